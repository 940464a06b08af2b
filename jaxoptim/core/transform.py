"""Optimizer steps of whole pytrees, made of the updates of single arrays."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax
from jax import export

from jaxoptim.core import sparse, trees
from jaxoptim.core.leaf import (
    LeafUpdate,
    Wanted,
    as_computed,
    by_leaf,
    check_gradient,
    check_param,
    first_pass,
    fitting,
    init_leaf,
    of_any_leaf,
    summed,
)
from jaxoptim.core.noise import Draw, drawn_for
from jaxoptim.core.numerics import real_size
from jaxoptim.core.packing import Packed, unpacked
from jaxoptim.core.placement import on_mesh_of
from jaxoptim.core.restoring import restored
from jaxoptim.core.rule import Hyperparameters, Off, Rule, Traced, assembled, is_tree
from jaxoptim.core.signatures import bound
from jaxoptim.core.stacks import spread_leaves, update_leaves

P = ParamSpec("P")


class OptState(NamedTuple):
    """The state of every optimizer of this library; its names are the checkpoint format.

    Attributes:
        step: the number of updates made of the tree, an int32 scalar, which schedules follow and samplers draw by.
        slots: for each of torch's state names (``exp_avg``, ...) a tree shaped like params, in at least
            float32. A parameter that lacks a slot holds None there.
        shared: the state of the whole pytree, such as a sampler's key.
        counts: a tree shaped like params with the number of updates of each array that has missed one because its
            gradient was None, an int32 scalar, and None for every other array, which has made ``step`` of them. None
            for all as long as no array has missed any.

    The counts come into being at the first update with a missing gradient. The state of a loop inside a compiled
    program cannot change its structure: where gradients are missing in one, start from ``init(..., counts=True)``.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim
        >>> params, rule = {"w": jnp.ones(2), "late": jnp.ones(2)}, jaxoptim.rules.SGD(lr=0.1, momentum=0.9)
        >>> state = jaxoptim.init(rule, params)
        >>> int(state.step), list(state.slots), state.shared, state.counts
        (0, ['momentum_buffer'], {}, None)
        >>> params, state = jaxoptim.step(rule, params, {"w": jnp.ones(2), "late": None}, state)
        >>> int(state.step), int(state.counts["late"]), state.counts["w"]
        (1, 0, None)
    """

    step: jax.Array
    slots: dict[str, Any]
    shared: dict[str, Any]
    counts: Any = None


export.register_namedtuple_serialization(OptState, serialized_name="jaxoptim.OptState")


def init(rule: Rule, params: Any, *, counts: bool = False) -> OptState:
    """Initialize the optimizer state.

    Args:
        rule: the optimizer.
        params: a pytree of floating or complex arrays, None leaves allowed; or a :class:`Packed`; or
            ``jax.ShapeDtypeStruct`` leaves under ``jax.eval_shape``.
        counts: give every array a count of its own from the start (default False: when a gradient is first
            missing), so that the state keeps its structure whichever gradients are missing.

    Returns:
        An :class:`OptState`, each slot with the sharding of its parameter, counts and keys on all devices of these.

    Raises:
        ``TypeError`` for a parameter that is not floating or complex; what the rule raises for a parameter
        that it cannot update (its name is in the message).

    Examples:
        >>> import jax.numpy as jnp, jaxoptim
        >>> state = jaxoptim.init(jaxoptim.rules.Adam(), {"w": jnp.ones(2), "frozen": None})
        >>> sorted(state.slots)
        ['exp_avg', 'exp_avg_sq']
    """
    _check_rule(rule)
    params = _whole(rule, params)
    leaves, treedef = jax.tree.flatten(params, is_leaf=trees.is_leaf)
    shared = rule.init_shared()
    arrays = {
        index: check_param(rule, name, leaf)
        for index, (name, leaf) in enumerate(zip(trees.names(params), leaves, strict=True))
        if leaf is not None
    }
    # A tree without arrays has the same slots as any other: optax initialises on such placeholders.
    example = {} if arrays else {-1: jax.ShapeDtypeStruct((1, 1), jnp.float32)}
    noise = _noise_of(rule, shared, 0, arrays | example)
    rules = by_leaf(rule.at(0), params, "params") if arrays else [of_any_leaf(rule.at(0))]
    made = {i: init_leaf(rules[i], x, noise[i]) for i, x in (arrays | example).items()}
    names = dict.fromkeys(key for slots in made.values() for key in slots)
    slots = [made.get(index, {}) for index in range(len(leaves))]
    trees_of_slots = {key: jax.tree.unflatten(treedef, [its.get(key) for its in slots]) for key in names}
    own = [jnp.zeros((), jnp.int32) if index in arrays else None for index in range(len(leaves))]
    step, own_counts = jnp.zeros((), jnp.int32), jax.tree.unflatten(treedef, own) if counts else None
    traced = [x for x in arrays.values() if isinstance(x, jax.core.Tracer)]
    if traced and not names:  # a compiled function that uses no parameter would not run on their devices
        step, _ = jax.lax.optimization_barrier((step, traced[0]))
    return on_mesh_of(params, OptState(step, trees_of_slots, shared, own_counts))


def update(rule: Rule, grads: Any, state: OptState, params: Any = None, **given: Any) -> tuple[Any, OptState]:
    """Return the changes to add to the parameters, in the gradients' dtype: the form of optax.

    Args:
        rule: the optimizer; its numbers may be traced.
        grads: a tree like params. None leaves a parameter, its slots and its count alone, as in torch; if all are
            None, nothing changes. For complex parameters the convention of torch and optax: the conjugate of what
            ``jax.grad`` returns.
        state: from :func:`init` or the last update.
        params: the current parameters. Only rules that use them (weight decay, for one) need them.
        given: trees like params that a rule takes by name, such as the ``noise`` of a sampler.

    Returns:
        The updates, a tree like ``grads``, and the new state. A sparse gradient gives a sparse update.

    Raises:
        ``ValueError`` for another tree or shape than the parameters', and for missing ``params``;
        ``RuntimeError`` for sparse gradients where they are not supported; ``TypeError`` for gradients
        that are not floating, for names that the rule does not take, and for what is no rule or no state;
        ``ValueError`` for the state of another rule. The message names the parameter or the slot.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim
        >>> params, rule = {"w": jnp.ones(2)}, jaxoptim.rules.SGD(lr=0.5)
        >>> updates, state = jaxoptim.update(rule, {"w": jnp.ones(2)}, jaxoptim.init(rule, params), params)
        >>> updates["w"].tolist()
        [-0.5, -0.5]
    """

    def finish(grad: Any, param: Any, rows: Any, change: Any, value: Any) -> Any:
        if value is None:
            change = change.astype(grad.dtype)
        else:  # in float32, so that the sum with the parameter is the value to the last bit
            old = param if rows is None else sparse.take(param, rows)
            change = value.astype(change.dtype) - old.astype(change.dtype)
        return change if rows is None else sparse.as_update(rows, change, grad.shape)

    return _updated(rule, grads, state, params, given, finish, lambda grad, param: grad, "change")


def step(rule: Rule, params: Any, grads: Any, state: OptState, **given: Any) -> tuple[Any, OptState]:
    """Update the parameters, and round them only once; :func:`update` rounds the change too.

    Args:
        rule: the optimizer; its numbers may be traced.
        params: the current parameters. Donate them, and the state, when the call is jitted.
        grads: as in :func:`update`.
        state: from :func:`init` or the last step.
        given: as in :func:`update`.

    Returns:
        The new parameters, in their own dtypes, and the new state.

    Raises:
        As :func:`update`.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxoptim
        >>> params, rule = {"w": jnp.ones(2)}, jaxoptim.rules.Adam(lr=0.1)
        >>> step = jax.jit(jaxoptim.step, donate_argnums=(1, 3))
        >>> params, state = step(rule, params, {"w": jnp.ones(2)}, jaxoptim.init(rule, params))
        >>> [round(x, 6) for x in params["w"].tolist()]
        [0.9, 0.9]
    """

    def finish(grad: Any, *leaf: Any) -> Any:
        return _applied(*leaf)

    return _updated(rule, grads, state, params, given, finish, lambda grad, param: param, "value")


def step_and_change(rule: Rule, param: Any, grad: Any, state: OptState) -> tuple[Any, Any, OptState]:
    """Update one array; return it, the change that was added to it, and the new state.

    The change is not rounded to the dtype of the array. To compute its norm, the old array need not be kept.
    """
    (new, change), state = _with_changes(rule, param, grad, state)
    return new, change, state


def steps_and_changes(
    rule: Rule, params: list[Any], grads: list[Any], state: OptState
) -> tuple[list[Any], list[Any], OptState]:
    """Update several arrays that have gradients; return them, the changes that were added, and the new state."""
    pairs, state = _with_changes(rule, params, grads, state)
    return [new for new, _ in pairs], [change for _, change in pairs], state


def _with_changes(rule: Rule, params: Any, grads: Any, state: OptState) -> tuple[Any, OptState]:
    """Update a pytree; return a pytree of pairs of the new array and its change, and the new state."""

    def finish(grad: Any, param: Any, rows: Any, change: Any, value: Any) -> Any:
        new = _applied(param, rows, change, value)
        return new, change if rows is None else new - param

    return _updated(rule, grads, state, params, {}, finish, lambda grad, param: (param, None), "both")


def _applied(param: Any, rows: Any, change: Any, value: Any) -> Any:
    """Apply to a parameter the change of some rows (None: all), or their new value."""
    if rows is None:
        return (param + change).astype(param.dtype) if value is None else value
    return sparse.put(param, rows, sparse.take(param, rows) + change if value is None else value)


@functools.singledispatch
def transformation(rule: Any, /) -> optax.GradientTransformationExtraArgs:
    """Turn a rule into an optax transformation.

    Args:
        rule: an instance of a rule. A Pyro-style optimizer will do too: its transformation is of a dict by names.

    Returns:
        ``optax.GradientTransformationExtraArgs``, whose ``update`` takes ``params`` third and ignores
        keywords that the rule has no use for.

    Raises:
        ``TypeError`` if ``rule`` is not an instance of a rule.

    Examples:
        >>> import jaxoptim, optax
        >>> tx = optax.chain(optax.clip(1.0), jaxoptim.transformation(jaxoptim.rules.SGD(lr=0.1)))
    """
    raise _no_rule(rule)


@transformation.register
def _array_by_array(rule: Rule, /) -> optax.GradientTransformationExtraArgs:
    """Make the transformation of a rule for single arrays: the same for every array of the pytree."""

    def init_fn(params: Any) -> OptState:
        return init(rule, params)

    def update_fn(grads: Any, state: OptState, params: Any = None, **extra: Any) -> tuple[Any, OptState]:
        changed = {name: extra[name] for name in rule.per_update if name in extra}
        given = {name: extra[name] for name in rule.takes if extra.get(name) is not None}
        return update(rule.replace(**changed) if changed else rule, grads, state, params, **given)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def factory(rule: Callable[P, Hyperparameters], name: str) -> Callable[P, optax.GradientTransformationExtraArgs]:
    """Make the optax-style function that builds a rule and returns its transformation.

    Args:
        rule: the class of a rule. Its signature and documentation become the function's.
        name: the name of the function.

    Returns:
        A function that takes the hyperparameters of ``rule``.

    Raises:
        The function raises ``TypeError`` for a hyperparameter that the rule does not have, and ``ValueError`` for one
        that float16 or bfloat16 has spoilt.

    Examples:
        >>> import jaxoptim
        >>> jaxoptim.adam(learning_rate=0.1)
        Traceback (most recent call last):
        TypeError: adam() got an unexpected keyword argument 'learning_rate'. It takes lr, betas, eps, ...
    """
    signature = inspect.signature(rule).replace(return_annotation=optax.GradientTransformationExtraArgs)
    if has_mask := _DECAY in getattr(rule, "specs", {}):
        mask = inspect.Parameter("mask", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Any")
        signature = signature.replace(parameters=[*signature.parameters.values(), mask])

    @functools.wraps(rule, assigned=("__module__", "__doc__"), updated=())
    def make(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
        options = bound(name, signature, args, kwargs)
        mask = options.pop("mask") if has_mask else None
        made = rule(**restored(rule, options))  # type: ignore[call-arg]
        return transformation(made) if mask is None else _with_mask(made, mask)

    if has_mask and make.__doc__:
        make.__doc__ = make.__doc__.replace("\n\n    Slots:", f"{_MASK}\n\n    Slots:", 1)
    make.__name__ = make.__qualname__ = name
    make.__signature__ = signature  # type: ignore[attr-defined]
    return make


_DECAY = "weight_decay"
_MASK = """
        mask: which parameters decay: a tree of bools like params, or a prefix of one, or a function that makes one of
            params (default None: all)."""


def _with_mask(rule: Any, mask: Any) -> optax.GradientTransformationExtraArgs:
    """Make the transformation of a rule that decays only the weights in a mask."""
    decay = getattr(rule, _DECAY)
    if is_tree(decay):
        raise TypeError(f"mask= is for one {_DECAY} of all parameters, but got a tree of them. Leave mask out.")

    def masked(params: Any) -> optax.GradientTransformationExtraArgs:
        if params is None:
            raise ValueError("A mask that is a function is called with the parameters. Give them: update(..., params).")
        chosen = mask(params) if callable(mask) else mask
        return transformation(rule.replace(**{_DECAY: jax.tree.map(lambda is_in: decay if is_in else 0.0, chosen)}))

    if not callable(mask):
        return masked(mask)

    def update_fn(grads: Any, state: OptState, params: Any = None, **extra: Any) -> tuple[Any, OptState]:
        return masked(params).update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(lambda params: masked(params).init(params), update_fn)


_known: dict[Any, list[str] | None] = {}


def _slot_names(rule: Rule) -> list[str] | None:
    """Return the names of a rule's slots; None if they depend on the parameter, or a switch cannot be hashed."""
    by_leaf_fields = [name for name, spec in rule.specs.items() if isinstance(spec, Traced) and spec.by_leaf]
    if rule.by_parameter or any(getattr(rule, name) is not None for name in by_leaf_fields):
        return None
    if rule.precision.master_weights:
        return None
    key = jax.tree.structure(rule)
    try:
        hash(key)
    except TypeError:
        return None
    if key not in _known:
        if len(_known) > 4096:
            _known.clear()
        example = jax.ShapeDtypeStruct((2, 2), jnp.float32)
        noise = _noise_of(rule, rule.init_shared(), 0, {0: example})
        try:
            _known[key] = list(init_leaf(rule.at(0), example, noise[0]))
        except (TypeError, ValueError):  # a rule for arrays of other shapes
            _known[key] = None
    return _known[key]


