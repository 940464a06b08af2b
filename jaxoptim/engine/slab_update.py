"""The update of slabs and of single arrays, each under the textbook rule of its parameters."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxoptim.core import OptState, Rule, check_gradient, init, step, step_and_change, steps_and_changes
from jaxoptim.core.clipping import squares
from jaxoptim.core.loss import Evaluation
from jaxoptim.core.sparse import rows_of
from jaxoptim.core.spreading import known_shardings
from jaxoptim.distributed.layouts import Parts, laid_out
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.layout import Cell, Layout
from jaxoptim.engine.numbers import Numbers, Setting
from jaxoptim.engine.records import NOT_STARTED
from jaxoptim.engine.slots import abstract_slots, scalar_slots
from jaxoptim.engine.static import Static
from jaxoptim.engine.update import Update, Updated


class MissingGradient(Exception):
    """Raised where a parameter in a slab has no gradient, so that the step needs a mask."""


class SparseGradient(Exception):
    """Raised where a parameter in a slab has a sparse gradient, so that it must stand by itself."""


class SlabUpdate(Update):
    """The update of all parameters of a :class:`~jaxoptim.engine.slabs.Slabs`.

    Its data are the settings of the cells, where small arrays begin (see :meth:`Layout.parted`), and a mask of the
    parameters that are updated, None for all.

    Args:
        layout: how the parameters are kept.
        form: the structure of their arrays.
        settings: the structure of the settings.
        even: whether all parameters have made the same steps so far, and have a gradient now.
        names: the parameters that take part, all if it is None.
        held: those of them that stay as they are.
    """

    def __init__(
        self,
        layout: Layout,
        form: Static,
        settings: tuple[Static, ...],
        even: bool,
        names: tuple[str, ...] | None,
        held: frozenset[str],
    ) -> None:
        self.layout, self.form, self.settings, self.even, self.names = layout, form, settings, even, names
        self.held = held

    def _numbers(self, data: Any) -> list[Numbers]:
        return [Numbers.tree_unflatten(form, arrays) for form, arrays in zip(self.settings, data[0], strict=True)]

    def values(self, data: Any, leaves: Sequence[Any]) -> dict[str, jax.Array]:
        """Return the values of the parameters that take part, by name."""
        _, offsets, _ = data
        values: dict[str, jax.Array] = {}
        for cell, (value, _) in zip(self.layout.cells, self.contents(leaves).cells, strict=True):
            own = None if offsets is None or not cell.is_slab else [offsets[member] for member in cell.members]
            parts = self.layout.parted(cell, value, own) if cell.is_slab else [value]
            values |= {self.layout.structs[member].name: x for member, x in zip(cell.members, parts, strict=True)}
        return values if self.names is None else {name: values[name] for name in self.names}

    def along(self, data: Any, leaves: Sequence[Any], grads: Any) -> tuple[Contents, None]:
        """Update along gradients; only parameters that stand by themselves may lack one.

        Raises:
            :class:`MissingGradient` and :class:`SparseGradient`; what ``jaxoptim.step`` raises for gradients that do
            not fit their parameters.
        """
        given, settings = self.layout.leaves(grads), _each(self._numbers(data))
        for cell in self.layout.cells:
            for member in cell.members:
                if cell.is_slab and isinstance(given[member], BCOO):
                    raise SparseGradient
                if cell.times and given[member] is None and (cell.is_slab or self.even):
                    raise MissingGradient
        for cell in self.layout.cells:
            for member in cell.members:
                if given[member] is not None:
                    struct = self.layout.structs[member]
                    rule = settings[cell.setting].rule
                    given[member] = check_gradient(rule, struct.name, given[member], struct.like)
        joined = [
            self.layout.joined(cell, [given[member] for member in cell.members])
            if cell.is_slab and cell.times
            else given[cell.members[0]]
            for cell in self.layout.cells
        ]
        return self._stepped(data, leaves, joined, measured=False).contents, None

    def gathered(self, grads: dict[str, jax.Array]) -> list[Any]:
        """Return the gradient of each slab, zero for parameters that do not take part, and of each single array."""
        found: list[Any] = []
        for cell in self.layout.cells:
            structs = [self.layout.structs[member] for member in cell.members]
            own = [grads.get(struct.name) for struct in structs]
            if cell.is_slab and any(grad is not None for grad in own):
                pairs = zip(own, structs, strict=True)
                filled = [jnp.zeros(like.shape, like.dtype) if grad is None else grad for grad, like in pairs]
                found.append(self.layout.joined(cell, filled))
            else:
                found.append(own[0])
        return found

    def after(self, data: Any, leaves: Sequence[Any], evaluation: Evaluation, measured: bool) -> Updated:
        """Update along the gradient of a loss; parameters that do not take part stay, by the mask."""
        settings = _each(self._numbers(data))
        grads = [
            rows_of(grad) if grad is not None and settings[cell.setting].rule.sparse == "required" else grad
            for cell, grad in zip(self.layout.cells, evaluation.grads, strict=True)
        ]
        return self._stepped(data, leaves, grads, measured)

    def _stepped(self, data: Any, leaves: Sequence[Any], grads: Sequence[Any], measured: bool) -> Updated:
        """Return values, slots and counts after one step along the gradient of each cell, and measured changes."""
        layout, (_, _, mask), contents = self.layout, data, self.contents(leaves)
        counts, settings, new, changes = contents.counts, _each(self._numbers(data)), [], []
        together = _steps_together(layout, settings, contents, grads) if self.even else {}
        for cell, grad, (value, slots) in zip(layout.cells, grads, contents.cells, strict=True):
            setting = settings[cell.setting]
            if slots is None or grad is None or not cell.times:
                new.append((value, slots))
                continue
            members = jnp.array(cell.members)
            count = counts[0] if self.even else counts[members] if cell.is_slab else counts[cell.members[0]]
            if cell.number in together:
                value, slots, change = together[cell.number]
            elif not cell.is_slab:
                value, slots, change = _alone_step(cell, setting, value, slots, count, grad, measured)
            elif self.even and cell.is_flat:
                value, slots, change = _flat_step(setting, value, slots, count, grad, measured)
            else:
                on = None if mask is None else mask[members]
                value, slots, change = _row_step(layout, cell, setting, value, slots, count, grad, on)
            new.append((value, slots))
            changes.append(change)
        return Updated(Contents(_counted(layout, counts, grads, mask), new), changes=changes if measured else None)


@functools.partial(jax.jit, static_argnames=("layout", "alone"), donate_argnames="contents")
def start(layout: Layout, alone: frozenset[int], numbers: Sequence[Numbers], contents: Contents, mask: Any) -> Contents:
    """Return contents in which some parameters have their state before the first update.

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
            new.append((value, _alone_slots(cell, setting.rule, value) if cell.number in alone else slots))
    return Contents(jnp.where(fresh, 0, counts), new)


