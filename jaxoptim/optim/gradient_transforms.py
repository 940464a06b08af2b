"""Transformations of optax that gradients pass before a step: one for all parameters, and those of groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxoptim.core import as_jax
from jaxoptim.core.shown import shown
from jaxoptim.optim.parameter import Parameter

KEY = "gradient_transform"
"""The keyword of constructors, and the key of groups and of state dicts."""


def check(tx: Any) -> None:
    """Raise for an object that is no transformation."""
    if tx is not None and not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(
            f"{KEY} takes a transformation of optax, such as optax.clip_by_global_norm(1.0), but got {shown(tx)}."
        )


def combined(whole: Any, of_groups: Sequence[tuple[Any, frozenset[Parameter]]], tree: Any) -> Any:
    """Join all transformations into one of the whole tree: that of all parameters first, then those of groups.

    Args:
        whole: of all parameters, None for none.
        of_groups: transformations, and whose gradients each sees.
        tree: the parameters.
    """
    masked = [optax.masked(tx, jax.tree.map(params.__contains__, tree)) for tx, params in of_groups]
    every = ([] if whole is None else [whole]) + masked
    return every[0] if len(every) == 1 else optax.chain(*every)


def saved(state: Any) -> dict[str, Any]:
    """Return the arrays of a state by their paths."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(state)[0]}


def loaded(given: Mapping[str, Any], like: Any, strict: bool) -> Any:
    """Return a state made of the result of :func:`saved`; where not strict, missing arrays stay as they are.

    Raises:
        ``ValueError`` for other paths or shapes.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    here = {jax.tree_util.keystr(path): x for path, x in paths}
    if strict and (differing := sorted(here.keys() ^ given.keys())):
        has, lacks = ("lacks", "has") if differing[0] in here else ("has", "lacks")
        raise ValueError(
            f"The state of {KEY} in the state dict {has} {differing[0]!r}, which that of the optimizer {lacks}. Give "
            "the constructor the same transformation, or load with strict=False, where it begins afresh."
        )
    new = []
    for name, x in here.items():
        value = as_jax(given[name]) if name in given else x
        if value.shape != jnp.shape(x):
            raise ValueError(
                f"The state of {KEY} in the state dict has {name!r} of shape {value.shape}, but that of the optimizer "
                f"has {jnp.shape(x)}. Load the state of the same transformation of the same parameters."
            )
        new.append(value)
    return jax.tree.unflatten(treedef, new)
