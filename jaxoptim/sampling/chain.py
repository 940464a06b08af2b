"""One chain: its start, and some of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxoptim.core import Rule, Sampler, init, noise_of_some, step
from jaxoptim.core.noise import fold_in, is_key
from jaxoptim.core.numerics import is_complex, view_as_complex, view_as_real
from jaxoptim.rules import PSGLD, SGLD
from jaxoptim.sampling.control_variates import Center, estimate
from jaxoptim.sampling.held import joined, joined_state, state_without, without
from jaxoptim.sampling.metropolis import ACCEPTANCE, tested
from jaxoptim.sampling.microbatches import mean_over_parts
from jaxoptim.sampling.minimum import loss_and_gradient, loss_of_all
from jaxoptim.sampling.observables import Draw, Observable, at_draws
from jaxoptim.sampling.streams import batch_of
from jaxoptim.sampling.swaps import SWAP_RATE, Tried
from jaxoptim.sampling.target import Given, Target

# The epochs of a chain fold small numbers into its key; noise and probes have theirs from the other end.
_NOISE, _PROBES, _START, _METROPOLIS = (np.uint32(2**32 - number) for number in (1, 2, 3, 4))


class ChainSpec(NamedTuple):
    """The static part of a chain, which names a compiled program.

    Attributes:
        target: the loss, and the module that its parameters are in.
        transformation: the sampler, None where it is a rule, which is data.
        batch_size: how many data make a batch; None for all.
        observables: names and observables.
        room: how many draws can be written down.
        microbatches: in how many parts a batch is evaluated.
        metropolis: whether steps are accepted or rejected.
        in_a_row: how many chains, one after the other, have one setting and begin at one point.
    """

    target: Target
    transformation: Any
    batch_size: int | None
    observables: tuple[tuple[str, Observable], ...]
    room: int
    microbatches: int = 1
    metropolis: bool = False
    in_a_row: int = 1


class Thinning(NamedTuple):
    """The steps of a chain that are draws, after burn-in and thinned; traced numbers, which do not recompile.

    Attributes:
        num_burnin_steps: the steps before.
        num_steps_bw_draws: the steps for each draw.
        first: the draw that is written down first; those before have left the device.
    """

    num_burnin_steps: Any
    num_steps_bw_draws: Any
    first: Any = 0

    def is_draw(self, step: Any) -> Any:
        """Whether a step is the last one before a draw is written down."""
        past = step - self.num_burnin_steps
        return (past >= 0) & ((past + 1) % self.num_steps_bw_draws == 0)

    def draw_at(self, step: Any) -> Any:
        """Return the index at which a step writes its draw; the last step of a draw overwrites the others' values."""
        return jnp.maximum(step - self.num_burnin_steps, 0) // self.num_steps_bw_draws - self.first


class Chain(NamedTuple):
    """The state of a chain, replaced at every step but for ``key``.

    Attributes:
        key: the key of the chain, from which every step's batch and noise follow.
        params: the current parameters, the tree of the arrays that are sampled, None for those that all chains share.
        state: the state of the sampler.
        memories: the state of each observable.
        traces: by name the values recorded at each draw; room for all of them is there from the start.
        center: its own center of control variates, without the arrays that all chains share; None if it has none.
        known: loss and gradient at the parameters, of all arrays, where steps are accepted or rejected; else None.
        tried: what it has tried to swap with the next temperature; None if there is no such thing.
    """

    key: jax.Array
    params: Any
    state: Any
    memories: dict[str, Any]
    traces: dict[str, Any]
    center: Any = None
    known: Any = None
    tried: Tried | None = None


