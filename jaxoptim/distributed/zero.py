"""ZeRO: optimizer state partitioned over the devices of a data axis."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxoptim.core import trees
from jaxoptim.core.spreading import known_shardings
from jaxoptim.distributed.layouts import (
    Axes,
    Held,
    Placed,
    as_transformation,
    check_axes,
    is_along,
    laid_out,
    sharding_on,
    spread,
    state_specs,
    warn_of_whole,
    without_shardings,
)

_is_asked: contextvars.ContextVar[bool] = contextvars.ContextVar("_is_asked", default=False)
"""Whether the shardings of a state are being computed, which an ``init`` inside another one cannot provide."""


def zero(
    optimizer: Any, mesh: Mesh, axis: str | tuple[str, ...], specs: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Partition the state of a transformation over the devices of a data axis: ZeRO, stages 1 and 2.

    Device :math:`i` of :math:`n` reduces part :math:`i` of the gradient, and has that part of the moments; the updates
    are gathered:

    .. math::
        g^{(i)} = \frac{1}{n} \sum_{r=1}^{n} g_r^{(i)}, \qquad
        u^{(i)}, s^{(i)} = \mathrm{update}(g^{(i)}, s^{(i)}, \theta^{(i)}), \qquad
        u = (u^{(1)}, \dots, u^{(n)})

    State takes :math:`1/n` of the memory, moments and the float32 values of ``with_precision(master_weights=True)``
    alike, and no more is sent than to reduce whole gradients. The numbers are those of the run on one device, to
    rounding. The compiler does it all, from constraints on the layout of the arrays: compute the gradient of the mean
    loss over a batch that is sharded along ``axis``, and leave the reduction to it.

    Parameters that are sharded along ``axis`` already are so in all of this (FSDP, ZeRO stage 3): say so in ``specs``.
    Give the whole of a chain to this function, ``zero(optax.chain(...), ...)``, so that the constraint on the gradient
    comes first.

    Args:
        optimizer: a rule, a transformation, also of optax, or a Pyro-style optimizer.
        mesh: the mesh that the parameters are placed on.
        axis: the name of the data axis, or several. Of each parameter the longest dimension that it divides is cut.
        specs: the ``PartitionSpec`` of each parameter: a tree like them, or a prefix of one (default None: whole on
            every device; with explicit axes, as they are).

    Returns:
        A transformation with the state of ``optimizer``, which ``init`` and ``update`` place, jitted or not.

    Raises:
        ``ValueError`` for an axis that the mesh lacks, and from ``init`` for a parameter that is not sharded as
        ``specs`` says. ``init`` warns once of all arrays of which the axis divides no dimension: their state is whole
        on every device.

    References:
        Rajbhandari, Rasley, Ruwase, He, ZeRO: memory optimizations toward training trillion parameter models, SC 2020.
        Xu et al., Automatic cross-replica sharding of weight update in data-parallel training, 2020.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxoptim, optax
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
        >>> params = jax.device_put({"w": jnp.ones((8, 2))}, NamedSharding(mesh, PartitionSpec()))
        >>> tx = jaxoptim.distributed.zero(jaxoptim.adam(lr=0.1), mesh, "data")
        >>> state = tx.init(params)
        >>> state.slots["exp_avg"]["w"].sharding.spec[0]
        'data'
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = tx.update(jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params), state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> params, state = step(params, state)
        >>> round(float(params["w"][0, 0]), 6), params["w"].is_fully_replicated
        (0.9, True)
    """
    inner, axes = as_transformation(optimizer), check_axes("zero", mesh, axis)
    layout = SpreadInit(inner, mesh, axes, specs)

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        like = grads if params is None else params
        held = layout.held(like)
        parts = layout.parts(held)
        grads = laid_out(grads, layout.placed(parts))
        params = None if params is None else laid_out(params, layout.placed(parts))
        with known_shardings(layout.named(parts)):
            updates, state = inner.update(grads, state, params, **extra)
        return laid_out(updates, layout.placed(held)), layout.state_laid_out(state, like, parts)

    return optax.GradientTransformationExtraArgs(layout, update)


