"""The update of one leaf of a pytree: computing dtype, complex numbers, sparse gradients, its part of the rule.

The rules never see what this file handles.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO

from jaxoptim.core import precision, sparse, trees
from jaxoptim.core.noise import Draw
from jaxoptim.core.numerics import computing_dtype, is_complex, real_dtype, view_as_complex, view_as_real
from jaxoptim.core.rule import Off, Rule, Slots, Traced, assembled, is_part, is_tree


def check_param(rule: Rule, name: str, param: Any) -> Any:
    """Return a parameter as an array; raise if the rule cannot update it.

    Args:
        rule: the optimizer.
        name: the parameter's name in messages.
        param: an array, or its shape and dtype.

    Returns:
        The array.

    Raises:
        ``TypeError`` if it is not floating or complex, and what :meth:`Rule.check_param` raises.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.core import check_param
        >>> from jaxoptim.rules import Muon
        >>> check_param(Muon(), "bias", jnp.ones(3))
        Traceback (most recent call last):
        ValueError: Muon only supports 2D parameters, but 'bias' has shape (3,). ...
    """
    param = trees.check_array("parameter", name, param)
    if not rule.complex and jnp.issubdtype(param.dtype, jnp.complexfloating):
        raise rule.complex_error(
            f"{type(rule).__name__} does not support complex parameters, but {name!r} has dtype {param.dtype}. "
            "Optimize its real and imaginary parts as two parameters, or use another optimizer."
        )
    rule.check_param(name, param)
    return param


def check_gradient(rule: Rule, name: str, grad: Any, param: Any) -> Any:
    """Return a gradient, a dense one as an array; raise if it does not fit its parameter or its rule.

    Args:
        rule: the optimizer.
        name: the parameter's name in messages.
        grad: an array or a ``BCOO`` of rows.
        param: the parameter, or its shape and dtype, or None if it is not known.

    Returns:
        The gradient.

    Raises:
        As :func:`update`.

    Examples:
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


def fitting(what: str, name: str, x: Any, grad: Any) -> Any:
    """Check a leaf of a pytree that a rule takes by name, and return it."""
    if x is None:
        raise ValueError(f"{what} has nothing for {name!r}, which has a gradient. Give it an array of its shape.")
    x = trees.check_array(f"leaf of {what}", name, x)
    trees.check_shape(f"leaf of {what}", name, x, grad)
    return x


def by_leaf(rule: Rule, like: Any, like_what: str) -> list[Any]:
    """Return one rule for each leaf, with the leaf's part of the fields that hold a pytree."""
    leaves = jax.tree.leaves(like, is_leaf=trees.is_leaf)
    own: list[dict[str, Any]] = [{} for _ in leaves]
    by_parameter = rule.by_parameter
    for field, spec in rule.specs.items():
        value = getattr(rule, field)
        if field in by_parameter:
            numbers = numbers_of(spec, value, field, like, like_what)
            own = [mine | {field: number} for mine, number in zip(own, numbers, strict=True)]
        if value is None or not (isinstance(spec, Traced) and spec.by_leaf):
            continue
        one_for_all = jax.tree_util.all_leaves([value]) and not spec.is_value
        parts = [value] * len(leaves) if one_for_all else trees.leaves_like(value, like, field, like_what)
        fitted = _value if spec.is_value else _broadcasting
        for mine, name, leaf, part in zip(own, trees.names(like), leaves, parts, strict=True):
            mine[field] = None if leaf is None or part is None else fitted(field, name, part, leaf)
    rules = [assembled(type(rule), vars(rule) | mine) if mine else rule for mine in own]
    if by_parameter:
        for its, leaf in zip(rules, leaves, strict=True):
            if leaf is not None:
                its.check()
    return rules


def of_any_leaf(rule: Rule) -> Any:
    """Return the rule for a pytree without arrays: one number of each pytree of numbers, of an enabled term if any."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(one, value))
        parts = [part for part in jax.tree.leaves(value, is_leaf=is_part) if part is not None]
        return next((part for part in parts if not isinstance(part, Off)), parts[0]) if is_tree(value) else value

    return assembled(type(rule), vars(rule) | {name: one(getattr(rule, name)) for name in rule.by_parameter})


def numbers_of(spec: Any, value: Any, field: str, like: Any, like_what: str) -> list[Any]:
    """Return a hyperparameter's value for each leaf; it may be one number or a pytree of numbers."""
    if isinstance(spec, tuple):
        columns = [
            numbers_of(s, v, f"{field}[{at}]", like, like_what)
            for at, (s, v) in enumerate(zip(spec, value, strict=True))
        ]
        return list(zip(*columns, strict=True))
    if not is_tree(value):
        return [value] * len(jax.tree.leaves(like, is_leaf=trees.is_leaf))
    numbers = trees.spread(value, like, field, like_what, is_part)
    for name, leaf, number in zip(
        trees.names(like), jax.tree.leaves(like, is_leaf=trees.is_leaf), numbers, strict=True
    ):
        if number is None and leaf is not None and not spec.optional:
            raise ValueError(f"{field} has None for {name!r}. Give a number for every parameter.")
    return numbers


