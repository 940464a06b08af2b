"""Conversion to the pure face in the middle of training, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxoptim.core import OptState, Rule, transformation, trees
from jaxoptim.engine.slots import abstract_slots
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.part import Part
from jaxoptim.optim.storage import Storage

RuleOf = Callable[[Part], Rule]
"""The rule with which the pure face goes on."""


def leave(storage: Storage, rule_of: RuleOf) -> tuple[optax.GradientTransformationExtraArgs, Any, Any]:
    """Return the transformation, the parameters and the state of this moment."""
    storage.settle()
    parts, tree = storage.parts(), storage.tree()
    params = jax.tree.map(lambda param: param.value, tree)
    tx = _transformation(parts, tree, rule_of)
    state = tx.init(params)
    for index, part in enumerate(parts):
        if part.count is not None and part.times:
            states = [part.slots[i] for i in _in_tree_order(tree, part)]
            slots = {
                name: jax.tree.unflatten(jax.tree.structure(of), [s[name] for s in states if name in s])
                for name, of in _state_of(parts, state, index).slots.items()
            }
            # Copies: the optimizer donates its own.
            rest = jax.tree.map(jnp.copy, (jnp.asarray(part.count, jnp.int32), part.shared or {}))
            state = _with_state(parts, state, index, OptState(rest[0], slots, rest[1]))
    if (transform := storage.transform()) is not None:
        return optax.chain(transform.tx, tx), params, (transform.state, state)
    return tx, params, state


def enter(storage: Storage, rule_of: RuleOf, params: Any, state: Any) -> None:
    """Take over parameters and state, after both were checked."""
    storage.settle()
    parts, tree = storage.parts(), storage.tree()
    cells = jax.tree.leaves(tree, is_leaf=trees.is_leaf)
    values = trees.leaves_like(params, tree, "params", "the optimizer's params")
    pairs = [(cell, value) for cell, value in zip(cells, values, strict=True) if cell is not None]
    for cell, value in pairs:
        trees.check_shape("value", storage.labels[cell], jnp.asarray(value), cell)
    tx, transform = _transformation(parts, tree, rule_of), storage.transform()
    expected = jax.eval_shape((tx if transform is None else optax.chain(transform.tx, tx)).init, params)
    given, wanted = jax.tree.structure(_without_counts(state)), jax.tree.structure(expected)
    if given != wanted:  # type: ignore[operator]
        raise ValueError(
            "from_functional takes a state of the transformation that to_functional gave, but got one of another "
            f"structure: it has {trees.first_difference(_without_counts(state), expected, 'that one')}."
        )
    if transform is not None:
        storage.loaded_transform_state, state = state
    counts = [
        _counts_of(tree, part, _state_of(parts, state, index).counts) if part.times else {}
        for index, part in enumerate(parts)
    ]
    for cell, value in pairs:
        cell.value = value
    for index, part in enumerate(parts):
        if part.times:
            new = _state_of(parts, state, index)
            slots: list[dict[str, Any]] = [{} for _ in part.params]
            for name, slot_tree in new.slots.items():
                has_it = [i for i in _in_tree_order(tree, part) if name in _slot_names(part, i)]
                for i, leaf in zip(has_it, jax.tree.leaves(slot_tree), strict=True):
                    slots[i][name] = leaf
            storage.load_part(part._replace(count=new.step, slots=slots, shared=new.shared), counts[index])


def _transformation(parts: Sequence[Part], tree: Any, rule_of: RuleOf) -> optax.GradientTransformationExtraArgs:
    """Return the rule of the only part, or a partition of the tree into all of them."""
    if any(part.times > 1 for part in parts):
        raise ValueError("A parameter stands twice in its group, which the pure face has no form for.")
    if any(part.times and not all(param.requires_grad for param in part.params) for part in parts):
        raise ValueError("A frozen parameter stands in a group that shares its state. Put it into a group of its own.")
    if len(parts) == 1 and parts[0].times:
        return transformation(rule_of(parts[0]))
    kinds = {
        str(index): transformation(rule_of(part)) if part.times else optax.set_to_zero()
        for index, part in enumerate(parts)
    }
    where = {param: str(index) for index, part in enumerate(parts) for param in part.params}
    return optax.partition(kinds, jax.tree.map(where.__getitem__, tree))


def _state_of(parts: Sequence[Part], state: Any, index: int) -> OptState:
    """Return the state of one part within the state of the transformation."""
    return state if len(parts) == 1 else state.inner_states[str(index)].inner_state


def _with_state(parts: Sequence[Part], state: Any, index: int, new: OptState) -> Any:
    """Return the state of the transformation with that of one part replaced."""
    if len(parts) == 1:
        return new
    inner = state.inner_states[str(index)]._replace(inner_state=new)
    return state._replace(inner_states=state.inner_states | {str(index): inner})


def _without_counts(state: Any) -> Any:
    """Return a state as it was before any gradient was missing."""
    return jax.tree.map(
        lambda x: x._replace(counts=None) if isinstance(x, OptState) else x,
        state,
        is_leaf=lambda x: isinstance(x, OptState),
    )


def _counts_of(tree: Any, part: Part, counts: Any) -> dict[Parameter, Any]:
    """Return the counts of those parameters of a part that have missed an update."""
    if counts is None:
        return {}
    inside = set(part.params)
    own = jax.tree.map(lambda param: param if param in inside else optax.MaskedNode(), tree)
    leaves = trees.leaves_like(counts, own, "state.counts", "the optimizer's params")
    params = jax.tree.leaves(own, is_leaf=trees.is_leaf)
    return {param: count for param, count in zip(params, leaves, strict=True) if count is not None}


def _in_tree_order(tree: Any, part: Part) -> list[int]:
    """Return the indices of a part's parameters in the order of the leaves of the user's tree."""
    place: dict[Parameter, int] = {param: index for index, param in enumerate(part.params)}
    return [place[leaf] for leaf in jax.tree.leaves(tree) if leaf in place]


def _slot_names(part: Part, index: int) -> set[str]:
    """Return the names of the slots that one parameter has."""
    slots = abstract_slots(part.rule, part.params[index].struct)
    return {name for name, slot in slots.items() if slot is not None}
