"""A test kit for developers of rules; it needs chex, which is not installed with the library."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxoptim import optim
from jaxoptim.core import Decay, OptState, Rule, Sampler, check_param, init, pack, step
from jaxoptim.core.names import listing
from jaxoptim.pyro.optim import PyroOptim

__all__ = [
    "check_rule",
]
__dir__ = listing(__all__)

Params = dict[str, jax.Array]

_SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "vector": (5,),
    "matrix": (4, 3),
    "wide": (3, 4),
    "tensor": (2, 3, 2),
    "empty": (0, 3),
}
_BY_SHAPE = ("wide", "tensor")
"""The example arrays that are redundant for a rule that does not depend on shapes."""
_RTOL = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.1, "complex64": 1e-3}
"""The relative tolerance between a jitted program and eager updates. (Scalars in float32 cost digits.)"""


def check_rule(rule: Rule, params: Any = None) -> None:
    """Check that a rule works with everything that the library does with rules.

    The checks, in their order: the rule is a pytree (``structure``); :meth:`Rule.init` and :meth:`Rule.update` keep
    shapes, dtypes and structure, and mutate nothing (``arrays``); ``jit`` changes nothing, and another number compiles
    nothing (``jit``); all dtypes work (``dtypes``); ``vmap`` over its numbers is a loop (``vmap``); hypergradients are
    finite (``grad``); packed arrays are updated as plain ones (``packing``); an array without a gradient stays, and
    goes on as it would alone (``missing``); the torch-style and the Pyro-style optimizer of the rule make its steps
    (``faces``). The last two are not for samplers.

    Args:
        rule: an instance.
        params: a dict of float arrays to try it on (default None: a scalar, a vector, matrices, a tensor and an empty
            array, those of them that the rule takes).

    Raises:
        ``AssertionError`` that names the check, says what was expected and has chex's comparison; ``TypeError`` for
        what is no rule; ``ValueError`` if there are no arrays that the rule takes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.core import Rule, rule
        >>> from jaxoptim.rules import SGD
        >>> from jaxoptim.testing import check_rule
        >>> check_rule(SGD(lr=0.1, momentum=0.9))
        >>> @rule
        ... class Low(Rule):
        ...     def init(self, param):
        ...         return {"buffer": jnp.zeros(param.shape, "float16")}
        ...
        ...     def update(self, grad, slots, param, step):
        ...         return -0.1 * slots["buffer"], {"buffer": 0.9 * slots["buffer"] + grad}
        >>> check_rule(Low())
        Traceback (most recent call last):
        AssertionError: Low fails the check 'arrays': ... init makes the slot 'buffer' of 'vector' in float16 ...
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"check_rule takes an instance of a Rule, such as rules.Adam(), but got {rule!r}.")
    with jax.enable_x64(True):
        params = _example(rule) if params is None else {name: jnp.asarray(x, "float64") for name, x in params.items()}
        if not params:
            raise ValueError(f"{type(rule).__name__} takes none of the arrays to try it on. Give params of your own.")
        for check, expected in _CHECKS.items():
            try:
                check(rule, params)
            except Exception as error:
                name = check.__name__.removeprefix("_check_")
                raise AssertionError(
                    f"{type(rule).__name__} fails the check {name!r}: {expected}\n{type(error).__name__}: {error}"
                ) from error


def _example(rule: Rule) -> Params:
    """Make example arrays that the rule takes."""
    rng, params = np.random.default_rng(0), dict[str, jax.Array]()
    for name, shape in _SHAPES.items():
        if (rule.sparse == "required" and not (shape and shape[0])) or (rule.elementwise and name in _BY_SHAPE):
            continue
        value = jnp.asarray(rng.normal(size=shape), "float64")
        try:
            check_param(rule, name, value)
        except (ValueError, TypeError, RuntimeError):
            continue
        params[name] = value
    return params


