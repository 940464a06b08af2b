"""The compiled steps: one call for all parameters of a store.

Each compiles once for each structure: which parameters stand together, which terms the rules have, the shapes.
Numbers, counts and masks are data: a new learning rate, a parameter that is frozen or thawed, run the same program.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxoptim.core import OptState, Rule, check_gradient, init, step
from jaxoptim.core.clipping import squares
from jaxoptim.core.loss import Loss, evaluated
from jaxoptim.core.sparse import rows_of
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.layout import Cell, Layout
from jaxoptim.engine.numbers import Numbers, Setting
from jaxoptim.engine.slots import abstract_slots, scalar_slots

NOT_STARTED = -1
"""The count of steps of a parameter that has no state."""


class MissingGradient(Exception):
    """A parameter in a slab has no gradient, which takes a mask."""


class SparseGradient(Exception):
    """A parameter in a slab has a sparse gradient, for which it must stand by itself."""


@functools.partial(jax.jit, static_argnames=("layout", "even"), donate_argnames="contents")
def advance(
    layout: Layout, even: bool, numbers: Sequence[Numbers], contents: Contents, grads: Any, mask: Any
) -> Sequence[jax.Array]:
    """One step of all parameters from a tree of gradients.

    Args:
        layout: how the parameters are kept.
        even: whether all parameters have made the same steps so far, and have a gradient now.
        numbers: the settings of the cells.
        contents: values, slots and counts, which are donated.
        grads: a tree like the one that the user sees.
        mask: which parameters are updated, if not all; only those that stand by themselves may lack a gradient.

    Returns:
        The leaves of the new contents.

    Errors:
        :class:`MissingGradient` and :class:`SparseGradient`, while tracing; what ``jaxoptim.step`` raises for gradients
        that do not fit their parameters.
    """
    leaves = layout.leaves(grads)
    for cell in layout.cells:
        for member in cell.members:
            if cell.is_slab and isinstance(leaves[member], BCOO):
                raise SparseGradient
            if cell.times and leaves[member] is None and (cell.is_slab or even):
                raise MissingGradient
    return stepped(layout, even, numbers, contents, checked(layout, numbers, leaves), mask).leaves


@functools.partial(jax.jit, static_argnames=("layout", "even", "loss"), donate_argnames="contents")
def minimize(
    layout: Layout,
    even: bool,
    numbers: Sequence[Numbers],
    contents: Contents,
    offsets: Any,
    loss: Loss,
    args: tuple[Any, ...],
) -> Sequence[jax.Array]:
    """One step of all parameters along the gradient of a loss.

    Args:
        layout: how the parameters are kept.
        even: whether all parameters have made the same steps so far.
        numbers: the settings of the cells.
        contents: values, slots and counts, which are donated.
        offsets: where small arrays begin; see :meth:`Layout.parted`.
        loss: the loss as a function of the tree that the user sees.
        args: what else it takes.

    Returns:
        The leaves of the new contents, and the loss before the step behind them.
    """
    return _minimized(layout, even, numbers, contents, offsets, loss, args)[0]


@functools.partial(jax.jit, static_argnames=("layout", "even", "loss"), donate_argnames="contents")
def minimize_with_aux(
    layout: Layout,
    even: bool,
    numbers: Sequence[Numbers],
    contents: Contents,
    offsets: Any,
    loss: Loss,
    args: tuple[Any, ...],
) -> tuple[Sequence[jax.Array], Any]:
    """The same, and what the loss function returns besides."""
    return _minimized(layout, even, numbers, contents, offsets, loss, args)


def _minimized(
    layout: Layout,
    even: bool,
    numbers: Sequence[Numbers],
    contents: Contents,
    offsets: Any,
    loss: Loss,
    args: tuple[Any, ...],
) -> tuple[list[jax.Array], Any]:
    found = evaluated(loss, layout.tree(values_of(layout, contents, offsets)), args)
    grads = in_rows(layout, numbers, layout.leaves(found.grads))
    new = stepped(layout, even, numbers, contents, grads, None)
    return [*new.leaves, found.loss], found.aux


@functools.partial(jax.jit, static_argnames=("layout", "alone"), donate_argnames="contents")
def start(layout: Layout, alone: frozenset[int], numbers: Sequence[Numbers], contents: Contents, mask: Any) -> Contents:
    """The state of parameters before their first update.

    Args:
        layout: how the parameters are kept.
        alone: the cells of single arrays that are to have state.
        numbers: the settings of the cells.
        contents: values, slots and counts, which are donated.
        mask: which parameters are to have state.
    """
    counts, new = contents.counts, []
    fresh = mask & (counts == NOT_STARTED)
    settings = _each(numbers)
    for cell, (value, slots) in zip(layout.cells, contents.cells, strict=True):
        setting = settings[cell.setting]
        if cell.is_slab:
            made = _first_slots(layout, cell, setting, value)
            if slots is not None:
                here = _by_row(layout, cell, fresh)
                slots = {name: _chosen(here, made[name], slots[name]) for name in slots}
            new.append((value, made if slots is None else slots))
        else:
            new.append((value, init(setting.rule, value).slots if cell.number in alone else slots))
    return Contents(jnp.where(fresh, 0, counts), new)


def _each(numbers: Sequence[Numbers]) -> list[Setting]:
    """The settings that the cells follow."""
    return [setting for some in numbers for setting in some.each()]


def checked(layout: Layout, numbers: Sequence[Numbers], leaves: Sequence[Any]) -> list[Any]:
    """The gradients of all parameters, which fit them."""
    grads, settings = list(leaves), _each(numbers)
    for cell in layout.cells:
        setting = settings[cell.setting]
        for member in cell.members:
            if grads[member] is not None:
                struct = layout.structs[member]
                grads[member] = check_gradient(setting.rule, struct.name, grads[member], struct.like)
    return grads


def in_rows(layout: Layout, numbers: Sequence[Numbers], leaves: Sequence[Any]) -> list[Any]:
    """Dense gradients, as rows for the rules that take nothing else."""
    grads, settings = list(leaves), _each(numbers)
    for cell in layout.cells:
        setting = settings[cell.setting]
        if setting.rule.sparse == "required":
            for member in cell.members:
                grads[member] = rows_of(grads[member])
    return grads


def values_of(layout: Layout, contents: Contents, offsets: Sequence[Any] | None) -> list[Any]:
    """The values of all parameters; ``offsets`` as :meth:`Layout.parted` takes them, by the number of the parameter."""
    values: list[Any] = [None] * len(layout.structs)
    for cell, (value, _) in zip(layout.cells, contents.cells, strict=True):
        if not cell.is_slab:
            values[cell.members[0]] = value
            continue
        own = None if offsets is None else [offsets[member] for member in cell.members]
        for member, part in zip(cell.members, layout.parted(cell, value, own), strict=True):
            values[member] = part
    return values


def stepped(
    layout: Layout, even: bool, numbers: Sequence[Numbers], contents: Contents, grads: Sequence[Any], mask: Any
) -> Contents:
    """Values, slots and counts after one step; see :func:`advance`."""
    counts, new = contents.counts, []
    settings = _each(numbers)
    for cell, (value, slots) in zip(layout.cells, contents.cells, strict=True):
        setting = settings[cell.setting]
        own = [grads[member] for member in cell.members]
        count = counts[0] if even else counts[jnp.array(cell.members)] if cell.is_slab else counts[cell.members[0]]
        if slots is None or (not cell.is_slab and own[0] is None) or not cell.times:
            new.append((value, slots))
        elif cell.is_slab:
            grad = layout.joined(cell, own)
            if even and cell.is_flat:
                new.append(_flat_step(setting, value, slots, count, grad))
            else:
                on = None if mask is None else mask[jnp.array(cell.members)]
                new.append(_row_step(layout, cell, setting, value, slots, count, grad, on))
        else:
            for _ in range(cell.times):
                value, state = step(setting.rule, value, setting.clip.clipped(own[0]), OptState(count, slots, {}))
                count, slots = state.step, state.slots
            new.append((value, slots))
    return Contents(_counted(layout, counts, grads, mask), new)


def _counted(layout: Layout, counts: jax.Array, grads: Sequence[Any], mask: Any) -> jax.Array:
    """The counts after one step of the parameters that have a gradient and are in the mask."""
    more = [0 if grads[member] is None else layout.places[member][0].times for member in range(len(grads))]
    after = counts + (more[0] if len(set(more)) == 1 else jnp.array(more))
    return after if mask is None else jnp.where(mask, after, counts)


def _flat_step(setting: Setting, value: Any, slots: Any, count: Any, grad: Any) -> tuple[Any, Any]:
    """One step of parameters that have made the same steps under the same numbers: of one long array."""
    scalar = scalar_slots(setting.rule)
    one = {name: slot[0] if name in scalar else slot for name, slot in slots.items()}
    value, state = step(setting.rule, value, grad, OptState(count, one, {}))
    new = {
        name: jnp.broadcast_to(slot, slots[name].shape) if name in scalar else slot
        for name, slot in state.slots.items()
    }
    return value, new


def _row_step(
    layout: Layout, cell: Cell, setting: Setting, value: Any, slots: Any, counts: Any, grad: Any, mask: Any
) -> tuple[Any, Any]:
    """One step of the rows of a slab, each with the numbers and the count of its parameter."""
    owners = jnp.array(layout.owners[cell.number])
    counts, of_count = (counts[owners], 0) if counts.ndim else (counts, None)
    on = None if mask is None else mask[owners]
    of_row, setting, rule = _by_rows(layout, cell, setting)
    values, grads = (x.reshape((-1, *cell.row)) for x in (value, grad))  # type: ignore[misc]
    square = _squares_by_row(layout, cell, owners, grads) if setting.clip.clip_norm is not None else owners

    def advanced(setting: Setting, grad: Any, square: Any, param: Any, slots: Any, count: Any, on: Any) -> Any:
        if not setting.clip.is_off:
            grad = setting.clip.bounded(grad, square)
        new, state = step(setting.rule, param, grad, OptState(count, slots, {}))
        if on is None:
            return new, state.slots
        return jax.tree.map(lambda new, old: jnp.where(on, new, old), (new, state.slots), (param, slots))

    shaped = _shaped(cell, rule, values.dtype, slots)
    new = jax.vmap(advanced, in_axes=(of_row, 0, 0, 0, 0, of_count, None if on is None else 0))(
        setting, grads, square, values, shaped, counts, on
    )
    return _as_kept(cell, new)


def _as_kept(cell: Cell, arrays: Any) -> Any:
    """The arrays of a slab by rows, as they are kept."""
    return jax.tree.map(lambda x: x.reshape(-1), arrays) if cell.is_flat else arrays


def _by_rows(layout: Layout, cell: Cell, setting: Setting) -> tuple[Any, Setting, Rule]:
    """The settings of the rows of a slab, the axis of its numbers along them (None: one for all), and a row's rule."""
    if len(set(cell.groups)) == 1:
        return None, setting, setting.rule
    rows = jnp.array(np.array(cell.groups)[layout.owners[cell.number]])
    # All numbers at once, because each gather by itself is a kernel to compile.
    numbers, form = jax.tree.flatten(setting)
    return 0, jax.tree.unflatten(form, list(jnp.stack(numbers)[:, rows])), jax.tree.map(lambda x: x[0], setting.rule)


