"""Optimizers that take a loss function instead of gradients, and share one evaluation of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxoptim import rules
from jaxoptim.core import Hyperparameters, init, step, transformation
from jaxoptim.core.loss import Evaluation, Loss
from jaxoptim.core.names import listing
from jaxoptim.core.sparse import rows_of
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.pyro.optim import parts as steps
from jaxoptim.pyro.optim.foreign import ANY, PART, WRAPPER, refuse_foreign
from jaxoptim.pyro.optim.horovod import HorovodOptimizer
from jaxoptim.pyro.optim.multi_optimizer import Compiled, Params, check_state, differentiated, values_of
from jaxoptim.pyro.optim.multi_optimizer import MultiOptimizer as MultiOptimizer
from jaxoptim.pyro.optim.optim import Constructor, OptimArgs, PyroOptim
from jaxoptim.pyro.optim.parts import Owned, Part
from jaxoptim.pyro.optim.state_trees import by_place, from_places
from jaxoptim.pyro.optim.torch_style import TorchStyle

__all__ = [
    "MixedMultiOptimizer",
    "MultiOptimizer",
    "Newton",
    "PyroMultiOptimizer",
    "TorchMultiOptimizer",
    "as_multi_optimizer",
]
__dir__ = listing(__all__)

Name = str | re.Pattern[str]
"""The name of parameters in a part of a :class:`MixedMultiOptimizer`."""


class PyroMultiOptimizer(Compiled):
    """A :class:`PyroOptim` in the interface of :class:`MultiOptimizer`.

    Args:
        optim: makes the steps; options, clipping, state and schedules are its.

    Attributes:
        optim: as given.

    Raises:
        ``TypeError`` for anything but a :class:`PyroOptim`.

    Examples:
        >>> from jaxoptim.optim import Parameter
        >>> from jaxoptim.pyro import optim
        >>> params = {"x": Parameter(3.0, "x")}
        >>> optimizer = optim.multi.PyroMultiOptimizer(optim.SGD({"lr": 0.5}))
        >>> float(optimizer.step(lambda values: values["x"] ** 2, params)), float(params["x"].value)
        (9.0, 0.0)
    """

    def __init__(self, optim: PyroOptim) -> None:
        refuse_foreign("The optimizer", optim, WRAPPER)
        if not isinstance(optim, PyroOptim):
            raise TypeError(f"Expected a PyroOptim object but got a {type(optim)}")
        self.optim = optim

    def _step(self, loss: Loss, params: Params, args: tuple[Any, ...], skip_nonfinite: bool) -> Any:
        if not isinstance(self.optim, HorovodOptimizer):
            return super()._step(loss, params, args, skip_nonfinite)
        value, aux, grads = differentiated(loss, values_of(params), args)
        if skip_nonfinite:  # of one replica, and so of all
            grads = jax.tree.map(lambda grad: jnp.where(jnp.isfinite(value), grad, jnp.nan), grads)
        given = [grads[name] for name in params]
        taken = self.optim.advance(list(params.values()), given, skip_nonfinite=skip_nonfinite)
        value = value if taken else jnp.full_like(value, jnp.nan)
        return (value, aux) if loss.has_aux else value

    def _new_values(self, evaluation: Evaluation) -> dict[str, jax.Array]:
        new = {}
        for name, value in evaluation.values.items():
            setting, state = self.optim.pure(name, value)
            state = init(setting.rule, value) if state is None else state
            grad: Any = evaluation.grads[name]
            grad = rows_of(grad) if setting.rule.sparse == "required" else grad
            new[name], _ = step(setting.rule, value, setting.clip.clipped(grad), state)
        return new

    def state_dict(self, params: Params) -> dict[str, Any]:
        """See :meth:`MultiOptimizer.state_dict`; that of each parameter is as in :meth:`PyroOptim.get_state`."""
        states = self.optim.states_of(params)
        return {"kind": _PYRO, "names": [name for name in states if name in params], "state": states}

    def _load(self, state_dict: Mapping[str, Any], params: Params) -> Callable[[], None]:
        check_state(state_dict, _PYRO, params)
        return self.optim.take_over(state_dict["state"], params)

    def _keeper(self) -> Any:
        return self.optim

    def _parts(self, params: Params, ahead: int | None) -> list[Part] | None:
        return None if isinstance(self.optim, HorovodOptimizer) else super()._parts(params, ahead)

    def _open(self, params: Params, ahead: int | None = None) -> Part:
        if isinstance(self.optim, HorovodOptimizer):
            raise TypeError(
                "A HorovodOptimizer reduces gradients between two compiled programs, so it cannot share one with other "
                "optimizers. Give all parameters to it, or reduce the loss itself over the data."
            )
        joint, undo = self.optim.joined(list(params.values()))
        return steps.joint_part(joint, tuple(params), undo, ahead)


class TorchMultiOptimizer(PyroMultiOptimizer):
    """A torch-style class in the interface of :class:`MultiOptimizer`.

    Args:
        optim_constructor: see :class:`PyroOptim`.
        optim_args: see :class:`PyroOptim`.

    Examples:
        >>> from jaxoptim import optim
        >>> from jaxoptim.pyro.optim.multi import TorchMultiOptimizer
        >>> params = {"x": optim.Parameter(3.0, "x")}
        >>> _ = TorchMultiOptimizer(optim.SGD, {"lr": 0.5}).step(lambda values: values["x"] ** 2, params)
        >>> float(params["x"].value)
        0.0
    """

    def __init__(self, optim_constructor: Constructor, optim_args: OptimArgs) -> None:
        super().__init__(PyroOptim(optim_constructor, optim_args))


class TransformationMultiOptimizer(Compiled):
    """A rule, or an optax transformation, in the interface of :class:`MultiOptimizer`.

    Args:
        optimizer: an instance of a rule (``rules.Adam()``, ``rules.LBFGS()``, ...), whose numbers are data of the
            compiled program; or a transformation, whose ``update`` gets ``value``, ``grad`` and ``value_fn``.

    Raises:
        ``TypeError`` for anything else.

    Examples:
        >>> from jaxoptim import optim, rules
        >>> from jaxoptim.pyro.optim.multi import TransformationMultiOptimizer
        >>> params = {"x": optim.Parameter(3.0, "x")}
        >>> _ = TransformationMultiOptimizer(rules.LBFGS()).step(lambda values: (values["x"] - 1) ** 2, params)
        >>> round(float(params["x"].value), 3)
        1.0
    """

    def __init__(self, optimizer: Hyperparameters | optax.GradientTransformation) -> None:
        if not isinstance(optimizer, Hyperparameters | optax.GradientTransformation):
            raise TypeError(f"Expected a rule or a transformation but got a {type(optimizer).__name__}")
        self.optimizer = optimizer
        self._owned = Owned()

    def _new_values(self, evaluation: Evaluation) -> dict[str, jax.Array]:
        self._owned.check(evaluation.values)
        state = self._owned.state_for(self.transformation.init(evaluation.values), list(evaluation.values))
        return steps.updated(self.optimizer, evaluation, evaluation.values, state)[0]

    def state_dict(self, params: Params) -> dict[str, Any]:
        """See :meth:`MultiOptimizer.state_dict`; the leaves of the state are there by their places in it."""
        names, state = self._owned.saved(params) or ([], None)
        return {"kind": _TRANSFORMATION, "names": names, "state": by_place(state)}

    def _load(self, state_dict: Mapping[str, Any], params: Params) -> Callable[[], None]:
        check_state(state_dict, _TRANSFORMATION, params)
        names = list(state_dict["names"])
        if not names:
            return self._owned.restore(params, None)
        fresh = self.transformation.init({name: params[name].value for name in names})
        return self._owned.restore(params, (names, from_places(state_dict["state"], fresh, names)))

    def _open(self, params: Params, ahead: int | None = None) -> Part:
        return steps.transformation_part(self._owned, self.optimizer, params)

    @property
    def transformation(self) -> Any:
        """The transformation."""
        return transformation(self.optimizer) if isinstance(self.optimizer, Hyperparameters) else self.optimizer


class Newton(Compiled):
    """Newton's method on each parameter by itself: ``pyro.optim.multi.Newton``.

    The equations are those of :func:`jaxoptim.newton_step`. Each parameter is a batch of problems along its last axis
    (a scalar is one of length 1), and sees the others at their old values.

    Args:
        trust_radii: the radius of the trust region of each parameter, a dict by name; those that are left out take
            plain Newton steps (default None: all).

    Raises:
        ``ValueError`` for a radius that is not positive, and, at a step, for one of a parameter that there is not.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.optim import Parameter
        >>> from jaxoptim.pyro.optim.multi import Newton
        >>> params = {"x": Parameter([3.0, -1.0], "x")}
        >>> _ = Newton().step(lambda values: jnp.sum((values["x"] - 1) ** 2), params)
        >>> params["x"].value.tolist()
        [1.0, 1.0]
    """

    _second_order = True

    def __init__(self, trust_radii: Mapping[str, Any] | None = None) -> None:
        self.trust_radii = dict(trust_radii or {})
        self._owned = Owned()
        rules.Newton(self.trust_radii)  # which checks them

    def _new_values(self, evaluation: Evaluation) -> dict[str, jax.Array]:
        return steps.newton_steps(evaluation, self._radii(evaluation.values))

    def state_dict(self, params: Params) -> dict[str, Any]:
        """See :meth:`MultiOptimizer.state_dict`; there is nothing to keep."""
        return {"kind": _NEWTON, "names": []}

    def _load(self, state_dict: Mapping[str, Any], params: Params) -> Callable[[], None]:
        check_state(state_dict, _NEWTON, params)
        return lambda: None

    def _open(self, params: Params, ahead: int | None = None) -> Part:
        radii = self._radii({name: param.struct for name, param in params.items()})
        return steps.newton_part(self._owned, radii, params)

    def _radii(self, params: Any) -> dict[str, Any]:
        """The radii; raises for parameters that Newton's method cannot take, and for radii of others."""
        rule = rules.Newton(self.trust_radii)
        transformation(rule).init(params)
        return rule.trust_radii


