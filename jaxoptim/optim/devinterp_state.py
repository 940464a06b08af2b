"""State dicts of devinterp 2's ``SGMCMC``, whose groups hold priors and preconditioners as Python objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxoptim.optim import state_checks
from jaxoptim.optim.prior import CompositePrior, GaussianPrior, Prior, terms_of

_PLACE = "param_idx"
_IDLE = (_PLACE, "thermostat", "momentum")
"""Entries of state that no step depends on."""


def with_places(state_dict: Any) -> Any:
    """Return a state dict with the place of each parameter in its group, by which devinterp finds its mask."""
    for group in state_dict["param_groups"]:
        for place, number in enumerate(group["params"]):
            state_dict["state"].setdefault(number, {})[_PLACE] = place
    return state_dict


def read(state_dict: Any, aside: tuple[str, ...]) -> Any:
    """Return a state dict, of devinterp or of this library, in the terms of the rule; it is not changed itself.

    Args:
        state_dict: in torch's layout.
        aside: entries of groups that are left out.
    """
    state_checks.check_layout(state_dict)
    new = state_dict.copy()
    new["state"] = {
        key: {name: x for name, x in entry.items() if name not in _IDLE and x is not None}
        if isinstance(entry, Mapping)
        else entry
        for key, entry in state_dict["state"].items()
    }
    new["param_groups"] = [
        {name: x for name, x in _group(group).items() if name not in aside} for group in state_dict["param_groups"]
    ]
    return new


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group, with numbers for the objects of devinterp."""
    if isinstance(group.get("preconditioner"), str):
        return dict(group)
    objects = ("prior", "preconditioner", "mask", "metrics")
    terms = terms_of(_prior(group.get("prior")))
    return {
        **{name: x for name, x in group.items() if name not in objects},
        "weight_decay": terms.weight_decay,
        "localization": terms.localization,
        "center_slot": terms.slot,
        "preconditioner": "identity",
        "optimize_over": None,
        **_preconditioner(group.get("preconditioner")),
        "metrics": "components" if "metrics" in group else None,
    }


def _prior(prior: Any) -> Prior | None:
    """Return a prior of devinterp as one of ours; the state says where its center is."""
    if prior is None or hasattr(prior, "box_size"):
        return None
    if hasattr(prior, "priors"):
        return CompositePrior([_prior(member) for member in prior.priors])
    # There other text, and a number, is zero.
    is_centred = prior.center == "initial" if isinstance(prior.center, str | int | float) else prior.center is not None
    return GaussianPrior(prior.localization, center="initial" if is_centred else None)


def _preconditioner(preconditioner: Any) -> dict[str, Any]:
    """Return the options of a preconditioner of devinterp."""
    if hasattr(preconditioner, "preconditioners"):
        parts = [_preconditioner(part) for part in preconditioner.preconditioners]
        return {name: x for part in parts for name, x in part.items()}
    if hasattr(preconditioner, "masks"):
        return {"optimize_over": list(preconditioner.masks)}
    if hasattr(preconditioner, "alpha"):
        return {"preconditioner": "rmsprop", "alpha": preconditioner.alpha, "eps": preconditioner.eps}
    if hasattr(preconditioner, "diffusion_factor"):
        return {"preconditioner": "nht", "diffusion_factor": preconditioner.diffusion_factor}
    return {}
