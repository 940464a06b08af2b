"""Recognize objects of other libraries without importing these."""

from __future__ import annotations

import functools
import inspect
from typing import Any

ARRAYS_ALONE = (
    "Give the arrays alone, eqx.partition(model, eqx.is_inexact_array)[0] or nnx.split(model, nnx.Param, ...)[1], and "
    "join them with the rest in the loss."
)
"""Advice for a module among other parameters, for error messages."""


def is_tensor(x: Any) -> bool:
    """Whether ``x`` is a tensor of torch."""
    return hasattr(x, "requires_grad") and hasattr(x, "to_dense")


def check_not_trained_by_torch(what: str, x: Any) -> None:
    """Raise for a tensor that torch differentiates by, and for a module of torch; other tensors are data."""
    is_module = hasattr(type(x), "named_parameters")
    if is_module or (is_tensor(x) and (x.requires_grad or type(x).__name__ == "Parameter")):
        kind = f"{'module' if is_module else 'parameter'} of torch"
        raise TypeError(
            f"{what} is a {kind}, which no loss.backward() would train here: the loss is a JAX function. Convert the "
            "weights, {n: p.detach().numpy() for n, p in module.named_parameters()}; jaxoptim.interop.torch has the "
            "rest of a run."
        )


def unwrapped(given: Any) -> Any:
    """Return the function inside of a ``functools.partial``, and the object of a bound method."""
    while isinstance(given, functools.partial):
        given = given.func
    return given.__self__ if inspect.ismethod(given) else given


def kind_of(given: Any) -> Any:
    """Return a class or a function as it is, and the class of anything else."""
    return given if isinstance(given, type) or inspect.isfunction(given) else type(given)


def origin(given: Any, *packages: str) -> Any:
    """Return the class or function of these packages that an object is or derives from; None if there is none."""
    kind, prefixes = kind_of(unwrapped(given)), tuple(f"{name}." for name in packages)
    kinds = kind.__mro__ if isinstance(kind, type) else (kind,)
    return next((of for of in kinds if f"{of.__module__}.".startswith(prefixes)), None)
