"""Optimizers over many devices, by JAX's own sharding: placement of state, ZeRO, reduction of gradients."""

from jaxoptim.core.names import listing
from jaxoptim.distributed.reduction import all_reduce
from jaxoptim.distributed.shardings import state_shardings
from jaxoptim.distributed.zero import zero

__all__ = [
    "all_reduce",
    "state_shardings",
    "zero",
]
__dir__ = listing(__all__)
