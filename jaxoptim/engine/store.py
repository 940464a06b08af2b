"""The owner of parameters: slabs for steps, records for edits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.sparse import BCOO

from jaxoptim.core import as_jax, check_gradient
from jaxoptim.engine.freeze import View
from jaxoptim.engine.numbers import TakenApart
from jaxoptim.engine.records import NOT_STARTED, Group, Record
from jaxoptim.engine.slab_update import SparseGradient
from jaxoptim.engine.slabs import Slabs

State = tuple[int, dict[str, Any]]
"""The steps of a parameter, and all of its entries by name."""

_QUIET = 3
"""So many steps without a newcomer are enough for the newcomers to join the others."""
_MANY_NEWCOMERS = 64


class Store:
    """Parameters with their state, in one of two forms: slabs, on which steps run, and records, which are edited.

    :meth:`thaw` goes from the first to the second, :meth:`freeze` back. Neither compiles anything, and slabs of the
    same parameters run the same programs.

    Parameters that come when others are in slabs already are stepped by themselves at first, by programs that all
    parameters of their shape share, and join when no others have come for some steps: where they come one after the
    other, each would compile a program for all.

    Attributes:
        units: slabs that are stepped by one program each; the newcomers behind the first. None while parameters are
            edited.
        records: parameters that are in no slab.
    """

    def __init__(self) -> None:
        self.units: list[Slabs] = []
        self.records: dict[Any, Record] = {}
        self._unit_of: dict[Any, Slabs] = {}
        self._alone: set[Any] = set()
        self._steps_since = 0

    # The two forms.

    @property
    def slabs(self) -> Slabs | None:
        """The slabs of all parameters but newcomers; None while parameters are edited."""
        return self.units[0] if self.units else None

    def has(self, param: Any) -> bool:
        """Return whether a parameter is in a slab."""
        return param in self._unit_of

    def thaw(self) -> None:
        """Take the parameters out of their slabs."""
        for slabs in self.units:
            self.records |= slabs.records()
        self._take([])

    def freeze(self, groups: Sequence[Group], labels: Mapping[Any, str], view: View | Sequence[Any]) -> None:
        """Put the parameters of some groups into slabs; the others stay as they are.

        Args:
            groups: the parameters and their settings.
            labels: their names in messages.
            view: the structure in which gradients come, or the list of the parameters in their order.

        Raises:
            ``ValueError`` for a slot of another shape than its parameter has; nothing is changed then.
        """
        if not isinstance(view, View):
            view = View(jax.tree.structure([0] * len(view)), tuple(view))
        with jax.ensure_compile_time_eval():
            inside = {param for group in groups for param in group.params}
            records = {param: self.record_of(param) for param in inside}
            slabs = Slabs(groups, labels, view, records, self._alone)
            self.records = {param: record for param, record in self.records.items() if param not in inside}
            self._take([slabs])

    def add(self, groups: Sequence[Group]) -> None:
        """Take newcomers in, each by itself."""
        self._steps_since = 0
        for group in groups:
            (param,) = group.params
            with jax.ensure_compile_time_eval():
                record = {param: self.record_of(param)}
                # Not its own name, so that all newcomers of one shape run the same program.
                view = View(jax.tree.structure([0]), (param,))
                slabs = Slabs([group], {param: "parameter"}, view, record, self._alone)
            self.records.pop(param, None)
            self._take([*self.units, slabs])

    def is_quiet(self) -> bool:
        """Whether there are newcomers that are due to join the others."""
        new = len(self.units) - 1
        return new > 0 and (self._steps_since >= _QUIET or new >= max(_MANY_NEWCOMERS, len(self.units[0].params)))

    def forget(self, param: Any) -> None:
        """Let a parameter go, which keeps its value."""
        value = param.value
        self.thaw()
        self.records.pop(param, None)
        param.value = value

    def _take(self, units: list[Slabs]) -> None:
        self.units = units
        self._unit_of = {param: slabs for slabs in units for param in slabs.params}

    def record_of(self, param: Any) -> Record:
        """Return the record of a parameter that is in no slab."""
        if param in self.records:
            return self.records[param]
        return Record(None, NOT_STARTED, {}, param.value.sharding)

    # State by parameter.

    def state_of(self, param: Any) -> State:
        """Return the steps of a parameter, below zero without any, and its entries; edited ones stay as they are.

        These have their count among them.
        """
        if (slabs := self._unit_of.get(param)) is not None:
            index = slabs.index[param]
            return int(slabs.counts()[index]), slabs.slots_of(index) | slabs.others.get(param, {})
        if param not in self.records:
            return NOT_STARTED, {}
        record = self.records[param]
        if record.is_edited:
            return NOT_STARTED, dict(record.slots)
        return record.count, {name: _as_read(x) for name, x in record.slots.items() if x is not None}

    def count_of(self, param: Any, names: Sequence[str]) -> int:
        """Return the steps of a parameter whose rule has slots of these names; below zero without any."""
        if (slabs := self._unit_of.get(param)) is not None:
            return int(slabs.counts()[slabs.index[param]])
        return self.record_of(param).steps(names)

    def states(self) -> dict[Any, State]:
        """Return the state of all parameters that are known."""
        found = {param: self.state_of(param) for param in self.records}
        for slabs in self.units:
            for param, count, slots in zip(slabs.params, slabs.counts().tolist(), slabs.all_slots(), strict=True):
                found[param] = (count, slots | slabs.others.get(param, {}))
        return found

    def set_state(self, param: Any, state: dict[str, Any]) -> None:
        """Give a parameter other entries, the count of steps among them."""
        self.thaw()
        self.records[param] = dataclasses.replace(self.record_of(param), slots=dict(state), is_edited=True)

    def load(self, param: Any, count: int, slots: dict[str, Any]) -> None:
        """Give a parameter a count and slots that its rule has made elsewhere; entries of a user's own stay."""
        self.thaw()
        record = self.record_of(param)
        self.records[param] = dataclasses.replace(record, count=count, slots=record.slots | slots, is_edited=False)

    def known(self) -> list[Any]:
        """Return all parameters that may have state."""
        return [*self._unit_of, *self.records]

    # Settings.

    def renumber(self, settings: Mapping[int, TakenApart]) -> None:
        """Take other settings for some groups by their number; where more than numbers differ, all are thawed."""
        with jax.ensure_compile_time_eval():
            if not self.units[0].renumber(settings):
                self.thaw()

    def renumber_some(self, settings: Mapping[Any, TakenApart]) -> None:
        """Take other settings for the groups of some parameters; where more than numbers differ, all are thawed."""
        for slabs in self.units if settings else ():
            own = {slabs.group_of(param): apart for param, apart in settings.items() if param in slabs.index}
            with jax.ensure_compile_time_eval():
                is_done = not own or slabs.renumber(own)
            if not is_done:
                return self.thaw()

    # Steps.

    def advance(self, grads: Any, refreeze: Callable[[], None]) -> None:
        """Make one step of all parameters along a tree of gradients.

        Args:
            grads: the tree.
            refreeze: freezes the parameters again, which happens where one in a slab has a sparse gradient.
        """
        try:
            self.units[0].advance(grads)
        except SparseGradient:
            self._set_apart(self.units[0].params, self.units[0].layout.leaves(grads))
            self.thaw()
            refreeze()
            self.units[0].advance(grads)

    def advance_some(self, params: Sequence[Any], grads: Sequence[Any], refreeze: Callable[[], None]) -> None:
        """Make one step of some parameters; those whose gradient is None stay.

        Args:
            params: the parameters.
            grads: the gradient of each.
            refreeze: see :meth:`advance`.
        """
        try:
            self._advance_units(params, grads)
        except SparseGradient:
            self._set_apart(params, grads)
            self.thaw()
            refreeze()
            self._advance_units(params, grads)
        self._steps_since += 1

    def _advance_units(self, params: Sequence[Any], grads: Sequence[Any]) -> None:
        first, *newcomers = self.units
        if not newcomers and first.params == params:
            return first.advance_leaves(list(grads))
        given = dict(zip(params, grads, strict=True))
        for slabs in newcomers:
            (param,) = slabs.params
            if given.get(param) is not None:
                rule = slabs.groups[0].apart.setting.rule
                given[param] = check_gradient(rule, str(param.name), given[param], slabs.layout.structs[0].like)
                if isinstance(given[param], BCOO) and param not in self._alone:
                    raise SparseGradient
                slabs.check_leaves([given[param]])
        for slabs in self.units:
            slabs.advance_leaves([given.get(param) for param in slabs.params])

    def _set_apart(self, params: Sequence[Any], grads: Sequence[Any]) -> None:
        """Remember which parameters have sparse gradients."""
        self._alone |= {param for param, grad in zip(params, grads, strict=True) if isinstance(grad, BCOO)}


def _as_read(x: Any) -> Any:
    """Return an entry of a record, as an array of JAX if it is one of NumPy."""
    return as_jax(x) if isinstance(x, np.ndarray | np.generic) else x
