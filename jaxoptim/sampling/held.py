"""Arrays that no chain moves: one copy, which all chains share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import OptState, Rule, Sampler, init, trees
from jaxoptim.core.rule import assembled


def held_arrays(rules: Any, params: Any) -> Any:
    """The arrays that the masks of all settings hold, a tree like the parameters with None for the others.

    Args:
        rules: the settings of the sampler, stacked; None for a transformation, whose masks are not known.
        params: the tree of arrays.

    Returns:
        The tree; None if there is no such array, no other one, or if the rule does not let them be left out.
    """
    if not isinstance(rules, Sampler) or not rules.leaves_out_held:
        return None
    mask = getattr(rules, "optimize_over", None)
    if mask is None or jax.tree_util.all_leaves([mask]):
        return None
    leaves, treedef = jax.tree.flatten(params, is_leaf=trees.is_leaf)
    parts = trees.leaves_like(mask, params, "optimize_over")
    held = [leaf if _holds(part, leaf) else None for leaf, part in zip(leaves, parts, strict=True)]
    moves = any(leaf is not None and its is None for leaf, its in zip(leaves, held, strict=True))
    return jax.tree.unflatten(treedef, held) if moves and any(its is not None for its in held) else None


def with_small_masks(rules: Any, held: Any) -> Any:
    """The settings with one zero for the mask of each held array."""
    if held is None:
        return rules
    masks, treedef = jax.tree.flatten(rules.optimize_over, is_leaf=trees.is_leaf)
    own = jax.tree.leaves(held, is_leaf=trees.is_leaf)
    small = [
        part if its is None else jnp.zeros(part.shape[:1], part.dtype) for part, its in zip(masks, own, strict=True)
    ]
    return assembled(type(rules), vars(rules) | {"optimize_over": jax.tree.unflatten(treedef, small)})


def only(tree: Any, held: Any) -> Any:
    """Return the held leaves of a tree like the parameters, None in place of the others; None if nothing is held."""
    return None if held is None else _each(lambda x, its: None if its is None else x, tree, held)


def without(tree: Any, held: Any) -> Any:
    """Return a tree like the parameters with None in place of the held leaves."""
    return tree if held is None else _each(lambda x, its: x if its is None else None, tree, held)


def joined(moving: Any, held: Any) -> Any:
    """Return the whole tree, from the leaves that chains move and those that are held."""
    return moving if held is None else _each(lambda x, its: x if its is None else its, moving, held)


def joined_state(rule: Rule, state: OptState, held: Any) -> OptState:
    """Return the state of the whole tree; the slots of held leaves are those of the start."""
    if held is None:
        return state
    slots = init(rule, held).slots
    return state._replace(slots={name: joined(slot, slots[name]) for name, slot in state.slots.items()})


def state_without(state: OptState, held: Any) -> OptState:
    """Return the state of the leaves that chains move."""
    return state._replace(slots={name: without(slot, held) for name, slot in state.slots.items()})


def _holds(masks: Any, leaf: Any) -> bool:
    """Return whether the masks of all settings hold an array; False for other shapes, for which a rule raises."""
    if leaf is None or masks is None or np.asarray(masks).any():
        return False
    own, shape = np.shape(masks)[1:], np.shape(leaf)
    return len(own) <= len(shape) and all(a in (1, b) for a, b in zip(own[::-1], shape[::-1], strict=False))


def _each(of: Any, tree: Any, held: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree, is_leaf=trees.is_leaf)
    own = jax.tree.leaves(held, is_leaf=trees.is_leaf)
    return jax.tree.unflatten(treedef, [of(x, its) for x, its in zip(leaves, own, strict=True)])
