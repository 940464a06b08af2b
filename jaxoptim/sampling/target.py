"""What is sampled: the loss of some parameters, which may come in a module, and its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxoptim.core import trees
from jaxoptim.core.batches import check_batch_size, size_of
from jaxoptim.core.loss import LossFunctions
from jaxoptim.core.modules import ARRAYS_ALONE, ModuleDef, Rest, check_not_inside, parts_of
from jaxoptim.core.numerics import as_jax, strong
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
    """

    data: Any
    rest: Rest = Rest()
    probes: dict[str, Any] | None = None
    batch_key: jax.Array | None = None


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
        raise TypeError(f"loss_fn is a function of the parameters, but got {type(loss_fn).__name__}.")
    LossFunctions("sample", "sample(loss_fn, params, sampler, data, ...)").check(loss_fn)
    parts = parts_of(params)
    module, arrays, rest = (None, params, Rest()) if parts is None else parts
    _check_arrays(arrays)
    arrays = jax.tree.map(lambda x: strong(as_jax(x)), arrays)
    if not jax.tree.leaves(arrays):
        raise ValueError("params has no arrays. Give a pytree of the parameters where the chains begin.")
    if data is not None:
        size_of(data)
    check_batch_size(options.batch_size, data)
    check_microbatches(options.microbatches, options.batch_size, data)
    data, probes = jax.tree.map(as_jax, (data, dict(options.probes) if options.probes else None))
    dtypes = tuple(x.dtype for x in jax.tree.leaves(arrays))
    target = Target(loss_fn, module, dtypes if any(map(is_low, dtypes)) else None)
    found = Problem(target, jax.tree.map(widened, arrays), Given(data, rest, probes))
    _check_loss(found, options.size_at_once(data))
    return found


def _check_arrays(arrays: Any) -> None:
    """Raise for a leaf that cannot be sampled."""
    check_not_inside(arrays)
    for name, leaf in zip(trees.names(arrays), jax.tree.leaves(arrays, is_leaf=trees.is_leaf), strict=True):
        if leaf is None:
            continue
        if not isinstance(leaf, int | float | complex) and not hasattr(leaf, "__array__"):
            kind = type(leaf).__name__
            raise TypeError(f"params is one module or a tree of arrays, but {name!r} is a {kind}. {ARRAYS_ALONE}")
        trees.check_array("parameter", name, leaf)


def _check_loss(found: Problem, batch_size: int | None) -> None:
    """Raise for a loss that is no real scalar."""
    size = slice(None, batch_size)
    batch = jax.tree.map(lambda x: jax.eval_shape(lambda x: x[size], x), found.given.data)
    loss = jax.eval_shape(found.target.evaluated, found.arrays, found.given.rest, batch)
    is_array = isinstance(loss, jax.ShapeDtypeStruct)
    if not is_array or loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        given = f"shape {loss.shape} and dtype {loss.dtype}" if is_array else type(loss).__name__
        raise TypeError(f"The loss is a real scalar, the mean over the batch, but loss_fn returned {given}.")
