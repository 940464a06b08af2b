"""Pyro's Adam with clipping and a decaying rate."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jaxoptim.core import Coefficient, DecayRate, NonNegative, OpenDecayRate, Rule, Slots, enabled, factory, rule, sqrt
from jaxoptim.rules._terms import decayed, needed, zeros


@rule
class ClippedAdam(Rule):
    r"""ClippedAdam: Adam on clipped gradients, with a learning rate that decays at every step.

    .. math::
        g_t &\leftarrow \mathrm{clip}(g_t, -c, c) + \lambda\,\theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1)\,g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2)\,h_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma\,d^t\,\frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
        \frac{m_t}{\sqrt{v_t} + \epsilon}

    with :math:`h_t = g_t`, or :math:`g_t - m_t` for the centered variance.

    Args:
        lr: learning rate :math:`\gamma \ge 0` (default 1e-3).
        betas: decay rates :math:`\beta_1, \beta_2` in [0, 1) (default 0.9, 0.999).
        eps: :math:`\epsilon \ge 0` (default 1e-8), added before the bias correction.
        weight_decay: L2 penalty :math:`\lambda \ge 0` (default 0), added after clipping.
        clip_norm: :math:`c \ge 0` (default 10), a bound on each number in spite of its name.
        lrd: decay :math:`d \ge 0` of the rate (default 1), in force from the first step on. Here :math:`t` counts
            the updates of the tree, as Pyro decays the rate of a group also where a gradient is missing.
        centered_variance: use the variance about the running mean (default False).

    Slots:
        ``exp_avg``, ``exp_avg_sq``, of the parameter's shape.

    Raises:
        ``ValueError`` for a number out of range (Pyro checks none); ``RuntimeError`` for complex parameters.

    References:
        Kingma, Ba, Adam: a method for stochastic optimization, ICLR 2015. Rengaraj et al., A two-step
        machine learning method for predicting the formation energy of ternary compounds, 2023, equation 2,
        for the centered variance.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.clipped_adam(lr=0.1, lrd=0.5), jnp.array([1.0, -2.0])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.95, -1.95]
    """

    lr: NonNegative = 1e-3
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: Coefficient = 0
    clip_norm: NonNegative = 10.0
    lrd: OpenDecayRate = 1.0
    centered_variance: bool = False

    complex: ClassVar[bool] = False

    def init(self, param: jax.Array) -> Slots:
        return zeros(param, "exp_avg", "exp_avg_sq")

    def at_update(self, number: Any) -> Self:
        return decayed(self, number)

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        beta1, beta2 = self.betas
        grad = jnp.clip(grad, -self.clip_norm, self.clip_norm)
        if enabled(self.weight_decay):
            grad = grad + self.weight_decay * needed(self, param)
        m = beta1.ema(slots["exp_avg"], grad)
        deviation = grad - m if self.centered_variance else grad
        v = beta2.ema(slots["exp_avg_sq"], deviation * deviation)
        size = self.lr * sqrt(beta2.bias_correction(step)) / beta1.bias_correction(step)
        return -size * m / (sqrt(v) + self.eps), {"exp_avg": m, "exp_avg_sq": v}


clipped_adam = factory(ClippedAdam, "clipped_adam")
