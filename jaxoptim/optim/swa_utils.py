"""Averages of the parameters and their learning rate: what ``torch.optim.swa_utils`` is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxoptim.averaging import checked_decay, copied, dtype_of, ema_step, first_copied, floating, start, swa_step
from jaxoptim.core import Packed, as_pytree, owned, pack, trees
from jaxoptim.core.numerics import computing_dtype
from jaxoptim.core.packing import unpacked
from jaxoptim.optim.lr_scheduler.base import LRScheduler, check_optimizer, per_group
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.schedules import arguments as of
from jaxoptim.schedules.annealing import anneal_fraction, weight

AvgFn = Callable[[Any, Any, Any], Any]
MultiAvgFn = Callable[[list[Any], list[Any], Any], list[Any]]


def get_swa_avg_fn() -> AvgFn:
    r"""The function for the mean, of one array.

    .. math::
        \bar\theta + \frac{\theta - \bar\theta}{n + 1}

    Returns:
        ``avg_fn(averaged_param, current_param, num_averaged) -> averaged_param``.

    Example:
        >>> from jaxoptim.optim import swa_utils
        >>> swa_utils.get_swa_avg_fn()(1.0, 4.0, 2)
        2.0
    """
    return Partial(swa_step)


def get_ema_avg_fn(decay: float = 0.999) -> AvgFn:
    r"""The function for the exponential moving average, of one array.

    .. math::
        \bar\theta + (1 - \beta) (\theta - \bar\theta)

    Args:
        decay: :math:`\beta`, in [0, 1] (default 0.999).

    Returns:
        ``avg_fn(averaged_param, current_param, num_averaged) -> averaged_param``.

    Errors:
        ``ValueError`` for a decay out of range.

    Example:
        >>> from jaxoptim.optim import swa_utils
        >>> swa_utils.get_ema_avg_fn(decay=0.5)(1.0, 4.0, 2)
        2.5
    """
    return Partial(ema_step, checked_decay(decay))


def get_swa_multi_avg_fn() -> MultiAvgFn:
    """The function for the mean, of a list of arrays; see :func:`get_swa_avg_fn`.

    Returns:
        ``multi_avg_fn(averaged_params, current_params, num_averaged) -> averaged_params``.

    Example:
        >>> from jaxoptim.optim import swa_utils
        >>> swa_utils.get_swa_multi_avg_fn()([1.0, 0.0], [4.0, 3.0], 2)
        [2.0, 1.0]
    """
    return Partial(_each, get_swa_avg_fn())


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAvgFn:
    r"""The function for the exponential moving average, of a list of arrays; see :func:`get_ema_avg_fn`.

    Args:
        decay: :math:`\beta`, in [0, 1] (default 0.999).

    Returns:
        ``multi_avg_fn(averaged_params, current_params, num_averaged) -> averaged_params``.

    Errors:
        ``ValueError`` for a decay out of range.

    Example:
        >>> from jaxoptim.optim import swa_utils
        >>> swa_utils.get_ema_multi_avg_fn(decay=0.5)([1.0, 0.0], [4.0, 3.0], 2)
        [2.5, 1.5]
    """
    return Partial(_each, get_ema_avg_fn(decay))


def _each(avg_fn: AvgFn, averaged: Sequence[Any], current: Sequence[Any], num_averaged: Any) -> list[Any]:
    return [avg_fn(average, param, num_averaged) for average, param in zip(averaged, current, strict=True)]


def _is_elementwise(function: Any) -> bool:
    """Whether an averaging function is one of ours, which may be applied to packed parameters."""
    if not isinstance(function, Partial):
        return False
    return function.func in (swa_step, ema_step) or (function.func is _each and _is_elementwise(function.args[0]))


class AveragedModel:
    r"""An average of the parameters, updated by one compiled and donated call.

    .. math::
        \bar\theta \leftarrow \begin{cases} \theta & n = 0 \\ \mathtt{avg\_fn}(\bar\theta, \theta, n) & n > 0
        \end{cases}, \qquad n \leftarrow n + 1

    Averages of bfloat16 and float16 parameters are kept in float32, where a small step is not lost.

    Args:
        model: a pytree of arrays, which is copied, or an ``Optimizer``, whose parameters are. Its *buffers* are
            the arrays of integers, and in a dict with a key ``"params"``, as flax's variables, everything under
            other keys (``"batch_stats"``).
        avg_fn: ``avg_fn(averaged_param, current_param, num_averaged)`` returns the new average of one array
            (default None: the mean, :func:`get_swa_avg_fn`). It is compiled.
        multi_avg_fn: the same for lists of all arrays of a dtype (default None). Unlike torch's it returns the
            list.
        use_buffers: average the buffers too (default False: keep the last ones).

    Attributes:
        module: the averaged tree, with the dtypes of ``model``; what was read stays valid.
        n_averaged: the number of updates, an int32 scalar.

    Errors:
        ``ValueError`` for both functions at once.

    Reference:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> averaged = optim.swa_utils.AveragedModel({"w": jnp.zeros(2)})
        >>> for value in (1.0, 3.0):
        ...     averaged.update_parameters({"w": jnp.full(2, value)})
        >>> averaged.module["w"].tolist(), int(averaged.n_averaged)
        ([2.0, 2.0], 2)
    """

    def __init__(
        self,
        model: Any,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
    ) -> None:
        if avg_fn is not None and multi_avg_fn is not None:
            raise ValueError("Only one of avg_fn and multi_avg_fn should be provided")
        self.avg_fn, self.multi_avg_fn, self.use_buffers = avg_fn, multi_avg_fn, use_buffers
        self.n_averaged = jnp.zeros((), jnp.int32)
        tree = _tree(model)
        self._like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), dtype_of(x)), tree)
        self._averaged = [use_buffers or not is_buffer for is_buffer in _are_buffers(self._like)]
        self._function = as_pytree(multi_avg_fn or Partial(_each, as_pytree(avg_fn or get_swa_avg_fn())))
        self._fill([start(x) for x in jax.tree.leaves(tree)])

    def _fill(self, leaves: Sequence[jax.Array]) -> None:
        """Go on from these arrays, which are ours, in the dtypes of the average."""
        average, self._buffers = self._parted(leaves)
        self._average: Any = pack(average) if _is_elementwise(self._function) else average
        self._module: Any = None

    def _parted(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Those of the leaves that are averaged, and the others."""
        pairs = list(zip(self._averaged, leaves, strict=True))
        return [x for averaged, x in pairs if averaged], [x for averaged, x in pairs if not averaged]

    def _leaves(self) -> list[jax.Array]:
        """Averages and buffers in the order of the tree; some are ours and will be donated."""
        average, buffers = iter(unpacked(self._average)), iter(self._buffers)
        return [next(average if averaged else buffers) for averaged in self._averaged]

    def _copies(self) -> list[jax.Array]:
        """The same for others to hold."""
        ours = {id(x) for x in jax.tree.leaves((self._average, self._buffers))}
        return [copied(x) if id(x) in ours else x for x in self._leaves()]

    @property
    def module(self) -> Any:
        """The averaged tree."""
        if self._module is None:
            likes, treedef = jax.tree.flatten(self._like)
            leaves = [
                x if x.dtype == like.dtype else x.astype(like.dtype)
                for x, like in zip(self._copies(), likes, strict=True)
            ]
            self._module = jax.tree.unflatten(treedef, leaves)
        return self._module

    def _put(self, collection: str, values: Sequence[jax.Array]) -> None:
        """Replace the arrays under one key."""
        key, given = jax.tree_util.DictKey(collection), iter(values)
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(self._like)[0]]
        self._fill([start(next(given)) if path[0] == key else x for path, x in zip(paths, self._leaves(), strict=True)])

    def update_parameters(self, model: Any) -> None:
        """Take one more set of parameters into the average; the first is copied.

        Args:
            model: a tree like the one given first, or an ``Optimizer``.

        Errors:
            ``ValueError`` for another tree or shape; ``TypeError`` if ``multi_avg_fn`` does not return as many
            arrays as it is given. The average is as it was then.
        """
        leaves = trees.arrays_like(_tree(model), self._like, "the model", "the average")
        params, buffers = self._parted([x if isinstance(x, jax.Array) else owned(x) for x in leaves])
        self._average, self._buffers, self.n_averaged = _update(
            self._average, self._function, self.n_averaged, params, buffers
        )
        self._module = None

    def state_dict(self) -> dict[str, Any]:
        """The average in torch's layout.

        Returns:
            ``{"n_averaged": count, "module.<path>": array, ...}``, with the dotted path of each array; averages in
            at least float32.
        """
        return {"n_averaged": self.n_averaged} | dict(zip(self._names(), self._copies(), strict=True))

    def _names(self) -> list[str]:
        return [f"module.{name}" for name in trees.array_names(self._like)]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Take over what :meth:`state_dict` gave, or torch's where the names are the same.

        Args:
            state_dict: it is not changed.
            strict: require every name and no other (default True).

        Errors:
            ``RuntimeError`` that lists missing and unexpected names and arrays of another shape. Nothing is
            changed then.
        """
        current = self.state_dict()
        problems = [f"Missing key in state_dict: {name!r}." for name in current if strict and name not in state_dict]
        problems += [
            f"Unexpected key in state_dict: {name!r}." for name in state_dict if strict and name not in current
        ]
        problems += [
            f"size mismatch for {name}: the state dict has {np.shape(state_dict[name])}, the model has {array.shape}."
            for name, array in current.items()
            if name in state_dict and np.shape(state_dict[name]) != array.shape
        ]
        if problems:
            raise RuntimeError("Error(s) in loading state_dict for AveragedModel:\n" + "\n".join(problems))
        given = {name: state_dict.get(name, array) for name, array in current.items()}
        new = {name: copied(x).astype(current[name].dtype) for name, x in given.items()}
        self.n_averaged = new.pop("n_averaged")
        self._fill(list(new.values()))

    def __getstate__(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("avg_fn", "multi_avg_fn", "use_buffers", "n_averaged")}
        return state | {"module": self.module, "leaves": self._copies()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"], state["avg_fn"], state["multi_avg_fn"], state["use_buffers"])  # type: ignore[misc]
        self.n_averaged = state["n_averaged"]
        self._fill([copied(x) for x in state["leaves"]])


def _tree(model: Any) -> Any:
    return model.params if isinstance(model, Optimizer) else model


def _are_buffers(tree: Any) -> list[bool]:
    """Which arrays of a tree are no parameters."""
    is_variables = isinstance(tree, Mapping) and "params" in tree
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    inside = [not is_variables or path[0] == jax.tree_util.DictKey("params") for path, _ in leaves]
    return [not (params and floating(x)) for params, (_, x) in zip(inside, leaves, strict=True)]


@functools.partial(jax.jit, donate_argnums=0)
def _update(
    average: Any, function: MultiAvgFn, num_averaged: jax.Array, params: list[Any], buffers: list[Any]
) -> tuple[Any, list[Any], jax.Array]:
    """The average, the buffers and the count after one more set of parameters."""
    old, treedef = jax.tree.flatten(average)
    current = jax.tree.leaves(average.pack(params) if isinstance(average, Packed) else params)
    new: list[Any] = [None] * len(old)
    for dtype in dict.fromkeys(x.dtype for x in old):
        group = [i for i, x in enumerate(old) if x.dtype == dtype]
        averages, given = [old[i] for i in group], [jnp.asarray(current[i]).astype(dtype) for i in group]
        results = function(averages, given, num_averaged)
        _check_results(results, given)
        for i, param, result in zip(group, given, results, strict=True):
            new[i] = first_copied(param, jnp.asarray(result), num_averaged)
    return jax.tree.unflatten(treedef, new), [copied(x) for x in buffers], num_averaged + 1


def _check_results(results: Any, params: Sequence[jax.Array]) -> None:
    """Raise for what a user's averaging function must not return."""
    if not isinstance(results, list | tuple) or len(results) != len(params):
        raise TypeError(
            f"multi_avg_fn must return the new averages, a list of {len(params)} arrays, but it returned "
            f"{type(results).__name__}. (torch's changes its first argument, which JAX's arrays do not allow.)"
        )
    for result, param in zip(results, params, strict=True):
        if result is None or np.shape(result) != param.shape:
            shape = "None" if result is None else f"an array of shape {np.shape(result)}"
            error: type[Exception] = TypeError if result is None else ValueError
            raise error(f"An averaging function returned {shape} for an array of shape {param.shape}, its new average.")


