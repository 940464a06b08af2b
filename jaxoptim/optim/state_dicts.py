"""torch's ``state_dict`` layout: slots by the number of their parameter, and the options of each group."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxoptim.core import Rearrangement, owned
from jaxoptim.core.numerics import is_numeric, put
from jaxoptim.core.shown import shown
from jaxoptim.distributed.layouts import parts_of
from jaxoptim.optim import gradient_transforms, state_checks
from jaxoptim.optim.matching import by_name, matched
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.state_checks import Loadable
from jaxoptim.optim.subclass import TORCH_FLAGS


class Transfer(NamedTuple):
    """The differences between the state dicts of two optimizers.

    Attributes:
        groups: the options, with the parameters of the optimizer here.
        given: all parameters in the order on the side that the state comes from.
        wanted: in the order on the other.
        moves: where the numbers of some parameters go.
    """

    groups: Sequence[dict[str, Any]]
    given: Sequence[Parameter]
    wanted: Sequence[Parameter]
    moves: Mapping[Parameter, Rearrangement]


@jax.tree_util.register_pytree_with_keys_class
class StateDict(dict[Any, Any]):
    """A state dict that has the owner and the names of the parameters, which torch's leaves out.

    It has torch's keys, and ``"gradient_transform"`` where the optimizer has such a state. Checkpoints keep what it
    says; ``load_state_dict`` checks it.

    Attributes:
        made_by: the name of the rule.
        names: for each group the names of its parameters, None for those that have none.
    """

    def __init__(self, items: Any, *, made_by: str, names: list[list[str | None]]) -> None:
        super().__init__(items)
        self.made_by, self.names = made_by, names

    def copy(self) -> StateDict:
        """Return a shallow copy."""
        return StateDict(self, made_by=self.made_by, names=self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return _state_dict, (dict(self), self.made_by, self.names)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Return the entries and their keys."""
        about = (tuple(self), self.made_by, tuple(map(tuple, self.names)))
        return [(jax.tree_util.DictKey(key), value) for key, value in self.items()], about

    @classmethod
    def tree_unflatten(cls, about: Any, entries: Iterable[Any]) -> StateDict:
        """Return a state dict of other entries under the same keys."""
        keys, made_by, names = about
        return cls(zip(keys, entries, strict=True), made_by=made_by, names=[list(of) for of in names])


def _state_dict(items: dict[Any, Any], made_by: str, names: list[list[str | None]]) -> StateDict:
    return StateDict(items, made_by=made_by, names=names)


