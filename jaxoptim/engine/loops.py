"""Many steps in one compiled call, each along the gradient of a loss at the values that the step before has left."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxoptim.core.loss import Loss
from jaxoptim.engine.programs import Arrays, StepNumbers, StepOptions, minimized
from jaxoptim.engine.static import Static
from jaxoptim.engine.update import Update

CAPACITY = 4096
"""So many steps one call makes at most. The number of them is data: any number runs the same program."""

BLOCK = 128
"""XLA runs a loop in one thread, and several times as fast, whose arrays have at most so many numbers of float32.
Losses leave it in blocks of that size."""


class Changes(Exception):
    """Raised where a step returns other shapes or structures than it was given, so that no loop can go on from them."""


class Turn(Static):
    """The way in which the arguments of a loss follow from one step to the next; fixed in a compiled program."""

    def arguments(self, at: Any, carried: Any, given: Any) -> tuple[Any, ...]:
        """Return the arguments of the loss at a step.

        Args:
            at: the number of the step within this call.
            carried: the values that the step before has left.
            given: the inputs that all steps share.
        """
        raise NotImplementedError

    def following(self, value: jax.Array, aux: Any, carried: Any) -> Any:
        """Return the values that a step leaves for the next.

        Args:
            value: the loss, nan for a step that was skipped.
            aux: the auxiliary output of the loss.
            carried: the values that the step before had left.
        """
        raise NotImplementedError


class Course(NamedTuple):
    """The inputs of a call that makes several steps.

    Attributes:
        turn: how arguments follow.
        carried: the values that the first step starts with.
        given: the inputs that all steps share.
        num_steps: how many, at most ``CAPACITY``.
    """

    turn: Turn
    carried: Any
    given: Any
    num_steps: int


def _many(
    updates: tuple[Update, ...],
    loss: Loss,
    options: StepOptions,
    turn: Turn,
    data: tuple[Any, ...],
    series: tuple[Any, ...],
    leaves: tuple[Arrays, ...],
    held: dict[str, jax.Array],
    carried: Any,
    given: Any,
    num_steps: Any,
    always: jax.Array,
) -> tuple[list[Any], Any, jax.Array, jax.Array]:
    """Make steps of one or more owners, each like that of :func:`~jaxoptim.engine.programs.minimize`.

    Args:
        updates: how the parameters of each owner are updated.
        loss: the loss, which takes a dict by name.
        options: the other options of a step.
        turn: see :class:`Course`.
        data: the data that each update reads.
        series: for each owner a tree like its data, with None for what stays; the others have a first axis of steps
            that are not skipped.
        leaves: values and state of each owner, which are donated.
        held: values of parameters that stay, by name.
        carried: see :class:`Course`.
        given: see :class:`Course`.
        num_steps: see :class:`Course`.
        always: the value True.

    Returns:
        For each owner the leaves of its new contents; what the last step has left; ``CAPACITY`` losses, of which the
        first are those of the steps; how many of these were not skipped.

    Raises:
        Changes: for a step from which no other can go on.
    """

    @jax.jit
    def step(at: Any, taken: Any, leaves: Any, carried: Any, constant: Any) -> Any:
        data, series, held, given, always = constant
        now = jax.tree.map(lambda x, of: x if of is None else of[taken], data, series, is_leaf=_is_none)
        args = turn.arguments(at, carried, given)
        new, _, value, aux, _ = minimized(
            updates, None, loss, options, StepNumbers(), now, leaves, held, args, always, {}
        )
        return tuple(new), turn.following(value, aux, carried), value

    constant = (data, series, held, given, always)
    start = (leaves, carried)
    *after, value = jax.eval_shape(step, 0, jnp.int32(0), *start, constant)  # traced once for this and for the loop
    if jax.tree.map(_form, tuple(after)) != jax.tree.map(_form, start):
        raise Changes

    def body(at: Any, state: Any) -> Any:
        leaves, carried, taken, losses = state
        leaves, carried, value = step(at, taken, leaves, carried, constant)
        is_taken = jnp.isfinite(value) if options.may_skip else True
        return leaves, carried, taken + is_taken, losses.at[at % losses.size].set(value)

    def block(number: Any, state: Any) -> Any:
        *state, losses = state
        begin = number * BLOCK
        few = jnp.zeros(BLOCK, losses.dtype)
        *state, few = jax.lax.fori_loop(begin, jnp.minimum(begin + BLOCK, num_steps), body, (*state, few))
        return *state, jax.lax.dynamic_update_slice(losses, few, (begin,))

    all_small = all(x.nbytes <= 4 * BLOCK for x in jax.tree.leaves((start, constant)))
    count, some = (-(-num_steps // BLOCK), block) if all_small else (num_steps, body)
    state = (*start, jnp.int32(0), jnp.zeros(CAPACITY, value.dtype))
    leaves, carried, taken, losses = jax.lax.fori_loop(0, count, some, state)
    return list(leaves), carried, losses, taken


_static: Any = {"static_argnames": ("updates", "loss", "options", "turn"), "donate_argnames": "leaves"}
minimize_many = jax.jit(_many, **_static)
"""Many steps as a compiled call."""


@functools.partial(jax.jit, **_static | {"static_argnames": (*_static["static_argnames"], "mesh")})
def minimize_fits(
    updates: tuple[Update, ...],
    loss: Loss,
    options: StepOptions,
    turn: Turn,
    data: tuple[Any, ...],
    series: tuple[Any, ...],
    leaves: tuple[Arrays, ...],
    held: dict[str, jax.Array],
    carried: Any,
    given: Any,
    num_steps: Any,
    always: jax.Array,
    mesh: Mesh | None = None,
) -> tuple[list[Any], Any, jax.Array, jax.Array]:
    """Make steps of several fits of the same parameters: ``leaves`` and ``carried`` have a first axis of fits.

    The arguments are those of :func:`minimize_many`, and the mesh whose devices the fits are spread over, if there is
    one; what is returned has a first axis of fits too.
    """

    def fits(leaves: tuple[Arrays, ...], carried: Any, common: tuple[Any, ...]) -> Any:
        data, series, held, given, num_steps, always = common

        def fit(leaves: tuple[Arrays, ...], carried: Any) -> Any:
            return _many(updates, loss, options, turn, data, series, leaves, held, carried, given, num_steps, always)

        return jax.vmap(fit)(leaves, carried)

    common = data, series, held, given, num_steps, always
    if mesh is None:
        return fits(leaves, carried, common)
    along = PartitionSpec(mesh.axis_names)
    specs = along, along, PartitionSpec()
    return jax.shard_map(fits, mesh=mesh, in_specs=specs, out_specs=along, check_vma=False)(leaves, carried, common)


def _is_none(x: Any) -> bool:
    return x is None


def _form(x: Any) -> Any:
    """Return the part of an array that must not change within a loop."""
    return x.shape, x.dtype
