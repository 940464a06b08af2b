"""Pyro's AdagradRMSProp over parameter pytrees."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Optimizer


class AdagradRMSProp(Optimizer):
    """Pyro's ``AdagradRMSProp``, computed by :class:`jaxoptim.rules.AdagradRMSProp`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.AdagradRMSProp({"w": jnp.ones(2)}, eta=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> [round(x, 3) for x in opt.params["w"].tolist()]
        [0.95, 0.95]
    """

    rule = rules.AdagradRMSProp
    step_type: ClassVar[type | None] = int

    def __init__(
        self,
        params: Any,
        eta: float = rule.eta,
        delta: float = rule.delta,
        t: float = rule.t,
        *,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(params, {"eta": eta, "delta": delta, "t": t}, groups=groups)
        # As in Pyro, the state of the first groups exists at once.
        self._storage.start()
