"""Groups whose parameters are updated as one, because their rule shares state between them: samplers, L-BFGS."""

from __future__ import annotations

import abc
import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxoptim.core import Rule
from jaxoptim.engine.layout import Cell, Layout, Struct
from jaxoptim.engine.numbers import Numbers
from jaxoptim.engine.whole import Whole
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.part import Part
from jaxoptim.optim.storage import Group, Storage, labelled


class Section(NamedTuple):
    """Parameters that are updated as one.

    Attributes:
        group: the dict of options that they follow.
        params: the parameters.
        times: how often one step updates them: once, or never if they stand in no group.
    """

    group: Group
    params: tuple[Parameter, ...]
    times: int


class WholeStorage(Storage, abc.ABC):
    """Groups of parameters that are each updated as one, over a :class:`~jaxoptim.engine.whole.Whole`.

    Attributes:
        whole: values, and the state of each section; None before the first look at the groups.
        sections: the groups, and the parameters that stand in none.
        layout: which parameters are whose; its cells are the sections.
        numbers: the rules of the sections, on the device.
    """

    whole: Whole | None = None
    layout: Layout
    numbers: Numbers
    sections: Sequence[Section] = ()
    takes_transforms = False

    def __init__(self, rule: type[Rule], step_type: type | None, fixed: Mapping[str, Any]) -> None:
        super().__init__(rule, step_type, fixed)
        self._place_of: dict[Parameter, tuple[int, int]] = {}  # the section of each parameter, and its place there
        self._edited: dict[Parameter, dict[str, Any]] = {}  # state that a user has written since the last step
        self._unstarted: list[int] = []  # the sections that have no state

    # What is different in samplers and L-BFGS.

    @abc.abstractmethod
    def fresh(self, at: int) -> Any:
        """Return the state of a section before its first update."""

    @abc.abstractmethod
    def restored(self, at: int, states: Mapping[Parameter, dict[str, Any]], began: bool) -> Any:
        """Return the state of a section from those of its parameters; None if there is none."""

    # State by parameter.

    def known(self) -> list[Parameter]:
        """Return all parameters that may have state: those of the groups, and others that were there before."""
        return list(dict.fromkeys([*self.parameters(), *self._place_of, *self._edited]))

    def states(self) -> dict[Parameter, dict[str, Any]]:
        """Return the state of all parameters that have some."""
        return {param: state for param in self.known() if (state := self.state_of(param))}

    def set_state(self, param: Parameter, state: dict[str, Any]) -> None:
        """Give a parameter another state, from the next step on."""
        self._edited[param] = state

    def state_at(self, at: int) -> Any:
        """Return the state of a section, None before its first update."""
        return None if self.whole is None else self.whole.states[at]

    def replace_state(self, at: int, state: Any) -> None:
        """Give a section another state."""
        owner = self._owner()
        owner.states = [state if other == at else old for other, old in enumerate(owner.states)]
        self._find_unstarted()

    def _find_unstarted(self) -> None:
        states = self._owner().states
        self._unstarted = [at for at, of in enumerate(self.sections) if of.times and states[at] is None]

    def _is_loose(self) -> bool:
        return bool(self._edited) or self.whole is None

    def read_all(self) -> None:
        """Do nothing: every value is an array of its own."""

    def parts(self) -> list[Part]:
        """Return the parameters as the pure face has them."""
        return [self._part(at, section) for at, section in enumerate(self.sections)]

    def _part(self, at: int, section: Section) -> Part:
        state, labels = self.state_at(at), [self.labels[param] for param in section.params]
        count, shared = (None, None) if state is None else (state.step, state.shared)
        slots = [self.slots_of(at, place) for place in range(len(section.params))]
        return Part(section.group, self.rule_at(at), section.params, labels, section.times, count, slots, shared)

    def slots_of(self, at: int, place: int) -> dict[str, Any]:
        """Return the slots of one parameter of a section."""
        return {}

    # A step.

    def start(self) -> None:
        """Create the state of all parameters now instead of at their first update."""
        self.settle()
        with self._started():
            pass

    @contextlib.contextmanager
    def _started(self) -> Iterator[None]:
        """Create the state of sections that have none, and take it away again if what follows fails."""
        new = self._unstarted
        try:
            for at in new:
                self.replace_state(at, self.fresh(at))
            yield
        except BaseException:
            for at in new:
                self.replace_state(at, None)
            raise

    def _owner(self) -> Whole:
        """Return the owner of the parameters, up to date with groups, options, and assigned values."""
        if self.whole is None:
            self._arrange()
        return self.whole  # type: ignore[return-value]

    def rule_at(self, at: int) -> Rule:
        """Return the rule of a section."""
        settings = zip(self._settings, self.groups, strict=True)
        # Parameters that the user took out of all groups are not updated by any.
        own = self.sections[at].group
        return next((apart for apart, group in settings if group is own), self._settings[0]).setting.rule

    def check_repeated(self, params: Sequence[Parameter]) -> None:
        """Raise for a parameter that stands in a group more than once: shared state, such as a key, has one step."""
        if repeated := [param for param, times in Counter(params).items() if times > 1]:
            name = repeated[0].name or f"params[{params.index(repeated[0])}]"
            raise ValueError(
                f"{self.rule.__name__} takes each parameter once, but {name!r} stands in its group more than once. "
                "Give it once, with the sum of its gradients."
            )

    # What the user has changed since the last step.

    def settle(self) -> None:
        """Bring everything up to date with groups, options, and assigned values."""
        self._check_groups()
        self._settle_options()
        if self._edited or self._groups_changed() or self.whole is None:
            self._arrange()
        self._owner().update_outdated()

    def _changed(self, settings: Any, is_same_form: bool) -> None:
        if not is_same_form:
            self._seen = []
        elif self.whole is not None:
            self._number()

    def _arrange(self) -> None:
        """Find the parameters of each group, and the state that they have now."""
        before = dict(vars(self))
        try:
            self._rearrange()
        except BaseException:
            vars(self).update(before)
            raise
        self._edited.clear()
        self._seen = [(group, list(group["params"])) for group in self.groups]

    def _rearrange(self) -> None:
        tree = self.tree()
        labels = labelled(tree)
        sections = self._sections(labels)
        params = [param for section in sections for param in section.params]
        states = {param: self.state_of(param) for param in params}
        begun = {param for param, (at, _) in self._place_of.items() if self._owner().states[at] is not None}
        self.labels, self.sections = labels, sections
        number = {param: index for index, param in enumerate(params)}
        cells = [
            Cell(at, tuple(number[param] for param in of.params), None, (0,) * len(of.params), at, of.times)
            for at, of in enumerate(sections)
        ]
        structs = [Struct(labels[param], param.shape, str(jnp.dtype(param.dtype))) for param in params]
        leaves, treedef = jax.tree.flatten(tree)
        self.layout = Layout(treedef, tuple(number[param] for param in leaves), tuple(structs), tuple(cells))
        self.whole = Whole(params, [None] * len(sections))
        self._place_of = {params[member]: (of.number, at) for of in cells for at, member in enumerate(of.members)}
        self._number()
        self.whole.states = [
            self.restored(at, states, not begun.isdisjoint(of.params)) for at, of in enumerate(sections)
        ]
        self._find_unstarted()

    def _sections(self, labels: Mapping[Parameter, str]) -> list[Section]:
        """Return the parameters of each group, and those that stand in none at the end."""
        inside = set(self.parameters())
        for group in self.groups:
            self.check_repeated(group["params"])
        sections = [Section(group, tuple(group["params"]), 1) for group in self.groups if group["params"]]
        outside = tuple(param for param in labels if param not in inside)
        return [*sections, Section({"params": list(outside)}, outside, 0)] if outside else sections

    def _number(self) -> None:
        self.numbers = Numbers([self.rule_at(at) for at in range(len(self.sections))])
