"""The arguments of ``minimize``, checked and in the form of the compiled step."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import trees
from jaxoptim.core.clipping import Clip
from jaxoptim.core.loss import Loss
from jaxoptim.core.loss_scale import LossScale
from jaxoptim.core.shown import shown
from jaxoptim.engine.owner import Minimization
from jaxoptim.engine.programs import Measured, StepNumbers, StepOptions, num_skipped
from jaxoptim.optim.grad_scaler import GradScaler


def loss_of(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    static: Collection[str],
) -> tuple[Loss, tuple[Any, ...]]:
    """Return the loss, and the arguments that are data, those by keyword last.

    Raises:
        TypeError: for a static name that is no keyword, a static value that cannot be hashed, and what is no data.
    """
    static = _names(static)
    if unknown := sorted(set(static) - kwargs.keys()):
        raise TypeError(
            f"static names {unknown[0]!r}, which is no keyword argument of this call. Pass it by keyword: "
            f"minimize(loss_fn, ..., {unknown[0]}=value, static=[{unknown[0]!r}])."
        )
    if not kwargs:
        _check_data({}, args)
        return Loss(loss_fn, has_aux), trees.owned_arrays(args)
    fixed = tuple((name, kwargs[name]) for name in sorted(static))
    for name, value in fixed:
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"The static argument {name!r} is a {type(value).__name__}, which cannot be hashed. Static are str, "
                "bool, int and other values that name a program; arrays are data."
            ) from None
    data = {name: value for name, value in kwargs.items() if name not in static}
    _check_data(data, args)
    return Loss(loss_fn, has_aux, tuple(data), fixed), trees.owned_arrays((*args, *data.values()))


def _names(static: Any) -> tuple[str, ...]:
    """Return the names of arguments that are fixed, as one or several were given."""
    names = (static,) if isinstance(static, str) else static
    if not isinstance(names, Collection) or isinstance(names, Mapping):
        raise TypeError(
            f"static takes the names of keyword arguments, such as ['train'], but got {shown(static)}. Pass the "
            "argument by keyword, and give its name."
        )
    return tuple(names)


def _check_data(kwargs: Mapping[str, Any], args: tuple[Any, ...]) -> None:
    """Raise for values that a compiled program cannot be given: text, functions and other objects."""
    if all(isinstance(leaf, jax.Array) or trees.no_data(leaf) is None for leaf in jax.tree.leaves((args, kwargs))):
        return
    places = {f"number {at}": value for at, value in enumerate(args, 1)}
    for place, value in (places | {repr(name): value for name, value in kwargs.items()}).items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            if (kind := trees.no_data(leaf)) is not None:
                is_or_has = f"has at {jax.tree_util.keystr(path, simple=True, separator='.')!r}" if path else "is"
                raise TypeError(
                    f"The argument {place} of the loss {is_or_has} {kind}, which is no data. Give arrays of numbers; "
                    "what decides how the loss computes is passed by keyword and marked: "
                    "minimize(loss_fn, ..., mode='train', static=['mode'])."
                )


def undecidable(args: tuple[Any, ...], kwargs: Mapping[str, Any], static: Collection[str]) -> TypeError | None:
    """Return the message for a loss that branches on a number given as one of Python; None if there is none."""
    named = {name: x for name, x in kwargs.items() if name not in _names(static) and isinstance(x, int)}
    numbered = {f"number {at}": x for at, x in enumerate(args, 1) if isinstance(x, int)}
    if not named and not numbered:
        return None
    given = ", ".join(f"{place} ({x})" for place, x in (named | numbered).items())
    name, x = next(iter(named.items()), ("train", True))
    return TypeError(
        f"The loss decides by an argument whose value its program does not know. Such numbers are {given}. Fix the one "
        f"that decides, by keyword: minimize(loss_fn, ..., {name}={x}, static=[{name!r}])."
    )


def minimization(
    loss: Loss,
    args: tuple[Any, ...],
    clip_norm: float | None,
    clip_value: float | None,
    accumulate: int | None,
    accumulate_mean: bool,
    skip_nonfinite: bool,
    measure: bool,
    last: Measured | None,
    scaler: GradScaler | None,
) -> Minimization:
    """Return the checked arguments of one call.

    Raises:
        ValueError: for a bound that is negative, and for fewer than one micro-batch.
        TypeError: for anything but a scaler.
    """
    given = (clip_norm, clip_value, accumulate, scaler)
    if all(option is None for option in given) and not skip_nonfinite and not measure:
        return Minimization(loss, args)
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(
            f"loss_scale takes an optim.GradScaler, which keeps the factor between steps, but got {shown(scaler, 60)}."
        )
    are_plain = all(type(option) in (int, float, type(None)) for option in (clip_norm, clip_value, accumulate))
    options, numbers = (_kept if are_plain else _asked)(
        clip_norm,
        clip_value,
        accumulate,
        bool(accumulate_mean),
        bool(skip_nonfinite),
        None if scaler is None else scaler.loss_scale,
        jax.config.jax_enable_x64,  # type: ignore[attr-defined]
    )
    if options.may_skip:
        numbers = numbers._replace(num_skipped=num_skipped(last), loss_scale=None if scaler is None else scaler.state)
    return Minimization(loss, args, options, numbers)


def _asked(
    clip_norm: Any,
    clip_value: Any,
    accumulate: Any,
    accumulate_mean: bool,
    skip_nonfinite: bool,
    loss_scale: LossScale | None,
    is_double: bool,
) -> tuple[StepOptions, StepNumbers]:
    """Return the options, checked, and the bounds on the device."""
    if accumulate is not None and (accumulate := operator.index(accumulate)) < 1:
        raise ValueError(f"accumulate is the number of micro-batches, at least 1, but got {accumulate}.")
    clip, dtype = Clip(clip_norm=clip_norm, clip_value=clip_value), jnp.float64 if is_double else jnp.float32
    for name, bound in (("clip_norm", clip.clip_norm), ("clip_value", clip.clip_value)):
        if bound is not None and jnp.ndim(bound):
            raise ValueError(f"{name} is one number, but got an array of shape {jnp.shape(bound)}. Give a scalar.")
    norm, value = (jnp.asarray(x, dtype) if isinstance(x, float) else x for x in (clip.clip_norm, clip.clip_value))
    return StepOptions(accumulate, accumulate_mean, skip_nonfinite, True, loss_scale), StepNumbers(norm, value)


_kept = functools.lru_cache(64, typed=True)(_asked)
"""The same, where a training loop asks for the same at every step."""
