"""Bridges to other libraries, which are imported only when their bridge is used."""

from jaxoptim.core.names import listing
from jaxoptim.interop import numpyro, torch

__all__ = [
    "numpyro",
    "torch",
]
__dir__ = listing(__all__)
