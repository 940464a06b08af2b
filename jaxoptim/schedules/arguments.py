"""Checks of the arguments of schedules, chosen by the annotations of the formulas.

A check takes the argument's name and value and returns the value to keep, or raises. The classes of
``jaxoptim.optim.lr_scheduler`` call those that torch makes too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import as_pytree, is_known
from jaxoptim.core.shown import shown
from jaxoptim.schedules.arithmetic import Base


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
        raise TypeError(f"{name} must be a number or a scalar array, but got {shown(value)} ({type(value).__name__}).")
    if isinstance(value, jax.Array | np.ndarray):
        return value if jnp.issubdtype(value.dtype, jnp.floating) else jnp.asarray(value, float)
    return float(value)


def rate(name: str, value: Any) -> Any:
    """Check a number >= 0."""
    value = _number(name, value)
    if is_known(value) and not np.all(np.asarray(value) >= 0):
        raise ValueError(f"{name} must be >= 0, but got {value}.")
    return value


def _base(name: str, value: Any) -> Base:
    return Base.of(rate(name, value))


def whole(name: str, value: Any, least: int) -> int:
    """Check a whole number that has a lower bound."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or value != int(value):
        raise TypeError(f"{name} must be a whole number, but got {shown(value)}.")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, but got {value}.")
    return int(value)


def _count(name: str, value: Any) -> int:
    return whole(name, value, 0)


def _size(name: str, value: Any) -> int:
    return whole(name, value, 1)


def _optional_count(name: str, value: Any) -> int | None:
    return None if value is None else _count(name, value)


def _milestones(name: str, value: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(_count(f"an element of {name}", milestone) for milestone in value))


def function(name: str, value: Any) -> Callable[..., Any]:
    """Check a function, and return it as part of a pytree."""
    if not callable(value):
        raise TypeError(f"{name} should be a function, but got {type(value).__name__}")
    return as_pytree(value)


def _optional_function(name: str, value: Any) -> Callable[..., Any] | None:
    return None if value is None else function(name, value)


def _functions(name: str, value: Iterable[Any]) -> tuple[Callable[..., Any], ...]:
    functions = tuple(function(f"an element of {name}", element) for element in value)
    if not functions:
        raise ValueError(f"{name} must have at least one schedule, but got none.")
    return functions


def _factor(text: str, admits: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
    """Make a check of a factor, with torch's message for one that is out of range."""

    def check(name: str, value: Any) -> Any:
        _number(name, value)
        if is_known(value) and not admits(value):
            raise ValueError(f"{text} Got {name}={value}.")
        return value

    return check


constant_factor = _factor(
    "Constant multiplicative factor expected to be between 0 and 1.", lambda factor: 0 <= factor <= 1
)
start_factor = _factor(
    "Starting multiplicative factor expected to be greater than 0 and less or equal to 1.",
    lambda factor: 0 < factor <= 1,
)
end_factor = _factor("Ending multiplicative factor expected to be between 0 and 1.", lambda factor: 0 <= factor <= 1)


def first_period(name: str, value: Any) -> Any:
    """Check the number of steps to the first restart."""
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"Expected positive integer {name}, but got {value}")
    return value


def growth(name: str, value: Any) -> Any:
    """Check the factor between periods."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"Expected integer {name} >= 1, but got {value}")
    return value


def lowest_rate(name: str, value: Any) -> Any:
    """Check the lowest rate of a schedule, whose type torch checks."""
    if isinstance(value, bool) or not isinstance(value, float | int | np.number | jax.Array):
        raise ValueError(f"Expected float or int {name}, but got {value} of type {type(value)}")
    return value


def fraction(name: str, value: Any) -> Any:
    """Check a float in [0, 1]; as in torch, an int is refused."""
    if is_known(value) and (not isinstance(value, float) or not 0 <= value <= 1):
        raise ValueError(f"Expected float between 0 and 1 {name}, but got {value}")
    return value


def strategy(name: str, value: Any) -> Any:
    """Check the name of the curve from one rate to another."""
    if value not in ("cos", "linear"):
        raise ValueError(f"{name} must be one of 'cos' or 'linear', instead got {value}")
    return value


def cyclic_mode(name: str, value: Any) -> Any:
    """Check the name of the amplitude scaling of ``cyclic_lr``, if no function is given for it."""
    if value not in ("triangular", "triangular2", "exp_range"):
        raise ValueError(
            f"{name} is invalid and scale_fn is None. Got {name}={value!r}; allowed are 'triangular', 'triangular2' "
            "and 'exp_range'."
        )
    return value


def scale_mode(name: str, value: Any) -> Any:
    """Check the name of the argument of the amplitude function."""
    if value not in ("cycle", "iterations"):
        raise ValueError(f"{name} must be one of 'cycle' or 'iterations', instead got {value!r}")
    return value


def anneal_epochs(name: str, value: Any) -> Any:
    """Check the number of steps to the final rate."""
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be equal or greater than 0, got {value}")
    return value


def total_steps(total_steps: Any, epochs: Any, steps_per_epoch: Any) -> int:
    """Return the length of a cycle, which is given directly or as a product."""
    given = {"total_steps": total_steps} if total_steps is not None else {}
    if not given and epochs is not None and steps_per_epoch is not None:
        given = {"epochs": epochs, "steps_per_epoch": steps_per_epoch}
    if not given:
        raise ValueError("You must define either total_steps OR (epochs AND steps_per_epoch)")
    product = 1
    for name, value in given.items():
        product *= first_period(name, value)
    return product


Number = Annotated[Any, _number]
"""A number, which may be traced."""
Rate = Annotated[Any, rate]
"""A learning rate: a number >= 0, which may be traced."""
Power = Annotated[Any, _base]
"""The base of a power: a number >= 0, which may be traced."""
Count = Annotated[int, _count]
"""A whole number >= 0."""
Size = Annotated[int, _size]
"""A whole number >= 1."""
OptionalCount = Annotated[int | None, _optional_count]
"""A whole number >= 0, or None."""
Milestones = Annotated[Iterable[int], _milestones]
"""Whole numbers >= 0."""
Function = Annotated[Callable[..., Any], function]
"""A function that JAX can trace."""
OptionalFunction = Annotated[Callable[..., Any] | None, _optional_function]
"""A function that JAX can trace, or None."""
Functions = Annotated[Iterable[Any], _functions]
"""Schedules: functions ``step -> value``."""
