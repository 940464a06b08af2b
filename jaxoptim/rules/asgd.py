"""Averaged stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import Coefficient, NonNegative, Rule, Scalar, Slots, factory, rule
from jaxoptim.rules._terms import descent, needed, zeros


@rule
class ASGD(Rule):
    r"""ASGD: gradient descent with a decaying rate, and an average of the iterates.

    .. math::
        \theta_t &= (1 - \lambda\eta_{t-1})\,\theta_{t-1} - \eta_{t-1}\,g_t \\
        \bar\theta_t &= \bar\theta_{t-1} + \mu_{t-1}\,(\theta_t - \bar\theta_{t-1}) \\
        \eta_t &= \frac{\gamma}{(1 + \lambda\gamma t)^\alpha}, \qquad \mu_t = \frac{1}{\max(1, t - t_0)}

    with :math:`\eta_0 = \gamma`, :math:`\mu_0 = 1`: a new learning rate acts one step late, as in torch.

    Args:
        lr: learning rate :math:`\gamma \ge 0` (default 1e-2).
        lambd: decay :math:`\lambda` (default 1e-4).
        alpha: power :math:`\alpha` (default 0.75).
        t0: step :math:`t_0` at which averaging starts (default 1e6).
        weight_decay: L2 penalty :math:`\ge 0` (default 0).
        maximize: ascend instead (default False). Weight decay still decays.

    Slots:
        ``eta``, ``mu``: float32 scalars in every precision, as torch keeps them; ``ax``: the average, of
        the parameter's shape.

    Raises:
        ``ValueError`` for a number out of range, or for missing ``params`` in an update.

    References:
        Polyak, Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control Optim.,
        1992. Bottou, Stochastic gradient descent tricks, 2012.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.asgd(lr=0.1), jnp.array([1.0, -2.0])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.8, -1.6]
    """

    lr: NonNegative = 1e-2
    lambd: Scalar = 1e-4
    alpha: Scalar = 0.75
    t0: Scalar = 1e6
    weight_decay: Coefficient = 0
    maximize: bool = False

    def init(self, param: jax.Array) -> Slots:
        return {"eta": jnp.asarray(self.lr, jnp.float32), "mu": jnp.ones((), jnp.float32), **zeros(param, "ax")}

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        grad = descent(self, grad, param)
        eta, mu = slots["eta"].astype(step.dtype), slots["mu"].astype(step.dtype)
        change = -self.lambd * eta * needed(self, param) - eta * grad
        iterate = needed(self, param) + change
        average = jnp.where(mu == 1, iterate, slots["ax"] + mu * (iterate - slots["ax"]))
        eta = self.lr * jnp.exp(-self.alpha * jnp.log1p(self.lambd * self.lr * step))
        mu = 1 / jnp.maximum(1.0, step - self.t0)
        return change, {"eta": eta, "mu": mu, "ax": average}


asgd = factory(ASGD, "asgd")
