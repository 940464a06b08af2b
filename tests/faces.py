"""The same training through every face: an adapter for each, which :mod:`test_faces` runs against each other."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from typing import Any

import jax
import jax.numpy as jnp

import jaxoptim
from jaxoptim import OptState, optim, rules
from jaxoptim.core import Rule
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim as pyro_optim
from jaxoptim.pyro.optim.multi import PyroMultiOptimizer

Options = dict[str, Any]
Grads = dict[str, Any]
Kept = tuple[int, dict[str, Any]]
"""The count of a parameter and its slots."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """An optimizer under all of its names.

    Attributes:
        rule: of the pure face.
        options: of all groups.
        change: a number besides the learning rate, and what it becomes.
        matrices: whether it takes nothing but matrices.
    """

    rule: type[Rule]
    options: Options
    change: tuple[str, Any]
    matrices: bool = False

    @property
    def cls(self) -> type[optim.Optimizer]:
        """The torch-style class."""
        return getattr(optim, self.rule.__name__)

    @property
    def is_counted(self) -> bool:
        """Whether its state shows a count."""
        return self.cls.step_type is not None

    @property
    def fades(self) -> bool:
        """Whether the learning rate of a group decays at every step."""
        return self.cls.decays is not None

    def rule_of(self, options: Options) -> Rule:
        """The rule of a group; its rate has decayed already."""
        return self.rule(**options | dict(self.cls.fixed))


KINDS = {
    kind.rule.__name__: kind
    for kind in (
        Kind(rules.Adam, {"lr": 0.1, "weight_decay": 0.01}, ("betas", (0.8, 0.95))),
        Kind(rules.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, ("momentum", 0.7)),
        Kind(rules.NAdam, {"lr": 0.1}, ("momentum_decay", 0.01)),
        Kind(rules.ASGD, {"lr": 0.1, "lambd": 0.1, "t0": 2.0}, ("alpha", 0.5)),
        Kind(rules.Adagrad, {"lr": 0.1, "lr_decay": 0.05, "initial_accumulator_value": 0.1}, ("lr_decay", 0.5)),
        Kind(rules.Rprop, {"lr": 0.1}, ("etas", (0.4, 1.3))),
        Kind(rules.RMSprop, {"lr": 0.1, "centered": True, "momentum": 0.5}, ("alpha", 0.9)),
        Kind(rules.ClippedAdam, {"lr": 0.1, "lrd": 0.9, "weight_decay": 0.1, "clip_norm": 1.0}, ("lrd", 0.8)),
        Kind(rules.Adafactor, {"lr": 0.1, "weight_decay": 0.01}, ("d", 2.0)),
        Kind(rules.Muon, {"lr": 0.1, "ns_steps": 2}, ("momentum", 0.7), matrices=True),
    )
}


class Face:
    """Parameters by name in groups, trained by one of the faces.

    Args:
        kind: the optimizer.
        groups: for each group the values of its parameters by name.
        rates: the learning rate of each group.

    Attributes:
        names: the parameters of each group.
        options: of each group.
    """

    def __init__(self, kind: Kind, groups: list[dict[str, jax.Array]], rates: list[float]) -> None:
        self.kind = kind
        self.names = [list(group) for group in groups]
        self.options = [kind.options | {"lr": rate} for rate in rates]
        self.params = {name: Parameter(x, name) for group in groups for name, x in group.items()}
        self.make()

    def make(self) -> None:
        """Make the optimizer."""

    def step(self, grads: Grads) -> None:
        """One step along gradients, None where one is missing."""
        if self.kind.fades:
            for options in self.options:
                options["lr"] *= options["lrd"]
        self.advance(grads)

    def advance(self, grads: Grads) -> None:
        """The step itself."""
        raise NotImplementedError

    def set_grads(self, grads: Grads) -> list[Parameter]:
        """The parameters that are in groups, with their gradients."""
        for name, param in self.params.items():
            param.grad = grads[name]
        return [self.params[name] for group in self.names for name in group]

    def values(self) -> dict[str, jax.Array]:
        """All parameters."""
        return {name: param.value for name, param in self.params.items()}

    def kept(self, name: str) -> Kept:
        """What is kept of a parameter."""
        raise NotImplementedError

    def write(self, at: int, name: str, value: Any) -> None:
        """Change a number of a group."""
        self.options[at][name] = value

    def load(self, name: str, count: int, slots: dict[str, Any]) -> None:
        """Replace the state of a parameter."""
        raise NotImplementedError

    def assign(self, name: str, value: jax.Array) -> None:
        """Assign a value."""
        self.params[name].value = value

    def take_out(self, name: str) -> None:
        """Take a parameter out of its group."""
        for names in self.names:
            if name in names:
                names.remove(name)

    def put_in(self, name: str, at: int) -> None:
        """Put a parameter into a group."""
        self.names[at].append(name)

    def add(self, name: str, value: jax.Array, rate: float) -> None:
        """Add a group of one new parameter."""
        self.params[name] = Parameter(value, name)
        self.names.append([name])
        self.options.append(self.kind.options | {"lr": rate})

    def save_and_load(self) -> None:
        """Go through a state dict to another optimizer of the same parameters."""

    def copied(self, by_pickle: bool) -> Face:
        """A copy, which shares nothing."""
        return pickle.loads(pickle.dumps(self)) if by_pickle else copy.deepcopy(self)


_step = jax.jit(jaxoptim.step)


class Pure(Face):
    """The pure face with one rule for each parameter: what the others are compared with."""

    def make(self) -> None:
        self.states: dict[str, OptState] = {}

    def advance(self, grads: Grads) -> None:
        for names, options in zip(self.names, self.options, strict=True):
            rule = self.kind.rule_of(options)
            for name in names:
                if grads[name] is None:
                    continue
                value = self.params[name].value
                state = self.states.get(name) or jaxoptim.init(rule, value)
                self.params[name].value, self.states[name] = _step(rule, value, grads[name], state)

    def kept(self, name: str) -> Kept:
        state = self.states[name]
        return int(state.step), {slot: x for slot, x in state.slots.items() if x is not None}

    def load(self, name: str, count: int, slots: dict[str, Any]) -> None:
        of_rule = dict.fromkeys(self.states[name].slots) | slots
        self.states[name] = OptState(jnp.asarray(count, jnp.int32), of_rule, {})


class Tree(Pure):
    """The pure face with one state for each group, whose arrays have counts of their own."""

    def advance(self, grads: Grads) -> None:
        for names, options in zip(self.names, self.options, strict=True):
            here = [name for name in names if grads[name] is not None]
            if not here:
                continue
            rule, params = self.kind.rule_of(options), {name: self.params[name].value for name in names}
            whole = jaxoptim.init(rule, params, counts=True)
            slots = {
                slot: of | {name: self.states[name].slots[slot] for name in names if name in self.states}
                for slot, of in whole.slots.items()
            }
            counts = whole.counts | {name: self.states[name].step for name in names if name in self.states}
            state = OptState(max(counts.values()), slots, {}, counts)
            params, state = _step(rule, params, {name: grads[name] for name in names}, state)
            for name in here:
                own = {slot: of[name] for slot, of in state.slots.items()}
                self.params[name].value, self.states[name] = params[name], OptState(state.counts[name], own, {})


class Stepped(Face):
    """A torch-style optimizer, whose ``step`` takes each parameter's ``grad``."""

    def make(self) -> None:
        self.opt = self.made()

    def made(self) -> optim.Optimizer:
        groups = zip(self.names, self.options, strict=True)
        return self.kind.cls(
            [{"params": [self.params[name] for name in names], **options} for names, options in groups]
        )

    def advance(self, grads: Grads) -> None:
        self.set_grads(grads)
        with warnings.catch_warnings():  # a script may begin without any gradient
            warnings.filterwarnings("ignore", ".* did nothing, because no parameter has ever had a grad")
            self.opt.step()

    def tree_of(self, grads: Grads) -> Any:
        """Gradients in the structure of the parameters."""
        return jax.tree.map(lambda param: grads[param.name], self.opt._storage.tree())

    def kept(self, name: str) -> Kept:
        state = dict(self.opt.state[self.params[name]])
        return int(state.pop("step", -1)), state

    def write(self, at: int, name: str, value: Any) -> None:
        super().write(at, name, value)
        self.opt.param_groups[at][name] = value

    def load(self, name: str, count: int, slots: dict[str, Any]) -> None:
        self.opt.state[self.params[name]] = shown(self.kind, count) | slots

    def take_out(self, name: str) -> None:
        super().take_out(name)
        for group in self.opt.param_groups:
            if self.params[name] in group["params"]:
                group["params"].remove(self.params[name])

    def put_in(self, name: str, at: int) -> None:
        super().put_in(name, at)
        self.opt.param_groups[at]["params"].append(self.params[name])

    def add(self, name: str, value: jax.Array, rate: float) -> None:
        super().add(name, value, rate)
        self.opt.add_param_group({"params": [self.params[name]], **self.options[-1]})

    def save_and_load(self) -> None:
        new = self.made()
        new.load_state_dict(self.opt.state_dict())
        self.opt = new


