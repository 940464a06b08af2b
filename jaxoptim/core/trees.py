"""Pytrees whose leaves may be arrays, sparse arrays or None, and the names of their parameters."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.sparse import BCOO


def is_leaf(x: Any) -> bool:
    """What a tree of parameters or gradients is not taken apart beyond."""
    return x is None or isinstance(x, BCOO)


def names(tree: Any) -> list[str]:
    """The dotted path of every leaf, None included, such as ``encoder.0.kernel``."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [jax.tree_util.keystr(path, simple=True, separator=".") or "params" for path, _ in paths]


def leaves_like(tree: Any, like: Any, what: str, like_what: str = "params") -> list[Any]:
    """The leaves of ``tree``, None included, one for each leaf of ``like``.

    Errors:
        ``ValueError`` that names the first parameter at which the two trees part.
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_leaf)
    treedef: Any = jax.tree.structure(tree, is_leaf=is_leaf)
    expected: Any = jax.tree.structure(like, is_leaf=is_leaf)
    if treedef == expected:
        return leaves
    given, wanted = names(tree), names(like)
    if missing := [name for name in wanted if name not in given]:
        problem = f"{what} has nothing for {missing[0]!r}"
    elif extra := [name for name in given if name not in wanted]:
        problem = f"{what} has {extra[0]!r}, which {like_what} lacks"
    else:
        problem = f"{what} has the containers {treedef}, {like_what} has {expected}"
    raise ValueError(
        f"{what} and {like_what} are different trees: {problem}. Give {what} the structure of {like_what}, "
        "with None where there is nothing."
    )


def check_shape(what: str, name: str, given: Any, expected: Any) -> None:
    """Raise a ``ValueError`` that names the parameter if two shapes differ."""
    if tuple(given.shape) != tuple(expected.shape):
        raise ValueError(
            f"The {what} of {name!r} has shape {tuple(given.shape)}, but the parameter has {tuple(expected.shape)}. "
            "They must be equal."
        )
