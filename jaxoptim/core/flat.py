"""A whole tree as one real vector, for optimizers that see all parameters at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO

from jaxoptim.core import sparse, trees
from jaxoptim.core.numerics import (
    computing_dtype,
    is_complex,
    real_dtype,
    real_size,
    sharded_like,
    view_as_complex,
    view_as_real,
    whole,
)
from jaxoptim.core.packing import Packed, join, split


def flatten(tree: Any) -> jax.Array:
    """Flatten a pytree into one real vector, leaf after leaf.

    Complex numbers stand as pairs, real part first. None leaves take no place.

    Args:
        tree: a pytree of floating or complex arrays, or a :class:`Packed`.

    Returns:
        A vector in the dtype that all leaves promote to, float32 at least.

    Raises:
        ``TypeError`` that names the parameter which is not floating or complex.

    Examples:
        >>> import jax.numpy as jnp
        >>> flatten({"w": jnp.array([1 + 2j]), "x": None, "y": jnp.zeros(2)}).tolist()
        [1.0, 2.0, 0.0, 0.0]
    """
    leaves = zip(trees.names(tree), jax.tree.leaves(tree, is_leaf=trees.is_leaf), strict=True)
    return _joined([trees.check_array("parameter", name, leaf) for name, leaf in leaves if leaf is not None])


def flatten_like(tree: Any, like: Any, what: str = "grads") -> jax.Array:
    """Flatten a pytree of gradients with the layout and dtype that :func:`flatten` gives the parameters.

    Args:
        tree: a tree like ``like``. None counts as zeros; a sparse array (``BCOO``) is made dense.
        like: the parameters.
        what: the name of ``tree`` in messages.

    Returns:
        A vector as long as ``flatten(like)``.

    Raises:
        ``ValueError`` for another structure or shape than that of ``like``, ``TypeError`` for an array that
        is not floating, or complex where the parameter is real (or the reverse). Each names the parameter.

    Examples:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones(2), "x": jnp.ones(1)}
        >>> flatten_like({"w": jnp.array([3.0, 4.0]), "x": None}, params).tolist()
        [3.0, 4.0, 0.0]
    """
    if isinstance(like, Packed) and not isinstance(tree, Packed):
        tree = like.pack(tree, what)
    arrays = []
    places = zip(trees.names(like), jax.tree.leaves(like, is_leaf=trees.is_leaf), strict=True)
    for (name, param), leaf in zip(places, trees.leaves_like(tree, like, what), strict=True):
        if param is not None:
            arrays.append(_fitting(leaf, name, trees.check_array("parameter", name, param), what))
    dtype = _flat_dtype([leaf for leaf in jax.tree.leaves(like, is_leaf=trees.is_leaf) if leaf is not None])
    return _joined(arrays).astype(dtype)


def unflatten(vector: jax.Array, like: Any) -> Any:
    """Rebuild a pytree from a vector: the inverse of :func:`flatten`.

    Its transpose is a concatenation, so gradients through it are cheap.

    Args:
        vector: as many numbers as :func:`flatten` makes of ``like``.
        like: a tree of arrays, or of their shapes and dtypes.

    Returns:
        A tree of the structure, shapes and dtypes of ``like``.

    Raises:
        ``ValueError`` if the number of elements differs.

    Examples:
        >>> import jax.numpy as jnp
        >>> unflatten(jnp.array([1.0, 2.0, 3.0]), (jnp.zeros(1, complex), None, jnp.zeros(1)))
        (Array([1.+2.j], dtype=complex64), None, Array([3.], dtype=float32))
    """
    leaves, treedef = jax.tree.flatten(like, is_leaf=trees.is_leaf)
    arrays = [jnp.asarray(x) if not hasattr(x, "dtype") else x for x in leaves if x is not None]
    sizes = list(map(real_size, arrays))
    if vector.shape != (sum(sizes),):
        raise ValueError(f"The vector has shape {vector.shape}, but the tree holds {sum(sizes)} real numbers.")
    parts = iter(zip(arrays, split(vector, sizes) if sizes else [], strict=True))
    return jax.tree.unflatten(treedef, [None if leaf is None else _placed(*next(parts)) for leaf in leaves])


def _placed(like: Any, part: jax.Array) -> jax.Array:
    """Build one array of the pytree from its part of the vector."""
    if is_complex(like):
        pairs = part.astype(real_dtype(like.dtype)).reshape((*like.shape, 2))
        return sharded_like(view_as_complex(pairs), like)
    return sharded_like(part.astype(like.dtype).reshape(like.shape), like)


def _fitting(leaf: Any, name: str, param: Any, what: str) -> Any:
    """Return a gradient as a dense array, after checking that it fits its parameter."""
    if leaf is None:
        return jnp.zeros(param.shape, param.dtype)
    leaf = sparse.to_dense(leaf) if isinstance(leaf, BCOO) else trees.check_array(f"leaf of {what}", name, leaf)
    trees.check_shape(f"leaf of {what}", name, leaf, param)
    if is_complex(leaf) != is_complex(param):
        raise TypeError(
            f"The leaf of {what} {name!r} has dtype {leaf.dtype}, but the parameter has {param.dtype}. "
            "Both must be real, or both complex."
        )
    return leaf


def _joined(arrays: list[Any]) -> jax.Array:
    dtype = _flat_dtype(arrays)
    return join([view_as_real(whole(x)).reshape(-1).astype(dtype) for x in arrays]) if arrays else jnp.zeros(0, dtype)


def _flat_dtype(arrays: list[Any]) -> Any:
    """Return the real dtype that all of ``arrays`` promote to."""
    if not arrays:
        return real_dtype(computing_dtype(jnp.float32))
    return real_dtype(computing_dtype(jnp.result_type(*(x.dtype for x in arrays))))
