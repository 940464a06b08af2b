"""torch's AdamW over parameter pytrees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxoptim import rules
from jaxoptim.core import enabled
from jaxoptim.optim import state_checks
from jaxoptim.optim.optimizer import Groups, Number, Optimizer


class AdamW(Optimizer):
    """torch's ``AdamW``, computed by :class:`jaxoptim.rules.AdamW`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.AdamW({"w": jnp.ones(2)}, lr=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> [round(x, 3) for x in opt.params["w"].tolist()]
        [0.899, 0.899]
    """

    rule = rules.AdamW

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        betas: tuple[Number, Number] = rule.betas,
        eps: float = rule.eps,
        weight_decay: float = rule.weight_decay,
        amsgrad: bool = rule.amsgrad,
        *,
        maximize: bool = rule.maximize,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
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
                "decoupled_weight_decay": True,
            },
            groups=groups,
        )

    def _check_state(self, group: dict[str, Any], state: Mapping[Any, Any]) -> None:
        decay = group["weight_decay"]
        if group.get("decoupled_weight_decay") is False and enabled(self.rule(weight_decay=decay).weight_decay):
            raise ValueError(
                f"loaded state dict is of Adam: it adds weight_decay={decay} times the parameter to the gradient of "
                f"{state_checks.labels(group)[0]}, which AdamW does not. Load it into Adam, or use strict=False, which "
                "decouples the decay from now on, as torch does."
            )
        super()._check_state(group, state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state dict of Adam says otherwise
            group["decoupled_weight_decay"] = True
