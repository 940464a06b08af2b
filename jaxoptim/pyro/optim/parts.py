"""One step of several optimizers that share one evaluation of the loss, in one compiled call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxoptim.core import Hyperparameters, Rule, transformation
from jaxoptim.core import step as step_of_rule
from jaxoptim.core.sparse import rows_of
from jaxoptim.optim.bucket import Bucket, Contents, Static
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.program import Rules
from jaxoptim.pyro.optim.evaluation import Evaluation, all_finite, evaluated
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
        close: takes the new ones, and whether the step was taken (None if it could not be skipped).
    """

    program: Program
    data: Any
    contents: Any
    close: Callable[[Any, Any], None]


def make_step(
    parts: Sequence[Part],
    loss_fn: Callable[..., Any],
    args: tuple[Any, ...],
    held: dict[str, jax.Array],
    has_aux: bool,
    skip_nonfinite: bool,
) -> Any:
    """One step of all parts at the old values of all parameters.

    Args:
        parts: of every optimizer.
        loss_fn: ``loss_fn(values, *args)``.
        args: passed on to it.
        held: values of parameters that no part updates.
        has_aux: whether the loss comes with an auxiliary output.
        skip_nonfinite: leave everything as it is where the loss or a gradient is not finite.

    Returns:
        The loss, or ``(loss, aux)``.
    """
    programs = tuple(part.program for part in parts)
    data, contents = tuple(part.data for part in parts), tuple(part.contents for part in parts)
    result, taken, new = _step(programs, loss_fn, has_aux, skip_nonfinite, data, contents, held, args)
    for part, its in zip(parts, new, strict=True):
        part.close(its, taken)
    return result


@functools.partial(
    jax.jit, static_argnames=("programs", "loss_fn", "has_aux", "skip_nonfinite"), donate_argnames="contents"
)
def _step(
    programs: tuple[Program, ...],
    loss_fn: Callable[..., Any],
    has_aux: bool,
    skip_nonfinite: bool,
    data: tuple[Any, ...],
    contents: tuple[Any, ...],
    held: dict[str, jax.Array],
    args: tuple[Any, ...],
) -> tuple[Any, Any, tuple[Any, ...]]:
    values = dict(held)
    for program, its in zip(programs, contents, strict=True):
        values.update(program.values(its))
    # The barriers make the loss and its gradient what they are in a program by themselves, to the last bit.
    values, args = jax.lax.optimization_barrier((values, args))
    second = any(program.second_order for program in programs)
    evaluation = evaluated(loss_fn, values, args, has_aux, second)
    loss, aux, grads = jax.lax.optimization_barrier((evaluation.loss, evaluation.aux, evaluation.grads))
    evaluation = evaluation._replace(loss=loss, aux=aux, grads=grads)
    new = tuple(
        program.advanced(numbers, its, evaluation.of(program.values(its)))
        for program, numbers, its in zip(programs, data, contents, strict=True)
    )
    taken = all_finite((loss, grads)) if skip_nonfinite else None
    if skip_nonfinite:
        new = jax.tree.map(functools.partial(jnp.where, taken), new, contents)
    return (loss, aux) if has_aux else loss, taken, new


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


def joint_part(joint: Joint, names: tuple[str, ...]) -> Part:
    """The share of parameters that are updated together."""
    joint.settle()
    selection = joint.select(names)
    settings = joint.decayed(selection)

    def close(contents: Any, taken: Any) -> None:
        skipped = taken is not None and settings is not joint.settings and not bool(taken)
        joint.put(selection, joint.settings if skipped else settings, contents)

    data = (joint.rules(selection, settings), selection.masks)
    return Part(JointProgram(selection.plan, names), data, joint.take(selection), close)


