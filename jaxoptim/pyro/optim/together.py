"""One step of many parameters, each of which has an optimizer and a count of its own, in one program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxoptim.core import Decay, OptState, Rule, check_gradient, init, step
from jaxoptim.core.packing import join, read, split
from jaxoptim.optim.bucket import Cells, Contents, Static
from jaxoptim.optim.program import RegroupNeeded, Rules
from jaxoptim.pyro.optim.clipping import Clip

NOT_STARTED = -1
"""The count of steps of a parameter that has no state."""
Masks = tuple[Any, ...] | None
"""For each of some cells, which of its parameters are updated; None for all of all."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fading:
    """An option that every step multiplies by another: ClippedAdam's rate.

    Attributes:
        option: its name.
        factor: what it is multiplied by.
        since: the count of steps at which it had the value that the rule says.
    """

    option: str = dataclasses.field(metadata={"static": True})
    factor: Decay
    since: Any

    def at(self, rule: Rule, step: Any) -> Rule:
        """The rule at a count of steps."""
        return rule.replace(**{self.option: getattr(rule, self.option) * self.factor.power(step - self.since)})


class Setting(NamedTuple):
    """What a parameter has of its own: its optimizer, and how its gradient is clipped. A pytree of numbers."""

    rule: Rule
    clip: Clip
    fading: Fading | None = None


def advanced(setting: Setting, param: Any, grad: Any, state: OptState) -> tuple[Any, OptState]:
    """One parameter and its state after one step.

    A count of :data:`NOT_STARTED` stands for slots that are not made yet. They are made here, so that a new parameter
    needs no program for that.
    """
    count = jnp.maximum(state.step, 0)
    rule = setting.rule if setting.fading is None else setting.fading.at(setting.rule, count + 1)
    fresh = init(rule, param).slots
    slots = jax.tree.map(lambda new, old: jnp.where(state.step == NOT_STARTED, new, old), fresh, state.slots)
    return step(rule, param, setting.clip.clipped(grad), state._replace(step=count, slots=slots))


class Single(Cells):
    """One parameter, kept as it is: large, sharded, with sparse gradients, or with options that are arrays."""

    def _leaf(self, tree: Any, index: int) -> Any:
        return tree

    def _with_leaf(self, tree: Any, index: int, value: Any) -> Any:
        return value


class Stack(Cells):
    """Parameters of one shape whose settings differ in numbers only: each array has them along its first axis."""

    def _leaves(self, tree: Any) -> list[Any]:
        if tree is None:
            return [None] * len(self.params)
        shape, size = tree.shape[1:], int(np.prod(tree.shape[1:]))
        return read(_flat(tree), [(shape, index * size) for index in range(len(self.params))])

    def _leaf(self, tree: Any, index: int) -> Any:
        return None if tree is None else _row(tree, index)

    def _with_leaf(self, tree: Any, index: int, value: Any) -> Any:
        return _with_row(tree, index, value)

    def update_outdated(self) -> None:
        """Bring all values back at once if many are outdated."""
        if len(self.outdated) < 8:
            return super().update_outdated()
        values = np.array(self.values)
        for index in sorted(self.outdated):
            values[index] = np.asarray(self.params[index].value)
            self.params[index].enter(self, index)
        self.outdated.clear()
        self.replace(Contents(jax.device_put(values, self.values.sharding), self.state))


@jax.jit
def _flat(tree: jax.Array) -> jax.Array:
    return tree.reshape(-1)


@jax.jit
def _row(tree: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(tree, index, 0, keepdims=False)


@jax.jit
def _with_row(tree: jax.Array, index: Any, value: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(tree, value, index, 0)


class Plan(Static):
    """Which parameters some cells hold. Gradients are given in their order.

    Args:
        cells: the cells.
    """

    def __init__(self, cells: Sequence[Cells]) -> None:
        super().__init__(*((of.labels, isinstance(of, Stack)) for of in cells))

    def values(self, contents: Sequence[Contents]) -> dict[str, jax.Array]:
        """The values by name."""
        values: dict[str, jax.Array] = {}
        for (names, stacked), content in zip(self.content, contents, strict=True):
            values.update(zip(names, _unstacked(content.values) if stacked else [content.values], strict=True))
        return values

    def advanced(
        self, settings: Rules, contents: Sequence[Contents], grads: Sequence[Any], masks: Masks
    ) -> tuple[Contents, ...]:
        """The cells after one step."""
        new, left = [], iter(grads)
        for index, ((names, stacked), setting, content) in enumerate(
            zip(self.content, settings.each(), contents, strict=True)
        ):
            values, state = content.values, cast(OptState, content.state)
            like = jax.ShapeDtypeStruct(values.shape[1:] if stacked else values.shape, values.dtype)
            given = [check_gradient(setting.rule, name, next(left), like) for name in names]
            if not stacked:
                new.append(Contents(*advanced(setting, values, given[0], state)))
                continue
            if any(isinstance(grad, BCOO) for grad in given):
                raise RegroupNeeded
            stack = join(given).reshape(values.shape)
            result = jax.vmap(advanced)(setting, values, stack, state)
            if masks is not None:
                result = jax.tree.map(functools.partial(_where, masks[index]), result, (values, state))
            new.append(Contents(*result))
        return tuple(new)


def _unstacked(values: jax.Array) -> list[jax.Array]:
    """The arrays along the first axis, by an operation whose transpose is a concatenation."""
    count, shape = values.shape[0], values.shape[1:]
    return [part.reshape(shape) for part in split(values.reshape(-1), [int(np.prod(shape))] * count)]


def _where(mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(mask.reshape(mask.shape + (1,) * (new.ndim - 1)), new, old)


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="contents")
def advance(
    plan: Plan, settings: Rules, contents: tuple[Contents, ...], grads: Sequence[Any], masks: Masks
) -> tuple[Contents, ...]:
    """One step from gradients.

    Errors:
        ``RegroupNeeded``, while tracing, for a sparse gradient in a stack; what ``check_gradient`` raises.
    """
    return plan.advanced(settings, contents, grads, masks)
