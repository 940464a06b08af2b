"""Samplers that take the options of devinterp's SGNHT."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from jaxoptim.optim.optimizer import Groups, Selectors
from jaxoptim.optim.sampler import Sampler
from jaxoptim.optim.sgld import warn_of_settings


class ThermostatSampler(Sampler):
    """A sampler that warns, as devinterp does, of metrics that it does not keep."""

    may_lack: ClassVar[frozenset[str]] = Sampler.may_lack | {"weight_decay", "localization", "optimize_over", "order"}

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        save_noise: bool = False,
        save_mala_vars: bool = False,
        groups: Groups | None = None,
        frozen: Selectors | None = None,
        wrt: Any = None,
    ) -> None:
        if save_noise:
            warnings.warn(
                "Warning: NoiseNorm not implemented for SGNHT! If you insist on using NoiseNorm, use SGLD instead.",
                stacklevel=3,
            )
        if save_mala_vars:
            warnings.warn(
                "Warning: MALA not implemented for SGNHT! If you insist on using MALA, use SGLD instead.", stacklevel=3
            )
        warn_of_settings("SGNHT", 1.0, defaults["nbeta"])
        super().__init__(params, defaults, groups=groups, frozen=frozen, wrt=wrt)