def _each(numbers: Sequence[Numbers]) -> list[Setting]:
    """Return the settings that the cells follow."""
    return [setting for some in numbers for setting in some.each()]


def _counted(layout: Layout, counts: jax.Array, grads: Sequence[Any], mask: Any) -> jax.Array:
    """Return the counts after one step of the cells that have a gradient, for parameters in the mask."""
    more = [0] * len(layout.structs)
    for cell, grad in zip(layout.cells, grads, strict=True):
        for member in cell.members:
            more[member] = 0 if grad is None else cell.times
    after = counts + (more[0] if len(set(more)) == 1 else jnp.array(more))
    return after if mask is None else jnp.where(mask, after, counts)


def _alone_slots(cell: Cell, rule: Rule, value: Any) -> dict[str, Any]:
    """Return the slots of an array that stands by itself before the first update."""
    if cell.parts is None:
        return init(rule, value).slots
    return _in_parts(cell.parts, init(rule, *laid_out([value], [cell.parts.parts])).slots)


def _in_parts(parts: Parts, slots: dict[str, Any]) -> dict[str, Any]:
    """Spread slots over the devices of a data axis."""
    return laid_out(slots, [parts.slot(slots[name]) for name in sorted(slots)])


def _while_updated(cell: Cell, x: Any) -> Any:
    """The value or the gradient of a single array where it is updated."""
    return x if cell.parts is None else laid_out([x], [cell.parts.parts])[0]


