"""Local learning coefficients."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxoptim.core import Rule
from jaxoptim.core.batches import size_of
from jaxoptim.sampling import diagnostics
from jaxoptim.sampling.control_variates import ControlVariates
from jaxoptim.sampling.doubts import Evidence, Statistics, divergence, doubts, fall_to_warn_of, statistics, warn
from jaxoptim.sampling.labelled import dataset
from jaxoptim.sampling.minimum import descent, full_gradient, full_loss
from jaxoptim.sampling.observables import Observable
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.run import SamplerLike, arranged_in, check_sampler, observed, prepare, stacked
from jaxoptim.sampling.sample import first_divergence
from jaxoptim.sampling.selections import named_selections, stacked_masks
from jaxoptim.sampling.streams import NUM_REFERENCES
from jaxoptim.sampling.target import Problem, problem


def default_nbeta(n: float) -> float:
    r"""The inverse temperature of the WBIC, :math:`n\beta = n/\log n`.

    Args:
        n: the number of data; more than e. devinterp takes the batch size for it.

    Returns:
        :math:`n / \log n`.

    Raises:
        ``ValueError`` for n of at most e, where it does not grow.

    References:
        Watanabe, A widely applicable Bayesian information criterion, JMLR 2013.

    Examples:
        >>> from jaxoptim.sampling import default_nbeta
        >>> round(default_nbeta(1797), 1)
        239.8
    """
    if not n > math.e:
        raise ValueError(f"n/log n is a temperature for n > {math.e:.2f}, but n is {n!r}. Give nbeta yourself.")
    return n / math.log(n)


@dataclasses.dataclass(frozen=True)
class LLC:
    r"""Estimates of the local learning coefficient :math:`\hat\lambda = n\beta\,(E[L] - L(w^*))`.

    With a list of selections every array has a first axis of selections.

    Attributes:
        loss: the loss at each draw, ``(chains, draws)``.
        init_loss: :math:`L(w^*)`.
        nbeta: :math:`n\beta`.
        diverged: for each chain the first draw whose loss is not finite, -1 if there is none. Means and errors leave
            such chains out.
        observables: what else was observed.
        names: of the selections, None if they have none.
        axes: as of :class:`Samples`.
    """

    loss: np.ndarray
    init_loss: float
    nbeta: float
    diverged: np.ndarray
    observables: dict[str, Any]
    names: tuple[str, ...] | None = None
    axes: dict[str, tuple[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        """The estimate in a line, its numbers in three digits; mcse and R-hat as far as they are known."""
        chains, draws = self.loss.shape[-2:]
        lost = (self.diverged >= 0).sum()
        of_each, several = self._statistics(), self.loss.ndim == 3
        shown = []
        for name in ("mean", "mcse", "rhat"):
            numbers = [f"{getattr(x, name):#.3g}".rstrip(".") for x in of_each]
            if set(numbers) == {"nan"} and name != "mean":
                continue
            if several and self.names is not None:
                numbers = [f"{name}: {number}" for name, number in zip(self.names, numbers, strict=True)]
            shown.append(f"{name}={'[' + ', '.join(numbers) + ']' if several else numbers[0]}")
        end = f", {lost} of them diverged" if lost else ""
        return f"LLC({', '.join(shown)}, {chains} chains of {draws} draws{end})"

    @property
    def trace(self) -> np.ndarray:
        r""":math:`n\beta\,(L - L(w^*))` at each draw, ``(chains, draws)``."""
        return self.nbeta * (self.loss - self.init_loss)

    @property
    def per_chain(self) -> np.ndarray:
        """The estimate of each chain, ``(chains,)``; NaN where it has diverged."""
        return np.where(self.diverged < 0, np.where(np.isfinite(self.trace), self.trace, 0).mean(-1), np.nan)

    @property
    def mean(self) -> Any:
        """The pooled estimate: the mean of the chains."""
        return _plain(self._each(lambda trace: trace.mean(-1).mean()))

    @property
    def std(self) -> Any:
        """The standard deviation between chains (divisor ``chains - 1``); NaN of a single one."""
        return _plain(self._each(lambda trace: trace.mean(-1).std(ddof=1) if len(trace) > 1 else math.nan))

    @property
    def mcse(self) -> Any:
        """The Monte-Carlo standard error of :attr:`mean`, from the effective sample size (needs numpyro)."""
        return _plain(self._each(diagnostics.mcse))

    @property
    def rhat(self) -> Any:
        r"""The split :math:`\hat R` of the loss (needs numpyro)."""
        return _plain(self._each(diagnostics.rhat))

    @property
    def effective_sample_size(self) -> Any:
        """The number of independent draws of the loss (needs numpyro)."""
        return _plain(self._each(diagnostics.effective_sample_size))

    def _statistics(self) -> list[Statistics]:
        """Mean, error, R-hat and effective sample size of each selection, NaN where one is not known."""
        return [statistics(trace) for trace in self._good_traces()]

    def _each(self, of: Callable[[np.ndarray], Any]) -> np.ndarray:
        """A number for each selection, from the traces of its chains that have not diverged."""
        values = [of(trace) if len(trace) else math.nan for trace in self._good_traces()]
        return np.asarray(values, np.float64).reshape(self.diverged.shape[:-1])

    def _good_traces(self) -> list[np.ndarray]:
        """The traces of each selection, of its chains that have not diverged."""
        good = self.diverged.reshape(-1, self.diverged.shape[-1]) < 0
        traces = self.trace.reshape(*good.shape, self.loss.shape[-1])
        return [trace[keep] for trace, keep in zip(traces, good, strict=True)]

    def plot(self, *, ax: Any = None) -> Any:
        """Draw the trace of each chain and the pooled running mean with matplotlib.

        Args:
            ax: the matplotlib ``Axes`` to draw on (default None: new ones).

        Returns:
            The ``Axes``.

        Raises:
            ``ImportError`` without matplotlib; ``ValueError`` for several selections: index them first.

        Examples:
            See :func:`estimate_llc`.
        """
        from jaxoptim.sampling.plotting import plot_traces

        return plot_traces(self, ax)

    def to_xarray(self) -> Any:
        r"""Return the estimate's draws as an ``xarray.Dataset``, which arviz reads.

        It is that of :meth:`Samples.to_xarray`, with ``init_loss`` among its coordinates, and with a variable ``llc``
        ``(chain, draw)``: :attr:`trace`, whose mean is the estimate. Several selections are an axis ``selection``
        before that of chains, with their names. :math:`n\beta` is the attribute ``nbeta``.

        Returns:
            An ``xarray.Dataset``. ``arviz.summary(dataset, var_names="llc")`` has mean, error and R-hat.

        Raises:
            ``ImportError`` without xarray; ``ValueError`` for observables whose names there coincide.

        Examples:
            >>> import jax, jax.numpy as jnp
            >>> from jaxoptim import rules, sampling
            >>> llc = sampling.estimate_llc(lambda w: jnp.sum(w**2) / 2, jnp.zeros(10), rules.SGLD(lr=1e-3),
            ...                             nbeta=100.0, key=jax.random.key(0), num_draws=1000)
            >>> found = llc.to_xarray()
            >>> dict(found["llc"].sizes), bool(abs(found["llc"].mean() - llc.mean) < 1e-6)
            ({'chain': 10, 'draw': 1000}, True)
        """
        about = {"diverged": self.diverged, "init_loss": self.init_loss}
        first = selection_axis(self.loss.shape[0], self.names) if self.loss.ndim == 3 else {}
        traces, values = {"llc": self.trace}, {"loss": self.loss} | self.observables
        return dataset(values, self.axes, about, first, traces, {"nbeta": self.nbeta})

    def __getitem__(self, selection: int | str) -> LLC:
        """The estimate of one of several selections, by its number or its name."""
        if self.loss.ndim == 2:
            raise TypeError("This is the estimate of one selection, which has no parts.")
        if isinstance(selection, str):
            if self.names is None or selection not in self.names:
                raise KeyError(f"There is no selection {selection!r}. Their names are {self.names}.")
            selection = self.names.index(selection)
        parts = jax.tree.map(lambda x: x[selection], (self.loss, self.diverged, self.observables))
        return LLC(parts[0], self.init_loss, self.nbeta, parts[1], parts[2], axes=self.axes)


def selection_axis(count: int, names: tuple[str, ...] | None) -> dict[str, Any]:
    """The axis of selections with its labels: their names, or their numbers."""
    return {"selection": list(names) if names is not None else np.arange(count)}


def estimate_llc(
    loss_fn: Callable[..., Any],
    params: Any,
    sampler: SamplerLike,
    data: Any = None,
    *,
    nbeta: float | None = None,
    key: jax.Array,
    init_loss: float | None = None,
    selections: Sequence[Any] | Mapping[str, Any] | None = None,
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
    until_mcse: float | None = None,
    control_variates: ControlVariates | None = None,
    metropolis: bool = False,
) -> LLC:
    r"""Estimate the local learning coefficient at ``params`` from chains that start there.

    .. math::
        \hat\lambda(w^*) = n\beta\,\left(E_w[L(w)] - L(w^*)\right), \qquad
        p(w) \propto \exp\left(-n\beta\,L(w) - \tfrac{\gamma}{2}\|w - w^*\|^2\right)

    A ``center`` of the sampler takes the place of :math:`w^*` in the localization.

    Args:
        loss_fn: ``loss_fn(params)``, or ``loss_fn(params, batch)`` where there are data: the mean loss L.
        params: :math:`w^*`, where every chain begins: arrays or a module, as for :func:`sample`.
        sampler: a rule, whose ``nbeta`` is replaced, such as ``rules.SGLD(lr=1e-4, localization=100.0)``; or a
            transformation, which has its ``nbeta`` already.
        data: a pytree of arrays whose first axes run over the data, an iterable of batches, or a function
            ``key -> batch``, as for :func:`sample` (default None).
        nbeta: :math:`n\beta > 0` (default None: the rule's own if that is not 1, else :func:`default_nbeta` of the
            number of data, which an iterable and a function do not tell).
        key: a typed JAX key.
        init_loss: :math:`L(w^*)` (default None: the loss over all data, in batches of ``batch_size``, weighted by
            their sizes; of an iterable over its first 32 batches, those of its first epoch at the most, which stay on
            the host; of a function over 32 batches of keys of their own. They stand for all data in the warnings too.
            Where you have the loss of all data, give it).
        selections: refined coefficients, of chains that move some parameters only: a list of masks (see
            ``optimize_over`` of :class:`jaxoptim.rules.SGLD`), such as those of :func:`restriction`, or of regular
            expressions and predicates of the dotted path that select whole arrays; all of them in one program. Arrays
            that none of them selects are one copy for all chains, as :func:`sample` says. A mapping gives them names
            (default None: all parameters).
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
        until_mcse: as for :func:`sample`, but of the estimate, :attr:`LLC.mcse`; of selections all are to have an error
            no larger (default None).
        control_variates: as for :func:`sample` (default None).
        metropolis: as for :func:`sample` (default False).

    Returns:
        :class:`LLC`. With draws of burn-in too few, the estimate is too low: the chains begin at the minimum.

    Raises:
        As :func:`sample`, and before the loss is evaluated; ``TypeError`` for a rule without ``nbeta``, and for
        selections of a transformation; ``ValueError`` without ``nbeta`` and data, for a number out of range, and for a
        selection that selects nothing, or a mask that does not fit; ``FloatingPointError`` if all chains of a selection
        diverge.

    Warns:
        :class:`LLCWarning`, once for each of these reasons, with the selections that it is about:

        - Chains have diverged. They are left out, and the warning says at which draws.
        - ``params`` is far from a minimum: some step down the gradient over all data, of a length that follows from the
          gradient, lowers the potential :math:`n\beta L + \tfrac{\gamma}{2}\|w - w^*\|^2` by more than a fifth of the
          estimate (a fifth of 1/2 at least, the coefficient of one regular parameter). By as much or more the
          estimate is too low. It costs a gradient and two losses over all data, in batches.
        - The estimate is below zero by more than three of its standard errors.
        - :math:`\hat R` is above 1.1.
        - The effective sample size is below 100, there are fewer than four draws, or the loss is the same at all.

        The last three need numpyro (but for a number of draws below four), and are left out without it.
        ``warnings.filterwarnings("ignore", category=sampling.LLCWarning)`` silences all.

    References:
        Lau, Furman, Wang, Murfet, Wei, The local learning coefficient: a singularity-aware complexity measure, 2023.
        Wang, Hoogland, van Wingerden, Furman, Murfet, Differentiation and specialization of attention heads via the
        refined local learning coefficient, 2024.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> llc = sampling.estimate_llc(lambda w: jnp.sum(w**2) / 2, jnp.zeros(10), rules.SGLD(lr=1e-3), nbeta=100.0,
        ...                             key=jax.random.key(0), num_chains=8, num_draws=1000, num_burnin_steps=200)
        >>> abs(llc.mean - 5.13) < 4 * llc.mcse, llc.per_chain.shape
        (True, (8,))
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
        until_mcse=until_mcse,
        control_variates=control_variates,
        metropolis=metropolis,
    )
    check_sampler(sampler)
    given = problem(loss_fn, params, data, options, NUM_REFERENCES)
    names, chosen = named_selections(selections, sampler)
    masks = None if chosen is None else stacked_masks(chosen, given.arrays)
    several, lines = estimated("estimate_llc", given, sampler, options, nbeta, init_loss, names, masks)
    warn(lines, stacklevel=2)
    return several if masks is not None else several[0]


