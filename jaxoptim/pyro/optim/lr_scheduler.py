"""Learning rate schedules for parameters that are met while the program runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jaxoptim.core.shown import shown
from jaxoptim.optim.lr_scheduler import LRScheduler
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.optim.foreign import CLASS, SCHEDULE, refuse_foreign
from jaxoptim.pyro.optim.optim import Constructor, OptimArgs, PyroOptim, restored


class PyroLRScheduler(PyroOptim):
    r"""A scheduled optimizer for parameters that are met while the program runs: ``pyro.optim.PyroLRScheduler``.

    Each parameter has a schedule of its own, which begins when the parameter comes. Calling the object updates the
    parameters; :meth:`step` moves all schedules on:

    .. math::
        \theta_i \leftarrow \mathrm{step}(\mathrm{rule}(\gamma_i(n_i)),\ \theta_i,\ \mathrm{clip}_i(g_i)), \qquad
        n_i \leftarrow n_i + 1.

    Args:
        scheduler_constructor: a class of ``jaxoptim.optim.lr_scheduler``, or a function ``(optimizer, **options)``.
        optim_args: a dict with ``"optimizer"`` (a class of ``jaxoptim.optim``), ``"optim_args"`` (its options: a dict
            or a function, as in :class:`PyroOptim`), and the scheduler's options. It is not changed. For
            ``ChainedScheduler`` and ``SequentialLR``, ``"schedulers"`` is a list of functions of the optimizer, each
            of which returns a scheduler.
        clip_args: see :class:`PyroOptim`.

    Attributes:
        pt_scheduler_constructor: as given.
        kwargs: the options of the scheduler.
        optimizer: the class of the optimizer.

    Raises:
        ``TypeError`` for options that are no dict and for classes of torch's, ``KeyError`` for one without
        ``"optimizer"`` or ``"optim_args"``; at the first step of a parameter what the scheduler and the optimizer
        raise, with its name.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim as torch_style
        >>> from jaxoptim.pyro import optim
        >>> scheduler = optim.ExponentialLR({"optimizer": torch_style.SGD, "optim_args": {"lr": 0.5}, "gamma": 0.5})
        >>> params, grads = {"loc": jnp.array(1.0)}, {"loc": jnp.array(1.0)}
        >>> for epoch in range(2):
        ...     params = scheduler.update(params, grads)
        ...     scheduler.step()
        >>> float(params["loc"])
        0.25
    """

    def __init__(
        self,
        scheduler_constructor: Callable[..., LRScheduler],
        optim_args: Mapping[str, Any],
        clip_args: OptimArgs | None = None,
    ) -> None:
        if not isinstance(optim_args, Mapping):
            raise TypeError(
                "optim_args of a scheduler must be a dict with 'optimizer', 'optim_args' and the scheduler's options, "
                f"but got {shown(optim_args)}."
            )
        if missing := [name for name in ("optimizer", "optim_args") if name not in optim_args]:
            raise KeyError(
                f"optim_args has no {missing[0]!r}. Give {{'optimizer': optim.SGD, 'optim_args': {{'lr': 0.1}}, ...}}, "
                "where the rest are the scheduler's options."
            )
        refuse_foreign("scheduler_constructor", scheduler_constructor, SCHEDULE)
        refuse_foreign("The 'optimizer' of optim_args", optim_args["optimizer"], CLASS)
        self.pt_scheduler_constructor = scheduler_constructor
        self.kwargs = {name: value for name, value in optim_args.items() if name not in ("optimizer", "optim_args")}
        self._schedulers: dict[str, LRScheduler] = {}
        self._missed = weakref.WeakKeyDictionary[Parameter, list[Any]]()
        super().__init__(optim_args["optimizer"], optim_args["optim_args"], clip_args)

    @property
    def optimizer(self) -> Constructor:
        """The class of the optimizer."""
        return self.pt_optim_constructor

    @property
    def optim_objs(self) -> Mapping[str, Any]:
        """The scheduler of each parameter, by name, each with its ``optimizer``."""
        return MappingProxyType({name: self._schedulers[name] for name in self._joint.members})

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Advance all schedules, once an epoch. Before any parameter is known this does nothing.

        A schedule that was loaded and waits for its parameter is moved on when that comes; until then its state has the
        arguments of these steps under ``"late"``.

        Args:
            args: what the scheduler's ``step`` takes, such as the loss for ``ReduceLROnPlateau``.
            kwargs: as ``args``.
        """
        for name in self._joint.members:
            self._schedulers[name].step(*args, **kwargs)
        for state in self._waiting.values():
            state.setdefault("late", []).append((args, kwargs))
        for param in self._aside:
            self._missed.setdefault(param, []).append((args, kwargs))

    def _meet(self, params: list[Parameter]) -> Callable[[], None]:
        before = dict(self._schedulers)
        try:
            undo_others = super()._meet(params)
        except BaseException:
            self._schedulers = before
            raise
        missed = {param: self._missed.pop(param) for param in params if param in self._missed}

        def undo() -> None:
            undo_others()
            self._schedulers = before
            self._missed.update(missed)

        return undo

    def _optimizer(self, name: str, param: Parameter) -> Optimizer:
        optimizer = super()._optimizer(name, param)
        options = dict(self.kwargs)
        if made := options.get("schedulers"):
            options["schedulers"] = [of(optimizer) for of in made]
        try:
            self._schedulers[name] = self.pt_scheduler_constructor(optimizer=optimizer, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"The schedule of {name!r}, {options}, does not work: {error}") from error
        optimizer._opt_called = True  # a parameter comes with its first step
        return optimizer

    def _saved(self, name: str) -> Any:
        return {"scheduler": self._schedulers[name].state_dict(), "optimizer": super()._saved(name)}

    def _load(self, name: str, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        if missing := [part for part in ("scheduler", "optimizer") if part not in state]:
            raise ValueError(f"The state of {name!r} has no {missing[0]!r}: it is not of a scheduled optimizer.")
        restored(name, self._schedulers[name], state["scheduler"])
        super()._load(name, optimizer, state["optimizer"])
        for args, kwargs in state.get("late", ()):
            self._schedulers[name].step(*args, **kwargs)

    def _resume(self, name: str, optimizer: Optimizer, param: Parameter) -> None:
        super()._resume(name, optimizer, param)
        for args, kwargs in self._missed.get(param, []):
            self._schedulers[name].step(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        about = {"pt_scheduler_constructor": self.pt_scheduler_constructor, "kwargs": self.kwargs}
        return super().__getstate__() | about

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.pt_scheduler_constructor, self.kwargs = state["pt_scheduler_constructor"], state["kwargs"]
        self._schedulers, self._missed = {}, weakref.WeakKeyDictionary()
        super().__setstate__(state)
