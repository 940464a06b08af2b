"""State dicts as torch loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxoptim.optim import state_dicts
from jaxoptim.optim.matching import by_name

if TYPE_CHECKING:
    import torch

_SINGLE = ("mu_product", "eta", "mu")
"""The slots that torch keeps in float32, until it loads them."""


def to_torch(state_dict: Any) -> Any:
    """A state dict that torch loads: of an optimizer, a scheduler, or an averaged model.

    Args:
        state_dict: what ``state_dict()`` gave. It is not changed.

    Returns:
        The same in plain dicts, lists and tuples, each array of JAX or NumPy as a CPU tensor of its shape and
        dtype that owns its memory. ``torch.load(weights_only=True)`` reads it back after ``torch.save``.

    Errors:
        ``TypeError`` for an array of a dtype that torch lacks, such as a typed PRNG key. What torch's
        ``load_state_dict`` raises is its own; :func:`load_state_dict` keeps torch from changing dtypes.

    Example:
        >>> import torch, jax.numpy as jnp
        >>> from jaxoptim import interop, optim
        >>> ours = optim.SGD({"w": jnp.ones(2)}, lr=0.1, momentum=0.9)
        >>> ours.step({"w": jnp.ones(2)})
        >>> theirs = torch.optim.SGD([torch.ones(2)], lr=0.5, momentum=0.5)
        >>> theirs.load_state_dict(interop.torch.to_torch(ours.state_dict()))
        >>> theirs.param_groups[0]["lr"], theirs.state_dict()["state"][0]["momentum_buffer"].tolist()
        (0.1, [1.0, 1.0])
    """
    if isinstance(state_dict, state_dicts.StateDict):
        state_dict = dict(state_dict)
    if isinstance(state_dict, jax.Array | np.ndarray):
        return as_tensor(state_dict)
    if isinstance(state_dict, np.generic):
        return state_dict.item()
    if isinstance(state_dict, dict):
        new = type(state_dict)()
        new.update({key: to_torch(value) for key, value in state_dict.items()})
        return new
    if type(state_dict) in (list, tuple):
        return type(state_dict)(map(to_torch, state_dict))
    return state_dict


def as_tensor(array: Any) -> torch.Tensor:
    """A tensor of one's own with the numbers of an array."""
    import torch

    dtype = getattr(torch, str(array.dtype), None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch has no dtype {array.dtype}. Leave such an array out of what is converted.")
    host = np.asarray(array)
    if not host.size:
        return torch.empty(host.shape, dtype=dtype)
    try:
        return torch.frombuffer(bytearray(host.tobytes()), dtype=dtype).reshape(host.shape)
    except NotImplementedError as error:
        raise TypeError(f"torch has no numbers of dtype {array.dtype}, only its name.") from error


def load_state_dict(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict of ours into an optimizer of torch, so that it continues to the last digit.

    torch's own ``load_state_dict`` gives every slot the dtype of its parameter, also the float32 numbers of NAdam
    (``mu_product``) and ASGD (``eta``, ``mu``), and goes on with other roundings than without the interruption.
    This one puts them back. Where both sides have names, parameters are matched by name.

    Args:
        optimizer: of torch, the class that ``state_dict`` is of.
        state_dict: of ours.

    Errors:
        ``ValueError`` for the state of another class and for other names; what torch's ``load_state_dict`` raises.

    Example:
        >>> import torch, jax.numpy as jnp
        >>> from jaxoptim import interop, optim
        >>> ours = optim.NAdam({"w": jnp.ones(2)})
        >>> ours.step({"w": jnp.ones(2)})
        >>> theirs = torch.optim.NAdam([torch.ones(2, dtype=torch.float64)])
        >>> interop.torch.load_state_dict(theirs, ours.state_dict())
        >>> theirs.state_dict()["state"][0]["mu_product"].dtype
        torch.float32
    """
    import torch

    converted = to_torch(state_dict)
    if isinstance(state_dict, state_dicts.StateDict):
        if state_dict.made_by != type(optimizer).__name__:
            raise ValueError(
                f"The state dict is of {state_dict.made_by}, but torch's optimizer is {type(optimizer).__name__}."
            )
        there = [group.get("param_names", [None]) for group in optimizer.param_groups]
        groups = by_name(converted["param_groups"], state_dict.names, there, strict=True)
        if groups != converted["param_groups"] and isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("The state of LBFGS is in the order of the parameters. Use carry_back, which changes it.")
        converted["param_groups"] = groups
    optimizer.load_state_dict(converted)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = [key for group in converted["param_groups"] for key in group["params"]]
    for key, param in zip(ids, params, strict=True):
        for name, slot in converted["state"].get(key, {}).items():
            loaded = optimizer.state[param].get(name)
            if name in _SINGLE and isinstance(loaded, torch.Tensor):
                optimizer.state[param][name] = slot.to(loaded.device)
