"""Reduction of gradients over the devices of a named axis."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax.experimental.sparse import BCOO

from jaxoptim.core import trees
from jaxoptim.core.clipping import squares
from jaxoptim.core.numerics import computing_dtype
from jaxoptim.core.shown import shown

Op = Literal["mean", "sum", "adasum"]
"""The reduction of gradients."""


def all_reduce(axis_name: Any, op: Op = "mean", *, dtype: Any = None) -> optax.GradientTransformationExtraArgs:
    r"""Make a transformation that reduces gradients over the devices of a named axis, as Horovod does.

    .. math::
        \text{mean: } \bar g = \frac{1}{n} \sum_{r=1}^{n} g_r, \qquad
        \text{sum: } \bar g = \sum_{r=1}^{n} g_r, \qquad
        \text{adasum: } a \oplus b = \Bigl(1 - \frac{a \cdot b}{2 \lVert a \rVert^2}\Bigr) a
        + \Bigl(1 - \frac{a \cdot b}{2 \lVert b \rVert^2}\Bigr) b

    Adasum combines the gradients of an array in pairs, and these in pairs: the sum of those that are orthogonal, the
    mean of those that are equal, so that the learning rate need not change with the number of devices.

    It is for functions under ``jax.shard_map``, or ``jax.vmap`` with ``axis_name``. There ``jax.grad`` sums by itself
    over the devices along which parameters do not vary: take gradients of
    ``jax.lax.pcast(params, axis_name, to="varying")``. Under ``jax.jit`` alone the compiler reduces, and :func:`zero`
    says how.

    Args:
        axis_name: the axis, or several.
        op: ``"mean"`` (default), ``"sum"``, or ``"adasum"`` over one axis of 2, 4, 8, ... devices. Sparse gradients
            have the rows of all devices in their mean and sum.
        dtype: the dtype in which gradients of more bits are sent, such as ``"bfloat16"`` (default None: their own). The
            results are in their own again.

    Returns:
        A transformation without state; put it in front of clipping, so that all devices clip alike.

    Raises:
        ``ValueError`` for another ``op``, and for a number of devices that adasum does not take. ``update`` raises
        ``ValueError`` for a gradient that does not vary along the axis, and ``TypeError`` for sparse ones with adasum.

    References:
        Sergeev, Del Balso, Horovod: fast and easy distributed deep learning in TensorFlow, 2018. Maleki et al., Scaling
        distributed training with adaptive summation, MLSys 2021.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxoptim, optax
        >>> tx = optax.chain(jaxoptim.distributed.all_reduce("data"), jaxoptim.sgd(lr=0.5))
        >>> params, batch = jnp.zeros(()), jnp.array([1.0, 3.0])
        >>> def step(params, x):
        ...     grads = jax.grad(lambda p: (p - x) ** 2)(params)
        ...     updates, _ = tx.update(grads, tx.init(params), params)
        ...     return optax.apply_updates(params, updates)
        >>> jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name="data")(params, batch).item()
        2.0
    """
    if op not in get_args(Op):
        raise ValueError(f"Invalid op: {shown(op)}. all_reduce takes {', '.join(map(repr, get_args(Op)))}.")

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return reduced(grads, axis_name, op, dtype), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def reduced(grads: Any, axis_name: Any, op: Op, dtype: Any = None) -> Any:
    """Reduce a pytree of gradients over all devices of a named axis; see :func:`all_reduce`."""
    leaves, treedef = jax.tree.flatten(grads, is_leaf=trees.is_leaf)
    named = zip(trees.names(grads), leaves, strict=True)
    return jax.tree.unflatten(
        treedef, [None if grad is None else _reduced(name, grad, axis_name, op, dtype) for name, grad in named]
    )


def _reduced(name: str, grad: Any, axis_name: Any, op: Op, dtype: Any) -> Any:
    if isinstance(grad, BCOO):
        return _sparse(name, grad, axis_name, op)
    _check_varies(name, grad, axis_name)
    grad = jnp.asarray(grad)
    is_narrowed = dtype is not None and jnp.finfo(grad.dtype).bits > jnp.finfo(dtype).bits
    sent = (
        grad.astype(jnp.result_type(dtype, jnp.complex64) if jnp.iscomplexobj(grad) else dtype) if is_narrowed else grad
    )
    if op == "adasum":
        return _adasum(sent, axis_name).astype(grad.dtype)
    return (jax.lax.pmean if op == "mean" else jax.lax.psum)(sent, axis_name).astype(grad.dtype)


def _sparse(name: str, grad: BCOO, axis_name: Any, op: Op) -> BCOO:
    """Gather the rows of all devices."""
    if op == "adasum":
        raise TypeError(f"adasum takes dense gradients, but that of {name!r} is a BCOO. Give its todense().")
    _check_varies(name, grad.data, axis_name)
    to = "invarying" if all(map(_is_tracked, _axes(axis_name))) else "varying"
    data, indices = (jax.lax.all_gather(x, axis_name, tiled=True, to=to) for x in (grad.data, grad.indices))
    return BCOO((data / jax.lax.axis_size(axis_name) if op == "mean" else data, indices), shape=grad.shape)


def _adasum(grad: jax.Array, axis_name: Any) -> jax.Array:
    """Compute the adaptive sum of the arrays of all devices by exchanges with the devices 1, 2, 4, ... away."""
    count = jax.lax.axis_size(axis_name)
    if count & (count - 1):
        raise ValueError(f"adasum combines gradients in pairs, but the axis {shown(axis_name)} has {count} devices.")
    mine, distance = grad.astype(computing_dtype(grad.dtype)), 1
    while distance < count:
        pairs = [(at, at ^ distance) for at in range(count)]
        other = jax.lax.ppermute(mine.astype(grad.dtype), axis_name, pairs).astype(mine.dtype)
        product = jnp.sum((mine * other.conj()).real)
        mine = _weight(product, mine) * mine + _weight(product, other) * other
        distance *= 2
    return jax.lax.pmean(mine, axis_name)  # of equal arrays, so that JAX knows that they are


def _weight(product: jax.Array, x: jax.Array) -> jax.Array:
    """Return the coefficient of a gradient in the sum of a pair."""
    square = squares(x)
    return 1 - jnp.where(square > 0, product / (2 * jnp.where(square > 0, square, 1)), 0)


def _check_varies(name: str, grad: Any, axis_name: Any) -> None:
    """Raise for a gradient that JAX knows to be the same on all devices: it is reduced already."""
    for axis in _axes(axis_name):
        if _is_tracked(axis) and axis not in _varying(grad):
            raise ValueError(
                f"The gradient of {name!r} is the same on all devices along {axis!r}: jax.grad has summed it there. "
                f"Take the gradient of jax.lax.pcast(params, {axis!r}, to='varying'), or leave all_reduce out."
            )


def _axes(axis_name: Any) -> tuple[Any, ...]:
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _is_tracked(axis: Any) -> bool:
    """Whether JAX tracks which values vary along an axis: in ``shard_map``, unless it is told not to."""
    return axis in _varying(jax.lax.axis_index(axis))


def _varying(x: Any) -> Any:
    """Return the axes along which JAX knows that an array varies."""
    return getattr(jax.typeof(x).manual_axis_type, "varying", ())
