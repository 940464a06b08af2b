"""Count sketches of the concatenation of several arrays, by a hash instead of tables."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core.noise import hashed, offsets
from jaxoptim.core.numerics import computing_dtype, real_dtype, view_as_real
from jaxoptim.core.shown import shown

_LANE = 3


@functools.partial(jax.jit, static_argnames="dim")
def sketched(arrays: Sequence[jax.Array], dim: int, seed: Any) -> jax.Array:
    """Compute the count sketch of some arrays, concatenated."""
    dtype = real_dtype(computing_dtype(jnp.result_type(*(x.dtype for x in arrays)) if arrays else jnp.float32))
    total, start = jnp.zeros(dim, dtype), 0
    for array in arrays:
        values = view_as_real(array).astype(dtype)
        total += part(values, dim, seed, place(start))
        start += values.size
    return total


def part(values: jax.Array, dim: int, seed: Any, start: jax.Array | np.ndarray) -> jax.Array:
    """Compute the contribution of real numbers to a sketch.

    Args:
        values: the numbers.
        dim: the size of the sketch.
        seed: the seed of the hash, of 32 bits.
        start: the place of the first of them in the long vector; see :func:`place`.
    """
    key = jax.random.key_data(jax.random.key(jnp.asarray(seed, jnp.uint32), impl="threefry2x32"))
    word = words(key, start, values.shape)
    signs = jnp.where((word & 1) == 1, -1, 1).astype(values.dtype)
    return jnp.zeros(dim, values.dtype).at[(word >> 1) % dim].add(signs * values)


def words(key: jax.Array, start: jax.Array | np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """Compute the random word of each element of an array, the first of which has the place ``start``."""
    high, low = offsets(shape)
    low = low + start[1]
    return hashed(key, _LANE, high + start[0] + (low < start[1]), low)


def place(number: int) -> np.ndarray:
    """Split a place in a long vector into its high and its low 32 bits."""
    return np.array([number >> 32, number % 2**32], np.uint32)


def check(dim: Any, seed: Any, prefix: str = "") -> None:
    """Raise for an invalid size or seed of a sketch; their arguments have this prefix in messages."""
    if isinstance(dim, bool) or not isinstance(dim, int | np.integer) or not 1 <= dim < 2**31:
        raise ValueError(f"Invalid {prefix}dim: {shown(dim)}. A sketch has an int >= 1 of numbers.")
    is_number = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not isinstance(seed, jax.Array) and not (is_number and 0 <= seed < 2**32):
        raise ValueError(f"Invalid {prefix}seed: {shown(seed)}. It is an int from 0 to 2**32 - 1.")
