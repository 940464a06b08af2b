"""The compiled steps: one call for all parameters of an optimizer, whichever face it has.

Each compiles once for each structure: which parameters stand together, which terms the rules have, the shapes.
Numbers, counts and masks are data: a new learning rate, a parameter that is frozen or thawed, run the same program.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxoptim.core.accumulation import accumulated
from jaxoptim.core.clipping import Clip, squares
from jaxoptim.core.loss import Evaluation, Loss, all_finite, evaluated
from jaxoptim.core.loss_scale import LossScale, ScaleState
from jaxoptim.engine.apart import apart, waits
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.layout import Layout
from jaxoptim.engine.update import Update
from jaxoptim.native import CannotCompile, after, is_native

Arrays = Sequence[jax.Array]
"""The leaves of an owner's contents."""


@functools.partial(jax.jit, static_argnames="update", donate_argnames="leaves")
def advance(update: Update, data: Any, leaves: Arrays, grads: Any) -> tuple[list[Any], list[Any]]:
    """Make one step of all parameters along a tree of gradients.

    Args:
        update: how they are updated.
        data: the data that the update reads.
        leaves: values and state, which are donated.
        grads: a tree like the one that the user sees.

    Returns:
        The leaves of the new contents (the contents where their structure has changed) and what is published, each in a
        list of one.

    Raises:
        What the update raises for gradients that do not fit their parameters, while tracing.
    """
    new, published = update.along(data, leaves, grads)
    return [_returned(update, new)], [published]


class StepOptions(NamedTuple):
    """The options of a step besides its evaluation and update; they decide what is compiled.

    Attributes:
        accumulate: into how many micro-batches the batch is cut, None for a loss that takes it whole.
        mean: whether the loss is the mean over micro-batches, not their sum.
        skip_nonfinite: leave everything as it is where the loss or a gradient is not finite.
        measures: return the norms of gradient and update.
        loss_scale: how a factor on the loss follows the gradients, which leave everything as it is where one is not
            finite; None for no factor.
    """

    accumulate: int | None = None
    mean: bool = True
    skip_nonfinite: bool = False
    measures: bool = False
    loss_scale: LossScale | None = None

    @property
    def may_skip(self) -> bool:
        """Whether a step may be skipped."""
        return self.skip_nonfinite or self.loss_scale is not None


class StepNumbers(NamedTuple):
    """The numbers of these options, which are data.

    Attributes:
        clip_norm: a bound on the norm of the whole gradient, None for no bound.
        clip_value: a bound on each number of it, None for no bound.
        num_skipped: the steps that were skipped so far, where one may be.
        loss_scale: the factor on the loss.
    """

    clip_norm: Any = None
    clip_value: Any = None
    num_skipped: Any = None
    loss_scale: ScaleState | None = None


class Measured(NamedTuple):
    """The measurements of a step, on the device.

    Attributes:
        grad_norm: the norm of the whole gradient before clipping.
        update_norm: the norm of the change of all parameters, before it is rounded to their dtypes.
        skipped: whether the step was left out because the loss or a gradient was not finite.
        num_skipped: the steps that were left out so far.
        loss_scale: the factor on the loss at the next step; None without one.
    """

    grad_norm: jax.Array
    update_norm: jax.Array
    skipped: Any = None
    num_skipped: Any = None
    loss_scale: ScaleState | None = None

    def after(self, last: Measured | None) -> Measured:
        """Return the measurements after an earlier step; what a program that skips no step omits is filled in."""
        if self.skipped is not None:
            return self
        return Measured(self.grad_norm, self.update_norm, _false(), num_skipped(last))


def num_skipped(last: Measured | None) -> jax.Array:
    """Return the number of steps that were skipped so far."""
    return _zero() if last is None else last.num_skipped


@functools.cache
def _zero() -> jax.Array:
    return jnp.zeros((), jnp.int32)


@functools.cache
def _false() -> jax.Array:
    return jnp.array(False)


def minimized(
    updates: tuple[Update, ...],
    layout: Layout | None,
    loss: Loss,
    options: StepOptions,
    numbers: StepNumbers,
    data: tuple[Any, ...],
    leaves: tuple[Arrays, ...],
    held: dict[str, jax.Array],
    args: tuple[Any, ...],
    always: jax.Array | None = None,
    elsewhere: dict[str, jax.Array] | None = None,
) -> tuple[list[Any], list[Any], jax.Array, Any, Measured | None]:
    """Make one step of the parameters of one or more owners from one evaluation of a loss at their old values.

    Args:
        updates: how the parameters of each owner are updated.
        layout: makes the tree that the loss takes (None: it takes a dict by name).
        loss: the loss.
        options: the other options of the step.
        numbers: of the options.
        data: the data that each update reads.
        leaves: values and state of each owner, which :func:`minimize` destroys.
        held: values of parameters that stay, by name.
        args: the other arguments of the loss.
        always: the value True, to make the update apart from the evaluation (None: as the compiler likes).
        elsewhere: values of parameters that others update, by name; a step is skipped for their gradient too.

    Returns:
        For each owner the leaves of its new contents and what it publishes; the loss, nan for a step that is skipped;
        the auxiliary output of the loss; what was measured, if that is asked for.
    """
    elsewhere = elsewhere or {}
    values, still, own = dict(elsewhere), dict(held), list[list[str]]()
    for update, reads, its in zip(updates, data, leaves, strict=True):
        found_there = update.values(reads, its)
        own.append([name for name in found_there if name not in update.held])
        values |= {name: found_there[name] for name in own[-1]}
        still |= {name: found_there[name] for name in found_there.keys() & update.held}
    # The loss is differentiated by what is updated alone.
    seen = loss.of(lambda values: _as_seen(layout, {**still, **values}))
    scale = None if numbers.loss_scale is None else numbers.loss_scale.scale
    needs_push = any(update.second_order for update in updates)
    if options.accumulate is not None:
        found = accumulated(seen, values, args, options.accumulate, options.mean, scale)
    else:
        found = evaluated(seen, values, args, needs_push, scale)
    data = _after(data, found)
    move = functools.partial(_moved, updates, options, numbers, data, own, found)
    if always is None or options.accumulate is not None or needs_push:
        moved = move(leaves, found.loss, found.grads)
    else:
        moved = apart(move, always, leaves, found.loss, found.grads)
        if not options.may_skip and not waits(leaves):
            moved = moved._replace(loss=found.loss)
    aux = found.aux
    if options.may_skip and loss.carries:
        aux = (aux[0], jax.tree.map(functools.partial(jnp.where, moved.taken), aux[1], args[0]))
    return moved.new, moved.published, moved.loss, aux, moved.measured