def _broadcasting(field: str, name: str, part: Any, like: Any) -> Any:
    """Return an array after checking that it broadcasts to the shape of another."""
    shape = jnp.shape(part)
    fits = len(shape) <= len(like.shape) and all(
        a in (1, b) for a, b in zip(shape[::-1], tuple(like.shape)[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"{field} has shape {shape} for {name!r}, which does not broadcast to the parameter's {tuple(like.shape)}. "
            "Give one array for all parameters, or a tree like them."
        )
    return part


def _value(field: str, name: str, part: Any, like: Any) -> Any:
    """Return an array after checking that it could be a value of another: its shape and dtype fit."""
    part = trees.check_array(f"{field} of", name, part)
    trees.check_shape(field, name, part, like)
    if is_complex(part) and not is_complex(like):
        raise TypeError(f"The {field} of {name!r} is complex, the parameter is not. Give the real part.")
    return part


def as_computed(x: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype in which a rule sees an array."""
    dtype = computing_dtype(x.dtype)
    return jax.ShapeDtypeStruct((*x.shape, 2) if is_complex(x) else x.shape, real_dtype(dtype))


class LeafUpdate(NamedTuple):
    """The inputs of the update of one array.

    Attributes:
        number: the array's place among the leaves of the tree.
        rule: the optimizer, with its own part of the fields that hold a tree.
        grad: the gradient.
        slots: the array's slots.
        param: the array, or None if it is not known.
        step: the number of this update of the array, from 1.
        given: its part of the trees that the rule takes by name, or a draw of noise.
    """

    number: int
    rule: Rule
    grad: Any
    slots: Slots
    param: Any
    step: jax.Array
    given: dict[str, Any]


def init_leaf(rule: Rule, param: Any, drawn: dict[str, Any]) -> Slots:
    """Initialize the slots of one parameter; for a complex one they hold the real slots of both parts."""
    dtype = computing_dtype(param.dtype)
    if is_complex(param):
        rule = _with_pairs(rule)

    def slots_of(param: jax.Array, drawn: dict[str, Any]) -> Slots:
        real = view_as_real(param.astype(dtype))
        slots = _as_stored(param, real, rule.cast(real.dtype).init(real, **jax.tree.map(view_as_real, drawn)))
        return precision.first(rule.precision, param, slots)

    if isinstance(param, jax.ShapeDtypeStruct):
        return jax.eval_shape(slots_of, param, drawn)
    return slots_of(param, drawn)


Wanted = Literal["value", "change", "both"]
"""The result wanted of an update: the new value of the array, its change, or both."""

Change = tuple[Any, Any, Any, Slots]
"""The rows that change (None: all), their change (None: not wanted), their new values, and the new slots.

The new values are None if they follow from the change."""


def update_leaf(leaf: LeafUpdate, shared: dict[str, Any]) -> Change:
    """Update one parameter: the rows that change (None: all), their change, their new values, and the new slots.

    The new values are None where they are the old ones plus the change, rounded.
    """
    if not isinstance(leaf.grad, BCOO):
        return None, *valued(leaf, *update_dense(*leaf[1:], shared))
    if not leaf.rule.rowwise:
        leaf = leaf._replace(grad=sparse.to_dense(leaf.grad))
        return None, *valued(leaf, *update_dense(*leaf[1:], shared))
    rows, values = sparse.distinct_rows(leaf.grad)
    touched = {key: slot if slot is None else sparse.take(slot, rows) for key, slot in leaf.slots.items()}
    here = None if leaf.param is None else sparse.take(leaf.param, rows)
    of_rows = leaf._replace(grad=values, slots=touched, param=here)
    change, value, new = valued(of_rows, *update_dense(*of_rows[1:], shared))
    return (
        rows,
        change,
        value,
        {key: None if values is None else sparse.put(leaf.slots[key], rows, values) for key, values in new.items()},
    )


def valued(leaf: LeafUpdate, change: jax.Array, slots: Slots) -> tuple[jax.Array, Any, Slots]:
    """Return the change, the new value if the precision keeps more than the nearest one, and the slots."""
    param, how = leaf.param, leaf.rule.precision
    if param is None or not precision.is_low(param.dtype) or not how.keeps_values:
        return change, None, slots
    if (master := leaf.slots.get(precision.MASTER)) is None:
        return change, precision.kept(param + change, param.dtype, how.rounding, leaf.step), slots
    new = precision.value_of(param, master) + change
    return change, new.astype(param.dtype), slots | {precision.MASTER: new}


@jax.jit
def update_dense(
    rule: Rule,
    grad: jax.Array,
    slots: Slots,
    param: Any,
    count: jax.Array,
    given: dict[str, Any],
    shared: dict[str, Any],
) -> tuple[jax.Array, Slots]:
    """Run the rule in the computing dtype, on the real view of complex arrays; return the change and the new slots.

    Jitted so that all arrays of one shape are traced and lowered once, which is most of the work of tracing
    a large tree; the compiler inlines it.
    """
    rounding = rule.precision.rounding
    rule, real, seen, param, given = _as_real(rule, grad, slots, param, given)
    change, new = rule.update_with(real, seen, param, count.astype(real_dtype(real.dtype)), shared, **given)
    kept = _as_stored(grad, real, {key: slot for key, slot in new.items() if key in slots})
    kept = {
        key: slot if slot is None else precision.kept(slot, slots[key].dtype, rounding, count)
        for key, slot in kept.items()
    }
    change = view_as_complex(change) if real.ndim != grad.ndim else change
    return change, kept | {key: x for key, x in new.items() if key not in slots}


@jax.jit
def first_pass(leaf: LeafUpdate, shared: dict[str, Any]) -> dict[str, jax.Array]:
    """Return the scalars that the rule sums over all arrays before any is updated."""
    rule, real, seen, param, given = _as_real(leaf.rule, leaf.grad, leaf.slots, leaf.param, leaf.given)
    return rule.first_pass(real, seen, param, leaf.step.astype(real.dtype), shared, **given)


def seen_by_rule(leaf: LeafUpdate) -> tuple[Rule, jax.Array, Slots]:
    """Return the rule of a leaf, its gradient and its slots, in the dtype that they are computed in."""
    rule, real, seen, _, _ = _as_real(leaf.rule, leaf.grad, leaf.slots, leaf.param, {})
    return rule, real, seen


def _as_real(rule: Rule, grad: jax.Array, slots: Slots, param: Any, given: dict[str, Any]) -> tuple[Any, ...]:
    """Cast the rule and arrays to the computing dtype, complex arrays as pairs."""
    dtype = computing_dtype(grad.dtype if param is None else param.dtype)

    def real(x: Any) -> jax.Array:
        return view_as_real(x.astype(dtype))

    seen = {
        key: slot if slot is None or slot.shape != grad.shape else view_as_real(_computed(slot))
        for key, slot in slots.items()
    }
    if is_complex(grad):
        rule = _with_pairs(rule)
    if param is not None and (master := seen.pop(precision.MASTER, None)) is not None:
        param = precision.value_of(param, master)
    param = param if param is None else real(param)
    given = {key: x.numbers().astype(real_dtype(dtype)) if isinstance(x, Draw) else real(x) for key, x in given.items()}
    return rule.cast(real_dtype(dtype)), real(grad), seen, param, given


def _computed(slot: jax.Array) -> jax.Array:
    """Cast a slot to the dtype that rules compute in."""
    return slot.astype(jnp.float32) if precision.is_low(slot.dtype) else slot


def _as_stored(param: jax.Array, real: jax.Array, slots: Slots) -> Slots:
    """Turn slots computed on the real view of a complex array back into complex arrays."""
    if real.ndim == param.ndim:
        return slots
    return {
        key: slot if slot is None or slot.shape != real.shape else view_as_complex(slot) for key, slot in slots.items()
    }


def summed(scalars: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Return the sums over all arrays of the scalars that each has."""
    sums: dict[str, jax.Array] = {}
    for of_leaf in scalars:
        for key, x in of_leaf.items():
            sums[key] = sums[key] + x if key in sums else x
    return sums


def _with_pairs(rule: Rule) -> Rule:
    """Return the rule of a complex array: its own arrays get a last axis for real and imaginary parts."""

    def paired(spec: Traced, x: jax.Array) -> jax.Array:
        return view_as_real(x.astype(jnp.promote_types(x.dtype, jnp.complex64))) if spec.is_value else x[..., None]

    arrays = {
        name: paired(spec, jnp.asarray(getattr(rule, name)))
        for name, spec in rule.specs.items()
        if isinstance(spec, Traced) and spec.by_leaf and getattr(rule, name) is not None
    }
    return assembled(type(rule), vars(rule) | arrays)
