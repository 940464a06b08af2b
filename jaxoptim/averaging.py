"""Averages of the parameters over training steps, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxoptim.core import Decay, as_jax, is_known, owned, trees
from jaxoptim.core.names import listing
from jaxoptim.core.numerics import computing_dtype
from jaxoptim.core.placement import on_mesh_of
from jaxoptim.schedules.arithmetic import where

__all__ = [
    "AverageState",
    "Averaging",
    "ema",
    "swa",
]
__dir__ = listing(__all__)

AverageStep = Callable[[Any, Any, Any], Any]
"""``(average, param, number averaged) -> average``, of one array."""


class AverageState(NamedTuple):
    """The state of :func:`swa` and :func:`ema`.

    Attributes:
        average: a tree like params, in at least float32; before the first update the parameters themselves.
        n_averaged: the number of updates, an int32 scalar.
    """

    average: Any
    n_averaged: jax.Array


class Averaging(NamedTuple):
    """A pair of pure functions, which :func:`swa` and :func:`ema` return.

    Attributes:
        init: ``init(params) -> state``.
        update: ``update(state, params) -> state``; the first one copies. Donate ``state`` when it is jitted.
    """

    init: Callable[[Any], AverageState]
    update: Callable[[AverageState, Any], AverageState]


def swa_step(average: Any, param: Any, num_averaged: Any) -> Any:
    """Update a mean of ``num_averaged`` values of a parameter with one more."""
    return average + (param - average) / (num_averaged + 1)


def ema_step(decay: Decay, average: Any, param: Any, num_averaged: Any) -> Any:
    """Update an exponential moving average with one more value, in the form that rounds less."""
    long = decay.ema(average, param)
    return where(decay.rate > 0.5, long, decay.rate * average + decay.complement * param)


def debiased_ema_step(decay: Decay, average: Any, param: Any, num_averaged: Any) -> Any:
    """Update a debiased exponential moving average with one more value: its weights are divided by their sum."""
    n, is_long = num_averaged + 1.0, decay.rate > 0.5
    # In each branch the numbers of the other are replaced, whose derivatives are not finite.
    tends = is_long & (decay.complement > 0)
    long = Decay(jnp.where(tends, decay.rate, 0.75), jnp.where(tends, decay.complement, 0.25))
    short = 1 - jnp.where(is_long, 0.5, decay.rate) ** n
    weight = decay.complement / jnp.where(is_long, long.bias_correction(n), short)
    return average + (param - average) * jnp.where(decay.complement == 0, 1 / n, weight)


def checked_decay(decay: Any) -> Decay:
    """Return the decay rate of an average; raise if it is not in [0, 1]."""
    rate = decay.rate if isinstance(decay, Decay) else decay
    if is_known(rate) and not np.all((np.asarray(rate) >= 0) & (np.asarray(rate) <= 1)):
        raise ValueError(f"Invalid decay value {rate} provided. Please provide a value in [0,1] range.")
    return Decay.of(float(decay) if isinstance(decay, int | np.number) else decay)


def dtype_of(x: Any) -> Any:
    """Return the dtype of an array or number; that of random keys is not numeric."""
    return x.dtype if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else jnp.result_type(x)


def floating(x: Any) -> bool:
    """Whether an array is averaged; integers and random keys are copied instead."""
    return bool(jnp.issubdtype(dtype_of(x), jnp.inexact))


def copied(x: Any) -> jax.Array:
    """Return a copy of an array."""
    if not isinstance(x, jax.Array):
        return owned(x)
    return jax.random.clone(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.copy(x)


def first_average(param: Any) -> jax.Array:
    """Copy a parameter to begin an average with, in at least float32."""
    own = copied(param)
    return own.astype(computing_dtype(own.dtype)) if floating(own) else own


def first_copied(param: jax.Array, average: Any, num_averaged: jax.Array) -> jax.Array:
    """Return the average in the dtype of ``param``, or ``param`` itself if nothing was averaged before."""
    return jnp.where(num_averaged == 0, param, average.astype(param.dtype))


def _averaging(step: AverageStep) -> Averaging:
    def init(params: Any) -> AverageState:
        return on_mesh_of(params, AverageState(jax.tree.map(first_average, params), jnp.zeros((), jnp.int32)))

    def update(state: AverageState, params: Any) -> AverageState:
        averages, treedef = jax.tree.flatten(state.average)
        given = trees.arrays_like(params, state.average, "params", "the average")
        new = []
        for average, param in zip(averages, given, strict=True):
            param = as_jax(param)
            if floating(average):
                param = param.astype(average.dtype)
                new.append(first_copied(param, step(average, param, state.n_averaged), state.n_averaged))
            else:
                new.append(copied(param))
        return AverageState(jax.tree.unflatten(treedef, new), state.n_averaged + 1)

    return Averaging(init, update)


def swa() -> Averaging:
    r"""Average the parameters with equal weights: stochastic weight averaging.

    .. math::
        \bar\theta_{n+1} = \bar\theta_n + \frac{\theta - \bar\theta_n}{n + 1}

    Returns:
        An :class:`Averaging`: ``init(params) -> state``, ``update(state, params) -> state``; ``state.average`` is
        the mean, ``state.n_averaged`` the count. Averages are kept in at least float32; integers are copied.

    Raises:
        ``update`` raises ``ValueError`` for another tree or shape than the average's.

    References:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import averaging
        >>> average = averaging.swa()
        >>> state = average.init({"w": jnp.zeros(2)})
        >>> for value in (1.0, 2.0, 6.0):
        ...     state = average.update(state, {"w": jnp.full(2, value)})
        >>> state.average["w"].tolist(), int(state.n_averaged)
        ([3.0, 3.0], 3)
    """
    return _averaging(swa_step)


def ema(decay: Any = 0.999, debias: bool = False) -> Averaging:
    r"""Average the parameters with exponentially decaying weights: an exponential moving average.

    .. math::
        \bar\theta_{n+1} = \bar\theta_n + w (\theta - \bar\theta_n), \qquad
        w = 1 - \beta \quad \text{or} \quad w = \frac{1 - \beta}{1 - \beta^{n+1}} \text{ (debiased)}

    The first update copies in both cases; with ``debias`` the first parameters have no more weight than the
    others, as if the average had started at zero and were divided by :math:`1 - \beta^n`.

    Args:
        decay: :math:`\beta`, in [0, 1] (default 0.999); a number, a traced scalar or a ``Decay``.
        debias: divide by the sum of the weights (default False).

    Returns:
        An :class:`Averaging`: ``init(params) -> state``, ``update(state, params) -> state``; ``state.average`` is
        the average, ``state.n_averaged`` the count. Averages are kept in at least float32; integers are copied.

    Raises:
        ``ValueError`` for a decay out of range; ``update`` raises ``ValueError`` for another tree or shape than
        the average's.

    References:
        Polyak, Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import averaging
        >>> average = averaging.ema(decay=0.5)
        >>> state = average.init({"w": jnp.zeros(2)})
        >>> for value in (1.0, 2.0):
        ...     state = average.update(state, {"w": jnp.full(2, value)})
        >>> state.average["w"].tolist()
        [1.5, 1.5]
    """
    return _averaging(Partial(debiased_ema_step if debias else ema_step, checked_decay(decay)))
