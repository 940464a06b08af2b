"""Where the state of sharded parameters is."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxoptim.core.numerics import put

T = TypeVar("T")


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree is placed on; None where there is none, or where other devices are used too.

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
    """A state whose counts, keys and other numbers are on all devices of its parameters.

    An array that JAX may still move to where it is needed is another argument to a compiled step than the one which the
    step returns: without this the second step would be another program.
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
