"""Conversion of states of any structure to plain containers, which a checkpoint can store, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import OptState, as_jax
from jaxoptim.core.numerics import placed_like


def by_place(state: Any) -> dict[str, Any]:
    """The leaves of a state by their places, as JAX prints them: ``"[0].mu['loc']"``."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def from_places(leaves: Mapping[str, Any], like: Any, names: list[str]) -> Any:
    """The state whose leaves :func:`by_place` gave.

    Args:
        leaves: what it gave.
        like: a state before the first update.
        names: of the parameters that the state is about.

    Raises:
        ``ValueError`` for another structure, or a leaf of another shape.
    """
    if isinstance(like, OptState):  # which has counts only when an array has missed an update
        counted = {name for name in names if f".counts[{name!r}]" in leaves}
        counts = {name: jnp.zeros((), jnp.int32) if name in counted else None for name in names}
        like = like._replace(counts=counts if counted else None)
    wanted, treedef = jax.tree_util.tree_flatten_with_path(like)
    places = {jax.tree_util.keystr(path): leaf for path, leaf in wanted}
    advice = "Make the optimizer with the options of the one that was saved."
    if missing := [place for place in places if place not in leaves]:
        raise ValueError(f"The saved state of the optimizer lacks {missing[0]}, which this optimizer has. {advice}")
    if extra := [place for place in leaves if place not in places]:
        raise ValueError(f"The saved state of the optimizer has {extra[0]}, which this optimizer lacks. {advice}")
    for place, leaf in places.items():
        if jnp.shape(leaves[place]) != jnp.shape(leaf):
            raise ValueError(
                f"The saved state of the optimizer has shape {jnp.shape(leaves[place])} at {place}, but that of this "
                f"optimizer is {jnp.shape(leaf)}. {advice}"
            )
    return jax.tree.unflatten(treedef, [_own(leaves[place], leaf) for place, leaf in places.items()])


def _own(x: Any, like: Any) -> Any:
    """A leaf as an array of JAX, on the devices of another."""
    return placed_like(as_jax(x), like) if hasattr(x, "dtype") else x


def plain(tree: Any) -> Any:
    """A tree in which nodes of other classes are dicts, by the names that JAX prints."""
    if isinstance(tree, dict):
        return {key: plain(child) for key, child in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(plain, tree))
    children = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0]
    if not children or not children[0][0]:
        return tree
    return {jax.tree_util.keystr(path, simple=True): plain(child) for path, child in children}


def shaped_like(tree: Any, like: Any, what: str) -> Any:
    """A tree that :func:`plain` gave in the structure of another.

    Raises:
        ``ValueError`` for other names or shapes.
    """
    given, (wanted, treedef) = _named(tree), jax.tree_util.tree_flatten_with_path(like)
    named = _named(like)
    if given.keys() != named.keys():
        name = min(given.keys() ^ named.keys())
        problem = "has" if name in given else "lacks"
        raise ValueError(f"The saved {what} {problem} {name!r}. It has {', '.join(map(repr, given)) or 'nothing'}.")
    for name, leaf in named.items():
        if jnp.shape(given[name]) != jnp.shape(leaf):
            raise ValueError(
                f"The saved {what} has {name!r} of shape {jnp.shape(given[name])}, but that of the model is "
                f"{jnp.shape(leaf)}. Both must be equal."
            )
    return jax.tree.unflatten(treedef, [given[name] for name in map(_name, [path for path, _ in wanted])])


def _named(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
