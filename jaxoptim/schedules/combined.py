"""Schedules composed of schedules: in sequence, and as a product."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxoptim.core import is_known
from jaxoptim.schedules import arguments as of
from jaxoptim.schedules.annealing import cosine_annealing_lr, cosine_annealing_warm_restarts, swa_lr
from jaxoptim.schedules.arithmetic import where
from jaxoptim.schedules.cycles import cyclic_lr, one_cycle_lr
from jaxoptim.schedules.decays import lambda_lr
from jaxoptim.schedules.schedule import Schedule, schedule


@schedule()
def sequential_lr(step: Any, lr: of.Rate, schedulers: of.Functions, milestones: of.Milestones) -> Any:
    r"""Run schedules one after the other, each from its milestone: ``SequentialLR``.

    .. math::
        \eta_n = s_i(n - m_i), \qquad i = |\{m \,:\, m \le n\}|, \quad m_0 = 0

    Every schedule begins from the base rate. (In torch ``MultiplicativeLR`` and ``SWALR`` go on from the rate that
    they find, and ``ConstantLR`` with ``total_iters=0`` has no factor.)

    Args:
        lr: the base rate, a number >= 0; may be traced.
        schedulers: the schedules :math:`s_i`, made with the same rate; functions ``step -> value`` of other
            kinds, such as optax's, are taken too.
        milestones: the steps :math:`m_i` at which the next begins, one fewer than schedules, in order.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Raises:
        ``ValueError`` for no schedule, a wrong number of milestones, or schedules of another rate.

    Examples:
        >>> from jaxoptim import schedules
        >>> warmup = schedules.linear_lr(0.1, start_factor=0.5, total_iters=2)
        >>> decay = schedules.exponential_lr(0.1, gamma=0.5)
        >>> schedule = schedules.sequential_lr(0.1, [warmup, decay], milestones=[2])
        >>> [round(float(schedule(n)), 6) for n in range(5)]
        [0.05, 0.075, 0.1, 0.05, 0.025]
    """
    schedulers, milestones = tuple(schedulers), tuple(milestones)
    if len(milestones) != len(schedulers) - 1:
        raise ValueError(
            "Sequential Schedulers expects number of schedulers provided to be one more than the number of milestone "
            f"points, but got number of schedulers {len(schedulers)} and the number of milestones to be equal to "
            f"{len(milestones)}"
        )
    _check_rates(lr, schedulers)
    value: Any = 0.0
    for start, end, scheduler in zip((0, *milestones), (*milestones, None), schedulers, strict=True):
        its_turn = (step >= start) if end is None else (step >= start) & (step < end)
        value = where(its_turn, scheduler(where(its_turn, step - start, 0)), value)
    return value


@schedule()
def chained(step: Any, lr: of.Rate, schedulers: of.Functions) -> Any:
    r"""Multiply the factors of several schedules: ``ChainedScheduler``.

    .. math::
        \eta_n = \eta_0 \prod_i \frac{s_i(n)}{\eta_0}

    As in torch, the product begins anew where a schedule sets the rate whatever it was, and what the others did
    before that is forgotten: at every step (:func:`lambda_lr`, :func:`cosine_annealing_warm_restarts`,
    :func:`cyclic_lr`, :func:`one_cycle_lr`), after a minimum (:func:`cosine_annealing_lr`) and at a milestone
    (:func:`sequential_lr`). Powers that have become too small for a number are forgotten too.

    Args:
        lr: :math:`\eta_0`, the base rate, a number >= 0; may be traced.
        schedulers: the schedules :math:`s_i`, made with the same rate; functions ``step -> value`` of other
            kinds, such as optax's, are taken too.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Raises:
        ``ValueError`` for no schedule, for schedules of another rate, and for those that are no factor: what
        :func:`swa_lr`, :func:`cosine_annealing_lr` with a minimum other than 0, and the latter after a schedule
        that starts from the base rate, do depends on all steps before. The class,
        ``optim.lr_scheduler.ChainedScheduler``, chains them too.

    Examples:
        >>> from jaxoptim import schedules
        >>> parts = [schedules.constant_lr(0.1, factor=0.5, total_iters=1), schedules.exponential_lr(0.1, gamma=0.5)]
        >>> schedule = schedules.chained(0.1, parts)
        >>> [round(float(schedule(n)), 6) for n in range(3)]
        [0.05, 0.05, 0.025]
    """
    schedulers = tuple(schedulers)
    _check_rates(lr, schedulers)
    _check_factors(schedulers)
    values = [scheduler(step) for scheduler in schedulers]
    value = lr
    for factor in values:
        value = value * _ratio(factor, lr)
    latest: Any = _NEVER
    for index, scheduler in enumerate(schedulers):
        start = _start(scheduler, step)
        if start is None:
            continue
        anew = values[index]
        for other, factor in enumerate(values):
            if other != index:
                anew = anew * _ratio(factor, _value_at(schedulers[other], start - (other > index), lr))
        is_latest = (start > _NEVER) & (start >= latest)
        value, latest = where(is_latest, anew, value), where(is_latest, start, latest)
    return value


_NEVER = -1


def _start(scheduler: Any, step: Any) -> Any:
    """Return the last step at which a schedule set the rate regardless of its value; None if it never does."""
    formula = _formula(scheduler)
    if formula in _FROM_BASE:
        return step
    if formula is cosine_annealing_lr.formula:
        period = scheduler.arguments["T_max"]
        return where(step > period, step - (step - 1 - period) % (2 * period), _NEVER)
    if formula is sequential_lr.formula:
        return _start_in_sequence(step, **scheduler.arguments)
    if formula is chained.formula:
        starts = [start for part in scheduler.arguments["schedulers"] if (start := _start(part, step)) is not None]
        return functools.reduce(jnp.maximum, starts) if starts else None
    return None


def _start_in_sequence(step: Any, lr: Any, schedulers: Any, milestones: Any) -> Any:
    latest = jnp.full_like(step, _NEVER)
    for begin, scheduler in zip((0, *milestones), schedulers, strict=True):
        own = _start(scheduler, where(step >= begin, step - begin, 0))
        start = begin if own is None else jnp.maximum(begin, own + begin)
        latest = where(step >= begin, start, latest)
    return latest


def _value_at(scheduler: Any, step: Any, lr: Any) -> Any:
    """Return the value at a step, and the base rate before the first step."""
    return where(step >= 0, scheduler(where(step >= 0, step, 0)), lr)


_FROM_BASE = {f.formula for f in (lambda_lr, cosine_annealing_warm_restarts, cyclic_lr, one_cycle_lr)}


def _formula(scheduler: Any) -> Any:
    return scheduler.formula if isinstance(scheduler, Schedule) else None


def _ratio(value: Any, base: Any) -> Any:
    """Return ``value / base``, or 1 where both are 0: a schedule that has ended leaves the rate as it is."""
    return where(base == 0, where(value == 0, 1.0, 0.0), value / where(base == 0, 1.0, base))


def _check_rates(lr: Any, schedulers: tuple[Any, ...]) -> None:
    """Raise for a schedule that was made with another base rate."""
    for index, scheduler in enumerate(schedulers):
        own = scheduler.arguments.get("lr", lr) if isinstance(scheduler, Schedule) else lr
        if is_known(own) and is_known(lr) and not np.array_equal(own, lr):
            raise ValueError(
                f"All schedules need the base rate {lr}, but {scheduler} at index {index} was made with {own}. "
                "Give both the same lr."
            )


def _check_factors(schedulers: tuple[Any, ...]) -> None:
    """Raise for a schedule that does not multiply the base rate by a factor."""
    if len(schedulers) == 1:
        return
    for index, scheduler in enumerate(schedulers):
        formula = _formula(scheduler)
        minimum = scheduler.arguments["eta_min"] if formula is cosine_annealing_lr.formula else 0.0
        follows = formula is cosine_annealing_lr.formula and any(_formula(x) in _FROM_BASE for x in schedulers[:index])
        if follows or formula is swa_lr.formula or (is_known(minimum) and np.any(np.asarray(minimum) != 0)):
            raise ValueError(
                f"{scheduler} at index {index} does not multiply the rate by a factor of the step, so a chain of it "
                "has no closed form. Use sequential_lr, or optim.lr_scheduler.ChainedScheduler."
            )
