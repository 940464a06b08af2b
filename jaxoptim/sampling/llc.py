"""Local learning coefficients."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import Rule, trees
from jaxoptim.core.batches import size_of
from jaxoptim.core.modules import module_of
from jaxoptim.optim.groups import predicate
from jaxoptim.sampling import diagnostics
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.run import SamplerLike, run, stacked
from jaxoptim.sampling.sample import first_divergence
from jaxoptim.sampling.target import Given, Problem, Target, problem


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
    """

    loss: np.ndarray
    init_loss: float
    nbeta: float
    diverged: np.ndarray
    observables: dict[str, Any]
    names: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        """The estimate in a line."""
        chains, draws = self.loss.shape[-2:]
        lost = (self.diverged >= 0).sum()
        return (
            f"LLC(mean={self.mean}, std={self.std}, {chains} chains of {draws} draws"
            + (f", {lost} of them diverged" if lost else "")
            + ")"
        )

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
        return _plain(np.nanmean(self.per_chain, -1))

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

    def _each(self, of: Callable[[np.ndarray], Any]) -> np.ndarray:
        """A number for each selection, from the traces of its chains that have not diverged."""
        draws = self.loss.shape[-1]
        good = self.diverged.reshape(-1, self.diverged.shape[-1]) < 0
        values = [of(trace[keep]) for trace, keep in zip(self.trace.reshape(*good.shape, draws), good, strict=True)]
        return np.asarray(values, np.float64).reshape(self.diverged.shape[:-1])

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

    def __getitem__(self, selection: int | str) -> LLC:
        """The estimate of one of several selections, by its number or its name."""
        if self.loss.ndim == 2:
            raise TypeError("This is the estimate of one selection, which has no parts.")
        if isinstance(selection, str):
            if self.names is None or selection not in self.names:
                raise KeyError(f"There is no selection {selection!r}. Their names are {self.names}.")
            selection = self.names.index(selection)
        parts = jax.tree.map(lambda x: x[selection], (self.loss, self.diverged, self.observables))
        return LLC(parts[0], self.init_loss, self.nbeta, parts[1], parts[2])


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
    **options: Any,
) -> LLC:
    r"""Estimate the local learning coefficient at ``params`` from chains that start there.

    .. math::
        \hat\lambda(w^*) = n\beta\,\left(E_w[L(w)] - L(w^*)\right), \qquad
        p(w) \propto \exp\left(-n\beta\,L(w) - \tfrac{\gamma}{2}\|w - w^*\|^2\right)

    Args:
        loss_fn: ``loss_fn(params)``, or ``loss_fn(params, batch)`` where there are data: the mean loss L.
        params: :math:`w^*`, where every chain begins: arrays or a module, as for :func:`sample`.
        sampler: a rule, whose ``nbeta`` is replaced, such as ``rules.SGLD(lr=1e-4, localization=100.0)``; or a
            transformation, which has its ``nbeta`` already.
        data: a pytree of arrays whose first axes run over the data (default None).
        nbeta: :math:`n\beta > 0` (default None: the rule's own if that is not 1, else :func:`default_nbeta` of the
            number of data).
        key: a typed JAX key.
        init_loss: :math:`L(w^*)` (default None: the loss over all data, in batches of ``batch_size``, weighted by
            their sizes).
        selections: refined coefficients, of chains that move some parameters only: a list of masks (see
            ``optimize_over`` of :class:`jaxoptim.rules.SGLD`), or of regular expressions and predicates of the dotted
            path that select whole arrays; all of them in one program. A mapping gives them names (default None: all
            parameters).
        options: the other keywords of :func:`sample`: ``num_chains``, ``num_draws``, ``num_burnin_steps``, ...

    Returns:
        :class:`LLC`. With draws of burn-in too few, the estimate is too low: the chains begin at the minimum.

    Raises:
        As :func:`sample`; ``ValueError`` without ``nbeta`` and data; ``FloatingPointError`` if all chains of a
        selection diverge. Some that do are left out, and a warning says which, and at which draw.

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
    checked = options_of("estimate_llc", key, options)
    nbeta = temperature("estimate_llc", nbeta, sampler, data)
    given = problem(loss_fn, params, data, checked)
    masks, count, names = None, 1, None
    if isinstance(selections, str) or callable(selections):
        raise TypeError(f"selections is a list, or a mapping of names, but got {selections!r}. Give [{selections!r}].")
    if selections is not None:
        if getattr(sampler, "optimize_over", None) is not None:
            raise ValueError("The sampler has a mask, optimize_over, of its own. Give it as one of the selections.")
        if isinstance(selections, Mapping):
            names, selections = tuple(selections), list(selections.values())
        masks, count = stacked_masks(selections, given.arrays), len(selections)
    changes = {} if masks is None else {"optimize_over": masks}
    rules = tempered(sampler, count, nbeta, **changes)
    init_loss = initial_loss(init_loss, given, checked.size_at_once(data))
    found = run(given, sampler, rules, count, checked)
    shape = (count, checked.num_chains) if selections is not None else (checked.num_chains,)
    return made(found, shape, init_loss, nbeta, names)


def options_of(caller: str, key: Any, options: dict[str, Any]) -> RunOptions:
    """The keywords of :func:`sample` that were given to another function."""
    allowed = [field.name for field in dataclasses.fields(RunOptions) if field.name != "key"]
    if unknown := [name for name in options if name not in allowed]:
        raise TypeError(f"{caller}() got an unexpected keyword argument {unknown[0]!r}. It takes {', '.join(allowed)}.")
    return RunOptions(key=key, **options)


def temperature(caller: str, nbeta: Any, sampler: SamplerLike, data: Any) -> float:
    """The inverse temperature: what was given, here or to the rule, or the default of the number of data."""
    own = getattr(sampler, "nbeta", 1.0)
    if nbeta is None and (callable(own) or np.ndim(own) or own != 1.0):
        nbeta = own
    if nbeta is None:
        if data is None:
            raise ValueError(f"{caller} has no data to count: give nbeta, such as default_nbeta(n).")
        return default_nbeta(size_of(data))
    if isinstance(nbeta, str | bool) or callable(nbeta) or np.ndim(nbeta) or not nbeta > 0:
        raise ValueError(f"Invalid nbeta: {nbeta!r}. It is a number > 0; a coefficient has one temperature.")
    return float(nbeta)


def initial_loss(init_loss: Any, given: Problem, batch_size: int | None) -> float:
    """The loss to compare with: what was given, or that of all data at the parameters."""
    value = float(_full_loss(*given, batch_size) if init_loss is None else init_loss)
    if not math.isfinite(value):
        what = "The loss of all data at params" if init_loss is None else "init_loss"
        raise ValueError(f"{what} is {value}, with which no other loss can be compared.")
    return value


def made(
    found: dict[str, Any], shape: tuple[int, ...], init_loss: float, nbeta: float, names: tuple[str, ...] | None
) -> LLC:
    """The estimate of a run, whose chains are arranged in ``shape``; warns of those that have diverged."""
    arranged = arranged_in(shape, found)
    loss = arranged.pop("loss").astype(np.float64)
    diverged = first_divergence(loss)
    if (diverged >= 0).any():
        lost = np.argwhere(diverged >= 0)
        where = ", ".join(f"{_chain(i)} at draw {diverged[tuple(i)]}" for i in lost[:5])
        many = f"{len(lost)} of {diverged.size} chains diverged: {where}{', ...' if len(lost) > 5 else ''}"
        advice = (
            "SGLD is stable where lr * (nbeta * curvature + localization) < 4: try a smaller lr. "
            "sampling.sample with the same arguments returns all traces."
        )
        if (diverged >= 0).all(-1).any():
            raise FloatingPointError(f"{many}. {advice}")
        warnings.warn(f"{many}; they are left out of the estimate. {advice}", stacklevel=3)
    return LLC(loss, init_loss, nbeta, diverged, arranged, names)


def arranged_in(shape: tuple[int, ...], found: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a run with its chains arranged in ``shape``."""
    return {
        name: jax.tree.map(lambda x: np.asarray(x).reshape(*shape, *x.shape[1:]), x)
        for name, x in found.items()
        if name != "params"
    }


