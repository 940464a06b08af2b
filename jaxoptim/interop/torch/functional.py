"""Conversion of optax-style states from torch and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxoptim.optim
from jaxoptim.core import Decay, Hyperparameters, OptState, Packed, init, trees
from jaxoptim.core.precision import DEFAULT
from jaxoptim.core.rule import Off
from jaxoptim.core.shown import shown
from jaxoptim.interop.torch.tensors import to_torch
from jaxoptim.optim import Optimizer


def from_torch(rule: Hyperparameters, params: Any, state_dict: dict[str, Any]) -> OptState:
    """Convert a torch state dict to an optax-style state that continues the run.

    Args:
        rule: the optimizer, such as ``rules.Adam(lr=1e-3)``. Its numbers count, not those of the state dict.
        params: the current parameters, a pytree of arrays. They are matched with those of the state dict by name
            if that has ``param_names``, else in the order of ``jax.tree.leaves`` (sorted keys).
        state_dict: the state dict of torch's optimizer (or ours), with one parameter group.

    Returns:
        A state as ``transformation(rule).init(params)`` makes it, with counts of their own for parameters that were
        updated less often than others. torch's SGD and Muon keep no count of steps; where they have state the count
        is 1.

    Raises:
        As ``Optimizer.load_state_dict``.

    Where names or layouts differ, ``carry_over`` into the torch-style class and its ``to_functional()`` lead here.

    Examples:
        >>> import torch, jax, jax.numpy as jnp, jaxoptim
        >>> weight = torch.ones(2, requires_grad=True)
        >>> theirs = torch.optim.Adam([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> theirs.step()
        >>> rule, params = jaxoptim.rules.Adam(lr=0.1), {"weight": jnp.asarray(weight.detach().numpy())}
        >>> state = jaxoptim.interop.torch.from_torch(rule, params, theirs.state_dict())
        >>> int(state.step), [round(x, 3) for x in state.slots["exp_avg"]["weight"].tolist()]
        (1, [0.2, 0.2])
    """
    optimizer = _optimizer(rule, params)
    options = {name: x for name, x in optimizer.param_groups[0].items() if name in _options(rule)}
    optimizer.load_state_dict(state_dict)  # with its own options, which tell what it is of
    (group,) = optimizer.param_groups
    group.update(options)
    optimizer._check_state(group, optimizer.state)
    _, _, state = optimizer.to_functional()
    return state if isinstance(state, OptState) else _joined(optimizer, rule, params)


def to_torch_state_dict(rule: Hyperparameters, params: Any, state: OptState) -> dict[str, Any]:
    """Convert an optax-style state to a state dict that torch's class loads to continue the run.

    Args:
        rule: the optimizer. Its numbers become the options of the group; a schedule, its value at ``state.step``.
        params: the current parameters.
        state: a state from ``jaxoptim.init(rule, params)`` and the steps after it.

    Returns:
        A state dict of tensors, one group, in the order of ``jax.tree.leaves``, each with its own count of steps.

    Raises:
        ``ValueError`` for a state of another structure.

    Examples:
        >>> import torch, jax.numpy as jnp, jaxoptim
        >>> rule, params = jaxoptim.rules.Adam(lr=0.1), {"weight": jnp.ones(2)}
        >>> params, state = jaxoptim.step(rule, params, params, jaxoptim.init(rule, params))
        >>> theirs = torch.optim.Adam([torch.ones(2)])
        >>> theirs.load_state_dict(jaxoptim.interop.torch.to_torch_state_dict(rule, params, state))
        >>> theirs.param_groups[0]["lr"]
        0.1
    """
    optimizer = _optimizer(rule.at(state.step), params)
    optimizer.from_functional(params, state)
    return to_torch(optimizer.state_dict())


def _joined(optimizer: Optimizer, rule: Any, params: Any) -> OptState:
    """Join the states of parameters that were updated different numbers of times into one state."""
    storage = optimizer._storage
    state_of = {
        param: (part.count or 0, slots)
        for part in storage.parts()
        for param, slots in zip(part.params, part.slots, strict=True)
    }
    states = iter([state_of[param] for param in jax.tree.leaves(storage.tree())])
    leaves, treedef = jax.tree.flatten(params, is_leaf=trees.is_leaf)
    found = [(None, {}) if leaf is None else next(states) for leaf in leaves]
    counts, slots = [count for count, _ in found], [slots for _, slots in found]
    step, fresh = max(count for count in counts if count is not None), init(rule, params)
    slot_trees = {
        name: jax.tree.unflatten(
            treedef,
            [of.get(name, new) for of, new in zip(slots, jax.tree.leaves(tree, is_leaf=trees.is_leaf), strict=True)],
        )
        for name, tree in fresh.slots.items()
    }
    own = [None if count in (None, step) else jnp.asarray(count, jnp.int32) for count in counts]
    return OptState(jnp.asarray(step, jnp.int32), slot_trees, fresh.shared, jax.tree.unflatten(treedef, own))


def _options(rule: Hyperparameters) -> dict[str, Any]:
    """Return the hyperparameters of a rule, numbers as plain numbers."""
    plain = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule) if field.init}  # type: ignore[arg-type]
    return {
        name: jax.tree.map(_number, value, is_leaf=lambda x: isinstance(x, Decay | Off))
        for name, value in plain.items()
    }


def _number(x: Any) -> Any:
    x = x.rate if isinstance(x, Decay) else 0.0 if isinstance(x, Off) else x
    return x.item() if isinstance(x, jax.Array | np.ndarray | np.generic) and x.ndim == 0 else x


def _optimizer(rule: Hyperparameters, params: Any) -> Optimizer:
    """Make the torch-style optimizer of a rule."""
    if not isinstance(rule, Hyperparameters):
        raise TypeError(f"A rule is expected, such as rules.Adam(lr=1e-3), but got {shown(rule, 200)}.")
    if isinstance(params, Packed):
        raise TypeError(
            "The parameters are packed, but torch keeps state by parameter. Give params.unpack(), and pack later."
        )
    classes = [x for x in vars(jaxoptim.optim).values() if isinstance(x, type) and issubclass(x, Optimizer)]
    found = [x for x in classes if getattr(x, "rule", None) is type(rule)]
    kind: Any = found[0] if found else type(type(rule).__name__, (Optimizer,), {"rule": type(rule)})
    optimizer = kind(params, **_options(rule))
    optimizer._storage.precision = getattr(rule, "precision", DEFAULT)
    return optimizer
