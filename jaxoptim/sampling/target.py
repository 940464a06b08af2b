"""What is sampled: the loss of some parameters, which may come in a module, and its data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import trees
from jaxoptim.core.batches import check_batch_size, size_of
from jaxoptim.core.foreign import check_not_trained_by_torch, is_tensor
from jaxoptim.core.loss import LossFunctions
from jaxoptim.core.modules import ARRAYS_ALONE, ModuleDef, Rest, check_not_inside, parts_of
from jaxoptim.core.numerics import as_jax, is_numeric, strong
from jaxoptim.core.precision import is_low, widened
from jaxoptim.sampling.microbatches import check_microbatches
from jaxoptim.sampling.options import RunOptions


class Given(NamedTuple):
    """What is the same for all chains and at every step, on the device.

    Attributes:
        data: a pytree of arrays, None if there are no data.
        rest: the arrays of a module that are not sampled.
        probes: by name the data sets of observables; None if there are none.
        batch_key: the key from which the batches of all chains follow; None if each chain's follow from its own.
        held: the arrays that no chain moves, in a tree like the parameters; None if chains keep all.
    """

    data: Any
    rest: Rest = Rest()
    probes: dict[str, Any] | None = None
    batch_key: jax.Array | None = None
    held: Any = None


class Target(NamedTuple):
    """The static part of what is sampled, which names a compiled program.

    Attributes:
        loss_fn: ``loss_fn(params)``, or ``loss_fn(params, batch)`` where there are data.
        module: the module that the parameters came in, None for a plain tree.
        dtypes: of the arrays as they were given, where chains keep some of them in float32; None where they keep none.
    """

    loss_fn: Callable[..., Any]
    module: ModuleDef | None = None
    dtypes: tuple[Any, ...] | None = None

    def params(self, arrays: Any, rest: Rest) -> Any:
        """The parameters as they were given, with these arrays in their dtypes; a module is a new one each time."""
        arrays = self.as_given(arrays)
        return arrays if self.module is None else self.module.joined(arrays, rest)

    def as_given(self, arrays: Any) -> Any:
        """Positions of chains in the dtypes of the parameters."""
        if self.dtypes is None:
            return arrays
        leaves, treedef = jax.tree.flatten(arrays)
        return jax.tree.unflatten(treedef, [x.astype(dtype) for x, dtype in zip(leaves, self.dtypes, strict=True)])

    def evaluated(self, arrays: Any, rest: Rest, batch: Any) -> Any:
        """What the loss function returns at these arrays; what it changes in a module is dropped."""
        params = self.params(arrays, rest)
        return self.loss_fn(params) if batch is None else self.loss_fn(params, batch)

    def loss(self, arrays: Any, rest: Rest, batch: Any) -> Any:
        """The loss at these arrays, in float32 at least: sums and differences of losses would lose more bits."""
        return widened(self.evaluated(arrays, rest, batch))


class Problem(NamedTuple):
    """What a run samples, checked.

    Attributes:
        target: its static part.
        arrays: the tree of arrays where every chain begins, in float32 at least, None in the place of anything else.
        given: data, and the other arrays of a module.
    """

    target: Target
    arrays: Any
    given: Given


def problem(loss_fn: Any, params: Any, data: Any, options: RunOptions) -> Problem:
    """Check what a run is given, with its arrays on the device.

    Raises:
        ``TypeError`` for what is no function, no array, and for a loss that is not a real scalar; ``ValueError`` for
        no parameters, data of different lengths, and a batch that cannot be taken from them.
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn is a function of the parameters, but got {type(loss_fn).__name__}. Give loss_fn(params, batch), "
            "or loss_fn(params) without data."
        )
    LossFunctions("sample", "sample(loss_fn, params, sampler, data, ...)").check(loss_fn)
    parts = parts_of(params)
    module, arrays, rest = (None, params, Rest()) if parts is None else parts
    _check_arrays(arrays)
    arrays = jax.tree.map(lambda x: strong(as_jax(x)), arrays)
    if not jax.tree.leaves(arrays):
        raise ValueError("params has no arrays. Give a pytree of the parameters where the chains begin.")
    _check_data(data)
    check_batch_size(options.batch_size, data)
    check_microbatches(options.microbatches, options.batch_size, data)
    _check_signature(loss_fn, data)
    data, probes = jax.tree.map(as_jax, (data, dict(options.probes) if options.probes else None))
    dtypes = tuple(x.dtype for x in jax.tree.leaves(arrays))
    target = Target(loss_fn, module, dtypes if any(map(is_low, dtypes)) else None)
    found = Problem(target, jax.tree.map(widened, arrays), Given(data, rest, probes))
    _check_loss(found, options.size_at_once(data))
    return found


