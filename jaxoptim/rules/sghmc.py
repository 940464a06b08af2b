"""Stochastic gradient Hamiltonian Monte Carlo."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import (
    ArraysByLeaf,
    Coefficient,
    NonNegative,
    OptionalCoefficient,
    Positive,
    Slots,
    ValuesByLeaf,
    factory,
    is_known,
    rule,
)
from jaxoptim.core.shown import shown
from jaxoptim.rules._components import PosteriorSampler
from jaxoptim.rules._langevin import boxed, check_terms, first_momentum, force, masked, relaxation
from jaxoptim.rules._terms import needed


@rule
class SGHMC(PosteriorSampler):
    r"""SGHMC: Langevin dynamics with momentum and a constant friction.

    With :math:`U = n\beta L + \tfrac{\lambda}{2}\|w\|^2 + \tfrac{\gamma}{2}\|w - c\|^2`, a mask :math:`M`, and
    ``order="euler"``, which is the paper's:

    .. math::
        v &\leftarrow (1 - \alpha)\,v - \epsilon\,M\nabla U(w) + \sqrt{2(\alpha - \hat\beta)\epsilon}\,M\zeta,
        \qquad \zeta \sim N(0, 1) \\
        w &\leftarrow w + v

    ``order="baoab"`` splits symmetrically; its error is of second order, at one gradient per step too:

    .. math::
        v &\leftarrow v - \epsilon\,M\nabla U(w), \qquad w \leftarrow w + v/2 \\
        v &\leftarrow e^{-\alpha} v + \sqrt{\epsilon\,(1 - \hat\beta/\alpha)(1 - e^{-2\alpha})}\;M\zeta,
        \qquad w \leftarrow w + v/2

    In the terms of Hamiltonian dynamics :math:`\epsilon` is the square of the step size, :math:`\alpha` the friction
    times it.

    Args:
        lr: step size :math:`\epsilon \ge 0` (default 0.01).
        alpha: friction :math:`\alpha > 0` (default 0.1).
        beta: estimate :math:`\hat\beta` in :math:`[0, \alpha]` of the friction that the noise of the gradient makes
            up for, half its variance times :math:`\epsilon` (default 0).
        nbeta: inverse temperature :math:`n\beta \ge 0` times the number of data (default 1).
        weight_decay: :math:`\lambda \ge 0` (default 0).
        localization: :math:`\gamma \ge 0`, toward the center :math:`c` (default 0).
        bounding_box_size: :math:`b > 0`, or None for no box (default None). A momentum that leads out of it changes
            its sign.
        optimize_over: mask of zeros and ones, as in :class:`SGLD` (default None).
        box: ``"clamp"`` or ``"reflect"``, as in :class:`SGLD` (default ``"clamp"``).
        order: ``"euler"`` or ``"baoab"`` (default ``"euler"``).
        metrics: ``"components"`` tracks the parts of each step in ``shared``, as below (default None: nothing).
        center: :math:`c`, as in :class:`SGLD` (default None: the initial parameters).
        key: a typed JAX key (default None: ``jax.random.key(0)``).
        noise_impl: the generator of the noise (default ``"key"``; see :func:`jaxoptim.core.noise.normal`).

    Components:
        Of the step :math:`w_{t+1} - w_t = m - a - \ell - d + n`, up to the box, ``metrics="components"`` keeps what
        :class:`SGLD` names, with :math:`a = M\rho\epsilon\,n\beta\nabla L`, :math:`\ell = M\rho\epsilon\gamma(w_t - c)`
        and :math:`d = M\rho\epsilon\lambda w_t`: how far the force of this step moves the parameters in this step.
        The momentum before the step moves them by m; what it keeps of force and noise moves them in steps to come.
        ``unscaled_grad_norm`` is :math:`\|M\epsilon\,n\beta\nabla L\|`, the norm of the kick.

        - ``"euler"``: :math:`\rho = 1`, :math:`n = \sqrt{2(\alpha - \hat\beta)\epsilon}\,M\zeta`,
          :math:`m = (1 - \alpha) v_t`;
        - ``"baoab"``: :math:`\rho = (1 + e^{-\alpha})/2`, n half of what the momentum gets as noise,
          :math:`m = \rho v_t`.

    Parameters of float16 and bfloat16 lose small steps: see :class:`jaxoptim.Sampler`.

    Slots:
        ``momentum``, from :math:`N(0, \epsilon)` at the start, and ``initial_param``, of the parameter's shape.

    Raises:
        As :class:`SGLD`; ``ValueError`` for ``beta`` beyond ``alpha``.

    References:
        Chen, Fox, Guestrin, Stochastic gradient Hamiltonian Monte Carlo, ICML 2014, equation 15. Leimkuhler, Matthews,
        Rational construction of stochastic numerical methods for molecular sampling, AMRX 2013 (BAOAB).

    Examples:
        >>> import jax.numpy as jnp, jaxoptim
        >>> tx, params = jaxoptim.sghmc(lr=0.25), jnp.array([1.0, -2.0])
        >>> state = tx.init(params)
        >>> state = state._replace(slots=state.slots | {"momentum": jnp.zeros(2)})
        >>> updates, state = tx.update(params, state, params, noise=jnp.zeros(2))
        >>> updates.tolist()
        [-0.25, 0.5]
    """

    lr: NonNegative = 0.01
    alpha: Positive = 0.1
    beta: NonNegative = 0.0
    nbeta: NonNegative = 1.0
    weight_decay: Coefficient = 0.0
    localization: Coefficient = 0.0
    bounding_box_size: OptionalCoefficient = None
    optimize_over: ArraysByLeaf = None
    box: str = "clamp"
    order: str = "euler"
    metrics: str | None = None
    center: ValuesByLeaf = None

    def check(self) -> None:
        super().check()
        check_terms(self, metrics=(None, "components"), order=("euler", "baoab"))
        if is_known(self.alpha) and is_known(self.beta) and np.any(np.asarray(self.beta) > np.asarray(self.alpha)):
            raise ValueError(
                f"Invalid beta: {shown(self.beta)}. SGHMC takes beta of at most alpha, which is {shown(self.alpha)}."
            )

    @property
    def leaves_out_held(self) -> bool:
        return True

    def init(self, param: jax.Array, noise: jax.Array) -> Slots:  # type: ignore[override]
        return {"momentum": first_momentum(self, param, noise), "initial_param": jnp.copy(param)}

    def update(  # type: ignore[override]
        self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array, noise: jax.Array, shared: dict[str, Any]
    ) -> tuple[jax.Array, Slots]:
        param, noise = needed(self, param), masked(self, noise)
        kicked = slots["momentum"] - self.lr * masked(self, force(self, grad, slots, param))
        heat = self.lr * (self.alpha - self.beta)
        if self.order == "baoab":
            keeps, shaken = relaxation(self.alpha, noise, heat)
            momentum = keeps * kicked + shaken
            moved, rate, shaken = param + (kicked + momentum) / 2, self.lr * (1 + keeps) / 2, shaken / 2
        else:
            shaken = jnp.sqrt(2 * heat) * noise
            momentum = kicked - self.alpha * slots["momentum"] + shaken
            moved, rate = param + momentum, self.lr
        inside, sign = boxed(self, moved, slots)
        measured = self.components(grad, slots, param, rate=rate, unscaled=self.lr, noise=shaken)
        return inside - param, {**slots, "momentum": momentum * sign, **measured}


sghmc = factory(SGHMC, "sghmc")
