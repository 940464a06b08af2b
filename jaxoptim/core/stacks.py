"""Stacked updates of arrays of one shape under a shape-dependent rule: on accelerators a few large kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO
from jax.sharding import NamedSharding

from jaxoptim.core.leaf import Change, LeafUpdate, Wanted, seen_by_rule, update_dense, update_leaf, valued
from jaxoptim.core.one_pass import in_one_pass
from jaxoptim.core.packing import is_sharded
from jaxoptim.core.rule import Off, Rule, Slots, enabled
from jaxoptim.core.spreading import devices_of, sharding_of

_STACK = 2**25
"""The most elements in a stack, which takes memory beside the arrays: 128 MB in float32, and the rule's temporaries."""


def update_leaves(leaves: Sequence[LeafUpdate], shared: Sequence[dict[str, Any]], wanted: Wanted) -> list[Change]:
    """Update arrays; under a shape-dependent rule those of one shape are stacked.

    Elementwise rules gain nothing: their arrays are packed, or take one kernel each.

    Args:
        leaves: the arrays.
        shared: for each array the state of the whole pytree as it sees it.
        wanted: the result wanted of the updates.

    Returns:
        For each what :func:`~jaxoptim.core.leaf.update_leaf` returns, or, of what is wanted, a kernel of one pass.
    """
    kinds: dict[Hashable, list[int]] = {}
    for at, (leaf, of_tree) in enumerate(zip(leaves, shared, strict=True)):
        kinds.setdefault(at if of_tree else _kind(at, leaf), []).append(at)
    made: dict[int, Change] = {}
    for members in kinds.values():
        for stack in _stacks(members, leaves[members[0]].grad):
            own = [leaves[at] for at in stack]
            updated = _update_stack(own) if len(own) > 1 else [_update_one(own[0], shared[stack[0]], wanted)]
            made |= dict(zip(stack, updated, strict=True))
    return [made[at] for at in range(len(leaves))]


def spread_leaves(leaves: Sequence[LeafUpdate], names: Sequence[str]) -> list[LeafUpdate]:
    """Do the work on whole matrices that are sharded, where a rule has such, for all of one shape together.

    Args:
        leaves: the arrays.
        names: the names of their parameters.

    Returns:
        The leaves, with what their updates get of that by name.
    """
    kinds: dict[tuple[int, Hashable, Hashable, NamedSharding], list[int]] = {}
    for at, (leaf, name) in enumerate(zip(leaves, names, strict=True)):
        if leaf.rule.elementwise or leaf.given or isinstance(leaf.grad, BCOO):
            continue
        if (sharding := sharding_of(name, leaf.grad)) is not None:
            kinds.setdefault((id(leaf.rule), _like(leaf.grad), _like(leaf.param), sharding), []).append(at)
    done = list(leaves)
    for (_, _, _, sharding), members in kinds.items():
        like = leaves[members[0]].grad
        for stack in _stacks(members, like, devices_of(sharding, *like.shape)):
            for at, given in zip(stack, _spread([leaves[at] for at in stack], sharding), strict=True):
                done[at] = done[at]._replace(given=given)
    return done


@functools.partial(jax.jit, static_argnames="sharding")
def _spread(leaves: Sequence[LeafUpdate], sharding: NamedSharding) -> list[dict[str, jax.Array]]:
    seen = [seen_by_rule(leaf) for leaf in leaves]
    return seen[0][0].spread([grad for _, grad, _ in seen], [slots for *_, slots in seen], sharding)


def _update_one(leaf: LeafUpdate, shared: dict[str, Any], wanted: Wanted) -> Change:
    """Update one array."""
    done = None if isinstance(leaf.grad, BCOO) else in_one_pass(leaf, shared, wanted)
    return update_leaf(leaf, shared) if done is None else done


