"""The choice of the setting of a grid at which an estimate depends least on the step size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxoptim.sampling.doubts import HIGHEST_RHAT, statistics


class Setting(NamedTuple):
    """A pair of a step size and a localization, with the results there.

    Attributes:
        lr: the step size.
        localization: the localization.
        mean: the estimate.
        std: the standard deviation between chains.
        diverged: the share of chains that have diverged.
        rhat: the split R-hat of the trace; NaN without numpyro, for fewer than two chains or four draws.
    """

    lr: float
    localization: float
    mean: float
    std: float
    diverged: float
    rhat: float


def rhats(trace: np.ndarray) -> np.ndarray:
    """R-hat of each setting, ``(lr, localization)``, NaN where it is not known.

    Args:
        trace: ``(lr, localization, chains, draws)``.
    """
    found = np.full(trace.shape[:2], np.nan)
    for at in np.ndindex(*found.shape):
        if trace.shape[2] > 1 and np.isfinite(trace[at]).all():
            found[at] = statistics(trace[at]).rhat
    return found


def usable(mean: np.ndarray, error: np.ndarray, diverged: np.ndarray, rhat: np.ndarray) -> np.ndarray:
    """Return a mask of usable settings: no chain has diverged, chains agree, the mean is above two errors."""
    with np.errstate(invalid="ignore"):
        return (diverged == 0) & (mean > 2 * error) & ~(rhat > HIGHEST_RHAT)


def flattest(lr: np.ndarray, mean: np.ndarray, error: np.ndarray, is_usable: np.ndarray) -> tuple[int, int]:
    r"""The setting with the smallest bound on :math:`|d \log\hat\lambda / d \log\epsilon|`.

    Of the differences to the next smaller and the next larger step size, as far as they are usable, the larger one
    counts, with two standard errors added, so that what is not known to be flat is not taken for it. Of equals it is
    one between two others, then the larger step. Settings that have none beside them come last, by relative error.
    """
    order = np.argsort(lr, kind="stable")
    costs = []
    for place, column in np.ndindex(*mean.shape):
        row = order[place]
        if not is_usable[row, column]:
            continue
        here, relative = float(mean[row, column]), float(error[row, column] / mean[row, column])
        slopes = []
        for other in (order[at] for at in (place - 1, place + 1) if 0 <= at < len(order)):
            if is_usable[other, column] and 0 < lr[other] != lr[row] > 0:
                errors = np.hypot(relative, error[other, column] / mean[other, column])
                difference = abs(np.log(here / mean[other, column])) + 2 * errors
                slopes.append(float(difference / abs(np.log(lr[row] / lr[other]))))
        bound = round(max(slopes), 9) if slopes else np.inf
        costs.append((bound, -len(slopes), 0.0 if slopes else relative, -lr[row], row, column))
    *_, row, column = min(costs)
    return int(row), int(column)
