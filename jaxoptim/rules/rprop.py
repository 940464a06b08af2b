"""Resilient backpropagation."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jaxoptim.core import NonNegative, Numeric, Rule, Scalar, Slots, factory, full_like, rule
from jaxoptim.rules._terms import zeros

Shrinking = Annotated[Any, Numeric(((">", 0), ("<", 1)))]
Growing = Annotated[Any, Numeric(((">", 1),))]


@rule
class Rprop(Rule):
    r"""Rprop: a step size for each number, grown while the sign of its gradient stays, cut when it flips.

    .. math::
        s_t &= \mathrm{clip}\bigl(s_{t-1} \cdot
        (\eta_+ \text{ if } g_t g_{t-1} > 0,\ \eta_- \text{ if } < 0,\ 1 \text{ if } = 0),\
        s_{\min}, s_{\max}\bigr) \\
        g_t &\leftarrow 0 \text{ where } g_t g_{t-1} < 0, \qquad
        \theta_t = \theta_{t-1} - \mathrm{sign}(g_t)\,s_t

    Args:
        lr: first step size :math:`s_0 \ge 0` (default 1e-2). Later changes of it have no effect.
        etas: :math:`0 < \eta_- < 1 < \eta_+` (default 0.5, 1.2).
        step_sizes: :math:`s_{\min}, s_{\max}` (default 1e-6, 50); they hold for the first step too.
        maximize: ascend instead (default False).

    Slots:
        ``prev``, ``step_size``, of the parameter's shape.

    Raises:
        ``ValueError`` for a number out of range, or etas out of order.

    References:
        Riedmiller, Braun, A direct adaptive method for faster backpropagation learning: the RPROP
        algorithm, ICNN 1993, in the variant of torch. optax's ``rprop`` is one step late.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.rprop(lr=0.1), jnp.array([1.0, -2.0])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.9, -1.9]
    """

    lr: NonNegative = 1e-2
    etas: tuple[Shrinking, Growing] = (0.5, 1.2)
    step_sizes: tuple[Scalar, Scalar] = (1e-6, 50)
    _: KW_ONLY
    maximize: bool = False

    def init(self, param: jax.Array) -> Slots:
        return {**zeros(param, "prev"), "step_size": full_like(param, self.lr)}

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        minus, plus = self.etas
        smallest, largest = self.step_sizes
        grad = -grad if self.maximize else grad
        agreement = grad * slots["prev"]
        factor = jnp.where(agreement > 0, plus, jnp.where(agreement < 0, minus, 1.0))
        size = jnp.clip(slots["step_size"] * factor, smallest, largest)
        grad = jnp.where(agreement < 0, 0.0, grad)
        return -jnp.sign(grad) * size, {"prev": grad, "step_size": size}


rprop = factory(Rprop, "rprop")