def estimated(
    caller: str,
    given: Problem,
    sampler: SamplerLike,
    options: RunOptions,
    nbeta: Any,
    init_loss: Any,
    names: tuple[str, ...] | None,
    masks: Any,
) -> tuple[LLC, list[str]]:
    """The estimates of selections from one run, with an axis of selections, and the reasons to doubt them.

    Args:
        caller: what messages call the function that asks.
        given: what is sampled.
        sampler: the rule, or the transformation.
        options: the keywords of the run.
        nbeta: as for :func:`estimate_llc`.
        init_loss: as for :func:`estimate_llc`.
        names: of the selections, None if they have none.
        masks: of the selections, stacked; None for one of all that the sampler moves.
    """
    ((several, known),) = estimates(caller, given, sampler, options, nbeta, [("params", init_loss)], names, masks)
    labels = None if masks is None else selection_labels(len(several.loss), names)
    return several, divergence(several.diverged, labels) + doubts(known, several.loss.shape[-1], labels)


def estimates(
    caller: str,
    given: Problem,
    sampler: SamplerLike,
    options: RunOptions,
    nbeta: Any,
    init_losses: Sequence[tuple[str, Any]],
    names: tuple[str, ...] | None,
    masks: Any,
) -> list[tuple[LLC, list[Evidence]]]:
    """Return the estimates at each starting point of one run, with an axis of selections, and the evidence on each.

    Args:
        caller: as for :func:`estimated`.
        given: what is sampled; of its points those beyond ``init_losses`` are left out of the result.
        sampler: as for :func:`estimated`.
        options: as for :func:`estimated`.
        nbeta: as for :func:`estimated`.
        init_losses: what messages call each point, and its :math:`L(w^*)`, None for the loss of all data there.
        names: as for :func:`estimated`.
        masks: as for :func:`estimated`.
    """
    nbeta = temperature(caller, nbeta, sampler, given)
    for _, init_loss in init_losses:
        check_initial_loss(init_loss)
    if options.until_mcse is not None:  # that of the mean loss, as a run knows it
        options = dataclasses.replace(options, until_mcse=options.until_mcse / nbeta)
    count = 1 if masks is None else len(jax.tree.leaves(masks)[0])
    rules = tempered(sampler, count, nbeta, **({} if masks is None else {"optimize_over": masks}))
    prepared, size = prepare(given, sampler, rules, count, options), options.size_at_once(given.example)
    points = [(given.at_start(at), *of) for at, of in enumerate(init_losses)]
    starts = [initial_loss(init_loss, one, size, where) for one, where, init_loss in points]
    seen = arranged_in((given.num_starts or 1, count, options.num_chains), observed(prepared))
    eps, loss = float(jnp.finfo(seen["loss"].dtype).eps), seen.pop("loss").astype(np.float64)
    found = []
    for at, (start, (one, _, _)) in enumerate(zip(starts, points, strict=True)):
        own = jax.tree.map(lambda x, at=at: x[at], seen)
        several = LLC(loss[at], start, nbeta, first_divergence(loss[at]), own, names, options.axes)
        found.append((several, evidence(several, eps, one, rules, size)))
    return found


