"""Work on whole matrices of a stack that is sharded over devices: groups of devices take a matrix each."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxoptim.core.numerics import explicit_sharding

_known: contextvars.ContextVar[Mapping[str, NamedSharding] | None] = contextvars.ContextVar("_known", default=None)
"""The shardings of arrays over automatic axes, by the name of their parameter; the types of traced arrays lack them."""


@contextlib.contextmanager
def known_shardings(shardings: Mapping[str, NamedSharding]) -> Iterator[None]:
    """Say in a block how the gradients of the parameters of these names are sharded, moments as they are."""
    token = _known.set(shardings)
    try:
        yield
    finally:
        _known.reset(token)


def sharding_of(name: str, x: jax.Array) -> NamedSharding | None:
    """Return how a matrix is sharded over several devices; None if it is not, or if that is not known.

    Args:
        name: the name of its parameter.
        x: the matrix.
    """
    sharding = explicit_sharding(x) or (_known.get() or {}).get(name)
    if sharding is None or x.ndim != 2 or (over := _over(sharding, *x.shape)) is None:
        return None
    return sharding if over.devices > 1 else None


class Group(NamedTuple):
    """The devices that have the parts of one matrix.

    Attributes:
        axes: the axes of the mesh that all groups are along.
        members: for each group the numbers of its devices along these axes; none if each device has whole matrices.
    """

    axes: tuple[str, ...] = ()
    members: tuple[tuple[int, ...], ...] = ()

    def total(self, x: jax.Array) -> jax.Array:
        """Return the sum of the arrays of all devices of the group."""
        return jax.lax.psum(x, self.axes, axis_index_groups=self.members) if self.members else x

    def rows_of_total(self, x: jax.Array) -> jax.Array:
        """Return this device's share of the rows of the sum of a matrix of each device."""
        if not self.members:
            return x
        return jax.lax.psum_scatter(x, self.axes, axis_index_groups=self.members, tiled=True)

    def all_rows(self, x: jax.Array) -> jax.Array:
        """Return the matrix whose rows the devices share."""
        if not self.members:
            return x
        return jax.lax.all_gather(x, self.axes, axis_index_groups=self.members, tiled=True)


ALONE = Group()
"""A device that has whole matrices."""


class _Over(NamedTuple):
    """The devices over which one dimension of matrices is sharded.

    Attributes:
        axes: the axes of the mesh.
        devices: their number.
        dimension: 0 for rows, 1 for columns.
    """

    axes: tuple[str, ...]
    devices: int
    dimension: int


def devices_of(sharding: NamedSharding, rows: int, columns: int) -> int:
    """Return the number of devices that share a matrix."""
    over = _over(sharding, rows, columns)
    return 1 if over is None else over.devices


def spread(
    function: Callable[[jax.Array, Group], jax.Array], stack: jax.Array, sharding: NamedSharding, groups: int
) -> jax.Array:
    """Evaluate a function of the matrices of a sharded stack, each on a group of devices that share its longer side.

    An all-to-all takes the matrices to their groups, and another one brings the results back. Zeros fill up sides that
    the devices of a group do not divide, and the places of groups without a matrix: the function must leave them zero.

    Args:
        function: of a part of a matrix, and the group that has the others; the result has the shape of the part.
        stack: the matrices.
        sharding: of each of them.
        groups: the number of groups, which divides that of the devices.

    Returns:
        The results, sharded as the matrices are.
    """
    height, *shape = stack.shape
    over = _over(sharding, *shape)
    if over is None:
        raise ValueError("A sharded matrix is expected.")
    axes, devices, at = over
    parts, each = devices // groups, -(-height // groups)
    is_along = shape[at] > shape[1 - at] or (at == 1 and shape[0] == shape[1])
    neighbours = tuple(tuple(range(start, start + groups)) for start in range(0, devices, groups))
    apart = tuple(tuple(range(start, devices, groups)) for start in range(groups)) if parts > 1 else ()
    group, width = Group(axes, apart), shape[1 - at]

    def to_groups(x: jax.Array) -> jax.Array:
        """Move from shares of all matrices, whose first side is shared by all devices, to parts of those of a group."""
        if is_along:
            return jax.lax.all_to_all(x, axes, 0, 1, axis_index_groups=neighbours, tiled=True) if groups > 1 else x
        pieces = x.reshape(groups, each, x.shape[1], parts, -1).transpose(3, 0, 1, 2, 4)
        moved = jax.lax.all_to_all(pieces.reshape(devices, each, x.shape[1], -1), axes, 0, 0, tiled=True)
        return moved.transpose(1, 0, 2, 3).reshape(each, devices * x.shape[1], -1)

    def back(x: jax.Array) -> jax.Array:
        if is_along:
            return jax.lax.all_to_all(x, axes, 1, 0, axis_index_groups=neighbours, tiled=True) if groups > 1 else x
        pieces = x.reshape(each, devices, -1, x.shape[2]).transpose(1, 0, 2, 3)
        moved = jax.lax.all_to_all(pieces, axes, 0, 0, tiled=True)
        moved = moved.reshape(parts, groups, each, -1, x.shape[2]).transpose(1, 2, 3, 0, 4)
        return moved.reshape(groups * each, moved.shape[2], -1)

    def on_each(x: jax.Array) -> jax.Array:
        first = jnp.swapaxes(x, 1, 2) if at == 1 else x
        first = jnp.pad(first, ((0, groups * each - height), (0, 0), (0, -width % parts)))
        own = to_groups(first)
        own = jnp.swapaxes(own, 1, 2) if at == 1 else own
        own = jax.vmap(lambda part: function(part, group))(own)
        own = jnp.swapaxes(own, 1, 2) if at == 1 else own
        last = back(own)[:height, :, :width]
        return jnp.swapaxes(last, 1, 2) if at == 1 else last

    spec = PartitionSpec(*[axes if place == at + 1 else None for place in range(3)])
    placed = constrained(stack, NamedSharding(sharding.mesh, spec))
    done = jax.shard_map(on_each, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False)(placed)
    entries = (*sharding.spec, None, None)[:2]
    return constrained(done, NamedSharding(sharding.mesh, PartitionSpec(None, *entries)))


def constrained(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Constrain an array to a sharding, which the compiler may not change."""
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def _over(sharding: NamedSharding, rows: int, columns: int) -> _Over | None:
    """Return the devices of a matrix, which is in parts along both sides or one; None if they divide neither side."""
    entries = [() if axis is None else axis if isinstance(axis, tuple) else (axis,) for axis in sharding.spec]
    first, second = (*entries, (), ())[:2]
    axes = (*first, *second)
    devices = math.prod(sharding.mesh.shape[axis] for axis in axes)
    if not second or (first and rows % devices == 0):
        return _Over(axes, devices, 0)
    return _Over(axes, devices, 1) if columns % devices == 0 else None
