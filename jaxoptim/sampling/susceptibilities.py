"""Susceptibilities: the response of parts of a model to more weight on some data."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxoptim.core.batches import size_of
from jaxoptim.core.loss import LossFunctions
from jaxoptim.core.precision import widened
from jaxoptim.sampling.control_variates import ControlVariates
from jaxoptim.sampling.doubts import warn
from jaxoptim.sampling.excess import Alone, ExcessLosses, ExcessMoments
from jaxoptim.sampling.jackknife import jackknife_error
from jaxoptim.sampling.llc import LLC, estimated
from jaxoptim.sampling.losses import Losses
from jaxoptim.sampling.observables import Observable
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.response import Response
from jaxoptim.sampling.run import SamplerLike, check_sampler
from jaxoptim.sampling.selections import named_selections, stacked_masks
from jaxoptim.sampling.streams import NUM_REFERENCES
from jaxoptim.sampling.target import Given, Target, problem

BASELINES = ("full", "component")
_NAME, _ALL = "susceptibilities", "full"


@dataclasses.dataclass(frozen=True)
class Susceptibilities:
    r"""The susceptibilities of selections of parameters to data.

    Attributes:
        chi: by probe :math:`\chi_x` of each selection and datum, ``(selections, N, ...)``, with further axes, such as
            one of tokens, as ``loss_of_each`` returns them.
        std_error: the standard error of each, by jackknife over chains, of the same shapes; NaN of a single chain.
        response: how the selections answer to whole probes: a column for each, the mean of :math:`\chi_x` over it,
            with its own error.
        names: of the selections, by number where they have none.
        baseline: which mean loss of a datum its losses are compared with.
        llc: the local learning coefficients of the same chains. Where the chains of all parameters were run beside
            those of the selections, they come last, as ``"full"``.
    """

    chi: dict[str, np.ndarray]
    std_error: dict[str, np.ndarray]
    response: Response
    names: tuple[str, ...]
    baseline: str
    llc: LLC

    def __repr__(self) -> str:
        """The response to each probe in three digits, and its error in two."""
        shown = []
        for probe, values, errors in zip(self.chi, self.response.matrix.T, self.response.std_error.T, strict=True):
            of_each = zip(self.names[:5], values[:5], errors[:5], strict=True)
            some = [f"{name}: {value:.3g} +- {error:.2g}" for name, value, error in of_each]
            more = [f"{len(self.names) - 5} more"] if len(self.names) > 5 else []
            shown.append(f"{probe}=[{', '.join(some + more)}]")
        chains, draws = self.llc.loss.shape[-2:]
        return f"Susceptibilities({', '.join(shown)}, baseline={self.baseline!r}, {chains} chains of {draws} draws)"

    @property
    def response_of_each(self) -> Response:
        """The response to each datum: those of all probes, and their further axes, one after the other as columns."""
        matrix, error = (
            np.concatenate([x.reshape(len(self.names), -1) for x in found.values()], 1)
            for found in (self.chi, self.std_error)
        )
        columns = [
            f"{probe}[{', '.join(map(str, index))}]"
            for probe, x in self.chi.items()
            for index in np.ndindex(*x.shape[1:])
        ]
        return Response(matrix, error, self.names, tuple(columns))


def susceptibilities(
    loss_fn: Callable[..., Any],
    params: Any,
    sampler: SamplerLike,
    data: Any = None,
    *,
    probes: Mapping[str, Any],
    loss_of_each: Callable[[Any, Any], Any] | None = None,
    selections: Sequence[Any] | Mapping[str, Any] | None = None,
    baseline: str = "full",
    reference: str | None = None,
    nbeta: float | None = None,
    key: jax.Array,
    num_chains: int = 10,
    num_draws: int = 100,
    num_burnin_steps: int = 0,
    num_steps_bw_draws: int = 1,
    start_noise: float = 0.0,
    batch_size: int | None = None,
    probe_batch_size: int | None = None,
    microbatches: int = 1,
    same_batches: bool = False,
    chain_method: str = "auto",
    mesh: Mesh | None = None,
    observables: Mapping[str, Observable | Callable[[Any], Any]] | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    control_variates: ControlVariates | None = None,
    metropolis: bool = False,
) -> Susceptibilities:
    r"""Estimate the susceptibility of parts of a model to each datum, from chains that move one part only.

    .. math::
        \chi_x = -\left(E_C[\varphi\,\Delta_x] - E_C[\varphi]\,E[\Delta_x]\right), \qquad
        \varphi = L(w) - L(w^*), \quad \Delta_x = \ell_x(w) - L(w)

    :math:`E_C` is over chains that move the parameters of the selection C alone, and E over chains that move all of
    them (``baseline="full"``), or :math:`E_C` too: then :math:`\chi_x = -\mathrm{Cov}_C(\varphi, \Delta_x)`
    (``baseline="component"``). There is no factor :math:`n\beta`: of all parameters it is
    :math:`\tfrac{1}{n\beta} \tfrac{d}{dh} E[\varphi]` where the loss is :math:`(1 - h) L + h\,\ell_x`. It is negative
    where more weight on x holds the part closer to its minimum.

    All draws are used as they come: the chains keep three numbers for each loss of the probes, and no traces.

    Args:
        loss_fn: as for :func:`estimate_llc`.
        params: as for :func:`estimate_llc`.
        sampler: as for :func:`estimate_llc`.
        data: as for :func:`estimate_llc` (default None).
        probes: by name the data x, each a pytree of arrays whose first axes run over its data. Other data of the same
            shapes compile nothing anew.
        loss_of_each: ``loss_of_each(params, batch)`` returns :math:`\ell_x` of each x of a batch, an array whose first
            axis runs over it; as for :class:`Losses` (default None: ``loss_fn`` of each datum as a batch of its own).
        selections: the parts of the model, as for :func:`estimate_llc` (default None: all parameters, as one).
        baseline: ``"full"`` or ``"component"`` (default ``"full"``, which also runs chains of all parameters, unless a
            selection is that). With the former a part's answer holds what x does to the whole model, and for small
            parts that is most of it: with the same curvature everywhere its sign is the other one.
        reference: the name of the probe whose mean loss L is; with batches a pass over that in each draw takes the
            place of one over all data (default None: L is ``loss_fn`` of all data, exact in each draw).
        nbeta: as for :func:`estimate_llc` (default None: the rule's own, or that of the number of data).
        key: a typed JAX key. Chain c of all selections has the same noise.
        num_chains: as for :func:`sample` (default 10).
        num_draws: as for :func:`sample`, at least 2 (default 100).
        num_burnin_steps: as for :func:`sample` (default 0).
        num_steps_bw_draws: as for :func:`sample` (default 1).
        start_noise: as for :func:`sample` (default 0).
        batch_size: as for :func:`sample` (default None: all data in every step).
        probe_batch_size: how many data of a probe are evaluated at once, an int >= 1 (default None: all).
        microbatches: as for :func:`sample` (default 1).
        same_batches: as for :func:`sample` (default False).
        chain_method: as for :func:`sample` (default ``"auto"``).
        mesh: as for :func:`sample` (default None).
        observables: as for :func:`sample` (default None); the results are in ``llc.observables``.
        progress: as for :func:`sample` (default False).
        checkpoint: as for :func:`sample` (default None).
        control_variates: as for :func:`sample` (default None). They make chains better, not :math:`\varphi`, which is
            of all data, or of ``reference``, in any case.
        metropolis: as for :func:`sample` (default False).

    Returns:
        :class:`Susceptibilities`, whose means and errors leave out chains that have diverged. Means are over all draws
        of all chains, and covariances have the divisor of their number less one.

    Raises:
        As :func:`estimate_llc`; ``ValueError`` for an unknown ``baseline`` or ``reference``, for no probes, for a
        single draw, and for a selection of a part that is called ``"full"``; ``TypeError`` for what is no function.

    Warns:
        :class:`LLCWarning`, as :func:`estimate_llc`, and where losses of probes are not finite.

    References:
        Baker, Wang, Hoogland, Murfet, Structural inference: interpreting small language models with susceptibilities,
        2025. Wang, Murfet, Patterning: the dual of interpretability, 2026.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> def loss(w):
        ...     return jnp.sum(w**2) / 2
        >>> def loss_of_each(w, scales):
        ...     return scales * loss(w)
        >>> found = sampling.susceptibilities(
        ...     loss, jnp.zeros(10), rules.SGLD(lr=1e-3), nbeta=100.0, key=jax.random.key(0), num_chains=8,
        ...     num_draws=1000, num_burnin_steps=200, probes={"scales": jnp.array([0.0, 1.0, 3.0])},
        ...     loss_of_each=loss_of_each, selections={"two": jnp.arange(10) < 2}, baseline="component")
        >>> exact = -jnp.array([-1.0, 0.0, 2.0]) / (100 * (1 - 0.1 / 4)) ** 2  # -(scale - 1) * d / 2 * variance**2
        >>> bool((abs(found.chi["scales"][0] - exact) <= 4 * found.std_error["scales"][0]).all())
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
        same_batches=same_batches,
        start_noise=start_noise,
        mesh=mesh,
        control_variates=control_variates,
        metropolis=metropolis,
    )
    check_sampler(sampler)
    given = problem(loss_fn, params, data, options, NUM_REFERENCES)
    _check(baseline, reference, options, given.stream is not None)
    losses = _losses(loss_fn, loss_of_each, probe_batch_size, options.probes, given.given.data is not None)
    names, chosen = named_selections(selections, sampler)
    asked: tuple[str, ...] = (_ALL,)
    base: int | None = 0
    masks = None
    if chosen is not None:
        asked = names or tuple(map(str, range(len(chosen))))
        names, masks, base = _with_all(asked, chosen, given.arrays, baseline)
    watched = {**(options.observables or {}), _NAME: ExcessLosses(losses, reference)}
    options = dataclasses.replace(options, observables=watched)
    llc, lines = estimated("susceptibilities", given, sampler, options, nbeta, None, names, masks)
    moments, good = llc.observables.pop(_NAME), llc.diverged < 0
    init_loss = llc.init_loss if reference is None else _mean_loss(_of(reference, losses), *given[:3])
    chi, std_error, of_probes = {}, {}, []
    for probe in options.probes or {}:
        of = moments[probe]
        mean = jax.tree.map(lambda x: x.reshape(*good.shape, -1).mean(2, dtype=np.float64), of)
        rest = float(init_loss), good, options.num_draws, base, len(asked)
        chi[probe], std_error[probe] = _chi(of, *rest)
        of_probes.append(_chi(mean, *rest))
        if lost := int((~np.isfinite(chi[probe])).any(0).sum()):
            lines.append(
                f"{lost} losses of the probe {probe!r} are not finite at some draws, and their susceptibilities are "
                "NaN. Leave these data out, or try a smaller lr."
            )
    warn(lines, stacklevel=2)
    matrix, error = (np.stack(columns, 1) for columns in zip(*of_probes, strict=True))
    response = Response(matrix, error, asked, tuple(chi))
    return Susceptibilities(chi, std_error, response, asked, baseline, llc if chosen is not None else llc[0])


