"""Optimizers that may count the steps of each number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxoptim.engine.slots import abstract_slots
from jaxoptim.optim.decaying_rate import DecayingRate
from jaxoptim.optim.state_dicts import Transfer


class CountsByNumber(DecayingRate):
    """An optimizer that counts the steps of each number of a parameter in groups that are ``subsample_aware``."""

    may_lack: ClassVar[frozenset[str]] = frozenset(("dct_dim", "subsample"))

    def _transferred(self, state: Mapping[Any, Any], transfer: Transfer) -> Mapping[Any, Any]:
        """Return the state with a count for each number, where Pyro has one for all until it meets a subsample."""
        new = dict(super()._transferred(state, transfer))
        for group in [group for group in transfer.groups if group.get("subsample_aware")]:
            rule = self._storage.rule_of(group)
            for param in group["params"]:
                if np.ndim(step := new.get(param, {}).get("step", ())) == 0:
                    counts = abstract_slots(rule, param.struct)["step"]
                    new[param] = {**new[param], "step": jnp.full(counts.shape, step, counts.dtype)}
        return new
