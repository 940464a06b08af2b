"""Basic array operations that every rule uses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

T = TypeVar("T")


@jax.custom_jvp
def sqrt(x: jax.Array) -> jax.Array:
    """Compute the square root, with derivative zero at zero.

    A unit whose gradient has always been zero has a second moment of zero. Its update does not depend on
    that moment, but the chain rule would multiply an infinite slope by zero and give NaN to every
    derivative taken through the training run.
    """
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[jax.Array, jax.Array]:
    root = sqrt(primals[0])
    slope = jnp.where(root > 0, 0.5 / jnp.where(root > 0, root, 1), 0)
    return root, slope * tangents[0]


def from_numbers(function: Callable[..., T], *numbers: Any) -> T:
    """Evaluate a function of scalars, in a few kernels on a TPU.

    TPUs do not fuse operations on scalars, and each would be a kernel: there the function gets every scalar twice,
    as an array.
    """
    leaves, treedef = jax.tree.flatten(numbers)
    known = {at: x for at, x in enumerate(leaves) if not isinstance(x, jax.Array)}  # which keep their digits
    arrays = [x for x in leaves if isinstance(x, jax.Array)]

    def once(*arrays: jax.Array) -> T:
        rest = iter(arrays)
        merged = [known[at] if at in known else next(rest) for at in range(len(leaves))]
        return function(*jax.tree.unflatten(treedef, merged))

    def twice(*arrays: jax.Array) -> T:
        # The compiler may not see that the two are one.
        ones = jax.lax.optimization_barrier({str(x.dtype): jnp.ones(2, x.dtype) for x in arrays})
        pairs = [x * ones[str(x.dtype)].reshape(2, *[1] * x.ndim) for x in arrays]
        return jax.tree.map(lambda x: x[0], once(*pairs))

    return jax.lax.platform_dependent(*arrays, tpu=twice, default=once)


def full_like(param: jax.Array, value: Any = 0.0) -> jax.Array:
    """Return an array like ``param``, filled with ``value``, and placed on devices as ``param`` is.

    Unlike ``jnp.full_like``, the result depends on ``param`` as far as the compiler's placement goes:
    under ``jit`` with automatic sharding a fresh constant would land on one device.
    """
    return jnp.where(False, param, jnp.asarray(value, param.dtype))


def owned(array: Any) -> jax.Array:
    """Copy an array of another library; the copy is complete on return, so its owner may change it at once.

    A tensor of torch may be on any device, sparse, a view, a lazy conjugate, or part of a graph of gradients.
    """
    if hasattr(array, "to_dense"):
        array = array.detach().cpu().to_dense().resolve_conj().resolve_neg().contiguous()
    if not isinstance(array, np.ndarray) and hasattr(array, "__dlpack__"):
        array = jnp.from_dlpack(array)  # which NumPy has not the dtypes for
    array = np.array(array)
    if array.dtype.kind in "OSUMm":
        raise TypeError(f"Arrays of numbers are taken, but got one of dtype {array.dtype}. Leave it out.")
    return jnp.asarray(array)  # on no particular device, where JAX would otherwise keep it to its own


def placed_like(array: jax.Array, like: Any) -> jax.Array:
    """Put an array on the devices of another, or of a ``ShapeDtypeStruct`` with a sharding."""
    sharding = getattr(like, "sharding", None)
    return array if sharding is None or sharding == array.sharding else put(array, sharding)


def put(arrays: Any, sharding: Any) -> Any:
    """Put arrays under a sharding, also over the devices of several processes, which all have the same arrays."""
    if sharding.is_fully_addressable:
        return jax.device_put(arrays, sharding)
    return _program_that_puts(sharding)(arrays)


@functools.cache
def _program_that_puts(sharding: Any) -> Any:
    return jax.jit(lambda arrays: arrays, out_shardings=sharding)


def strong(x: Any) -> jax.Array:
    """Return an array without JAX's weak type, which would trigger another compilation."""
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    return jax.lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x


def as_jax(array: Any) -> jax.Array:
    """Return an array of JAX as it is, and a copy of any other."""
    return array if isinstance(array, jax.Array) else owned(array)


def computing_dtype(dtype: Any) -> np.dtype:
    """Return the dtype that arrays of ``dtype`` are computed in: their own, but at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def real_dtype(dtype: Any) -> np.dtype:
    """Return the dtype of the real and imaginary parts of ``dtype``."""
    return jnp.finfo(dtype).dtype


def is_complex(x: Any) -> bool:
    """Whether an array, or its shape and dtype, is complex."""
    return bool(jnp.issubdtype(x.dtype, jnp.complexfloating))


def real_size(x: Any) -> int:
    """Return the number of real numbers in an array, or in its shape and dtype: two for a complex one."""
    return math.prod(np.shape(x)) * (2 if jnp.iscomplexobj(x) else 1)


def is_numeric(dtype: Any) -> bool:
    """Whether a dtype is numeric or boolean; knows the dtypes that NumPy lacks."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.number))


def view_as_real(x: jax.Array) -> jax.Array:
    """View a complex array as real pairs along a new last axis; return a real array as it is."""
    return jnp.stack([x.real, x.imag], axis=-1) if jnp.iscomplexobj(x) else x


def view_as_complex(x: jax.Array) -> jax.Array:
    """View real pairs as a complex array: the inverse of :func:`view_as_real` on complex arrays."""
    return jax.lax.complex(x[..., 0], x[..., 1])


def explicit_sharding(x: Any) -> NamedSharding | None:
    """Return the layout of an array, or of its shape, over the explicit axes of a mesh; None if it has none."""
    sharding: Any = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).sharding
    return sharding if any(axis is not None for axis in getattr(sharding, "spec", ())) else None


def whole(x: jax.Array) -> jax.Array:
    """Gather an array that is sharded over explicit axes: JAX refuses to choose the layout of products of such."""
    sharding = explicit_sharding(x)
    return x if sharding is None else jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def sharded_like(x: jax.Array, like: Any) -> jax.Array:
    """Shard an array over explicit axes as another one is."""
    sharding = explicit_sharding(like)
    return x if sharding is None else jax.reshard(x, sharding)


def with_replicated(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Evaluate ``function(x)`` for a function that mixes the axes of ``x``, whatever their explicit sharding.

    The array is gathered, ``function`` runs on every device, and the result is sharded as ``x`` was.
    """
    return sharded_like(function(whole(x)), x)
