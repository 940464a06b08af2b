"""The state of a fit: its parameters, and the effects of each call of model and guide."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.shown import shown
from jaxoptim.core.tracing import refuse_tracing
from jaxoptim.engine.loops import Changes, Course
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.infer.arguments import Arguments
from jaxoptim.pyro.infer.batches import Data, Drawn, Draws, kept_if_finite
from jaxoptim.pyro.infer.elbo import as_elbo
from jaxoptim.pyro.infer.objective import Discovery, Objective, Site, discover
from jaxoptim.pyro.infer.parameters import Parameters
from jaxoptim.pyro.infer.program import Plan, Program
from jaxoptim.pyro.infer.saved import Loaded
from jaxoptim.pyro.infer.stores import by_site
from jaxoptim.pyro.optim.multi_optimizer import Compiled
from jaxoptim.pyro.optim.torch_style import TorchStyle

_MANY = 16
"""The number of programs for different static arguments from which a warning is due."""


class Fit:
    """The state of an :class:`~jaxoptim.pyro.infer.SVI`, and its steps.

    See there for the arguments and for what has no underscore.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: Any,
        *,
        key: jax.Array | None = None,
        params: dict[str, Parameter] | None = None,
        init_params: Mapping[str, Any] | None = None,
        skip_nonfinite: bool = False,
        forward_mode_differentiation: bool = False,
    ) -> None:
        for what, fn in (("model", model), ("guide", guide)):
            if not callable(fn):
                raise TypeError(f"The {what} must be a function of numpyro's statements, but got {type(fn).__name__}.")
        self._model, self._guide, self._elbo = model, guide, as_elbo(loss)
        if params is not None and not isinstance(params, Parameters):
            raise TypeError(
                f"params must be svi.params of another SVI, but got {type(params).__name__}. Values to begin with go "
                "into init_params, or into svi.params before the first step."
            )
        self._params = Parameters() if params is None else params
        self._shares = params is not None
        self._initial = checked_values(init_params)
        self._optim, self._multi = optim, self._params.optimized_by(optim)
        self.key = jax.random.key(0) if key is None else checked_key(key)
        self.mutable_state: dict[str, Any] = {}
        self._skip_nonfinite = bool(skip_nonfinite)
        self._is_forward = bool(forward_mode_differentiation)
        self.losses = np.zeros(0, np.float32)
        self.num_steps = 0
        self._draws = Draws(jax.random.fold_in(_typed(self.key), 2))
        self._begun = False
        self._sites: dict[str, Site] = {}
        self._programs: dict[Any, Program] = {}
        self._forms: dict[Any, Arguments] = {}
        self._loaded = Loaded()
        self._store: dict[str, Any] = {}

    def _advance(self, arguments: Arguments, skips: bool) -> jax.Array:
        """Make one step, and return its loss without waiting for it."""
        plan = self._plan(arguments)
        data = (plan.key, plan.mutable, plan.traced)
        with Uninterrupted():  # or the next step would draw from a key that is used up
            if plan.params:
                # No user's: without checks of what is right, and of names, some of which other steps reach.
                if isinstance(self._multi, Compiled | TorchStyle):
                    loss, aux = self._multi._step(plan.program.loss, plan.params, data, skips)
                else:
                    loss, aux = self._multi.step(
                        plan.program.loss_fn, plan.params, *data, has_aux=True, skip_nonfinite=skips
                    )
                plan.all_params |= plan.params  # a torch-style optimizer may put its own in their places
            else:
                loss, aux = plan.program.evaluate({}, *data)
            mutable, key = aux
            if skips and mutable:
                mutable = kept_if_finite(loss, mutable, plan.mutable)
            self._commit(plan)
            self.key, self.mutable_state, self.num_steps = key, mutable, self.num_steps + 1
        return loss

    def _advance_many(self, data: Data, most: int, skips: bool) -> np.ndarray:
        """Make at most ``most`` of the next steps; append their losses to those of the run, and return them."""
        count, before = data.ahead(most), len(self.losses)
        with Uninterrupted():  # whose end raises, when what was done is kept
            left = self._repeated(data, count, skips)
        if left:
            self._made_singly(data, left, skips)
        return self.losses[before:]

    def _made_singly(self, data: Data, count: int, skips: bool) -> None:
        """Make steps one after another."""
        found = list[jax.Array]()
        try:
            for _ in range(count):
                with Uninterrupted():
                    found.append(self._advance(data.arguments(), skips))
                    self._go_on(data, 1)
        finally:
            if found:
                self._keep(np.stack(jax.device_get(found)))

    def _repeated(self, data: Data, count: int, skips: bool) -> int:
        """Make steps in one compiled call; return the number left to make singly where that is not possible."""
        plan = self._plan(data.arguments())
        if not plan.params or plan.program.failures > 1:
            return count
        course = Course(data.turn(skips), (plan.key, plan.mutable), data.given(), count)
        try:
            steps = self._multi._steps(plan.program.loss, plan.params, course, skips)
        except Changes:  # after one step a state may have the form that it keeps
            plan.program.failures += 1
            steps, count = None, 1
        if steps is None:
            self._commit(plan)
            return count
        made, losses, (key, mutable) = steps
        self._commit(plan)
        self.key, self.mutable_state, self.num_steps = key, mutable, self.num_steps + made
        self._go_on(data, made)
        self._keep(np.asarray(losses)[:made])
        return 0

    def _keep(self, losses: np.ndarray) -> None:
        """Append losses to those of the run."""
        self.losses = np.concatenate([self.losses, losses]) if len(self.losses) else losses

    def _go_on(self, data: Data, count: int) -> None:
        """Advance the data by so many steps."""
        data.advance(count)
        if isinstance(data, Drawn):
            self._draws = data.draws

    def _plan(self, arguments: Arguments, initial: Mapping[str, Any] | None = None) -> Plan:
        """Return the plan of a call; nothing is changed until :meth:`_commit`."""
        refuse_tracing("A step of SVI", "use differentiable_loss, which is pure")
        program = self._programs.get(arguments.program)
        plan = Plan(self.key, arguments, dict(self._params), self._sites, self.mutable_state)
        if program is None:
            reached = self._reached(arguments)
            if reached is None or not reached <= self._sites.keys() | self.mutable_state.keys():
                initial = {} if self._begun else self._initial if initial is None else initial
                if self._store:
                    initial = {**initial, **self._stored(arguments)}
                plan.found = found = self._found(arguments, initial)
                self._loaded.check_reached(arguments, found.sites)
                plan.key = plan.key if self._begun else found.key
                if not self._begun and not self._shares:
                    self._params.check_names(found)
                plan.all_params |= self._params.begun(found, initial, self._multi.brought())
                plan.sites = found.sites | self._sites
                plan.mutable = found.mutable | self._loaded.in_form(self.mutable_state, found.mutable)
                reached = set(found.sites)
            sites = {name: site for name, site in plan.sites.items() if name in reached}
            objective = Objective(self._model, self._guide, self._elbo, sites, {})
            program = Program(objective, arguments, sites, self._is_forward)
        plan.begin(program)
        return plan

    def _reached(self, arguments: Arguments) -> set[str] | None:
        """The sites that other shapes of known arguments lead to, without any computation; None for new arguments."""
        # An automatic guide keeps what it finds at its first run, which must not be traced.
        if arguments.form not in self._forms:
            return None
        names: set[str] = set()
        known = self._known()

        def look(traced: Any) -> None:
            found = discover(self._model, self._guide, self._elbo, self.key, *arguments.rebuilt(traced), known, {})
            names.update(found.sites, found.mutable)

        jax.eval_shape(look, arguments.traced)
        return names

    def _found(self, arguments: Arguments, initial: Mapping[str, Any]) -> Discovery:
        """Return the sites that model and guide reach, with initial values for new ones."""
        # The next step draws from children of the key itself.
        key = jax.random.fold_in(self.key, 1) if self._begun else self.key
        args, kwargs = arguments.rebuilt(arguments.traced)
        known = self._known()
        if self._loaded:
            # What was loaded must be known before anything new is drawn, or that would have other keys.
            first = discover(self._model, self._guide, self._elbo, self.key, args, kwargs, known, {})
            known |= self._loaded.values(first, self._params, self.mutable_state)
        return discover(self._model, self._guide, self._elbo, key, args, kwargs, known, initial)

    def _stored(self, arguments: Arguments) -> dict[str, Any]:
        """The initial values that Pyro's parameter store has for the sites of this call."""
        args, kwargs = arguments.rebuilt(arguments.traced)
        found = discover(self._model, self._guide, self._elbo, self.key, args, kwargs, {}, {})
        return by_site(self._store, found.sites, found.values)[0]

    def _known(self) -> dict[str, Any]:
        """Return the values of the sites that have values already."""
        waiting = self._loaded.mutable
        return self._met() | {name: value for name, value in self.mutable_state.items() if name not in waiting}

    def _met(self) -> dict[str, Any]:
        """The constrained values of the sites that model and guide have reached here."""
        values = {leaf: self._params[leaf].value for site in self._sites.values() for leaf in site.leaves}
        return {name: site.value(values) for name, site in self._sites.items()}

    def _commit(self, plan: Plan) -> None:
        """Store the findings of a call that has succeeded."""
        self._params.update(plan.all_params)
        if plan.arguments.program in self._programs:
            return
        self._params.reached.update(plan.program.names)
        self._programs[plan.arguments.program] = plan.program
        if plan.arguments.form not in self._forms:
            self._forms[plan.arguments.form] = plan.arguments.without_data()
            self._warn_of_many()
        self.key, self._sites, self.mutable_state, self._begun = plan.key, plan.sites, plan.mutable, True
        if plan.found is not None:
            self._loaded.meet(plan.found)
            self._store = {}

    def _warn_of_many(self) -> None:
        """Warn once if static arguments compile another program at each step."""
        if len(self._forms) != _MANY:
            return
        values: dict[str, set[Any]] = {}
        for arguments in self._forms.values():
            for name, value in arguments.static().items():
                values.setdefault(name, set()).add(value)
        counts = {name: len(distinct) for name, distinct in values.items()}
        name = max(counts, key=lambda name: counts[name], default="")
        if counts.get(name, 0) > _MANY // 2:
            warnings.warn(
                f"SVI has compiled {_MANY} programs, because the static argument {name} had {counts[name]} values. "
                "If it is a number that changes from step to step, pass it as a float or an array.",
                stacklevel=5,
            )


def checked_values(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """A dict of initial values by site."""
    if values is not None and not isinstance(values, Mapping):
        raise TypeError(f"init_params must be a dict of values by site, but got {type(values).__name__}.")
    return dict(values or {})


def checked_key(key: Any) -> jax.Array:
    """A JAX key; raises for anything else."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    raw = isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.ndim == 1
    if not (typed or raw):
        raise TypeError(f"The key must be a JAX key, such as jax.random.key(0), but got {shown(key)}.")
    return key


def _typed(key: jax.Array) -> jax.Array:
    """A typed key for one of either kind."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
