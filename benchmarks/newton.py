"""Time of Newton's method on batches of small problems against Pyro's: ``make bench``.

A step is one Newton step on all problems of a batch, loss included: the sum of Rosenbrock functions of two or three
variables. Pyro is given a loss computed anew for each step, from a detached point, as its documentation says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contenders import Builders, torch, torch_runs_here
from jaxoptim.rules.newton import newton, newton_step
from tables import asked
from timing import Effort, Run, heading, measure, row

try:
    from pyro.ops.newton import newton_step as pyro_newton_step
except ImportError:
    pyro_newton_step = None

PROBLEMS = 1000
SIZES = (2, 3)
RADII = (None, 0.1)


def rosenbrock(x: Any, scales: Any) -> Any:
    """The sum over a batch, for arrays of either library."""
    return (scales * ((1 - x[:, :-1]) ** 2 + 100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2)).sum()


def batch(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the problems begin, and their scales."""
    rng = np.random.default_rng(0)
    start = rng.uniform(-1.5, 1.5, (PROBLEMS, size)).astype(np.float32)
    return start, rng.uniform(0.5, 2, (PROBLEMS, 1)).astype(np.float32)


def one_by_one(radius: float | None, start: jax.Array, scales: jax.Array) -> Run:
    """A compiled step, called from a loop in Python."""

    @jax.jit
    def step(x: jax.Array, scales: jax.Array) -> jax.Array:
        return newton_step(lambda x: rosenbrock(x, scales), x, radius)[0]

    return functools.partial(_advance, lambda x: step(x, scales), start)


def as_transformation(radius: float | None, start: jax.Array, scales: jax.Array) -> Run:
    """The optax transformation."""
    tx = newton(None if radius is None else {"params": radius})

    @jax.jit
    def step(x: jax.Array, state: Any, scales: jax.Array) -> tuple[jax.Array, Any]:
        updates, state = tx.update(x, state, x, value_fn=lambda x: rosenbrock(x, scales))
        return x + updates, state

    return functools.partial(_advance, lambda carry: step(*carry, scales), (start, tx.init(start)))


def in_one_loop(radius: float | None, start: jax.Array, scales: jax.Array) -> Run:
    """All steps of a turn in one compiled loop."""

    @jax.jit
    def steps(x: jax.Array, scales: jax.Array, number: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, number, lambda _, x: newton_step(lambda x: rosenbrock(x, scales), x, radius)[0], x)

    return lambda number: jax.block_until_ready(steps(start, scales, number))


def in_pyro(radius: float | None, start: jax.Array, scales: jax.Array) -> Run:
    """The parent."""
    scales = torch.from_dlpack(scales)

    def step(x: Any) -> Any:
        x = x.detach().requires_grad_()
        return pyro_newton_step(rosenbrock(x, scales), x, radius)[0]

    return functools.partial(_advance, step, torch.from_dlpack(start))


def _advance(step: Callable[[Any], Any], start: Any, number: int) -> None:
    """Steps from the start of the batch, and a wait for the last."""
    x = start
    for _ in range(number):
        x = step(x)
    if torch is not None and isinstance(x, torch.Tensor):
        x.sum().item()
    else:
        jax.block_until_ready(x)


def table(size: int, radius: float | None, effort: Effort) -> str:
    """The times of all contenders on one batch."""
    data = [jnp.asarray(array) for array in batch(size)]
    makers = {
        "jaxoptim.newton_step, jitted": one_by_one,
        "jaxoptim.newton, transformation, jitted": as_transformation,
        "jaxoptim.newton_step, steps in one loop": in_one_loop,
    }
    makers |= {"pyro.ops.newton.newton_step": in_pyro} if torch_runs_here() and pyro_newton_step is not None else {}
    builders: Builders = {name: functools.partial(make, radius, *data) for name, make in makers.items()}
    times = measure(builders, effort)
    reference = times.get("pyro.ops.newton.newton_step")
    rows = [row(name, times[name], reference) for name in makers]
    title = f"Newton's method on {PROBLEMS} problems in {size} dimensions, trust_radius={radius}, float32"
    return "\n".join([title, heading("step", "pyro"), *rows])


def main() -> None:
    """Measure, and print one table for each batch, with and without a radius."""
    effort = asked(__doc__.splitlines()[0])
    for size in SIZES:
        for radius in RADII:
            print("\n" + table(size, radius, effort), flush=True)


if __name__ == "__main__":
    main()
