"""The groups of a torch-style optimizer, and the store that keeps their parameters."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import Rule, check_param, trees
from jaxoptim.core.precision import DEFAULT
from jaxoptim.core.rule import Traced
from jaxoptim.core.shown import shown
from jaxoptim.engine.freeze import View
from jaxoptim.engine.numbers import Setting, TakenApart, taken_apart
from jaxoptim.engine.owner import Minimization
from jaxoptim.engine.records import NOT_STARTED
from jaxoptim.engine.records import Group as Members
from jaxoptim.engine.slabs import Slabs
from jaxoptim.engine.store import State, Store
from jaxoptim.engine.transformed import Transform
from jaxoptim.optim import gradient_transforms, option_names
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.part import Part

Group = dict[str, Any]

_MISSING = object()
"""Stands for an option that a group has lost; making its rule raises."""


class Storage:
    """Groups of parameters as the user sees and edits them, over a :class:`~jaxoptim.engine.store.Store`.

    Args:
        rule: the class of the rule.
        step_type: how ``state`` shows the count of steps: ``jax.Array``, ``int``, or None for not at all.
        fixed: hyperparameters of the rule that stay at these values whatever a group says.

    Attributes:
        groups: torch's ``param_groups``, which the user may change at any time.
        forest: the trees of parameters as they were given.
        is_list: whether the user sees a list with one tree per group, or the one tree that was given.
        labels: a unique name for each parameter.
        allowed: the names of the options of a group.
        unlisted: those that a group has only where they are given.
        other_state: the entries under keys that are no parameters, the user's own.
        gradient_transform: the transformation of the gradients of all parameters before a step, None for none.
        precision: how arrays of few bits are kept.
        axes: the data axes over whose devices state is in parts.
        loaded_transform_state: the state of the transformations from the next step on, None for that which they have.
    """

    takes_transforms = True
    """Whether gradients can go through transformations."""

    def __init__(self, rule: type[Rule], step_type: type | None, fixed: Mapping[str, Any]) -> None:
        self.rule, self.step_type, self.fixed = rule, step_type, fixed
        self.groups: list[Group] = []
        self.forest: list[Any] = []
        self.is_list = False
        self.other_state: dict[Any, Any] = {}
        self.precision = DEFAULT
        self.axes: tuple[str, ...] = ()
        self.gradient_transform: Any = None
        self.loaded_transform_state: Any = None
        self._transform: Transform | None = None
        self._transform_key: Any = None  # what it was made of
        self.labels: dict[Parameter, str] = {}
        self.allowed: Collection[str] = ()
        self.unlisted: Collection[str] = ()
        self._num_keys = 0  # of all groups, when their names were last checked
        self.store = Store()
        self._fields = [field.name for field in dataclasses.fields(rule) if field.init]  # type: ignore[arg-type]
        self._options: list[list[Any]] = []  # what the settings were made of
        self._settings: list[TakenApart] = []  # one for each group
        self._seen: list[tuple[Group, list[Parameter]]] = []  # what the slabs were made of
        self._strays: list[Parameter] = []  # parameters that were only put into a group
        self._places: list[int] = []  # of the groups in the slabs among all, where one may stand twice

    # What belongs to whom.

    def parameters(self) -> list[Parameter]:
        """All parameters in the order of the groups, each once."""
        return list(dict.fromkeys(param for group in self.groups for param in group["params"]))

    def known(self) -> list[Parameter]:
        """Return all parameters that may have state: those of the groups, and others that were there before."""
        return list(dict.fromkeys([*self.parameters(), *self.store.known()]))

    def tree(self) -> Any:
        """Return the parameters in the user's structure; at the end a list of those that were only put into a group."""
        if self._is_loose() or self._groups_changed():
            given, inside = set(jax.tree.leaves(self.forest)), set(self.parameters())
            self._strays = [
                param for param in self.known() if param not in given and (param in inside or self.has_state(param))
            ]
        if self._strays:
            return [*self.forest, self._strays]
        return self.forest if self.is_list else self.forest[0]

    def _is_loose(self) -> bool:
        """Return whether parameters may have come or gone since the last step."""
        return self.store.slabs is None

    def own_gradients(self) -> Any:
        """Return the tree of each parameter's ``grad``, None where a parameter stands a second time."""
        leaves, treedef = jax.tree.flatten(self.tree())
        grads = {param: param.grad for param in leaves}
        if len(grads) == len(leaves):
            return jax.tree.unflatten(treedef, grads.values())
        return jax.tree.unflatten(treedef, [grads.pop(param, None) for param in leaves])

    def rule_of(self, group: Group) -> Rule:
        """Return the rule with the options of a group."""
        fields = [name for name in self._fields if name in group or name not in self.unlisted]
        if missing := [name for name in fields if name not in group]:
            raise KeyError(
                f"A parameter group of {self.rule.__name__} has no option {missing[0]!r}. "
                f"It takes {', '.join(self._fields)}."
            )
        given = {name: self._option(group, name) for name in fields}
        options = {
            name: option if isinstance(self.rule.specs.get(name), Traced) else jax.tree.map(_plain, option)
            for name, option in given.items()
        }
        rule = self.rule(**options | dict(self.fixed))
        if self.precision != DEFAULT:
            rule = rule.with_precision(**self.precision._asdict())
        if by_parameter := rule.by_parameter:
            name = by_parameter[0]
            raise TypeError(
                f"Invalid {name}: {shown(given[name])}. A class takes one number for all parameters of a group. Give "
                f"groups=[(selector, {{{name!r}: number}}), ...], or use the pure face, which takes trees."
            )
        for name, option in given.items():
            if isinstance(self.rule.specs.get(name), Traced):
                continue
            if isinstance(option, jax.Array) and option.size != 1:
                raise ValueError(f"Tensor {name} must be 1-element, but it has shape {option.shape}.")
        return rule

    def _option(self, group: Group, name: str) -> Any:
        """Return the value of a hyperparameter in a group."""
        return group.get(name, _MISSING)

    def check_param(self, rule: Rule, name: str, param: Parameter) -> None:
        """Raise for a parameter that the rule cannot update."""
        check_param(rule, name, param.struct)

    def check_repeated(self, params: Sequence[Parameter]) -> None:
        """Accept parameters that stand in a group more than once: a step updates them as often, as in torch."""

    def read_all(self) -> None:
        """Read the values of all parameters, which is faster than one after the other."""
        if self.store.slabs is not None:
            self.store.slabs.read_all()

    def values(self) -> Any:
        """Return the values of all parameters, in the structure of :meth:`tree`."""
        self.read_all()
        return jax.tree.map(lambda param: param.value, self.tree())

    # State by parameter.

    def has_state(self, param: Parameter) -> bool:
        """Return whether ``state`` has an entry for the parameter."""
        return bool(self.state_of(param))

    def state_of(self, param: Parameter) -> dict[str, Any]:
        """Return the state of a parameter by torch's names, a new dict."""
        return self._as_shown(self.store.state_of(param), {})

    def states(self) -> dict[Parameter, dict[str, Any]]:
        """Return the state of all parameters that have some."""
        counts: dict[int, Any] = {}
        states = {param: self._as_shown(state, counts) for param, state in self.store.states().items()}
        return {param: states[param] for param in self.known() if states.get(param)}

    def _as_shown(self, state: State, counts: dict[int, Any]) -> dict[str, Any]:
        """Return the entries of torch's state, the count of steps first, if it has one."""
        count, entries = state
        if self.step_type is None or count == NOT_STARTED:
            return dict(entries)
        if self.step_type is int:
            return {"step": count} | entries
        if count not in counts:
            counts[count] = jnp.asarray(count, jnp.float32)
        return {"step": counts[count]} | entries

    def set_state(self, param: Parameter, state: dict[str, Any]) -> None:
        """Give a parameter another state, from the next step on."""
        self.store.set_state(param, state)

    # A step.

    def advance(self, grads: Any) -> None:
        """Make one update of all parameters that have a gradient."""
        if not self.groups:
            return  # as torch
        self.settle()
        self.store.advance(grads, self._freeze)

    def minimize(self, job: Minimization) -> Any:
        """Make one update along the gradient of a loss, in one compiled call; see :meth:`Owner.minimize_by`."""
        return self.slabs().minimize(job)

    def start(self) -> None:
        """Create the state of all parameters now instead of at their first update."""
        self.slabs().start()

    # The pure face.

    def parts(self) -> list[Part]:
        """Return the parameters as the pure face has them: by group, and by the steps that they have made."""
        groups, states = self.slabs().groups, self.store.states()
        found: list[Part] = []
        for at, members in enumerate(groups):
            group = self.groups[self._places[at]] if at < len(self._places) else {}
            kinds: dict[tuple[int, int], list[Parameter]] = {}
            for param, times in zip(members.params, members.times, strict=True):
                kinds.setdefault((times if param.requires_grad else 0, states[param][0]), []).append(param)
            for (times, count), params in kinds.items():
                labels, slots = [self.labels[param] for param in params], [states[param][1] for param in params]
                steps = None if count == NOT_STARTED else count
                found.append(Part(group, members.apart.setting.rule, params, labels, times, steps, slots))
        return found

    def load_part(self, part: Part, counts: Mapping[Parameter, Any]) -> None:
        """Take over state that was kept elsewhere; ``counts`` are of the parameters that have missed an update."""
        for param, slots in zip(part.params, part.slots, strict=True):
            steps, (before, _) = int(counts.get(param, part.count)), self.store.state_of(param)
            if steps or before != NOT_STARTED or param not in counts:
                self.store.load(param, steps, slots)

    # What the user has changed since the last step.

    def slabs(self) -> Slabs:
        """Return the arrays, up to date with groups, options, and assigned values."""
        self.settle()
        return self.store.slabs  # type: ignore[return-value]

    def settle(self) -> None:
        """Bring the store up to date with groups, options, and assigned values."""
        self._check_groups()
        self._settle_options()
        if self._groups_changed():
            self.store.thaw()
        if self.store.slabs is None:
            self._freeze()
        self.store.slabs.update_outdated()  # type: ignore[union-attr]
        self._settle_transform()

    def _settle_transform(self) -> None:
        """Bring the transformation of gradients up to date."""
        of_groups = [(tx, group) for group in self.groups if (tx := group.get(gradient_transforms.KEY)) is not None]
        slabs: Slabs = self.store.slabs  # type: ignore[assignment]
        if self.gradient_transform is None and not of_groups:
            slabs.transform = self._transform = self._transform_key = None
            return
        txs = (self.gradient_transform, *(tx for tx, _ in of_groups))
        tree = self.tree()
        leaves, treedef = jax.tree.flatten(tree)
        key = (txs, treedef, leaves, [list(group["params"]) for _, group in of_groups])
        if self._transform is not None and self._transform_key == key and self.loaded_transform_state is None:
            slabs.transform = self._transform
            return
        if self._transform is not None and self._transform_key[0] == txs and self._transform_key != key:
            slabs.publish()
            if jax.tree.leaves(self._transform.state):
                warnings.warn(
                    "The state of gradient_transform begins afresh, because the parameters are others than before.",
                    stacklevel=2,
                )
        for tx in txs:
            gradient_transforms.check(tx)
        pairs = [(tx, frozenset(group["params"])) for tx, group in of_groups]
        tx, state = gradient_transforms.combined(txs[0], pairs, tree), self.loaded_transform_state
        if state is None:
            state = jax.jit(tx.init)(jax.tree.map(lambda param: param.value, tree))
        slabs.transform = self._transform = Transform(tx, state)
        self._transform_key, self.loaded_transform_state = key, None

    def transform(self) -> Transform | None:
        """Return the transformation of gradients, with its current state; None if there is none."""
        keys = (group.get(gradient_transforms.KEY) for group in self.groups)
        if not self.groups or (self.gradient_transform is None and all(tx is None for tx in keys)):
            return None
        slabs = self.slabs()
        slabs.publish()
        return slabs.transform

    def transform_state(self) -> Any:
        """Return the state of the transformation of gradients, None without one."""
        transform = self.transform()
        return None if transform is None else transform.state

    def _check_groups(self) -> None:
        """Raise if there is nothing to update."""
        if not self.groups:
            raise ValueError("The optimizer has no parameter groups left. Add one with add_param_group.")
        self._check_names()

    def _check_names(self) -> None:
        """Raise if a new key of a group is a misspelt option."""
        if (number := sum(map(len, self.groups))) != self._num_keys:
            for group in self.groups:
                self.check_keys(self.rule.__name__, group)
            self._num_keys = number

    def check_keys(self, owner: str, group: Group) -> None:
        """Raise for a key of a group that is a misspelt option, or that this optimizer does not use."""
        option_names.check_own(owner, group, self.allowed)
        if group.get(gradient_transforms.KEY) is not None:
            self.check_transforms(owner)

    def check_transforms(self, owner: str) -> None:
        """Raise if gradients cannot go through transformations."""
        if not self.takes_transforms:
            raise TypeError(
                f"{owner} takes no gradient_transform here: samplers, L-BFGS and the optimizers of a PyroOptim follow "
                "the gradient of the loss itself. Put what you need into the loss, or take another optimizer."
            )

    def _groups_changed(self) -> bool:
        """Return whether the slabs were made of other groups or other parameters."""
        seen, groups = self._seen, self.groups
        return len(seen) != len(groups) or any(
            old is not new or params != new["params"] for (old, params), new in zip(seen, groups, strict=True)
        )

    def _settle_options(self) -> None:
        """Make new settings if an option of a group has changed."""
        options = [[self._option(group, name) for name in self._fields] for group in self.groups]
        if _same(options, self._options):
            return
        old = dict(enumerate(zip(self._options, self._settings, strict=True)))
        settings = []
        for at, (group, now) in enumerate(zip(self.groups, options, strict=True)):
            before, setting = old.get(at, (None, None))
            settings.append(self._setting_after(before, setting, now, group))
        forms = [of.form for of in self._settings]
        self._options = [[copy.copy(x) if isinstance(x, list | np.ndarray) else x for x in of] for of in options]
        self._settings = settings
        self._changed(settings, [of.form for of in settings] == forms and all(of.is_numeric for of in settings))

    def _changed(self, settings: list[TakenApart], is_same_form: bool) -> None:
        """Pass on new settings."""
        if not is_same_form:
            self.store.thaw()  # a term came or went, and perhaps a slot with it
        elif self.store.slabs is not None:
            self.store.renumber({at: settings[place] for at, place in enumerate(self._places)})

    def _setting_after(self, before: Any, setting: TakenApart | None, now: list[Any], group: Group) -> TakenApart:
        """Return the setting of a group, given its previous one."""
        if setting is not None and _same(now, before):
            return setting
        if setting is not None:
            changed = [at for at, (new, old) in enumerate(zip(now, before, strict=True)) if new is not old]
            if len(changed) == 1 and type(now[changed[0]]) is float:
                name = self._fields[changed[0]]
                if name not in self.fixed and (new := setting.with_number(name, now[changed[0]])) is not None:
                    return new
        return self._setting(group)

    def _setting(self, group: Group) -> TakenApart:
        return taken_apart(Setting(self.rule_of(group)))

    def _freeze(self) -> None:
        """Put the parameters of the groups into slabs."""
        tree = self.tree()
        leaves, treedef = jax.tree.flatten(tree)
        self.labels = labelled(tree)
        members = []
        self._places = list({id(group): at for at, group in reversed([*enumerate(self.groups)])}.values())[::-1]
        for at in self._places:
            group = self.groups[at]
            times: Counter[Parameter] = Counter(group["params"] * sum(other is group for other in self.groups))
            is_counted = self.step_type is not None
            members.append(Members(self._settings[at], tuple(times), tuple(times.values()), is_counted, self.axes))
        every = Counter(param for of in members for param in of.params)
        if twice := [param for param, count in every.items() if count > 1]:
            raise ValueError(f"some parameters appear in more than one parameter group: {twice[0]}")
        inside = {param for of in members for param in of.params}
        outside = tuple(param for param in self.labels if param not in inside)
        if outside:  # taken out of all groups, and updated by none
            never = (0,) * len(outside)
            members.append(Members(self._settings[0], outside, never, self.step_type is not None, self.axes))
        self.store.freeze(members, self.labels, View(treedef, tuple(leaves)))
        self._seen = [(group, list(group["params"])) for group in self.groups]


def labelled(tree: Any) -> dict[Parameter, str]:
    """Return a unique name for each parameter: its own, or its path where others have that name too."""
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


def _plain(x: Any) -> Any:
    """Return an option, a NumPy array of one element as a number."""
    return x.item() if isinstance(x, np.ndarray) and x.size == 1 else x


def _same(options: Any, others: Any) -> bool:
    """Return whether no option has changed; arrays that are not the same object count as changed."""
    try:
        return options == others
    except ValueError:
        return False
