"""The compiled steps: one call for all parameters of an optimizer, whichever face it has.

Each compiles once for each structure: which parameters stand together, which terms the rules have, the shapes.
Numbers, counts and masks are data: a new learning rate, a parameter that is frozen or thawed, run the same program.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core.loss import Evaluation, Loss, all_finite, evaluated
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.layout import Layout
from jaxoptim.engine.update import Update

Arrays = Sequence[jax.Array]
"""The leaves of an owner's contents."""


@functools.partial(jax.jit, static_argnames="update", donate_argnames="leaves")
def advance(update: Update, data: Any, leaves: Arrays, grads: Any) -> tuple[list[Any], list[Any]]:
    """Make one step of all parameters along a tree of gradients.

    Args:
        update: how they are updated.
        data: what the update reads.
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


@functools.partial(jax.jit, static_argnames=("updates", "layout", "loss", "skip_nonfinite"), donate_argnames="leaves")
def minimize(
    updates: tuple[Update, ...],
    layout: Layout | None,
    loss: Loss,
    skip_nonfinite: bool,
    data: tuple[Any, ...],
    leaves: tuple[Arrays, ...],
    held: dict[str, jax.Array],
    args: tuple[Any, ...],
    always: jax.Array | None = None,
) -> tuple[list[Any], list[Any], jax.Array, Any]:
    """Make one step of the parameters of one or more owners from one evaluation of a loss at their old values.

    Args:
        updates: how the parameters of each owner are updated.
        layout: makes the tree that the loss takes (None: it takes a dict by name).
        loss: the loss.
        skip_nonfinite: leave everything as it is where the loss or a gradient is not finite.
        data: what each update reads.
        leaves: values and state of each owner, which are donated.
        held: values of parameters that nobody updates, by name.
        args: what the loss takes besides.
        always: the value True, where the loss is to be evaluated apart from the update (None: as the compiler likes).

    Returns:
        For each owner the leaves of its new contents and what it publishes; the loss, nan for a step that is skipped;
        what the loss returns besides.
    """
    values = dict(held)
    own = [update.values(reads, its) for update, reads, its in zip(updates, data, leaves, strict=True)]
    for some in own:
        values.update(some)
    seen = loss if layout is None else loss.of(layout.tree)
    if always is None or any(update.second_order for update in updates):
        found = evaluated(seen, values, args, any(update.second_order for update in updates))
    else:
        found = _evaluated_apart(seen, values, args, always)
    new, published, value = list[Any](), list[Any](), found.loss
    if skip_nonfinite:
        taken = all_finite((found.loss, found.grads))
        value = jnp.where(taken, found.loss, jnp.nan)
    for update, reads, old, names in zip(updates, data, leaves, own, strict=True):
        after, public = update.after(reads, old, found.of(names))
        if skip_nonfinite:
            kept = (update.contents(old), update.published(reads))
            after, public = jax.tree.map(functools.partial(jnp.where, taken), (after, public), kept)
        new.append(_returned(update, after))
        published.append(public)
    return new, published, value, found.aux


def _returned(update: Update, new: Contents) -> Any:
    """The leaves of new contents; the contents themselves where their structure is another one."""
    return new.leaves if new.form is update.form else new


@functools.cache
def true() -> jax.Array:
    """Return the array True, which a program does not know to be."""
    return jnp.array(True)


def _evaluated_apart(loss: Loss, values: dict[str, jax.Array], args: Any, always: jax.Array) -> Evaluation:
    """Evaluate a loss and its gradient, to the last bit as in a loop that is written out.

    There they are a program of their own. Here the compiler would fuse them with the update, and round otherwise; it
    does not fuse across a condition that it cannot foresee. (An ``optimization_barrier`` it drops on CPUs.)
    """

    @jax.jit
    def evaluate(values: dict[str, jax.Array], args: Any) -> Any:
        found = evaluated(loss, values, args)
        return found.loss, found.aux, found.grads

    like = jax.eval_shape(evaluate, values, args)

    def never(values: dict[str, jax.Array], args: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.full(x.shape, 0, x.dtype), like)

    value, aux, grads = jax.lax.cond(always, evaluate, never, values, args)
    return Evaluation(lambda values: loss.value(values, args), values, value, aux, grads, None)
