"""The base of the torch-style samplers: what a rule shares between parameters is kept in the group."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxoptim.core import OptState, Rule, check_gradient, step, trees
from jaxoptim.core.loss import Loss, evaluated
from jaxoptim.core.noise import check_key, is_key
from jaxoptim.core.rule import assembled
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.layout import Layout
from jaxoptim.engine.numbers import Numbers
from jaxoptim.optim.optimizer import Groups, Optimizer
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.part import Part
from jaxoptim.optim.storage import Group, Storage
from jaxoptim.optim.whole import Whole, WholeStorage

Common = tuple[jax.Array, dict[str, jax.Array]]
"""The count of steps of a group, and what its rule shares between the parameters."""


class WholeGroup(Whole):
    """All parameters of one group, which have one count of steps whether or not each has a gradient.

    The count and what the rule shares (its key, a thermostat, metrics) are entries of the group, where the user reads
    and writes them. What a compiled step is donated has neither.
    """

    _shared: tuple[str, ...] = ()

    @property
    def state(self) -> OptState | None:
        """The state, None before it is made."""
        state = self.contents.cells[0][1]
        if state is None:
            return None
        step, shared = self.common()
        return state._replace(step=step, shared=shared)

    @state.setter
    def state(self, state: OptState | None) -> None:
        if state is not None:
            self.take((state.step, state.shared))
            state = state._replace(step=None, shared={}, counts=None)  # type: ignore[arg-type]
        self.contents = Contents(None, [(self.values, state)])

    def common(self) -> Common:
        """What the group has now."""
        shared = {name: self.group[name] for name in self._shared if self.group[name] is not False}  # a metric, off
        arrays = {name: x if isinstance(x, jax.Array) else jnp.asarray(x, jnp.float32) for name, x in shared.items()}
        return jnp.asarray(self.group["step"], jnp.int32), arrays

    def take(self, common: Common) -> None:
        """Put other values into the group."""
        step, shared = common
        self._shared = tuple(shared)
        self.group.update(shared, step=step)

    def load(self, rule: Rule, count: Any, slots: Sequence[dict[str, Any]], shared: Any = None) -> None:
        """Take state that was kept elsewhere; count and ``shared`` from the group if the latter is not given."""
        if shared is None:
            known = {name: x for name, x in self.group.items() if x is not None and not isinstance(x, bool)}
            shared = {name: known.get(name, x) for name, x in rule.init_shared().items()}
            count = self.group.get("step", 0)
        super().load(rule, count, slots, shared)


class SamplerStorage(WholeStorage):
    """Parameters of samplers: one bucket for each group."""

    whole_class = WholeGroup

    def __init__(self, rule: type[Rule], step_type: type | None, fixed: Mapping[str, Any]) -> None:
        super().__init__(rule, step_type, fixed)
        self._fields = [name for name in self._fields if name not in fixed]
        fields = dataclasses.fields(rule)  # type: ignore[arg-type]
        self._switches = {field.name for field in fields if isinstance(field.default, bool)}

    def advance(self, grads: Any, noise: Any = None) -> None:
        """One update of all parameters that have a gradient, with this noise if it is given."""
        if not self.groups:
            return  # as torch
        self.settle()
        with self._started():
            self._take_all(*_advance(self.layout, self.numbers, self.taken(), self._common(), grads, noise))

    def minimize(self, loss: Loss, args: tuple[Any, ...]) -> Any:
        """The loss, and one update along its gradient, in one compiled call."""
        self.settle()
        with self._started():
            result, new = _minimize(self.layout, self.numbers, self.taken(), self._common(), loss, args)
            self._take_all(*new)
        return result

    def rule_for(self, whole: Whole) -> Rule:
        """The rule that a group follows, its masks by the names of the parameters."""
        return _by_name(super().rule_for(whole), whole.labels)

    def _common(self) -> tuple[Common, ...]:
        return tuple(whole.common() for whole in self.wholes)  # type: ignore[attr-defined]

    def _take_all(self, contents: tuple[Contents, ...], common: tuple[Common, ...]) -> None:
        for whole, new, its in zip(self.wholes, contents, common, strict=True):
            whole.contents = new
            whole.take(its)  # type: ignore[attr-defined]

    def _option(self, group: Group, name: str) -> Any:
        """What a group says of a hyperparameter; a metric that has a value is switched on."""
        option = super()._option(group, name)
        return True if name in self._switches and isinstance(option, jax.Array) else option

    def _whole(self, group: Group, rule: Rule, times: int, params: list[Parameter]) -> Whole:
        return super()._whole(group, _by_name(rule, [self.labels[p] for p in params]), times, params)


def _by_name(rule: Any, names: Sequence[str]) -> Any:
    """A rule whose masks, if there is one for each parameter, are a dict by names."""
    masks = rule.optimize_over
    if masks is None or jax.tree_util.all_leaves([masks]):
        return rule
    leaves = jax.tree.leaves(masks, is_leaf=trees.is_leaf)
    if not isinstance(masks, list | tuple):
        of_name = dict(zip(trees.names(masks), leaves, strict=True))
        if of_name.keys() != set(names):
            odd = sorted(of_name.keys() ^ set(names))
            raise ValueError(
                f"optimize_over has masks by name, but {odd[0]!r} is not both there and among the parameters of the "
                f"group, {', '.join(names)}. Give one for each of them, or a list in their order."
            )
        leaves = [of_name[name] for name in names]
    if len(leaves) != len(names):
        raise ValueError(
            f"optimize_over has {len(leaves)} masks, but the group has {len(names)} parameters. Give one mask that "
            "broadcasts to all of them, or one for each."
        )
    return assembled(type(rule), vars(rule) | {"optimize_over": OrderedDict(zip(names, leaves, strict=True))})


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="contents")
def _advance(
    layout: Layout,
    numbers: Numbers,
    contents: tuple[Contents, ...],
    common: tuple[Common, ...],
    grads: Any,
    noise: Any,
) -> Any:
    """One step of all groups from trees of gradients and noise."""
    rules = numbers.each()
    gradients, drawn = layout.leaves(grads), None if noise is None else layout.leaves(noise, "noise")
    for cell, rule in zip(layout.cells, rules, strict=True):
        for member in cell.members:
            if gradients[member] is not None:
                struct = layout.structs[member]
                gradients[member] = check_gradient(rule, struct.name, gradients[member], struct.like)
    return _stepped(layout, rules, contents, common, gradients, drawn)


@functools.partial(jax.jit, static_argnames=("layout", "loss"), donate_argnames="contents")
def _minimize(
    layout: Layout,
    numbers: Numbers,
    contents: tuple[Contents, ...],
    common: tuple[Common, ...],
    loss: Loss,
    args: tuple[Any, ...],
) -> Any:
    """The loss (and aux) at the current parameters, and one step of all groups along its gradient."""
    values = [value for of in contents for value in of.cells[0][0].values()]
    found = evaluated(loss, layout.tree(values), args)
    new = _stepped(layout, numbers.each(), contents, common, layout.leaves(found.grads), None)
    return (found.loss, found.aux) if loss.has_aux else found.loss, new


def _stepped(
    layout: Layout, rules: list[Any], contents: Sequence[Contents], common: Sequence[Common], grads: Any, noise: Any
) -> Any:
    """All groups after one step, and what the rule of each shares; those without any gradient as they were."""
    new, shares = [], []
    for cell, rule, of, (count, shared) in zip(layout.cells, rules, contents, common, strict=True):
        values, bare = of.cells[0]
        own = OrderedDict(zip(values, [grads[member] for member in cell.members], strict=True))
        given = {}
        if noise is not None:
            given["noise"] = OrderedDict(zip(values, [noise[member] for member in cell.members], strict=True))
        state = bare and bare._replace(step=count, shared=shared)
        if jax.tree.leaves(own) and state is not None:
            for _ in range(cell.times):
                values, state = step(rule, values, own, state, **given)
        if state is not None:
            count, shared = state.step, state.shared
        shares.append((count, shared))
        new.append(Contents(None, [(values, state and state._replace(step=None, shared={}, counts=None))]))
    return tuple(new), tuple(shares)


class Sampler(Optimizer):
    r"""The base of the torch-style samplers: an optimizer whose rule draws noise.

    State exists from the construction on, as in devinterp: the initial parameters are those of then. Each group has its
    own ``key``, count ``step`` and whatever else the rule shares (SGNHT: ``thermostat``) as entries of its dict; they
    are saved, loaded, and may be written. The key of the first group is the one given, that of group number i is

    .. math::
        \text{key}_i = \mathrm{fold\_in}(\text{key}, 2^{32} - i)

    unless the group has one. So a sampler with one group draws what the pure face draws with the same key.

    A subclass is a rule and one line: ``class Mine(optim.Sampler): rule = MySampler``.

    Args:
        params: see :class:`Optimizer`.
        defaults: see :class:`Optimizer`; its ``key`` is a typed JAX key, or None for ``jax.random.key(0)``.
        groups: see :class:`Optimizer`.

    Errors:
        As :class:`Optimizer`; ``TypeError`` for a key that is not typed.

    Reference:
        Of each rule. On keys and counters: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3,
        SC 2011.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> chain = optim.SGHMC({"w": jnp.ones(2)}, lr=1e-3, nbeta=50.0, key=jax.random.key(1))
        >>> for _ in range(3):
        ...     loss = chain.minimize(lambda params: jnp.sum(params["w"] ** 2) / 2)
        >>> int(chain.param_groups[0]["step"])
        3
    """

    step_type: ClassVar[type | None] = None
    storage_class: ClassVar[type[Storage]] = SamplerStorage
    may_lack: ClassVar[frozenset[str]] = frozenset(("key", "noise_impl", "step", "box"))

    def __init__(self, params: Any, defaults: dict[str, Any], *, groups: Groups | None = None) -> None:
        if defaults.get("key") is None:
            defaults = defaults | {"key": jax.random.key(0)}
        check_key(defaults["key"])
        super().__init__(params, defaults, groups=groups)
        self._storage.start()

    def _add(self, group: dict[str, Any]) -> None:
        number = len(self.param_groups)
        if number and "key" not in group:
            # No step counts so far up, so that no other noise has this key.
            group["key"] = jax.random.fold_in(self.defaults["key"], np.uint32(2**32 - number))
        if group.get("optimize_over", self.defaults.get("optimize_over")) is not None:
            group.setdefault("optimize_over", self.defaults["optimize_over"])
            group["optimize_over"] = jax.tree.map(
                lambda mask: jnp.asarray(trees.owned_arrays(mask)), group["optimize_over"]
            )
        super()._add(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see :meth:`Optimizer.add_param_group`. Its initial parameters are those of now."""
        super().add_param_group(param_group)
        self._storage.start()

    def step(self, grads: Any = None, closure: Callable[[], Any] | None = None, *, noise: Any = None) -> Any:
        """Update the parameters once; see :meth:`Optimizer.step`.

        Args:
            grads: see :meth:`Optimizer.step`.
            closure: see :meth:`Optimizer.step`.
            noise: a tree like ``params`` of standard-normal noise (default None: drawn).

        Returns:
            What the closure returned, else None.

        Errors:
            As :meth:`Optimizer.step`.

        Example:
            >>> import jax.numpy as jnp
            >>> from jaxoptim import optim
            >>> chain = optim.SGLD({"w": jnp.ones(2)}, lr=0.5, nbeta=2.0)
            >>> chain.step({"w": jnp.ones(2)}, noise={"w": jnp.zeros(2)})
            >>> chain.params["w"].tolist()
            [0.5, 0.5]
        """
        loss, grads = self._evaluated(grads, closure)
        noise = trees.owned_arrays(noise)
        self._update(lambda: self._storage.advance(grads, noise))  # type: ignore[call-arg]
        return loss

    def _pure_rule(self, part: Part) -> Rule:
        rule: Any = super()._pure_rule(part)
        rule = rule.replace(key=part.group["key"])
        if not isinstance(rule.optimize_over, OrderedDict):
            return rule
        mask_of = dict(zip(part.params, rule.optimize_over.values(), strict=True))
        tree = jax.tree.map(lambda param: mask_of.get(param, optax.MaskedNode()), self._storage.tree())
        return assembled(type(rule), vars(rule) | {"optimize_over": tree})

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
