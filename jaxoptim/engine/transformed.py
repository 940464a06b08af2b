"""A transformation of the gradients in front of an update, with a state of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax
from jax.experimental.sparse import BCOO

from jaxoptim.core import trees
from jaxoptim.core.loss import Evaluation
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.layout import Layout
from jaxoptim.engine.update import Update, Updated


class TransformedUpdate(Update):
    """An update along gradients that a transformation of optax has changed.

    Its data are those of the update itself and the state of the transformation, which is published with what the update
    publishes. The transformation sees a tree like that of the user, with zero for a gradient that is missing; a
    parameter without a gradient stays nevertheless.

    Args:
        update: the update itself.
        layout: the structure of the tree.
        tx: the transformation.
    """

    def __init__(self, update: Update, layout: Layout, tx: Any) -> None:
        self.update, self.layout, self.tx = update, layout, tx
        self.form, self.held, self.second_order = update.form, update.held, update.second_order

    def values(self, data: Any, leaves: Sequence[Any]) -> dict[str, Any]:
        """Return the values of the parameters that take part, by name."""
        return self.update.values(data[0], leaves)

    def along(self, data: Any, leaves: Sequence[Any], grads: Any) -> tuple[Contents, Any]:
        """Update along gradients."""
        new, state = self._transformed(data, leaves, self.layout.leaves(grads))
        contents, published = self.update.along(data[0], leaves, self.layout.once(new))
        return contents, (published, state)

    def after(self, data: Any, leaves: Sequence[Any], evaluation: Evaluation, measured: bool) -> Updated:
        """Update after an evaluation of the loss, whose gradients come by name."""
        names = [struct.name for struct in self.layout.structs]
        new, state = self._transformed(data, leaves, [evaluation.grads.get(name) for name in names])
        grads = {name: grad for name, grad in zip(names, new, strict=True) if grad is not None}
        evaluation = evaluation._replace(grads=self.update.gathered(grads))
        updated = self.update.after(data[0], leaves, evaluation, measured)
        return updated._replace(published=(updated.published, state))

    def unchanged(self, data: Any, published: Any) -> Any:
        """Return what a step that changes nothing publishes."""
        return self.update.unchanged(data[0], published[0]), data[1]

    def _transformed(self, data: Any, leaves: Sequence[Any], grads: Sequence[Any]) -> tuple[list[Any], Any]:
        """Return the gradient of each parameter after the transformation, and its new state."""
        structs, values = self.layout.structs, self.update.values(data[0], leaves)
        for struct, grad in zip(structs, grads, strict=True):
            if isinstance(grad, BCOO):
                raise TypeError(
                    f"gradient_transform takes dense gradients, but that of {struct.name!r} is sparse. Leave "
                    "gradient_transform out, or give grad.todense()."
                )
            if grad is not None:
                trees.check_shape("gradient", struct.name, grad, struct.like)
        filled = [jnp.zeros_like(values[x.name]) if g is None else g for x, g in zip(structs, grads, strict=True)]
        params = self.layout.once([values[struct.name] for struct in structs])
        updates, state = optax.with_extra_args_support(self.tx).update(self.layout.once(filled), data[1], params)
        new = self.layout.leaves(updates, "what gradient_transform returns")
        pairs = zip(grads, new, strict=True)
        return [None if old is None else jnp.asarray(x, jnp.result_type(old)) for old, x in pairs], state


class Transform:
    """A transformation of all gradients of an optimizer, between its steps.

    Args:
        tx: the transformation.
        state: its state.
    """

    def __init__(self, tx: Any, state: Any) -> None:
        self.tx, self.state = tx, state
