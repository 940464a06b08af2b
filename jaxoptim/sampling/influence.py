"""Covariances of observables over a posterior: the influence between data, from their losses at the draws."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.sampling.jackknife import jackknife_error

KINDS, CHAINS = ("covariance", "correlation"), ("within", "pooled", "mean")
_BLOCK = 2**22
"""The number of products in one block, of all chains together."""


class Influence(NamedTuple):
    """Covariances or correlations of observables.

    Attributes:
        value: of each of ``x`` with each of ``y``.
        error: the standard error of each, by jackknife over chains; NaN of a single chain.
    """

    value: np.ndarray
    error: np.ndarray


def influence(x: Any, y: Any = None, *, kind: str = "covariance", chains: str = "within") -> Influence:
    r"""Covariances, or correlations, of observables over the draws: the kernel of Bayesian influence functions.

    .. math::
        \mathrm{Cov}(x_i, y_j) = \frac{1}{C (T - 1)} \sum_{c,t} (x_{cti} - \bar x_{ci})(y_{ctj} - \bar y_{cj})

    Of the losses of data, :math:`-\mathrm{Cov}(\ell_i, \ell_j)` is the Bayesian influence of datum i on the loss of
    datum j: how this changes when i gets more weight. It comes without that sign, so that its diagonal is positive.

    Args:
        x: ``(chains, draws, ...)``: anything observed at the draws, such as the trace of :class:`Losses`, logits or
            margins. Finite, at least two draws.
        y: the same, of the same chains and draws (default None: ``x``).
        kind: ``"covariance"`` or ``"correlation"`` (default ``"covariance"``). A correlation with an observable that
            does not move is NaN.
        chains: ``"within"``: deviations from the mean of each chain; ``"pooled"``: from that of all chains, so that
            what chains disagree about counts too (devinterp's ``"stack"``); ``"mean"``: of the mean over chains, draw
            by draw, which is smaller by the number of chains and for chains with common noise (default ``"within"``).

    Returns:
        :class:`Influence`, whose arrays have the axes of ``x`` behind the draws, and then those of ``y``.

    Raises:
        ``ValueError`` for traces of other shapes, numbers that are not finite, and an unknown ``kind`` or ``chains``.

    References:
        Kreer, Wu, Adam, Furman, Hoogland, Bayesian influence functions for Hessian-free data attribution, 2025.
        Adam, Furman, Hoogland, The loss kernel, 2025.

    Examples:
        >>> import numpy as np
        >>> from jaxoptim import sampling
        >>> weights = np.random.default_rng(0).normal(size=(4, 500, 2))
        >>> losses = weights @ np.array([[1.0, 1.0, 0.0], [0.0, 0.1, 1.0]])  # of three data, two of them alike
        >>> found = sampling.influence(losses, kind="correlation")
        >>> np.abs(found.value).round().tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    if kind not in KINDS:
        raise ValueError(f"Invalid kind: {kind!r}. It is one of {', '.join(map(repr, KINDS))}.")
    if chains not in CHAINS:
        raise ValueError(f"Invalid chains: {chains!r}. It is one of {', '.join(map(repr, CHAINS))}.")
    x = checked_trace("x", x)
    y = x if y is None else checked_trace("y", y)
    if x.shape[:2] != y.shape[:2]:
        raise ValueError(f"x and y must be of the same chains and draws, but have shapes {x.shape} and {y.shape}.")
    shape, (num_chains, draws) = x.shape[2:] + y.shape[2:], x.shape[:2]
    # Small deviations from large means would be lost in float32.
    x, y = ((of - of.mean((0, 1))).reshape(num_chains, draws, -1) for of in (x, y))
    rows = max(1, _BLOCK // (num_chains * max(y.shape[2], 1)))
    blocks = [_block(x[:, :, at : at + rows], y, kind, chains) for at in range(0, x.shape[2], rows)]
    value, error = (np.concatenate(parts).reshape(shape) for parts in zip(*jax.device_get(blocks), strict=True))
    return Influence(value, error)


def checked_trace(name: str, trace: Any, least: int = 2) -> np.ndarray:
    """Return a finite trace in float64 with at least so many axes; raise for anything else."""
    trace = np.asarray(trace, np.float64)
    if trace.ndim < least or trace.shape[1] < 2 or not trace.size:
        axes = "(chains, draws, ...)" if least == 2 else "(chains, draws, data)"
        raise ValueError(f"{name} is a trace {axes} of two draws at least, but has shape {trace.shape}.")
    if not np.isfinite(trace).all():
        raise ValueError(f"{name} has numbers that are not finite. Leave out the chains that have diverged.")
    return trace


@functools.partial(jax.jit, static_argnames=("kind", "chains"))
def _block(x: jax.Array, y: jax.Array, kind: str, chains: str) -> tuple[jax.Array, jax.Array]:
    """The statistic of some of ``x`` with all of ``y``, and its standard error."""
    value, others = _covariances(x, y, chains, functools.partial(jnp.einsum, "...tn,...tm->...nm"))
    if kind == "correlation":
        of_x, of_y = (_covariances(of, of, chains, lambda a, b: jnp.sum(a * b, -2)) for of in (x, y))
        value, others = (
            both / jnp.sqrt(a[..., :, None] * b[..., None, :])
            for both, a, b in zip((value, others), of_x, of_y, strict=True)
        )
    return value, jackknife_error(others)


def _covariances(
    x: jax.Array, y: jax.Array, chains: str, product: Callable[[jax.Array, jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Covariances over all chains, and over all but each of them.

    Args:
        x: ``(chains, draws, n)``.
        y: ``(chains, draws, m)``.
        chains: see :func:`influence`.
        product: the sum over draws of products of deviations.
    """
    count, draws = x.shape[:2]
    if chains == "pooled":
        sums, x_sum, y_sum = product(x, y), x.sum(1), y.sum(1)

        def pooled(sums: jax.Array, x_sum: jax.Array, y_sum: jax.Array, chains: int) -> jax.Array:
            size = chains * draws
            return (sums - product(x_sum[..., None, :], y_sum[..., None, :]) / size) / (size - 1)

        everything = sums.sum(0), x_sum.sum(0), y_sum.sum(0)
        without = everything[0] - sums, everything[1] - x_sum, everything[2] - y_sum
        return pooled(*everything, count), pooled(*without, max(count - 1, 1))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    if chains == "within":
        sums = product(x, y) / (draws - 1)
        return sums.mean(0), (sums.sum(0) - sums) / max(count - 1, 1)
    all_x, all_y = x.sum(0), y.sum(0)
    fewer = product(all_x - x, all_y - y) / (max(count - 1, 1) ** 2 * (draws - 1))
    return product(all_x, all_y) / (count**2 * (draws - 1)), fewer
