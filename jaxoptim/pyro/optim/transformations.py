"""The Pyro-style optimizers as transformations of a dict of parameters by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxoptim import rules
from jaxoptim.core import OptState, Rule, init, transformation, update
from jaxoptim.distributed import all_reduce
from jaxoptim.engine.numbers import Setting
from jaxoptim.pyro.optim.horovod import OPS, HorovodOptimizer
from jaxoptim.pyro.optim.lr_scheduler import PyroLRScheduler
from jaxoptim.pyro.optim.multi import (
    MixedMultiOptimizer,
    MultiOptimizer,
    Newton,
    PyroMultiOptimizer,
    TransformationMultiOptimizer,
)
from jaxoptim.pyro.optim.optim import PyroOptim


@transformation.register
def _by_name(optim: PyroOptim, /) -> optax.GradientTransformationExtraArgs:
    """The transformation of a dict by names: each name by itself, its options asked for when it is first seen."""
    settings: dict[tuple[Any, ...], Setting] = {}

    def setting(name: Any, param: Any) -> Setting:
        if not isinstance(name, str):
            raise TypeError(f"A PyroOptim finds options by the names of parameters, but a key of params is {name!r}.")
        like = jax.tree.leaves(param)[0] if jax.tree.leaves(param) else jnp.zeros(())
        key = (name, like.shape, like.dtype)
        if key not in settings:
            settings[key] = optim._setting(name, like)
        return settings[key]

    def items(params: Any) -> Any:
        if not isinstance(params, Mapping):
            raise TypeError(f"A PyroOptim takes a dict of parameters by name, but got {type(params).__name__}.")
        return params.items()

    def init_fn(params: Any) -> dict[str, Any]:
        return {name: init(setting(name, param).rule, param) for name, param in items(params)}

    def update_fn(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, new, any_given = {}, {}, bool(jax.tree.leaves(grads))
        for name, grad in items(grads):
            param = None if params is None else params[name]
            its = setting(name, grad if params is None else param)
            updates[name], new[name] = update(its.rule, jax.tree.map(its.clip.clipped, grad), state[name], param)
            if any_given and not jax.tree.leaves(grad) and type(its.rule).at_update is not Rule.at_update:
                new[name] = _passed_over(state[name])
        return updates, new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _passed_over(state: OptState) -> OptState:
    """The state after an update without this parameter, whose rate decays all the same, as in Pyro."""
    counts = state.counts
    if counts is None:
        counts = jax.tree.map(lambda _: jnp.copy(state.step), next(iter(state.slots.values())))
    return state._replace(step=optax.safe_increment(state.step), counts=counts)


@transformation.register
def _over_axis(optim: HorovodOptimizer, /) -> optax.GradientTransformationExtraArgs:
    """The transformation for compiled functions: gradients are reduced along a named axis."""
    if optim.axis_name is None:
        raise ValueError(
            "In a compiled function HorovodOptimizer reduces gradients along a named axis, but none was given. Give "
            "HorovodOptimizer(optim, axis_name='data'), the axis of the jax.shard_map."
        )
    reduce, base = all_reduce(optim.axis_name, OPS[optim.op]), _by_name(optim)

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        grads, _ = reduce.update(grads, optax.EmptyState(), params)
        return base.update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(base.init, update)


@transformation.register
def _refused(scheduler: PyroLRScheduler, /) -> optax.GradientTransformationExtraArgs:
    """Raise: a schedule that is stepped by hand would stand still in a compiled function."""
    raise TypeError(
        "A PyroLRScheduler is moved on by its step(), which a compiled function does not see. Use a rule whose rate is "
        "a schedule, rules.SGD(lr=jaxoptim.schedules.step_lr(0.1, 10)), or call the scheduler itself."
    )


@transformation.register
def _multi(optimizer: MultiOptimizer, /) -> optax.GradientTransformationExtraArgs:
    """The transformation of a dict of parameters by name; ``value_fn`` is the loss of such a dict."""
    if isinstance(optimizer, PyroMultiOptimizer):
        return transformation(optimizer.optim)
    if isinstance(optimizer, TransformationMultiOptimizer):
        return optax.with_extra_args_support(optimizer.transformation)
    if isinstance(optimizer, Newton):
        return transformation(rules.Newton(optimizer.trust_radii))
    if isinstance(optimizer, MixedMultiOptimizer):
        return _mixed(optimizer)
    raise TypeError(f"{type(optimizer).__name__} has no pure form. Use its step, or its get_step.")


def _mixed(mixed: MixedMultiOptimizer) -> optax.GradientTransformationExtraArgs:
    """The parts by themselves, each with the loss as a function of its parameters."""
    every = [transformation(multi) for _, multi in mixed.parts]

    def init(params: Any) -> list[Any]:
        parts = zip(mixed._names(params), every, strict=True)
        return [tx.init({name: params[name] for name in names}) for names, tx in parts]

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, new = {}, []
        for names, tx, old in zip(mixed._names(grads), every, state, strict=True):
            own, value_fn = dict(extra), extra.get("value_fn")
            if value_fn is not None:
                own["value_fn"] = functools.partial(_value_of_part, value_fn, params)
            if extra.get("grad") is not None:
                own["grad"] = {name: extra["grad"][name] for name in names}
            its = None if params is None else {name: params[name] for name in names}
            changes, its_state = tx.update({name: grads[name] for name in names}, old, its, **own)
            updates.update(changes)
            new.append(its_state)
        return {name: updates[name] for name in grads}, new

    return optax.GradientTransformationExtraArgs(init, update)


def _value_of_part(value_fn: Callable[[Any], Any], params: Any, own: Any) -> Any:
    return value_fn({**params, **own})