def _gradients(rule: Rule, params: Params, seed: int = 0) -> dict[str, Any]:
    """Make gradients that are nowhere zero, as rows for a rule that takes nothing else."""
    rng, grads = np.random.default_rng(seed + 1), dict[str, Any]()
    for name, x in params.items():
        grad: Any = jnp.asarray(rng.uniform(0.5, 1.5, x.shape) * rng.choice([-1, 1], x.shape), x.dtype)
        if rule.sparse == "required":
            grad = BCOO((grad, jnp.arange(x.shape[0])[:, None]), shape=x.shape)
        grads[name] = grad
    return grads


def _trained(step: Any, rule: Rule, params: Params, times: int = 3) -> tuple[Any, OptState]:
    state = init(rule, params)
    for grads in _gradients_of_steps(rule, params, times):
        params, state = step(rule, params, grads, state)
    return params, state


def _gradients_of_steps(rule: Rule, params: Params, times: int = 3) -> list[dict[str, Any]]:
    """Make the gradients of some steps from the first parameters: a step reorders them, and so the draws."""
    return [_gradients(rule, params, t) for t in range(times)]


def _scanned(rule: Rule, params: Params) -> Any:
    """Train by a scan over one step: unrolled programs of several steps take many times as long to compile."""

    def one_step(carry: tuple[Any, OptState], grads: Any) -> Any:
        return step(rule, carry[0], grads, carry[1]), None

    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *_gradients_of_steps(rule, params))
    return jax.lax.scan(one_step, (params, init(rule, params)), stacked)[0][0]


def _assert_close(ours: Any, theirs: Any) -> None:
    """Assert that two pytrees have the same shapes, dtypes and, but for rounding, numbers."""
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    for dtype, rtol in _RTOL.items():
        of_dtype = functools.partial(_only, dtype)
        chex.assert_trees_all_close(jax.tree.map(of_dtype, ours), jax.tree.map(of_dtype, theirs), rtol=rtol, atol=rtol)


def _only(dtype: str, x: Any) -> Any:
    return x if str(x.dtype) == dtype else None


# The checks.


def _check_structure(rule: Rule, params: Params) -> None:
    leaves, treedef = jax.tree.flatten(rule)
    assert not any(leaf is rule for leaf in leaves), "it is not decorated with @rule"  # noqa: S101
    hash(treedef)
    again = jax.tree.unflatten(treedef, leaves)
    chex.assert_trees_all_equal(again, rule)


def _check_arrays(rule: Rule, params: Params) -> None:
    for dtype in ("float32", "float64"):
        for name, param in params.items():
            param = param.astype(dtype)
            own = rule.at(0).cast(dtype)
            drawn = {"noise": jnp.full_like(param, 0.5)} if "noise" in rule.takes else {}
            slots = dict(own.init(param, **drawn))
            _check_slots(name, param, slots)
            kept, grad, count = dict(slots), jnp.full_like(param, 0.5), jnp.ones((), dtype)
            shared = own.init_shared()
            if own.two_pass:
                shared = own.prepare_shared(shared, own.first_pass(grad, slots, param, count, shared, **drawn))
            change, new = own.update_with(grad, slots, param, count, shared, **drawn)
            if any(slots.get(slot) is not x for slot, x in kept.items()) or slots.keys() != kept.keys():
                raise AssertionError(f"update has changed the dict of slots of {name!r} in place; return a new one.")
            has_sums = type(rule).update_shared is not Rule.update_shared
            sums = {slot for slot in new if has_sums and slot not in kept}
            wanted, given = _arrays_of(kept), _arrays_of({slot: x for slot, x in new.items() if slot not in sums})
            if missing := sorted(wanted.keys() ^ given.keys()):
                raise AssertionError(f"init and update differ in the slots {missing} of {name!r}.")
            chex.assert_trees_all_equal_shapes(given, wanted)
            chex.assert_trees_all_equal_shapes_and_dtypes(_unless_scalar(given), _unless_scalar(wanted))
            if change.shape != param.shape or change.dtype != param.dtype:
                raise AssertionError(
                    f"update returns a change of shape {change.shape} and dtype {change.dtype} for {name!r}, which has "
                    f"{param.shape} and {param.dtype}."
                )


