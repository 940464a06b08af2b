"""Conversion of state dicts to those that torch loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxoptim.core.noise import is_key
from jaxoptim.optim import state_checks, state_dicts
from jaxoptim.optim.matching import by_name

if TYPE_CHECKING:
    import torch

_SINGLE = ("mu_product", "eta", "mu")
"""The slots that torch keeps in float32 until a state dict is loaded."""


def to_torch(state_dict: Any) -> Any:
    """Convert a state dict of an optimizer, a scheduler or an averaged model to one that torch loads.

    Args:
        state_dict: the result of ``state_dict()``. It is not changed.

    Returns:
        The same in plain dicts, lists and tuples, each array of JAX or NumPy as a CPU tensor of its shape and
        dtype that owns its memory. ``torch.load(weights_only=True)`` reads it back after ``torch.save``.

    Raises:
        ``TypeError`` for what is no state dict, and for an array of a dtype that torch lacks, such as a typed PRNG
        key. What torch's ``load_state_dict`` raises is its own; :func:`load_state_dict` keeps torch from changing
        dtypes.

    Examples:
        >>> import torch, jax.numpy as jnp
        >>> from jaxoptim import interop, optim
        >>> ours = optim.SGD({"w": jnp.ones(2)}, lr=0.1, momentum=0.9)
        >>> ours.step({"w": jnp.ones(2)})
        >>> theirs = torch.optim.SGD([torch.ones(2)], lr=0.5, momentum=0.5)
        >>> theirs.load_state_dict(interop.torch.to_torch(ours.state_dict()))
        >>> theirs.param_groups[0]["lr"], theirs.state_dict()["state"][0]["momentum_buffer"].tolist()
        (0.1, [1.0, 1.0])
    """
    if not isinstance(state_dict, Mapping | list | tuple | jax.Array | np.ndarray):
        raise TypeError(f"to_torch takes a state dict, what state_dict() returns, but got {type(state_dict).__name__}.")
    return _converted(state_dict)


def _converted(x: Any) -> Any:
    """Convert the arrays in a piece of a state dict to tensors; a typed key becomes its words."""
    if is_key(x):
        x = jax.random.key_data(x)
    if isinstance(x, jax.Array | np.ndarray):
        return as_tensor(x)
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, dict):
        new = {} if isinstance(x, state_dicts.StateDict) else type(x)()
        new.update({key: _converted(value) for key, value in x.items()})
        return new
    return type(x)(map(_converted, x)) if type(x) in (list, tuple) else x


def as_tensor(array: Any) -> torch.Tensor:
    """Copy an array into a tensor that owns its memory."""
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
    """Load a state dict of ours into an optimizer of torch, so that it continues bit for bit.

    torch's own ``load_state_dict`` gives every slot the dtype of its parameter, also the float32 numbers of NAdam
    (``mu_product``) and ASGD (``eta``, ``mu``), and goes on with other roundings than without the interruption.
    This one puts them back. Where both sides have names, parameters are matched by name, else by position (that of
    ``jax.tree.leaves``, which sorts the keys of a dict).

    Args:
        optimizer: a torch optimizer of the class of ``state_dict``.
        state_dict: a state dict of ours.

    Raises:
        ``ValueError`` for the state of another class, for other names, and for a slot that has not the shape of its
        parameter; what torch's ``load_state_dict`` raises. Nothing is changed then.

    Examples:
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

    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"An optimizer of torch is expected, but got {type(optimizer).__name__}.")
    state_checks.check_layout(state_dict)
    _check_class(optimizer, state_dict)
    converted = to_torch(state_dict)
    groups = converted["param_groups"]
    if all("param_names" in group for group in optimizer.param_groups):
        names = state_dicts.names_in(state_dict)
        ordered = by_name(groups, names, [group["param_names"] for group in optimizer.param_groups], strict=True)
        if ordered != groups and isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "The vectors of LBFGS are in the order of the parameters. Use carry_back, which changes it."
            )
        converted["param_groups"] = ordered
    else:
        converted["param_groups"] = [{k: x for k, x in group.items() if k != "param_names"} for group in groups]
    _check_shapes(optimizer, converted)
    optimizer.load_state_dict(converted)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = [key for group in converted["param_groups"] for key in group["params"]]
    for key, param in zip(ids, params, strict=True):
        for name, slot in converted["state"].get(key, {}).items():
            loaded = optimizer.state[param].get(name)
            if name in _SINGLE and isinstance(loaded, torch.Tensor):
                optimizer.state[param][name] = slot.to(loaded.device)


def _check_class(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise for the state of another class; a user's subclass counts as the class that it derives from."""
    parents = [cls.__name__ for cls in type(optimizer).__mro__ if cls.__module__.startswith(("torch.", "pyro."))]
    kind = parents[0] if parents[0] != "Optimizer" else type(optimizer).__name__
    maker = getattr(state_dict, "made_by", kind)
    options = [name for group in state_dict["param_groups"] for name in optimizer.defaults if name not in group]
    if maker != kind or options:
        found = f"is of {maker}" if maker != kind else f"has no option {options[0]!r}"
        raise ValueError(f"The state dict {found}, but torch's optimizer is {type(optimizer).__name__}.")


_FACTORS = ("row_var", "col_var")
"""The slots that do not have the shape of their parameter."""


def _check_shapes(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise for slots of another shape than their parameter; L-BFGS has vectors for all parameters at once."""
    import torch

    if isinstance(optimizer, torch.optim.LBFGS):
        return
    for group, theirs in zip(state_dict["param_groups"], optimizer.param_groups, strict=False):
        for key, param in zip(group["params"], theirs["params"], strict=False):
            for name, slot in state_dict["state"].get(key, {}).items():
                if isinstance(slot, torch.Tensor) and slot.ndim and name not in _FACTORS and slot.shape != param.shape:
                    raise ValueError(
                        f"{name!r} of the parameter number {key} has shape {tuple(slot.shape)}, but torch's parameter "
                        f"there has {tuple(param.shape)}. If torch has another order, use carry_back."
                    )