def update_bn(
    loader: Iterable[Any], averaged: AveragedModel, apply_fn: Callable[[Any, Any], Any], batch_stats: Any = None
) -> Any:
    r"""Compute the batch statistics of the averaged parameters: the mean of those of all batches.

    .. math::
        s = \frac{1}{N} \sum_{i=1}^{N} s_i

    A layer's update is :math:`s \leftarrow m s + (1 - m) s_i`, with a momentum :math:`m` that is found by giving it
    a huge :math:`s`. Whether the variance is the unbiased one (as in torch) or not (as in flax) is up to the layer.

    Args:
        loader: batches; of a list or tuple the first element is taken, as in torch.
        averaged: the average, of variables with a collection ``"batch_stats"``, or of parameters only.
        apply_fn: ``apply_fn(variables, batch)`` runs the model in training mode and returns ``(output, updates)``,
            where ``updates["batch_stats"]`` are the new statistics: flax's ``apply`` with
            ``mutable=["batch_stats"]``. ``variables`` is ``{"params": ..., "batch_stats": ...}``, with whatever
            other collections there are. It is compiled; give the same function each time.
        batch_stats: the statistics of a model whose average is of parameters only (default None), for their shapes.

    Returns:
        The new statistics, which are also put into ``averaged.module``, if it has a place for them; None for a
        model without batch statistics.

    Errors:
        ``ValueError`` for a loader without batches and for layers whose statistics are not such averages.

    Reference:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> def apply_fn(variables, x):
        ...     mean = 0.9 * variables["batch_stats"]["mean"] + 0.1 * x.mean()
        ...     return x - x.mean(), {"batch_stats": {"mean": mean}}
        >>> model = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.zeros(())}}
        >>> averaged = optim.swa_utils.AveragedModel(model)
        >>> stats = optim.swa_utils.update_bn([jnp.full(3, 1.0), jnp.full(3, 3.0)], averaged, apply_fn)
        >>> round(float(averaged.module["batch_stats"]["mean"]), 6)
        2.0
    """
    module = averaged.module
    has_place = isinstance(module, Mapping) and "batch_stats" in module
    variables = dict(module) if has_place else {"params": module, "batch_stats": batch_stats}
    old, treedef = jax.tree.flatten(variables["batch_stats"])
    if not old:
        return None
    total, number, first = [jnp.zeros_like(x) for x in old], 0, None
    for item in loader:
        batch = item[0] if isinstance(item, list | tuple) else item
        first = batch if number == 0 else first
        total, number = _add_statistics(apply_fn, variables, total, batch), number + 1
    if number == 0:
        raise ValueError("update_bn was given a loader without batches. Give one that can be run through.")
    new = [
        _divided(x, number * (1 - _momentum(probe, probed))) if floating(x) else x
        for x, probe, probed in zip(total, _probes(old), _probed(apply_fn, variables, first), strict=True)
    ]
    if has_place:
        averaged._put("batch_stats", new)
    return jax.tree.unflatten(treedef, new)


