"""The slots that a rule keeps of an array, found without any computation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import Rule
from jaxoptim.core.leaf import as_computed, init_leaf
from jaxoptim.core.noise import drawn_for
from jaxoptim.core.precision import MASTER

_known: dict[Any, dict[str, Any]] = {}


def abstract_slots(rule: Rule, param: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Return the shapes and dtypes of the slots of one array, None where it lacks one, in the rule's order."""
    try:
        key = (jax.tree.structure(rule), param.shape, param.dtype, jnp.result_type(float))
        hash(key)
    except TypeError:  # a switch that cannot be hashed
        return _found(rule, param)
    if key not in _known:
        if len(_known) > 4096:
            _known.clear()
        _known[key] = _found(rule, param)
    return _known[key]


def slot_names(rule: Rule) -> list[str]:
    """Return the names of a rule's slots, in its order."""
    names = list(abstract_slots(rule, _EXAMPLE))
    return [*names, MASTER] if rule.precision.master_weights else names


def scalar_slots(rule: Rule) -> set[str]:
    """Return the slots of a rule that are one number for each parameter."""
    return {name for name, slot in abstract_slots(rule, _EXAMPLE).items() if slot is not None and slot.shape == ()}


def has_slots_of(rule: Rule, other: Rule) -> bool:
    """Return whether a rule keeps the same slots as another."""
    return abstract_slots(rule, _EXAMPLE) == abstract_slots(other, _EXAMPLE)


_EXAMPLE = jax.ShapeDtypeStruct((2, 2), jnp.float32)


def _found(rule: Rule, param: jax.ShapeDtypeStruct) -> dict[str, Any]:
    names: list[str] = []

    def slots_of(param: jax.Array) -> dict[str, Any]:
        noise = [drawn_for(param, x) for x in rule.draw_noise(rule.init_shared(), 0, {0: as_computed(param)}).values()]
        drawn = {"noise": noise[0]} if noise else {}
        slots = init_leaf(rule.at(0), param, drawn)
        names.extend(slots)
        return slots

    slots = jax.eval_shape(slots_of, param)  # which sorts the names
    return {name: slots[name] for name in names}
