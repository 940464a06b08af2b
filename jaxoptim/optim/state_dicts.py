"""torch's ``state_dict`` layout: slots by the position of their parameter, and the options of each group."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxoptim.core import Rule, enabled, owned
from jaxoptim.optim.bucket import abstract_slots, slot_names
from jaxoptim.optim.subclass import TORCH_FLAGS

if TYPE_CHECKING:
    from jaxoptim.optim.optimizer import Optimizer


def saved(optimizer: Optimizer) -> dict[str, Any]:
    """The state and the groups of an optimizer, with numbers for parameters."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = {param: index for index, param in enumerate(params)}  # of a duplicate the last one, as torch does
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}, "params": [ids[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    states = optimizer._storage.states()
    state = {ids[param]: states[param] for param in ids if param in states}  # not of those that were taken out
    return {"state": state | optimizer._storage.other_state, "param_groups": groups}


def to_load(optimizer: Optimizer, state_dict: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    """The state and the groups that a state dict describes, with the optimizer's own parameters; checked.

    Errors:
        ``KeyError`` and ``ValueError`` for what does not fit, which name the parameter.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise KeyError(f"loaded state dict has no {key!r}; it has {', '.join(map(repr, state_dict)) or 'nothing'}")
    groups = [
        {name: option if name == "params" else jax.tree.map(_own, option) for name, option in group.items()}
        for group in copy.deepcopy(state_dict["param_groups"])
    ]
    here = optimizer.param_groups
    if len(here) != len(groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"it has {len(groups)}, the optimizer has {len(here)}"
        )
    for index, (group, mine) in enumerate(zip(groups, here, strict=True)):
        if len(group["params"]) != len(mine["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {index} has {len(group['params'])} parameters there, {len(mine['params'])} here"
            )
    params = {
        key: param
        for group, mine in zip(groups, here, strict=True)
        for key, param in zip(group["params"], mine["params"], strict=True)
    }
    for group, mine in zip(groups, here, strict=True):
        group["params"] = mine["params"]
        if "param_names" in mine:
            group.setdefault("param_names", mine["param_names"])
        _switch_off_missing(optimizer, group)
    state = {params.get(key, key): _copied(value) for key, value in state_dict["state"].items()}
    if strict:
        for group in groups:
            optimizer._check_state(group, state)
    return {"state": state, "param_groups": groups}


def _switch_off_missing(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Complete a group that was saved before torch had some of its options: what is missing is off."""
    fields = {field.name: field.default for field in dataclasses.fields(optimizer.rule)}
    for name in optimizer.defaults:
        if not (off := (fields | TORCH_FLAGS).get(name, dataclasses.MISSING)):
            group.setdefault(name, off)


def _copied(value: Any) -> Any:
    """An entry with arrays of our own in the place of those of NumPy and torch, which may change."""
    if not isinstance(value, Mapping):
        return value
    return {name: jax.tree.map(_own, slot) for name, slot in value.items()}


def _own(x: Any) -> Any:
    return owned(x) if hasattr(x, "__array__") and not isinstance(x, jax.Array) else x


def check_slots(optimizer: Optimizer, group: dict[str, Any], state: Mapping[Any, Any]) -> None:
    """Raise for state that the optimizer could not have made with these options."""
    rule = optimizer._storage.rule_of(group)
    count = set() if optimizer.step_type is None else {"step"}
    slots_of = functools.cache(lambda shape, dtype: abstract_slots(rule, jax.ShapeDtypeStruct(shape, dtype)))
    for index, param in enumerate(group["params"]):
        given = {name: slot for name, slot in state.get(param, {}).items() if slot is not None}
        if not given:
            continue
        name = param.name or f"params[{index}]"
        slots = slots_of(param.shape, param.dtype)
        wanted = {slot for slot, value in slots.items() if value is not None} | count
        extra = given.keys() - wanted
        if wanted - given.keys() or (extra and extra - _dormant(rule)):
            raise ValueError(
                f"loaded state dict has {_list(given)} for the parameter {name!r}, but {type(optimizer).__name__} with "
                f"the options of that group has {_list(wanted)}. Load the state of the same optimizer, or use "
                "strict=False."
            )
        for slot in wanted - count:
            if np.shape(given[slot]) != slots[slot].shape:
                raise ValueError(
                    f"loaded state dict has {slot!r} of shape {np.shape(given[slot])} for the parameter {name!r}, "
                    f"which needs {slots[slot].shape}."
                )


def _dormant(rule: Rule) -> set[str]:
    """The slots of terms that are switched off, which state keeps, as in torch, from the time when they were on."""
    names: set[str] = set()
    for field in dataclasses.fields(rule):  # type: ignore[arg-type]
        value = getattr(rule, field.name)
        if value is False or not enabled(value):
            with contextlib.suppress(ValueError):
                names.update(slot_names(rule.replace(**{field.name: True if value is False else 0.5})))
    return names


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
