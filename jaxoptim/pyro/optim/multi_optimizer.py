"""The base class of optimizers that take a loss function instead of gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import trees
from jaxoptim.core.loss import Evaluation, Loss, LossFunctions, Values, evaluated
from jaxoptim.core.numerics import strong
from jaxoptim.core.tracing import refuse_tracing
from jaxoptim.engine.loops import Course
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.optim import parts as steps
from jaxoptim.pyro.optim.parts import Part

Params = Mapping[str, Parameter]

_CALL = "optimizer.step(loss_fn, params, batch)"


class MultiOptimizer:
    r"""The base of optimizers that differentiate the loss themselves: ``pyro.optim.multi.MultiOptimizer``.

    .. math::
        \theta \leftarrow \mathrm{get\_step}(L, \theta)

    The loss is a function of a dict of named values, where Pyro takes the graph of one tensor. A subclass of your own
    defines :meth:`get_step`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim.optim import Parameter
        >>> from jaxoptim.pyro.optim.multi import MultiOptimizer
        >>> class GradientDescent(MultiOptimizer):
        ...     def get_step(self, loss_fn, params, *args):
        ...         values = {name: jnp.asarray(getattr(p, "value", p)) for name, p in params.items()}
        ...         grads = jax.grad(loss_fn)(values, *args)
        ...         return {name: values[name] - 0.5 * grads[name] for name in values}
        >>> params = {"x": Parameter(3.0, "x")}
        >>> float(GradientDescent().step(lambda values: values["x"] ** 2, params)), float(params["x"].value)
        (9.0, 0.0)
    """

    _second_order = False
    """Whether :meth:`_new_values` needs second derivatives."""

    def get_step(self, loss_fn: Callable[..., Any], params: Mapping[str, Any], *args: Any) -> dict[str, jax.Array]:
        """Return the values after a step. Nothing is changed, state included; derivatives pass through.

        Args:
            loss_fn: ``loss_fn(values, *args)`` returns a real scalar; ``values`` is a dict of name to array.
            params: a dict of name to parameter or array.
            args: passed on to ``loss_fn``.

        Returns:
            A dict of the new values.

        Raises:
            ``NotImplementedError`` in a subclass that does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no get_step. Define it to return a dict of new values.")

    def step(
        self,
        loss_fn: Callable[..., Any],
        params: Params,
        *args: Any,
        has_aux: bool = False,
        skip_nonfinite: bool = False,
    ) -> Any:
        """Update parameters in place once, all from one evaluation of the loss at their old values.

        It is compiled once for each ``loss_fn`` and shapes of ``args``; pass one function again and again, and data as
        arguments. What else ``loss_fn`` reads, such as a global or an attribute, is fixed then.

        Args:
            loss_fn: ``loss_fn(values, *args)`` returns a real scalar, or ``(scalar, aux)``; ``values`` is a dict of
                name to array.
            params: a dict of name to parameter.
            args: pytrees of arrays.
            has_aux: whether ``loss_fn`` returns an auxiliary output too (default False).
            skip_nonfinite: leave parameters and state as they are if the loss or a gradient is not finite (default
                False).

        Returns:
            The loss before the step, nan if it was skipped, or ``(loss, aux)``.

        Raises:
            ``TypeError`` for what is no parameter and for a loss that is not real; ``ValueError`` for one that is not
            a scalar, and for a parameter whose name is not its key; what ``loss_fn`` raises. Nothing is changed then.
        """
        refuse_tracing(f"{type(self).__name__}.step", "use its get_step, which is pure")
        # Made here and not by a constructor, which a user's class need not call.
        vars(self).setdefault("_loss_functions", LossFunctions("step", _CALL)).check(loss_fn)
        self._check_whole(checked(params))
        return self._step(Loss(loss_fn, has_aux), params, trees.owned_arrays(args), skip_nonfinite)

    def state_dict(self, params: Params) -> dict[str, Any]:
        """The state of a fit, for :meth:`load_state_dict`. A class of your own that has state defines both.

        Args:
            params: the parameters of the fit, a dict of name to parameter. Their values are not saved.

        Returns:
            A dict that ``jaxoptim.checkpoint`` takes. That of a class which does not define it is empty.

        Examples:
            >>> from jaxoptim import rules
            >>> from jaxoptim.optim import Parameter
            >>> from jaxoptim.pyro.optim.multi import TransformationMultiOptimizer
            >>> params = {"x": Parameter(3.0, "x")}
            >>> old, new = (TransformationMultiOptimizer(rules.SGD(lr=0.1, momentum=0.9)) for _ in range(2))
            >>> loss = old.step(lambda values: values["x"] ** 2, params)
            >>> new.load_state_dict(old.state_dict(params), params)
            >>> {place: float(x) for place, x in new.state_dict(params)["state"].items()}
            {'.step': 1.0, ".slots['momentum_buffer']['x']": 6.0}
        """
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any], params: Params) -> None:
        """Take over what :meth:`state_dict` gave, also in another process. Values of parameters stay.

        Args:
            state_dict: what it gave.
            params: the parameters that the state is for, a dict of name to parameter.

        Raises:
            ``KeyError`` for a parameter that is missing, ``ValueError`` for a state of another kind of optimizer or one
            that does not fit, ``TypeError`` for what is no dict. Nothing is changed then.

        Examples:
            See :meth:`state_dict`.
        """
        if state_dict:
            raise ValueError(
                f"The saved optimizer has a state, but {type(self).__name__} keeps none. Define state_dict(params) and "
                "load_state_dict(state_dict, params), or load it into an optimizer of the kind that was saved."
            )

    def _step(self, loss: Loss, params: Params, args: tuple[Any, ...], skip_nonfinite: bool) -> Any:
        """The step, after checks of what was given."""
        compiled, others = self._divided(params)
        own = dict[str, Any]()
        for optimizer, its in others:
            own |= _own_step(optimizer, its, params, loss, args)
        elsewhere = {name: params[name].value for name in own}
        opened = _opened(compiled, None)
        result = steps.make_step(opened, loss, args, held_values(params), elsewhere, skip_nonfinite)
        if own and not (skip_nonfinite and not bool(jnp.isfinite(result[0] if loss.has_aux else result))):
            for name, value in own.items():
                params[name].value = value
        return result

    def _steps(self, loss: Loss, params: Params, course: Course, skip_nonfinite: bool) -> tuple[int, Any, Any] | None:
        """Make many steps in one compiled call; return None if a step has to run Python code.

        Returns:
            As :func:`parts.make_steps`.

        Raises:
            Changes: for a step from which no other can go on. Nothing is done then.
        """
        parts = self._parts(params, course.num_steps)
        return None if parts is None else steps.make_steps(parts, loss, course, held_values(params), skip_nonfinite)

    def _parts(self, params: Params, ahead: int | None) -> list[Part] | None:
        """Return the shares of all optimizers in so many steps of one call; None if a step has to run Python code."""
        compiled, others = self._divided(params)
        return None if others or not compiled else _opened(compiled, ahead)

    def _divided(self, params: Params) -> tuple[list[tuple[Compiled, Params]], list[tuple[MultiOptimizer, Params]]]:
        """Return the parameters of each optimizer: those of this library, and others."""
        compiled, others = list[tuple[Compiled, Params]](), list[tuple[MultiOptimizer, Params]]()
        for optimizer, share in _merged(self._shares(params)):
            its = {name: param for name, param in share.items() if param.requires_grad}
            if its and isinstance(optimizer, Compiled):
                compiled.append((optimizer, its))
            elif its:
                others.append((optimizer, its))
        return compiled, others

    def brought(self) -> dict[str, Parameter]:
        """Return by name the parameters that this optimizer substitutes for others."""
        return {}

    def _check_whole(self, params: Params) -> None:
        """Raise for a name of this optimizer that matches none of the parameters, given all of them."""

    def _shares(self, params: Params) -> list[tuple[MultiOptimizer, Params]]:
        """Return each optimizer with the parameters that it updates."""
        return [(self, params)]

    def _keeper(self) -> Any:
        """Return the object that keeps the state: two multi-optimizers with the same one make one step."""
        return self