def selection_labels(count: int, names: tuple[str, ...] | None) -> list[str]:
    """Return the labels of selections in messages."""
    return [f"selection {name!r}" for name in names or range(count)]


def evidence(several: LLC, eps: float, given: Problem, rules: Any, batch_size: int | None) -> list[Evidence]:
    """Return the evidence on the estimate of each selection.

    Args:
        several: the estimates, with an axis of selections.
        eps: the resolution of the losses as they were computed.
        given: the problem, whose parameters are those where the chains began.
        rules: the settings of the sampler, stacked; None for a transformation.
        batch_size: how many data the loss gets at once.
    """
    least = float(np.nanmin(abs(several.loss), initial=np.inf))
    rounding = 8 * eps * several.nbeta * max(abs(several.init_loss), least)
    gradient, found = full_gradient(given, batch_size), []
    for i, of in enumerate(several._statistics()):
        wanted = fall_to_warn_of(of.mean) + rounding
        found.append(
            Evidence(of, *descent(given, rules, i, several.nbeta, gradient, wanted, batch_size), rounding=rounding)
        )
    return found


def temperature(caller: str, nbeta: Any, sampler: SamplerLike, given: Problem) -> float:
    """Return the inverse temperature: the one given, here or to the rule, or the default for the number of data."""
    own = getattr(sampler, "nbeta", 1.0)
    if nbeta is None and (callable(own) or np.ndim(own) or own != 1.0):
        nbeta = own
    if nbeta is None:
        if given.stream is not None:
            raise ValueError(
                f"{caller} cannot count the data of {given.stream.kind}: give nbeta, such as default_nbeta(n)."
            )
        if given.given.data is None:
            raise ValueError(f"{caller} has no data to count: give nbeta, such as default_nbeta(n).")
        return default_nbeta(size_of(given.given.data))
    if not _is_number(nbeta) or not 0 < nbeta < math.inf:
        raise ValueError(f"Invalid nbeta: {nbeta!r:.80}. It is a finite number > 0; a coefficient has one temperature.")
    return float(nbeta)


