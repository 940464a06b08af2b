"""Time of a step of SVI with every kind of optimizer, against Pyro and numpyro: ``make bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pyro
import pyro.distributions
import pyro.infer
import pyro.optim
import torch

from contenders import Builders
from jaxoptim import optim, rules
from jaxoptim.pyro import infer
from jaxoptim.pyro import optim as named
from tables import asked
from timing import Run, heading, measure, row

FEATURES, ROWS = 20, 200
STEPS = 1000
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "Adam of pyro.optim": lambda: named.Adam({"lr": 1e-3}),
    "ClippedAdam, lr decaying": lambda: named.ClippedAdam({"lr": 1e-3, "lrd": 0.999}),
    "rules.Adam": lambda: rules.Adam(lr=1e-3),
    "optim.Adam": lambda: lambda params: optim.Adam(params, lr=1e-3),
}


def data() -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a logistic regression."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, FEATURES)).astype(np.float32)
    return x, (x.sum(1) > 0).astype(np.float32)


def model(x: jax.Array, y: jax.Array) -> None:
    """Logistic regression."""
    weight = numpyro.sample("weight", dist.Normal(jnp.zeros(FEATURES), 1.0).to_event(1))
    with numpyro.plate("rows", ROWS):
        numpyro.sample("y", dist.Bernoulli(logits=x @ weight), obs=y)


def guide(x: jax.Array, y: jax.Array) -> None:
    """A normal posterior with a scale for each weight."""
    loc = numpyro.param("loc", jnp.zeros(FEATURES))
    scale = numpyro.param("scale", jnp.ones(FEATURES), constraint=dist.constraints.positive)
    numpyro.sample("weight", dist.Normal(loc, scale).to_event(1))


def pyro_model(x: torch.Tensor, y: torch.Tensor) -> None:
    """The same in Pyro."""
    weight = pyro.sample("weight", pyro.distributions.Normal(torch.zeros(FEATURES), 1.0).to_event(1))
    with pyro.plate("rows", ROWS):
        pyro.sample("y", pyro.distributions.Bernoulli(logits=x @ weight), obs=y)


def pyro_guide(x: torch.Tensor, y: torch.Tensor) -> None:
    """The same in Pyro."""
    loc = pyro.param("loc", torch.zeros(FEATURES))
    scale = pyro.param("scale", torch.ones(FEATURES), constraint=pyro.distributions.constraints.positive)
    pyro.sample("weight", pyro.distributions.Normal(loc, scale).to_event(1))


def ours(make: Callable[[], Any]) -> Run:
    """A step in one compiled call, whose loss comes to the host as in Pyro."""
    arguments = tuple(map(jnp.asarray, data()))
    svi = infer.SVI(model, guide, make(), numpyro.infer.Trace_ELBO())

    def run(steps: int) -> None:
        for _ in range(steps):
            svi.step(*arguments)

    return run


def ours_together(make: Callable[[], Any]) -> Run:
    """Many steps in one call."""
    arguments = tuple(map(jnp.asarray, data()))
    svi = infer.SVI(model, guide, make(), numpyro.infer.Trace_ELBO())

    def run(calls: int) -> None:
        for _ in range(calls):
            svi.run(STEPS, *arguments, progress_bar=False)

    return run


def numpyro_together() -> Run:
    """Its update in a jitted scan, which is faster than its ``run``: that compiles anew at each call."""
    arguments = tuple(map(jnp.asarray, data()))
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1e-3), numpyro.infer.Trace_ELBO())
    state = svi.init(jax.random.key(0), *arguments)
    scan = jax.jit(lambda state, *args: jax.lax.scan(lambda s, _: svi.update(s, *args), state, length=STEPS))

    def run(calls: int) -> None:
        nonlocal state
        for _ in range(calls):
            state, losses = scan(state, *arguments)
            np.asarray(losses)

    return run


def in_numpyro() -> Run:
    """Its jitted update."""
    arguments = tuple(map(jnp.asarray, data()))
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1e-3), numpyro.infer.Trace_ELBO())
    state = svi.init(jax.random.key(0), *arguments)
    update = jax.jit(svi.update)

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, loss = update(state, *arguments)
            float(loss)

    return run


def in_pyro() -> Run:
    """The parent."""
    pyro.clear_param_store()
    arguments = tuple(map(torch.from_numpy, data()))
    svi = pyro.infer.SVI(pyro_model, pyro_guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())

    def run(steps: int) -> None:
        for _ in range(steps):
            svi.step(*arguments)

    return run


def contenders() -> Builders:
    """SVI on one model, with each optimizer and in both parents."""
    builders: Builders = {f"jaxoptim SVI, {name}": lambda make=make: ours(make) for name, make in OPTIMIZERS.items()}
    return builders | {"numpyro, Adam": in_numpyro, "Pyro, Adam": in_pyro}


def contenders_together() -> Builders:
    """Many steps in one call, with each optimizer and in numpyro."""
    ours: Builders = {
        f"jaxoptim SVI.run, {name}": lambda make=make: ours_together(make) for name, make in OPTIMIZERS.items()
    }
    return ours | {"numpyro, Adam, jitted scan": numpyro_together}


def main() -> None:
    """Measure, and print the tables."""
    effort, title = asked(__doc__), f"SVI of a logistic regression, {FEATURES} weights, {ROWS} rows"
    times = measure(contenders(), effort)
    rows = [row(name, of, times["Pyro, Adam"]) for name, of in times.items()]
    print("\n".join([title, heading("step", "Pyro"), *rows]))
    times = measure(contenders_together(), effort)
    rows = [row(name, of, times["numpyro, Adam, jitted scan"]) for name, of in times.items()]
    print("\n".join([f"\nThe same, {STEPS} steps in one call", heading("call", "numpyro"), *rows]))


if __name__ == "__main__":
    main()
