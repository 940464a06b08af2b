"""Pytrees whose leaves may be arrays, sparse arrays or None, and the names of their parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxoptim.core.foreign import ARRAYS_ALONE, check_not_trained_by_torch
from jaxoptim.core.numerics import is_complex, owned
from jaxoptim.core.shown import shown


def is_leaf(x: Any) -> bool:
    """Whether ``x`` is a leaf of a tree of parameters or gradients: None and sparse arrays are."""
    return x is None or isinstance(x, BCOO)


_WRAPPED = (jax.tree_util.GetAttrKey("value"),)
"""The end of the path to an array in a wrapper such as ``nnx.Param``; left out of its name."""


def names(tree: Any) -> list[str]:
    """Return the dotted path of every leaf, None included, such as ``encoder.0.kernel``."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]
    siblings = Counter(path[:-1] for path in paths)
    paths = [path[:-1] if path[-1:] == _WRAPPED and siblings[path[:-1]] == 1 else path for path in paths]
    return [jax.tree_util.keystr(path, simple=True, separator=".") or "params" for path in paths]


def array_names(tree: Any) -> list[str]:
    """Return the dotted path of every array."""
    leaves = jax.tree.leaves(tree, is_leaf=is_leaf)
    return [name for name, leaf in zip(names(tree), leaves, strict=True) if leaf is not None]


