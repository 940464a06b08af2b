"""The base of the torch-style samplers, which keep the shared state of a rule in the group."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxoptim.core import OptState, Rule, as_jax, init, trees
from jaxoptim.core.noise import check_key, is_key
from jaxoptim.core.numerics import placed_like
from jaxoptim.core.precision import is_low
from jaxoptim.core.rule import Traced, assembled
from jaxoptim.engine import programs
from jaxoptim.engine.numbers import Numbers
from jaxoptim.engine.owner import Minimization
from jaxoptim.engine.slots import slot_names
from jaxoptim.engine.whole import SharedUpdate, bare, named
from jaxoptim.optim.optimizer import Groups, Optimizer, Selectors
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.part import Part
from jaxoptim.optim.storage import Group, Storage
from jaxoptim.optim.whole import WholeStorage

Common = tuple[jax.Array, dict[str, jax.Array]]
"""The count of steps of a group, and what its rule shares between the parameters."""


class SamplerStorage(WholeStorage):
    """The parameters of a sampler; a group has one count of steps, whether or not each parameter has a gradient.

    The count and what the rule shares (its key, a thermostat, metrics) are entries of the group, where the user reads
    and writes them.
    """

    def __init__(self, rule: type[Rule], step_type: type | None, fixed: Mapping[str, Any]) -> None:
        self._all_groups: list[Group] = []
        self._made: SharedUpdate | None = None
        self._raw: dict[tuple[int, str], Any] = {}  # the keys of the last step, and their numbers
        super().__init__(rule, step_type, fixed)
        self._fields = [name for name in self._fields if name not in fixed]
        fields = dataclasses.fields(rule)  # type: ignore[arg-type]
        self._switches = {field.name for field in fields if isinstance(field.default, bool)}
        self._names: dict[int, tuple[list[str], tuple[str, ...]]] = {}  # of slots and of what is shared, by section
        self._others: dict[Parameter, dict[str, Any]] = {}  # entries of state that the rules do not keep

    @property
    def groups(self) -> list[Group]:
        """The groups as torch's ``param_groups``, with what the last step has published."""
        self._publish()
        return self._all_groups

    @groups.setter
    def groups(self, groups: list[Group]) -> None:
        self._all_groups = groups

    # A step.

    def advance(self, grads: Any, noise: Any = None) -> None:
        """Make one update of all parameters that have a gradient, with this noise if it is given."""
        if not self.groups:
            return  # as torch
        self.settle()
        with self._started():
            update, common = self._update()
            owner = self._owner()
            args = (update, (self.numbers.arrays, common, noise), owner.taken(), grads)
            owner.run(programs.advance, (update, noise is None), args)
        self._publish()

    def minimize(self, job: Minimization) -> Any:
        """Make one update along the gradient of a loss, in one compiled call; see :meth:`Owner.minimize_by`."""
        self.settle()
        with self._started():
            update, common = self._update()
            data = (self.numbers.arrays, common, None)
            result = self._owner().minimize_by(update, self.layout, data, job)
        self._publish()
        return result

    def _arrange(self) -> None:
        self._publish()
        super()._arrange()

    def _update(self) -> tuple[SharedUpdate, list[Common]]:
        """Return the update of all sections, and their current state, keys as their numbers."""
        common, keys = list[Common](), list[Any]()
        for at in range(len(self.sections)):
            count, shared = self._common_of(at)
            raw = {name: self._raw_key(at, name, x) for name, x in shared.items() if is_key(x)}
            common.append((count, shared | {name: numbers for name, (numbers, _) in raw.items()}))
            keys.append(tuple((name, impl) for name, (_, impl) in raw.items()))
        owner = self._owner()
        held = self.layout.names_of(owner.held) if owner.held else frozenset[str]()
        parts = (self.layout, owner.form, self.numbers.form, tuple(keys), held)
        if self._made is None or self._made.content != parts:
            self._made = SharedUpdate(*parts)
        return self._made, common

    def _raw_key(self, at: int, name: str, key: jax.Array) -> tuple[jax.Array, Any]:
        """Return the numbers of a key, and its implementation."""
        known, raw = self._raw.get((at, name), (None, None))
        if known is not key:
            raw = (jax.random.key_data(key), jax.random.key_impl(key))
            self._raw[at, name] = (key, raw)
        return raw

    def _common_of(self, at: int) -> Common:
        group, (_, names) = self.sections[at].group, self._names.get(at, ([], ()))
        shared = {name: group[name] for name in names if group[name] is not False}  # a metric, off
        arrays = {name: x if isinstance(x, jax.Array) else jnp.asarray(x, jnp.float32) for name, x in shared.items()}
        step = group.get("step", 0)
        return step if _is_count(step) else jnp.asarray(step, jnp.int32), arrays

    def _publish(self) -> None:
        """Put the results that the last step has published into the groups, unless that was done."""
        if self.whole is not None and (published := self.whole.published) is not None:
            for at, common in enumerate(published):
                self._put(at, common)
            self.whole.published = None

    def _put(self, at: int, common: Common) -> None:
        """Put the count and the shared state of the rule into the group of a section."""
        (count, shared), group = common, self.sections[at].group
        for name, x in shared.items():
            was: Any = group.get(name)
            if is_key(was) and not is_key(x):
                x = jax.random.wrap_key_data(x, impl=jax.random.key_impl(was))
            group[name] = x
        group["step"] = count

    # State by parameter.

    def state_of(self, param: Parameter) -> dict[str, Any]:
        """Return the state of a parameter by torch's names, a new dict."""
        if param in self._edited:
            return dict(self._edited[param])
        if param not in self._place_of:
            return {}
        return self.slots_of(*self._place_of[param]) | self._others.get(param, {})

    def slots_of(self, at: int, place: int) -> dict[str, Any]:
        """Return the slots of one parameter of a section, without those it lacks; empty before the first update."""
        state = super().state_at(at)
        slots = {} if state is None else state.slots
        label = self.labels[self.sections[at].params[place]]
        names, _ = self._names.get(at, ([], ()))
        found = {name: slots[name][label] for name in names if name in slots}
        return {name: slot for name, slot in found.items() if slot is not None}

    def state_at(self, at: int) -> OptState | None:
        """Return the state of a section with the entries of its group, None before its first update."""
        state = super().state_at(at)
        if state is None:
            return None
        self._publish()
        step, shared = self._common_of(at)
        return state._replace(step=step, shared=shared)

    def fresh(self, at: int) -> OptState:
        """Return the state of a section before its first update."""
        return self._bared(at, _init(self.rule_at(at), self._values(at)))

    def _bared(self, at: int, state: OptState) -> OptState:
        """Return a state without the count and the shared entries, which are in the group."""
        self._names[at] = (slot_names(self.rule_at(at)), tuple(state.shared))
        self._put(at, (state.step, state.shared))
        return bare(state)

    def _values(self, at: int) -> OrderedDict[str, jax.Array]:
        return named(self.layout, self.layout.cells[at], self._owner().values)

    def restored(self, at: int, states: Mapping[Parameter, dict[str, Any]], began: bool) -> OptState | None:
        """Return the state of a section from those of its parameters; None if there is none."""
        self._names.pop(at, None)
        rule, section = self.rule_at(at), self.sections[at]
        names, slots = set(slot_names(rule)), []
        for param in section.params:
            slots.append({name: x for name, x in states[param].items() if name in names and x is not None})
            self._others.pop(param, None)
            if others := {name: x for name, x in states[param].items() if name not in (*names, "step")}:
                self._others[param] = others
        group = section.group
        if not (began or any(slots) or "step" in group):
            return None
        known = {name: x for name, x in group.items() if x is not None and not isinstance(x, bool)}
        shared = {name: known.get(name, x) for name, x in rule.init_shared().items()}
        return self._loaded(at, group.get("step", 0), slots, shared)

    def load_part(self, part: Part, counts: Mapping[Parameter, Any]) -> None:
        """Take over state that was kept elsewhere; all parameters have the count of the group."""
        at, _ = self._place_of[part.params[0]]
        self.replace_state(at, self._loaded(at, part.count, part.slots, part.shared))

    def _loaded(self, at: int, count: Any, slots: Sequence[dict[str, Any]], shared: Any) -> OptState:
        """Return the state of a section from the slots of each parameter that has them, and the rest."""
        made = _init(self.rule_at(at), self._values(at)).slots
        for param, given in zip(self.sections[at].params, slots, strict=True):
            label = self.labels[param]
            for name, slot in given.items():
                like = made[name][label]
                slot = as_jax(slot).astype(like.dtype)
                trees.check_shape(f"slot {name!r}", label, slot, like)
                made[name][label] = placed_like(slot, like)
        return self._bared(at, OptState(jnp.asarray(count, jnp.int32), made, shared))

    # Options.

    def _number(self) -> None:
        # The keys are among what the rules share.
        rules = [self.rule_at(at) for at in range(len(self.sections))]
        self.numbers = Numbers([assembled(type(rule), vars(rule) | {"key": None}) for rule in rules])

    def rule_at(self, at: int) -> Rule:
        """Return the rule of a section, with masks and center by the names of the parameters."""
        return _by_name(super().rule_at(at), [self.labels[param] for param in self.sections[at].params])

    def _option(self, group: Group, name: str) -> Any:
        """Return the value of a hyperparameter in a group; a metric that has a value is switched on."""
        option = super()._option(group, name)
        return True if name in self._switches and isinstance(option, jax.Array) else option


