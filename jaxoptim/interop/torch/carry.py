"""Conversion of a whole run: parameters and optimizer state, with names and layouts translated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxoptim.core import Rearrangement, as_jax
from jaxoptim.core.numerics import is_complex, placed_like
from jaxoptim.interop.torch.tensors import as_tensor, to_torch
from jaxoptim.optim import Optimizer, Parameter, state_checks
from jaxoptim.optim.groups import Selector, predicate
from jaxoptim.optim.state_dicts import Transfer

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, Any]
"""Tensors by name, such as a module's ``state_dict()`` or ``dict(module.named_parameters())``."""
TorchNames = Mapping[str, str] | Callable[[str], str]
"""The torch name of each parameter here, by dotted path; a path that a mapping lacks is its own torch name."""
Transforms = Mapping[Selector, Callable[[Any], Any]]
"""Functions of torch's arrays, as in ``{r".*kernel": jnp.transpose}``; selectors as in ``Optimizer(groups=...)``."""


def carry_over(
    optimizer: Optimizer,
    params: Tensors,
    state_dict: dict[str, Any],
    *,
    names: TorchNames | None = None,
    transforms: Transforms | None = None,
    order: Iterable[str] | None = None,
) -> None:
    """Continue a whole run of torch: load its parameters and its optimizer's state into an optimizer of ours.

    Args:
        optimizer: ours of the same class, over parameters of any values, with the dtypes and devices wanted.
        params: torch's parameters by name, such as ``module.state_dict()``. Names that no parameter here has
            (buffers) are left out.
        state_dict: the state dict of torch's optimizer.
        names: torch's name of each parameter here (default None: they are equal).
        transforms: functions of a NumPy array that move the numbers of a parameter, such as a transposition for
            ``[out, in]`` to ``[in, out]``, by regular expression or predicate of its path here (default None).
            Slots of the same shape follow; so do Adafactor's means of rows and columns, which a transposition
            exchanges. A square matrix for which one is forgotten goes unnoticed.
        order: torch's names in the order of its optimizer's parameters (default None: those in ``state_dict``, if
            it has ``param_names``; or, of a single group, the order of ``params``).

    A parameter has one counterpart: one of torch cannot become several. Those of torch that are not here and were
    never updated, such as frozen layers, are left out. Tied weights count by the first of their names.

    Raises:
        ``ValueError`` for a parameter that one side lacks, for shapes that differ after the transform, for a
        transform that does not only move numbers, or with which the optimizer would go on otherwise (Muon's
        orientation, the last two axes in Adafactor); and those of ``Optimizer.load_state_dict``. They name the
        parameter. Nothing is changed then.

    A scheduler is made before, because that sets the rate, and takes torch's state after:
    ``scheduler.load_state_dict(...)``.

    Muon of a square matrix that is transposed makes the same steps up to the bfloat16 in which it iterates.

    Examples:
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
    state_checks.check_layout(state_dict)
    _check_arguments(optimizer, params, names, transforms)
    first = _first_names(params)
    places = _places(optimizer, params, first, names, transforms)
    values = {}
    for param, (label, name, move) in places.items():
        value = move(as_jax(params[name]))
        if is_complex(value) and not is_complex(param):
            raise ValueError(f"{label!r} is real, but {name!r} in torch is complex.")
        values[param] = placed_like(value.astype(param.dtype), param.value)
    labels = {name: label for label, name, _ in places.values()}
    there = _names_in(state_dict, params, first, [*labels], order)
    groups, called = [], []
    for group, known in zip(state_dict["param_groups"], there, strict=True):
        # What is not here and was never updated there, such as a frozen layer, has nothing to bring.
        kept = [
            (key, name)
            for key, name in zip(group["params"], known, strict=True)
            if name in labels or state_dict["state"].get(key)
        ]
        groups.append({**group, "params": [key for key, _ in kept]})
        called.append([labels.get(name, name) for _, name in kept])
    moves = {param: move for param, (_, _, move) in places.items() if not move.is_identity()}
    given = state_dict.copy()
    given["param_groups"] = groups
    optimizer._load(given, True, names=called, moves=moves)
    for param, value in values.items():
        param.value = value


def carry_back(
    optimizer: Optimizer,
    params: Tensors,
    *,
    names: TorchNames | None = None,
    transforms: Transforms | None = None,
    order: Iterable[str] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Convert a run of ours to torch's parameters and optimizer state: the inverse of :func:`carry_over`.

    Args:
        optimizer: an optimizer of ours.
        params: torch's parameters by name, for their shapes, dtypes and order.
        names: as in :func:`carry_over`.
        transforms: as in :func:`carry_over`, from torch to here; they are inverted.
        order: torch's names in the order of its optimizer's parameters, and so of its groups (default None: that of
            ``params``, and the groups as they are here).

    Returns:
        ``(tensors by torch's name, state dict)``, for ``module.load_state_dict(tensors, strict=False)``, which keeps
        buffers and frozen layers, and :func:`load_state_dict`, which matches the names if torch's optimizer has some.

    Raises:
        As :func:`carry_over`.

    Examples:
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
    _check_arguments(optimizer, params, names, transforms)
    first = _first_names(params)
    places = _places(optimizer, params, first, names, transforms)
    known = {name: param for param, (_, name, _) in places.items()}
    ranks = {name: rank for rank, name in enumerate(_translated(params if order is None else order, first))}
    if missing := [name for name in known if name not in ranks]:
        raise ValueError(f"order lacks {missing[0]!r}. It has all of torch's names.")
    inverse = {param: move.inverse() for param, (_, _, move) in places.items()}
    tensors = {
        name: as_tensor(inverse[param](param.value)).to(tensor.dtype)
        for name, tensor in params.items()
        if (param := known.get(first[name])) is not None
    }
    saved = optimizer.state_dict()
    given = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [
        {**group, "params": sorted(mine["params"], key=lambda param: ranks[places[param][1]])}
        for group, mine in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    if order is not None:
        groups.sort(key=lambda group: ranks[places[group["params"][0]][1]] if group["params"] else len(ranks))
    wanted = [param for group in groups for param in group["params"]]
    numbered = dict(enumerate(given))
    state = {numbered.get(key, key): entry for key, entry in saved["state"].items()}
    moves = {param: move for param, move in inverse.items() if not move.is_identity()}
    state = dict(optimizer._transferred(state, Transfer(optimizer.param_groups, given, wanted, moves)))
    ids = {param: index for index, param in enumerate(wanted)}
    for group in groups:
        group["param_names"] = [places[param][1] for param in group["params"]]
        group["params"] = [ids[param] for param in group["params"]]
    slots = {ids[param]: state[param] for param in wanted if param in state}
    others = {key: entry for key, entry in state.items() if key not in ids}
    return tensors, to_torch({"state": slots | others, "param_groups": groups})


def _check_arguments(optimizer: Any, params: Any, names: Any, transforms: Any) -> None:
    """Raise for arguments of the wrong kind."""
    for what, given, kind in (
        ("optimizer", optimizer, Optimizer),
        ("params", params, Mapping),
        ("transforms", transforms or {}, Mapping),
        ("names", names or {}, Mapping | Callable),
    ):
        if not isinstance(given, kind):
            wanted = {
                "optimizer": "an optimizer of jaxoptim.optim",
                "params": "tensors by name, such as module.state_dict()",
            }
            raise TypeError(f"{what} is {wanted.get(what, 'a dict by paths here')}, but got {type(given).__name__}.")
    if foreign := [name for name, tensor in params.items() if not hasattr(tensor, "detach")]:
        raise TypeError(f"params has tensors of torch, but {foreign[0]!r} is {type(params[foreign[0]]).__name__}.")


def _places(
    optimizer: Optimizer,
    params: Tensors,
    first: Mapping[str, str],
    names: TorchNames | None,
    transforms: Transforms | None,
) -> dict[Parameter, tuple[str, str, Rearrangement]]:
    """Return each parameter's path here, its first name in torch, and the permutation from torch's layout to ours."""
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
                "from the paths here to torch's names."
            )
        name = first[name]
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


def _first_names(params: Tensors) -> dict[str, str]:
    """Map each name to the first name of its tensor: tied weights have several, but one entry in torch's optimizer."""
    first: dict[Any, str] = {}
    return {name: first.setdefault(_place_of(name, tensor), name) for name, tensor in params.items()}


