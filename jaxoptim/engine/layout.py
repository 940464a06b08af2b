"""The assignment of parameters to rows of slabs: the static half of a store's arrays."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxoptim.core import Rule, trees
from jaxoptim.core.packing import join, split
from jaxoptim.distributed.layouts import Parts
from jaxoptim.engine.static import Static

WIDTHS = (8, 16, 32, 64, 128)
"""Lengths of rows for parameters of many sizes."""
_ROW_COST, _NARROW_COST, _PADDING_COST = 16, 4, 512
"""What a row costs besides its numbers, a row of one number, and an array that does not fill its rows: in numbers of
a wide row."""


_MANY_SHAPES = 32
"""Where there are more shapes, the pieces of a slab are joined by a few at a time, which compiles faster."""


class Struct(NamedTuple):
    """The name, shape and dtype of a parameter, as compiled programs know it.

    Attributes:
        name: in messages.
        shape: of its value.
        dtype: of its value, by name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def like(self) -> jax.ShapeDtypeStruct:
        """Return shape and dtype for abstract evaluation."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


class Cell(NamedTuple):
    """Parameters that are updated by one run of their rule: the rows of a slab, or a single array.

    Attributes:
        number: its place among the cells.
        members: the numbers of the parameters in the layout.
        row: the shape of a row of the slab; None for a single array that is kept as it is.
        groups: for each of the parameters which of the groups of the cell it belongs to.
        setting: which of the settings they follow; that of a few groups has a vector for each number.
        times: how often one step updates them.
        is_flat: whether the arrays of a slab are one long row each, which is faster for parameters that make the same
            steps under the same numbers; else the compiler repeats work for rows that it is to lay end to end.
        parts: where the parts of a single array are that is updated in parts over a data axis, None for others.
        sharding: of a single array over a mesh while it is updated, None for others.
    """

    number: int
    members: tuple[int, ...]
    row: tuple[int, ...] | None
    groups: tuple[int, ...]
    setting: int
    times: int = 1
    is_flat: bool = True
    parts: Parts | None = None
    sharding: NamedSharding | None = None

    @property
    def is_slab(self) -> bool:
        """Whether the parameters are rows of a slab."""
        return self.row is not None

    @property
    def width(self) -> int:
        """The number of elements of a row."""
        return math.prod(self.row or ())


class Layout(Static):
    """The cells of parameters that stand in the user's tree.

    Args:
        treedef: the structure of the tree that the user sees.
        order: the number of the parameter at each of its leaves; one parameter may stand at several.
        structs: the parameters.
        cells: where they are kept.
    """

    def __init__(
        self, treedef: Any, order: tuple[int, ...], structs: tuple[Struct, ...], cells: tuple[Cell, ...]
    ) -> None:
        self.treedef, self.order, self.structs, self.cells = treedef, order, structs, cells
        self.places = {member: (cell, at) for cell in self.cells for at, member in enumerate(cell.members)}
        self.rows = [
            [-(-self.structs[member].size // cell.width) for member in cell.members] if cell.is_slab else []
            for cell in self.cells
        ]
        """For each slab the number of rows of each parameter; what follows knows slabs by their number too."""

    @functools.cached_property
    def are_rows(self) -> list[bool]:
        """A bool for each parameter: whether it is rows of a slab."""
        return [self.places[index][0].is_slab for index in range(len(self.structs))]

    def tree(self, values: Mapping[str, Any]) -> Any:
        """Return the user's tree, filled with the values of all parameters, given by name."""
        return jax.tree.unflatten(self.treedef, [values[self.structs[number].name] for number in self.order])

    def once(self, leaves: Sequence[Any]) -> Any:
        """Return the user's tree with one item for each parameter; None where a parameter stands a second time."""
        seen: set[int] = set()
        tree = []
        for number in self.order:
            tree.append(None if number in seen else leaves[number])
            seen.add(number)
        return jax.tree.unflatten(self.treedef, tree)

    def names_of(self, members: Iterable[int]) -> frozenset[str]:
        """Return the names of parameters, given by their numbers."""
        return frozenset(self.structs[member].name for member in members)

    def leaves(self, tree: Any, what: str = "grads") -> list[Any]:
        """Return the leaf of a tree for each parameter, None included; a sum for one that stands at several places."""
        like = jax.tree.unflatten(self.treedef, [self.structs[number].name for number in self.order])
        wanted = jax.tree.leaves(like, is_leaf=trees.is_leaf)
        given = zip(trees.leaves_like(tree, like, what), wanted, strict=True)
        leaves = [leaf for leaf, name in given if name is not None]
        found: list[Any] = [None] * len(self.structs)
        for number, leaf in zip(self.order, leaves, strict=True):
            other = found[number]
            found[number] = leaf if other is None else other if leaf is None else other + leaf
        return found

    # Slabs.

    @functools.cached_property
    def owners(self) -> list[np.ndarray]:
        """Return, for each slab, the parameter of each row as its place in the cell."""
        return [np.repeat(np.arange(len(rows)), rows).astype(np.int32) for rows in self.rows]

    @functools.cached_property
    def sizes(self) -> list[int]:
        """The number of elements of each slab."""
        return [sum(rows) * cell.width for rows, cell in zip(self.rows, self.cells, strict=True)]

    @functools.cached_property
    def first_rows(self) -> list[list[int]]:
        """The first row of each parameter in its slab, for each slab."""
        return [[0, *np.cumsum(rows[:-1]).tolist()] for rows in self.rows]

    @functools.cached_property
    def value_places(self) -> list[list[tuple[tuple[int, ...], int]]]:
        """The shape of each parameter and the start of its values, for each slab."""
        return [
            [(self.structs[member].shape, row * cell.width) for member, row in zip(cell.members, first, strict=False)]
            for cell, first in zip(self.cells, self.first_rows, strict=True)
        ]

    def joined(self, cell: Cell, arrays: Sequence[jax.Array]) -> jax.Array:
        """Return the arrays of all parameters of a slab as one flat array."""
        parts = []
        for x, member, rows in zip(arrays, cell.members, self.rows[cell.number], strict=True):
            padding = rows * cell.width - self.structs[member].size
            parts.append(jnp.pad(x.reshape(-1), (0, padding)) if padding else x)
        if len({x.shape for x in arrays}) > _MANY_SHAPES:
            return join(parts, group=8)
        return join(parts)

    def parted(self, cell: Cell, values: jax.Array, offsets: Sequence[Any] | None) -> list[jax.Array]:
        """Split the values of a slab into the arrays of its parameters.

        Args:
            cell: the slab.
            values: its values.
            offsets: where each begins, as traced numbers (default None: they are fixed in the program). On CPUs every
                slice at a fixed offset is a kernel that is compiled by itself, which takes longer than all the rest;
                slices at traced offsets are the same kernel for all arrays of one shape.
        """
        flat, shapes = values.reshape(-1), [self.structs[member].shape for member in cell.members]
        if offsets is not None:
            return [
                jax.lax.dynamic_slice(flat, (offset,), (math.prod(shape),)).reshape(shape)
                for offset, shape in zip(offsets, shapes, strict=True)
            ]
        sizes = []
        for member, rows in zip(cell.members, self.rows[cell.number], strict=True):
            size = self.structs[member].size
            padding = rows * cell.width - size
            sizes += [size, padding] if padding else [size]
        pieces, arrays = iter(split(flat, sizes)), []
        for shape, rows in zip(shapes, self.rows[cell.number], strict=True):
            arrays.append(next(pieces).reshape(shape))
            if rows * cell.width - math.prod(shape):
                next(pieces)
        return arrays


def row_shape(rule: Rule, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the cheapest shape of a row for parameters of these shapes; theirs, if the rule looks at shapes."""
    if not rule.elementwise:
        return shapes[0]
    sizes = Counter(math.prod(shape) for shape in shapes)
    candidates = [1, *WIDTHS, *(size for size, _ in sizes.most_common(4))]

    def cost(width: int) -> int:
        rows = sum(-(-size // width) * times for size, times in sizes.items())
        padded = sum(times for size, times in sizes.items() if size % width)
        return rows * (_NARROW_COST if width == 1 else max(width, 8) + _ROW_COST) + padded * _PADDING_COST

    best = min(candidates, key=cost)
    return () if best == 1 else (best,)
