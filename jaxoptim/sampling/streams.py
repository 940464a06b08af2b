"""Data too large for the device: batches that arrive one after another, and batches that a function makes."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core.arriving import ANOTHER_ITERABLE, ENDED, Epochs, filled, is_arriving, rows_at_once
from jaxoptim.core.batches import batch_at
from jaxoptim.core.noise import fold_in
from jaxoptim.core.numerics import as_jax
from jaxoptim.core.signatures import mismatch
from jaxoptim.sampling.data import check_data, compiled

NUM_REFERENCES = 32
"""The number of batches that stand for all data where these cannot be counted."""


# What a compiled program is given in the place of data.


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Made:
    """Batches that a function of a key makes on the device."""

    make: Callable[[jax.Array], Any]

    def at(self, step: Any, key: jax.Array) -> Any:
        """The batch of a step."""
        return self.make(fold_in(key, step))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrived:
    """Batches of some steps, which have come from the host.

    Attributes:
        batches: arrays ``(steps, chains, ...)``, or ``(steps, 1, ...)`` if all chains have the same.
        first: the step of the first row.
        chain: the number of the chain that it is given to.
    """

    batches: Any
    first: Any
    chain: Any

    def at(self, step: Any, key: jax.Array) -> Any:
        """The batch of a step."""

        def of(x: Any) -> Any:
            # A constant place where all have one batch, which vmap then does not repeat for each chain.
            place = 0 if x.shape[1] == 1 else self.chain % x.shape[1]
            return x.at[step - self.first, place].get(mode="promise_in_bounds")

        return jax.tree.map(of, self.batches)


def batch_of(data: Any, step: Any, key: jax.Array, batch_size: int | None) -> Any:
    """Return the batch of a step, from data of any kind."""
    return data.at(step, key) if isinstance(data, Made | Arrived) else batch_at(step, key, data, batch_size)


def of_chain(data: Any, number: Any) -> Any:
    """Return the data for the chain of this number."""
    return dataclasses.replace(data, chain=number) if isinstance(data, Arrived) else data


# The host's side of it.


class Stream(Protocol):
    """The batches of a run, in place of an array of data.

    Attributes:
        kind: what it is, for the description of a run.
        example: a batch, or what stands for its shapes.
        at_start: what chains are given before their first step.
    """

    kind: str
    example: Any
    at_start: Any

    def references(self) -> Iterator[Any]:
        """The batches that stand for all data, one in memory at a time where they can be made again."""

    def ahead(self, most: int) -> int:
        """Return the number of next steps that can be one piece of a run, at most ``most``."""

    def skip(self, steps: int) -> None:
        """Skip the batches of steps that have been made."""

    def given(self, start: int, stop: int) -> Any:
        """Return the inputs of the steps from ``start`` to ``stop``."""


class MadeStream:
    """Batches that a function makes.

    Args:
        make: ``make(key)`` returns a batch.
        key: that of the references.
        num_references: how many batches stand for all data.
    """

    kind = "a function of keys"

    def __init__(self, make: Callable[[jax.Array], Any], key: jax.Array, num_references: int) -> None:
        _check_function(make)

        def checked(key: jax.Array) -> Any:
            batch = make(key)
            check_data(batch, "what data(key) returns")
            return jax.tree.map(as_jax, batch)

        with compiled("data"):
            self.example = jax.eval_shape(checked, key)
        self.at_start = Made(make)
        self._make, self._key, self._num_references = make, key, num_references

    def references(self) -> Iterator[Any]:
        """Batches of keys of their own, made one at a time."""
        make = jax.jit(self._make)
        return (make(fold_in(self._key, number)) for number in range(self._num_references))

    def ahead(self, most: int) -> int:
        """Return ``most``: all of the steps."""
        return most

    def skip(self, steps: int) -> None:
        """Do nothing: each batch follows from its key."""

    def given(self, start: int, stop: int) -> Any:
        """Return the function."""
        return self.at_start


class ArrivingStream:
    """Batches that come one after another.

    Step t of chain c is given batch number ``t * width + c``, or number t where the width is 1.

    Args:
        batches: the iterable.
        width: how many batches a step takes.
        num_references: how many of the first batches stand for all data, those of one epoch at the most.

    Raises:
        ``ValueError`` for an iterable that is empty; see :func:`~jaxoptim.sampling.data.check_data`.
    """

    kind = "an iterable of batches"

    def __init__(self, batches: Iterable[Any], width: int, num_references: int) -> None:
        self._epochs, self._width, self._ready = Epochs(batches), width, deque[Any]()
        first = self._epochs.within()
        if first is ENDED:
            raise ValueError("data is an iterable without batches. Give one that has some, and begin it anew.")
        check_data(first, "a batch of data")
        self.example = jax.tree.map(_on_host, first)
        self._ready.append(self.example)
        while len(self._ready) < num_references and (batch := self._epochs.within()) is not ENDED:
            self._ready.append(self._alike(batch))
        self._references = list(self._ready)
        self._rows = rows_at_once(width * sum(x.nbytes for x in jax.tree.leaves(self.example)))
        one = jax.tree.map(lambda x: x[None, None], self.example)
        self.at_start = Arrived(one, np.int32(0), np.int32(0))

    def references(self) -> Iterator[Any]:
        """Return the first batches."""
        return (jax.tree.map(jnp.asarray, batch) for batch in self._references)

    def ahead(self, most: int) -> int:
        """Return the number of steps whose batches go to the device at once."""
        return min(most, self._rows)

    def skip(self, steps: int) -> None:
        """Take the batches of these steps from the iterator."""
        for _ in range(steps * self._width):
            self._next()

    def given(self, start: int, stop: int) -> Any:
        """Return the batches of these steps, stacked on the host."""
        batches = filled([self._next() for _ in range((stop - start) * self._width)], self._rows * self._width)

        def stacked(*rows: Any) -> np.ndarray:
            return np.stack(rows).reshape(self._rows, self._width, *rows[0].shape)

        return Arrived(jax.tree.map(stacked, *batches), np.int32(start), np.int32(0))

    def _next(self) -> Any:
        """The next batch."""
        if self._ready:
            return self._ready.popleft()
        batch = self._epochs.next()
        if batch is ENDED:
            raise ValueError(
                f"The batches of data ended after {self._epochs.count}, before the last step, and each step takes "
                f"{self._width}. {ANOTHER_ITERABLE}"
            )
        return self._alike(batch)

    def _alike(self, batch: Any) -> Any:
        """A batch on the host; raises for another tree, or other shapes, than the first one's."""
        structure: Any = jax.tree.structure(self.example)
        if jax.tree.structure(batch) != structure:
            raise ValueError(
                f"Batch number {self._epochs.count} of data is another tree than the first one. Give batches of one "
                "structure."
            )
        batch = jax.tree.map(_on_host, batch)
        here, there = ([(x.shape, x.dtype) for x in jax.tree.leaves(of)] for of in (batch, self.example))
        for mine, first in zip(here, there, strict=True):
            if mine != first:
                raise ValueError(
                    f"Batch number {self._epochs.count} of data has shape {mine[0]} and dtype {mine[1]}, but the first "
                    f"one {first[0]} and {first[1]}. Give batches of one shape (drop_last=True of a loader)."
                )
        return batch


