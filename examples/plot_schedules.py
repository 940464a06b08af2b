"""Draw every schedule of ``jaxoptim.schedules``, with the rate 0.1, as one picture.

Run ``python examples/plot_schedules.py --help`` for the options. The picture is the one in ``docs/optax.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from digits import OneLineParser
from jaxoptim import schedules

LR, STEPS, COLUMNS = 0.1, 100, 4

cyclic = {"base_lr": 0.02, "max_lr": LR, "step_size_up": 10}
triangles = schedules.cyclic_lr(**cyclic)
one_cycle = schedules.one_cycle_lr(LR, total_steps=STEPS)
warmup = schedules.linear_lr(LR, start_factor=0.1, total_iters=20)
cosine = schedules.cosine_annealing_lr(LR, T_max=80)
constant = schedules.constant_lr(LR, factor=0.5, total_iters=30)
exponential = schedules.exponential_lr(LR, gamma=0.97)


def metric(step: Any) -> Any:
    """A made-up loss, in parts of its start, that comes down in three slides with plateaus between them."""
    return sum(jnp.exp(-jnp.maximum(step - begin, 0) / 5.0) for begin in (0, 35, 70)) / 3


def plateau_rates() -> jax.Array:
    """The rate at every step of a training with that loss."""
    plateau = schedules.reduce_lr_on_plateau(factor=0.5, patience=6, threshold=0.01)

    def body(state: schedules.PlateauState, step: jax.Array) -> tuple[schedules.PlateauState, jax.Array]:
        return plateau.step(state, metric(step)), state.lr

    return jax.lax.scan(body, plateau.init(LR), jnp.arange(STEPS))[1]


PANELS: dict[str, Callable[[Any], Any]] = {
    "lambda_lr": schedules.lambda_lr(LR, lambda step: jnp.minimum((step + 1) / 20, (20 / (step + 1)) ** 0.5)),
    "multiplicative_lr": schedules.multiplicative_lr(LR, lambda step: 1 - 1 / (step + 10)),
    "step_lr": schedules.step_lr(LR, step_size=25, gamma=0.5),
    "multi_step_lr": schedules.multi_step_lr(LR, milestones=[20, 60, 70], gamma=0.5),
    "constant_lr": constant,
    "linear_lr": schedules.linear_lr(LR, total_iters=50),
    "exponential_lr": exponential,
    "polynomial_lr, power=1": schedules.polynomial_lr(LR, total_iters=80),
    "polynomial_lr, power=2": schedules.polynomial_lr(LR, total_iters=80, power=2.0),
    "cosine_annealing_lr": schedules.cosine_annealing_lr(LR, T_max=50, eta_min=0.01),
    "…_warm_restarts, T_mult=1": schedules.cosine_annealing_warm_restarts(LR, T_0=25),
    "…_warm_restarts, T_mult=2": schedules.cosine_annealing_warm_restarts(LR, T_0=15, T_mult=2),
    "cyclic_lr, triangular": triangles,
    "cyclic_lr, triangular2": schedules.cyclic_lr(**cyclic, mode="triangular2"),
    "cyclic_lr, exp_range": schedules.cyclic_lr(**cyclic, mode="exp_range", gamma=0.98),
    "cyclic_lr(…).momentum": triangles.momentum,
    "one_cycle_lr, cos": one_cycle,
    "one_cycle_lr, linear": schedules.one_cycle_lr(LR, total_steps=STEPS, anneal_strategy="linear"),
    "one_cycle_lr, three_phase": schedules.one_cycle_lr(LR, total_steps=STEPS, three_phase=True),
    "one_cycle_lr(…).momentum": one_cycle.momentum,
    "swa_lr": schedules.swa_lr(LR, swa_lr=0.05, anneal_epochs=50),
    "sequential_lr": schedules.sequential_lr(LR, [warmup, cosine], milestones=[20]),
    "chained": schedules.chained(LR, [constant, exponential]),
    "reduce_lr_on_plateau": plateau_rates().__getitem__,
}


def plot(path: Path) -> None:
    figure = Figure(figsize=(12, 10.5), layout="constrained")
    grid = figure.subplots(-(-len(PANELS) // COLUMNS), COLUMNS, sharex=True)
    for axes, (title, schedule) in zip(grid.flat, PANELS.items(), strict=True):
        is_momentum = "momentum" in title
        schedules.plot(schedule, STEPS, ax=axes, color="C1" if is_momentum else "C0", linewidth=2)
        axes.set_title(title, fontsize=12, family="monospace")
        axes.set(xlabel="", ylabel="", ylim=(0.75, 1) if is_momentum else (0, 1.08 * LR))
        axes.grid(alpha=0.3)
    grid.flat[-1].plot(0.095 * metric(jnp.arange(STEPS)), "--", color="gray", label="metric")
    grid.flat[-1].legend()
    figure.supxlabel("step")
    figure.supylabel("learning rate (blue), momentum (orange)")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_out("docs/images")
    arguments = parser.parse_args()
    parser.make_directory(arguments.out)
    path = arguments.out / "schedules.png"
    plot(path)
    print(f"The {len(PANELS)} schedules are in {path}.")


if __name__ == "__main__":
    main()
