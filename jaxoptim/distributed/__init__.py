"""Optimizers over many devices, on JAX's own engine: placement of state, ZeRO, reduction of gradients."""

from jaxoptim.distributed.reduction import all_reduce as all_reduce
from jaxoptim.distributed.shardings import state_shardings as state_shardings
from jaxoptim.distributed.zero import zero as zero
