"""The compiled loss of one call of model and guide."""

from __future__ import annotations

import functools
from typing import Any

import jax

from jaxoptim.core.forward import by_forward_mode
from jaxoptim.core.loss import Loss
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.infer.arguments import Arguments
from jaxoptim.pyro.infer.objective import Discovery, Objective, Site


class Plan:
    """The plan of one call: its program, and the results to keep if it succeeds."""

    program: Program
    params: dict[str, Parameter]
    found: Discovery | None = None

    def __init__(
        self,
        key: jax.Array,
        arguments: Arguments,
        all_params: dict[str, Parameter],
        sites: dict[str, Site],
        mutable: dict[str, Any],
    ) -> None:
        self.key, self.arguments, self.traced = key, arguments, arguments.traced
        self.all_params, self.sites, self.mutable = all_params, sites, mutable

    def begin(self, program: Program) -> None:
        """Choose the program and the parameters that it reaches."""
        self.program = program
        self.params = {name: self.all_params[name] for name in program.names}


class Program:
    """The loss for one combination of static arguments, shapes and dtypes.

    Args:
        objective: the loss over all arguments.
        arguments: of the first call.
        sites: the parameters that these arguments lead to.
        is_forward: whether it is differentiated forward.

    Attributes:
        failures: how often many steps in one call could not be made; a state may change its form once.
        most: so many of them take neither too short nor too long a time.
    """

    def __init__(self, objective: Objective, arguments: Arguments, sites: dict[str, Site], is_forward: bool) -> None:
        self.names = [leaf for site in sites.values() for leaf in site.leaves]

        arguments = arguments.without_data()

        def loss_fn(params: dict[str, Any], key: jax.Array, mutable: dict[str, Any], traced: Any) -> Any:
            args, kwargs = arguments.rebuilt(traced)
            key, step_key = jax.random.split(key)

            def at(params: dict[str, Any]) -> Any:
                return objective.with_mutable_state(params, mutable, step_key, *args, **kwargs)

            loss, new = (by_forward_mode(at) if is_forward else at)(params)
            return loss, (new, key)

        # Optimizers warn of functions that are made anew at each call; these are made anew for each program.
        self.loss_fn = functools.partial(loss_fn)
        self.loss = Loss(self.loss_fn, True)
        self.evaluate = jax.jit(loss_fn)
        self.failures, self.most = 0, 1
