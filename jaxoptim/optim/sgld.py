"""devinterp's SGLD over parameter pytrees."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import jax

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number
from jaxoptim.optim.sampler import Sampler
from jaxoptim.rules.sgld import METRICS


class SGLD(Sampler):
    """devinterp's ``SGLD``, computed by :class:`jaxoptim.rules.SGLD`.

    The metrics that are switched on are entries of the groups; ``opt.noise_norm``, ``opt.grad_norm``,
    ``opt.weight_norm``, ``opt.distance`` and ``opt.lr`` are those of the first group. ``opt.noise`` (a list of arrays
    for each group), ``opt.dws`` (a list) and ``opt.localization_loss`` (summed over the groups) are of the last step.
    ``temperature`` is an old name of ``nbeta``, which it overrides. ``optimize_over`` of a group is a mask that
    broadcasts to all its parameters, or a tree or list with one for each.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> chain = optim.SGLD({"w": jnp.ones(2)}, lr=1e-3, nbeta=50.0, noise_norm=True, key=jax.random.key(1))
        >>> chain.step({"w": jnp.ones(2)})
        >>> 0 < float(chain.noise_norm) < 5
        True
    """

    rule = rules.SGLD
    may_lack: ClassVar[frozenset[str]] = Sampler.may_lack | {"metrics"}

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        noise_level: float = rule.noise_level,
        weight_decay: float = rule.weight_decay,
        localization: float = rule.localization,
        nbeta: Any = rule.nbeta,
        bounding_box_size: float | None = rule.bounding_box_size,
        save_noise: bool = rule.save_noise,
        save_mala_vars: bool = rule.save_mala_vars,
        optimize_over: Any = rule.optimize_over,
        noise_norm: bool = rule.noise_norm,
        grad_norm: bool = rule.grad_norm,
        weight_norm: bool = rule.weight_norm,
        distance: bool = rule.distance,
        temperature: float | None = None,
        *,
        box: str = rule.box,
        metrics: str = rule.metrics,
        key: Any = None,
        noise_impl: str = rule.noise_impl,
        groups: Groups | None = None,
    ) -> None:
        if temperature is not None:
            nbeta = temperature
            warnings.warn("Temperature is deprecated. Please use nbeta in your yaml file instead.", stacklevel=2)
        if isinstance(noise_level, int | float) and noise_level != 1.0:
            warnings.warn(
                "Warning: noise_level in SGLD is unequal to one, this removes SGLD posterior sampling guarantees.",
                stacklevel=2,
            )
        warn_of_nbeta(nbeta)
        self.fixed = {"save_noise": save_noise, "save_mala_vars": save_mala_vars}
        super().__init__(
            params,
            {
                "lr": lr,
                "noise_level": noise_level,
                "weight_decay": weight_decay,
                "localization": localization,
                "nbeta": nbeta,
                "bounding_box_size": bounding_box_size,
                "optimize_over": optimize_over,
                "noise_norm": noise_norm,
                "grad_norm": grad_norm,
                "weight_norm": weight_norm,
                "distance": distance,
                "box": box,
                "metrics": metrics,
                "key": key,
                "noise_impl": noise_impl,
            },
            groups=groups,
        )

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
        """For each group the noise of its parameters in the last step, before the mask; None if it is not kept."""
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


def warn_of_nbeta(nbeta: Any) -> None:
    """Warn, as devinterp does, of a temperature that is the default."""
    if isinstance(nbeta, int | float) and nbeta == 1.0:
        warnings.warn(
            "Warning: nbeta set to 1, LLC estimates will be off unless you know what you're doing. "
            "Use utils.default_nbeta(dataloader) instead",
            stacklevel=3,
        )
