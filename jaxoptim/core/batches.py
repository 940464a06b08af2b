"""Minibatches drawn on the device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxoptim.core import trees
from jaxoptim.core.noise import fold_in, words
from jaxoptim.core.shown import shown


def size_of(data: Any, what: str = "data") -> int:
    """Count the data.

    Args:
        data: a pytree of arrays, whose first axes run over the data.
        what: the name of the data in messages.

    Returns:
        The length of the first axes.

    Raises:
        ``ValueError`` for no arrays, for an array without axes, and for first axes of different lengths.

    Examples:
        >>> import jax.numpy as jnp
        >>> size_of((jnp.zeros((7, 3)), jnp.zeros(7)))
        7
    """
    sizes = {name: jnp.shape(x)[0] if jnp.ndim(x) else None for name, x in zip(*_named(data), strict=True)}
    if not sizes:
        raise ValueError(
            f"{what} has no arrays. Give a pytree of arrays whose first axes run over the data, or leave it out."
        )
    if None in sizes.values() or len(set(sizes.values())) > 1:
        given = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(f"The first axes of {what} must have one length, but they have {given}.")
    return next(iter(sizes.values()))  # type: ignore[return-value]


def check_batch_size(batch_size: Any, data: Any) -> None:
    """Raise for a batch that cannot be taken from the data."""
    if batch_size is None:
        return
    if data is None:
        raise ValueError(f"batch_size is {batch_size}, but there are no data. Give data, or batch_size=None.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= size_of(data):
        raise ValueError(
            f"Invalid batch_size: {shown(batch_size)}. It is an int from 1 to the number of data, {size_of(data)}, or "
            "None for all data in every step."
        )


def in_batches(data: Any, batch_size: int | None) -> tuple[Any, Any, tuple[int, int]]:
    """Split the data into whole batches along a new first axis and a remainder; also return the sizes of both."""
    n = size_of(data)
    size = batch_size or n
    whole = n // size * size
    batches = jax.tree.map(lambda x: x[:whole].reshape(n // size, size, *x.shape[1:]), data)
    return batches, jax.tree.map(lambda x: x[whole:], data), (size, n - whole)


def batch_at(step: Any, key: jax.Array, data: Any, batch_size: int | None) -> Any:
    """Return the minibatch of a step.

    The data are shuffled anew in every epoch, and each epoch takes as many whole batches as there are: no datum
    is seen twice in one epoch, and the remainder that is left out is another one each time.
    """
    if batch_size is None:
        return data
    count = size_of(data)
    epoch, batch = jnp.divmod(step, count // batch_size)
    places = jnp.arange(batch_size, dtype=jnp.uint32) + jnp.asarray(batch * batch_size, jnp.uint32)
    chosen = shuffled(places, count, fold_in(key, epoch))
    return jax.tree.map(lambda x: x.at[chosen].get(mode="promise_in_bounds"), data)


def shuffled(places: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """Map places below ``count`` to their places in a random permutation that the key determines.

    It is a permutation of the next power of two, in rounds that can each be undone (an odd factor, a summand, a shift),
    walked along until it is back among the places there are. So no order has to be sorted, or kept.

    Args:
        places: uint32, below ``count``.
        count: the number of places.
        key: one typed key.

    Returns:
        As many places, all different.

    References:
        Black, Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002 (walking along cycles).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> sorted(shuffled(jnp.arange(7, dtype=jnp.uint32), 7, jax.random.key(0)).tolist())
        [0, 1, 2, 3, 4, 5, 6]
    """
    bits = max(count - 1, 1).bit_length()
    mask, shift = np.uint32(2**bits - 1), (bits + 1) // 2
    factors, summands = words(key, 2 * _ROUNDS).reshape(2, _ROUNDS)

    def permuted(x: jax.Array) -> jax.Array:
        for factor, summand in zip(factors | 1, summands, strict=True):
            x = (x * factor + summand) & mask
            x = x ^ (x >> shift)
        return x

    return lax.while_loop(
        lambda x: jnp.any(x >= count), lambda x: jnp.where(x >= count, permuted(x), x), permuted(places)
    )


_ROUNDS = 6


def _named(data: Any) -> tuple[list[str], list[Any]]:
    return trees.names(data), jax.tree.leaves(data, is_leaf=trees.is_leaf)
