"""One step of several optimizers that share one evaluation of the loss, in one compiled call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxoptim.core import Hyperparameters, Rule, transformation, trees
from jaxoptim.core import step as step_of_rule
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.loss import Evaluation, Loss
from jaxoptim.core.sparse import rows_of
from jaxoptim.engine import programs
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.numbers import Numbers
from jaxoptim.engine.owner import Owner
from jaxoptim.engine.static import Static
from jaxoptim.engine.update import Update
from jaxoptim.engine.whole import Whole, contents
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.optim.joint import Joint
from jaxoptim.rules.newton import hessian, solve


class Part(NamedTuple):
    """The share of one optimizer in a step.

    Attributes:
        update: how its parameters are updated.
        data: what the update reads.
        owner: has values and state.
        undo: takes back what was done for a step that fails.
        skipped: takes back what was done for a step that is skipped, None if that is nothing.
    """

    update: Update
    data: Any
    owner: Owner
    undo: Callable[[], None] = lambda: None
    skipped: Callable[[], None] | None = None


def undo(parts: Sequence[Part]) -> None:
    """Take back what was done for a step that fails."""
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
    is_kept = False
    try:
        with Uninterrupted():
            taken = tuple(part.owner.taken() for part in parts)
            options = programs.StepOptions(skip_nonfinite=skip_nonfinite)
            new, _, value, aux, _ = programs.minimize(
                updates,
                None,
                loss,
                options,
                programs.StepNumbers(),
                data,
                taken,
                held,
                args,
                programs.true(),
                elsewhere,
            )
            for part, leaves in zip(parts, new, strict=True):
                part.owner.take(leaves)
            is_kept = True
    except BaseException:
        if not is_kept:
            undo(parts)
        raise
    skipped = [part.skipped for part in parts if part.skipped is not None]
    if skip_nonfinite and skipped and not bool(jnp.isfinite(value)):
        for take_back in skipped:
            take_back()
    return (value, aux) if loss.has_aux else value


def joint_part(joint: Joint, names: tuple[str, ...], undo: Callable[[], None]) -> Part:
    """The share of parameters that are updated together."""
    params = [joint.members[name].param for name in names]
    back, new = joint.fade(params), list[int]()

    def undo_all() -> None:
        if new:
            joint.store.units[0].lose(new)
        if back is not None:
            back()
        undo()

    try:
        joint.settle(together=True)
        (slabs,) = joint.store.units
        mask, started = slabs.opened(params)
        new.extend(started)
    except BaseException:
        undo_all()
        raise
    update = slabs.update(slabs.is_even and mask is None, names)
    return Part(update, (slabs.settings.arrays, slabs.offsets, mask), slabs, undo_all, back)


class Owned:
    """The parameters, and the state, of an optimizer that sees all of them at once, by name."""

    def __init__(self) -> None:
        self._whole: Whole | None = None
        # The states of other fits, for as long as their parameters are there.
        self._aside = weakref.WeakKeyDictionary[Parameter, tuple[list[weakref.ref[Parameter]], Any]]()

    def owner(self, params: Mapping[str, Parameter], init: Callable[[Any], Any]) -> Whole:
        """The owner of these parameters and of all before; state that is lacking is made by ``init``.

        Other parameters under known names are another fit, which begins afresh, or goes on if it comes again.
        """
        if self._whole is not None and not is_one_fit(params, self._whole.params):
            self._whole = self._changed(self._whole, params)
        whole = self._whole
        known = {} if whole is None else {str(param.name): param for param in whole.params}
        if whole is None or not params.keys() <= known.keys():
            every, old = known | dict(params), None if whole is None else whole.states[0]
            state = grown(old, init({name: param.value for name, param in every.items()}))
            whole = self._whole = Whole(list(every.values()), [state])
        whole.update_outdated()
        return whole

    def _changed(self, old: Whole, params: Mapping[str, Parameter]) -> Whole | None:
        """Put a fit aside for that of other parameters; None if that is a new one."""
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
        """Give the fit of these parameters a state that was saved, or none; what is returned takes it back."""
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
        """Raise for values that do not go with the state."""
        for param in () if self._whole is None else self._whole.params:
            if (name := str(param.name)) in values:
                trees.check_shape("value", name, values[name], param)

    def __getstate__(self) -> dict[str, Any]:
        return {"kept": None if self._whole is None else (self._whole.params, self._whole.states)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._whole = None if state["kept"] is None else Whole(*state["kept"])

    @property
    def state(self) -> Any:
        """The state; None before the first step."""
        return None if self._whole is None else self._whole.states[0]


def is_one_fit(params: Mapping[str, Parameter], others: Sequence[Parameter]) -> bool:
    """Whether no name stands for two parameters."""
    by_name = {str(param.name): param for param in others}
    return all(by_name.get(name, param) is param for name, param in params.items())


def grown(old: Any, fresh: Any) -> Any:
    """A state for more parameters, with what is there already; a fresh one if it is of another shape."""
    kept = dict(jax.tree_util.tree_flatten_with_path(old)[0])
    leaves, treedef = jax.tree_util.tree_flatten_with_path(fresh)
    if any(path in kept and jnp.shape(kept[path]) != jnp.shape(leaf) for path, leaf in leaves):
        return fresh
    return jax.tree.unflatten(treedef, [kept.get(path, leaf) for path, leaf in leaves])


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

    def after(self, data: Any, leaves: Sequence[Any], evaluation: Evaluation) -> tuple[Contents, None]:
        """Make one update; a rule of one array makes the exact step."""
        optimizer, (values, state) = self.tx if data is None else data.each()[0], self.parted(leaves)
        new, state = updated(optimizer, evaluation, values, state)
        return contents([new[name] for name in self.every], [state]), None


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

    def after(self, data: Any, leaves: Sequence[Any], evaluation: Evaluation) -> tuple[Contents, None]:
        """Make one step; see :func:`newton_steps`."""
        values, state = self.parted(leaves)
        new = values | newton_steps(evaluation, data.each()[0])
        return contents([new[name] for name in self.every], [state]), None


def newton_steps(evaluation: Evaluation, radii: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The values after one Newton step of each, all derivatives at the old point."""
    new = {}
    for name, value in evaluation.values.items():
        dx, _ = solve(evaluation.grads[name], hessian(evaluation.push_of(name), value), radii.get(name))
        new[name] = (value + dx).astype(value.dtype)
    return new
