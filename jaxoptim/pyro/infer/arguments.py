"""The split of a model's arguments into traced data and static values that choose the compiled program."""

from __future__ import annotations

import copy
from typing import Any

import jax
import numpy as np

from jaxoptim.core import trees


class _Traced:
    """A placeholder for an array or a float."""

    def __repr__(self) -> str:
        return "<traced>"


_TRACED = _Traced()


class Arguments:
    """The arguments of one call, split into traced data and static values.

    Arrays, also of NumPy, and Python's floats and complex numbers are data: another value runs the same program. All
    else (ints, bools, strings, None, functions, and the containers) is static: each combination has its own program.
    An int is static because sizes of plates and layers must be; a count that changes at each step goes in as a float
    or an array.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.

    Attributes:
        traced: the data.
        form: what does not change within one program, hashable: containers and static values.
        program: ``form`` and the shapes and dtypes of the data, hashable.

    Raises:
        ``TypeError`` that names an argument which is neither data nor hashable, or an array of another library.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self._treedef = jax.tree.flatten((args, kwargs))
        kinds = [_kind(leaf) for leaf in leaves]
        self.traced = trees.owned_arrays([x for x, kind in zip(leaves, kinds, strict=True) if kind is not None])
        self._leaves = [_TRACED if kind is not None else x for x, kind in zip(leaves, kinds, strict=True)]
        # 1, 1.0 and True are equal, but not the same argument.
        self.form = (self._treedef, tuple((type(x), x) for x in self._leaves))
        self.program = (self.form, tuple(kind for kind in kinds if kind is not None))
        if None not in kinds:
            return
        try:
            hash(self.form)
        except TypeError:
            self._explain()
            raise
        if any(hasattr(x, "__array__") and not isinstance(x, np.generic) for x in self._leaves):
            self._explain()

    def rebuilt(self, traced: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments with other data."""
        data = iter(traced)
        return jax.tree.unflatten(self._treedef, [next(data) if x is _TRACED else x for x in self._leaves])

    def span(self, key: int | str) -> tuple[int, int]:
        """Return the range of one argument's data, given by its number or name, among the data of all."""
        args, kwargs = jax.tree.unflatten(self._treedef, range(len(self._leaves)))
        places = jax.tree.leaves(args[key] if isinstance(key, int) else kwargs[key])
        before = sum(x is _TRACED for x in self._leaves[: min(places, default=0)])
        return before, before + sum(self._leaves[place] is _TRACED for place in places)

    def without_data(self) -> Arguments:
        """Return a copy without the data, which may be kept."""
        new = copy.copy(self)
        new.traced = []
        return new

    def static(self) -> dict[str, Any]:
        """The static values by the names of their arguments."""
        return {name: x for name, x in zip(self._names(), self._leaves, strict=True) if x is not _TRACED}

    def _names(self) -> list[str]:
        """The name of each leaf in messages."""
        tree = jax.tree.unflatten(self._treedef, range(len(self._leaves)))
        names = []
        for (place, first, *rest), _ in jax.tree_util.tree_flatten_with_path(tree)[0]:
            what = f"number {first.idx + 1}" if place.idx == 0 else repr(first.key)
            names.append(what + jax.tree_util.keystr(tuple(rest)))
        return names

    def _explain(self) -> None:
        """Raise for the first leaf that cannot choose a program, if there is one."""
        for name, leaf in self.static().items():
            if hasattr(leaf, "__array__") and not isinstance(leaf, np.generic):
                kind = f"{type(leaf).__module__}.{type(leaf).__name__}"
                raise TypeError(f"The argument {name} is a {kind}. Give jax.numpy.asarray(...) of numbers.")
            try:
                hash(leaf)
            except TypeError:
                raise TypeError(
                    f"The argument {name} is of type {type(leaf).__name__}, which is not hashable. Arguments are "
                    "arrays and floats, which are traced, or hashable values such as strings, ints, bools, tuples and "
                    "functions, each of which has its own program."
                ) from None


def _kind(x: Any) -> Any:
    """Return the part of an array or float that a compiled program depends on; None for anything else."""
    if isinstance(x, jax.Array):
        return x.shape, x.dtype, getattr(x, "weak_type", False)
    if isinstance(x, np.ndarray | np.inexact):
        # Strings and objects are no data; they are refused by name.
        return None if x.dtype.kind in "OSUMmV" else (x.shape, x.dtype)
    return type(x) if isinstance(x, float | complex) else None
