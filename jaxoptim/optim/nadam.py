"""torch's NAdam over parameter pytrees."""

from __future__ import annotations

from typing import Any

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number, Optimizer


class NAdam(Optimizer):
    """torch's ``NAdam``, computed by :class:`jaxoptim.rules.NAdam`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.NAdam({"w": jnp.ones(2)}, lr=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> [round(x, 3) for x in opt.params["w"].tolist()]
        [0.894, 0.894]
    """

    rule = rules.NAdam

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        betas: tuple[Number, Number] = rule.betas,
        eps: float = rule.eps,
        weight_decay: float = rule.weight_decay,
        momentum_decay: float = rule.momentum_decay,
        decoupled_weight_decay: bool = rule.decoupled_weight_decay,
        *,
        foreach: bool | None = None,
        maximize: bool = rule.maximize,
        capturable: bool = False,
        differentiable: bool = False,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "momentum_decay": momentum_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "maximize": maximize,
                "foreach": foreach,
                "capturable": capturable,
                "differentiable": differentiable,
            },
            groups=groups,
        )
