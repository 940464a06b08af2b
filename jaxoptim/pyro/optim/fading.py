"""Options that decay at every step, of many parameters at once."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxoptim.engine.loops import CAPACITY
from jaxoptim.engine.settings import Spots
from jaxoptim.engine.slabs import Slabs
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.optim.member import Member

_NUMBERS, _FEWEST = 2**20, 16
"""The most numbers in the settings of the steps of one call, and the fewest steps all the same."""


class Faded(NamedTuple):
    """Options that have decayed for some steps.

    Attributes:
        num_steps: for how many.
        back: takes so many steps back.
        series: the settings of each step, as :meth:`Settings.series` has them; None where they are those of the slabs.
        most: so many steps one call makes at most.
    """

    num_steps: int = 0
    back: Callable[[int], None] = lambda count: None
    series: Any = None
    most: int = CAPACITY


class Fading:
    """The cache of options that decay, valid until one is written or a setting is read elsewhere.

    The numbers are Python's to the last bit: NumPy multiplies as it does. The settings of the parameters stay behind,
    and catch up at the end.

    Args:
        params: the parameters of a step.
        members: those of them whose options decay.
        slabs: where all of them are.
        spots: where the options are among its numbers.
    """

    def __init__(
        self, params: Sequence[Parameter], members: Sequence[Member], slabs: Slabs, spots: Sequence[Spots]
    ) -> None:
        self._params, self._members, self._slabs, self._spots = list(params), members, slabs, spots
        decays = [member.optimizer.decays or ("", "") for member in members]
        self._groups = [member.options for member in members]
        self._names = [option for option, _ in decays]
        self._numbers = np.array([group[option] for group, (option, _) in zip(self._groups, decays, strict=True)])
        self._factors = np.array([group[factor] for group, (_, factor) in zip(self._groups, decays, strict=True)])
        self._is_over = False
        for member in members:
            member.catch_up = self._end

    @classmethod
    def of(cls, members: Sequence[Member], slabs: Slabs) -> Fading | None:
        """Return the options that decay in these parameters' step; None if none does or one is no plain number."""
        params = [member.param for member in members]
        faded = [member for member in members if member.fades]
        if not faded or not slabs.is_started or not all(param in slabs.index for param in params):
            return None
        leaves = [member.leaf_that_fades() for member in faded]
        if None in leaves:
            return None
        spots = slabs.settings.spots([slabs.group_of(member.param) for member in faded], leaves)  # type: ignore[arg-type]
        return None if spots is None else cls(params, faded, slabs, spots)

    def goes_on(self, params: Sequence[Parameter], units: Sequence[Slabs]) -> bool:
        """Return whether a step of these parameters is like the one before."""
        if not self._is_over and len(units) == 1 and units[0] is self._slabs and params == self._params:
            return True
        self._end()
        return False

    def fade(self) -> Callable[[], None]:
        """Decay the options, and return a function that undoes it."""
        before = self._numbers
        self._fade(before)
        return functools.partial(self._back, before)

    def fade_many(self, ahead: int) -> Faded:
        """Decay the options for so many steps, or as many as there is room for."""
        room = max(_FEWEST, min(CAPACITY, _NUMBERS // self._slabs.settings.size))
        count = min(ahead, room)
        # One product after the other, as single steps have them.
        factors = np.tile(self._factors, (count, 1))
        every = np.multiply.accumulate(np.vstack([self._numbers, factors]))
        rows = np.vstack([every[1:], np.tile(every[-1], (room - count, 1))])
        series = self._slabs.settings.series(self._spots, rows)
        self._take(every[-1])
        return Faded(count, lambda back: self._back(every[count - back]) if back else None, series, room)

    def advance(self, step: Callable[[], None]) -> None:
        """Decay the options and make a step; do neither if it fails or is interrupted before it is made."""
        before, leaves = self._numbers, self._slabs.leaves
        try:
            self._fade(before)
            step()
        except BaseException:
            if not leaves[0].is_deleted():  # the counts, which a step is given, and destroys
                self._back(before)
            raise

    def _fade(self, numbers: np.ndarray) -> None:
        self._take(numbers * self._factors)

    def _take(self, numbers: np.ndarray) -> None:
        self._numbers = numbers
        self._slabs.settings.write(self._spots, self._numbers)
        # Past the groups' own method, which says that an option was written.
        deque(map(dict.__setitem__, self._groups, self._names, self._numbers.tolist()), maxlen=0)

    def _back(self, numbers: np.ndarray) -> None:
        self._end()
        for group, name, number in zip(self._groups, self._names, numbers.tolist(), strict=True):
            group[name] = number

    def _end(self) -> None:
        """Bring the settings of the parameters up to date."""
        if self._is_over:
            return
        self._is_over = True
        for member, name, number in zip(self._members, self._names, self._numbers.tolist(), strict=True):
            member.keep(name, number)
