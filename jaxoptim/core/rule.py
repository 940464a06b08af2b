"""The base class of optimizers: a frozen dataclass of hyperparameters with the update of one array."""

from __future__ import annotations

import abc
import dataclasses
import math
import operator
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core.decay import Decay
from jaxoptim.core.precision import DEFAULT, Precision, checked
from jaxoptim.core.rearrangement import Rearrangement
from jaxoptim.core.shown import shown

R = TypeVar("R", bound="Hyperparameters")

Slots = dict[str, Any]
"""The state of one array, a dict from the names of slots to arrays, or to None where the array has no such slot."""


_COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


@dataclasses.dataclass(frozen=True)
class Numeric:
    """Annotation metadata: the check of the number in a field, and the form in which it is stored.

    Attributes:
        bounds: the conditions on the number, such as ``((">=", 0), ("<", 1))``.
        decay: whether it is stored as a :class:`Decay`.
        zero_is_off: whether a literal zero removes its term from the compiled program.
        optional: whether None is allowed.
    """

    bounds: tuple[tuple[str, float], ...] = ()
    decay: bool = False
    zero_is_off: bool = False
    optional: bool = False

    def __str__(self) -> str:
        """Describe the bounds in words."""
        return " and ".join(f"{comparison} {bound:g}" for comparison, bound in self.bounds) or "no NaN"

    def admits(self, value: Any) -> bool:
        """Whether every number in ``value`` satisfies the bounds; NaN never does."""
        numbers = [value] if isinstance(value, int | float) else np.asarray(value, np.float64).ravel().tolist()
        within = (_COMPARISONS[comparison](x, bound) for x in numbers for comparison, bound in self.bounds)
        return all(within) and not any(math.isnan(x) for x in numbers)


@dataclasses.dataclass(frozen=True)
class Traced:
    """Annotation metadata of a field that holds a pytree of arrays, stored as it is given.

    Attributes:
        by_leaf: it is one array for all parameters, or a tree like theirs; the rule of each sees its own.
        is_value: each is a value that its parameter may have, of its shape, and not one that broadcasts.
    """

    by_leaf: bool = False
    is_value: bool = False


Scalar = Annotated[Any, Numeric()]
"""Any number."""
NonNegative = Annotated[Any, Numeric(((">=", 0),))]
"""A number >= 0."""
OptionalNonNegative = Annotated[Any, Numeric(((">=", 0),), optional=True)]
"""A number >= 0, or None."""
Positive = Annotated[Any, Numeric(((">", 0),))]
"""A number > 0."""
Coefficient = Annotated[Any, Numeric(((">=", 0),), zero_is_off=True)]
"""A number >= 0 whose literal zero removes its term from the compiled program."""
DecayRate = Annotated[Any, Numeric(((">=", 0), ("<", 1)), decay=True)]
"""A decay rate in [0, 1), kept as a :class:`Decay`."""
ClosedDecayRate = Annotated[Any, Numeric(((">=", 0), ("<=", 1)), decay=True)]
"""A decay rate in [0, 1], kept as a :class:`Decay`."""
OpenDecayRate = Annotated[Any, Numeric(((">=", 0),), decay=True)]
"""A decay rate >= 0, kept as a :class:`Decay`, where the parent checks no upper bound."""
Dampening = Annotated[Any, Numeric(decay=True, zero_is_off=True)]
"""A number kept with its complement; its literal zero removes its term from the compiled program."""
OptionalCoefficient = Annotated[Any, Numeric(((">=", 0),), zero_is_off=True, optional=True)]
"""A number >= 0 whose literal zero, like None, removes its term from the compiled program."""
Arrays = Annotated[Any, Traced()]
"""A pytree of arrays."""
ArraysByLeaf = Annotated[Any, Traced(by_leaf=True)]
"""One array for all parameters, or a pytree like them."""
ValuesByLeaf = Annotated[Any, Traced(by_leaf=True, is_value=True)]
"""A pytree of values of the parameters, with None for some."""


class Off(float):
    """A literal zero, static in the pytree: the term of its :data:`Coefficient` is left out of the compiled program.

    Pickled rules and the checkpoints of runs of chains name this class.
    """

    __slots__ = ()


jax.tree_util.register_static(Off)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PlainFunction:
    """A plain function as a pytree without leaves."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self.function(*args)


def as_pytree(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function if it is a pytree, such as a schedule with a traced rate; else wrap it as a static node."""
    return PlainFunction(function) if jax.tree_util.all_leaves([function]) else function


def enabled(coefficient: Any) -> bool:
    """Whether the term of a :data:`Coefficient` is part of the compiled program."""
    return not isinstance(coefficient, Off)


