"""Covariances of losses over the draws, computed without keeping their traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax

from jaxoptim.core.modules import anew
from jaxoptim.sampling.losses import Losses
from jaxoptim.sampling.observables import Draw, Function, Moments, Observable


@dataclasses.dataclass(frozen=True)
class CrossCovariance(Observable):
    r"""The covariance of two observables over the draws, updated at each draw.

    The result of each chain has the axes of ``x``, and then those of ``y``, with the divisor ``draws - 1``; its mean
    over chains is the ``value`` of :func:`influence` of both traces. It takes as much memory for each chain, whatever
    the number of draws: the better form where there are more draws than data.

    Args:
        x: a function of the parameters that returns an array, or a :class:`Losses`.
        y: the same (default None: ``x``).

    Raises:
        In a run, ``TypeError`` for another observable; what the function, or :class:`Losses`, raises.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> samples = sampling.sample(
        ...     lambda w: jnp.sum(w**2) / 2, jnp.zeros(3), rules.SGLD(lr=0.01, nbeta=10.0), key=jax.random.key(0),
        ...     num_chains=2, num_draws=100, observables={"squares": sampling.CrossCovariance(lambda w: w**2)})
        >>> samples.observables["squares"].shape
        (2, 3, 3)
    """

    x: Losses | Callable[[Any], Any]
    y: Losses | Callable[[Any], Any] | None = None

    def begin(self, params: Any, probes: Mapping[str, Any]) -> Any:
        return Moments.none(*jax.eval_shape(lambda: self._values(lambda: anew(params), probes)))

    def update(self, memory: Any, draw: Draw) -> tuple[Any, Any]:
        def observed() -> Any:
            return memory.after(*self._values(lambda: draw.params, draw.probes))

        return lax.cond(draw.is_recorded, observed, lambda: memory), None

    def result(self, memory: Any, trace: Any) -> Any:
        return memory.covariance

    def _values(self, params: Callable[[], Any], probes: Mapping[str, Any]) -> tuple[Any, Any]:
        x = _value(self.x, params, probes)
        return x, x if self.y is None else _value(self.y, params, probes)


def _value(of: Any, params: Callable[[], Any], probes: Mapping[str, Any]) -> Any:
    """Return the value of an observable at some parameters."""
    if isinstance(of, Losses):
        return of.value(params, probes)
    if isinstance(of, Observable):
        raise TypeError(f"CrossCovariance is of functions of the parameters and of Losses, but got {of!r:.80}.")
    return Function(of).value(params())
