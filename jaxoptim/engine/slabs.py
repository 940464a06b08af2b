"""The arrays of a store, on which steps run."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.engine import programs
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.freeze import View, frozen
from jaxoptim.engine.numbers import TakenApart
from jaxoptim.engine.owner import Minimization, Owner
from jaxoptim.engine.records import NOT_STARTED, Group, Record
from jaxoptim.engine.settings import Settings
from jaxoptim.engine.slab_parts import FEW_PARTS, host_part_of, part_of, parts_of, values_of, with_values
from jaxoptim.engine.slab_update import MissingGradient, SlabUpdate, start
from jaxoptim.engine.slots import abstract_slots
from jaxoptim.engine.static import Static
from jaxoptim.engine.transformed import Transform, TransformedUpdate
from jaxoptim.engine.update import Update

_TRACED_OFFSETS = 256
"""Up to so many arrays, slices at traced offsets cost less than compiling a kernel for each fixed one."""
_FEW_KERNELS = 4
"""So many more kernels to compile cost less than an argument for each array at every step."""


class Slabs(Owner):
    """The values, slots and counts of parameters, as compiled steps take them.

    Args:
        groups: the parameters and their settings.
        labels: a name for each parameter, for messages.
        view: the structure in which gradients come.
        records: the record of each parameter.
        alone: parameters that stand by themselves because their gradients are sparse.

    Attributes:
        layout: which rows are whose.
        settings: those of the groups.
        others: entries of state that the rules do not keep, by parameter.
        transform: a transformation of the gradients of its steps.

    Raises:
        ``ValueError`` for a slot of another shape.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        labels: Mapping[Any, str],
        view: View,
        records: Mapping[Any, Record],
        alone: set[Any],
    ) -> None:
        made = frozen(groups, labels, view, records, alone)
        self.layout, self.others = made.layout, made.others
        self.groups = list(groups)
        self._groups_of = made.groups_of
        self._unstarted, self._even = made.unstarted, made.is_even
        self._read: dict[int, jax.Array] = {}  # since the last step
        self._counts: Any = None  # read since the last step
        self._has_gaps = False  # whether a gradient was missing in the last step
        self._updates: dict[Any, SlabUpdate] = {}
        self.transform: Transform | None = None
        aparts = [group.apart for group in groups]
        self.settings = Settings(aparts, made.forms, made.groups_in, made.num_shared)
        super().__init__(made.params, made.contents)

    def renumber(self, changed: Mapping[int, TakenApart]) -> bool:
        """Take other numbers for some groups; return False, and do nothing, where more than numbers differ."""
        if not self.settings.renumber(changed):
            return False
        for at, apart in changed.items():
            self.groups[at] = self.groups[at]._replace(apart=apart)
        return True

    @property
    def is_started(self) -> bool:
        """Whether all parameters have state."""
        return not self._unstarted

    def group_of(self, param: Any) -> int:
        """Return the number of the group of a parameter."""
        return self._groups_of[self.index[param]]

    # What is there now.

    def counts(self) -> np.ndarray:
        """The steps of each parameter."""
        if self._counts is None:
            self._counts = np.array(self.leaves[0])
        return self._counts

    def read(self, index: int) -> jax.Array:
        """Return the value of one parameter, the same array until the next step."""
        if index not in self._read:
            if len(self._read) >= FEW_PARTS:
                self.read_all()
            else:
                cell, at = self.layout.places[index]
                value, _ = self.contents.cells[cell.number]
                self._read[index] = part_of(self.layout, cell, at, value, self.layout.structs[index].shape)
        return self._read[index]

    def read_all(self) -> None:
        """Read the values of all parameters, which is faster than one after the other."""
        if len(self._read) == len(self.params):
            return
        for cell, (value, _) in zip(self.layout.cells, self.contents.cells, strict=True):
            for member, x in zip(cell.members, values_of(self.layout, cell, value), strict=True):
                self._read.setdefault(member, x)

    def slots_of(self, index: int) -> dict[str, Any]:
        """Return the slots of one parameter by name, without those it lacks."""
        cell, at = self.layout.places[index]
        _, slots = self.contents.cells[cell.number]
        if slots is None or self.counts()[index] == NOT_STARTED:
            return {}
        like = self._slots_like(index)
        return {
            name: part_of(self.layout, cell, at, slots[name], struct.shape)
            for name, struct in like.items()
            if struct is not None and name in slots
        }

    def all_slots(self) -> list[dict[str, Any]]:
        """Return the slots of every parameter, as :meth:`slots_of` gives them."""
        found: list[dict[str, Any]] = [{} for _ in self.params]
        counts = self.counts()
        for cell, (_, slots) in zip(self.layout.cells, self.contents.cells, strict=True):
            if slots is None:
                continue
            like = [self._slots_like(member) for member in cell.members]
            for name in like[0]:
                if like[0][name] is not None and slots.get(name) is not None:
                    parts = parts_of(self.layout, cell, slots[name], [of[name].shape for of in like])
                    for member, x in zip(cell.members, parts, strict=True):
                        if counts[member] != NOT_STARTED:
                            found[member][name] = x
        return found

    def _slots_like(self, index: int) -> dict[str, Any]:
        return abstract_slots(self.groups[self._groups_of[index]].apart.setting.rule, self.layout.structs[index].like)

    def records(self) -> dict[Any, Record]:
        """Return a record of each parameter, read without a compiled program."""
        self.publish()
        counts, found = self.counts(), {}
        for cell, (value, slots) in zip(self.layout.cells, self.contents.cells, strict=True):
            whole = (value, slots) if not cell.is_slab else jax.tree.map(_flat, (value, slots))
            for at, member in enumerate(cell.members):
                param = self.params[member]
                like = {} if slots is None or counts[member] == NOT_STARTED else self._slots_like(member)
                own = {
                    name: host_part_of(self.layout, cell, at, whole[1][name], struct.shape)
                    for name, struct in like.items()
                    if struct is not None and name in whole[1]
                }
                here = None
                if member not in self.outdated:
                    here = host_part_of(self.layout, cell, at, whole[0], self.layout.structs[member].shape)
                count = int(counts[member])
                found[param] = Record(here, count, self.others.get(param, {}) | own, value.sharding, self, member)
        return found

    # What is changed between steps.

    def update_outdated(self) -> None:
        """Bring back the values that were assigned, or taken over by another optimizer, since the last step."""
        if not self.outdated:
            return
        cells = [list(cell) for cell in self.contents.cells]
        for at, cell in enumerate(self.layout.cells):
            own = [place for place, member in enumerate(cell.members) if member in self.outdated]
            if not own:
                continue
            values = {place: self.params[cell.members[place]].value for place in own}
            cells[at][0] = with_values(self.layout, cell, cells[at][0], values)
        for index in sorted(self.outdated):
            self.params[index].enter(self, index)
        self.outdated.clear()
        self.replace(Contents(self.leaves[0], [tuple(cell) for cell in cells]))

    def taken(self) -> Sequence[Any]:
        """Return the arrays for a compiled program, which destroys them."""
        self._forget_read()
        return super().taken()

    def replace(self, contents: Contents) -> None:
        """Keep other arrays, of this or another structure."""
        self._forget_read()
        super().replace(contents)

    def _forget_read(self) -> None:
        self._read.clear()
        self._counts = None
        self.publish()

    def publish(self) -> None:
        """Hand over the state of the transformation that the last step has left."""
        if self.transform is not None and (published := self.published) is not None:
            self.transform.state, self.published = published[1], None

    # Steps.

    @property
    def is_even(self) -> bool:
        """Whether all parameters have made the same steps."""
        return self._even and not self._unstarted

    def update(
        self, even: bool, names: tuple[str, ...] | None = None, held: frozenset[str] = frozenset()
    ) -> SlabUpdate:
        """Return the update of these parameters, or of some of them by name, where some may be held."""
        key = (self.form, even, names, held)
        if key not in self._updates:
            self._updates[key] = self._update(*key)
        return self._updates[key]

    def _update(
        self, form: Static, even: bool, names: tuple[str, ...] | None, held: frozenset[str] = frozenset()
    ) -> SlabUpdate:
        return SlabUpdate(self.layout, form, self.settings.forms, even, names, held)

    @functools.cached_property
    def offsets(self) -> list[Any] | None:
        """Return the start of each small array, as numbers on the device; None where fixed places are better."""
        small = [member for cell in self.layout.cells if cell.is_slab for member in cell.members]
        shapes = {self.layout.structs[member].shape for member in small}
        if len(small) - len(shapes) <= _FEW_KERNELS or len(self.params) > _TRACED_OFFSETS:
            return None
        found: list[Any] = [None] * len(self.params)
        for cell in self.layout.cells:
            if cell.is_slab:
                for member, row in zip(cell.members, self.layout.first_rows[cell.number], strict=True):
                    found[member] = jax.device_put(np.int32(row * cell.width))
        return found

    def advance(self, grads: Any) -> None:
        """Make one step along a tree of gradients.

        Raises:
            What ``jaxoptim.step`` raises for gradients that do not fit their parameters.
        """
        if not self._unstarted and not self._has_gaps and not self.held:
            with contextlib.suppress(MissingGradient):
                return self._advance_all(grads)
        self._advance_some(self._without_held(self.layout.leaves(grads)), grads)

    def advance_leaves(self, grads: list[Any]) -> None:
        """Make one step along a list of gradients, one for each parameter in their order."""
        if self._unstarted or self.held or any(map(operator.is_, grads, itertools.repeat(None))):
            self._advance_some(self._without_held(grads), grads)
        else:
            self._advance_all(grads)

    def _without_held(self, leaves: list[Any]) -> list[Any]:
        """Return the gradients, None for parameters that stay as they are."""
        return [None if index in self.held else leaf for index, leaf in enumerate(leaves)] if self.held else leaves

    def _advance_all(self, grads: Any) -> None:
        """Make one step of all parameters, which have state."""
        self._run(self._even, grads, None if self._even else self._all)

    def _advance_some(self, leaves: Sequence[Any], grads: Any) -> None:
        """Make one step in which some parameters have no gradient, or no state yet."""
        here = np.array([leaf is not None for leaf in leaves]) & self._updated
        self._has_gaps = not here[self._updated].all()
        if not here.any():
            return
        with self._started(here):
            if not self._has_gaps:
                return self._advance_all(grads)
            self._even = False  # before the step, which Ctrl-C may be the end of
            filled = [
                _zeros(struct.shape, struct.dtype) if leaf is None and is_row else leaf
                for leaf, struct, is_row in zip(leaves, self.layout.structs, self.layout.are_rows, strict=True)
            ]
            self._run(False, self.layout.once(filled), here)

    def check_leaves(self, grads: list[Any]) -> None:
        """Raise what the first step along these gradients would raise, without a step."""
        if self._ran:
            return

        def step(contents: Contents, grads: Any) -> Any:
            if self._unstarted:
                contents = start(self.layout, self._alone_of(self._all), self.settings.numbers, contents, self._all)
            update = self._update(contents.form, self._even, None)
            return update.along((self.settings.arrays, None, None), contents.leaves, grads)[0]

        jax.eval_shape(step, self.contents, grads)

    @functools.cached_property
    def _updated(self) -> np.ndarray:
        """Return a mask of the parameters that a step updates if they have a gradient."""
        return np.array([self.layout.places[index][0].times > 0 for index in range(len(self.params))])

    @functools.cached_property
    def _all(self) -> np.ndarray:
        return np.ones(len(self.params), bool)

    @contextlib.contextmanager
    def _started(self, here: np.ndarray) -> Iterator[None]:
        """Create the state of parameters that have none, and take it away again if what follows fails."""
        new = self.start(here)
        try:
            yield
        except BaseException:
            if new:
                self.lose(new)
            raise

    def start(self, here: np.ndarray | None = None) -> list[int]:
        """Create the state of these parameters, or of all, if they have none; return which of them had none."""
        new = [index for index in self._unstarted if here is None or here[index]]
        if not new:
            return []
        mask = np.zeros(len(self.params), bool)
        mask[new] = True
        with Uninterrupted():
            contents = Contents.tree_unflatten(self.form, self.taken())
            self.replace(start(self.layout, self._alone_of(mask), self.settings.numbers, contents, mask))
            self._unstarted -= set(new)
        return new

    def _alone_of(self, mask: np.ndarray) -> frozenset[int]:
        """Return the cells of single arrays in the mask that have no slots."""
        return frozenset(cell.number for cell in self.layout.cells if not cell.is_slab and mask[cell.members[0]])

    def lose(self, members: Sequence[int]) -> None:
        """Take away the state of parameters that was made for a step that failed."""
        counts = np.array(self.leaves[0])
        if counts[members].any():
            return  # the step was made before it was interrupted
        counts[members] = NOT_STARTED
        cells = [
            (value, None if not cell.is_slab and cell.members[0] in members else slots)
            for cell, (value, slots) in zip(self.layout.cells, self.contents.cells, strict=True)
        ]
        self.replace(Contents(jnp.asarray(counts), cells))
        self._unstarted |= set(members)

    def _run(self, even: bool, grads: Any, mask: Any) -> None:
        """Run the program of a step, and keep what it returns."""
        update, data = self._transformed(self.update(even), (self.settings.arrays, None, mask))
        self.run(programs.advance, (update, mask is None), (update, data, self.taken(), grads))

    def _transformed(self, update: Update, data: Any) -> tuple[Update, Any]:
        """Return the update and its data, with the transformation of the gradients in front."""
        if self.transform is None:
            return update, data
        self.publish()
        return TransformedUpdate(update, self.layout, self.transform.tx), (data, self.transform.state)

    def opened(self, params: Sequence[Any]) -> tuple[np.ndarray | None, list[int]]:
        """Prepare a step of some parameters that is part of another program.

        Returns:
            The mask of the step, None for all parameters, and those that had no state before.
        """
        if not self._unstarted and self._even and params == self.params:
            return None, []
        here = np.zeros(len(self.params), bool)
        here[[self.index[param] for param in params]] = True
        new = self.start(here)
        if here.all():
            return None, new
        self._even = False
        return here, new

    def minimize(self, job: Minimization) -> Any:
        """Make one step of all parameters along the gradient of a loss; see :meth:`Owner.minimize_by`."""
        here, held = None, frozenset[str]()
        if self.held:
            here = self._updated.copy()
            here[list(self.held)] = False
            held = self.layout.names_of(self.held)
        with self._started(self._updated if here is None else here) if self._unstarted else contextlib.nullcontext():
            self._even = self._even and here is None  # before the step, which Ctrl-C may be the end of
            data = (self.settings.arrays, self.offsets, here)
            update, data = self._transformed(self.update(self._even, held=held), data)
            return self.minimize_by(update, self.layout, data, job)


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype)


def _flat(array: jax.Array) -> np.ndarray:
    """Return the numbers of an array, one after the other, on the host."""
    return np.asarray(array).reshape(-1)
