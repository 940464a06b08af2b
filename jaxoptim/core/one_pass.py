"""The update of a large array on a CPU in one pass over memory, from the text of its rule."""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxoptim.core import precision
from jaxoptim.core.leaf import Change, LeafUpdate, Wanted, update_dense, valued
from jaxoptim.core.noise import Draw, is_key
from jaxoptim.core.numerics import is_complex, real_size, view_as_complex
from jaxoptim.core.packing import is_sharded
from jaxoptim.core.rule import Rule, Slots
from jaxoptim.native import CannotCompile, Unsupported, is_native, one_pass


class _Alike(NamedTuple):
    """The inputs that are the same for all elements of an array."""

    settings: list[Any]
    step: jax.Array
    slots: Slots
    shared: dict[str, Any]
    draws: dict[str, Draw]


def in_one_pass(leaf: LeafUpdate, shared: dict[str, Any], wanted: Wanted) -> Change | None:
    """Update an array as :func:`~jaxoptim.core.leaf.update_leaf` does for a dense gradient; None if XLA is to do it."""
    shared = {name: x for name, x in shared.items() if not is_key(x)}
    if not _pays(leaf, shared, wanted):
        return None
    kind = type(leaf.rule)
    try:
        made, slots = _update(leaf, shared, wanted)
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


def _pays(leaf: LeafUpdate, shared: dict[str, Any], wanted: Wanted) -> bool:
    """Whether a kernel pays: the array is large, not split over devices, and its rule pointwise."""
    rule, param, slots = leaf.rule, leaf.param, [slot for slot in leaf.slots.values() if slot is not None]
    like = leaf.grad if param is None else param
    given = [x for x in leaf.given.values() if not isinstance(x, Draw)]
    is_drawn = len(given) < len(leaf.given)
    size = real_size(like)
    if not is_native(size, is_drawn) or like.ndim == 0 or size == 0 or type(rule) in _refused:
        return False
    if is_drawn and size > 2**32:  # places of two words
        return False
    if not rule.pointwise or any(jnp.ndim(number) for number in jax.tree.leaves(shared)):
        return False
    own = [x for x in jax.tree.leaves(rule) if jnp.ndim(x)]
    arrays = [x for x in (leaf.grad, param, *slots, *own, *given) if x is not None and x.shape == like.shape]
    is_low = any(precision.is_low(x.dtype) for x in arrays)
    if is_low and (rule.precision.rounding == "stochastic" or (wanted == "change" and rule.precision.keeps_values)):
        return False
    if any(map(is_sharded, arrays)) or any(x.shape not in ((), like.shape) for x in (*slots, *own)):
        return False
    return len({is_complex(x) for x in arrays}) == 1


@functools.partial(jax.jit, static_argnames="wanted")
def _update(leaf: LeafUpdate, shared: dict[str, Any], wanted: Wanted) -> tuple[dict[str, jax.Array], Slots]:
    """Compute the new value and the change, as far as they are wanted, and the slots.

    Jitted so that all arrays of one shape are traced once.
    """
    grad, slots, param = leaf.grad, leaf.slots, leaf.param
    each = {name: x for name, x in slots.items() if x is not None and x.shape == grad.shape}
    draws = {name: x for name, x in leaf.given.items() if isinstance(x, Draw)}
    others = {name: x for name, x in leaf.given.items() if name not in draws}
    settings, form = jax.tree.flatten(leaf.rule)
    own = {str(at): x for at, x in enumerate(settings) if jnp.ndim(x)}
    arrays = {"grad": grad, **({} if param is None else {"param": param})}
    arrays |= _named(_STATE, each) | _named(_GIVEN, others) | _named(_OWN, own)

    def text(alike: _Alike, arrays: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], Slots]:
        grad, param = arrays["grad"], arrays.get("param")
        rule = jax.tree.unflatten(form, [arrays.get(f"{_OWN}{at}", x) for at, x in enumerate(alike.settings)])
        own = alike.slots | {name: arrays[_STATE + name] for name in each}
        given = {name: arrays[_GIVEN + name] for name in others}
        pairs = (*grad.shape, 2) if is_complex(grad) else grad.shape
        for name, draw in alike.draws.items():
            numbers = draw.numbers_in(pairs)
            given[name] = view_as_complex(numbers) if is_complex(grad) else numbers
        leaf = LeafUpdate(0, rule, grad, own, param, alike.step, given)
        change, value, new = valued(leaf, *update_dense(*leaf[1:], alike.shared))
        made = {}
        if wanted != "change" and param is not None:
            made["param"] = (param + change).astype(param.dtype) if value is None else value
        if wanted == "both":
            made["change"] = change
        elif wanted == "change":
            made["change"] = change.astype(grad.dtype)
        made |= _named(_STATE, {name: new[name] for name in each})
        return made, {name: slot for name, slot in new.items() if name not in each}

    scalars = [None if str(at) in own or is_key(x) else x for at, x in enumerate(settings)]
    alike = _Alike(scalars, leaf.step, {name: x for name, x in slots.items() if name not in each}, shared, draws)
    made, rest = one_pass(text, alike, arrays)
    new = {name: made.pop(_STATE + name) for name in each} | rest
    return made, {name: new[name] for name in slots} | {name: x for name, x in new.items() if name not in slots}


_STATE, _GIVEN, _OWN = "state.", "given.", "rule."


def _named(prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """Rename arrays so that no others have their names."""
    return {prefix + name: x for name, x in arrays.items()}
