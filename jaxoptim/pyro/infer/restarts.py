"""Several fits of one model and guide, from values of their own, in one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxoptim.core.loss import Loss
from jaxoptim.core.numerics import put
from jaxoptim.core.placement import readable
from jaxoptim.engine.loops import Changes, Course
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.infer.arguments import Arguments
from jaxoptim.pyro.infer.objective import Site, discover
from jaxoptim.pyro.optim.multi_optimizer import MultiOptimizer
from jaxoptim.pyro.optim.parts import Part, make_steps_of_fits


class Restarts(NamedTuple):
    """The results of several fits.

    Attributes:
        best: the number of the fit whose loss at the end is the lowest, an int.
        losses: of each fit at each step, ``(num_restarts, num_steps)``.
        params: the constrained parameters of all fits by site, with a first axis of fits.
    """

    best: int
    losses: jax.Array
    params: dict[str, Any]


def beginnings(
    model: Any, guide: Any, elbo: Any, keys: jax.Array, arguments: Arguments, initial: Mapping[str, Any]
) -> tuple[dict[str, jax.Array], Any]:
    """Return the initial values of fits with these keys, and the keys and mutable states of their first steps.

    An automatic guide keeps the values that it finds at its first run, here of all fits at once; so it must be one that
    has not run, and does not run again.
    """

    def begin(key: jax.Array, traced: Any) -> Any:
        args, kwargs = arguments.rebuilt(traced)
        found = discover(model, guide, elbo, key, args, kwargs, {}, initial)
        return found.values, (found.key, found.mutable)

    return jax.jit(jax.vmap(begin, (0, None)))(keys, arguments.traced)


class Fits:
    """Several fits of the same parameters, advanced together.

    Args:
        multi: the optimizer.
        values: the initial values of all fits by name, with a first axis of fits.
        carried: what the first steps are left, with a first axis of fits.
        mesh: the devices that the fits are spread over; None for one.

    Attributes:
        params: the parameters, which have the values of one of the fits.
        carried: what the last steps have left.
        losses: of all steps so far.

    Raises:
        ``TypeError`` for an optimizer that needs Python in each step.
    """

    def __init__(self, multi: MultiOptimizer, values: Mapping[str, jax.Array], carried: Any, mesh: Mesh | None) -> None:
        rows, self._parts = list[Any](), list[Part]()
        for at in range(len(next(iter(values.values())))):
            # Each under the same names: another fit, which the optimizer begins afresh.
            own = {name: Parameter(x[at], name) for name, x in values.items()}
            self.params = dict(own)
            parts = multi._parts(self.params, 1)
            if parts is None or self.params != own:
                raise TypeError(
                    "Many fits at once take an optimizer that begins each of them, and whose steps are compiled: a "
                    "PyroOptim, a rule, a transformation of optax or a function that makes a torch-style one, but no "
                    "instance of the last, no HorovodOptimizer, L-BFGS of torch's kind or class of your own. Give one "
                    "of them, or run a new SVI for each key."
                )
            for part in parts:
                if part.skipped is not None:
                    part.skipped(1)
            rows.append([list(part.owner.leaves) for part in parts])
            self._parts = parts
        leaves = jax.tree.map(lambda *of_fits: jnp.stack(of_fits), *rows)
        if mesh is not None:
            leaves, carried = put((leaves, carried), NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
        self._multi, self._mesh, self._leaves, self.carried = multi, mesh, leaves, carried
        self.losses = np.zeros((len(rows), 0), np.float32)

    def advance(self, loss: Loss, turn: Any, given: Any, count: int, skips: bool) -> int:
        """Make at most so many of the next steps of all fits, and return their number."""
        parts = self._multi._parts(self.params, count) or []
        course = Course(turn, self.carried, given, count)
        try:
            made, self._leaves, losses, self.carried = make_steps_of_fits(
                parts, self._leaves, loss, course, skips, self._mesh
            )
        except Changes:
            raise TypeError(
                "Many fits at once take an optimizer and a mutable state that keep their form from step to step, and "
                "these do not. Run a new SVI for each key."
            ) from None
        self._parts = parts
        new = np.asarray(readable(losses))[:, :made]
        self.losses = np.concatenate([self.losses, new], 1) if self.losses.size else new
        return made

    def best(self) -> int:
        """The fit whose loss, the mean over the last tenth of its steps, is the lowest; raises if none is finite."""
        last = self.losses[:, -max(1, self.losses.shape[1] // 10) :].astype(np.float64).mean(1)
        if not np.isfinite(last).any():
            raise ValueError(
                f"None of the {len(last)} fits has a finite loss at the end. Give a smaller learning rate, other "
                "init_params, or stable_update=True."
            )
        return int(np.nanargmin(np.where(np.isfinite(last), last, np.nan)))

    def constrained(self, sites: Mapping[str, Site]) -> dict[str, Any]:
        """The constrained values of all fits by site."""

        def of_fit(leaves: Any) -> dict[str, Any]:
            values: dict[str, Any] = {}
            for part, its in zip(self._parts, leaves, strict=True):
                values |= part.update.values(part.data, its)
            return {name: site.value(values) for name, site in sites.items()}

        return jax.jit(jax.vmap(of_fit))(self._leaves)

    def keep(self, fit: int) -> None:
        """Leave parameters and optimizer as one of the fits has them."""
        for part, leaves in zip(self._parts, self._leaves, strict=True):
            part.owner.take([self._of(fit, x) for x in leaves])
        self.carried = jax.tree.map(functools.partial(self._of, fit), self.carried)

    def _of(self, fit: int, x: jax.Array) -> jax.Array:
        """Return the slice of an array that belongs to one of the fits, on one device of this process."""
        own = x[fit]
        return own if self._mesh is None else readable(own).addressable_data(0)