def tempered(sampler: SamplerLike, count: int, nbeta: float, **changes: Any) -> Any:
    """Settings of a rule at an inverse temperature."""
    if not isinstance(sampler, Rule):
        if changes:
            raise TypeError(f"{', '.join(changes)} can be set in a rule only, but the sampler is a transformation.")
        return None
    if lacking := [name for name in ("nbeta", *changes) if name not in sampler.specs]:
        raise TypeError(f"{type(sampler).__name__} has no {', '.join(lacking)}. Give a sampler: SGLD, SGNHT, ...")
    return stacked(sampler.replace(nbeta=nbeta), count, **changes)


def stacked_masks(selections: Sequence[Any], params: Any) -> Any:
    """Masks with a first axis of selections, a tree like the parameters."""
    if not selections:
        raise ValueError("selections is empty. Give at least one mask, regular expression or predicate.")
    names, leaves = trees.names(params), jax.tree.leaves(params, is_leaf=trees.is_leaf)
    chosen: list[list[Any]] = []
    for selection in selections:
        is_module = module_of(selection) is not None  # of bools, which may be callable
        if isinstance(selection, str) or hasattr(selection, "fullmatch") or (callable(selection) and not is_module):
            matches = predicate(selection)
            flags = [bool(matches(name)) for name in names]
            if not any(flags):
                raise ValueError(
                    f"selections: {selection!r} selects no parameter. A regular expression must match the whole path, "
                    f"as 'layer.*' does. The paths are {', '.join(names)}."
                )
            chosen.append([np.asarray(flag) for flag in flags])
        elif jax.tree_util.all_leaves([selection]):
            chosen.append([np.asarray(selection)] * len(names))
        else:
            parts = trees.leaves_like(selection, params, "selections")
            chosen.append([np.asarray(True) if part is None else np.asarray(part) for part in parts])
    masks = []
    for index, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        parts = [of_one[index] for of_one in chosen]
        if not all(np.isin(part, (0, 1)).all() for part in parts):
            raise ValueError(f"selections: a mask of {name!r} has other numbers than zeros and ones.")
        try:
            masks.append(None if leaf is None else _stacked(parts, jnp.shape(leaf)))
        except ValueError as error:
            raise ValueError(
                f"selections: a mask does not broadcast to {name!r} of shape {jnp.shape(leaf)}."
            ) from error
    treedef = jax.tree.structure(params, is_leaf=trees.is_leaf)
    return jax.tree.map(jnp.asarray, jax.tree.unflatten(treedef, masks))


