"""torch's Muon over parameter pytrees."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number, Optimizer


class Muon(Optimizer):
    """torch's ``Muon``, computed by :class:`jaxoptim.rules.Muon`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.Muon({"w": jnp.eye(2)}, lr=0.1)
        >>> opt.step({"w": jnp.eye(2)})
        >>> [round(x, 3) for x in opt.params["w"][0].tolist()]
        [0.877, 0.0]
    """

    rule = rules.Muon
    step_type: ClassVar[type | None] = None

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        weight_decay: float = rule.weight_decay,
        momentum: float = rule.momentum,
        nesterov: bool = rule.nesterov,
        ns_coefficients: tuple[float, float, float] = rule.ns_coefficients,
        eps: float = rule.eps,
        ns_steps: int = rule.ns_steps,
        adjust_lr_fn: str | None = rule.adjust_lr_fn,
        *,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
            },
            groups=groups,
        )
