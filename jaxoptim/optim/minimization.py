"""What ``minimize`` is asked to do, checked and in the form of the compiled step."""

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
    if isinstance(static, str):
        static = (static,)
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


def _check_data(kwargs: Mapping[str, Any], args: tuple[Any, ...]) -> None:
    """Raise for what a compiled program cannot be given: text, functions and other objects."""
    kinds = set(map(type, jax.tree.leaves((args, kwargs))))  # a batch has many leaves and few types
    if all(map(_is_data, kinds)):
        return
    places = {f"number {at}": value for at, value in enumerate(args, 1)}
    for place, value in (places | {repr(name): value for name, value in kwargs.items()}).items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            if not _is_data(type(leaf)):
                is_or_has = f"has at {jax.tree_util.keystr(path, simple=True, separator='.')!r}" if path else "is"
                kind = "text" if isinstance(leaf, str | bytes) else type(leaf).__name__
                raise TypeError(
                    f"The argument {place} of the loss {is_or_has} the {kind} {leaf!r:.60}, which is no data. Give "
                    "arrays; what decides how the loss computes is passed by keyword and marked: "
                    "minimize(loss_fn, ..., mode='train', static=['mode'])."
                )


def _is_data(kind: type) -> bool:
    is_array = any(hasattr(kind, name) for name in ("dtype", "__jax_array__", "__dlpack__"))
    return is_array or issubclass(kind, (int, float, complex))


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
    """Return what one call is about.

    Raises:
        ValueError: for a bound that is negative, and for fewer than one micro-batch.
        TypeError: for what is no scaler.
    """
    given = (clip_norm, clip_value, accumulate, scaler)
    if all(option is None for option in given) and not skip_nonfinite and not measure:
        return Minimization(loss, args)
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(
            f"loss_scale takes an optim.GradScaler, which keeps the factor between steps, but got {scaler!r:.60}."
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
    """The options, checked, and the bounds on the device."""
    if accumulate is not None and (accumulate := operator.index(accumulate)) < 1:
        raise ValueError(f"accumulate is the number of micro-batches, at least 1, but got {accumulate}.")
    clip, dtype = Clip(clip_norm=clip_norm, clip_value=clip_value), jnp.float64 if is_double else jnp.float32
    norm, value = (jnp.asarray(x, dtype) if isinstance(x, float) else x for x in (clip.clip_norm, clip.clip_value))
    return StepOptions(accumulate, accumulate_mean, skip_nonfinite, True, loss_scale), StepNumbers(norm, value)


_kept = functools.lru_cache(64, typed=True)(_asked)
"""The same, where a training loop asks for the same at every step."""
