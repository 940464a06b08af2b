"""The owner of arrays that compiled steps destroy and replace."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.core.loss import Loss
from jaxoptim.engine import programs
from jaxoptim.engine.contents import Contents
from jaxoptim.engine.layout import Layout
from jaxoptim.engine.programs import StepNumbers, StepOptions
from jaxoptim.engine.update import Update


class Owner:
    """The owner of some parameters: a compiled step takes its arrays, which are gone then, and returns new ones.

    Ctrl-C at any moment leaves the arrays of before or after a step.

    Args:
        params: the parameters; other methods know them by their numbers in it.
        contents: their values and state.

    Attributes:
        params: as given.
        index: the number of each parameter.
        form: the structure of the arrays.
        outdated: the parameters whose current value is no longer here.
        held: the parameters that steps leave as they are.
    """

    def __init__(self, params: Sequence[Any], contents: Contents) -> None:
        self.params = list(params)
        self.index: dict[Any, int] = {param: index for index, param in enumerate(self.params)}
        # What programs have returned, the arrays in front. The last counts; those of the others are gone.
        self._history: list[Any] = [([list(contents.leaves)],)]
        self.form = contents.form
        self.outdated: set[int] = set()
        self.held: set[int] = set()
        self._ran: set[Hashable] = set()  # the kinds of steps whose program is compiled
        for index, param in enumerate(self.params):
            param.enter(self, index)

    @property
    def leaves(self) -> Sequence[Any]:
        """The arrays that the last program has returned."""
        return self._history[-1][0][0]

    @property
    def contents(self) -> Contents:
        """The arrays as values and state."""
        return Contents.tree_unflatten(self.form, self.leaves)

    @property
    def published(self) -> Any:
        """The results that the last step has published, until this is set to None."""
        _, *published = self._history[-1]
        return published[0][0] if published else None

    @published.setter
    def published(self, nothing: None) -> None:
        self._history[-1] = self._history[-1][:1]

    def read(self, index: int) -> Any:
        """Return the value of one parameter, the same array until the next step."""
        raise NotImplementedError

    def read_all(self) -> None:
        """Read the values of all parameters, where that is faster than one after the other."""

    def update_outdated(self) -> None:
        """Bring back the values that were assigned, or taken over by another optimizer, since the last step."""
        raise NotImplementedError

    def taken(self) -> Sequence[Any]:
        """Return the arrays for a compiled program, which destroys them; those that others hold are copied first.

        On CPUs a copy that is donated costs less than a result in fresh memory.
        """
        leaves = self.leaves
        held = [count > _OURS for count in _references(leaves)]
        if any(held):
            leaves = [jnp.copy(x) if other else x for x, other in zip(leaves, held, strict=True)]
            self._history[-1] = ([leaves],)
        return leaves

    def replace(self, contents: Contents) -> None:
        """Keep other arrays, of this or another structure."""
        self._history, self.form = [([list(contents.leaves)],)], contents.form

    def take(self, new: Sequence[Any] | Contents) -> None:
        """Keep what a program of several owners has returned: the arrays, or contents of another structure."""
        if isinstance(new, Contents):
            self.replace(new)
        else:
            self._history = [([new],)]

    def run(self, program: Callable[..., Any], kind: Hashable, args: tuple[Any, ...]) -> Any:
        """Call a compiled program, and keep the arrays that it returns for those that it destroys.

        Args:
            program: returns a tuple that begins with a list of the owner's arrays, and a list of what it publishes.
            kind: decides whether it is compiled already; None for a program that may run Python code at each call.
            args: of the program, :meth:`taken` among them.

        Returns:
            What the program returns.
        """
        if kind is not None and kind in self._ran:
            # All of it happens within one operation of the interpreter, which Ctrl-C does not break.
            self._history.extend(itertools.starmap(program, [args]))
        else:
            with Uninterrupted():
                self._history.append(program(*args))
                self._ran.add(kind)
        result = self._history[-1]
        self._history[:] = [result[:2]]
        return result

    def minimize_by(self, update: Update, layout: Layout, data: Any, job: Minimization) -> Any:
        """Make one step along the gradient of a loss, in one compiled call.

        Returns:
            The loss before the step, the auxiliary output of the loss, and what was measured.
        """
        loss, args, options, numbers = job
        kinds = (*map(kind_of, jax.tree.leaves(args)), *(number is None for number in numbers))
        kind = None if loss.has_aux else (update, loss, options, *kinds)  # an auxiliary output may be of any class
        given: tuple[Any, ...] = ((update,), layout, loss, options, numbers, (data,), (self.taken(),), {}, args)
        return self.run(programs.minimize, kind, given)[2:]


class Minimization(NamedTuple):
    """The checked arguments of one call of ``minimize``.

    Attributes:
        loss: the loss.
        args: its arguments besides the parameters.
        options: the other options of the step.
        numbers: of these options.
    """

    loss: Loss
    args: tuple[Any, ...]
    options: StepOptions = StepOptions()
    numbers: StepNumbers = StepNumbers()


def _references(arrays: Sequence[Any]) -> list[int]:
    """Return the number of references to each array."""
    return [sys.getrefcount(x) for x in arrays]


_OURS = _references((object(),))[0]
"""What :func:`_references` counts for an object that only a sequence holds."""


def kind_of(x: Any) -> Any:
    """Return the part of an argument that decides which program runs."""
    return (x.shape, x.dtype) if hasattr(x, "shape") else type(x)
