"""Bridges to other libraries, each of which imports its library when it is used."""

from jaxoptim.core.names import listing
from jaxoptim.interop import numpyro, torch

__all__ = [
    "numpyro",
    "torch",
]
__dir__ = listing(__all__)
