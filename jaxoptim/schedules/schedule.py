"""Schedules made of formulas: functions of the step whose numbers are the leaves of a pytree."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import bound

P = ParamSpec("P")


class Formula(Protocol[P]):
    """A function that returns schedules, and the formula behind them; made by :func:`schedule`."""

    formula: Callable[Concatenate[Any, P], Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Schedule:
        """Return the schedule of these arguments."""


@jax.tree_util.register_pytree_with_keys_class
class Schedule:
    """A learning rate as a function of the step: jit-able, vmap-able, differentiable.

    It is a pytree whose leaves are the rates and other real numbers; step counts, milestones and switches belong
    to its structure. A rule that holds it can therefore be passed to a compiled program with other rates, without
    compiling it again.

    Args:
        formula: the function, of the step and the arguments.
        arguments: the arguments by name.
        momentum: another formula of the same arguments, for the momentum that goes with the rate.

    Examples:
        >>> import jax
        >>> from jaxoptim import schedules
        >>> schedule = schedules.step_lr(0.1, step_size=30)
        >>> schedule
        step_lr(lr=0.1, step_size=30, gamma=0.1)
        >>> round(float(schedule(30)), 6)
        0.01
        >>> jax.tree.leaves(schedule)[0]
        0.1
    """

    def __init__(
        self,
        formula: Callable[..., Any],
        arguments: dict[str, Any],
        momentum: Callable[..., Any] | None = None,
    ) -> None:
        # Nothing here changes after it is made; a schedule of other numbers is another object.
        self.formula, self.arguments, self._momentum = formula, arguments, momentum
        self._traced = tuple(name for name, value in arguments.items() if not _is_switch(value))

    def __call__(self, step: Any) -> jax.Array:
        """Return the value at a step, in float32, or in float64 if x64 is enabled."""
        step = jnp.asarray(step)
        step = step.astype(float if jnp.issubdtype(step.dtype, jnp.floating) else int)  # else int32 / int32 is float32
        return jnp.asarray(self.formula(step, **self.arguments), jnp.result_type(float))

    @property
    def momentum(self) -> Schedule:
        """The momentum (or first beta) that goes with the rate, of :func:`cyclic_lr` and :func:`one_cycle_lr`."""
        if self._momentum is None:
            raise AttributeError(f"{self.formula.__name__} has no momentum; cyclic_lr and one_cycle_lr have one.")
        if not self.arguments["cycle_momentum"]:
            raise AttributeError(f"This {self.formula.__name__} was made with cycle_momentum=False.")
        return Schedule(self._momentum, self.arguments)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Return the numbers as leaves, and everything else as the structure."""
        children = [(jax.tree_util.GetAttrKey(name), self.arguments[name]) for name in self._traced]
        switches = tuple((name, value) for name, value in self.arguments.items() if name not in self._traced)
        return children, (self.formula, self._momentum, tuple(self.arguments), self._traced, switches)

    @classmethod
    def tree_unflatten(cls, form: Any, children: Any) -> Schedule:
        """Rebuild the schedule with other numbers."""
        new = object.__new__(cls)
        new.formula, new._momentum, names, new._traced, switches = form
        values = dict(switches) | dict(zip(new._traced, children, strict=True))
        new.arguments = {name: values[name] for name in names}
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the formula by the name of its public function, because the formula itself has no importable name."""
        function = getattr(sys.modules[self.formula.__module__], self.formula.__name__)
        return _restored, (function, self.arguments, self._momentum)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.formula.__name__}({arguments})"


def _restored(function: Any, arguments: dict[str, Any], momentum: Callable[..., Any] | None) -> Schedule:
    return Schedule(getattr(function, "formula", function), arguments, momentum)


def _is_switch(value: Any) -> bool:
    """Whether an argument belongs to the static structure because it holds no real number."""
    return not any(isinstance(leaf, float | jax.Array | np.ndarray) for leaf in jax.tree.leaves(value))


def schedule(
    momentum: Callable[..., Any] | None = None,
) -> Callable[[Callable[Concatenate[Any, P], Any]], Formula[P]]:
    """Turn a formula ``formula(step, ...)`` into a function that returns schedules.

    The formula's arguments after the step are those of the function; their annotations say how each is checked
    (``jaxoptim.schedules.arguments``).

    Args:
        momentum: a formula of the same arguments for the schedule's ``momentum`` (default None: it has none).

    Returns:
        A decorator. What it returns is a function whose ``formula`` is the formula itself.
    """

    def decorate(formula: Callable[Concatenate[Any, P], Any]) -> Formula[P]:
        name = formula.__name__
        signature = inspect.signature(formula)
        signature = signature.replace(parameters=list(signature.parameters.values())[1:], return_annotation=Schedule)
        hints = typing.get_type_hints(formula, include_extras=True)
        checks = {
            key: hint.__metadata__[0] for key, hint in hints.items() if typing.get_origin(hint) is typing.Annotated
        }

        @functools.wraps(formula)
        def make(*args: P.args, **kwargs: P.kwargs) -> Schedule:
            arguments = bound(name, signature, args, kwargs)
            checked = {key: checks[key](key, value) if key in checks else value for key, value in arguments.items()}
            new = Schedule(formula, checked, momentum)
            jax.eval_shape(new, 0)  # so that what is wrong is said now and not at the first step
            return new

        make.__signature__ = signature  # type: ignore[attr-defined]
        make.formula = formula  # type: ignore[attr-defined]
        return typing.cast(Formula[P], make)

    return decorate
