"""A model, a guide and an ELBO as a plain loss function, for loops of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxoptim.pyro.infer.elbo import as_elbo
from jaxoptim.pyro.infer.objective import Objective, Values, discover


def differentiable_loss(
    model: Callable[..., Any], guide: Callable[..., Any], elbo: Any, key: jax.Array, /, *args: Any, **kwargs: Any
) -> tuple[Values, Callable[[dict[str, Any]], dict[str, Any]], Objective]:
    r"""The parts of stochastic variational inference: parameters, constraints and the loss.

    With unconstrained values :math:`u` and the bijections :math:`T` of the constraints,

    .. math:: \mathrm{loss\_fn}(u, \mathrm{key}, \ldots) = \mathrm{elbo.loss}(\mathrm{key}, T(u), \ldots).

    Args:
        model: a model of numpyro.
        guide: a guide of numpyro, also an automatic one.
        elbo: an ELBO of numpyro; or a function ``loss(model, guide, *args, **kwargs)`` that returns a scalar. Model
            and guide come to it with parameters, ready for ``numpyro.handlers.trace``, ``replay`` and ``seed``, and for
            the ELBOs of numpyro. Where the function seeds them, equal seeds give equal draws within one evaluation, and
            others in the next: its key is folded in. Elsewhere they draw from ``(model key, guide key)``, split as in
            ``numpyro.infer.Trace_ELBO``: the first call of each from its key, call ``n = 1, 2, ...`` after it from
            ``jax.random.fold_in(key, n)``. Within ``vmap``, ``scan`` and what else JAX traces, a draw needs a seed.
        key: a JAX key for the initial values. They are those of ``numpyro.infer.SVI.init`` with this key.
        args: arguments of model and guide, such as the first batch.
        kwargs: keyword arguments of both, of any name: those called like arguments of the ELBO itself reach model and
            guide alone.

    Returns:
        ``(params, constrain, loss_fn)``:

        - ``params``: a dict of unconstrained arrays. A parameter that is a tree, such as the weights of a flax module,
          has one entry for each array, under its path: ``decoder$params.Dense_0.kernel``.
        - ``constrain(params)``: a dict of what the model sees, with trees as they were.
        - ``loss_fn(params, key, *args, **kwargs)``: a pure function that can be jitted and differentiated; the
          arguments may be traced, strings and flags must be static there. Before each call split a key:
          ``key, step_key = jax.random.split(key)``.

        A model with mutable sites (batch normalisation) has ``loss_fn.mutable_state`` and
        ``loss_fn.with_mutable_state(params, mutable, key, *args) -> (loss, mutable)`` in place of the call.

    Raises:
        ``TypeError`` for a loss that is no ELBO and no function or returns no scalar, and for a parameter that is not
        floating; ``KeyError`` for a dict that lacks a parameter or has another; ``ValueError`` where ``loss_fn`` is
        called without the mutable state, and for a draw without a seed in what a loss lets JAX trace;
        ``ImportError`` without numpyro; what model and guide raise.

    Examples:
        >>> import jax, numpyro, optax
        >>> import numpyro.distributions as dist
        >>> from numpyro.infer import Trace_ELBO
        >>> import jaxoptim
        >>> from jaxoptim.pyro.infer import differentiable_loss
        >>> def model(data):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("data", dist.Normal(mean, 1.0), obs=data)
        >>> def guide(data):
        ...     scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
        ...     numpyro.sample("mean", dist.Normal(numpyro.param("loc", 0.0), scale))
        >>> key = jax.random.key(0)
        >>> params, constrain, loss_fn = differentiable_loss(model, guide, Trace_ELBO(num_particles=10), key, 2.0)
        >>> tx = jaxoptim.adam(lr=0.02)
        >>> state, value_and_grad = tx.init(params), jax.jit(jax.value_and_grad(loss_fn))
        >>> for _ in range(300):
        ...     key, step_key = jax.random.split(key)
        ...     loss, grads = value_and_grad(params, step_key, 2.0)
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> {name: round(float(value), 1) for name, value in sorted(constrain(params).items())}
        {'loc': 1.0, 'scale': 0.7}
    """
    elbo = as_elbo(elbo)
    found = discover(model, guide, elbo, key, args, kwargs, {}, {})
    loss_fn = Objective(model, guide, elbo, found.sites, found.mutable)
    # Copies: an initial value may be the user's own array, and parameters are what one donates.
    params = {name: jax.numpy.array(value) for name, value in found.values.items()}
    return params, loss_fn.constrain, loss_fn
