"""Adadelta."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import jax

from jaxoptim.core import ClosedDecayRate, Coefficient, NonNegative, Rule, Slots, factory, rule, sqrt
from jaxoptim.rules._terms import descent, zeros


@rule
class Adadelta(Rule):
    r"""Adadelta: steps in the units of the parameter, from two running averages.

    .. math::
        v_t &= \rho v_{t-1} + (1-\rho)\,g_t^2 \\
        \Delta_t &= \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}}\,g_t \\
        u_t &= \rho u_{t-1} + (1-\rho)\,\Delta_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma\,\Delta_t

    Args:
        lr: learning rate :math:`\gamma \ge 0` (default 1).
        rho: decay rate :math:`\rho` in [0, 1] (default 0.9).
        eps: :math:`\epsilon \ge 0` (default 1e-6).
        weight_decay: L2 penalty :math:`\lambda \ge 0` (default 0).
        maximize: ascend instead (default False). Weight decay still decays.

    Slots:
        ``square_avg``, ``acc_delta``, of the parameter's shape.

    Raises:
        ``ValueError`` for a number out of range.

    References:
        Zeiler, ADADELTA: an adaptive learning rate method, 2012 (arXiv:1212.5701).

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.adadelta(lr=100.0), jnp.array([1.0, -2.0])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.684, -1.684]
    """

    lr: NonNegative = 1.0
    rho: ClosedDecayRate = 0.9
    eps: NonNegative = 1e-6
    weight_decay: Coefficient = 0
    _: KW_ONLY
    maximize: bool = False

    def init(self, param: jax.Array) -> Slots:
        return zeros(param, "square_avg", "acc_delta")

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        grad = descent(self, grad, param)
        v = self.rho.ema(slots["square_avg"], grad * grad)
        delta = sqrt(slots["acc_delta"] + self.eps) / sqrt(v + self.eps) * grad
        u = self.rho.ema(slots["acc_delta"], delta * delta)
        return -self.lr * delta, {"square_avg": v, "acc_delta": u}


adadelta = factory(Adadelta, "adadelta")
