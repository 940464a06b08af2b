"""torch's ``state_dict`` layout: slots by the number of their parameter, and the options of each group."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import Rearrangement, Rule, enabled, owned
from jaxoptim.core.numerics import is_complex
from jaxoptim.optim.bucket import abstract_slots, slot_names
from jaxoptim.optim.matching import by_name, matched
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.subclass import TORCH_FLAGS

if TYPE_CHECKING:
    from jaxoptim.optim.optimizer import Optimizer

Moves = Mapping[Parameter, Rearrangement]
"""How the numbers of some parameters are moved on the way into an optimizer, or out of it."""

_ADDED = TORCH_FLAGS.keys() | {"maximize", "decoupled_weight_decay", "dct_dim", "subsample"}
"""The options that checkpoints may lack: torch added them to its classes later, or its parents have them elsewhere."""
_OF_SCHEDULERS = frozenset(("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"))
"""The options that schedulers add to a group."""


@jax.tree_util.register_pytree_with_keys_class
class StateDict(dict[Any, Any]):
    """A state dict that says what torch's leaves out: whose it is, and the names of the parameters.

    It has torch's keys and no others. Checkpoints keep what it says; ``load_state_dict`` checks it.

    Attributes:
        made_by: the name of the rule.
        names: for each group the names of its parameters, None for those that have none.
    """

    def __init__(self, items: Any, *, made_by: str, names: list[list[str | None]]) -> None:
        super().__init__(items)
        self.made_by, self.names = made_by, names

    def copy(self) -> StateDict:
        """A shallow copy."""
        return StateDict(self, made_by=self.made_by, names=self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return _state_dict, (dict(self), self.made_by, self.names)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """The entries and their keys."""
        about = (tuple(self), self.made_by, tuple(map(tuple, self.names)))
        return [(jax.tree_util.DictKey(key), value) for key, value in self.items()], about

    @classmethod
    def tree_unflatten(cls, about: Any, entries: Iterable[Any]) -> StateDict:
        """Other entries under the same keys."""
        keys, made_by, names = about
        return cls(zip(keys, entries, strict=True), made_by=made_by, names=[list(of) for of in names])


def _state_dict(items: dict[Any, Any], made_by: str, names: list[list[str | None]]) -> StateDict:
    return StateDict(items, made_by=made_by, names=names)


def saved(optimizer: Optimizer) -> StateDict:
    """The state and the groups of an optimizer, with numbers for parameters."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = {param: index for index, param in enumerate(params)}  # of a duplicate the last one, as torch does
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}, "params": [ids[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    states = optimizer._storage.states()
    state = {ids[param]: states[param] for param in ids if param in states}  # not of those that were taken out
    return StateDict(
        {"state": state | optimizer._storage.other_state, "param_groups": groups},
        made_by=optimizer.rule.__name__,
        names=[names_of(group) for group in optimizer.param_groups],
    )


def names_of(group: Mapping[str, Any]) -> list[str | None]:
    """The names of the parameters of a group, as the user gave them if they were given."""
    return list(group["param_names"]) if "param_names" in group else [param.name for param in group["params"]]


def to_load(
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
    strict: bool,
    names: Sequence[Sequence[str]] | None = None,
    moves: Moves | None = None,
) -> dict[str, Any]:
    """The state and the groups that a state dict describes, with the optimizer's own parameters; checked.

    Args:
        optimizer: what is to be loaded.
        state_dict: in torch's layout.
        strict: see ``Optimizer.load_state_dict``.
        names: for each group of the state dict what its parameters are called in the optimizer's labels (default
            None: names are compared if both sides have some).
        moves: where the numbers of some parameters go.

    Errors:
        ``KeyError`` and ``ValueError`` for what does not fit, which name the parameter.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise KeyError(f"loaded state dict has no {key!r}; it has {', '.join(map(repr, state_dict)) or 'nothing'}")
    maker = getattr(state_dict, "made_by", optimizer.rule.__name__)
    if strict and maker != optimizer.rule.__name__:
        raise ValueError(
            f"loaded state dict is of {maker}, but this is {type(optimizer).__name__}. Load it into {maker}, or use "
            "strict=False."
        )
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
    order = [key for group in groups for key in group["params"]]
    if names is None:
        there = getattr(state_dict, "names", [_names_there(group) for group in groups])
        groups = by_name(groups, there, [names_of(group) for group in here], strict)
    else:
        optimizer._storage.settle()
        groups = matched(groups, names, [[optimizer._storage.labels[p] for p in group["params"]] for group in here])
        groups = [{name: option for name, option in group.items() if name != "param_names"} for group in groups]
    for index, (group, mine) in enumerate(zip(groups, here, strict=True)):
        _check_size(index, group, mine)
    params = {
        key: param
        for group, mine in zip(groups, here, strict=True)
        for key, param in zip(group["params"], mine["params"], strict=True)
    }
    for index, (group, mine) in enumerate(zip(groups, here, strict=True)):
        if strict:
            _check_options(optimizer, index, group, mine)
        group["params"] = mine["params"]
        if "param_names" in mine:
            group.setdefault("param_names", mine["param_names"])
        _switch_off_missing(optimizer, group)
    strays = [key for key, entry in state_dict["state"].items() if isinstance(entry, Mapping) and key not in params]
    if strict and (strays := [key for key in strays if isinstance(key, int)]):
        raise ValueError(
            f"loaded state dict has state of the parameter number {strays[0]}, which is in none of its groups. "
            "Use strict=False to keep it."
        )
    state: Mapping[Any, Any] = {params.get(key, key): _copied(value) for key, value in state_dict["state"].items()}
    given, wanted = [params[key] for key in order], [param for group in here for param in group["params"]]
    state = optimizer._rearranged(groups, state, given, wanted, moves or {})
    if strict:
        for group in groups:
            optimizer._check_state(group, state)
    return {"state": state, "param_groups": groups}


def _names_there(group: Mapping[str, Any]) -> list[str | None]:
    """The names of the parameters of a group in a state dict."""
    names = group.get("param_names", [])
    return list(names) if len(names) == len(group["params"]) else [None] * len(group["params"])


def _check_size(index: int, group: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise for groups of different size, by way of the first parameter that has no counterpart."""
    there, here = len(group["params"]), len(mine["params"])
    if there == here:
        return
    if there < here:
        lonely = f"{labels(mine)[there]} has nothing there"
    else:
        names = group.get("param_names", group["params"])
        lonely = f"the parameter {names[here]!r} has nothing here"
    raise ValueError(
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
        f"group {index} has {there} parameters there, {here} here; {lonely}"
    )


def labels(group: Mapping[str, Any]) -> list[str]:
    """What the parameters of a group are called in messages."""
    return [repr(name or f"params[{index}]") for index, name in enumerate(names_of(group))]


def _check_options(optimizer: Optimizer, index: int, group: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise for options of another class, and for typing errors."""
    known = optimizer.defaults.keys() | mine.keys() | _OF_SCHEDULERS | {"params", "param_names"}
    members = labels(mine)
    some = ", ".join(members[:3]) + (", ..." if len(members) > 3 else "")
    if unknown := [name for name in group if name not in known]:
        raise ValueError(
            f"loaded state dict has the options {', '.join(map(repr, unknown))} in group {index} (of {some}), which "
            f"{type(optimizer).__name__} does not take. It takes {', '.join(optimizer.defaults)}. Load the state of "
            "the same optimizer, give the group such an entry first, or use strict=False."
        )
    if missing := [name for name in optimizer.defaults if name not in group.keys() | _ADDED]:
        raise KeyError(
            f"loaded state dict has no option {', '.join(map(repr, missing))} in group {index} (of {some}). "
            f"{type(optimizer).__name__} takes {', '.join(optimizer.defaults)}. Load the state of the same optimizer."
        )


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
    if isinstance(x, jax.Array) or not hasattr(x, "__array__"):
        return x
    return x if isinstance(x, np.ndarray) and x.dtype.kind in "OSUMm" else owned(x)


def rearranged(
    optimizer: Optimizer, groups: Sequence[dict[str, Any]], state: Mapping[Any, Any], moves: Moves
) -> dict[Any, Any]:
    """State by parameter, with the numbers of some moved.

    Errors:
        ``ValueError`` that names a parameter with which the rule does not go along.
    """
    new = dict(state)
    for group in groups:
        for label, param in zip(labels(group), group["params"], strict=True):
            if param in moves and state.get(param):
                try:
                    new[param] = optimizer._storage.rule_of(group).rearranged(state[param], moves[param])
                except ValueError as error:
                    raise ValueError(f"The state of {label} cannot follow its transform: {error}") from error
    return new


def check_slots(optimizer: Optimizer, group: dict[str, Any], state: Mapping[Any, Any]) -> None:
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
        if wanted - given.keys() or (extra and extra - _dormant(rule)):
            raise ValueError(
                f"loaded state dict has {_list(given)} for the parameter {label}, but {type(optimizer).__name__} with "
                f"the options of that group has {_list(wanted)}. Load the state of the same optimizer, or use "
                "strict=False."
            )
        for slot in [name for name in (*slots, *count) if name in wanted]:
            check_array(slot, label, given[slot], slots.get(slot, _COUNT))
        if "step" in given and not np.all(np.asarray(given["step"]) >= 0):
            raise ValueError(f"loaded state dict has a 'step' below zero for the parameter {label}: {given['step']}.")


_COUNT = jax.ShapeDtypeStruct((), jnp.float32)
"""How the count of steps is kept."""


def check_array(slot: str, label: str, given: Any, wanted: Any) -> None:
    """Raise for a slot that has not the shape, or is complex and must not be."""
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