def _check_arrays(arrays: Any) -> None:
    """Raise for a leaf that cannot be sampled."""
    check_not_trained_by_torch("params", arrays)
    if hasattr(arrays, "__next__"):
        raise TypeError(
            f"params is a tree of arrays, but got a {type(arrays).__name__}. Give a dict or a list of arrays."
        )
    check_not_inside(arrays)
    for name, leaf in zip(trees.names(arrays), jax.tree.leaves(arrays, is_leaf=trees.is_leaf), strict=True):
        if leaf is None:
            continue
        check_not_trained_by_torch(repr(name), leaf)
        if not isinstance(leaf, int | float | complex) and not hasattr(leaf, "__array__"):
            kind = type(leaf).__name__
            raise TypeError(f"params is one module or a tree of arrays, but {name!r} is a {kind}. {ARRAYS_ALONE}")
        if isinstance(leaf, np.ndarray | np.generic) and not is_numeric(leaf.dtype):
            raise TypeError(f"The parameter {name!r} has dtype {leaf.dtype}. Floating and complex arrays are sampled.")
        trees.check_array("parameter", name, leaf)


def _check_signature(loss_fn: Callable[..., Any], data: Any) -> None:
    """Raise for a loss that cannot be called with what it is given."""
    if hasattr(type(loss_fn), "named_parameters"):
        raise TypeError("loss_fn is a module of torch, but the loss is a JAX function. Write it with jax.numpy.")
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):
        return  # which some callables do not tell
    call, because = ("loss_fn(params)", "no data") if data is None else ("loss_fn(params, batch)", "data")
    try:
        signature.bind(*[None] * (1 if data is None else 2))
    except TypeError as error:
        remedy = (
            "Give data, or take no batch." if data is None else "Take the batch, a tree like data, as one argument."
        )
        raise TypeError(
            f"As there are {because}, the loss is called as {call}, but its signature is another: {error}. {remedy}"
        ) from None


def _check_data(data: Any) -> None:
    """Raise for what is no tree of arrays with one length of their first axes."""
    if data is None:
        return
    # Iterators are leaves only if one says so.
    leaves = jax.tree_util.tree_leaves_with_path(data, is_leaf=lambda x: trees.is_leaf(x) or hasattr(x, "__next__"))
    for path, leaf in leaves:
        name, kind = jax.tree_util.keystr(path, simple=True, separator="."), type(leaf).__name__
        what = f"data: {name!r}" if path else "data"
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        is_array = shape is not None and (hasattr(leaf, "__array__") or isinstance(leaf, jax.Array))
        if not is_array and not isinstance(leaf, str | bytes | type) and _is_collection(leaf):
            # A set of data gives its examples one by one, what iterates over them gives batches.
            join = "stack" if hasattr(leaf, "__getitem__") else "concatenate"
            of_an_epoch = "its examples" if join == "stack" else "the batches of one epoch"
            raise TypeError(
                f"{what} is a {kind}, but data are arrays, of which batch_size= makes batches on the device. Collect "
                f"{of_an_epoch}: jax.tree.map(lambda *x: np.{join}(x), *data). Data that do not fit in memory are not "
                "supported yet."
            )
        if not is_array or shape is None or len(shape) == 0:
            given = "a scalar" if is_array else "None" if leaf is None else f"a {kind}"
            raise TypeError(
                f"{what} is {given}, but data is a pytree of arrays whose first axes run over the data. Give arrays, "
                "such as np.asarray of a list, and leave out what is none."
            )
        if not isinstance(leaf, jax.Array) and not is_tensor(leaf) and not is_numeric(dtype):
            raise TypeError(f"{what} has dtype {dtype}, but data are arrays of numbers. Encode it, or leave it out.")
    if size_of(data) == 0:
        raise ValueError("data has arrays of length 0. Give at least one datum.")


def _is_collection(x: Any) -> bool:
    """Whether something iterates over data or their batches."""
    return isinstance(x, Iterable) or (hasattr(x, "__getitem__") and hasattr(x, "__len__"))


def _check_loss(found: Problem, batch_size: int | None) -> None:
    """Raise for a loss that is no real scalar."""
    size = slice(None, batch_size)
    batch = jax.tree.map(lambda x: jax.eval_shape(lambda x: x[size], x), found.given.data)

    def checked(*args: Any) -> Any:
        loss = found.target.evaluated(*args)
        _check_scalar(loss)  # here, because JAX has messages of its own about what leaves a trace
        return loss

    try:
        jax.eval_shape(checked, found.arrays, found.given.rest, batch)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise TypeError(
            "loss_fn is compiled, but needs the value of an array while it is traced: it calls float(), NumPy or "
            "torch, or branches on a value. Write it with jax.numpy."
        ) from error


def _check_scalar(loss: Any) -> None:
    """Raise for a loss that is no real scalar."""
    if isinstance(loss, tuple | list):
        raise TypeError(
            f"The loss is a real scalar, but loss_fn returned a {type(loss).__name__} of {len(loss)}. Return the mean "
            "loss alone, without auxiliary output: lambda *args: loss_fn(*args)[0]; observables= records other values."
        )
    is_array = isinstance(loss, jax.Array | np.ndarray | np.generic | int | float | complex)
    shape, dtype = (jnp.shape(loss), jnp.result_type(loss)) if is_array else (None, np.dtype(object))
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        given = f"shape {shape} and dtype {dtype}" if is_array else f"a {type(loss).__name__}"
        raise TypeError(
            f"The loss is a real scalar, the mean over the batch, but loss_fn returned {given}. Return the mean loss "
            "alone."
        )
