"""Optimizers that decay the learning rate of each group, as Pyro's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from jaxoptim.core import Rule
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.optim.part import Part


class DecayingRate(Optimizer):
    """An optimizer that multiplies the learning rate of each group by its ``lrd`` at every step, as Pyro's does.

    It does so for all parameters of a group, those without a gradient included; a rule by itself counts the
    steps of each parameter.
    """

    decays: ClassVar[tuple[str, str] | None] = ("lr", "lrd")
    fixed: Mapping[str, Any] = {"lrd": 1.0}

    def _update(self, run: Callable[[], Any]) -> Any:
        with Uninterrupted():  # or rates would have decayed for a step that was not made
            rates = [group["lr"] for group in self.param_groups]
            for group in self.param_groups:
                group["lr"] = group["lr"] * group["lrd"]
            before, is_made = self.last, False
            try:
                result = run()
                is_made = self.last is before or self.last is None or not bool(self.last.skipped)
                return result
            finally:
                if not is_made:
                    for group, rate in zip(self.param_groups, rates, strict=True):
                        group["lr"] = rate

    def _pure_rule(self, part: Part) -> Rule:
        lrd = part.group["lrd"]
        return super()._pure_rule(part).replace(lr=part.group["lr"] / lrd ** (part.count or 0), lrd=lrd)

    def from_functional(self, params: Any, state: Any) -> None:
        """Return from the pure face; see :meth:`Optimizer.from_functional`."""
        before = self._counts()
        super().from_functional(params, state)
        after = self._counts()
        for group in self.param_groups:
            group["lr"] = group["lr"] * group["lrd"] ** (after[id(group)] - before[id(group)])

    def _counts(self) -> dict[int, int]:
        """Return the most steps that a parameter of each group has made."""
        self._storage.settle()
        counts: dict[int, int] = {}
        for part in self._storage.parts():
            counts[id(part.group)] = max(part.count or 0, counts.get(id(part.group), 0))
        return counts
