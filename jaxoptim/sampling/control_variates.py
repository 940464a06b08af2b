"""Control variates: gradients of batches with less variance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import trees
from jaxoptim.core.modules import trained_of
from jaxoptim.core.numerics import as_jax


@dataclasses.dataclass(frozen=True)
class ControlVariates:
    r"""A reduction of the variance of batch gradients, by the loss and the gradient of all data at a center.

    .. math::
        g_t = \nabla L_B(w_t) - \nabla L_B(c) + \nabla L(c)

    with the loss :math:`L_B` of the batch of the step and the loss L of all data is unbiased, and for smooth losses its
    variance is of the order of :math:`\|w_t - c\|^2`. For chains that stay about a minimum it is far smaller than that
    of :math:`\nabla L_B(w_t)`, which is noise that SGLD adds to its own. Of the loss at a draw

    .. math::
        \ell_t = L_B(w_t) - L_B(c) + L(c) + (\nabla L(c) - \nabla L_B(c)) \cdot (w_t - c)

    is reported, of which :math:`g_t` is the gradient: unbiased too, and so nearer to the loss of all data that the
    estimate of a learning coefficient is better by it. Each step evaluates two gradients of its batch.

    Args:
        center: :math:`c`, a tree like the parameters; of a module one of its kind (default None: the parameters that
            are given). The gradient of all data there is taken once, for all chains: SGLD-CV. A good one is near the
            mode.
        renewed_every: how many steps m, an int >= 1: each chain takes its own :math:`w_t` for the center whenever t is
            a multiple of m: SVRG-LD, which needs no mode, but a gradient of all data each time, in batches as large as
            the steps', and keeps two more copies of the parameters in each chain (default None: the center stays).

    Raises:
        ``ValueError`` for both a center and a number of steps, and for what is no such number; from :func:`sample` for
        a center of another structure or shape.

    References:
        Baker, Fearnhead, Fox, Nemeth, Control variates for stochastic gradient MCMC, Statistics and Computing 2019.
        Dubey, Reddi, Williamson, Poczos, Smola, Xing, Variance reduction in stochastic gradient Langevin dynamics,
        NIPS 2016.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> x = jax.random.normal(jax.random.key(0), (512, 3))
        >>> data = {"x": x, "y": x @ jnp.ones(3) + jax.random.normal(jax.random.key(1), (512,))}
        >>> def loss(params, batch):
        ...     return jnp.mean((batch["x"] @ params - batch["y"]) ** 2) / 2
        >>> def spread(**options):
        ...     return sampling.sample(loss, jnp.ones(3), rules.SGLD(lr=1e-4, nbeta=512.0), data, batch_size=16,
        ...                            key=jax.random.key(2), num_chains=4, num_draws=100, **options).loss.std()
        >>> bool(spread(control_variates=sampling.ControlVariates()) < spread() / 10)
        True
    """

    center: Any = None
    renewed_every: int | None = None

    def __post_init__(self) -> None:
        every = self.renewed_every
        if every is None:
            return
        if isinstance(every, bool) or not isinstance(every, int | np.integer) or every < 1:
            raise ValueError(f"Invalid renewed_every: {every!r}. It is an int >= 1, or None for a center that stays.")
        if self.center is not None:
            raise ValueError("A center that is given stays, but renewed_every renews it. Give one of them.")


class Center(NamedTuple):
    """A center, with the loss and the gradient of all data there.

    Attributes:
        arrays: where it is, a tree like the parameters.
        loss: of all data there.
        grads: its gradient.
    """

    arrays: Any
    loss: jax.Array
    grads: Any


def check_control_variates(given: Any, batch_size: Any, data: Any, is_stream: bool) -> None:
    """Raise for anything but a :class:`ControlVariates`, and for a run without batches of countable data."""
    if given is None:
        return
    if not isinstance(given, ControlVariates):
        kind = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise TypeError(f"control_variates is an instance of ControlVariates, but got {kind}. Give one.")
    if is_stream:
        raise ValueError(
            "control_variates need the gradient of all data, but data is a stream of batches, which has no end. Give "
            "arrays."
        )
    if data is None or batch_size is None:
        raise ValueError(
            "control_variates are for gradients of batches, but each step takes all there is. Give data and "
            "batch_size, or leave control_variates out."
        )


def center_like(center: Any, arrays: Any) -> Any:
    """Return a center as arrays of the parameters' shapes and dtypes; the parameters themselves for None.

    Raises:
        ``ValueError`` for one of another structure or shape.
    """
    if center is None:
        return arrays
    given = trees.arrays_like(trained_of(center), arrays, "the center of control_variates", "params")
    leaves, treedef = jax.tree.flatten(arrays)
    return jax.tree.unflatten(treedef, [as_jax(x).astype(like.dtype) for x, like in zip(given, leaves, strict=True)])


def estimate(of_batch: Callable[[Any], tuple[Any, Any]], params: Any, center: Center) -> tuple[Any, Any]:
    """Return the loss and the gradient of a batch, corrected by those at a center.

    Args:
        of_batch: returns the loss and the gradient of the batch at some arrays, that of complex ones conjugated.
        params: where the chain is.
        center: the center, of all arrays.
    """
    (loss, grads), (own, own_grads) = of_batch(params), of_batch(center.arrays)
    lacking = jax.tree.map(jnp.subtract, center.grads, own_grads)
    along = jax.tree.map(lambda g, x, c: jnp.sum((jnp.conj(g) * (x - c)).real), lacking, params, center.arrays)
    estimated = loss - own + center.loss + sum(jax.tree.leaves(along))
    corrected = jax.tree.map(lambda g, more: (g + more).astype(g.dtype), grads, lacking)
    return estimated.astype(loss.dtype), corrected
