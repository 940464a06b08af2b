"""The loss of each datum of a probe, at every draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxoptim.core.batches import in_batches, size_of
from jaxoptim.sampling.observables import Draw, Observable, at_draws


@dataclasses.dataclass(frozen=True)
class Losses(Observable):
    r"""The loss of each datum of a probe at the parameters of each draw, before its step.

    .. math::
        \ell_i(w_t), \qquad i = 1, \ldots, N

    The result is ``(chains, draws, N, ...)``, with further axes as ``loss_of_each`` returns them, such as one of
    tokens. The covariance of two data over the draws is their influence on one another (the Bayesian influence
    function); if the data of the run are the probe, the mean over i is the loss on all of them, without the noise of
    batches.

    The N numbers of each draw are kept on the device, those of all draws from the start, and their number rounded up
    as :func:`sample` says.

    Args:
        loss_of_each: ``loss_of_each(params, batch)`` returns an array whose first axis runs over the batch. Define it
            once: equal functions share a program.
        probe: the name of the data set among the ``probes`` of the run. Other data of the same shapes compile nothing
            anew.
        batch_size: how many data are evaluated at once, an int from 1 to N; the last batch may be smaller (default
            None: all).

    Raises:
        In a run, ``ValueError`` for an unknown probe, for a ``batch_size`` out of range, and for a ``loss_of_each``
        whose first axis is not the batch.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> def loss_of_each(w, x):
        ...     return jnp.sum((x - w) ** 2, -1) / 2
        >>> def loss(w, x):
        ...     return jnp.mean(loss_of_each(w, x))
        >>> x = jax.random.normal(jax.random.key(0), (50, 3))
        >>> samples = sampling.sample(
        ...     loss, x.mean(0), rules.SGLD(lr=0.01, nbeta=50.0), x, key=jax.random.key(1), num_chains=2, num_draws=100,
        ...     probes={"train": x, "test": x[:7] + 1.0},
        ...     observables={name: sampling.Losses(loss_of_each, name, batch_size=16 if name == "train" else None)
        ...                  for name in ("train", "test")})
        >>> samples.observables["train"].shape, samples.observables["test"].shape
        ((2, 100, 50), (2, 100, 7))
    """

    loss_of_each: Callable[[Any, Any], Any]
    probe: str
    batch_size: int | None = None

    def update(self, memory: Any, draw: Draw) -> tuple[Any, Any]:
        # A module is a new one for each batch: its variables may be changed only by the trace in which they were made.
        return memory, at_draws(draw, lambda: self.value(lambda: draw.params, draw.probes))

    def axes(self, name: str) -> tuple[str, tuple[str, ...]]:
        return f"loss_{name}", ("draw", f"batch_{name}", "token_pos")

    def value(self, params: Callable[[], Any], probes: Mapping[str, Any]) -> jax.Array:
        """Return the loss of each datum at the parameters that ``params()`` returns."""
        if self.probe not in probes:
            there = f"The probes are {', '.join(map(repr, probes))}." if probes else "Give probes={name: data}."
            raise ValueError(f"Losses: there is no probe {self.probe!r}. {there}")
        data = probes[self.probe]
        count = size_of(data)
        size = count if self.batch_size is None else self.batch_size
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or not 1 <= size <= count:
            raise ValueError(
                f"Losses: invalid batch_size {size!r}. It is an int from 1 to the number of data of the probe "
                f"{self.probe!r}, {count}, or None for all at once."
            )

        def of(batch: Any) -> jax.Array:
            losses = self.loss_of_each(params(), batch)
            if not isinstance(losses, jax.Array) or losses.shape[:1] != (size_of(batch),):
                found = f"shape {losses.shape}" if isinstance(losses, jax.Array) else type(losses).__name__
                raise ValueError(
                    "Losses: loss_of_each returns an array whose first axis runs over the batch, but of a batch of "
                    f"{size_of(batch)} it returned {found}."
                )
            return losses

        if size == count:
            return of(data)
        batches, remainder, (_, left) = in_batches(data, size)
        losses = lax.map(of, batches)
        losses = losses.reshape(count - left, *losses.shape[2:])
        return jnp.concatenate([losses, of(remainder)]) if left else losses
