"""Swaps of positions between chains at neighbouring temperatures."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxoptim.core.noise import fold_in

SWAP_RATE = "swap_rate"
"""The name of the recorded rate at which swaps are accepted."""


class Swaps(NamedTuple):
    """The schedule of swaps of positions, the same for all chains.

    Attributes:
        key: from which it follows what is accepted.
        every: after how many steps.
    """

    key: jax.Array
    every: Any


class Tried(NamedTuple):
    """The swaps that a chain has tried with the one at the next temperature.

    Attributes:
        accepted: the sum of the probabilities of acceptance.
        number: how many there are.
    """

    accepted: jax.Array
    number: jax.Array

    @classmethod
    def none(cls) -> Tried:
        """Return the record of no swaps."""
        return cls(jnp.zeros(()), jnp.zeros((), jnp.int32))

    @property
    def rate(self) -> jax.Array:
        """The mean probability of acceptance; NaN of none."""
        return self.accepted / self.number


def partners(nbeta: jax.Array, loss: jax.Array, swaps: Swaps, turn: Any, tried: Any) -> tuple[jax.Array, Tried]:
    r"""Return the source of each chain's position after the swaps of a turn, and the record of the swaps tried.

    Two positions at the temperatures :math:`\beta_i, \beta_j` change places with the probability
    :math:`\min(1, e^{(\beta_i - \beta_j)(L_i - L_j)})`. In even and odd turns other pairs have theirs.

    Args:
        nbeta: the temperatures, ``(temperatures,)``.
        loss: of all data at the positions, ``(temperatures * chains,)``, temperature by temperature.
        swaps: the key.
        turn: the number of the turn.
        tried: before, each of the shape of ``loss``.

    References:
        Syed, Bouchard-Cote, Deligiannidis, Doucet, Non-reversible parallel tempering, JRSS B 2022.
    """
    count = len(nbeta)
    loss = loss.reshape(count, -1)
    keys = fold_in(fold_in(swaps.key, turn), jnp.arange(loss.shape[1]))
    alpha = jnp.exp(jnp.minimum(0, (nbeta[:-1] - nbeta[1:])[:, None] * (loss[:-1] - loss[1:])))
    alpha = jnp.where(jnp.isnan(alpha), 0, alpha)  # of a chain that has diverged
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (count - 1,), alpha.dtype))(keys).T
    has_turn = (jnp.arange(count - 1) % 2 == turn % 2)[:, None]
    none = jnp.zeros_like(loss[:1], bool)
    up = jnp.concatenate([(drawn < alpha) & has_turn, none])  # of each chain, whether it swaps with the next one
    places = jnp.arange(loss.size).reshape(loss.shape)
    step = loss.shape[1] * (up.astype(int) - jnp.roll(up, 1, 0).astype(int))
    more = jnp.concatenate([jnp.where(has_turn, alpha, 0), none.astype(alpha.dtype)])
    is_tried = jnp.concatenate([jnp.broadcast_to(has_turn, alpha.shape), none])
    after = Tried(
        tried.accepted + more.reshape(-1).astype(tried.accepted.dtype),
        tried.number + is_tried.reshape(-1).astype(tried.number.dtype),
    )
    return (places + step).reshape(-1), after