def _place_of(name: str, tensor: Any) -> Any:
    """Return the memory location of a tensor's data, or its name if that is unknown."""
    address = tensor.data_ptr() if hasattr(tensor, "data_ptr") else 0
    return (address, tuple(tensor.shape), tensor.stride()) if address else name


def _translated(order: Iterable[str], first: Mapping[str, str]) -> list[str]:
    """Translate names to the first names of their tensors, each once.

    Raises:
        ``ValueError`` for a name that no tensor has.
    """
    names = list(order)
    if unknown := [name for name in names if name not in first]:
        raise ValueError(f"order has {unknown[0]!r}, but torch has {_listed(first)}.")
    return list(dict.fromkeys(first[name] for name in names))


def _names_in(
    state_dict: Mapping[str, Any],
    params: Tensors,
    first: Mapping[str, str],
    known: Sequence[str],
    order: Iterable[str] | None,
) -> list[list[str]]:
    """Return the torch names of the parameters of each group in a state dict."""
    groups = state_dict["param_groups"]
    if order is None and all("param_names" in group for group in groups):
        return [[first.get(name, name) for name in group["param_names"]] for group in groups]
    if order is None and len(groups) > 1:
        raise ValueError(
            f"The state dict has {len(groups)} groups and no param_names, so the order of its parameters is not known. "
            "Give order, torch's names in the order of the groups, or make torch's optimizer of named_parameters()."
        )
    count = sum(len(group["params"]) for group in groups)
    everything = _translated(params if order is None else order, first)
    flat = everything if order is not None or count == len(everything) else [x for x in everything if x in known]
    if count != len(flat):
        raise ValueError(
            f"The state dict has {count} parameters, but {len(flat)} were expected: {_listed(flat)}. "
            "Give order, torch's names in the order of its optimizer's parameters."
        )
    names = iter(flat)
    return [[next(names) for _ in group["params"]] for group in groups]


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
