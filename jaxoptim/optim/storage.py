"""Where an optimizer keeps its parameters and their state, and how it advances them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxoptim.core import Rule, check_param, trees
from jaxoptim.core.rule import Traced
from jaxoptim.optim import program
from jaxoptim.optim.bucket import Bucket, abstract_slots, slot_names
from jaxoptim.optim.parameter import Parameter

Group = dict[str, Any]

_MISSING = object()
"""Stands for an option that a group has lost; making its rule raises."""


class Storage:
    """Parameters in buckets that are updated together, rearranged when the user changes what belongs together.

    Args:
        rule: the class of the rule.
        step_type: how ``state`` shows the count of steps: ``jax.Array``, ``int``, or None for not at all.
        fixed: hyperparameters of the rule that stay at these values whatever a group says.

    Attributes:
        groups: torch's ``param_groups``, which the user may change at any time.
        forest: the trees of parameters as they were given.
        is_list: whether the user sees a list with one tree per group, or the one tree that was given.
        labels: a unique name for each parameter.
        buckets: the parameters that are updated together.
        other_state: what the user filed under other keys than parameters.
    """

    _minimize = staticmethod(program.minimize)
    """The program of :meth:`minimize`."""
    bucket_class: ClassVar[type[Bucket]] = Bucket
    """What keeps the parameters that are updated together."""

    def __init__(self, rule: type[Rule], step_type: type | None, fixed: Mapping[str, Any]) -> None:
        self.rule, self.step_type, self.fixed = rule, step_type, fixed
        self.groups: list[Group] = []
        self.forest: list[Any] = []
        self.is_list = False
        self.other_state: dict[Any, Any] = {}
        self.labels: dict[Parameter, str] = {}
        self._fields = [field.name for field in dataclasses.fields(rule) if field.init]  # type: ignore[arg-type]
        self._options: list[list[Any]] = []
        self._rules: list[Rule] = []
        self._seen: list[tuple[Group, list[Parameter]]] = []
        self._strays: list[Parameter] = []
        self.buckets: list[Bucket] = []
        self._places: dict[Parameter, tuple[Bucket, int]] = {}
        self._loose: dict[Parameter, dict[str, Any]] = {}
        self._extras: dict[Parameter, dict[str, Any]] = {}
        self._with_rows: set[Parameter] = set()
        self._kinds: dict[Any, tuple[list[str], set[str]]] = {}

    # What belongs to whom.

    def parameters(self) -> list[Parameter]:
        """All parameters in the order of the groups, each once."""
        return list(dict.fromkeys(param for group in self.groups for param in group["params"]))

    def known(self) -> list[Parameter]:
        """All parameters that may have state: those of the groups, and others that were there before."""
        return list(dict.fromkeys([*self.parameters(), *self._places, *self._loose]))

    def tree(self) -> Any:
        """The parameters in the structure that the user gave; a list at the end for those only put into a group."""
        if self._groups_changed():
            given = set(jax.tree.leaves(self.forest))
            inside = set(self.parameters())
            self._strays = [
                param for param in self.known() if param not in given and (param in inside or self.has_state(param))
            ]
        if self._strays:
            return [*self.forest, self._strays]
        return self.forest if self.is_list else self.forest[0]

    def own_gradients(self) -> Any:
        """The tree of each parameter's ``grad``, None where a parameter stands a second time."""
        leaves, treedef = jax.tree.flatten(self.tree())
        grads = {param: param.grad for param in leaves}
        if len(grads) == len(leaves):
            return jax.tree.unflatten(treedef, grads.values())
        return jax.tree.unflatten(treedef, [grads.pop(param, None) for param in leaves])

    def rule_of(self, group: Group) -> Rule:
        """The rule with the options of a group."""
        if missing := [name for name in self._fields if name not in group]:
            raise KeyError(
                f"A parameter group of {self.rule.__name__} has no option {missing[0]!r}. "
                f"It takes {', '.join(self._fields)}."
            )
        given = {name: self._option(group, name) for name in self._fields}
        options = {
            name: option if isinstance(self.rule.specs.get(name), Traced) else jax.tree.map(_plain, option)
            for name, option in given.items()
        }
        rule = self.rule(**options | dict(self.fixed))
        for name, option in given.items():
            if isinstance(self.rule.specs.get(name), Traced):
                continue
            if isinstance(option, jax.Array) and option.size != 1:
                raise ValueError(f"Tensor {name} must be 1-element, but it has shape {option.shape}.")
        return rule

    def _option(self, group: Group, name: str) -> Any:
        """What a group says of a hyperparameter."""
        return group.get(name, _MISSING)

    def check_param(self, rule: Rule, name: str, param: Parameter) -> None:
        """Raise for a parameter that the rule cannot update."""
        check_param(rule, name, param.struct)

    # State by parameter.

    def has_state(self, param: Parameter) -> bool:
        """Whether ``state`` has an entry for the parameter."""
        if param in self._loose:
            return bool(self._loose[param])
        if param not in self._places:
            return False
        state = self._places[param][0].state
        return (state is not None and (self.step_type is not None or bool(state.slots))) or param in self._extras

    def state_of(self, param: Parameter) -> dict[str, Any]:
        """The state of a parameter by torch's names, a new dict."""
        if param in self._loose:
            return dict(self._loose[param])
        if not self.has_state(param):
            return {}
        bucket, index = self._places[param]
        return self._count_of(bucket) | bucket.slots_of(index) | self._extras.get(param, {})

    def states(self) -> dict[Parameter, dict[str, Any]]:
        """The state of all parameters that have some."""
        states = {}
        for bucket in self.buckets:
            count = self._count_of(bucket)
            for param, slots in zip(bucket.params, bucket.all_slots(), strict=True):
                states[param] = count | slots | self._extras.get(param, {})
        states |= self._loose
        return {param: states[param] for param in self.known() if self.has_state(param)}

    def _count_of(self, bucket: Bucket) -> dict[str, Any]:
        """The entry of torch's state for the count of steps, if it has one."""
        if self.step_type is None or bucket.state is None:
            return {}
        return {"step": int(bucket.state.step) if self.step_type is int else bucket.state.step.astype(jnp.float32)}

    def set_state(self, param: Parameter, state: dict[str, Any]) -> None:
        """Give a parameter another state, from the next step on."""
        self._loose[param] = state

    # A step.

    def advance(self, grads: Any) -> None:
        """One update of all parameters that have a gradient."""
        if not self.groups:
            return  # as torch
        self.settle()
        if any(bucket.contents.has_state for bucket in self.buckets):
            with contextlib.suppress(program.RegroupNeeded):
                return self._take(program.advance(self._plan, self._packed_rules, self._contents(), grads))
        with self._started(self._regroup(grads)):
            self._take(program.advance(self._plan, self._packed_rules, self._contents(), grads))

    def minimize(self, loss_fn: Callable[..., Any], has_aux: bool, args: tuple[Any, ...]) -> Any:
        """The loss, and one update along its gradient, in one compiled call."""
        self.settle()
        with self._started(self.buckets):
            loss, contents = self._minimize(self._plan, self._packed_rules, self._contents(), loss_fn, has_aux, args)
            self._take(contents)
        return loss

    def start(self) -> None:
        """Make the state of all parameters now instead of at their first update."""
        self.settle()
        with self._started(self.buckets):
            pass

    def _contents(self) -> tuple[Any, ...]:
        """What the compiled programs take: ours alone, because they destroy it."""
        for bucket in self.buckets:
            bucket.keep_what_others_hold()
        return tuple(bucket.contents for bucket in self.buckets)

    def _take(self, contents: tuple[Any, ...]) -> None:
        for bucket, new in zip(self.buckets, contents, strict=True):
            bucket.replace(new)

    @contextlib.contextmanager
    def _started(self, buckets: list[Bucket]) -> Iterator[None]:
        """Make the state of buckets that have none; they lose it again if what follows fails."""
        new = [bucket for bucket in buckets if not bucket.contents.has_state and bucket.times]
        try:
            for bucket in new:
                bucket.start(self.rule_for(bucket))
            yield
        except BaseException:
            for bucket in new:
                bucket.state = None
            raise

    # What the user has changed since the last step.

    def settle(self) -> None:
        """Bring buckets and rules up to date with groups, options, and assigned values."""
        if not self.groups:
            raise ValueError("The optimizer has no parameter groups left. Add one with add_param_group.")
        self._settle_options()
        if self._loose or self._groups_changed():
            self._arrange()
        for bucket in self.buckets:
            if bucket.outdated:
                bucket.update_outdated()

    def _groups_changed(self) -> bool:
        """Whether the buckets were made of other groups or other parameters."""
        seen, groups = self._seen, self.groups
        return len(seen) != len(groups) or any(
            old is not new or params != new["params"] for (old, params), new in zip(seen, groups, strict=True)
        )

    def _settle_options(self) -> None:
        """Make new rules if an option of a group has changed."""
        options = [[self._option(group, name) for name in self._fields] for group in self.groups]
        if _same(options, self._options):
            return
        rules = [self.rule_of(group) for group in self.groups]
        forms = [jax.tree.structure(rule) for rule in self._rules]
        self._options = [[copy.copy(x) if isinstance(x, list | np.ndarray) else x for x in of] for of in options]
        self._rules = rules
        if [jax.tree.structure(rule) for rule in rules] != forms:
            self._seen = []  # a term came or went, and perhaps a slot with it
        else:
            self._number_rules()

    def rule_for(self, bucket: Bucket) -> Rule:
        """The rule that a bucket follows."""
        return next(
            (rule for rule, group in zip(self._rules, self.groups, strict=True) if group is bucket.group),
            self._rules[0],  # parameters that the user took out of all groups are not updated by any
        )

    def _regroup(self, grads: Any) -> list[Bucket]:
        """Split buckets of which only some have a gradient, and return those that do."""
        given = dict(
            pair
            for bucket, leaves in zip(self.buckets, self._plan.gradients(grads), strict=True)
            for pair in zip(bucket.params, leaves, strict=True)
        )
        self._with_rows |= {param for param, grad in given.items() if isinstance(grad, BCOO)}
        self._arrange(given)
        return [bucket for bucket in self.buckets if given[bucket.params[0]] is not None]

    def _arrange(self, grads: Mapping[Parameter, Any] | None = None) -> None:
        """Put those parameters into one bucket that can be updated together."""
        self.labels = self._labels()
        inside = set(self.parameters())
        outside = {"params": [param for param in self.labels if param not in inside]}
        members: dict[Hashable, tuple[Group, Rule, int, bool, list[Parameter]]] = {}
        for group, rule in [*zip(self.groups, self._rules, strict=True), (outside, self._rules[0])]:
            for param, times in Counter(group["params"]).items():
                times = 0 if group is outside else times
                packed = self._packs(rule) and param not in self._with_rows
                updated = grads is None or grads.get(param) is not None
                key = (id(group), times, packed, updated, self._past(param, rule))
                members.setdefault(key, (group, rule, times, packed, []))[-1].append(param)
        self.buckets = [self._bucket(*entry) for entry in members.values()]
        self._places = {param: (bucket, index) for bucket in self.buckets for index, param in enumerate(bucket.params)}
        self._loose.clear()
        self._seen = [(group, list(group["params"])) for group in self.groups]
        self._number_rules()
        self._plan = self._planned()

    def _packs(self, rule: Rule) -> bool:
        """Whether small arrays may stand in one buffer."""
        return rule.elementwise and rule.sparse != "required"

    def _past(self, param: Parameter, rule: Rule) -> Hashable:
        """What two parameters have in common if they have always been updated together; None before that."""
        if param not in self._loose:
            bucket = self._places[param][0] if param in self._places else None
            return None if bucket is None or bucket.state is None else id(bucket)
        names, scalars = self._slot_kinds(rule)
        state = {name: slot for name, slot in self._loose[param].items() if slot is not None}
        if "step" not in state and not state.keys() & set(names):
            return None
        if not rule.elementwise:
            names = [name for name, slot in abstract_slots(rule, param.struct).items() if slot is not None]
        numbers = [(name, float(state[name])) for name in names if name in scalars & state.keys()]
        return (count_in(state), *numbers, *(name for name in names if name not in state))

    def _slot_kinds(self, rule: Rule) -> tuple[list[str], set[str]]:
        """The names of a rule's slots, and of those that are one number for each parameter."""
        form = jax.tree.structure(rule)
        if form not in self._kinds:
            self._kinds[form] = slot_names(rule), _scalar_slots(rule)
        return self._kinds[form]

    def _bucket(self, group: Group, rule: Rule, times: int, packed: bool, params: list[Parameter]) -> Bucket:
        """The bucket of some parameters: as it was, or a new one with their values and state."""
        names = slot_names(rule)
        old = self._places[params[0]][0] if params[0] in self._places else None
        whole = old is not None and old.params == tuple(params) and (old.times, old.packed) == (times, packed)
        awakened = any(self._extras.get(param, {}).keys() & set(names) for param in params)
        if old is not None and whole and not awakened and not any(param in self._loose for param in params):
            old.group = group
            if old.state is not None and not old.state.slots.keys() >= set(names):
                old.start(rule)
                if self.step_type is None:  # what torch counts by the presence of the slot alone starts anew
                    old.state = old.state._replace(step=jnp.zeros_like(old.state.step))
            return old
        has_past = self._past(params[0], rule) is not None
        states = [self._loose.get(param) or self.state_of(param) for param in params]
        count = None if old is None or old.state is None or params[0] in self._loose else old.state.step
        bucket = self.bucket_class(group, [self.labels[param] for param in params], params, times, packed)
        if has_past:
            slots = [{name: x for name, x in s.items() if name in names and x is not None} for s in states]
            bucket.load(rule, count_in(states[0]) if count is None else count, slots)
        for param, state in zip(params, states, strict=True):
            self._extras.pop(param, None)
            if extras := {name: x for name, x in state.items() if name not in (*names, "step")}:
                self._extras[param] = extras
        return bucket

    def _number_rules(self) -> None:
        self._packed_rules = program.Rules([self.rule_for(bucket) for bucket in self.buckets])

    def _planned(self) -> program.Plan:
        """The way from the tree that the user sees to the buckets."""
        leaves = self._leaves()
        order = {param: position for position, param in enumerate(dict.fromkeys(leaves))}
        return program.Plan(
            jax.tree.structure(self.tree()),
            [self.labels[param] for param in leaves],
            [order[param] for param in leaves],
            [(tuple(order[p] for p in bucket.params), bucket.times, bucket.packed) for bucket in self.buckets],
        )

    def _leaves(self) -> list[Parameter]:
        return jax.tree.leaves(self.tree())

    def _labels(self) -> dict[Parameter, str]:
        """A unique name for each parameter: its own, or its path where others have that name too."""
        tree = self.tree()
        leaves = jax.tree.leaves(tree, is_leaf=trees.is_leaf)
        paths = {leaf: path for path, leaf in zip(trees.names(tree), leaves, strict=True) if leaf is not None}
        shared = Counter(param.name for param in paths)
        taken: Counter[str] = Counter()
        labels = {}
        for param, path in paths.items():
            name = path if param.name is None or shared[param.name] > 1 else param.name
            taken[name] += 1
            labels[param] = name if taken[name] == 1 else f"{name} ({taken[name]})"
        return labels


def count_in(state: dict[str, Any]) -> int:
    """The steps that a parameter's state has seen; state without a count is past its first step."""
    return int(np.max(state.get("step", 1)))  # DCTAdam counts for each number


def _plain(x: Any) -> Any:
    """An option, a NumPy array of one element as a number."""
    return x.item() if isinstance(x, np.ndarray) and x.size == 1 else x


def _scalar_slots(rule: Rule) -> set[str]:
    """The slots of a rule that are one number for each parameter."""
    slots = abstract_slots(rule, jax.ShapeDtypeStruct((2, 2), jnp.float32))
    return {name for name, slot in slots.items() if slot is not None and slot.shape == ()}


def _same(options: list[list[Any]], others: list[list[Any]]) -> bool:
    """Whether no option has changed; arrays that are not the same object count as changed."""
    try:
        return options == others
    except ValueError:
        return False
