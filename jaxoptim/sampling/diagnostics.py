"""Diagnostics of draws, by numpyro: effective sample size, R-hat, standard error."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from jaxoptim.interop.numpyro import required


def is_available() -> bool:
    """Whether numpyro is installed."""
    return importlib.util.find_spec("numpyro") is not None


def effective_sample_size(trace: Any) -> np.ndarray:
    """Estimate the number of independent draws that a trace is worth, by ``numpyro.diagnostics``.

    Args:
        trace: ``(chains, draws, ...)``, finite, at least two draws.

    Returns:
        Of the shape ``(...)``, float64.

    Raises:
        ``ValueError`` for fewer axes or draws, or for draws that are not finite; ``ImportError`` without numpyro.

    References:
        Geyer, Practical Markov chain Monte Carlo, Statistical Science 1992. Gelman et al., Bayesian data analysis,
        2013, section 11.5.

    Examples:
        >>> import numpy as np
        >>> from jaxoptim.sampling import effective_sample_size
        >>> trace = np.random.default_rng(0).normal(size=(4, 500))
        >>> 1500 < float(effective_sample_size(trace)) < 3000
        True
    """
    required()
    from numpyro import diagnostics

    with np.errstate(invalid="ignore", divide="ignore"):  # NaN for a trace that never moves
        return np.asarray(diagnostics.effective_sample_size(_checked(trace, "effective_sample_size")))


def rhat(trace: Any) -> np.ndarray:
    r"""The split Gelman-Rubin statistic :math:`\hat R`, by ``numpyro.diagnostics``: near 1 where chains agree.

    Args:
        trace: ``(chains, draws, ...)``, finite, at least four draws.

    Returns:
        Of the shape ``(...)``, float64.

    Raises:
        As :func:`effective_sample_size`.

    References:
        Gelman et al., Bayesian data analysis, 2013, section 11.4.

    Examples:
        >>> import numpy as np
        >>> from jaxoptim.sampling import rhat
        >>> trace = np.random.default_rng(0).normal(size=(4, 500))
        >>> abs(float(rhat(trace)) - 1) < 0.01
        True
    """
    required()
    from numpyro import diagnostics

    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(diagnostics.split_gelman_rubin(_checked(trace, "rhat", 4)))


def mcse(trace: Any) -> np.ndarray:
    r"""The Monte-Carlo standard error of the mean of all draws, :math:`s/\sqrt{\mathrm{ESS}}`.

    Args:
        trace: ``(chains, draws, ...)``, finite, at least two draws.

    Returns:
        Of the shape ``(...)``, float64.

    Raises:
        As :func:`effective_sample_size`.

    Examples:
        >>> import numpy as np
        >>> from jaxoptim.sampling import mcse
        >>> trace = np.random.default_rng(0).normal(size=(4, 2500))
        >>> 0.008 < float(mcse(trace)) < 0.012
        True
    """
    trace = _checked(trace, "mcse")
    spread = trace.std((0, 1), ddof=1)
    # A trace that never moves is known exactly, and has no effective sample size.
    ramp = np.arange(trace.shape[1]).reshape(1, -1, *[1] * spread.ndim)
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN where the draws are too few for an effective size
        return spread / np.sqrt(effective_sample_size(np.where(spread > 0, trace, ramp)))


def _checked(trace: Any, what: str, least: int = 2) -> np.ndarray:
    trace = np.asarray(trace, np.float64)
    if trace.ndim < 2 or trace.shape[1] < least:
        raise ValueError(f"{what} takes (chains, draws, ...) with at least {least} draws, but got shape {trace.shape}.")
    if not np.isfinite(trace).all():
        raise ValueError(f"{what} takes finite draws. Leave out the chains that have diverged.")
    return trace