class SpreadInit:
    """The ``init`` of :func:`zero`, which also knows the shardings.

    Args:
        inner: the transformation.
        mesh: the mesh.
        axes: the data axes.
        specs: the layouts of the parameters.
    """

    def __init__(self, inner: optax.GradientTransformationExtraArgs, mesh: Mesh, axes: Axes, specs: Any) -> None:
        self.inner, self.mesh, self.axes, self.specs = inner, mesh, axes, specs

    def __call__(self, params: Any) -> Any:
        """Initialize the state, in parts."""
        if _is_asked.get():
            raise ValueError(
                "The shardings of a state are known for zero(...) as a whole, but here it stands inside another "
                "transformation. Give the whole to it: zero(optax.chain(...), mesh, axis)."
            )
        shardings = self.shardings(params)
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
            return laid_out(self.inner.init(params), jax.tree.leaves(shardings, is_leaf=trees.is_leaf))
        return jax.jit(self.inner.init, out_shardings=shardings)(params)

    def held(self, params: Any) -> list[Placed | None]:
        """Return the layouts of the parameters; raise for one that is not sharded as ``specs`` says."""
        leaves = jax.tree.leaves(params, is_leaf=trees.is_leaf)
        given: list[Any] = [None] * len(leaves)
        if self.specs is not None:
            given = trees.spread(
                self.specs, params, "specs", is_part=lambda x: x is None or isinstance(x, PartitionSpec)
            )
        named = zip(trees.names(params), leaves, given, strict=True)
        return [None if x is None else self._held(name, x, spec) for name, x, spec in named]

    def _held(self, name: str, x: Any, spec: PartitionSpec | None) -> Placed:
        its: Any = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
        if spec is None and AxisType.Explicit in self.mesh.axis_types and hasattr(its, "spec"):
            spec = its.spec
        spec = PartitionSpec() if spec is None else spec
        is_known = isinstance(its, NamedSharding) and not isinstance(x, jax.core.Tracer)
        if is_known and not its.is_equivalent_to(NamedSharding(self.mesh, spec), len(x.shape)):
            raise ValueError(
                f"zero was told that {name!r} is sharded as {spec}, but it is sharded as {its.spec}. In a compiled "
                "function only you know: give specs=jax.tree.map(lambda x: x.sharding.spec, params), and its mesh."
            )
        return Placed(name, tuple(x.shape), spec)

    def parts(self, held: Sequence[Placed | None]) -> list[Placed | None]:
        """Return the layouts of arrays partitioned over the data axes."""
        return [None if its is None else its._replace(spec=spread(its, self.mesh, self.axes)) for its in held]

    def named(self, arrays: Sequence[Placed | None]) -> dict[str, NamedSharding]:
        """Return the shardings of parameters by name."""
        pairs = zip(arrays, self.placed(arrays), strict=True)
        return {its.name: sharding for its, sharding in pairs if its is not None and sharding is not None}

    def placed(self, arrays: Sequence[Placed | Held | None]) -> list[NamedSharding | None]:
        """Return the shardings of arrays."""
        return [None if its is None else sharding_on(self.mesh, its.spec, len(its.shape)) for its in arrays]

    def shardings(self, params: Any) -> Any:
        """Return the shardings of the state; warn of arrays that are not in parts."""
        with asking():
            state = jax.eval_shape(lambda params: self.inner.init(params), without_shardings(params))
        parts = self.parts(self.held(params))
        found = self._specs(state, params, parts)
        cut = {its.name for its in parts if its is not None and is_along(its.spec, self.axes)}
        whole: dict[str, tuple[tuple[int, ...], int]] = {}
        leaves, treedef = jax.tree.flatten(state, is_leaf=trees.is_leaf)
        for x, its in zip(leaves, found, strict=True):
            if its is not None and its.shape and its.name not in cut and not is_along(its.spec, self.axes):
                size = math.prod(its.shape) * x.dtype.itemsize
                whole[its.name] = its.shape, whole.get(its.name, ((), 0))[1] + size
        warn_of_whole("zero", self.mesh, self.axes, whole, 3)
        return jax.tree.unflatten(treedef, self.placed(found))

    def state_laid_out(self, state: Any, params: Any, parts: Sequence[Placed | None]) -> Any:
        """Constrain a state to be in parts."""
        return laid_out(state, self.placed(self._specs(state, params, parts)))

    def _specs(self, state: Any, params: Any, parts: Sequence[Placed | None]) -> list[Held | None]:
        """Return the layouts of the arrays of a state; those that belong to no parameter are in parts too."""
        found = state_specs(state, params, parts)
        return [
            its if its is None or its.is_owned else its._replace(spec=spread(its, self.mesh, self.axes))
            for its in found
        ]


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Mark a block in which an ``init`` is called only for the shapes of its state."""
    token = _is_asked.set(True)
    try:
        yield
    finally:
        _is_asked.reset(token)