def _whole(rule: Rule, params: Any) -> Any:
    """Return the pytree that a rule works on: packed buffers only for elementwise rules, else unpacked."""
    return params.unpack() if isinstance(params, Packed) and not _is_packable(rule) else params


def _is_packable(rule: Rule) -> bool:
    """Whether a rule may update packed buffers: it is elementwise, with the same hyperparameters for all."""
    return rule.elementwise and not rule.by_parameter


def _check_rule(rule: Any) -> None:
    """Raise for anything but a rule."""
    if not isinstance(rule, Rule):
        raise _no_rule(rule)


def _no_rule(given: Any) -> TypeError:
    """Make the error for an object given in place of a rule, with advice."""
    if isinstance(given, type) and issubclass(given, Hyperparameters):
        return TypeError(
            f"A rule is expected, but got the class {given.__name__}. Give an instance: {given.__name__}(...)."
        )
    if isinstance(given, optax.GradientTransformation):
        return TypeError(
            "A rule is expected, such as jaxoptim.rules.Adam(lr=1e-3), but got a transformation. Call its own init and "
            "update."
        )
    if isinstance(given, Hyperparameters):
        return TypeError(
            f"{type(given).__name__} does not work array by array. "
            "Use the init and update of jaxoptim.transformation(rule), where rule is an instance."
        )
    kind = given if isinstance(given, type) else type(given)
    return TypeError(
        f"A rule is expected, such as jaxoptim.rules.Adam(lr=1e-3), but got {'the class' if given is kind else 'a'} "
        f"{kind.__module__}.{kind.__qualname__}. An optimizer of jaxoptim.optim makes its own steps, and its "
        "to_functional() gives the pure form."
    )


