"""Parameter stores of Pyro: their files, and their values by the names of numpyro's sites."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.interop.numpyro import by_path
from jaxoptim.pyro.infer.objective import Site
from jaxoptim.pyro.optim import files
from jaxoptim.pyro.optim.optim import DIVIDER


def loaded(path: str | os.PathLike[str]) -> Any:
    """Return the content of a file of ours, or of ``pyro.get_param_store().save``. No code in either is run.

    Raises:
        ``ImportError`` for a file of Pyro's without torch; ``ValueError`` for another file of torch; what the loading
        raises.
    """
    return files.loaded(path, lambda torch: _read(path, torch))


def _read(path: str | os.PathLike[str], torch: Any) -> Any:
    """A parameter store of Pyro from its file."""
    try:
        allowed: list[Any] = [_class_of(name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)]
        with torch.serialization.safe_globals(allowed):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{os.fspath(path)} is neither a file of svi.save nor a parameter store of Pyro that can be read: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not is_store(state):
        raise ValueError(
            f"{os.fspath(path)} is a file of torch.save, but no parameter store of Pyro, which is a dict of 'params' "
            "and 'constraints'. Give what svi.save or pyro.get_param_store().save has written."
        )
    return state


def is_store(state: Any) -> bool:
    """Return whether an object has the form of ``pyro.get_param_store().get_state()``."""
    return isinstance(state, Mapping) and state.keys() == {"params", "constraints"}


class _Unknown:
    """A placeholder for an object of an unknown class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


def _class_of(name: str) -> tuple[Any, str]:
    """A class of constraints, or an empty one in its place, and the name that it has in a file."""
    module, _, own = name.rpartition(".")
    package, _, _ = module.rpartition(".")
    found = None
    # Pyro has constraints of its own, whose transforms are registered when it is imported.
    if package in ("torch.distributions", "pyro.distributions") and importlib.util.find_spec(package.split(".")[0]):
        importlib.import_module(package)
        found = getattr(importlib.import_module(f"{package}.constraints"), own, None)
    base = importlib.import_module("torch.distributions").constraints.Constraint
    is_constraint = isinstance(found, type) and issubclass(found, base)
    return (found if is_constraint else type(own, (_Unknown,), {})), name


def constrained_values(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The constrained values in a parameter store by name.

    Raises:
        ``ValueError`` for a parameter that is no tensor, or whose constraint cannot be read.
    """
    import torch

    values = {}
    for name, param in state["params"].items():
        if not isinstance(param, torch.Tensor):
            raise ValueError(f"{name!r} in the parameter store of Pyro is a {type(param).__name__}, but no tensor.")
        constraint = state["constraints"].get(name, torch.distributions.constraints.real)
        try:
            value = torch.distributions.transform_to(constraint)(param.detach().cpu())
        except NotImplementedError as error:
            raise ValueError(
                f"The constraint of {name!r}, {type(constraint).__name__}, is not known here. Import the package that "
                f"has it, such as pyro.distributions, or give init_params={{{name!r}: value}} to SVI."
            ) from error
        values[name] = value.numpy().copy()
    return values


def by_site(
    store: Mapping[str, Any], sites: Mapping[str, Site], values: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Constrained values in the form of the sites.

    Args:
        store: by the names that Pyro has given them.
        sites: of the model and the guide.
        values: of their parameters, unconstrained.

    Returns:
        The value of each site that the store has some of, and the names of the arrays that are from there.

    Raises:
        ``KeyError`` for a name that there is no array of, ``ValueError`` for one of another shape.
    """
    own = {leaf: site for site in sites.values() for leaf in site.leaves}
    given = {_leaf_of(name, own): value for name, value in store.items()}
    result = {}
    for name in dict.fromkeys(own[leaf].name for leaf in given):
        site = sites[name]
        arrays = by_path({name: site.value(values)})
        for leaf in arrays.keys() & given.keys():
            if arrays[leaf].shape != given[leaf].shape:
                raise ValueError(
                    f"Pyro's value of {leaf!r} has shape {given[leaf].shape}, but that of the param statement is "
                    f"{arrays[leaf].shape}. Both must be equal."
                )
            arrays[leaf] = jnp.asarray(given[leaf]).astype(arrays[leaf].dtype)
        result[name] = jax.tree.unflatten(site.treedef, [arrays[leaf] for leaf in site.leaves])
    return result, list(given)


def unconstrained(sites: Mapping[str, Site], values: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The unconstrained values of some of the arrays of constrained sites.

    Raises:
        ``ValueError`` for a value outside its constraint.
    """
    arrays: dict[str, Any] = {}
    for name, value in values.items():
        arrays |= sites[name].unconstrained(value)
    for name in names:
        if not jnp.isfinite(arrays[name]).all():
            raise ValueError(
                f"Pyro's value of {name!r} is not within the constraint that model and guide have for it. Give both "
                "the same one."
            )
    return {name: arrays[name] for name in names}


def _leaf_of(name: str, known: Mapping[str, Any]) -> str:
    """Return the leaf's name in this library for Pyro's ``name``."""
    for candidate in (name, name.replace(DIVIDER, "."), name.replace(DIVIDER, "$params.")):
        if candidate in known:
            return candidate
    raise KeyError(
        f"Pyro's store has {name!r}, but no param statement that model and guide reach has this name. They reach "
        f"{', '.join(map(repr, sorted(known))) or 'none'}."
    )
