"""The host's side of a run: the compiled program, its progress and its checkpoints."""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxoptim.core import Hyperparameters, Rule, Sampler
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.numerics import strong
from jaxoptim.core.rule import assembled
from jaxoptim.sampling import chains, saved
from jaxoptim.sampling.chain import Chain, ChainSpec, Thinning
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.progress import bar
from jaxoptim.sampling.target import Problem

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


def check_sampler(sampler: Any) -> None:
    """Raise a ``TypeError`` for what is no sampler."""
    if isinstance(sampler, Rule | optax.GradientTransformation):
        return
    name = getattr(sampler, "__name__", type(sampler).__name__)
    if isinstance(sampler, type):
        given, hint = f"the class {name}", "an instance"
    elif isinstance(sampler, Hyperparameters):
        given, hint = f"a {name}, which evaluates the loss itself", "a sampler"
    elif hasattr(sampler, "param_groups"):
        given, hint = f"an optimizer {name}, which makes its own steps", "a rule"
    elif callable(sampler):
        given, hint = f"the function {name}", "what it returns, or a rule"
    else:
        given, hint = repr(sampler) if isinstance(sampler, str | int | float | None) else f"a {name}", "a rule"
    raise TypeError(
        f"The sampler is a rule or a transformation, but got {given:.80}. Give {hint}: jaxoptim.rules.SGLD(lr=1e-4)."
    )


class Run(NamedTuple):
    """A run that has passed all checks, before its first step or where its checkpoint has left it."""

    problem: Problem
    spec: ChainSpec
    method: str
    mesh: Any
    rules: Any
    settings: np.ndarray
    options: RunOptions
    about: Any
    start: int
    state: Chain


def prepare(problem: Problem, sampler: SamplerLike, rules: Any, num_settings: int, options: RunOptions) -> Run:
    """Make ``options.num_chains`` chains of each setting; chain c of all settings has one key.

    Nothing is evaluated but what a checkpoint tells runs apart by: what is wrong raises before work is done.

    Raises:
        ``ValueError`` for a checkpoint of another run, and what the sampler and the observables raise.
    """
    target, params, given = problem[:3]
    transformation = None if isinstance(sampler, Rule) else optax.with_extra_args_support(sampler)
    room = room_for(options.num_draws)
    spec = ChainSpec(target, transformation, options.batch_size, options.watched(), room, options.microbatches)
    method, mesh = chains.layout(options.chain_method, num_settings * options.num_chains, params, given)
    given = given._replace(batch_key=options.batch_key)
    settings = np.repeat(np.arange(num_settings), options.num_chains)
    numbers = np.tile(np.arange(options.num_chains), num_settings)
    rules, params, given = chains.on_all(mesh, (rules, params, given))
    problem = problem._replace(arrays=params, given=given)
    noise = options.start_noise or None  # without any, none is drawn
    state = chains.init_chains(spec, mesh, rules, settings, options.key, numbers, params, given, noise)
    start, about = 0, None  # which is kept in every save of this run
    if options.checkpoint is not None:
        about = saved.description(options, spec, num_settings, sampler, rules, problem)
    if options.checkpoint is not None and os.path.exists(options.checkpoint):
        start, state = saved.load(options.checkpoint, about, options, state)
    if problem.stream is not None:
        problem.stream.skip(start)
    return Run(problem, spec, method, mesh, rules, settings, options, about, start, state)


def run(prepared: Run) -> dict[str, Any]:
    """Take the steps that are left.

    Returns:
        The loss, the final parameters and what was observed, by name, each with a first axis of settings and chains,
        setting by setting.
    """
    (target, _, given, stream), spec, method, mesh, rules, settings, options, about, start, state = prepared
    thinning = Thinning(options.num_burnin_steps, options.num_steps_bw_draws)
    piece, last_save = max(1, options.num_steps // 100), time.monotonic()
    with bar(options.num_steps, start, options.progress) as show:
        try:
            while start < options.num_steps:
                count, before = piece if stream is None else stream.ahead(piece), time.monotonic()
                stop = min(start + count, options.num_steps)
                if stream is not None:
                    given = given._replace(data=chains.on_all(mesh, stream.given(start, stop)))
                with Uninterrupted():  # until what has become of the donated chains is kept
                    state = chains.run_steps(spec, method, mesh, rules, settings, state, given, thinning, start, stop)
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
    rest = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(settings), *x.shape)), given.rest)
    return {**chains.results(spec, options.num_draws, state), "params": target.params(state.params, rest)}


def room_for(num_draws: int) -> int:
    """Return the number of draws that a program has room for: few sizes, so that few programs are compiled."""
    return max(64, 1 << (num_draws - 1).bit_length()) if num_draws <= 4096 else -(-num_draws // 4096) * 4096
