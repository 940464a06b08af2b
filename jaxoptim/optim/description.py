"""A table of what an optimizer does with each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxoptim.core import trees
from jaxoptim.core.shown import aligned
from jaxoptim.optim import gradient_transforms
from jaxoptim.optim.storage import Storage, labelled


class Row(NamedTuple):
    """The entry of one parameter.

    Attributes:
        name: its name, or its path.
        shape: of its array.
        dtype: of its array; None where there is no array.
        group: the number of its group in ``param_groups``; None if it is in none.
        rate: its learning rate at the next step.
        decay: its weight decay at the next step; None if the optimizer has none.
        trained: whether steps update it.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: Any
    group: int | None
    rate: Any
    decay: Any
    trained: bool


class Table(tuple[Row, ...]):
    """The rows of a description; printed as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """Return the rows as aligned text."""
        return aligned([Row._fields, *(tuple(map(_shown, row)) for row in self)], left=True)

    __repr__ = __str__


def described(storage: Storage, options: Sequence[dict[str, Any]], with_none: bool) -> Table:
    """Return the entries of all parameters of an optimizer, in the order of its tree.

    Args:
        storage: its groups.
        options: those of each group at the next step.
        with_none: whether None in the tree is a frozen parameter, and not a part of a module that is no parameter.
    """
    tree = storage.tree()
    group_of = {param: at for at, group in reversed([*enumerate(storage.groups)]) for param in group["params"]}
    labels = labelled(tree)
    rows = []
    for name, param in zip(trees.names(tree), jax.tree.leaves(tree, is_leaf=trees.is_leaf), strict=True):
        if param is None:
            rows += [Row(name, None, None, None, None, None, False)] * with_none
            continue
        at = group_of.get(param)
        its = {} if at is None else options[at]
        rate, is_trained = its.get("lr", its.get("eta")), at is not None and param.requires_grad
        rows.append(Row(labels[param], param.shape, param.dtype, at, rate, its.get("weight_decay"), is_trained))
    return Table(rows)


def options_at(group: dict[str, Any], step: int) -> dict[str, Any]:
    """Return the options of a group, with every schedule replaced by its value at a step."""

    def now(option: Any) -> Any:
        if isinstance(option, tuple):
            return tuple(map(now, option))
        return float(option(step)) if callable(option) else option

    aside = ("params", "param_names", gradient_transforms.KEY)
    return {name: now(option) for name, option in group.items() if name not in aside}


def has_schedule(group: dict[str, Any]) -> bool:
    """Return whether an option of a group depends on the step."""
    options = [x for name, x in group.items() if name not in ("params", gradient_transforms.KEY)]
    return any(map(callable, jax.tree.leaves(options, is_leaf=callable)))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "trained" if value else "frozen"
    if isinstance(value, float) or (hasattr(value, "__array__") and np.size(value) == 1):
        return f"{np.asarray(value).item():.4g}"
    return str(value)
