"""The numbers of all rules as one array."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import Rule, enabled
from jaxoptim.core.clipping import Clip
from jaxoptim.core.rule import Numeric, assembled
from jaxoptim.engine.slots import has_slots_of
from jaxoptim.engine.static import Static


class Setting(NamedTuple):
    """The rule of the parameters of a group, and the bounds that clip their gradients. A pytree of numbers."""

    rule: Rule
    clip: Clip = Clip()


class TakenApart:
    """A setting, split into its structure and its leaves.

    Args:
        form: the structure, which decides what is compiled.
        leaves: the numbers as floats; anything else as it is.
        setting: the whole (default None: made of these when it is asked for).

    Attributes:
        is_numeric: whether all leaves are numbers, so that the settings of many groups can stand in one vector each.
    """

    __slots__ = ("_setting", "form", "is_numeric", "leaves")

    def __init__(self, form: Any, leaves: list[Any], setting: Setting | None = None) -> None:
        self.form, self.leaves, self._setting = form, leaves, setting
        self.is_numeric = all(isinstance(x, float) for x in leaves)

    @property
    def setting(self) -> Setting:
        """The setting, put together again."""
        if self._setting is None:
            self._setting = jax.tree.unflatten(self.form, self.leaves)
        return self._setting

    def with_number(self, name: str, value: float) -> TakenApart | None:
        """Return the setting with another number for a hyperparameter; None where more than a number may change.

        Raises:
            What the rule says of numbers that are wrong together.
        """
        rule, place = self.setting.rule, self.place_of(name)
        if place is None or not rule.specs[name].admits(value):
            return None  # making the rule tells
        new = self.with_leaf(place, value)
        new.setting.rule.check()
        return new

    def place_of(self, name: str) -> int | None:
        """Return the leaf that is a hyperparameter; None if it is no number, or more than one to the rule."""
        spec = self.setting.rule.specs.get(name)
        if not isinstance(spec, Numeric) or spec.decay or spec.zero_is_off:
            return None
        return _places(self.form, type(self.setting.rule)).get(name)

    def with_leaf(self, place: int, value: float) -> TakenApart:
        """Return the setting with another number at one of the leaves, which is not checked."""
        leaves = self.leaves.copy()
        leaves[place] = value
        return TakenApart(self.form, leaves)


@functools.lru_cache(maxsize=256)
def _places(form: Any, kind: type[Rule]) -> dict[str, int]:
    """Return the place of each hyperparameter among the leaves of a setting, for those of one leaf."""
    paths = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(form, range(form.num_leaves)))[0]
    return {path[1].name: leaf for path, leaf in paths if len(path) == 2 and path[0].name == "rule"}


def taken_apart(setting: Setting) -> TakenApart:
    """Split a setting into its structure and its leaves."""
    leaves, form = jax.tree.flatten(setting)
    leaves = [float(np.asarray(x).item()) if _is_number(x) else x for x in leaves]
    return TakenApart(form, leaves, setting)


class Form(NamedTuple):
    """The common structure of settings that stand in one vector.

    Attributes:
        treedef: the structure.
        sources: for each of its leaves the leaf of the setting, None for the zero of a term that others have.
    """

    treedef: Any
    sources: tuple[int | None, ...]

    def places(self) -> np.ndarray:
        """The places of the leaves of the setting."""
        places = {source: place for place, source in enumerate(self.sources) if source is not None}
        return np.array([places[source] for source in range(len(places))], int)

    def leaves(self, apart: TakenApart) -> list[Any]:
        """Return the leaves of a setting, with zeros for the terms that it lacks."""
        return [0.0 if source is None else apart.leaves[source] for source in self.sources]


def common_forms(settings: Sequence[TakenApart]) -> list[Form]:
    """Return a form for each setting that has the terms of the others of its rule too: fewer programs and kernels.

    A term whose coefficient is zero adds nothing. One that comes with a slot of its own stays out.
    """
    own = [Form(apart.form, tuple(range(apart.form.num_leaves))) for apart in settings]
    if not all(apart.is_numeric for apart in settings):
        return own
    rules = [apart.setting.rule for apart in settings]
    present = {(type(rule), name) for rule in rules for name in _terms(rule) if enabled(getattr(rule, name))}
    return [_with_terms(form, rule, present) for form, rule in zip(own, rules, strict=True)]


def _terms(rule: Rule) -> list[str]:
    """Return the coefficients that switch a term of the rule on."""
    return [
        name
        for name, spec in rule.specs.items()
        if isinstance(spec, Numeric) and spec.zero_is_off and not (spec.decay or spec.optional)
    ]


def _with_terms(form: Form, rule: Rule, present: set[tuple[type, str]]) -> Form:
    off = [name for name in _terms(rule) if not enabled(getattr(rule, name)) and (type(rule), name) in present]
    missing = [name for name in off if has_slots_of(rule, assembled(type(rule), vars(rule) | {name: 0.0}))]
    # A rule that takes sparse gradients refuses them together with some terms.
    if not missing or rule.sparse != "refused":
        return form
    sources = jax.tree.unflatten(form.treedef, form.sources)
    terms = dict.fromkeys(missing, _ZERO)
    leaves, treedef = jax.tree.flatten(sources._replace(rule=assembled(type(rule), vars(sources.rule) | terms)))
    return Form(treedef, tuple(None if leaf is _ZERO else leaf for leaf in leaves))


_ZERO = object()


def together(settings: Sequence[TakenApart], forms: Sequence[Form]) -> Any:
    """Join the settings of groups into one whose leaves are vectors over the groups; a single one stays as it is."""
    leaves = [form.leaves(apart) for form, apart in zip(forms, settings, strict=True)]
    if len(settings) == 1:
        return jax.tree.unflatten(forms[0].treedef, leaves[0])
    columns = np.array(leaves, np.float64).reshape(len(settings), -1)
    return jax.tree.unflatten(forms[0].treedef, list(columns.T))


@jax.tree_util.register_pytree_node_class
class Numbers:
    """Settings, or other pytrees of numbers, as one array.

    Args:
        trees: pytrees whose leaves are numbers, NumPy arrays of numbers, and other arrays.
        stay: whether they serve many calls; those of a single one come to the device with it (default True).

    Each scalar that crosses into a compiled call costs as much as a small array, so all of them go as one,
    which stays on the device until a number changes.

    Attributes:
        arrays: that array, and the others.
        form: how the trees are made of them.
    """

    def __init__(self, trees: Sequence[Any], *, stay: bool = True) -> None:
        leaves, treedef = jax.tree.flatten(list(trees))
        shapes = tuple(_shape_of_numbers(leaf) for leaf in leaves)
        numbers = [np.reshape(x, -1) for x, shape in zip(leaves, shapes, strict=True) if shape is not None]
        # In the dtype of JAX's floats already, which is faster than to have JAX convert it.
        vector: Any = np.concatenate([*numbers, []]).astype(jnp.result_type(float))
        vector = jnp.asarray(vector) if stay else vector
        self.arrays: tuple[Any, ...] = (vector, *(x for x, shape in zip(leaves, shapes, strict=True) if shape is None))
        self.form = Static(treedef, shapes)

    def of(self, numbers: np.ndarray) -> Numbers:
        """Return the same trees with other numbers, given as a vector in the order of the leaves."""
        return self._of(jnp.asarray(numbers.astype(jnp.result_type(float))))  # half the time of jax.device_put

    def of_one_step(self, numbers: np.ndarray) -> Numbers:
        """Return the same trees with numbers that change at every step: they come to the device with the call."""
        return self._of(numbers.astype(self.arrays[0].dtype))

    def _of(self, vector: Any) -> Numbers:
        return Numbers.tree_unflatten(self.form, (vector, *self.arrays[1:]))

    def each(self) -> list[Any]:
        """Return the trees, each with its numbers."""
        treedef, shapes = self.form.content
        vector, *others = self.arrays
        leaves, arrays, position = [], iter(others), 0
        for shape in shapes:
            size = math.prod(shape or ())
            leaves.append(next(arrays) if shape is None else vector[position : position + size].reshape(shape))
            position += 0 if shape is None else size
        return jax.tree.unflatten(treedef, leaves)

    def tree_flatten(self) -> tuple[Any, Static]:
        """Return the arrays and the structure of the trees."""
        return self.arrays, self.form

    @classmethod
    def tree_unflatten(cls, form: Static, children: Any) -> Numbers:
        """Return the trees of other arrays."""
        new = object.__new__(cls)
        new.form, new.arrays = form, tuple(children)
        return new


def _is_number(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and x.size == 1 and jnp.issubdtype(x.dtype, jnp.floating)


def _shape_of_numbers(x: Any) -> tuple[int, ...] | None:
    """Return the shape that a leaf takes in the array of numbers; None for a leaf that stays by itself."""
    if isinstance(x, float):
        return ()
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    return x.shape if isinstance(x, np.ndarray) else () if x.size == 1 else None
