"""One step of several optimizers that share one evaluation of the loss, in one compiled call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxoptim.core import Hyperparameters, Rule, transformation, trees
from jaxoptim.core import step as step_of_rule
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.sparse import rows_of
from jaxoptim.optim.bucket import Bucket, Contents, Static
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.program import Rules
from jaxoptim.pyro.optim.evaluation import Evaluation, Loss, all_finite, evaluated
from jaxoptim.pyro.optim.joint import Joint
from jaxoptim.rules.newton import hessian, solve


class Program(Static):
    """What a compiled step knows of one optimizer: how to read its values, and how to make its step."""

    second_order = False
    """Whether the step needs second derivatives."""

    def values(self, contents: Any) -> dict[str, jax.Array]:
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
    """

    program: Program
    data: Any
    contents: Any
    close: Callable[[Any], None]
    undo: Callable[[], None] = lambda: None


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
    programs = tuple(part.program for part in parts)
    data, contents = tuple(part.data for part in parts), tuple(part.contents for part in parts)
    with Uninterrupted():
        result, new = _step(programs, loss, skip_nonfinite, data, contents, held, args, _true())
        for part, its in zip(parts, new, strict=True):
            part.close(its)
    return result


@functools.partial(jax.jit, static_argnames=("programs", "loss_fn", "skip_nonfinite"), donate_argnames="contents")
def _step(
    programs: tuple[Program, ...],
    loss_fn: Loss,
    skip_nonfinite: bool,
    data: tuple[Any, ...],
    contents: tuple[Any, ...],
    held: dict[str, jax.Array],
    args: tuple[Any, ...],
    always: jax.Array,
) -> tuple[Any, tuple[Any, ...]]:
    values = dict(held)
    for program, its in zip(programs, contents, strict=True):
        values.update(program.values(its))
    if any(program.second_order for program in programs):
        evaluation = evaluated(loss_fn, values, args, True)
    else:
        evaluation = _evaluated_apart(loss_fn, values, args, always)
    loss, aux, grads = evaluation.loss, evaluation.aux, evaluation.grads
    new = tuple(
        program.advanced(numbers, its, evaluation.of(program.values(its)))
        for program, numbers, its in zip(programs, data, contents, strict=True)
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

    def values(self, contents: Any) -> dict[str, jax.Array]:
        """Those that take part."""
        plan, names = self.content
        values = plan.values(contents)
        return {name: values[name] for name in names}

    def advanced(self, data: Any, contents: Any, evaluation: Evaluation) -> Any:
        """As :func:`jaxoptim.pyro.optim.together.advance`."""
        plan, _ = self.content
        settings, masks = data
        every, grads = plan.values(contents), []
        for (names, _), setting in zip(plan.content, settings.each(), strict=True):
            for name in names:
                grad = evaluation.grads.get(name, jnp.zeros_like(every[name]))
                grads.append(rows_of(grad) if setting.rule.sparse == "required" else grad)
        return plan.advanced(settings, contents, grads, masks)


def joint_part(joint: Joint, names: tuple[str, ...], undo: Callable[[], None]) -> Part:
    """The share of parameters that are updated together."""
    joint.settle()
    selection = joint.select(names)
    data = (joint.rules(selection), selection.masks)
    close = functools.partial(joint.put, selection)
    return Part(JointProgram(selection.plan, names), data, joint.take(selection), close, undo)


class Owned:
    """Parameters as a dict of values, and a state of any kind: where optimizers keep them that see all at once."""

    def __init__(self) -> None:
        self._bucket: Bucket | None = None

    def taken(self, params: Mapping[str, Parameter], init: Callable[[Any], Any]) -> Bucket:
        """Values and state of these parameters and of all before; state that is lacking is made by ``init``."""
        bucket = self._bucket
        every = dict(params) if bucket is None else dict(zip(bucket.labels, bucket.params, strict=True)) | dict(params)
        if bucket is None or bucket.params != tuple(every.values()):
            old = None if bucket is None else bucket.state
            state: Any = grown(old, init({name: param.value for name, param in every.items()}))
            bucket = self._bucket = Bucket({}, list(every), list(every.values()), 1, packed=False)
            bucket.state = state
        if bucket.outdated:
            bucket.update_outdated()
        bucket.keep_what_others_hold()
        return bucket

    def put(self, contents: Contents) -> None:
        """Put in what a step has returned."""
        if self._bucket is not None:
            self._bucket.replace(contents)

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise for values that do not go with the state."""
        for param in () if self._bucket is None else self._bucket.params:
            if (name := str(param.name)) in values:
                trees.check_shape("value", name, values[name], param)

    def __getstate__(self) -> dict[str, Any]:
        bucket = self._bucket
        return {"kept": None if bucket is None else (bucket.labels, bucket.params, bucket.state)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bucket = None
        if state["kept"] is not None:
            labels, params, kept = state["kept"]
            self._bucket = Bucket({}, labels, params, 1, packed=False)
            self._bucket.state = kept

    @property
    def state(self) -> Any:
        """The state; None before the first step."""
        return None if self._bucket is None else self._bucket.state


def grown(old: Any, fresh: Any) -> Any:
    """A state for more parameters, with what is there already; a fresh one if it is of another shape."""
    kept = dict(jax.tree_util.tree_flatten_with_path(old)[0])
    leaves, treedef = jax.tree_util.tree_flatten_with_path(fresh)
    if any(path in kept and jnp.shape(kept[path]) != jnp.shape(leaf) for path, leaf in leaves):
        return fresh
    return jax.tree.unflatten(treedef, [kept.get(path, leaf) for path, leaf in leaves])


class OwnedProgram(Program):
    """Some of the parameters that an :class:`Owned` has."""

    def values(self, contents: Any) -> dict[str, jax.Array]:
        """Those that take part."""
        return {name: contents.values[name] for name in self.content[0]}


class TransformationProgram(OwnedProgram):
    """Parameters of which a transformation, or a rule, sees all."""

    def advanced(self, data: Any, contents: Any, evaluation: Evaluation) -> Any:
        """One update; a rule of one array makes the exact step."""
        _, tx = self.content
        new, state = updated(tx if data is None else data.each()[0], evaluation, contents.values, contents.state)
        return Contents(type(contents.values)((name, new[name]) for name in contents.values), state)


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
    bucket = owned.taken(params, tx.init)
    data = Rules([optimizer]) if is_rule else None
    return Part(TransformationProgram(tuple(params), None if is_rule else tx), data, bucket.contents, owned.put)


class NewtonProgram(OwnedProgram):
    """Parameters each of which makes a Newton step of its own."""

    second_order = True

    def advanced(self, data: Any, contents: Any, evaluation: Evaluation) -> Any:
        """See :func:`newton_steps`."""
        (radii,) = data.each()
        return Contents(type(contents.values)(contents.values, **newton_steps(evaluation, radii)), None)


def newton_steps(evaluation: Evaluation, radii: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The values after one Newton step of each, all derivatives at the old point."""
    new = {}
    for name, value in evaluation.values.items():
        dx, _ = solve(evaluation.grads[name], hessian(evaluation.push_of(name), value), radii.get(name))
        new[name] = (value + dx).astype(value.dtype)
    return new
