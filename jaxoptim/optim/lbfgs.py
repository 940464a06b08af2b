"""torch's LBFGS over parameter pytrees."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxoptim import rules
from jaxoptim.core import OptState, as_jax
from jaxoptim.core.flat import flatten, flatten_like, unflatten
from jaxoptim.core.loss import Loss, evaluated
from jaxoptim.core.numerics import is_complex, real_size
from jaxoptim.core.placement import on_mesh_of
from jaxoptim.distributed.layouts import laid_out
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.layout import Layout
from jaxoptim.engine.numbers import Numbers
from jaxoptim.engine.owner import Minimization, kind_of
from jaxoptim.engine.programs import StepOptions
from jaxoptim.engine.static import Static
from jaxoptim.engine.whole import contents, named
from jaxoptim.optim import state_checks
from jaxoptim.optim.hooks import hooked
from jaxoptim.optim.optimizer import Number, Optimizer
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.part import Part
from jaxoptim.optim.state_dicts import Transfer
from jaxoptim.optim.storage import Storage
from jaxoptim.optim.whole import WholeStorage

_HISTORY = ("old_dirs", "old_stps", "ro")
_ENTRIES = ("func_evals", "n_iter", "al", "d", "t", *_HISTORY, "H_diag", "prev_flat_grad", "prev_loss")
"""torch's state, in its order; ``al`` is scratch."""
_LISTS = ("al", *_HISTORY)
_VECTORS = ("d", "prev_flat_grad", "old_dirs", "old_stps")
"""The entries with a number for each of the parameters."""


