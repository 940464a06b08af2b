"""Diagnostics of sampler steps: the norms of the parts of a step, and the products between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxoptim.core import Sampler, Slots, sqrt
from jaxoptim.rules._langevin import forces, masked

COMPONENTS = (
    "scaled_grad_norm",
    "unscaled_grad_norm",
    "localization_norm",
    "weight_decay_norm",
    "scaled_noise_norm",
    "distance_norm",
    "grad_dot_prior",
    "grad_dot_noise",
    "prior_dot_noise",
)
SKETCHES = ("scaled_grad_sketch", "unscaled_grad_sketch", "localization_sketch", "weight_decay_sketch", "noise_sketch")
"""The count sketches of the parts of a step, in the order of :meth:`PosteriorSampler.parts`."""


class Scaled(NamedTuple):
    """An unevaluated product of a number and an array: sums over it read the array, without a temporary product."""

    number: Any
    array: jax.Array

    @property
    def value(self) -> jax.Array:
        """The evaluated product."""
        return self.number * self.array

    def dot(self, other: Scaled) -> jax.Array:
        """Return the inner product with another scaled array."""
        return self.number * other.number * jnp.sum(self.array * other.array)


class PosteriorSampler(Sampler):
    r"""The base of the samplers of a tempered posterior, which can measure the parts of their steps.

    A step is :math:`\Delta w = m - a - \ell - d + n`, up to the box: with the force that it multiplies by a rate
    r, and a mask M, its parts are :math:`a = M r\,n\beta\,g`, :math:`\ell = M r\,\gamma (w - c)` and
    :math:`d = M r\,\lambda w`, the noise n, and what it keeps of its momentum, m.

    A subclass has a switch ``metrics``, and returns :meth:`components` from its update beside the slots.
    """

    metrics: str | None
    nbeta: Any
    weight_decay: Any
    localization: Any
    center: Any
    optimize_over: Any

    @property
    def pointwise(self) -> bool:
        return True

    def init_shared(self) -> dict[str, Any]:
        names = COMPONENTS if self.metrics == "components" else ()
        return super().init_shared() | {name: jnp.zeros((), jnp.float32) for name in names}

    def components(
        self, grad: jax.Array, slots: Slots, param: jax.Array, *, rate: Any, unscaled: Any, noise: jax.Array
    ) -> Slots:
        """Compute one array's summands of the metrics, in the order of their names; none if the metrics are off.

        The arguments are those of :meth:`parts`.
        """
        if self.metrics != "components":
            return {}
        parts = self.parts(grad, slots, param, rate=rate, unscaled=unscaled, noise=noise)
        return self.products(parts, slots, param)

    def parts(
        self, grad: jax.Array, slots: Slots, param: jax.Array, *, rate: Any, unscaled: Any, noise: jax.Array
    ) -> tuple[Scaled | None, ...]:
        """Compute one array's part of a, of a without preconditioner and friction, of l, d and n; None is zero.

        Args:
            grad: the gradient of the loss.
            slots: the slots before the step.
            param: the array before the step.
            rate: the factor of the force in the step, a number or an array.
            unscaled: the number in its place without preconditioner and friction.
            noise: the noise that the step adds, masked.
        """
        terms = {name: (k, masked(self, x)) for name, (k, x) in forces(self, grad, slots, param).items()}

        def at(rate: Any, name: str) -> Scaled | None:
            if name not in terms:
                return None
            number, x = terms[name]
            return Scaled(rate * number, x) if jnp.ndim(rate) == 0 else Scaled(number, rate * x)

        pull, decay = at(rate, "localization"), at(rate, "weight_decay")
        return at(rate, "grad"), at(unscaled, "grad"), pull, decay, Scaled(1.0, noise)

    def products(self, parts: tuple[Scaled | None, ...], slots: Slots, param: jax.Array) -> Slots:
        """Compute one array's summands of the metrics from its parts of the step."""
        descent, _, pull, decay, noise = parts
        prior = pull if decay is None else decay if pull is None else Scaled(1.0, pull.value + decay.value)
        vectors = (*parts, Scaled(1.0, masked(self, param - slots["initial_param"])))
        pairs = (*zip(vectors, vectors, strict=True), (descent, prior), (descent, noise), (prior, noise))
        return {name: _dot(*pair) for name, pair in zip(COMPONENTS, pairs, strict=True)}

    def update_shared(self, shared: dict[str, Any], sums: dict[str, jax.Array]) -> dict[str, Any]:
        found = {name: sums[name] for name in COMPONENTS if name in sums}
        norms = {name: sqrt(x) for name, x in found.items() if name.endswith("_norm")}
        return shared | {name: x.astype(jnp.float32) for name, x in (found | norms).items()}


def _dot(a: Scaled | None, b: Scaled | None) -> jax.Array:
    """Return the inner product of two scaled arrays; None stands for zeros."""
    return jnp.zeros(()) if a is None or b is None else a.dot(b)
