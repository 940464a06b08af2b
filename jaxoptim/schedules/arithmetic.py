"""Arithmetic of the schedules that would lose precision in its plain form.

A formula serves two users. The classes of ``jaxoptim.optim.lr_scheduler`` call it with Python numbers, and each
operation is then the one that torch makes. The pure schedules call it with arrays: in float64 the operations
are the same; in float32 they are rearranged, so that a millionth step is as exact as the first.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import is_known

_HALF = 12
"""The bits that two factors may have for their product to be exact in float32."""


def is_array(x: Any) -> bool:
    """Whether ``x`` is an array (or traced) instead of a Python number."""
    return isinstance(x, jax.Array)


def is_single() -> bool:
    """Whether schedules are computed in float32."""
    return jnp.result_type(float) == jnp.float32


def where(condition: Any, x: Any, y: Any) -> Any:
    """Select ``x`` or ``y``, in Python if the condition is a Python value."""
    return jnp.where(condition, x, y) if is_array(condition) else x if condition else y


def minimum(x: Any, y: Any) -> Any:
    """Return the smaller of two numbers, the first if they are equal."""
    return where(y < x, y, x)


def divide(x: Any, y: Any) -> Any:
    """Return ``x / y``, rounded once.

    XLA divides an array by a scalar by multiplying with the reciprocal, and merges constants. The last digit
    that this costs is a difference of 1e-10 after a million steps, because phases grow with the step.
    """
    if not is_array(x) or is_single():
        return x / y
    return x / jax.lax.optimization_barrier(y + 0 * x)


def one_plus_cos(x: Any, y: Any = 1) -> Any:
    r"""Compute :math:`1 + \cos(\pi x / y)`."""
    if not is_array(x):
        return 1 + math.cos(math.pi * x / y)
    if not is_single():
        return 1 + jnp.cos(divide(math.pi * x, y))
    return 2 * jnp.square(jnp.sin(math.pi / 2 * ((y - x % (2 * y)) / y)))


def one_minus_cos(x: Any, y: Any = 1) -> Any:
    r"""Compute :math:`1 - \cos(\pi x / y)` for :math:`0 \le x \le y`."""
    if not is_array(x):
        return 1 - math.cos(math.pi * x / y)
    if not is_single():
        return 1 - jnp.cos(divide(math.pi * x, y))
    return 2 * jnp.square(jnp.sin(math.pi / 2 * (x / y)))


def turns(step: Any, period: Any) -> tuple[Any, Any, Any]:
    """Return the number of the period at a step, from 1, the fraction of it that is done, and the fraction left."""
    if is_array(step) and is_single():
        done = step % period
        return 1 + step // period, done / period, (period - done) / period
    turn = jnp.floor(1 + divide(step, period)) if is_array(step) else math.floor(1 + step / period)
    x = 1.0 + divide(step, period) - turn
    return turn, x, 1 - x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Base:
    r"""The base :math:`\gamma` of a power, with its logarithm in two parts.

    In float32, :math:`\gamma^n` for a large :math:`n` needs more digits of :math:`\log\gamma` than one number
    has. They are formed in float64, before anything is traced.

    Attributes:
        base: the number itself.
        high: the leading digits of its logarithm, to the base 2.
        low: the rest of the logarithm.
    """

    base: Any
    high: Any
    low: Any

    def __str__(self) -> str:
        return str(self.base)

    @classmethod
    def of(cls, base: Any) -> Self:
        """Make the base of the powers of a number >= 0."""
        xp: Any = np if is_known(base) else jnp
        # 2**-1e4 is 0, and 2**(-1e4 * 0) is 1: what a base of 0 needs.
        log = xp.where(base > 0, xp.log2(xp.where(base > 0, base, 1.0)), -1e4)
        fraction, exponent = xp.frexp(log if xp is np else jax.lax.stop_gradient(log))
        high = xp.ldexp(xp.round(fraction * 2.0**_HALF), exponent - _HALF)
        return cls(base, *(float(x) if isinstance(x, np.generic) else x for x in (high, log - high)))


def power(base: Any, n: Any) -> Any:
    """Compute ``base ** n`` for a whole number n; ``base`` is a :class:`Base` if n is an array."""
    if not is_array(n):
        return base**n
    if not is_single():
        return base.base**n
    # Below 2**24, n is the sum of two numbers of 12 digits. Their products with the high part are exact.
    coarse = n // 2**_HALF * 2.0**_HALF
    fine = n % 2**_HALF
    logs = [coarse * base.high, fine * base.high, n * base.low]
    whole = sum(jnp.round(log) for log in logs)
    fraction = sum(log - jnp.round(log) for log in logs)
    return jnp.ldexp(jnp.exp2(fraction), jnp.clip(whole, -1000, 1000).astype(int))
