"""The parameters of one SVI, or of several that share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.infer.objective import Discovery
from jaxoptim.pyro.optim.multi import as_multi_optimizer
from jaxoptim.pyro.optim.multi_optimizer import MultiOptimizer, checked


class Parameters(dict[str, Parameter]):
    """A dict of unconstrained parameters by name, with the bookkeeping of the SVIs that share it.

    Attributes:
        reached: the names that one of them has found in its model or guide.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reached: set[str] = set()
        self._optimizers: list[tuple[Any, MultiOptimizer]] = []

    def optimized_by(self, optim: Any) -> MultiOptimizer:
        """Return the optimizer, one for all SVIs given the same object, because rules keep no state themselves."""
        for given, multi in self._optimizers:
            if given is optim:
                return multi
        self._optimizers.append((optim, as_multi_optimizer(optim)))
        return self._optimizers[-1][1]

    def begun(
        self, found: Discovery, initial: Mapping[str, Any], brought: Mapping[str, Parameter]
    ) -> dict[str, Parameter]:
        """The parameters that are new; those that are there already stay.

        Args:
            found: what an SVI has found.
            initial: the sites whose values in ``found`` were asked for.
            brought: the parameters that the optimizer puts in the places of others.

        Raises:
            ``TypeError`` and ``ValueError`` for a parameter that is none, of another shape, or given twice.
        """
        given = {name: param for name, param in checked(self).items() if name in found.values}
        chosen = {leaf: name for name in initial for leaf in found.sites[name].leaves}
        for name in chosen.keys() & (given.keys() | brought.keys()):
            raise ValueError(
                f"init_params has {chosen[name]!r}, which has a value in params or in the optimizer already. Give one "
                "of them."
            )
        for name, param in given.items():
            if param.shape != found.values[name].shape:
                raise ValueError(
                    f"params has {name!r} of shape {param.shape}, but that of the param statement, unconstrained, is "
                    f"{found.values[name].shape}. Both must be equal."
                )
            if name not in self.reached and brought.get(name, param) is not param:
                raise ValueError(f"params has {name!r}, but the optimizer brings a value of its own. Give one of them.")
        new = {name: Parameter(value, name) for name, value in found.values.items() if name not in given}
        own = {name: param for name, param in brought.items() if name in new and param.shape == new[name].shape}
        return new | own

    def check_names(self, found: Discovery) -> None:
        """Raise ``KeyError`` for a parameter that was put in but that no model or guide reaches."""
        names = {leaf for site in found.sites.values() for leaf in site.leaves}
        if unknown := sorted(self.keys() - names - self.reached):
            raise KeyError(
                f"params has {unknown[0]!r}, but no param statement that model and guide reach has this name. They "
                f"reach {', '.join(map(repr, sorted(names))) or 'none'}."
            )