_init = jax.jit(init)


def _is_count(step: Any) -> bool:
    return isinstance(step, jax.Array) and step.dtype == jnp.int32


def _by_name(rule: Rule, names: Sequence[str]) -> Rule:
    """Return a rule whose masks and center are a dict by names, where there is one for each parameter."""
    own = {name: _each_by_name(rule, name, names) for name in _by_leaf_fields(rule)}
    return assembled(type(rule), vars(rule) | own)


def _by_leaf_fields(rule: Rule | type[Rule]) -> list[str]:
    """Return the hyperparameters that may be a tree like the parameters."""
    return [name for name, spec in rule.specs.items() if isinstance(spec, Traced) and spec.by_leaf]


def _each_by_name(rule: Rule, field: str, names: Sequence[str]) -> Any:
    """Return a hyperparameter as a dict by the names of the parameters, unless it is one for all of them."""
    value = getattr(rule, field)
    is_leaf = jax.tree_util.all_leaves([value])
    if value is None or (is_leaf and not rule.specs[field].is_value):
        return value
    what = "centers" if rule.specs[field].is_value else "masks"
    leaves = jax.tree.leaves(value, is_leaf=trees.is_leaf)
    if not is_leaf and not isinstance(value, list | tuple):
        of_name = dict(zip(trees.names(value), leaves, strict=True))
        if of_name.keys() != set(names):
            odd = sorted(of_name.keys() ^ set(names))
            raise ValueError(
                f"{field} has {what} by name, but {odd[0]!r} is not both there and among the parameters of the "
                f"group, {', '.join(names)}. Give one for each of them, or a list in their order."
            )
        leaves = [of_name[name] for name in names]
    if len(leaves) != len(names):
        others = "" if rule.specs[field].is_value else "one mask that broadcasts to all of them, or "
        raise ValueError(
            f"{field} has {len(leaves)} {what}, but the group has {len(names)} parameters. Give {others}one for each."
        )
    return OrderedDict(zip(names, leaves, strict=True))


