"""Hyperparameters that ``optax.inject_hyperparams`` has cast to half precision, the dtype of the weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core.rule import Numeric, is_known


def restored(rule: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with float16 and bfloat16 ones in float32, and rounded defaults as the exact defaults.

    Raises:
        ``ValueError`` for any other number that such a dtype spoils: a decay rate, or a number that has become zero.
    """
    halves = {name: x for name, x in options.items() if _is_half(x) and isinstance(rule.specs.get(name), Numeric)}
    return options | {name: _restored(rule, name, x) for name, x in halves.items()}


def _is_half(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and x.dtype in (jnp.float16, jnp.bfloat16)


def _restored(rule: Any, name: str, x: Any) -> Any:
    default = getattr(rule, name, None)
    default = float(default) if isinstance(default, int | float) else None
    rounded = None if default is None else jnp.asarray(default, x.dtype)
    # A rate may be zero, as at the start of a warmup, and is as good in any dtype.
    is_default = rounded is not None and is_known(x) and bool(jnp.all(x == rounded))
    is_checked = name != "lr" and is_known(x) and not is_default
    if is_checked and (rule.specs[name].decay or (default != 0 and not bool(jnp.all(x)))):
        raise ValueError(
            f"The {name} of {rule.__name__} is {x.dtype}, which has not the digits for it. Write "
            "optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32), or give it in float32."
        )
    x = jnp.asarray(x, jnp.float32)
    return x if rounded is None else jnp.where(x == rounded.astype(jnp.float32), jnp.float32(default), x)
