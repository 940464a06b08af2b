"""Stochastic gradient Nosé-Hoover thermostats."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxoptim.core import (
    ArraysByLeaf,
    Coefficient,
    NonNegative,
    OptionalCoefficient,
    Slots,
    ValuesByLeaf,
    factory,
    rule,
)
from jaxoptim.rules._components import PosteriorSampler
from jaxoptim.rules._langevin import boxed, check_terms, first_momentum, force, free, masked, relaxation
from jaxoptim.rules._terms import needed


@rule
class SGNHT(PosteriorSampler):
    r"""SGNHT: Langevin dynamics with momentum, whose friction adapts until the momentum has the right temperature.

    With :math:`U = n\beta L + \tfrac{\lambda}{2}\|w\|^2 + \tfrac{\gamma}{2}\|w - c\|^2`, a mask :math:`M`, and
    ``order="kick_friction"``, which is devinterp's:

    .. math::
        v &\leftarrow v - \epsilon\,M\nabla U(w) \\
        v &\leftarrow v - \xi\,v + \sqrt{2\epsilon A}\,M\zeta, \qquad \zeta \sim N(0, 1) \\
        w &\leftarrow w + v \\
        \xi &\leftarrow \xi + \|v\|^2/d - \epsilon

    where :math:`d` counts the numbers that move; :math:`v_0 \sim N(0, \epsilon)` and :math:`\xi_0 = A`. There is one
    thermostat :math:`\xi` for all arrays. ``order="ding"`` is the paper's: the friction acts on the old momentum,
    :math:`v \leftarrow (1 - \xi)v - \epsilon M\nabla U + \sqrt{2\epsilon A}M\zeta`. Both have an error of first order
    in A (about :math:`\pm A/2`). ``order="badodab"`` splits symmetrically and is of second order:

    .. math::
        v &\leftarrow v - \epsilon\,M\nabla U(w), \qquad w \leftarrow w + v/2, \qquad
        \xi \leftarrow \xi + (\|v\|^2/d - \epsilon)/2 \\
        v &\leftarrow e^{-\xi} v + \sqrt{\epsilon A (1 - e^{-2\xi})/\xi}\;M\zeta \\
        \xi &\leftarrow \xi + (\|v\|^2/d - \epsilon)/2, \qquad w \leftarrow w + v/2

    Args:
        lr: step size :math:`\epsilon \ge 0` (default 0.01).
        diffusion_factor: :math:`A \ge 0` (default 0.01).
        bounding_box_size: :math:`b > 0`, or None for no box (default None). A momentum that leads out of it changes
            its sign.
        nbeta: inverse temperature :math:`n\beta \ge 0` times the number of data (default 1).
        weight_decay: :math:`\lambda \ge 0` (default 0).
        localization: :math:`\gamma \ge 0`, toward the center :math:`c` (default 0).
        optimize_over: mask of zeros and ones, as in :class:`SGLD` (default None).
        box: ``"clamp"`` or ``"reflect"``, as in :class:`SGLD` (default ``"clamp"``).
        order: ``"kick_friction"``, ``"ding"`` or ``"badodab"`` (default ``"kick_friction"``).
        metrics: ``"components"`` tracks the parts of each step in ``shared``, as below (default None: nothing).
        center: :math:`c`, as in :class:`SGLD` (default None: the initial parameters).
        key: a typed JAX key (default None: ``jax.random.key(0)``).
        noise_impl: the generator of the noise (default ``"key"``; see :func:`jaxoptim.core.noise.normal`).

    Components:
        Of the step :math:`w_{t+1} - w_t = m - a - \ell - d + n`, up to the box, ``metrics="components"`` keeps what
        :class:`SGHMC` does, where :math:`\xi` is the friction that acts in this step:

        - ``"kick_friction"``: :math:`\rho = 1 - \xi`, :math:`n = \sqrt{2\epsilon A}\,M\zeta`, :math:`m = \rho v_t`;
        - ``"ding"``: :math:`\rho = 1`, the same n, :math:`m = (1 - \xi) v_t`;
        - ``"badodab"``: :math:`\rho = (1 + e^{-\xi})/2`, n half of what the momentum gets as noise,
          :math:`m = \rho v_t`.

    Parameters of float16 and bfloat16 lose small steps: see :class:`jaxoptim.Sampler`.

    Slots:
        ``momentum`` and ``initial_param``, of the parameter's shape. ``shared`` has ``key`` and ``thermostat``, a
        float32 scalar in every precision, as devinterp keeps it.

    Differences from devinterp:
        Weight decay, localization and masks are possible. An update without any gradient changes nothing (there it
        divides by zero). The equations follow devinterp's code, which is right; those of its documentation are not.

    Raises:
        As :class:`SGLD`.

    References:
        Ding, Fang, Babbush, Chen, Skeel, Neven, Bayesian sampling using stochastic gradient thermostats, NIPS 2014.
        Leimkuhler, Shang, Adaptive thermostats for noisy gradient systems, SIAM J. Sci. Comput., 2016 (BADODAB).

    Examples:
        >>> import jax.numpy as jnp, jaxoptim
        >>> tx, params = jaxoptim.sgnht(lr=0.25, diffusion_factor=0.5), jnp.array([1.0, -2.0])
        >>> state = tx.init(params)
        >>> state = state._replace(slots=state.slots | {"momentum": jnp.zeros(2)})
        >>> updates, state = tx.update(params, state, params, noise=jnp.zeros(2))
        >>> updates.tolist(), round(float(state.shared["thermostat"]), 6)
        ([-0.125, 0.25], 0.289062)
    """

    lr: NonNegative = 0.01
    diffusion_factor: NonNegative = 0.01
    bounding_box_size: OptionalCoefficient = None
    nbeta: NonNegative = 1.0
    weight_decay: Coefficient = 0.0
    localization: Coefficient = 0.0
    optimize_over: ArraysByLeaf = None
    box: str = "clamp"
    order: str = "kick_friction"
    metrics: str | None = None
    center: ValuesByLeaf = None

    of_tree: ClassVar[tuple[str, ...]] = ("diffusion_factor",)

    def check(self) -> None:
        super().check()
        check_terms(self, metrics=(None, "components"), order=("kick_friction", "ding", "badodab"))

    def init_shared(self) -> dict[str, Any]:
        return super().init_shared() | {"thermostat": jnp.asarray(self.at(0).diffusion_factor, jnp.float32)}

    def init(self, param: jax.Array, noise: jax.Array) -> Slots:  # type: ignore[override]
        return {"momentum": first_momentum(self, param, noise), "initial_param": jnp.copy(param)}

    @property
    def leaves_out_held(self) -> bool:
        return True

    @property
    def two_pass(self) -> bool:
        """Whether a first pass is needed: the thermostat of the splitting moves between kick and friction."""
        return self.order == "badodab"

    def first_pass(
        self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array, shared: dict[str, Any], **given: Any
    ) -> dict[str, jax.Array]:
        return self._energy(self._kicked(grad, slots, needed(self, param)), half=True)

    def prepare_shared(self, shared: dict[str, Any], sums: dict[str, jax.Array]) -> dict[str, Any]:
        return self.update_shared(shared, sums)

    def update(  # type: ignore[override]
        self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array, noise: jax.Array, shared: dict[str, Any]
    ) -> tuple[jax.Array, Slots]:
        param = needed(self, param)
        friction = shared["thermostat"].astype(grad.dtype)
        kicked = self._kicked(grad, slots, param)
        shaken = jnp.sqrt(2 * self.lr * self.diffusion_factor) * masked(self, noise)
        if self.order == "badodab":
            keeps, shaken = relaxation(friction, masked(self, noise), self.lr * self.diffusion_factor)
            momentum = keeps * kicked + shaken
            moved, rate, shaken = param + (kicked + momentum) / 2, self.lr * (1 + keeps) / 2, shaken / 2
        elif self.order == "ding":
            momentum = kicked - friction * slots["momentum"] + shaken
            moved, rate = param + momentum, self.lr
        else:
            momentum = kicked - friction * kicked + shaken
            moved, rate = param + momentum, self.lr * (1 - friction)
        energy = self._energy(momentum, half=self.two_pass)
        inside, sign = boxed(self, moved, slots)
        measured = self.components(grad, slots, param, rate=rate, unscaled=self.lr, noise=shaken)
        return inside - param, {**slots, "momentum": momentum * sign, **energy, **measured}

    def _kicked(self, grad: jax.Array, slots: Slots, param: jax.Array) -> jax.Array:
        return slots["momentum"] - self.lr * masked(self, force(self, grad, slots, param))

    def _energy(self, momentum: jax.Array, half: bool) -> Slots:
        """Compute one array's summands for the thermostat: the excess of energy over its target, and a count."""
        count = free(self, momentum)
        excess = jnp.sum(momentum**2) - count * self.lr
        return {"excess": excess / 2 if half else excess, "count": jnp.asarray(count, momentum.dtype)}

    def update_shared(self, shared: dict[str, Any], sums: dict[str, jax.Array]) -> dict[str, Any]:
        rise = jnp.where(sums["count"] > 0, sums["excess"] / jnp.maximum(sums["count"], 1), 0)
        thermostat = (shared["thermostat"] + rise).astype(jnp.float32)
        return super().update_shared(shared, sums) | {"thermostat": thermostat}


sgnht = factory(SGNHT, "sgnht")
