"""Parallel tempering over the inverse temperature, and free energies."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxoptim.core import enabled
from jaxoptim.rules import SGLD
from jaxoptim.sampling.control_variates import ControlVariates
from jaxoptim.sampling.jackknife import jackknife_error
from jaxoptim.sampling.labelled import dataset
from jaxoptim.sampling.observables import Observable
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.run import SamplerLike, arranged_in, check_sampler, observed, prepare, stacked
from jaxoptim.sampling.sample import first_divergence
from jaxoptim.sampling.swaps import SWAP_RATE
from jaxoptim.sampling.target import problem

_SETTINGS = "nbeta"
"""The name of the axis of temperatures."""


class FreeEnergy(NamedTuple):
    r"""Free energies :math:`F(\beta_k) - F(\beta_0)` at the temperatures of a run, arrays ``(temperatures,)``.

    Attributes:
        value: the estimates.
        error: their Monte-Carlo standard errors, by jackknife over chains; NaN of a single chain.
        correction: what the variances have added to the trapezoidal rule, an error of the order of the squared
            distance between temperatures. What is left is of the fourth order: far less where this is small.
    """

    value: np.ndarray
    error: np.ndarray
    correction: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tempering:
    """The draws of chains at several temperatures.

    Attributes:
        nbeta: the inverse temperatures, ``(temperatures,)``.
        loss: the loss of all data at each draw before its step, ``(temperatures, chains, draws)``.
        swap_rate: the mean probability with which neighbouring temperatures have swapped positions, in all turns, those
            of burn-in included, ``(temperatures - 1, chains)``; NaN where there was no turn.
        diverged: for each chain at each temperature the first draw whose loss is not finite, -1 if there is none.
        observables: what else was observed, by name, with first axes of temperatures and chains.
        axes: as of :class:`Samples`.
    """

    nbeta: np.ndarray
    loss: np.ndarray
    swap_rate: np.ndarray
    diverged: np.ndarray
    observables: dict[str, Any]
    axes: dict[str, tuple[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def free_energy(self) -> FreeEnergy:
        r"""The free energies, by thermodynamic integration.

        .. math::
            F(\beta) = -\log \int e^{-\beta L(w)}\,\varphi(w)\,dw, \qquad
            F(\beta_k) - F(\beta_0) = \int_{\beta_0}^{\beta_k} E_\beta[L]\,d\beta
            \approx \sum_{i < k} \frac{h_i}{2}(E_i + E_{i+1}) + \frac{h_i^2}{12}(V_{i+1} - V_i)

        with :math:`\beta` for :math:`n\beta`, the prior :math:`\varphi` of localization and weight decay, the distances
        :math:`h_i` between temperatures, and mean and variance of L at them (Friel, Hurn, Wyse, Improving power
        posterior estimation of statistical evidence, Statistics and Computing 2014). Where :math:`\beta_0` is 0 and
        the prior is normalized, :math:`F(\beta_0)` is 0. Chains that have diverged at some temperature are left out.
        """
        loss = self.loss[:, (self.diverged < 0).all(0)].astype(np.float64)
        count = loss.shape[1]

        def integrals(loss: np.ndarray) -> np.ndarray:
            distance = np.diff(self.nbeta)
            mean, variance = loss.mean((1, 2)), loss.var((1, 2))
            plain = distance / 2 * (mean[1:] + mean[:-1])
            return np.cumsum([np.zeros(2), *np.stack([plain, distance**2 / 12 * np.diff(variance)], 1)], 0)

        if not count:
            none = np.full(len(self.nbeta), np.nan)
            return FreeEnergy(none, none, none)
        plain, correction = integrals(loss).T
        others = loss[None] if count == 1 else [np.delete(loss, chain, 1) for chain in range(count)]
        error = jackknife_error(np.array([integrals(of).sum(1) for of in others]))
        return FreeEnergy(plain + correction, error, correction)

    def to_xarray(self) -> Any:
        """Return the draws as an ``xarray.Dataset``, which arviz reads.

        It is that of :meth:`Samples.to_xarray` with an axis ``nbeta`` of temperatures before that of chains, and with
        ``swap_rate`` among its coordinates, NaN at the last temperature, which has no next one.

        Returns:
            An ``xarray.Dataset``. Its part at one temperature is ``dataset.sel(nbeta=...)``.

        Raises:
            ``ImportError`` without xarray; ``ValueError`` for observables whose names there coincide.

        Examples:
            >>> import jax, jax.numpy as jnp
            >>> from jaxoptim import rules, sampling
            >>> run = sampling.parallel_tempering(
            ...     lambda w: jnp.sum(w**2) / 2, jnp.zeros(4), rules.SGLD(lr=0.1, localization=1.0), nbeta=[0.5, 2.0],
            ...     key=jax.random.key(0), num_chains=3, num_draws=20)
            >>> dict(run.to_xarray()["sampling_loss"].sizes)
            {'nbeta': 2, 'chain': 3, 'draw': 20}
        """
        rate = np.concatenate([self.swap_rate, np.full_like(self.swap_rate[:1], np.nan)])
        about = {"diverged": self.diverged, SWAP_RATE: rate}
        return dataset({"loss": self.loss} | self.observables, self.axes, about, {_SETTINGS: self.nbeta})


def parallel_tempering(
    loss_fn: Callable[..., Any],
    params: Any,
    sampler: SamplerLike,
    data: Any = None,
    *,
    nbeta: Sequence[float],
    lr: Sequence[float] | None = None,
    key: jax.Array,
    num_chains: int = 10,
    num_draws: int = 100,
    num_burnin_steps: int = 0,
    num_steps_bw_draws: int = 1,
    num_steps_bw_swaps: int = 1,
    start_noise: float = 0.0,
    batch_size: int | None = None,
    microbatches: int = 1,
    chain_method: str = "auto",
    mesh: Mesh | None = None,
    observables: Mapping[str, Observable | Callable[[Any], Any]] | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    probes: Mapping[str, Any] | None = None,
    store: str | os.PathLike[str] | None = None,
    until_mcse: float | None = None,
    control_variates: ControlVariates | None = None,
    metropolis: bool = False,
) -> Tempering:
    r"""Run chains at several temperatures that swap their positions, all of them in one compiled program.

    After every ``num_steps_bw_swaps`` steps, chain c at one temperature and chain c at the next one change places with
    the probability :math:`\min(1, e^{(n\beta_i - n\beta_j)(L(w_i) - L(w_j))})`, pairs that begin at an even and at an
    odd temperature taking turns. This leaves :math:`\prod_i e^{-n\beta_i L(w_i)}\varphi(w_i)` as it is, so that chains
    cross barriers at high temperatures, and at the low ones sample the minima by their weights. L is that of all data,
    whatever the steps take. The steps are those of the sampler, and have its error: with ``metropolis=True`` there is
    none.

    Args:
        loss_fn: as for :func:`sample`.
        params: as for :func:`sample`.
        sampler: a rule ``SGLD``; its ``nbeta`` is replaced. (Samplers with momentum have it depend on the position, by
            as much as their steps are long, and are off by several percent if positions alone are swapped.)
        data: arrays, as for :func:`sample` (default None).
        nbeta: the inverse temperatures :math:`n\beta \ge 0`, two at least, each larger than the one before. 0 is the
            prior of localization and weight decay.
        lr: a step size for each temperature (default None: that of the rule). One that is good at one temperature is
            too small at a higher one, a smaller :math:`n\beta`.
        key: a typed JAX key. Each chain at each temperature has noise and batches of its own.
        num_chains: at each temperature, as for :func:`sample` (default 10).
        num_draws: as for :func:`sample` (default 100).
        num_burnin_steps: as for :func:`sample` (default 0).
        num_steps_bw_draws: as for :func:`sample` (default 1).
        num_steps_bw_swaps: steps after which positions are swapped, an int >= 1; each time the loss of all data is
            evaluated, unless ``metropolis`` knows it (default 1).
        start_noise: as for :func:`sample` (default 0).
        batch_size: as for :func:`sample` (default None: all data in every step).
        microbatches: as for :func:`sample` (default 1).
        chain_method: as for :func:`sample` (default ``"auto"``).
        mesh: as for :func:`sample` (default None).
        observables: as for :func:`sample`, of each temperature (default None). A swap between two steps is part of the
            second one.
        progress: as for :func:`sample` (default False).
        checkpoint: as for :func:`sample` (default None).
        probes: as for :func:`sample` (default None).
        store: as for :func:`sample`; the zarr group is that of :meth:`Tempering.to_xarray` (default None).
        until_mcse: as for :func:`sample`, of the mean loss of all data; all temperatures are to have an error no larger
            (default None).
        control_variates: as for :func:`sample` (default None).
        metropolis: as for :func:`sample` (default False).

    Returns:
        :class:`Tempering`.

    Raises:
        As :func:`sample`; ``ValueError`` for temperatures that are not as above, for step sizes of another number, for
        a temperature of 0 without a prior, and for data that are no arrays; ``TypeError`` for another sampler.

    References:
        Geyer, Markov chain Monte Carlo maximum likelihood, 1991. Friel, Pettitt, Marginal likelihood estimation via
        power posteriors, JRSS B 2008.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> run = sampling.parallel_tempering(
        ...     lambda w: jnp.sum(w**2) / 2, jnp.zeros(4), rules.SGLD(lr=0.1, localization=1.0),
        ...     nbeta=[0.0, 0.5, 1.0, 2.0, 3.0], metropolis=True, key=jax.random.key(0), num_chains=20, num_draws=300,
        ...     num_burnin_steps=100)
        >>> found = run.free_energy  # the evidence of a Gaussian: 2 log(1 + nbeta)
        >>> bool(abs(found.value[-1] - 2 * jnp.log(4.0)) < 4 * found.error[-1] + 0.02)
        True
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
        start_noise=start_noise,
        mesh=mesh,
        store=store,
        until_mcse=until_mcse,
        control_variates=control_variates,
        metropolis=metropolis,
        num_steps_bw_swaps=num_steps_bw_swaps,
    )
    check_sampler(sampler)
    given = problem(loss_fn, params, data, options)
    if given.stream is not None:
        raise ValueError("parallel_tempering needs the loss of all data, but data is a stream of batches. Give arrays.")
    if not isinstance(sampler, SGLD):
        raise TypeError(
            f"parallel_tempering is for the rule SGLD, but the sampler is {type(sampler).__name__}, whose state "
            "depends on the position that would be swapped. Give rules.SGLD(lr=...)."
        )
    temperatures = _temperatures(nbeta, sampler)
    changes = {"nbeta": jnp.asarray(temperatures)}
    if lr is not None:
        changes["lr"] = jnp.asarray(_step_sizes(lr, len(temperatures)))
    count = len(temperatures)
    rules = stacked(sampler, count, **changes)
    prepared = prepare(given, sampler, rules, count, options, {_SETTINGS: temperatures})
    found = arranged_in((count, num_chains), observed(prepared))
    loss, rate = found.pop("loss"), found.pop(SWAP_RATE)[:-1]
    return Tempering(temperatures, loss, rate, first_divergence(loss), found, options.axes)


