"""Checks of the inputs of a :class:`PyroOptim`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.experimental.sparse import BCOO

from jaxoptim.core import trees
from jaxoptim.core.foreign import check_not_trained_by_torch
from jaxoptim.core.numerics import strong
from jaxoptim.core.shown import shown
from jaxoptim.optim.parameter import Parameter


def listed(params: Iterable[Parameter]) -> list[Parameter]:
    """Return parameters as a list; raise for anything that is not a collection."""
    if isinstance(params, Parameter) or not isinstance(params, Iterable):
        raise TypeError(f"A list of parameters is expected, but got {shown(params)}. Give optimizer([parameter]).")
    return list(params)


def check_name(param: Any) -> None:
    """Raise for anything but a parameter with a name."""
    check_not_trained_by_torch("One of the parameters", param)
    if not isinstance(param, Parameter):
        raise TypeError(
            f"Parameters are expected, jaxoptim.optim.Parameter(value, name), but one is {type(param).__name__}. For "
            "arrays there is update(params, grads)."
        )
    if not isinstance(param.name, str):
        raise ValueError(
            f"A parameter of shape {param.shape} has no name, by which its options and state are found. "
            "Give Parameter(value, name)."
        )


def check_same(param: Parameter, shape: tuple[int, ...], dtype: Any) -> None:
    """Raise for a value that cannot replace that of the parameter of the same name."""
    if param.shape != shape or param.dtype != dtype:
        raise ValueError(
            f"The parameter {param.name!r} has shape {shape} and dtype {dtype} now, but its state is of shape "
            f"{param.shape} and dtype {param.dtype}. Take another name, or a new optimizer."
        )


def check_dict(what: str, name: str, given: Any) -> None:
    """Raise for a function of the name that has returned no dict."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"per-param {what} arg must return defaults dictionary, but for {name!r} the function returned {given!r}."
        )


def checked_update(params: Any, grads: Any) -> Mapping[str, Any]:
    """Check both dicts, and return the gradients by name."""
    for what, given in (("params", params), ("grads", grads)):
        if not isinstance(given, Mapping):
            raise TypeError(f"update takes dicts by the names of parameters, but {what} is {type(given).__name__}.")
        for name in given:
            if not isinstance(name, str):
                raise TypeError(f"update takes dicts by the names of parameters, but {what} has the key {name!r}.")
        if traced := [name for name, value in given.items() if isinstance(value, jax.core.Tracer)]:
            raise TypeError(
                f"update keeps state, so it cannot be compiled, but {what}[{traced[0]!r}] is traced. In a compiled "
                "function, use jaxoptim.transformation(optimizer), whose state you carry."
            )
    if missing := sorted(params.keys() - grads.keys()):
        raise ValueError(f"grads has nothing for {missing[0]!r}. Give None where a value is to stay.")
    if extra := sorted(grads.keys() - params.keys()):
        raise ValueError(f"grads has {extra[0]!r}, which params lacks. The names are {', '.join(map(repr, params))}.")
    return {name: _array(grad) for name, grad in trees.owned_arrays(dict(grads)).items()}


def _array(grad: Any) -> Any:
    return grad if grad is None or isinstance(grad, BCOO) else strong(grad)


def takes_two(function: Callable[..., Any]) -> bool:
    """Return whether a function takes two names, of a module and of its parameter (the deprecated form).

    As in Pyro, an argument with a default counts.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(place.kind in kinds for place in inspect.signature(function).parameters.values()) >= 2
