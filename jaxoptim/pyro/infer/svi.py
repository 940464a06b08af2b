"""Stochastic variational inference with an object that keeps its parameters."""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxoptim import checkpoint
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.placement import along, check_mesh, is_over_processes
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.infer.arguments import Arguments
from jaxoptim.pyro.infer.batches import Data, Draws, data_of
from jaxoptim.pyro.infer.fit import Fit, checked_key, checked_values
from jaxoptim.pyro.infer.pieces import in_pieces
from jaxoptim.pyro.infer.program import Plan
from jaxoptim.pyro.infer.restarts import Fits, Restarts, beginnings
from jaxoptim.pyro.infer.saved import (
    Loaded,
    calls_of,
    check_params,
    checked_state,
    loaded_mutable,
    sites_of,
)
from jaxoptim.pyro.infer.stores import by_site, constrained_values, is_store, loaded, unconstrained
from jaxoptim.pyro.optim.multi_optimizer import checked
from jaxoptim.pyro.optim.state_trees import plain


class SVI(Fit):
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
        losses: the losses of the last :meth:`run`, those of one that ended early too.
        num_steps: the steps made so far, an int, which a saved state has too.

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
            ``TypeError`` for an argument that is neither array nor hashable, for one called ``self`` that is given by
            keyword to an automatic guide, and for a loss that is no scalar; what model, guide and optimizer raise. A
            ``UserWarning`` when static arguments make many programs.
        """
        return float(self._advance(Arguments(args, kwargs), self._skip_nonfinite))

    def evaluate_loss(self, /, *args: Any, **kwargs: Any) -> float:
        """Return the loss at the start of the next step; parameters, key and mutable state stay as they are.

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
            self._commit(self._plan(data.arguments(), self._initial | checked_values(init_params)))
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
        mesh: Mesh | None = None,
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
            mesh: the devices to spread the fits over, each of which makes as many, such as
                ``jax.make_mesh((8,), ("fits",))``; all of its axes count. They may be of several processes, which all
                make this call with the same arguments; then ``params`` stay where their fits are (default None: one
                device).
            kwargs: as of :meth:`run`.

        Returns:
            The number of the best fit, ``best``, and of all fits ``losses`` and constrained ``params``.

        Raises:
            ``ValueError`` after the first call, where parameters are shared, for a mesh whose devices do not divide the
            fits, and where no fit has a finite loss at the end; ``TypeError`` for an optimizer that needs Python in
            each step; as :meth:`run`. Nothing is kept then, but after Ctrl-C: the best so far.

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
        if (mesh := check_mesh(mesh)) is not None and num_restarts % mesh.size:
            raise ValueError(
                f"The mesh has {mesh.size} devices, which do not divide {num_restarts} fits. Give another number of "
                "fits, or a mesh of some of its devices."
            )
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
        fits, skips = (
            Fits(self._multi, *begun, None if mesh is None else along(mesh, "fits")),
            self._skip_nonfinite or bool(stable_update),
        )

        def advance(most: int) -> np.ndarray:
            count, before = data.ahead(most), fits.losses.shape[1]
            if data.arguments().program != plan.arguments.program:
                raise ValueError("The batches of run_many must have one shape, but one differs from the first.")
            with Uninterrupted():
                data.advance(fits.advance(plan.program.loss, data.turn(skips), data.given(), count, skips))
            return np.min(fits.losses[:, before:], 0)

        try:
            in_pieces(num_steps, progress_bar, advance, mesh=mesh)
        except KeyboardInterrupt:
            if fits.losses.size and not is_over_processes(mesh):  # which are interrupted at different steps
                self._keep_best(fits, plan, data)
            raise
        best, params = fits.best(), fits.constrained(plan.sites)
        self._keep_best(fits, plan, data)
        return Restarts(best, jnp.asarray(fits.losses), params)

    def _keep_best(self, fits: Fits, plan: Plan, data: Data) -> None:
        """Continue from the best of several fits."""
        best = fits.best()
        fits.keep(best)
        plan.all_params |= fits.params
        plan.key, plan.mutable = fits.carried
        self.losses, self.num_steps = fits.losses[best], fits.losses.shape[1]
        self._commit(plan)
        self._go_on(data, 0)

    def get_params(self) -> dict[str, Any]:
        """Return the constrained parameters, in the form for ``numpyro.infer.Predictive``.

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
        """Return the full state of a run: parameters, optimizer state, key, mutable state and counts.

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
        params = checked(self._params)
        return {
            "params": {name: param.value for name, param in params.items()},
            "optimizer": self._multi.state_dict(params),
            "key": self.key,
            "mutable_state": plain(dict(self.mutable_state)),
            "has_begun": self._begun,
            "reached": sorted(self._params.reached),
            "sites": sites_of(self._sites, params, self._loaded),
            "calls": calls_of(self._programs, self._loaded),
            "store": self._store,
            "draws": self._draws._asdict(),
            "num_steps": self.num_steps,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume, bit for bit, from the state of an SVI with the same model, guide and kind of optimizer.

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
        key, values, own = checked_key(state["key"]), state["params"], dict(checked(self._params))
        brought = self._multi.brought()
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
            self._draws, self.num_steps = Draws(**state["draws"]), int(state["num_steps"])
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
        """Continue from constrained values by name."""
        if not self._begun:
            self._store = store
            return
        values = {name: param.value for name, param in self._params.items()}
        given, names = by_site(store, self._sites, values)
        new = unconstrained(self._sites, given, names)
        with Uninterrupted():
            for name, value in new.items():
                self._params[name].value = value
