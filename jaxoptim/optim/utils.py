"""Clipping of all gradients together, as in ``torch.nn.utils``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO

from jaxoptim.core import sparse, trees
from jaxoptim.core.names import listing
from jaxoptim.core.numerics import computing_dtype, is_complex
from jaxoptim.core.tracing import refuse_tracing
from jaxoptim.optim.parameter import Parameter

__all__ = [
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_total_norm",
]
__dir__ = listing(__all__)


def get_total_norm(
    tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> jax.Array:
    r"""Return the norm of all arrays of a tree together.

    .. math::
        \Bigl\lVert \bigl( \lVert g_1 \rVert_p, \lVert g_2 \rVert_p, \dots \bigr) \Bigr\rVert_p

    Args:
        tensors: an array, an iterable or a pytree of arrays, None left out. Rows (``BCOO``) are summed first.
        norm_type: :math:`p`, a number, or ``"inf"`` (default 2).
        error_if_nonfinite: raise if the norm is nan or infinite (default False). This waits for the norm.
        foreach: accepted, as torch's, without effect.

    Returns:
        A scalar, in float32 at least; 0 without arrays.

    Raises:
        ``RuntimeError`` for a norm that is not finite, if asked for; ``TypeError`` if that is asked for in a compiled
        function.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> float(optim.utils.get_total_norm({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}))
        5.0
    """
    return _checked(_norm(_own_tree(tensors), float(norm_type)), norm_type, error_if_nonfinite)


def clip_grad_norm_(
    parameters: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Any:
    r"""Clip the norm of all gradients together.

    .. math::
        g \leftarrow g \min\Bigl(1, \frac{c}{\lVert g \rVert_p + 10^{-6}}\Bigr)

    Args:
        parameters: a :class:`~jaxoptim.optim.Parameter`, or an iterable or pytree of them, whose ``grad`` are clipped
            in place; or a pytree of gradients.
        max_norm: :math:`c`, a number.
        norm_type: :math:`p`, a number, or ``"inf"`` (default 2).
        error_if_nonfinite: raise if the norm is nan or infinite (default False), before anything is changed. This
            waits for the norm.
        foreach: accepted, as torch's, without effect.

    Returns:
        For parameters the norm before clipping, a scalar; for gradients the pair of the clipped tree and that norm.

    Raises:
        As :func:`get_total_norm`; ``TypeError`` for parameters in a compiled function.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> weight = optim.Parameter([1.0, 2.0])
        >>> weight.grad = jnp.array([3.0, 4.0])
        >>> float(optim.utils.clip_grad_norm_([weight], 1.0))
        5.0
        >>> clipped, norm = optim.utils.clip_grad_norm_({"w": jnp.array([3.0, 4.0])}, 1.0)
        >>> [round(x, 3) for x in clipped["w"].tolist()]
        [0.6, 0.8]
    """

    def clipped(grads: Any) -> tuple[Any, jax.Array]:
        norm = get_total_norm(grads, norm_type, error_if_nonfinite)
        return _scaled(grads, norm, max_norm), norm

    tree = _own_tree(parameters)
    if _are_parameters(tree):
        return _in_place("clip_grad_norm_", tree, clipped)
    return clipped(tree)


def clip_grad_value_(parameters: Any, clip_value: float, foreach: bool | None = None) -> Any:
    r"""Clip each number of all gradients.

    .. math::
        g \leftarrow \mathrm{clip}(g, -v, v)

    Args:
        parameters: as of :func:`clip_grad_norm_`.
        clip_value: :math:`v`, a number.
        foreach: accepted, as torch's, without effect.

    Returns:
        None for parameters; for gradients the clipped tree.

    Raises:
        ``TypeError`` for complex gradients, and for parameters in a compiled function.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> optim.utils.clip_grad_value_({"w": jnp.array([3.0, -0.5])}, 1.0)["w"].tolist()
        [1.0, -0.5]
    """
    tree = _own_tree(parameters)
    if _are_parameters(tree):
        return _in_place("clip_grad_value_", tree, lambda grads: (_bounded(grads, clip_value), None))
    return _bounded(tree, clip_value)


def _own_tree(given: Any) -> Any:
    """Return the arguments as a tree, an iterator read out."""
    if isinstance(given, Iterator):
        given = list(given)
        if not given:
            warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    return trees.owned_arrays(given)


def _are_parameters(tree: Any) -> bool:
    return any(isinstance(leaf, Parameter) for leaf in jax.tree.leaves(tree))


def _in_place(name: str, tree: Any, clip: Callable[[Any], tuple[Any, Any]]) -> Any:
    """Clip the gradients of parameters, each once."""
    refuse_tracing(f"optim.utils.{name}", "give it the tree of gradients, and take the clipped one that it returns")
    params = [param for param in dict.fromkeys(jax.tree.leaves(tree)) if param.grad is not None]
    grads, result = clip([param.grad for param in params])
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return result


def _checked(norm: jax.Array, norm_type: float, error_if_nonfinite: bool) -> jax.Array:
    if error_if_nonfinite and isinstance(norm, jax.core.Tracer):
        raise TypeError("error_if_nonfinite reads the norm, which a compiled function cannot do. Leave it out there.")
    if error_if_nonfinite and not bool(jnp.isfinite(norm)):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    return norm


@functools.partial(jax.jit, static_argnames="norm_type")
def _norm(tree: Any, norm_type: float) -> jax.Array:
    def of_one(grad: Any) -> jax.Array:
        x = sparse.distinct_rows(grad)[1] if isinstance(grad, BCOO) else jnp.asarray(grad)
        return jnp.linalg.norm(x.astype(computing_dtype(x.dtype)).reshape(-1), norm_type)

    norms = [of_one(grad) for grad in jax.tree.leaves(tree, is_leaf=trees.is_leaf) if grad is not None]
    return jnp.linalg.norm(jnp.stack(norms), norm_type) if norms else jnp.zeros(())


@jax.jit
def _scaled(tree: Any, norm: jax.Array, max_norm: Any) -> Any:
    factor = jnp.minimum(1, max_norm / (norm + 1e-6))

    def scaled(x: jax.Array) -> jax.Array:
        return (x.astype(computing_dtype(x.dtype)) * factor).astype(x.dtype)

    return _on_numbers(scaled, tree)


@jax.jit
def _bounded(tree: Any, bound: Any) -> Any:
    def bounded(x: jax.Array) -> jax.Array:
        if is_complex(x):
            raise TypeError("clip_grad_value_ bounds real numbers, but a gradient is complex. Use clip_grad_norm_.")
        return jnp.clip(x, -bound, bound).astype(x.dtype)

    return _on_numbers(bounded, tree)


def _on_numbers(function: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    """Return a tree with its numbers changed, those of rows after they were summed."""

    def changed(grad: Any) -> Any:
        if not isinstance(grad, BCOO):
            return None if grad is None else function(jnp.asarray(grad))
        rows, values = sparse.distinct_rows(grad)
        return BCOO((function(values), rows[:, None]), shape=grad.shape)

    return jax.tree.map(changed, tree, is_leaf=trees.is_leaf)
