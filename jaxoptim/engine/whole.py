"""Parameters of optimizers that see many at once: samplers, L-BFGS, transformations of other libraries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax

from jaxoptim.core import check_gradient, step
from jaxoptim.core.loss import Evaluation
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.layout import Cell, Layout
from jaxoptim.engine.numbers import Numbers
from jaxoptim.engine.owner import Owner
from jaxoptim.engine.static import Static
from jaxoptim.engine.update import Update, Updated


class Whole(Owner):
    """The owner of parameters in groups, each with a state of any form.

    Args:
        params: the parameters, whose values are taken over.
        states: of the groups.
    """

    def __init__(self, params: Sequence[Any], states: Sequence[Any]) -> None:
        super().__init__(params, contents([param.value for param in params], states))

    @property
    def values(self) -> Sequence[jax.Array]:
        """The values of the parameters."""
        return self.leaves[: len(self.params)]

    @property
    def states(self) -> Sequence[Any]:
        """The state of each group."""
        return self.contents.cells[0][1]

    @states.setter
    def states(self, states: Sequence[Any]) -> None:
        self.replace(contents(self.values, states))

    def read(self, index: int) -> jax.Array:
        """Return the value of one parameter."""
        return self.leaves[index]

    def update_outdated(self) -> None:
        """Bring back the values that were assigned, or taken over by another optimizer, since the last step."""
        if self.outdated:
            values = list(self.values)
            for index in sorted(self.outdated):
                values[index] = self.params[index].value
                self.params[index].enter(self, index)
            self.outdated.clear()
            self.replace(contents(values, self.states))


def contents(values: Sequence[Any], states: Sequence[Any]) -> Contents:
    """Return values and states as compiled programs take them; the values are the first leaves."""
    return Contents(None, [(tuple(values), tuple(states))])


class SharedUpdate(Update):
    """The update of groups whose rules share state between the parameters of a group.

    Its data are the rules, for each group the count of steps and what its rule shares, and a tree of noise, None where
    it is to be drawn. Counts and what is shared are published after a step, but for keys that stay what they were.

    Keys come and go as the numbers that they are made of: a compiled call that is given a typed key, or returns one,
    takes several times as long.

    Args:
        layout: which parameters are whose; its cells are the groups.
        form: the structure of values and states.
        rules: the structure of the rules.
        keys: for each group the names and the implementations of the keys among what its rule shares.
        held: the parameters that stay as they are.
    """

    def __init__(
        self,
        layout: Layout,
        form: Static,
        rules: Static,
        keys: tuple[tuple[tuple[str, Any], ...], ...],
        held: frozenset[str] = frozenset(),
    ) -> None:
        self.layout, self.form, self.rules, self.keys, self.held = layout, form, rules, keys, held

    def values(self, data: Any, leaves: Sequence[Any]) -> dict[str, jax.Array]:
        """Return the values of all parameters by name."""
        values, _ = self.contents(leaves).cells[0]
        return {struct.name: value for struct, value in zip(self.layout.structs, values, strict=True)}

    def along(self, data: Any, leaves: Sequence[Any], grads: Any) -> tuple[Contents, Any]:
        """Update along gradients; a parameter without one stays."""
        structs = self.layout.structs
        pairs = zip(self.layout.leaves(grads), structs, strict=True)
        given = [None if struct.name in self.held else leaf for leaf, struct in pairs]
        for cell, rule in zip(self.layout.cells, self._rules(data), strict=True):
            for member in cell.members:
                if given[member] is not None:
                    given[member] = check_gradient(rule, structs[member].name, given[member], structs[member].like)
        return self._stepped(data, leaves, given)

    def after(self, data: Any, leaves: Sequence[Any], evaluation: Evaluation, measured: bool) -> Updated:
        """Update along the gradient of a loss."""
        grads = [evaluation.grads.get(struct.name) for struct in self.layout.structs]
        return Updated(*self._stepped(data, leaves, grads))

    def unchanged(self, data: Any, published: Any) -> Any:
        """Return the counts and what is shared as they are."""
        pairs = zip(data[1], published, strict=True)
        return [(count, {name: shared[name] for name in new}) for (count, shared), (_, new) in pairs]

    def _rules(self, data: Any) -> list[Any]:
        return Numbers.tree_unflatten(self.rules, data[0]).each()

    def _stepped(self, data: Any, leaves: Sequence[Any], grads: Sequence[Any]) -> tuple[Contents, Any]:
        """Return all groups after one step, and what the rule of each shares; those without any gradient stay."""
        (_, common, noise), (values, states) = data, self.contents(leaves).cells[0]
        drawn = None if noise is None else self.layout.leaves(noise, "noise")
        values, new, shares = list(values), [], []
        groups = zip(self.layout.cells, self._rules(data), self.keys, states, common, strict=True)
        for cell, rule, its_keys, state, (count, shared) in groups:
            keys = {name: jax.random.wrap_key_data(shared[name], impl=impl) for name, impl in its_keys}
            shared = shared | keys
            gradients = named(self.layout, cell, grads)
            if state is not None and jax.tree.leaves(gradients):
                given = {} if drawn is None else {"noise": named(self.layout, cell, drawn)}
                own, state = named(self.layout, cell, values), state._replace(step=count, shared=shared)
                own, state = step(rule, own, gradients, state, **given)
                for member, value in zip(cell.members, own.values(), strict=True):
                    values[member] = value
                count, shared = state.step, state.shared
                state = bare(state)
            else:
                shared = rule.rested(shared)
            new.append(state)
            changed = {name: x for name, x in shared.items() if x is not keys.get(name)}
            shares.append((count, {name: jax.random.key_data(x) if name in keys else x for name, x in changed.items()}))
        return contents(values, new), shares


def named(layout: Layout, cell: Cell, leaves: Sequence[Any]) -> OrderedDict[str, Any]:
    """Return the entries of the parameters of a cell, by their names."""
    return OrderedDict((layout.structs[member].name, leaves[member]) for member in cell.members)


def bare(state: Any) -> Any:
    """Return a state without the entries that the group publishes."""
    return state._replace(step=None, shared={}, counts=None)
