"""The arrays of a store: what a compiled step takes, donated, and returns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.engine.static import Static


@jax.tree_util.register_pytree_node_class
class Contents:
    """The counts of steps, and the values and slots of each cell.

    It is a pytree that is flat already, because a step would spend more time on its structure than on a small
    network's arrays.

    Args:
        counts: the steps of each parameter, an int32 vector.
        cells: for each cell its value and a dict of its slots, None before its first update.
    """

    def __init__(self, counts: Any, cells: Sequence[tuple[Any, Any]]) -> None:
        leaves, treedef = jax.tree.flatten((counts, [tuple(cell) for cell in cells]))
        self.leaves: Sequence[Any] = leaves
        self._form = Static(treedef)

    @property
    def counts(self) -> Any:
        """The steps of each parameter."""
        return self.leaves[0]

    @property
    def cells(self) -> list[tuple[Any, Any]]:
        """For each cell its value and its slots."""
        return jax.tree.unflatten(self._form.content[0], self.leaves)[1]

    def tree_flatten(self) -> tuple[Sequence[Any], Static]:
        """The arrays and their structure."""
        return self.leaves, self._form

    @classmethod
    def tree_unflatten(cls, form: Static, leaves: Sequence[Any]) -> Contents:
        """Other arrays in the same structure."""
        new = object.__new__(cls)
        new._form, new.leaves = form, leaves
        return new

    def own(self) -> Contents:
        """The same with copies of the arrays that somebody else holds too, because a step donates ours.

        On CPUs a copy that is donated costs less than a result in fresh memory.
        """
        held = [count > _OURS for count in _references(self.leaves)]
        if not any(held):
            return self
        copies = [jnp.copy(x) if other else x for x, other in zip(self.leaves, held, strict=True)]
        return Contents.tree_unflatten(self._form, copies)


def _references(arrays: Sequence[Any]) -> list[int]:
    """How many references there are to each array."""
    return [sys.getrefcount(x) for x in arrays]


_OURS = _references((object(),))[0]
"""What :func:`_references` counts for an object that only a sequence holds."""
