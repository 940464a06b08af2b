"""The batch statistics of averaged parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.averaging import floating
from jaxoptim.core import trees
from jaxoptim.core.numerics import computing_dtype
from jaxoptim.optim.swa_utils.averaged_model import AveragedModel


def update_bn(
    loader: Iterable[Any], averaged: AveragedModel, apply_fn: Callable[[Any, Any], Any], batch_stats: Any = None
) -> Any:
    r"""Compute the batch statistics of the averaged parameters: the mean over all batches.

    .. math::
        s = \frac{1}{N} \sum_{i=1}^{N} s_i

    A layer's update is :math:`s \leftarrow m s + (1 - m) s_i`, with a momentum :math:`m` that is found by giving it
    a huge :math:`s`. Whether the variance is the unbiased one (as in torch) or not (as in flax) is up to the layer.

    Args:
        loader: batches; of a list or tuple the first element is taken, as in torch.
        averaged: the average, of variables with a collection ``"batch_stats"``, or of parameters only.
        apply_fn: ``apply_fn(variables, batch)`` runs the model in training mode and returns ``(output, updates)``,
            where ``updates["batch_stats"]`` are the new statistics: flax's ``apply`` with
            ``mutable=["batch_stats"]``. ``variables`` is ``{"params": ..., "batch_stats": ...}``, with whatever
            other collections there are. It is compiled; give the same function each time.
        batch_stats: the statistics of a model whose average is of parameters only (default None), for their shapes.

    Returns:
        The new statistics, which are also put into ``averaged.module``, if it has a place for them; None for a
        model without batch statistics.

    Raises:
        ``ValueError`` for a loader without batches and for layers whose statistics are not such averages.

    References:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> def apply_fn(variables, x):
        ...     mean = 0.9 * variables["batch_stats"]["mean"] + 0.1 * x.mean()
        ...     return x - x.mean(), {"batch_stats": {"mean": mean}}
        >>> model = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.zeros(())}}
        >>> averaged = optim.swa_utils.AveragedModel(model)
        >>> stats = optim.swa_utils.update_bn([jnp.full(3, 1.0), jnp.full(3, 3.0)], averaged, apply_fn)
        >>> round(float(averaged.module["batch_stats"]["mean"]), 6)
        2.0
    """
    module = averaged.module
    has_place = isinstance(module, Mapping) and "batch_stats" in module
    variables = dict(module) if has_place else {"params": module, "batch_stats": batch_stats}
    old, treedef = jax.tree.flatten(variables["batch_stats"])
    if not old:
        return None
    total, number, first = [jnp.zeros_like(x) for x in old], 0, None
    for item in loader:
        batch = item[0] if isinstance(item, list | tuple) else item
        first = batch if number == 0 else first
        total, number = _add_statistics(apply_fn, variables, total, batch), number + 1
    if number == 0:
        raise ValueError("update_bn was given a loader without batches. Give one that can be run through.")
    new = [
        _divided(x, number * (1 - _momentum(probe, probed))) if floating(x) else x
        for x, probe, probed in zip(total, _probes(old), _probed(apply_fn, variables, first), strict=True)
    ]
    if has_place:
        averaged.put("batch_stats", new)
    return jax.tree.unflatten(treedef, new)


def _statistics(apply_fn: Callable[[Any, Any], Any], variables: Any, values: list[Any], batch: Any) -> list[Any]:
    """Return the statistics, as a list, after a batch that found these values there."""
    old = variables["batch_stats"]
    given = jax.tree.unflatten(jax.tree.structure(old), values)
    updates = apply_fn({**variables, "batch_stats": given}, batch)[1]["batch_stats"]
    by_name = dict(zip(trees.array_names(updates), jax.tree.leaves(updates), strict=True))
    return [by_name[name].astype(x.dtype) for name, x in zip(trees.array_names(old), values, strict=True)]


@functools.partial(jax.jit, static_argnames="apply_fn", donate_argnames="total")
def _add_statistics(apply_fn: Callable[[Any, Any], Any], variables: Any, total: list[Any], batch: Any) -> list[Any]:
    """Return the sum of statistics with those of one more batch."""
    given = [jnp.zeros_like(x) if floating(x) else x for x in total]  # integers count on
    new = _statistics(apply_fn, variables, given, batch)
    return [x + y if floating(x) else y for x, y in zip(total, new, strict=True)]


def _divided(x: jax.Array, divisor: float) -> jax.Array:
    return (x.astype(computing_dtype(x.dtype)) / divisor).astype(x.dtype)


def _probes(old: list[Any]) -> list[float]:
    """Return, for each running statistic, a value beside which that of a batch vanishes, also after a tiny momentum."""

    def probe(dtype: Any) -> float:
        limit = int(jnp.finfo(dtype).maxexp)
        return 2.0 ** max(min(100, limit - 2), limit * 25 // 32)

    return [probe(x.dtype) if floating(x) else 0.0 for x in old]


@functools.partial(jax.jit, static_argnames="apply_fn")
def _probed(apply_fn: Callable[[Any, Any], Any], variables: Any, batch: Any) -> list[Any]:
    """Return the statistics after a batch that began at the probes, less those that began at zero."""
    old = jax.tree.leaves(variables["batch_stats"])
    given = [jnp.full_like(x, probe) for x, probe in zip(old, _probes(old), strict=True)]
    high = _statistics(apply_fn, variables, given, batch)
    low = _statistics(apply_fn, variables, [jnp.zeros_like(x) for x in old], batch)
    return [x - y for x, y in zip(high, low, strict=True)]


_NOTHING = 2.0**-60
"""A momentum below which 1 - momentum is 1, and the statistics of a batch show beside what it leaves of a probe."""


def _momentum(probe: float, probed: jax.Array) -> float:
    """Return the momentum that has made ``probed`` of the probe: the shortest decimal that equals it in its dtype."""
    found = np.unique(np.asarray(probed) / np.asarray(probe, probed.dtype))
    if np.abs(found).max() < _NOTHING:
        return 0.0
    if len(found) != 1 or not 0 <= float(found[0]) < 1:
        raise ValueError(
            "update_bn needs statistics that follow new = momentum * old + (1 - momentum) * batch with a momentum in "
            f"[0, 1), but these have {found} for it."
        )
    decimals = (float(f"{float(found[0]):.{digits}g}") for digits in range(1, 18))
    return next(x for x in decimals if np.asarray(x, probed.dtype) == found[0])
