"""Groups whose parameters are updated as one, because their rule shares state between them: samplers, L-BFGS."""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxoptim.core import OptState, Rule, as_jax, init, trees
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.numerics import placed_like
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.layout import Cell, Layout, Struct
from jaxoptim.engine.numbers import Numbers
from jaxoptim.engine.slots import slot_names
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.part import Part
from jaxoptim.optim.storage import Group, Storage, labelled


class Whole:
    """All parameters of one group with one state of the pure face, which exists from the first update on.

    Args:
        group: the dict of options that the parameters follow.
        labels: a unique name for each parameter.
        params: the parameters, whose values are taken over.
        times: how often one step updates them: as often as they stand in the group.

    Attributes:
        contents: the values by label, and the state.
        outdated: the numbers of parameters whose current value is no longer here.
    """

    def __init__(self, group: Group, labels: Sequence[str], params: Sequence[Parameter], times: int) -> None:
        self.group, self.labels, self.params, self.times = group, tuple(labels), tuple(params), times
        self.contents = Contents(None, [(OrderedDict(zip(labels, [p.value for p in params], strict=True)), None)])
        self.names: list[str] = []
        self.outdated: set[int] = set()
        for index, param in enumerate(params):
            param.enter(self, index)

    @property
    def values(self) -> OrderedDict[str, jax.Array]:
        """The values by label."""
        return self.contents.cells[0][0]

    @property
    def state(self) -> OptState | None:
        """The state, None before the first update."""
        return self.contents.cells[0][1]

    @state.setter
    def state(self, state: OptState | None) -> None:
        self.contents = Contents(None, [(self.values, state)])

    def read(self, index: int) -> jax.Array:
        """The value of one parameter."""
        return self.contents.leaves[index]

    def update_outdated(self) -> None:
        """Bring back the values that were assigned, or taken over by another optimizer, since the last step."""
        values = self.values
        for index in sorted(self.outdated):
            values[self.labels[index]] = self.params[index].value
            self.params[index].enter(self, index)
        self.outdated.clear()
        self.contents = Contents(None, [(values, self.contents.cells[0][1])])

    def taken(self) -> Contents:
        """What a compiled program takes, and destroys: arrays that nobody else holds."""
        self.contents = self.contents.own()
        return self.contents

    def start(self, rule: Rule) -> None:
        """Make the state before the first update, or the slots that a change of options has added."""
        fresh = _init(rule, self.values)
        self.names = slot_names(rule)
        self.state = fresh if self.state is None else self.state._replace(slots=fresh.slots | self.state.slots)

    def load(self, rule: Rule, count: Any, slots: Sequence[dict[str, Any]], shared: Any = None) -> None:
        """Take state that was kept elsewhere: the count, the slots of each parameter that has them, and the rest."""
        made = _init(rule, self.values).slots
        self.names = slot_names(rule)
        for label, given in zip(self.labels, slots, strict=True):
            for name, slot in given.items():
                like = made[name][label]
                slot = as_jax(slot).astype(like.dtype)
                trees.check_shape(f"slot {name!r}", label, slot, like)
                made[name][label] = placed_like(slot, like)
        self.state = OptState(jnp.asarray(count, jnp.int32), made, shared or {})

    def slots_of(self, index: int) -> dict[str, Any]:
        """The slots of one parameter, without those it lacks; empty before the first update."""
        state = self.contents.cells[0][1]
        made = {} if state is None else state.slots
        slots = {name: made[name][self.labels[index]] for name in self.names if name in made}
        return {name: slot for name, slot in slots.items() if slot is not None}


_init = jax.jit(init)


