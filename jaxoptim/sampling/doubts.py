"""Warnings about unreliable estimates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxoptim.sampling import diagnostics
from jaxoptim.sampling.jackknife import Estimate

FEWEST_DRAWS = 100
"""The number of effective draws below which neither an error nor R-hat is reliable."""
HIGHEST_RHAT = 1.1
OF_ESTIMATE = 0.2
"""The largest fall of the potential on a step down the gradient, as a share of the estimate."""
ONE_PARAMETER = 0.5
"""The coefficient of one regular parameter, the scale by which others are called small."""


class LLCWarning(UserWarning):
    """A warning that an estimate of a local learning coefficient is unreliable.

    See :func:`estimate_llc`, :func:`singular_learning` and :func:`llc_of_two_temperatures` for its reasons.

    Examples:
        >>> import warnings
        >>> from jaxoptim import sampling
        >>> warnings.filterwarnings("ignore", category=sampling.LLCWarning)  # silences all of them
        >>> warnings.filterwarnings("error", category=sampling.LLCWarning)  # makes errors of them
        >>> warnings.resetwarnings()
    """


class Statistics(NamedTuple):
    """Statistics of one estimate, from its traces; NaN where unknown: without numpyro, or of too few draws.

    Attributes:
        mean: the pooled estimate.
        mcse: its Monte-Carlo standard error.
        rhat: the split R-hat.
        size: the effective sample size.
        is_constant: whether all draws are one number.
    """

    mean: float
    mcse: float
    rhat: float
    size: float
    is_constant: bool


def statistics(trace: np.ndarray) -> Statistics:
    """The statistics of a trace, ``(chains, draws)``."""
    if not len(trace):
        return Statistics(math.nan, math.nan, math.nan, math.nan, False)
    is_constant, draws = bool(np.ptp(trace) == 0), trace.shape[1]
    mcse = rhat = size = math.nan
    if diagnostics.is_available() and draws >= 2:
        mcse = float(diagnostics.mcse(trace))
    if diagnostics.is_available() and draws >= 4 and not is_constant:
        rhat, size = float(diagnostics.rhat(trace)), float(diagnostics.effective_sample_size(trace))
        size = max(size, 0.0) if math.isfinite(size) else 0.0  # of draws too few to tell
    return Statistics(float(trace.mean()), mcse, rhat, size, is_constant)


class Evidence(NamedTuple):
    """The evidence on one estimate, and on the parameters where its chains began.

    Attributes:
        of: the statistics of its trace.
        fall: what a step down the gradient lowers the potential by.
        norm: the norm of the gradient.
        rounding: an error of the estimate that is due to rounding.
    """

    of: Statistics
    fall: float
    norm: float
    rounding: float


def fall_to_warn_of(mean: float) -> float:
    """The fall of the potential on a step down its gradient from which parameters are far from a minimum."""
    return OF_ESTIMATE * max(abs(mean), ONE_PARAMETER)


def divergence(diverged: np.ndarray, labels: Sequence[str] | None, *, all_may: bool = False) -> list[str]:
    """Return a line about the chains that have diverged; raise if all of one estimate have, unless that is allowed."""
    lost = np.argwhere(diverged >= 0)
    if not len(lost):
        return []
    some = [
        f"chain {chain}{'' if labels is None else f' of {labels[i]}'} at draw {diverged[i, chain]}"
        for i, chain in lost[:5]
    ]
    many = f"{len(lost)} of {diverged.size} chains diverged: {', '.join(some)}{', ...' if len(lost) > 5 else ''}"
    advice = (
        "SGLD is stable where lr * (nbeta * curvature + localization) < 4: try a smaller lr. "
        "sampling.sample with the same arguments returns all traces."
    )
    if not all_may and (diverged >= 0).all(-1).any():
        raise FloatingPointError(f"{many}. {advice}")
    return [f"{many}; they are left out of the estimate. {advice}"]


def doubts(found: Sequence[Evidence], num_draws: int, names: Sequence[str] | None) -> list[str]:
    """The reasons to doubt estimates, a line for each reason.

    Args:
        found: what is known of each.
        num_draws: the draws of each chain.
        names: the estimates as messages call them; None if there is one.
    """
    of_each = [each.of for each in found]

    def line(what: str, bad: Sequence[bool], value: Any, advice: str) -> None:
        where = [i for i, is_bad in enumerate(bad) if is_bad]
        if not where:
            return
        some = [f"{value(i)}{'' if names is None else f' for {names[i]}'}" for i in where[:5]]
        more = f" and {len(where) - 5} more" if len(where) > 5 else ""
        lines.append(f"{what} {', '.join(some)}{more}. {advice}")

    def effective(i: int) -> str:
        if num_draws < 4:
            return f"{num_draws} of each chain"
        return "the chains do not move" if of_each[i].is_constant else f"{of_each[i].size:.3g}"

    lines: list[str] = []
    line(
        "params is not near a minimum: a step down the gradient lowers nbeta * loss by over a fifth of the estimate,",
        [each.fall >= fall_to_warn_of(each.of.mean) + each.rounding for each in found],
        lambda i: f"{found[i].fall:.3g} (gradient norm {found[i].norm:.3g})",
        "The coefficient is that of a minimum, and is too low elsewhere: train further, or raise localization.",
    )
    line(
        "The estimate is negative beyond its error:",
        [each.of.mean < -3 * each.of.mcse - each.rounding for each in found],
        lambda i: f"{of_each[i].mean:.3g} +- {of_each[i].mcse:.2g}",
        "The chains found lower losses than that of params: train further, raise localization, or check init_loss.",
    )
    line(
        f"The chains disagree, with an R-hat above {HIGHEST_RHAT}:",
        [x.rhat > HIGHEST_RHAT for x in of_each],
        lambda i: f"{of_each[i].rhat:.3f}",
        "Raise num_burnin_steps, num_draws or num_steps_bw_draws.",
    )
    line(
        f"The draws are worth too few independent ones, less than {FEWEST_DRAWS}:",
        [num_draws < 4 or x.size < FEWEST_DRAWS or x.is_constant for x in of_each],
        effective,
        "Raise num_draws, num_steps_bw_draws or lr.",
    )
    return lines


def disagreement(estimate: Estimate, name: str, other: Estimate, other_name: str, gap: Estimate) -> list[str]:
    """Return a line if two estimates of one coefficient differ by more than their errors allow, and by a fifth.

    Args:
        estimate: the one that is asked for.
        name: what it is made from.
        other: another.
        other_name: what that is made from.
        gap: their difference, whose error knows what both have in common.
    """
    # By a little they differ for every finite step, and with every localization.
    if not abs(gap.value) > max(3 * gap.error, fall_to_warn_of(estimate.value)):
        return []
    one, another = (f"{x.value:.3g} +- {x.error:.2g}" for x in (estimate, other))
    return [
        f"The learning coefficient from {name}, {one}, and that from {other_name}, {another}, disagree beyond their "
        "errors. Raise num_burnin_steps, or lower lr or localization."
    ]


def warn(lines: Sequence[str], stacklevel: int) -> None:
    """Warn once for each line."""
    for text in lines:
        warnings.warn(text, LLCWarning, stacklevel=stacklevel + 1)
