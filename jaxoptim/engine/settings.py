"""The settings of the groups of some slabs, in arrays on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxoptim.engine.numbers import Form, Numbers, TakenApart, together
from jaxoptim.engine.static import Static


class Spots(NamedTuple):
    """The places of some numbers in one of the arrays of the settings.

    Attributes:
        number: of the array.
        places: in it.
        own: which of the numbers are there.
    """

    number: int
    places: np.ndarray
    own: np.ndarray


class Settings:
    """The settings of groups: an array for all slabs, and one for each setting that only single arrays follow.

    Where each of these has the same places in an array of its own, arrays of one shape run the same kernel.

    Args:
        aparts: of each group.
        forms: in which each stands with others.
        groups_in: the groups of each setting that cells follow, those of slabs first.
        num_shared: how many of these slabs follow.

    Attributes:
        numbers: the settings on the device.
        arrays: their arrays, as the update reads them.
    """

    def __init__(
        self,
        aparts: Sequence[TakenApart],
        forms: Sequence[Form],
        groups_in: Sequence[Sequence[int]],
        num_shared: int,
    ) -> None:
        self._aparts, self._forms, self._groups_in = list(aparts), forms, groups_in
        singles = range(num_shared, len(groups_in))
        self._bundles = [list(range(num_shared))] * bool(num_shared) + [[at] for at in singles]
        self._is_numeric = all(apart.is_numeric for apart in aparts)
        self._fill()
        if self._is_numeric:
            self._find_spots()

    def _fill(self) -> None:
        """Put the settings into arrays."""

        def common(at: int) -> Any:
            own = self._groups_in[at]
            return together([self._aparts[group] for group in own], [self._forms[group] for group in own])

        self.numbers = [Numbers([common(at) for at in bundle]) for bundle in self._bundles]
        self.arrays = [numbers.arrays for numbers in self.numbers]

    def _find_spots(self) -> None:
        """Keep the numbers on the host too, leaf by leaf of a setting, each for all of its groups."""
        self._vectors: list[np.ndarray] = []
        self._spots: dict[int, list[tuple[int, np.ndarray]]] = {at: [] for at in range(len(self._aparts))}
        for number, bundle in enumerate(self._bundles):
            vector: list[float] = []
            for at in bundle:
                begin, groups = len(vector), self._groups_in[at]
                own = [self._forms[group].leaves(self._aparts[group]) for group in groups]
                vector += [x for column in zip(*own, strict=True) for x in column]
                for place, group in enumerate(groups):
                    spots = begin + place + len(own) * self._forms[group].places()
                    self._spots[group].append((number, spots))
            self._vectors.append(np.array(vector))

    def _take(self, number: int, numbers: Numbers) -> None:
        self.numbers[number], self.arrays[number] = numbers, numbers.arrays

    @property
    def forms(self) -> tuple[Static, ...]:
        """The structures of the arrays."""
        return tuple(numbers.form for numbers in self.numbers)

    def renumber(self, changed: Mapping[int, TakenApart]) -> bool:
        """Take other numbers for some groups; return False, and do nothing, where more than numbers differ."""
        new = {at: apart for at, apart in changed.items() if apart is not self._aparts[at]}
        if not all(apart.is_numeric and apart.form == self._aparts[at].form for at, apart in new.items()):
            return False
        for at, apart in new.items():
            self._aparts[at] = apart
        if new and not self._is_numeric:
            self._fill()
        elif new:
            spots = [(number, spot, apart) for at, apart in new.items() for number, spot in self._spots[at]]
            for number, spot, apart in spots:
                self._vectors[number][spot] = apart.leaves
            for number in {number for number, _, _ in spots}:
                self._take(number, self.numbers[number].of(self._vectors[number]))
        return True

    def spots(self, groups: Sequence[int], leaves: Sequence[int]) -> list[Spots] | None:
        """Return the places of a number in the settings of some groups; None where settings are not numbers alone."""
        if not self._is_numeric:
            return None
        found: dict[int, list[tuple[int, int]]] = {}
        for own, (group, leaf) in enumerate(zip(groups, leaves, strict=True)):
            for number, spot in self._spots[group]:
                found.setdefault(number, []).append((spot[leaf], own))
        return [Spots(number, *np.array(pairs).T) for number, pairs in found.items()]

    @property
    def size(self) -> int:
        """The number of numbers."""
        return sum(map(len, self._vectors))

    def series(self, spots: Sequence[Spots], rows: np.ndarray) -> list[tuple[Any, ...]]:
        """Return the arrays of steps whose numbers at some places change, a row for each step; None for what stays."""
        found: list[tuple[Any, ...]] = [(None,) * len(arrays) for arrays in self.arrays]
        for of in spots:
            vectors = np.tile(self._vectors[of.number], (len(rows), 1))
            vectors[:, of.places] = rows[:, of.own]
            first, *others = self.numbers[of.number].of_one_step(vectors).arrays
            found[of.number] = (first, *[None] * len(others))
        return found

    def write(self, spots: Sequence[Spots], numbers: np.ndarray) -> None:
        """Write other numbers at some places for the next step; the settings of the groups stay behind."""
        for of in spots:
            vector = self._vectors[of.number]
            vector[of.places] = numbers[of.own]
            self._take(of.number, self.numbers[of.number].of_one_step(vector))
