"""A line search for the strong Wolfe conditions, one evaluation at a time.

Along a direction d from x the loss is a function of one number, phi(t) = loss(x + t d). The search is for a
step t with sufficient decrease and a flat slope:

    phi(t) <= phi(0) + c1 t phi'(0)    and    |phi'(t)| <= c2 |phi'(0)|

First it extrapolates until two samples *bracket* such a step, then it *zooms* into the bracket. Nocedal and
Wright, Numerical Optimization, 2nd ed. 2006, algorithms 3.5 and 3.6. Everything here is about that function of
one number; vectors are the business of the caller.

A trial with a loss or slope that is not finite lies too far out: the search returns to the middle of the bracket.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_C1, _C2 = 1e-4, 0.9
"""The constants c1 of sufficient decrease and c2 of a flat slope."""
_SMALLEST_BRACKET = 1e-9
"""The size of the bracket, along the direction's largest component, below which the zoom ends."""
_MARGIN = 0.1
"""The fraction of the bracket at either end in which two successive trials may not lie."""

LOW, TRIAL, START = 0, 1, 2
"""Codes of the point that is now the lowest: the one that was, the trial, or the start of the line."""


class Sample(NamedTuple):
    """A sample of the line: the step t, phi(t) and phi'(t)."""

    t: Any
    loss: Any
    slope: Any


class Line(NamedTuple):
    """The state of a line search between two evaluations.

    Attributes:
        t: the step to evaluate next; the step found, once ``ended``.
        low: when bracketing, the sample before the trial; when zooming, the better end of the bracket; the
            sample found, once ``ended``.
        high: when zooming, the other end.
        low_first: whether ``low`` was the older of the two when they were ranked. Decides ties.
        zooming: whether the search zooms, instead of bracketing.
        stalled: whether the last trial of the zoom lay close to an end of the bracket.
        trials: evaluations made.
        ended: whether the search is over.
    """

    t: jax.Array
    low: Sample
    high: Sample
    low_first: jax.Array
    zooming: jax.Array
    stalled: jax.Array
    trials: jax.Array
    ended: jax.Array


def init_line(start: Sample, t: jax.Array) -> Line:
    """Begin a search from ``start``, where t = 0, that tries the step ``t`` first."""
    no = jnp.zeros((), bool)
    return Line(t, start, start, no, no, no, jnp.zeros((), jnp.int32), no)


def update_line(line: Line, trial: Sample, start: Sample, reach: Any, exhausted: Any) -> tuple[Line, jax.Array]:
    """Take in the sample at ``line.t`` and choose the next step.

    Args:
        line: the state.
        trial: the sample at ``line.t``.
        start: the sample at t = 0.
        reach: the largest component of the direction, by absolute value.
        exhausted: whether this was the last evaluation allowed.

    Returns:
        The new state, and which point is now ``low``: LOW, TRIAL or START.
    """
    finite = jnp.isfinite(trial.loss) & jnp.isfinite(trial.slope)
    trial = trial._replace(loss=jnp.where(finite, trial.loss, jnp.inf))
    bracketed, zoomed = _bracket(line, trial, start, exhausted), _zoom(line, trial, start, exhausted)
    after, source = jax.tree.map(lambda a, b: jnp.where(line.zooming, a, b), zoomed, bracketed)
    after = after._replace(trials=line.trials + 1)
    proposed = _propose(after, reach)
    after = jax.tree.map(lambda a, b: jnp.where(after.zooming & ~after.ended, a, b), proposed, after)
    return after._replace(t=jnp.where(after.ended, after.low.t, after.t)), source


def _too_high(trial: Sample, start: Sample) -> jax.Array:
    """Whether the decrease is insufficient (Armijo)."""
    return (trial.loss > start.loss + _C1 * trial.t * start.slope) | (trial.loss == jnp.inf)


def _flat(trial: Sample, start: Sample) -> jax.Array:
    """Whether the slope is flat enough (strong curvature condition)."""
    return jnp.abs(trial.slope) <= -_C2 * start.slope


