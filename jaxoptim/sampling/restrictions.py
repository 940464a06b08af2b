"""Masks of parts of parameters, such as the heads of an attention layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxoptim.core import trees
from jaxoptim.core.modules import trained_of
from jaxoptim.optim.groups import predicate


def slices(params: Any, selection: Mapping[str, Any]) -> Any:
    r"""Make a mask that lets chains move only some parts of arrays.

    Args:
        params: a pytree of arrays or a module, as for :func:`sample`.
        selection: by regular expression, which must match the whole dotted path of an array: True for all of it; or
            ``(axis, parts, index)`` where the axis is made of so many equal parts and this one is meant, such as
            ``(1, num_heads, head)``; ``index`` may be a list of them; or a list of such triples. What several
            expressions say of an array adds up.

    Returns:
        A tree of booleans that broadcast to the arrays, for ``optimize_over`` of a rule and for ``selections`` of
        :func:`estimate_llc`.

    Raises:
        ``ValueError`` for an expression that matches nothing, an axis that there is not or that is not made of equal
        parts, and a part that there is not; ``TypeError`` for anything else than a triple.

    References:
        Wang, Hoogland, van Wingerden, Furman, Murfet, Differentiation and specialization of attention heads via the
        refined local learning coefficient, 2024.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import sampling
        >>> params = {"attention": {"query": jnp.ones((4, 6)), "out": jnp.ones((6, 4))}, "mlp": jnp.ones(3)}
        >>> mask = sampling.slices(params, {r"attention\.query": (1, 3, 0), r"attention\.out": (0, 3, 0)})
        >>> mask["attention"]["query"].astype(int).tolist(), bool(mask["mlp"])
        ([[1, 1, 0, 0, 0, 0]], False)
    """
    arrays = trained_of(params)
    names, leaves = trees.names(arrays), jax.tree.leaves(arrays, is_leaf=trees.is_leaf)
    masks = [None if leaf is None else np.asarray(False) for leaf in leaves]
    if not isinstance(selection, Mapping):
        raise TypeError(
            f"selection is a dict from regular expressions to True or (axis, parts, index), but got {selection!r:.60}."
        )
    for pattern, parts in selection.items():
        matches = predicate(pattern)
        own = [at for at, name in enumerate(names) if leaves[at] is not None and matches(name)]
        if not own:
            raise ValueError(
                f"{pattern!r} matches no parameter. An expression must match the whole path, as 'layer.*' does. The "
                f"paths are {', '.join(names)}."
            )
        for at in own:
            for part in parts if isinstance(parts, list) else [parts]:
                masks[at] = masks[at] | _mask(names[at], np.shape(leaves[at]), part)
    return jax.tree.unflatten(jax.tree.structure(arrays, is_leaf=trees.is_leaf), masks)


def preview(params: Any, mask: Any) -> str:
    """Say what a mask selects: a line for each array of which it selects something, and one for all.

    Args:
        params: a pytree of arrays or a module, as for :func:`sample`.
        mask: a tree of masks like it, None where all of an array is selected, such as :func:`restriction` and
            :func:`slices` make.

    Returns:
        Lines of path, shape, and how many numbers are selected of how many.

    Raises:
        ``ValueError`` for a mask that is another tree.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import sampling
        >>> params = {"query": jnp.ones((4, 6)), "out": jnp.ones((6, 4))}
        >>> print(sampling.preview(params, sampling.slices(params, {"query": (1, 3, 0)})))
        query       (4, 6)  8 of 24
        all arrays          8 of 48
    """
    arrays = trained_of(params)
    leaves, masks = jax.tree.leaves(arrays, is_leaf=trees.is_leaf), trees.leaves_like(mask, arrays, "mask")
    rows, chosen, total = [], 0, 0
    for name, leaf, part in zip(trees.names(arrays), leaves, masks, strict=True):
        if leaf is None:
            continue
        size, part = math.prod(np.shape(leaf)), np.asarray(True if part is None else part, bool)
        count = int(np.broadcast_to(part, np.shape(leaf)).sum())
        chosen, total = chosen + count, total + size
        if count:
            rows.append((name, str(np.shape(leaf)), f"{count} of {size}"))
    rows.append(("all arrays", "", f"{chosen} of {total}"))
    first, second = (max(len(row[at]) for row in rows) for at in (0, 1))
    return "\n".join(f"{name:{first}}  {shape:{second}}  {count}" for name, shape, count in rows)


def _mask(name: str, shape: tuple[int, ...], part: Any) -> np.ndarray:
    """The mask of one part of an array."""
    if part is True:
        return np.asarray(True)
    if not isinstance(part, tuple) or len(part) != 3:
        raise TypeError(f"The part of {name!r} is (axis, parts, index) or True, but got {part!r:.60}.")
    axis, count, index = part
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{name!r} has shape {shape}, and so no axis {axis}.")
    size = shape[axis]
    if count < 1 or size % count:
        raise ValueError(f"Axis {axis} of {name!r} has length {size}, which is not {count} equal parts.")
    chosen = list(index) if isinstance(index, Sequence) else [index]
    if outside := [at for at in chosen if not 0 <= at < count]:
        raise ValueError(f"There is no part {outside[0]} among the {count} of axis {axis} of {name!r}.")
    along = np.isin(np.arange(size) // (size // count), chosen)
    return along.reshape([size if at == axis % len(shape) else 1 for at in range(len(shape))])
