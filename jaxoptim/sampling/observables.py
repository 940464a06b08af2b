"""Observables: quantities that are recorded at the draws of a chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxoptim.core.flat import flatten
from jaxoptim.core.modules import module_of, trained_of
from jaxoptim.core.numerics import computing_dtype
from jaxoptim.core.precision import widened
from jaxoptim.rules import SGLD
from jaxoptim.sampling.mala import mala_acceptance, potential_at


class Draw(NamedTuple):
    """One step of a chain, as an observable sees it.

    Attributes:
        arrays: the arrays :math:`w_t` that are sampled, before the step, where the loss and the gradient are taken; a
            tree like ``grads``. Those of float16 and bfloat16 are in float32, and ``params`` has them rounded.
        loss: the loss there, of the batch of this step, in float32 at least.
        grads: its gradient, in the dtypes of ``arrays``.
        batch: the data of this step.
        sampler: the rule, its numbers those of this step, or the transformation.
        state: the state of the sampler before the step; the slots of arrays that no chain moves are those of its start.
        is_recorded: whether this step is a draw: not one of burn-in, or between two draws.
        as_given: puts such arrays into the module that they came in, in the dtypes that they had there.
        probes: by name the data sets of ``sample(..., probes=)``.
        full_loss: returns the loss of all data at ``arrays``, in batches as large as the steps'. It costs a pass over
            the data where steps take batches, so call it at draws only.
    """

    arrays: Any
    loss: jax.Array
    grads: Any
    batch: Any
    sampler: Any
    state: Any
    is_recorded: jax.Array
    as_given: Callable[[Any], Any]
    probes: dict[str, Any]
    full_loss: Callable[[], jax.Array]

    @property
    def params(self) -> Any:
        """The parameters before the step as the loss gets them; a module is a new one at each access."""
        return self.as_given(self.arrays)


class Observable:
    """The base class of observables that carry a memory from step to step.

    A plain function of the parameters is an observable too. A subclass must be hashable, such as a frozen dataclass:
    equal ones share a compiled program.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> class Farthest(sampling.Observable):
        ...     def init(self, params):
        ...         return jnp.zeros(())
        ...
        ...     def update(self, memory, draw):
        ...         memory = jnp.maximum(memory, jnp.linalg.norm(draw.params))
        ...         return memory, memory
        >>> samples = sampling.sample(
        ...     lambda w: jnp.sum(w**2) / 2, jnp.zeros(3), rules.SGLD(lr=0.01, nbeta=10.0), key=jax.random.key(0),
        ...     num_chains=2, num_draws=5, observables={"farthest": Farthest()})
        >>> samples.observables["farthest"].shape
        (2, 5)
    """

    def init(self, params: Any) -> Any:
        """Return the memory before the first step, a pytree of arrays.

        ``params`` are those given to the run, as the loss gets them; where a chain begins, its first step tells.
        """
        return ()

    def begin(self, params: Any, probes: Mapping[str, Any]) -> Any:
        """Return the memory before the first step where it depends on the probes too; :meth:`init` by default."""
        return self.init(params)

    def update(self, memory: Any, draw: Draw) -> tuple[Any, Any]:
        """Return the memory after a step, and a pytree of arrays to record, None for nothing."""
        raise NotImplementedError

    def result(self, memory: Any, trace: Any) -> Any:
        """Return the result of a chain: by default the recorded arrays, ``(draws, ...)``."""
        return trace

    def axes(self, name: str) -> tuple[str, tuple[str, ...]]:
        """Return the name of the result in ``Samples.to_xarray``, and the names of its axes after that of chains.

        By default it has the name that it is given, and an axis ``"draw"`` unless :meth:`result` is another. Axes that
        are left out get names of their own.
        """
        return name, ("draw",) if type(self).result is Observable.result else ()


def at_draws(draw: Draw, value: Callable[[], Any]) -> Any:
    """Return the value of a function at the draws; zeros at other steps, where it is not computed.

    It makes its own ``draw.params``: the variables of an nnx module may be changed only by the trace that made them.
    """
    like = jax.eval_shape(value)
    return lax.cond(draw.is_recorded, value, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like))


@dataclasses.dataclass(frozen=True)
class Function(Observable):
    """A function of the parameters, computed at the draws only."""

    function: Callable[[Any], Any]

    def value(self, params: Any) -> Any:
        """Return the value of the function; for a module, its sampled arrays."""
        value = self.function(params)
        parts = module_of(value)
        return jax.tree.map(jnp.asarray, value if parts is None else parts.trained)

    def update(self, memory: Any, draw: Draw) -> tuple[Any, Any]:
        return memory, at_draws(draw, lambda: self.value(draw.params))


@dataclasses.dataclass(frozen=True)
class MalaAcceptance(Observable):
    r"""The rate at which a Metropolis test would accept the steps; see :func:`mala_acceptance`.

    The potential is :math:`n\beta L + \tfrac{\lambda}{2}\|w\|^2 + \tfrac{\gamma}{2}\|w - c\|^2` with the loss of each
    step's batch, so it means what it says on all data (``batch_size=None``). Directions that a mask holds take no
    part. For the rule ``SGLD`` with ``noise_level=1``; a step that a box has changed counts as if it had not.

    Parameters of float16 and bfloat16 are taken as the loss gets them, so that what it rates is the step size, and not
    how coarse they are.

    The trace holds at each draw the acceptance of the step that led there, NaN at the very first position. It keeps
    the position and the gradient of the last step: twice the memory of the parameters for each chain.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> samples = sampling.sample(
        ...     lambda w: jnp.sum(w**2) / 2, jnp.zeros(3), rules.SGLD(lr=0.01, nbeta=10.0), key=jax.random.key(0),
        ...     num_chains=2, num_draws=100, observables={"accepted": sampling.MalaAcceptance()})
        >>> float(jnp.nanmean(samples.observables["accepted"])) > 0.95
        True
    """

    def init(self, params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, _wide(trained_of(params)))
        return zeros, zeros, jnp.full((), jnp.nan)

    def update(self, memory: Any, draw: Draw) -> tuple[Any, Any]:
        rule = draw.sampler
        if not isinstance(rule, SGLD):
            raise TypeError(f"MalaAcceptance is of the rule SGLD, but the sampler is {type(rule).__name__}.")
        position = _wide(trained_of(draw.params))
        energy, forces = potential_at(rule, draw.state, position, draw.loss, _wide(draw.grads))
        here = position, forces, energy
        (x, grad_x, before), (y, grad_y, now) = memory, here
        return here, mala_acceptance(x, grad_x, before, y, grad_y, now, rule.lr)


def _wide(tree: Any) -> Any:
    """Return the arrays of a tree in their computing dtypes."""
    return jax.tree.map(widened, tree)


class Moments(NamedTuple):
    """The means of two vectors, and the sum of the products of their deviations, over draws."""

    draws: jax.Array
    x: jax.Array
    y: jax.Array
    products: jax.Array

    @classmethod
    def none(cls, x: Any, y: Any) -> Moments:
        """Return the moments of no draws, for vectors like these."""
        dtype = computing_dtype(jnp.result_type(x.dtype, y.dtype))
        return cls(*(jnp.zeros(shape, dtype) for shape in ((), x.shape, y.shape, (*x.shape, *y.shape))))

    def after(self, x: jax.Array, y: jax.Array) -> Moments:
        """Return the moments after another draw."""
        draws, away = self.draws + 1, x - self.x
        mean = self.y + (y - self.y) / draws
        return Moments(draws, self.x + away / draws, mean, self.products + jnp.multiply.outer(away, y - mean))

    @property
    def covariance(self) -> jax.Array:
        """Return the covariance, with the divisor ``draws - 1``."""
        return self.products / (self.draws - 1)


@dataclasses.dataclass(frozen=True)
class Covariance(Observable):
    """The covariance matrix of the parameters over the draws, all parameters flattened into one vector.

    The result of each chain is ``(size, size)``, with the divisor ``draws - 1``; it takes as much memory for each
    chain. ``select`` makes a smaller tree of the parameters first. It gets parameters of float16 and bfloat16 as the
    loss does; without it their positions in float32 are observed.

    Args:
        select: a function of the parameters whose result is observed in their place (default None).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> samples = sampling.sample(
        ...     lambda w: jnp.sum(w**2) / 2, jnp.zeros(3), rules.SGLD(lr=0.01, nbeta=10.0), key=jax.random.key(0),
        ...     num_chains=2, num_draws=100, observables={"covariance": sampling.Covariance()})
        >>> samples.observables["covariance"].shape
        (2, 3, 3)
    """

    select: Callable[[Any], Any] | None = None

    def _vector(self, params: Any) -> jax.Array:
        return flatten(trained_of(params) if self.select is None else self.select(params))

    def init(self, params: Any) -> Any:
        like = self._vector(params)  # of which the compiler keeps the shape alone
        return Moments.none(like, like)

    def update(self, memory: Any, draw: Draw) -> tuple[Any, Any]:
        def observed() -> Any:
            here = flatten(draw.arrays) if self.select is None else self._vector(draw.params)
            return memory.after(here, here)

        return lax.cond(draw.is_recorded, observed, lambda: memory), None

    def result(self, memory: Any, trace: Any) -> Any:
        return memory.covariance
