"""The terms that the samplers share: the force of the potential, the mask, the box."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import Slots, enabled, full_like, is_known
from jaxoptim.core.clipping import squares
from jaxoptim.core.modules import trained_of
from jaxoptim.core.shown import shown


class _Potential(Protocol):
    """A rule that samples from a tempered posterior."""

    @property
    def nbeta(self) -> Any: ...
    @property
    def weight_decay(self) -> Any: ...
    @property
    def localization(self) -> Any: ...
    @property
    def center(self) -> Any: ...
    @property
    def optimize_over(self) -> Any: ...


class _Boxed(Protocol):
    """A rule that keeps to a box."""

    @property
    def bounding_box_size(self) -> Any: ...
    @property
    def box(self) -> str: ...


def force(rule: _Potential, grad: jax.Array, slots: Slots, param: Any) -> jax.Array:
    r"""Compute the gradient of the potential, :math:`n\beta\,g + \lambda w + \gamma (w - c)`."""
    terms = forces(rule, grad, slots, param).values()
    return functools.reduce(operator.add, (number * x for number, x in terms))


def forces(rule: _Potential, grad: jax.Array, slots: Slots, param: Any) -> dict[str, tuple[Any, jax.Array]]:
    """Return the terms of :func:`force` that are on, by name, each a number and an array to be multiplied."""
    terms = {"grad": (rule.nbeta, grad)}
    if enabled(rule.weight_decay):
        terms["weight_decay"] = rule.weight_decay, param
    if enabled(rule.localization):
        terms["localization"] = rule.localization, from_center(rule, slots, param)
    return terms


def potential(rule: _Potential, loss: Any, slots: Slots, param: jax.Array) -> Any:
    r"""Compute one array's part of :math:`n\beta L + \lambda \|w\|^2/2 + \gamma \|w - c\|^2/2`, given its part of L.

    Where the mask is zero the array does not move, and what it adds is a constant that is left out.
    """
    total = rule.nbeta * loss
    if enabled(rule.weight_decay):
        total = total + rule.weight_decay / 2 * squares(masked(rule, param))
    if enabled(rule.localization):
        total = total + rule.localization / 2 * squares(masked(rule, from_center(rule, slots, param)))
    return total


def from_center(rule: _Potential, slots: Slots, param: jax.Array) -> jax.Array:
    """Return the offset of a position from the center of localization: the rule's, else the array's start."""
    return param - (slots["initial_param"] if rule.center is None else jnp.asarray(rule.center, param.dtype))


def masked(rule: _Potential, x: jax.Array) -> jax.Array:
    """Return ``x`` where the mask is one, else zero."""
    return x if rule.optimize_over is None else x * mask_like(rule, x)


def mask_like(rule: _Potential, x: jax.Array) -> jax.Array:
    """Return the mask in the dtype of ``x``, with an axis for the parts of complex numbers if ``x`` has one."""
    return jnp.asarray(rule.optimize_over).astype(x.dtype)


def free(rule: _Potential, x: jax.Array) -> Any:
    """Count the elements of ``x`` that the mask lets move."""
    return x.size if rule.optimize_over is None else jnp.sum(jnp.broadcast_to(mask_like(rule, x), x.shape))


def has_box(rule: _Boxed) -> bool:
    """Whether the rule has a box; as in devinterp, a size of zero means none."""
    return rule.bounding_box_size is not None and enabled(rule.bounding_box_size)


def boxed(rule: _Boxed, param: jax.Array, slots: Slots) -> tuple[jax.Array, Any]:
    r"""Bring a position back into the box :math:`|w - w_0| \le b`; return it, and the sign that its momentum takes.

    ``"clamp"`` puts it onto the face. ``"reflect"`` folds the path back, which leaves no atoms there.
    """
    if not has_box(rule):
        return param, 1
    center, size = slots["initial_param"], rule.bounding_box_size
    away = param - center
    if rule.box == "clamp":
        return jnp.clip(param, center - size, center + size), jnp.where(jnp.abs(away) < size, 1, -1)
    phase = jnp.mod(away + size, 4 * size)
    outward = phase < 2 * size
    return center + jnp.where(outward, phase - size, 3 * size - phase), jnp.where(outward, 1, -1)


def check_terms(rule: Any, **choices: Sequence[str | None]) -> None:
    """Raise for an invalid mask, center, box or other switch."""
    _check_mask(rule)
    _check_center(rule)
    for field, allowed in {"box": ("clamp", "reflect"), **choices}.items():
        _check_choice(rule, field, allowed)


def _check_mask(rule: Any) -> None:
    """Raise for a mask of other numbers than zeros and ones, if it is concrete."""
    for mask in jax.tree.leaves(rule.optimize_over):
        if isinstance(mask, jax.ShapeDtypeStruct) or not is_known(mask) or getattr(mask, "dtype", None) == np.bool_:
            continue
        if isinstance(mask, str) or not np.isin(np.asarray(mask), (0, 1)).all():
            raise ValueError(
                f"Invalid optimize_over: {shown(mask, 200)}. {type(rule).__name__} takes masks of zeros and ones; a "
                "factor between them would sample from another distribution."
            )


def _check_center(rule: Any) -> None:
    """Raise for a center that is not of finite numbers, if it is concrete."""
    for leaf in jax.tree.leaves(trained_of(rule.center)):
        if isinstance(leaf, jax.ShapeDtypeStruct) or not (callable(leaf) or is_known(leaf)):
            continue
        is_array = hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)
        if not is_array or not np.isfinite(leaf).all():
            what = "numbers that are not finite" if is_array else f"a {type(leaf).__name__} in it"
            raise ValueError(
                f"Invalid center, with {what}. {type(rule).__name__} takes a tree like the parameters, of finite "
                "numbers, with None where the center is the start."
            )


def _check_choice(rule: Any, field: str, allowed: Sequence[str | None]) -> None:
    """Raise for a switch that is none of the allowed values."""
    if getattr(rule, field) not in allowed:
        raise ValueError(
            f"Invalid {field}: {shown(getattr(rule, field))}. {type(rule).__name__} takes "
            f"{' or '.join(map(repr, allowed))}."
        )


def first_momentum(rule: Any, param: jax.Array, noise: jax.Array) -> jax.Array:
    r"""Draw a momentum from :math:`N(0, \epsilon)`, on the devices of the parameter."""
    return full_like(param) + masked(rule, jnp.sqrt(rule.lr) * noise)


def relaxation(friction: jax.Array, noise: jax.Array, heat: Any) -> tuple[jax.Array, jax.Array]:
    r"""Return the decay factor and the noise of a momentum after unit time of :math:`dv = -\xi v\,dt + \sqrt{2h}\,dW`.

    .. math:: v \leftarrow e^{-\xi} v + \sqrt{h\,(1 - e^{-2\xi})/\xi}\;\zeta,

    where the root tends to :math:`\sqrt{2h}` as :math:`\xi \to 0`.
    """
    at_zero = friction == 0
    rate = jnp.where(at_zero, 2.0, -jnp.expm1(-2 * friction) / jnp.where(at_zero, 1.0, friction))
    return jnp.exp(-friction), jnp.sqrt(heat * rate) * noise
