"""One step of several optimizers that share one evaluation of the loss, in one compiled call."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxoptim.core import Hyperparameters, Rule, transformation, trees
from jaxoptim.core import step as step_of_rule
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.loss import Evaluation, Loss, all_finite, evaluated
from jaxoptim.core.sparse import rows_of
from jaxoptim.engine import programs
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.numbers import Numbers
from jaxoptim.engine.static import Static
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.whole import Whole
from jaxoptim.pyro.optim.joint import Joint
from jaxoptim.rules.newton import hessian, solve


class Program(Static):
    """What a compiled step knows of one optimizer: how to read its values, and how to make its step."""

    second_order = False
    """Whether the step needs second derivatives."""

    def values(self, data: Any, contents: Any) -> dict[str, jax.Array]:
        """The values of its parameters by name."""
        raise NotImplementedError

    def advanced(self, data: Any, contents: Any, evaluation: Evaluation) -> Any:
        """The contents after a step; ``data`` holds the numbers of the optimizer."""
        raise NotImplementedError


class Part(NamedTuple):
    """The share of one optimizer in a step.

    Attributes:
        program: what is compiled.
        data: its numbers.
        contents: values and state, which the step destroys.
        close: takes the new ones.
        undo: takes back what was done for a step that fails.
        skipped: takes back what was done for a step that is skipped, None if that is nothing.
    """

    program: Program
    data: Any
    contents: Any
    close: Callable[[Any], None]
    undo: Callable[[], None] = lambda: None
    skipped: Callable[[], None] | None = None


def undo(parts: Sequence[Part]) -> None:
    """Take back what was done for a step that fails."""
    for part in parts:
        part.undo()


def make_step(
    parts: Sequence[Part], loss: Loss, args: tuple[Any, ...], held: dict[str, jax.Array], skip_nonfinite: bool
) -> Any:
    """One step of all parts at the old values of all parameters.

    Args:
        parts: of every optimizer.
        loss: the loss of all values and of ``args``.
        args: passed on to it.
        held: values of parameters that no part updates.
        skip_nonfinite: leave everything as it is where the loss or a gradient is not finite.

    Returns:
        The loss, or ``(loss, aux)``.
    """
    steps = tuple(part.program for part in parts)
    data, contents = tuple(part.data for part in parts), tuple(part.contents for part in parts)
    is_closed = False
    try:
        with Uninterrupted():
            result, new = _step(steps, loss, skip_nonfinite, data, contents, held, args, _true())
            for part, its in zip(parts, new, strict=True):
                part.close(its)
            is_closed = True
    except BaseException:
        if not is_closed:
            undo(parts)
        raise
    skipped = [part.skipped for part in parts if part.skipped is not None]
    if skip_nonfinite and skipped and not bool(jnp.isfinite(result[0] if loss.has_aux else result)):
        for take_back in skipped:
            take_back()
    return result


@functools.partial(jax.jit, static_argnames=("steps", "loss_fn", "skip_nonfinite"), donate_argnames="contents")
def _step(
    steps: tuple[Program, ...],
    loss_fn: Loss,
    skip_nonfinite: bool,
    data: tuple[Any, ...],
    contents: tuple[Any, ...],
    held: dict[str, jax.Array],
    args: tuple[Any, ...],
    always: jax.Array,
) -> tuple[Any, tuple[Any, ...]]:
    values = dict(held)
    own = [program.values(numbers, its) for program, numbers, its in zip(steps, data, contents, strict=True)]
    for its in own:
        values.update(its)
    if any(program.second_order for program in steps):
        evaluation = evaluated(loss_fn, values, args, True)
    else:
        evaluation = _evaluated_apart(loss_fn, values, args, always)
    loss, aux, grads = evaluation.loss, evaluation.aux, evaluation.grads
    new = tuple(
        program.advanced(numbers, its, evaluation.of(names))
        for program, numbers, its, names in zip(steps, data, contents, own, strict=True)
    )
    if skip_nonfinite:
        taken = all_finite((loss, grads))
        new = jax.tree.map(functools.partial(jnp.where, taken), new, contents)
        loss = jnp.where(taken, loss, jnp.nan)
    return (loss, aux) if loss_fn.has_aux else loss, new


@functools.cache
def _true() -> jax.Array:
    return jnp.array(True)


def _evaluated_apart(loss_fn: Loss, values: dict[str, jax.Array], args: Any, always: jax.Array) -> Evaluation:
    """A loss and its gradient, to the last bit what they are in a loop that is written out.

    There they are a program of their own. Here the compiler would fuse them with the update, and round otherwise; it
    does not fuse across a condition that it cannot foresee. (An ``optimization_barrier`` it drops on CPUs.)
    """

    @jax.jit
    def evaluate(values: dict[str, jax.Array], args: Any) -> Any:
        found = evaluated(loss_fn, values, args, False)
        return found.loss, found.aux, found.grads

    like = jax.eval_shape(evaluate, values, args)

    def never(values: dict[str, jax.Array], args: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.full(x.shape, 0, x.dtype), like)

    loss, aux, grads = jax.lax.cond(always, evaluate, never, values, args)
    return Evaluation(lambda values: loss_fn.value(values, args), values, loss, aux, grads, None)


class JointProgram(Program):
    """The parameters of a ``PyroOptim``."""

    def values(self, data: Any, contents: Any) -> dict[str, jax.Array]:
        """Those that take part."""
        layout, _, names = self.content
        _, offsets, _ = data
        values = programs.values_of(layout, contents, offsets)
        found = {struct.name: value for struct, value in zip(layout.structs, values, strict=True)}
        return {name: found[name] for name in names}

    def advanced(self, data: Any, contents: Any, evaluation: Evaluation) -> Any:
        """As :func:`jaxoptim.engine.programs.stepped`."""
        layout, even, _ = self.content
        numbers, _, mask = data
        grads = [
            evaluation.grads.get(struct.name, jnp.zeros(struct.shape, struct.dtype) if is_row else None)
            for struct, is_row in zip(layout.structs, layout.are_rows, strict=True)
        ]
        grads = programs.in_rows(layout, numbers, grads)
        return programs.stepped(layout, even, numbers, contents, grads, mask)


def joint_part(joint: Joint, names: tuple[str, ...], undo: Callable[[], None]) -> Part:
    """The share of parameters that are updated together."""
    params = [joint.members[name].param for name in names]
    back, new = joint.fade(params), list[int]()

    def undo_all() -> None:
        if new:
            joint.store.units[0].lose(new)
        if back is not None:
            back()
        undo()

    try:
        joint.settle(together=True)
        (slabs,) = joint.store.units
        mask, started = slabs.opened(params)
        new.extend(started)
    except BaseException:
        undo_all()
        raise
    program = JointProgram(slabs.layout, slabs.is_even and mask is None, names)
    return Part(program, (slabs.numbers, slabs.offsets, mask), slabs.taken(), slabs.replace, undo_all, back)


class Owned:
    """Parameters as a dict of values, and a state of any kind: where optimizers keep them that see all at once."""

    def __init__(self) -> None:
        self._whole: Whole | None = None

    def taken(self, params: Mapping[str, Parameter], init: Callable[[Any], Any]) -> Whole:
        """Values and state of these parameters and of all before; state that is lacking is made by ``init``.

        Other parameters under known names are another fit, which begins afresh.
        """
        whole = self._whole
        if whole is not None:
            known = dict(zip(whole.labels, whole.params, strict=True))
            if any(known.get(name, param) is not param for name, param in params.items()):
                for param in whole.params:
                    param.value = param.value
                whole = None
        every = dict(params) if whole is None else dict(zip(whole.labels, whole.params, strict=True)) | dict(params)
        if whole is None or whole.params != tuple(every.values()):
            old = None if whole is None else whole.state
            state: Any = grown(old, init({name: param.value for name, param in every.items()}))
            whole = self._whole = Whole({}, list(every), list(every.values()), 1)
            whole.state = state
        if whole.outdated:
            whole.update_outdated()
        return whole

    def put(self, contents: Contents) -> None:
        """Put in what a step has returned."""
        if self._whole is not None:
            self._whole.contents = contents

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise for values that do not go with the state."""
        for param in () if self._whole is None else self._whole.params:
            if (name := str(param.name)) in values:
                trees.check_shape("value", name, values[name], param)

    def __getstate__(self) -> dict[str, Any]:
        whole = self._whole
        return {"kept": None if whole is None else (whole.labels, whole.params, whole.state)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._whole = None
        if state["kept"] is not None:
            labels, params, kept = state["kept"]
            self._whole = Whole({}, labels, params, 1)
            self._whole.state = kept

    @property
    def state(self) -> Any:
        """The state; None before the first step."""
        return None if self._whole is None else self._whole.state


def grown(old: Any, fresh: Any) -> Any:
    """A state for more parameters, with what is there already; a fresh one if it is of another shape."""
    kept = dict(jax.tree_util.tree_flatten_with_path(old)[0])
    leaves, treedef = jax.tree_util.tree_flatten_with_path(fresh)
    if any(path in kept and jnp.shape(kept[path]) != jnp.shape(leaf) for path, leaf in leaves):
        return fresh
    return jax.tree.unflatten(treedef, [kept.get(path, leaf) for path, leaf in leaves])


class OwnedProgram(Program):
    """Some of the parameters that an :class:`Owned` has."""

    def values(self, data: Any, contents: Any) -> dict[str, jax.Array]:
        """Those that take part."""
        values, _ = contents.cells[0]
        return {name: values[name] for name in self.content[0]}


class TransformationProgram(OwnedProgram):
    """Parameters of which a transformation, or a rule, sees all."""

    def advanced(self, data: Any, contents: Any, evaluation: Evaluation) -> Any:
        """One update; a rule of one array makes the exact step."""
        _, tx = self.content
        values, state = contents.cells[0]
        new, state = updated(tx if data is None else data.each()[0], evaluation, values, state)
        return Contents(None, [(OrderedDict((name, new[name]) for name in values), state)])


def updated(
    optimizer: Any, evaluation: Evaluation, values: Mapping[str, jax.Array], state: Any
) -> tuple[dict[str, jax.Array], Any]:
    """New values and state from a rule or a transformation.

    Parameters that the evaluation is not about stay. They have no gradient for a rule, and one of zero for a
    transformation of another library, which knows no missing ones.
    """
    values = dict(values)
    grads: dict[str, Any] = {name: evaluation.grads.get(name) for name in values}
    if isinstance(optimizer, Rule):
        if optimizer.sparse == "required":
            grads = {name: None if grad is None else rows_of(grad) for name, grad in grads.items()}
        return step_of_rule(optimizer, values, grads, state)
    if isinstance(optimizer, Hyperparameters):
        optimizer = transformation(optimizer)
    else:
        grads = {name: jnp.zeros_like(values[name]) if grad is None else grad for name, grad in grads.items()}

    def value_fn(new: Mapping[str, jax.Array]) -> Any:
        return evaluation.loss_of({name: new[name] for name in evaluation.values})

    update = optax.with_extra_args_support(optimizer).update
    updates, state = update(grads, state, values, value=evaluation.loss, grad=grads, value_fn=value_fn)
    moved = {name: updates[name] for name in evaluation.values}
    return values | optax.apply_updates({name: values[name] for name in moved}, moved), state


def transformation_part(owned: Owned, optimizer: Any, params: Mapping[str, Parameter]) -> Part:
    """The share of a transformation or a rule."""
    is_rule = isinstance(optimizer, Hyperparameters)
    tx = transformation(optimizer) if is_rule else optimizer
    whole = owned.taken(params, tx.init)
    data = Numbers([optimizer]) if is_rule else None
    return Part(TransformationProgram(tuple(params), None if is_rule else tx), data, whole.taken(), owned.put)


class NewtonProgram(OwnedProgram):
    """Parameters each of which makes a Newton step of its own."""

    second_order = True

    def advanced(self, data: Any, contents: Any, evaluation: Evaluation) -> Any:
        """See :func:`newton_steps`."""
        (radii,) = data.each()
        values, _ = contents.cells[0]
        return Contents(None, [(OrderedDict(values, **newton_steps(evaluation, radii)), None)])


def newton_steps(evaluation: Evaluation, radii: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The values after one Newton step of each, all derivatives at the old point."""
    new = {}
    for name, value in evaluation.values.items():
        dx, _ = solve(evaluation.grads[name], hessian(evaluation.push_of(name), value), radii.get(name))
        new[name] = (value + dx).astype(value.dtype)
    return new
