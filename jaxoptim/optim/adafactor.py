"""torch's Adafactor over parameter pytrees."""

from __future__ import annotations

from typing import Any

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number, Optimizer


class Adafactor(Optimizer):
    """torch's ``Adafactor``, computed by :class:`jaxoptim.rules.Adafactor`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.Adafactor({"w": jnp.ones(2)}, lr=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> [round(x, 3) for x in opt.params["w"].tolist()]
        [0.9, 0.9]
    """

    rule = rules.Adafactor

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        beta2_decay: float = rule.beta2_decay,
        eps: tuple[float | None, float] = rule.eps,
        d: float = rule.d,
        weight_decay: float = rule.weight_decay,
        *,
        foreach: bool | None = None,
        maximize: bool = rule.maximize,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "beta2_decay": beta2_decay,
                "eps": eps,
                "d": d,
                "weight_decay": weight_decay,
                "foreach": foreach,
                "maximize": maximize,
            },
            groups=groups,
        )
