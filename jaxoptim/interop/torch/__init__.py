"""Conversion from torch and back: checkpoints, whole runs, and optax-style states.

``load_state_dict`` of our classes takes torch's state dicts as they are. This module has the rest.
"""

from jaxoptim.core.names import listing
from jaxoptim.interop.torch.carry import carry_back, carry_over
from jaxoptim.interop.torch.functional import from_torch, to_torch_state_dict
from jaxoptim.interop.torch.tensors import load_state_dict, to_torch

__all__ = [
    "carry_back",
    "carry_over",
    "from_torch",
    "load_state_dict",
    "to_torch",
    "to_torch_state_dict",
]
__dir__ = listing(__all__)