def _statistics(apply_fn: Callable[[Any, Any], Any], variables: Any, values: list[Any], batch: Any) -> list[Any]:
    """The statistics, as a list, after a batch that found these values there."""
    old = variables["batch_stats"]
    given = jax.tree.unflatten(jax.tree.structure(old), values)
    updates = apply_fn({**variables, "batch_stats": given}, batch)[1]["batch_stats"]
    by_name = dict(zip(trees.array_names(updates), jax.tree.leaves(updates), strict=True))
    return [by_name[name].astype(x.dtype) for name, x in zip(trees.array_names(old), values, strict=True)]


@functools.partial(jax.jit, static_argnames="apply_fn", donate_argnames="total")
def _add_statistics(apply_fn: Callable[[Any, Any], Any], variables: Any, total: list[Any], batch: Any) -> list[Any]:
    """The sum of statistics with those of one more batch."""
    given = [jnp.zeros_like(x) if floating(x) else x for x in total]  # integers count on
    new = _statistics(apply_fn, variables, given, batch)
    return [x + y if floating(x) else y for x, y in zip(total, new, strict=True)]


def _divided(x: jax.Array, divisor: float) -> jax.Array:
    return (x.astype(computing_dtype(x.dtype)) / divisor).astype(x.dtype)


def _probes(old: list[Any]) -> list[float]:
    """For each running statistic a value beside which that of a batch vanishes."""
    return [2.0 ** min(100, int(jnp.finfo(x.dtype).maxexp) - 2) if floating(x) else 0.0 for x in old]