class Given(Stepped):
    """A torch-style optimizer, whose ``step`` is given a tree; it leaves for the pure face and comes back."""

    def advance(self, grads: Grads) -> None:
        self.opt.step(self.tree_of(grads))

    def save_and_load(self) -> None:
        _, params, state = self.opt.to_functional()
        self.opt.from_functional(params, state)


def product(params: Any, grads: Any) -> Any:
    """A loss with these gradients."""
    params, grads = jax.tree.leaves(params), jax.tree.leaves(grads)
    return sum(jnp.sum(x * g).astype(float) for x, g in zip(params, grads, strict=True))


class Minimized(Stepped):
    """A torch-style optimizer, whose ``minimize`` makes the steps in which no gradient is missing."""

    def advance(self, grads: Grads) -> None:
        tree = self.tree_of(grads)
        if None in grads.values():
            self.opt.step(tree)
        else:
            self.opt.minimize(product, tree)


class ByName:
    """The options of a Pyro-style optimizer, a function that can be pickled: those of the group, before a step."""

    def __init__(self, face: Called) -> None:
        self.face = face

    def __call__(self, name: str) -> Options:
        groups = zip(self.face.names, self.face.before, strict=True)
        return next(dict(options) for names, options in groups if name in names)


class Called(Face):
    """A ``PyroOptim`` that is called with parameters."""

    def make(self) -> None:
        self.before: list[Options] = []
        self.opt = self.made()

    def made(self) -> pyro_optim.PyroOptim:
        return pyro_optim.PyroOptim(self.kind.cls, ByName(self))

    def step(self, grads: Grads) -> None:
        self.before = [dict(options) for options in self.options]
        super().step(grads)

    def advance(self, grads: Grads) -> None:
        self.opt(self.set_grads(grads))

    def kept(self, name: str) -> Kept:
        (state,) = self.opt.get_state()[name]["state"].values()
        return int(state.pop("step", -1)), state

    def edit(self, name: str, options: Options, state: Options | None = None) -> None:
        """Change options, and state if given, of a parameter that is known or waited for."""
        if name in self.opt.optim_objs:
            own = self.opt.optim_objs[name]
            own.param_groups[0].update(options)
            if state is not None:
                own.state[own.param_groups[0]["params"][0]] = state
        elif name in (waiting := self.opt.get_state()):
            waiting[name]["param_groups"][0].update(options)
            if state is not None:
                waiting[name]["state"] = {0: state}
            self.opt.set_state(waiting)

    def write(self, at: int, name: str, value: Any) -> None:
        super().write(at, name, value)
        for param in self.names[at]:
            self.edit(param, {name: value})

    def load(self, name: str, count: int, slots: dict[str, Any]) -> None:
        self.edit(name, {}, shown(self.kind, count) | slots)

    def put_in(self, name: str, at: int) -> None:
        super().put_in(name, at)
        self.edit(name, self.options[at])

    def save_and_load(self) -> None:
        new = self.made()
        new.set_state(self.opt.get_state())
        self.opt = new


