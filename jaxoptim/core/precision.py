"""Master weights and stochastic rounding, so that low-precision parameters and state keep small changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxoptim.core.noise import mixed, offset_in
from jaxoptim.core.numerics import computing_dtype
from jaxoptim.core.shown import shown

MASTER = "master_weights"
"""The slot that holds the float32 value of a float16 or bfloat16 parameter."""


class Precision(NamedTuple):
    """The way in which arrays of float16 and bfloat16 are stored; see :meth:`Rule.with_precision`."""

    master_weights: bool = False
    rounding: str = "nearest"
    state_dtype: Any = None

    @property
    def keeps_values(self) -> bool:
        """Whether more is kept of a parameter's new value than the nearest representable one."""
        return self.master_weights or self.rounding == "stochastic"


DEFAULT = Precision()


def checked(master_weights: bool, rounding: str, state_dtype: Any) -> Precision:
    """Make a checked precision; raise for an unknown rounding or dtype."""
    if not isinstance(master_weights, bool):
        raise TypeError(f"master_weights is True or False, but got {shown(master_weights)}.")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding is 'nearest' or 'stochastic', but got {shown(rounding)}.")
    if state_dtype is not None and not is_low(state_dtype := jnp.dtype(state_dtype)):
        raise ValueError(
            f"state_dtype is bfloat16, float16 or None, but got {state_dtype}. Without it state has the dtype of its "
            "parameter, float32 at least."
        )
    return Precision(master_weights, rounding, state_dtype)


def is_low(dtype: Any) -> bool:
    """Whether numbers of a dtype are computed in float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and computing_dtype(dtype) != dtype


def widened(x: Any) -> Any:
    """Cast an array to float32 if its dtype has fewer bits; else return it as it is."""
    return x.astype(computing_dtype(x.dtype)) if is_low(jnp.result_type(x)) else x


def first(precision: Precision, param: jax.Array, slots: dict[str, Any]) -> dict[str, Any]:
    """Return the first slots of a parameter as they are stored, its float32 value among them."""
    if precision.state_dtype is not None:
        slots = {
            name: x
            if x is None or x.shape != param.shape or not jnp.issubdtype(x.dtype, jnp.floating)
            else x.astype(precision.state_dtype)
            for name, x in slots.items()
        }
    if precision.master_weights and is_low(param.dtype):
        slots = slots | {MASTER: param.astype(computing_dtype(param.dtype))}
    return slots


def value_of(param: jax.Array, master: jax.Array) -> jax.Array:
    """Return the value of a parameter in float32; an element that was assigned since counts instead of its master."""
    return jnp.where(master.astype(param.dtype) == param, master, param.astype(master.dtype))


def kept(x: jax.Array, dtype: Any, rounding: str, step: Any) -> jax.Array:
    r"""Round an array to another dtype.

    Stochastic rounding gives one of the two neighbours :math:`a \le x \le b` of a number in the dtype,

    .. math::
        P(b) = \frac{x - a}{b - a},

    so that its mean is :math:`x`. The random numbers are a hash of :math:`x`, its place, and the count of steps.

    Args:
        x: the array.
        dtype: the dtype to round to.
        rounding: ``"nearest"`` or ``"stochastic"``.
        step: the count of steps.
    """
    near = x.astype(dtype)
    if rounding == "nearest" or not is_low(dtype) or x.dtype == dtype:
        return near
    back = near.astype(jnp.float32)
    x = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(near, jnp.uint16)
    other = lax.bitcast_convert_type(
        jnp.where(jnp.abs(x) > jnp.abs(back), bits + 1, bits - 1).astype(jnp.uint16), dtype
    )
    place = mixed(offset_in(x.shape, jnp.uint32) ^ mixed(jnp.asarray(step).astype(jnp.uint32)))
    word = mixed(lax.bitcast_convert_type(x, jnp.uint32) ^ place)
    uniform = (word >> 8).astype(jnp.float32) * np.float32(2**-24)
    chance = jnp.abs(x - back) / jnp.abs(other.astype(jnp.float32) - back)
    return jnp.where(jnp.isfinite(x) & (x != back) & (uniform < chance), other, near)