def init_chain(
    spec: ChainSpec, rule: Rule | None, params: Any, given: Given, key: jax.Array, start_noise: Any = None
) -> Chain:
    """Return a chain before its first step.

    The state of the sampler, and what observables remember, are those of ``params``, from which noise moves the chain.
    """
    noise_key = fold_in(key, _NOISE)
    if rule is None:
        # The noise of a transformation that keeps typed keys is other noise in each chain, and for each of them.
        leaves, treedef = jax.tree.flatten(spec.transformation.init(params))
        keys = [index for index, leaf in enumerate(leaves) if is_key(leaf)]
        for number, index in enumerate(keys):
            leaves[index] = fold_in(noise_key, _NOISE - np.uint32(number)) if number else noise_key
        state = jax.tree.unflatten(treedef, leaves)
    else:
        state = init(rule.replace(key=noise_key) if isinstance(rule, Sampler) else rule, params)
    memories = {
        name: observable.begin(spec.target.params(params, given.rest), given.probes or {})
        for name, observable in spec.observables
    }
    if start_noise is not None:
        params = _moved(rule, params, fold_in(key, _START), start_noise)
    if given.held is not None:
        params, state = without(params, given.held), state_without(state, given.held)
    center = known = None
    if given.renewed_every is not None or spec.metropolis:  # which the first step makes
        like = jax.eval_shape(lambda params: _center_at(spec, params, given), params)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        center, known = (None, (zeros.loss, zeros.grads)) if spec.metropolis else (zeros, None)
    tried = None if given.swaps is None else Tried.none()
    chain = Chain(key, params, state, memories, {}, center, known, tried)
    values = jax.eval_shape(lambda chain: _chain_step(spec, rule, given, Thinning(0, 1), chain, 0)[1], chain)
    traces = jax.tree.map(lambda x: jnp.zeros((spec.room, *x.shape), x.dtype), values)
    return chain._replace(traces=traces)


def run_steps(
    spec: ChainSpec, rule: Rule | None, given: Given, thinning: Thinning, chain: Chain, start: Any, stop: Any
) -> Chain:
    """Return a chain after the steps from ``start`` to ``stop``, whose number is traced and does not recompile."""

    def body(t: Any, chain: Chain) -> Chain:
        chain, values = _chain_step(spec, rule, given, thinning, chain, t)
        draw = thinning.draw_at(t)
        written = jax.tree.map(lambda x, trace: trace.at[draw].set(x), values, chain.traces)
        return chain._replace(traces=written)

    return lax.fori_loop(start, stop, body, chain)


def results(spec: ChainSpec, num_draws: int, chain: Chain) -> dict[str, Any]:
    """Return the results of a chain's observables, and the traces of the sampler's own metrics."""
    observed, traces = dict(spec.observables), jax.tree.map(lambda x: x[:num_draws], chain.traces)
    own = {name: trace for name, trace in traces.items() if name not in observed}
    made = {name: observable.result(chain.memories[name], traces[name]) for name, observable in spec.observables}
    return own | made | ({} if chain.tried is None else {SWAP_RATE: chain.tried.rate})


def loss_at(spec: ChainSpec, given: Given, chain: Chain) -> jax.Array:
    """Return the loss of all data at a chain's position."""
    if chain.known is not None:
        return chain.known[0]
    return loss_of_all(spec.target, joined(chain.params, given.held), given, _size_at_once(spec))


