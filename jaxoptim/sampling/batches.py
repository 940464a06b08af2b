"""Minibatches drawn on the device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxoptim.core import trees
from jaxoptim.core.noise import fold_in


def size_of(data: Any) -> int:
    """How many data there are.

    Args:
        data: a pytree of arrays, whose first axes run over the data.

    Returns:
        The length of the first axes.

    Errors:
        ``ValueError`` for no arrays, for an array without axes, and for first axes of different lengths.

    Example:
        >>> import jax.numpy as jnp
        >>> size_of((jnp.zeros((7, 3)), jnp.zeros(7)))
        7
    """
    sizes = {name: jnp.shape(x)[0] if jnp.ndim(x) else None for name, x in zip(*_named(data), strict=True)}
    if not sizes:
        raise ValueError("data has no arrays. Give a pytree of arrays whose first axes run over the data, or None.")
    if None in sizes.values() or len(set(sizes.values())) > 1:
        given = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(f"The first axes of data must have one length, but they have {given}.")
    return next(iter(sizes.values()))  # type: ignore[return-value]


def check_batch_size(batch_size: Any, data: Any) -> None:
    """Raise for a batch that cannot be taken from the data."""
    if batch_size is None:
        return
    if data is None:
        raise ValueError(f"batch_size is {batch_size}, but there are no data. Give data, or batch_size=None.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= size_of(data):
        raise ValueError(
            f"Invalid batch_size: {batch_size!r}. It is an int from 1 to the number of data, {size_of(data)}, or None "
            "for all data in every step."
        )


def first_order(data: Any, batch_size: int | None) -> jax.Array | None:
    """The order of the data before the first step; None where no batches are drawn."""
    return None if batch_size is None else jnp.arange(size_of(data), dtype=jnp.int32)


def batch_at(step: Any, key: jax.Array, order: jax.Array | None, data: Any, batch_size: int | None) -> tuple[Any, Any]:
    """The batch of a step, and the order of the data that it is from.

    The data are shuffled anew in every epoch, and each epoch takes as many whole batches as there are: no datum
    is seen twice in one, and what is left over is another part each time.
    """
    if order is None or batch_size is None:
        return data, order
    size, per_epoch = len(order), len(order) // batch_size
    epoch, place = step // per_epoch, step % per_epoch

    def shuffled(order: jax.Array) -> jax.Array:
        # Two data draw one number so rarely that their order hardly matters.
        return jnp.argsort(jax.random.bits(fold_in(key, epoch), (size,))).astype(order.dtype)

    order = lax.cond(place == 0, shuffled, lambda order: order, order)
    chosen = lax.dynamic_slice_in_dim(order, place * batch_size, batch_size)
    return jax.tree.map(lambda x: x[chosen], data), order


def _named(data: Any) -> tuple[list[str], list[Any]]:
    return trees.names(data), jax.tree.leaves(data, is_leaf=trees.is_leaf)
