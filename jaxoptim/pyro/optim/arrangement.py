"""From parameters, their values and states to the cells that hold them, without a compiled program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import OptState, as_jax, init, trees
from jaxoptim.core.numerics import placed_like
from jaxoptim.optim.bucket import Cells, Contents, abstract_slots
from jaxoptim.optim.storage import count_in
from jaxoptim.pyro.optim.member import Member
from jaxoptim.pyro.optim.together import NOT_STARTED, Setting, Single, Stack


class Rows:
    """What cells hold of each parameter, read without a compiled program: in NumPy, large arrays excepted."""

    def __init__(self, places: dict[str, tuple[Cells, int]]) -> None:
        self._places = places
        self._read: dict[int, Any] = {}

    def of(self, member: Member, slots: dict[str, Any]) -> tuple[Any, int, dict[str, Any]]:
        """The value, the count of steps and the slots of a parameter."""
        value, step, old = None, NOT_STARTED, dict[str, Any]()
        if member.name in self._places:
            cells, index = self._places[member.name]
            if id(cells) not in self._read:
                self._read[id(cells)] = self._all(cells)
            whole = self._read[id(cells)]
            part = whole if isinstance(cells, Single) else jax.tree.map(lambda x: x[index], whole)
            value = None if cells.params[index] is not member.param or index in cells.outdated else part[0]
            step, old = int(part[1].step), part[1].slots
        if member.assigned is not None:
            step = count_in(member.assigned) if member.assigned else NOT_STARTED
            old = {name: member.assigned[name] for name in slots if name in member.assigned}
        return member.param.value if value is None else value, step, old

    def _all(self, cells: Cells) -> Any:
        contents = (cells.values, cells.state)
        return contents if isinstance(cells, Single) else jax.tree.map(np.asarray, contents)


def built(members: list[Member], rows: Rows) -> Callable[[], Cells]:
    """Cells of these parameters; made at the end, when nothing can fail any more."""
    first = members[0]
    rule, struct = first.setting.rule, first.param.struct
    slots = abstract_slots(rule, struct)
    kept = [complete(member, slots, *rows.of(member, slots)) for member in members]
    params, labels = [member.param for member in members], [member.name for member in members]
    if first.alone:
        value, step, own = kept[0]
        state = OptState(jnp.asarray(step, jnp.int32), jax.tree.map(as_jax, own), {})
        contents, kind = Contents(as_jax(value), state), Single
    else:
        values, steps, every = zip(*kept, strict=True)
        stacks = {name: None if like is None else _stack([s[name] for s in every]) for name, like in slots.items()}
        state = OptState(jnp.asarray(np.array(steps, np.int32)), stacks, {})
        whole = (_stack(values), state)
        like = jax.ShapeDtypeStruct((), struct.dtype, sharding=first.sharding)
        contents, kind = Contents(*jax.tree.map(lambda x: placed_like(x, like), whole)), Stack  # type: ignore[assignment]

    def make() -> Cells:
        cells = kind(labels, params, contents)
        cells.names = list(slots)
        return cells

    return make


def complete(
    member: Member, slots: dict[str, Any], value: Any, step: int, given: dict[str, Any]
) -> tuple[Any, int, dict[str, Any]]:
    """A value, a count, and all slots of a rule."""
    missing = [name for name, like in slots.items() if like is not None and given.get(name) is None]
    new: dict[str, Any] = {}
    if missing and member.step_type is None:
        step = NOT_STARTED  # what torch counts by the presence of the slot alone starts anew
    fresh = init(member.setting.rule, as_jax(value)).slots if missing and step != NOT_STARTED else {}
    for name, like in slots.items():
        if like is None:
            new[name] = None
        elif name in missing:
            new[name] = fresh[name] if fresh else np.zeros(like.shape, like.dtype)
        else:
            new[name] = given[name] if isinstance(given[name], jax.Array | np.ndarray) else np.asarray(given[name])
            trees.check_shape(f"slot {name!r}", member.name, new[name], like)
            new[name] = new[name].astype(like.dtype)
    return value, step, new


def _stack(arrays: Sequence[Any]) -> jax.Array:
    return jnp.asarray(np.stack([np.asarray(x) for x in arrays]))


def stacked(members: list[Member], cells: Cells) -> Setting:
    """The settings of the parameters of some cells as one, whose leaves are arrays of numbers."""
    steps = np.asarray(cells.state.step).reshape(-1)  # type: ignore[union-attr]
    numbers = [member.numbers_since(max(int(step), 0)) for member, step in zip(members, steps, strict=True)]
    form = jax.tree.structure(members[0].setting)
    if isinstance(cells, Single):
        return jax.tree.unflatten(form, numbers[0])
    return jax.tree.unflatten(form, list(np.array(numbers, np.float64).reshape(len(members), -1).T))


def step_of(cells: Cells, index: int) -> int:
    """The count of steps of one parameter."""
    step = cells.state.step  # type: ignore[union-attr]
    return int(np.asarray(step) if isinstance(cells, Single) else np.asarray(step)[index])
