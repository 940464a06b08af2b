"""The update of a large array on a CPU in one pass over memory, from the text of its rule."""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxoptim.core import precision
from jaxoptim.core.leaf import Change, LeafUpdate, Wanted, update_dense, valued
from jaxoptim.core.numerics import is_complex, real_size
from jaxoptim.core.packing import is_sharded
from jaxoptim.core.rule import Rule, Slots
from jaxoptim.native import CannotCompile, Unsupported, is_native, one_pass


class _Alike(NamedTuple):
    """The inputs that are the same for all elements of an array."""

    rule: Rule
    step: jax.Array
    slots: Slots


def in_one_pass(leaf: LeafUpdate, wanted: Wanted) -> Change | None:
    """Update an array as :func:`~jaxoptim.core.leaf.update_leaf` does for a dense gradient; None if XLA is to do it."""
    if not _pays(leaf, wanted):
        return None
    kind = type(leaf.rule)
    try:
        made, slots = _update(leaf.rule, leaf.grad, leaf.slots, leaf.param, leaf.step, wanted)
    except (Unsupported, CannotCompile) as problem:
        _refused.add(kind)
        warnings.warn(
            f"{kind.__name__} on large arrays goes through XLA, and not in one pass over memory: {problem}. "
            'jaxoptim.config.native = "off" says so from the start.',
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return None, made.get("change"), made.get("param"), slots


_refused: set[type[Rule]] = set()
"""The rules for which no kernel could be made."""


def _pays(leaf: LeafUpdate, wanted: Wanted) -> bool:
    """Whether a kernel pays: the array is large, not split over devices, and its rule elementwise."""
    rule, param, slots = leaf.rule, leaf.param, [slot for slot in leaf.slots.values() if slot is not None]
    like = leaf.grad if param is None else param
    if not is_native(real_size(like)) or like.ndim == 0 or like.size == 0 or type(rule) in _refused:
        return False
    if not rule.elementwise or type(rule).update_with is not Rule.update_with or rule.two_pass or leaf.given:
        return False
    if any(jnp.ndim(number) for number in jax.tree.leaves(rule)):
        return False
    arrays = [x for x in (leaf.grad, param, *slots) if x is not None and x.shape == like.shape]
    is_low = any(precision.is_low(x.dtype) for x in arrays)
    if is_low and (rule.precision.rounding == "stochastic" or (wanted == "change" and rule.precision.keeps_values)):
        return False
    if any(map(is_sharded, arrays)) or any(slot.shape not in ((), like.shape) for slot in slots):
        return False
    return len({is_complex(x) for x in arrays}) == 1


@functools.partial(jax.jit, static_argnames="wanted")
def _update(
    rule: Rule, grad: jax.Array, slots: Slots, param: Any, count: jax.Array, wanted: Wanted
) -> tuple[dict[str, jax.Array], Slots]:
    """Compute the new value and the change, as far as they are wanted, and the slots.

    Jitted so that all arrays of one shape are traced once.
    """
    each = {name: x for name, x in slots.items() if x is not None and x.shape == grad.shape}
    arrays = {"grad": grad, **({} if param is None else {"param": param}), **_by_place(each)}

    def text(alike: _Alike, arrays: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], Slots]:
        grad, param = arrays["grad"], arrays.get("param")
        own = alike.slots | {name: arrays[_PLACE + name] for name in each}
        leaf = LeafUpdate(0, alike.rule, grad, own, param, alike.step, {})
        change, value, new = valued(leaf, *update_dense(alike.rule, grad, own, param, alike.step, {}, {}))
        made = {}
        if wanted != "change" and param is not None:
            made["param"] = (param + change).astype(param.dtype) if value is None else value
        if wanted == "both":
            made["change"] = change
        elif wanted == "change":
            made["change"] = change.astype(grad.dtype)
        made |= _by_place({name: new[name] for name in each})
        return made, {name: slot for name, slot in new.items() if name not in each}

    alike = _Alike(rule, count, {name: x for name, x in slots.items() if name not in each})
    made, scalars = one_pass(text, alike, arrays)
    new = {name: made.pop(_PLACE + name) for name in each} | scalars
    return made, {name: new[name] for name in slots}


_PLACE = "state."


def _by_place(slots: Slots) -> Slots:
    """Rename the slots so that no other array has their names."""
    return {_PLACE + name: x for name, x in slots.items()}