def _opened(compiled: list[tuple[Compiled, Params]], ahead: int | None) -> list[Part]:
    """The shares of all optimizers in a step, or in so many."""
    opened: list[Part] = []
    try:
        for optimizer, its in compiled:
            opened.append(optimizer._open(its, ahead))
    except BaseException:
        steps.undo(opened)
        raise
    return opened


def held_values(params: Params) -> dict[str, Any]:
    """The values of frozen parameters."""
    return {name: param.value for name, param in params.items() if not param.requires_grad}


def _merged(shares: list[tuple[MultiOptimizer, Params]]) -> list[tuple[MultiOptimizer, Params]]:
    """Merge the shares of one optimizer into one."""
    merged: dict[int, tuple[MultiOptimizer, Params]] = {}
    for optimizer, its in shares:
        first, so_far = merged.get(id(optimizer._keeper()), (optimizer, {}))
        merged[id(optimizer._keeper())] = first, {**so_far, **its}
    return list(merged.values())


def _own_step(
    optimizer: MultiOptimizer, its: Params, params: Params, loss: Loss, args: tuple[Any, ...]
) -> dict[str, Any]:
    """The step of a user's class, which is not compiled: it may do anything."""
    others = {name: param.value for name, param in params.items() if name not in its}

    def loss_of(values: Values, *args: Any) -> Any:
        return loss.value(others | dict(values), args)

    new = optimizer.get_step(loss_of, its, *args)
    if missing := [name for name in its if name not in new]:
        raise ValueError(f"The get_step of {type(optimizer).__name__} has returned nothing for {missing[0]!r}.")
    values = {name: jnp.asarray(new[name]) for name in its}
    for name, value in values.items():
        trees.check_shape(f"value that the get_step of {type(optimizer).__name__} has returned", name, value, its[name])
    return values


