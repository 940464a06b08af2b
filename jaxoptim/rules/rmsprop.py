"""RMSprop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import Coefficient, NonNegative, OpenDecayRate, Rule, Slots, enabled, factory, rule, sqrt
from jaxoptim.rules._terms import descent, zeros


@rule
class RMSprop(Rule):
    r"""RMSprop: steps scaled by a running average of the squared gradient.

    .. math::
        v_t &= \alpha v_{t-1} + (1-\alpha)\,g_t^2, \qquad
        \bar g_t = \alpha \bar g_{t-1} + (1-\alpha)\,g_t \\
        d_t &= \frac{g_t}{\sqrt{v_t} + \epsilon} \quad
        \text{(centered: } \frac{g_t}{\sqrt{v_t - \bar g_t^2} + \epsilon}\text{)} \\
        b_t &= \mu b_{t-1} + d_t, \qquad \theta_t = \theta_{t-1} - \gamma\,b_t

    Args:
        lr: learning rate :math:`\gamma \ge 0` (default 1e-2).
        alpha: decay rate :math:`\alpha \ge 0` (default 0.99; optax's default is 0.9).
        eps: :math:`\epsilon \ge 0` (default 1e-8), outside the root, where optax has it inside by default.
        weight_decay: L2 penalty :math:`\lambda \ge 0` (default 0).
        momentum: :math:`\mu \ge 0` (default 0: no momentum, no buffer).
        centered: divide by the estimated standard deviation (default False). The variance is kept from
            falling below zero by rounding, where torch gives NaN.
        maximize: ascend instead (default False). Weight decay still decays.

    Slots:
        ``square_avg``; ``momentum_buffer`` unless ``momentum`` is 0; ``grad_avg`` if ``centered``; all of
        the parameter's shape.

    Raises:
        ``ValueError`` for a number out of range.

    References:
        Tieleman, Hinton, Lecture 6.5: RMSprop, COURSERA 2012. Graves, Generating sequences with recurrent
        neural networks, 2013 (arXiv:1308.0850), for the centered form.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.rmsprop(lr=0.01), jnp.array([1.0, -2.0])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.9, -1.9]
    """

    lr: NonNegative = 1e-2
    alpha: OpenDecayRate = 0.99
    eps: NonNegative = 1e-8
    weight_decay: Coefficient = 0
    momentum: Coefficient = 0
    centered: bool = False
    maximize: bool = False

    def init(self, param: jax.Array) -> Slots:
        names = ["square_avg"]
        names += ["momentum_buffer"] if enabled(self.momentum) else []
        names += ["grad_avg"] if self.centered else []
        return zeros(param, *names)

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        grad = descent(self, grad, param)
        v = self.alpha.ema(slots["square_avg"], grad * grad)
        new = {"square_avg": v}
        if self.centered:
            mean = new["grad_avg"] = self.alpha.ema(slots["grad_avg"], grad)
            v = jnp.maximum(v - mean * mean, 0.0)
        direction = grad / (sqrt(v) + self.eps)
        if enabled(self.momentum):
            direction = new["momentum_buffer"] = self.momentum * slots["momentum_buffer"] + direction
        return -self.lr * direction, new


rmsprop = factory(RMSprop, "rmsprop")