def _check_slots(name: str, param: jax.Array, slots: dict[str, Any]) -> None:
    """Check that the initial slots can be donated, and have the dtype in which the rule computes."""
    arrays = _arrays_of(slots)
    for slot, x in arrays.items():
        if x is param or any(x is other for key, other in arrays.items() if key != slot):
            raise AssertionError(f"The slot {slot!r} of {name!r} is an array that stands elsewhere too; copy it.")
        if x.ndim and x.dtype != param.dtype:
            raise AssertionError(
                f"init makes the slot {slot!r} of {name!r} in {x.dtype} where the rule computes in {param.dtype}; "
                "make it of param, such as jnp.zeros_like(param)."
            )
        if not x.ndim and not jnp.issubdtype(x.dtype, jnp.floating):
            raise AssertionError(f"The scalar slot {slot!r} of {name!r} has dtype {x.dtype}; it must be floating.")


def _arrays_of(slots: dict[str, Any]) -> dict[str, Any]:
    return {slot: x for slot, x in slots.items() if x is not None}


def _unless_scalar(slots: dict[str, Any]) -> dict[str, Any]:
    return {slot: x for slot, x in slots.items() if x.ndim}


def _check_jit(rule: Rule, params: Params) -> None:
    traced = []

    @jax.jit
    def jitted(rule: Rule, *args: Any) -> Any:
        traced.append(rule)
        return step(rule, *args)

    _assert_close(_trained(jitted, rule, params), _trained(step, rule, params))
    _trained(jitted, _neighbours(rule)[1], params, 1)
    if len(traced) > 1:
        raise AssertionError("The step was compiled again, for the structure of its state or of the rule has changed.")


def _check_dtypes(rule: Rule, params: Params) -> None:
    jitted = jax.jit(step)
    for dtype in ("float32", "bfloat16", "float64", *(["complex64"] if rule.complex else [])):
        before = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        after, state = _trained(jitted, rule, before, 2)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
        chex.assert_trees_all_equal_shapes_and_dtypes(state.slots, init(rule, before).slots)
        filled = [name for name, x in params.items() if x.size]  # the mean of an empty array is not finite
        slots = {slot: {name: of[name] for name in filled} for slot, of in state.slots.items()}
        chex.assert_tree_all_finite((after, slots))


def _check_vmap(rule: Rule, params: Params) -> None:
    if not jax.tree.leaves(rule):
        return
    rules = _neighbours(rule)
    stack = jax.tree.map(lambda *numbers: _stacked(numbers), *rules)
    swept = jax.jit(jax.vmap(lambda rule: _scanned(rule, params)))(stack)
    jitted = jax.jit(step)
    looped = [_trained(jitted, rule, params)[0] for rule in rules]
    _assert_close(swept, jax.tree.map(lambda *arrays: jnp.stack(arrays), *looped))


def _neighbours(rule: Rule) -> list[Rule]:
    """Return the rule, and one with other numbers where it takes them."""
    other = rule
    for name in rule.specs:
        value = getattr(rule, name)
        value = value.rate if isinstance(value, Decay) else value
        if isinstance(value, float) and value:
            try:
                changed = other.replace(**{name: value * 0.99})
            except ValueError:
                continue
            structures: list[Any] = [jax.tree.structure(changed), jax.tree.structure(rule)]
            if structures[0] == structures[1]:
                other = changed
    return [rule, other]


def _stacked(numbers: tuple[Any, ...]) -> jax.Array:
    return jnp.stack([jnp.asarray(x) for x in numbers])


