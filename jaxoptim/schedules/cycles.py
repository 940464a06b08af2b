"""Schedules that rise and fall: the cyclic rate, the one-cycle rate, and their momenta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from jaxoptim.schedules import arguments as of
from jaxoptim.schedules.annealing import fall
from jaxoptim.schedules.arithmetic import minimum, power, turns, where
from jaxoptim.schedules.schedule import schedule

Phase = tuple[Any, Any, Any]
"""The last step of a phase, the value at its start, and the value at its end."""


def triangle(step: Any, total_size: Any, step_ratio: Any) -> tuple[Any, Any]:
    """Return the cycle of a step, counted from 1, and its height between the base (0) and the maximum (1)."""
    cycle, x, left = turns(step, total_size)
    down = left / (1 - step_ratio) if step_ratio != 1 else 0.0
    return cycle, where(x <= step_ratio, x / step_ratio, down)


def amplitude(x: Any, mode: str, gamma: Any) -> Any:
    """Return the height of the maximum in one of torch's modes; ``x`` is the step in "exp_range", else the cycle."""
    if mode == "triangular":
        return 1.0
    return 0.5 ** (x - 1) if mode == "triangular2" else power(gamma, x)


def _cyclic_height(
    step: Any, step_size_up: int, step_size_down: int | None, mode: str, gamma: Any, scale_fn: Any, scale_mode: str
) -> Any:
    """Return the distance of the rate from the base, as a fraction of the distance of the maximum."""
    total_size = step_size_up + (step_size_up if step_size_down is None else step_size_down)
    cycle, height = triangle(step, total_size, step_size_up / total_size)
    if scale_fn is None:
        of.cyclic_mode("mode", mode)
        return height * amplitude(step if mode == "exp_range" else cycle, mode, gamma)
    return height * scale_fn(cycle if of.scale_mode("scale_mode", scale_mode) == "cycle" else step)


def _cyclic_momentum(
    step: Any, base_lr: Any, max_lr: Any, cycle_momentum: bool, base_momentum: Any, max_momentum: Any, **shape: Any
) -> Any:
    """Compute the momentum of :func:`cyclic_lr`."""
    return max_momentum - (max_momentum - base_momentum) * _cyclic_height(step, **shape)


@schedule(momentum=_cyclic_momentum)
def cyclic_lr(
    step: Any,
    base_lr: of.Rate,
    max_lr: of.Rate,
    step_size_up: of.Size = 2000,
    step_size_down: of.OptionalCount = None,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: of.Power = 1.0,
    scale_fn: of.OptionalFunction = None,
    scale_mode: Literal["cycle", "iterations"] = "cycle",
    cycle_momentum: bool = True,
    base_momentum: of.Number = 0.8,
    max_momentum: of.Number = 0.9,
) -> Any:
    r"""Cycle linearly up and down between two rates: ``CyclicLR``.

    .. math::
        \eta_n = \eta_{\mathrm{base}} + (\eta_{\max} - \eta_{\mathrm{base}}) \, h(n) \, s, \qquad
        \mu_n = \mu_{\max} - (\mu_{\max} - \mu_{\mathrm{base}}) \, h(n) \, s

    where :math:`h` rises from 0 to 1 and falls back, and :math:`s` is 1 ("triangular"), :math:`2^{1-c}` in cycle
    :math:`c` ("triangular2") or :math:`\gamma^n` ("exp_range").

    Args:
        base_lr: :math:`\eta_{\mathrm{base}}`, a number >= 0; may be traced.
        max_lr: :math:`\eta_{\max}`, a number >= 0; may be traced.
        step_size_up: the steps up, a whole number >= 1 (default 2000).
        step_size_down: the steps down, a whole number >= 0 (default None: as many as up).
        mode: "triangular" (default), "triangular2" or "exp_range"; not looked at if ``scale_fn`` is given.
        gamma: :math:`\gamma`, a number >= 0 (default 1); may be traced.
        scale_fn: a function for :math:`s` that JAX can trace (default None).
        scale_mode: whether ``scale_fn`` takes the "cycle" (default) or the "iterations".
        cycle_momentum: whether the schedule has a ``momentum`` (default True).
        base_momentum: :math:`\mu_{\mathrm{base}}`, a number (default 0.8); may be traced.
        max_momentum: :math:`\mu_{\max}`, the momentum at the start, a number (default 0.9); may be traced.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class. Its
        ``momentum`` is the schedule of :math:`\mu`.

    Raises:
        ``TypeError`` for what is not a number, ``ValueError`` for one out of range or an unknown mode.

    References:
        Smith, "Cyclical Learning Rates for Training Neural Networks", 2017.

    Examples:
        >>> from jaxoptim import schedules
        >>> schedule = schedules.cyclic_lr(0.1, max_lr=0.5, step_size_up=2)
        >>> [round(float(schedule(n)), 6) for n in range(6)]
        [0.1, 0.3, 0.5, 0.3, 0.1, 0.3]
        >>> [round(float(schedule.momentum(n)), 6) for n in range(3)]
        [0.9, 0.85, 0.8]
    """
    height = _cyclic_height(step, step_size_up, step_size_down, mode, gamma, scale_fn, scale_mode)
    return base_lr + (max_lr - base_lr) * height