def _check(baseline: Any, reference: Any, options: RunOptions, has_stream: bool) -> None:
    """Raise for an invalid baseline or probe, and for draws that have no covariance."""
    if baseline not in BASELINES:
        raise ValueError(f"Invalid baseline: {baseline!r}. It is one of {', '.join(map(repr, BASELINES))}.")
    if not options.probes:
        raise ValueError("There are no probes, the data x of the susceptibilities. Give probes={name: data}.")
    if reference is not None and reference not in list(options.probes):
        there = ", ".join(map(repr, options.probes))
        raise ValueError(f"Invalid reference: {reference!r}. It is one of the probes, {there}, or None.")
    if reference is None and has_stream:
        raise ValueError(
            "The loss of all data is asked for at each draw, but data come in batches that are not kept. Give "
            "reference=, the probe whose mean loss takes its place."
        )
    if options.num_draws < 2:
        raise ValueError(f"Invalid num_draws: {options.num_draws}. Covariances are of two draws at least.")
    if _NAME in (options.observables or {}):
        raise ValueError(f"observables: the name {_NAME!r} is taken. Choose another one.")


def _losses(loss_fn: Any, loss_of_each: Any, size: Any, probes: Any, has_data: bool) -> tuple[Losses, ...]:
    """Return the observables of each probe's losses; raise for anything but a function or a number of data."""
    if loss_of_each is None and not has_data:
        raise ValueError(
            "There are no data, so that loss_fn takes no batch and has no loss of each x. Give "
            "loss_of_each=, a function of the parameters and a batch of x."
        )
    if loss_of_each is not None and not callable(loss_of_each):
        raise TypeError(
            f"loss_of_each is a function, but got {type(loss_of_each).__name__}. Give loss_of_each(params, batch), or "
            "None for loss_fn of each datum alone."
        )
    LossFunctions("susceptibilities", "susceptibilities(loss_fn, params, sampler, data, ...)").check(loss_of_each)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1):
        raise ValueError(f"Invalid probe_batch_size: {size!r}. It is an int >= 1, or None for all data of a probe.")
    of_each = Alone(loss_fn) if loss_of_each is None else loss_of_each
    return tuple(
        Losses(of_each, name, None if size is None else min(int(size), size_of(data))) for name, data in probes.items()
    )