def _check_grad(rule: Rule, params: Params) -> None:
    params = {name: x for name, x in params.items() if x.size}
    leaves, treedef = jax.tree.flatten(rule)
    numbers = [at for at, leaf in enumerate(leaves) if isinstance(leaf, float)]

    def final(values: list[Any]) -> Any:
        own = list(leaves)
        for at, value in zip(numbers, values, strict=True):
            own[at] = value
        after = _scanned(jax.tree.unflatten(treedef, own), params)
        return sum(jnp.sum(x * x) for x in after.values())

    chex.assert_tree_all_finite(jax.jit(jax.grad(final))([leaves[at] for at in numbers]))


def _check_packing(rule: Rule, params: Params) -> None:
    if rule.sparse == "required":
        return
    # Several arrays of each shape, so that a buffer is none of them.
    many = params | {f"{name} again": -2 * x for name, x in params.items()}
    packed, plain = pack(many), many
    state, other = init(rule, packed), init(rule, many)
    jitted = jax.jit(step)
    for t in range(3):
        grads = _gradients(rule, many, t)
        packed, state = jitted(rule, packed, grads, state)
        plain, other = jitted(rule, plain, grads, other)
    _assert_close(packed.unpack(), plain)


def _check_missing(rule: Rule, params: Params) -> None:
    if isinstance(rule, Sampler):
        return  # the noise of an array depends on the others
    late = next(iter(params))
    alone = {late: params[late]}
    state, own, now, jitted = init(rule, params, counts=True), init(rule, alone), params, jax.jit(step)
    for t, is_missing in enumerate((True, False, True, False)):
        grads = _gradients(rule, params, t)
        before = now[late], {slot: of[late] for slot, of in state.slots.items()}
        now, state = jitted(rule, now, grads | {late: None} if is_missing else grads, state)
        if is_missing:
            chex.assert_trees_all_equal((now[late], {slot: of[late] for slot, of in state.slots.items()}), before)
        else:
            alone, own = jitted(rule, alone, {late: grads[late]}, own)
    _assert_close(now[late], alone[late])


def _check_faces(rule: Rule, params: Params) -> None:
    if isinstance(rule, Sampler):
        return  # which has a torch-style base of its own, and no Pyro-style one
    cls: Any = type(type(rule).__name__, (optim.Optimizer,), {"rule": type(rule)})
    options = {field.name: _option(getattr(rule, field.name)) for field in dataclasses.fields(rule) if field.init}  # type: ignore[arg-type]
    late = next(iter(params))
    torch_style, named = cls(params, **options), {name: optim.Parameter(x, name) for name, x in params.items()}
    pyro_style = PyroOptim(cls, options)
    pure, state, jitted = params, init(rule, params), jax.jit(step)
    for t in range(3):
        grads = _gradients(rule, params, t) | ({late: None} if t == 0 else {})
        pure, state = jitted(rule, pure, grads, state)
        torch_style.step(grads)
        for name, param in named.items():
            param.grad = grads[name]
        pyro_style(list(named.values()))
    _assert_close(torch_style.params, pure)
    _assert_close({name: param.value for name, param in named.items()}, pure)


def _option(value: Any) -> Any:
    """Return a hyperparameter in the form in which a class takes it."""
    if isinstance(value, tuple):
        return tuple(map(_option, value))
    return value.rate if isinstance(value, Decay) else float(value) if isinstance(value, float) else value


_CHECKS: dict[Callable[[Rule, Params], None], str] = {
    _check_structure: "a rule is a pytree of its numbers.",
    _check_arrays: "init and update keep the shapes, dtypes and names of one array and its slots, and mutate nothing.",
    _check_jit: "a jitted step is the same step, compiled once for all numbers.",
    _check_dtypes: "parameters of every dtype are updated, and stay finite.",
    _check_vmap: "vmap over the numbers of a rule is a loop over its settings.",
    _check_grad: "the derivatives of trained parameters by the numbers of the rule are finite.",
    _check_packing: "a rule that says it is elementwise updates packed arrays as it does plain ones.",
    _check_missing: "an array without a gradient stays, and goes on as it would alone.",
    _check_faces: "the torch-style and the Pyro-style optimizer of the rule make its steps.",
}
"""The checks, with a description of what each expects."""