class FlatStorage(WholeStorage):
    """The parameters of the only group as one vector; torch files its state under the first of them."""

    def check_param(self, rule: Any, name: str, param: Parameter) -> None:
        """Accept all: a vector is made of any parameters."""

    # State.

    def fresh(self, at: int) -> OptState:
        """Return the state before the first step."""
        return self._placed(jnp.zeros((), jnp.int32), self._first())

    def _placed(self, count: jax.Array, shared: Any) -> OptState:
        return on_mesh_of(self._owner().values, OptState(count, {}, shared))

    def _first(self) -> Any:
        return _init(self.rule_at(0), _vector(self.layout, self._owner().values))

    def restored(self, at: int, states: Mapping[Parameter, dict[str, Any]], began: bool) -> OptState | None:
        """Return the state of the vector, from that of its first parameter."""
        section = self.sections[at]
        state = states[section.params[0]] if section.times else {}
        if not state:
            return None
        return self._placed(jnp.zeros((), jnp.int32), _loaded(self.rule_at(at), self._first(), state))

    def load_part(self, part: Part, counts: Mapping[Parameter, Any]) -> None:
        """Take over state that was kept elsewhere; all of it is shared."""
        self.replace_state(0, self._placed(jnp.asarray(part.count, jnp.int32), part.shared or {}))

    def state_of(self, param: Parameter) -> dict[str, Any]:
        """Return the state by torch's names in a new dict; empty for all but the first parameter."""
        if param in self._edited:
            return dict(self._edited[param])
        if self._place_of.get(param) != (0, 0) or (kept := self.state_at(0)) is None:
            return {}
        rule: Any = self.rule_at(0)
        shared = kept.shared
        counts = {name: int(shared[name]) for name in ("func_evals", "n_iter")}
        if not counts["n_iter"]:  # the first gradient was below the tolerance
            return counts if counts["func_evals"] else {}
        scratch = {"al": [None] * rule.history_size} if counts["n_iter"] > 1 else {}
        state = {**shared, **rule.history(shared), **counts, **scratch, "prev_loss": float(shared["prev_loss"])}
        return {name: state[name] for name in _ENTRIES if name in state}

    # Steps.

    def advance(self, grads: Any) -> None:
        """Refuse: one gradient is not enough."""
        raise TypeError(
            "LBFGS evaluates the loss at several points in one step, so it takes no gradients. "
            "Call step(closure) with a function that sets the gradients and returns the loss, or minimize(loss_fn)."
        )

    def minimize(self, job: Minimization) -> Any:
        """Make one step with all of its evaluations, in one compiled call; see :meth:`Owner.minimize_by`."""
        loss, args, options, _ = job
        if options != StepOptions():
            raise TypeError(
                "LBFGS evaluates the loss at several points in one step, so its minimize takes no clip_norm, "
                "clip_value, accumulate, skip_nonfinite, measure or loss_scale. Put them into the loss, or take "
                "another optimizer."
            )
        self._settle_trained()
        with self._started():
            owner = self._owner()
            kind = None if loss.has_aux else (loss, self._shardings, *map(kind_of, jax.tree.leaves(args)))
            given = (self.layout, self._shardings, owner.form, self.numbers, owner.taken(), loss, args)
            value, aux, spoilt = owner.run(_minimize, kind, given)[2:]
        # A search for the step stays where the loss is finite, and need not be waited for.
        if not self._has_warned and not self._searches and bool(spoilt):
            self._warn(8)
        return value, aux, None

    @property
    def _shardings(self) -> tuple[Any, ...]:
        """The shardings of values on several devices, None for others: the compiler would choose by the vector."""
        shardings = [x.sharding for x in self._owner().values]
        return tuple(x if isinstance(x, NamedSharding) and x.mesh.size > 1 else None for x in shardings)

    def _settle_trained(self) -> None:
        """Bring everything up to date; raises if a parameter is frozen."""
        self.settle()
        if held := self._owner().held:
            raise ValueError(
                f"{self.layout.structs[min(held)].name!r} is frozen, but LBFGS updates all of its parameters as one "
                "vector. Give it those to train alone, and the others to the loss."
            )

    _has_warned = False

    @property
    def _searches(self) -> bool:
        rule: Any = self.rule_at(0)
        return rule.line_search_fn is not None

    def _warn(self, level: int) -> None:
        """Warn, once, of a step that ended early; the user's line is ``level`` calls away."""
        self._has_warned = True
        warnings.warn(
            "The loss became NaN or infinite in a step of LBFGS, which ended at the last point where it was finite. "
            "Give line_search_fn='strong_wolfe', or a smaller lr.",
            stacklevel=level,
        )

    def search(self, closure: Callable[[], Any]) -> Any:
        """Make one step with evaluations by a function that sets gradients; as before if it raises."""
        self._settle_trained()
        owner, losses = self._owner(), list[Any]()
        is_new = self.state_at(0) is None
        self.start()
        before = owner.contents
        try:
            places = self._shardings
            search = _begin(self.layout, self.numbers, before)
            while not losses or not bool(search.done):
                losses.append(closure())
                grads = _vector(self.layout, [param.grad for param in owner.params])
                search, values = _observe(self.layout, places, self.numbers, search, before, losses[-1], grads)
                owner.replace(contents(values, owner.states))
            owner.replace(_finish(self.layout, places, self.numbers, search, before))
        except BaseException:
            owner.replace(before)
            if is_new:
                self.replace_state(0, None)
            raise
        if not self._has_warned and not self._searches and not np.isfinite(float(losses[-1])):
            self._warn(5)
        return losses[0]


# The compiled search. The vector is that of the first section; other parameters stay.


def _vector(layout: Layout, values: Sequence[Any]) -> OrderedDict[str, Any]:
    """Return the values of the parameters in the vector, by name."""
    return named(layout, layout.cells[0], values)


def _with_vector(layout: Layout, places: tuple[Any, ...], values: Sequence[Any], x: jax.Array) -> list[Any]:
    """Return all values, with those of the vector taken from it."""
    own = unflatten(x, _vector(layout, values))
    return laid_out([own.get(struct.name, old) for struct, old in zip(layout.structs, values, strict=True)], places)


def _stepped(state: OptState, shared: Any, others: Sequence[Any]) -> list[Any]:
    return [OptState(state.step + 1, {}, shared), *others]


