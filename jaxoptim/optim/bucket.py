"""Parameters that are updated together, and where their values and state are kept."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import OptState, Packed, Rule, as_jax, init, pack, trees
from jaxoptim.core.numerics import placed_like
from jaxoptim.core.packing import unpacked
from jaxoptim.optim.parameter import Parameter


class Static:
    """Something fixed in a compiled program, compared at every call: its hash is kept, and identity decides."""

    def __init__(self, *content: Any) -> None:
        self.content = content
        self._hash = hash(content)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Static) and self._hash == other._hash and self.content == other.content
        )


@jax.tree_util.register_pytree_node_class
class Contents:
    """The values of a bucket and its state: what a compiled step takes, donated, and returns.

    It is a pytree that is flat already, because a step would spend more time on its structure than on a small
    network's arrays.

    Args:
        values: the values of the parameters.
        state: the state, or None before the first update.
    """

    def __init__(self, values: Any, state: OptState | None) -> None:
        leaves, treedef = jax.tree.flatten((values, state))
        self.leaves: Sequence[Any] = leaves
        self._form = Static(treedef, state is not None)

    @property
    def values(self) -> Any:
        """The values, in their structure."""
        return jax.tree.unflatten(self._form.content[0], self.leaves)[0]

    @property
    def state(self) -> OptState | None:
        """The state, in its structure."""
        return jax.tree.unflatten(self._form.content[0], self.leaves)[1]

    @property
    def has_state(self) -> bool:
        """Whether there is a state."""
        return self._form.content[1]

    def tree_flatten(self) -> tuple[Sequence[Any], Static]:
        """The arrays and their structure."""
        return self.leaves, self._form

    @classmethod
    def tree_unflatten(cls, form: Static, leaves: Sequence[Any]) -> Contents:
        """Other arrays in the same structure."""
        new = object.__new__(cls)
        new._form, new.leaves = form, leaves
        return new


class Cells:
    """Parameters whose values, and state, are kept together; how, a subclass says.

    Args:
        labels: a unique name for each parameter, for error messages.
        params: the parameters. Their values are taken over.
        contents: the values, and the state.

    Attributes:
        names: the names of the slots in the rule's order, which compiled programs forget.
        outdated: the indices of parameters whose current value is no longer here.
    """

    def __init__(self, labels: Sequence[str], params: Sequence[Parameter], contents: Contents) -> None:
        self.labels, self.params = tuple(labels), tuple(params)
        self.contents = contents
        self.names: list[str] = []
        self.outdated: set[int] = set()
        self._read: dict[int, jax.Array] = {}
        for index, param in enumerate(params):
            param.enter(self, index)

    @property
    def values(self) -> Any:
        """The values of the parameters."""
        return self.contents.values

    @property
    def state(self) -> OptState | None:
        """The state, None before the first update."""
        return self.contents.state

    @state.setter
    def state(self, state: OptState | None) -> None:
        self.contents = Contents(self.values, state)

    def replace(self, contents: Contents) -> None:
        """Put new values and state in the place of the old ones."""
        self.contents = contents
        self._read.clear()

    def read(self, index: int) -> jax.Array:
        """The value of one parameter, the same array until the next step."""
        if index not in self._read:
            self._read[index] = self._leaf(self.values, index)
        return self._read[index]

    def read_all(self) -> None:
        """Read the values of all parameters, which is faster than one after the other."""
        if len(self._read) < len(self.params):
            self._read = dict(enumerate(self._leaves(self.values)))

    def update_outdated(self) -> None:
        """Bring back the values that were assigned, or taken over by another optimizer, since the last step."""
        values = self.values
        for index in sorted(self.outdated):
            values = self._with_leaf(values, index, self.params[index].value)
            self.params[index].enter(self, index)
        self.outdated.clear()
        self.replace(Contents(values, self.contents.state))

    def keep_what_others_hold(self) -> None:
        """Copy the arrays that somebody else holds too, because the next step donates ours."""
        self._read.clear()
        held = [count > _OURS for count in _references(self.contents.leaves)]
        if any(held):
            leaves, form = self.contents.tree_flatten()
            copies = [jnp.copy(x) if other else x for x, other in zip(leaves, held, strict=True)]
            self.contents = Contents.tree_unflatten(form, copies)

    def slots_of(self, index: int) -> dict[str, Any]:
        """The slots of one parameter, without those it lacks; empty before the first update."""
        slot_trees = {} if self.state is None else self.state.slots
        slots = {name: self._leaf(slot_trees[name], index) for name in self.names if name in slot_trees}
        return {name: slot for name, slot in slots.items() if slot is not None}

    def all_slots(self) -> list[dict[str, Any]]:
        """The slots of every parameter, as :meth:`slots_of` gives them."""
        slot_trees = {} if self.state is None else self.state.slots
        leaves = {name: self._leaves(slot_trees[name]) for name in self.names if name in slot_trees}
        return [
            {name: leaves[name][index] for name in leaves if leaves[name][index] is not None}
            for index in range(len(self.params))
        ]

    def _leaves(self, tree: Any) -> list[Any]:
        """What the parameters have in values or in a slot."""
        return [self._leaf(tree, index) for index in range(len(self.params))]

    def _leaf(self, tree: Any, index: int) -> Any:
        """What one parameter has there."""
        raise NotImplementedError

    def _with_leaf(self, tree: Any, index: int, value: Any) -> Any:
        """The same with something else for one parameter."""
        raise NotImplementedError


class Bucket(Cells):
    """Parameters of one group with one count of steps: one run of the pure face.

    Values and slots are packed (:class:`~jaxoptim.Packed`) if the rule is elementwise; otherwise they are
    plain trees. State exists from the first update on.

    Args:
        group: the dict of options that the parameters follow.
        labels: a unique name for each parameter, for error messages.
        params: the parameters. The bucket takes their values over.
        times: how often one step updates them: as often as they stand in the group.
        packed: keep small arrays in one buffer.
    """

    def __init__(
        self, group: dict[str, Any], labels: Sequence[str], params: Sequence[Parameter], times: int, packed: bool
    ) -> None:
        self.group, self.times, self.packed = group, times, packed
        tree = OrderedDict(zip(labels, [param.value for param in params], strict=True))
        super().__init__(labels, params, Contents(pack(tree) if packed else tree, None))

    def start(self, rule: Rule) -> None:
        """Make the state before the first update, or the slots that a change of options has added."""
        fresh = _init(rule, self.values)
        self.names = slot_names(rule)
        self.state = fresh if self.state is None else self.state._replace(slots=fresh.slots | self.state.slots)

    def load(self, rule: Rule, count: Any, slots: Sequence[dict[str, Any]], shared: Any = None) -> None:
        """Take state that was kept elsewhere: the count, the slots of each parameter that has them, and the rest."""
        slot_trees = _init(rule, self.values).slots
        self.names = slot_names(rule)
        for index, given in enumerate(slots):
            for name, slot in given.items():
                like = self._leaf(slot_trees[name], index)
                slot = as_jax(slot).astype(like.dtype)
                trees.check_shape(f"slot {name!r}", self.labels[index], slot, like)
                slot_trees[name] = self._with_leaf(slot_trees[name], index, placed_like(slot, like))
        self.state = OptState(jnp.asarray(count, jnp.int32), slot_trees, shared or {})

    def _leaves(self, tree: Any) -> list[Any]:
        return list(unpacked(tree).values())

    def _leaf(self, tree: Any, index: int) -> Any:
        return tree.get(index) if isinstance(tree, Packed) else tree[self.labels[index]]

    def _with_leaf(self, tree: Any, index: int, value: Any) -> Any:
        if isinstance(tree, Packed):
            return tree.set(index, value)
        return OrderedDict(tree, **{self.labels[index]: value})


_init = jax.jit(init)


def slot_names(rule: Rule) -> list[str]:
    """The names of a rule's slots, in its order."""
    return list(abstract_slots(rule, jax.ShapeDtypeStruct((2, 2), jnp.float32)))


def abstract_slots(rule: Rule, param: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """The shapes and dtypes of the slots of one parameter, None where it lacks one."""
    names: list[str] = []

    def init(param: jax.Array) -> dict[str, Any]:
        noise = rule.draw(rule.begin(), 0, {0: param})
        slots = rule.at(0).init(param, *noise.values())
        names.extend(slots)
        return slots

    slots = jax.eval_shape(init, param)  # which sorts the names
    return {name: slots[name] for name in names}


def _references(arrays: Sequence[Any]) -> list[int]:
    """How many references there are to each array."""
    return [sys.getrefcount(x) for x in arrays]


_OURS = _references((object(),))[0]
"""What :func:`_references` counts for an object that only a sequence holds."""
