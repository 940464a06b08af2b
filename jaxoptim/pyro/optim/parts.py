"""One step of several optimizers that share one evaluation of the loss, in one compiled call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxoptim.core import Hyperparameters, OptState, Rule, transformation, trees
from jaxoptim.core import step as step_of_rule
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.loss import Evaluation, Loss
from jaxoptim.core.sparse import rows_of
from jaxoptim.engine import loops, programs
from jaxoptim.engine.apart import true
from jaxoptim.engine.numbers import Numbers
from jaxoptim.engine.owner import Owner
from jaxoptim.engine.slabs import Slabs
from jaxoptim.engine.static import Static
from jaxoptim.engine.update import Update, Updated
from jaxoptim.engine.whole import Whole, contents
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.optim.fading import Faded
from jaxoptim.pyro.optim.joint import Joint
from jaxoptim.rules.newton import hessian, solve


class Part(NamedTuple):
    """The share of one optimizer in a step.

    Attributes:
        update: how its parameters are updated.
        data: what the update reads.
        owner: has values and state.
        undo: takes back what was done for steps that fail.
        skipped: takes back what was done for so many steps that are skipped, None if that is nothing.
        series: of the data that differ from step to step, a tree like them; see :func:`loops.minimize_many`.
        most: so many steps one call makes at most.
    """

    update: Update
    data: Any
    owner: Owner
    undo: Callable[[], None] = lambda: None
    skipped: Callable[[int], None] | None = None
    series: Any = None
    most: int = loops.CAPACITY


def undo(parts: Sequence[Part]) -> None:
    """Undo the changes for a step that fails."""
    for part in parts:
        part.undo()


def make_step(
    parts: Sequence[Part],
    loss: Loss,
    args: tuple[Any, ...],
    held: dict[str, jax.Array],
    elsewhere: dict[str, jax.Array],
    skip_nonfinite: bool,
) -> Any:
    """Make one step of all parts at the old values of all parameters.

    Args:
        parts: of every optimizer.
        loss: the loss of all values and of ``args``.
        args: passed on to it.
        held: values of parameters that stay.
        elsewhere: values of parameters that no part updates, and somebody else does.
        skip_nonfinite: leave everything as it is where the loss or a gradient is not finite.

    Returns:
        The loss, or ``(loss, aux)``.
    """
    updates, data = tuple(part.update for part in parts), tuple(part.data for part in parts)
    options, none = programs.StepOptions(skip_nonfinite=skip_nonfinite), programs.StepNumbers()

    def run(taken: Any) -> Any:
        new, _, value, aux, _ = programs.minimize(
            updates, None, loss, options, none, data, taken, held, args, true(), elsewhere
        )
        return new, (value, aux)

    value, aux = _kept(parts, run)
    if skip_nonfinite:
        _take_back(parts, lambda: 1 - int(jnp.isfinite(value)))
    return (value, aux) if loss.has_aux else value


def make_steps(
    parts: Sequence[Part], loss: Loss, course: loops.Course, held: dict[str, jax.Array], skip_nonfinite: bool
) -> tuple[int, jax.Array, Any]:
    """Make many steps of all parts, in one compiled call.

    Args:
        parts: of every optimizer, opened for so many steps.
        loss: the loss of all values and of the arguments that the course has.
        course: what the steps are about.
        held: values of parameters that stay.
        skip_nonfinite: leave everything as it is in steps whose loss or gradient is not finite.

    Returns:
        How many steps were made; the losses, more than these; and what the last step leaves for the next.

    Raises:
        loops.Changes: for a step from which no other can go on. Nothing is done then.
    """
    course, call = _looped(parts, loss, course, skip_nonfinite)
    count = course.num_steps

    def run(taken: Any) -> Any:
        new, *others = call(loops.minimize_many, taken, held)
        return new, others

    left, losses, made = _kept(parts, run)
    _take_back(parts, lambda: count - int(made))
    return count, losses, left


def make_steps_of_fits(
    parts: Sequence[Part],
    leaves: Sequence[Any],
    loss: Loss,
    course: loops.Course,
    skip_nonfinite: bool,
    mesh: Mesh | None,
) -> tuple[int, list[Any], jax.Array, Any]:
    """Make many steps of several fits, in one compiled call, none of which keeps its arrays.

    Args:
        parts: of every optimizer, opened for so many steps.
        leaves: the arrays of each owner, with a first axis of fits. They are gone then.
        loss: see :func:`make_steps`; so are ``course`` and ``skip_nonfinite``.
        course: what the last step has left has a first axis of fits.
        skip_nonfinite: not for options that decay.
        mesh: the devices that the fits are spread over; None for one.

    Returns:
        How many steps were made; the new arrays; the losses; and what the last step leaves for the next.

    Raises:
        loops.Changes: for a step from which no other can go on; ``TypeError`` for options that decay, of steps that
            may be skipped. Nothing is done then.
    """
    course, call = _looped(parts, loss, course, skip_nonfinite)
    try:
        if skip_nonfinite and any(part.skipped is not None for part in parts):
            raise TypeError(
                "In many fits at once, options that decay at each step (lrd) would have to stand still where one of "
                "them skips it. Give a rule with a schedule, such as rules.ClippedAdam(lr=..., lrd=...), or leave "
                "skip_nonfinite out."
            )
        new, left, losses, _ = call(functools.partial(loops.minimize_fits, mesh=mesh), tuple(leaves), {})
    except BaseException:
        undo(parts)
        raise
    return course.num_steps, new, losses, left


def _looped(
    parts: Sequence[Part], loss: Loss, course: loops.Course, skip_nonfinite: bool
) -> tuple[loops.Course, Callable[..., Any]]:
    """The course with no more steps than all parts can make, and a call of a program of it.

    The call takes the program, the arrays of each owner, and the values of parameters that stay.
    """
    updates, data, series = zip(*((part.update, part.data, _series(part)) for part in parts), strict=True)
    options = programs.StepOptions(skip_nonfinite=skip_nonfinite)
    course = course._replace(num_steps=min(course.num_steps, *(part.most for part in parts)))

    def call(program: Callable[..., Any], leaves: Any, held: dict[str, jax.Array]) -> Any:
        turn, carried, given, count = course
        always = true()
        return program(updates, loss, options, turn, data, series, leaves, held, carried, given, count, always)

    return course, call


def _kept(parts: Sequence[Part], run: Callable[[Any], tuple[Any, Any]]) -> Any:
    """Run a program on the arrays of all parts, store the arrays it returns for them, and return its other outputs."""
    is_kept = False
    try:
        with Uninterrupted():
            new, others = run(tuple(part.owner.taken() for part in parts))
            for part, leaves in zip(parts, new, strict=True):
                part.owner.take(leaves)
            is_kept = True
    except BaseException:
        if not is_kept:
            undo(parts)
        raise
    return others


def _take_back(parts: Sequence[Part], count: Callable[[], int]) -> None:
    """Undo the changes for steps that were skipped, which are counted only if it matters."""
    skipped = [part.skipped for part in parts if part.skipped is not None]
    if skipped and (number := count()):
        for take_back in skipped:
            take_back(number)


def _series(part: Part) -> Any:
    return jax.tree.map(lambda _: None, part.data) if part.series is None else part.series


def joint_part(joint: Joint, names: tuple[str, ...], undo: Callable[[], None], ahead: int | None) -> Part:
    """The share of parameters that are updated together.

    Args:
        joint: has them.
        names: of those that take part.
        undo: lets those go that are new.
        ahead: how many steps are to be made in one call; None for one step in a call of its own.
    """
    params, fading = [joint.members[name].param for name in names], Faded()
    undo_new: Callable[[], None] = undo

    def undo_all() -> None:
        undo_new()
        fading.back(fading.num_steps)

    try:
        if ahead is None:
            fading = joint.fade_many(params, None)
        joint.settle(together=True)
        (slabs,) = joint.store.units
        part = slabs_part(slabs, names, params, undo)
        undo_new = part.undo
        if ahead is not None:  # for which all parameters must have state
            fading = joint.fade_many(params, ahead)
            joint.settle(together=True)
            part = part._replace(data=(slabs.settings.arrays, *part.data[1:]))
    except BaseException:
        undo_all()
        raise
    series = None
    if fading.series is not None:
        series = (fading.series, *jax.tree.map(lambda _: None, part.data[1:]))
    skipped = fading.back if fading.num_steps else None
    return part._replace(undo=undo_all, skipped=skipped, series=series, most=fading.most)


def slabs_part(
    slabs: Slabs, names: tuple[str, ...], params: Sequence[Parameter], undo: Callable[[], None] = lambda: None
) -> Part:
    """The share of some of the parameters of slabs; ``undo`` takes back what was done for them before."""
    mask, new = slabs.opened(params)

    def undo_all() -> None:
        if new:
            slabs.lose(new)
        undo()

    update = slabs.update(slabs.is_even and mask is None, names)
    return Part(update, (slabs.settings.arrays, slabs.offsets, mask), slabs, undo_all)


class Owned:
    """The parameters, by name, and the state of an optimizer that updates all parameters jointly."""

    def __init__(self) -> None:
        self._whole: Whole | None = None
        # The states of other fits, for as long as their parameters are there.
        self._aside = weakref.WeakKeyDictionary[Parameter, tuple[list[weakref.ref[Parameter]], Any]]()

    def owner(self, params: Mapping[str, Parameter], init: Callable[[Any], Any]) -> Whole:
        """Return the owner of these parameters and all earlier ones; missing state is made by ``init``.

        Other parameters under known names are another fit, which begins afresh, or goes on if it comes again.
        """
        if self._whole is not None and not is_one_fit(params, self._whole.params):
            self._whole = self._changed(self._whole, params)
        whole = self._whole
        known = {} if whole is None else {str(param.name): param for param in whole.params}
        if whole is None or not params.keys() <= known.keys():
            every, old = known | dict(params), None if whole is None else whole.states[0]
            fresh = init({name: param.value for name, param in every.items()})
            state = grown(old, fresh, known, every)
            whole = self._whole = Whole(list(every.values()), [state])
        whole.update_outdated()
        return whole

    def _changed(self, old: Whole, params: Mapping[str, Parameter]) -> Whole | None:
        """Set a fit aside, and return that of other parameters; None if it is new."""
        for param in old.params:
            param.value = param.value
            self._aside[param] = [weakref.ref(other) for other in old.params], old.states[0]
        refs, state = next((self._aside[param] for param in params.values() if param in self._aside), ([], None))
        every = [param for ref in refs if (param := ref()) is not None]
        if not refs or len(every) < len(refs) or not is_one_fit(params, every):
            return None
        for param in every:
            del self._aside[param]
        return Whole(every, [state])

    def saved(self, params: Mapping[str, Parameter]) -> tuple[list[str], Any] | None:
        """The names and the state of the fit that some of these parameters are of; None before its first step."""
        fits = [] if self._whole is None else [(self._whole.params, self._whole.states[0])]
        left = [self._aside[param] for param in params.values() if param in self._aside]
        fits += [([param for ref in refs if (param := ref()) is not None], state) for refs, state in left]
        for every, state in fits:
            if any(params.get(str(param.name)) is param for param in every):
                return [str(param.name) for param in every], state
        return None

    def restore(self, params: Mapping[str, Parameter], saved: tuple[list[str], Any] | None) -> Callable[[], None]:
        """Give the fit of these parameters a saved state, or none, and return a function that undoes it."""
        whole = self._whole
        if whole is not None and not is_one_fit(params, whole.params):
            whole = self._whole = self._changed(whole, params)
        before = None if whole is None else (whole.params, whole.states)
        for param in [] if whole is None else whole.params:
            param.value = param.value
        self._whole = None if saved is None else Whole([params[name] for name in saved[0]], [saved[1]])

        def undo() -> None:
            self._whole = None if before is None else Whole(*before)

        return undo

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise for values that do not fit the state."""
        for param in () if self._whole is None else self._whole.params:
            if (name := str(param.name)) in values:
                trees.check_shape("value", name, values[name], param)

    def __getstate__(self) -> dict[str, Any]:
        return {"kept": None if self._whole is None else (self._whole.params, self._whole.states)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._whole = None if state["kept"] is None else Whole(*state["kept"])

    def state_for(self, fresh: Any, names: Collection[str]) -> Any:
        """The state for these parameters; ``fresh`` is theirs before the first step."""
        if self._whole is None:
            return fresh
        return grown(self._whole.states[0], fresh, [str(param.name) for param in self._whole.params], names)


def is_one_fit(params: Mapping[str, Parameter], others: Sequence[Parameter]) -> bool:
    """Return whether each name stands for one parameter only."""
    by_name = {str(param.name): param for param in others}
    return all(by_name.get(name, param) is param for name, param in params.items())


def grown(old: Any, fresh: Any, known: Collection[str], names: Collection[str]) -> Any:
    """Return a state for more parameters that keeps the old entries; a fresh one if the shape of a leaf differs.

    Args:
        old: the state so far, None before the first.
        fresh: a state before the first update.
        known: the names of the parameters that the state so far is about.
        names: of all parameters.
    """
    if old is None:
        return fresh
    new = [name for name in names if name not in known]
    kept = dict(jax.tree_util.tree_flatten_with_path(old)[0])
    leaves, treedef = jax.tree_util.tree_flatten_with_path(fresh)
    if any(path in kept and jnp.shape(kept[path]) != jnp.shape(leaf) for path, leaf in leaves):
        return fresh
    state = jax.tree.unflatten(treedef, [kept.get(path, leaf) for path, leaf in leaves])
    before = {path: of for path, of in _states(old) if isinstance(of, OptState)}
    counted = [_counted(before[path], of, names, new) if path in before else of for path, of in _states(state)]
    return jax.tree.unflatten(jax.tree.structure(state, is_leaf=_is_state), counted)


def _is_state(x: Any) -> bool:
    return isinstance(x, OptState)


def _states(tree: Any) -> list[tuple[Any, Any]]:
    """The states of rules in a tree, and its other leaves, with their paths."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_state)[0]


def _counted(old: OptState, state: Any, names: Collection[str], new: Collection[str]) -> OptState:
    """Return a grown state in which new parameters have made no update and the others as many as before."""
    if not new:
        return state._replace(counts=old.counts)
    own: dict[str, Any] = {name: jnp.zeros((), jnp.int32) if name in new else None for name in names}
    masked = {name: x for name, x in next(iter(state.slots.values()), {}).items() if not jax.tree.leaves(x)}
    return state._replace(counts=own | (old.counts or {}) | {name: x for name, x in masked.items() if x is not None})


class OwnedUpdate(Update):
    """The update of some of the parameters that an :class:`Owned` has.

    Args:
        form: the structure of values and state.
        every: the names of all its parameters.
        names: those that take part.
        tx: a transformation that is fixed in the program, None for what the data have.
    """

    def __init__(self, form: Static, every: tuple[str, ...], names: tuple[str, ...], tx: Any) -> None:
        self.form, self.every, self.names, self.tx = form, every, names, tx

    def values(self, data: Any, leaves: Sequence[Any]) -> dict[str, jax.Array]:
        """Return the values of those that take part, by name."""
        values, _ = self.parted(leaves)
        return {name: values[name] for name in self.names}

    def parted(self, leaves: Sequence[Any]) -> tuple[dict[str, jax.Array], Any]:
        """The values of all parameters by name, and the state."""
        values, (state,) = self.contents(leaves).cells[0]
        return dict(zip(self.every, values, strict=True)), state


class TransformationUpdate(OwnedUpdate):
    """The update of parameters of which a transformation, or a rule, sees all."""

    def after(self, data: Any, leaves: Sequence[Any], evaluation: Evaluation, measured: bool) -> Updated:
        """Make one update; a rule of one array makes the exact step."""
        optimizer, (values, state) = self.tx if data is None else data.each()[0], self.parted(leaves)
        new, state = updated(optimizer, evaluation, values, state)
        return Updated(contents([new[name] for name in self.every], [state]))


def updated(
    optimizer: Any, evaluation: Evaluation, values: Mapping[str, jax.Array], state: Any
) -> tuple[dict[str, jax.Array], Any]:
    """New values and state from a rule or a transformation.

    Parameters that the evaluation is not about stay. They have no gradient for a rule, and one of zero for a
    transformation of another library, which knows no missing ones.
    """
    values = dict(values)
    grads: dict[str, Any] = {name: evaluation.grads.get(name) for name in values}
    if isinstance(optimizer, Rule):
        if optimizer.sparse == "required":
            grads = {name: None if grad is None else rows_of(grad) for name, grad in grads.items()}
        return step_of_rule(optimizer, values, grads, state)
    if isinstance(optimizer, Hyperparameters):
        optimizer = transformation(optimizer)
    else:
        grads = {name: jnp.zeros_like(values[name]) if grad is None else grad for name, grad in grads.items()}

    def value_fn(new: Mapping[str, jax.Array]) -> Any:
        return evaluation.loss_of({name: new[name] for name in evaluation.values})

    update = optax.with_extra_args_support(optimizer).update
    updates, state = update(grads, state, values, value=evaluation.loss, grad=grads, value_fn=value_fn)
    moved = {name: updates[name] for name in evaluation.values}
    return values | optax.apply_updates({name: values[name] for name in moved}, moved), state


def transformation_part(owned: Owned, optimizer: Any, params: Mapping[str, Parameter]) -> Part:
    """The share of a transformation or a rule."""
    is_rule = isinstance(optimizer, Hyperparameters)
    tx = transformation(optimizer) if is_rule else optimizer
    owner = owned.owner(params, tx.init)
    update = TransformationUpdate(owner.form, names_of(owner), tuple(params), None if is_rule else tx)
    return Part(update, Numbers([optimizer], stay=False) if is_rule else None, owner)


def newton_part(owned: Owned, radii: Mapping[str, Any], params: Mapping[str, Parameter]) -> Part:
    """The share of Newton's method."""
    owner = owned.owner(params, lambda values: None)
    return Part(NewtonUpdate(owner.form, names_of(owner), tuple(params), None), Numbers([radii], stay=False), owner)


def names_of(owner: Owner) -> tuple[str, ...]:
    """The names of all parameters of an owner."""
    return tuple(str(param.name) for param in owner.params)


class NewtonUpdate(OwnedUpdate):
    """The update of parameters each of which makes a Newton step of its own."""

    second_order = True

    def after(self, data: Any, leaves: Sequence[Any], evaluation: Evaluation, measured: bool) -> Updated:
        """Make one step; see :func:`newton_steps`."""
        values, state = self.parted(leaves)
        new = values | newton_steps(evaluation, data.each()[0])
        return Updated(contents([new[name] for name in self.every], [state]))


def newton_steps(evaluation: Evaluation, radii: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The values after one Newton step of each, all derivatives at the old point."""
    new = {}
    for name, value in evaluation.values.items():
        dx, _ = solve(evaluation.grads[name], hessian(evaluation.push_of(name), value), radii.get(name))
        new[name] = (value + dx).astype(value.dtype)
    return new
