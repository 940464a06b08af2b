"""Time of an averaged update, and of a step with a scheduler, against torch and optax: ``make bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from contenders import Builders, torch, torch_runs_here
from jaxoptim import averaging, optim
from tables import print_tables
from timing import Run

DECAY = 0.999
Params = dict[str, jax.Array]


def averages(params: Params) -> Builders:
    """Exponential moving averages of one tree, which all contenders read."""

    def averaged_model() -> Run:
        averaged = optim.swa_utils.AveragedModel(params, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(DECAY))

        def run(steps: int) -> None:
            for _ in range(steps):
                averaged.update_parameters(params)
            jax.block_until_ready(averaged.n_averaged)

        return run

    def in_torch() -> Run:
        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.params = torch.nn.ParameterList([torch.from_dlpack(x).clone() for x in params.values()])

        model = Model()
        multi_avg_fn = torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY)
        averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=multi_avg_fn)

        def run(steps: int) -> None:
            for _ in range(steps):
                averaged.update_parameters(model)

        return run

    pure = averaging.ema(DECAY)

    def increment(average: Params, new: Params) -> Params:
        return optax.incremental_update(new, average, 1 - DECAY)

    builders = {
        "jaxoptim.optim, AveragedModel": averaged_model,
        "jaxoptim.averaging": lambda: _jitted(pure.update, pure.init(params), params),
        "optax.incremental_update": lambda: _jitted(increment, jax.tree.map(jnp.copy, params), params),
    }
    return builders | ({"torch, AveragedModel": in_torch} if torch_runs_here() else {})


def _jitted(update: Callable[[Any, Any], Any], state: Any, params: Params) -> Run:
    compiled = jax.jit(lambda state, params: update(state, params), donate_argnums=0)

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state = compiled(state, params)
        jax.block_until_ready(state)

    return run


def schedulers(params: Params, grads: Params) -> Builders:
    """Steps of SGD, with the rate and momentum of one cycle changed before each, and without."""

    def ours(scheduled: bool) -> Callable[[], Run]:
        def build() -> Run:
            optimizer = optim.SGD(params, lr=0.1, momentum=0.9)
            step = _scheduled(optim.lr_scheduler, optimizer) if scheduled else lambda: None

            def run(steps: int) -> None:
                for _ in range(steps):
                    optimizer.step(grads)
                    step()
                jax.block_until_ready(optimizer.param_groups[0]["params"][-1].value)

            return run

        return build

    def in_torch() -> Run:
        parameters = [torch.nn.Parameter(torch.from_dlpack(x).clone()) for x in params.values()]
        for parameter, grad in zip(parameters, grads.values(), strict=True):
            parameter.grad = torch.from_dlpack(grad)
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)
        step = _scheduled(torch.optim.lr_scheduler, optimizer)

        def run(steps: int) -> None:
            for _ in range(steps):
                optimizer.step()
                step()

        return run

    builders = {"jaxoptim.optim, with a scheduler": ours(True), "jaxoptim.optim, without": ours(False)}
    return builders | ({"torch fused, with a scheduler": in_torch} if torch_runs_here() else {})


def _scheduled(module: Any, optimizer: Any) -> Callable[[], None]:
    return module.OneCycleLR(optimizer, max_lr=0.1, total_steps=10**9).step


if __name__ == "__main__":
    print_tables(__doc__, "step", {"averaged update": lambda params, _: averages(params), "step": schedulers})
