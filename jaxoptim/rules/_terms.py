"""Terms that many rules share: direction, weight decay, zero slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax

from jaxoptim.core import Rule, Slots, enabled, full_like
from jaxoptim.core.rule import assembled

R = TypeVar("R", bound=Rule)


class _WithDecay(Protocol):
    """A rule with torch's weight decay."""

    @property
    def lr(self) -> Any: ...
    @property
    def weight_decay(self) -> Any: ...


class _WithL2(_WithDecay, Protocol):
    """A rule with torch's weight decay that can also maximize."""

    @property
    def maximize(self) -> bool: ...


class _WithEither(_WithL2, Protocol):
    """A rule whose weight decay is L2, in the gradient, or decoupled from it."""

    @property
    def decoupled_weight_decay(self) -> bool: ...


def zeros(param: jax.Array, *names: str) -> Slots:
    """Make slots of the shape of ``param`` that start at zero."""
    return {name: full_like(param) for name in names}


def given_loss(does: str, params: Any, value_fn: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    """Return the loss that an update was given; raise without it, or without parameters, with their purpose."""
    if params is None or value_fn is None:
        missing = "params" if params is None else "value_fn"
        raise ValueError(
            f"{does}, but `{missing}` was not given. Call update(grads, state, params, value_fn=loss), where "
            "loss(params) is a scalar."
        )
    return value_fn


def needed(rule: Any, param: Any) -> jax.Array:
    """Return the parameter, for a term that uses its value; raise if it was not given."""
    if param is None:
        raise ValueError(
            f"{type(rule).__name__} uses the current parameters, but `params` was not given. "
            "Pass them as the third argument: update(grads, state, params)."
        )
    return param


def descent(rule: _WithL2, grad: jax.Array, param: Any) -> jax.Array:
    """Return the gradient to descend: negated to maximize, then plus the L2 penalty, which decays either way."""
    grad = -grad if rule.maximize else grad
    return grad + rule.weight_decay * needed(rule, param) if enabled(rule.weight_decay) else grad


def shrinkage(rule: _WithDecay, param: Any) -> Any:
    """Return the amount that decoupled weight decay subtracts from ``param``: lr * weight_decay * param."""
    return rule.lr * rule.weight_decay * needed(rule, param) if enabled(rule.weight_decay) else 0.0


def descent_and_shrinkage(rule: _WithEither, grad: jax.Array, param: Any) -> tuple[jax.Array, Any]:
    """Return :func:`descent` and :func:`shrinkage` for a rule whose user chooses the kind of weight decay."""
    if rule.decoupled_weight_decay:
        return -grad if rule.maximize else grad, shrinkage(rule, param)
    return descent(rule, grad, param), 0.0


def decayed(rule: R, step: Any) -> R:
    """Return the rule with its rate decayed by ``lrd`` once for each step, the one to come included."""
    now: Any = rule
    return assembled(type(rule), vars(rule) | {"lr": now.lr * now.lrd.power(step)})
