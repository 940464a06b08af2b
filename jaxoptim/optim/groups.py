"""Conversion of a user's parameters into groups."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.sparse import BCOO

from jaxoptim.core import trees
from jaxoptim.core.foreign import ARRAYS_ALONE, check_not_trained_by_torch
from jaxoptim.core.modules import check_not_inside, is_nnx
from jaxoptim.core.shown import shown
from jaxoptim.optim.parameter import Parameter

Selector = Any
"""Which parameters of a pytree: a regular expression that matches a whole dotted path, a predicate of it or of
``(path, array)``, or a tree of bools like the parameters, or a prefix of one."""
Groups = Sequence[tuple[Selector, dict[str, Any]]]
"""Options for some parameters of one pytree: a list of ``(selector, options)``."""

Selectors = Selector | Sequence[Selector]
"""One selector or several, each of which may also be the path of a subtree."""


def is_named_pair(x: Any) -> bool:
    """Return whether ``x`` is ``(name, parameter)``."""
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str)


def is_group(x: Any) -> bool:
    """Return whether ``x`` is one of torch's group dicts."""
    return isinstance(x, dict) and "params" in x


def listed(params: Any) -> Any:
    """Return the parameters that were given, iterators read out; raise for a type that no optimizer takes."""
    check_not_trained_by_torch("params", params)
    if isinstance(params, Parameter):
        raise TypeError(
            "params argument given to the optimizer should be an iterable of Parameters or dicts, or a pytree of "
            f"arrays, but got {params}. Give a list: [parameter]."
        )
    if isinstance(params, set | frozenset):
        raise TypeError(
            "optimizer parameters need to be organized in ordered collections, but the ordering of parameters in "
            "sets will change between runs. Please use a list instead."
        )
    if isinstance(params, Iterable) and jax.tree_util.all_leaves([params]) and not hasattr(params, "__array__"):
        params = list(params)
    if isinstance(params, list | tuple) and params and is_group(params[0]):
        for index, group in enumerate(params):
            if not is_group(group):
                raise KeyError(
                    f"params: the first item is a group dict, but item {index} has no 'params' key. "
                    "Give every group its parameters, {'params': ...}."
                )
    return params


def parameters_in(params: Any) -> tuple[Any, list[str] | None]:
    """Return the parameters of a group as a tree of :class:`Parameter`, and their names if they came as pairs.

    Args:
        params: a pytree of arrays or of parameters; an iterable of either; or of ``(name, parameter)``.

    Returns:
        The tree, in which each array has become a :class:`Parameter` of its own, and the names or None.

    Raises:
        ``TypeError`` for anything else, with its path; ``ValueError`` if only some have names.
    """
    if is_nnx(params):
        raise TypeError(
            "A module of nnx stands alone: optim.AdamW(model). Give groups its nnx.state(model, nnx.Param), or select "
            "within it: groups=[(selector, options)]."
        )
    params = [params] if isinstance(params, Parameter) else listed(params)
    if isinstance(params, list | tuple) and any(is_named_pair(item) for item in params):
        if not all(is_named_pair(item) for item in params):
            raise ValueError("all optimizer params should be with/without names. Some param names are missing")
        return [_named(value, name) for name, value in params], [name for name, _ in params]
    check_not_inside(params)
    for name, leaf in zip(trees.names(params), _with_none(params), strict=True):
        if isinstance(leaf, BCOO):
            raise ValueError(
                f"optimizer can only optimize dense arrays, but the parameter {name!r} is a BCOO. Give its todense(); "
                "only its gradient may be a BCOO, of dense rows."
            )
    leaves, treedef = jax.tree.flatten(params)
    names = trees.array_names(params)
    given = [isinstance(leaf, Parameter) for leaf in leaves]
    if any(given):
        if not all(given):
            name, leaf = next((n, x) for n, x, ours in zip(names, leaves, given, strict=True) if not ours)
            raise TypeError(
                f"optimizer can only optimize Parameters or a pytree of arrays, but among Parameters the one at "
                f"{name!r} is {type(leaf).__name__}. Wrap it: optim.Parameter(value)."
            )
        return params, None
    return jax.tree.unflatten(treedef, [_made(x, name) for x, name in zip(leaves, names, strict=True)]), None