def _alone_step(
    cell: Cell, setting: Setting, value: Any, slots: Any, count: Any, grad: Any, measured: bool
) -> tuple[Any, Any, Any]:
    """Make one step of an array that stands by itself; return its change too."""
    if cell.parts is not None:
        grad, value = _while_updated(cell, grad), _while_updated(cell, value)
        of_parts = cell._replace(parts=None)
        value, slots, change = _alone_step(of_parts, setting, value, slots, count, grad, measured)
        return *laid_out([value], [cell.parts.whole]), _in_parts(cell.parts, slots), change
    changes = []
    for _ in range(cell.times):
        state = OptState(count, slots, {})
        with known_shardings({} if cell.sharding is None else {"params": cell.sharding}):
            value, change, (count, slots, *_) = _moved(setting.rule, value, setting.clip.clipped(grad), state, measured)
        changes.append(change)
    return value, slots, functools.reduce(jnp.add, changes) if measured else None


def _moved(rule: Rule, value: Any, grad: Any, state: OptState, measured: bool) -> tuple[Any, Any, OptState]:
    """Return one array after one update, its change, None if it is not measured, and the new state."""
    if measured:
        return step_and_change(rule, value, grad, state)
    value, state = step(rule, value, grad, state)
    return value, None, state


def _steps_together(
    layout: Layout, settings: Sequence[Setting], contents: Contents, grads: Sequence[Any]
) -> dict[int, tuple[Any, Any, Any]]:
    """Make one step of the arrays that stand by themselves because their rule looks at shapes.

    Those of one shape and setting go through the rule as one stack, if all parameters have made the same steps.
    """
    alike: dict[int, list[int]] = {}
    for cell, grad, (_, slots) in zip(layout.cells, grads, contents.cells, strict=True):
        is_dense = grad is not None and slots is not None and not isinstance(grad, BCOO)
        is_apart = cell.is_slab or cell.times != 1 or settings[cell.setting].rule.elementwise
        if is_dense and not is_apart:
            alike.setdefault(cell.setting, []).append(cell.number)
    stepped: dict[int, tuple[Any, Any, Any]] = {}
    for at, numbers in alike.items():
        (rule, clip), cells = settings[at], [layout.cells[number] for number in numbers]
        own = [contents.cells[number][1] for number in numbers]
        names = dict.fromkeys(name for slots in own for name in slots)
        slots = {name: [slots.get(name) for slots in own] for name in names}
        values = [_while_updated(cell, contents.cells[cell.number][0]) for cell in cells]
        clipped = [clip.clipped(_while_updated(cell, grads[cell.number])) for cell in cells]
        known = {str(place): cell.sharding for place, cell in enumerate(cells) if cell.sharding is not None}
        with known_shardings(known):
            new, changes, state = steps_and_changes(rule, values, clipped, OptState(contents.counts[0], slots, {}))
        for place, cell in enumerate(cells):
            value, kept = new[place], {name: state.slots[name][place] for name in own[place]}
            if cell.parts is not None:
                [value], kept = laid_out([value], [cell.parts.whole]), _in_parts(cell.parts, kept)
            stepped[cell.number] = value, kept, changes[place]
    return stepped


def _flat_step(setting: Setting, value: Any, slots: Any, count: Any, grad: Any, measured: bool) -> tuple[Any, Any, Any]:
    """Make one step of parameters with the same steps and numbers, as one long array."""
    scalar = scalar_slots(setting.rule)
    one = {name: slot[0] if name in scalar else slot for name, slot in slots.items()}
    value, change, state = _moved(setting.rule, value, grad, OptState(count, one, {}), measured)
    new = {
        name: jnp.broadcast_to(slot, slots[name].shape) if name in scalar else slot
        for name, slot in state.slots.items()
    }
    return value, new, change


