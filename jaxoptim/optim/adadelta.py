"""torch's Adadelta over parameter pytrees."""

from __future__ import annotations

from typing import Any

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number, Optimizer


class Adadelta(Optimizer):
    """torch's ``Adadelta``, computed by :class:`jaxoptim.rules.Adadelta`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.Adadelta({"w": jnp.ones(2)}, lr=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> [round(x, 3) for x in opt.params["w"].tolist()]
        [1.0, 1.0]
    """

    rule = rules.Adadelta

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        rho: float = rule.rho,
        eps: float = rule.eps,
        weight_decay: float = rule.weight_decay,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = rule.maximize,
        differentiable: bool = False,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "rho": rho,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "capturable": capturable,
                "foreach": foreach,
                "differentiable": differentiable,
            },
            groups=groups,
        )
