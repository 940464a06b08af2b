"""Pyro's mixture of Adagrad and RMSprop."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxoptim.core import Rule, Scalar, Slots, factory, rule, sqrt
from jaxoptim.rules._terms import zeros


@rule
class AdagradRMSProp(Rule):
    r"""AdagradRMSProp: the step-size sequence of automatic differentiation variational inference.

    .. math::
        s_t &= t_r\,g_t^2 + (1 - t_r)\,s_{t-1}, \qquad s_1 = g_1^2 \\
        \theta_t &= \theta_{t-1} - \eta\,t^{-1/2+\delta}\,\frac{g_t}{1 + \sqrt{s_t}}

    Args:
        eta: step size :math:`\eta` (default 1).
        delta: :math:`\delta` (default 1e-16).
        t: weight :math:`t_r` of the newest squared gradient (default 0.1).

    Slots:
        ``sum``, of the parameter's shape.

    Raises:
        ``RuntimeError`` for complex parameters.

    References:
        Kucukelbir, Tran, Ranganath, Gelman, Blei, Automatic differentiation variational inference, JMLR
        2017, equations 10 and 11, as Pyro codes them.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.adagrad_rmsprop(eta=0.3), jnp.array([1.0, -2.0])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.8, -1.76]
    """

    eta: Scalar = 1.0
    delta: Scalar = 1e-16
    t: Scalar = 0.1

    complex: ClassVar[bool] = False

    def init(self, param: jax.Array) -> Slots:
        return zeros(param, "sum")

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        weight = jnp.where(step == 1, 1.0, self.t)
        total = slots["sum"] + weight * (grad * grad - slots["sum"])
        size = self.eta * step ** (-0.5 + self.delta)
        return -size * grad / (1 + sqrt(total)), {"sum": total}


adagrad_rmsprop = factory(AdagradRMSProp, "adagrad_rmsprop")
