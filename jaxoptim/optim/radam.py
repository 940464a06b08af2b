"""torch's RAdam over parameter pytrees."""

from __future__ import annotations

from typing import Any

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number, Optimizer


class RAdam(Optimizer):
    """torch's ``RAdam``, computed by :class:`jaxoptim.rules.RAdam`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.RAdam({"w": jnp.ones(2)}, lr=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> [round(x, 3) for x in opt.params["w"].tolist()]
        [0.9, 0.9]
    """

    rule = rules.RAdam

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        betas: tuple[Number, Number] = rule.betas,
        eps: float = rule.eps,
        weight_decay: float = rule.weight_decay,
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
                "maximize": maximize,
                "foreach": foreach,
                "capturable": capturable,
                "decoupled_weight_decay": decoupled_weight_decay,
                "differentiable": differentiable,
            },
            groups=groups,
        )