def is_known(value: Any) -> bool:
    """Whether the number in a field is concrete: not traced, not a schedule, not on another host."""
    if isinstance(value, Decay):
        return is_known(value.rate)
    if isinstance(value, jax.core.Tracer) or callable(value):
        return False
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def is_part(value: Any) -> bool:
    """Whether a value is a leaf of a pytree of numbers: a number, a schedule, a decay, or None."""
    return value is None or isinstance(value, Off | Decay) or callable(value)


def is_tree(value: Any) -> bool:
    """Whether a field holds a pytree of numbers, one for each parameter, instead of one number for all."""
    return not (isinstance(value, float) or is_part(value) or jax.tree_util.all_leaves([value]))


class Hyperparameters:
    """The base of what :func:`rule` decorates: checked hyperparameters, and the pytree they make.

    The instance is a pytree. Its leaves are the numbers; switches (bool, str, int, None, plain schedules,
    and the zero of a :data:`Coefficient`) belong to its structure. So a rule passed to a jitted function
    has its numbers traced, and ``grad`` with respect to a rule gives hypergradients. ``vmap`` over a rule
    sweeps hyperparameters: ``jax.vmap(train)(jax.vmap(Adam)(rates))``, where the inner ``vmap`` makes one
    rule of all the settings.

    An optimizer that updates one array at a time is a :class:`Rule`. One that sees all parameters at once,
    such as L-BFGS, derives from this class and registers how it becomes a transformation with
    :func:`jaxoptim.transformation`.

    Raises:
        Construction raises ``ValueError`` for a number out of range and ``TypeError`` for what is not a
        number. Traced values are not checked.

    Examples:
        >>> import jaxoptim
        >>> jaxoptim.rules.SGD(lr=0.1).replace(lr=0.2).lr
        0.2
    """

    specs: ClassVar[dict[str, Any]] = {}
    """The :class:`Numeric` (a tuple of them for a tuple) or :class:`Traced` of each traced field."""

    def check(self) -> None:
        """Raise for hyperparameters that are inconsistent with each other."""

    def at(self, step: Any) -> Self:
        """Return the rule with every schedule replaced by its value at ``step``."""

        def value_of(spec: Any, value: Any) -> Any:
            if isinstance(spec, tuple):
                return tuple(value_of(s, v) for s, v in zip(spec, value, strict=True))
            if isinstance(spec, Numeric) and is_tree(value):
                return jax.tree.map(lambda part: value_of(spec, part), value, is_leaf=is_part)
            if not (isinstance(spec, Numeric) and callable(value)):
                return value
            return Decay.of(value(step)) if spec.decay else value(step)

        now = {name: value_of(spec, getattr(self, name)) for name, spec in self.specs.items()}
        return assembled(type(self), vars(self) | now)

    def cast(self, dtype: Any) -> Self:
        """Return the rule with every floating array among its leaves cast to ``dtype``."""

        def cast(leaf: Any) -> Any:
            if isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating):
                return jnp.asarray(leaf, dtype)
            return leaf

        return jax.tree.map(cast, self)

    def replace(self, **fields: Any) -> Self:
        """Return a new rule with some hyperparameters changed, checked like any other."""
        allowed = [f.name for f in dataclasses.fields(self) if f.init]  # type: ignore[arg-type]
        if unknown := sorted(set(fields) - set(allowed)):
            raise TypeError(
                f"{type(self).__name__} has no hyperparameter {', '.join(unknown)}. It has {', '.join(allowed)}."
            )
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]

    def __post_init__(self) -> None:
        for name, spec in self.specs.items():
            object.__setattr__(self, name, _validated(spec, getattr(self, name), name, type(self).__name__))
        by_parameter = self.by_parameter
        if refused := [name for name in by_parameter if not self.takes_tree(name)]:
            raise TypeError(
                f"Invalid {refused[0]}: {shown(getattr(self, refused[0]))}. {type(self).__name__} takes a number or a "
                f"schedule (step -> value) for {refused[0]}, one for all parameters."
            )
        if not by_parameter:
            self.check()  # otherwise when the numbers of each parameter are known

    @property
    def by_parameter(self) -> list[str]:
        """The names of the hyperparameters that hold a pytree of numbers."""
        return [
            name
            for name, spec in self.specs.items()
            if (isinstance(spec, Numeric) and is_tree(getattr(self, name)))
            or (isinstance(spec, tuple) and any(map(is_tree, getattr(self, name))))
        ]

    def takes_tree(self, name: str) -> bool:
        """Whether a number may be another one for each parameter."""
        return False


