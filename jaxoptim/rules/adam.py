"""Adam, AMSGrad, and Adam with decoupled weight decay."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import Coefficient, DecayRate, NonNegative, Rule, Slots, factory, rule, sqrt
from jaxoptim.rules._terms import descent_and_shrinkage, zeros


@rule
class Adam(Rule):
    r"""Adam: steps scaled by running averages of the gradient and of its square.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1)\,g_t \\
        v_t &= \beta_2 v_{t-1} + (1-\beta_2)\,g_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma\,\frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    With ``amsgrad``, :math:`v_t` in the last line is the largest so far.

    Args:
        lr: learning rate :math:`\gamma \ge 0` (default 1e-3).
        betas: decay rates :math:`\beta_1, \beta_2` in [0, 1) (default 0.9, 0.999).
        eps: :math:`\epsilon \ge 0` (default 1e-8).
        weight_decay: :math:`\lambda \ge 0` (default 0), an L2 penalty :math:`g_t + \lambda\theta_{t-1}`.
        amsgrad: divide by the largest second moment (default False).
        maximize: ascend instead (default False). Weight decay still decays.
        decoupled_weight_decay: take :math:`\gamma\lambda\theta_{t-1}` from the parameter instead of adding
            the penalty to the gradient, as AdamW does (default False).

    Slots:
        ``exp_avg``, ``exp_avg_sq`` and, with ``amsgrad``, ``max_exp_avg_sq``, of the parameter's shape.

    Raises:
        ``ValueError`` for a number out of range.

    References:
        Kingma, Ba, Adam: a method for stochastic optimization, ICLR 2015. Reddi, Kale, Kumar, On the
        convergence of Adam and beyond, ICLR 2018 (AMSGrad; as torch, the maximum is of the uncorrected
        moment, where optax takes it of the corrected one).

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.adam(lr=0.1), jnp.array([1.0, -2.0])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.9, -1.9]
    """

    lr: NonNegative = 1e-3
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: Coefficient = 0
    amsgrad: bool = False
    _: KW_ONLY
    maximize: bool = False
    decoupled_weight_decay: bool = False

    def init(self, param: jax.Array) -> Slots:
        return zeros(param, "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if self.amsgrad else []))

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        beta1, beta2 = self.betas
        grad, shrinkage = descent_and_shrinkage(self, grad, param)
        m = beta1.ema(slots["exp_avg"], grad)
        v = beta2.ema(slots["exp_avg_sq"], grad * grad)
        new = {"exp_avg": m, "exp_avg_sq": v}
        if self.amsgrad:
            v = new["max_exp_avg_sq"] = jnp.maximum(slots["max_exp_avg_sq"], v)
        denominator = sqrt(v) / sqrt(beta2.bias_correction(step)) + self.eps
        return -(self.lr / beta1.bias_correction(step)) * m / denominator - shrinkage, new


adam = factory(Adam, "adam")