class MixedMultiOptimizer(Compiled):
    r"""Several optimizers, each for some of the parameters: ``pyro.optim.multi.MixedMultiOptimizer``.

    All of them see the old values of all parameters, in one evaluation of the loss. (In Pyro a part sees what those
    before it have done, if it does not fail.)

    A part names its parameters in a list of any of these:

    - the name of a parameter, ``"loc"``;
    - the beginning of names up to a dot, such as the site of a network or a layer of it: ``"decoder$params"`` and
      ``"decoder$params.Dense_1"`` reach ``decoder$params.Dense_1.kernel``, and the latter no ``Dense_10``. The name of
      a parameter is that parameter alone;
    - a compiled regular expression that matches whole names, by its ``fullmatch``: ``re.compile(r".*\.bias")``.

    Each parameter is in exactly one part, in which names may overlap. In :meth:`step`, :meth:`get_step` and the
    transformation, which are given all parameters, each name reaches one at least. A step of an ``SVI`` may reach some
    of them and leave others for later, so a name may reach none there. If it is misspelled, the parameter that it was
    meant for is in no part, and the first step that reaches this one raises.

    Args:
        parts: a list of ``(names, optimizer)``: a list of names, or one regular expression in its place; and a
            :class:`MultiOptimizer`, a :class:`PyroOptim`, a rule or a transformation.

    Attributes:
        parts: a list of ``(names, multi-optimizer)``, in which names are a list.

    Raises:
        ``TypeError`` for a string in the place of a list, and for a name of another type; ``ValueError`` for a name in
        two parts; at a step, ``ValueError`` for a parameter in two parts or in none, ``KeyError`` for a name that
        reaches no parameter.

    Examples:
        >>> import re
        >>> from jaxoptim.optim import Parameter
        >>> from jaxoptim.pyro import optim
        >>> params = {"x": Parameter(3.0, "x"), "y": Parameter(2.0, "y")}
        >>> mixed = optim.multi.MixedMultiOptimizer([(["x"], optim.SGD({"lr": 0.25})), (["y"], optim.multi.Newton())])
        >>> _ = mixed.step(lambda values: values["x"] ** 2 + values["y"] ** 2, params)
        >>> float(params["x"].value), float(params["y"].value)
        (1.5, 0.0)
        >>> net = {"net.0.kernel": 1.0, "net.0.bias": 1.0, "log_scale": 1.0}
        >>> parts = [(["net"], optim.SGD({"lr": 0.25})), (re.compile("log_.*"), optim.SGD({"lr": 0.5}))]
        >>> new = optim.multi.MixedMultiOptimizer(parts).get_step(lambda values: sum(values.values()), net)
        >>> {name: float(value) for name, value in new.items()}
        {'net.0.kernel': 0.75, 'net.0.bias': 0.75, 'log_scale': 0.5}
    """

    def __init__(self, parts: Iterable[tuple[Iterable[Name] | re.Pattern[str], Any]]) -> None:
        self.parts: list[tuple[list[Name], MultiOptimizer]] = []
        owners: dict[str, MultiOptimizer] = {}
        for given, optimizer in parts:
            if isinstance(given, str):
                raise TypeError(
                    f"A part is (list of names, optimizer), but the names are the string {given!r}. Give [{given!r}], "
                    "or a compiled regular expression."
                )
            refuse_foreign("The optimizer of a part", optimizer, PART)
            names: list[Name] = [given] if isinstance(given, re.Pattern) else list(given)
            multi = as_multi_optimizer(optimizer)
            if isinstance(multi, TorchStyle):
                raise TypeError("A torch-style optimizer owns its parameters. Give PyroOptim(optim.Adam, options).")
            for name in names:
                if not isinstance(name.pattern if isinstance(name, re.Pattern) else name, str):
                    raise TypeError(
                        f"A part names parameters by strings and regular expressions of strings, but got {name!r}."
                    )
                if isinstance(name, str):
                    _own(owners, name, multi)
            self.parts.append((names, multi))

    def _needs_second(self) -> bool:
        return any(isinstance(multi, Compiled) and multi._needs_second() for _, multi in self.parts)

    def _check_whole(self, params: Params) -> None:
        for names, (_, multi) in zip(self._names(params), self.parts, strict=True):
            if names:
                multi._check_whole({name: params[name] for name in names})

    def _shares(self, params: Params) -> list[tuple[MultiOptimizer, Params]]:
        every = zip(self._names(params, whole=False), self.parts, strict=True)
        shares = [multi._shares({name: params[name] for name in names}) for names, (_, multi) in every if names]
        return [share for of in shares for share in of]

    def _new_values(self, evaluation: Evaluation) -> dict[str, jax.Array]:
        new: dict[str, jax.Array] = {}
        for names, (_, multi) in zip(self._names(evaluation.values), self.parts, strict=True):
            its = evaluation.of(names)
            new |= multi._new_values(its) if isinstance(multi, Compiled) else multi.get_step(its.loss_of, its.values)
        return {name: new[name] for name in evaluation.values}

    def state_dict(self, params: Params) -> dict[str, Any]:
        """See :meth:`MultiOptimizer.state_dict`; there is one for each part."""
        return {"kind": _MIXED, "names": [], "parts": [multi.state_dict(params) for _, multi in self.parts]}

    def _load(self, state_dict: Mapping[str, Any], params: Params) -> Callable[[], None]:
        check_state(state_dict, _MIXED, params)
        states, undos = state_dict["parts"], list[Callable[[], None]]()
        if len(states) != len(self.parts):
            raise ValueError(
                f"The saved MixedMultiOptimizer has {len(states)} parts, but this one has {len(self.parts)}."
            )

        def undo() -> None:
            for back in reversed(undos):
                back()

        try:
            for number, ((names, multi), state) in enumerate(zip(self.parts, states, strict=True)):
                own = {name for item in names for name in _reached(item, params)}
                if strays := [name for name in state.get("names", ()) if name not in own]:
                    raise ValueError(
                        f"Part {number} of the saved MixedMultiOptimizer has {strays[0]!r}, but that of this one has "
                        f"{', '.join(map(repr, names)) or 'no names'}."
                    )
                undos.append(_loaded(multi, state, params))
        except BaseException:
            undo()
            raise
        return undo

    def _names(self, params: Mapping[str, Any], whole: bool = True) -> list[list[str]]:
        """The parameters of each part, by name; raises unless each is in exactly one.

        Args:
            params: the parameters.
            whole: whether there are no others, so that each name of a part must reach one of them.
        """
        of_parts, owners, idle = list[list[str]](), dict[str, MultiOptimizer](), list[Name]()
        for given, multi in self.parts:
            own: dict[str, None] = {}
            for item in given:
                reached = _reached(item, params)
                own |= dict.fromkeys(reached)
                idle += [] if reached else [item]
            for name in own:
                _own(owners, name, multi)
            of_parts.append(list(own))
        if whole and idle:
            raise KeyError(
                f"A part of MixedMultiOptimizer names {idle[0]!r}, but the parameters are "
                f"{', '.join(map(repr, params)) or 'none'}. Give the name of one, the beginning of names up to a dot, "
                "or a regular expression that matches whole names."
            )
        if extra := [name for name in params if name not in owners]:
            every = ", ".join(repr(item) for given, _ in self.parts for item in given) or "no names"
            unused = f", of which {', '.join(map(repr, idle))} reach no parameter here" if idle else ""
            raise ValueError(
                f"The parameter {extra[0]!r} is in no part of MixedMultiOptimizer, so nothing would optimize it. The "
                f"parts have {every}{unused}."
            )
        return of_parts


