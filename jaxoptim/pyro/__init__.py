"""Pyro's interfaces: ``from jaxoptim import pyro`` in place of ``import pyro``."""

from jaxoptim.core.names import listing
from jaxoptim.pyro import infer, optim

__all__ = [
    "infer",
    "optim",
]
__dir__ = listing(__all__)
