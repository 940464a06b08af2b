"""From torch and back: checkpoints, whole runs, and the states of the pure face.

``load_state_dict`` of our classes takes torch's state dicts as they are. This module has the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import jaxoptim.optim
from jaxoptim.core import Decay, Hyperparameters, OptState, Packed, Rearrangement, as_jax
from jaxoptim.core.numerics import is_complex, placed_like
from jaxoptim.core.rule import Off
from jaxoptim.optim import Optimizer, Parameter, state_dicts
from jaxoptim.optim.groups import Selector, predicate
from jaxoptim.optim.matching import by_name

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, Any]
"""Tensors by name, such as a module's ``state_dict()`` or ``dict(module.named_parameters())``."""
Names = Mapping[str, str] | Callable[[str], str]
"""The name in torch of each parameter here, by its dotted path; paths that a mapping lacks are names in torch too."""
Transforms = Mapping[Selector, Callable[[Any], Any]]
"""What to do to arrays of torch: ``{r".*kernel": jnp.transpose}``; selectors as in ``Optimizer(groups=...)``."""


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
        return _tensor(state_dict)
    if isinstance(state_dict, np.generic):
        return state_dict.item()
    if isinstance(state_dict, dict):
        new = type(state_dict)()
        new.update({key: to_torch(value) for key, value in state_dict.items()})
        return new
    if type(state_dict) in (list, tuple):
        return type(state_dict)(map(to_torch, state_dict))
    return state_dict


def _tensor(array: Any) -> torch.Tensor:
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


def from_torch(rule: Hyperparameters, params: Any, state_dict: Mapping[str, Any]) -> OptState:
    """The state with which the pure face continues what torch has begun.

    Args:
        rule: the optimizer, such as ``rules.Adam(lr=1e-3)``. Its numbers count, not those of the state dict.
        params: the current parameters, a pytree of arrays. They are matched with those of the state dict by name
            if that has ``param_names``, else in the order of ``jax.tree.leaves``.
        state_dict: of torch's optimizer (or ours), with one parameter group.

    Returns:
        A state as ``jaxoptim.init(rule, params)`` makes it. torch's SGD and Muon keep no count of steps; where they
        have state the count is 1.

    Errors:
        As ``Optimizer.load_state_dict``; ``ValueError`` if parameters were updated a different number of times,
        which one state has no place for.

    Example:
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
    options = {name: optimizer.param_groups[0][name] for name in _options(rule)}
    groups = [{**group, **options} for group in state_dict["param_groups"]]
    optimizer._load({**state_dict, "param_groups": groups}, True)
    _, _, state = optimizer.to_functional()
    if not isinstance(state, OptState):
        counts = {
            label: "none" if bucket.state is None else int(bucket.state.step)
            for bucket in optimizer._storage.buckets
            for label in bucket.labels
        }
        raise ValueError(
            "One OptState has one count of steps, but the parameters were updated a different number of times: "
            f"{', '.join(f'{name!r} {count}' for name, count in counts.items())}. Load the state dict into "
            f"optim.{type(rule).__name__} and use its to_functional(), which makes an optax.partition of them."
        )
    return state


def to_torch_state_dict(rule: Hyperparameters, params: Any, state: OptState) -> dict[str, Any]:
    """The way back: what torch's class loads to continue from a state of the pure face.

    Args:
        rule: the optimizer. Its numbers become the options of the group; a schedule, its value at ``state.step``.
        params: the current parameters.
        state: of ``jaxoptim.init(rule, params)`` and its successors.

    Returns:
        A state dict of tensors, one group, in the order of ``jax.tree.leaves``.

    Errors:
        ``ValueError`` for a state of another structure.

    Example:
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


def _options(rule: Hyperparameters) -> dict[str, Any]:
    """The hyperparameters of a rule as plain numbers where they are numbers."""
    plain = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule) if field.init}  # type: ignore[arg-type]
    return {
        name: jax.tree.map(_number, value, is_leaf=lambda x: isinstance(x, Decay | Off))
        for name, value in plain.items()
    }


def _number(x: Any) -> Any:
    x = x.rate if isinstance(x, Decay) else 0.0 if isinstance(x, Off) else x
    return x.item() if isinstance(x, jax.Array | np.ndarray | np.generic) and x.ndim == 0 else x


def _optimizer(rule: Hyperparameters, params: Any) -> Optimizer:
    """The torch-style optimizer of a rule."""
    if isinstance(params, Packed):
        raise TypeError(
            "The parameters are packed, but torch keeps state by parameter. Give params.unpack(), and pack later."
        )
    classes = [x for x in vars(jaxoptim.optim).values() if isinstance(x, type) and issubclass(x, Optimizer)]
    own = type(type(rule).__name__, (Optimizer,), {"rule": type(rule)})
    return next((x for x in classes if getattr(x, "rule", None) is type(rule)), own)(params, **_options(rule))


