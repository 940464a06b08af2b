"""Pyro's optimizers: parameters by name, met while the program runs, each with options and a count of its own."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim import checkpoint
from jaxoptim.core import OptState, bound
from jaxoptim.core.clipping import Clip
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.loss import all_finite
from jaxoptim.core.shown import shown
from jaxoptim.core.tracing import refuse_tracing
from jaxoptim.engine.numbers import Setting
from jaxoptim.optim.lbfgs import LBFGS
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.sampler import Sampler
from jaxoptim.pyro.optim.checks import check_dict, check_name, check_same, checked_update, listed, takes_two
from jaxoptim.pyro.optim.files import loaded
from jaxoptim.pyro.optim.foreign import CLASS, refuse_foreign
from jaxoptim.pyro.optim.joint import Joint
from jaxoptim.pyro.optim.member import Member

OptimArgs = Mapping[str, Any] | Callable[..., dict[str, Any]]
"""Options for all parameters, or a function that makes those of one from its name."""
Constructor = Callable[..., Optimizer]
"""A torch-style class, or a function ``(params, **options) -> optimizer``."""

DIVIDER = "$$$"
"""Pyro's separator between the names of a module and of its parameter."""


def is_scheduler(optimizer: Any) -> bool:
    """Return whether an object schedules the learning rate of an optimizer.

    Args:
        optimizer: anything.

    Returns:
        True for a :class:`PyroLRScheduler` (where Pyro's function says False) and for a scheduler of
        ``jaxoptim.optim.lr_scheduler``.

    Examples:
        >>> from jaxoptim.pyro import optim
        >>> optim.is_scheduler(optim.Adam({}))
        False
    """
    return hasattr(optimizer, "optimizer")


