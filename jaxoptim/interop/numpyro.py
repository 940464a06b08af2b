"""Optimizers for ``numpyro.infer.SVI``."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxoptim.core import transformation, trees
from jaxoptim.core.forward import by_forward_mode
from jaxoptim.core.names import listing
from jaxoptim.core.numerics import strong
from jaxoptim.core.rule import Hyperparameters

__all__ = [
    "to_numpyro",
]
__dir__ = listing(__all__)

if TYPE_CHECKING:
    from numpyro.optim import _NumPyroOptim


def required() -> ModuleType:
    """Import and return the package numpyro.

    Returns:
        The module.

    Raises:
        ``ImportError`` that says how to install it.

    Examples:
        >>> from jaxoptim.interop.numpyro import required
        >>> required().__name__
        'numpyro'
    """
    try:
        import numpyro
    except ImportError as error:
        raise ImportError(
            "This function needs numpyro, which is not installed. Run: pip install "
            "numpyro, or pip install 'jaxoptim[numpyro]'"
        ) from error
    return numpyro


def to_numpyro(optimizer: Any) -> _NumPyroOptim:
    """Convert an optimizer for ``numpyro.infer.SVI``, so that updates get the loss, its value and its gradient.

    numpyro hands the value of the loss to an optax transformation, and nothing else. Here ``value``, ``grad`` and
    ``value_fn`` reach it, so that L-BFGS, line searches and Newton's method work too.

    Args:
        optimizer: a ``GradientTransformation``, of this library or of optax; a rule such as
            ``jaxoptim.rules.LBFGS()``; a Pyro-style optimizer or a ``MultiOptimizer``. Pyro-style optimizers see the
            arrays of a neural network one by one, each under its dotted path: ``decoder$params.Dense_0.kernel``.

    Returns:
        A ``numpyro.optim._NumPyroOptim``. Its state is a pytree of arrays whose structure and dtypes never change, and
        does not depend on the object: another object made of an equal optimizer goes on with it. As in numpyro,
        ``stable_update`` leaves the state as it was where the loss or a gradient is not finite; mutable state is the
        model's and goes on.

    Raises:
        ``TypeError`` for anything else; ``ImportError`` without numpyro.

    Examples:
        >>> import jax, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO, autoguide
        >>> import jaxoptim
        >>> from jaxoptim import interop
        >>> def model(data):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("data", dist.Normal(mean, 1.0), obs=data)
        >>> optimizer = interop.numpyro.to_numpyro(jaxoptim.lbfgs(line_search_fn="strong_wolfe"))
        >>> svi = SVI(model, autoguide.AutoDelta(model), optimizer, Trace_ELBO())
        >>> result = svi.run(jax.random.key(0), 3, 2.0, progress_bar=False)
        >>> round(float(result.params["mean_auto_loc"]), 4)
        1.0
    """
    if isinstance(optimizer, optax.GradientTransformation):
        tx = optimizer
    elif isinstance(optimizer, Hyperparameters):
        tx = transformation(optimizer)
    else:
        tx = _by_name(transformation(optimizer))
    return _adapter()(optax.with_extra_args_support(tx))


def by_path(tree: Any) -> dict[str, Any]:
    """Flatten a pytree into a dict of its arrays by dotted path.

    Args:
        tree: a dict of arrays, or of trees of arrays.

    Returns:
        A flat dict in the order of ``jax.tree.leaves``.

    Raises:
        ``ValueError`` for two arrays of one path.

    Examples:
        >>> from jaxoptim.interop.numpyro import by_path
        >>> by_path({"net$params": {"bias": 1.0}, "scale": 2.0})
        {'net$params.bias': 1.0, 'scale': 2.0}
    """
    names = trees.array_names(tree)
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(
            f"Two parameters have the name {twice[0]!r}: dots join the name of a site and the path within its value. "
            "Rename one of the sites."
        )
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def _by_name(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Turn a transformation of a flat dict of arrays into one of a dict of pytrees."""
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return inner.init(by_path(params))

    def update(
        grads: Any,
        state: Any,
        params: Any = None,
        *,
        grad: Any = None,
        value_fn: Callable[[Any], Any] | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        names, treedef = trees.array_names(grads), jax.tree.structure(grads)

        def nested(flat: dict[str, Any]) -> Any:
            return jax.tree.unflatten(treedef, [flat[name] for name in names])

        if grad is not None:
            extra["grad"] = by_path(grad)
        if value_fn is not None:
            extra["value_fn"] = lambda flat: value_fn(nested(flat))
        flat_params = None if params is None else by_path(params)
        updates, state = inner.update(by_path(grads), state, flat_params, **extra)
        return nested(updates), state

    return optax.GradientTransformationExtraArgs(init, update)


@functools.cache
def _adapter() -> Callable[[optax.GradientTransformationExtraArgs], _NumPyroOptim]:
    """Make the class of the result of :func:`to_numpyro` on first use, because its base class needs numpyro."""
    required()
    from numpyro.optim import _NumPyroOptim

    class Transformation(_NumPyroOptim):  # type: ignore[misc]
        """A numpyro optimizer made of an optax transformation; its state is ``(count, (params, inner state))``."""

        def __init__(self, tx: optax.GradientTransformationExtraArgs) -> None:
            self._tx = tx
            super().__init__(lambda: (self._init_fn, self._update_fn, lambda state: state[0]), update_with_value=True)

        def init(self, params: Any) -> Any:
            """Initialize the state."""
            count, state = super().init(params)
            return strong(count), state

        def _init_fn(self, params: Any) -> tuple[Any, Any]:
            params = jax.tree.map(strong, params)
            return params, jax.tree.map(strong, self._tx.init(params))

        def _update_fn(self, count: Any, grads: Any, state: tuple[Any, Any], **extra: Any) -> tuple[Any, Any]:
            """Return the next state, in the dtypes of this one, because numpyro carries it through ``lax.scan``."""
            params, inner = state
            # optax takes the conjugate of what JAX calls the gradient; real numbers are their own.
            grads = jax.tree.map(jnp.conj, grads)
            updates, new = self._tx.update(grads, inner, params, grad=grads, **extra)
            return optax.apply_updates(params, updates), jax.tree.map(_like, new, inner)

        def eval_and_update(
            self, fn: Callable[[Any], tuple[Any, Any]], state: Any, forward_mode_differentiation: bool = False
        ) -> tuple[tuple[Any, Any], Any]:
            """Return the loss, its auxiliary output, and the state after one update."""
            out, aux, update, _ = self._evaluated(fn, state, forward_mode_differentiation)
            return (out, aux), update()

        def eval_and_stable_update(
            self, fn: Callable[[Any], tuple[Any, Any]], state: Any, forward_mode_differentiation: bool = False
        ) -> tuple[tuple[Any, Any], Any]:
            """Evaluate and update; if the loss or a gradient is not finite, the loss is nan and the state unchanged."""
            out, aux, update, finite = self._evaluated(fn, state, forward_mode_differentiation)
            out, state = lax.cond(finite, lambda: (out, update()), lambda: (jnp.full_like(out, jnp.nan), state))
            return (out, aux), state

        def _evaluated(
            self, fn: Callable[[Any], tuple[Any, Any]], state: Any, forward: bool
        ) -> tuple[Any, Any, Callable[[], Any], Any]:
            """Return the loss, its auxiliary output, a function that makes the update, and whether all is finite."""
            count, inner = state
            fn = by_forward_mode(fn) if forward else fn
            (out, aux), grads = jax.value_and_grad(fn, has_aux=True)(self.get_params(state))

            def value_fn(moved: Any) -> Any:
                return fn(moved)[0]

            def update() -> tuple[Any, Any]:
                return count + 1, self._update_fn(count, grads, inner, value=out, value_fn=value_fn)

            leaves = jax.tree.leaves((out, grads))
            return out, aux, update, functools.reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in leaves])

    return Transformation


def _like(x: Any, old: Any) -> Any:
    """Cast a leaf of the next state to the dtype of the present one."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else lax.convert_element_type(x, jnp.asarray(old).dtype)