def carry_over(
    optimizer: Optimizer,
    params: Tensors,
    state_dict: Mapping[str, Any],
    *,
    names: Names | None = None,
    transforms: Transforms | None = None,
    order: Sequence[str] | None = None,
) -> None:
    """Continue a whole run of torch: put its parameters and its optimizer's state into an optimizer of ours.

    Args:
        optimizer: of the same class, over parameters of any values, with the dtypes and devices wanted.
        params: torch's parameters by name, such as ``module.state_dict()``. Names that no parameter here has
            (buffers) are left out.
        state_dict: of torch's optimizer.
        names: torch's name of each parameter here (default None: they are equal).
        transforms: functions that move the numbers of a parameter, such as a transposition for ``[out, in]`` to
            ``[in, out]``, by regular expression or predicate of its path here (default None). Slots of the same
            shape follow; so do Adafactor's means of rows and columns, which a transposition exchanges.
        order: torch's names in the order of its optimizer's parameters (default None: those in ``state_dict``, if
            it has ``param_names``; or, of a single group, the order of ``params``).

    Errors:
        ``ValueError`` for a parameter that one side lacks, for shapes that differ after the transform, for a
        transform that does not only move numbers, or with which the optimizer would go on otherwise (Muon's
        orientation, the last two axes in Adafactor); and those of ``Optimizer.load_state_dict``. They name the
        parameter. Nothing is changed then.

    A scheduler is made before, because that sets the rate, and takes torch's state after:
    ``scheduler.load_state_dict(...)``.

    Muon of a square matrix that is transposed makes the same steps up to the bfloat16 in which it iterates.

    Example:
        >>> import torch, jax.numpy as jnp
        >>> from jaxoptim import interop, optim
        >>> layer = torch.nn.Linear(3, 2)
        >>> theirs = torch.optim.AdamW(layer.parameters(), lr=0.1)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> theirs.step()
        >>> ours = optim.AdamW({"dense": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}})
        >>> interop.torch.carry_over(
        ...     ours,
        ...     layer.state_dict(),
        ...     theirs.state_dict(),
        ...     names={"dense.kernel": "weight", "dense.bias": "bias"},
        ...     transforms={".*kernel": jnp.transpose},
        ... )
        >>> bool(jnp.array_equal(ours.params["dense"]["kernel"], layer.weight.detach().numpy().T))
        True
        >>> ours.param_groups[0]["lr"]
        0.1
    """
    places = _places(optimizer, params, names, transforms)
    values = {}
    for param, (label, name, move) in places.items():
        value = move(as_jax(params[name]))
        if is_complex(value) and not is_complex(param):
            raise ValueError(f"{label!r} is real, but {name!r} in torch is complex.")
        values[param] = placed_like(value.astype(param.dtype), param.value)
    labels = {name: label for label, name, _ in places.values()}
    there = _names_in(state_dict, [name for name in params if name in labels], order)
    moves = {param: move for param, (_, _, move) in places.items() if not move.is_identity()}
    optimizer._load(dict(state_dict), True, names=[[labels.get(n, n) for n in group] for group in there], moves=moves)
    for param, value in values.items():
        param.value = value


