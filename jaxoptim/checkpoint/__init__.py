"""Checkpoints on disk: safetensors for the arrays, JSON for the rest, nothing that could run."""

from jaxoptim.checkpoint.file import FORMAT_VERSION as FORMAT_VERSION
from jaxoptim.checkpoint.file import load as load
from jaxoptim.checkpoint.file import save as save