class Updated(Called):
    """A ``PyroOptim`` whose ``update`` takes and returns values by name."""

    def advance(self, grads: Grads) -> None:
        names = [name for group in self.names for name in group]
        given = {name: self.params[name].value for name in names}
        new = self.opt.update(given, {name: grads[name] for name in names})
        for name, value in new.items():
            self.params[name].value = value


class Multi(Called):
    """A multi-optimizer, which is given a loss of the parameters that are to move."""

    def make(self) -> None:
        super().make()
        self.multi = PyroMultiOptimizer(self.opt)

    def advance(self, grads: Grads) -> None:
        here = {param.name: param for param in self.set_grads(grads)}
        moved = {name: param for name, param in here.items() if grads[name] is not None}
        if self.kind.fades and moved.keys() != here.keys():
            self.opt(list(here.values()))  # the rates of the others decay too
        elif moved:
            self.multi.step(product, moved, {name: grads[name] for name in moved})

    def save_and_load(self) -> None:
        super().save_and_load()
        self.multi = PyroMultiOptimizer(self.opt)


FACES = (Tree, Stepped, Given, Minimized, Called, Updated, Multi)
"""All but the one that they are compared with."""


def shown(kind: Kind, count: int) -> dict[str, Any]:
    """The count as state has it."""
    if not kind.is_counted:
        return {}
    return {"step": count if kind.cls.step_type is int else jnp.asarray(count, jnp.float32)}