def _of(probe: str, losses: Sequence[Losses]) -> Losses:
    """The losses of one probe."""
    return next(of for of in losses if of.probe == probe)


def _with_all(
    names: tuple[str, ...], selections: list[Any], arrays: Any, baseline: str
) -> tuple[tuple[str, ...], Any, int | None]:
    """Return the selections to run, as names and masks, and the number of the one used as baseline.

    Chains of all parameters are run last, if the baseline needs them and no selection is that. Without a number the
    baseline is each selection's own.
    """
    masks = stacked_masks(selections, arrays)
    if baseline == "component":
        return names, masks, None
    whole = [i for i in range(len(selections)) if all(bool(mask[i].all()) for mask in jax.tree.leaves(masks))]
    if whole:
        return names, masks, whole[0]
    if _ALL in names:
        raise ValueError(
            f"selections: {_ALL!r} is the name of all parameters, whose chains the baseline needs, but this selection "
            "is a part. Give it another name."
        )
    return (*names, _ALL), stacked_masks([*selections, True], arrays), len(selections)


@functools.partial(jax.jit, static_argnames=("losses", "target"))
def _mean_loss(losses: Losses, target: Target, arrays: Any, given: Given) -> jax.Array:
    """The mean loss of a probe."""
    return jnp.mean(widened(losses.value(lambda: target.params(arrays, given.rest), given.probes or {})))


