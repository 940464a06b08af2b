"""A barrier between arrays: some are ready only when another one is, also for XLA on CPUs."""

from __future__ import annotations

import jax

from jaxoptim.native.call import call, on_cpus
from jaxoptim.native.text import barrier_of


def after(arrays: list[jax.Array], others: list[jax.Array]) -> list[jax.Array]:
    """Return the arrays as they are, each of them only once all of them and the others are there.

    XLA drops an ``optimization_barrier`` on CPUs. Where it does not know that what reads an array comes before what
    replaces it, it makes a copy.

    Raises:
        :class:`~jaxoptim.native.compiler.CannotCompile`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.native import after
        >>> [x.tolist() for x in after([jnp.ones(2)], [jnp.zeros(())])]
        [[1.0, 1.0]]
    """
    return on_cpus(_by_call, lambda arrays, others: arrays)(arrays, others)


def _by_call(arrays: list[jax.Array], others: list[jax.Array]) -> list[jax.Array]:
    text, in_place = barrier_of(len(arrays), len(others))
    return call(text, in_place, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays], [*arrays, *others], 0)
