"""A loss of named parameters, evaluated once with the derivatives that a step asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Values = Mapping[str, jax.Array]


class Loss(NamedTuple):
    """A loss function, and whether it returns an auxiliary output too; hashable, so that it names a program."""

    function: Callable[..., Any]
    has_aux: bool

    def both(self, values: Values, args: Sequence[Any]) -> tuple[Any, Any]:
        """The loss and the auxiliary output, None if there is none."""
        result = self.function(dict(values), *args)
        return result if self.has_aux else (result, None)

    def value(self, values: Values, args: Sequence[Any]) -> Any:
        """The loss alone."""
        return self.both(values, args)[0]


class Evaluation(NamedTuple):
    """A loss and its derivatives at the old values of all parameters.

    Attributes:
        loss_of: the loss at any values.
        values: the old values by name.
        loss: the loss there.
        aux: what the loss function returns besides.
        grads: its gradients by name, in torch's and optax's convention for complex parameters.
        push: the derivative of all gradients along a tangent of all values, if second derivatives were asked for.
    """

    loss_of: Callable[[Values], Any]
    values: dict[str, jax.Array]
    loss: jax.Array
    aux: Any
    grads: dict[str, jax.Array]
    push: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] | None

    def push_of(self, name: str) -> Callable[[jax.Array], jax.Array]:
        """The derivative of one parameter's gradient along its own tangents."""
        push = self.push
        if push is None:
            raise ValueError("The evaluation was made without second derivatives.")
        still = {other: jnp.zeros_like(value) for other, value in self.values.items()}
        return lambda tangent: push(still | {name: tangent})[name]

    def of(self, names: Iterable[str]) -> Evaluation:
        """The same evaluation as seen by some of the parameters, whose loss is a function of their values alone."""
        push, every = self.push, self.values
        own, grads = ({name: of[name] for name in names} for of in (every, self.grads))
        still = {other: jnp.zeros_like(value) for other, value in every.items()}
        return self._replace(
            loss_of=lambda new: self.loss_of(every | dict(new)),
            values=own,
            grads=grads,
            push=None if push is None else lambda tangents: push(still | tangents),
        )


def evaluated(loss_fn: Loss, values: dict[str, jax.Array], args: Sequence[Any], second: bool) -> Evaluation:
    """Evaluate a loss and its gradient once, and linearize the gradient if second derivatives are asked for.

    Errors:
        ``ValueError`` for a loss that is not a scalar, ``TypeError`` for one that is not real.
    """

    def repeated(values: dict[str, jax.Array]) -> tuple[Any, Any]:
        loss, aux = loss_fn.both(values, args)
        if jnp.shape(loss) != ():
            raise ValueError(f"Expected loss to be a scalar, actual shape {jnp.shape(loss)}. Sum it over the batch.")
        if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise TypeError(f"Expected loss to be a real number, actual dtype {jnp.result_type(loss)}.")
        return loss, (loss, aux)

    def gradient(values: dict[str, jax.Array]) -> tuple[Any, Any]:
        (_, outputs), grads = jax.value_and_grad(repeated, has_aux=True)(values)
        return grads, outputs

    if second:
        grads, push, (loss, aux) = jax.linearize(gradient, values, has_aux=True)
    else:
        (grads, (loss, aux)), push = gradient(values), None
    grads = jax.tree.map(jnp.conj, grads)
    return Evaluation(lambda values: loss_fn.value(values, args), values, loss, aux, grads, push)


def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is finite."""
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, finite, jnp.array(True))
