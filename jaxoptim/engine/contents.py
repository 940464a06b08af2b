"""The arrays of a store: donated to a compiled step, and returned by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

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
        self.form = Static(treedef)

    @property
    def counts(self) -> Any:
        """The steps of each parameter."""
        return self.leaves[0]

    @property
    def cells(self) -> list[tuple[Any, Any]]:
        """The value and the slots of each cell."""
        return jax.tree.unflatten(self.form.content[0], self.leaves)[1]

    @property
    def values(self) -> list[Any]:
        """The values of the cells."""
        return [value for value, _ in self.cells]

    def tree_flatten(self) -> tuple[Sequence[Any], Static]:
        """Return the arrays and their structure."""
        return self.leaves, self.form

    @classmethod
    def tree_unflatten(cls, form: Static, leaves: Sequence[Any]) -> Contents:
        """Return contents of the same structure with other arrays."""
        new = object.__new__(cls)
        new.form, new.leaves = form, leaves
        return new
