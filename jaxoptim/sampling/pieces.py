"""Traces that leave the device between the pieces of a run."""

from __future__ import annotations

import abc
from typing import Any

import jax
import numpy as np

from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.placement import readable
from jaxoptim.sampling.options import RunOptions

BYTES_ON_DEVICE = 2**26
"""The most bytes of traces on the device, if that is more than one draw; longer ones leave it in pieces."""


class Pieces(abc.ABC):
    """The store of a run's traces, of which the device holds one piece.

    Args:
        options: the keywords of the run.
        room: how many draws the device has room for.
        step: where the run stands.

    Attributes:
        taken: how many draws are here, and no more on the device.
    """

    def __init__(self, options: RunOptions, room: int, step: int) -> None:
        self._options, self._room = options, room
        self.taken = options.draws_at(step)

    def limit(self) -> int:
        """The step at which the room on the device is full."""
        return self._options.steps_of(self.taken + self._room)

    def take(self, step: int, traces: Any) -> None:
        """Take the draws that are whole at a step and still on the device."""
        count = self._options.draws_at(step) - self.taken
        if count:
            block = jax.tree.map(lambda x: np.asarray(x)[:, :count], readable(traces))
            with Uninterrupted():  # until it is known what is here
                self._append(block)
                self.taken += count

    @abc.abstractmethod
    def _append(self, block: Any) -> None:
        """Append draws to those already taken."""

    @abc.abstractmethod
    def traces(self, like: dict[str, Any]) -> dict[str, Any]:
        """Return all draws, in the form of the device's traces but for their number."""

    @abc.abstractmethod
    def loss(self) -> np.ndarray:
        """The loss at the draws that are taken, ``(chains, draws)``."""

    @abc.abstractmethod
    def saved_with_chains(self, traces: Any) -> Any:
        """Return the traces to save in the file of the chains; the rest is on the device."""

    def finish(self, found: dict[str, Any]) -> None:  # noqa: B027 - most have nothing to do
        """Add the results of a finished run."""


class Host(Pieces):
    """The traces of a run in host memory, allocated for all draws at the start.

    Args:
        options: the keywords of the run.
        room: how many draws the device has room for.
        step: where the run stands.
        traces: the draws until then, or what is like them where there are none.
    """

    def __init__(self, options: RunOptions, room: int, step: int, traces: Any) -> None:
        super().__init__(options, room, 0)

        def empty(x: Any) -> np.ndarray:
            return np.empty((len(x), options.num_draws, *x.shape[2:]), x.dtype)

        self._whole = jax.tree.map(empty, traces)
        self.take(step, traces)

    def _append(self, block: Any) -> None:
        for whole, part in zip(jax.tree.leaves(self._whole), jax.tree.leaves(block), strict=True):
            whole[:, self.taken : self.taken + part.shape[1]] = part

    def traces(self, like: Any = None) -> Any:
        """Return all draws."""
        return jax.tree.map(lambda whole: whole[:, : self.taken], self._whole)

    def loss(self) -> np.ndarray:
        """The loss at the draws that are taken."""
        return self.traces()["loss"]

    def saved_with_chains(self, traces: Any) -> Any:
        """Return all draws."""
        return self.traces()


def room_of_a_piece(draws: int, traces: Any) -> int:
    """Return the number of draws that the device has room for.

    Args:
        draws: how many there are to be.
        traces: traces of so many.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(traces)) // draws
    return min(draws, max(1, BYTES_ON_DEVICE // size))
