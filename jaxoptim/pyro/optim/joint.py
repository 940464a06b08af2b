"""Parameters by name, each with a torch-style optimizer of its own, which are all updated in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxoptim.core import OptState, Rule
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.optim.bucket import Cells, Contents
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.program import RegroupNeeded, Rules
from jaxoptim.pyro.optim import together
from jaxoptim.pyro.optim.arrangement import Rows, built, stacked, step_of
from jaxoptim.pyro.optim.member import Member
from jaxoptim.pyro.optim.together import NOT_STARTED, Plan, Setting, Stack


class Selection(NamedTuple):
    """The cells that take part in a step.

    Attributes:
        cells: their numbers.
        plan: what compiled programs know of them.
        source: for each of their parameters the index of its gradient among those given, None for one that is not
            updated.
        masks: for each of the cells which parameters are updated, None if all are.
    """

    cells: tuple[int, ...]
    plan: Plan
    source: list[int | None]
    masks: Any


class Joint:
    """Parameters with optimizers of their own, in stacks of those that differ in numbers only.

    Attributes:
        members: by name.
        written: whether an option was written since the last step.
        moved: whether parameters have to find their places anew.
    """

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.written = self.moved = False
        self._cells: list[Cells] = []
        self._kinds: list[Hashable] = []
        self._places: dict[str, tuple[Cells, int]] = {}
        self._settings: list[Setting] = []
        self._lagging = False
        self._rules: dict[tuple[int, ...], Rules] = {}
        self._made: dict[Hashable, tuple[Rule, Any, list[Any]]] = {}
        self._selections: dict[Any, Selection] = {}

    def add(self, member: Member) -> None:
        """Take a parameter in; it finds its place before the next step."""
        self.members[member.name] = member
        self.moved = True

    def remove(self, name: str) -> None:
        """Let a parameter go, which keeps its value."""
        param = self.members.pop(name).param
        param.value = param.value
        self.moved = True

    def read_all(self) -> None:
        """Read the values of all parameters, which is faster than one after the other."""
        for cells in self._cells:
            cells.read_all()

    # State.

    def state_of(self, member: Member) -> dict[str, Any]:
        """The state of a parameter by torch's names; empty before its first step."""
        if (place := self._places.get(member.name)) is None:
            return {}
        cells, index = place
        step = step_of(cells, index)
        if step == NOT_STARTED:
            return {}
        count: dict[str, Any] = {}
        if member.step_type is not None:
            count = {"step": step if member.step_type is int else jnp.asarray(step, jnp.float32)}
        return count | cells.slots_of(index)

    def pure(self, name: str) -> tuple[Setting, OptState | None]:
        """The setting of a parameter's next step, and its state as the pure face has it, None before the first."""
        with jax.ensure_compile_time_eval():
            self.settle()
            cells, index = self._places[name]
            setting = self._settings[self._cells.index(cells)]
            if isinstance(cells, Stack):
                setting = jax.tree.map(lambda numbers: float(numbers[index]), setting)
            started = step_of(cells, index) != NOT_STARTED
            return setting, jax.tree.map(lambda x: cells._leaf(x, index), cells.state) if started else None

    def write_faded(self) -> None:
        """Write into the groups what steps have made of their options."""
        if not self._lagging:
            return
        self._lagging = False
        for cells, setting in zip(self._cells, self._settings, strict=True):
            if (fading := setting.fading) is not None:
                steps = np.maximum(np.asarray(cells.state.step).reshape(-1), 0) - fading.since  # type: ignore[union-attr]
                numbers = getattr(setting.rule, fading.option) * np.asarray(fading.factor.rate) ** steps
                for param, number in zip(cells.params, numbers, strict=True):
                    member = self.members[str(param.name)]
                    if not member.written:
                        member.become(fading.option, float(number))

    def made_rule(self, member: Member) -> tuple[Rule, Any, list[Any]]:
        """The rule of a member's options, its structure and its leaves; many have the same options."""
        key = (member.rule, *[(name, type(x), x) for name, x in member.options.items() if name != "params"])
        try:
            if key not in self._made:
                self._made = {} if len(self._made) > 4096 else self._made
                self._made[key] = _taken_apart(member.rule_of(member.options))
            return self._made[key]
        except TypeError:  # an option that is not hashable, or none that there is, which making the rule tells
            return _taken_apart(member.rule_of(member.options))

    # A step.

    def advance(self, params: Sequence[Parameter], grads: Sequence[Any]) -> None:
        """One step of these parameters; of those whose gradient is None only options decay."""
        self.settle()
        try:
            self._advance(params, grads)
        except RegroupNeeded:
            for param, grad in zip(params, grads, strict=True):
                self.members[str(param.name)].has_rows |= isinstance(grad, BCOO)
            self._arrange()
            self._advance(params, grads)

    def _advance(self, params: Sequence[Parameter], grads: Sequence[Any]) -> None:
        missing = [grad is None for grad in grads]
        selection = self.select(tuple([param.name for param in params]), tuple(missing) if any(missing) else None)
        if selection.masks is None:
            ordered = [grads[index] for index in selection.source]  # type: ignore[index]
        else:
            rows = [param for at in selection.cells for param in self._cells[at].params]
            ordered = [
                _zeros(param.shape, param.dtype) if index is None else grads[index]
                for param, index in zip(rows, selection.source, strict=True)
            ]
        rules = self.rules(selection)
        with Uninterrupted():
            contents = self.take(selection)
            if contents:
                contents = together.advance(selection.plan, rules, contents, ordered, selection.masks)
            self.put(selection, contents)
        for param, absent in zip(params, missing, strict=True) if any(missing) else ():
            if absent:
                self.members[str(param.name)].decay()

    def select(self, names: tuple[str | None, ...], missing: tuple[bool, ...] | None = None) -> Selection:
        """The cells that take part in a step of these parameters, some of which may have no gradient."""
        key = names, missing
        if key not in self._selections:
            given = {name: index for index, name in enumerate(names) if missing is None or not missing[index]}
            # All stacks, so that any set of their parameters is updated by one program; others only if need be.
            cells = [
                at
                for at, of in enumerate(self._cells)
                if (given and isinstance(of, Stack)) or any(param.name in given for param in of.params)
            ]
            params = [[param.name for param in self._cells[at].params] for at in cells]
            source = [given.get(name) for row in params for name in row]
            partly = None in source
            masks = tuple(np.array([name in given for name in row]) for row in params) if partly else None
            plan = Plan([self._cells[at] for at in cells])
            self._selections = dict(list(self._selections.items())[-64:])
            self._selections[key] = Selection(tuple(cells), plan, source, masks)
        return self._selections[key]

    def rules(self, selection: Selection) -> Rules:
        """Settings as compiled programs take them."""
        if selection.cells not in self._rules:
            self._rules[selection.cells] = Rules([self._settings[at] for at in selection.cells])
        return self._rules[selection.cells]

    def take(self, selection: Selection) -> tuple[Contents, ...]:
        """What a compiled program takes, and destroys."""
        for at in selection.cells:
            self._cells[at].keep_what_others_hold()
        return tuple(self._cells[at].contents for at in selection.cells)

    def put(self, selection: Selection, contents: Sequence[Contents]) -> None:
        """Put in what it has returned."""
        for at, new in zip(selection.cells, contents, strict=True):
            self._cells[at].replace(new)
        self._lagging = True

    # Places.

    def settle(self) -> None:
        """Bring cells and settings up to date with options, states and values that were assigned."""
        if self.moved or self.written:
            self._arrange()
        for cells in self._cells:
            if cells.outdated:
                cells.update_outdated()

    def _arrange(self) -> None:
        """Put those parameters into one stack whose settings differ in numbers only."""
        self.write_faded()
        kinds: dict[Hashable, list[Member]] = {}
        for member in self.members.values():
            kinds.setdefault(member.kind, []).append(member)
        rows = Rows(self._places)
        made: list[Callable[[], Cells]] = []
        for kind, members in kinds.items():
            old = self._places[members[0].name][0] if members[0].name in self._places else None
            same = old is not None and old.params == tuple(member.param for member in members)
            if same and self._kinds[self._cells.index(old)] == kind and all(m.assigned is None for m in members):  # type: ignore[arg-type]
                made.append(functools.partial(_same, old))
            else:
                made.append(built(members, rows))
        before, self._cells = self._cells, [make() for make in made]
        self._kinds = list(kinds)
        self._places = {str(p.name): (cells, i) for cells in self._cells for i, p in enumerate(cells.params)}
        self._settings = [stacked(members, cells) for members, cells in zip(kinds.values(), self._cells, strict=True)]
        self._rules.clear()
        if self._cells != before:
            self._selections.clear()
        for member in self.members.values():
            member.assigned = None
        self.moved = self.written = False


def _taken_apart(rule: Rule) -> tuple[Rule, Any, list[Any]]:
    leaves, form = jax.tree.flatten(rule)
    return rule, form, [float(np.asarray(x).item()) if _is_number(x) else x for x in leaves]


def _is_number(x: Any) -> bool:
    return isinstance(x, jax.Array) and x.size == 1 and jnp.issubdtype(x.dtype, jnp.floating)


def _same(cells: Any) -> Cells:
    return cells


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype)
