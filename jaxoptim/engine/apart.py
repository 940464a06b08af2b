"""An update that is not compiled into one with the evaluation of the loss before it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

SMALL = 2**16
"""Of values of so many bytes a copy costs less than to wait for the loss."""


@functools.cache
def true() -> jax.Array:
    """Return the array True, which a program does not know to be."""
    return jnp.array(True)


def apart(
    move: Callable[..., Any], always: jax.Array, loss: jax.Array, leaves: Any, grads: Any, taken: jax.Array
) -> tuple[Any, jax.Array]:
    """Make an update after an evaluation, to the last bit as in a loop that is written out.

    There the two are programs of their own. Here the compiler would fuse them, and round otherwise; it does not fuse
    across a condition that it cannot foresee. (An ``optimization_barrier`` it drops on CPUs.)

    Args:
        move: makes the update; returns the new leaves first.
        always: the value True.
        loss: the loss. The compiler keeps a copy of the old values for one that need not be ready when the update
            begins.
        leaves: what is replaced by the update.
        grads: the gradients.
        taken: whether the step counts.

    Returns:
        What ``move`` returns of the last three; the loss.
    """
    move = jax.jit(move)  # traced once, for its form and for the condition
    form = jax.eval_shape(move, leaves, grads, taken)
    is_large = sum(x.nbytes for x in jax.tree.leaves(leaves)) > SMALL
    waiting = [loss] if is_large else []

    def update(leaves: Any, grads: Any, taken: Any, *waiting: jax.Array) -> Any:
        return move(leaves, grads, taken), list(waiting)

    def never(leaves: Any, grads: Any, taken: Any, *waiting: jax.Array) -> Any:
        new, *others = form
        olds = jax.tree.leaves(leaves)
        if [(x.shape, x.dtype) for x in olds] == [(x.shape, x.dtype) for x in jax.tree.leaves(new)]:
            new = jax.tree.unflatten(jax.tree.structure(new), olds)  # they can be replaced in place
        else:
            new = jax.tree.map(_zeros, new)
        return (new, *jax.tree.map(_zeros, others)), [_zeros(x) for x in waiting]

    moved, waiting = jax.lax.cond(always, update, never, leaves, grads, taken, *waiting)
    return moved, waiting[0] if is_large else loss


def _zeros(x: Any) -> jax.Array:
    return jax.lax.full(x.shape, 0, x.dtype)
