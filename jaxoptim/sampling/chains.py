"""Many chains in one compiled program."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxoptim.core import Rule
from jaxoptim.core.noise import fold_in
from jaxoptim.core.numerics import put
from jaxoptim.core.placement import along
from jaxoptim.sampling import chain
from jaxoptim.sampling.chain import Chain, ChainSpec, Thinning
from jaxoptim.sampling.streams import of_chain
from jaxoptim.sampling.swaps import Swaps, partners
from jaxoptim.sampling.target import Given

_SMALL = 2048
"""Numbers in the parameters up to which ``"auto"`` takes all chains at once on a CPU: beyond, they leave the cache."""
_MEDIUM = 65536
"""The same limit where one device has several cores, which work together on all chains only."""


def layout(
    method: str, num_chains: int, params: Any, given: Given, mesh: Mesh | None = None
) -> tuple[str, Mesh | None]:
    """The method of running chains, and the devices to spread them over (None: they stay where their inputs are).

    Args:
        method: as :func:`jaxoptim.sampling.sample` takes it.
        num_chains: how many chains there are, of all settings and points.
        params: where they begin.
        given: what all are given.
        mesh: the devices that the user wants; None to choose among those of this process.

    Raises:
        ``ValueError`` for a mesh whose devices do not divide the chains.
    """
    arrays = [x for x in jax.tree.leaves((params, given)) if isinstance(x, jax.Array)]
    devices = set().union(*(x.devices() for x in arrays)) if arrays else set()
    platform = next(iter(devices)).platform if devices else jax.default_backend()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if method == "auto":
        size = sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(params))
        alone = len(jax.local_devices(backend=platform)) == 1 < cores
        method = "map" if platform == "cpu" and size > (_MEDIUM if alone else _SMALL) else "vmap"
    if mesh is not None:
        if num_chains % mesh.size:
            raise ValueError(
                f"The mesh has {mesh.size} devices, which do not divide {num_chains} chains. Give another num_chains, "
                "or a mesh of some of its devices."
            )
        return method, along(mesh, "chains") if mesh.size > 1 else None
    candidates = jax.local_devices(backend=platform)
    if platform == "cpu":  # more devices than cores only get in each other's way
        candidates = candidates[:cores]
    count = max(d for d in range(1, len(candidates) + 1) if num_chains % d == 0) if len(devices) <= 1 else 1
    return method, Mesh(np.array(candidates[:count]), ("chains",)) if count > 1 else None


@functools.partial(jax.jit, static_argnames=("spec", "mesh"))
def init_chains(
    spec: ChainSpec,
    mesh: Mesh | None,
    rules: Any,
    settings: Any,
    key: Any,
    numbers: Any,
    params: Any,
    given: Given,
    start_noise: Any = None,
    starts: Any = None,
) -> Chain:
    """Return chains before their first step, stacked.

    Args:
        spec: the static part of the chains.
        mesh: the devices to spread the chains over.
        rules: the settings of the sampler, stacked; None for a transformation.
        settings: for each chain the number of its setting.
        key: the key of the run.
        numbers: for each chain the number that is folded into it.
        params: where all begin.
        given: what all are given.
        start_noise: the standard deviation of the noise about ``params`` where each begins; None for none.
        starts: for each chain the number of the point where it begins, of those on the first axes of ``params``, and of
            what ``given`` has of them; None where all begin at one.
    """

    def one(setting: Any, start: Any, key: Any, rules: Any, params: Any, given: Given, start_noise: Any) -> Chain:
        given, params = _given_at(given, start), _at(params, start)
        return chain.init_chain(spec, _setting(rules, setting), params, given, key, start_noise)

    # At the start there is nothing to compute that would need the cache.
    mapped, common = (fold_in(key, numbers),), (rules, params, given, start_noise)
    return _over_chains(one, "vmap", mesh, mapped, common, (settings, starts), spec.in_a_row)


@functools.partial(jax.jit, static_argnames=("spec", "method", "mesh"), donate_argnames="chains")
def run_steps(
    spec: ChainSpec,
    method: str,
    mesh: Mesh | None,
    rules: Any,
    settings: Any,
    chains: Chain,
    given: Given,
    thinning: Thinning,
    start: Any,
    stop: Any,
    starts: Any = None,
) -> Chain:
    """Return chains after the steps from ``start`` to ``stop``, and the swaps that are due after them.

    ``starts`` is that of :func:`init_chains`.
    """
    if given.swaps is None:
        return _after_steps(spec, method, mesh, rules, settings, chains, given, thinning, start, stop, starts)
    swaps, every = given.swaps, given.swaps.every

    def body(at: tuple[Any, Chain]) -> tuple[Any, Chain]:
        here, chains = at
        there = jnp.minimum((here // every + 1) * every, stop)
        chains = _after_steps(spec, method, mesh, rules, settings, chains, given, thinning, here, there, starts)
        swap = functools.partial(_swapped, spec, method, mesh, rules, given, swaps, there // every)
        return there, lax.cond(there % every == 0, swap, lambda chains: chains, chains)

    return lax.while_loop(lambda at: at[0] < stop, body, (jnp.asarray(start), chains))[1]


def _swapped(
    spec: ChainSpec, method: str, mesh: Mesh | None, rules: Any, given: Given, swaps: Swaps, turn: Any, chains: Chain
) -> Chain:
    """Return chains after each pair of neighbouring temperatures has swapped positions or kept them."""
    loss = _over_chains(lambda state, given: chain.loss_at(spec, given, state), method, mesh, (chains,), (given,))
    places, tried = partners(rules.nbeta, loss, swaps, turn, chains.tried)
    moved = jax.tree.map(lambda x: x[places], (chains.params, chains.known))
    return chains._replace(params=moved[0], known=moved[1], tried=tried)


def _after_steps(
    spec: ChainSpec,
    method: str,
    mesh: Mesh | None,
    rules: Any,
    settings: Any,
    chains: Chain,
    given: Given,
    thinning: Thinning,
    start: Any,
    stop: Any,
    starts: Any,
) -> Chain:
    """Return chains after the steps from ``start`` to ``stop``."""

    def one(
        setting: Any, at: Any, number: Any, state: Chain, rules: Any, given: Given, thinning: Any, start: Any, stop: Any
    ) -> Chain:
        given = _given_at(given, at)._replace(data=of_chain(given.data, number))
        return chain.run_steps(spec, _setting(rules, setting), given, thinning, state, start, stop)

    mapped, common = (jnp.arange(len(settings)), chains), (rules, given, thinning, start, stop)
    return _over_chains(one, method, mesh, mapped, common, (settings, starts), spec.in_a_row)


@functools.partial(jax.jit, static_argnames=("spec", "num_draws"))
def results(spec: ChainSpec, num_draws: int, chains: Chain) -> dict[str, Any]:
    """Return the results of all chains, each with a first axis of chains."""
    return jax.vmap(functools.partial(chain.results, spec, num_draws))(chains)


def _over_chains(
    one: Callable[..., Any],
    method: str,
    mesh: Mesh | None,
    mapped: Any,
    common: Any,
    in_rows: Any = (),
    in_a_row: int = 1,
) -> Any:
    """``one(*in_rows, *mapped, *common)`` for all chains, over the devices of a mesh.

    What follows from ``in_rows``, which is the same for so many chains in a row, such as the masks of their setting, is
    there once for all of them that are taken at once.
    """

    def some(in_rows: Any, mapped: Any, common: Any) -> Any:
        if method == "map":
            return lax.map(lambda each: one(*each[0], *each[1], *common), (in_rows, mapped))

        def of_row(at: Any, mapped: Any) -> Any:
            return jax.vmap(lambda mapped: one(*at, *mapped, *common))(mapped)

        count = len(jax.tree.leaves(mapped)[0])
        width = math.gcd(count, in_a_row)  # a device may begin or end within a row
        heads = jax.tree.map(lambda x: x[::width], in_rows)
        if width == count:
            return of_row(jax.tree.map(lambda x: x[0], heads), mapped)
        rows = jax.tree.map(lambda x: x.reshape(-1, width, *x.shape[1:]), mapped)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(of_row)(heads, rows))

    if mesh is None:
        return some(in_rows, mapped, common)
    of_chains = PartitionSpec("chains")
    specs = of_chains, of_chains, PartitionSpec()
    spread = jax.shard_map(some, mesh=mesh, in_specs=specs, out_specs=of_chains, check_vma=False)
    return spread(in_rows, mapped, common)


def _setting(rules: Any, setting: Any) -> Rule | None:
    """Return one of the stacked settings of a rule."""
    return jax.tree.map(lambda x: x[setting], rules)


def _at(tree: Any, start: Any) -> Any:
    """Return the arrays of one point: their row ``start`` if there are several points."""
    return tree if start is None else jax.tree.map(lambda x: x[start], tree)


def _given_at(given: Given, start: Any) -> Given:
    """Return the inputs that the chains of one point share."""
    return given._replace(rest=_at(given.rest, start), held=_at(given.held, start))


def on_all(mesh: Mesh | None, tree: Any) -> Any:
    """Return arrays replicated on every device of a mesh, sent there once."""
    return tree if mesh is None else put(tree, NamedSharding(mesh, PartitionSpec()))