def carry_back(
    optimizer: Optimizer,
    params: Tensors,
    *,
    names: Names | None = None,
    transforms: Transforms | None = None,
    order: Sequence[str] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The way back from :func:`carry_over`: a run of ours as torch's parameters and optimizer state.

    Args:
        optimizer: of ours.
        params: torch's parameters by name, for their shapes, dtypes and order.
        names: as in :func:`carry_over`.
        transforms: as in :func:`carry_over`, from torch to here; they are inverted.
        order: torch's names in the order of its optimizer's parameters (default None: that of ``params``).

    Returns:
        ``(tensors by torch's name, state dict)``, for ``module.load_state_dict(tensors, strict=False)`` and
        :func:`load_state_dict`. The groups are those of ``optimizer``.

    Errors:
        As :func:`carry_over`.

    Example:
        >>> import torch, jax.numpy as jnp
        >>> from jaxoptim import interop, optim
        >>> ours = optim.SGD({"kernel": jnp.ones((3, 2))}, momentum=0.9)
        >>> ours.step({"kernel": jnp.ones((3, 2))})
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> tensors, state_dict = interop.torch.carry_back(
        ...     ours, layer.state_dict(), names={"kernel": "weight"}, transforms={"kernel": jnp.transpose}
        ... )
        >>> tuple(tensors["weight"].shape), tuple(state_dict["state"][0]["momentum_buffer"].shape)
        ((2, 3), (2, 3))
    """
    places = _places(optimizer, params, names, transforms)
    known = {name: param for param, (_, name, _) in places.items()}
    ranks = {name: rank for rank, name in enumerate(order or params)}
    if missing := [name for name in known if name not in ranks]:
        raise ValueError(f"order lacks {missing[0]!r}. It has all of torch's names.")
    tensors = {
        name: _tensor(places[known[name]][2].inverse()(known[name].value)).to(params[name].dtype)
        for name in params
        if name in known
    }
    saved = optimizer.state_dict()
    given = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [
        {**group, "params": sorted(mine["params"], key=lambda param: ranks[places[param][1]])}
        for group, mine in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    wanted = [param for group in groups for param in group["params"]]
    state = {given[key] if isinstance(key, int) else key: entry for key, entry in saved["state"].items()}
    inverse = {param: move.inverse() for param, (_, _, move) in places.items() if not move.is_identity()}
    state = dict(optimizer._rearranged(optimizer.param_groups, state, given, wanted, inverse))
    ids = {param: index for index, param in enumerate(wanted)}
    for group in groups:
        if "param_names" in group:
            group["param_names"] = [places[param][1] for param in group["params"]]
        group["params"] = [ids[param] for param in group["params"]]
    return tensors, to_torch(
        {
            "state": {ids.get(key, key): state[key] for key in sorted(state, key=lambda k: ids.get(k, len(ids)))},
            "param_groups": groups,
        }
    )


def _places(
    optimizer: Optimizer, params: Tensors, names: Names | None, transforms: Transforms | None
) -> dict[Parameter, tuple[str, str, Rearrangement]]:
    """For each parameter its path here, its name in torch, and how its numbers go from there to here."""
    optimizer._storage.settle()
    inside = optimizer._storage.parameters()
    labels = {param: optimizer._storage.labels[param] for param in inside}
    if isinstance(names, Mapping) and (unknown := [path for path in names if path not in labels.values()]):
        raise ValueError(f"names has {unknown[0]!r}, but the parameters here are {_listed(labels.values())}.")
    rules = [(selector, predicate(selector), function) for selector, function in (transforms or {}).items()]
    for selector, selects, _ in rules:
        if not any(map(selects, labels.values())):
            raise ValueError(
                f"transforms: {selector!r} selects no parameter. A regular expression must match the whole path; the "
                f"paths are {_listed(labels.values())}."
            )
    places: dict[Parameter, tuple[str, str, Rearrangement]] = {}
    taken: dict[str, str] = {}
    for param, label in labels.items():
        name = names(label) if callable(names) else (names or {}).get(label, label)
        if name not in params:
            raise ValueError(
                f"torch has no parameter {name!r} for {label!r} here; it has {_listed(params)}. Give names, a dict "
                "from the paths here to the names there."
            )
        if name in taken:
            raise ValueError(f"{label!r} and {taken[name]!r} cannot both be {name!r} in torch.")
        taken[name] = label
        function = next((function for _, selects, function in rules if selects(label)), lambda x: x)
        move = Rearrangement.of(function, tuple(params[name].shape), label)
        if move.index.shape != param.shape:
            raise ValueError(
                f"{label!r} has shape {param.shape}, but {name!r} in torch has {tuple(params[name].shape)}, which its "
                f"transform makes {move.index.shape}. Give transforms that lead to the shape here."
            )
        places[param] = label, name, move
    return places


def _names_in(state_dict: Mapping[str, Any], known: Sequence[str], order: Sequence[str] | None) -> list[list[str]]:
    """The names in torch of the parameters of each group in a state dict."""
    groups = state_dict["param_groups"]
    if order is None and all("param_names" in group for group in groups):
        return [list(group["param_names"]) for group in groups]
    if order is None and len(groups) > 1:
        raise ValueError(
            f"The state dict has {len(groups)} groups and no param_names, so the order of its parameters is not known. "
            "Give order, torch's names in the order of the groups, or make torch's optimizer of named_parameters()."
        )
    flat = known if order is None else order
    count = sum(len(group["params"]) for group in groups)
    if count != len(flat):
        raise ValueError(
            f"The state dict has {count} parameters, but {len(flat)} were expected: {_listed(flat)}. "
            "Give order, torch's names in the order of its optimizer's parameters."
        )
    names = iter(flat)
    return [[next(names) for _ in group["params"]] for group in groups]


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