def _after(data: tuple[Any, ...], found: Evaluation) -> tuple[Any, ...]:
    """Return the data of the updates, held until the evaluation has read the parameters, which kernels replace."""
    if not any(is_native(getattr(grad, "size", 0)) for grad in found.grads.values()):
        return data
    leaves, form = jax.tree.flatten(data)
    numbers = [at for at, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating) and x.size <= _FEW]
    try:
        tied = after([leaves[at] for at in numbers], [*found.grads.values(), found.loss])
    except CannotCompile:  # about which the updates warn
        return data
    for at, x in zip(numbers, tied, strict=True):
        leaves[at] = x
    return jax.tree.unflatten(form, leaves)


_FEW = 4096


class _Moved(NamedTuple):
    """The result of an update along an evaluated loss."""

    new: list[Any]
    published: list[Any]
    loss: jax.Array
    taken: jax.Array
    measured: Measured | None


def _moved(
    updates: tuple[Update, ...],
    options: StepOptions,
    numbers: StepNumbers,
    data: tuple[Any, ...],
    own: list[list[str]],
    found: Evaluation,
    leaves: tuple[Arrays, ...],
    value: jax.Array,
    by_name: dict[str, jax.Array],
) -> _Moved:
    """Update along the gradients of a loss, with the options of :func:`minimized`."""
    if options.loss_scale is not None and numbers.loss_scale is not None:
        by_name = options.loss_scale.unscaled(by_name, numbers.loss_scale)
    found = found._replace(loss=value, grads=by_name)
    clip = Clip(numbers.clip_norm, numbers.clip_value)
    seen_by = [found.of(names) for names in own]
    grads = [update.gathered(evaluation.grads) for update, evaluation in zip(updates, seen_by, strict=True)]
    is_measured = options.measures or clip.clip_norm is not None
    square = sum_of_squares(grads) if is_measured else jnp.zeros(())
    taken = jnp.array(True)
    if options.may_skip:
        of_updates = {name for names in own for name in names}
        elsewhere = [grad for name, grad in by_name.items() if name not in of_updates]
        taken = all_finite((grads, elsewhere))
    are_finite = taken
    if options.skip_nonfinite:
        taken &= all_finite(value)
        value = jnp.where(taken, value, jnp.nan)
    if not clip.is_off:
        grads = jax.tree.map(lambda grad: clip.bounded(grad, square), grads)
    new, published, moved = list[Any](), list[Any](), list[Any]()
    for update, reads, old, evaluation, along in zip(updates, data, leaves, seen_by, grads, strict=True):
        after, public, changes = update.after(reads, old, evaluation._replace(grads=along), options.measures)
        if options.measures:
            olds = update.contents(old).values
            moved.append(jax.tree.map(jnp.subtract, after.values, olds) if changes is None else changes)
        if options.may_skip:
            kept = (update.contents(old), update.unchanged(reads, public))
            after, public = jax.tree.map(functools.partial(jnp.where, taken), (after, public), kept)
        new.append(_returned(update, after))
        published.append(public)
    if not options.measures:
        return _Moved(new, published, value, taken, None)
    measured = Measured(jnp.sqrt(square), jnp.sqrt(sum_of_squares(moved)))
    if options.may_skip:
        measured = measured._replace(
            update_norm=jnp.where(taken, measured.update_norm, 0),
            skipped=~taken,
            num_skipped=numbers.num_skipped + (~taken).astype(jnp.int32),
        )
    if options.loss_scale is not None and numbers.loss_scale is not None:
        measured = measured._replace(loss_scale=options.loss_scale.updated(numbers.loss_scale, are_finite))
    return _Moved(new, published, value, taken, measured)


minimize = jax.jit(minimized, static_argnames=("updates", "layout", "loss", "options"), donate_argnames="leaves")
"""One step as a compiled call."""


def _as_seen(layout: Layout | None, values: dict[str, jax.Array]) -> Any:
    """Return all values in the structure that the loss takes."""
    return values if layout is None else layout.tree(values)


def sum_of_squares(tree: Any) -> jax.Array:
    """Return the sum of the squared absolute values of all numbers of a tree, in float32 at least."""
    return functools.reduce(jnp.add, map(squares, jax.tree.leaves(tree)), jnp.zeros(()))


def _returned(update: Update, new: Contents) -> Any:
    """Return the leaves of new contents; the contents themselves where their structure has changed."""
    return list(new.leaves) if new.form is update.form else new  # a list always: a tuple would be another program
