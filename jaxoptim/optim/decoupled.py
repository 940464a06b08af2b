"""Optimizers that decouple the weight decay whatever a state dict says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxoptim.core import enabled
from jaxoptim.optim import state_checks
from jaxoptim.optim.optimizer import Optimizer


class Decoupled(Optimizer):
    """An optimizer whose groups have ``decoupled_weight_decay`` on; a state dict of Adam says otherwise."""

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
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
