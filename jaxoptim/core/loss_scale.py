"""Loss scaling, so that small gradients in float16 do not underflow."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxoptim.core.loss import all_finite
from jaxoptim.core.numerics import computing_dtype
from jaxoptim.core.placement import on_mesh_of
from jaxoptim.core.shown import shown


class ScaleState(NamedTuple):
    """The state of a :class:`LossScale`.

    Attributes:
        scale: the factor, a float32 scalar.
        growth_tracker: the steps since it last changed, an int32 scalar.
    """

    scale: jax.Array
    growth_tracker: jax.Array


class ScaledState(NamedTuple):
    """The state of :func:`scale_loss`.

    Attributes:
        loss_scale: the factor on the loss.
        inner_state: the state of the transformation inside.
    """

    loss_scale: ScaleState
    inner_state: Any


@dataclasses.dataclass(frozen=True)
class LossScale:
    r"""A loss scale :math:`s` that adapts to the range of float16, as torch's ``GradScaler``.

    .. math::
        g = \nabla(s L) / s, \qquad
        s \leftarrow \begin{cases} b\,s & \text{some } g \text{ is not finite: the step is skipped} \\
        a\,s & n \text{ steps were made since } s \text{ changed} \end{cases}

    Args:
        init_scale: the first :math:`s > 0` (default 65536).
        growth_factor: :math:`a > 1` (default 2).
        backoff_factor: :math:`b` in (0, 1) (default 0.5).
        growth_interval: :math:`n \ge 1` (default 2000).

    Raises:
        ``ValueError`` for a number out of range.

    References:
        Micikevicius et al., Mixed precision training, ICLR 2018.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim
        >>> loss_scale = jaxoptim.LossScale(init_scale=8.0)
        >>> state = loss_scale.init()
        >>> float(loss_scale.scaled(jnp.float32(2.0), state))
        16.0
        >>> float(loss_scale.updated(state, is_finite=False).scale)
        4.0
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        for name, is_good, range_ in (
            ("init_scale", self.init_scale > 0, "> 0"),
            ("growth_factor", self.growth_factor > 1, "> 1"),
            ("backoff_factor", 0 < self.backoff_factor < 1, "in (0, 1)"),
            ("growth_interval", self.growth_interval >= 1, ">= 1"),
        ):
            if not is_good:
                raise ValueError(f"Invalid {name}: {shown(getattr(self, name))}. LossScale takes {name} {range_}.")

    def init(self) -> ScaleState:
        """Initialize the state."""
        return ScaleState(jnp.asarray(self.init_scale, jnp.float32), jnp.zeros((), jnp.int32))

    def scaled(self, loss: Any, state: ScaleState) -> jax.Array:
        """Multiply the loss by the factor, in the loss's dtype."""
        return loss * state.scale.astype(jnp.result_type(loss))

    def unscaled(self, grads: Any, state: ScaleState) -> Any:
        """Divide gradients of the scaled loss by the factor, in at least float32."""
        return jax.tree.map(lambda grad: grad.astype(computing_dtype(grad.dtype)) / state.scale, grads)

    def updated(self, state: ScaleState, is_finite: Any) -> ScaleState:
        """Return the state after a step, given whether all its gradients were finite."""
        tracker = state.growth_tracker + 1
        is_over, grown = tracker == self.growth_interval, state.scale * self.growth_factor
        scale = jnp.where(is_over & jnp.isfinite(grown), grown, state.scale)
        return ScaleState(
            jnp.where(is_finite, scale, state.scale * self.backoff_factor),
            jnp.where(is_finite & ~is_over, tracker, 0),
        )


def scale_loss(
    tx: optax.GradientTransformation, loss_scale: LossScale | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wrap a transformation so that it takes gradients of a scaled loss; the scale is kept in its state.

    Where a gradient is not finite the update is zero, and the state of the transformation inside stays.

    Args:
        tx: the transformation inside.
        loss_scale: the rule that adapts the factor (default None: ``LossScale()``).

    Returns:
        A transformation with state :class:`ScaledState`.

    Raises:
        What the transformation inside raises.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxoptim, optax
        >>> loss_scale = jaxoptim.LossScale(init_scale=1024.0)
        >>> tx, params = jaxoptim.scale_loss(jaxoptim.sgd(lr=0.5), loss_scale), jnp.array([1.0, -2.0])
        >>> state = tx.init(params)
        >>> grads = jax.grad(lambda x: loss_scale.scaled(jnp.sum(x**2) / 2, state.loss_scale))(params)
        >>> grads.tolist()
        [1024.0, -2048.0]
        >>> updates, state = tx.update(grads, state, params)
        >>> optax.apply_updates(params, updates).tolist()
        [0.5, -1.0]
    """
    scaling, inner = LossScale() if loss_scale is None else loss_scale, optax.with_extra_args_support(tx)

    def init(params: Any) -> ScaledState:
        return on_mesh_of(params, ScaledState(scaling.init(), inner.init(params)))

    def update(grads: Any, state: ScaledState, params: Any = None, **extra: Any) -> tuple[Any, ScaledState]:
        scale, before = state
        is_finite = all_finite(grads)
        updates, after = inner.update(scaling.unscaled(grads, scale), before, params, **extra)
        updates = jax.tree.map(lambda x: jnp.where(is_finite, x, jnp.zeros_like(x)), updates)
        kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), after, before)
        return updates, ScaledState(scaling.updated(scale, is_finite), kept)

    return optax.GradientTransformationExtraArgs(init, update)
