"""From the update of one array to the update of a whole pytree.

The rules never see what this file handles: trees, None, dtypes, complex numbers, sparse gradients, packing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax
from jax import export
from jax.experimental.sparse import BCOO

from jaxoptim.core import sparse, trees
from jaxoptim.core.numerics import computing_dtype, is_complex, real_dtype, view_as_complex, view_as_real
from jaxoptim.core.packing import Packed, unpacked
from jaxoptim.core.rule import Hyperparameters, Rule, Slots
from jaxoptim.core.signatures import bound

P = ParamSpec("P")


class OptState(NamedTuple):
    """The state of every optimizer of this library; its names are the checkpoint format.

    Attributes:
        step: the number of updates made, an int32 scalar.
        slots: for each of torch's state names (``exp_avg``, ...) a tree shaped like params, in at least
            float32. A parameter that lacks a slot holds None there.
        shared: what belongs to the whole tree, such as a sampler's key.

    Example:
        >>> import jax.numpy as jnp, jaxoptim
        >>> state = jaxoptim.sgd(lr=0.1, momentum=0.9).init({"w": jnp.ones(2)})
        >>> int(state.step), list(state.slots), state.shared
        (0, ['momentum_buffer'], {})
    """

    step: jax.Array
    slots: dict[str, Any]
    shared: dict[str, Any]


export.register_namedtuple_serialization(OptState, serialized_name="jaxoptim.OptState")


def init(rule: Rule, params: Any) -> OptState:
    """The state before the first update.

    Args:
        rule: the optimizer.
        params: a pytree of floating or complex arrays, None leaves allowed; or a :class:`Packed`; or
            ``jax.ShapeDtypeStruct`` leaves under ``jax.eval_shape``.

    Returns:
        An :class:`OptState`, each slot on the devices of its parameter.

    Errors:
        ``TypeError`` for a parameter that is not floating or complex; what the rule raises for a parameter
        that it cannot update (its name is in the message).

    Example:
        >>> import jax.numpy as jnp, jaxoptim
        >>> state = jaxoptim.init(jaxoptim.rules.Adam(), {"w": jnp.ones(2), "frozen": None})
        >>> sorted(state.slots)
        ['exp_avg', 'exp_avg_sq']
    """
    _check_rule(rule)
    params = _whole(rule, params)
    leaves, treedef = jax.tree.flatten(params, is_leaf=trees.is_leaf)
    started = rule.at(0)
    slots = [
        None if leaf is None else _init_one(started, name, leaf)
        for name, leaf in zip(trees.names(params), leaves, strict=True)
    ]
    # A tree without arrays has the same slots as any other: optax initialises on such placeholders.
    example = next((s for s in slots if s is not None), None)
    if example is None:
        example = jax.eval_shape(started.init, jax.ShapeDtypeStruct((1, 1), jnp.float32))
    trees_of_slots = {key: jax.tree.unflatten(treedef, [s and s[key] for s in slots]) for key in example}
    return OptState(jnp.zeros((), jnp.int32), trees_of_slots, {})


def update(rule: Rule, grads: Any, state: OptState, params: Any = None) -> tuple[Any, OptState]:
    """What to add to the parameters, in the gradients' dtype: the form of optax.

    Args:
        rule: the optimizer; its numbers may be traced.
        grads: a tree like params. None leaves a parameter and its slots alone. For complex parameters the
            convention of torch and optax: the conjugate of what ``jax.grad`` returns.
        state: from :func:`init` or the last update.
        params: the current parameters. Only rules that use them (weight decay, for one) need them.

    Returns:
        The updates, a tree like ``grads``, and the new state. A sparse gradient gives a sparse update.

    Errors:
        ``ValueError`` for another tree or shape than the parameters', and for missing ``params``;
        ``RuntimeError`` for sparse gradients where they are not supported; ``TypeError`` for gradients
        that are not floating. The message names the parameter.

    Example:
        >>> import jax.numpy as jnp, jaxoptim
        >>> params, rule = {"w": jnp.ones(2)}, jaxoptim.rules.SGD(lr=0.5)
        >>> updates, state = jaxoptim.update(rule, {"w": jnp.ones(2)}, jaxoptim.init(rule, params), params)
        >>> updates["w"].tolist()
        [-0.5, -0.5]
    """

    def finish(grad: Any, param: Any, rows: Any, change: jax.Array) -> Any:
        change = change.astype(grad.dtype)
        return change if rows is None else sparse.as_update(rows, change, grad.shape)

    return _advance(rule, grads, state, params, finish, lambda grad, param: grad)


def step(rule: Rule, params: Any, grads: Any, state: OptState) -> tuple[Any, OptState]:
    """The parameters after one update: the exact form, rounded once.

    Args:
        rule: the optimizer; its numbers may be traced.
        params: the current parameters. Donate them, and the state, when the call is jitted.
        grads: as in :func:`update`.
        state: from :func:`init` or the last step.

    Returns:
        The new parameters, in their own dtypes, and the new state.

    Errors:
        As :func:`update`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxoptim
        >>> params, rule = {"w": jnp.ones(2)}, jaxoptim.rules.Adam(lr=0.1)
        >>> step = jax.jit(jaxoptim.step, donate_argnums=(1, 3))
        >>> params, state = step(rule, params, {"w": jnp.ones(2)}, jaxoptim.init(rule, params))
        >>> [round(x, 6) for x in params["w"].tolist()]
        [0.9, 0.9]
    """

    def finish(grad: Any, param: Any, rows: Any, change: jax.Array) -> Any:
        if rows is None:
            return (param + change).astype(param.dtype)
        return sparse.put(param, rows, sparse.take(param, rows) + change)

    return _advance(rule, grads, state, params, finish, lambda grad, param: param)


@functools.singledispatch
def transformation(rule: Any, /) -> optax.GradientTransformationExtraArgs:
    """A rule as an optax transformation.

    Args:
        rule: an instance of a rule. A Pyro-style optimizer will do too: its transformation is of a dict by names.

    Returns:
        ``optax.GradientTransformationExtraArgs``, whose ``update`` takes ``params`` third and ignores
        keywords that the rule has no use for.

    Errors:
        ``TypeError`` if ``rule`` is not an instance of a rule.

    Example:
        >>> import jaxoptim, optax
        >>> tx = optax.chain(optax.clip(1.0), jaxoptim.transformation(jaxoptim.rules.SGD(lr=0.1)))
    """
    raise TypeError(f"transformation was given {rule!r}. It takes an instance of a rule, such as Adam(lr=1e-3).")


@transformation.register
def _array_by_array(rule: Rule, /) -> optax.GradientTransformationExtraArgs:
    """The transformation of a rule for one array: the same for every array of the tree."""

    def init_fn(params: Any) -> OptState:
        return init(rule, params)

    def update_fn(grads: Any, state: OptState, params: Any = None, **extra: Any) -> tuple[Any, OptState]:
        given = {name: extra[name] for name in rule.per_update if name in extra}
        return update(rule.replace(**given) if given else rule, grads, state, params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def factory(rule: Callable[P, Hyperparameters], name: str) -> Callable[P, optax.GradientTransformationExtraArgs]:
    """The function of the pure face that builds a rule and returns its transformation.

    Args:
        rule: the class of a rule. Its signature and documentation become the function's.
        name: the name of the function.

    Returns:
        A function that takes the hyperparameters of ``rule``.

    Errors:
        The function raises ``TypeError`` for a hyperparameter that the rule does not have.

    Example:
        >>> import jaxoptim
        >>> jaxoptim.adam(learning_rate=0.1)
        Traceback (most recent call last):
        TypeError: adam() got an unexpected keyword argument 'learning_rate'. It takes lr, betas, eps, ...
    """
    signature = inspect.signature(rule).replace(return_annotation=optax.GradientTransformationExtraArgs)

    @functools.wraps(rule, assigned=("__module__", "__doc__"), updated=())
    def make(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
        return transformation(rule(**bound(name, signature, args, kwargs)))  # type: ignore[call-arg]

    make.__name__ = make.__qualname__ = name
    make.__signature__ = signature  # type: ignore[attr-defined]
    return make


def _whole(rule: Rule, params: Any) -> Any:
    """The tree that a rule works on: packed buffers only for those that take every number by itself."""
    return params.unpack() if isinstance(params, Packed) and not rule.elementwise else params


def _check_rule(rule: Any) -> None:
    if not isinstance(rule, Rule):
        raise TypeError(
            f"{type(rule).__name__} does not work array by array. "
            "Use the init and update of jaxoptim.transformation(rule), where rule is an instance."
        )


def check_param(rule: Rule, name: str, param: Any) -> Any:
    """A parameter as an array; raises if the rule cannot update it.

    Args:
        rule: the optimizer.
        name: the parameter's name in messages.
        param: an array, or its shape and dtype.

    Returns:
        The array.

    Errors:
        ``TypeError`` if it is not floating or complex, and what :meth:`Rule.check_param` raises.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.core import check_param
        >>> from jaxoptim.rules import Muon
        >>> check_param(Muon(), "bias", jnp.ones(3))
        Traceback (most recent call last):
        ValueError: Muon only supports 2D parameters, but 'bias' has shape (3,). ...
    """
    param = trees.check_array("parameter", name, param)
    if not rule.complex and jnp.issubdtype(param.dtype, jnp.complexfloating):
        raise RuntimeError(
            f"{type(rule).__name__} does not support complex parameters, but {name!r} has dtype {param.dtype}. "
            "Optimize its real and imaginary parts as two parameters, or use another optimizer."
        )
    rule.check_param(name, param)
    return param


def _init_one(rule: Rule, name: str, param: Any) -> Slots:
    """The slots of one parameter; complex ones hold the real slots of both parts."""
    param = check_param(rule, name, param)
    dtype = computing_dtype(param.dtype)

    def slots_of(param: jax.Array) -> Slots:
        real = view_as_real(param.astype(dtype))
        return _as_stored(param, real, rule.cast(real.dtype).init(real))

    return jax.eval_shape(slots_of, param) if isinstance(param, jax.ShapeDtypeStruct) else slots_of(param)


def _as_stored(param: jax.Array, real: jax.Array, slots: Slots) -> Slots:
    """Slots that were computed on the real view of a complex array, as complex arrays."""
    if real.ndim == param.ndim:
        return slots
    return {
        key: slot if slot is None or slot.shape != real.shape else view_as_complex(slot) for key, slot in slots.items()
    }


def _advance(
    rule: Rule,
    grads: Any,
    state: OptState,
    params: Any,
    finish: Callable[[Any, Any, Any, jax.Array], Any],
    skipped: Callable[[Any, Any], Any],
) -> tuple[Any, OptState]:
    """One update of every array; ``finish`` makes the result of each, ``skipped`` that of a missing gradient."""
    _check_rule(rule)
    if isinstance(params, Packed):
        if not rule.elementwise:
            result, state = _advance(rule, unpacked(grads), state, params.unpack(), finish, skipped)
            return params.pack(result), state
        if not isinstance(grads, Packed):
            grads = params.pack(grads, "grads")
    like = grads if params is None else params
    _, treedef = jax.tree.flatten(like, is_leaf=trees.is_leaf)
    all_grads = trees.leaves_like(grads, like, "grads")
    all_params = [None] * len(all_grads) if params is None else jax.tree.leaves(like, is_leaf=trees.is_leaf)
    slots = {key: trees.leaves_like(tree, like, f"state.slots[{key!r}]") for key, tree in state.slots.items()}

    current = rule.at(state.step)
    count = optax.safe_increment(state.step)
    results, new_slots = [], {key: list(leaves) for key, leaves in slots.items()}
    for i, (name, grad, param) in enumerate(zip(trees.names(like), all_grads, all_params, strict=True)):
        if grad is None or (param is None and params is not None):
            results.append(skipped(grad, param))
            continue
        old = {key: leaves[i] for key, leaves in slots.items()}
        param = param if param is None else check_param(rule, name, param)
        grad = check_gradient(rule, name, grad, param)
        rows, change, new = _update_one(current, grad, old, param, count)
        results.append(finish(grad, param, rows, change))
        for key, slot in new.items():
            new_slots[key][i] = slot
    new_trees = {key: jax.tree.unflatten(treedef, leaves) for key, leaves in new_slots.items()}
    return jax.tree.unflatten(treedef, results), OptState(count, new_trees, state.shared)


def check_gradient(rule: Rule, name: str, grad: Any, param: Any) -> Any:
    """A gradient, dense ones as an array; raises if it does not fit its parameter or its rule.

    Args:
        rule: the optimizer.
        name: the parameter's name in messages.
        grad: an array or a ``BCOO`` of rows.
        param: the parameter, or its shape and dtype, or None if it is not known.

    Returns:
        The gradient.

    Errors:
        As :func:`update`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.core import check_gradient
        >>> from jaxoptim.rules import Adam
        >>> check_gradient(Adam(), "bias", jnp.ones(3), jnp.ones(2))
        Traceback (most recent call last):
        ValueError: The gradient of 'bias' has shape (3,), but the parameter has (2,). They must be equal.
    """
    kind = type(rule).__name__
    grad = grad if isinstance(grad, BCOO) else trees.check_array("gradient of", name, grad)
    like = grad if param is None else param
    if isinstance(grad, BCOO):
        if rule.sparse == "refused":
            raise RuntimeError(
                f"{kind} does not support sparse gradients, but that of {name!r} is a BCOO. "
                "Give its todense(), or use SparseAdam instead."
            )
        rule.check_sparse()
        sparse.check_rows(name, grad, like)
        return grad
    if rule.sparse == "required":
        raise RuntimeError(
            f"{kind} does not support dense gradients, but that of {name!r} is dense. "
            "Give a jax.experimental.sparse.BCOO of dense rows, or use Adam instead."
        )
    trees.check_shape("gradient", name, grad, like)
    if is_complex(grad) and not is_complex(like):
        raise TypeError(f"The gradient of {name!r} is complex, the parameter is not. Give the real part.")
    return grad


def _update_one(rule: Rule, grad: Any, slots: Slots, param: Any, count: jax.Array) -> tuple[Any, jax.Array, Slots]:
    """The change of one parameter, dense or in ``rows``, and its new slots."""
    if not isinstance(grad, BCOO):
        return None, *_dense(rule, grad, slots, param, count)
    if not rule.rowwise:
        return None, *_dense(rule, sparse.to_dense(grad), slots, param, count)
    rows, values = sparse.distinct_rows(grad)
    touched = {key: sparse.take(slot, rows) for key, slot in slots.items()}
    here = None if param is None else sparse.take(param, rows)
    change, new = _dense(rule, values, touched, here, count)
    return rows, change, {key: sparse.put(slots[key], rows, values) for key, values in new.items()}


@jax.jit
def _dense(rule: Rule, grad: jax.Array, slots: Slots, param: Any, count: jax.Array) -> tuple[jax.Array, Slots]:
    """Run the rule in the computing dtype, on the real view of complex arrays.

    Jitted so that all arrays of one shape are traced and lowered once, which is most of the work of tracing
    a large tree; the compiler inlines it.
    """
    dtype = computing_dtype(grad.dtype if param is None else param.dtype)
    rule, count = rule.cast(real_dtype(dtype)), count.astype(real_dtype(dtype))
    grad = grad.astype(dtype)
    real = view_as_real(grad)
    seen = {
        key: slot if slot is None or slot.shape != grad.shape else view_as_real(slot) for key, slot in slots.items()
    }
    change, new = rule.update(real, seen, param if param is None else view_as_real(param.astype(dtype)), count)
    new = _as_stored(grad, real, new)
    new = {key: slot if slot is None else slot.astype(slots[key].dtype) for key, slot in new.items()}
    return view_as_complex(change) if real.ndim != grad.ndim else change, new