class Owned:
    """Parameters as a dict of values, and a state of any kind: where optimizers keep them that see all at once."""

    def __init__(self) -> None:
        self._bucket: Bucket | None = None

    def taken(self, params: Mapping[str, Parameter], init: Callable[[Any], Any]) -> Bucket:
        """The values and the state, from now on kept here; state that is lacking is made by ``init``."""
        cells, bucket = tuple(params.values()), self._bucket
        if bucket is None or bucket.params != cells or bucket.labels != tuple(params):
            old = None if bucket is None else bucket.state
            values = {name: param.value for name, param in params.items()}
            state: Any = _grown(old, init(values))
            bucket = self._bucket = Bucket({}, list(params), cells, 1, packed=False)
            bucket.state = state
        if bucket.outdated:
            bucket.update_outdated()
        bucket.keep_what_others_hold()
        return bucket

    def put(self, contents: Contents, taken: Any) -> None:
        """Put in what a step has returned."""
        if self._bucket is not None:
            self._bucket.replace(contents)

    @property
    def state(self) -> Any:
        """The state; None before the first step."""
        return None if self._bucket is None else self._bucket.state


def _grown(old: Any, fresh: Any) -> Any:
    """A state for more parameters, with what is there already; a fresh one if it is of another shape."""
    kept = dict(jax.tree_util.tree_flatten_with_path(old)[0])
    leaves, treedef = jax.tree_util.tree_flatten_with_path(fresh)
    if any(path in kept and jnp.shape(kept[path]) != jnp.shape(leaf) for path, leaf in leaves):
        return fresh
    return jax.tree.unflatten(treedef, [kept.get(path, leaf) for path, leaf in leaves])


class TransformationProgram(Program):
    """Parameters of which a transformation, or a rule, sees all."""

    def values(self, contents: Any) -> dict[str, jax.Array]:
        """All of them."""
        return dict(contents.values)

    def advanced(self, data: Any, contents: Any, evaluation: Evaluation) -> Any:
        """One update; a rule of one array makes the exact step."""
        values, (tx,) = contents.values, self.content
        new, state = updated(tx if data is None else data.each()[0], evaluation, contents.state)
        return Contents(type(values)((name, new[name]) for name in values), state)


def updated(optimizer: Any, evaluation: Evaluation, state: Any) -> tuple[dict[str, jax.Array], Any]:
    """New values and state from a rule or a transformation."""
    values, grads = evaluation.values, dict[str, Any](evaluation.grads)
    if isinstance(optimizer, Rule):
        if optimizer.sparse == "required":
            grads = {name: rows_of(grad) for name, grad in grads.items()}
        return step_of_rule(optimizer, values, grads, state)
    tx = transformation(optimizer) if isinstance(optimizer, Hyperparameters) else optimizer
    about = {"value": evaluation.loss, "grad": grads, "value_fn": evaluation.loss_of}
    updates, state = optax.with_extra_args_support(tx).update(grads, state, values, **about)
    return optax.apply_updates(values, updates), state


def transformation_part(owned: Owned, optimizer: Any, params: Mapping[str, Parameter]) -> Part:
    """The share of a transformation or a rule."""
    is_rule = isinstance(optimizer, Hyperparameters)
    tx = transformation(optimizer) if is_rule else optimizer
    bucket = owned.taken(params, tx.init)
    data = Rules([optimizer]) if is_rule else None
    return Part(TransformationProgram(None if is_rule else tx), data, bucket.contents, owned.put)


class NewtonProgram(Program):
    """Parameters each of which makes a Newton step of its own."""

    second_order = True

    def values(self, contents: Any) -> dict[str, jax.Array]:
        """All of them."""
        return dict(contents.values)

    def advanced(self, data: Any, contents: Any, evaluation: Evaluation) -> Any:
        """See :func:`newton_steps`."""
        (radii,) = data.each()
        new = newton_steps(evaluation, radii)
        return Contents(type(contents.values)((name, new[name]) for name in contents.values), None)


def newton_steps(evaluation: Evaluation, radii: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The values after one Newton step of each, all derivatives at the old point."""
    new = {}
    for name, value in evaluation.values.items():
        dx, _ = solve(evaluation.grads[name], hessian(evaluation.push_of(name), value), radii.get(name))
        new[name] = (value + dx).astype(value.dtype)
    return new
