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

from jaxoptim.core import OptState, Rule, trees
from jaxoptim.core.noise import check_key, is_key
from jaxoptim.core.rule import assembled
from jaxoptim.optim import program
from jaxoptim.optim.bucket import Bucket, Contents
from jaxoptim.optim.optimizer import Groups, Optimizer
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.program import Plan, Rules
from jaxoptim.optim.storage import Group, Storage

Common = tuple[jax.Array, dict[str, jax.Array]]
"""The count of steps of a group, and what its rule shares between the parameters."""


class WholeGroup(Bucket):
    """All parameters of one group, which have one count of steps whether or not each has a gradient.

    The count and what the rule shares (its key, a thermostat, metrics) are entries of the group, where the user reads
    and writes them. What a compiled step is donated has neither.
    """

    _shared: tuple[str, ...] = ()

    @property
    def state(self) -> OptState | None:
        """The state, None before it is made."""
        state = self.contents.state
        if state is None:
            return None
        step, shared = self.common()
        return state._replace(step=step, shared=shared)

    @state.setter
    def state(self, state: OptState | None) -> None:
        if state is not None:
            self.take((state.step, state.shared))
            state = state._replace(step=None, shared={}, counts=None)  # type: ignore[arg-type]
        self.contents = Contents(self.values, state)

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
            shared = {name: known.get(name, x) for name, x in rule.begin().items()}
            count = self.group.get("step", 0)
        super().load(rule, count, slots, shared)


class SamplerStorage(Storage):
    """Parameters of samplers: one bucket for each group."""

    bucket_class = WholeGroup

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
        with self._started(self.buckets):
            new = _advance(self._plan, self._packed_rules, self._contents(), self._common(), grads, noise)
            self._take_all(*new)

    def minimize(self, loss_fn: Callable[..., Any], has_aux: bool, args: tuple[Any, ...]) -> Any:
        """The loss, and one update along its gradient, in one compiled call."""
        self.settle()
        with self._started(self.buckets):
            contents, common = self._contents(), self._common()
            loss, new = _minimize(self._plan, self._packed_rules, contents, common, loss_fn, has_aux, args)
            self._take_all(*new)
        return loss

    def rule_for(self, bucket: Bucket) -> Rule:
        """The rule that a bucket follows, its masks by the names of the parameters."""
        return _by_name(super().rule_for(bucket), bucket.labels)

    def _common(self) -> tuple[Common, ...]:
        return tuple(bucket.common() for bucket in self.buckets)  # type: ignore[attr-defined]

    def _take_all(self, contents: tuple[Contents, ...], common: tuple[Common, ...]) -> None:
        self._take(contents)
        for bucket, new in zip(self.buckets, common, strict=True):
            bucket.take(new)  # type: ignore[attr-defined]

    def _option(self, group: Group, name: str) -> Any:
        """What a group says of a hyperparameter; a metric that has a value is switched on."""
        option = super()._option(group, name)
        return True if name in self._switches and isinstance(option, jax.Array) else option

    def _packs(self, rule: Rule) -> bool:
        return False

    def _past(self, param: Parameter, rule: Rule) -> Any:
        """The parameters of a group have one past: its count of steps."""
        return 0

    def _bucket(self, group: Group, rule: Rule, times: int, packed: bool, params: list[Parameter]) -> Bucket:
        return super()._bucket(group, _by_name(rule, [self.labels[p] for p in params]), times, packed, params)


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


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="contents")
def _advance(
    plan: Plan, rules: Rules, contents: tuple[Contents, ...], common: tuple[Common, ...], grads: Any, noise: Any
) -> Any:
    """One step of all groups from trees of gradients and noise."""
    whole = _whole(contents, common)
    gradients = program.checked(plan, rules, whole, grads)
    given: list[dict[str, Any]] = [{} for _ in whole]
    if noise is not None:
        given = [
            {"noise": OrderedDict(zip(gradient, leaves, strict=True))}
            for gradient, leaves in zip(gradients, plan.gradients(noise, "noise"), strict=True)
        ]
    return _parted(program.stepped(plan, rules, whole, gradients, given))


@functools.partial(jax.jit, static_argnames=("plan", "loss_fn", "has_aux"), donate_argnames="contents")
def _minimize(
    plan: Plan,
    rules: Rules,
    contents: tuple[Contents, ...],
    common: tuple[Common, ...],
    loss_fn: Callable[..., Any],
    has_aux: bool,
    args: tuple[Any, ...],
) -> Any:
    """The loss (and aux) at the current parameters, and one step of all groups along its gradient."""
    whole = _whole(contents, common)
    loss, grads = program.loss_and_gradients(plan, rules, whole, loss_fn, has_aux, args)
    return loss, _parted(program.stepped(plan, rules, whole, grads))


def _whole(contents: Sequence[Contents], common: Sequence[Common]) -> list[Contents]:
    """Contents with the state that the pure face knows."""
    return [
        Contents(of.values, of.state and of.state._replace(step=step, shared=shared))
        for of, (step, shared) in zip(contents, common, strict=True)
    ]


def _parted(contents: Sequence[Contents]) -> Any:
    """Contents without count and what is shared, and these."""
    states = [of.state for of in contents]
    common = [(state.step, state.shared) for state in states if state is not None]
    bare = [state and state._replace(step=None, shared={}, counts=None) for state in states]  # type: ignore[arg-type]
    return tuple(Contents(of.values, state) for of, state in zip(contents, bare, strict=True)), tuple(common)


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

    def _pure_rule(self, bucket: Bucket) -> Rule:
        rule: Any = super()._pure_rule(bucket)
        rule = rule.replace(key=bucket.group["key"])
        if not isinstance(rule.optimize_over, OrderedDict):
            return rule
        mask_of = dict(zip(bucket.params, rule.optimize_over.values(), strict=True))
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
