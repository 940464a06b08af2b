"""torch's Adagrad over parameter pytrees."""

from __future__ import annotations

from typing import Any

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number, Optimizer


class Adagrad(Optimizer):
    """torch's ``Adagrad``, computed by :class:`jaxoptim.rules.Adagrad`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.Adagrad({"w": jnp.ones(2)}, lr=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> [round(x, 3) for x in opt.params["w"].tolist()]
        [0.9, 0.9]
    """

    rule = rules.Adagrad

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        lr_decay: float = rule.lr_decay,
        weight_decay: float = rule.weight_decay,
        initial_accumulator_value: float = rule.initial_accumulator_value,
        eps: float = rule.eps,
        foreach: bool | None = None,
        *,
        maximize: bool = rule.maximize,
        differentiable: bool = False,
        fused: bool | None = None,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "lr_decay": lr_decay,
                "eps": eps,
                "weight_decay": weight_decay,
                "initial_accumulator_value": initial_accumulator_value,
                "foreach": foreach,
                "maximize": maximize,
                "differentiable": differentiable,
                "fused": fused,
            },
            groups=groups,
        )
        # As in torch, the state of the first groups exists at once: it begins at the initial value.
        self._storage.start()
