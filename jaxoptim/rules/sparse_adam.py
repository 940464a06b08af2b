"""Adam for embedding tables."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax

from jaxoptim.core import DecayRate, Positive, Rule, Slots, factory, rule, sqrt
from jaxoptim.rules._terms import zeros


@rule
class SparseAdam(Rule):
    r"""SparseAdam: Adam that updates the rows a gradient touches and leaves the others, moments included.

    On those rows

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1)\,g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2)\,g_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma\,\frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
        \frac{m_t}{\sqrt{v_t} + \epsilon}

    The step :math:`t` counts all updates, whatever their rows.

    Args:
        lr: learning rate :math:`\gamma > 0` (default 1e-3).
        betas: decay rates :math:`\beta_1, \beta_2` in [0, 1) (default 0.9, 0.999).
        eps: :math:`\epsilon > 0` (default 1e-8), added before the bias correction.
        maximize: ascend instead (default False).

    Gradients are ``jax.experimental.sparse.BCOO`` with indices of shape (rows, 1) and dense rows; duplicate
    rows are summed, in any order, and rows past the end are ignored. The work is proportional to their
    number if parameters and state are donated.

    Slots:
        ``exp_avg``, ``exp_avg_sq``, dense, of the parameter's shape.

    Raises:
        ``ValueError`` for a number out of range, and for complex and 0-d parameters; ``RuntimeError`` for a dense
        gradient.

    References:
        Kingma, Ba, Adam: a method for stochastic optimization, ICLR 2015, in torch's lazy form.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim
        >>> from jax.experimental.sparse import BCOO
        >>> rule, table = jaxoptim.rules.SparseAdam(lr=0.1), jnp.ones((4, 2))
        >>> grad = BCOO((jnp.ones((2, 2)), jnp.array([[3], [3]])), shape=(4, 2))
        >>> table, state = jaxoptim.step(rule, table, grad, jaxoptim.init(rule, table))
        >>> [round(x, 3) for x in table[:, 0].tolist()]
        [1.0, 1.0, 1.0, 0.9]
    """

    lr: Positive = 1e-3
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    eps: Positive = 1e-8
    maximize: bool = False

    sparse: ClassVar[Literal["refused", "accepted", "required"]] = "required"
    complex: ClassVar[bool] = False
    complex_error: ClassVar[type[Exception]] = ValueError

    def check_param(self, name: str, param: Any) -> None:
        if not param.shape:
            raise ValueError(
                f"SparseAdam updates rows, but {name!r} has shape (), which has none. Make it one of shape (1,), or "
                "give it to another optimizer."
            )

    def init(self, param: jax.Array) -> Slots:
        return zeros(param, "exp_avg", "exp_avg_sq")

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        beta1, beta2 = self.betas
        grad = -grad if self.maximize else grad
        m = beta1.ema(slots["exp_avg"], grad)
        v = beta2.ema(slots["exp_avg_sq"], grad * grad)
        size = self.lr * sqrt(beta2.bias_correction(step)) / beta1.bias_correction(step)
        return -size * m / (sqrt(v) + self.eps), {"exp_avg": m, "exp_avg_sq": v}


sparse_adam = factory(SparseAdam, "sparse_adam")
