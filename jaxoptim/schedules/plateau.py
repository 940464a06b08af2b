"""Reduce the learning rate when a metric stops improving: a state machine instead of a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxoptim.core import is_known
from jaxoptim.schedules import arguments as of
from jaxoptim.schedules.arithmetic import where


class PlateauState(NamedTuple):
    """The state of :func:`reduce_lr_on_plateau`.

    Attributes:
        lr: the learning rate.
        best: the best metric so far.
        num_bad_epochs: the number of steps since then.
        cooldown_counter: the number of steps after a reduction that are still to be ignored.
    """

    lr: jax.Array
    best: jax.Array
    num_bad_epochs: jax.Array
    cooldown_counter: jax.Array


class Plateau(NamedTuple):
    """A pair of pure functions, which :func:`reduce_lr_on_plateau` returns.

    Attributes:
        init: ``init(lr) -> state``.
        step: ``step(state, metric) -> state``, to be called once for each value of the metric.
    """

    init: Callable[[Any], PlateauState]
    step: Callable[[PlateauState, Any], PlateauState]


def worst(mode: str) -> float:
    """Return the value that every metric is better than."""
    return math.inf if mode == "min" else -math.inf


def is_better(metric: Any, best: Any, mode: str, threshold: Any, threshold_mode: str) -> Any:
    """Whether a metric is better than the best so far by more than the threshold."""
    if mode == "min":
        return metric < (best * (1.0 - threshold) if threshold_mode == "rel" else best - threshold)
    return metric > (best * (threshold + 1.0) if threshold_mode == "rel" else best + threshold)


def count(
    better: Any, num_bad_epochs: Any, cooldown_counter: Any, patience: Any, cooldown: Any
) -> tuple[Any, Any, Any]:
    """Return the two counters after one more metric, and whether the rate is to be reduced."""
    bad = where(better, 0, num_bad_epochs + 1)
    cooling = cooldown_counter > 0
    left = where(cooling, cooldown_counter - 1, cooldown_counter)
    bad = where(cooling, 0, bad)
    reduce = bad > patience
    return where(reduce, 0, bad), where(reduce, cooldown, left), reduce


def reduced(lr: Any, factor: Any, min_lr: Any, eps: Any) -> Any:
    """Return the rate after a reduction; a reduction of at most ``eps`` is not made."""
    new = lr * factor
    new = where(min_lr > new, min_lr, new)
    return where(lr - new > eps, new, lr)


def check_plateau(mode: str, factor: Any, threshold_mode: str) -> None:
    """Raise for options that torch refuses."""
    if is_known(factor) and factor >= 1.0:
        raise ValueError(f"Factor should be < 1.0. Got factor={factor}.")
    if mode not in ("min", "max"):
        raise ValueError(f"mode {mode} is unknown! It is 'min' or 'max'.")
    if threshold_mode not in ("rel", "abs"):
        raise ValueError(f"threshold mode {threshold_mode} is unknown! It is 'rel' or 'abs'.")


def reduce_lr_on_plateau(
    mode: Literal["min", "max"] = "min",
    factor: Any = 0.1,
    patience: Any = 10,
    threshold: Any = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: Any = 0,
    min_lr: Any = 0.0,
    eps: Any = 1e-8,
) -> Plateau:
    r"""Reduce the learning rate when a metric has stopped improving: ``ReduceLROnPlateau``, for use in ``lax.scan``.

    A metric :math:`x` is better than the best so far, :math:`b`, if :math:`x < b (1 - \tau)` ("min", "rel"),
    :math:`x < b - \tau` ("min", "abs"), :math:`x > b (1 + \tau)` ("max", "rel") or :math:`x > b + \tau` ("max",
    "abs"). After more than ``patience`` metrics that are not better,

    .. math::
        \eta \leftarrow \max(\eta f, \eta_{\min}) .

    As in torch, the relative threshold of a negative metric points the other way, and NaN is never better.

    Args:
        mode: whether a smaller ("min", default) or a larger ("max") metric is better.
        factor: :math:`f`, a number < 1 (default 0.1); may be traced, as all numbers here.
        patience: the number of metrics in a row that need not be better, a whole number (default 10).
        threshold: :math:`\tau`, a number (default 1e-4).
        threshold_mode: "rel" (default) or "abs".
        cooldown: the number of metrics after a reduction that are ignored, a whole number (default 0).
        min_lr: :math:`\eta_{\min}`, a number (default 0).
        eps: the smallest reduction that is made, a number (default 1e-8).

    Returns:
        A :class:`Plateau`: ``init(lr) -> state``, ``step(state, metric) -> state``; ``state.lr`` is the rate, a
        float32 scalar (float64 if JAX computes in it). ``lr`` and ``metric`` may be traced; ``vmap`` over both
        makes many machines.

    Raises:
        ``ValueError`` for an unknown mode or a factor >= 1, ``TypeError`` for what is not a number.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import schedules
        >>> plateau = schedules.reduce_lr_on_plateau(factor=0.5, patience=1)
        >>> def body(state, metric):
        ...     state = plateau.step(state, metric)
        ...     return state, state.lr
        >>> metrics = jnp.array([1.0, 1.0, 1.0, 1.0, 1.0])
        >>> state, rates = jax.lax.scan(body, plateau.init(0.5), metrics)
        >>> rates.tolist()
        [0.5, 0.5, 0.25, 0.25, 0.125]
    """
    check_plateau(mode, factor, threshold_mode)

    def init(lr: Any) -> PlateauState:
        dtype = jnp.result_type(float)
        zero = jnp.zeros((), int)
        return PlateauState(jnp.asarray(of.rate("lr", lr), dtype), jnp.asarray(worst(mode), dtype), zero, zero)

    def step(state: PlateauState, metric: Any) -> PlateauState:
        metric = jnp.asarray(metric, state.best.dtype)
        better = is_better(metric, state.best, mode, threshold, threshold_mode)
        bad, left, reduce = count(better, state.num_bad_epochs, state.cooldown_counter, patience, cooldown)
        lr = where(reduce, reduced(state.lr, factor, jnp.asarray(min_lr, state.lr.dtype), eps), state.lr)
        new = PlateauState(lr, where(better, metric, state.best), bad, left)
        return jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, state)

    return Plateau(init, step)