def _stacked(masks: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Masks of one array, of as few numbers as tell them apart, behind a first axis."""
    wide = np.broadcast_shapes(*(mask.shape for mask in masks))
    if np.broadcast_shapes(wide, shape) != shape:
        raise ValueError
    each = wide and (1,) * (len(shape) - len(wide)) + wide
    return np.stack([np.broadcast_to(mask, each) for mask in masks])


@functools.partial(jax.jit, static_argnames=("target", "batch_size"))
def _full_loss(target: Target, params: Any, given: Given, batch_size: int | None) -> jax.Array:
    """The mean loss over all data, batch by batch, each weighted by its size."""
    data, rest = given.data, given.rest
    if data is None:
        return target.loss(params, rest, None)
    n = size_of(data)
    size = batch_size or n
    whole = n // size * size
    batches = jax.tree.map(lambda x: x[:whole].reshape(n // size, size, *x.shape[1:]), data)
    total = jnp.sum(jax.lax.map(lambda batch: target.loss(params, rest, batch), batches)) * size
    if whole < n:
        total += target.loss(params, rest, jax.tree.map(lambda x: x[whole:], data)) * (n - whole)
    return total / n


def _chain(index: Any) -> str:
    return f"chain {index[0]}" if len(index) == 1 else f"chain {index[-1]} of selection {index[0]}"


def _plain(x: np.ndarray) -> Any:
    """A number as a float, more of them as an array."""
    return float(x) if np.ndim(x) == 0 else x
