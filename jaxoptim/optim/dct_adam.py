"""Pyro's DCTAdam over parameter pytrees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxoptim import rules
from jaxoptim.engine.slots import abstract_slots
from jaxoptim.optim.clipped_adam import DecayingRate
from jaxoptim.optim.optimizer import Groups, Number
from jaxoptim.optim.state_dicts import Transfer


class DCTAdam(DecayingRate):
    """Pyro's ``DCTAdam``, computed by :class:`jaxoptim.rules.DCTAdam`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.DCTAdam({"w": jnp.ones(2)}, lr=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> [round(x, 3) for x in opt.params["w"].tolist()]
        [0.9, 0.9]
    """

    rule = rules.DCTAdam
    step_type: ClassVar[type | None] = int
    may_lack: ClassVar[frozenset[str]] = frozenset(("dct_dim", "subsample"))

    def _transferred(self, state: Mapping[Any, Any], transfer: Transfer) -> Mapping[Any, Any]:
        """The state with a count for each number, where Pyro has one for all until it meets a subsample."""
        new = dict(super()._transferred(state, transfer))
        for group in [group for group in transfer.groups if group.get("subsample_aware")]:
            rule = self._storage.rule_of(group)
            for param in group["params"]:
                if np.ndim(step := new.get(param, {}).get("step", ())) == 0:
                    counts = abstract_slots(rule, param.struct)["step"]
                    new[param] = {**new[param], "step": jnp.full(counts.shape, step, counts.dtype)}
        return new

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        betas: tuple[Number, Number] = rule.betas,
        eps: float = rule.eps,
        clip_norm: float = rule.clip_norm,
        lrd: float = rule.lrd,
        subsample_aware: bool = rule.subsample_aware,
        *,
        dct_dim: int | None = rule.dct_dim,
        subsample: Any = rule.subsample,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "clip_norm": clip_norm,
                "lrd": lrd,
                "subsample_aware": subsample_aware,
                "dct_dim": dct_dim,
                "subsample": subsample,
            },
            groups=groups,
        )
