"""Time of a step on named parameters, each with an optimizer of its own, against Pyro: ``make bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pyro
import pyro.optim
import torch

from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim
from tables import asked
from timing import Run, heading, measure, row
from trees import Shapes, numbers_in, random_tree

SIZES: dict[str, Shapes] = {
    "10 scalars": {f"p{i}": () for i in range(10)},
    "100 scalars": {f"p{i}": () for i in range(100)},
    "1000 scalars": {f"p{i}": () for i in range(1000)},
    "20 of 100k": {f"p{i}": (100_000,) for i in range(20)},
}
SETTINGS: dict[str, tuple[str, Any, Any]] = {
    "Adam": ("Adam", {"lr": 1e-3}, None),
    "ClippedAdam, lr decaying": ("ClippedAdam", {"lr": 1e-3, "lrd": 0.999}, None),
    "Adam, options by name, clipped": (
        "Adam",
        lambda name: {"lr": 1e-3 / (1 + int(name[1:]))},
        {"clip_norm": 10.0, "clip_value": 1.0},
    ),
}


def contenders(setting: str, shapes: Shapes) -> dict[str, Callable[[], Run]]:
    """One optimizer with one tree; the gradients stay the same."""
    kind, options, clip = SETTINGS[setting]
    values, grads = random_tree(shapes, 0), random_tree(shapes, 1)
    arguments = (options,) if clip is None else (options, clip)

    def called() -> Run:
        params = [Parameter(value, name) for name, value in values.items()]
        for param in params:
            param.grad = grads[param.name]
        optimizer = getattr(optim, kind)(*arguments)

        def run(steps: int) -> None:
            for _ in range(steps):
                optimizer(params)
            jax.block_until_ready(params[-1].value)

        return run

    def pure() -> Run:
        optimizer, now = getattr(optim, kind)(*arguments), values

        def run(steps: int) -> None:
            nonlocal now
            for _ in range(steps):
                now = optimizer.update(now, grads)
            jax.block_until_ready(now)

        return run

    def in_pyro() -> Run:
        pyro.clear_param_store()
        params = [pyro_param(name, value, grads[name]) for name, value in values.items()]
        optimizer = getattr(pyro.optim, kind)(*arguments)

        def run(steps: int) -> None:
            for _ in range(steps):
                optimizer(params)

        return run

    return {"jaxoptim.pyro, optim(params)": called, "jaxoptim.pyro, update(params, grads)": pure, "Pyro": in_pyro}


def pyro_param(name: str, value: jax.Array, grad: jax.Array) -> torch.Tensor:
    """A parameter of Pyro's store with a gradient."""
    param = pyro.param(name, torch.from_dlpack(value).clone()).unconstrained()
    param.grad = torch.from_dlpack(grad).clone()
    return param


def main() -> None:
    """Measure what the command line asks for."""
    effort = asked(__doc__)
    for setting in SETTINGS:
        for size, shapes in SIZES.items():
            times = measure(contenders(setting, shapes), effort)
            rows = [row(name, of, times["Pyro"]) for name, of in times.items()]
            title = f"{setting}, {size} ({numbers_in(shapes):,} numbers)"
            print("\n".join(["", title, heading("step", "Pyro"), *rows]), flush=True)


if __name__ == "__main__":
    main()
