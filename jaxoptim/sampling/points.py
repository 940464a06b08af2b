"""The checkpoints of a training: parameters, files of them, or one tree of all."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxoptim import checkpoint
from jaxoptim.core import trees
from jaxoptim.core.batches import size_of
from jaxoptim.core.modules import parts_of


class Points(NamedTuple):
    """Checkpoints that are read on demand.

    Attributes:
        named: pairs of a name and a function that returns the parameters.
        length: how many they are; None if it is not known.
        are_there: whether all are in memory already.
    """

    named: Iterator[tuple[Any, Callable[[], Any]]]
    length: int | None
    are_there: bool

    def groups(self, size: int | None) -> Iterator[dict[Any, Any]]:
        """Yield the parameters by name, so many checkpoints at once; None for all.

        Raises:
            ``ValueError`` for two of one name, and for no checkpoint.
        """
        seen: set[Any] = set()
        while chunk := list(itertools.islice(self.named, size)):
            for name, _ in chunk:
                if name in seen:
                    raise ValueError(f"Two checkpoints have the name {name!r}. Give each a name of its own.")
                seen.add(name)
            yield {name: read() for name, read in chunk}
        if not seen:
            raise ValueError("There are no checkpoints. Give at least one.")


def points(given: Any, names: Any, stacked: bool, read: Callable[[Any], Any] | None) -> Points:
    """Checkpoints as :func:`jaxoptim.sampling.llc_over_checkpoints` takes them.

    Raises:
        ``TypeError`` for what is no collection of checkpoints; ``ValueError`` for names that are not as many.
    """
    own: list[Any] | None = None
    found: Iterator[Any]
    count: int | None
    if stacked:
        parts = _Stacked(given)
        found, count, are_there = iter(parts), len(parts), True
    elif isinstance(given, str | os.PathLike) or not isinstance(given, Iterable):
        raise TypeError(
            f"checkpoints is a list, or a mapping of names, but got a {type(given).__name__}. Give [params, ...], or "
            "one tree whose arrays have a first axis of checkpoints with stacked=True."
        )
    else:
        own = list(given) if isinstance(given, Mapping) else None
        each: Any = given.values() if isinstance(given, Mapping) else given
        found, count = iter(each), len(each) if hasattr(each, "__len__") else None
        are_there = count is not None and not any(isinstance(x, str | os.PathLike) for x in each)
    if own is not None and names is not None:
        raise ValueError("checkpoints is a mapping, which has names, but names= was given too. Give one of them.")
    own = own if names is None else list(names)
    if own is not None and count not in (None, len(own)):
        raise ValueError(f"There are {count} checkpoints, but {len(own)} names. Give a name for each.")
    return Points(_named(found, own, read or _read), count, are_there)


def _named(
    found: Iterator[Any], names: Sequence[Any] | None, read: Callable[[Any], Any]
) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """Return names, and functions that return the parameters; paths are read."""
    number = -1
    for number, each in enumerate(found):
        if names is not None and number == len(names):
            raise ValueError(f"There are more checkpoints than names, of which there are {len(names)}. Give all names.")
        is_path = isinstance(each, str | os.PathLike)
        name = (os.fspath(each) if is_path else number) if names is None else names[number]
        yield name, functools.partial(read, each) if is_path else functools.partial(_itself, each)
    if names is not None and number + 1 < len(names):
        raise ValueError(f"There are {number + 1} checkpoints, but {len(names)} names. Give a name for each.")


def _itself(params: Any) -> Any:
    return params


def _read(path: Any) -> Any:
    """The parameters in a file of this library."""
    try:
        return checkpoint.load(path)
    except ValueError as error:
        raise ValueError(f"{error} A file of another kind is read by read=, a function of its path.") from error


class _Stacked(Sequence[Any]):
    """A tree, or a module, whose arrays have a first axis of checkpoints, as a sequence of its parts."""

    def __init__(self, tree: Any) -> None:
        self._parts = parts_of(tree)
        self._arrays = tree if self._parts is None else (self._parts.trained, self._parts.rest)
        leaves = jax.tree.leaves(self._arrays, is_leaf=trees.is_leaf)
        there = {name: x for name, x in zip(trees.names(self._arrays), leaves, strict=True) if x is not None}
        self._count = size_of(there, "checkpoints")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        arrays = jax.tree.map(lambda x: x[index], self._arrays)
        return arrays if self._parts is None else self._parts.definition.joined(*arrays)


def label(name: Any) -> str:
    """Return the label of a checkpoint in messages."""
    return f"checkpoint {name!r}"


def axis(names: Sequence[Any]) -> np.ndarray:
    """Return the names along an axis: numbers if all of them are, else strings."""
    are_numbers = all(isinstance(name, int | float | np.number) and not isinstance(name, bool) for name in names)
    return np.asarray(names) if are_numbers else np.asarray([str(name) for name in names])
