"""The one-cycle policy on scikit-learn's handwritten digits: rate and momentum in cycles, in both faces.

Run ``python examples/one_cycle.py --help`` for the options. The torch-style loop steps ``OneCycleLR`` after every
batch; the pure one gives the schedule to the optimizer, as its rate and as its momentum, and is one ``lax.scan``.
Both make the same steps, so their losses must agree to ``TOLERANCE``. Under ``vmap`` the pure training runs from
many initial weights at once, with the cycle and at a constant rate. A figure shows the cycle and the losses.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxoptim
from digits import (
    BATCH_SIZE,
    Data,
    OneLineParser,
    Params,
    accuracy_of,
    check_difference,
    init_params,
    load_data,
    loss_of,
    mean_and_spread,
    shuffled,
    stacked,
)
from jaxoptim import optim, schedules

MAX_LR, CONSTANT_LR = 0.2, 0.1
"""Each is the best of six, from 0.05 to 0.7 and from 0.01 to 0.3, for the mean test accuracy after eight epochs."""

TRAININGS = 16
TOLERANCE = 1e-6
"""How far apart two losses may be. A scheduler that is late by one step comes to 1e-1, and eight epochs in float64 to
1e-15. In float32 the machine has a say: a hidden unit that ReLU cuts off in one of two trainings alone."""


# Training ------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """The initial weights, and the indices of the batches of all epochs, a row for each step."""

    params: Params
    batches: np.ndarray


def start(seed: int, epochs: int, data: Data) -> Start:
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda weight: weight.astype(float), init_params(rng))
    return Start(params, np.concatenate([shuffled(rng, len(data.train_labels)) for _ in range(epochs)]))


def train_torch_style(begin: Start, data: Data) -> tuple[np.ndarray, np.ndarray, float]:
    """The loss of every step, the rate and the momentum that it was made with, and the final test accuracy."""
    optimizer = optim.SGD(begin.params, lr=MAX_LR, momentum=0.9)
    scheduler = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=MAX_LR, total_steps=len(begin.batches))
    losses, options = [], []
    for batch in begin.batches:
        group = optimizer.param_groups[0]
        options.append((group["lr"], group["momentum"]))
        losses.append(optimizer.minimize(loss_of, data.train_images[batch], data.train_labels[batch]))
        scheduler.step()
    return np.array(losses), np.array(options), float(accuracy_of(optimizer.params, data))


def train(tx: optax.GradientTransformation, data: Data, begin: Start) -> tuple[jax.Array, jax.Array]:
    """The loss of every step and the final test accuracy."""

    def step(carry: tuple[Params, Any], batch: jax.Array) -> tuple[tuple[Params, Any], jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, data.train_images[batch], data.train_labels[batch])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, _), losses = jax.lax.scan(step, (begin.params, tx.init(begin.params)), begin.batches)
    return losses, accuracy_of(params, data)


# The command ---------------------------------------------------------------------------------------------


def plot(schedule: schedules.Schedule, options: np.ndarray, losses: dict[str, np.ndarray], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    momentum_axes = left.twinx()
    for axes, value, column, color in ((left, schedule, 0, "C0"), (momentum_axes, schedule.momentum, 1, "C1")):
        schedules.plot(value, len(options), ax=axes, color=color, linewidth=4, alpha=0.4)
        axes.plot(options[:, column], "--", color=color, linewidth=1)
        axes.yaxis.label.set_color(color)
    left.set_title("One cycle: wide as a function, dashed as a scheduler")
    momentum_axes.set_ylabel("momentum")
    for (name, values), style in zip(losses.items(), ("-", "--", "-"), strict=True):
        window = min(20, len(values))
        mean = np.convolve(values, np.ones(window) / window, "valid")
        right.semilogy(np.arange(len(mean)) + window, mean, style, label=name)
    right.set(title="Training", xlabel="step", ylabel="training loss (mean of 20 steps)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_epochs(default=8)
    parser.add_out()
    arguments = parser.parse_args()
    parser.make_directory(arguments.out)
    jax.config.update("jax_enable_x64", True)
    data, epochs = load_data(), arguments.epochs

    schedule = schedules.one_cycle_lr(MAX_LR, epochs=epochs, steps_per_epoch=len(data.train_labels) // BATCH_SIZE)
    cycle = jaxoptim.sgd(lr=schedule, momentum=schedule.momentum)
    constant = jaxoptim.sgd(lr=CONSTANT_LR, momentum=0.9)

    starts = [start(seed, epochs, data) for seed in range(TRAININGS)]
    losses, options, accuracy = train_torch_style(starts[0], data)
    cycle_losses, cycle_accuracies = jax.jit(jax.vmap(functools.partial(train, cycle, data)))(stacked(starts))
    constant_losses, constant_accuracies = jax.jit(jax.vmap(functools.partial(train, constant, data)))(stacked(starts))

    print(f"{'':<24}{'test accuracy':>15}{f'mean of {TRAININGS} trainings':>26}")
    print(f"{'one cycle, torch-style':<24}{accuracy:>15.2%}")
    for name, accuracies in ("one cycle, pure", cycle_accuracies), (f"constant {CONSTANT_LR}", constant_accuracies):
        print(f"{name:<24}{accuracies[0]:>15.2%}{mean_and_spread(accuracies):>26}")
    difference = float(np.max(np.abs(cycle_losses[0] - losses)))
    print(f"largest difference between the losses of the two faces: {difference:.1e}")
    path = arguments.out / "one_cycle.png"
    curves = {"pure": cycle_losses[0], "torch-style": losses, f"constant {CONSTANT_LR}": constant_losses[0]}
    plot(schedule, options, curves, path)
    print(f"The cycle and the losses are in {path}.")
    check_difference("losses", difference, TOLERANCE)


if __name__ == "__main__":
    main()
