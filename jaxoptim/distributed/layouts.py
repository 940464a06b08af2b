"""Layouts of the arrays of an optimizer state over a mesh, derived from those of its parameters."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxoptim.core import transformation, trees
from jaxoptim.core.shown import shown
from jaxoptim.core.spreading import constrained

Axes = tuple[str, ...]
"""Names of axes of a mesh."""


class Placed(NamedTuple):
    """The name, shape and layout of a parameter on a mesh.

    Attributes:
        name: its dotted path.
        shape: its shape.
        spec: the axes of the mesh along each of its dimensions.
    """

    name: str
    shape: tuple[int, ...]
    spec: PartitionSpec


def spread(param: Placed | Held, mesh: Mesh, axes: Axes) -> PartitionSpec:
    """Return a parameter's layout with the longest dimension that these axes divide sharded along them too.

    It is the parameter's own layout if that is sharded along them already, or if they divide no dimension.
    """
    entries = _entries(param.spec, len(param.shape))
    if set(axes) & set(itertools.chain(*entries)):
        return param.spec
    parts = [math.prod(mesh.shape[axis] for axis in (*entry, *axes)) for entry in entries]
    fitting = [at for at, length in enumerate(param.shape) if length and length % parts[at] == 0]
    if not fitting:
        return param.spec
    at = max(fitting, key=lambda at: (not entries[at], param.shape[at]))
    return _spec([(*entry, *axes) if place == at else entry for place, entry in enumerate(entries)])


def is_along(spec: PartitionSpec, axes: Axes) -> bool:
    """Whether a layout shards a dimension along one of these axes."""
    return bool(set(axes) & set(itertools.chain(*_entries(spec, len(spec)))))


class Held(NamedTuple):
    """The name, shape and layout of an array of a state.

    Attributes:
        name: the name of its parameter, or its own path.
        shape: its shape.
        spec: its layout.
        is_owned: whether it belongs to a parameter.
    """

    name: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    is_owned: bool


def state_specs(state: Any, params: Any, placed: Sequence[Placed | None]) -> list[Held | None]:
    """Return the layout of each leaf of a state, None for a leaf that is None.

    An array belongs to the parameter whose path is part of its own: at its end, as in all states of optax that are
    pytrees like the parameters, or split between its front and its end. It has the layout of the parameter
    along the dimensions that the two share. An array of no parameter is replicated.

    Args:
        state: arrays, or their shapes.
        params: the tree of parameters.
        placed: the layouts of its leaves, None for those that are None.
    """
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params, is_leaf=trees.is_leaf)[0]]
    known = {path: its for path, its in zip(paths, placed, strict=True) if its is not None}
    lengths = sorted({len(path) for path in known}, reverse=True)
    found: list[Held | None] = []
    for path, x in jax.tree_util.tree_flatten_with_path(state, is_leaf=trees.is_leaf)[0]:
        found.append(None if x is None else _held(path, x, known, lengths))
    return found


def _held(path: tuple[Any, ...], x: Any, known: dict[Any, Placed], lengths: Sequence[int]) -> Held:
    shape = tuple(x.shape)
    for its in _owners(path, known, lengths):
        if (spec := _inherited(shape, its)) is not None:
            return Held(its.name, shape, spec, True)
    return Held(jax.tree_util.keystr(path, simple=True, separator="."), shape, PartitionSpec(), False)


def _owners(path: tuple[Any, ...], known: dict[Any, Placed], lengths: Sequence[int]) -> Iterator[Placed]:
    """Yield the parameters whose path is part of another path, the longest first."""
    for length in lengths:
        for front in range(length + 1 if length <= len(path) else 0):
            its = known.get((*path[:front], *path[len(path) - (length - front) :]))
            if its is not None:
                yield its


def _inherited(shape: tuple[int, ...], param: Placed) -> PartitionSpec | None:
    """Return the layout of an array that belongs to a parameter; None if it shares no dimension with it."""
    entries, whole = _entries(param.spec, len(param.shape)), param.shape
    more = len(shape) - len(whole)
    if more >= 0 and shape[more:] == whole:  # the same, or a stack of them
        return _spec([()] * more + entries)
    if more == 0 and all(a in (1, b) for a, b in zip(shape, whole, strict=True)):  # means over some dimensions
        return _spec([entry if a == b else () for a, b, entry in zip(shape, whole, entries, strict=True)])
    if more < 0:  # the same without these dimensions
        kept = [at for at in itertools.combinations(range(len(whole)), len(shape)) if _taken(whole, at) == shape]
        specs = [_spec(_taken(entries, at)) for at in kept]
        if specs:
            return specs[0] if all(spec == specs[0] for spec in specs) else PartitionSpec()
    return None


def _taken(values: Sequence[Any], at: Sequence[int]) -> tuple[Any, ...]:
    return tuple(values[place] for place in at)


def _entries(spec: PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    """Return the mesh axes along each dimension."""
    entries = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]
    return entries + [()] * (ndim - len(entries))


def _spec(entries: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """Normalize a layout, so that equivalent ones compare equal."""
    short = list(entries)
    while short and not short[-1]:
        short.pop()
    return PartitionSpec(*(None if not entry else entry[0] if len(entry) == 1 else entry for entry in short))


def sharding_on(mesh: Mesh, spec: PartitionSpec, ndim: int) -> NamedSharding:
    """Return the sharding of an array; on a mesh of explicit axes with an entry for each dimension, as types have."""
    if AxisType.Explicit in mesh.axis_types:
        spec = PartitionSpec(*spec, *[None] * (ndim - len(spec)))
    return NamedSharding(mesh, spec)


class Parts(NamedTuple):
    """The shardings of an array that is updated in parts.

    Attributes:
        mesh: the mesh.
        whole: the sharding of the array itself.
        parts: the sharding of its moments, and of its gradient and itself in an update.
        shape: its shape.
    """

    mesh: Mesh
    whole: NamedSharding
    parts: NamedSharding
    shape: tuple[int, ...]

    def slot(self, x: Any) -> NamedSharding | None:
        """Return the sharding of a slot; None for a slot that is None."""
        if x is None:
            return None
        spec = _inherited(tuple(x.shape), Placed("", self.shape, self.parts.spec))
        return sharding_on(self.mesh, PartitionSpec() if spec is None else spec, len(x.shape))


def parts_of(sharding: Any, shape: tuple[int, ...], axes: Axes) -> Parts | None:
    """Return the shardings of an array split over data axes; None without axes, and for an array on no mesh."""
    if not axes or not isinstance(sharding, NamedSharding) or not isinstance(mesh := sharding.mesh, Mesh):
        return None
    spec = spread(Placed("", shape, sharding.spec), mesh, axes)
    return Parts(mesh, sharding, sharding_on(mesh, spec, len(shape)), shape)


Whole = Mapping[str, tuple[tuple[int, ...], int]]
"""The arrays whose state is not partitioned, by name: their shapes, and the bytes of their state."""


def warn_of_whole(what: str, mesh: Mesh, axes: Axes, whole: Whole, level: int) -> None:
    """Warn of arrays that the data axes do not divide, if any.

    Args:
        what: the name of the function that the axes were given to.
        mesh: their mesh.
        axes: the axes.
        whole: the arrays.
        level: the number of calls between here and the user's line.
    """
    if not whole:
        return
    count, size = math.prod(mesh.shape[axis] for axis in axes), sum(size for _, size in whole.values())
    first = ", ".join(f"{name!r} {shape}" for name, (shape, _) in list(whole.items())[:5])
    warnings.warn(
        f"The axis {', '.join(map(repr, axes))} of {what}, {count} devices, divides no dimension of {len(whole)} "
        f"arrays, whose state, {size} bytes, is whole on every device: {first}{', ...' if len(whole) > 5 else ''}. "
        f"Where that is too much, make a dimension of them a multiple of {count}.",
        stacklevel=level + 1,
    )


def check_axes(what: str, mesh: Mesh, axis: Any) -> Axes:
    """Return the data axes by name; raise for one that the mesh lacks."""
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    if missing := [name for name in axes if name not in mesh.axis_names] or ([] if axes else [()]):
        raise ValueError(
            f"Invalid axis: {shown(missing[0])}. {what} takes an axis of the mesh: "
            f"{', '.join(map(repr, mesh.axis_names))}."
        )
    return axes


def laid_out(tree: Any, shardings: Sequence[NamedSharding | None]) -> Any:
    """Constrain the dense arrays of a pytree to shardings, which the compiler may not change."""

    def under(x: Any, sharding: NamedSharding | None) -> Any:
        return x if sharding is None or trees.is_leaf(x) else constrained(x, sharding)

    leaves, treedef = jax.tree.flatten(tree, is_leaf=trees.is_leaf)
    return jax.tree.unflatten(treedef, [under(x, its) for x, its in zip(leaves, shardings, strict=True)])


def without_shardings(tree: Any) -> Any:
    """Return the shapes and dtypes of a pytree."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def as_transformation(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """Turn a rule, a transformation or a Pyro-style optimizer into a transformation."""
    if isinstance(optimizer, optax.GradientTransformation):
        return optax.with_extra_args_support(optimizer)
    return transformation(optimizer)