def stream_of(data: Any, key: jax.Array, width: int, num_references: int, batch_size: Any) -> Stream | None:
    """Data as a stream; None for arrays.

    Args:
        data: as :func:`~jaxoptim.sampling.sample` takes them.
        key: that of the references of a function.
        width: how many batches a step takes, if they come one after another.
        num_references: how many batches stand for all data.
        batch_size: as given; a stream has a size of its own.

    Raises:
        ``TypeError`` for a ``batch_size`` of a stream, and for what is no data.
    """
    is_batches = is_arriving(data) and not hasattr(data, "__getitem__")  # else it gives examples
    is_function = callable(data) and not isinstance(data, type) and jax.tree_util.all_leaves([data]) and not is_batches
    if not is_batches and not is_function:
        return None
    if batch_size is not None:
        given = "an iterable of batches" if is_batches else "a function that makes batches"
        raise TypeError(f"data is {given}, so batch_size is None, but got {batch_size!r:.80}. Make them of that size.")
    return ArrivingStream(data, width, num_references) if is_batches else MadeStream(data, key, num_references)


def _on_host(x: Any) -> np.ndarray:
    """Return an array on the host in the dtype that JAX would give it."""
    return np.asarray(as_jax(x))


def _check_function(make: Callable[..., Any]) -> None:
    """Raise for a function that cannot be called with a key, or cannot name a program."""
    if (error := mismatch(make, 1)) is not None:
        raise TypeError(
            f"data is a function, so it is called as data(key), but its signature is another: {error}. Take one typed "
            "key, and return a batch."
        )
    try:
        hash(make)
    except TypeError:
        raise TypeError(
            f"data is a function that names a compiled program, but {type(make).__name__} is not hashable. Wrap it in "
            "a function."
        ) from None
