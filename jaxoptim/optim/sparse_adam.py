"""torch's SparseAdam over parameter pytrees."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number, Optimizer


class SparseAdam(Optimizer):
    """torch's ``SparseAdam``, computed by :class:`jaxoptim.rules.SparseAdam`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax.experimental.sparse import BCOO
        >>> from jaxoptim import optim
        >>> opt = optim.SparseAdam({"table": jnp.ones((4, 2))}, lr=0.1)
        >>> opt.step({"table": BCOO((jnp.ones((1, 2)), jnp.array([[3]])), shape=(4, 2))})
        >>> [round(x, 3) for x in opt.params["table"][:, 0].tolist()]
        [1.0, 1.0, 1.0, 0.9]
    """

    rule = rules.SparseAdam
    step_type: ClassVar[type | None] = int

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        betas: tuple[Number, Number] = rule.betas,
        eps: float = rule.eps,
        maximize: bool = rule.maximize,
        *,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "maximize": maximize}, groups=groups)
