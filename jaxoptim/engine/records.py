"""Records of single parameters: the form in which a store's arrays are edited."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxoptim.core import as_jax, init, trees
from jaxoptim.core.numerics import placed_like
from jaxoptim.core.precision import MASTER
from jaxoptim.engine.numbers import TakenApart
from jaxoptim.engine.slots import abstract_slots, slot_names

NOT_STARTED = -1
"""The count of steps of a parameter that has no state."""
COUNT = "step"
"""The name of the count of steps in the state of a parameter."""


class Keeper(Protocol):
    """The protocol of an owner of values."""

    outdated: set[int]
    held: set[int]

    def read(self, index: int) -> Any:
        """Return the value of one parameter."""


class Variable(Protocol):
    """The protocol of a parameter, as a store knows it."""

    name: str | None
    value: Any
    shape: tuple[int, ...]
    dtype: Any

    def enter(self, keeper: Keeper, index: int) -> None:
        """Let a keeper have the value from now on."""

    def __hash__(self) -> int: ...


class Group(NamedTuple):
    """The parameters that follow one setting.

    Attributes:
        apart: the setting.
        params: the parameters, each once.
        times: how often one step updates each of them.
        is_counted: whether state shows a count; state without one starts anew with a slot that is new.
        axes: the data axes over whose devices the state of sharded parameters is in parts.
    """

    apart: TakenApart
    params: tuple[Any, ...]
    times: tuple[int, ...]
    is_counted: bool = True
    axes: tuple[str, ...] = ()


@dataclasses.dataclass
class Record:
    """The value and the state of a single parameter.

    Attributes:
        value: its array, None if the parameter has it.
        count: its steps, :data:`NOT_STARTED` without state.
        slots: its arrays by name, those of terms that are switched off, and a user's own, among them.
        sharding: where it is.
        keeper: the owner that the array was read from, None without one.
        index: the number of the parameter there.
        is_edited: whether a user has edited the slots, the count among them.
    """

    value: Any
    count: int
    slots: dict[str, Any]
    sharding: Any
    keeper: Keeper | None = None
    index: int = 0
    is_edited: bool = False

    def steps(self, names: Sequence[str]) -> int:
        """Return the count of steps, from the slots where a user has set them; ``names`` are those of the rule."""
        if not self.is_edited:
            return self.count
        state = {name: slot for name, slot in self.slots.items() if slot is not None}
        return count_in(state) if COUNT in state or state.keys() & set(names) else NOT_STARTED

    def current(self, param: Variable) -> Any:
        """Return the value, whoever has it."""
        is_stale = self.keeper is not None and self.index in self.keeper.outdated
        return param.value if self.value is None or is_stale else self.value


def count_in(state: Mapping[str, Any]) -> int:
    """Return the steps that a parameter's state has seen; state without a count is past its first step."""
    return int(np.max(np.asarray(state.get(COUNT, 1))))  # of NumPy, which compiles nothing; DCTAdam counts each number


def complete(record: Record, group: Group, label: str, param: Variable) -> tuple[Any, int, dict[str, Any] | None]:
    """Return the value of a parameter, its count, and all slots of its rule, None before the first update.

    Raises:
        ``ValueError`` for a slot of another shape.
    """
    value = record.current(param)
    rule = group.apart.setting.rule
    like = abstract_slots(rule, _struct(param))
    count = record.steps(list(like))
    if count == NOT_STARTED:
        return value, NOT_STARTED, None
    given = {name: record.slots[name] for name in like if record.slots.get(name) is not None}
    missing = [name for name, struct in like.items() if struct is not None and name not in given]
    if missing != [MASTER] * len(missing) and not group.is_counted:
        if not given:
            return value, NOT_STARTED, None
        count = 0
    fresh = init(rule, as_jax(value)).slots if missing else {}
    slots: dict[str, Any] = {}
    for name, struct in like.items():
        if struct is None:
            slots[name] = None
        elif name in missing:
            slots[name] = fresh[name]
        else:
            slot = given[name] if hasattr(given[name], "astype") else np.asarray(given[name])
            trees.check_shape(f"slot {name!r}", label, slot, struct)
            slots[name] = slot.astype(struct.dtype)
    return value, count, slots


def other_slots(record: Record, group: Group) -> dict[str, Any]:
    """Return the entries of a record that its rule does not keep."""
    names = (*slot_names(group.apart.setting.rule), COUNT)
    return {name: x for name, x in record.slots.items() if name not in names}


def placed(array: Any, sharding: Any) -> Any:
    """Return an array of JAX on the devices where it belongs."""
    return placed_like(as_jax(array), _At(sharding))


class _At(NamedTuple):
    sharding: Any


def _struct(param: Variable) -> Any:
    return jax.ShapeDtypeStruct(param.shape, param.dtype)
