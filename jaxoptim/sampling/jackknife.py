"""Standard errors of statistics of several chains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A number and its standard error.

    Attributes:
        value: the number.
        error: its standard error, by jackknife over chains; NaN of a single chain.
    """

    value: float
    error: float


def jackknife(of: Callable[..., float], *chains: np.ndarray) -> Estimate:
    """A function of some chains, of one run or of several, and its standard error from all but each of them."""
    count = len(chains[0])
    if count == 1:
        return Estimate(of(*chains), math.nan)
    others = np.array([of(*(np.delete(run, chain, 0) for run in chains)) for chain in range(count)])
    return Estimate(of(*chains), float(jackknife_error(others)))


def jackknife_error(others: Any) -> Any:
    r"""The standard error of a statistic, by jackknife over chains.

    .. math::
        \sqrt{\tfrac{C - 1}{C} \sum_c (s_c - \bar s)^2}

    Args:
        others: the values :math:`s_c` on all chains but each of them, an array of NumPy or JAX whose first axis runs
            over the C chains.

    Returns:
        An array of the other axes; NaN of a single chain.

    References:
        Efron, Stein, The jackknife estimate of variance, Annals of Statistics 1981.
    """
    count = len(others)
    if count == 1:
        return others[0] * math.nan
    return (((others - others.mean(0)) ** 2).sum(0) * ((count - 1) / count)) ** 0.5
