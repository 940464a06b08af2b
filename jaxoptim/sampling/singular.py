"""The numbers of singular learning theory, from the loss of each datum at the draws of one run."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from jaxoptim.sampling.doubts import disagreement, warn
from jaxoptim.sampling.influence import checked_trace
from jaxoptim.sampling.jackknife import Estimate, jackknife


class SingularLearning(NamedTuple):
    r"""The quantities of singular learning theory of a posterior :math:`p(w) \propto \exp(-n\beta L(w))`.

    Attributes:
        llc: the learning coefficient from the mean, :math:`n\beta\,(E[L] - L(w^*))`; NaN without ``init_loss``.
        llc_of_variance: the same from the variance, :math:`\mathrm{Var}(n\beta L)`, which needs no loss to compare
            with. Both agree where the settings are good.
        singular_fluctuation: :math:`\nu = \tfrac{n\beta}{2}\,\tfrac1n \sum_i \mathrm{Var}(\ell_i)`; of a regular model
            half the number of its parameters, as the learning coefficient is.
        waic: the widely applicable information criterion, an estimate of the loss of the Bayesian prediction on new
            data, :math:`-\tfrac1n \sum_i \log E[e^{-\ell_i}] + \tfrac{\beta}{n} \sum_i \mathrm{Var}(\ell_i)`.
        wbic: the widely applicable Bayesian information criterion, :math:`n\,E[L]` at :math:`n\beta = n/\log n`: an
            estimate of the free energy; NaN at another temperature.
    """

    llc: Estimate
    llc_of_variance: Estimate
    singular_fluctuation: Estimate
    waic: Estimate
    wbic: Estimate


def singular_learning(losses: Any, nbeta: float, *, init_loss: float | None = None) -> SingularLearning:
    r"""Estimate all the numbers of singular learning theory from one run.

    Args:
        losses: :math:`\ell_i(w) = -\log p(x_i \mid w)` at the draws, ``(chains, draws, n)``, for all data; such as the
            trace of :class:`Losses` for all of them. Finite, at least two draws. (Further axes, such as tokens, are
            data too.)
        nbeta: :math:`n\beta > 0`, the temperature of the run.
        init_loss: :math:`L(w^*)`, the mean loss where the chains began (default None: ``llc`` is NaN).

    Returns:
        :class:`SingularLearning`, each of whose numbers has a ``value`` and an ``error``.

    Raises:
        ``ValueError`` for another shape, numbers that are not finite, and a temperature that is not positive.

    Warns:
        :class:`LLCWarning` where ``llc`` and ``llc_of_variance`` differ by more than three standard errors of their
        difference, and by more than a fifth of ``llc`` (a fifth of 1/2 at least). On a quadratic with localization
        :math:`\gamma` both fall short, by the factors :math:`a = n\beta h / (n\beta h + \gamma)` and :math:`a^2`, so
        that the difference is about what ``llc`` lacks. Of a single chain there is no error, and no warning.

    References:
        Watanabe, Asymptotic equivalence of Bayes cross validation and widely applicable information criterion, JMLR
        2010; A widely applicable Bayesian information criterion, JMLR 2013; Mathematical theory of Bayesian
        statistics, 2018.

    Examples:
        >>> import numpy as np
        >>> from jaxoptim import sampling
        >>> rng, n = np.random.default_rng(0), 1000
        >>> x = rng.normal(size=n)
        >>> means = rng.normal(x.mean(), n**-0.5, size=(4, 500, 1))  # draws from the posterior of a normal mean
        >>> losses = (x - means) ** 2 / 2 + np.log(2 * np.pi) / 2
        >>> found = sampling.singular_learning(losses, nbeta=n)
        >>> [abs(of.value - 0.5) < 4 * of.error for of in (found.llc_of_variance, found.singular_fluctuation)]
        [True, True]
    """
    losses = _checked("losses", losses, nbeta)
    n, total = losses.shape[2], losses.mean(2)
    beta = nbeta / n

    def of_mean(total: np.ndarray) -> float:
        return math.nan if init_loss is None else nbeta * (total.mean() - init_loss)

    def waic(losses: np.ndarray) -> float:
        least = losses.min((0, 1))
        prediction = least - np.log(np.exp(least - losses).mean((0, 1)))
        return float(prediction.mean() + beta * _variance(losses).mean())

    def of_variance(total: np.ndarray) -> float:
        return float(nbeta**2 * _variance(total))

    llc, llc_of_variance = jackknife(of_mean, total), jackknife(of_variance, total)
    gap = jackknife(lambda total: of_mean(total) - of_variance(total), total)
    warn(disagreement(llc, "the mean above init_loss", llc_of_variance, "the variance", gap), stacklevel=2)
    is_wbic = n > math.e and math.isclose(nbeta, n / math.log(n), rel_tol=0.01)
    return SingularLearning(
        llc,
        llc_of_variance,
        jackknife(lambda losses: float(nbeta / 2 * _variance(losses).mean()), losses),
        jackknife(waic, losses),
        jackknife(lambda total: float(n * total.mean()) if is_wbic else math.nan, total),
    )


def llc_of_two_temperatures(losses: Any, nbeta: float, other_losses: Any, other_nbeta: float) -> Estimate:
    r"""Estimate the learning coefficient from runs at two temperatures, without a loss to compare with.

    .. math::
        \hat\lambda = \frac{E_1[L] - E_2[L]}{1/(n\beta_1) - 1/(n\beta_2)}

    Args:
        losses: the loss of all data at the draws, ``(chains, draws)``, or that of each, with more axes.
        nbeta: :math:`n\beta_1 > 0`, its temperature.
        other_losses: the same at the other temperature; chain for chain with the same key, so that noise they have in
            common cancels.
        other_nbeta: :math:`n\beta_2 > 0`, not equal to the first.

    Returns:
        The estimate and its standard error, by jackknife over pairs of chains.

    Raises:
        ``ValueError`` for traces of other shapes, numbers that are not finite, and temperatures that are equal or not
        positive.

    Warns:
        :class:`LLCWarning` where it differs from the mean of the estimates from the variances, those of
        ``llc_of_variance`` of :func:`singular_learning` at both temperatures, as there.

    References:
        Watanabe, A widely applicable Bayesian information criterion, JMLR 2013.

    Examples:
        >>> import numpy as np
        >>> from jaxoptim.sampling import llc_of_two_temperatures
        >>> weights = np.random.default_rng(0).normal(size=(8, 500, 10))  # of a quadratic, standardized
        >>> runs = [(weights**2).sum(2) / (2 * nbeta) for nbeta in (100.0, 200.0)]
        >>> round(llc_of_two_temperatures(runs[0], 100.0, runs[1], 200.0).value)
        5
    """
    pair = [_checked("losses", losses, nbeta, 2), _checked("other_losses", other_losses, other_nbeta, 2)]
    both = [of.reshape(*of.shape[:2], -1).mean(2) for of in pair]
    if len(both[0]) != len(both[1]):
        raise ValueError(f"Both runs must have as many chains, but they have {len(both[0])} and {len(both[1])}.")
    if nbeta == other_nbeta:
        raise ValueError(f"The temperatures must differ, but nbeta and other_nbeta are both {nbeta}.")

    def of_temperatures(one: np.ndarray, other: np.ndarray) -> float:
        return float((one.mean() - other.mean()) / (1 / nbeta - 1 / other_nbeta))

    def of_variances(one: np.ndarray, other: np.ndarray) -> float:
        return float((nbeta**2 * _variance(one) + other_nbeta**2 * _variance(other)) / 2)

    found, variances = jackknife(of_temperatures, *both), jackknife(of_variances, *both)
    gap = jackknife(lambda *both: of_temperatures(*both) - of_variances(*both), *both)
    warn(disagreement(found, "two temperatures", variances, "the variances", gap), stacklevel=2)
    return found


def _variance(trace: np.ndarray) -> np.ndarray:
    """The variance over all draws of all chains."""
    return trace.var((0, 1), ddof=1)


def _checked(name: str, losses: Any, nbeta: float, least: int = 3) -> np.ndarray:
    losses = checked_trace(name, losses, least)
    if not nbeta > 0:
        raise ValueError(f"Invalid nbeta: {nbeta!r}. It is a number > 0, the temperature of the run.")
    return losses if least == 2 else losses.reshape(*losses.shape[:2], -1)