def _chi(
    of: ExcessMoments, init_loss: float, good: np.ndarray, draws: int, base: int | None, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The susceptibilities of the first selections, and their standard errors.

    Args:
        of: the moments, ``(selections, chains, ...)``.
        init_loss: the loss where the chains began.
        good: which chains count, ``(selections, chains)``.
        draws: of each chain.
        base: the number of the selection behind the baseline; None for each one's own.
        count: how many selections.
    """

    def excess_of(i: int) -> np.ndarray:
        return np.asarray(of.excess[i] + np.asarray(of.moments.y[i], np.float64))

    values, errors = [], []
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # of losses that are not finite
        whole = None if base is None else excess_of(base)
        for i in range(count):
            loss, excess = of.loss[i] + np.asarray(of.moments.x[i], np.float64) - init_loss, excess_of(i)
            axes = (-1, *[1] * (excess.ndim - 1))
            own, other = (flags.reshape(axes) for flags in (good[i], good[i if base is None else base]))
            loss = loss.reshape(axes)
            each = [np.where(own, x, 0.0) for x in (1.0, loss, excess, of.moments.products[i], loss * excess)]
            each += [np.where(other, x, 0.0) for x in (1.0, excess if whole is None else whole)]
            sums = [x.sum(0, dtype=np.float64) for x in each]
            values.append(_of_sums(*sums, draws=draws))
            others = _of_sums(*(total - x for total, x in zip(sums, each, strict=True)), draws=draws)
            errors.append(jackknife_error(others[(own | other).reshape(-1)]))
    return np.stack(values), np.stack(errors)


def _of_sums(
    chains: Any, loss: Any, excess: Any, products: Any, both: Any, base_chains: Any, base_excess: Any, *, draws: int
) -> Any:
    """The susceptibility from sums over chains: of means, of products of deviations from them, of products of means."""
    covariance = (products + draws * (both - loss * excess / chains)) / (chains * draws - 1)
    return -(covariance + loss / chains * (excess / chains - base_excess / base_chains))