class Compiled(MultiOptimizer):
    """A multi-optimizer of this library, whose step is part of a compiled program."""

    def get_step(self, loss_fn: Callable[..., Any], params: Mapping[str, Any], *args: Any) -> dict[str, jax.Array]:
        """See :meth:`MultiOptimizer.get_step`."""
        evaluation = evaluated(Loss(loss_fn, False), values_of(params), args, self._needs_second())
        return self._new_values(evaluation)

    def _needs_second(self) -> bool:
        return self._second_order

    def _new_values(self, evaluation: Evaluation) -> dict[str, jax.Array]:
        """The values after a step from an evaluation; a pure function of it."""
        raise NotImplementedError

    def _open(self, params: Params, ahead: int | None = None) -> Part:
        """This optimizer's share of a compiled step, or of so many in one call."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Mapping[str, Any], params: Params) -> None:
        """See :meth:`MultiOptimizer.load_state_dict`."""
        self._load(state_dict, params)

    def _load(self, state_dict: Mapping[str, Any], params: Params) -> Callable[[], None]:
        """Load a state, and return a function that undoes it."""
        raise NotImplementedError


def check_state(state_dict: Any, kind: str, params: Params) -> None:
    """Raise for anything but a state of this kind of optimizer and of parameters that exist."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"A state is what state_dict() gave, a dict, but got {type(state_dict).__name__}.")
    if (given := state_dict.get("kind", "another optimizer")) != kind:
        raise ValueError(
            f"The saved state is of {given}, but this optimizer is {kind}. Load it into an optimizer of the kind that "
            "was saved."
        )
    if missing := [name for name in state_dict["names"] if name not in params]:
        raise KeyError(
            f"The saved state of the optimizer is about {missing[0]!r}, but the parameters are "
            f"{', '.join(map(repr, params)) or 'none'}."
        )


@functools.partial(jax.jit, static_argnames="loss")
def differentiated(loss: Loss, values: dict[str, jax.Array], args: Any) -> Any:
    """The loss, its auxiliary output and its gradients."""
    evaluation = evaluated(loss, values, args, False)
    return evaluation.loss, evaluation.aux, evaluation.grads


def checked(params: Any) -> Params:
    """A dict of parameters, each under its name; one without a name gets it."""
    if not isinstance(params, Mapping):
        raise TypeError(f"A dict of name to Parameter is expected, but got {type(params).__name__}.")
    for name, param in params.items():
        if not isinstance(param, Parameter):
            raise TypeError(
                f"A dict of name to Parameter is expected, but {name!r} is {type(param).__name__}. Give "
                "Parameter(value, name), or call get_step, which takes arrays."
            )
        if param.name not in (None, name):
            raise ValueError(f"The parameter under the key {name!r} is called {param.name!r}. Both must be equal.")
    for name, param in params.items():
        param.name = name
    return params


def values_of(params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Parameters or arrays as arrays, not weakly typed."""
    arrays = {name: strong(p.value if isinstance(p, Parameter) else p) for name, p in params.items()}
    return {name: trees.check_array("parameter", name, x) for name, x in arrays.items()}
