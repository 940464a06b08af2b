"""Checks of a state dict before it is loaded: parameters, options and slots."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import Rule, enabled
from jaxoptim.core.numerics import is_complex
from jaxoptim.core.precision import MASTER
from jaxoptim.engine.slots import abstract_slots, slot_names
from jaxoptim.optim.option_names import OF_SCHEDULERS
from jaxoptim.optim.storage import Storage
from jaxoptim.optim.subclass import TORCH_FLAGS

_ADDED = TORCH_FLAGS.keys() | {"maximize", "decoupled_weight_decay"}
"""The options that checkpoints may lack, because torch added them to its classes later."""
_COUNT = jax.ShapeDtypeStruct((), jnp.float32)
"""How the count of steps is kept."""


class Loadable(Protocol):
    """The protocol of an optimizer, as far as its state dict is concerned."""

    defaults: dict[str, Any]
    _storage: Storage

    @property
    def rule(self) -> type[Any]:
        """The class of the rule that computes the update of one parameter."""

    @property
    def step_type(self) -> type | None:
        """The type in which the state shows the count of steps."""

    @property
    def may_lack(self) -> frozenset[str]:
        """Options that a state dict may lack."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups."""

    def _transferred(self, state: Mapping[Any, Any], transfer: Any) -> Mapping[Any, Any]: ...

    def _adopt(self, group: dict[str, Any]) -> None: ...

    def _check_state(self, group: dict[str, Any], state: Mapping[Any, Any]) -> None: ...


def check_layout(state_dict: Any) -> None:
    """Raise for an object that is no state dict of an optimizer."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"A state dict is expected, which an optimizer's state_dict() gives, but got {type(state_dict).__name__}."
        )
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise KeyError(f"loaded state dict has no {key!r}; it has {', '.join(map(repr, state_dict)) or 'nothing'}")


def check_class(optimizer: Loadable, state_dict: Mapping[str, Any]) -> None:
    """Raise for a state dict that says that it is of another optimizer."""
    maker = getattr(state_dict, "made_by", optimizer.rule.__name__)
    if maker != optimizer.rule.__name__:
        raise ValueError(
            f"loaded state dict is of {maker}, but this is {type(optimizer).__name__}. Load it into {maker}, or use "
            "strict=False."
        )


def names_of(group: Mapping[str, Any]) -> list[str | None]:
    """Return the names of the parameters of a group, if the user gave them."""
    return list(group["param_names"]) if "param_names" in group else [param.name for param in group["params"]]


def labels(group: Mapping[str, Any]) -> list[str]:
    """Return the names of the parameters of a group for messages."""
    return [repr(name or f"params[{index}]") for index, name in enumerate(names_of(group))]


def check_size(index: int, group: Mapping[str, Any], mine: Mapping[str, Any], names: Sequence[str | None]) -> None:
    """Raise for groups of different size, and name the first parameter that has no counterpart."""
    there, here = len(group["params"]), len(mine["params"])
    if there == here:
        return
    ours = names_of(mine)
    named = not {None} & {*names, *ours} and len(names) == there
    if there < here:
        lonely = next((i for i, name in enumerate(ours) if named and name not in names), there)
        problem = f"{labels(mine)[lonely]} has nothing there"
    else:
        name = next((name for name in names if named and name not in ours), (names or group["params"])[here])
        problem = f"the parameter {name or group['params'][here]!r} has nothing here"
    raise ValueError(
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
        f"group {index} has {there} parameters there, {here} here; {problem}"
    )


def check_options(optimizer: Loadable, index: int, group: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise for options of another class, and for typing errors."""
    known = optimizer.defaults.keys() | mine.keys() | OF_SCHEDULERS | {"params", "param_names"}
    members = labels(mine)
    some = ", ".join(members[:3]) + (", ..." if len(members) > 3 else "")
    if unknown := [name for name in group if name not in known]:
        raise ValueError(
            f"loaded state dict has the options {', '.join(map(repr, unknown))} in group {index} (of {some}), which "
            f"{type(optimizer).__name__} does not take. It takes {', '.join(optimizer.defaults)}. Load the state of "
            "the same optimizer. Keys of your own are taken if the group here has them too, or with strict=False."
        )
    if missing := [name for name in optimizer.defaults if name not in group.keys() | _ADDED | optimizer.may_lack]:
        raise KeyError(
            f"loaded state dict has no option {', '.join(map(repr, missing))} in group {index} (of {some}). "
            f"{type(optimizer).__name__} takes {', '.join(optimizer.defaults)}. Load the state of the same optimizer."
        )


def check_strays(state: Mapping[Any, Any], params: Mapping[Any, Any]) -> None:
    """Raise for slots of a parameter that is in no group."""
    for key, entry in state.items():
        if isinstance(key, int) and isinstance(entry, Mapping) and key not in params:
            raise ValueError(
                f"loaded state dict has state of the parameter number {key}, which is in none of its groups. "
                "Use strict=False to keep it."
            )


def check_slots(optimizer: Loadable, group: dict[str, Any], state: Mapping[Any, Any]) -> None:
    """Raise for state that the optimizer could not have made with these options."""
    rule = optimizer._storage.rule_of(group)
    count = set() if optimizer.step_type is None else {"step"}
    slots_of = functools.cache(lambda shape, dtype: abstract_slots(rule, jax.ShapeDtypeStruct(shape, dtype)))
    for label, param in zip(labels(group), group["params"], strict=True):
        entry = state.get(param, {})
        given = {name: slot for name, slot in entry.items() if slot is not None}
        if not given:
            continue
        slots = slots_of(param.shape, param.dtype)
        wanted = {slot for slot, value in slots.items() if value is not None} | count
        extra = given.keys() - wanted
        if wanted - given.keys() - {MASTER} or (extra and extra - _dormant(rule)):
            raise ValueError(
                f"loaded state dict has {_list(given)} for the parameter {label}, but {type(optimizer).__name__} with "
                f"the options of that group has {_list(wanted)}. Load the state of the same optimizer, or use "
                "strict=False."
            )
        for slot in [name for name in (*slots, *count) if name in wanted & given.keys()]:
            check_array(slot, label, given[slot], slots.get(slot, _COUNT))
        if "step" in given and not np.all(np.asarray(given["step"]) >= 0):
            raise ValueError(f"loaded state dict has a 'step' below zero for the parameter {label}: {given['step']}.")


def check_array(slot: str, label: str, given: Any, wanted: Any) -> None:
    """Raise for a slot of another shape, or a complex one that must be real."""
    if np.shape(given) != wanted.shape:
        raise ValueError(
            f"loaded state dict has {slot!r} of shape {np.shape(given)} for the parameter {label}, "
            f"which needs {wanted.shape}."
        )
    dtype = given.dtype if hasattr(given, "dtype") else np.asarray(given).dtype
    if not jnp.issubdtype(dtype, np.number) or (jnp.issubdtype(dtype, np.complexfloating) and not is_complex(wanted)):
        raise ValueError(
            f"loaded state dict has {slot!r} of dtype {dtype} for the parameter {label}, which needs {wanted.dtype}."
        )


def _dormant(rule: Rule) -> set[str]:
    """Return the slots of terms that are switched off; state keeps them, as in torch, since the time of the terms."""
    names: set[str] = set()
    for field in dataclasses.fields(rule):  # type: ignore[arg-type]
        value = getattr(rule, field.name)
        if value is False or not enabled(value):
            with contextlib.suppress(ValueError):
                names.update(slot_names(rule.replace(**{field.name: True if value is False else 0.5})))
    return names


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
