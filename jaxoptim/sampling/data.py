"""Checks of data and of the functions that take them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from jaxoptim.core import trees
from jaxoptim.core.batches import size_of
from jaxoptim.core.foreign import is_tensor
from jaxoptim.core.numerics import is_numeric


def check_data(data: Any, what: str = "data") -> None:
    """Raise for anything but a pytree of arrays whose first axes have the same length."""
    # Iterators are leaves only if one says so.
    leaves = jax.tree_util.tree_leaves_with_path(data, is_leaf=lambda x: trees.is_leaf(x) or hasattr(x, "__next__"))
    for path, leaf in leaves:
        name, kind = jax.tree_util.keystr(path, simple=True, separator="."), type(leaf).__name__
        where = f"{what}: {name!r}" if path else what
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        is_array = shape is not None and (hasattr(leaf, "__array__") or isinstance(leaf, jax.Array))
        if not is_array and not isinstance(leaf, str | bytes | type) and _is_collection(leaf):
            raise TypeError(f"{where} is a {kind}, but {_remedy(leaf)}")
        if not is_array or shape is None or len(shape) == 0:
            given = "a scalar" if is_array else "None" if leaf is None else f"a {kind}"
            raise TypeError(
                f"{where} is {given}, but {what} is a pytree of arrays whose first axes run over the data. Give "
                "arrays, such as np.asarray of a list, and leave out what is none."
            )
        if not isinstance(leaf, jax.Array) and not is_tensor(leaf) and not is_numeric(dtype):
            raise TypeError(f"{where} has dtype {dtype}, but data are arrays of numbers. Encode it, or leave it out.")
    if size_of(data, what) == 0:
        raise ValueError(f"{what} has arrays of length 0. Give at least one datum.")


def _is_collection(x: Any) -> bool:
    """Return whether an object iterates over data or their batches."""
    return isinstance(x, Iterable) or (hasattr(x, "__getitem__") and hasattr(x, "__len__"))


def _remedy(x: Any) -> str:
    """Return advice for a message: what to pass instead of a collection among arrays."""
    if hasattr(x, "__getitem__"):  # a set of data gives its examples one by one
        return (
            "that gives examples one by one, not batches. Give a loader that makes batches of it, or collect its "
            "examples: jax.tree.map(lambda *x: np.stack(x), *data)."
        )
    return "data are arrays, or one iterable of batches, each a tree of arrays. Zip iterables into one: zip(x, y)."


@contextlib.contextmanager
def compiled(what: str) -> Iterator[None]:
    """Replace the error of a function that cannot be traced by a ``TypeError`` that explains it."""
    try:
        yield
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise TypeError(
            f"{what} is compiled, but needs the value of an array while it is traced: it calls float(), NumPy or "
            "torch, or branches on a value. Write it with jax.numpy."
        ) from error