def _check_state(rule: Rule, state: Any) -> None:
    """Raise for anything but a state of the rule."""
    kind = type(rule).__name__
    if not isinstance(state, OptState):
        got = f"a {type(state).__name__}" if state is not None else "None"
        raise TypeError(
            f"The state of {kind} must be the OptState that init(params) gave, but got {got}. If a checkpoint made "
            "another container of it, rebuild it: OptState(**fields) or OptState(*fields)."
        )
    wanted = _slot_names(rule)
    if wanted is None or state.slots.keys() == set(wanted):
        return
    # A number that is zero for now, as optax injects it, has left its slot behind.
    on = {name: 1.0 if isinstance(x, Off) else x for name, x in vars(rule).items()}
    allowed = _slot_names(assembled(type(rule), on)) or wanted
    missing, extra = [x for x in wanted if x not in state.slots], [x for x in state.slots if x not in allowed]
    if missing or extra:
        problem = f"lacks the slot {missing[0]!r}" if missing else f"has the slot {extra[0]!r}, which this one has not"
        raise ValueError(
            f"The state is of another rule than this {kind}, or of one with other options: it {problem}. Go on with "
            "the options of the run that made it, or begin anew with init(params)."
        )


def _updated(
    rule: Rule,
    grads: Any,
    state: OptState,
    params: Any,
    given: dict[str, Any],
    finish: Callable[[Any, Any, Any, Any, Any], Any],
    skipped: Callable[[Any, Any], Any],
    wanted: Wanted,
) -> tuple[Any, OptState]:
    """Update every array once: ``finish`` makes the result of each, ``skipped`` that of a missing gradient."""
    _check_rule(rule)
    if unknown := sorted(given.keys() - set(rule.takes)):
        takes = f"takes {', '.join(rule.takes)} by name" if rule.takes else "takes no trees by name"
        raise TypeError(f"{type(rule).__name__} has no use for {', '.join(unknown)}: it {takes}.")
    _check_state(rule, state)
    if params is None and rule.precision.keeps_values:
        raise ValueError(
            f"{type(rule).__name__} needs the parameters to keep their value in more or other bits. Give them: "
            "update(grads, state, params)."
        )
    if isinstance(params, Packed):
        if not _is_packable(rule):
            given = {name: unpacked(tree) for name, tree in given.items()}
            result, state = _updated(rule, unpacked(grads), state, params.unpack(), given, finish, skipped, wanted)
            return params.pack(result), state
        if not isinstance(grads, Packed):
            grads = params.pack(grads, "grads")
    like = grads if params is None else params
    _, treedef = jax.tree.flatten(like, is_leaf=trees.is_leaf)
    all_grads = trees.leaves_like(grads, like, "grads")
    all_params = [None] * len(all_grads) if params is None else jax.tree.leaves(like, is_leaf=trees.is_leaf)
    slots = {key: trees.leaves_like(tree, like, f"state.slots[{key!r}]") for key, tree in state.slots.items()}
    own = [None] * len(all_grads)
    if state.counts is not None:
        own = trees.leaves_like(state.counts, like, "state.counts")
    leaves_given = {name: trees.leaves_like(tree, like, name) for name, tree in given.items()}
    count = optax.safe_increment(state.step)
    rules = _rules_at(rule, state.step, count, like, "grads" if params is None else "params")
    todo: list[LeafUpdate] = []
    results: list[Any] = []
    new_own: list[Any] = []
    names = trees.names(like)
    for i, (name, grad, param) in enumerate(zip(names, all_grads, all_params, strict=True)):
        if grad is None or (param is None and params is not None):
            results.append(skipped(grad, param))
            is_array = param is not None or (params is None and any(leaves[i] is not None for leaves in slots.values()))
            # A copy, because whoever donates a state may not give one array twice.
            new_own.append(jnp.copy(state.step) if own[i] is None and is_array else own[i])
            continue
        results.append(None)
        new_own.append(None if own[i] is None else optax.safe_increment(own[i]))
        param = param if param is None else check_param(rule, name, param)
        grad = check_gradient(rule, name, grad, param)
        mine = {key: fitting(key, name, leaves[i], grad) for key, leaves in leaves_given.items()}
        its_count = count if new_own[i] is None else new_own[i]
        own_slots = {key: leaves[i] for key, leaves in slots.items()}
        todo.append(LeafUpdate(i, rules[i], grad, own_slots, param, its_count, mine))
    if not todo:
        return jax.tree.unflatten(treedef, results), state
    shared = state.shared
    if "noise" not in given:
        arrays = {leaf.number: leaf.grad if leaf.param is None else leaf.param for leaf in todo}
        noise = _noise_of(rule, shared, count, arrays, made=_undrawn)
        todo = [leaf._replace(given=leaf.given | noise[leaf.number]) for leaf in todo]
    if rule.two_pass:
        shared = rule.prepare_shared(shared, summed([first_pass(leaf, shared) for leaf in todo]))
    new_slots, sums = {key: list(leaves) for key, leaves in slots.items()}, []
    sizes = [0 if x is None else real_size(x) for x in (all_grads if params is None else all_params)]
    starts = list(itertools.accumulate(sizes, initial=0))
    todo = spread_leaves(todo, [names[leaf.number] for leaf in todo])
    updated = update_leaves(todo, [rule.shared_at(starts[leaf.number], shared) for leaf in todo], wanted)
    for leaf, (rows, change, value, new) in zip(todo, updated, strict=True):
        results[leaf.number] = finish(leaf.grad, leaf.param, rows, change, value)
        for key in new_slots.keys() & new.keys():
            new_slots[key][leaf.number] = new.pop(key)
        sums.append(new)
    new_trees = {key: jax.tree.unflatten(treedef, leaves) for key, leaves in new_slots.items()}
    counted = state.counts is not None or any(x is not None for x in new_own)
    counts = jax.tree.unflatten(treedef, new_own) if counted else None
    shared = rule.update_shared(shared, summed(sums))
    return jax.tree.unflatten(treedef, results), OptState(count, new_trees, shared, counts)