class Rule(Hyperparameters, abc.ABC):
    """The base of every optimizer that works array by array: hyperparameters, and the update of one array.

    A subclass is decorated with :func:`rule`, declares its hyperparameters as annotated fields, and writes
    :meth:`init` and :meth:`update`. It never sees a tree, a dtype below float32, a complex number or a
    missing gradient: the functions of ``jaxoptim.core.transform`` take care of those.

    Any number may be a tree like the parameters, or a prefix of one, whose leaves are numbers or schedules: each
    array is then updated by its own. They are leaves of the rule as all numbers are.

    Raises:
        As :class:`Hyperparameters`.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim
        >>> from jaxoptim.core import Rule, Scalar, rule
        >>> @rule
        ... class GradientDescent(Rule):
        ...     lr: Scalar = 0.1
        ...
        ...     def init(self, param):
        ...         return {}
        ...
        ...     def update(self, grad, slots, param, step):
        ...         return -self.lr * grad, slots
        >>> params = {"w": jnp.ones(2)}
        >>> state = jaxoptim.init(GradientDescent(), params)
        >>> params, state = jaxoptim.step(GradientDescent(), params, {"w": jnp.ones(2)}, state)
        >>> [round(float(x), 3) for x in params["w"]]
        [0.9, 0.9]
    """

    sparse: ClassVar[Literal["refused", "accepted", "required"]] = "refused"
    """Whether gradients may come as rows (``BCOO``)."""
    complex: ClassVar[bool] = True
    """Whether complex parameters are treated as pairs of real numbers."""
    complex_error: ClassVar[type[Exception]] = RuntimeError
    """The exception that is raised for complex parameters if they are refused: torch's type."""
    per_update: ClassVar[tuple[str, ...]] = ()
    """Fields that a single ``update`` may replace through a keyword of the same name."""
    of_tree: ClassVar[tuple[str, ...]] = ()
    """Fields that hold one number for all parameters, because state of the whole pytree depends on it."""
    takes: ClassVar[tuple[str, ...]] = ()
    """Names by which a single ``update`` takes further pytrees like the parameters."""

    precision: Precision = DEFAULT
    """The storage of low-precision arrays; not a hyperparameter."""

    def with_precision(
        self, *, master_weights: bool = False, rounding: str = "nearest", state_dtype: Any = None
    ) -> Self:
        r"""Return the rule with another way to store low-precision arrays.

        A step that is smaller than half the distance between neighbours of float16 or bfloat16 is lost when the new
        value is rounded to the nearest one. With :math:`\theta^{32}` in float32,

        .. math::
            \theta^{32}_t = \theta^{32}_{t-1} + u_t, \qquad \theta_t = \mathrm{round}(\theta^{32}_t),

        none is, and the run is that of float32 parameters which are rounded in the loss, to the last bit. Stochastic
        rounding, :math:`P(b) = (x - a) / (b - a)` for the neighbours :math:`a \le x \le b`, loses none in the mean,
        and takes no memory.

        Args:
            master_weights: keep :math:`\theta^{32}` of float16 and bfloat16 parameters in the slot
                ``master_weights`` (default False). A value that you assign to the parameter counts.
            rounding: the rounding of parameters without it, and of low-precision state: ``"nearest"`` (default) or
                ``"stochastic"``, whose random numbers are a hash of the number, its place, and the count of steps.
            state_dtype: the dtype of slots of the parameter's shape, bfloat16 or float16 (default None: that of the
                parameter, float32 at least).

        Raises:
            ``ValueError`` for another rounding or dtype. ``update`` then needs the parameters, and gives updates of
            float16 and bfloat16 parameters in float32, so that ``optax.apply_updates`` is exact.

        References:
            Micikevicius et al., Mixed precision training, ICLR 2018. Gupta et al., Deep learning with limited
            numerical precision, ICML 2015.

        Examples:
            >>> import jax.numpy as jnp, jaxoptim
            >>> rule = jaxoptim.rules.SGD(lr=1e-3).with_precision(master_weights=True)
            >>> params = jnp.ones(2, jnp.bfloat16)
            >>> state = jaxoptim.init(rule, params)
            >>> for _ in range(10):
            ...     params, state = jaxoptim.step(rule, params, jnp.ones(2, jnp.bfloat16), state)
            >>> params.tolist(), [round(x, 4) for x in state.slots["master_weights"].tolist()]
            ([0.98828125, 0.98828125], [0.99, 0.99])
        """
        return assembled(type(self), vars(self) | {"precision": checked(master_weights, rounding, state_dtype)})

    def replace(self, **fields: Any) -> Self:
        """Return a new rule with some hyperparameters changed, checked like any other, and the same precision."""
        return super().replace(**fields).with_precision(**self.precision._asdict())

    def takes_tree(self, name: str) -> bool:
        """Whether a number may be another one for each parameter."""
        return name not in self.of_tree

    @abc.abstractmethod
    def init(self, param: jax.Array) -> Slots:
        """Initialize the slots of one array."""

    @abc.abstractmethod
    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        """Return the change of ``param`` and its new slots; ``step`` is the number of this update of it, from 1."""

    # Overridden by rules that depend on more than one array: on the tree's count of updates, or on state of the whole
    # tree, ``OptState.shared``.

    def at_update(self, number: Any) -> Self:
        """Return the rule for update ``number`` of the pytree, for terms that follow it and not the arrays' counts."""
        return self

    def init_shared(self) -> dict[str, Any]:
        """Return the state of the whole tree before the first update."""
        return {}

    def draw_noise(
        self, shared: dict[str, Any], step: Any, likes: dict[int, Any], only: Collection[int] | None = None
    ) -> dict[int, Any]:
        """Return the noise of these arrays, by their indices among the leaves; only for rules that take ``noise``.

        Each is an array, or a :class:`~jaxoptim.core.noise.Draw` of one. With ``only`` it is drawn for some of them
        alone, with the same numbers as when it is drawn for all.
        """
        return {}

    def update_with(
        self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array, shared: dict[str, Any], **given: Any
    ) -> tuple[jax.Array, Slots]:
        """Update one array, given the state of the whole tree and the array's part of the trees given by name.

        Besides the slots it may return scalars by other names, whose sums over all arrays :meth:`update_shared` gets.
        """
        return self.update(grad, slots, param, step)

    def spread(self, grads: Sequence[jax.Array], slots: Sequence[Slots], sharding: Any) -> list[dict[str, jax.Array]]:
        """Return what the updates of matrices of one shape, which devices share alike, are to get by name.

        It is for work on whole matrices, which the devices divide (:mod:`jaxoptim.core.spreading`).
        """
        return [{} for _ in grads]

    @property
    def two_pass(self) -> bool:
        """Whether an update passes over the arrays twice, first for the sums that :meth:`prepare_shared` gets."""
        return False

    def first_pass(
        self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array, shared: dict[str, Any], **given: Any
    ) -> dict[str, jax.Array]:
        """Return scalars of one array before its update, whose sums over all arrays :meth:`prepare_shared` gets."""
        return {}

    def prepare_shared(self, shared: dict[str, Any], sums: dict[str, jax.Array]) -> dict[str, Any]:
        """Return the state of the whole tree as :meth:`update_with` sees it."""
        return shared

    def shared_at(self, start: int, shared: dict[str, Any]) -> dict[str, Any]:
        """Return the shared state for the array at element ``start`` of the pytree; complex elements count as two."""
        return shared

    def update_shared(self, shared: dict[str, Any], sums: dict[str, jax.Array]) -> dict[str, Any]:
        """Return the state of the whole tree after an update."""
        return shared

    def rested(self, shared: dict[str, Any]) -> dict[str, Any]:
        """Return the shared state after a step of other pytrees in which this one had no gradient at all."""
        return shared

    @property
    def elementwise(self) -> bool:
        """Whether the update is elementwise, whatever the shape of the array.

        Arrays may then be packed into one buffer.
        """
        return True

    @property
    def pointwise(self) -> bool:
        """Whether a kernel may take the numbers of an array one by one, in any shape.

        The result for each follows from the numbers in its place, its noise among them, and from scalars; sums over the
        array go to :meth:`update_shared` alone.
        """
        return self.elementwise

    @property
    def rowwise(self) -> bool:
        """Whether rows without a gradient stay as they are, so that a sparse gradient touches no others."""
        return self.sparse != "refused"

    def check_param(self, name: str, param: Any) -> None:
        """Raise for a parameter that this rule cannot update."""

    def check_sparse(self) -> None:
        """Raise for hyperparameters that do not go with a sparse gradient."""

    def rearranged(self, slots: Slots, move: Rearrangement) -> Slots:
        """Permute the slots of an array with its elements, such as those of torch's ``[out, in]`` for ``[in, out]``.

        A rule that depends on the shape of an array declares here which permutations it supports.

        Raises:
            ``ValueError`` for a permutation after which the rule would make other updates, with the reason.
        """
        if not self.elementwise:
            raise ValueError(f"{type(self).__name__} depends on the order of the axes.")
        return {name: move(slot) if np.shape(slot) == move.shape else slot for name, slot in slots.items()}


