"""Compile an update apart from the evaluation of the loss before it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_SMALL = 2**16  # bytes


@functools.cache
def true() -> jax.Array:
    """Return the array True in a form that the compiler cannot fold as a constant."""
    return jnp.array(True)


def apart(move: Callable[..., Any], always: jax.Array, leaves: Any, loss: jax.Array, grads: Any) -> Any:
    """Make an update after an evaluation, with the same bits as in a loop that calls one program for each.

    There the two are programs of their own. Here the compiler would fuse them, and round otherwise; it does not fuse
    across a condition that it cannot foresee. (An ``optimization_barrier`` it drops on CPUs.) All that is done with
    gradients is behind the condition, their gathering too.

    Args:
        move: makes the update; returns the new leaves first.
        always: the value True.
        leaves: the arrays that the update replaces.
        loss: the loss.
        grads: the gradients.

    Returns:
        What ``move`` returns of the last three.
    """
    move = jax.jit(move)  # traced once, for its form and for the condition
    form = jax.eval_shape(move, leaves, loss, grads)

    def never(leaves: Any, loss: Any, grads: Any) -> Any:
        """Return the arrays themselves where shapes allow them to be replaced in place; else zeros."""
        olds = iter(jax.tree.leaves(leaves))
        return jax.tree.map(lambda new: _like(new, next(olds, None)), form)

    return jax.lax.cond(always, move, never, leaves, loss, grads)


def waits(leaves: Any) -> bool:
    """Return whether the loss has to be a result of the update, which then waits for it.

    For a loss that need not be ready when the update begins, the compiler keeps a copy of the old values. Of small ones
    it costs less than to hand the loss over.
    """
    return sum(x.nbytes for x in jax.tree.leaves(leaves)) > _SMALL


def _like(new: Any, old: Any) -> jax.Array:
    is_same = old is not None and (old.shape, old.dtype) == (new.shape, new.dtype)
    return old if is_same else jax.lax.full(new.shape, 0, new.dtype)
