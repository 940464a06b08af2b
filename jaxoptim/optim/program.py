"""The compiled programs of the torch-style face: all groups of an optimizer in one call.

A step compiles once for each structure: which parameters stand together, which terms the rules have, the
shapes. Numbers are data: a new learning rate is a new array of the same shape.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxoptim.core import check_gradient, step, trees
from jaxoptim.core.packing import unpacked
from jaxoptim.core.sparse import rows_of
from jaxoptim.optim.bucket import Contents, Static


class RegroupNeeded(Exception):
    """The gradients of one bucket are partly missing, or of another kind than it is laid out for."""


@jax.tree_util.register_pytree_node_class
class Rules:
    """The rules of all groups as one array of their numbers.

    Args:
        rules: one rule for each bucket, or any other pytrees whose leaves are numbers, NumPy arrays of numbers, and
            other arrays.

    Each scalar that crosses into a compiled call costs as much as a small array, so all of them go as one,
    which stays on the device until a number changes.
    """

    def __init__(self, rules: Sequence[Any]) -> None:
        leaves, treedef = jax.tree.flatten(list(rules))
        shapes = tuple(_shape_of_numbers(leaf) for leaf in leaves)
        numbers = [np.reshape(x, -1) for x, shape in zip(leaves, shapes, strict=True) if shape is not None]
        # In the dtype of JAX's floats already, which is faster than to have JAX convert it.
        self._numbers: Any = jnp.asarray(np.concatenate([*numbers, []]).astype(jnp.result_type(float)))
        self._arrays = [x for x, shape in zip(leaves, shapes, strict=True) if shape is None]
        self._form = Static(treedef, shapes)

    def each(self) -> list[Any]:
        """The rules, each with its numbers."""
        treedef, shapes = self._form.content
        leaves, arrays, position = [], iter(self._arrays), 0
        for shape in shapes:
            size = math.prod(shape or ())
            leaves.append(next(arrays) if shape is None else self._numbers[position : position + size].reshape(shape))
            position += 0 if shape is None else size
        return jax.tree.unflatten(treedef, leaves)

    def tree_flatten(self) -> tuple[Any, Static]:
        """The arrays, and how rules are made of them."""
        return (self._numbers, *self._arrays), self._form

    @classmethod
    def tree_unflatten(cls, form: Static, children: Any) -> Rules:
        """The rules of other arrays."""
        new = object.__new__(cls)
        new._form, (new._numbers, *new._arrays) = form, children
        return new


class Plan(Static):
    """How the tree that a user sees is spread over the buckets.

    Args:
        treedef: the structure of the tree.
        labels: the name of each of its leaves.
        order: the number of the parameter at each leaf; one parameter may stand at several.
        buckets: for each bucket, the numbers of its parameters, how often a step updates them, and whether it
            is packed.
    """

    def __init__(
        self,
        treedef: Any,
        labels: Sequence[str],
        order: Sequence[int],
        buckets: Sequence[tuple[tuple[int, ...], int, bool]],
    ) -> None:
        super().__init__(treedef, tuple(labels), tuple(order), tuple(buckets))
        self.treedef, self.labels, self.order, self.buckets = self.content

    def tree(self, values: Sequence[Any]) -> Any:
        """The tree of the values that the buckets hold."""
        arrays: dict[int, Any] = {}
        for (numbers, _, _), value in zip(self.buckets, values, strict=True):
            arrays.update(zip(numbers, jax.tree.leaves(unpacked(value)), strict=True))
        return jax.tree.unflatten(self.treedef, [arrays[number] for number in self.order])

    def gradients(self, grads: Any, what: str = "grads") -> list[list[Any]]:
        """The leaves of a tree of gradients, None included, for each bucket."""
        like = jax.tree.unflatten(self.treedef, self.labels)
        wanted = jax.tree.leaves(like, is_leaf=trees.is_leaf)
        given = zip(trees.leaves_like(grads, like, what), wanted, strict=True)
        leaves = [grad for grad, label in given if label is not None]
        arrays: dict[int, Any] = {}
        for number, grad in zip(self.order, leaves, strict=True):
            other = arrays.get(number)  # the gradient of a parameter that stands at several places is their sum
            arrays[number] = grad if other is None else other if grad is None else other + grad
        return [[arrays[number] for number in numbers] for numbers, _, _ in self.buckets]


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="contents")
def advance(plan: Plan, rules: Rules, contents: tuple[Contents, ...], grads: Any) -> tuple[Contents, ...]:
    """One step of all buckets from a tree of gradients.

    Errors:
        :class:`RegroupNeeded`, while tracing, if a bucket's gradients do not fit its layout; what
        ``jaxoptim.step`` raises for gradients that do not fit their parameters.
    """
    for content, leaves, bucket in zip(contents, plan.gradients(grads), plan.buckets, strict=True):
        _, times, packed = bucket
        missing = [leaf is None for leaf in leaves]
        sparse = packed and any(isinstance(leaf, BCOO) for leaf in leaves)
        if times and not all(missing) and (any(missing) or sparse or not content.has_state):
            raise RegroupNeeded
    return stepped(plan, rules, contents, checked(plan, rules, contents, grads))


def checked(plan: Plan, rules: Rules, contents: Sequence[Contents], grads: Any) -> list[Any]:
    """The gradients of each bucket, which fit its parameters."""
    gradients = []
    for content, leaves, rule in zip(contents, plan.gradients(grads), rules.each(), strict=True):
        params = jax.eval_shape(unpacked, content.values)
        gradients.append(
            OrderedDict(
                (name, grad if grad is None else check_gradient(rule, name, grad, param))
                for (name, param), grad in zip(params.items(), leaves, strict=True)
            )
        )
    return gradients


@functools.partial(jax.jit, static_argnames=("plan", "loss_fn", "has_aux"), donate_argnames="contents")
def minimize(
    plan: Plan,
    rules: Rules,
    contents: tuple[Contents, ...],
    loss_fn: Callable[..., Any],
    has_aux: bool,
    args: tuple[Any, ...],
) -> tuple[Any, tuple[Contents, ...]]:
    """The loss (and aux) at the current parameters, and one step of all buckets along its gradient."""
    loss, grads = loss_and_gradients(plan, rules, contents, loss_fn, has_aux, args)
    return loss, stepped(plan, rules, contents, grads)


def loss_and_gradients(
    plan: Plan,
    rules: Rules,
    contents: Sequence[Contents],
    loss_fn: Callable[..., Any],
    has_aux: bool,
    args: tuple[Any, ...],
) -> tuple[Any, list[Any]]:
    """The loss (and aux) at the current parameters, and its gradient for each bucket."""

    def loss_of(values: list[Any]) -> Any:
        return loss_fn(plan.tree(values), *args)

    loss, grads = jax.value_and_grad(loss_of, has_aux=has_aux)([content.values for content in contents])
    # torch and optax take the conjugate of what JAX calls the gradient; real numbers are their own.
    grads = jax.tree.map(jnp.conj, grads)
    as_rows = [rule.sparse == "required" for rule in rules.each()]
    return loss, [jax.tree.map(rows_of, g) if needed else g for g, needed in zip(grads, as_rows, strict=True)]


def stepped(
    plan: Plan, rules: Rules, contents: Sequence[Contents], grads: list[Any], given: Sequence[dict[str, Any]] = ()
) -> tuple[Contents, ...]:
    """The buckets after one step; those without any gradient as they were.

    Args:
        plan: how they are laid out.
        rules: the rule of each.
        contents: their values and state.
        grads: the gradients of each.
        given: what else the rule of each is given by name (default: nothing).
    """
    new = []
    given = given or [{}] * len(contents)
    for rule, content, gradient, (_, times, _), more in zip(
        rules.each(), contents, grads, plan.buckets, given, strict=True
    ):
        values, state = content.values, content.state
        if jax.tree.leaves(gradient) and state is not None:
            for _ in range(times):
                values, state = step(rule, values, gradient, state, **more)
        new.append(Contents(values, state))
    return tuple(new)


def _shape_of_numbers(x: Any) -> tuple[int, ...] | None:
    """The shape in which a leaf of a rule comes out of the array of numbers; None for what stays by itself."""
    if isinstance(x, float):
        return ()
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    return x.shape if isinstance(x, np.ndarray) else () if x.size == 1 else None


class LossFunctions:
    """The last loss functions of one optimizer, each of which has its compiled program.

    Args:
        method: the name of the method that they are given to.
        call: how to call it.
    """

    def __init__(self, method: str, call: str) -> None:
        self._method, self._call = method, call
        self._known: list[Any] = []

    def check(self, loss_fn: Callable[..., Any]) -> None:
        """Raise for a function that cannot name a program, warn about one that is made anew at each call."""
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