def noise_of_some(rule: Rule, state: OptState, some: Any, whole: Any) -> Any:
    """Draw the noise that the next update of a pytree would draw, for some of its arrays.

    Args:
        rule: a rule that takes ``noise``.
        state: the state of ``some``, which shares its key and its count with that of the whole.
        some: the tree with None in the place of the other arrays.
        whole: the tree.

    Returns:
        A tree like ``some``, for :func:`step` by the name ``noise``.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim
        >>> from jaxoptim.core import noise_of_some
        >>> rule, whole = jaxoptim.rules.SGLD(lr=1.0, nbeta=0.0), {"a": jnp.zeros(2), "b": jnp.zeros(2)}
        >>> some = whole | {"a": None}
        >>> state = jaxoptim.init(rule, some)
        >>> noise = noise_of_some(rule, state, some, whole)
        >>> part, _ = jaxoptim.step(rule, some, some, state, noise=noise)
        >>> both, _ = jaxoptim.step(rule, whole, whole, jaxoptim.init(rule, whole))
        >>> part["a"], bool((part["b"] == both["b"]).all())
        (None, True)
    """
    leaves, treedef = jax.tree.flatten(some, is_leaf=trees.is_leaf)
    arrays = {number: x for number, x in enumerate(trees.leaves_like(whole, some, "whole", "some")) if x is not None}
    only = {number for number, x in enumerate(leaves) if x is not None}
    noise = _noise_of(rule, state.shared, optax.safe_increment(state.step), arrays, only)
    return jax.tree.unflatten(treedef, [noise[at]["noise"] if at in only else None for at in range(len(leaves))])


