"""Data-parallel steps: gradients are reduced over devices and processes first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxoptim.core.flat import flatten, unflatten
from jaxoptim.core.numerics import computing_dtype
from jaxoptim.core.shown import shown
from jaxoptim.distributed.reduction import Op, reduced
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.optim.foreign import WRAPPER, refuse_foreign
from jaxoptim.pyro.optim.lr_scheduler import PyroLRScheduler
from jaxoptim.pyro.optim.optim import PyroOptim

OPS: dict[str, Op] = {"average": "mean", "sum": "sum", "adasum": "adasum"}
"""Horovod's names of how gradients are reduced, and ours."""


class HorovodOptimizer(PyroOptim):
    r"""A :class:`PyroOptim` whose gradients are averaged over replicas: ``pyro.optim.HorovodOptimizer``.

    .. math::
        \bar g = \frac{1}{R} \sum_{r=1}^{R} g_r, \qquad
        \theta, s \leftarrow \mathrm{step}(\theta, \mathrm{clip}(\bar g), s)

    The collectives are JAX's own; Horovod is not needed. Replicas are

    - the processes of ``jax.distributed``: each calls with its own gradients of the same parameters, and all get the
      same result, bit for bit, if they began with the same values. A parameter without a gradient in some processes
      has zero there; without any, it is not updated.
    - devices: a gradient given to :meth:`update` may have one more leading axis, a gradient for each replica, such as
      an array that is sharded over the devices along it.
    - in compiled functions, the devices along ``axis_name`` of a ``jax.shard_map`` (or the axis of a ``jax.vmap``):
      ``jaxoptim.transformation(optimizer)`` has :func:`jaxoptim.distributed.all_reduce` in front.

    Gradients are reduced first and clipped then, so that all replicas clip alike.

    Args:
        pyro_optim: what makes the steps; its options and clipping are taken over, its state is not.
        op: ``"average"`` (default), ``"sum"``, or ``"adasum"`` of 2, 4, 8, ... replicas; see
            :func:`jaxoptim.distributed.all_reduce`.
        axis_name: the axis for use in compiled functions (default None).

    Raises:
        ``TypeError`` for anything but a :class:`PyroOptim` without schedule; ``ValueError`` for another ``op``.

    References:
        Sergeev, Del Balso, Horovod: fast and easy distributed deep learning in TensorFlow, 2018.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.pyro import optim
        >>> optimizer = optim.HorovodOptimizer(optim.SGD({"lr": 0.5}))
        >>> of_each_device = jnp.array([1.0, 3.0])
        >>> float(optimizer.update({"loc": jnp.array(1.0)}, {"loc": of_each_device})["loc"])
        0.0
    """

    def __init__(
        self, pyro_optim: PyroOptim, *, op: Literal["average", "sum", "adasum"] = "average", axis_name: Any = None
    ) -> None:
        refuse_foreign("The optimizer", pyro_optim, WRAPPER)
        if not isinstance(pyro_optim, PyroOptim) or isinstance(pyro_optim, PyroLRScheduler):
            raise TypeError(f"Expected a PyroOptim object without a schedule but got a {type(pyro_optim).__name__}.")
        if op not in OPS:
            raise ValueError(f"Invalid op: {shown(op)}. HorovodOptimizer takes {', '.join(map(repr, OPS))}.")
        super().__init__(pyro_optim.pt_optim_constructor, pyro_optim.pt_optim_args, pyro_optim.pt_clip_args)
        self.op, self.axis_name = op, axis_name

    def _reduced(self, params: list[Parameter], grads: list[Any]) -> list[Any]:
        """The gradients of all replicas as one."""
        stacked = {
            index: grad
            for index, (param, grad) in enumerate(zip(params, grads, strict=True))
            if grad is not None and jnp.ndim(grad) == len(param.shape) + 1
        }
        if len({len(grad) for grad in stacked.values()}) > 1:
            raise ValueError("The gradients of the replicas have leading axes of different lengths.")
        reduced = _over_devices(stacked, self.op) if stacked else {}
        own = [reduced.get(index, grad) for index, grad in enumerate(grads)]
        return own if jax.process_count() == 1 else self._over_processes(params, own)

    def _over_processes(self, params: Sequence[Parameter], grads: Sequence[Any]) -> list[Any]:
        """The gradients of all processes, in one collective, which all of them make in the order of the names."""
        order = sorted(range(len(params)), key=lambda index: str(params[index].name))
        present = np.array([grads[index] is not None for index in order], np.float32)
        own = [jnp.zeros_like(params[index].value) if grads[index] is None else grads[index] for index in order]
        like = [jax.ShapeDtypeStruct(grad.shape, grad.dtype) for grad in own]
        reduced, counts = _reduce_of_processes(tuple(like), self.op)(
            _of_processes(jnp.concatenate([flatten(own), present]))
        )
        result: list[Any] = [None] * len(params)
        for index, grad, count in zip(order, reduced, np.asarray(counts.addressable_data(0)), strict=True):
            result[index] = grad.addressable_data(0) if count else None
        return result

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"op": self.op, "axis_name": self.axis_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.op, self.axis_name = state["op"], state["axis_name"]


def _stacked(grads: Any, op: str) -> Any:
    """Gradients of replicas, which stand along a leading axis, as one; sharded along it, this is an all-reduce."""
    return jax.vmap(lambda own: reduced(own, "replicas", OPS[op]), axis_name="replicas", out_axes=None)(grads)


_over_devices = jax.jit(_stacked, static_argnames="op")


def _of_processes(vector: jax.Array) -> jax.Array:
    """The vectors of all processes as one array, a row on a device of each."""
    return jax.make_array_from_single_device_arrays(
        (jax.process_count(), *vector.shape),
        NamedSharding(_mesh(), PartitionSpec("processes")),
        [jax.device_put(vector[None], _mesh().local_devices[0])],
    )


@functools.cache
def _mesh() -> Mesh:
    devices = {device.process_index: device for device in reversed(jax.devices())}
    return Mesh(np.array([devices[process] for process in sorted(devices)]), ("processes",))


@functools.cache
def _reduce_of_processes(like: tuple[jax.ShapeDtypeStruct, ...], op: str) -> Any:
    """The program that reduces the gradients of all processes, and counts which have them."""

    def reduce(whole: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        vectors, present = jnp.split(whole, [whole.shape[1] - len(like)], 1)
        wide = [jax.ShapeDtypeStruct(x.shape, computing_dtype(x.dtype)) for x in like]
        grads = _stacked(jax.vmap(lambda vector: unflatten(vector, wide))(vectors), op)
        return [grad.astype(x.dtype) for grad, x in zip(grads, like, strict=True)], present.sum(0)

    return jax.jit(reduce, out_shardings=NamedSharding(_mesh(), PartitionSpec()))
