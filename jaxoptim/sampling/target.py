"""The target of sampling: the loss of some parameters, which may come in a module, and its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import trees
from jaxoptim.core.batches import check_batch_size, size_of
from jaxoptim.core.foreign import ARRAYS_ALONE, check_not_trained_by_torch
from jaxoptim.core.loss import LossFunctions
from jaxoptim.core.modules import ModuleDef, Rest, check_not_inside, parts_of
from jaxoptim.core.numerics import as_jax, is_numeric, strong
from jaxoptim.core.precision import is_low, widened
from jaxoptim.core.signatures import mismatch
from jaxoptim.sampling.control_variates import Center, check_control_variates
from jaxoptim.sampling.data import check_data, compiled
from jaxoptim.sampling.microbatches import check_microbatches
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.streams import Stream, stream_of
from jaxoptim.sampling.swaps import Swaps


class Given(NamedTuple):
    """The arrays on the device that are the same for all chains and at every step.

    Attributes:
        data: a pytree of arrays, or batches (see :mod:`jaxoptim.sampling.streams`); None if there are no data.
        rest: the arrays of a module that are not sampled.
        probes: by name the data sets of observables; None if there are none.
        batch_key: the key from which the batches of all chains follow; None if each chain's follow from its own.
        held: the arrays that no chain moves, in a tree like the parameters; None if chains keep all.
        center: that of control variates which is the same for all chains; None if there is none.
        renewed_every: after how many steps each chain renews its own center; None if there is none.
        swaps: when chains at neighbouring temperatures swap their positions; None if they do not.
    """

    data: Any
    rest: Rest = Rest()
    probes: dict[str, Any] | None = None
    batch_key: jax.Array | None = None
    held: Any = None
    center: Center | None = None
    renewed_every: Any = None
    swaps: Swaps | None = None


class Target(NamedTuple):
    """The static part of the target, a key of the compiled program.

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
        """Return the value of the loss function at these arrays; its changes to a module are dropped."""
        params = self.params(arrays, rest)
        return self.loss_fn(params) if batch is None else self.loss_fn(params, batch)

    def loss(self, arrays: Any, rest: Rest, batch: Any) -> Any:
        """The loss at these arrays, in float32 at least: sums and differences of losses would lose more bits."""
        return widened(self.evaluated(arrays, rest, batch))


class Problem(NamedTuple):
    """The checked target of a run.

    Attributes:
        target: its static part.
        arrays: the tree of arrays where every chain begins, in float32 at least, None in the place of anything else.
        given: data, and the other arrays of a module.
        stream: from where batches come if not from data; None if there is none.
        num_starts: at how many points chains begin, where they do at several: ``arrays``, and the other arrays of a
            module, then have a first axis of them. None for one point.
    """

    target: Target
    arrays: Any
    given: Given
    stream: Stream | None = None
    num_starts: int | None = None

    def at_start(self, index: int) -> Problem:
        """The problem of one of several points."""
        if self.num_starts is None:
            return self
        arrays, rest = jax.tree.map(lambda x: x[index], (self.arrays, self.given.rest))
        return self._replace(arrays=arrays, given=self.given._replace(rest=rest), num_starts=None)

    @property
    def example(self) -> Any:
        """The data, or an example with the shapes of a batch."""
        return self.given.data if self.stream is None else self.stream.example

    def wholes(self) -> Iterator[Given]:
        """Yield all data; for a stream, the batches that stand for them, one after another."""
        if self.stream is None:
            return iter([self.given])
        return (self.given._replace(data=batch) for batch in self.stream.references())


