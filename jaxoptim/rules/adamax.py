"""Adam with the infinity norm."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import Coefficient, DecayRate, NonNegative, Rule, Slots, factory, rule
from jaxoptim.rules._terms import descent, zeros


@rule
class Adamax(Rule):
    r"""Adamax: Adam whose second moment is a decaying maximum.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1)\,g_t \\
        u_t &= \max(\beta_2 u_{t-1},\, |g_t| + \epsilon) \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1-\beta_1^t}\,\frac{m_t}{u_t}

    Args:
        lr: learning rate :math:`\gamma \ge 0` (default 2e-3).
        betas: decay rates :math:`\beta_1, \beta_2` in [0, 1) (default 0.9, 0.999).
        eps: :math:`\epsilon \ge 0` (default 1e-8), inside the maximum.
        weight_decay: L2 penalty :math:`\lambda \ge 0` (default 0).
        maximize: ascend instead (default False). Weight decay still decays.

    Slots:
        ``exp_avg``, ``exp_inf``, of the parameter's shape.

    Raises:
        ``ValueError`` for a number out of range.

    References:
        Kingma, Ba, Adam: a method for stochastic optimization, ICLR 2015, section 7.1.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.adamax(lr=0.1), jnp.array([1.0, -2.0])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.9, -1.9]
    """

    lr: NonNegative = 2e-3
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: Coefficient = 0
    _: KW_ONLY
    maximize: bool = False

    def init(self, param: jax.Array) -> Slots:
        return zeros(param, "exp_avg", "exp_inf")

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        beta1, beta2 = self.betas
        grad = descent(self, grad, param)
        m = beta1.ema(slots["exp_avg"], grad)
        u = jnp.maximum(beta2.rate * slots["exp_inf"], jnp.abs(grad) + self.eps)
        return -(self.lr / beta1.bias_correction(step)) * m / u, {"exp_avg": m, "exp_inf": u}


adamax = factory(Adamax, "adamax")