def _rules_at(rule: Rule, step: Any, count: Any, like: Any, like_what: str) -> list[Any]:
    """Return the rule of each leaf at update ``count``."""
    if not rule.by_parameter:
        return by_leaf(rule.at(step).at_update(count), like, like_what)
    leaves = jax.tree.leaves(like, is_leaf=trees.is_leaf)
    pairs = zip(by_leaf(rule.at(step), like, like_what), leaves, strict=True)
    return [its if leaf is None else its.at_update(count) for its, leaf in pairs]


def _noise_of(
    rule: Rule,
    shared: dict[str, Any],
    step: Any,
    arrays: dict[int, Any],
    only: Collection[int] | None = None,
    made: Callable[[Any, Any], Any] = drawn_for,
) -> dict[int, dict[str, Any]]:
    """Return the keyword ``noise`` of each array's update, or no keyword where its rule takes none.

    ``made`` makes it of the array and of what the rule draws.
    """

    def drawn() -> dict[int, Any]:
        likes = {number: as_computed(x) for number, x in arrays.items()}
        return {number: made(arrays[number], x) for number, x in rule.draw_noise(shared, step, likes, only).items()}

    is_abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays.values())
    noise = jax.eval_shape(drawn) if is_abstract else drawn()
    return {number: {"noise": noise[number]} if number in noise else {} for number in arrays}


def _undrawn(like: Any, noise: Any) -> Any:
    """Leave a draw to the update that uses it."""
    return noise if isinstance(noise, Draw) else drawn_for(like, noise)
