"""torch's RMSprop over parameter pytrees."""

from __future__ import annotations

from typing import Any

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number, Optimizer


class RMSprop(Optimizer):
    """torch's ``RMSprop``, computed by :class:`jaxoptim.rules.RMSprop`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.RMSprop({"w": jnp.ones(2)}, lr=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> [round(x, 3) for x in opt.params["w"].tolist()]
        [0.0, 0.0]
    """

    rule = rules.RMSprop

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        alpha: float = rule.alpha,
        eps: float = rule.eps,
        weight_decay: float = rule.weight_decay,
        momentum: float = rule.momentum,
        centered: bool = rule.centered,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = rule.maximize,
        differentiable: bool = False,
        *,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "alpha": alpha,
                "eps": eps,
                "centered": centered,
                "weight_decay": weight_decay,
                "capturable": capturable,
                "foreach": foreach,
                "maximize": maximize,
                "differentiable": differentiable,
            },
            groups=groups,
        )