def _bracket(line: Line, trial: Sample, start: Sample, exhausted: Any) -> tuple[Line, jax.Array]:
    """Extrapolate until the trial and the sample before it bracket a good step (algorithm 3.5)."""
    previous = line.low
    too_high = _too_high(trial, start) | ((line.trials > 1) & (trial.loss >= previous.loss))
    accepted = ~too_high & _flat(trial, start)
    found = (too_high | (trial.slope >= 0)) & ~accepted
    previous_lower = previous.loss <= trial.loss
    source = jnp.where(
        exhausted,
        jnp.where(start.loss <= trial.loss, START, TRIAL),
        jnp.where(found & previous_lower, LOW, TRIAL),
    )
    further = _cubic_minimum(previous, trial, trial.t + 0.01 * (trial.t - previous.t), 10 * trial.t)
    after = line._replace(
        t=further,
        low=_choose(source, previous, trial, start),
        high=_where(previous_lower, trial, previous),
        low_first=previous_lower,
        zooming=found,
        ended=exhausted | accepted,
    )
    return after, source


def _zoom(line: Line, trial: Sample, start: Sample, exhausted: Any) -> tuple[Line, jax.Array]:
    """Replace one end of the bracket by the trial (algorithm 3.6)."""
    low, high = line.low, line.high
    too_high = _too_high(trial, start) | (trial.loss >= low.loss)
    accepted = ~too_high & _flat(trial, start)
    # Too high: the trial replaces the high end. It may still be the lower of the two, as a decrease can be
    # insufficient; of two equal ones the older is preferred.
    trial_lower = jnp.where(line.low_first, ~(low.loss <= trial.loss), trial.loss <= low.loss)
    # Else it replaces the low end; the old low end becomes the high one if the minimum is between them.
    turned = ~accepted & (trial.slope * (high.t - low.t) >= 0)
    replaces_low = ~too_high | trial_lower
    after = line._replace(
        low=_where(replaces_low, trial, low),
        high=_where(too_high, _where(trial_lower, low, trial), _where(turned, low, high)),
        low_first=line.low_first ^ (too_high & trial_lower),
        ended=exhausted | accepted,
    )
    return after, jnp.where(replaces_low, TRIAL, LOW)


def _propose(line: Line, reach: Any) -> Line:
    """Return the next step to try within the bracket: the cubic's minimum, kept away from the ends."""
    lower, upper = jnp.minimum(line.low.t, line.high.t), jnp.maximum(line.low.t, line.high.t)
    t = _cubic_minimum(line.low, line.high, lower, upper)
    margin = _MARGIN * (upper - lower)
    close = jnp.minimum(upper - t, t - lower) < margin
    # One trial close to an end is allowed, a second in a row or one on the end itself is moved inwards.
    moved = close & (line.stalled | (t >= upper) | (t <= lower))
    inwards = jnp.where(jnp.abs(t - upper) < jnp.abs(t - lower), upper - margin, lower + margin)
    return line._replace(
        t=jnp.where(moved, inwards, t),
        stalled=close & ~moved,
        ended=(upper - lower) * reach < _SMALLEST_BRACKET,
    )


def _cubic_minimum(a: Sample, b: Sample, lower: Any, upper: Any) -> jax.Array:
    """Return the minimum of the cubic through two samples and their slopes (equation 3.59), clipped to the bounds.

    It is the middle of the bounds where that cubic has no minimum.
    """
    left, right = _where(a.t <= b.t, a, b), _where(a.t <= b.t, b, a)
    d1 = left.slope + right.slope - 3 * (left.loss - right.loss) / (left.t - right.t)
    square = d1 * d1 - left.slope * right.slope
    d2 = jnp.sqrt(jnp.maximum(square, 0))
    lowest = right.t - (right.t - left.t) * ((right.slope + d2 - d1) / (right.slope - left.slope + 2 * d2))
    clipped = jnp.minimum(jnp.maximum(lowest, lower), upper)
    return jnp.where((square >= 0) & ~jnp.isnan(lowest), clipped, (lower + upper) / 2)


def _where(condition: jax.Array, a: Sample, b: Sample) -> Sample:
    return Sample(*(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True)))


def _choose(source: jax.Array, low: Sample, trial: Sample, start: Sample) -> Sample:
    return _where(source == TRIAL, trial, _where(source == START, start, low))
