"""Parameters by name, each with options of its own, which are all updated together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import OptState
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.engine.numbers import Setting
from jaxoptim.engine.records import NOT_STARTED
from jaxoptim.engine.slots import slot_names
from jaxoptim.engine.store import Store
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.optim.fading import Faded, Fading
from jaxoptim.pyro.optim.member import Member


class Joint:
    """Parameters with options of their own in one store.

    Attributes:
        members: by name.
        fades: whether the options of some parameters decay at each step.
        store: their values and state.
    """

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.fades = False
        self.store = Store()
        self._written: list[Member] = []
        self._fading: Fading | None = None
        self._has_new = False  # whether parameters have come since the last step

    def written(self, member: Member) -> None:
        """Remember that an option of a parameter was written."""
        self._written.append(member)

    def add(self, member: Member) -> None:
        """Add a parameter."""
        self.members[member.name] = member
        self._has_new = True
        self.fades = self.fades or member.optimizer.decays is not None

    def remove(self, name: str) -> None:
        """Remove a parameter, which keeps its value."""
        self.store.forget(self.members.pop(name).param)

    def let_go(self) -> None:
        """Forget the parameters that others have replaced."""
        if len(self.store.known()) != len(self.members):
            own = {member.param for member in self.members.values()}
            for param in self.store.known():
                if param not in own:
                    self.store.forget(param)

    def read_all(self) -> None:
        """Read the values of all parameters, which is faster than one after the other."""
        for slabs in self.store.units:
            slabs.read_all()

    def pure(self, name: str) -> tuple[Setting, OptState | None]:
        """The setting of a parameter's next step, and its state as the pure face has it, None before the first."""
        member = self.members[name]
        with jax.ensure_compile_time_eval():
            setting = member.next_setting()
            names = slot_names(setting.rule)
            count, (_, entries) = self.store.count_of(member.param, names), self.store.state_of(member.param)
            if count == NOT_STARTED:
                return setting, None
            slots = {slot: entries.get(slot) for slot in names}
            return setting, OptState(jnp.asarray(count, jnp.int32), slots, {})

    def fade(self, params: Sequence[Parameter]) -> Callable[[], None] | None:
        """Decay the options of these parameters, and return a function that undoes it."""
        if not self.fades:
            return None
        if (fading := self._steady(params)) is not None:
            return fading.fade()
        faded = [undo for param in params if (undo := self.members[str(param.name)].fade()) is not None]

        def back() -> None:
            for undo in faded:
                undo()

        return back if faded else None

    def fade_many(self, params: Sequence[Parameter], ahead: int | None) -> Faded:
        """Decay the options of these parameters for the steps of one call.

        Args:
            params: the parameters.
            ahead: how many steps it is to make; None for one step in a program of its own.
        """
        if not self.fades:
            return Faded()
        if ahead is not None and (fading := self._steady(params)) is not None:
            return fading.fade_many(ahead)
        back = self.fade(params)
        return Faded() if back is None else Faded(1, lambda count: back() if count else None, most=1)

    def _steady(self, params: Sequence[Parameter]) -> Fading | None:
        """The options that decay at a step of these parameters, if the step before was alike and none was written."""
        if self._fading is not None and self._fading.goes_on(params, self.store.units):
            return self._fading
        self._fading = None
        if not self._written and len(self.store.units) == 1:
            with Uninterrupted():
                members = [self.members[str(param.name)] for param in params]
                self._fading = Fading.of(members, self.store.units[0])
        return self._fading

    def advance(self, params: Sequence[Parameter], grads: Sequence[Any]) -> None:
        """Make one step of these parameters; those whose gradient is None stay."""

        def step() -> None:
            self.settle()
            self.store.advance_some(params, grads, self._freeze)

        if not self.fades:
            return step()
        if (fading := self._steady(params)) is not None:
            return fading.advance(step)
        with Uninterrupted():
            back = self.fade(params)
            try:
                step()
            except BaseException:
                if back is not None:
                    back()
                raise

    def settle(self, *, together: bool = False) -> None:
        """Bring the store up to date with parameters, options, states and values.

        Args:
            together: all parameters in one unit, also those that have come just now (default False).
        """
        if self._written:
            written, self._written = list(dict.fromkeys(self._written)), []
            changed = {member.param: member.apart for member in written if self.members.get(member.name) is member}
            self.store.renumber_some(changed)
        members = self.members.values() if self._has_new else ()
        new = [member for member in members if not self.store.has(member.param)]
        if new and self.store.units and not together:
            self.store.add([member.as_group for member in new])
        elif new or not self.store.units or (together and len(self.store.units) > 1) or self.store.is_quiet():
            self._freeze()
        self._has_new = False
        for slabs in self.store.units:
            slabs.update_outdated()

    def _freeze(self) -> None:
        """Put all parameters into one unit."""
        members = list(self.members.values())
        params = [member.param for member in members]
        self.store.thaw()
        self.store.freeze(
            [member.as_group for member in members], {member.param: member.name for member in members}, params
        )