@functools.partial(jax.jit, static_argnames=("layout", "places", "form", "loss"), donate_argnames="leaves")
def _minimize(
    layout: Layout,
    places: tuple[Any, ...],
    form: Static,
    numbers: Numbers,
    leaves: Sequence[Any],
    loss: Loss,
    args: tuple[Any, ...],
) -> tuple[list[Any], list[Any], Any, Any, jax.Array]:
    """Make one step, line search included, in the form of :func:`jaxoptim.engine.programs.minimize`.

    The auxiliary output is that of the first evaluation. What comes last says whether the step ended at a loss that is
    not finite.
    """
    rule, (values, (state, *others)) = numbers.each()[0], Contents.tree_unflatten(form, leaves).cells[0]
    names = [struct.name for struct in layout.structs]

    def by_name(x: jax.Array) -> dict[str, Any]:
        return dict(zip(names, _with_vector(layout, places, values, x), strict=True))

    def value_and_grad(x: jax.Array) -> tuple[Any, Any]:
        found = evaluated(loss.of(layout.tree).of(by_name), x, args)
        return found.loss, found.grads

    x, first, aux = flatten(_vector(layout, values)), None, None
    if loss.has_aux:
        found = evaluated(loss.of(layout.tree).of(by_name), x, args)
        first, aux = (found.loss, found.grads), found.aux
    value, x, shared, spoilt = rule.minimized(value_and_grad, x, state.shared, first)
    new = contents(_with_vector(layout, places, values, x), _stepped(state, shared, others))
    return [new.leaves], [None], value, aux, spoilt


@functools.partial(jax.jit, static_argnames="layout")
def _begin(layout: Layout, numbers: Numbers, kept: Contents) -> Any:
    """Begin a search that shares no memory with the optimizer, which keeps its state until the step succeeds."""
    values, (state, *_) = kept.cells[0]
    return numbers.each()[0].start(state.shared, flatten(_vector(layout, values)))


@functools.partial(jax.jit, static_argnames=("layout", "places"), donate_argnames="search")
def _observe(
    layout: Layout, places: tuple[Any, ...], numbers: Numbers, search: Any, kept: Contents, loss: Any, grads: Any
) -> tuple[Any, Any]:
    """Return the search after an evaluation, and the values to evaluate next."""
    values, _ = kept.cells[0]
    search = numbers.each()[0].observe(search, loss, flatten_like(grads, _vector(layout, values)))
    return search, _with_vector(layout, places, values, search.point)


@functools.partial(jax.jit, static_argnames=("layout", "places"))
def _finish(layout: Layout, places: tuple[Any, ...], numbers: Numbers, search: Any, kept: Contents) -> Contents:
    """Return the values and the state at the end of a step."""
    values, (state, *others) = kept.cells[0]
    _, x, shared = numbers.each()[0].finish(search)
    return contents(_with_vector(layout, places, values, x), _stepped(state, shared, others))


_init = jax.jit(lambda rule, values: rule.init(flatten(values)))


def _loaded(rule: Any, shared: dict[str, jax.Array], state: dict[str, Any]) -> dict[str, jax.Array]:
    """Return the state with torch's entries in it."""
    given = {name: state[name] for name in shared if name in state and name not in _HISTORY}
    shared = shared | {name: jnp.asarray(x, shared[name].dtype) for name, x in given.items()}
    return rule.with_history(shared, *(list(state.get(name) or []) for name in _HISTORY))