def leaves_like(tree: Any, like: Any, what: str, like_what: str = "params") -> list[Any]:
    """Return the leaves of ``tree``, None included, one for each leaf of ``like``.

    Raises:
        ``ValueError`` that names the first parameter at which the two trees part.
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_leaf)
    treedef: Any = jax.tree.structure(tree, is_leaf=is_leaf)
    expected: Any = jax.tree.structure(like, is_leaf=is_leaf)
    if treedef == expected:
        return leaves
    given, wanted = names(tree), names(like)
    other_root = None if given == wanted else _other_root(tree, like, what, like_what)
    if other_root is not None:
        problem = other_root
    elif missing := [name for name in wanted if name not in given]:
        problem = f"{what} has nothing for {missing[0]!r}"
    elif extra := [name for name in given if name not in wanted]:
        problem = f"{what} has {extra[0]!r}, which {like_what} lacks"
    else:
        problem = f"{what} has the containers wrong: {first_difference(tree, like, like_what)}"
    raise ValueError(
        f"{what} and {like_what} are different trees: {problem}. Give {what} the structure of {like_what}, "
        "with None where there is nothing."
    )


def spread(
    prefix: Any, tree: Any, what: str, like_what: str = "params", is_part: Callable[[Any], bool] = lambda x: x is None
) -> list[Any]:
    """Broadcast the leaves of a prefix of a pytree to all leaves of the pytree below them, None included.

    Args:
        prefix: a tree like ``tree``, or one that has a leaf in the place of some of its subtrees.
        tree: the whole.
        what: the name of ``prefix`` in messages.
        like_what: the name of ``tree`` there.
        is_part: a predicate for further leaves of the prefix (default None).

    Raises:
        ``ValueError`` that names the first leaf at which the two part.
    """
    parts = jax.tree.leaves(prefix, is_leaf=is_part)
    treedef: Any = jax.tree.structure(prefix, is_leaf=is_part)
    try:
        subtrees = treedef.flatten_up_to(tree)
    except ValueError:
        raise ValueError(
            f"{what} is no prefix of {like_what}: {_parting(prefix, tree, what, like_what, is_part)}. Give a tree "
            f"like {like_what}, or one with a leaf in the place of some of its subtrees."
        ) from None
    counts = [len(jax.tree.leaves(subtree, is_leaf=is_leaf)) for subtree in subtrees]
    return [part for part, count in zip(parts, counts, strict=True) for _ in range(count)]


def _parting(prefix: Any, tree: Any, what: str, like_what: str, is_part: Callable[[Any], bool]) -> str:
    """Describe the first place at which a pytree fails to be a prefix of another."""
    given = [path for path, _ in jax.tree_util.tree_flatten_with_path(prefix, is_leaf=is_part)[0]]
    wanted = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]

    def unmatched(paths: list[Any], others: list[Any], is_below: bool) -> str | None:
        for path in paths:
            if not any(a == b[: len(a)] for other in others for a, b in [(other, path) if is_below else (path, other)]):
                return repr(jax.tree_util.keystr(path, simple=True, separator="."))
        return None

    if name := unmatched(given, wanted, False):
        return f"{what} has {name}, which {like_what} lacks"
    if name := unmatched(wanted, given, True):
        return f"{what} has nothing for {name}"
    return f"the containers differ, {type(prefix).__name__} at the top of {what}, {type(tree).__name__} of {like_what}"


def _other_root(tree: Any, like: Any, what: str, like_what: str) -> str | None:
    """Describe the error of a list, tuple or array in place of another root container; None if that is not it."""
    is_array = jax.tree_util.all_leaves([tree], is_leaf=is_leaf)
    if not (is_array or type(tree) in (list, tuple)) or type(tree) is type(like):
        return None
    if jax.tree_util.all_leaves([like], is_leaf=is_leaf):
        return f"{what} is {_kind(tree)}, {like_what} is one array"
    hint = ""
    if type(tree) is tuple and len(tree) == 2 and any(jax.tree_util.all_leaves([x]) and not np.shape(x) for x in tree):
        hint = "; jax.value_and_grad gives (loss, grads), of which the second is meant"
    return f"{what} is {_kind(tree)}, {like_what} is {_kind(like)}{hint}"


def _kind(tree: Any) -> str:
    """Describe a container or an array in a few words."""
    if tree is None:
        return "None"
    if jax.tree_util.all_leaves([tree], is_leaf=is_leaf):
        return f"an array of shape {np.shape(tree)}" if np.shape(tree) else "a scalar"
    size = f" of {len(tree)}" if isinstance(tree, list | tuple | dict) else ""
    return f"a {type(tree).__name__}{size}"


def first_difference(tree: Any, like: Any, like_what: str) -> str:
    """Describe the first place at which two pytrees with the same names have different containers."""
    path, given, wanted = "", tree, like
    while type(given) is type(wanted) and not jax.tree_util.all_leaves([given], is_leaf=is_leaf):
        pairs = [_children(given), _children(wanted)]
        found = next(
            ((name, a, b) for (name, a), (_, b) in zip(*pairs, strict=False) if _shape(a) != _shape(b)),
            None,
        )
        if found is None:
            break
        path, given, wanted = f"{path}.{found[0]}".lstrip("."), found[1], found[2]
    return f"{_kind(given)} at {repr(path) if path else 'its root'}, where {like_what} has {_kind(wanted)}"


def _children(tree: Any) -> list[tuple[str, Any]]:
    """Return the children of a container, with their names."""
    parts = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="."), part) for path, part in parts]


def _shape(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=is_leaf)


def arrays_like(tree: Any, like: Any, what: str, like_what: str) -> list[Any]:
    """Return the arrays of ``tree``, one for each array of ``like`` and of its shape; none for a None in both.

    Raises:
        ``ValueError`` that names the first parameter at which the two trees part; ``TypeError`` for a complex
        array in the place of a real one.
    """
    given = leaves_like(tree, like, what, like_what)
    expected = jax.tree.leaves(like, is_leaf=is_leaf)
    for index, (leaf, array) in enumerate(zip(given, expected, strict=True)):
        if (leaf is None) != (array is None):
            lacking, other = (what, like_what) if leaf is None else (like_what, what)
            raise ValueError(
                f"{lacking} has nothing for {names(like)[index]!r}, but {other} has an array. Give both the same."
            )
        if leaf is not None and np.shape(leaf) != array.shape:
            raise ValueError(
                f"{names(like)[index]!r} has shape {np.shape(leaf)} in {what}, but {array.shape} in {like_what}. "
                "They must be equal."
            )
        if leaf is not None and np.iscomplexobj(leaf) and not is_complex(array):
            raise TypeError(
                f"{names(like)[index]!r} is complex in {what}, but not in {like_what}. Give the real part, or begin "
                "with a complex array."
            )
    return [leaf for leaf in given if leaf is not None]


def owned_arrays(tree: Any) -> Any:
    """Copy the NumPy and torch arrays of a pytree: their owner may change them before a program reads them."""
    leaves = jax.tree.leaves(tree)
    # A tree has many leaves and few types: one leaf of each is looked at.
    foreign = {kind for kind, leaf in dict(zip(map(type, leaves), leaves, strict=True)).items() if _is_foreign(leaf)}
    if not foreign:
        return tree
    return jax.tree.map(lambda leaf: owned(leaf) if type(leaf) in foreign else leaf, tree)


def _is_foreign(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) or (hasattr(leaf, "__dlpack__") and not isinstance(leaf, jax.Array))


def check_array(what: str, name: str, x: Any) -> Any:
    """Return an array-like leaf as an array; raise if it is not floating or complex."""
    x = as_array(what, name, x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        how = " (eqx.partition and nnx.split do so)" if what == "parameter" else ""
        raise TypeError(
            f"The {what} {name!r} has dtype {x.dtype}. Floating and complex arrays are optimized; "
            f"put None in the place of anything else{how}."
        )
    return x


def as_array(what: str, name: str, x: Any) -> Any:
    """Return an array-like leaf as an array; raise for anything else, and for parameters that torch trains."""
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return x
    is_parameter = what == "parameter"
    if is_parameter:
        check_not_trained_by_torch(f"The parameter {name!r}", x)
    if (kind := no_data(x)) is not None and (isinstance(x, np.ndarray) or not hasattr(x, "__array__")):
        raise TypeError(f"The {what} {name!r} is {kind}, no array. {ARRAYS_ALONE if is_parameter else NONE_ELSE}")
    return jnp.asarray(x)


NONE_ELSE = "Put None in the place of anything but an array."
"""Advice for a leaf of gradients that is not an array, for error messages."""


def no_data(x: Any) -> str | None:
    """Describe a value that no compiled program can take: text, a function, an array of such; None for an array."""
    kind = type(x)
    if isinstance(x, np.ndarray):
        return f"an array of dtype {x.dtype}" if x.dtype.kind in "OSUMm" else None
    if issubclass(kind, str | bytes):
        return f"the text {shown(x, 40)}"
    is_array = not isinstance(x, type) and hasattr(x, "dtype") and hasattr(x, "shape")
    is_array = is_array or hasattr(kind, "__jax_array__") or hasattr(kind, "__dlpack__")
    return None if is_array or issubclass(kind, (int, float, complex)) else f"a {kind.__name__}"


def first_no_data(tree: Any) -> tuple[str, str] | None:
    """Return the name of the first leaf that is not an array, and its description."""
    leaves = zip(names(tree), jax.tree.leaves(tree, is_leaf=is_leaf), strict=True)
    return next(((name, kind) for name, x in leaves if x is not None and (kind := no_data(x)) is not None), None)


def check_shape(what: str, name: str, given: Any, expected: Any) -> None:
    """Raise a ``ValueError`` that names the parameter if two shapes differ."""
    if tuple(given.shape) != tuple(expected.shape):
        raise ValueError(
            f"The {what} of {name!r} has shape {tuple(given.shape)}, but the parameter has {tuple(expected.shape)}. "
            "They must be equal."
        )
