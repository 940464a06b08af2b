"""Schedules made of schedules: one after the other, and several at once."""

from __future__ import annotations

from typing import Any

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
    r"""One schedule after the other: ``SequentialLR``.

    .. math::
        \eta_n = s_i(n - m_i), \qquad i = |\{m \,:\, m \le n\}|, \quad m_0 = 0

    Args:
        lr: the base rate, a number >= 0; may be traced.
        schedulers: the schedules :math:`s_i`, made with the same rate; functions ``step -> value`` of other
            kinds, such as optax's, are taken too.
        milestones: the steps :math:`m_i` at which the next begins, one fewer than schedules, in order.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Errors:
        ``ValueError`` for no schedule, a wrong number of milestones, or schedules of another rate.

    Example:
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
    value = schedulers[0](step)
    for milestone, scheduler in zip(milestones, schedulers[1:], strict=True):
        value = where(step >= milestone, scheduler(step - milestone), value)
    return value


@schedule()
def chained(step: Any, lr: of.Rate, schedulers: of.Functions) -> Any:
    r"""Several schedules at once: ``ChainedScheduler``.

    .. math::
        \eta_n = \eta_0 \prod_i \frac{s_i(n)}{\eta_0}

    As in torch, a schedule that starts from the base rate at each step (:func:`lambda_lr`,
    :func:`cosine_annealing_warm_restarts`, :func:`cyclic_lr`, :func:`one_cycle_lr`) takes back what those before
    it have done, and of those after it only the last factor remains, :math:`s_i(n) / s_i(n-1)`.

    Args:
        lr: :math:`\eta_0`, the base rate, a number >= 0; may be traced.
        schedulers: the schedules :math:`s_i`, made with the same rate; functions ``step -> value`` of other
            kinds, such as optax's, are taken too.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Errors:
        ``ValueError`` for no schedule, for schedules of another rate, and for those that are no factor
        (:func:`swa_lr`, and :func:`cosine_annealing_lr` with a minimum other than 0): what they do depends on all
        steps before. The class, ``optim.lr_scheduler.ChainedScheduler``, chains them too.

    Example:
        >>> from jaxoptim import schedules
        >>> parts = [schedules.constant_lr(0.1, factor=0.5, total_iters=1), schedules.exponential_lr(0.1, gamma=0.5)]
        >>> schedule = schedules.chained(0.1, parts)
        >>> [round(float(schedule(n)), 6) for n in range(3)]
        [0.05, 0.05, 0.025]
    """
    schedulers = tuple(schedulers)
    _check_rates(lr, schedulers)
    _check_factors(schedulers)
    starts = [index for index, scheduler in enumerate(schedulers) if _formula(scheduler) in _FROM_BASE]
    if not starts:
        value = lr
        for scheduler in schedulers:
            value = value * _ratio(scheduler(step), lr)
        return value
    value = schedulers[starts[-1]](step)
    for scheduler in schedulers[starts[-1] + 1 :]:
        before = where(step > 0, scheduler(where(step > 0, step - 1, 0)), lr)
        value = value * _ratio(scheduler(step), before)
    return value


_FROM_BASE = {f.formula for f in (lambda_lr, cosine_annealing_warm_restarts, cyclic_lr, one_cycle_lr)}


def _formula(scheduler: Any) -> Any:
    return scheduler.formula if isinstance(scheduler, Schedule) else None


def _ratio(value: Any, base: Any) -> Any:
    """``value / base``, and 0 where both are."""
    return value / where(base == 0, 1.0, base)


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
    """Raise for a schedule that is no factor of the base rate."""
    if len(schedulers) == 1:
        return
    for index, scheduler in enumerate(schedulers):
        formula = _formula(scheduler)
        minimum = scheduler.arguments["eta_min"] if formula is cosine_annealing_lr.formula else 0.0
        if formula is swa_lr.formula or (is_known(minimum) and np.any(np.asarray(minimum) != 0)):
            raise ValueError(
                f"{scheduler} at index {index} does not multiply the rate by a factor of the step, so a chain of it "
                "has no closed form. Use sequential_lr, or optim.lr_scheduler.ChainedScheduler."
            )
