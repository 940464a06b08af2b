"""A sweep over step size and localization."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.sampling.llc import arranged_in, initial_loss, options_of, temperature, tempered
from jaxoptim.sampling.run import SamplerLike, run
from jaxoptim.sampling.sample import first_divergence
from jaxoptim.sampling.target import problem


@dataclasses.dataclass(frozen=True)
class Calibration:
    r"""Local learning coefficients over a grid of step sizes and localizations.

    Attributes:
        lr: the step sizes.
        localization: the localizations.
        mean: the pooled estimate of each setting over the chains that have not diverged, ``(lr, localization)``;
            NaN where all have.
        std: the standard deviation between chains.
        diverged: the share of chains that have diverged.
        trace: :math:`n\beta (L - L(w^*))`, ``(lr, localization, chains, draws)``.
        observables: what else was observed, each with the first three of these axes.
    """

    lr: np.ndarray
    localization: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    diverged: np.ndarray
    trace: np.ndarray
    observables: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        """The grid in a line."""
        return (
            f"Calibration(lr={self.lr.tolist()}, localization={self.localization.tolist()}, mean={self.mean.tolist()})"
        )

    def plot(self, *, ax: Any = None) -> Any:
        """Draw the estimates against the step size, one line for each localization, with matplotlib.

        A good setting lies on a plateau, where the estimate depends on neither.

        Args:
            ax: the matplotlib ``Axes`` to draw on (default None: new ones).

        Returns:
            The ``Axes``.

        Raises:
            ``ImportError`` without matplotlib.

        Examples:
            See :func:`calibrate`.
        """
        from jaxoptim.sampling.plotting import plot_sweep

        return plot_sweep(self, ax)


def calibrate(
    loss_fn: Callable[..., Any],
    params: Any,
    sampler: SamplerLike,
    data: Any = None,
    *,
    lr: Sequence[float],
    localization: Sequence[float],
    nbeta: float | None = None,
    key: jax.Array,
    init_loss: float | None = None,
    **options: Any,
) -> Calibration:
    """Estimate the local learning coefficient for every pair of a step size and a localization, in one program.

    Settings that diverge are part of the answer: they raise nothing.

    Args:
        loss_fn: as for :func:`estimate_llc`.
        params: as for :func:`estimate_llc`.
        sampler: a rule; its ``lr``, ``localization`` and ``nbeta`` are replaced.
        data: as for :func:`estimate_llc`.
        lr: step sizes >= 0.
        localization: localizations >= 0.
        nbeta: as for :func:`estimate_llc`.
        key: a typed JAX key. Chain c of all settings has the same noise.
        init_loss: as for :func:`estimate_llc`.
        options: the other keywords of :func:`sample`.

    Returns:
        :class:`Calibration`.

    Raises:
        As :func:`estimate_llc`, but for divergence.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> sweep = sampling.calibrate(lambda w: jnp.sum(w**2) / 2, jnp.zeros(10), rules.SGLD(), lr=[1e-4, 1e-3, 1.0],
        ...                            localization=[0.0, 10.0], nbeta=100.0, key=jax.random.key(0), num_chains=4)
        >>> sweep.mean.shape, sweep.diverged[-1].tolist()
        ((3, 2), [1.0, 1.0])
    """
    checked = options_of("calibrate", key, options)
    nbeta = temperature("calibrate", nbeta, sampler, data)
    given = problem(loss_fn, params, data, checked)
    init_loss = initial_loss(init_loss, given, checked.size_at_once(data))
    rates, strengths = np.asarray(lr, float).reshape(-1), np.asarray(localization, float).reshape(-1)
    for name, values in (("lr", rates), ("localization", strengths)):
        if not len(values) or not (values >= 0).all():
            raise ValueError(f"Invalid {name}: {values.tolist()}. It is a list of numbers >= 0.")
    grid = [x.reshape(-1) for x in np.meshgrid(rates, strengths, indexing="ij")]
    count = len(grid[0])
    rules = tempered(sampler, count, nbeta, lr=jnp.asarray(grid[0]), localization=jnp.asarray(grid[1]))
    found = run(given, sampler, rules, count, checked)
    arranged = arranged_in((len(rates), len(strengths), checked.num_chains), found)
    loss = arranged.pop("loss").astype(np.float64)
    trace = nbeta * (loss - init_loss)
    good = first_divergence(loss) < 0
    chains = np.where(good, np.where(np.isfinite(trace), trace, 0).mean(-1), 0)
    number = good.sum(-1)
    mean = np.where(number > 0, chains.sum(-1) / np.maximum(number, 1), np.nan)
    squares = np.where(good, (chains - mean[..., None]) ** 2, 0).sum(-1)
    std = np.where(number > 1, np.sqrt(squares / np.maximum(number - 1, 1)), np.nan)
    return Calibration(rates, strengths, mean, std, 1 - number / checked.num_chains, trace, arranged)
