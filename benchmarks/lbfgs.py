"""Time of one fit by L-BFGS against torch's: ``make bench``.

The fit is a logistic regression on scikit-learn's breast cancer data in float64: a new optimizer, and a few steps from
zero, of up to 20 iterations each. So every fit does the same work; those that evaluate the loss equally often and end
at the same loss have taken the same path.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

from contenders import Builders, torch, torch_runs_here
from jaxoptim import optim
from timing import Effort, Run, heading, measure, row

PENALTY = 1e-4
STEPS = 3
LINE_SEARCHES = (None, "strong_wolfe")


class Fit(NamedTuple):
    """What a fit leaves: its optimizer, which counts the evaluations, and the weights."""

    optimizer: Any
    weight: Any
    bias: Any

    def summary(self, x: jax.Array, y: jax.Array) -> str:
        """How often the loss was evaluated, and where that led."""
        evaluations = int(self.optimizer.state_dict()["state"][0]["func_evals"])
        params = {"weight": np.asarray(self.weight), "bias": np.asarray(self.bias)}
        return f"{evaluations:>13}{float(loss_fn(params, x, y)):>17.12f}"


def load_data() -> tuple[jax.Array, jax.Array]:
    """Standardized features, and labels 0.0 and 1.0."""
    x, y = load_breast_cancer(return_X_y=True)
    return jnp.asarray((x - x.mean(axis=0)) / x.std(axis=0)), jnp.asarray(y, float)


def loss_fn(params: dict[str, Any], x: jax.Array, y: jax.Array) -> jax.Array:
    logits = x @ params["weight"] + params["bias"]
    return optax.sigmoid_binary_cross_entropy(logits, y).mean() + PENALTY * jnp.sum(params["weight"] ** 2)


def with_minimize(options: dict[str, Any], x: jax.Array, y: jax.Array) -> Callable[[], Fit]:
    """All in one compiled program."""

    def fit() -> Fit:
        optimizer = optim.LBFGS({"weight": jnp.zeros(x.shape[1]), "bias": jnp.zeros(())}, **options)
        for _ in range(STEPS):
            optimizer.minimize(loss_fn, x, y)
        return Fit(optimizer, **jax.block_until_ready(optimizer.params))

    return fit


def with_closure(options: dict[str, Any], x: jax.Array, y: jax.Array) -> Callable[[], Fit]:
    """The way of torch: the optimizer asks for one evaluation after the other."""
    loss_and_grads = jax.jit(jax.value_and_grad(loss_fn))

    def fit() -> Fit:
        weight, bias = optim.Parameter(jnp.zeros(x.shape[1])), optim.Parameter(jnp.zeros(()))
        optimizer = optim.LBFGS([weight, bias], **options)

        def closure() -> jax.Array:
            loss, grads = loss_and_grads({"weight": weight.value, "bias": bias.value}, x, y)
            weight.grad, bias.grad = grads["weight"], grads["bias"]
            return loss

        for _ in range(STEPS):
            optimizer.step(closure)
        return Fit(optimizer, *jax.block_until_ready((weight.value, bias.value)))

    return fit


def in_torch(options: dict[str, Any], x: jax.Array, y: jax.Array) -> Callable[[], Fit]:
    """The parent."""
    features, labels = torch.from_dlpack(x), torch.from_dlpack(y)
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits

    def fit() -> Fit:
        weight = torch.zeros_like(features[0], requires_grad=True)
        bias = torch.zeros_like(labels[0], requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], **options)

        def closure() -> Any:
            optimizer.zero_grad()
            loss = cross_entropy(features @ weight + bias, labels) + PENALTY * torch.sum(weight**2)
            loss.backward()
            return loss

        for _ in range(STEPS):
            optimizer.step(closure)
        return Fit(optimizer, weight.detach().cpu(), bias.detach().cpu())

    return fit


def table(line_search: str | None, effort: Effort) -> str:
    """The times of all contenders with one line search."""
    data = load_data()
    options = {"line_search_fn": line_search}
    makers = {"jaxoptim.optim, minimize": with_minimize, "jaxoptim.optim, step(closure)": with_closure}
    makers |= {"torch, step(closure)": in_torch} if torch_runs_here() else {}
    builders: Builders = {name: functools.partial(built, make, options, *data) for name, make in makers.items()}
    times = measure(builders, effort)
    reference = times.get("torch, step(closure)")
    header = f"{heading('fit', 'torch')}{'evaluations':>13}{'loss':>17}"
    rows = [row(name, times[name], reference) + make(options, *data)().summary(*data) for name, make in makers.items()]
    return "\n".join([f"L-BFGS on breast cancer, line_search_fn={line_search!r}, float64", header, *rows])


def built(make: Callable[..., Callable[[], Fit]], options: dict[str, Any], x: jax.Array, y: jax.Array) -> Run:
    """A contender that repeats a whole fit."""
    fit = make(options, x, y)

    def run(fits: int) -> None:
        for _ in range(fits):
            fit()

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print one table for each line search."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=Effort.rounds, help="turns of each contender")
    parser.add_argument("--quick", action="store_true", help="three short rounds and one first fit: for a look")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    for line_search in LINE_SEARCHES:
        print("\n" + table(line_search, Effort(3, 0.05, 1) if options.quick else Effort(options.rounds)), flush=True)


if __name__ == "__main__":
    main()
