"""Stochastic gradient Langevin dynamics."""

from __future__ import annotations

from typing import Any

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
from jaxoptim.rules._components import PosteriorSampler, Scaled
from jaxoptim.rules._langevin import boxed, check_terms, force, from_center, masked
from jaxoptim.rules._terms import needed, zeros

METRICS = ("noise_norm", "grad_norm", "weight_norm", "distance")


@rule
class SGLD(PosteriorSampler):
    r"""SGLD: gradient descent on a potential, with noise that makes it sample from the posterior.

    .. math::
        U(w) &= n\beta\,L(w) + \tfrac{\lambda}{2}\|w\|^2 + \tfrac{\gamma}{2}\|w - c\|^2 \\
        w_{t+1} &= w_t + M\left(-\tfrac{\epsilon}{2}\,\nabla U(w_t) + \sqrt{\epsilon}\,\sigma\,\xi_t\right),
        \qquad \xi_t \sim N(0, 1)

    samples :math:`p(w) \propto e^{-U(w)}` as :math:`\epsilon \to 0`; the gradient given is that of the mean loss
    :math:`L`. Then :math:`w_{t+1}` is brought into the box :math:`|w - w_0| \le b` about the initial parameters.
    Elsewhere :math:`\epsilon/2` is called the step size.

    Args:
        lr: step size :math:`\epsilon \ge 0` (default 0.01).
        noise_level: :math:`\sigma \ge 0`; only 1 samples from the posterior (default 1).
        weight_decay: :math:`\lambda \ge 0`, toward zero (default 0).
        localization: :math:`\gamma \ge 0`, toward the center :math:`c` (default 0).
        nbeta: inverse temperature :math:`n\beta \ge 0` times the number of data (default 1; see
            :func:`jaxoptim.sampling.default_nbeta`).
        bounding_box_size: :math:`b > 0`, or None for no box (default None).
        save_noise: keep :math:`\sigma\xi_t`, before the mask, as the slot ``noise`` (default False).
        save_mala_vars: keep :math:`\nabla U(w_t)`, before the mask, as the slot ``dws``, and the term of
            localization as ``shared["localization_loss"]`` (default False).
        optimize_over: mask :math:`M` of zeros and ones: one that broadcasts to every parameter, or a tree like the
            parameters, None where one moves freely (default None).
        noise_norm: track :math:`\|M\sigma\xi_t\|` in ``shared["noise_norm"]`` (default False).
        grad_norm: track :math:`\|\tfrac{\epsilon}{2} n\beta\nabla L\|` (default False).
        weight_norm: track :math:`\|w_{t+1}\|` before the box (default False).
        distance: track :math:`\gamma\|w_t - w_0\|`; with ``save_mala_vars``
            :math:`(\sum_p \epsilon\sqrt{\gamma}\|M(w_t - w_0)\|_p)^{1/2}` over the arrays p (default False).
        box: ``"clamp"`` puts what left the box onto its face, ``"reflect"`` folds the path back (default
            ``"clamp"``).
        metrics: ``"devinterp"`` tracks the four as above, ``"scaled"`` what moves the parameters:
            :math:`\|M\sqrt{\epsilon}\sigma\xi_t\|`, :math:`\|M\tfrac{\epsilon}{2} n\beta\nabla L\|`,
            :math:`\|w_{t+1}\|` in the box, :math:`\|M(w_t - w_0)\|`. ``"components"`` tracks the four as
            ``"scaled"``, and always the nine below (default ``"devinterp"``).
        center: :math:`c`, a tree of arrays like the parameters, None in the place of those that are pulled toward
            :math:`w_0` (default None: all of them). A module, for :func:`jaxoptim.sampling.sample`, stands for its
            arrays. Without localization it has no effect. Another center compiles nothing anew.
        key: a typed JAX key (default None: ``jax.random.key(0)``). Two samplers with one key draw the same noise.
        noise_impl: the generator of the noise (default ``"key"``; see :func:`jaxoptim.core.noise.normal`).

    Components:
        Of the step :math:`w_{t+1} - w_t = -a - \ell - d + n`, up to the box, ``metrics="components"`` keeps

        - ``scaled_grad_norm`` and ``unscaled_grad_norm``: :math:`\|a\|`, with
          :math:`a = M\tfrac{\epsilon}{2} n\beta\nabla L`,
        - ``localization_norm``: :math:`\|\ell\|`, with :math:`\ell = M\tfrac{\epsilon}{2}\gamma(w_t - c)`,
        - ``weight_decay_norm``: :math:`\|d\|`, with :math:`d = M\tfrac{\epsilon}{2}\lambda w_t`,
        - ``scaled_noise_norm``: :math:`\|n\|`, with :math:`n = M\sqrt{\epsilon}\sigma\xi_t`,
        - ``distance_norm``: :math:`\|M(w_t - w_0)\|`,
        - ``grad_dot_prior``, ``grad_dot_noise``, ``prior_dot_noise``: :math:`a \cdot (\ell + d)`,
          :math:`a \cdot n` and :math:`(\ell + d) \cdot n`,

        over all arrays that have a gradient, complex numbers as pairs. In the mean
        :math:`\|n\|^2 = \epsilon\sigma^2` times the numbers that move, and the products with n are zero.

    Parameters of float16 and bfloat16 lose small steps: see :class:`jaxoptim.Sampler`.

    Slots:
        ``initial_param``, of the parameter's shape, and those that are switched on. ``shared`` has ``key`` and the
        metrics, float32 scalars.

    Differences from devinterp:
        A parameter without gradient does not move (there it diffuses). A metric recovers from an overflow (there
        it stays NaN). ``nbeta``, like every number, may be a schedule (there it fails).

    Raises:
        ``ValueError`` for a number out of range, for an unknown ``box`` or ``metrics``, for a mask that does not
        broadcast, for a center of another structure or shape, or for missing ``params`` in an update.

    References:
        Welling, Teh, Bayesian learning via stochastic gradient Langevin dynamics, ICML 2011. Lau, Furman, Wang,
        Murfet, Wei, The local learning coefficient, 2023.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.sgld(lr=0.5, nbeta=2.0), jnp.array([1.0, -2.0])
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params, noise=jnp.zeros(2))
        >>> optax.apply_updates(params, updates).tolist()
        [0.5, -1.0]
    """

    lr: NonNegative = 0.01
    noise_level: NonNegative = 1.0
    weight_decay: Coefficient = 0.0
    localization: Coefficient = 0.0
    nbeta: NonNegative = 1.0
    bounding_box_size: OptionalCoefficient = None
    save_noise: bool = False
    save_mala_vars: bool = False
    optimize_over: ArraysByLeaf = None
    noise_norm: bool = False
    grad_norm: bool = False
    weight_norm: bool = False
    distance: bool = False
    box: str = "clamp"
    metrics: str = "devinterp"
    center: ValuesByLeaf = None

    def check(self) -> None:
        super().check()
        check_terms(self, metrics=("devinterp", "scaled", "components"))

    @property
    def tracked(self) -> list[str]:
        """The names of the metrics in ``shared`` that have their own switches."""
        names = [name for name in METRICS if getattr(self, name)]
        return [*names, "localization_loss"] if self.save_mala_vars else names

    @property
    def leaves_out_held(self) -> bool:
        """Whether no metric, and nothing stored before the mask, needs the held arrays."""
        of_all = self.weight_norm or (self.grad_norm and self.metrics == "devinterp")
        return not (of_all or self.save_noise or self.save_mala_vars)

    def init_shared(self) -> dict[str, Any]:
        return super().init_shared() | {name: jnp.zeros((), jnp.float32) for name in self.tracked}

    def init(self, param: jax.Array, noise: jax.Array) -> Slots:  # type: ignore[override]
        kept = {"noise": self.save_noise, "dws": self.save_mala_vars}
        return {"initial_param": jnp.copy(param), **zeros(param, *(name for name, keep in kept.items() if keep))}

    def update(  # type: ignore[override]
        self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array, noise: jax.Array, shared: dict[str, Any]
    ) -> tuple[jax.Array, Slots]:
        param = needed(self, param)
        noise, rate = self.noise_level * noise, self.lr / 2
        drift, shaken = force(self, grad, slots, param), jnp.sqrt(self.lr) * noise
        moved = param + masked(self, -rate * drift + shaken)
        inside, _ = boxed(self, moved, slots)
        kept = {"noise": noise, "dws": drift}
        return inside - param, {
            **slots,
            **{name: kept[name] for name in kept.keys() & slots.keys()},
            **self._squares(grad, slots, param, noise, moved, inside),
            **self.components(grad, slots, param, rate=rate, unscaled=rate, noise=masked(self, shaken)),
        }

    def _squares(self, grad: Any, slots: Slots, param: Any, noise: Any, moved: Any, inside: Any) -> Slots:
        """Compute one array's summands of the metrics that have switches."""
        shaken, pull, away = masked(self, noise), self.lr / 2 * self.nbeta, param - slots["initial_param"]

        def landed(x: jax.Array) -> Scaled:
            return Scaled(1.0, param + (x - param))  # as the step writes it, so that it is in memory

        if self.metrics == "devinterp":
            vectors = Scaled(1.0, shaken), Scaled(pull, grad), landed(moved), Scaled(self.localization, away)
        else:
            free, there = Scaled(pull, masked(self, grad)), Scaled(1.0, masked(self, away))
            vectors = Scaled(jnp.sqrt(self.lr), shaken), free, landed(inside), there
        sums = {name: x.dot(x) for name, x in zip(METRICS, vectors, strict=True)}
        if self.save_mala_vars and self.metrics == "devinterp":
            sums["distance"] = self.lr * jnp.sqrt(self.localization * jnp.sum(masked(self, away) ** 2))
        held = self.localization * jnp.sum(masked(self, from_center(self, slots, param)) ** 2)
        return {name: (sums | {"localization_loss": held / 2})[name] for name in self.tracked}

    def update_shared(self, shared: dict[str, Any], sums: dict[str, jax.Array]) -> dict[str, Any]:
        found = {name: jnp.sqrt(sums[name]) if name in METRICS else sums[name] for name in self.tracked}
        return super().update_shared(shared, sums) | {name: x.astype(jnp.float32) for name, x in found.items()}


sgld = factory(SGLD, "sgld")
