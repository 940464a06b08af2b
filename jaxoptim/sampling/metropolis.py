"""The Metropolis step: a proposal is accepted or rejected, so that the posterior is sampled at any step size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import is_known
from jaxoptim.rules import SGLD
from jaxoptim.rules._langevin import has_box
from jaxoptim.sampling.mala import mala_acceptance, potential_at

ACCEPTANCE = "metropolis_acceptance"
"""The name of the recorded probability with which the step from a draw is accepted."""


def check_metropolis(sampler: Any, options: Any, is_stream: bool) -> None:
    """Raise for a run whose steps have no Metropolis test, or do not use all data."""
    if not isinstance(options.metropolis, bool):
        raise ValueError(f"Invalid metropolis: {options.metropolis!r}. It is True or False.")
    if not options.metropolis:
        return
    if not isinstance(sampler, SGLD):
        raise TypeError(f"metropolis is for steps of the rule SGLD, but the sampler is {type(sampler).__name__}.")
    if has_box(sampler):
        raise ValueError("metropolis has no box, but bounding_box_size is given. Leave it out.")
    level = sampler.noise_level
    if callable(level) or (is_known(level) and jnp.ndim(level) == 0 and level != 1):
        raise ValueError(f"metropolis is for steps with noise_level=1, but it is {level!r:.80}.")
    if options.batch_size is not None or is_stream:
        raise ValueError("metropolis needs the loss of all data in each step. Give arrays, and batch_size=None.")


def tested(rule: Any, state: Any, here: Any, proposal: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return whether a proposal is accepted, and the probability of its acceptance.

    Args:
        rule: the rule at this step.
        state: its state.
        here: parameters, loss and gradient before the step.
        proposal: the same after it.
        key: the key of the step.
    """
    (x, loss_x, grads_x), (y, loss_y, grads_y) = here, proposal
    before, force_x = potential_at(rule, state, x, loss_x, grads_x)
    after, force_y = potential_at(rule, state, y, loss_y, grads_y)
    alpha = mala_acceptance(x, force_x, before, y, force_y, after, rule.lr)
    alpha = jnp.where(jnp.isnan(alpha), 0, alpha)  # of a proposal where the loss is not finite
    return jax.random.uniform(key, dtype=alpha.dtype) < alpha, alpha
