"""Adam with Nesterov momentum."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import Coefficient, Decay, DecayRate, NonNegative, Rule, Slots, factory, from_numbers, rule, sqrt
from jaxoptim.rules._terms import descent_and_shrinkage, zeros


@rule
class NAdam(Rule):
    r"""NAdam: Adam with Nesterov momentum and a momentum schedule.

    .. math::
        \mu_t &= \beta_1\bigl(1 - \tfrac12\,0.96^{t\psi}\bigr), \qquad \pi_t = \pi_{t-1}\,\mu_t \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1)\,g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2)\,g_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma\,
        \frac{\mu_{t+1}\,m_t/(1-\pi_t\mu_{t+1}) + (1-\mu_t)\,g_t/(1-\pi_t)}{\sqrt{v_t/(1-\beta_2^t)} + \epsilon}

    Args:
        lr: learning rate :math:`\gamma \ge 0` (default 2e-3).
        betas: decay rates :math:`\beta_1, \beta_2` in [0, 1) (default 0.9, 0.999).
        eps: :math:`\epsilon \ge 0` (default 1e-8).
        weight_decay: :math:`\lambda \ge 0` (default 0), an L2 penalty.
        momentum_decay: :math:`\psi \ge 0` (default 4e-3).
        decoupled_weight_decay: take :math:`\gamma\lambda\theta_{t-1}` from the parameter instead of adding
            the penalty to the gradient (default False).
        maximize: ascend instead (default False). Weight decay still decays.

    Slots:
        ``exp_avg``, ``exp_avg_sq`` of the parameter's shape; ``mu_product``, a float32 scalar in every
        precision, as torch keeps it.

    Raises:
        ``ValueError`` for a number out of range.

    References:
        Dozat, Incorporating Nesterov momentum into Adam, ICLR workshop 2016. optax's ``nadam`` has no
        momentum schedule and gives other numbers.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.nadam(lr=0.1), jnp.array([1.0, -2.0])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.894, -1.894]
    """

    lr: NonNegative = 2e-3
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: Coefficient = 0
    momentum_decay: NonNegative = 4e-3
    decoupled_weight_decay: bool = False
    _: KW_ONLY
    maximize: bool = False

    def init(self, param: jax.Array) -> Slots:
        return {"mu_product": jnp.ones((), jnp.float32), **zeros(param, "exp_avg", "exp_avg_sq")}

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        beta1, beta2 = self.betas
        grad, shrinkage = descent_and_shrinkage(self, grad, param)

        m = beta1.ema(slots["exp_avg"], grad)
        v = beta2.ema(slots["exp_avg_sq"], grad * grad)
        numbers = self.lr, beta1, self.momentum_decay, slots["mu_product"], step
        mu_product, ahead, here = from_numbers(_numbers, *numbers)
        denominator = sqrt(v / beta2.bias_correction(step)) + self.eps
        change = -(here * grad / denominator) - ahead * m / denominator
        return change - shrinkage, {"mu_product": mu_product, "exp_avg": m, "exp_avg_sq": v}


def _numbers(lr: Any, beta: Decay, decay: Any, mu_product: jax.Array, step: jax.Array) -> tuple[jax.Array, ...]:
    """Return the product of the momenta with its next factor, and the rates of the moment and of the gradient."""
    half = 0.5 * beta.rate * 0.96 ** (step * decay)
    half_next = 0.5 * beta.rate * 0.96 ** ((step + 1) * decay)
    mu, mu_next = beta.rate - half, beta.rate - half_next
    mu_product = mu_product * mu.astype(jnp.float32)
    product = mu_product.astype(step.dtype)
    return mu_product, lr * mu_next / (1 - product * mu_next), lr * (beta.complement + half) / (1 - product)


nadam = factory(NAdam, "nadam")
