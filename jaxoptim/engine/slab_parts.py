"""The arrays of single parameters within those of a slab."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxoptim.core.packing import part, read, with_part
from jaxoptim.engine.layout import Cell, Layout
from jaxoptim.engine.records import placed

FEW_PARTS = 8
"""Up to so many parts of a slab are read, or written, one by one."""
_FEW_SHAPES = 16
"""Up to so many shapes have a program each to read them."""


def place_of(layout: Layout, cell: Cell, at: int, array: Any, shape: tuple[int, ...]) -> int:
    """Return the start of the part of a parameter of a given shape in an array of a slab."""
    first, size = layout.first_rows[cell.number][at], math.prod(shape)
    is_like_values = array.size == layout.sizes[cell.number] and size == layout.structs[cell.members[at]].size
    return first * (cell.width if is_like_values else size)


def part_of(layout: Layout, cell: Cell, at: int, array: Any, shape: tuple[int, ...]) -> Any:
    """Return the part of one parameter; all of a single array."""
    return part(array, place_of(layout, cell, at, array, shape), shape, is_whole=True) if cell.is_slab else array


def values_of(layout: Layout, cell: Cell, array: Any) -> list[Any]:
    """Return the values of all parameters of a cell."""
    return _all_parts(array, layout.value_places[cell.number]) if cell.is_slab else [array]


def parts_of(layout: Layout, cell: Cell, array: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Return the parts of all parameters of a cell."""
    if not cell.is_slab:
        return [array]
    return _all_parts(array, [(shape, place_of(layout, cell, at, array, shape)) for at, shape in enumerate(shapes)])


def _all_parts(array: Any, places: list[tuple[tuple[int, ...], int]]) -> list[Any]:
    if len({shape for shape, _ in places}) <= _FEW_SHAPES:
        return read(array, places, is_whole=True)
    # A program for each shape would take longer to compile than a copy of all.
    whole = np.asarray(array).reshape(-1)
    return [
        placed(jnp.asarray(whole[begin : begin + math.prod(shape)].reshape(shape).copy()), array.sharding)
        for shape, begin in places
    ]


def host_part_of(layout: Layout, cell: Cell, at: int, array: Any, shape: tuple[int, ...]) -> Any:
    """Return the part of one parameter of an array on the host, flat if the array is that of a slab."""
    if not cell.is_slab:
        return array
    begin = place_of(layout, cell, at, array, shape)
    return array[begin : begin + math.prod(shape)].reshape(shape)


def with_values(layout: Layout, cell: Cell, array: Any, values: Mapping[int, Any]) -> Any:
    """Return the values of a cell with those of some parameters replaced, by their places in it."""
    if not cell.is_slab:
        return values[0]
    if len(values) < FEW_PARTS:
        for at, value in values.items():
            array = with_part(array, place_of(layout, cell, at, array, value.shape), value)
        return array
    whole = np.array(array)
    for at, value in values.items():
        begin = place_of(layout, cell, at, whole, value.shape)
        whole.reshape(-1)[begin : begin + value.size] = np.asarray(value).reshape(-1)
    return placed(jnp.asarray(whole), array.sharding)
