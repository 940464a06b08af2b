"""Decay rates that keep the precision of their complement, one minus the rate."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decay:
    r"""A decay rate :math:`\beta` carried together with :math:`1 - \beta`.

    In float32, :math:`1 - 0.999` has lost four of its seven digits, and :math:`1 - \beta^t` with it. The
    complement is therefore formed once, in float64, before anything is traced, and every use of the rate
    that needs it starts from there:

    .. math::
        \mathrm{ema}(a, x) = a + (1-\beta)(x - a), \qquad
        \beta^t = e^{t \log\beta}, \qquad
        1 - \beta^t = -\mathrm{expm1}(t \log\beta), \qquad
        \log\beta = \mathrm{log1p}(-(1-\beta)).

    Args:
        rate: :math:`\beta`, a float or a (possibly traced) scalar array.
        complement: :math:`1 - \beta`, of the same kind. Use :meth:`of` to have it computed.

    The two fields are separate leaves of the pytree. The derivative of a loss with respect to
    :math:`\beta` is therefore the derivative by ``rate`` less the derivative by ``complement``.

    Examples:
        >>> from jaxoptim import Decay
        >>> beta = Decay.of(0.999)
        >>> f"{beta.complement:.4f}"
        '0.0010'
        >>> bool(abs(beta.bias_correction(1) - 1e-3) < 1e-9)
        True
    """

    rate: Any
    complement: Any

    def __str__(self) -> str:
        return str(self.rate)

    @classmethod
    def of(cls, rate: Any) -> Decay:
        """Make the decay of a given rate; a ``Decay`` is returned as it is."""
        if isinstance(rate, Decay):
            return rate
        if isinstance(rate, np.ndarray):
            return cls(rate, 1.0 - rate.astype(np.float64))
        return cls(rate, 1.0 - rate)

    def ema(self, average: jax.Array, value: jax.Array) -> jax.Array:
        """Return the exponential moving average after one more ``value``, of the shape of ``average``."""
        return average + self.complement * (value - average)

    def power(self, step: Any) -> jax.Array:
        r"""Return the rate to the power of ``step``, :math:`\beta^t`."""
        return jnp.exp(step * self._log())

    def bias_correction(self, step: Any) -> jax.Array:
        r"""Return the sum of the weights of an average that started at zero, :math:`1 - \beta^t`."""
        return -jnp.expm1(step * self._log())

    def _log(self) -> jax.Array:
        """Return the logarithm of the rate, from whichever of the two fields gives it more precisely."""
        return jnp.where(self.rate > 0.5, jnp.log1p(-self.complement), jnp.log(self.rate))
