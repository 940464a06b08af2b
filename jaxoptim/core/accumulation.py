"""Gradient accumulation: a loss and its gradient over micro-batches, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core.loss import Evaluation, Loss, evaluated
from jaxoptim.core.noise import is_key
from jaxoptim.core.numerics import computing_dtype


def accumulated(
    loss_fn: Loss, values: Any, args: Sequence[Any], count: int, mean: bool, scale: jax.Array | None = None
) -> Evaluation:
    r"""Evaluate a loss and its gradient on equal parts of a batch, with one gradient in memory at a time.

    .. math::
        L = \frac{\sum_i w_i L_i}{\sum_i w_i}, \qquad w_i = 1 \text{ where the loss returns no weight}

    Args:
        loss_fn: the loss. It may return ``(sum, weight)`` for the loss :math:`w_i L_i` and its weight :math:`w_i`.
        values: a tree of arrays.
        args: further arguments of the loss. A first argument that comes back goes to the next part, and those that are
            no part of the batch go to all. Of the others, the leading axis of each array is cut into ``count`` parts;
            numbers go to all parts as they are, and a key to each with the number of the part folded in.
        count: the number of parts.
        mean: whether the loss is the mean over the parts (that over all weights), or their sum.
        scale: a factor of the gradient (default None: 1).

    Returns:
        The evaluation, whose ``aux`` has one entry for each part along a new leading axis.

    Raises:
        ValueError: for an array whose leading axis is not a multiple of ``count``, with its place; if nothing differs
            from part to part.
    """
    whole, batch = tuple(args[: loss_fn.num_whole]), tuple(args[loss_fn.num_whole :])
    first, kept = (whole[:1], whole[1:]) if loss_fn.carries else ((), whole)
    leaves, treedef = jax.tree.flatten(batch)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(batch)[0]]
    is_cut = [_is_cut(leaf, path, count) for leaf, path in zip(leaves, paths, strict=True)]
    if count > 1 and not (loss_fn.carries or any(is_cut) or any(map(is_key, leaves))):
        raise ValueError(
            f"accumulate={count} cuts the arrays among the arguments of the loss, but there are none. Pass the batch "
            f"as an argument: minimize(loss_fn, batch, accumulate={count})."
        )
    parts = [
        leaf.reshape((count, leaf.shape[0] // count, *leaf.shape[1:]))
        for leaf, cut in zip(leaves, is_cut, strict=True)
        if cut
    ]

    def args_of(number: Any, cut: Sequence[Any]) -> tuple[Any, ...]:
        rest = iter(cut)
        own = [next(rest) if is_part else _for_part(leaf, number) for leaf, is_part in zip(leaves, is_cut, strict=True)]
        return jax.tree.unflatten(treedef, own)

    def evaluate(first: tuple[Any, ...], number: Any, cut: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Evaluate one micro-batch: loss, weight and gradient, the carry for the next one, and its auxiliary output."""
        found, weight = weighted(loss_fn, values, (*first, *kept, *args_of(number, cut)), scale)
        aux, *after = found.aux if loss_fn.carries else (found.aux,)
        sums = (found.loss, weight, found.grads)
        return jax.tree.map(lambda x: x.astype(computing_dtype(x.dtype)), sums), tuple(after), aux

    def add(so_far: Any, part: Any) -> tuple[Any, Any]:
        sums, first = so_far
        more, first, aux = evaluate(first, *part)
        return (jax.tree.map(jnp.add, sums, more), first), aux

    numbers = jnp.arange(count)
    like, _, _ = jax.eval_shape(evaluate, first, numbers[0], [part[0] for part in parts])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    ((loss, weight, grads), first), aux = jax.lax.scan(add, (zeros, first), (numbers, parts))
    aux = (aux, *first) if loss_fn.carries else aux
    divisor = weight if mean else jnp.ones_like(weight)
    grads = jax.tree.map(lambda grad, value: (grad / divisor).astype(value.dtype), grads, values)
    return Evaluation(lambda values: loss_fn.value(values, args), values, loss / divisor, aux, grads, None)


def weighted(
    loss_fn: Loss, values: Any, args: Sequence[Any], scale: jax.Array | None = None
) -> tuple[Evaluation, jax.Array]:
    """Evaluate a loss that may return ``(sum, weight)``; return the evaluation of the sum, and the weight, else 1."""

    def with_weight(values: Any, *args: Any) -> tuple[Any, Any]:
        loss, aux = loss_fn.both(values, args)
        if isinstance(loss, tuple) and len(loss) == 2:
            return loss[0], (jnp.asarray(loss[1], float), aux)
        return loss, (jnp.ones((), float), aux)

    found = evaluated(Loss(with_weight, True), values, args, scale=scale)
    weight, aux = found.aux
    return found._replace(aux=aux), weight


def _is_cut(leaf: Any, path: str, count: int) -> bool:
    """Whether a leaf of the arguments has a leading axis, which is cut into micro-batches."""
    if not jnp.ndim(leaf) or is_key(leaf):
        return False
    if leaf.shape[0] % count:
        raise ValueError(
            f"accumulate={count} cuts the leading axis of each array of a batch into {count} equal parts, but "
            f"args{path} has shape {leaf.shape}. Give a batch whose size is a multiple of {count}."
        )
    return True


def _for_part(leaf: Any, number: Any) -> Any:
    return jax.random.fold_in(leaf, number) if is_key(leaf) else leaf
