"""Rectified Adam."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import Coefficient, Decay, DecayRate, NonNegative, Rule, Slots, factory, from_numbers, rule, sqrt
from jaxoptim.rules._terms import descent_and_shrinkage, zeros


@rule
class RAdam(Rule):
    r"""RAdam: Adam that trusts the second moment only once its variance is known to be small.

    .. math::
        \rho_\infty &= \frac{2}{1-\beta_2} - 1, \qquad
        \rho_t = \rho_\infty - \frac{2t\,\beta_2^t}{1-\beta_2^t} \\
        \theta_t &= \theta_{t-1} - \gamma\,\frac{m_t}{1-\beta_1^t}
        \begin{cases}
        \sqrt{\dfrac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}}\;
        \dfrac{\sqrt{1-\beta_2^t}}{\sqrt{v_t} + \epsilon} & \rho_t > 5 \\
        1 & \text{otherwise}
        \end{cases}

    with the moments of :class:`Adam`.

    Args:
        lr: learning rate :math:`\gamma \ge 0` (default 1e-3).
        betas: decay rates :math:`\beta_1, \beta_2` in [0, 1) (default 0.9, 0.999).
        eps: :math:`\epsilon \ge 0` (default 1e-8).
        weight_decay: :math:`\lambda \ge 0` (default 0), an L2 penalty.
        decoupled_weight_decay: take :math:`\gamma\lambda\theta_{t-1}` from the parameter instead of adding
            the penalty to the gradient (default False).
        maximize: ascend instead (default False). Weight decay still decays.

    Slots:
        ``exp_avg``, ``exp_avg_sq``, of the parameter's shape.

    Raises:
        ``ValueError`` for a number out of range.

    References:
        Liu, Jiang, He, Chen, Liu, Gao, Han, On the variance of the adaptive learning rate and beyond,
        ICLR 2020. :math:`\epsilon` stands where torch has it, before the bias correction.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.radam(lr=0.1), jnp.array([1.0, -2.0])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.8, -1.6]
    """

    lr: NonNegative = 1e-3
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: Coefficient = 0
    decoupled_weight_decay: bool = False
    _: KW_ONLY
    maximize: bool = False

    def init(self, param: jax.Array) -> Slots:
        return zeros(param, "exp_avg", "exp_avg_sq")

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        beta1, beta2 = self.betas
        grad, shrinkage = descent_and_shrinkage(self, grad, param)
        m = beta1.ema(slots["exp_avg"], grad)
        v = beta2.ema(slots["exp_avg_sq"], grad * grad)

        rate, rectified, scale = from_numbers(_numbers, self.lr, self.betas, step)
        adaptive = jnp.where(rectified, scale / (sqrt(v) + self.eps), 1.0)
        return rate * m * adaptive - shrinkage, {"exp_avg": m, "exp_avg_sq": v}


def _numbers(lr: Any, betas: tuple[Decay, Decay], step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the rate, whether the second moment is used, and its rectification factor then."""
    beta1, beta2 = betas
    rho_inf = 2 / beta2.complement - 1
    rho = length_of_average(beta2, step)
    rectified = rho > 5
    rho = jnp.where(rectified, rho, 6.0)  # keeps the unused branch, and its derivative, finite
    rectification = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    return -lr / beta1.bias_correction(step), rectified, rectification * sqrt(beta2.bias_correction(step))


def length_of_average(beta: Decay, step: jax.Array) -> jax.Array:
    r"""Return the length :math:`\rho_t` of the simple moving average that approximates the exponential one.

    Its definition subtracts two numbers near :math:`2/(1-\beta)`, which leaves three digits in float32.
    With :math:`x = -\log\beta` it is equal to

    .. math::
        \rho_t = 2t\,\phi(tx) - 2\,\phi(x) + 1, \qquad \phi(y) = \frac1y - \frac1{e^y - 1},

    which subtracts nothing of that size.
    """
    x = jnp.asarray(-jnp.log1p(-beta.complement), step.dtype)
    return 2 * step * _phi(step * x) - 2 * _phi(x) + 1


def _phi(y: jax.Array) -> jax.Array:
    """Compute 1/y - 1/(exp(y) - 1), by its Taylor series where the two terms cancel."""
    series = jnp.zeros_like(y)
    for coefficient in reversed(_PHI):
        series = series * (y * y) + coefficient
    large = jnp.maximum(y, 1.0)
    return jnp.where(y < 1, 0.5 - y * series, 1 / large - 1 / jnp.expm1(large))


def _bernoulli_over_factorial(count: int) -> list[Fraction]:
    """Compute B_n / n!, the Taylor coefficients of y / (exp(y) - 1)."""
    numbers = [Fraction(1)]
    for n in range(1, count):
        numbers.append(-sum((b / math.factorial(n + 1 - k) for k, b in enumerate(numbers)), Fraction(0)))
    return numbers


_PHI = [float(b) for b in _bernoulli_over_factorial(25)[2::2]]
"""Coefficients of (1/2 - phi(y)) / y in powers of y squared: enough for float64 up to y = 1."""

radam = factory(RAdam, "radam")
