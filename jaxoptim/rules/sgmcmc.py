"""Langevin dynamics with a prior and a preconditioner, as devinterp 2 puts them together."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxoptim.core import (
    ArraysByLeaf,
    Coefficient,
    DecayRate,
    NonNegative,
    OptionalNonNegative,
    Positive,
    Sampler,
    Slots,
    enabled,
    rule,
    sqrt,
)
from jaxoptim.rules._langevin import boxed, check_terms, force, forces, free, masked
from jaxoptim.rules._terms import needed, zeros

NORMS = (
    "scaled_grad_norm",
    "unscaled_grad_norm",
    "localization_norm",
    "weight_decay_norm",
    "prior_norm",
    "scaled_noise_norm",
    "distance_norm",
)
PRODUCTS = ("grad_dot_prior", "grad_dot_noise", "prior_dot_noise")
COUNT = "numel"


@rule
class SGMCMC(Sampler):
    r"""The step of devinterp's ``SGMCMC``: SGLD with a preconditioner, which weighs loss, prior and noise.

    .. math::
        U(w) &= n\beta\,L(w) + \tfrac{\lambda}{2}\|w\|^2 + \tfrac{\gamma}{2}\|w - c\|^2 \\
        w_{t+1} &= w_t + M\left(-\tfrac{\epsilon}{2}\,G_t \nabla U(w_t) + \sqrt{\epsilon G_t}\,\sigma\,\xi_t\right),
        \qquad \xi_t \sim N(0, 1)

    and then the box :math:`|w - w_0| \le b`. ``preconditioner="identity"`` has :math:`G = 1`, which is :class:`SGLD`;
    ``"rmsprop"`` :math:`G_t = 1/(\delta + \sqrt{V_t})` with :math:`V_t = \alpha V_{t-1} + (1 - \alpha)\,g_t^2`, which
    is :class:`PSGLD`; and ``"nht"`` :math:`G = 1` with the noise :math:`\sqrt{2A}\,\sigma\,\xi_t`, which is SGLD at the
    temperature :math:`2A`.

    Args:
        lr: step size :math:`\epsilon \ge 0` (default 0.01).
        noise_level: :math:`\sigma \ge 0` (default 1).
        nbeta: inverse temperature :math:`n\beta \ge 0` times the number of data (default 1).
        weight_decay: :math:`\lambda \ge 0` (default 0).
        localization: :math:`\gamma \ge 0` (default 0).
        center_slot: the name of the slot that holds :math:`c`, the initial parameters unless another one is put there
            (default ``"prior_center"``).
        preconditioner: ``"identity"``, ``"rmsprop"`` or ``"nht"`` (default ``"identity"``).
        alpha: decay rate :math:`\alpha` in [0, 1) of ``"rmsprop"`` (default 0.99).
        eps: :math:`\delta > 0` of ``"rmsprop"`` (default 0.1).
        diffusion_factor: :math:`A \ge 0` of ``"nht"`` (default 0.01).
        bounding_box_size: :math:`b \ge 0`, of which zero lets nothing move, or None for no box (default None).
        optimize_over: mask :math:`M` of zeros and ones, as in :class:`SGLD` (default None).
        save_metrics: measure each step (default False).
        key: a typed JAX key (default None: ``jax.random.key(0)``).
        noise_impl: what makes noise of it (default ``"key"``; see :func:`jaxoptim.core.noise.normal`).

    Slots:
        The center, if there is localization; ``square_avg`` of ``"rmsprop"``; ``initial_param``, if there is a box or
        metrics. With metrics ``shared`` has those of :data:`NORMS` and :data:`PRODUCTS`, and how many numbers moved.

    Raises:
        As :class:`SGLD`.
    """

    lr: NonNegative = 0.01
    noise_level: NonNegative = 1.0
    nbeta: NonNegative = 1.0
    weight_decay: Coefficient = 0.0
    localization: Coefficient = 0.0
    center_slot: str = "prior_center"
    preconditioner: str = "identity"
    alpha: DecayRate = 0.99
    eps: Positive = 0.1
    diffusion_factor: NonNegative = 0.01
    bounding_box_size: OptionalNonNegative = None
    optimize_over: ArraysByLeaf = None
    save_metrics: bool = False

    box: ClassVar[str] = "clamp"

    def check(self) -> None:
        super().check()
        check_terms(self, preconditioner=("identity", "rmsprop", "nht"))

    def init_shared(self) -> dict[str, Any]:
        metrics = {name: jnp.zeros((), jnp.float32) for name in (*NORMS, *PRODUCTS)} | {COUNT: jnp.zeros((), jnp.int32)}
        return super().init_shared() | (metrics if self.save_metrics else {})

    def init(self, param: jax.Array, noise: jax.Array) -> Slots:  # type: ignore[override]
        kept = {
            self.center_slot: enabled(self.localization),
            "initial_param": self.bounding_box_size is not None or self.save_metrics,
        }
        averages = zeros(param, "square_avg") if self.preconditioner == "rmsprop" else {}
        return {name: jnp.copy(param) for name, is_kept in kept.items() if is_kept} | averages

    def update(  # type: ignore[override]
        self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array, noise: jax.Array, shared: dict[str, Any]
    ) -> tuple[jax.Array, Slots]:
        param = needed(self, param)
        heat = self.noise_level * (jnp.sqrt(2 * self.diffusion_factor) if self.preconditioner == "nht" else 1.0)
        conditioner: Any = 1.0
        if self.preconditioner == "rmsprop":
            square_avg = self.alpha.ema(slots["square_avg"], grad**2)
            conditioner, slots = 1 / (self.eps + sqrt(square_avg)), slots | {"square_avg": square_avg}
        rate, drift = self.lr / 2 * conditioner, force(self, grad, self._centred(slots), param)
        shaken = masked(self, jnp.sqrt(self.lr * conditioner) * heat * noise)
        inside, _ = boxed(self, param - masked(self, rate * drift) + shaken, slots)
        return inside - param, slots | self._measured(grad, rate, shaken, slots, param)

    def _centred(self, slots: Slots) -> Slots:
        """The slots as the terms of the potential take them, which pull to ``initial_param``."""
        return slots | {"initial_param": slots[self.center_slot]} if enabled(self.localization) else slots

    def _measured(self, grad: jax.Array, rate: Any, shaken: jax.Array, slots: Slots, param: jax.Array) -> Slots:
        """One array's part of what is summed for the metrics."""
        if not self.save_metrics:
            return {}
        terms, none = forces(self, grad, self._centred(slots), param), jnp.zeros_like(param)
        descent, pull, decay = (
            masked(self, rate * terms.get(name, none)) for name in ("grad", "localization", "weight_decay")
        )
        prior, away = pull + decay, param - slots["initial_param"]
        norms = (descent, self.lr / 2 * terms["grad"], pull, decay, prior, shaken, away)
        products = (descent * prior, descent * shaken, prior * shaken)
        sums = map(jnp.sum, (*(x**2 for x in norms), *products))
        return {**dict(zip((*NORMS, *PRODUCTS), sums, strict=True)), COUNT: jnp.asarray(free(self, param), jnp.int32)}

    def update_shared(self, shared: dict[str, Any], sums: dict[str, jax.Array]) -> dict[str, Any]:
        norms = {name: jnp.sqrt(x) for name, x in sums.items() if name in NORMS}
        return shared | {name: x if name == COUNT else x.astype(jnp.float32) for name, x in (sums | norms).items()}