def warn_user(message: str) -> None:
    """Warn at the line outside of this library that made the call."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").startswith("jaxoptim."):
        level += 1
    warnings.warn(message, stacklevel=level + 1)


class Sampler(Optimizer):
    r"""The base of the torch-style samplers: an optimizer whose rule draws noise.

    State exists from the construction on, as in devinterp: the initial parameters are those of then. Each group has its
    own ``key``, count ``step`` and whatever else the rule shares (SGNHT: ``thermostat``) as entries of its dict; they
    are saved, loaded, and may be written. The key of the first group is the one given, that of group number i is

    .. math::
        \text{key}_i = \mathrm{fold\_in}(\text{key}, 2^{32} - i)

    unless the group has one. So a sampler with one group draws what the pure face draws with the same key.

    Parameters of float16 and bfloat16 are rounded to the nearest number at each step, as devinterp's are, which loses
    small steps; a warning says so. Float32 parameters that the loss casts lose none.

    A subclass is a rule and one line: ``class Mine(optim.Sampler): rule = MySampler``.

    Args:
        params: see :class:`Optimizer`.
        defaults: see :class:`Optimizer`; its ``key`` is a typed JAX key, or None for ``jax.random.key(0)``.
        groups: see :class:`Optimizer`.
        frozen: see :class:`Optimizer`.
        wrt: see :class:`Optimizer`.

    Raises:
        As :class:`Optimizer`; ``TypeError`` for a key that is not typed. A warning, once, for a parameter of float16 or
        bfloat16 that is not frozen.

    References:
        Of each rule. On keys and counters: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3,
        SC 2011.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> chain = optim.SGHMC({"w": jnp.ones(2)}, lr=1e-3, nbeta=50.0, key=jax.random.key(1))
        >>> for _ in range(3):
        ...     loss = chain.minimize(lambda params: jnp.sum(params["w"] ** 2) / 2)
        >>> int(chain.param_groups[0]["step"])
        3
    """

    step_type: ClassVar[type | None] = None
    starts_at_once: ClassVar[bool] = True
    storage_class: ClassVar[type[Storage]] = SamplerStorage
    may_lack: ClassVar[frozenset[str]] = frozenset(("key", "noise_impl", "step", "box", "metrics", "center"))

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        groups: Groups | None = None,
        frozen: Selectors | None = None,
        wrt: Any = None,
    ) -> None:
        if defaults.get("key") is None:
            defaults = defaults | {"key": jax.random.key(0)}
        check_key(defaults["key"])
        self._has_warned = True  # not of a group that is frozen when all are added
        super().__init__(params, defaults, groups=groups, frozen=frozen, wrt=wrt)
        self._has_warned = False
        self._warn_of_rounding()

    _has_warned = False

    def _warn_of_rounding(self) -> None:
        """Warn, once, of parameters whose dtype loses small steps."""
        coarse = [param for param in self._storage.parameters() if param.requires_grad and is_low(param.dtype)]
        if not coarse or self._has_warned:
            return
        self._has_warned = True
        warn_user(
            f"{type(self).__name__} rounds each step to the parameter's dtype, {coarse[0].dtype}, which loses small "
            "steps: the chain samples from another distribution, or stands still. Give float32 parameters and cast "
            "them in the loss, as jaxoptim.sampling.sample does."
        )

    def _add(self, group: dict[str, Any]) -> None:
        number = len(self.param_groups)
        if number and "key" not in group:
            # No step counts so far up, so that no other noise has this key.
            group["key"] = jax.random.fold_in(self.defaults["key"], np.uint32(2**32 - number))
        for name in _by_leaf_fields(self.rule):
            if (value := group.get(name, self.defaults.get(name))) is not None:
                group[name] = jax.tree.map(lambda x: jnp.asarray(trees.owned_arrays(x)), value)
        super()._add(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see :meth:`Optimizer.add_param_group`. Its initial parameters are the current ones."""
        super().add_param_group(param_group)
        self._storage.start()
        self._warn_of_rounding()

    def step(self, grads: Any = None, closure: Callable[[], Any] | None = None, *, noise: Any = None) -> Any:
        """Update the parameters once; see :meth:`Optimizer.step`.

        Args:
            grads: see :meth:`Optimizer.step`.
            closure: see :meth:`Optimizer.step`.
            noise: a tree like ``params`` of standard-normal noise (default None: drawn).

        Returns:
            What the closure returned, else None.

        Raises:
            As :meth:`Optimizer.step`.

        Examples:
            >>> import jax.numpy as jnp
            >>> from jaxoptim import optim
            >>> chain = optim.SGLD({"w": jnp.ones(2)}, lr=0.5, nbeta=2.0)
            >>> chain.step({"w": jnp.ones(2)}, noise={"w": jnp.zeros(2)})
            >>> chain.params["w"].tolist()
            [0.5, 0.5]
        """
        loss, grads = self._evaluated(grads, closure)
        noise = trees.owned_arrays(noise)
        self._update_along(grads, lambda: self._storage.advance(grads, noise))  # type: ignore[call-arg]
        return loss

    def _pure_rule(self, part: Part) -> Rule:
        rule: Any = super()._pure_rule(part)
        rule = rule.replace(key=part.group["key"])
        whole = {}
        for name in _by_leaf_fields(rule):
            if isinstance(value := getattr(rule, name), OrderedDict):
                of = dict(zip(part.params, value.values(), strict=True))
                whole[name] = jax.tree.map(lambda param, of=of: of.get(param, optax.MaskedNode()), self._storage.tree())
        return assembled(type(rule), vars(rule) | whole)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"fixed": self.fixed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "fixed" in state:
            self.fixed = state["fixed"]
        super().__setstate__(state)

    def _adopt(self, group: dict[str, Any]) -> None:
        key = group.get("key")
        if isinstance(key, jax.Array) and not is_key(key):  # as it comes back from torch
            group["key"] = jax.random.wrap_key_data(key, impl=jax.random.key_impl(self.defaults["key"]))
