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
from jaxoptim.core.modules import trained_of
from jaxoptim.core.numerics import strong
from jaxoptim.core.placement import is_over_processes, largest, readable
from jaxoptim.core.rule import assembled
from jaxoptim.sampling import chains, saved
from jaxoptim.sampling.chain import Chain, ChainSpec, Thinning
from jaxoptim.sampling.control_variates import Center, center_like
from jaxoptim.sampling.held import held_arrays, joined, only, with_small_masks
from jaxoptim.sampling.labelled import Labels
from jaxoptim.sampling.metropolis import check_metropolis
from jaxoptim.sampling.minimum import loss_and_gradient
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.pieces import Host, Pieces, room_of_a_piece
from jaxoptim.sampling.progress import bar
from jaxoptim.sampling.store import Store, is_made
from jaxoptim.sampling.target import Given, Problem, Target
from jaxoptim.sampling.until import is_look, largest_mcse, next_look

SamplerLike: TypeAlias = Rule | optax.GradientTransformation
"""A sampler as :func:`jaxoptim.sampling.sample` takes it."""

_SECONDS_BETWEEN_SAVES = 60.0
_SECONDS_OF_A_PIECE = 0.3
"""The least seconds of one call, so that its overhead is small; Ctrl-C acts between calls."""


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
    if (center := getattr(rule, "center", None)) is not None:
        rule = rule.replace(center=trained_of(center))

    def repeated(x: Any) -> jax.Array:
        x = strong(x)
        return jnp.broadcast_to(x, (num_settings, *x.shape))

    return assembled(type(rule), vars(jax.tree.map(repeated, rule)) | changes)


def check_sampler(sampler: Any) -> None:
    """Raise a ``TypeError`` for anything but a sampler."""
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
    """A run that has passed all checks, before its first step or at the step of its checkpoint."""

    problem: Problem
    spec: ChainSpec
    method: str
    mesh: Any
    rules: Any
    settings: np.ndarray
    starts: np.ndarray | None
    options: RunOptions
    about: Any
    start: int
    state: Chain
    pieces: Pieces | None


def prepare(
    problem: Problem,
    sampler: SamplerLike,
    rules: Any,
    num_settings: int,
    options: RunOptions,
    labels: Labels | None = None,
) -> Run:
    """Make ``options.num_chains`` chains of each setting; chain c of all settings has one key, unless they swap.

    Where chains begin at several points there are so many of each setting at each of them, one point after the other;
    such a run has no store and no control variates.

    Nothing is evaluated but what a checkpoint tells runs apart by, and the gradient at a center of control variates
    that stays: what is wrong raises before work is done.

    Args:
        problem: what is sampled.
        sampler: the rule, or the transformation.
        rules: its settings, see :func:`stacked`.
        num_settings: how many there are.
        options: the keywords.
        labels: what the axis of settings is called in a store, and its labels; None for a single one.

    Raises:
        ``ValueError`` for a checkpoint of another run, and what the sampler and the observables raise.
    """
    target, params, given = problem[:3]
    one, count = problem.at_start(0), num_settings * options.num_chains * (problem.num_starts or 1)
    check_metropolis(sampler, options, problem.stream is not None)
    transformation = None if isinstance(sampler, Rule) else optax.with_extra_args_support(sampler)
    room = room_for(options.num_draws)
    others = options.microbatches, options.metropolis, options.num_chains
    spec = ChainSpec(target, transformation, options.batch_size, options.watched(), room, *others)
    method, mesh = chains.layout(options.chain_method, count, one.arrays, one.given, options.mesh)
    given = given._replace(batch_key=options.batch_key, swaps=options.swaps)
    if options.store is not None and is_over_processes(mesh):
        raise ValueError("A store is written by one process, but the mesh has devices of several. Leave store= out.")
    numbers = np.arange(count) % options.num_chains
    settings = np.arange(count) // options.num_chains % num_settings
    starts = None if problem.num_starts is None else np.arange(count) // (options.num_chains * num_settings)
    if options.swaps is not None:  # what changes places must be independent, so noise is not common to the settings
        numbers = numbers * num_settings + settings
    params, given = chains.on_all(mesh, (params, given))
    given = given._replace(held=only(params, held_arrays(rules, one.arrays)))
    given = chains.on_all(mesh, _with_center(options, target, params, given))
    rules = chains.on_all(mesh, with_small_masks(rules, given.held))
    problem = problem._replace(arrays=params, given=given)
    noise = options.start_noise or None  # without any, none is drawn
    begun = mesh, rules, settings, options.key, numbers, params, given, noise, starts
    spec = spec._replace(room=room_of_a_piece(room, chains.init_chains.eval_shape(spec, *begun).traces))
    state = chains.init_chains(spec, *begun)
    start, about, traces = 0, None, state.traces  # what tells the run apart is kept in every save of it
    if options.saved_at is not None:
        about = saved.description(options, spec, num_settings, sampler, rules, problem)
    if options.saved_at is not None and os.path.exists(options.saved_at):
        start, state, traces = saved.load(options.saved_at, about, options, state)
    elif options.store is not None and os.path.exists(options.store):
        raise ValueError(
            f"The store {options.store} exists, but there is no {options.saved_at}, which says of what run it is. Give "
            "another path, or remove it."
        )
    if problem.stream is not None:
        problem.stream.skip(start)
    pieces: Pieces | None = None
    if options.store is not None:
        pieces = Store(options, spec.room, start, labels or {})
    elif spec.room < room:
        pieces = Host(options, spec.room, start, traces)
    return Run(problem, spec, method, mesh, rules, settings, starts, options, about, start, state, pieces)


