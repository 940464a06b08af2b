"""Placement of optimizer state for sharded parameters."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxoptim.core.numerics import put
from jaxoptim.core.shown import shown

T = TypeVar("T")


def check_mesh(mesh: Any) -> Mesh | None:
    """Return a mesh or None as given; raise a ``TypeError`` for anything else."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh takes a Mesh, such as jax.make_mesh((8,), ('data',)), but got {shown(mesh)}.")
    return mesh


def along(mesh: Mesh, axis: str) -> Mesh:
    """Return a mesh of all devices of a mesh along one axis, of the automatic kind."""
    return Mesh(mesh.devices.reshape(-1), (axis,))


def readable(tree: T) -> T:
    """Make all arrays of a pytree readable by this process: those that it has in part only are replicated.

    All processes that have a part of such an array must call this.
    """

    def whole(x: Any) -> Any:
        if not is_in_parts(x) or not isinstance(x.sharding, NamedSharding):
            return x
        return put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))

    return jax.tree.map(whole, tree)


def is_in_parts(x: Any) -> bool:
    """Whether this process holds only a part of an array."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated


def is_over_processes(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of several processes."""
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def largest(mesh: Mesh | None, number: float) -> float:
    """Return the largest of the numbers of all processes of a mesh, so that they decide alike."""
    if mesh is None or not is_over_processes(mesh):
        return number
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    own = np.full(len(mesh.local_devices), number, np.float32)
    return float(jnp.max(jax.make_array_from_process_local_data(each, own)))


def mesh_of(tree: Any) -> Mesh | None:
    """Return the mesh that a pytree is placed on; None if there is none, or if other devices are used too.

    Args:
        tree: arrays, or their shapes and dtypes with shardings. Traced arrays and those that are not committed to a
            device do not count.
    """
    shardings = [x.sharding for x in jax.tree.leaves(tree) if _is_placed(x)]
    meshes = [x.mesh for x in shardings if isinstance(x, NamedSharding) and isinstance(x.mesh, Mesh)]
    if not meshes or len({frozenset(sharding.device_set) for sharding in shardings}) > 1:
        return None
    return meshes[0]


def _is_placed(x: Any) -> bool:
    if isinstance(x, jax.Array):
        return not isinstance(x, jax.core.Tracer) and x.committed
    return getattr(x, "sharding", None) is not None


def on_mesh_of(params: Any, state: T) -> T:
    """Put the counts, keys and other numbers of a state on all devices of its parameters.

    An uncommitted array is another argument to a compiled step than the committed one that the step returns: without
    this the second step would compile again.
    """
    if (mesh := mesh_of(params)) is None or mesh.size == 1:
        return state
    leaves, treedef = jax.tree.flatten(state)
    free = [at for at, x in enumerate(leaves) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
    free = [at for at in free if not leaves[at].committed]
    placed = put([leaves[at] for at in free], NamedSharding(mesh, PartitionSpec()))
    for at, x in zip(free, placed, strict=True):
        leaves[at] = x
    return jax.tree.unflatten(treedef, leaves)
