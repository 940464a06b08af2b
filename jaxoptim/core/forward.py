"""Losses that only forward mode can differentiate, such as those with a ``while_loop``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def by_forward_mode(fn: Callable[[Any], tuple[Any, Any]]) -> Callable[[Any], tuple[Any, Any]]:
    """Give a loss a custom gradient computed in forward mode, which ``jax.grad`` then uses too.

    The gradient costs one evaluation for each number of the parameters, all at once under ``vmap``.

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