def _kind(at: int, leaf: LeafUpdate) -> Hashable:
    """Return the key that arrays of one stack share; for an array that is not stacked, its index."""
    rule, grad, slots, param = leaf.rule, leaf.grad, leaf.slots, leaf.param
    if rule.elementwise or leaf.given or isinstance(grad, BCOO) or any(map(is_sharded, _arrays(leaf))):
        return at
    places = tuple(None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None) for x in _arrays(leaf))
    kept = tuple((name, _like(slot)) for name, slot in slots.items())
    return id(rule), _like(grad), _like(param), kept, places


def _arrays(leaf: LeafUpdate) -> list[jax.Array]:
    """Return the arrays of a leaf: its gradient, the parameter if it is known, and its slots."""
    return jax.tree.leaves((leaf.grad, leaf.param, leaf.slots))


def _like(x: Any) -> Hashable:
    return None if x is None else (x.shape, x.dtype)


def _stacks(members: list[int], like: Any, devices: int = 1) -> list[list[int]]:
    """Divide arrays into as few stacks as memory allows, of about the same height.

    On several devices the part of each may be as large as a square of the shorter side, which products have anyway.
    """
    most = _STACK if devices == 1 else devices * max(_STACK, min(like.shape) ** 2)
    highest = max(1, most // max(1, math.prod(like.shape)))
    height = -(-len(members) // -(-len(members) // highest))
    return [members[start : start + height] for start in range(0, len(members), height)]


def _update_stack(leaves: Sequence[LeafUpdate]) -> list[Change]:
    """Update arrays that differ only in their values."""
    params = None if leaves[0].param is None else [leaf.param for leaf in leaves]
    counts = {id(leaf.step): leaf.step for leaf in leaves}
    count = leaves[0].step if len(counts) == 1 else [leaf.step for leaf in leaves]
    updated = _dense(leaves[0].rule, [leaf.grad for leaf in leaves], [leaf.slots for leaf in leaves], params, count)
    return [(None, *valued(leaf, *new)) for leaf, new in zip(leaves, updated, strict=True)]


@jax.jit
def _dense(rule: Rule, grads: Any, slots: Any, params: Any, count: Any) -> list[tuple[jax.Array, Slots]]:
    """Compute the changes and the new slots of arrays, stacked or not as the platform prefers.

    CPUs gain nothing: 200 small arrays as a stack compile for seven times as long, and large products are no faster.
    """
    arguments = (rule, grads, slots, params, count)
    return jax.lax.platform_dependent(*arguments, cpu=_one_by_one, default=_together)


def _one_by_one(rule: Rule, grads: Any, slots: Any, params: Any, count: Any) -> list[tuple[jax.Array, Slots]]:
    params = params or [None] * len(grads)
    counts = count if isinstance(count, list) else [count] * len(grads)
    return [update_dense(rule, *own, {}, {}) for own in zip(grads, slots, params, counts, strict=True)]


def _together(rule: Rule, grads: Any, slots: Any, params: Any, count: Any) -> list[tuple[jax.Array, Slots]]:
    """Compute the changes and the new slots of arrays by one update of a stack.

    A kernel that reads old arrays and writes new ones in their place needs copies of the old ones, each by a kernel of
    its own. Where the new ones are a stack before they are arrays, there are none.
    """
    whole = _stacked(zip(grads, slots, params or [None] * len(grads), strict=True))
    counts, of_count = (_stacked(count), 0) if isinstance(count, list) else (count, None)
    changes, new = jax.vmap(lambda own, count: update_dense(rule, *own, count, {}, {}), in_axes=(0, of_count))(
        whole, counts
    )
    new = jax.lax.optimization_barrier(new)
    if enabled(getattr(rule, "weight_decay", Off(0.0))):  # which reads the old parameters number by number
        changes = jax.lax.optimization_barrier(changes)
    return _unstacked((changes, new), len(grads))


def _stacked(trees: Iterable[Any]) -> Any:
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def _unstacked(tree: Any, height: int) -> list[Any]:
    """Unstack the pytrees of a stack, in a form for which the GPU compiler writes all arrays by one kernel."""

    def row(x: jax.Array, at: int) -> jax.Array:
        return x.reshape(1, height, -1)[0, at].reshape(x.shape[1:])

    return [jax.tree.map(functools.partial(row, at=at), tree) for at in range(height)]
