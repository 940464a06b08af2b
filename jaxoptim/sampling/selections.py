"""Selections of parameters, for refined coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import Rule, trees
from jaxoptim.core.modules import module_of
from jaxoptim.optim.groups import predicate


def named_selections(selections: Any, sampler: Any) -> tuple[tuple[str, ...] | None, list[Any] | None]:
    """The selections as a list, and their names if they have any."""
    if selections is None:
        return None, None
    if not isinstance(selections, list | tuple | Mapping | np.ndarray | jax.Array):
        given = repr(selections) if isinstance(selections, str | int | float) else f"a {type(selections).__name__}"
        raise TypeError(f"selections is a list, or a mapping of names, but got {given}. Give [selection, ...].")
    if getattr(sampler, "optimize_over", None) is not None:
        raise ValueError("The sampler has a mask, optimize_over, of its own. Give it as one of the selections.")
    if not isinstance(sampler, Rule):
        raise TypeError("selections can be set in a rule only, but the sampler is a transformation. Give a rule.")
    if isinstance(selections, Mapping):
        return tuple(selections), list(selections.values())
    return None, list(selections)


def stacked_masks(selections: Sequence[Any], params: Any) -> Any:
    """Masks with a first axis of selections, a tree like the parameters."""
    if not selections:
        raise ValueError("selections is empty. Give at least one mask, regular expression or predicate.")
    names, leaves = trees.names(params), jax.tree.leaves(params, is_leaf=trees.is_leaf)
    chosen: list[list[Any]] = []
    for selection in selections:
        is_module = module_of(selection) is not None  # of bools, which may be callable
        if isinstance(selection, str) or hasattr(selection, "fullmatch") or (callable(selection) and not is_module):
            matches = predicate(selection)
            flags = [bool(matches(name)) for name in names]
            if not any(flags):
                raise ValueError(
                    f"selections: {selection!r} selects no parameter. A regular expression must match the whole path, "
                    f"as 'layer.*' does. The paths are {', '.join(names)}."
                )
            chosen.append([np.asarray(flag) for flag in flags])
        elif jax.tree_util.all_leaves([selection]):
            chosen.append([np.asarray(selection)] * len(names))
        else:
            parts = trees.leaves_like(selection, params, "selections")
            chosen.append([np.asarray(True) if part is None else np.asarray(part) for part in parts])
        if not any(part.any() for part, leaf in zip(chosen[-1], leaves, strict=True) if leaf is not None):
            raise ValueError(
                f"selections: number {len(chosen) - 1} selects nothing, and no chain would move. Give a mask with ones."
            )
    masks = []
    for index, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        parts = [of_one[index] for of_one in chosen]
        if not all(np.isin(part, (0, 1)).all() for part in parts):
            raise ValueError(f"selections: a mask of {name!r} has other numbers than zeros and ones.")
        shape = () if leaf is None else jnp.shape(leaf)
        try:
            masks.append(None if leaf is None else _stacked(parts, shape))
        except ValueError as error:
            raise ValueError(f"selections: a mask does not broadcast to {name!r} of shape {shape}.") from error
    treedef = jax.tree.structure(params, is_leaf=trees.is_leaf)
    return jax.tree.map(jnp.asarray, jax.tree.unflatten(treedef, masks))


def _stacked(masks: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Return the masks of one array, stacked on a first axis, in as few numbers as tell them apart."""
    wide = np.broadcast_shapes(*(mask.shape for mask in masks))
    if np.broadcast_shapes(wide, shape) != shape:
        raise ValueError
    each = wide and (1,) * (len(shape) - len(wide)) + wide
    return np.stack([np.broadcast_to(mask, each) for mask in masks])
