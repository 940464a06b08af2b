"""From torch and back: checkpoints, whole runs, and the states of the pure face.

``load_state_dict`` of our classes takes torch's state dicts as they are. This module has the rest.
"""

from jaxoptim.interop.torch.carry import carry_back as carry_back
from jaxoptim.interop.torch.carry import carry_over as carry_over
from jaxoptim.interop.torch.functional import from_torch as from_torch
from jaxoptim.interop.torch.functional import to_torch_state_dict as to_torch_state_dict
from jaxoptim.interop.torch.tensors import load_state_dict as load_state_dict
from jaxoptim.interop.torch.tensors import to_torch as to_torch