def _validated(spec: Any, value: Any, name: str, owner: str) -> Any:
    """Return the value of a field as a rule stores it; raise if the field does not take it."""
    if isinstance(spec, tuple):
        if not isinstance(value, tuple | list) or len(value) != len(spec):
            raise ValueError(
                f"Invalid {name}: {shown(value)}. {owner} takes a tuple of {len(spec)} numbers for {name}."
            )
        return tuple(_validated(s, v, f"{name}[{i}]", owner) for i, (s, v) in enumerate(zip(spec, value, strict=True)))
    if isinstance(spec, Traced) or (spec.optional and value is None):
        return value
    if callable(value):
        return as_pytree(value)
    if is_tree(value):
        return _validated_tree(spec, value, name, owner)
    number = value.rate if isinstance(value, Decay) else value
    if isinstance(number, bool | np.bool_) or not isinstance(number, int | float | np.number | np.ndarray | jax.Array):
        raise TypeError(
            f"Invalid {name}: {shown(value)} ({type(value).__name__}). "
            f"{owner} takes a number, a scalar array or a schedule (step -> value) for {name}."
        )
    if is_known(number) and not spec.admits(number):
        raise ValueError(f"Invalid {name}: {shown(number)}. {owner} takes {name} {spec}.")
    if spec.zero_is_off and isinstance(number, int | float) and number == 0:
        return Off(0.0)
    if isinstance(value, Decay):
        return value
    # One kind of leaf for every plain number, so that an int or a NumPy scalar does not retrace.
    if isinstance(number, int | float | np.number) or (isinstance(number, np.ndarray) and number.ndim == 0):
        number = float(number)
    elif not jnp.issubdtype(number.dtype, jnp.floating):
        number = jnp.asarray(number, float)
    return Decay.of(number) if spec.decay else number