class WholeStorage(Storage):
    """The groups of an optimizer, each of which is a :class:`Whole`."""

    whole_class: ClassVar[type[Whole]] = Whole
    """What keeps the parameters of a group."""

    def __init__(self, rule: type[Rule], step_type: type | None, fixed: Mapping[str, Any]) -> None:
        super().__init__(rule, step_type, fixed)
        self.wholes: list[Whole] = []
        self._whole_of: dict[Parameter, tuple[Whole, int]] = {}
        self._edited: dict[Parameter, dict[str, Any]] = {}
        self._others: dict[Parameter, dict[str, Any]] = {}

    # State by parameter.

    def known(self) -> list[Parameter]:
        """All parameters that may have state: those of the groups, and others that were there before."""
        return list(dict.fromkeys([*self.parameters(), *self._whole_of, *self._edited]))

    def state_of(self, param: Parameter) -> dict[str, Any]:
        """The state of a parameter by torch's names, a new dict."""
        if param in self._edited:
            return dict(self._edited[param])
        if param not in self._whole_of:
            return {}
        whole, index = self._whole_of[param]
        return whole.slots_of(index) | self._others.get(param, {})

    def states(self) -> dict[Parameter, dict[str, Any]]:
        """The state of all parameters that have some."""
        return {param: state for param in self.known() if (state := self.state_of(param))}

    def set_state(self, param: Parameter, state: dict[str, Any]) -> None:
        """Give a parameter another state, from the next step on."""
        self._edited[param] = state

    def _is_loose(self) -> bool:
        return bool(self._edited) or not self.wholes

    def read_all(self) -> None:
        """Do nothing: every value is an array of its own."""

    def parts(self) -> list[Part]:
        """The parameters as the pure face has them."""
        return [self._part(whole) for whole in self.wholes]

    def _part(self, whole: Whole) -> Part:
        count, shared = (None, None) if whole.state is None else (whole.state.step, whole.state.shared)
        slots = [whole.slots_of(index) for index in range(len(whole.params))]
        return Part(whole.group, self.rule_for(whole), whole.params, whole.labels, whole.times, count, slots, shared)

    def load_part(
        self,
        part: Part,
        count: Any,
        counts: Mapping[Parameter, Any],
        slots: Sequence[dict[str, Any]],
        shared: Any,
    ) -> None:
        """Take state that was kept elsewhere; all parameters have the count of the group."""
        whole = next(whole for whole in self.wholes if whole.params == part.params)
        whole.load(self.rule_for(whole), count, slots, shared)

    # A step.

    def start(self) -> None:
        """Make the state of all parameters now instead of at their first update."""
        self.settle()
        with self._started():
            pass

    @contextlib.contextmanager
    def _started(self) -> Iterator[None]:
        """Make the state of groups that have none; they lose it again if what follows fails."""
        new = [whole for whole in self.wholes if whole.state is None and whole.times]
        try:
            for whole in new:
                whole.start(self.rule_for(whole))
            with Uninterrupted():
                yield
        except BaseException:
            for whole in new:
                whole.state = None
            raise

    def rule_for(self, whole: Whole) -> Rule:
        """The rule that a group follows."""
        settings = zip(self._settings, self.groups, strict=True)
        # Parameters that the user took out of all groups are not updated by any.
        apart = next((apart for apart, group in settings if group is whole.group), self._settings[0])
        return apart.setting.rule

    # What the user has changed since the last step.

    def settle(self) -> None:
        """Bring everything up to date with groups, options, and assigned values."""
        self._check_groups()
        self._settle_options()
        if self._edited or self._groups_changed():
            self._arrange()
        for whole in self.wholes:
            if whole.outdated:
                whole.update_outdated()

    def _changed(self, settings: Any, is_same_form: bool) -> None:
        if not is_same_form:
            self._seen = []
        elif self.wholes:
            self._number()

    def _arrange(self) -> None:
        """Find the parameters of each group."""
        tree = self.tree()
        self.labels = labelled(tree)
        inside = set(self.parameters())
        outside: Group = {"params": [param for param in self.labels if param not in inside]}
        wholes: list[Whole] = []
        for group, apart in [*zip(self.groups, self._settings, strict=True), (outside, self._settings[0])]:
            by_times: dict[int, list[Parameter]] = {}
            for param, times in Counter(group["params"]).items():
                by_times.setdefault(0 if group is outside else times, []).append(param)
            wholes += [self._whole(group, apart.setting.rule, times, params) for times, params in by_times.items()]
        self.wholes = wholes
        self._whole_of = {param: (whole, index) for whole in wholes for index, param in enumerate(whole.params)}
        self._edited.clear()
        self._seen = [(group, list(group["params"])) for group in self.groups]
        leaves, treedef = jax.tree.flatten(tree)
        params = [param for whole in wholes for param in whole.params]
        number = {param: index for index, param in enumerate(params)}
        cells = [
            Cell(at, tuple(number[param] for param in whole.params), None, (0,) * len(whole.params), at, whole.times)
            for at, whole in enumerate(wholes)
        ]
        structs = [Struct(self.labels[param], param.shape, str(jnp.dtype(param.dtype))) for param in params]
        self.layout = Layout(treedef, [number[param] for param in leaves], structs, cells)
        self._number()

    def _number(self) -> None:
        self.numbers = Numbers([self.rule_for(whole) for whole in self.wholes])

    def _whole(self, group: Group, rule: Rule, times: int, params: list[Parameter]) -> Whole:
        """The parameters of a group: as they were, or with the state that they have now."""
        old = self._whole_of[params[0]][0] if params[0] in self._whole_of else None
        names = slot_names(rule)
        is_same = old is not None and (old.params, old.times) == (tuple(params), times)
        awakened = any(self._others.get(param, {}).keys() & set(names) for param in params)
        if old is not None and is_same and not awakened and not any(param in self._edited for param in params):
            old.group = group
            if old.state is not None and not old.state.slots.keys() >= set(names):
                old.start(rule)
            return old
        states = [self.state_of(param) for param in params]
        has_past = old is not None and old.state is not None
        whole = self.whole_class(group, [self.labels[param] for param in params], params, times)
        if has_past or any(state.keys() & set(names) for state in states):
            slots = [{name: x for name, x in s.items() if name in names and x is not None} for s in states]
            whole.load(rule, 0, slots)
        for param, state in zip(params, states, strict=True):
            self._others.pop(param, None)
            if others := {name: x for name, x in state.items() if name not in (*names, "step")}:
                self._others[param] = others
        return whole

    def taken(self) -> tuple[Contents, ...]:
        """What the compiled programs take, and destroy."""
        return tuple(whole.taken() for whole in self.wholes)
