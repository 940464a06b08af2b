"""The parameters of one SVI, or of several that share them."""

from __future__ import annotations

from typing import Any

from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.optim.multi import as_multi_optimizer
from jaxoptim.pyro.optim.multi_optimizer import MultiOptimizer


class Parameters(dict[str, Parameter]):
    """A dict of unconstrained parameters by name, with what the SVIs that share it have to know of each other.

    Attributes:
        reached: the names that one of them has found in its model or guide.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reached: set[str] = set()
        self._optimizers: list[tuple[Any, MultiOptimizer]] = []

    def optimized_by(self, optim: Any) -> MultiOptimizer:
        """An optimizer, the same for all SVIs that are given one object: rules keep no state themselves."""
        for given, multi in self._optimizers:
            if given is optim:
                return multi
        self._optimizers.append((optim, as_multi_optimizer(optim)))
        return self._optimizers[-1][1]
