"""Gradients that touch a few rows of a large table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO, bcoo_sum_duplicates
from jax.sharding import NamedSharding, PartitionSpec

from jaxoptim.core import trees
from jaxoptim.core.numerics import explicit_sharding


def check_rows(name: str, grad: BCOO, param: Any) -> None:
    """Raise a ``ValueError`` for a sparse gradient that is not made of dense rows of ``param``."""
    if (grad.n_batch, grad.n_sparse, grad.n_dense) != (0, 1, len(grad.shape) - 1):
        raise ValueError(
            f"The sparse gradient of {name!r} has n_batch={grad.n_batch}, n_sparse={grad.n_sparse}, "
            f"n_dense={grad.n_dense}. Dense rows are allowed: indices of shape (rows, 1) and data of shape "
            f"(rows, ...), that is n_batch=0, n_sparse=1, n_dense={len(grad.shape) - 1}."
        )
    trees.check_shape("sparse gradient", name, grad, param)


def distinct_rows(grad: BCOO) -> tuple[jax.Array, jax.Array]:
    """Return the rows that a gradient touches, each once, and the sums of their values.

    Returns:
        Row numbers of shape ``(nse,)`` and values of shape ``(nse, ...)``. As many as there were entries:
        the surplus has a row number past the end of the table, which reads zeros and writes nothing.
    """
    grad = bcoo_sum_duplicates(grad, nse=grad.nse)
    return grad.indices[:, 0], grad.data


def take(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Take rows of a table, zeros for those past its end."""
    sharding = explicit_sharding(table)
    along = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
    return table.at[rows].get(mode="fill", fill_value=0, out_sharding=along)


def put(table: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """Return the table with rows replaced."""
    values, sharding = values.astype(table.dtype), explicit_sharding(table)
    return table.at[rows].set(values, mode="drop", unique_indices=True, out_sharding=sharding)


def as_update(rows: jax.Array, values: jax.Array, shape: tuple[int, ...]) -> BCOO:
    """Make a sparse array of row updates, which can be added to the table."""
    return BCOO((values, rows[:, None]), shape=shape, unique_indices=True)


def to_dense(grad: BCOO) -> jax.Array:
    """Make a sparse gradient dense."""
    return jnp.zeros(grad.shape, grad.dtype).at[grad.indices[:, 0]].add(grad.data, mode="drop")


def rows_of(grad: jax.Array) -> BCOO:
    """Make a dense gradient sparse; rows that are zero are left out, by indices past the end."""
    rows = grad.shape[0]
    touched = jnp.any(grad.reshape(rows, -1) != 0, axis=1)
    return BCOO((grad, jnp.where(touched, jnp.arange(rows), rows)[:, None]), shape=grad.shape)