class PyroOptim:
    r"""A torch-style optimizer for parameters that are met while the program runs: ``pyro.optim.PyroOptim``.

    Each parameter has options, state and a count of steps of its own, under its name, from its first step on:

    .. math::
        \theta_i, s_i \leftarrow
        \mathrm{step}(\mathrm{rule}(\text{options of } i),\ \theta_i,\ \mathrm{clip}_i(g_i),\ s_i).

    All of them are updated in one compiled call, in which options are data. Another set of known parameters needs no
    other program (but for large arrays); new parameters, however many, need one.

    Args:
        optim_constructor: a class of ``jaxoptim.optim`` (or a function of ``params`` and options that returns one),
            ``LBFGS`` and samplers excepted.
        optim_args: its options, a dict; or a function of the parameter's name that returns a dict and is asked once
            for each name. ``"$$$"`` in a name, Pyro's mark between a module and its parameter, comes as a dot. A
            function of two arguments (deprecated; a second one with a default counts, as in Pyro) gets the names of
            module and parameter.
        clip_args: how gradients are clipped, a dict with ``clip_norm`` (a bound on the norm of each parameter's
            gradient, applied first) and ``clip_value`` (a bound on each number); or a function of the names of module
            and parameter (default None: not at all). The parameter's ``grad`` is left as it is.

    Attributes:
        pt_optim_constructor: as given.
        pt_optim_args: as given.
        pt_clip_args: as given.

    Raises:
        ``TypeError`` for arguments of another kind, such as a class of torch's; at the first step of a parameter, with
        its name, ``TypeError`` for an option or clipping that does not exist and ``ValueError`` for one out of range. A
        call that raises leaves everything as it was.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.optim import Parameter
        >>> from jaxoptim.pyro import optim
        >>> loc, scale = Parameter(1.0, "loc"), Parameter(2.0, "scale")
        >>> optimizer = optim.Adam(lambda name: {"lr": 0.5 if name == "loc" else 0.25}, {"clip_norm": 10.0})
        >>> loc.grad, scale.grad = jnp.array(3.0), jnp.array(-1.0)
        >>> optimizer([loc, scale])
        >>> round(float(loc.value), 3), round(float(scale.value), 3)
        (0.5, 2.25)
    """

    def __init__(
        self, optim_constructor: Constructor, optim_args: OptimArgs, clip_args: OptimArgs | None = None
    ) -> None:
        refuse_foreign("optim_constructor", optim_constructor, CLASS)
        if not callable(optim_constructor) or optim_constructor is LBFGS:
            raise TypeError(
                "optim_constructor must be a class of jaxoptim.optim other than LBFGS, but got "
                f"{shown(optim_constructor)}."
            )
        kind: Any = optim_constructor
        if isinstance(kind, type) and issubclass(kind, Sampler):
            raise TypeError(
                f"PyroOptim has state for each parameter, but {kind.__name__} shares its noise and more "
                "between them. SVI takes its rule, and jaxoptim.sampling samples."
            )
        clip_args = {} if clip_args is None else clip_args
        for what, given in (("optim_args", optim_args), ("clip_args", clip_args)):
            if not (callable(given) or isinstance(given, Mapping)):
                raise TypeError(
                    f"{what} must be function that returns defaults or a defaults dictionary, but got {shown(given)}. "
                    "Give {'lr': 0.1}, or a function of the parameter's name that returns such a dict."
                )
        self.pt_optim_constructor = optim_constructor
        self.pt_optim_args = optim_args
        self.pt_clip_args = clip_args
        self._joint = Joint()
        self._asked: dict[str, tuple[dict[str, Any], Clip]] = {}
        self._waiting: dict[str, Any] = {}
        self._aside = weakref.WeakKeyDictionary[Parameter, Any]()  # states of parameters in whose places others came
        self._met: list[Parameter] = []
        self._subsampled: list[Member] = []

    @property
    def optim_objs(self) -> Mapping[str, Any]:
        """The torch-style optimizer of each parameter, by name.

        What you write into its ``param_groups`` or ``state`` takes effect at the next step; it makes no steps itself.
        """
        return MappingProxyType({name: member.optimizer for name, member in self._joint.members.items()})

    # Steps.

    def __call__(self, params: Iterable[Parameter]) -> None:
        """Update parameters once, each from its ``grad``.

        Args:
            params: parameters with names. One whose ``grad`` is None is left as it is. A new parameter under a known
                name begins afresh, as in Pyro: another fit. The other goes on from its own state when it comes again.

        Raises:
            ``TypeError`` for what is no parameter; ``ValueError`` for a parameter without a name, for two of one
            name, and for one of another shape than the parameter of that name so far.

        Examples:
            See :class:`PyroOptim`.
        """
        _refuse_tracing(self)
        params = params if isinstance(params, list) else listed(params)
        try:
            grads = [param.grad for param in params]
        except AttributeError:
            for param in params:
                check_name(param)
            raise
        self.advance(params, grads)

    def update(self, params: Mapping[str, Any], grads: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Update values by name: the same step without parameters that change.

        Args:
            params: a dict of name to array.
            grads: a dict of name to gradient, None where a value is to stay.

        Returns:
            A dict of the new values. What was given is left as it is.

        Raises:
            ``ValueError`` for gradients of other names or shapes; ``TypeError`` inside a compiled function, where
            there is ``jaxoptim.transformation(optimizer)``.

        Examples:
            >>> import jax.numpy as jnp
            >>> from jaxoptim.pyro import optim
            >>> optimizer = optim.SGD({"lr": 0.5})
            >>> optimizer.update({"loc": jnp.array(1.0)}, {"loc": jnp.array(3.0)})
            {'loc': Array(-0.5, dtype=float32)}
        """
        _refuse_tracing(self)
        grads = checked_update(params, grads)
        known = {name: self._joint.members[name].param for name in params if name in self._joint.members}
        cells = [known.get(name) or Parameter(value, name) for name, value in params.items()]
        pairs = zip(cells, params.values(), strict=True)
        changed = [(cell, cell.value, value) for cell, value in pairs if cell.name in known and cell.value is not value]
        for cell, _, value in changed:
            check_same(cell, jnp.shape(value), jnp.result_type(value))
        try:
            for cell, _, value in changed:
                cell.value = value
            self.advance(cells, [grads[name] for name in params])
        except BaseException:
            for cell, old, _ in changed:
                cell.value = old
            raise
        self._joint.read_all()
        return {str(cell.name): cell.value for cell in cells}

    def joined(self, params: list[Parameter]) -> tuple[Joint, Callable[[], None]]:
        """Return the store of all parameters, these among them, for a step; and a function that undoes the addition."""
        undo = self._meet(params) if params != self._met else _nothing
        for member in self._subsampled:
            if member.param.subsample is not member.subsample:
                member.subsample = member.param.subsample
                member.options["subsample"] = jax.tree.map(np.asarray, member.subsample)
        return self._joint, undo

    def pure(self, name: str, value: jax.Array) -> tuple[Setting, OptState | None]:
        """The setting of a parameter's next step, and its state as the pure face has it, None before the first."""
        if name not in self._joint.members:
            return self._setting(name, value), None
        check_same(self._joint.members[name].param, value.shape, value.dtype)
        return self._joint.pure(name)

    def advance(self, params: list[Parameter], grads: list[Any], *, skip_nonfinite: bool = False) -> bool:
        """Make a step of parameters along given gradients, and return whether it was taken.

        Args:
            params: parameters with names.
            grads: a gradient for each, or None.
            skip_nonfinite: make no step if a gradient is not finite (default False).
        """
        # A known set of parameters has nothing to undo, and its step by itself stands Ctrl-C.
        is_known = params == self._met
        with contextlib.nullcontext() if is_known else Uninterrupted():
            joint, undo = self.joined(params)
            try:
                grads = self._reduced(params, grads)
                taken = not skip_nonfinite or bool(all_finite(grads))
                if taken:
                    joint.advance(params, grads)
                return taken
            except BaseException:
                if not is_known:
                    undo()
                raise

    def _reduced(self, params: list[Parameter], grads: list[Any]) -> list[Any]:
        """Return gradients as the step takes them; a subclass reduces them over replicas here."""
        return grads

    def _meet(self, params: list[Parameter]) -> Callable[[], None]:
        """Add all parameters that are new, or new under a known name, or none; return a function that undoes it."""
        seen: dict[str, Parameter] = {}
        for param in params:
            check_name(param)
            if seen.setdefault(str(param.name), param) is not param:
                raise ValueError(
                    f"Two of the parameters are called {param.name!r}. Parameters are told apart by their names."
                )
        if len(seen) != len(params):
            raise ValueError("A parameter stands twice in the list. Give each once.")
        joint, members = self._joint, self._joint.members
        joint.let_go()
        new, old, left = list[Member](), list[Member](), dict[Parameter, Any]()
        for name, param in seen.items():
            if name in members:
                check_same(members[name].param, param.shape, param.dtype)
                if members[name].param is param:
                    continue
                old.append(members[name])
                left[members[name].param] = self._saved(name)
            asked = self._asked.pop(name, None)
            try:
                new.append(self._member(name, param))
            except BaseException:
                if asked is not None:
                    self._asked[name] = asked
                raise
        returned = {member.param: self._aside.pop(member.param) for member in new if member.param in self._aside}
        fresh = [member.name for member in new if member.param not in returned]
        consumed = {name: self._waiting.pop(name) for name in fresh if name in self._waiting}
        self._aside.update(left)
        for member in new:
            joint.add(member)
        self._set_met(params)

        def undo() -> None:
            for member in new:
                joint.remove(member.name)
                self._asked.pop(member.name, None)
            for member in old:
                joint.add(member)
            self._waiting |= consumed
            for param in left:
                self._aside.pop(param, None)
            self._aside.update(returned)
            self._set_met([])

        return undo

    def _set_met(self, params: list[Parameter]) -> None:
        self._met = list(params)
        self._subsampled = [member for member in self._joint.members.values() if "subsample" in member.options]

    # From a name to an optimizer.

    def _ask(self, name: str) -> tuple[dict[str, Any], Clip]:
        """The options and the clipping of a name."""
        if name not in self._asked:
            module, _, own = name.partition(DIVIDER)
            pieces = (module, own or module)
            options = self.pt_optim_args
            if callable(options):
                options = options(*pieces) if takes_two(options) else options(name.replace(DIVIDER, "."))
                check_dict("optim", name, options)
            clip = self.pt_clip_args
            if callable(clip):
                clip = clip(*pieces)
                check_dict("clip", name, clip)
            what = f"clip_args of {name!r}: Clip"
            self._asked[name] = (dict(options), Clip(**bound(what, inspect.signature(Clip), (), clip)))
        return self._asked[name]

    def _optimizer(self, name: str, param: Parameter) -> Optimizer:
        """The torch-style optimizer of one parameter."""
        options, _ = self._ask(name)
        try:
            optimizer = self.pt_optim_constructor([param], **options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"The options of {name!r}, {options}, do not work: {error}") from error
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optim_constructor must make an optimizer of jaxoptim.optim, but made {type(optimizer).__name__}."
            )
        (group,) = optimizer.param_groups
        if "dct_dim" in group and group["dct_dim"] is None and param.dct_dim is not None:
            group["dct_dim"] = param.dct_dim
            optimizer._storage.check_param(optimizer._storage.rule_of(group), name, param)
        return optimizer

    def _member(self, name: str, param: Parameter) -> Member:
        """A parameter as it comes in, with the state that has been waiting for it."""
        try:
            optimizer = self._optimizer(name, param)
            if param in self._aside:
                self._resume(name, optimizer, param)
            elif name in self._waiting:
                self._load(name, optimizer, self._waiting[name])
            return Member(self._joint.store, param, optimizer, self._ask(name)[1], self._joint.written)
        except BaseException:
            self._asked.pop(name, None)  # asked for again next time
            raise

    def _setting(self, name: str, like: Any) -> Setting:
        """The setting of a parameter that has made no steps, which the pure face goes on with."""
        with jax.ensure_compile_time_eval():
            optimizer = self._optimizer(name, Parameter(np.zeros(like.shape, like.dtype), name))
        (group,) = optimizer.param_groups
        rule = optimizer._storage.rule_of(group).replace(**{option: group[option] for option in optimizer.fixed})
        return Setting(rule, self._ask(name)[1])

    # Saving and loading.

    def get_state(self) -> dict[str, Any]:
        """The state of all parameters.

        Returns:
            A dict of name to the state dict of its optimizer, in torch's layout; also those that wait for their
            parameter (which Pyro leaves out).

        Examples:
            >>> import jax.numpy as jnp
            >>> from jaxoptim.pyro import optim
            >>> optimizer = optim.Adam({"lr": 0.5})
            >>> _ = optimizer.update({"loc": jnp.array(1.0)}, {"loc": jnp.array(3.0)})
            >>> sorted(optimizer.get_state()["loc"]["state"][0])
            ['exp_avg', 'exp_avg_sq', 'step']
        """
        return {name: self._saved(name) for name in self._joint.members} | copy.deepcopy(self._waiting)

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`get_state` gave, here or in Pyro. Options come from it too.

        Args:
            state_dict: a dict of name to state. The state of a name that is not known yet waits for its parameter; that
                of a known one takes effect at once (Pyro ignores it).

        Raises:
            ``TypeError`` for what is no dict of dicts; ``ValueError`` and ``KeyError`` for a state that does not fit
            the parameter of that name. Nothing is changed then. The state that waits is checked when its parameter
            comes.

        Examples:
            >>> import jax.numpy as jnp
            >>> from jaxoptim.pyro import optim
            >>> old, new = optim.Adam({"lr": 0.5}), optim.Adam({})
            >>> params = old.update({"loc": jnp.array(1.0)}, {"loc": jnp.array(3.0)})
            >>> new.set_state(old.get_state())
            >>> new.update(params, {"loc": jnp.array(3.0)})["loc"] == old.update(params, {"loc": jnp.array(3.0)})["loc"]
            Array(True, dtype=bool)
        """
        if not isinstance(state_dict, Mapping) or not all(isinstance(of, Mapping) for of in state_dict.values()):
            raise TypeError("set_state takes what get_state() gave: a dict of parameter name to state dict.")
        known = [name for name in state_dict if name in self._joint.members]
        before = {name: self._saved(name) for name in known}
        try:
            for name in known:
                self._load(name, self._joint.members[name].optimizer, state_dict[name])
        except BaseException:
            for name in known:
                self._load(name, self._joint.members[name].optimizer, before[name])
            raise
        self._waiting |= {name: copy.deepcopy(state) for name, state in state_dict.items() if name not in known}

    def states_of(self, params: Mapping[str, Parameter]) -> dict[str, Any]:
        """The states of the parameters of one fit, whichever was updated last, and those that wait."""
        members = self._joint.members
        known = [
            param
            for name, param in params.items()
            if param in self._aside or (name in members and members[name].param is param)
        ]
        self._meet(known)
        return {str(param.name): self._saved(str(param.name)) for param in known} | copy.deepcopy(self._waiting)

    def take_over(self, states: Mapping[str, Any], params: Mapping[str, Parameter]) -> Callable[[], None]:
        """Give the parameters of one fit what :meth:`states_of` gave; the others begin afresh.

        Returns:
            A function that takes it back.
        """
        waiting = self._waiting
        before = {name: state for name, state in self.states_of(params).items() if name not in waiting}
        self._waiting = {name: state for name, state in waiting.items() if name not in states}
        for name in before.keys() - states.keys():
            self._joint.remove(name)
        undo_meeting = _nothing

        def undo() -> None:
            self.set_state({name: before[name] for name in before.keys() & states.keys()})
            undo_meeting()
            self._meet([params[name] for name in before])
            self.set_state(before)
            self._waiting = waiting

        try:
            undo_meeting = self._meet([params[name] for name in states if name in params])
            self.set_state(states)
        except BaseException:
            undo()
            raise
        return undo

    def save(self, filename: str | os.PathLike[str]) -> None:
        """Write :meth:`get_state` to a file, as ``jaxoptim.checkpoint.save`` does.

        Args:
            filename: the file.

        Raises:
            See ``jaxoptim.checkpoint.save``.
        """
        checkpoint.save(filename, self.get_state())

    def load(self, filename: str | os.PathLike[str], map_location: Any = None) -> None:
        """Read what :meth:`save` wrote, here or in Pyro, into :meth:`set_state`.

        Args:
            filename: the file. One of Pyro's is read by ``torch.load(weights_only=True)``, which needs torch.
            map_location: passed on to ``torch.load``; without effect on files of this library (default None).

        Raises:
            See :meth:`set_state` and ``jaxoptim.checkpoint.load``; ``ImportError`` for a file of Pyro's without torch.
        """
        # Read so, nothing in a file is run.
        self.set_state(loaded(filename, lambda torch: torch.load(filename, map_location, weights_only=True)))

    def _saved(self, name: str) -> Any:
        """The state of one parameter; counts of each number that are all the same as one, as Pyro has them."""
        optimizer = self._joint.members[name].optimizer
        saved = optimizer.state_dict()
        for group in saved["param_groups"]:
            for option in optimizer.may_lack & group.keys():  # which Pyro keeps elsewhere
                del group[option]
        for entry in saved["state"].values():
            counts = np.asarray(entry.get("step", 0))
            if counts.ndim and counts.size and (counts == counts.flat[0]).all():
                entry["step"] = int(counts.flat[0])
        return saved

    def _load(self, name: str, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Give an optimizer the state of one parameter."""
        if "scheduler" in state:
            raise ValueError(
                f"The state of {name!r} is of a PyroLRScheduler, but this optimizer has no schedule. Load it into one, "
                "or give the 'optimizer' part of each name."
            )
        restored(name, optimizer, state)

    def _resume(self, name: str, optimizer: Optimizer, param: Parameter) -> None:
        """Give an optimizer the state that a parameter had when another came in its place."""
        self._load(name, optimizer, self._aside[param])

    def __getstate__(self) -> dict[str, Any]:
        about = {name: vars(self)[name] for name in ("pt_optim_constructor", "pt_optim_args", "pt_clip_args")}
        return about | {"state": self.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PyroOptim.__init__(self, state["pt_optim_constructor"], state["pt_optim_args"], state["pt_clip_args"])
        self._waiting = state["state"]


def _refuse_tracing(optimizer: PyroOptim) -> None:
    refuse_tracing(f"A step of {type(optimizer).__name__}", "use jaxoptim.transformation(optimizer)")


def _nothing() -> None:
    """Undo nothing."""


def restored(name: str, owner: Any, state: Any) -> None:
    """Load a state dict into an optimizer or a scheduler; what does not fit is told with the parameter's name."""
    try:
        owner.load_state_dict(state)
    except (KeyError, ValueError, TypeError) as error:
        raise type(error)(f"The state of {name!r} does not fit: {error.args[0] if error.args else error}") from error
