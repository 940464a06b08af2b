"""Evaluation of a loss, once, with the derivatives that a step asks for."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Values = Mapping[str, jax.Array]


class Loss(NamedTuple):
    """A hashable loss function: the static key of a compiled program.

    Attributes:
        function: the function as given.
        has_aux: whether it returns an auxiliary output too.
        keywords: the names of its last arguments, which it takes by keyword.
        static: arguments by keyword that are fixed in the program.
        carries: whether its first argument comes back, for the next evaluation: its auxiliary output is
            ``(aux, first argument)``.
        num_whole: how many of its first arguments are no part of the batch: each micro-batch gets them whole.
    """

    function: Callable[..., Any]
    has_aux: bool
    keywords: tuple[str, ...] = ()
    static: tuple[tuple[str, Any], ...] = ()
    carries: bool = False
    num_whole: int = 0

    def __call__(self, values: Values, *args: Any) -> Any:
        """Call the function."""
        positional = args[: len(args) - len(self.keywords)]
        named = dict(zip(self.keywords, args[len(positional) :], strict=True))
        return self.function(values, *positional, **named, **dict(self.static))

    def both(self, values: Values, args: Sequence[Any]) -> tuple[Any, Any]:
        """Return the loss and the auxiliary output, None if there is none."""
        result = self(values, *args)
        return loss_and_aux(result) if self.has_aux else (result, None)

    def of(self, view: Callable[[Any], Any]) -> Loss:
        """Return the loss as a function of other values, given the function that maps them to those it takes."""
        return self._replace(function=lambda values, *args: self(view(values), *args), keywords=(), static=())

    def value(self, values: Values, args: Sequence[Any]) -> Any:
        """Return the loss alone."""
        return self.both(values, args)[0]


class Evaluation(NamedTuple):
    """A loss and its derivatives at the old values of all parameters.

    Attributes:
        loss_of: the loss as a function of the values.
        values: the old values, by name if parts of them are asked for.
        loss: the loss there.
        aux: the auxiliary output of the loss function.
        grads: its gradients by name, in torch's and optax's convention for complex parameters.
        push: the derivative of all gradients along a tangent of all values, if second derivatives were asked for.
    """

    loss_of: Callable[[Values], Any]
    values: Any
    loss: jax.Array
    aux: Any
    grads: Any
    push: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] | None

    def push_of(self, name: str) -> Callable[[jax.Array], jax.Array]:
        """Return the map from tangents of one parameter to the derivative of its gradient, a block of the Hessian."""
        push = self.push
        if push is None:
            raise ValueError("The evaluation was made without second derivatives.")
        still = {other: jnp.zeros_like(value) for other, value in self.values.items()}
        return lambda tangent: push(still | {name: tangent})[name]

    def of(self, names: Iterable[str]) -> Evaluation:
        """Return the evaluation as seen by some of the parameters, whose loss is a function of their values alone."""
        push, every = self.push, self.values
        own, grads = ({name: of[name] for name in names} for of in (every, self.grads))
        still = {other: jnp.zeros_like(value) for other, value in every.items()}
        return self._replace(
            loss_of=lambda new: self.loss_of(every | dict(new)),
            values=own,
            grads=grads,
            push=None if push is None else lambda tangents: push(still | tangents),
        )


def loss_and_aux(result: Any) -> tuple[Any, Any]:
    """Unpack the ``(loss, aux)`` that a function with an auxiliary output returned."""
    if not (isinstance(result, tuple | list) and len(result) == 2):
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else f"a {type(result).__name__}"
        got = "the loss alone" if isinstance(result, jax.Array | float) else got
        raise TypeError(
            f"has_aux=True expects (loss, aux), but the function returns {got}. Return both, or leave has_aux out."
        )
    return result[0], result[1]


class NotAScalar(ValueError, TypeError):
    """A loss that is not a scalar: a ``ValueError`` to some parent libraries, a ``TypeError`` to JAX."""


def evaluated(
    loss_fn: Loss, values: Any, args: Sequence[Any], second: bool = False, scale: jax.Array | None = None
) -> Evaluation:
    """Evaluate a loss and its gradient once, and linearize the gradient if second derivatives are asked for.

    Args:
        loss_fn: the loss.
        values: a tree of arrays; a dict by name, if a part of it is to be asked for.
        args: further arguments of the loss.
        second: whether second derivatives are asked for (default False).
        scale: a factor of the gradient, which the loss has when it is differentiated (default None: 1).

    Returns:
        The evaluation.

    Raises:
        ``ValueError`` for a loss that is not a scalar, ``TypeError`` for one that is not real.
    """

    def repeated(values: Any) -> tuple[Any, Any]:
        # Variables of nnx can be changed only by the trace in which they were made.
        loss, aux = loss_fn.both(values, jax.tree.map(lambda x: x, args))
        if isinstance(loss, tuple | list | dict):
            raise TypeError(
                f"Expected loss to be a scalar, but the function returns a {type(loss).__name__} of {len(loss)}. "
                "Return the loss alone, or (loss, aux) and say has_aux=True."
            )
        if jnp.shape(loss) != ():
            raise NotAScalar(f"Expected loss to be a scalar, actual shape {jnp.shape(loss)}. Sum it over the batch.")
        if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise TypeError(f"Expected loss to be a real number, actual dtype {jnp.result_type(loss)}.")
        return loss if scale is None else loss * scale.astype(jnp.result_type(loss)), (loss, aux)

    def gradient(values: Any) -> tuple[Any, Any]:
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


class LossFunctions:
    """The loss functions last given to one optimizer, each with a compiled program of its own.

    Args:
        method: the name of the method that they are given to.
        call: how to call it.
    """

    def __init__(self, method: str, call: str) -> None:
        self._method, self._call = method, call
        # The last eight functions; they live as long as the optimizer.
        self._known: list[Any] = []

    def check(self, loss_fn: Callable[..., Any]) -> None:
        """Raise for a function that cannot be a key of a program; warn of one that is made anew at each call."""
        try:
            hash(loss_fn)
        except TypeError:
            raise TypeError(
                f"{self._method} compiles once for each loss function and so must hash it, but "
                f"{type(loss_fn).__name__} is not hashable. Wrap it in a function, and pass arrays as arguments."
            ) from None
        code = getattr(loss_fn, "__code__", None)
        if code is None or any(known is loss_fn for known in self._known):
            return
        if sum(known.__code__ is code for known in self._known) == 3:
            warnings.warn(
                f"{self._method} got a new function {loss_fn.__name__!r} at each of four calls, and compiles every "
                f"one. Define it once, and pass what changes as arguments: {self._call}.",
                stacklevel=4,
            )
        self._known = [*self._known, loss_fn][-8:]