def _reached(item: Name, params: Mapping[str, Any]) -> list[str]:
    """The parameters that an item of a part's list stands for."""
    if isinstance(item, re.Pattern):
        return [name for name in params if item.fullmatch(name)]
    return [item] if item in params else [name for name in params if name.startswith(f"{item}.")]


def _own(owners: dict[str, MultiOptimizer], name: str, multi: MultiOptimizer) -> None:
    """Record the optimizer of a name; raise if it has one already."""
    if name in owners:
        raise ValueError(
            f"Attempted to optimize parameter '{name}' by two different optimizers: {owners[name]} vs {multi}"
        )
    owners[name] = multi


_PYRO, _TRANSFORMATION = "a Pyro-style optimizer", "a rule or a transformation"
_NEWTON, _MIXED = "Newton's method", "a MixedMultiOptimizer"
"""The kinds of optimizers in saved states."""


def _loaded(multi: MultiOptimizer, state: Mapping[str, Any], params: Params) -> Callable[[], None]:
    """Load a state into any multi-optimizer, and return a function that undoes it."""
    if isinstance(multi, Compiled):
        return multi._load(state, params)
    before = multi.state_dict(params)
    multi.load_state_dict(state, params)
    return lambda: multi.load_state_dict(before, params)


def as_multi_optimizer(optimizer: Any) -> MultiOptimizer:
    """Any optimizer of this library in the interface of :class:`MultiOptimizer`.

    Args:
        optimizer: a :class:`MultiOptimizer` (as it is), a :class:`PyroOptim`, an instance of a rule, a
            transformation, a torch-style optimizer, or a function that makes one of a dict of parameters.

    Raises:
        ``TypeError`` for anything else; for an optimizer of torch, Pyro or numpyro it says which of ours to take.

    Examples:
        >>> from jaxoptim import rules
        >>> from jaxoptim.pyro.optim.multi import as_multi_optimizer
        >>> type(as_multi_optimizer(rules.Adam())).__name__
        'TransformationMultiOptimizer'
    """
    if isinstance(optimizer, MultiOptimizer):
        return optimizer
    if isinstance(optimizer, PyroOptim):
        return PyroMultiOptimizer(optimizer)
    if isinstance(optimizer, rules.Newton):
        return Newton(optimizer.trust_radii)
    if isinstance(optimizer, Hyperparameters | optax.GradientTransformation):
        return TransformationMultiOptimizer(optimizer)
    refuse_foreign("The optimizer", optimizer, ANY)
    if isinstance(optimizer, Optimizer) or callable(optimizer):
        return TorchStyle(optimizer)
    raise TypeError(
        f"Expected an optimizer but got a {type(optimizer).__name__}. Allowed are a PyroOptim, a MultiOptimizer, an "
        "instance of a rule such as rules.Adam(), an optax transformation, a torch-style optimizer, and a function "
        "that makes one of a dict of parameters."
    )
