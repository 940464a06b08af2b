"""torch's SGD over parameter pytrees."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number, Optimizer


class SGD(Optimizer):
    """torch's ``SGD``, computed by :class:`jaxoptim.rules.SGD`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> [round(x, 3) for x in opt.params["w"].tolist()]
        [0.9, 0.9]
    """

    rule = rules.SGD
    step_type: ClassVar[type | None] = None

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        momentum: float = rule.momentum,
        dampening: float = rule.dampening,
        weight_decay: float = rule.weight_decay,
        nesterov: bool = rule.nesterov,
        *,
        maximize: bool = rule.maximize,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
                "foreach": foreach,
                "differentiable": differentiable,
                "fused": fused,
            },
            groups=groups,
        )
