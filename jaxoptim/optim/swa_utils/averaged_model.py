"""The average of a model's parameters, and the functions that compute it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxoptim.averaging import (
    checked_decay,
    copied,
    dtype_of,
    ema_step,
    first_average,
    first_copied,
    floating,
    swa_step,
)
from jaxoptim.core import Packed, as_jax, as_pytree, pack, trees
from jaxoptim.core.modules import Parts, is_nnx, module_of
from jaxoptim.core.numerics import is_complex
from jaxoptim.core.packing import unpacked
from jaxoptim.optim.optimizer import Optimizer

AvgFn = Callable[[Any, Any, Any], Any]
MultiAvgFn = Callable[[list[Any], list[Any], Any], list[Any]]


def get_swa_avg_fn() -> AvgFn:
    r"""Return the function for the mean of one array.

    .. math::
        \bar\theta + \frac{\theta - \bar\theta}{n + 1}

    Returns:
        ``avg_fn(averaged_param, current_param, num_averaged) -> averaged_param``.

    Examples:
        >>> from jaxoptim.optim import swa_utils
        >>> swa_utils.get_swa_avg_fn()(1.0, 4.0, 2)
        2.0
    """
    return Partial(swa_step)


def get_ema_avg_fn(decay: float = 0.999) -> AvgFn:
    r"""Return the function for the exponential moving average of one array.

    .. math::
        \bar\theta + (1 - \beta) (\theta - \bar\theta)

    Args:
        decay: :math:`\beta`, in [0, 1] (default 0.999).

    Returns:
        ``avg_fn(averaged_param, current_param, num_averaged) -> averaged_param``.

    Raises:
        ``ValueError`` for a decay out of range.

    Examples:
        >>> from jaxoptim.optim import swa_utils
        >>> swa_utils.get_ema_avg_fn(decay=0.5)(1.0, 4.0, 2)
        2.5
    """
    return Partial(ema_step, checked_decay(decay))


def get_swa_multi_avg_fn() -> MultiAvgFn:
    """Return the function for the mean of a list of arrays; see :func:`get_swa_avg_fn`.

    Returns:
        ``multi_avg_fn(averaged_params, current_params, num_averaged) -> averaged_params``.

    Examples:
        >>> from jaxoptim.optim import swa_utils
        >>> swa_utils.get_swa_multi_avg_fn()([1.0, 0.0], [4.0, 3.0], 2)
        [2.0, 1.0]
    """
    return Partial(_each, get_swa_avg_fn())


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAvgFn:
    r"""Return the function for the exponential moving average of a list of arrays; see :func:`get_ema_avg_fn`.

    Args:
        decay: :math:`\beta`, in [0, 1] (default 0.999).

    Returns:
        ``multi_avg_fn(averaged_params, current_params, num_averaged) -> averaged_params``.

    Raises:
        ``ValueError`` for a decay out of range.

    Examples:
        >>> from jaxoptim.optim import swa_utils
        >>> swa_utils.get_ema_multi_avg_fn(decay=0.5)([1.0, 0.0], [4.0, 3.0], 2)
        [2.5, 1.5]
    """
    return Partial(_each, get_ema_avg_fn(decay))


def _each(avg_fn: AvgFn, averaged: Sequence[Any], current: Sequence[Any], num_averaged: Any) -> list[Any]:
    return [avg_fn(average, param, num_averaged) for average, param in zip(averaged, current, strict=True)]


def _is_elementwise(function: Any) -> bool:
    """Return whether an averaging function is one of ours, which may be applied to packed parameters."""
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
            other keys (``"batch_stats"``). Of a module of equinox the inexact arrays are averaged, of one of nnx its
            ``nnx.Param``, or what the optimizer trains (``wrt``); variables that a call may change are
            buffers.
        avg_fn: ``avg_fn(averaged_param, current_param, num_averaged)`` returns the new average of one array
            (default None: the mean, :func:`get_swa_avg_fn`). It is compiled.
        multi_avg_fn: the same for lists of all arrays of a dtype (default None). Unlike torch's it returns the
            list.
        use_buffers: average the buffers too (default False: keep the last ones).

    Attributes:
        module: the averaged tree, with the dtypes of ``model``; what was read stays valid.
        n_averaged: the number of updates, an int32 scalar.

    Raises:
        ``ValueError`` for both functions at once.

    References:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> averaged = optim.swa_utils.AveragedModel({"w": jnp.zeros(2)})
        >>> for value in (1.0, 3.0):
        ...     averaged.update_parameters({"w": jnp.full(2, value)})
        >>> averaged.module["w"].tolist(), int(averaged.n_averaged)
        ([2.0, 2.0], 2)
    """

    _wrt: Any = None  # what is averaged of an nnx module

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
        if isinstance(model, Optimizer):
            self._wrt = model.wrt
        self._whole, tree = _tree(model, self._wrt)
        self._like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), dtype_of(x)), tree)
        self._averaged = [use_buffers or not is_buffer for is_buffer in _are_buffers(self._like)]
        self._function = as_pytree(multi_avg_fn or Partial(_each, as_pytree(avg_fn or get_swa_avg_fn())))
        self._fill([first_average(x) for x in jax.tree.leaves(tree)])

    def _fill(self, leaves: Sequence[jax.Array]) -> None:
        """Continue from these arrays, which are ours, in the dtypes of the average."""
        average, self._buffers = self._parted(leaves)
        self._average: Any = pack(average) if _is_elementwise(self._function) else average
        self._module: Any = None

    def _parted(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Return the leaves that are averaged, and the others."""
        pairs = list(zip(self._averaged, leaves, strict=True))
        return [x for averaged, x in pairs if averaged], [x for averaged, x in pairs if not averaged]

    def _leaves(self) -> list[jax.Array]:
        """Return averages and buffers in the order of the tree; some are ours and will be donated."""
        average, buffers = iter(unpacked(self._average)), iter(self._buffers)
        return [next(average if averaged else buffers) for averaged in self._averaged]

    def _copies(self) -> list[jax.Array]:
        """Return copies of averages and buffers for others to hold."""
        ours = {id(x) for x in jax.tree.leaves((self._average, self._buffers))}
        return [copied(x) if id(x) in ours else x for x in self._leaves()]

    @property
    def module(self) -> Any:
        """The averaged tree."""
        if self._module is None:
            likes, treedef = jax.tree.flatten(self._like)
            leaves = [_cast(x, like.dtype) for x, like in zip(self._copies(), likes, strict=True)]
            tree = jax.tree.unflatten(treedef, leaves)
            self._module = tree if self._whole is None else _joined(self._whole, tree)
        return self._module

    def put(self, collection: str, values: Sequence[jax.Array]) -> None:
        """Replace the arrays under one key, such as ``"batch_stats"``.

        Args:
            collection: the key.
            values: the arrays under it, in the order of the tree.
        """
        key, given = jax.tree_util.DictKey(collection), iter(values)
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(self._like)[0]]
        leaves = zip(paths, self._leaves(), strict=True)
        self._fill([first_average(next(given)) if path[0] == key else x for path, x in leaves])

    def update_parameters(self, model: Any) -> None:
        """Take one more set of parameters into the average; the first is copied.

        Args:
            model: a tree like the one given first, or an ``Optimizer``. The parameters of groups that were added to
                it since the last call are copied, and the average is a list of trees, as ``params`` is.

        Raises:
            ``ValueError`` for another tree or shape; ``TypeError`` if ``multi_avg_fn`` does not return as many
            arrays as it is given. The average is as it was then.
        """
        before, tree = dict(vars(self)), _tree(model, self._wrt)[1]
        try:
            if isinstance(model, Optimizer) and (added := _added(tree, self._like)):
                self._grow(tree, added)
            leaves = trees.arrays_like(tree, self._like, "the model", "the average")
            params, buffers = self._parted([as_jax(x) for x in leaves])
            self._average, self._buffers, self.n_averaged = _update(
                self._average, self._function, self.n_averaged, params, buffers
            )
        except BaseException:
            vars(self).update(before)
            raise
        self._module = None

    def _grow(self, tree: list[Any], added: list[Any]) -> None:
        """Take in the last trees of a list as they are; the others are known."""
        known, new = self._leaves(), jax.tree.leaves(added)
        likes = [*jax.tree.leaves(self._like), *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in new)]
        self._like = jax.tree.unflatten(jax.tree.structure(tree), likes)
        self._averaged = [*self._averaged, *[True] * len(new)]
        self._fill([*known, *map(first_average, new)])

    def state_dict(self) -> dict[str, Any]:
        """Return the average in torch's layout.

        Returns:
            ``{"n_averaged": count, "module.<path>": array, ...}``, with the dotted path of each array; averages in
            at least float32.
        """
        return {"n_averaged": self.n_averaged} | dict(zip(self._names(), self._copies(), strict=True))

    def _names(self) -> list[str]:
        return [f"module.{name}" for name in trees.array_names(self._like)]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load the result of :meth:`state_dict`, or torch's where the names are the same.

        Args:
            state_dict: it is not changed.
            strict: require every name and no other (default True).

        Raises:
            ``RuntimeError`` that lists missing and unexpected names and arrays of another shape. Nothing is
            changed then.
        """
        current = {"n_averaged": self.n_averaged} | dict(zip(self._names(), self._leaves(), strict=True))
        problems = [f"Missing key in state_dict: {name!r}." for name in current if strict and name not in state_dict]
        problems += [
            f"Unexpected key in state_dict: {name!r}." for name in state_dict if strict and name not in current
        ]
        problems += [
            f"size mismatch for {name}: the state dict has {np.shape(state_dict[name])}, the model has {array.shape}."
            for name, array in current.items()
            if name in state_dict and np.shape(state_dict[name]) != array.shape
        ]
        given = {} if problems else {name: copied(state_dict.get(name, array)) for name, array in current.items()}
        problems += [
            f"{name} is complex in the state dict, but real in the model."
            for name, array in given.items()
            if is_complex(array) and not is_complex(current[name])
        ]
        if problems:
            raise RuntimeError("Error(s) in loading state_dict for AveragedModel:\n" + "\n".join(problems))
        new = {name: _cast(array, current[name].dtype) for name, array in given.items()}
        self.n_averaged = new.pop("n_averaged")
        self._fill(list(new.values()))

    def __getstate__(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("avg_fn", "multi_avg_fn", "use_buffers", "n_averaged")}
        return state | {"module": self.module, "leaves": self._copies(), "wrt": self._wrt}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._wrt = state["wrt"]
        self.__init__(state["module"], state["avg_fn"], state["multi_avg_fn"], state["use_buffers"])  # type: ignore[misc]
        self.n_averaged = state["n_averaged"]
        self._fill([copied(x) for x in state["leaves"]])


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    """Return an array in a dtype, which keys have already."""
    return x if x.dtype == dtype else x.astype(dtype)


def _tree(model: Any, wrt: Any) -> tuple[Parts | None, Any]:
    """Return the parts of a module, None for anything else, and the arrays of a model as a tree."""
    is_optimizer = isinstance(model, Optimizer)
    parts = model.parts if is_optimizer and wrt is not None and model.wrt == wrt else None
    if parts is None:
        whole = model.params if is_optimizer else model
        parts = module_of(whole, wrt if is_nnx(whole) else None)
        if parts is None:
            return None, whole
    changing = parts.rest.changing
    return parts, parts.trained if changing is None else {"params": parts.trained, "rest": changing}


def _added(tree: Any, like: Any) -> list[Any]:
    """Return the trees that ``add_param_group`` has put behind a tree, or behind a list of trees."""
    for known in ([like], like):
        if isinstance(tree, list) and isinstance(known, list) and 0 < len(known) < len(tree):
            structures: list[Any] = [jax.tree.structure(x) for x in (tree[: len(known)], known)]
            if structures[0] == structures[1]:
                return tree[len(known) :]
    return []


def _joined(parts: Parts, tree: Any) -> Any:
    """Return the module with the arrays of a tree."""
    if parts.rest.changing is None:
        return parts.definition.joined(tree, parts.rest)
    return parts.definition.joined(tree["params"], parts.rest._replace(changing=tree["rest"]))


def _are_buffers(tree: Any) -> list[bool]:
    """Return a mask of the arrays of a tree that are no parameters."""
    is_variables = isinstance(tree, Mapping) and "params" in tree
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    inside = [not is_variables or path[0] == jax.tree_util.DictKey("params") for path, _ in leaves]
    return [not (params and floating(x)) for params, (_, x) in zip(inside, leaves, strict=True)]


@functools.partial(jax.jit, donate_argnums=0)
def _update(
    average: Any, function: MultiAvgFn, num_averaged: jax.Array, params: list[Any], buffers: list[Any]
) -> tuple[Any, list[Any], jax.Array]:
    """Return the average, the buffers and the count after one more set of parameters."""
    old, treedef = jax.tree.flatten(average)
    current = jax.tree.leaves(average.pack(params) if isinstance(average, Packed) else params)
    new: list[Any] = [None] * len(old)
    for dtype in dict.fromkeys(x.dtype for x in old):
        group = [i for i, x in enumerate(old) if x.dtype == dtype]
        averages, given = [old[i] for i in group], [current[i].astype(dtype) for i in group]
        results = function(averages, given, num_averaged)
        _check_results(results, given)
        for i, param, result in zip(group, given, results, strict=True):
            new[i] = first_copied(param, jnp.asarray(result), num_averaged)
    return jax.tree.unflatten(treedef, new), [copied(x) for x in buffers], num_averaged + 1


def _check_results(results: Any, params: Sequence[jax.Array]) -> None:
    """Raise for results that a user's averaging function must not return."""
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
