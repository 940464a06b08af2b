"""The entry of one named parameter: its options, and its torch-style optimizer's view of the common store."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from jaxoptim.core.clipping import Clip
from jaxoptim.engine.numbers import Setting, TakenApart, taken_apart
from jaxoptim.engine.records import Group as Members
from jaxoptim.engine.store import Store
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.state import State
from jaxoptim.optim.storage import Group, Storage


class Options(dict[str, Any]):
    """The group of one parameter, which says when an option is written."""

    def __init__(self, group: Group, written: Callable[[], None]) -> None:
        super().__init__(group)
        self._written = written

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._written()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._written()

    def __ior__(self, other: Any) -> Options:  # type: ignore[override,misc]
        self.update(other)
        return self

    # By way of the two above.
    update = MutableMapping.update
    setdefault = MutableMapping.setdefault
    pop = MutableMapping.pop
    popitem = MutableMapping.popitem
    clear = MutableMapping.clear

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class Member(Storage):
    """The entry of one parameter of a ``PyroOptim``: a group of the common store, as its torch-style optimizer sees it.

    Args:
        store: where the parameters are kept.
        param: the parameter.
        optimizer: an optimizer of this parameter alone, which moves in here.
        clip: how the gradient is clipped.
        written: is called when an option is written.

    Attributes:
        param: the parameter.
        optimizer: as given.
        is_written: whether an option was written since the setting was made.
    """

    takes_transforms = False

    def __init__(
        self, store: Store, param: Parameter, optimizer: Optimizer, clip: Clip, written: Callable[[Member], None]
    ) -> None:
        old = optimizer._storage
        if old.gradient_transform is not None:
            self.check_transforms(type(optimizer).__name__)
        self._groups: list[Group] = []
        self._tell = written
        super().__init__(old.rule, old.step_type, old.fixed)
        self.allowed, self.unlisted, self.precision = old.allowed, old.unlisted, old.precision
        self.param, self.optimizer, self.clip = param, optimizer, clip
        self.subsample: Any = None
        self.is_written = True
        self._apart: TakenApart | None = None
        self._made_of: list[Any] = []  # the options in the setting
        self.catch_up: Callable[[], None] = _nothing  # before the setting is read, or an option written
        state = old.state_of(param)
        self.store = store
        self.groups, self.forest, self.is_list = old.groups, old.forest, old.is_list
        if state:
            self.set_state(param, state)
        optimizer._storage, optimizer._state = self, State(self)

    @property
    def groups(self) -> list[Group]:
        """The group of the parameter."""
        return self._groups

    @groups.setter
    def groups(self, groups: list[Group]) -> None:
        self._groups = [Options(group, self._write) for group in groups]
        if groups:
            self._write()

    def _write(self) -> None:
        self.catch_up()
        self.is_written = True
        self._tell(self)

    @property
    def options(self) -> Group:
        """The options of the parameter."""
        return self._groups[0]

    def fade(self) -> Callable[[], None] | None:
        """Decay options, as Pyro does at every step, and return a function that undoes it."""
        if self.optimizer.decays is None or not self.fades:
            return None
        options, (option, factor) = self.options, self.optimizer.decays
        before = options[option]
        options[option] = before * options[factor]
        return lambda: options.__setitem__(option, before)

    @property
    def fades(self) -> bool:
        """Whether options decay at each step."""
        if self.optimizer.decays is None:
            return False
        option, factor = self.optimizer.decays
        # The rule itself lets a schedule decay.
        return not callable(self.options[option]) and self.options[factor] != 1

    def leaf_that_fades(self) -> int | None:
        """Return the leaf of the setting that decays at each step; None if it is no plain number."""
        option, factor = self.optimizer.decays or ("", "")
        is_plain = type(self.options.get(option)) is float and type(self.options.get(factor)) is float
        return self.apart.place_of(option) if is_plain else None

    def keep(self, option: str, value: float) -> None:
        """Take an option that has changed, unchecked, into the setting."""
        self.catch_up = _nothing
        if self._apart is not None and (place := self._apart.place_of(option)) is not None:
            self._apart = self._apart.with_leaf(place, value)
            self._made_of[self._fields.index(option)] = value

    def next_setting(self) -> Setting:
        """The setting of the next step, whose options have decayed once more."""
        setting, back = self.apart.setting, self.fade()
        if back is not None:
            setting = self.apart.setting
            back()
        return setting

    @property
    def apart(self) -> TakenApart:
        """The setting of the parameter: its rule with the current options, and the clipping."""
        self.catch_up()
        if self._apart is None or self.is_written:
            self._check_names()
            now = [self._option(self.options, name) for name in self._fields]
            self._apart = self._setting_after(self._made_of or None, self._apart, now, self.options)
            self._made_of, self.is_written = now, False
        return self._apart

    def _setting(self, group: Group) -> TakenApart:
        rule = self.rule_of(group)
        if self.optimizer.decays is not None and callable(group[self.optimizer.decays[0]]):
            factor = self.optimizer.decays[1]
            rule = rule.replace(**{factor: group[factor]})
        return taken_apart(Setting(rule, self.clip))

    @property
    def as_group(self) -> Members:
        """The parameter as a group of the store."""
        return Members(self.apart, (self.param,), (1,), self.step_type is not None)

    @property
    def name(self) -> str:
        """The name of the parameter."""
        return str(self.param.name)

    # What the torch-style optimizer asks for.

    def known(self) -> list[Parameter]:
        """The parameter."""
        return [self.param]

    def states(self) -> dict[Parameter, dict[str, Any]]:
        """The state, if there is some."""
        return {self.param: state} if (state := self.state_of(self.param)) else {}

    def state_of(self, param: Parameter) -> dict[str, Any]:
        """The state by torch's names, a new dict."""
        return super().state_of(param) if param is self.param else {}

    def set_state(self, param: Parameter, state: dict[str, Any]) -> None:
        """Give the parameter another state, from the next step on."""
        if param is self.param:
            super().set_state(param, state)

    def tree(self) -> Any:
        """The parameter in the structure that its optimizer was given."""
        return self.forest[0]

    def settle(self) -> None:
        """Raise: steps are made by the :class:`PyroOptim`."""
        raise TypeError(
            "This optimizer is one of many in a PyroOptim, which makes the steps of all. Call it with a list of "
            "parameters, or its update(params, grads)."
        )


def _nothing() -> None:
    """Do nothing."""
