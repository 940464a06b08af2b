"""Optimizers whose state exists from the construction on."""

from __future__ import annotations

from typing import Any

from optax import GradientTransformation

from jaxoptim.optim.optimizer import Groups, Optimizer, Selectors


class Started(Optimizer):
    """An optimizer that makes the state of its first groups at once, as the parent does."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        groups: Groups | None = None,
        frozen: Selectors | None = None,
        wrt: Any = None,
        gradient_transform: GradientTransformation | None = None,
        master_weights: bool = False,
        rounding: str = "nearest",
        state_dtype: Any = None,
    ) -> None:
        super().__init__(
            params,
            defaults,
            groups=groups,
            frozen=frozen,
            wrt=wrt,
            gradient_transform=gradient_transform,
            master_weights=master_weights,
            rounding=rounding,
            state_dtype=state_dtype,
        )
        self._storage.start()