@functools.partial(jax.jit, static_argnames="apply_fn")
def _probed(apply_fn: Callable[[Any, Any], Any], variables: Any, batch: Any) -> list[Any]:
    """What becomes of the probes, less what becomes of zeros."""
    old = jax.tree.leaves(variables["batch_stats"])
    given = [jnp.full_like(x, probe) for x, probe in zip(old, _probes(old), strict=True)]
    high = _statistics(apply_fn, variables, given, batch)
    low = _statistics(apply_fn, variables, [jnp.zeros_like(x) for x in old], batch)
    return [x - y for x, y in zip(high, low, strict=True)]


def _momentum(probe: float, probed: jax.Array) -> float:
    """The momentum that has made ``probed`` of the probe: the shortest decimal that is this number in its dtype."""
    found = np.unique(np.asarray(probed) / np.asarray(probe, probed.dtype))
    if len(found) != 1 or not 0 <= float(found[0]) < 1:
        raise ValueError(
            "update_bn needs statistics that follow new = momentum * old + (1 - momentum) * batch with a momentum in "
            f"[0, 1), but these have {found} for it."
        )
    decimals = (float(f"{float(found[0]):.{digits}g}") for digits in range(1, 18))
    return next(x for x in decimals if np.asarray(x, probed.dtype) == found[0])