def _with_center(options: RunOptions, target: Target, params: Any, given: Given) -> Given:
    """Return the inputs of all chains, with the center of control variates."""
    by = options.control_variates
    if by is None:
        return given
    if by.renewed_every is not None:
        return given._replace(renewed_every=np.int32(by.renewed_every))
    center = center_like(by.center, params)
    size = options.size_at_once(given.data)
    return given._replace(center=Center(center, *loss_and_gradient(target, center, given, size)))


def run(prepared: Run) -> dict[str, Any]:
    """Take the remaining steps, and return the results.

    Returns:
        The loss, the final parameters and what was observed, by name, each with a first axis of settings and chains,
        setting by setting.
    """
    (state, draws), problem, count = _ended(prepared), prepared.problem, len(prepared.settings)
    given = problem.given

    def of_each(x: Any) -> jax.Array:
        return jnp.broadcast_to(x, (count, *x.shape)) if prepared.starts is None else x[prepared.starts]

    held, rest = jax.tree.map(of_each, (given.held, given.rest))
    return {**_observed(prepared, state, draws), "params": problem.target.params(joined(state.params, held), rest)}


def observed(prepared: Run) -> dict[str, Any]:
    """Take the remaining steps, and return the results of :func:`run` without the final parameters.

    Arrays that no chain moves are not copied for each.
    """
    return _observed(prepared, *_ended(prepared))


def _ended(prepared: Run) -> tuple[Chain, int]:
    """Return the chains after the remaining steps, or some of them if that is enough, and their number of draws."""
    problem, spec, method, mesh, rules, settings, starts, options, about, start, state, pieces = prepared
    given, stream = problem.given, problem.stream

    def save() -> None:
        traces = state.traces
        if pieces is not None:
            pieces.take(start, traces)
            traces = pieces.saved_with_chains(traces)
        if options.saved_at is not None:
            saved.save(options.saved_at, about, options, start, state._replace(traces=traces))

    def is_enough() -> bool:
        draws = options.draws_at(start)
        if options.until_mcse is None or not is_look(draws):
            return False
        if pieces is None:
            loss = np.asarray(readable(state.traces["loss"]))[:, :draws]
        else:
            pieces.take(start, state.traces)
            loss = pieces.loss()
        return largest_mcse(loss.reshape(-1, options.num_chains, draws)) <= options.until_mcse

    if options.store is not None and not start:
        save()  # before there are draws, which are not known without it
    piece, since_save = max(1, options.num_steps // 100), 0.0
    with bar(options.num_steps, start, options.progress) as show:
        try:
            while start < options.num_steps and not is_enough():
                count, before = piece if stream is None else stream.ahead(piece), time.monotonic()
                stop = min(start + count, options.num_steps)
                if pieces is not None:
                    stop = min(stop, pieces.limit())
                if options.until_mcse is not None:
                    stop = min(stop, options.steps_of(next_look(options.draws_at(start))))
                if stream is not None:
                    given = given._replace(data=chains.on_all(mesh, stream.given(start, stop)))
                first = 0 if pieces is None else pieces.taken
                thinning = Thinning(options.num_burnin_steps, options.num_steps_bw_draws, first)
                with Uninterrupted():  # until what has become of the donated chains is kept
                    state = chains.run_steps(
                        spec, method, mesh, rules, settings, state, given, thinning, start, stop, starts
                    )
                    jax.block_until_ready(state.traces)
                    start = stop
                seconds = largest(mesh, time.monotonic() - before)
                since_save += seconds
                if seconds < _SECONDS_OF_A_PIECE:
                    piece *= 2
                if pieces is not None and start == pieces.limit():
                    pieces.take(start, state.traces)
                show(start)
                if options.saved_at is not None and since_save > _SECONDS_BETWEEN_SAVES:
                    save()
                    since_save = 0.0
        except KeyboardInterrupt:
            if not is_over_processes(mesh):  # which are interrupted at different steps
                save()
            raise
    save()
    return state, options.draws_at(start)


def _observed(prepared: Run, state: Chain, num_draws: int) -> dict[str, Any]:
    """Return the results of finished chains, in NumPy arrays where they have left the device."""
    spec, pieces = prepared.spec, prepared.pieces
    if pieces is None:
        return readable(chains.results(spec, num_draws, state))
    traces = pieces.traces(state.traces)
    made = tuple((name, of) for name, of in spec.observables if is_made(of))
    names = dict(made).keys()
    found = {name: x for name, x in traces.items() if name not in names}
    memories, own = ({name: of[name] for name in names} for of in (state.memories, traces))
    results = chains.results(spec._replace(observables=made), num_draws, state._replace(memories=memories, traces=own))
    found |= readable(results)
    pieces.finish(found)
    return found


def arranged_in(shape: tuple[int, ...], found: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a run with its chains arranged in ``shape``."""
    return {
        name: jax.tree.map(lambda x: np.asarray(x).reshape(*shape, *x.shape[1:]), x)
        for name, x in found.items()
        if name != "params"
    }


def room_for(num_draws: int) -> int:
    """Return the number of draws that a program has room for: few sizes, so that few programs are compiled."""
    return max(64, 1 << (num_draws - 1).bit_length()) if num_draws <= 4096 else -(-num_draws // 4096) * 4096
