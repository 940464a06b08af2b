"""The data of a run's steps: all data, batches drawn on the device, or batches that arrive one after another."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxoptim.core import as_jax
from jaxoptim.core.arriving import ANOTHER_ITERABLE, ENDED, Epochs, filled, is_arriving, rows_at_once
from jaxoptim.core.batches import batch_at, check_batch_size
from jaxoptim.engine.loops import Turn
from jaxoptim.pyro.infer.arguments import Arguments


class SameData(Turn):
    """The turn of steps that are given the same data.

    Args:
        skips: whether a step that is not finite leaves the mutable state as it was.
    """

    def __init__(self, skips: bool) -> None:
        self.skips = skips

    def arguments(self, at: Any, carried: Any, given: Any) -> tuple[Any, ...]:
        """The key, the mutable state and the data."""
        return *carried, self.traced(at, given)

    def following(self, value: jax.Array, aux: Any, carried: Any) -> Any:
        """The next key and mutable state."""
        mutable, key = aux
        if self.skips:
            mutable = kept_if_finite(value, mutable, carried[1])
        return key, mutable

    def traced(self, at: Any, given: Any) -> Any:
        """The data of a step."""
        return given


class DrawnBatches(SameData):
    """The turn of steps that draw batches of data on the device; see :func:`~jaxoptim.core.batches.batch_at`.

    Args:
        skips: see :class:`SameData`.
        place: which of the arguments' arrays are data.
        batch_size: of each step.
    """

    def __init__(self, skips: bool, place: tuple[int, int], batch_size: int) -> None:
        super().__init__(skips)
        self.place, self.batch_size = place, batch_size

    def traced(self, at: Any, given: Any) -> Any:
        """The data of a step, those of its batch in their place."""
        traced, data, key, first = given
        return put(traced, self.place, batch_at(first + at, key, data, self.batch_size))


class StackedBatches(SameData):
    """The turn of steps whose batches come stacked.

    Args:
        skips: see :class:`SameData`.
        place: which of the arguments' arrays are those of the batch.
    """

    def __init__(self, skips: bool, place: tuple[int, int]) -> None:
        super().__init__(skips)
        self.place = place

    def traced(self, at: Any, given: Any) -> Any:
        """The data of a step, those of its batch in their place."""
        traced, batches = given
        return put(traced, self.place, [x[at] for x in batches])


def put(traced: Sequence[Any], place: tuple[int, int], batch: Sequence[Any]) -> list[Any]:
    """Return the arrays of all arguments, with those in this place replaced."""
    return [*traced[: place[0]], *batch, *traced[place[1] :]]


@jax.jit
def kept_if_finite(loss: jax.Array, new: Any, old: Any) -> Any:
    """New state, or the old one after a step that was skipped."""
    return jax.tree.map(lambda n, o: jnp.where(jnp.isfinite(loss), n, o), new, old)


class Data:
    """The data of a run's steps; here the same at each step.

    Args:
        args: positional arguments of model and guide.
        kwargs: keyword arguments of both.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments = Arguments(args, kwargs)

    def ahead(self, most: int) -> int:
        """Return the number of next steps that run one program, at most ``most``."""
        return most

    def arguments(self) -> Arguments:
        """The arguments of the next step."""
        return self._arguments

    def turn(self, skips: bool) -> Turn:
        """Return the rule by which each of the next steps follows from the one before."""
        return SameData(skips)

    def given(self) -> Any:
        """Return the inputs that all of the next steps share."""
        return self._arguments.traced

    def advance(self, count: int) -> None:
        """Advance to the data after so many steps."""