class SWALR(LRScheduler):
    r"""From the current rate to that of weight averaging, which then stays.

    .. math::
        \eta_n = \alpha \, \eta_{\mathrm{swa}} + (1 - \alpha) \, \eta_0, \qquad
        \alpha = \tfrac12 \left( 1 - \cos \pi t \right) \text{ or } t, \qquad t = \min(1, n / E)

    Args:
        optimizer: the optimizer whose groups are scheduled.
        swa_lr: :math:`\eta_{\mathrm{swa}}`, a number, or a list with one for each group.
        anneal_epochs: :math:`E`, an ``int`` >= 0 (default 10).
        anneal_strategy: "cos" (default) or "linear".
        last_epoch: see :class:`~jaxoptim.optim.lr_scheduler.LRScheduler` (default -1).

    Errors:
        ``TypeError`` for what is not an optimizer, ``ValueError`` for an argument out of range.

    Reference:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.

    Example:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.5)
        >>> scheduler = optim.swa_utils.SWALR(optimizer, swa_lr=0.25, anneal_epochs=2, anneal_strategy="linear")
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.375
    """

    def __init__(
        self,
        optimizer: Optimizer,
        swa_lr: float | list[float],
        anneal_epochs: int = 10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        last_epoch: int = -1,
    ) -> None:
        check_optimizer(optimizer)
        swa_lrs = per_group("swa_lr", optimizer, swa_lr)
        self._anneal_strategy = of.strategy("anneal_strategy", anneal_strategy)
        self.anneal_epochs = of.anneal_epochs("anneal_epochs", anneal_epochs)
        for rate, group in zip(swa_lrs, optimizer.param_groups, strict=True):
            group["swa_lr"] = rate
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """The rate of each group, from the one before."""
        self._warn_outside_step()
        step = self._step_count - 1
        before, now = self._alpha(step - 1), self._alpha(step)
        return [
            group["swa_lr"] * now + _start_of(group["lr"], group["swa_lr"], before) * (1 - now)
            for group in self.optimizer.param_groups
        ]

    def _alpha(self, step: int) -> float:
        """The weight of the final rate."""
        return weight(max(0, anneal_fraction(step, self.anneal_epochs)), self._anneal_strategy)


def _start_of(lr: Any, swa_lr: Any, alpha: float) -> Any:
    """The rate from which ``lr`` has come a part ``alpha`` of the way."""
    return swa_lr if alpha == 1 else (lr - alpha * swa_lr) / (1 - alpha)