def _chain_step(
    spec: ChainSpec, rule: Rule | None, given: Given, thinning: Thinning, chain: Chain, t: Any
) -> tuple[Chain, Any]:
    """Return the chain after one step, and the values that the step would record."""
    batch_key = chain.key if given.batch_key is None else given.batch_key
    batch = batch_of(given.data, t, batch_key, spec.batch_size)

    def as_given(params: Any) -> Any:
        return spec.target.params(params, given.rest)

    def loss_of(params: Any, part: Any) -> Any:
        return spec.target.loss(params, given.rest, part)

    def mean(function: Callable[[Any], Any]) -> Any:
        return mean_over_parts(function, batch, spec.microbatches)

    # By all arrays, as observables see it: what nothing uses is not computed.
    params = joined(chain.params, given.held)
    own, center = chain.center, given.center
    if own is not None:
        own = lax.cond(t % given.renewed_every == 0, lambda: _center_at(spec, chain.params, given), lambda: own)
        center = own._replace(arrays=joined(own.arrays, given.held))

    def evaluated(params: Any) -> tuple[Any, Any]:
        def of_part(part: Any) -> tuple[Any, Any]:
            def at(params: Any) -> tuple[Any, Any]:
                loss, grads = jax.value_and_grad(loss_of)(params, part)
                return loss, jax.tree.map(jnp.conj, grads)  # JAX has the conjugate for complex parameters

            return at(params) if center is None else estimate(at, params, center)

        return mean(of_part)

    if spec.metropolis:
        loss, grads = lax.cond(t == 0, lambda: evaluated(params), lambda: chain.known)
    else:
        loss, grads = evaluated(params)
    sampler = spec.transformation if rule is None else rule.at(chain.state.step)
    is_draw, probes = thinning.is_draw(t), given.probes or {}

    def full_loss() -> Any:
        if spec.batch_size is None:
            return loss
        return loss_of_all(spec.target, params, given, _size_at_once(spec))

    whole = chain.state if rule is None else joined_state(rule, chain.state, given.held)
    draw = Draw(params, loss, grads, batch, sampler, whole, is_draw, as_given, probes, full_loss)
    # Swaps compare losses of all data, whatever the steps take.
    values: dict[str, Any] = {"loss": loss if given.swaps is None else at_draws(draw, full_loss)}
    memories = {}
    for name, observable in spec.observables:
        memories[name], values[name] = observable.update(chain.memories[name], draw)
    if rule is None:
        updates, state = spec.transformation.update(grads, chain.state, params)
        moved = optax.apply_updates(params, updates)
    else:
        probe = fold_in(fold_in(chain.key, _PROBES), t)
        extra = {}
        if _uses_curvature(rule):
            curvature = mean(lambda part: _curvature(lambda x: loss_of(x, part), params, probe))
            extra["curvature"] = without(curvature, given.held)
        if given.held is not None:  # so that what chains share does not change the noise of what they move
            extra["noise"] = noise_of_some(rule, chain.state, chain.params, params)
        moved, state = step(rule, chain.params, without(grads, given.held), chain.state, **extra)
    known = None
    if spec.metropolis:
        there = joined(moved, given.held)
        known = evaluated(there)
        drawn = fold_in(fold_in(chain.key, _METROPOLIS), t)
        accepted, values[ACCEPTANCE] = tested(sampler, whole, (params, loss, grads), (there, *known), drawn)
        stays = (chain.params, (loss, grads))
        moved, known = jax.tree.map(lambda x, y: jnp.where(accepted, y, x), stays, (moved, known))
    shared = getattr(state, "shared", {})
    values |= {name: x for name, x in shared.items() if name not in values and jnp.shape(x) == () and not is_key(x)}
    return chain._replace(params=moved, state=state, memories=memories, center=own, known=known), values


def _center_at(spec: ChainSpec, params: Any, given: Given) -> Center:
    """Return the center of control variates at a chain's position."""
    return Center(params, *loss_and_gradient(spec.target, joined(params, given.held), given, _size_at_once(spec)))


def _size_at_once(spec: ChainSpec) -> int | None:
    """Return the number of data on which the loss of all is evaluated at once; None for all."""
    return None if spec.batch_size is None else spec.batch_size // spec.microbatches


def _moved(rule: Rule | None, params: Any, key: jax.Array, scale: Any) -> Any:
    r"""The parameters plus ``scale`` times noise, where the mask of the rule lets them move, and in its box.

    That is a step of SGLD without force, of size :math:`\epsilon = s^2`.
    """
    limits = {
        name: getattr(rule, name) for name in ("optimize_over", "bounding_box_size", "box") if hasattr(rule, name)
    }
    free = SGLD(lr=scale**2, nbeta=0.0, key=key, **limits)
    return step(free, params, jax.tree.map(jnp.zeros_like, params), init(free, params))[0]


def _uses_curvature(rule: Rule) -> bool:
    """Whether a rule uses the curvature of the loss."""
    return isinstance(rule, PSGLD) and rule.gamma


def _curvature(loss_of: Callable[[Any], Any], params: Any, key: jax.Array) -> Any:
    r"""The diagonal of the Hessian, estimated by :math:`z \odot Hz` with random signs z (Hutchinson).

    Complex numbers are pairs, and so is their part of the diagonal.
    """
    leaves, treedef = jax.tree.flatten(params)
    pairs = [view_as_real(x) for x in leaves]
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, pairs, strict=True)]

    def as_given(parts: list[Any]) -> list[Any]:
        return [view_as_complex(x) if is_complex(like) else x for x, like in zip(parts, leaves, strict=True)]

    def loss_of_pairs(pairs: list[Any]) -> Any:
        return loss_of(jax.tree.unflatten(treedef, as_given(pairs)))

    _, product = jax.jvp(jax.grad(loss_of_pairs), (pairs,), (signs,))
    return jax.tree.unflatten(treedef, as_given(list(map(jnp.multiply, signs, product))))
