"""Batches that come one after another from an iterable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import jax

ENDED = object()
"""What stands for a batch where there is none left."""

ANOTHER_ITERABLE = "Give an iterable that begins anew each time, such as a DataLoader, or ask for fewer steps."


def is_arriving(x: Any) -> bool:
    """Whether something gives one batch after another, and is no data or setting itself."""
    is_other = isinstance(x, type | str | bytes | Sequence | Set | Mapping) or hasattr(x, "__array__")
    return isinstance(x, Iterable) and not is_other and jax.tree_util.all_leaves([x])


class Epochs:
    """The batches of an iterable, from its beginning again where it can begin anew.

    Args:
        batches: the iterable.

    Attributes:
        count: how many have come.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches, self._iterator, self.count = batches, iter(batches), 0

    def within(self) -> Any:
        """The next batch of this epoch, :data:`ENDED` behind its last one."""
        batch = next(self._iterator, ENDED)
        if batch is not ENDED:
            self.count += 1
        return batch

    def next(self) -> Any:
        """The next batch; :data:`ENDED` where there are no more, because the iterable does not begin anew."""
        batch = self.within()
        if batch is ENDED and self._iterator is not self._batches and self.count:
            self._iterator = iter(self._batches)
            batch = self.within()
        return batch


def rows_at_once(size: int) -> int:
    """How many batches of so many bytes go to the device in one call."""
    return max(1, min(_BATCHES_AT_ONCE, _BYTES_AT_ONCE // max(size, 1)))


_BATCHES_AT_ONCE, _BYTES_AT_ONCE = 32, 2**26
"""So many batches go to the device in one call, if they are no larger than that together."""


def filled(rows: list[Any], count: int) -> list[Any]:
    """As many rows always, the last one again and again: other shapes would be another program."""
    return rows + rows[-1:] * (count - len(rows))
