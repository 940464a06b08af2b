"""torch's Adam over parameter pytrees."""

from __future__ import annotations

from typing import Any

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number, Optimizer


class Adam(Optimizer):
    """torch's ``Adam``, computed by :class:`jaxoptim.rules.Adam`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.Adam({"w": jnp.ones(2)}, lr=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> [round(x, 3) for x in opt.params["w"].tolist()]
        [0.9, 0.9]
    """

    rule = rules.Adam

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        betas: tuple[Number, Number] = rule.betas,
        eps: float = rule.eps,
        weight_decay: float = rule.weight_decay,
        amsgrad: bool = rule.amsgrad,
        *,
        foreach: bool | None = None,
        maximize: bool = rule.maximize,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = rule.decoupled_weight_decay,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
                "foreach": foreach,
                "capturable": capturable,
                "differentiable": differentiable,
                "fused": fused,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
            groups=groups,
        )