def _temperatures(nbeta: Any, sampler: Any) -> np.ndarray:
    """Check the temperatures, and return them."""
    found = np.asarray(nbeta, float)
    is_list = found.ndim == 1 and len(found) >= 2
    if not is_list or not np.isfinite(found).all() or found[0] < 0 or (np.diff(found) <= 0).any():
        raise ValueError(
            f"Invalid nbeta: {found.tolist()!r:.200}. It is a list of two or more finite numbers >= 0, each larger "
            "than the one before."
        )
    if found[0] == 0 and not _has_prior(sampler):
        raise ValueError("nbeta begins with 0, where chains sample the prior, but there is none. Give localization.")
    return found


def _has_prior(sampler: Any) -> bool:
    """Return whether a rule pulls its parameters to a point, or keeps them in a box."""
    pulls = [getattr(sampler, name, 0.0) for name in ("weight_decay", "localization", "bounding_box_size")]
    return any(pull is not None and enabled(pull) for pull in pulls)


def _step_sizes(lr: Any, count: int) -> np.ndarray:
    """Check the step sizes, and return them."""
    found = np.asarray(lr, float)
    if found.shape != (count,) or not (found >= 0).all():
        given = f"{found.tolist()!r:.200}"
        raise ValueError(f"Invalid lr: {given}. It is a list of {count} numbers >= 0, one for each nbeta.")
    return found
