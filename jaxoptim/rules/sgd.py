"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import Coefficient, Dampening, NonNegative, Rule, Slots, enabled, factory, is_known, rule
from jaxoptim.rules._terms import descent, zeros


@rule
class SGD(Rule):
    r"""Stochastic gradient descent, with momentum and Nesterov's variant.

    .. math::
        g_t &= \nabla f(\theta_{t-1}) + \lambda\,\theta_{t-1} \\
        b_t &= \mu\,b_{t-1} + (1 - \tau)\,g_t, \qquad b_1 = g_1 \\
        \theta_t &= \theta_{t-1} - \gamma\,b_t
        \quad\text{(Nesterov: } \theta_{t-1} - \gamma\,(g_t + \mu\,b_t)\text{)}

    Args:
        lr: learning rate :math:`\gamma \ge 0` (default 1e-3).
        momentum: :math:`\mu \ge 0` (default 0: no momentum, no state).
        dampening: :math:`\tau` (default 0). The first gradient is never dampened.
        weight_decay: L2 penalty :math:`\lambda \ge 0` (default 0).
        nesterov: look ahead along the momentum (default False).
        maximize: ascend instead (default False). Weight decay still decays.

    Slots:
        ``momentum_buffer``, of the parameter's shape, unless ``momentum`` is 0.

    Sparse gradients touch their rows only, unless ``momentum`` or ``weight_decay`` moves all of them.

    Raises:
        ``ValueError`` for a number out of range (NaN too, which torch lets pass as ``lr``), and for
        ``nesterov`` without momentum or with dampening.

    References:
        Sutskever, Martens, Dahl, Hinton, On the importance of initialization and momentum in deep
        learning, ICML 2013. The order of terms is torch's, which multiplies the velocity by the rate.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.sgd(lr=0.1, momentum=0.9), jnp.array([1.0, -2.0])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.8, -1.6]
    """

    lr: NonNegative = 1e-3
    momentum: Coefficient = 0
    dampening: Dampening = 0
    weight_decay: Coefficient = 0
    nesterov: bool = False
    _: KW_ONLY
    maximize: bool = False

    sparse: ClassVar[Literal["refused", "accepted", "required"]] = "accepted"

    def check(self) -> None:
        dampened = enabled(self.dampening) and is_known(self.dampening) and np.any(self.dampening.rate != 0)
        if self.nesterov and (not enabled(self.momentum) or dampened):
            raise ValueError(
                f"Nesterov momentum requires a momentum and zero dampening, but SGD got momentum={self.momentum} "
                f"and dampening={self.dampening}. Set momentum > 0 and dampening=0, or nesterov=False."
            )

    @property
    def rowwise(self) -> bool:
        return not (enabled(self.momentum) or enabled(self.weight_decay))

    def init(self, param: jax.Array) -> Slots:
        return zeros(param, "momentum_buffer") if enabled(self.momentum) else {}

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        grad = descent(self, grad, param)
        if not enabled(self.momentum):
            return -self.lr * grad, slots
        buffer = self.momentum * slots["momentum_buffer"] + grad
        if enabled(self.dampening):
            dampened = self.momentum * slots["momentum_buffer"] + self.dampening.complement * grad
            buffer = jnp.where(step == 1, grad, dampened)
        direction = grad + self.momentum * buffer if self.nesterov else buffer
        return -self.lr * direction, {"momentum_buffer": buffer}


sgd = factory(SGD, "sgd")
