"""A whole run: parameters and optimizer state, with names and layouts translated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxoptim.core import Rearrangement, as_jax
from jaxoptim.core.numerics import is_complex, placed_like
from jaxoptim.interop.torch.tensors import as_tensor, to_torch
from jaxoptim.optim import Optimizer, Parameter
from jaxoptim.optim.groups import Selector, predicate

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, Any]
"""Tensors by name, such as a module's ``state_dict()`` or ``dict(module.named_parameters())``."""
Names = Mapping[str, str] | Callable[[str], str]
"""The name in torch of each parameter here, by its dotted path; paths that a mapping lacks are names in torch too."""
Transforms = Mapping[Selector, Callable[[Any], Any]]
"""What to do to arrays of torch: ``{r".*kernel": jnp.transpose}``; selectors as in ``Optimizer(groups=...)``."""


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
        name: as_tensor(places[known[name]][2].inverse()(known[name].value)).to(params[name].dtype)
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
    numbered = dict(enumerate(given))
    state = {numbered.get(key, key): entry for key, entry in saved["state"].items()}
    inverse = {param: move.inverse() for param, (_, _, move) in places.items() if not move.is_identity()}
    state = dict(optimizer._rearranged(optimizer.param_groups, state, given, wanted, inverse))
    ids = {param: index for index, param in enumerate(wanted)}
    for group in groups:
        if "param_names" in group:
            group["param_names"] = [places[param][1] for param in group["params"]]
        group["params"] = [ids[param] for param in group["params"]]
    slots = {ids[param]: state[param] for param in wanted if param in state}
    others = {key: entry for key, entry in state.items() if key not in ids}
    return tensors, to_torch({"state": slots | others, "param_groups": groups})


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
