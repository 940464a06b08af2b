"""Batches in parts, evaluated one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxoptim.core.batches import size_of
from jaxoptim.core.numerics import computing_dtype


def check_microbatches(count: int, batch_size: int | None, data: Any) -> None:
    """Raise for a number of parts that does not divide the batch."""
    if count == 1:
        return
    if data is None:
        raise ValueError(f"microbatches is {count}, but there are no data. Give data, or microbatches=1.")
    size, what = (size_of(data), "the number of data") if batch_size is None else (batch_size, "batch_size")
    if size % count:
        raise ValueError(f"Invalid microbatches: {count}. It divides {what}, which is {size}.")


def mean_over_parts(function: Callable[[Any], Any], batch: Any, count: int) -> Any:
    r"""The mean of a function over equal parts of a batch, whose intermediate values exist for one part at a time.

    .. math::
        \frac{1}{k} \sum_{i=1}^k f(B_i), \qquad B = B_1 \cup \ldots \cup B_k

    Of a mean over data, and of its derivatives, it is that of the whole batch, to rounding.

    Args:
        function: of a batch, returns a pytree of arrays.
        batch: a pytree of arrays whose first axes run over the data.
        count: k, which divides their length.
    """
    if count == 1:
        return function(batch)
    parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
    like = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, computing_dtype(x.dtype)), like)
    total, _ = lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), zeros, parts)
    return jax.tree.map(lambda x, one: (x / count).astype(one.dtype), total, like)
