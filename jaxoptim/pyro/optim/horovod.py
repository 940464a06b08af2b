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
from jaxoptim.core.shown import shown
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.optim.foreign import WRAPPER, refuse_foreign
from jaxoptim.pyro.optim.lr_scheduler import PyroLRScheduler
from jaxoptim.pyro.optim.optim import PyroOptim


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
      ``jaxoptim.transformation(optimizer)`` reduces with ``jax.lax.pmean``.

    Gradients are reduced first and clipped then, so that all replicas clip alike.

    Args:
        pyro_optim: what makes the steps; its options and clipping are taken over, its state is not.
        op: ``"average"`` or ``"sum"`` (default ``"average"``).
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
        self, pyro_optim: PyroOptim, *, op: Literal["average", "sum"] = "average", axis_name: Any = None
    ) -> None:
        refuse_foreign("The optimizer", pyro_optim, WRAPPER)
        if not isinstance(pyro_optim, PyroOptim) or isinstance(pyro_optim, PyroLRScheduler):
            raise TypeError(f"Expected a PyroOptim object without a schedule but got a {type(pyro_optim).__name__}.")
        if op not in ("average", "sum"):
            raise ValueError(f"Invalid op: {shown(op)}. HorovodOptimizer takes 'average' or 'sum'.")
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
        vector = _sum_of_processes(jnp.concatenate([flatten(own), present]))
        counts, vector = np.asarray(vector[len(vector) - len(order) :]), vector[: len(vector) - len(order)]
        if self.op == "average":
            vector = vector / jax.process_count()
        result: list[Any] = [None] * len(params)
        for index, grad, count in zip(order, unflatten(vector, like), counts, strict=True):
            result[index] = grad if count else None
        return result

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"op": self.op, "axis_name": self.axis_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.op, self.axis_name = state["op"], state["axis_name"]


@functools.partial(jax.jit, static_argnames="op")
def _over_devices(grads: dict[int, jax.Array], op: str) -> dict[int, jax.Array]:
    """Gradients without their leading axis; sharded along it, this is an all-reduce."""
    return {index: grad.mean(0) if op == "average" else grad.sum(0) for index, grad in grads.items()}


def _sum_of_processes(vector: jax.Array) -> jax.Array:
    """The sum of a vector over all processes, on a device of each."""
    devices = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([devices[process] for process in sorted(devices)]), ("processes",))
    mine = jax.device_put(vector[None], devices[jax.process_index()])
    shape = (len(devices), *vector.shape)
    whole = jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, PartitionSpec("processes")), [mine])
    return _total(NamedSharding(mesh, PartitionSpec()))(whole).addressable_data(0)


@functools.cache
def _total(sharding: NamedSharding) -> Any:
    return jax.jit(lambda whole: whole.sum(0), out_shardings=sharding)
