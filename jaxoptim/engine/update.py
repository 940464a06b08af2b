"""The update of the parameters of one owner within a compiled step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxoptim.core.loss import Evaluation
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.static import Static


class Updated(NamedTuple):
    """The result of an update.

    Attributes:
        contents: the new contents.
        published: the results that the owner publishes, None for most.
        changes: what was added to the values, before they were rounded; None where that is not measured, or is the
            difference of the values.
    """

    contents: Contents
    published: Any = None
    changes: Any = None


class Update(Static):
    """The update of one owner's parameters, a pure function that is fixed in a compiled program.

    In all methods ``data`` are the inputs of the update (numbers, masks), and ``leaves`` the owner's arrays, which come
    without their structure because a call would spend more time on it than on a small network's arrays.
    """

    form: Static
    """The structure of the owner's arrays."""

    held: frozenset[str] = frozenset()
    """The parameters that take part in the loss, and stay as they are."""

    second_order = False
    """Whether the update needs second derivatives of the loss."""

    def contents(self, leaves: Sequence[Any]) -> Contents:
        """Return the arrays as values and state."""
        return Contents.tree_unflatten(self.form, leaves)

    def values(self, data: Any, leaves: Sequence[Any]) -> dict[str, jax.Array]:
        """Return the values of the parameters that take part, by name."""
        raise NotImplementedError

    def along(self, data: Any, leaves: Sequence[Any], grads: Any) -> tuple[Contents, Any]:
        """Update along gradients.

        Args:
            data: see above.
            leaves: see above.
            grads: a tree of gradients like the one that the user sees.

        Returns:
            The new contents, and the results that the owner publishes, None for most.
        """
        raise NotImplementedError

    def gathered(self, grads: dict[str, jax.Array]) -> Any:
        """Return gradients, given by name, in the form that :meth:`after` takes: a tree of as few arrays as can be."""
        return grads

    def after(self, data: Any, leaves: Sequence[Any], evaluation: Evaluation, measured: bool) -> Updated:
        """Update after an evaluation of the loss at the values of the parameters that take part.

        Args:
            data: see above.
            leaves: see above.
            evaluation: of the loss; its gradients have the form that :meth:`gathered` gives them.
            measured: whether the changes of the values are asked for.
        """
        raise NotImplementedError

    def unchanged(self, data: Any, published: Any) -> Any:
        """Return what a step that changes nothing publishes, in the place of what :meth:`after` has published."""
        return published