def _row_step(
    layout: Layout, cell: Cell, setting: Setting, value: Any, slots: Any, counts: Any, grad: Any, mask: Any
) -> tuple[Any, Any, Any]:
    """Make one step of the rows of a slab, each with the numbers and the count of its parameter."""
    owners = jnp.array(layout.owners[cell.number])
    counts, of_count = (counts[owners], 0) if counts.ndim else (counts, None)
    on = None if mask is None else mask[owners]
    of_row, setting, rule = _by_rows(layout, cell, setting)
    values, grads = (x.reshape((-1, *cell.row)) for x in (value, grad))  # type: ignore[misc]
    square = _squares_by_row(layout, cell, owners, grads) if setting.clip.clip_norm is not None else owners

    def advanced(setting: Setting, grad: Any, square: Any, param: Any, slots: Any, count: Any, on: Any) -> Any:
        if not setting.clip.is_off:
            grad = setting.clip.bounded(grad, square)
        new, change, state = step_and_change(setting.rule, param, grad, OptState(count, slots, {}))
        if on is None:
            return new, state.slots, change
        kept = (param, slots, jnp.zeros_like(change))
        return jax.tree.map(functools.partial(jnp.where, on), (new, state.slots, change), kept)

    shaped = _shaped(cell, rule, values.dtype, slots)
    new = jax.vmap(advanced, in_axes=(of_row, 0, 0, 0, 0, of_count, None if on is None else 0))(
        setting, grads, square, values, shaped, counts, on
    )
    return _as_kept(cell, new)


def _as_kept(cell: Cell, arrays: Any) -> Any:
    """Return the arrays of a slab, given by rows, in the form in which they are kept."""
    return jax.tree.map(lambda x: x.reshape(-1), arrays) if cell.is_flat else arrays


def _by_rows(layout: Layout, cell: Cell, setting: Setting) -> tuple[Any, Setting, Rule]:
    """Return the settings of the rows of a slab, the axis of their numbers (None: one for all), and a row's rule."""
    if len(set(cell.groups)) == 1:
        return None, setting, setting.rule
    rows = np.array(cell.groups)[layout.owners[cell.number]]
    numbers, form = jax.tree.flatten(setting)
    if not np.array_equal(rows, np.arange(len(numbers[0]))):
        # All numbers at once, because each gather by itself is a kernel to compile.
        numbers = list(jnp.stack(numbers)[:, jnp.array(rows)])
    of_row = jax.tree.unflatten(form, numbers)
    return 0, of_row, jax.tree.map(lambda x: x[0], setting.rule)


def _squares_by_row(layout: Layout, cell: Cell, owners: jax.Array, grads: jax.Array) -> jax.Array:
    """Return, for each row of gradients, the squared norm of the whole gradient that it is a part of."""
    sums = jax.ops.segment_sum(jax.vmap(squares)(grads), owners, len(cell.members), indices_are_sorted=True)
    return sums[owners]


def _first_slots(layout: Layout, cell: Cell, setting: Setting, value: Any) -> Any:
    """Return the slots of all rows of a slab before the first update."""
    of_row, setting, _ = _by_rows(layout, cell, setting)
    made = jax.vmap(lambda setting, param: init(setting.rule, param).slots, in_axes=(of_row, 0))(
        setting,
        value.reshape((-1, *cell.row)),  # type: ignore[misc]
    )
    return _as_kept(cell, made)


def _shaped(cell: Cell, rule: Rule, dtype: Any, slots: Any) -> Any:
    """Return the slots of a slab row by row."""
    like = abstract_slots(rule, jax.ShapeDtypeStruct(cell.row or (), dtype))
    return {name: None if x is None else x.reshape((-1, *like[name].shape)) for name, x in slots.items()}


def _by_row(layout: Layout, cell: Cell, of_each: jax.Array) -> jax.Array:
    """Return, for each row of a slab, the entry of its parameter in a vector over all parameters."""
    return of_each[jnp.array(cell.members)][jnp.array(layout.owners[cell.number])]


def _chosen(rows: jax.Array, new: Any, old: Any) -> Any:
    """Return the rows of one slot, from ``new`` where they are chosen."""
    if new is None:
        return None
    per_row = new.size // rows.size
    return jnp.where(jnp.repeat(rows, per_row, total_repeat_length=new.size).reshape(new.shape), new, old)
