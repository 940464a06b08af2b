"""Samplers that measure each step, as devinterp's SGLD."""

from __future__ import annotations

import warnings
from typing import Any

import jax

from jaxoptim.optim.optimizer import Groups, Selectors
from jaxoptim.optim.sampler import Sampler, warn_user
from jaxoptim.rules.sgld import METRICS


class MeasuredSampler(Sampler):
    """A sampler that may track metrics and keep the noise and the gradient of its last step."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        temperature: float | None = None,
        groups: Groups | None = None,
        frozen: Selectors | None = None,
        wrt: Any = None,
    ) -> None:
        if temperature is not None:
            defaults["nbeta"] = temperature
            warnings.warn("Temperature is deprecated. Please use nbeta in your yaml file instead.", stacklevel=3)
        warn_of_settings("SGLD", defaults["noise_level"], defaults["nbeta"])
        self.fixed = {name: defaults.pop(name) for name in ("save_noise", "save_mala_vars")}
        super().__init__(params, defaults, groups=groups, frozen=frozen, wrt=wrt)

    def _add(self, group: dict[str, Any]) -> None:
        super()._add(group)
        group["num_el"] = sum(param.value.size for param in group["params"])

    @property
    def save_noise(self) -> bool:
        """Whether the noise of the last step is kept."""
        return self.fixed["save_noise"]

    @property
    def save_mala_vars(self) -> bool:
        """Whether the gradient of the potential at the last step is kept."""
        return self.fixed["save_mala_vars"]

    @property
    def noise(self) -> dict[int, list[jax.Array]] | None:
        """The noise of the parameters of each group in the last step, before the mask; None if it is not kept."""
        return dict(enumerate(self._of_each_group("noise"))) if self.save_noise else None

    @property
    def dws(self) -> list[jax.Array]:
        """The gradient of the potential in the last step, before the mask, for all parameters."""
        self._check_saved("dws")
        return [x for of_group in self._of_each_group("dws") for x in of_group]

    @property
    def localization_loss(self) -> jax.Array:
        """The term of localization in the potential at the last step, over all groups."""
        self._check_saved("localization_loss")
        return sum(group["localization_loss"] for group in self.param_groups)

    def _check_saved(self, name: str) -> None:
        if not self.save_mala_vars:
            raise AttributeError(
                f"'{type(self).__name__}' object has no attribute '{name}' without save_mala_vars=True"
            )

    def _of_each_group(self, slot: str) -> list[list[jax.Array]]:
        return [[self.state[param][slot] for param in group["params"]] for group in self.param_groups]

    def __getattr__(self, name: str) -> Any:
        if name in (*METRICS, "lr"):
            return self.param_groups[0][name]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")


def warn_of_settings(name: str, noise_level: Any, nbeta: Any, prefix: str = "Warning: ") -> None:
    """Warn, as devinterp does, of noise that is not the posterior's, and of a temperature that is the default.

    Args:
        name: the name of the sampler in messages.
        noise_level: the factor of its noise.
        nbeta: its inverse temperature.
        prefix: the beginning of messages, in devinterp 1.
    """
    if isinstance(noise_level, int | float) and noise_level != 1.0:
        warn_user(f"{prefix}noise_level in {name} is unequal to one, this removes SGLD posterior sampling guarantees.")
    if isinstance(nbeta, int | float) and nbeta == 1.0:
        warn_user(
            f"{prefix}nbeta set to 1, LLC estimates will be off unless you know what you're doing. "
            "Use utils.default_nbeta(dataloader) instead"
        )
