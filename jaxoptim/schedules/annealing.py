"""Schedules that go from one rate to another along a cosine or a line."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from jaxoptim.schedules import arguments as of
from jaxoptim.schedules.arithmetic import (
    divide,
    is_array,
    is_single,
    minimum,
    one_minus_cos,
    one_plus_cos,
    where,
)
from jaxoptim.schedules.schedule import schedule


def cosine(step: Any, lr: Any, period: Any, eta_min: Any) -> Any:
    """Compute a cosine that goes from ``lr`` at step 0 to ``eta_min`` at ``period``, and on from there."""
    return eta_min + (lr - eta_min) * one_plus_cos(step, period) / 2


def fall(start: Any, end: Any, done: Any, left: Any, strategy: str) -> Any:
    """Anneal a rate from ``start`` to ``end``, given the fraction of the way that is done and the fraction left.

    The two fractions sum to 1. In float32, one cannot be computed from the other without losing digits of a small one.
    """
    if is_array(done) and is_single():
        return end * weight(done, strategy) + start * weight(left, strategy)
    if strategy == "cos":
        return end + (start - end) / 2.0 * one_plus_cos(done)
    return (end - start) * done + start


def weight(fraction: Any, strategy: str) -> Any:
    """Return the weight of the end value at a fraction of the way."""
    return one_minus_cos(fraction) / 2 if strategy == "cos" else fraction


@schedule()
def cosine_annealing_lr(step: Any, lr: of.Rate, T_max: of.Size, eta_min: of.Number = 0.0) -> Any:
    r"""Anneal the rate along a cosine down to a minimum and up again: ``CosineAnnealingLR``.

    .. math::
        \eta_n = \eta_{\min} + \tfrac12 (\eta_0 - \eta_{\min}) \left( 1 + \cos \frac{\pi n}{T} \right)

    In float64 this is torch's recursion with its rounding errors, which are frozen at each minimum (after a
    million steps they are 3e-10 of the rate). What a minimum other than 0 adds to them is left out: up to
    1e-10 with ``T_max=5000`` and ``eta_min`` a tenth of the rate, in proportion to the square of ``T_max``.

    Args:
        lr: :math:`\eta_0`, a number >= 0; may be traced.
        T_max: :math:`T`, the steps to the minimum, a whole number >= 1.
        eta_min: :math:`\eta_{\min}`, a number (default 0); may be traced.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Raises:
        ``TypeError`` for what is not a number, ``ValueError`` for one out of range.

    References:
        Loshchilov, Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.

    Examples:
        >>> from jaxoptim import schedules
        >>> schedule = schedules.cosine_annealing_lr(0.1, T_max=4)
        >>> [round(float(schedule(n)), 6) for n in range(6)]
        [0.1, 0.085355, 0.05, 0.014645, 0.0, 0.014645]
    """
    if is_single() or not is_array(step):
        return cosine(step, lr, T_max, eta_min)
    first = step - (step - 1 - T_max) % (2 * T_max)  # the first step after the last minimum
    risen = eta_min + (lr - eta_min) * one_minus_cos(1, T_max) / 2
    amplitude = where(step > T_max, (risen - eta_min) / one_plus_cos(first, T_max), (lr - eta_min) / 2)
    return eta_min + amplitude * one_plus_cos(step, T_max)


@schedule()
def cosine_annealing_warm_restarts(
    step: Any,
    lr: of.Rate,
    T_0: Annotated[int, of.first_period],
    T_mult: Annotated[int, of.growth] = 1,
    eta_min: Annotated[Any, of.lowest_rate] = 0.0,
) -> Any:
    r"""Anneal the rate along a cosine down to a minimum, and restart: ``CosineAnnealingWarmRestarts``.

    .. math::
        \eta_n = \eta_{\min} + \tfrac12 (\eta_0 - \eta_{\min}) \left( 1 + \cos \frac{\pi t}{T_i} \right),
        \qquad T_i = T_0 m^i

    where :math:`t` is the number of steps since the last restart, and :math:`i` the number of restarts.

    Args:
        lr: :math:`\eta_0`, a number >= 0; may be traced.
        T_0: the steps to the first restart, an ``int`` >= 1.
        T_mult: :math:`m`, the growth of the periods, an ``int`` >= 1 (default 1).
        eta_min: :math:`\eta_{\min}`, a number (default 0); may be traced.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Raises:
        ``TypeError`` for what is not a number, ``ValueError`` for one out of range.

    References:
        Loshchilov, Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.

    Examples:
        >>> from jaxoptim import schedules
        >>> schedule = schedules.cosine_annealing_warm_restarts(0.1, T_0=2, T_mult=2)
        >>> [round(float(schedule(n)), 6) for n in range(7)]
        [0.1, 0.05, 0.1, 0.085355, 0.05, 0.014645, 0.1]
    """
    if T_mult == 1:
        return cosine(step % T_0, lr, T_0, eta_min)
    start, period = 0, T_0
    since, current = step, float(T_0)
    while start + period < 2**31:
        start, period = start + period, period * T_mult
        since, current = where(step >= start, step - start, since), where(step >= start, float(period), current)
    return cosine(since, lr, current, eta_min)


@schedule()
def swa_lr(
    step: Any,
    lr: of.Rate,
    swa_lr: of.Rate,
    anneal_epochs: Annotated[int, of.anneal_epochs] = 10,
    anneal_strategy: Annotated[Literal["cos", "linear"], of.strategy] = "cos",
) -> Any:
    r"""Anneal the base rate to the constant rate of weight averaging: ``SWALR``.

    .. math::
        \eta_n = \alpha \, \eta_{\mathrm{swa}} + (1 - \alpha) \, \eta_0, \qquad
        \alpha = \tfrac12 \left( 1 - \cos \pi t \right) \text{ or } t, \qquad t = \min(1, n / E)

    Args:
        lr: :math:`\eta_0`, a number >= 0; may be traced.
        swa_lr: :math:`\eta_{\mathrm{swa}}`, a number >= 0; may be traced.
        anneal_epochs: :math:`E`, an ``int`` >= 0 (default 10).
        anneal_strategy: "cos" (default) or "linear".

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Raises:
        ``TypeError`` for what is not a number, ``ValueError`` for one out of range.

    References:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.

    Examples:
        >>> from jaxoptim import schedules
        >>> schedule = schedules.swa_lr(0.1, swa_lr=0.05, anneal_epochs=2)
        >>> [round(float(schedule(n)), 6) for n in range(4)]
        [0.1, 0.075, 0.05, 0.05]
    """
    done = anneal_fraction(step, anneal_epochs)
    if is_single() and anneal_epochs:
        return fall(lr, swa_lr, done, (anneal_epochs - minimum(anneal_epochs, step)) / anneal_epochs, anneal_strategy)
    alpha = weight(done, anneal_strategy)
    return swa_lr * alpha + lr * (1 - alpha)


def anneal_fraction(step: Any, anneal_epochs: int) -> Any:
    """Return the fraction of the way to the averaging rate that a step has gone."""
    if anneal_epochs == 0:
        return 1.0 + 0 * step
    return minimum(1, divide(1.0 * step, anneal_epochs))
