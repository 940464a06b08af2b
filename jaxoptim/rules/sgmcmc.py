"""Langevin dynamics with a prior and a preconditioner, as in devinterp 2."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jaxoptim.core import (
    Arrays,
    ArraysByLeaf,
    Coefficient,
    DecayRate,
    NonNegative,
    OptionalNonNegative,
    Positive,
    Slots,
    enabled,
    rule,
    sketches,
    sqrt,
)
from jaxoptim.core.rule import assembled
from jaxoptim.rules._components import COMPONENTS, SKETCHES, PosteriorSampler, Scaled
from jaxoptim.rules._langevin import boxed, check_terms, force, free, masked
from jaxoptim.rules._terms import needed, zeros

COUNT = "numel"
"""The metric that counts the elements that moved."""
_START = "sketch_start"


@rule
class SGMCMC(PosteriorSampler):
    r"""SGMCMC: devinterp's SGLD step with a preconditioner, which weighs loss, prior and noise.

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
        metrics: ``"components"`` measures the parts of each step, as :class:`PSGLD` (default None: nothing).
        sketch_dim: measure the parts of each step as sketches of so many numbers, an int >= 1 (default None: none); see
            :func:`jaxoptim.sampling.sketch`.
        sketch_seed: an int in :math:`[0, 2^{32})` that the sketches hash with (default None: 0).
        sketch_start: the offset of the tree's numbers in the vector that is sketched (default 0).
        key: a typed JAX key (default None: ``jax.random.key(0)``).
        noise_impl: the generator of the noise (default ``"key"``; see :func:`jaxoptim.core.noise.normal`).

    Slots:
        The center, if there is localization; ``square_avg`` of ``"rmsprop"``; ``initial_param``, if there is a box or
        metrics. With metrics ``shared`` has them, and :data:`COUNT`; with sketches it has those, ``(sketch_dim,)``
        each. The unscaled gradient is not masked.

    Raises:
        As :class:`SGLD`; ``ValueError`` for a size or seed of sketches out of range.
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
    metrics: str | None = None
    sketch_dim: int | None = None
    sketch_seed: Arrays = None
    sketch_start: int = 0

    box: ClassVar[str] = "clamp"
    center: ClassVar[Any] = None  # type: ignore[misc]  # a slot has it

    def check(self) -> None:
        super().check()
        check_terms(self, preconditioner=("identity", "rmsprop", "nht"), metrics=(None, "components"))
        if self.sketch_dim is not None:
            sketches.check(self.sketch_dim, self._sketch_seed, "sketch_")

    @property
    def _sketch_seed(self) -> Any:
        return 0 if self.sketch_seed is None else self.sketch_seed

    @property
    def pointwise(self) -> bool:
        """Whether there are no sketches, which look at the places of numbers."""
        return self.sketch_dim is None

    def init_shared(self) -> dict[str, Any]:
        count = {} if self.metrics is None else {COUNT: jnp.zeros((), jnp.int32)}
        names = () if self.sketch_dim is None else SKETCHES
        return super().init_shared() | count | {name: jnp.zeros(self.sketch_dim, jnp.float32) for name in names}

    def shared_at(self, start: int, shared: dict[str, Any]) -> dict[str, Any]:
        at = {} if self.sketch_dim is None else {_START: sketches.place(self.sketch_start + start)}
        return shared | at

    def init(self, param: jax.Array, noise: jax.Array) -> Slots:  # type: ignore[override]
        kept = {
            self.center_slot: enabled(self.localization),
            "initial_param": self.bounding_box_size is not None or self.metrics is not None,
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
        rate, centred = self.lr / 2 * conditioner, self._centred(slots)
        shaken = masked(self, jnp.sqrt(self.lr * conditioner) * heat * noise)
        moved = param - masked(self, rate * force(centred, grad, slots, param)) + shaken
        inside, _ = boxed(self, moved, slots)
        return inside - param, slots | centred._measured(grad, slots, param, rate, shaken, shared)

    def _measured(
        self, grad: jax.Array, slots: Slots, param: jax.Array, rate: Any, noise: jax.Array, shared: dict[str, Any]
    ) -> Slots:
        """Compute one array's summands of the metrics and sketches that are on."""
        if self.metrics is None and self.sketch_dim is None:
            return {}
        descent, _, *others = self.parts(grad, slots, param, rate=rate, unscaled=self.lr / 2, noise=noise)
        whole = Scaled(self.lr / 2 * self.nbeta, grad)  # devinterp leaves the mask out of it
        parts = (descent, whole, *others)
        found = {}
        if self.metrics is not None:
            found = self.products(parts, slots, param) | {COUNT: jnp.asarray(free(self, param), jnp.int32)}
        if self.sketch_dim is None:
            return found
        return found | {
            name: jnp.zeros(self.sketch_dim, param.dtype)
            if x is None
            else sketches.part(x.value, self.sketch_dim, self._sketch_seed, shared[_START])
            for name, x in zip(SKETCHES, parts, strict=True)
        }

    def _centred(self, slots: Slots) -> Self:
        """Return the rule with the center that the slots hold."""
        return assembled(type(self), vars(self) | {"center": slots.get(self.center_slot)})

    def update_shared(self, shared: dict[str, Any], sums: dict[str, jax.Array]) -> dict[str, Any]:
        counted = {COUNT: sums[COUNT]} if COUNT in sums else {}
        sketched = {name: sums[name].astype(jnp.float32) for name in SKETCHES if name in sums}
        return super().update_shared(shared, sums) | counted | sketched

    def rested(self, shared: dict[str, Any]) -> dict[str, Any]:
        measured = [name for name in (*COMPONENTS, COUNT, *SKETCHES) if name in shared]
        return shared | {name: jnp.zeros_like(shared[name]) for name in measured}
