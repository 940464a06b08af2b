"""Put records into slabs: group parameters that share a slab, and make its arrays without a compiled program."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxoptim.core import Rule, as_jax, init
from jaxoptim.core.numerics import placed_like
from jaxoptim.distributed.layouts import Parts, parts_of
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.layout import Cell, Layout, Struct, row_shape
from jaxoptim.engine.numbers import Form, common_forms
from jaxoptim.engine.records import NOT_STARTED, Group, Record, complete, other_slots, placed
from jaxoptim.engine.slots import abstract_slots, scalar_slots

MAX_SIZE = 16384
"""Larger arrays stay by themselves, as in :func:`jaxoptim.pack`: to copy them would cost more than it saves."""
_OWN_SLAB = 4096
"""So many numbers in the small arrays of each of a few groups repay a slab, and kernels, of their own."""
_FEW_GROUPS = 4

_State = tuple[Any, int, dict[str, Any] | None]
"""The value of a parameter, its count, and its slots, None before the first update."""


class View(NamedTuple):
    """The structure in which a user sees the parameters.

    Attributes:
        treedef: of the tree.
        leaves: the parameters at its leaves.
    """

    treedef: Any
    leaves: tuple[Any, ...]


class Frozen(NamedTuple):
    """Parameters in slabs.

    Attributes:
        params: the parameters; what follows knows them by their numbers in it.
        groups_of: the group of each parameter.
        groups_in: the groups of each setting that cells follow, those of slabs first.
        num_shared: how many of the settings slabs follow.
        forms: in which the settings of the groups stand together.
        layout: which rows are whose.
        contents: values, slots and counts.
        others: entries of state that the rules do not keep, by parameter.
        unstarted: the parameters without state.
        is_even: whether all parameters have made the same steps, those without state aside.
    """

    params: list[Any]
    groups_of: list[int]
    groups_in: list[list[int]]
    num_shared: int
    forms: list[Form]
    layout: Layout
    contents: Contents
    others: dict[Any, dict[str, Any]]
    unstarted: set[int]
    is_even: bool


def frozen(
    groups: Sequence[Group], labels: Mapping[Any, str], view: View, records: Mapping[Any, Record], alone: set[Any]
) -> Frozen:
    """Put parameters into slabs.

    Args:
        groups: the parameters and their settings.
        labels: a name for each parameter, for messages.
        view: the structure in which gradients come.
        records: the record of each parameter.
        alone: parameters that stand by themselves because their gradients are sparse.

    Raises:
        ``ValueError`` for a slot of another shape.
    """
    members = [
        _Member(param, at, times)
        for at, group in enumerate(groups)
        for param, times in zip(group.params, group.times, strict=True)
    ]
    params, groups_of = [member.param for member in members], [member.group for member in members]
    rules = [groups[at].apart.setting.rule for at in groups_of]
    number = {param: index for index, param in enumerate(params)}
    forms = common_forms([group.apart for group in groups])
    structs = [Struct(labels[param], tuple(param.shape), str(jnp.dtype(param.dtype))) for param in params]
    cells, groups_in, num_shared = _cells(members, groups, _kinds(groups, forms, members, records, alone), records)
    layout = Layout(view.treedef, tuple(number[param] for param in view.leaves), tuple(structs), tuple(cells))
    states = [complete(records[param], groups[at], labels[param], param) for param, at, _ in members]
    counts = [count for _, count, _ in states]
    arrays = [
        _arrays(layout, cell, rules[cell.members[0]], states, records[params[cell.members[0]]].sharding)
        for cell in cells
    ]
    return Frozen(
        params,
        groups_of,
        groups_in,
        num_shared,
        forms,
        layout,
        Contents(jax.device_put(np.array(counts, np.int32)), arrays),
        {param: others for param, at, _ in members if (others := other_slots(records[param], groups[at]))},
        {index for index, count in enumerate(counts) if count == NOT_STARTED},
        _is_even(layout, rules, states),
    )


class _Member(NamedTuple):
    """A parameter that has yet to be given a cell."""

    param: Any
    group: int
    times: int


class _Alone(NamedTuple):
    """The kind of a parameter that has a cell to itself."""

    param: Any


def _kinds(
    groups: Sequence[Group],
    forms: Sequence[Form],
    members: Sequence[_Member],
    records: Mapping[Any, Record],
    alone: set[Any],
) -> list[Hashable]:
    """Return a key for each parameter; parameters of equal keys share a cell."""
    kinds: list[Hashable] = []
    for param, at, times in members:
        apart, sharding = groups[at].apart, records[param].sharding
        rule = apart.setting.rule
        is_small = 0 < math.prod(param.shape) <= MAX_SIZE and len(sharding.device_set) == 1
        if not is_small or times != 1 or param in alone or rule.sparse == "required":
            kinds.append(_Alone(param))
            continue
        shape = None if rule.elementwise else param.shape
        own = None if apart.is_numeric else at
        if not (rule.elementwise or apart.is_numeric):
            kinds.append(_Alone(param))
            continue
        kinds.append((forms[at].treedef, jnp.dtype(param.dtype), sharding, shape, own))
    sizes: dict[Hashable, Counter[int]] = {}
    for (param, at, _), kind in zip(members, kinds, strict=True):
        sizes.setdefault(kind, Counter())[at] += math.prod(param.shape)
    apart_kinds = {kind for kind, of in sizes.items() if len(of) <= _FEW_GROUPS and min(of.values()) >= _OWN_SLAB}
    return [
        (kind, at) if kind in apart_kinds and not isinstance(kind, _Alone) else kind
        for (_, at, _), kind in zip(members, kinds, strict=True)
    ]


def _cells(
    members: Sequence[_Member], groups: Sequence[Group], kinds: Sequence[Hashable], records: Mapping[Any, Record]
) -> tuple[list[Cell], list[list[int]], int]:
    """Return the cells, the groups of each setting that they follow, and the number of settings that slabs follow.

    Cells of the same groups share a setting, so that what depends on it alone is computed once.
    """
    by_kind: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(index)
    groups_of = {kind: tuple(dict.fromkeys(members[index].group for index in own)) for kind, own in by_kind.items()}
    ordered = sorted(by_kind, key=lambda kind: isinstance(kind, _Alone))
    settings = {found: at for at, found in enumerate(dict.fromkeys(groups_of[kind] for kind in ordered))}
    num_shared = len({groups_of[kind] for kind in by_kind if not isinstance(kind, _Alone)})
    cells: list[Cell] = []
    for kind, own in by_kind.items():
        at = {group: place for place, group in enumerate(groups_of[kind])}
        shapes = [tuple(members[index].param.shape) for index in own]
        rule, clip = groups[members[own[0]].group].apart.setting
        row = None if isinstance(kind, _Alone) else row_shape(rule, shapes)
        of_each, times = tuple(at[members[index].group] for index in own), members[own[0]].times
        is_flat = rule.elementwise and len(at) == 1 and clip.is_off
        parts = sharding = None
        if isinstance(kind, _Alone):
            whole = records[kind.param].sharding
            parts = parts_of(whole, shapes[0], groups[members[own[0]].group].axes)
            sharding = parts.parts if parts else whole if isinstance(whole, NamedSharding) else None
        setting = settings[groups_of[kind]]
        cells.append(Cell(len(cells), tuple(own), row, of_each, setting, times, is_flat, parts, sharding))
    return cells, [list(found) for found in settings], num_shared


def _is_even(layout: Layout, rules: Sequence[Rule], states: Sequence[_State]) -> bool:
    """Return whether all parameters with state have made the same number of steps."""
    counts = {max(count, 0) for _, count, _ in states}
    if len(counts) > 1 or any(cell.times != 1 for cell in layout.cells):
        return False
    for cell in layout.cells:
        names = scalar_slots(rules[cell.members[0]]) if cell.is_slab else ()
        slots = [states[member][2] for member in cell.members]
        values = [[float(own[name]) for name in names] for own in slots if own]
        if any(value != values[0] for value in values):
            return False
    return True


def _arrays(
    layout: Layout, cell: Cell, rule: Rule, states: Sequence[_State], sharding: Any
) -> tuple[jax.Array, dict[str, Any] | None]:
    """Return the value and the slots of a cell."""
    own = [states[member] for member in cell.members]
    if not cell.is_slab:
        value, _, slots = own[0]
        value = placed(value, sharding)
        return value, slots and _slots_beside(rule, value, slots, cell.parts)
    value = _joined(layout, cell, [value for value, _, _ in own], sharding, cell.row)
    if all(slots is None for _, _, slots in own):
        return value, None
    scalars = scalar_slots(rule) if rule.elementwise else set()
    joined: dict[str, Any] = {}
    of_row = abstract_slots(rule, jax.ShapeDtypeStruct(cell.row or (), value.dtype))
    for name, like in abstract_slots(rule, layout.structs[cell.members[0]].like).items():
        if like is None:
            joined[name] = None
            continue
        arrays = []
        for member, rows, (_, _, slots) in zip(cell.members, layout.rows[cell.number], own, strict=True):
            shape = () if name in scalars else layout.structs[member].shape if rule.elementwise else like.shape
            array = np.zeros(shape, like.dtype) if slots is None else np.asarray(slots[name])
            arrays.append(np.repeat(array, rows) if name in scalars else array)
        padded = rule.elementwise and name not in scalars
        joined[name] = _joined(layout, cell, arrays, sharding, of_row[name].shape, padded)
    return value, joined


def _slots_beside(rule: Rule, value: jax.Array, slots: dict[str, Any], parts: Parts | None) -> dict[str, Any]:
    """Return the slots of a single array, placed on its devices."""
    slots = {name: None if x is None else as_jax(x) for name, x in slots.items()}
    if parts is not None:
        return {name: None if x is None else placed(x, parts.slot(x)) for name, x in slots.items()}
    devices = value.sharding.device_set
    if all(x is None or x.sharding.device_set == devices for x in slots.values()):
        return slots
    fresh = _init(rule, value)
    return {name: None if x is None else placed_like(x, fresh[name]) for name, x in slots.items()}


@jax.jit
def _init(rule: Any, value: jax.Array) -> dict[str, Any]:
    return init(rule, value).slots


def _joined(
    layout: Layout, cell: Cell, arrays: Sequence[Any], sharding: Any, row: Any, padded: bool = True
) -> jax.Array:
    """Return the arrays of all parameters of a slab as one, flat or as rows of a given shape."""
    parts = []
    for x, rows in zip(arrays, layout.rows[cell.number], strict=True):
        flat = np.asarray(x).reshape(-1)
        parts.append(flat)
        if padded and (padding := rows * cell.width - flat.size):
            parts.append(np.zeros(padding, flat.dtype))
    whole = np.concatenate(parts).reshape(-1 if cell.is_flat else (-1, *row))
    return placed(jax.device_put(whole), sharding)  # which compiles nothing
