"""Losses that can be differentiated forward only, such as those with a loop that ends by a condition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def by_forward_mode(fn: Callable[[Any], tuple[Any, Any]]) -> Callable[[Any], tuple[Any, Any]]:
    """A loss whose gradient is found by forward differentiation, also where ``jax.grad`` asks for it.

    It costs one evaluation for each number of the parameters, all of them at once under ``vmap``.

    Args:
        fn: returns ``(loss, aux)`` of a tree of real arrays.

    Returns:
        The same function, for ``jax.value_and_grad(..., has_aux=True)``.
    """

    def repeated(params: Any) -> tuple[Any, Any]:
        loss, aux = fn(params)
        return loss, (loss, aux)

    def ahead(params: Any) -> tuple[Any, Any]:
        grads, outputs = jax.jacfwd(repeated, has_aux=True)(params)
        return outputs, grads

    def back(grads: Any, cotangents: tuple[Any, Any]) -> tuple[Any]:
        return (jax.tree.map(lambda grad: (cotangents[0] * grad).astype(grad.dtype), grads),)

    evaluated = jax.custom_vjp(lambda params: fn(params))
    evaluated.defvjp(ahead, back)
    return evaluated
