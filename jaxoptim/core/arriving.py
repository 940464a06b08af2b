"""Batches that come one after another from an iterable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import jax

ENDED = object()
"""A sentinel returned in place of a batch when none is left."""

ANOTHER_ITERABLE = "Give an iterable that begins anew each time, such as a DataLoader, or ask for fewer steps."


def is_arriving(x: Any) -> bool:
    """Whether an argument is an iterable of batches, and not data or a setting itself."""
    is_other = isinstance(x, type | str | bytes | Sequence | Set | Mapping) or hasattr(x, "__array__")
    return isinstance(x, Iterable) and not is_other and jax.tree_util.all_leaves([x])


class Epochs:
    """An iterator over the batches of an iterable, restarted at its end where it can begin anew.

    Args:
        batches: the iterable.

    Attributes:
        count: the number of batches so far.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches, self._iterator, self.count = batches, iter(batches), 0

    def within(self) -> Any:
        """Return the next batch of this epoch, and :data:`ENDED` after its last one."""
        batch = next(self._iterator, ENDED)
        if batch is not ENDED:
            self.count += 1
        return batch

    def next(self) -> Any:
        """Return the next batch, or :data:`ENDED` if there are no more because the iterable does not begin anew."""
        batch = self.within()
        if batch is ENDED and self._iterator is not self._batches and self.count:
            self._iterator = iter(self._batches)
            batch = self.within()
        return batch


def rows_at_once(size: int) -> int:
    """Return the number of batches of so many bytes that go to the device in one call."""
    return max(1, min(_BATCHES_AT_ONCE, _BYTES_AT_ONCE // max(size, 1)))


_BATCHES_AT_ONCE, _BYTES_AT_ONCE = 32, 2**26
"""The most batches, and the most bytes, that go to the device in one call."""


def filled(rows: list[Any], count: int) -> list[Any]:
    """Pad to a fixed number of rows by repeating the last one: other shapes would compile another program."""
    return rows + rows[-1:] * (count - len(rows))
