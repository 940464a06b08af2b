"""Leaving for the pure face in the middle of training, and coming back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxoptim.core import OptState, Rule, transformation, trees
from jaxoptim.optim.bucket import Bucket, abstract_slots
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.storage import Storage

RuleOf = Callable[[Bucket], Rule]
"""The rule with which the pure face goes on."""


def leave(storage: Storage, rule_of: RuleOf) -> tuple[optax.GradientTransformationExtraArgs, Any, Any]:
    """The transformation, the parameters and the state of this moment."""
    storage.settle()
    params = jax.tree.map(lambda param: param.value, storage.tree())
    tx = _transformation(storage, rule_of)
    state = tx.init(params)
    for index, bucket in enumerate(storage.buckets):
        if bucket.state is not None:
            states = [bucket.slots_of(i) for i in _in_tree_order(storage, bucket)]
            slots = {
                name: jax.tree.unflatten(jax.tree.structure(tree), [s[name] for s in states if name in s])
                for name, tree in _state_of(storage, state, index).slots.items()
            }
            # Copies: the optimizer donates its own.
            rest = jax.tree.map(jnp.copy, (bucket.state.step, bucket.state.shared))
            state = _with_state(storage, state, index, OptState(rest[0], slots, rest[1]))
    return tx, params, state


def enter(storage: Storage, rule_of: RuleOf, params: Any, state: Any) -> None:
    """Take parameters and state over, after both were checked."""
    storage.settle()
    tree = storage.tree()
    cells = jax.tree.leaves(tree, is_leaf=trees.is_leaf)
    values = trees.leaves_like(params, tree, "params", "the optimizer's params")
    pairs = [(cell, value) for cell, value in zip(cells, values, strict=True) if cell is not None]
    for cell, value in pairs:
        trees.check_shape("value", storage.labels[cell], jnp.asarray(value), cell)
    expected = jax.eval_shape(_transformation(storage, rule_of).init, params)
    given, wanted = jax.tree.structure(_without_counts(state)), jax.tree.structure(expected)
    if given != wanted:  # type: ignore[operator]
        raise ValueError(
            "from_functional takes a state of the transformation that to_functional gave, but got one of another "
            f"structure: {given} instead of {wanted}."
        )
    counts = [
        _counts_of(storage, bucket, _state_of(storage, state, index).counts) if bucket.times else {}
        for index, bucket in enumerate(storage.buckets)
    ]
    for cell, value in pairs:
        cell.value = value
    for index, bucket in enumerate(storage.buckets):
        if bucket.times:
            new, was_begun = _state_of(storage, state, index), bucket.state is not None
            slots: list[dict[str, Any]] = [{} for _ in bucket.params]
            for name, slot_tree in new.slots.items():
                has_it = [i for i in _in_tree_order(storage, bucket) if name in _slot_names(storage, bucket, i)]
                for i, leaf in zip(has_it, jax.tree.leaves(slot_tree), strict=True):
                    slots[i][name] = leaf
            # Those with counts of their own follow as if they were loaded, and the next step puts them elsewhere.
            others = [{} if param in counts[index] else own for param, own in zip(bucket.params, slots, strict=True)]
            bucket.load(storage.rule_for(bucket), new.step, others, new.shared)
            for param, own in zip(bucket.params, slots, strict=True):
                if (count := counts[index].get(param)) is not None:
                    kept = _as_shown(storage, count) | own | storage._extras.get(param, {})
                    storage.set_state(param, kept if int(count) or was_begun else {})


def _transformation(storage: Storage, rule_of: RuleOf) -> optax.GradientTransformationExtraArgs:
    """The rule of the only bucket, or a partition of the tree into all of them."""
    if any(bucket.times > 1 for bucket in storage.buckets):
        raise ValueError("A parameter stands twice in its group, which the pure face has no form for.")
    if len(storage.buckets) == 1:
        return transformation(rule_of(storage.buckets[0]))
    kinds = {
        str(index): transformation(rule_of(bucket)) if bucket.times else optax.set_to_zero()
        for index, bucket in enumerate(storage.buckets)
    }
    where = {param: str(index) for index, bucket in enumerate(storage.buckets) for param in bucket.params}
    return optax.partition(kinds, jax.tree.map(where.__getitem__, storage.tree()))


def _state_of(storage: Storage, state: Any, index: int) -> OptState:
    """The state of one bucket within the state of the transformation."""
    return state if len(storage.buckets) == 1 else state.inner_states[str(index)].inner_state


def _with_state(storage: Storage, state: Any, index: int, new: OptState) -> Any:
    """The state of the transformation with that of one bucket replaced."""
    if len(storage.buckets) == 1:
        return new
    inner = state.inner_states[str(index)]._replace(inner_state=new)
    return state._replace(inner_states=state.inner_states | {str(index): inner})


def _without_counts(state: Any) -> Any:
    """A state as it is before any gradient was missing."""
    return jax.tree.map(
        lambda x: x._replace(counts=None) if isinstance(x, OptState) else x,
        state,
        is_leaf=lambda x: isinstance(x, OptState),
    )


def _counts_of(storage: Storage, bucket: Bucket, counts: Any) -> dict[Parameter, Any]:
    """The counts of those parameters of a bucket that have missed an update."""
    if counts is None:
        return {}
    inside = set(bucket.params)
    tree = jax.tree.map(lambda param: param if param in inside else optax.MaskedNode(), storage.tree())
    leaves = trees.leaves_like(counts, tree, "state.counts", "the optimizer's params")
    params = jax.tree.leaves(tree, is_leaf=trees.is_leaf)
    return {param: count for param, count in zip(params, leaves, strict=True) if count is not None}


def _as_shown(storage: Storage, count: Any) -> dict[str, Any]:
    """The entry of torch's state for a count of steps, if it has one."""
    if storage.step_type is None:
        return {}
    return {"step": int(count) if storage.step_type is int else jnp.asarray(count, jnp.float32)}


def _in_tree_order(storage: Storage, bucket: Bucket) -> list[int]:
    """The indices of the bucket's parameters in the order of the leaves of the user's tree."""
    place: dict[Parameter, int] = {param: index for index, param in enumerate(bucket.params)}
    return [place[leaf] for leaf in jax.tree.leaves(storage.tree()) if leaf in place]


def _slot_names(storage: Storage, bucket: Bucket, index: int) -> set[str]:
    """The slots that one parameter has."""
    slots = abstract_slots(storage.rule_for(bucket), bucket.params[index].struct)
    return {name for name, slot in slots.items() if slot is not None}