def saved(optimizer: Loadable) -> StateDict:
    """Return the state and the groups of an optimizer, with numbers for parameters."""
    ids: dict[Parameter, int] = {}
    position, aside = 0, ("params", gradient_transforms.KEY)
    for group in optimizer.param_groups:
        # As in torch: of a parameter that stands twice in one group the last place, of one in two groups the first.
        ids |= {param: index for index, param in enumerate(group["params"], position) if param not in ids}
        position += len(group["params"])
    groups = [
        {
            **{key: value for key, value in group.items() if key not in aside},
            "params": [ids[p] for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    states = optimizer._storage.states()
    state = {ids[param]: states[param] for param in ids if param in states}  # not of those that were taken out
    of_transform = gradient_transforms.saved(optimizer._storage.transform_state())
    return StateDict(
        {"state": state | optimizer._storage.other_state, "param_groups": groups}
        | ({gradient_transforms.KEY: of_transform} if of_transform else {}),
        made_by=optimizer.rule.__name__,
        names=[state_checks.names_of(group) for group in optimizer.param_groups],
    )


def to_load(
    optimizer: Loadable,
    state_dict: Mapping[str, Any],
    strict: bool,
    names: Sequence[Sequence[str]] | None = None,
    moves: Mapping[Parameter, Rearrangement] | None = None,
    keep: Collection[str] = (),
) -> dict[str, Any]:
    """Return the state and the groups of a state dict, checked, with the optimizer's own parameters.

    Args:
        optimizer: the optimizer that loads.
        state_dict: in torch's layout.
        strict: see ``Optimizer.load_state_dict``.
        names: for each group of the state dict what its parameters are called in the optimizer's labels (default
            None: names are compared if both sides have some).
        moves: where the numbers of some parameters go.
        keep: see ``Optimizer.load_state_dict``.

    Raises:
        ``KeyError`` and ``ValueError`` for entries that do not fit; they name the parameter.
    """
    if isinstance(keep, str):
        raise TypeError(f"keep takes a list of options, but got {shown(keep)}. Give [{keep!r}].")
    keep = tuple(keep)  # of a generator, which each group would find more empty
    state_checks.check_layout(state_dict)
    if strict:
        state_checks.check_class(optimizer, state_dict)
    here = optimizer.param_groups
    groups = [
        {name: option if name == "params" else jax.tree.map(_own, option) for name, option in group.items()}
        for group in copy.deepcopy(state_dict["param_groups"])
    ]
    if len(here) != len(groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"it has {len(groups)}, the optimizer has {len(here)}"
        )
    order = [key for group in groups for key in group["params"]]
    there = names or names_in(state_dict)
    groups = _in_our_order(optimizer, groups, there, strict, names is not None)
    params: dict[Any, Parameter] = {}
    for index, (group, mine) in enumerate(zip(groups, here, strict=True)):
        state_checks.check_size(index, group, mine, there[index])
        if strict:
            state_checks.check_options(optimizer, index, group, mine)
        params |= zip(group["params"], mine["params"], strict=True)
        group["params"] = mine["params"]
        if "param_names" in mine:
            group.setdefault("param_names", mine["param_names"])
        _complete(optimizer, group, mine)
        _keep(group, mine, keep)
        if gradient_transforms.KEY in mine:
            group[gradient_transforms.KEY] = mine[gradient_transforms.KEY]
    if strict:
        state_checks.check_strays(state_dict["state"], params)
    state: Mapping[Any, Any] = {
        params.get(key, key): _copied(value, params.get(key), optimizer._storage.axes)
        for key, value in state_dict["state"].items()
    }
    given, wanted = [params[key] for key in order], [param for group in here for param in group["params"]]
    state = optimizer._transferred(state, Transfer(groups, given, wanted, moves or {}))
    if strict:
        for group in groups:
            optimizer._check_state(group, state)
    found = {"state": state, "param_groups": groups}
    storage = optimizer._storage
    now, given = storage.transform_state(), state_dict.get(gradient_transforms.KEY, {})
    if given or (strict and jax.tree.leaves(now)):
        found[gradient_transforms.KEY] = storage.gradient_transform, gradient_transforms.loaded(given, now, strict)
    return found


def _in_our_order(
    optimizer: Loadable,
    groups: list[dict[str, Any]],
    names: Sequence[Sequence[Any]],
    strict: bool,
    are_labels: bool,
) -> list[dict[str, Any]]:
    """Return the groups, and the parameters in each, in the optimizer's order."""
    here = optimizer.param_groups
    if not are_labels:
        return by_name(groups, names, [state_checks.names_of(group) for group in here], strict)
    optimizer._storage.settle()
    groups = matched(groups, names, [[optimizer._storage.labels[p] for p in group["params"]] for group in here])
    return [{name: option for name, option in group.items() if name != "param_names"} for group in groups]


def names_in(state_dict: Mapping[str, Any]) -> list[list[str | None]]:
    """Return the names of the parameters of each group of a state dict, None for those that have none."""
    if isinstance(state_dict, StateDict):
        return state_dict.names
    found = []
    for group in state_dict["param_groups"]:
        names, size = group.get("param_names", []), len(group["params"])
        found.append(list(names) if len(names) == size else [None] * size)
    return found


def _complete(optimizer: Loadable, group: dict[str, Any], mine: dict[str, Any]) -> None:
    """Complete a group that was saved before torch had some of its options: missing ones are off.

    What the parent never had stays as it is here.
    """
    for name in optimizer.may_lack & mine.keys():
        group.setdefault(name, mine[name])
    optimizer._adopt(group)
    fields = {field.name: field.default for field in dataclasses.fields(optimizer.rule)}
    for name in optimizer.defaults:
        if not (off := (fields | TORCH_FLAGS).get(name, dataclasses.MISSING)):
            group.setdefault(name, off)


def _keep(group: dict[str, Any], mine: dict[str, Any], keep: Collection[str]) -> None:
    """Take some options from the optimizer's own group."""
    if unknown := [name for name in keep if name not in mine or name in ("params", "param_names")]:
        known = ", ".join(name for name in mine if name != "params")
        raise ValueError(f"keep: a parameter group has no option {unknown[0]!r}. It has {known}.")
    group |= {name: mine[name] for name in keep}
    if "lr" in keep and "initial_lr" in group:
        group["initial_lr"] = mine.get("initial_lr", mine["lr"])


def _copied(value: Any, param: Parameter | None, axes: tuple[str, ...]) -> Any:
    """Return an entry with copied JAX arrays in the place of those of NumPy and torch, which may change.

    Those of the shape of a parameter on several devices go there, one by one: all may be too much for one device.
    """
    if not isinstance(value, Mapping):
        return value
    sharding = None if param is None or jax.device_count() == 1 else param.value.sharding
    if param is None or sharding is None or len(sharding.device_set) == 1:
        return {name: jax.tree.map(_own, slot) for name, slot in value.items()}

    if (parts := parts_of(sharding, param.shape, axes)) is not None:
        sharding = parts.parts

    def placed(x: Any) -> Any:
        x = _own(x)
        return put(x, sharding) if isinstance(x, jax.Array) and x.shape == param.shape else x

    return {name: jax.tree.map(placed, slot) for name, slot in value.items()}


def _own(x: Any) -> Any:
    if isinstance(x, jax.Array) or not hasattr(x, "__array__"):
        return x
    return owned(x) if not isinstance(x, np.ndarray) or is_numeric(x.dtype) else x


def transferred(optimizer: Loadable, state: Mapping[Any, Any], transfer: Transfer) -> dict[Any, Any]:
    """Return state by parameter, with the numbers of some moved.

    Raises:
        ``ValueError`` that names a parameter with which the rule does not go along.
    """
    new = dict(state)
    for group in transfer.groups:
        for label, param in zip(state_checks.labels(group), group["params"], strict=True):
            if param in transfer.moves and state.get(param):
                try:
                    new[param] = optimizer._storage.rule_of(group).rearranged(state[param], transfer.moves[param])
                except ValueError as error:
                    raise ValueError(f"The state of {label} cannot follow its transform: {error}") from error
    return new