def _squares_by_row(layout: Layout, cell: Cell, owners: jax.Array, grads: jax.Array) -> jax.Array:
    """For each row of gradients the squared norm of the whole gradient that it is a part of."""
    sums = jax.ops.segment_sum(jax.vmap(squares)(grads), owners, len(cell.members), indices_are_sorted=True)
    return sums[owners]


def _first_slots(layout: Layout, cell: Cell, setting: Setting, value: Any) -> Any:
    """The slots of all rows of a slab before the first update."""
    of_row, setting, _ = _by_rows(layout, cell, setting)
    made = jax.vmap(lambda setting, param: init(setting.rule, param).slots, in_axes=(of_row, 0))(
        setting,
        value.reshape((-1, *cell.row)),  # type: ignore[misc]
    )
    return _as_kept(cell, made)


def _shaped(cell: Cell, rule: Rule, dtype: Any, slots: Any) -> Any:
    """The slots of a slab row by row."""
    like = abstract_slots(rule, jax.ShapeDtypeStruct(cell.row or (), dtype))
    return {name: None if x is None else x.reshape((-1, *like[name].shape)) for name, x in slots.items()}


def _by_row(layout: Layout, cell: Cell, of_each: jax.Array) -> jax.Array:
    """For each row of a slab what its parameter has in a vector over all parameters."""
    return of_each[jnp.array(cell.members)][jnp.array(layout.owners[cell.number])]


def _chosen(rows: jax.Array, new: Any, old: Any) -> Any:
    """The rows of one slot from ``new`` where they are chosen."""
    if new is None:
        return None
    per_row = new.size // rows.size
    return jnp.where(jnp.repeat(rows, per_row, total_repeat_length=new.size).reshape(new.shape), new, old)
