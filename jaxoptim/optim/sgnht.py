"""devinterp's SGNHT over parameter pytrees."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from jaxoptim import rules
from jaxoptim.optim.optimizer import Groups, Number
from jaxoptim.optim.sampler import Sampler
from jaxoptim.optim.sgld import warn_of_nbeta


class SGNHT(Sampler):
    """devinterp's ``SGNHT``, computed by :class:`jaxoptim.rules.SGNHT`.

    The thermostat is an entry of each group, and begins at the group's own ``diffusion_factor`` (in devinterp at that
    of the constructor). devinterp's ``save_noise`` and ``save_mala_vars`` do nothing but warn, as there.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> chain = optim.SGNHT({"w": jnp.ones(2)}, lr=1e-3, nbeta=50.0, key=jax.random.key(1))
        >>> chain.step({"w": jnp.ones(2)})
        >>> chain.param_groups[0]["thermostat"].shape
        ()
    """

    rule = rules.SGNHT
    may_lack: ClassVar[frozenset[str]] = Sampler.may_lack | {"weight_decay", "localization", "optimize_over", "order"}

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        diffusion_factor: float = rule.diffusion_factor,
        bounding_box_size: float | None = rule.bounding_box_size,
        save_noise: bool = False,
        save_mala_vars: bool = False,
        nbeta: Any = rule.nbeta,
        *,
        weight_decay: float = rule.weight_decay,
        localization: float = rule.localization,
        optimize_over: Any = rule.optimize_over,
        box: str = rule.box,
        order: str = rule.order,
        key: Any = None,
        noise_impl: str = rule.noise_impl,
        groups: Groups | None = None,
    ) -> None:
        if save_noise:
            warnings.warn(
                "Warning: NoiseNorm not implemented for SGNHT! If you insist on using NoiseNorm, use SGLD instead.",
                stacklevel=2,
            )
        if save_mala_vars:
            warnings.warn(
                "Warning: MALA not implemented for SGNHT! If you insist on using MALA, use SGLD instead.", stacklevel=2
            )
        warn_of_nbeta(nbeta)
        super().__init__(
            params,
            {
                "lr": lr,
                "diffusion_factor": diffusion_factor,
                "bounding_box_size": bounding_box_size,
                "nbeta": nbeta,
                "weight_decay": weight_decay,
                "localization": localization,
                "optimize_over": optimize_over,
                "box": box,
                "order": order,
                "key": key,
                "noise_impl": noise_impl,
            },
            groups=groups,
        )
