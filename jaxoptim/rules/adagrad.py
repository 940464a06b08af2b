"""Adagrad."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, ClassVar, Literal

import jax

from jaxoptim.core import Coefficient, NonNegative, Rule, Slots, enabled, factory, full_like, rule, sqrt
from jaxoptim.rules._terms import descent


@rule
class Adagrad(Rule):
    r"""Adagrad: steps scaled by the sum of all squared gradients.

    .. math::
        \gamma_t &= \frac{\gamma}{1 + (t-1)\,\eta}, \qquad s_t = s_{t-1} + g_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma_t\,\frac{g_t}{\sqrt{s_t} + \epsilon}

    Args:
        lr: learning rate :math:`\gamma \ge 0` (default 1e-2).
        lr_decay: :math:`\eta \ge 0` (default 0).
        weight_decay: L2 penalty :math:`\lambda \ge 0` (default 0).
        initial_accumulator_value: :math:`s_0 \ge 0` (default 0; optax's default is 0.1).
        eps: :math:`\epsilon \ge 0` (default 1e-10), outside the root, where optax has it inside.
        maximize: ascend instead (default False). Weight decay still decays.

    Slots:
        ``sum``, of the parameter's shape.

    Sparse gradients touch their rows only. They cannot be combined with weight decay, as in torch.

    Raises:
        ``ValueError`` for a number out of range; ``RuntimeError`` for a sparse gradient with weight decay.

    References:
        Duchi, Hazan, Singer, Adaptive subgradient methods for online learning and stochastic
        optimization, JMLR 2011.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.adagrad(lr=0.1), jnp.array([1.0, -2.0])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.9, -1.9]
    """

    lr: NonNegative = 1e-2
    lr_decay: Coefficient = 0
    weight_decay: Coefficient = 0
    initial_accumulator_value: NonNegative = 0
    eps: NonNegative = 1e-10
    _: KW_ONLY
    maximize: bool = False

    sparse: ClassVar[Literal["refused", "accepted", "required"]] = "accepted"

    def check_sparse(self) -> None:
        if enabled(self.weight_decay):
            raise RuntimeError(
                "Adagrad: weight_decay is not compatible with sparse gradients, because it decays every row. "
                f"It is {self.weight_decay}: set it to 0, or give dense gradients."
            )

    def init(self, param: jax.Array) -> Slots:
        return {"sum": full_like(param, self.initial_accumulator_value)}

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        grad = descent(self, grad, param)
        lr = self.lr / (1 + (step - 1) * self.lr_decay) if enabled(self.lr_decay) else self.lr
        total = slots["sum"] + grad * grad
        return -lr * grad / (sqrt(total) + self.eps), {"sum": total}


adagrad = factory(Adagrad, "adagrad")
