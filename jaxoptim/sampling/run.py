"""The host's side of a run: checks, the compiled program, its progress and its checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxoptim.core import Rule, Sampler, trees
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.loss import LossFunctions
from jaxoptim.core.numerics import as_jax, strong
from jaxoptim.core.rule import assembled
from jaxoptim.sampling import chains, saved
from jaxoptim.sampling.batches import check_batch_size, size_of
from jaxoptim.sampling.chain import ChainSpec, Thinning
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.progress import bar

SamplerLike: TypeAlias = Rule | optax.GradientTransformation
"""A sampler as :func:`jaxoptim.sampling.sample` takes it."""

_SECONDS_BETWEEN_SAVES = 60.0
_SECONDS_OF_A_PIECE = 0.3
"""The least time of one call, so that calls cost nothing; between them there is time for Ctrl-C."""


def stacked(sampler: SamplerLike, num_settings: int, **changes: Any) -> Any:
    """Settings of a rule as one rule with a first axis of settings; None for a transformation.

    Args:
        sampler: the rule, or the transformation.
        num_settings: how many settings there are.
        changes: fields that differ, each with a first axis of settings.
    """
    if not isinstance(sampler, Rule):
        return None
    rule = sampler.replace(key=None) if isinstance(sampler, Sampler) else sampler

    def repeated(x: Any) -> jax.Array:
        x = strong(x)
        return jnp.broadcast_to(x, (num_settings, *x.shape))

    return assembled(type(rule), vars(jax.tree.map(repeated, rule)) | changes)


def run(
    loss_fn: Callable[..., Any],
    params: Any,
    sampler: SamplerLike,
    data: Any,
    rules: Any,
    num_settings: int,
    options: RunOptions,
) -> dict[str, Any]:
    """Run ``options.num_chains`` chains of each setting; chain c of all settings has one key.

    Returns:
        The loss, the final parameters and what was observed, by name, each with a first axis of settings and chains,
        setting by setting.
    """
    params, data = _checked(loss_fn, params, sampler, data, options)
    transformation = None if isinstance(sampler, Rule) else optax.with_extra_args_support(sampler)
    spec = ChainSpec(loss_fn, transformation, options.batch_size, options.watched(), room_for(options.num_draws))
    method, mesh = chains.layout(options.chain_method, num_settings * options.num_chains, params, data)
    settings = np.repeat(np.arange(num_settings), options.num_chains)
    numbers = np.tile(np.arange(options.num_chains), num_settings)
    rules, params, data = chains.on_all(mesh, (rules, params, data))
    state = chains.init_chains(spec, mesh, rules, settings, options.key, numbers, params, data)
    thinning, start = Thinning(options.num_burnin_steps, options.num_steps_bw_draws), 0
    about = None  # kept in every save of this run
    if options.checkpoint is not None:
        about = saved.description(options, spec, num_settings, sampler, rules, params, data)
    if options.checkpoint is not None and os.path.exists(options.checkpoint):
        start, state = saved.load(options.checkpoint, about, options, state)

    piece, last_save = max(1, options.num_steps // 100), time.monotonic()
    with bar(options.num_steps, start, options.progress) as show:
        try:
            while start < options.num_steps:
                stop, before = min(start + piece, options.num_steps), time.monotonic()
                with Uninterrupted():  # until what has become of the donated chains is kept
                    state = chains.run_steps(spec, method, mesh, rules, settings, state, data, thinning, start, stop)
                    jax.block_until_ready(state.traces)
                    start = stop
                if time.monotonic() - before < _SECONDS_OF_A_PIECE:
                    piece *= 2
                show(start)
                if options.checkpoint is not None and time.monotonic() - last_save > _SECONDS_BETWEEN_SAVES:
                    saved.save(options.checkpoint, about, options, start, state)
                    last_save = time.monotonic()
        except KeyboardInterrupt:
            if options.checkpoint is not None:
                saved.save(options.checkpoint, about, options, start, state)
            raise
    if options.checkpoint is not None:
        saved.save(options.checkpoint, about, options, start, state)
    return {**chains.results(spec, options.num_draws, state), "params": state.params}


def room_for(num_draws: int) -> int:
    """Return the number of draws that a program has room for: few sizes, so that few programs are compiled."""
    return max(64, 1 << (num_draws - 1).bit_length()) if num_draws <= 4096 else -(-num_draws // 4096) * 4096


def _checked(loss_fn: Any, params: Any, sampler: Any, data: Any, options: RunOptions) -> tuple[Any, Any]:
    """Parameters and data as arrays; raises for what cannot be run."""
    if not isinstance(sampler, Rule | optax.GradientTransformation):
        hint = " Give an instance: SGLD(lr=1e-4)." if isinstance(sampler, type) else ""
        raise TypeError(f"The sampler is a rule or a transformation, but got {sampler!r}.{hint}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is a function of the parameters, but got {type(loss_fn).__name__}.")
    LossFunctions("sample", "sample(loss_fn, params, sampler, data, ...)").check(loss_fn)
    for name, leaf in zip(trees.names(params), jax.tree.leaves(params, is_leaf=trees.is_leaf), strict=True):
        if leaf is not None:
            trees.check_array("parameter", name, leaf)
    params = jax.tree.map(lambda x: strong(as_jax(x)), params)
    if not jax.tree.leaves(params):
        raise ValueError("params has no arrays. Give a pytree of the parameters where the chains begin.")
    if data is not None:
        size_of(data)
    check_batch_size(options.batch_size, data)
    data = jax.tree.map(as_jax, data)
    check_loss(loss_fn, params, data, options.batch_size)
    return params, data


def check_loss(loss_fn: Callable[..., Any], params: Any, data: Any, batch_size: int | None) -> None:
    """Raise for a loss that is no real scalar."""
    size = slice(None, batch_size)
    args = () if data is None else (jax.tree.map(lambda x: jax.eval_shape(lambda x: x[size], x), data),)
    loss = jax.eval_shape(loss_fn, params, *args)
    if jnp.shape(loss) != () or not jnp.issubdtype(getattr(loss, "dtype", np.dtype(object)), jnp.floating):
        given = f"shape {loss.shape} and dtype {loss.dtype}" if hasattr(loss, "shape") else type(loss).__name__
        raise TypeError(f"The loss is a real scalar, the mean over the batch, but loss_fn returned {given}.")