def _validated_tree(spec: Numeric, tree: Any, name: str, owner: str) -> Any:
    """Return a pytree of numbers as a rule stores it; None stands where there is no parameter."""

    def validated(path: Any, part: Any) -> Any:
        place = f"{name}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
        return None if part is None else _validated(spec, part, place, owner)

    return jax.tree_util.tree_map_with_path(validated, tree, is_leaf=is_part)


def assembled(cls: type[R], fields: dict[str, Any]) -> R:
    """Build a rule from fields without conversion or checks: after pytree operations leaves may be anything."""
    new = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(new, name, value)
    return new


def _spec_of(hint: Any) -> Any:
    """Return the :class:`Numeric` or :class:`Traced` of an annotation, a tuple for a tuple, None for a switch."""
    if typing.get_origin(hint) is Annotated:
        return next((m for m in hint.__metadata__ if isinstance(m, Numeric | Traced)), None)
    if typing.get_origin(hint) is tuple:
        specs = tuple(_spec_of(argument) for argument in typing.get_args(hint))
        return specs if specs and None not in specs else None
    return None


@typing.dataclass_transform(frozen_default=True)
def rule(cls: type[R]) -> type[R]:
    """Turn a class of annotated hyperparameters into an optimizer: a frozen dataclass and a pytree.

    A field annotated :data:`Scalar`, :data:`NonNegative`, :data:`Positive`, :data:`Coefficient`,
    :data:`DecayRate`, :data:`Arrays` or a tuple of these is traced; every other field is a switch.

    Args:
        cls: a subclass of :class:`Rule`, or of :class:`Hyperparameters`.

    Returns:
        The same class.

    Raises:
        ``TypeError`` if ``cls`` is a subclass of neither.

    Examples:
        See :class:`Rule`.
    """
    if not (isinstance(cls, type) and issubclass(cls, Hyperparameters)):
        raise TypeError(f"@rule decorates a subclass of Rule, but was given {cls!r}. Write `class Name(Rule):`.")
    dataclasses.dataclass(frozen=True)(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    specs = {name: spec for name in names if (spec := _spec_of(hints[name])) is not None}
    switches = [name for name in names if name not in specs] + ["precision"] * issubclass(cls, Rule)
    cls.specs = specs

    def flatten_with_keys(self: Any) -> tuple[Any, Any]:
        children = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in specs]
        return children, tuple(getattr(self, name) for name in switches)

    def flatten(self: Any) -> tuple[Any, Any]:
        return [getattr(self, name) for name in specs], tuple(getattr(self, name) for name in switches)

    def unflatten(aux: Any, children: Any) -> Any:
        return assembled(cls, dict(zip([*specs, *switches], [*children, *aux], strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
