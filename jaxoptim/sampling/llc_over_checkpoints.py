"""Local learning coefficients over the checkpoints of a training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxoptim.core.arriving import is_arriving
from jaxoptim.core.shown import aligned, shown
from jaxoptim.sampling.doubts import Evidence, divergence, doubts, warn
from jaxoptim.sampling.labelled import dataset
from jaxoptim.sampling.llc import LLC, estimates, selection_axis, selection_labels
from jaxoptim.sampling.observables import Observable
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.points import Points, axis, label, points
from jaxoptim.sampling.run import SamplerLike, check_sampler
from jaxoptim.sampling.selections import named_selections, stacked_masks
from jaxoptim.sampling.streams import NUM_REFERENCES
from jaxoptim.sampling.target import problem, with_starts


@dataclasses.dataclass(frozen=True, repr=False)
class LLCOverCheckpoints:
    r"""Estimates of the local learning coefficient at the checkpoints of a training; its ``repr`` is a table.

    A mapping from names to :class:`LLC`: ``found[name]``, ``len(found)``, and the names in order when it is iterated.

    Attributes:
        names: of the checkpoints.
        loss: the loss at each draw, ``(checkpoints, chains, draws)``; with several selections, as of everything that
            has chains, ``(checkpoints, selections, chains, draws)``.
        init_loss: :math:`L(w^*)` of each checkpoint.
        nbeta: :math:`n\beta`.
        diverged: for each chain the first draw whose loss is not finite, -1 if there is none. Means and errors leave
            such chains out; where all have diverged they are NaN.
        observables: what else was observed, with a first axis of checkpoints.
        selections: their names, None if they have none.
        axes: as of :class:`Samples`.

    Examples:
        See :func:`llc_over_checkpoints`.
    """

    names: tuple[Any, ...]
    loss: np.ndarray
    init_loss: np.ndarray
    nbeta: float
    diverged: np.ndarray
    observables: dict[str, Any]
    selections: tuple[str, ...] | None = None
    axes: dict[str, tuple[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.names)

    def __getitem__(self, name: Any) -> LLC:
        """The estimate at one checkpoint, by its name."""
        if name not in self.names:
            raise KeyError(f"There is no checkpoint {name!r}. Their names are {self.names}.")
        return self._at(self.names.index(name))

    def __repr__(self) -> str:
        """The estimates in a table, a line each."""
        several = self.loss.ndim == 4
        chosen = selection_axis(self.loss.shape[1], self.selections)["selection"] if several else [None]
        rows = [["checkpoint", "selection", "loss", "LLC", "mcse", "R-hat", "diverged"]]
        for name, start, llc in zip(self.names, self.init_loss, self._each(), strict=True):
            for selection, of, lost in zip(
                chosen, llc._statistics(), (llc.diverged >= 0).reshape(len(chosen), -1), strict=True
            ):
                numbers = [f"{start:.4g}", *(f"{x:.3g}" for x in (of.mean, of.mcse)), f"{of.rhat:.3f}"]
                rows.append([str(name), str(selection), *numbers, f"{lost.sum()} of {lost.size}"])
        kept = [
            column
            for column in zip(*rows, strict=True)
            if (column[0] != "selection" or several)
            and (column[0] != "diverged" or (self.diverged >= 0).any())
            and (column[0] not in ("mcse", "R-hat") or set(column[1:]) != {"nan"})
        ]
        return aligned(zip(*kept, strict=True))

    @property
    def trace(self) -> np.ndarray:
        r""":math:`n\beta\,(L - L(w^*))` at each draw, of the shape of ``loss``."""
        return self.nbeta * (self.loss - self._start)

    @property
    def per_chain(self) -> np.ndarray:
        """The estimate of each chain, ``(checkpoints, chains)``; NaN where it has diverged."""
        return np.stack([llc.per_chain for llc in self._each()])

    @property
    def mean(self) -> np.ndarray:
        """The pooled estimates, ``(checkpoints,)``."""
        return self._statistic("mean")

    @property
    def std(self) -> np.ndarray:
        """The standard deviations between chains, as of :class:`LLC`."""
        return np.stack([np.asarray(llc.std) for llc in self._each()])

    @property
    def mcse(self) -> np.ndarray:
        """The Monte-Carlo standard errors of :attr:`mean`; NaN without numpyro."""
        return self._statistic("mcse")

    @property
    def rhat(self) -> np.ndarray:
        r"""The split :math:`\hat R` of the losses; NaN without numpyro."""
        return self._statistic("rhat")

    @property
    def effective_sample_size(self) -> np.ndarray:
        """The numbers of independent draws of the losses; NaN without numpyro."""
        return self._statistic("size")

    def to_xarray(self) -> Any:
        """Return the draws as an ``xarray.Dataset``: that of :meth:`LLC.to_xarray`, with a first axis ``checkpoint``.

        Its labels are the names of the checkpoints: numbers if all are, else strings.

        Returns:
            An ``xarray.Dataset``; ``dataset["llc"].mean(("chain", "draw"))`` are the estimates.

        Raises:
            As :meth:`LLC.to_xarray`.

        Examples:
            See :func:`llc_over_checkpoints`.
        """
        first: dict[str, Any] = {"checkpoint": axis(self.names)}
        if self.loss.ndim == 4:
            first |= selection_axis(self.loss.shape[1], self.selections)
        about = {"diverged": self.diverged, "init_loss": self._start[..., 0]}
        traces, values = {"llc": self.trace}, {"loss": self.loss} | self.observables
        return dataset(values, self.axes, about, first, traces, {"nbeta": self.nbeta})

    def plot(self, *, ax: Any = None) -> Any:
        """Draw the estimates over the checkpoints, a line for each selection, with matplotlib.

        Bars are two standard errors. Names that are numbers, such as steps, are where the points lie.

        Args:
            ax: the matplotlib ``Axes`` to draw on (default None: new ones).

        Returns:
            The ``Axes``.

        Raises:
            ``ImportError`` without matplotlib.

        Examples:
            See :func:`llc_over_checkpoints`.
        """
        from jaxoptim.sampling.plotting import plot_over_checkpoints

        return plot_over_checkpoints(self, ax)

    @property
    def _start(self) -> np.ndarray:
        """The loss where the chains began, which broadcasts to that of draws."""
        return self.init_loss.reshape(-1, *[1] * (self.loss.ndim - 1))

    def _at(self, index: int) -> LLC:
        loss, diverged, observables = jax.tree.map(lambda x: x[index], (self.loss, self.diverged, self.observables))
        return LLC(loss, float(self.init_loss[index]), self.nbeta, diverged, observables, self.selections, self.axes)

    def _each(self) -> list[LLC]:
        return [self._at(index) for index in range(len(self))]

    def _statistic(self, name: str) -> np.ndarray:
        """A statistic of each estimate, NaN where it is not known."""
        found = [[getattr(of, name) for of in llc._statistics()] for llc in self._each()]
        return np.asarray(found).reshape(self.loss.shape[:-2])


def llc_over_checkpoints(
    loss_fn: Callable[..., Any],
    checkpoints: Iterable[Any] | Mapping[Any, Any] | Any,
    sampler: SamplerLike,
    data: Any = None,
    *,
    nbeta: float | None = None,
    key: jax.Array,
    init_loss: Sequence[float] | Mapping[Any, float] | None = None,
    names: Sequence[Any] | None = None,
    stacked: bool = False,
    read: Callable[[Any], Any] | None = None,
    at_once: int | None = None,
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
) -> LLCOverCheckpoints:
    r"""Estimate the local learning coefficient at each checkpoint of a training, all in one compiled program.

    Each estimate is that of :func:`estimate_llc` at the checkpoint with the same keywords: to rounding, and to the last
    bit where one checkpoint is taken at once. So chain c of all checkpoints has the same noise, and differences between
    checkpoints are known better than each of them.

    Args:
        loss_fn: as for :func:`estimate_llc`.
        checkpoints: the parameters, or modules, of one structure and the same shapes:

            - a list, or any iterable, such as a generator, which is asked for so many as are taken at once;
            - a mapping that has names for them, such as ``{step: params}``;
            - with ``stacked=True`` one tree, or module, whose arrays have a first axis of checkpoints.

            A ``str`` or a path in a list or a mapping is the file of a checkpoint, which is read when it is its turn.
        sampler: as for :func:`estimate_llc`.
        data: as for :func:`estimate_llc`. An iterable that does not begin anew takes all checkpoints at once.
        nbeta: as for :func:`estimate_llc` (default None: the rule's own, or that of the number of data).
        key: a typed JAX key.
        init_loss: :math:`L(w^*)` of each checkpoint, as for :func:`estimate_llc`: in their order, or by their names
            (default None: the loss over all data at each).
        names: of the checkpoints, such as their steps (default None: those of a mapping, the paths of files, or else
            their numbers).
        stacked: whether ``checkpoints`` is one tree of all (default False).
        read: a function that returns the parameters in a file, given its path: such as
            ``safetensors.numpy.load_file``, or one that restores with orbax, or takes arrays out of ``torch.load``
            (default None: :func:`jaxoptim.checkpoint.load`).
        at_once: how many checkpoints are sampled together, an int >= 1: so many parameters are in memory, and their
            chains (default None: all, if they are in memory as they are given; one of files, and of an iterable whose
            length is not known).
        selections: as for :func:`estimate_llc` (default None: all parameters).
        num_chains: of each checkpoint, as for :func:`sample` (default 10).
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
        progress: as for :func:`sample`, a bar for each group that is taken at once (default False).
        checkpoint: as for :func:`sample`: a file of the chains, or, unless all checkpoints are taken at once, one for
            each group, ``<checkpoint>.0`` and so on. Groups that have ended are read from theirs, so that checkpoints
            which come later are sampled by themselves (default None).
        probes: as for :func:`sample` (default None).

    Returns:
        :class:`LLCOverCheckpoints`.

    Raises:
        As :func:`estimate_llc`, but for divergence; ``TypeError`` for what is no collection; ``ValueError`` for
        checkpoints of different shapes, for names and initial losses that are not as many, and for two of one name.

    Warns:
        :class:`LLCWarning`, as :func:`estimate_llc`, once for each reason, with the checkpoints that it is about; also
        where all chains of one have diverged, whose estimate is NaN.

    References:
        As of :func:`estimate_llc`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> def loss(w, scale):
        ...     return jnp.mean(scale) * jnp.sum(jnp.prod(w) ** 2) / 2 + jnp.sum(w[1:] ** 2) / 2
        >>> found = sampling.llc_over_checkpoints(
        ...     loss, {10: jnp.zeros(2), 20: jnp.array([3.0, 0.0])}, rules.SGLD(lr=1e-3, localization=1.0),
        ...     jnp.ones(4), nbeta=100.0, key=jax.random.key(0), num_chains=8, num_draws=1000, num_burnin_steps=500)
        >>> found.mean.shape, len(str(found).splitlines()), found[20].loss.shape
        ((2,), 3, (8, 1000))
        >>> dict(found.to_xarray()["llc"].sizes)
        {'checkpoint': 2, 'chain': 8, 'draw': 1000}
        >>> ax = found.plot()
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
    )
    check_sampler(sampler)
    given = points(checkpoints, names, stacked, read)
    at_once = _size_of_groups(at_once, given, data)
    of_selections, chosen = named_selections(selections, sampler)
    _check_losses(init_loss, given.length)
    found: list[tuple[LLC, list[Evidence]]] = []
    known: list[Any] = []
    first = None
    for number, group in enumerate(given.groups(at_once)):
        first = next(iter(group.values())) if first is None else first
        at = with_starts(problem(loss_fn, first, data, options, NUM_REFERENCES), _padded(group, at_once, bool(known)))
        masks = None if chosen is None else stacked_masks(chosen, at.at_start(0).arrays)
        own = [(label(name), _loss_of(init_loss, name, len(known) + place)) for place, name in enumerate(group)]
        kept = dataclasses.replace(options, checkpoint=_file_of(checkpoint, number, at_once))
        found += estimates("llc_over_checkpoints", at, sampler, kept, nbeta, own, of_selections, masks)
        known += group
    _check_losses(init_loss, len(known))
    llcs = [llc for llc, _ in found]
    labels = [label(name) for name in known]
    if chosen is not None:
        each = selection_labels(len(chosen), of_selections)
        labels = [f"{selection} of {of}" for of in labels for selection in each]
    together = jax.tree.map(lambda *x: np.stack(x), *((x.loss, x.diverged, x.observables) for x in llcs))
    loss, diverged, seen = together
    lines = divergence(diverged.reshape(-1, num_chains), labels, all_may=True)
    lines += doubts([of for _, each in found for of in each], options.num_draws, labels)
    warn(lines, stacklevel=2)
    if chosen is None:
        loss, diverged, seen = jax.tree.map(lambda x: x[:, 0], together)
    start = np.asarray([llc.init_loss for llc in llcs])
    return LLCOverCheckpoints(tuple(known), loss, start, llcs[0].nbeta, diverged, seen, of_selections, options.axes)