class Drawn(Data):
    """Batches that are drawn on the device, shuffled anew in each epoch.

    Args:
        args: positional arguments of model and guide; the first is the data, if no keyword is called ``data``.
        kwargs: keyword arguments of both.
        batch_size: of each step.
        draws: what has been drawn from them so far.

    Raises:
        ``TypeError`` without data; ``ValueError`` for data of different lengths, and a batch that they do not have.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int, draws: Draws) -> None:
        if "data" not in kwargs and not args:
            raise TypeError(
                f"batch_size is {batch_size}, but there are no data. Give them as the first argument or as data=."
            )
        self._key: int | str = "data" if "data" in kwargs else 0
        data = kwargs["data"] if "data" in kwargs else args[0]
        check_batch_size(batch_size, data)
        self._args, self._kwargs, self._batch_size, self.draws = args, kwargs, batch_size, draws
        self._leaves, self._treedef = jax.tree.flatten(jax.tree.map(as_jax, data))
        self._next: Arguments | None = None  # drawn once for each call

    def arguments(self) -> Arguments:
        """The arguments of the next step."""
        if self._next is None:
            batch = _drawn(self.draws.drawn, self.draws.key, self._leaves, self._batch_size)
            value = jax.tree.unflatten(self._treedef, batch)
            self._next = with_value(self._args, self._kwargs, self._key, value)
        return self._next

    def turn(self, skips: bool) -> Turn:
        """Return the rule by which each of the next steps follows from the one before."""
        return DrawnBatches(skips, self.arguments().span(self._key), self._batch_size)

    def given(self) -> Any:
        """Return the inputs that all of the next steps share."""
        return self.arguments().traced, self._leaves, self.draws.key, self.draws.drawn

    def advance(self, count: int) -> None:
        """Advance to the batches after so many steps."""
        self.draws, self._next = self.draws._replace(drawn=self.draws.drawn + count), None


class Draws(NamedTuple):
    """The state that determines which batches are drawn next.

    Attributes:
        key: shuffles; it stays.
        drawn: so many batches were.
    """

    key: jax.Array
    drawn: int = 0


class Arriving(Data):
    """Batches that come one after another.

    Args:
        args: positional arguments of model and guide.
        kwargs: keyword arguments of both.
        key: the number or the name of the argument that is an iterable of batches.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str) -> None:
        self._args, self._kwargs, self._key = args, kwargs, key
        self._epochs = Epochs(args[key] if isinstance(key, int) else kwargs[key])
        self._ready = deque[Arguments]()
        self._error: BaseException | None = None

    def ahead(self, most: int) -> int:
        """Return the number of next steps that run one program, at most ``most``."""
        while self._error is None and len(self._ready) < min(most, self._rows()):
            try:
                self._ready.append(with_value(self._args, self._kwargs, self._key, self._next()))
            except BaseException as error:  # Ctrl-C too: the batches that came before are not lost
                self._error = error
        if self._error is not None and not self._ready:
            raise self._error
        return len(self._alike())

    def _alike(self) -> list[Arguments]:
        """Return the next batches that have arrived, up to the first that runs another program."""
        program = self._ready[0].program
        return list(itertools.takewhile(lambda of: of.program == program, self._ready))

    def arguments(self) -> Arguments:
        """The arguments of the next step."""
        return self._ready[0]

    def turn(self, skips: bool) -> Turn:
        """Return the rule by which each of the next steps follows from the one before."""
        return StackedBatches(skips, self._ready[0].span(self._key))

    def given(self) -> Any:
        """Return the inputs that all of the next steps share."""
        first, (begin, end) = self._ready[0], self._ready[0].span(self._key)
        rows = [of.traced[begin:end] for of in self._alike()]
        return first.traced, _stacked(filled(rows, self._rows()))

    def advance(self, count: int) -> None:
        """Advance to the batches after so many steps."""
        for _ in range(count):
            self._ready.popleft()

    def _rows(self) -> int:
        """Return the number of batches to send to the device in one call; one while their size is not known."""
        if not self._ready:
            return 1
        begin, end = self._ready[0].span(self._key)
        return rows_at_once(sum(x.nbytes for x in map(jnp.asarray, self._ready[0].traced[begin:end])))

    def _next(self) -> Any:
        """The next batch, from the beginning again where that can be."""
        batch = self._epochs.next()
        if batch is ENDED:
            raise ValueError(
                f"The batches ended after {self._epochs.count}, before the last step; the steps so far are made. "
                + ANOTHER_ITERABLE
            )
        return batch


def data_of(args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int | None, draws: Draws) -> Data:
    """Return the data of a run's steps.

    Args:
        args: positional arguments of model and guide.
        kwargs: keyword arguments of both.
        batch_size: how many of the data each step is given; None for all.
        draws: which of them the next step would be given.

    Raises:
        ``TypeError`` for two iterables of batches, or one and a ``batch_size``; see :class:`Drawn`.
    """
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    arriving = [key for key, x in given if is_arriving(x)]
    if not arriving:
        return Data(args, kwargs) if batch_size is None else Drawn(args, kwargs, batch_size, draws)
    if len(arriving) > 1 or batch_size is not None:
        other = "another one" if len(arriving) > 1 else f"batch_size={batch_size}"
        raise TypeError(
            f"The argument {arriving[0]!r} is an iterable of batches, so a run takes no {other}. Zip iterables into "
            "one, and let it give batches of the size that you want."
        )
    return Arriving(args, kwargs, arriving[0])


def with_value(args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, value: Any) -> Arguments:
    """The arguments with another value of one of them."""
    if isinstance(key, int):
        return Arguments((*args[:key], value, *args[key + 1 :]), kwargs)
    return Arguments(args, kwargs | {key: value})


@functools.partial(jax.jit, static_argnames="batch_size")
def _drawn(step: Any, key: jax.Array, leaves: list[jax.Array], batch_size: int) -> list[jax.Array]:
    return batch_at(step, key, leaves, batch_size)


@jax.jit
def _stacked(rows: list[list[Any]]) -> list[jax.Array]:
    return [jnp.stack(column) for column in zip(*rows, strict=True)]
