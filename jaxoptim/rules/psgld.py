"""Preconditioned stochastic gradient Langevin dynamics."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxoptim.core import (
    ArraysByLeaf,
    Coefficient,
    DecayRate,
    NonNegative,
    OptionalCoefficient,
    Positive,
    Slots,
    ValuesByLeaf,
    factory,
    rule,
    sqrt,
)
from jaxoptim.core.shown import shown
from jaxoptim.rules._components import PosteriorSampler
from jaxoptim.rules._langevin import boxed, check_terms, force, masked
from jaxoptim.rules._terms import needed, zeros


@rule
class PSGLD(PosteriorSampler):
    r"""pSGLD: SGLD with RMSprop's preconditioner.

    .. math::
        V_t &= \alpha V_{t-1} + (1 - \alpha)\,g_t^2, \qquad G_t = \frac{1}{\delta + \sqrt{V_t}} \\
        w_{t+1} &= w_t + M\left(-\tfrac{\epsilon}{2}\,(G_t \nabla U(w_t) - \Gamma_t)
        + \sqrt{\epsilon G_t}\,\xi_t\right), \qquad \xi_t \sim N(0, 1)

    with :math:`U` as for :class:`SGLD` and :math:`g_t` the gradient of the mean loss. The correction
    :math:`\Gamma = \partial G/\partial w = -G^2 (1 - \alpha)\,g\,h/\sqrt{V}` takes the diagonal :math:`h` of the
    Hessian of the loss, which an update is given as ``curvature=``; :func:`jaxoptim.sampling.sample` estimates it
    without bias. With :math:`\alpha = 0` it makes the limit of small steps exact (without it, a 1-d quartic was off by
    90 %). Otherwise it is the derivative by the newest gradient alone, as in the paper, and small where :math:`\alpha`
    is near 1; by default it is left out.

    A preconditioner that follows the path biases what is sampled; from the update number ``frozen_after`` on it stays,
    and the rest of the chain is exact SGLD with the step sizes :math:`\epsilon G`.

    Args:
        lr: step size :math:`\epsilon \ge 0` (default 0.01).
        alpha: decay rate :math:`\alpha` in [0, 1) (default 0.99).
        eps: :math:`\delta > 0` (default 0.1). Where the gradient vanishes, G is its inverse.
        weight_decay: :math:`\lambda \ge 0` (default 0).
        localization: :math:`\gamma \ge 0`, toward the center :math:`c` (default 0).
        nbeta: inverse temperature :math:`n\beta \ge 0` times the number of data (default 1).
        bounding_box_size: :math:`b > 0`, or None for no box (default None).
        optimize_over: mask of zeros and ones, as in :class:`SGLD` (default None).
        bias_correction: divide V by :math:`1 - \alpha^t`, as Adam does (default False).
        frozen_after: the number of updates that renew V, or None for all (default None).
        gamma: add the correction :math:`\Gamma` (default False).
        box: ``"clamp"`` or ``"reflect"``, as in :class:`SGLD` (default ``"clamp"``).
        metrics: ``"components"`` tracks the parts of each step in ``shared``, as below (default None: nothing).
        center: :math:`c`, as in :class:`SGLD` (default None: the initial parameters).
        key: a typed JAX key (default None: ``jax.random.key(0)``).
        noise_impl: the generator of the noise (default ``"key"``; see :func:`jaxoptim.core.noise.normal`).

    Components:
        Of the step :math:`w_{t+1} - w_t = -a - \ell - d + n`, up to the box and the correction
        :math:`M\tfrac{\epsilon}{2}\Gamma_t`, ``metrics="components"`` keeps what :class:`SGLD` names, with
        :math:`a = M\tfrac{\epsilon}{2} G_t\,n\beta\nabla L`, the same factors in :math:`\ell` and :math:`d`, and
        :math:`n = M\sqrt{\epsilon G_t}\,\xi_t`. ``unscaled_grad_norm`` is
        :math:`\|M\tfrac{\epsilon}{2} n\beta\nabla L\|`.

    Parameters of float16 and bfloat16 lose small steps: see :class:`jaxoptim.Sampler`.

    Slots:
        ``square_avg`` and ``initial_param``, of the parameter's shape.

    Raises:
        As :class:`SGLD`; ``ValueError`` for an update without ``curvature`` if ``gamma=True``.

    References:
        Li, Chen, Carlson, Carin, Preconditioned stochastic gradient Langevin dynamics for deep neural networks, AAAI
        2016. The defaults are those of devinterp's ``SGMCMC.rmsprop_sgld``.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim
        >>> tx, params = jaxoptim.psgld(lr=0.5, alpha=0.0, eps=1.0), jnp.array([1.0, -3.0])
        >>> updates, state = tx.update(params, tx.init(params), params, noise=jnp.zeros(2))
        >>> updates.tolist()
        [-0.125, 0.1875]
    """

    lr: NonNegative = 0.01
    alpha: DecayRate = 0.99
    eps: Positive = 0.1
    weight_decay: Coefficient = 0.0
    localization: Coefficient = 0.0
    nbeta: NonNegative = 1.0
    bounding_box_size: OptionalCoefficient = None
    optimize_over: ArraysByLeaf = None
    bias_correction: bool = False
    frozen_after: int | None = None
    gamma: bool = False
    box: str = "clamp"
    metrics: str | None = None
    center: ValuesByLeaf = None

    takes: ClassVar[tuple[str, ...]] = ("noise", "curvature")

    def check(self) -> None:
        super().check()
        check_terms(self, metrics=(None, "components"))
        after = self.frozen_after
        if after is not None and (isinstance(after, bool) or not isinstance(after, int) or after < 1):
            raise ValueError(f"Invalid frozen_after: {shown(self.frozen_after)}. PSGLD takes an int >= 1, or None.")

    @property
    def leaves_out_held(self) -> bool:
        return True

    def init(self, param: jax.Array, noise: jax.Array) -> Slots:  # type: ignore[override]
        return {**zeros(param, "square_avg"), "initial_param": jnp.copy(param)}

    def update(  # type: ignore[override]
        self,
        grad: jax.Array,
        slots: Slots,
        param: Any,
        step: jax.Array,
        noise: jax.Array,
        shared: dict[str, Any],
        curvature: Any = None,
    ) -> tuple[jax.Array, Slots]:
        param = needed(self, param)
        moving = True if self.frozen_after is None else step <= self.frozen_after
        renewed = self.alpha.ema(slots["square_avg"], grad**2)
        square_avg = jnp.where(moving, renewed, slots["square_avg"])
        updates = step if self.frozen_after is None else jnp.minimum(step, self.frozen_after)
        size = self.alpha.bias_correction(updates) if self.bias_correction else 1.0
        root = sqrt(square_avg / size)
        conditioner = 1 / (self.eps + root)
        drift = conditioner * force(self, grad, slots, param)
        if self.gamma:
            slope = self.alpha.complement * grad * self._known(curvature) / size
            # At a root of zero the gradient is zero, and so is the slope.
            bend = jnp.where(root > 0, slope / jnp.where(root > 0, root, 1), 0)
            drift = drift + jnp.where(moving, conditioner**2 * bend, 0)
        rate, shaken = self.lr / 2, jnp.sqrt(self.lr * conditioner) * noise
        moved = param + masked(self, -rate * drift + shaken)
        inside, _ = boxed(self, moved, slots)
        measured = self.components(
            grad, slots, param, rate=rate * conditioner, unscaled=rate, noise=masked(self, shaken)
        )
        return inside - param, {**slots, "square_avg": square_avg, **measured}

    def _known(self, curvature: Any) -> jax.Array:
        if curvature is None:
            raise ValueError(
                "PSGLD with gamma=True uses the diagonal of the Hessian of the loss. Give update(..., curvature=tree "
                "like params), or let jaxoptim.sampling.sample estimate it."
            )
        return curvature


psgld = factory(PSGLD, "psgld")
