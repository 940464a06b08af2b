"""Moments over the draws of the loss and of the excess losses of single data over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxoptim.core.modules import anew
from jaxoptim.core.numerics import computing_dtype
from jaxoptim.core.precision import widened
from jaxoptim.sampling.losses import Losses
from jaxoptim.sampling.observables import Draw, Moments, Observable


@dataclasses.dataclass(frozen=True)
class Alone:
    """The loss of each datum, evaluated as a batch of size one.

    Attributes:
        loss_fn: ``loss_fn(params, batch)``, the mean loss.
    """

    loss_fn: Callable[[Any, Any], Any]

    def __call__(self, params: Any, batch: Any) -> Any:
        return jax.vmap(lambda datum: self.loss_fn(params, jax.tree.map(lambda x: x[None], datum)))(batch)


class ExcessMoments(NamedTuple):
    """Moments of the loss L and of the excess losses of one probe.

    Means of small deviations are exact where those of the values themselves would lose them in float32, so they are
    taken from the first draw.

    Attributes:
        loss: L at the first draw.
        excess: the excess losses there.
        moments: of the deviations from both.
    """

    loss: jax.Array
    excess: jax.Array
    moments: Moments

    def after(self, loss: jax.Array, excess: jax.Array) -> ExcessMoments:
        """Return the moments after another draw."""
        is_first, dtype = self.moments.draws == 0, self.excess.dtype
        loss, excess = loss.astype(dtype), excess.astype(dtype)
        first, others = jnp.where(is_first, loss, self.loss), jnp.where(is_first, excess, self.excess)
        return ExcessMoments(first, others, self.moments.after(loss - first, excess - others))


@dataclasses.dataclass(frozen=True)
class ExcessLosses(Observable):
    r"""Moments over the draws of the loss L and of the excess losses :math:`\ell_x - L` of the data of probes.

    They take three numbers for each loss, for each chain, whatever the number of draws. The result is a dictionary of
    :class:`ExcessMoments` by probe.

    Args:
        losses: of each probe.
        reference: the name of the probe whose mean loss L is; None for the loss of all data of the run.
    """

    losses: tuple[Losses, ...]
    reference: str | None = None

    def begin(self, params: Any, probes: Mapping[str, Any]) -> Any:
        def none(like: Any) -> ExcessMoments:
            loss, excess = (jnp.zeros(shape, computing_dtype(like.dtype)) for shape in ((), like.shape))
            return ExcessMoments(loss, excess, Moments.none(loss, excess))

        return jax.tree.map(none, jax.eval_shape(lambda: self.of_each(lambda: anew(params), probes)))

    def update(self, memory: Any, draw: Draw) -> tuple[Any, Any]:
        def observed() -> Any:
            of_each = self.of_each(lambda: draw.params, draw.probes)
            loss = draw.full_loss() if self.reference is None else jnp.mean(of_each[self.reference])
            return {probe: memory[probe].after(loss, losses - loss) for probe, losses in of_each.items()}

        return lax.cond(draw.is_recorded, observed, lambda: memory), None

    def result(self, memory: Any, trace: Any) -> Any:
        return memory

    def of_each(self, params: Callable[[], Any], probes: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The losses of each probe at the parameters that ``params()`` returns."""
        return {of.probe: widened(of.value(params, probes)) for of in self.losses}
