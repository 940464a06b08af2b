"""Stochastic variational inference with an object that keeps its parameters."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim import checkpoint
from jaxoptim.core.forward import by_forward_mode
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.loss import Loss
from jaxoptim.core.tracing import refuse_tracing
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.infer.arguments import Arguments
from jaxoptim.pyro.infer.elbo import as_elbo
from jaxoptim.pyro.infer.objective import Discovery, Objective, Site, discover
from jaxoptim.pyro.infer.parameters import Parameters
from jaxoptim.pyro.infer.saved import (
    Loaded,
    calls_of,
    check_params,
    checked_state,
    loaded_mutable,
    saved_state,
    sites_of,
)
from jaxoptim.pyro.infer.stores import by_site, constrained_values, is_store, loaded, unconstrained
from jaxoptim.pyro.optim.multi_optimizer import Compiled, checked
from jaxoptim.pyro.optim.torch_style import TorchStyle

_MANY = 16
"""So many programs for other static arguments are more than one means to have."""


class SVI:
    r"""Stochastic variational inference: Pyro's ``SVI``, on models and guides of numpyro.

    Each step splits the key, evaluates the loss and its gradient at the unconstrained parameters :math:`u`, and updates
    them, in one compiled program:

    .. math::
        k, k' \leftarrow \mathrm{split}(k), \qquad
        u \leftarrow u + \mathrm{optimizer}(\nabla_u\, \mathrm{loss}(k', T(u), \mathrm{model}, \mathrm{guide})).

    Keys, losses and initial values are those of ``numpyro.infer.SVI`` with the same key. Unlike there, parameters are
    made when model or guide first reach them, also in later steps, as in Pyro; a step updates those that it reaches.

    Args:
        model: a model of numpyro.
        guide: a guide of numpyro, also an automatic one.
        optim: a Pyro-style optimizer, a ``MultiOptimizer``, a rule, a transformation of optax, a torch-style optimizer
            or a function that makes one of a dict of parameters.
        loss: an ELBO of numpyro, or a function ``loss(model, guide, *args, **kwargs)``; see
            :func:`differentiable_loss`.
        key: a JAX key for initial values and draws (default ``jax.random.key(0)``).
        params: ``svi.params`` of another SVI, to share its parameters (default None: none are shared). With the same
            ``optim`` object the state of the optimizer is shared too, as in Pyro; another one has state of its own.
        init_params: a dict of constrained values to begin with, by site, in the place of those of the ``param``
            statements (default None: none).
        skip_nonfinite: a step whose loss or gradient is not finite changes nothing but the key (default False).
        forward_mode_differentiation: differentiate forward, as models with ``while_loop`` need; the cost grows with
            the number of parameters (default False).

    Attributes:
        key: the key that the next step splits. Before the first call the one for the initial values.
        params: a dict of the unconstrained :class:`~jaxoptim.optim.Parameter` by name; empty before the first call.
            One that you put in before is what the fit begins with. Trees have one for each array:
            ``decoder$params.Dense_0.kernel``.
        optim: the optimizer, as given.
        mutable_state: a dict of the values of ``numpyro.primitives.mutable`` sites, such as running averages of batch
            normalisation.

    The arguments of model and guide are data where they are arrays or floats: another value, such as that of an
    annealing factor, runs the same program. Ints, bools, strings, None, tuples of these and functions are static: each
    combination compiles a program of its own. A count that changes from step to step goes in as a float or an array.
    Whatever else model and guide read, such as a global or an attribute, is fixed when a program is compiled.

    Raises:
        ``TypeError`` for a loss that is no ELBO and no function, a key that is none, an optimizer of another kind, and
        ``params`` that are not of an SVI; ``ImportError`` without numpyro, and for ``TraceEnum_ELBO`` without funsor
        (the extra ``enum``). The first call raises ``KeyError`` for an initial value of a name that model and guide
        lack, ``ValueError`` for one that does not fit. A call that raises leaves parameters, optimizer and key as they
        were.

    Examples:
        >>> import jax, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro.infer import Trace_ELBO
        >>> import jaxoptim
        >>> from jaxoptim.pyro.infer import SVI
        >>> def model(data):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("data", dist.Normal(mean, 1.0), obs=data)
        >>> def guide(data):
        ...     scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
        ...     numpyro.sample("mean", dist.Normal(numpyro.param("loc", 0.0), scale))
        >>> svi = SVI(model, guide, jaxoptim.rules.Adam(lr=0.02), Trace_ELBO(num_particles=10))
        >>> losses = [svi.step(2.0) for _ in range(300)]
        >>> {name: round(float(value), 1) for name, value in sorted(svi.get_params().items())}
        {'loc': 1.0, 'scale': 0.7}
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
        self._initial = _checked_values(init_params)
        self._optim, self._multi = optim, self._params.optimized_by(optim)
        self.key = jax.random.key(0) if key is None else _checked_key(key)
        self.mutable_state: dict[str, Any] = {}
        self._skip_nonfinite = bool(skip_nonfinite)
        self._is_forward = bool(forward_mode_differentiation)
        self._begun = False
        self._sites: dict[str, Site] = {}
        self._programs: dict[Any, _Program] = {}
        self._forms: dict[Any, Arguments] = {}
        self._loaded = Loaded()
        self._store: dict[str, Any] = {}

    @property
    def optim(self) -> Any:
        """The optimizer, as given."""
        return self._optim

    @property
    def params(self) -> dict[str, Parameter]:
        """The unconstrained parameters by name."""
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Parameter]) -> None:
        new = dict(checked(params))
        self._params.clear()
        self._params.update(new)

    def step(self, /, *args: Any, **kwargs: Any) -> float:
        """Make one step.

        Args:
            args: arguments of model and guide.
            kwargs: keyword arguments of both.

        Returns:
            The loss before the update.

        Raises:
            ``TypeError`` for an argument that is neither array nor hashable, and a loss that is no scalar; what model,
            guide and optimizer raise. A ``UserWarning`` when static arguments make many programs.
        """
        return float(self._advance(args, kwargs))

    def evaluate_loss(self, /, *args: Any, **kwargs: Any) -> float:
        """The loss that the next step begins with; parameters, key and mutable state stay as they are.

        Args:
            args: arguments of model and guide.
            kwargs: keyword arguments of both.

        Returns:
            The loss.

        Raises:
            As :meth:`step`.
        """
        plan = self._plan(args, kwargs)
        values = {name: param.value for name, param in plan.params.items()}
        loss, _ = plan.program.evaluate(values, plan.key, plan.mutable, plan.traced)
        self._commit(plan)
        return float(loss)

    def run(
        self,
        num_steps: int,
        /,
        *args: Any,
        progress_bar: bool = True,
        init_params: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """Make many steps with the same arguments.

        Args:
            num_steps: how many, at least 1.
            args: arguments of model and guide.
            progress_bar: show one if tqdm is installed (default True).
            init_params: as of the class, for the first call (default None). A model's own argument of this name, or of
                the one before, goes through :meth:`step`.
            kwargs: keyword arguments of both.

        Returns:
            The losses, an array of length ``num_steps``.

        Raises:
            ``ValueError`` for fewer than one step, and for ``init_params`` after the first call; as :meth:`step`. The
            steps before an error are made.
        """
        num_steps = operator.index(num_steps)
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, but got {num_steps}.")
        if init_params is not None:
            if self._begun:
                raise ValueError(
                    "init_params are for the first call, but the parameters have values already. Write into "
                    "svi.params[name].value, or make a new SVI."
                )
            self._commit(self._plan(args, kwargs, self._initial | _checked_values(init_params)))
        losses: list[Any] = []
        batch = max(num_steps // 20, 1)
        with _progress_bar(num_steps, progress_bar) as bar:
            for count in range(1, num_steps + 1):
                losses.append(self._advance(args, kwargs))
                if count % batch == 0:
                    # A whole batch of losses comes to the host at once: nothing waits for a single step.
                    losses[-batch:] = jax.device_get(losses[-batch:])
                    if bar is not None:
                        bar.set_postfix_str(f"loss {np.mean(losses[-batch:]):.4f}", refresh=False)
                if bar is not None:
                    bar.update()
        return jnp.asarray(np.stack(jax.device_get(losses)))

    def get_params(self) -> dict[str, Any]:
        """The constrained parameters: what ``numpyro.infer.Predictive`` takes.

        Returns:
            A dict from the name of each ``param`` statement to its value, an array or a tree of arrays.

        Raises:
            ``ValueError`` before the first call, when no parameter is known.
        """
        if not self._begun:
            raise ValueError(
                "There are no parameters before model and guide have run. Call step or evaluate_loss first."
            )
        return self._met() | self._loaded.constrained(self._params)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on elsewhere: parameters, optimizer, key, mutable state and counts.

        Not in it are model, guide, loss, the optimizer's class and the arguments of the constructor: a new SVI gets
        them anew.

        Returns:
            A dict of arrays, numbers, strings and containers, which ``jaxoptim.checkpoint`` takes. Its arrays stay
            as they are when the run goes on.

        Raises:
            ``TypeError`` for what is no parameter in ``svi.params``.

        Examples:
            See :meth:`load_state_dict`.
        """
        optimizer = self._multi.state_dict(checked(self._params))
        state = saved_state(self._params, optimizer, self.key, self.mutable_state, self._begun)
        sites = sites_of(self._sites, self._params, self._loaded)
        return state | {"sites": sites, "calls": calls_of(self._programs, self._loaded), "store": self._store}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another SVI, of the same model, guide and kind of optimizer, was saved: bit for bit.

        In an SVI that has made no call yet parameters, key and mutable state are there at once, and the first call
        finds out how they are constrained; a name that model and guide lack is an error then. One that has begun must
        have the parameters of the state.

        Args:
            state_dict: what :meth:`state_dict` gave; or what ``pyro.get_param_store().get_state()`` gave, see
                :meth:`load`.

        Raises:
            ``TypeError`` and ``ValueError`` for something else, for a parameter of another shape, and for the state of
            another kind of optimizer; ``KeyError`` for a name that only one side has. Nothing is changed then.

        Examples:
            >>> import numpyro, numpyro.distributions as dist
            >>> from numpyro.infer import Trace_ELBO
            >>> from jaxoptim import rules
            >>> from jaxoptim.pyro.infer import SVI
            >>> def model(data):
            ...     numpyro.sample("data", dist.Normal(numpyro.param("loc", 0.0), 1.0), obs=data)
            >>> first, second = (SVI(model, lambda data: None, rules.Adam(lr=0.02), Trace_ELBO()) for _ in range(2))
            >>> _ = first.run(3, 2.0, progress_bar=False)
            >>> second.load_state_dict(first.state_dict())
            >>> first.step(2.0) == second.step(2.0), first.get_params() == second.get_params()
            (True, True)
        """
        if is_store(state_dict):
            return self._take_store(constrained_values(state_dict))
        state = checked_state(state_dict)
        key, values, own = _checked_key(state["key"]), state["params"], dict(checked(self._params))
        brought = self._multi.brought() if isinstance(self._multi, TorchStyle) else {}
        own |= {name: brought[name] for name in brought.keys() & values.keys()}
        check_params(values, own, self._begun)
        mutable = loaded_mutable(state["mutable_state"], self.mutable_state, self._begun)
        params = own | {name: Parameter(value, name) for name, value in values.items() if name not in own}
        with Uninterrupted():
            self._multi.load_state_dict(state["optimizer"], params)
            for name in values.keys() & own.keys():
                own[name].value = values[name]
            self._params.update(params)
            self._params.reached.update(state["reached"])
            self.key, self.mutable_state, self._store = key, mutable, state["store"]
            if state["has_begun"] and not self._begun:
                self._begun, self._loaded = True, Loaded(state["sites"], values, mutable, state["calls"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`state_dict` to a file, as ``jaxoptim.checkpoint.save`` does: whole or not at all.

        Args:
            path: the file. Its folder must exist.

        Raises:
            See ``jaxoptim.checkpoint.save``.

        Examples:
            See :meth:`load`.
        """
        checkpoint.save(path, self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` wrote, or the parameters that ``pyro.get_param_store().save`` wrote.

        Those of Pyro come by name, as constrained values; parameters that the store lacks stay as they are. ``"$$$"``,
        Pyro's mark between a module and its parameter, may be a dot here, or ``"$params."``. Before the first call they
        stand for ``init_params``.

        Args:
            path: the file. Nothing in it is run.

        Raises:
            See :meth:`load_state_dict` and ``jaxoptim.checkpoint.load``. For a file of Pyro's ``ImportError`` without
            torch, and ``ValueError`` for a constraint that is not known here; here or at the first call ``KeyError``
            for a name that model and guide lack, and ``ValueError`` for another shape or a value outside the
            constraint.

        Examples:
            >>> import tempfile, numpyro, numpyro.distributions as dist
            >>> from numpyro.infer import Trace_ELBO
            >>> from jaxoptim import rules
            >>> from jaxoptim.pyro.infer import SVI
            >>> def model(data):
            ...     numpyro.sample("data", dist.Normal(numpyro.param("loc", 0.0), 1.0), obs=data)
            >>> path = tempfile.mkdtemp() + "/fit.safetensors"
            >>> for steps in range(2):  # in two processes
            ...     svi = SVI(model, lambda data: None, rules.SGD(lr=0.5), Trace_ELBO())
            ...     if steps > 0:
            ...         svi.load(path)
            ...     loss = svi.step(2.0)
            ...     svi.save(path)
            >>> float(svi.params["loc"].value)
            1.5
        """
        self.load_state_dict(loaded(path))

    def _take_store(self, store: dict[str, Any]) -> None:
        """Go on from constrained values by name."""
        if not self._begun:
            self._store = store
            return
        values = {name: param.value for name, param in self._params.items()}
        given, names = by_site(store, self._sites, values)
        new = unconstrained(self._sites, given, names)
        with Uninterrupted():
            for name, value in new.items():
                self._params[name].value = value

    def _advance(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.Array:
        """One step, whose loss nobody waits for."""
        plan = self._plan(args, kwargs)
        data = (plan.key, plan.mutable, plan.traced)
        with Uninterrupted():  # or the next step would draw from a key that is used up
            if plan.params:
                if isinstance(self._multi, Compiled | TorchStyle):  # no user's: without checks of what is right
                    loss, aux = self._multi._step(plan.program.loss, plan.params, data, self._skip_nonfinite)
                else:
                    loss, aux = self._multi.step(
                        plan.program.loss_fn, plan.params, *data, has_aux=True, skip_nonfinite=self._skip_nonfinite
                    )
                plan.all_params |= plan.params  # a torch-style optimizer may put its own in their places
            else:
                loss, aux = plan.program.evaluate({}, *data)
            mutable, key = aux
            if self._skip_nonfinite and mutable:
                mutable = _kept_if_finite(loss, mutable, plan.mutable)
            self._commit(plan)
            self.key, self.mutable_state = key, mutable
        return loss

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any], initial: Mapping[str, Any] | None = None) -> _Plan:
        """What a call needs; nothing is changed until :meth:`_commit`."""
        refuse_tracing("A step of SVI", "use differentiable_loss, which is pure")
        arguments = Arguments(args, kwargs)
        program = self._programs.get(arguments.program)
        plan = _Plan(self.key, arguments, dict(self.params), self._sites, self.mutable_state)
        if program is None:
            reached = self._reached(arguments)
            if reached is None or not reached <= self._sites.keys() | self.mutable_state.keys():
                initial = {} if self._begun else self._initial if initial is None else initial
                if self._store:
                    initial = {**initial, **self._stored(args, kwargs)}
                plan.found = found = self._found(args, kwargs, initial)
                self._loaded.check_reached(arguments, found.sites)
                plan.key = plan.key if self._begun else found.key
                brought = self._multi.brought() if isinstance(self._multi, TorchStyle) else {}
                if not self._begun and not self._shares:
                    self._params.check_names(found)
                plan.all_params |= self._params.begun(found, initial, brought)
                plan.sites = found.sites | self._sites
                plan.mutable = found.mutable | self._loaded.in_form(self.mutable_state, found.mutable)
                reached = set(found.sites)
            sites = {name: site for name, site in plan.sites.items() if name in reached}
            objective = Objective(self._model, self._guide, self._elbo, sites, {})
            program = _Program(objective, arguments, sites, self._is_forward)
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

    def _found(self, args: tuple[Any, ...], kwargs: dict[str, Any], initial: Mapping[str, Any]) -> Discovery:
        """What model and guide reach, with initial values for what is new."""
        # The next step draws from children of the key itself.
        key = jax.random.fold_in(self.key, 1) if self._begun else self.key
        known = self._known()
        if self._loaded:
            # What was loaded must be known before anything new is drawn, or that would have other keys.
            first = discover(self._model, self._guide, self._elbo, self.key, args, kwargs, known, {})
            known |= self._loaded.values(first, self._params, self.mutable_state)
        return discover(self._model, self._guide, self._elbo, key, args, kwargs, known, initial)

    def _stored(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The initial values that Pyro's parameter store has for the sites of this call."""
        found = discover(self._model, self._guide, self._elbo, self.key, args, kwargs, {}, {})
        return by_site(self._store, found.sites, found.values)[0]

    def _known(self) -> dict[str, Any]:
        """The values of the sites that need no initial values any more."""
        waiting = self._loaded.mutable
        return self._met() | {name: value for name, value in self.mutable_state.items() if name not in waiting}

    def _met(self) -> dict[str, Any]:
        """The constrained values of the sites that model and guide have reached here."""
        values = {leaf: self._params[leaf].value for site in self._sites.values() for leaf in site.leaves}
        return {name: site.value(values) for name, site in self._sites.items()}

    def _commit(self, plan: _Plan) -> None:
        """Keep what a call that has succeeded found out."""
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
        """Warn once when static arguments make a program at each step."""
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


class _Plan:
    """One call in the making: what it runs, and what is to be kept when it succeeds."""

    program: _Program
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

    def begin(self, program: _Program) -> None:
        """Choose the program and the parameters that it reaches."""
        self.program = program
        self.params = {name: self.all_params[name] for name in program.names}


class _Program:
    """The loss for one combination of static arguments, shapes and dtypes.

    Args:
        objective: the loss over all arguments.
        arguments: of the first call.
        sites: the parameters that these arguments lead to.
        is_forward: whether it is differentiated forward.
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


@jax.jit
def _kept_if_finite(loss: jax.Array, new: Any, old: Any) -> Any:
    """The new mutable state, or the old one where the step was skipped."""
    return jax.tree.map(lambda n, o: jnp.where(jnp.isfinite(loss), n, o), new, old)


def _checked_values(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """A dict of initial values by site."""
    if values is not None and not isinstance(values, Mapping):
        raise TypeError(f"init_params must be a dict of values by site, but got {type(values).__name__}.")
    return dict(values or {})


def _checked_key(key: Any) -> jax.Array:
    """A JAX key; raises for anything else."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    raw = isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.ndim == 1
    if not (typed or raw):
        raise TypeError(f"The key must be a JAX key, such as jax.random.key(0), but got {key!r}.")
    return key


def _progress_bar(total: int, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """A bar of tqdm, or None without it."""
    if not wanted:
        return contextlib.nullcontext()
    try:
        import tqdm
    except ImportError:
        return contextlib.nullcontext()
    return tqdm.tqdm(total=total)
