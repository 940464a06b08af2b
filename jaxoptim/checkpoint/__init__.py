"""Checkpoints on disk: safetensors for the arrays, JSON for the rest, no executable content."""

from jaxoptim.checkpoint.file import FORMAT_VERSION, load, save
from jaxoptim.core.names import listing

__all__ = [
    "FORMAT_VERSION",
    "load",
    "save",
]
__dir__ = listing(__all__)