def _check_losses(given: Any, count: int | None) -> None:
    """Raise for anything but initial losses of so many checkpoints; None means that their number is unknown."""
    if isinstance(given, str) or not isinstance(given, Sequence | Mapping | np.ndarray | jax.Array | None):
        raise TypeError(
            f"init_loss is a list of numbers, or a mapping of names, but got {shown(given)}. Give one for each "
            "checkpoint."
        )
    if given is not None and count not in (None, len(given)):
        raise ValueError(f"init_loss has {len(given)} numbers, but there are {count} checkpoints. Give one for each.")


def _loss_of(given: Any, name: Any, number: int) -> Any:
    """The initial loss of the checkpoint with this name and number; None for that of all data."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        _check_losses(given, None if number < len(given) else number + 1)
        return given[number]
    if name not in given:
        raise ValueError(f"init_loss has none of the {label(name)}. Its names are {', '.join(map(repr, given))}.")
    return given[name]


def _file_of(path: Any, number: int, at_once: int | None) -> Any:
    """The file of the chains of a group."""
    return path if path is None or at_once is None else f"{os.fspath(path)}.{number}"


def _size_of_groups(at_once: Any, given: Points, data: Any) -> int | None:
    """Return the number of checkpoints to take at once, None for all; raise for no number, and for data that end."""
    is_number = isinstance(at_once, int | np.integer) and not isinstance(at_once, bool) and at_once >= 1
    if at_once is not None and not is_number:
        raise ValueError(f"Invalid at_once: {at_once!r}. It is an int >= 1, or None.")
    size = int(at_once) if at_once is not None else None if given.are_there else 1
    all_at_once = size is None or (given.length is not None and given.length <= size)
    if not all_at_once and is_arriving(data) and hasattr(data, "__next__"):
        raise ValueError(
            f"data is a {type(data).__name__}, which does not begin anew, but {size} of the checkpoints are taken at "
            "once. Give an iterable that does, or all checkpoints at once with at_once=."
        )
    return size


def _padded(group: dict[Any, Any], size: int | None, is_later: bool) -> dict[Any, Any]:
    """Return a smaller last group padded with its first checkpoint, so that it runs the others' program."""
    lack = size - len(group) if size is not None and is_later else 0
    return group | {("again", number): next(iter(group.values())) for number in range(lack)}
