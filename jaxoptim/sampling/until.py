"""Runs that stop themselves: at how many draws they look at their error, and what it is there."""

from __future__ import annotations

import math

import numpy as np

from jaxoptim.sampling import diagnostics

_FIRST_LOOK = 64


def is_look(draws: int) -> bool:
    """Whether a run looks at its error where it has so many draws."""
    return draws == next_look(draws - 1)


def next_look(draws: int) -> int:
    """The number of draws at which a run with so many looks next: 64, and then each time a quarter more.

    It does not depend on the run, so that one that is taken up again, or goes on, looks where it would have.
    """
    look = _FIRST_LOOK
    while look <= draws:
        look += -(-look // 4)
    return look


def largest_mcse(loss: np.ndarray) -> float:
    """The largest standard error of the mean losses of settings, ``(settings, chains, draws)``.

    Chains that have diverged are left out; without others the error is infinite, as where it cannot be told.
    """

    def of_setting(trace: np.ndarray) -> float:
        good = trace[np.isfinite(trace).all(-1)]
        error = float(diagnostics.mcse(good)) if len(good) else math.inf
        return error if error >= 0 else math.inf

    return max(map(of_setting, loss))
