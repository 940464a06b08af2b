"""Shardings of optimizer states."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxoptim.core import trees
from jaxoptim.core.placement import mesh_of
from jaxoptim.distributed.layouts import Placed, as_transformation, sharding_on, state_specs, without_shardings
from jaxoptim.distributed.zero import SpreadInit, asking


def state_shardings(optimizer: Any, params: Any) -> Any:
    """Return the shardings of the state of an optimizer, from those of its parameters.

    An array that belongs to a parameter has its layout along the dimensions that the two share: a moment that of the
    parameter, a mean over its columns that of its rows. Counts, keys, and what belongs to no parameter are whole on
    every device. For :func:`zero` state is in parts over the data axis too.

    Give them to ``jax.jit`` as ``out_shardings`` of an ``init`` whose arrays do not depend on the parameters (some of
    optax's), and to a checkpointer, to restore on this mesh what was saved on another one.

    Args:
        optimizer: a rule, a transformation, also of optax, or a Pyro-style optimizer.
        params: the parameters, on one mesh: arrays, or ``jax.ShapeDtypeStruct`` with ``sharding``. Those that are on
            none count as whole on every device.

    Returns:
        A tree like the state with a ``NamedSharding`` for each array.

    Raises:
        ``TypeError`` for what is no optimizer; ``ValueError`` for parameters that are on no mesh, or not all on one,
        and for a transformation that has :func:`zero` inside.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxoptim
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
        >>> params = {"w": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, PartitionSpec("data")))}
        >>> tx = jaxoptim.adam(lr=0.1)
        >>> shardings = jaxoptim.distributed.state_shardings(tx, params)
        >>> shardings.slots["exp_avg"]["w"].spec[0], shardings.step.is_fully_replicated
        ('data', True)
        >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
    """
    tx = as_transformation(optimizer)
    if isinstance(tx.init, SpreadInit):
        return tx.init.shardings(params)
    if (mesh := mesh_of(params)) is None:
        raise ValueError(
            "state_shardings follows the shardings of the parameters, but these are on no mesh, or not all on one. "
            "Place them, jax.device_put(params, NamedSharding(mesh, spec)), or give jax.ShapeDtypeStructs with them."
        )
    named = zip(trees.names(params), jax.tree.leaves(params, is_leaf=trees.is_leaf), strict=True)
    placed = [None if x is None else Placed(name, tuple(x.shape), _spec_of(x)) for name, x in named]
    with asking():
        state = jax.eval_shape(lambda params: tx.init(params), without_shardings(params))
    specs = state_specs(state, params, placed)
    found = [None if its is None else sharding_on(mesh, its.spec, len(its.shape)) for its in specs]
    return jax.tree.unflatten(jax.tree.structure(state, is_leaf=trees.is_leaf), found)


def _spec_of(x: Any) -> PartitionSpec:
    """Return the layout of an array on a mesh."""
    return getattr(x.sharding, "spec", PartitionSpec())