class LBFGS(Optimizer):
    """torch's ``LBFGS``, computed by :class:`jaxoptim.rules.LBFGS`.

    ``step(closure)`` evaluates the closure exactly as often and at the same points as torch, each put into the
    parameters' ``value`` first. ``minimize(loss_fn)`` does the same in one compiled program. There is one group.
    A step without line search that meets a loss that is not finite warns, once; for that ``minimize`` waits for its
    step, which it does not with a line search.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.LBFGS(jnp.array([-1.0, 1.5]), line_search_fn="strong_wolfe")
        >>> def rosenbrock(x):
        ...     return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> for _ in range(3):
        ...     loss = opt.minimize(rosenbrock)
        >>> [round(x, 2) for x in opt.params.tolist()]
        [1.0, 1.0]
    """

    rule = rules.LBFGS
    storage_class: ClassVar[type[Storage]] = FlatStorage
    _storage: FlatStorage

    def __init__(
        self,
        params: Any,
        lr: Number = rule.lr,
        max_iter: int = rule.max_iter,
        max_eval: int | None = rule.max_eval,
        tolerance_grad: float = rule.tolerance_grad,
        tolerance_change: float = rule.tolerance_change,
        history_size: int = rule.history_size,
        line_search_fn: str | None = rule.line_search_fn,
        *,
        wrt: Any = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "max_iter": max_iter,
                "max_eval": max_iter * 5 // 4 if max_eval is None else max_eval,
                "tolerance_grad": tolerance_grad,
                "tolerance_change": tolerance_change,
                "history_size": history_size,
                "line_search_fn": line_search_fn,
            },
            wrt=wrt,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the only group.

        Args:
            param_group: see :meth:`Optimizer.add_param_group`.

        Raises:
            ``ValueError`` for a second one.
        """
        if self.param_groups:
            raise ValueError(
                "LBFGS doesn't support per-parameter options (parameter groups). Put all parameters into one group."
            )
        super().add_param_group(param_group)

    def _transferred(self, state: Mapping[Any, Any], transfer: Transfer) -> Mapping[Any, Any]:
        """Return the state with its vectors in another order of the parameters."""
        _, given, wanted, moves = transfer
        if list(given) == list(wanted) and not moves:
            return state
        ends = dict(zip(given, np.cumsum([real_size(param) for param in given]), strict=True))
        index = []
        for param in wanted:
            numbers = np.arange(ends[param] - real_size(param), ends[param]).reshape(-1, 2 if is_complex(param) else 1)
            index.append(numbers[moves[param].index.reshape(-1)] if param in moves else numbers)
        order = np.concatenate([numbers.reshape(-1) for numbers in index])
        entry = dict(state.get(given[0], {}))
        for name in [name for name in _VECTORS if name in entry]:
            x = entry[name]
            entry[name] = [as_jax(row)[order] for row in x] if name in _LISTS else as_jax(x)[order]
        others = {key: value for key, value in state.items() if key is not given[0]}
        return others | ({wanted[0]: entry} if entry else {})

    def _check_state(self, group: dict[str, Any], state: Mapping[Any, Any]) -> None:
        size = sum(map(real_size, group["params"]))
        for index, param in enumerate(group["params"]):
            given = state.get(param, {})
            if unknown := sorted(set(given) - set(_ENTRIES) if index == 0 else set(given)):
                raise ValueError(
                    f"loaded state dict has {unknown[0]!r} for the parameter {param.name or index!r}, but LBFGS keeps "
                    f"{', '.join(_ENTRIES)}, of the first parameter only. Load an LBFGS, or use strict=False."
                )
            label = state_checks.labels(group)[index]
            entries = [(name, given[name]) for name in _ENTRIES if name not in _LISTS and given.get(name) is not None]
            entries += [(name, entry) for name in _HISTORY for entry in given.get(name) or []]
            for name, entry in entries:
                wanted = jax.ShapeDtypeStruct((size,) if name in _VECTORS else (), jnp.float32)
                state_checks.check_array(name, label, entry, wanted)
            if len(lengths := {len(given.get(name) or []) for name in _HISTORY}) > 1:
                raise ValueError(
                    f"loaded state dict has {' and '.join(map(str, sorted(lengths)))} entries in its lists "
                    f"{', '.join(_HISTORY)}, which must be equally long."
                )

    @hooked
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Make one step of up to ``max_iter`` iterations.

        Args:
            closure: a function that evaluates the loss at the parameters' current values, sets each ``grad``
                (None counts as zero), and returns the loss.

        Returns:
            The loss of the first evaluation.

        Raises:
            ``TypeError`` for anything but a function; what the closure raises, and then nothing has changed.

        Examples:
            >>> import jax
            >>> from jaxoptim import optim
            >>> x = optim.Parameter(3.0)
            >>> opt = optim.LBFGS([x])
            >>> def closure():
            ...     loss, x.grad = jax.value_and_grad(lambda x: (x - 1) ** 2)(x.value)
            ...     return loss
            >>> float(opt.step(closure)), round(float(x.value), 3)
            (4.0, 1.0)
        """
        if not (callable(closure) and jax.tree_util.all_leaves([closure])):
            self._storage.advance(closure)
        return self._storage.search(closure)