def phase_ends(total_steps: int, pct_start: Any, three_phase: bool) -> list[Any]:
    """Return the last step of each phase of one cycle."""
    peak = pct_start * total_steps
    return [peak - 1, 2 * peak - 2, total_steps - 1] if three_phase else [peak - 1, total_steps - 1]


def through(step: Any, phases: Sequence[Phase], strategy: str) -> Any:
    """Return the value at a step of a cycle; it stays constant after the last phase.

    The last phase is over at ``total_steps - 1``. A loop that calls its scheduler after every batch makes one
    step more.
    """
    step = minimum(step, phases[-1][0])
    start = 0.0
    values = []
    for end, first, last in phases:
        length = where(end == start, 1.0, end - start)
        done = where(end == start, 1.0, (step - start) / length)
        values.append(fall(first, last, done, (end - step) / length, strategy))
        start = end
    value = values[-1]
    for (end, _, _), earlier in zip(reversed(phases[:-1]), reversed(values[:-1]), strict=True):
        value = where(step <= end, earlier, value)
    return value


def cycle_of_rates(ends: Sequence[Any], initial: Any, peak: Any, least: Any) -> list[Phase]:
    """Return the phases of the rate: up, with three phases back to the start, and down to the least."""
    points = [initial, peak, initial, least] if len(ends) == 3 else [initial, peak, least]
    return list(zip(ends, points[:-1], points[1:], strict=True))


def cycle_of_momenta(ends: Sequence[Any], base: Any, top: Any) -> list[Phase]:
    """Return the phases of the momentum: down, and up again."""
    points = [top, base, top, top][: len(ends) + 1]
    return list(zip(ends, points[:-1], points[1:], strict=True))


def _phase_ends(total_steps: Any, epochs: Any, steps_per_epoch: Any, pct_start: Any, three_phase: bool) -> list[Any]:
    return phase_ends(of.total_steps(total_steps, epochs, steps_per_epoch), pct_start, three_phase)


def _one_cycle_momentum(
    step: Any,
    max_lr: Any,
    anneal_strategy: str,
    cycle_momentum: bool,
    base_momentum: Any,
    max_momentum: Any,
    div_factor: Any,
    final_div_factor: Any,
    **length: Any,
) -> Any:
    """Compute the momentum of :func:`one_cycle_lr`."""
    phases = cycle_of_momenta(_phase_ends(**length), base_momentum, max_momentum)
    return through(step, phases, anneal_strategy)


@schedule(momentum=_one_cycle_momentum)
def one_cycle_lr(
    step: Any,
    max_lr: of.Rate,
    total_steps: int | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    pct_start: Annotated[Any, of.fraction] = 0.3,
    anneal_strategy: Annotated[Literal["cos", "linear"], of.strategy] = "cos",
    cycle_momentum: bool = True,
    base_momentum: of.Number = 0.85,
    max_momentum: of.Number = 0.95,
    div_factor: of.Number = 25.0,
    final_div_factor: of.Number = 1e4,
    three_phase: bool = False,
) -> Any:
    r"""Run one cycle, up to a maximum and down to nearly zero: ``OneCycleLR``.

    The rate goes from :math:`\eta_{\max} / d` up to :math:`\eta_{\max}`, then down to :math:`\eta_{\max} / (d f)`; in
    three phases, down to its start in as many steps as up, and then to the least. In a phase from :math:`a` to
    :math:`b`, at the fraction :math:`t` of its steps,

    .. math::
        \eta = b + \tfrac12 (a - b) (1 + \cos \pi t) \quad \text{or} \quad \eta = a + (b - a) t .

    The momentum goes the other way, from its maximum to its base and back. The least rate is reached at
    ``total_steps - 1`` and kept.

    Args:
        max_lr: :math:`\eta_{\max}`, a number >= 0; may be traced.
        total_steps: the length of the cycle, an ``int`` >= 1 (default None: ``epochs * steps_per_epoch``).
        epochs: an ``int`` >= 1 (default None).
        steps_per_epoch: an ``int`` >= 1 (default None).
        pct_start: the part of the steps that go up, a ``float`` in [0, 1] (default 0.3).
        anneal_strategy: "cos" (default) or "linear".
        cycle_momentum: whether the schedule has a ``momentum`` (default True).
        base_momentum: the least momentum, a number (default 0.85); may be traced.
        max_momentum: the momentum at the start, a number (default 0.95); may be traced.
        div_factor: :math:`d`, a number (default 25); may be traced.
        final_div_factor: :math:`f`, a number (default 10,000); may be traced.
        three_phase: come down in two phases (default False).

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class. Its
        ``momentum`` is the schedule of the momentum.

    Raises:
        ``TypeError`` for what is not a number, ``ValueError`` for one out of range or a missing length.

    References:
        Smith, Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2019.

    Examples:
        >>> from jaxoptim import schedules
        >>> schedule = schedules.one_cycle_lr(0.1, total_steps=10)
        >>> [round(float(schedule(n)), 6) for n in (0, 2, 9)]
        [0.004, 0.1, 0.0]
        >>> [round(float(schedule.momentum(n)), 6) for n in (0, 2, 9)]
        [0.95, 0.85, 0.95]
    """
    ends = _phase_ends(total_steps, epochs, steps_per_epoch, pct_start, three_phase)
    initial = max_lr / div_factor
    return through(step, cycle_of_rates(ends, initial, max_lr, initial / final_div_factor), anneal_strategy)
