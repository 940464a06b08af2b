"""torch's ASGD over parameter pytrees."""

from __future__ import annotations

from typing import Any

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number, Optimizer


class ASGD(Optimizer):
    """torch's ``ASGD``, computed by :class:`jaxoptim.rules.ASGD`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.ASGD({"w": jnp.ones(2)}, lr=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> [round(x, 3) for x in opt.params["w"].tolist()]
        [0.9, 0.9]
    """

    rule = rules.ASGD

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        lambd: float = rule.lambd,
        alpha: float = rule.alpha,
        t0: float = rule.t0,
        weight_decay: float = rule.weight_decay,
        foreach: bool | None = None,
        maximize: bool = rule.maximize,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "lambd": lambd,
                "alpha": alpha,
                "t0": t0,
                "weight_decay": weight_decay,
                "foreach": foreach,
                "maximize": maximize,
                "differentiable": differentiable,
                "capturable": capturable,
            },
            groups=groups,
        )
