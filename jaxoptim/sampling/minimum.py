"""The loss over all data, and whether parameters are near one of its minima."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxoptim.core import Rule, trees
from jaxoptim.core.batches import in_batches, size_of
from jaxoptim.core.leaf import by_leaf
from jaxoptim.core.numerics import computing_dtype, is_complex, view_as_complex, view_as_real
from jaxoptim.rules._langevin import has_box
from jaxoptim.sampling.target import Given, Problem, Target

_PRIOR = ("weight_decay", "localization", "optimize_over", "bounding_box_size")
"""The options of a sampler that shape its potential besides the loss."""


def full_loss(problem: Problem, params: Any, batch_size: int | None) -> float:
    """The mean loss over all data, or over the batches of a stream that stand for them."""
    return float(_mean(loss_of_all, problem, params, batch_size))


def full_gradient(problem: Problem, batch_size: int | None) -> Any:
    """The gradient of :func:`full_loss` at the parameters of the problem."""
    return _mean(loss_and_gradient, problem, problem.arrays, batch_size)[1]


def _mean(function: Callable[..., Any], problem: Problem, params: Any, batch_size: int | None) -> Any:
    """Return the mean over all data, or the batches that stand for them, with one batch on the device at a time."""
    found, count = None, 0
    for given in problem.wholes():
        here = function(problem.target, params, given, batch_size)
        found, count = here if found is None else jax.tree.map(jnp.add, found, here), count + 1
    return jax.tree.map(lambda x: x / count, found)


@functools.partial(jax.jit, static_argnames=("target", "batch_size"))
def loss_of_all(target: Target, params: Any, given: Given, batch_size: int | None) -> jax.Array:
    """The mean loss over all data, batch by batch, each weighted by its size."""
    if given.data is None:
        return target.loss(params, given.rest, None)
    batches, remainder, sizes = in_batches(given.data, batch_size)
    total = jnp.sum(lax.map(lambda batch: target.loss(params, given.rest, batch), batches)) * sizes[0]
    if sizes[1]:
        total += target.loss(params, given.rest, remainder) * sizes[1]
    return total / size_of(given.data)


@functools.partial(jax.jit, static_argnames=("target", "batch_size"))
def loss_and_gradient(target: Target, params: Any, given: Given, batch_size: int | None) -> tuple[jax.Array, Any]:
    """:func:`loss_of_all` and its gradient, one batch in memory at a time."""

    def of_batch(batch: Any) -> tuple[jax.Array, Any]:
        loss, grads = jax.value_and_grad(lambda params: target.loss(params, given.rest, batch))(params)
        # What JAX calls the gradient of complex parameters is its conjugate.
        return loss, jax.tree.map(lambda g: jnp.conj(g).astype(computing_dtype(g.dtype)), grads)

    if given.data is None:
        return of_batch(None)
    batches, remainder, sizes = in_batches(given.data, batch_size)

    def added(total: Any, batch: Any, size: int) -> Any:
        return jax.tree.map(lambda x, g: x + g * size, total, of_batch(batch))

    like = jax.eval_shape(of_batch, jax.tree.map(lambda x: x[0], batches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    total, _ = lax.scan(lambda total, batch: (added(total, batch, sizes[0]), None), zeros, batches)
    if sizes[1]:
        total = added(total, remainder, sizes[1])
    return jax.tree.map(lambda x: x / size_of(given.data), total)


def descent(
    problem: Problem, rules: Any, index: int, nbeta: float, gradient: Any, wanted: float, batch_size: int | None
) -> tuple[float, float]:
    r"""Return the fall of the potential on a step down its gradient that was meant to lower it by ``wanted``.

    The step is the one at which the gradient alone predicts a fall of twice ``wanted``. Along it a quadratic potential
    falls by ``wanted`` or more just where its minimum on this line is as far below. Whatever the potential, a fall that
    is found is one that exists.

    Args:
        problem: the loss, and the parameters to begin from.
        rules: the settings of the sampler, stacked; None for a transformation, whose potential is that of the loss.
        index: the number of the setting.
        nbeta: the inverse temperature.
        gradient: of the loss over all data, at the parameters.
        wanted: a number > 0.
        batch_size: how many data the loss gets at once.

    Returns:
        The fall, and the norm of the gradient of the loss, as far as the parameters move.
    """
    params = problem.arrays
    shifted, rise, norm = _stepped(rules, index, nbeta, params, gradient, wanted)
    before, after = (full_loss(problem, at, batch_size) for at in (params, shifted))
    return nbeta * (before - after) - float(rise), float(norm)


@jax.jit
def _stepped(rules: Any, index: Any, nbeta: Any, params: Any, gradient: Any, wanted: Any) -> tuple[Any, Any, Any]:
    """The parameters after the step, the rise of the prior's part of the potential, and the norm of the gradient."""
    leaves, treedef = jax.tree.flatten(params, is_leaf=trees.is_leaf)
    grads = jax.tree.leaves(gradient, is_leaf=trees.is_leaf)
    rule = jax.tree.map(lambda x: x[index], rules)
    has_prior = isinstance(rule, Rule) and rule.specs.keys() >= set(_PRIOR)
    per_leaf = by_leaf(rule.at(0), params, "params") if has_prior else [None] * len(leaves)
    found: list[Any] = []
    squares = norm = jnp.zeros(())
    for one, param, grad in zip(per_leaf, leaves, grads, strict=True):
        if param is None:
            found.append(None)
            continue
        wide = param.astype(computing_dtype(param.dtype))
        decay, localization, mask, size = (0, 0, None, None) if one is None else (getattr(one, x) for x in _PRIOR)
        center = getattr(one, "center", None)  # by default the start, where the force of localization is zero
        mask = 1 if mask is None else jnp.asarray(mask).astype(wide.real.dtype)
        size = size if one is not None and has_box(one) else None
        away = 0 if center is None else wide - jnp.asarray(center, wide.dtype)
        down = mask * (nbeta * grad + decay * wide + localization * away)
        found.append((wide, down, decay, localization, mask, size, away))
        squares, norm = squares + jnp.sum(jnp.abs(down) ** 2), norm + jnp.sum(jnp.abs(mask * grad) ** 2)
    length = jnp.where(squares > 0, 2 * wanted / jnp.where(squares > 0, squares, 1), 0)
    shifted: list[Any] = []
    rise = jnp.zeros(())
    for cell, leaf in zip(found, leaves, strict=True):
        if cell is None:
            shifted.append(None)
            continue
        wide, down, decay, localization, mask, size, away = cell
        step = -(length * down).astype(wide.dtype)
        if size is not None:  # a box is of real numbers, complex ones are pairs
            inside = jnp.clip(view_as_real(step), -size, size)
            step = view_as_complex(inside) if is_complex(step) else inside
        rise += jnp.sum(mask * decay / 2 * (jnp.abs(wide + step) ** 2 - jnp.abs(wide) ** 2))
        rise += jnp.sum(localization / 2 * (jnp.abs(away + step) ** 2 - jnp.abs(away) ** 2))
        shifted.append((wide + step).astype(leaf.dtype))
    return jax.tree.unflatten(treedef, shifted), rise, jnp.sqrt(norm)
