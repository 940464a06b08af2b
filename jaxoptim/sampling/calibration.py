"""A sweep over step size and localization."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxoptim.core import Rule
from jaxoptim.core.shown import aligned
from jaxoptim.sampling.control_variates import ControlVariates
from jaxoptim.sampling.llc import check_initial_loss, initial_loss, temperature, tempered
from jaxoptim.sampling.observables import Observable
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.plateau import Setting, flattest, rhats, usable
from jaxoptim.sampling.run import SamplerLike, arranged_in, check_sampler, observed, prepare
from jaxoptim.sampling.sample import first_divergence
from jaxoptim.sampling.streams import NUM_REFERENCES
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

    def __str__(self) -> str:
        """The settings in a table, a line each; ``print`` shows it, with a star at the best."""
        settings = self.settings
        best = _best(self, settings)
        rows = [("", "lr", "localization", "mean", "std", "diverged", "R-hat")]
        for of in settings:
            numbers = f"{of.lr:.3g}", f"{of.localization:.3g}", f"{of.mean:.4g}", f"{of.std:.3g}"
            rhat = "" if np.isnan(of.rhat) else f"{of.rhat:.3f}"
            rows.append(("*" if of is best else "", *numbers, f"{of.diverged:.0%}", rhat))
        return aligned(rows)

    @property
    def settings(self) -> list[Setting]:
        """The settings in one list, those of the first step size first."""
        rhat = rhats(self.trace)
        return [
            Setting(
                *(float(x) for x in (self.lr[i], self.localization[j], self.mean[i, j], self.std[i, j])),
                *(float(x) for x in (self.diverged[i, j], rhat[i, j])),
            )
            for i, j in np.ndindex(*self.mean.shape)
        ]

    @property
    def best(self) -> Setting:
        r"""The setting whose estimate depends least on the step size.

        Of the settings without a diverged chain, with R-hat at most 1.1 (where it is known) and an estimate positive
        beyond two errors, it is the one with the smallest bound on :math:`|d \log\hat\lambda / d \log\epsilon|`: the
        larger one of the differences to the next smaller and larger step size, with two standard errors between chains
        added. A step too small has not arrived, there the slope is near 1; one too large has an error of its own. Of
        equals it is one between two others, then the larger step. With a single step size for each localization it is
        the setting with the smallest relative error.

        Raises:
            ``ValueError`` where no setting has an estimate.

        Examples:
            See :func:`calibrate`.
        """
        best = _best(self, self.settings)
        if best is None:
            raise ValueError(
                "No setting has an estimate: in each a chain has diverged, R-hat is above 1.1 or the mean is not "
                "positive. Print the calibration, and give smaller or larger lr, or more draws."
            )
        return best

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


def _best(sweep: Calibration, settings: Sequence[Setting]) -> Setting | None:
    """Return the setting of a sweep that :attr:`Calibration.best` names; None if there is none."""
    number = np.maximum(1, np.round((1 - sweep.diverged) * sweep.trace.shape[2]))
    error = np.nan_to_num(sweep.std) / np.sqrt(number)  # one chain has no error between chains
    rhat = np.reshape([of.rhat for of in settings], sweep.mean.shape)
    is_usable = usable(sweep.mean, error, sweep.diverged, rhat)
    if not is_usable.any():
        return None
    row, column = flattest(sweep.lr, sweep.mean, error, is_usable)
    return settings[row * len(sweep.localization) + column]


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
    num_chains: int = 10,
    num_draws: int = 100,
    num_burnin_steps: int = 0,
    num_steps_bw_draws: int = 1,
    start_noise: float = 0.0,
    batch_size: int | None = None,
    microbatches: int = 1,
    same_batches: bool = False,
    chain_method: str = "auto",
    mesh: Mesh | None = None,
    observables: Mapping[str, Observable | Callable[[Any], Any]] | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    probes: Mapping[str, Any] | None = None,
    control_variates: ControlVariates | None = None,
    metropolis: bool = False,
) -> Calibration:
    """Estimate the local learning coefficient for every pair of a step size and a localization, in one program.

    Settings that fail are part of the answer: they raise nothing, and warn of nothing.

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
        num_chains: as for :func:`sample` (default 10).
        num_draws: as for :func:`sample` (default 100).
        num_burnin_steps: as for :func:`sample` (default 0).
        num_steps_bw_draws: as for :func:`sample` (default 1).
        start_noise: as for :func:`sample` (default 0).
        batch_size: as for :func:`sample` (default None: all data in every step).
        microbatches: as for :func:`sample` (default 1).
        same_batches: as for :func:`sample` (default False).
        chain_method: as for :func:`sample` (default ``"auto"``).
        mesh: as for :func:`sample` (default None).
        observables: as for :func:`sample` (default None).
        progress: as for :func:`sample` (default False).
        checkpoint: as for :func:`sample` (default None).
        probes: as for :func:`sample` (default None).
        control_variates: as for :func:`sample` (default None).
        metropolis: as for :func:`sample`, whose rates of acceptance by setting are then among the ``observables``
            (default False).

    Returns:
        :class:`Calibration`.

    Raises:
        As :func:`estimate_llc`, but for divergence; ``TypeError`` for a transformation.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> sweep = sampling.calibrate(lambda w: jnp.sum(w**2) / 2, jnp.zeros(10), rules.SGLD(), lr=[1e-3, 1e-2, 1.0],
        ...                            localization=[0.0, 10.0], nbeta=100.0, key=jax.random.key(0), num_chains=4)
        >>> sweep.mean.shape, sweep.diverged[-1].tolist()
        ((3, 2), [1.0, 1.0])
        >>> sweep.best.lr
        0.01
    """
    options = RunOptions(
        key,
        num_chains,
        num_draws,
        num_burnin_steps,
        num_steps_bw_draws,
        batch_size,
        chain_method,
        observables,
        progress,
        checkpoint,
        probes=probes,
        microbatches=microbatches,
        same_batches=same_batches,
        start_noise=start_noise,
        mesh=mesh,
        control_variates=control_variates,
        metropolis=metropolis,
    )
    check_sampler(sampler)
    given = problem(loss_fn, params, data, options, NUM_REFERENCES)
    if not isinstance(sampler, Rule):
        raise TypeError(
            "calibrate sets lr, localization and nbeta of a rule, but the sampler is a transformation. Give a rule, "
            "such as jaxoptim.rules.SGLD()."
        )
    nbeta = temperature("calibrate", nbeta, sampler, given)
    check_initial_loss(init_loss)
    rates, strengths = np.asarray(lr, float).reshape(-1), np.asarray(localization, float).reshape(-1)
    for name, values in (("lr", rates), ("localization", strengths)):
        if not len(values) or not (values >= 0).all():
            raise ValueError(f"Invalid {name}: {values.tolist()}. It is a list of numbers >= 0.")
    grid = [x.reshape(-1) for x in np.meshgrid(rates, strengths, indexing="ij")]
    count = len(grid[0])
    rules = tempered(sampler, count, nbeta, lr=jnp.asarray(grid[0]), localization=jnp.asarray(grid[1]))
    prepared = prepare(given, sampler, rules, count, options)
    init_loss = initial_loss(init_loss, given, options.size_at_once(given.example))
    arranged = arranged_in((len(rates), len(strengths), options.num_chains), observed(prepared))
    loss = arranged.pop("loss").astype(np.float64)
    trace = nbeta * (loss - init_loss)
    good = first_divergence(loss) < 0
    chains = np.where(good, np.where(np.isfinite(trace), trace, 0).mean(-1), 0)
    number = good.sum(-1)
    mean = np.where(number > 0, chains.sum(-1) / np.maximum(number, 1), np.nan)
    squares = np.where(good, (chains - mean[..., None]) ** 2, 0).sum(-1)
    std = np.where(number > 1, np.sqrt(squares / np.maximum(number - 1, 1)), np.nan)
    return Calibration(rates, strengths, mean, std, 1 - number / options.num_chains, trace, arranged)
