"""Runs that stop at a given error: the numbers of draws at which they check it, and its estimate."""

from __future__ import annotations

import math

import numpy as np

from jaxoptim.sampling import diagnostics

_FIRST_LOOK = 64


def is_look(draws: int) -> bool:
    """Return whether a run checks its error at so many draws."""
    return draws == next_look(draws - 1)


def next_look(draws: int) -> int:
    """Return the next number of draws at which a run checks its error: 64, and then a quarter more each time.

    It does not depend on the run, so that one that is taken up again, or goes on, looks where it would have.
    """
    look = _FIRST_LOOK
    while look <= draws:
        look += -(-look // 4)
    return look


def largest_mcse(loss: np.ndarray) -> float:
    """Return the largest standard error of the mean loss of any setting, from losses ``(settings, chains, draws)``.

    Chains that have diverged are left out; without others the error is infinite, as where it cannot be told.
    """

    def of_setting(trace: np.ndarray) -> float:
        good = trace[np.isfinite(trace).all(-1)]
        error = float(diagnostics.mcse(good)) if len(good) else math.inf
        return error if error >= 0 else math.inf

    return max(map(of_setting, loss))
