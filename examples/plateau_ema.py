"""A rate that is reduced on plateaus, and the average of the weights, on handwritten digits with wrong labels.

Run ``python examples/plateau_ema.py --help`` for the options. Half of the training labels are replaced by random
ones, so that the weights wander about. ``ReduceLROnPlateau`` calms them, one reduction after the other; the
exponential moving average of the weights is calm at any rate. The torch-style loop and the pure one, a
``lax.scan`` over the epochs, must reduce the rate after the same epochs, and their validation losses must agree to
``TOLERANCE``. Under ``vmap`` the pure training runs from many initial weights at once. A figure shows the
validation losses and the rate.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

import jaxoptim
from digits import (
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
from jaxoptim import averaging, optim, rules, schedules

VALIDATION = 347  # of the 1347 training images
RANDOM_LABELS = 0.5

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
PLATEAU = {"factor": 0.5, "patience": 3}
DECAY = 0.99

TRAININGS = 16
TOLERANCE = 1e-6
"""How far apart two validation losses may be. A rate that is reduced one epoch late comes to 2e-1, and 25 epochs in
float64 to 1e-15. In float32 the machine would decide: a hidden unit that ReLU cuts off in one of the two trainings
and not in the other makes a difference of 1e-1 out of one of 1e-6 within ten epochs."""


# The data ------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """The initial weights, the training labels with the random ones, and the batches of every epoch."""

    params: Params
    labels: np.ndarray
    batches: np.ndarray


def start(seed: int, epochs: int, data: Data) -> Start:
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda weight: weight.astype(float), init_params(rng))
    labels = np.asarray(data.train_labels)
    labels = np.where(rng.random(len(labels)) < RANDOM_LABELS, rng.integers(10, size=len(labels)), labels)
    batches = [shuffled(rng, len(labels) - VALIDATION) + VALIDATION for _ in range(epochs)]
    return Start(params, labels, np.stack(batches))


@jax.jit
def validation_loss(params: Params, data: Data) -> jax.Array:
    return loss_of(params, data.train_images[:VALIDATION], data.train_labels[:VALIDATION])


# Training ------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a training gives: three numbers for every epoch, and the two test accuracies at the end."""

    rates: Any  # after the epoch
    losses: Any
    average_losses: Any
    accuracy: Any
    average_accuracy: Any


def train_torch_style(data: Data, begin: Start) -> Result:
    optimizer = optim.SGD(begin.params, **SGD)
    scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer, **PLATEAU)
    ema = optim.swa_utils.get_ema_multi_avg_fn(DECAY)
    averaged = optim.swa_utils.AveragedModel(optimizer, multi_avg_fn=ema)
    rows = []
    for batches in begin.batches:
        for batch in batches:
            optimizer.minimize(loss_of, data.train_images[batch], begin.labels[batch])
            averaged.update_parameters(optimizer)
        loss = float(validation_loss(optimizer.params, data))
        scheduler.step(loss)
        rows.append((optimizer.param_groups[0]["lr"], loss, float(validation_loss(averaged.module, data))))
    return Result(*np.transpose(rows), accuracy_of(optimizer.params, data), accuracy_of(averaged.module, data))


def train(data: Data, begin: Start) -> Result:
    rule = rules.SGD(**SGD)
    plateau = schedules.reduce_lr_on_plateau(**PLATEAU)
    ema = averaging.ema(DECAY)

    def epoch(carry: Any, batches: jax.Array) -> tuple[Any, Any]:
        def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
            params, state, average = carry
            grads = jax.grad(loss_of)(params, data.train_images[batch], begin.labels[batch])
            params, state = jaxoptim.step(rule.replace(lr=reducing.lr), params, grads, state)
            return (params, state, ema.update(average, params)), None

        *training, reducing = carry
        (params, state, average), _ = jax.lax.scan(step, tuple(training), batches)
        loss = validation_loss(params, data)
        reducing = plateau.step(reducing, loss)
        row = reducing.lr, loss, validation_loss(average.average, data)
        return (params, state, average, reducing), row

    carry = begin.params, jaxoptim.init(rule, begin.params), ema.init(begin.params), plateau.init(rule.lr)
    (params, _, average, _), rows = jax.lax.scan(epoch, carry, begin.batches)
    return Result(*rows, accuracy_of(params, data), accuracy_of(average.average, data))


# The command ---------------------------------------------------------------------------------------------


def reductions(rates: np.ndarray) -> str:
    """The epochs after which the rate was lowered."""
    epochs = np.flatnonzero(np.diff([SGD["lr"], *rates]) < 0) + 1
    return ", ".join(map(str, epochs)) or "none"


def plot(results: dict[str, Result], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    looks = {"linewidth": 4, "alpha": 0.4}, {"linewidth": 1, "linestyle": "--"}
    for (name, result), look in zip(results.items(), looks, strict=True):
        epochs = np.arange(1, len(result.rates) + 1)
        left.plot(epochs, result.losses, color="C0", label=f"last weights, {name}", **look)
        left.plot(epochs, result.average_losses, color="C1", label=f"average, {name}", **look)
        right.step(epochs, result.rates, color="C2", label=name, where="mid", **look)
    left.set(title="Validation", ylabel="validation loss")
    right.set(title="Reduced on plateaus", ylabel="learning rate after the epoch", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_epochs(default=25)
    parser.add_out()
    arguments = parser.parse_args()
    parser.make_directory(arguments.out)
    jax.config.update("jax_enable_x64", True)
    data = load_data()

    starts = [start(seed, arguments.epochs, data) for seed in range(TRAININGS)]
    one = train_torch_style(data, starts[0])
    many = jax.jit(jax.vmap(functools.partial(train, data)))(stacked(starts))
    many = jax.tree.map(np.asarray, many)
    pure = Result(*(x[0] for x in many))

    print(f"{'test accuracy':<24}{'last weights':>18}{'average':>18}   rate reduced after epochs")
    for name, result in ("torch-style", one), ("pure", pure):
        last, average = float(result.accuracy), float(result.average_accuracy)
        print(f"{name:<24}{last:>18.2%}{average:>18.2%}   {reductions(result.rates)}")
    spreads = f"{mean_and_spread(many.accuracy):>18}{mean_and_spread(many.average_accuracy):>18}"
    print(f"{f'mean of {TRAININGS} trainings':<24}{spreads}")
    pairs = (one.losses, pure.losses), (one.average_losses, pure.average_losses)
    difference = float(max(np.max(np.abs(x - y)) for x, y in pairs))
    print(f"largest difference between the validation losses of the two faces: {difference:.1e}")
    path = arguments.out / "plateau_ema.png"
    plot({"pure": pure, "torch-style": one}, path)
    print(f"The validation losses and the rate are in {path}.")
    check_difference("validation losses", difference, TOLERANCE)
    if reductions(one.rates) != reductions(pure.rates):
        raise SystemExit(
            f"The rate was reduced after epochs {reductions(one.rates)} in the torch-style loop, but after "
            f"{reductions(pure.rates)} in the pure one."
        )


if __name__ == "__main__":
    main()
