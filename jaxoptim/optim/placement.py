"""Parameters on a mesh, and the data axes over which their state is in parts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxoptim.core.numerics import put
from jaxoptim.core.placement import check_mesh
from jaxoptim.core.shown import shown
from jaxoptim.distributed import layouts
from jaxoptim.engine.slots import abstract_slots
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.storage import Storage


def checked(mesh: Any, zero: Any) -> Mesh | None:
    """Return the mesh of an optimizer; raise for anything else."""
    if zero is not None and mesh is None:
        raise TypeError(f"zero={shown(zero)} names an axis of a mesh, but no mesh was given. Give mesh= too.")
    return check_mesh(mesh)


def data_axes(mesh: Any, zero: Any) -> layouts.Axes:
    """Return the axes over which state is in parts."""
    return () if zero is None else layouts.check_axes("zero=", mesh, zero)


def place(params: Iterable[Parameter], mesh: Mesh | None) -> None:
    """Put parameters on all devices of a mesh, except those that are sharded over these."""
    if mesh is None:
        return
    devices = set(mesh.devices.flat)
    for param in params:
        sharding = param.value.sharding
        if not (isinstance(sharding, NamedSharding) and sharding.device_set == devices):
            param.value = put(param.value, NamedSharding(mesh, PartitionSpec()))


def warn_of_whole(storage: Storage, level: int) -> None:
    """Warn of the parameters whose state the data axes do not divide."""
    axes, whole, mesh = storage.axes, dict[str, tuple[tuple[int, ...], int]](), None
    for group in storage.groups if axes else ():
        rule = storage.rule_of(group)
        for param in group["params"]:
            parts = layouts.parts_of(param.value.sharding, param.shape, axes)
            if parts is None or not param.shape or layouts.is_along(parts.parts.spec, axes):
                continue
            mesh = parts.mesh
            slots = [x for x in abstract_slots(rule, param.struct).values() if x is not None and x.shape]
            if size := sum(math.prod(x.shape) * x.dtype.itemsize for x in slots):
                whole[param.name or f"params[{len(whole)}]"] = param.shape, size
    if mesh is not None:
        layouts.warn_of_whole("zero=", mesh, axes, whole, level)