def problem(loss_fn: Any, params: Any, data: Any, options: RunOptions, num_references: int = 1) -> Problem:
    """Check the inputs of a run, and return them with their arrays on the device.

    Args:
        loss_fn: the loss.
        params: where the chains begin.
        data: as :func:`jaxoptim.sampling.sample` takes them.
        options: the keywords.
        num_references: how many batches are to stand for all data where these cannot be counted.

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
    target, arrays, rest = _taken_apart(loss_fn, params)
    width = 1 if options.same_batches else options.num_chains
    stream = stream_of(data, options.reference_key, width, num_references, options.batch_size)
    if stream is None:
        if data is not None:
            check_data(data)
        check_batch_size(options.batch_size, data)
        check_microbatches(options.microbatches, options.batch_size, data)
    else:
        check_microbatches(options.microbatches, size_of(stream.example), stream.example)
    check_control_variates(options.control_variates, options.batch_size, data, stream is not None)
    _check_signature(loss_fn, data)
    data = stream.at_start if stream is not None else jax.tree.map(as_jax, data)
    probes = jax.tree.map(as_jax, dict(options.probes)) if options.probes else None
    found = Problem(target, arrays, Given(data, rest, probes), stream)
    _check_loss(found, options.size_at_once(found.example))
    return found


def with_starts(found: Problem, params: Mapping[Any, Any]) -> Problem:
    """The problem with chains that begin at other parameters, or at each of several.

    Args:
        found: the problem of parameters that are like them.
        params: by name parameters, each as :func:`problem` takes them.

    Raises:
        ``ValueError`` for parameters of another structure, or of other shapes; see :func:`problem` for what else. The
        messages have the name.
    """
    parts = []
    for name, one in params.items():
        try:
            target, *arrays = _taken_apart(found.target.loss_fn, one)
            _check_alike(found, target, *arrays)
        except (TypeError, ValueError) as error:
            raise type(error)(f"The checkpoint {name!r}: {error}") from error
        parts.append(arrays)
    if len(parts) == 1:
        return found._replace(arrays=parts[0][0], given=found.given._replace(rest=parts[0][1]))
    arrays, rest = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    return found._replace(arrays=arrays, given=found.given._replace(rest=rest), num_starts=len(parts))


def _taken_apart(loss_fn: Callable[..., Any], params: Any) -> tuple[Target, Any, Rest]:
    """Return the static part of the target, the sampled arrays, in float32 at least, and the rest of a module."""
    parts = parts_of(params)
    module, arrays, rest = (None, params, Rest()) if parts is None else parts
    _check_arrays(arrays)
    arrays = jax.tree.map(lambda x: strong(as_jax(x)), arrays)
    if not jax.tree.leaves(arrays):
        raise ValueError("params has no arrays. Give a pytree of the parameters where the chains begin.")
    dtypes = tuple(x.dtype for x in jax.tree.leaves(arrays))
    return Target(loss_fn, module, dtypes if any(map(is_low, dtypes)) else None), jax.tree.map(widened, arrays), rest


def _check_alike(like: Problem, target: Target, arrays: Any, rest: Rest) -> None:
    """Raise for parameters that are not of the structure and the shapes of those of a problem."""

    def shapes(tree: Any) -> list[Any]:
        return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]

    before: Any = jax.tree.structure((like.arrays, like.given.rest))
    if target.module != like.target.module or jax.tree.structure((arrays, rest)) != before:
        raise ValueError("It is another tree, or another module, than the first one.")
    there = [
        name
        for name, x in zip(trees.names(arrays), jax.tree.leaves(arrays, is_leaf=trees.is_leaf), strict=True)
        if x is not None
    ]
    for name, x, y in zip(there, *map(jax.tree.leaves, (like.arrays, arrays)), strict=True):
        if x.shape != y.shape:
            raise ValueError(f"{name!r} has shape {y.shape}, but that of the first one {x.shape}.")
    if target.dtypes != like.target.dtypes or shapes((arrays, rest)) != shapes((like.arrays, like.given.rest)):
        raise ValueError("Its arrays have other shapes or dtypes than those of the first one.")


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
    """Raise for a loss that cannot be called with its arguments."""
    if hasattr(type(loss_fn), "named_parameters"):
        raise TypeError("loss_fn is a module of torch, but the loss is a JAX function. Write it with jax.numpy.")
    call, because = ("loss_fn(params)", "no data") if data is None else ("loss_fn(params, batch)", "data")
    if (error := mismatch(loss_fn, 1 if data is None else 2)) is not None:
        remedy = (
            "Give data, or take no batch." if data is None else "Take the batch, a tree like data, as one argument."
        )
        raise TypeError(
            f"As there are {because}, the loss is called as {call}, but its signature is another: {error}. {remedy}"
        )


def _check_loss(found: Problem, batch_size: int | None) -> None:
    """Raise for a loss that is no real scalar."""
    size = slice(None, batch_size)
    batch = jax.tree.map(lambda x: jax.eval_shape(lambda x: x[size], x), found.example)

    def checked(*args: Any) -> Any:
        loss = found.target.evaluated(*args)
        _check_scalar(loss)  # here, because JAX has messages of its own about what leaves a trace
        return loss

    with compiled("loss_fn"):
        jax.eval_shape(checked, found.arrays, found.given.rest, batch)


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
