"""torch's Rprop over parameter pytrees."""

from __future__ import annotations

from typing import Any

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number, Optimizer


class Rprop(Optimizer):
    """torch's ``Rprop``, computed by :class:`jaxoptim.rules.Rprop`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.Rprop({"w": jnp.ones(2)}, lr=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> [round(x, 3) for x in opt.params["w"].tolist()]
        [0.9, 0.9]
    """

    rule = rules.Rprop

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        etas: tuple[float, float] = rule.etas,
        step_sizes: tuple[float, float] = rule.step_sizes,
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = rule.maximize,
        differentiable: bool = False,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "etas": etas,
                "step_sizes": step_sizes,
                "foreach": foreach,
                "maximize": maximize,
                "differentiable": differentiable,
                "capturable": capturable,
            },
            groups=groups,
        )