def check_initial_loss(init_loss: Any) -> None:
    """Raise for an initial loss that is no valid loss to compare with."""
    if init_loss is not None and (not _is_number(init_loss) or not math.isfinite(init_loss)):
        raise ValueError(
            f"Invalid init_loss: {init_loss!r:.80}. It is a finite number, with which the losses are compared, or None "
            "for the loss of all data at params."
        )


def initial_loss(init_loss: Any, given: Problem, batch_size: int | None, where: str = "params") -> float:
    """Return the loss to compare with: the one given, or that of all data at the parameters, named so in messages."""
    value = full_loss(given, given.arrays, batch_size) if init_loss is None else float(init_loss)
    if not math.isfinite(value):
        raise ValueError(
            f"The loss of all data at {where} is {value}, with which no other loss can be compared. Give params and "
            "data at which it is finite."
        )
    return value


def _is_number(x: Any) -> bool:
    """Return whether an object is one real number."""
    is_array = isinstance(x, np.ndarray | np.generic | jax.Array)
    return (is_array and np.ndim(x) == 0 and x.dtype.kind in "fiu") or (
        isinstance(x, int | float) and not isinstance(x, bool)
    )


def tempered(sampler: SamplerLike, count: int, nbeta: float, **changes: Any) -> Any:
    """Settings of a rule at an inverse temperature."""
    if not isinstance(sampler, Rule):
        if changes:
            raise TypeError(f"{', '.join(changes)} can be set in a rule only, but the sampler is a transformation.")
        return None
    if lacking := [name for name in ("nbeta", *changes) if name not in sampler.specs]:
        raise TypeError(f"{type(sampler).__name__} has no {', '.join(lacking)}. Give a sampler: SGLD, SGNHT, ...")
    return stacked(sampler.replace(nbeta=nbeta), count, **changes)


def _plain(x: np.ndarray) -> Any:
    """Return one number as a float, several as an array."""
    return float(x) if np.ndim(x) == 0 else x
