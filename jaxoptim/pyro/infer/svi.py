"""Stochastic variational inference with an object that keeps its parameters."""

from __future__ import annotations

import copy
import functools
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core.forward import by_forward_mode
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.loss import Loss
from jaxoptim.core.tracing import refuse_tracing
from jaxoptim.engine.loops import Changes, Course
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.infer.arguments import Arguments
from jaxoptim.pyro.infer.batches import Data, Drawn, Draws, data_of, kept_if_finite
from jaxoptim.pyro.infer.elbo import as_elbo
from jaxoptim.pyro.infer.objective import Discovery, Objective, Site, discover
from jaxoptim.pyro.infer.parameters import Parameters
from jaxoptim.pyro.infer.pieces import in_pieces
from jaxoptim.pyro.infer.restarts import Fits, Restarts, beginnings
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
        mutable_state: a dict of the values of ``numpyro.primitives.mutable`` sites, such as running averages of batch
            normalisation.
        losses: the losses of the last :meth:`run`, those of one that ended early too.

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
        self._multi = self._params.optimized_by(optim)
        self.key = jax.random.key(0) if key is None else _checked_key(key)
        self.mutable_state: dict[str, Any] = {}
        self._skip_nonfinite = bool(skip_nonfinite)
        self._is_forward = bool(forward_mode_differentiation)
        self.losses = np.zeros(0, np.float32)
        self._draws = Draws(jax.random.fold_in(_typed(self.key), 2))
        self._begun = False
        self._sites: dict[str, Site] = {}
        self._programs: dict[Any, _Program] = {}
        self._forms: dict[Any, Arguments] = {}

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
            ``TypeError`` for an argument that is neither array nor hashable, for one called ``self`` that is given by
            keyword to an automatic guide, and for a loss that is no scalar; what model, guide and optimizer raise. A
            ``UserWarning`` when static arguments make many programs.
        """
        return float(self._advance(Arguments(args, kwargs), self._skip_nonfinite))

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
        plan = self._plan(Arguments(args, kwargs))
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
        stable_update: bool = False,
        batch_size: int | None = None,
        init_params: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """Make many steps, in one compiled program.

        The steps are those of :meth:`step`, to the last bit. The program is called for some tenths of a second at a
        time; in between the bar moves on, and Ctrl-C finds everything as the last step has left it. Optimizers that
        need Python in each step (a class with a ``get_step`` of your own, ``HorovodOptimizer``, ``optim.LBFGS``,
        torch-style ones with hooks or ``gradient_transform``) make theirs one after another.

        Args:
            num_steps: how many, at least 1.
            args: arguments of model and guide. One that is an iterable of batches, such as a ``DataLoader`` of NumPy's
                arrays or a generator, gives each step another batch in its place, and begins anew at its end if it can.
            progress_bar: show one, with the loss, if tqdm is installed (default True).
            stable_update: a step whose loss or gradient is not finite changes nothing but the key, and its loss is nan
                (default False: as the class is told by ``skip_nonfinite``).
            batch_size: so many of the data each step is given, drawn on the device and shuffled anew in each epoch
                (default None: all). Data are the keyword argument ``data``, or else the first argument: a pytree of
                arrays whose first axes run over the data.
            init_params: as of the class, for the first call (default None). A model's own arguments of these names go
                through :meth:`step`.
            kwargs: keyword arguments of both.

        Returns:
            The losses, an array of length ``num_steps``. Those of a run that ended early are in
            :attr:`losses`.

        Raises:
            ``ValueError`` for fewer than one step, for ``init_params`` after the first call, a ``batch_size`` that the
            data do not have, and batches that end too early; as :meth:`step`. The steps before an error are made.

        Examples:
            See the class. With batches of 32 out of 256:

            >>> import jax, jax.numpy as jnp, numpyro
            >>> import numpyro.distributions as dist
            >>> from numpyro.infer import Trace_ELBO
            >>> from numpyro.infer.autoguide import AutoNormal
            >>> import jaxoptim
            >>> from jaxoptim.pyro.infer import SVI
            >>> def model(data):
            ...     mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
            ...     with numpyro.plate("data", 256, subsample_size=len(data)):
            ...         numpyro.sample("x", dist.Normal(mean, 1.0), obs=data)
            >>> svi = SVI(model, AutoNormal(model), jaxoptim.rules.Adam(lr=0.02), Trace_ELBO())
            >>> data = 3.0 + jax.random.normal(jax.random.key(0), (256,))
            >>> losses = svi.run(400, data, batch_size=32, progress_bar=False)
            >>> bool(abs(svi.get_params()["mean_auto_loc"] - data.mean()) < 0.1)
            True
        """
        num_steps = operator.index(num_steps)
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, but got {num_steps}.")
        data = data_of(args, kwargs, batch_size, self._draws)
        data.ahead(1)
        if init_params is not None:
            if self._begun:
                raise ValueError(
                    "init_params are for the first call, but the parameters have values already. Write into "
                    "svi.params[name].value, or make a new SVI."
                )
            self._commit(self._plan(data.arguments(), self._initial | _checked_values(init_params)))
        skips, self.losses = self._skip_nonfinite or bool(stable_update), np.zeros(0, np.float32)
        key = data.arguments().program
        most = self._programs[key].most if key in self._programs else 1
        most = in_pieces(num_steps, progress_bar, lambda most: self._advance_many(data, most, skips), most)
        self._programs[key].most = most
        return jnp.asarray(self.losses)

    def run_many(
        self,
        num_restarts: int,
        num_steps: int,
        /,
        *args: Any,
        progress_bar: bool = True,
        stable_update: bool = False,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Restarts:
        """Make many steps of several fits from initial values of their own, in one compiled program, and keep the best.

        Fit number i is that of ``SVI(..., key=jax.random.split(svi.key, num_restarts)[i])``, to rounding; batches are
        the same for all. At the end, parameters, optimizer, key and mutable state are those of the fit whose loss, the
        mean over the last tenth of the steps, is the lowest; :meth:`step` and :meth:`run` go on from there.

        Args:
            num_restarts: how many fits, at least 1.
            num_steps: how many steps of each, at least 1.
            args: as of :meth:`run`.
            progress_bar: as of :meth:`run`, with the lowest loss.
            stable_update: as of :meth:`run`.
            batch_size: as of :meth:`run`.
            kwargs: as of :meth:`run`.

        Returns:
            The number of the best fit, ``best``, and of all fits ``losses`` and constrained ``params``.

        Raises:
            ``ValueError`` after the first call, where parameters are shared, and where no fit has a finite loss at the
            end; ``TypeError`` for an optimizer that needs Python in each step; as :meth:`run`. Nothing is kept then,
            but after Ctrl-C: the best so far.

        Examples:
            >>> import jax, jax.numpy as jnp, numpyro
            >>> import numpyro.distributions as dist
            >>> from numpyro.infer import Trace_ELBO
            >>> import jaxoptim
            >>> from jaxoptim.pyro.infer import SVI
            >>> def model():
            ...     x = numpyro.sample("x", dist.Normal(0.0, 10.0))
            ...     numpyro.factor("two valleys", -((x**2 - 4.0) ** 2) + x)
            >>> def guide():
            ...     start = numpyro.param("x_loc", lambda key: 3 * jax.random.normal(key))
            ...     numpyro.sample("x", dist.Delta(start))
            >>> svi = SVI(model, guide, jaxoptim.rules.Adam(lr=0.05), Trace_ELBO())
            >>> found = svi.run_many(8, 200, progress_bar=False)
            >>> sorted({round(float(x)) for x in found.params["x_loc"]}), round(float(svi.get_params()["x_loc"]))
            ([-2, 2], 2)
        """
        num_restarts, num_steps = operator.index(num_restarts), operator.index(num_steps)
        if min(num_restarts, num_steps) < 1:
            raise ValueError(f"There must be a restart and a step at least, but got {num_restarts} and {num_steps}.")
        if self._begun or self._shares:
            raise ValueError(
                "run_many begins with fits of its own, but the parameters "
                f"{'have values already' if self._begun else 'are shared with another SVI'}. Make a new SVI."
            )
        if self._params:
            raise ValueError("run_many begins with values of its own, but svi.params has some. Give init_params.")
        if getattr(self._guide, "prototype_trace", None) is not None:
            raise ValueError(
                f"The {type(self._guide).__name__} has run already and keeps the values that it began with, so all "
                "fits would begin alike. Make a new one."
            )
        data = data_of(args, kwargs, batch_size, self._draws)
        data.ahead(1)
        guide, plan = copy.deepcopy(self._guide), self._plan(data.arguments())
        keys = jax.random.split(self.key, num_restarts)
        begun = beginnings(self._model, guide, self._elbo, keys, data.arguments(), self._initial)
        fits, skips = Fits(self._multi, *begun), self._skip_nonfinite or bool(stable_update)

        def advance(most: int) -> np.ndarray:
            count, before = data.ahead(most), fits.losses.shape[1]
            if data.arguments().program != plan.arguments.program:
                raise ValueError("The batches of run_many must have one shape, but one differs from the first.")
            with Uninterrupted():
                data.advance(fits.advance(plan.program.loss, data.turn(skips), data.given(), count, skips))
            return np.min(fits.losses[:, before:], 0)

        try:
            in_pieces(num_steps, progress_bar, advance)
        except KeyboardInterrupt:
            if fits.losses.size:
                self._keep_best(fits, plan, data)
            raise
        best, params = fits.best(), fits.constrained(plan.sites)
        self._keep_best(fits, plan, data)
        return Restarts(best, jnp.asarray(fits.losses), params)

    def _keep_best(self, fits: Fits, plan: _Plan, data: Data) -> None:
        """Go on as the best of several fits."""
        best = fits.best()
        fits.keep(best)
        plan.all_params |= fits.params
        plan.key, plan.mutable = fits.carried
        self.losses = fits.losses[best]
        self._commit(plan)
        self._go_on(data, 0)

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
        values = {name: param.value for name, param in self.params.items()}
        return {name: site.value(values) for name, site in self._sites.items()}

    def _advance(self, arguments: Arguments, skips: bool) -> jax.Array:
        """One step, whose loss nobody waits for."""
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
            self.key, self.mutable_state = key, mutable
        return loss

    def _advance_many(self, data: Data, most: int, skips: bool) -> np.ndarray:
        """Some of the next steps, at most so many; their losses, which come behind those that there are too."""
        count, before = data.ahead(most), len(self.losses)
        with Uninterrupted():  # whose end raises, when what was done is kept
            is_done = self._repeated(data, count, skips)
        if not is_done:
            self._made_singly(data, count, skips)
        return self.losses[before:]

    def _made_singly(self, data: Data, count: int, skips: bool) -> None:
        """Steps one after another."""
        found = list[jax.Array]()
        try:
            for _ in range(count):
                with Uninterrupted():
                    found.append(self._advance(data.arguments(), skips))
                    self._go_on(data, 1)
        finally:
            if found:
                self._keep(np.stack(jax.device_get(found)))

    def _repeated(self, data: Data, count: int, skips: bool) -> bool:
        """Steps in one compiled call; False, and nothing done, if that cannot be."""
        plan = self._plan(data.arguments())
        if not plan.params or not plan.program.repeats:
            return False
        course = Course(data.turn(skips), (plan.key, plan.mutable), data.given(), count)
        try:
            steps = self._multi._steps(plan.program.loss, plan.params, course, skips)
        except Changes:
            steps = None
        if steps is None:
            plan.program.repeats = False
            self._commit(plan)
            return False
        made, losses, (key, mutable) = steps
        self._commit(plan)
        self.key, self.mutable_state = key, mutable
        self._go_on(data, made)
        self._keep(np.asarray(losses)[:made])
        return True

    def _keep(self, losses: np.ndarray) -> None:
        """Put the losses of a run behind those that there are."""
        self.losses = np.concatenate([self.losses, losses]) if len(self.losses) else losses

    def _go_on(self, data: Data, count: int) -> None:
        """Let the next step be given what comes after so many."""
        data.advance(count)
        if isinstance(data, Drawn):
            self._draws = data.draws

    def _plan(self, arguments: Arguments, initial: Mapping[str, Any] | None = None) -> _Plan:
        """What a call needs; nothing is changed until :meth:`_commit`."""
        refuse_tracing("A step of SVI", "use differentiable_loss, which is pure")
        program = self._programs.get(arguments.program)
        plan = _Plan(self.key, arguments, dict(self.params), self._sites, self.mutable_state)
        if program is None:
            reached = self._reached(arguments)
            if reached is None or not reached <= self._sites.keys() | self.mutable_state.keys():
                initial = {} if self._begun else self._initial if initial is None else initial
                found = self._found(arguments, initial)
                plan.key = plan.key if self._begun else found.key
                brought = self._multi.brought() if isinstance(self._multi, TorchStyle) else {}
                if not self._begun and not self._shares:
                    self._params.check_names(found)
                plan.all_params |= self._params.begun(found, initial, brought)
                plan.sites = found.sites | self._sites
                plan.mutable = found.mutable | self.mutable_state
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

    def _found(self, arguments: Arguments, initial: Mapping[str, Any]) -> Discovery:
        """What model and guide reach, with initial values for what is new."""
        # The next step draws from children of the key itself.
        key = jax.random.fold_in(self.key, 1) if self._begun else self.key
        args, kwargs = arguments.rebuilt(arguments.traced)
        return discover(self._model, self._guide, self._elbo, key, args, kwargs, self._known(), initial)

    def _known(self) -> dict[str, Any]:
        """The values of the sites that need no initial values any more."""
        return (self.get_params() if self._begun else {}) | self.mutable_state

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

    Attributes:
        repeats: whether many steps may be made in one call.
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
        self.repeats, self.most = True, 1


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


def _typed(key: jax.Array) -> jax.Array:
    """A typed key for one of either kind."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
