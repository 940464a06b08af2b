"""One parameter of many: its options, and where its torch-style optimizer keeps it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, MutableMapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxoptim.core import Decay
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.state import State
from jaxoptim.optim.storage import Group, Storage
from jaxoptim.pyro.optim.clipping import Clip
from jaxoptim.pyro.optim.together import Fading, Setting

if TYPE_CHECKING:
    from jaxoptim.pyro.optim.joint import Joint

_MAX_SIZE = 16384
"""Larger arrays stay by themselves, as in :func:`jaxoptim.pack`: to copy them would cost more than it saves."""


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
    """One parameter of a :class:`Joint`: where its torch-style optimizer keeps it.

    Args:
        joint: what it belongs to.
        param: the parameter.
        optimizer: an optimizer of this parameter alone, which moves in here.
        clip: how the gradient is clipped.
    """

    def __init__(self, joint: Joint, param: Parameter, optimizer: Optimizer, clip: Clip) -> None:
        old = optimizer._storage
        self.written = True
        super().__init__(old.rule, old.step_type, old.fixed)
        self.joint, self.param, self.optimizer, self.clip = joint, param, optimizer, clip
        self.assigned: dict[str, Any] | None = old.state_of(param) or None
        self.groups, self.forest, self.is_list = old.groups, old.forest, old.is_list
        self._decays: tuple[str, str] | None = optimizer.decays
        self.has_rows = False
        self.subsample: Any = None
        self.sharding = param.value.sharding
        self._setting: Setting | None = None
        self._form_of_clip = jax.tree.structure(clip)
        optimizer._storage, optimizer._state = self, State(self)

    @property
    def groups(self) -> list[Group]:
        """The group of the parameter, as of now."""
        self.joint.write_faded()
        return self._groups

    @groups.setter
    def groups(self, groups: list[Group]) -> None:
        self._groups: list[Group] = [Options(group, self._write) for group in groups]
        self._write()

    def _write(self) -> None:
        self.written = True
        if "joint" in vars(self):
            self.joint.written = True

    def become(self, name: str, value: float) -> None:
        """Write what steps have made of an option, which they know already."""
        old = self.options[name]
        dict.__setitem__(self.options, name, jnp.full_like(old, value) if isinstance(old, jax.Array) else value)
        self._setting = None

    def decay(self) -> None:
        """Let options decay without a step: what happens to a parameter whose gradient is None."""
        if self.setting.fading is not None:
            group, (option, factor) = self.groups[0], self._decays  # type: ignore[misc]
            group[option] = group[option] * group[factor]

    @property
    def options(self) -> Group:
        """The options, without what the last steps have made of them."""
        return self._groups[0]

    @property
    def setting(self) -> Setting:
        """The rule of the current options, and the clipping, as they are for a parameter without any steps."""
        if self.written or self._setting is None:
            fading = None
            rule, form, numbers = self.joint.made_rule(self)
            if self._decays is not None and (factor := self.options[self._decays[1]]) != 1:
                option = self._decays[0]
                if callable(self.options[option]):  # a schedule, which the rule itself lets decay
                    rule = rule.replace(**{self._decays[1]: factor})
                    numbers, form = jax.tree.flatten(rule)
                else:
                    fading = Fading(option, Decay.of(float(factor)), 0.0)
            self._setting = Setting(rule, self.clip, fading)
            self._form = (form, self._form_of_clip, fading is None)
            self._numbers = [*numbers, *jax.tree.leaves((self.clip, fading))]
            self.written = False
        return self._setting

    @property
    def alone(self) -> bool:
        """Whether the parameter stands by itself."""
        is_sparse = self.has_rows or self.setting.rule.sparse == "required"
        is_large = math.prod(self.param.shape) > _MAX_SIZE or len(self.sharding.device_set) > 1
        return is_sparse or is_large or not all(isinstance(x, float) for x in self._numbers)

    @property
    def kind(self) -> Hashable:
        """What parameters have in common that stand in one stack."""
        alone, param = self.alone, self.param
        return (self._form, param) if alone else (self._form, param.shape, param.dtype, self.sharding)

    def numbers_since(self, step: int) -> list[Any]:
        """The leaves of the setting for a parameter that has made some steps."""
        fading = self.setting.fading
        return self._numbers if fading is None else [*self._numbers[:-1], float(step)]

    @property
    def name(self) -> str:
        """The name of the parameter."""
        return str(self.param.name)

    def move_to(self, param: Parameter) -> None:
        """Go on with another parameter."""
        self.assigned = self.state_of(self.param)
        self._groups = [Options(dict(self.groups[0], params=[param]), self._write)]
        self.param, self.forest, self.sharding = param, [[param]], param.value.sharding
        self._write()
        self.joint.moved = True

    # What the torch-style optimizer asks for.

    def has_state(self, param: Parameter) -> bool:
        """Whether ``state`` has an entry for the parameter."""
        return bool(self.state_of(param))

    def state_of(self, param: Parameter) -> dict[str, Any]:
        """The state by torch's names, a new dict."""
        if param is not self.param:
            return {}
        return dict(self.assigned) if self.assigned is not None else self.joint.state_of(self)

    def states(self) -> dict[Parameter, dict[str, Any]]:
        """The state, if there is some."""
        return {self.param: state} if (state := self.state_of(self.param)) else {}

    def set_state(self, param: Parameter, state: dict[str, Any]) -> None:
        """Give the parameter another state, from the next step on."""
        if param is self.param:
            self.assigned = state
            self.joint.moved = True

    def settle(self) -> None:
        """Refuse: a step is made by the whole."""
        raise TypeError(
            "This optimizer is one of many in a PyroOptim, which makes the steps of all. Call it with a list of "
            "parameters, or its update(params, grads)."
        )
