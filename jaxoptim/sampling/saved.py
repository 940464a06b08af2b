"""Checkpoints of a run: the state of its chains, and the fingerprint of the run."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim import checkpoint
from jaxoptim.core import trees
from jaxoptim.core.noise import is_key
from jaxoptim.core.numerics import put
from jaxoptim.sampling.chain import Chain, ChainSpec
from jaxoptim.sampling.excess import ExcessLosses
from jaxoptim.sampling.losses import Losses
from jaxoptim.sampling.observables import Function
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.sketches import Sketch
from jaxoptim.sampling.target import Given, Problem


def description(
    options: RunOptions, spec: ChainSpec, num_settings: int, sampler: Any, rules: Any, problem: Problem
) -> dict[str, Any]:
    """Return the fingerprint of a run; only a run with an equal fingerprint may continue it.

    Functions cannot be compared, so their values at the parameters are; of a stream its first batch is.
    """
    first_point = problem.at_start(0)
    params, given = first_point.arrays, next(first_point.wholes())
    kind = [] if problem.stream is None else [problem.stream.kind]
    batch = jax.tree.map(lambda x: x[: options.size_at_once(given.data)], given.data)

    def as_given() -> Any:
        return spec.target.params(params, given.rest)

    there: dict[str, Any] = {}
    for name, of in spec.observables:
        if isinstance(of, Function):
            there[name] = of.value(as_given())
        elif isinstance(of, Losses):
            there[name] = of.value(as_given, given.probes or {})
        elif isinstance(of, ExcessLosses):
            losses = of.of_each(as_given, given.probes or {})
            there[name] = losses, None if of.reference is None else losses[of.reference]
    first = None
    if spec.transformation is not None:
        first = spec.transformation.update(params, spec.transformation.init(params), params)
    held = {} if given.held is None else {"arrays that no chain moves": trees.array_names(given.held)}
    return held | {
        "key": options.key,
        "num_chains": options.num_chains,
        "num_burnin_steps": options.num_burnin_steps,
        "num_steps_bw_draws": options.num_steps_bw_draws,
        "start_noise": options.start_noise,
        "batch_size": options.batch_size,
        "microbatches": options.microbatches,
        "same_batches": options.same_batches,
        "store": options.store is not None,
        "metropolis": options.metropolis,
        "num_steps_bw_swaps": options.num_steps_bw_swaps,
        "control_variates": None if options.control_variates is None else _of_control_variates(given),
        "observables": [
            [name, repr(of) if isinstance(of, Sketch) else type(of).__name__] for name, of in spec.observables
        ],
        "number of settings": num_settings,
        "kind of sampler": f"{type(sampler).__name__} {jax.tree.structure(rules)}",
        "numbers of the sampler": [*jax.tree.leaves(rules), *jax.tree.leaves(first)],
        "params": jax.tree.leaves((spec.target.as_given(problem.arrays), problem.given.rest)),
        "data": [*kind, *map(_digest, jax.tree.leaves(given.data))],
        "probes": [[name, *map(_digest, jax.tree.leaves(probe))] for name, probe in (given.probes or {}).items()],
        "loss function": [spec.target.loss(params, given.rest, batch)],
        "functions to observe": [jnp.asarray(x) for x in jax.tree.leaves(there)],
    }


def save(path: str | os.PathLike[str], about: Any, options: RunOptions, step: int, chains: Chain) -> None:
    """Write a run."""
    content = {"run": about, "num_draws": options.num_draws, "step": step, "chains": jax.tree.leaves(chains)}
    checkpoint.save(path, content)


def load(path: str | os.PathLike[str], about: Any, options: RunOptions, like: Chain) -> tuple[int, Chain, Any]:
    """Return the step that a run has reached, its chains, and their traces as they were saved.

    Where there are more of these than the device has room for, the chains have none.

    Raises:
        ``ValueError`` for another run, and what :func:`jaxoptim.checkpoint.load` raises.
    """
    with jax.default_device(_host()):  # where there is room for traces that have left the device
        content = checkpoint.load(path)
    if not isinstance(content, dict) or content.keys() != {"run", "num_draws", "step", "chains"}:
        raise ValueError(f"The checkpoint {path} is not of a run of sample. Give another path, or remove it.")
    later = {"store": False, "control_variates": None, "metropolis": False, "num_steps_bw_swaps": None}
    there = later | content["run"]  # of which older files say nothing
    for name, mine in about.items():
        if not _equal(there.get(name), mine):
            raise ValueError(
                f"The checkpoint {path} is of another run: its {name} is not what was given. Give what it was made "
                "with, or another path."
            )
    if content["num_draws"] > options.num_draws:
        raise ValueError(
            f"The checkpoint {path} is of {content['num_draws']} draws, but num_draws is {options.num_draws}. A run "
            "may continue with more, not with fewer."
        )
    leaves, treedef = jax.tree.flatten(like)
    if any(x.dtype != mine.dtype for x, mine in zip(content["chains"], leaves, strict=True)):
        raise ValueError(
            f"The checkpoint {path} has chains in the dtype of their parameters, of a version that lost steps in it. "
            "Give another path, or remove it."
        )
    there = jax.tree.unflatten(treedef, content["chains"])
    fit = there.traces["loss"].shape[1] <= like.traces["loss"].shape[1]
    own = there if fit else there._replace(traces=like.traces)
    return content["step"], jax.tree.map(_fitted, own, like), there.traces


def _host() -> Any:
    """Return the CPU device of the host; None if JAX was configured without one."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _fitted(x: jax.Array, like: jax.Array) -> jax.Array:
    """Return a saved array placed like the run's, a trace extended by the draws to come."""
    x = put(x, like.sharding)
    return x if x.shape == like.shape else like.at[:, : x.shape[1]].set(x)


def _equal(a: Any, b: Any) -> bool:
    """Return whether two fingerprints are equal, arrays to the last bit."""
    if isinstance(b, list):
        return isinstance(a, list) and len(a) == len(b) and all(map(_equal, a, b))
    if is_key(b):
        return isinstance(a, jax.Array) and a.dtype == b.dtype and _equal(*map(jax.random.key_data, (a, b)))
    if isinstance(b, jax.Array):
        return isinstance(a, jax.Array) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
    return type(a) is type(b) and a == b


def _of_control_variates(given: Given) -> list[Any]:
    """Return the part of a fingerprint that depends on control variates."""
    every = given.renewed_every
    center = () if given.center is None else given.center.arrays
    return [None if every is None else int(every), *map(_digest, jax.tree.leaves(center))]


def _digest(x: jax.Array) -> str:
    """Return a string of an array's dtype, shape and hash."""
    x = jax.random.key_data(x) if is_key(x) else x
    return f"{x.dtype}{x.shape} {hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()}"