def selected(
    tree: Any,
    names: Sequence[str] | None,
    groups: Sequence[tuple[Selector, dict[str, Any]]],
    check: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Return the groups that selectors make of a tree: the first that matches, or a last one for the rest.

    Selectors see the names of the parameters if they were given, else their paths. ``check`` raises for options that
    are not allowed.

    Raises:
        ``ValueError`` for a selector that matches nothing; ``TypeError`` for what is not ``(selector, options)``.
    """
    params = jax.tree.leaves(tree)
    paths = names or trees.array_names(tree)

    def group(indices: Iterable[int]) -> dict[str, Any]:
        members: dict[str, Any] = {"params": [params[index] for index in indices]}
        return members if names is None else {**members, "param_names": [names[index] for index in indices]}

    chosen: list[dict[str, Any]] = []
    left = dict(enumerate(paths))
    for entry in groups:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], dict)):
            raise TypeError(f"groups takes a list of (selector, options), but one item is {shown(entry)}.")
        check(entry[1])
        selects = selection(entry[0], tree, paths)
        mine = [index for index in left if selects[index]]
        if not mine:
            raise _nothing_selected("groups: no parameter is left", entry[0], paths)
        chosen.append({**group(mine), **entry[1]})
        left = {index: name for index, name in left.items() if not selects[index]}
    return [*chosen, group(left)] if left else chosen


def selection(selector: Selector, tree: Any, paths: Sequence[str]) -> list[bool]:
    """Return a mask of the parameters that a selector selects.

    Args:
        selector: see :data:`Selector`. A predicate that requires two positional arguments gets the array too.
        tree: the parameters, arrays or :class:`Parameter`.
        paths: their names, in the order of the tree's leaves.

    Raises:
        ``TypeError`` for anything but a selector; ``ValueError`` for a regular expression that does not compile, and
        for a mask of another structure.
    """
    if is_mask(selector):  # before what can be called: a module of bools can
        parts = zip(trees.spread(selector, tree, "the mask of groups"), _with_none(tree), strict=True)
        return [bool(part) for part, leaf in parts if leaf is not None]
    if not (callable(selector) and _takes_two(selector)):
        matches = predicate(selector)
        try:
            return [bool(matches(path)) for path in paths]
        except AttributeError as error:
            raise TypeError(
                f"{shown(selector)} selects by the path, a str, and failed: {error}. A predicate that looks at the "
                "array too takes two arguments: lambda path, array: array.ndim > 1."
            ) from error
    values = [leaf.value if isinstance(leaf, Parameter) else leaf for leaf in jax.tree.leaves(tree)]
    return [bool(selector(path, value)) for path, value in zip(paths, values, strict=True)]


def chosen(selectors: Selectors, tree: Any, paths: Sequence[str], what: str) -> list[bool]:
    """Return a mask of the parameters that at least one of some selectors selects.

    Args:
        selectors: one or several; a regular expression also selects everything below a path.
        tree: the parameters.
        paths: their names, in the order of the tree's leaves.
        what: who asks, for messages.

    Raises:
        What :func:`selection` raises; ``ValueError`` for a selector that selects nothing.
    """
    several = isinstance(selectors, list | tuple) and not is_mask(selectors)
    found = [False] * len(paths)
    for selector in selectors if several else [selectors]:
        if isinstance(selector, str):
            predicate(selector)  # an error names it as it was given
        selects = selection(rf"(?:{selector})(?:\..*)?" if isinstance(selector, str) else selector, tree, paths)
        if not any(selects):
            raise _nothing_selected(f"{what}: there is no parameter", selector, paths)
        found = [was or now for was, now in zip(found, selects, strict=True)]
    return found


def _nothing_selected(what: str, selector: Selector, paths: Sequence[str]) -> ValueError:
    return ValueError(
        f"{what} that {_shown(selector)} selects. A regular expression must match the whole path. The paths are "
        f"{', '.join(paths[:20])}{', ...' if len(paths) > 20 else ''}."
    )


def predicate(selector: Selector) -> Callable[[str], Any]:
    """Return whether a selector selects a path.

    Raises:
        ``TypeError`` for anything but a selector of paths; ``ValueError`` for a regular expression that does not
        compile.
    """
    if isinstance(selector, str | re.Pattern):
        try:
            return re.compile(selector).fullmatch
        except re.error as error:
            raise ValueError(f"{selector!r} is no regular expression: {error}.") from None
    if callable(selector):
        return selector
    raise TypeError(f"A selector is a regular expression or a predicate of the path, but got {shown(selector)}.")


def is_mask(selector: Any) -> bool:
    """Return whether a selector is a tree of bools."""
    leaves = jax.tree.leaves(selector)
    return bool(leaves) and all(isinstance(leaf, bool | np.bool_) for leaf in leaves)


def _takes_two(predicate: Any) -> bool:
    """Return whether a predicate requires a path and an array."""
    try:
        parameters = inspect.signature(predicate).parameters.values()
    except ValueError:  # of some functions that are written in C
        return False
    either = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(x.kind in either and x.default is inspect.Parameter.empty for x in parameters) == 2


def _shown(selector: Any) -> str:
    return "the mask" if is_mask(selector) else shown(selector)


def _with_none(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=trees.is_leaf)


def _named(value: Any, name: str) -> Parameter:
    if not isinstance(value, Parameter):
        return _made(value, name)
    if value.name is None:
        value.name = name
    return value


def _made(value: Any, name: str) -> Parameter:
    """Return an array as a parameter."""
    check_not_trained_by_torch(f"One of the params, {name!r},", value)
    if isinstance(value, int | float | complex) or hasattr(value, "__array__"):
        return Parameter(value, name)
    raise TypeError(
        f"optimizer can only optimize arrays and Parameters, but one of the params, {name!r}, is "
        f"{type(value).__name__}. {ARRAYS_ALONE}"
    )
