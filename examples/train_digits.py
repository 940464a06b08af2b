"""Train a small convolutional network on scikit-learn's handwritten digits with five optimizers.

Run ``python examples/train_digits.py --help`` for the options. Every optimizer prints one row of a table
(test accuracy, seconds), and a figure shows the loss curves and a sweep of 16 learning rates, which is one
compiled program per optimizer: ``jax.vmap`` over the whole training.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxoptim
from digits import BATCH_SIZE, Data, OneLineParser, Params, load_data

SWEEP_EPOCHS = 4
SWEEP_RATES = np.logspace(-4, 0, 16)

Carry = tuple[Params, Any]  # the parameters and the state of their optimizer


# The optimizers ------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """A default learning rate, and the optimizer as a function of the rate (a number or a schedule)."""

    lr: float
    make: Callable[[Any], optax.GradientTransformation]


def muon_and_adamw(lr: Any) -> optax.GradientTransformation:
    """Muon takes matrices only, so the biases go to AdamW; ``match_rms_adamw`` lets the two share a rate."""
    return optax.partition(
        {"matrix": jaxoptim.muon(lr=lr, adjust_lr_fn="match_rms_adamw"), "bias": jaxoptim.adamw(lr=lr)},
        lambda params: jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "bias", params),
    )


OPTIMIZERS = {
    "sgd": Recipe(0.05, lambda lr: jaxoptim.sgd(lr=lr, momentum=0.9)),
    "adam": Recipe(0.005, lambda lr: jaxoptim.adam(lr=lr)),
    "adamw": Recipe(0.01, lambda lr: jaxoptim.adamw(lr=lr, weight_decay=0.05)),
    "muon": Recipe(0.01, muon_and_adamw),
    "rmsprop": Recipe(0.004, lambda lr: jaxoptim.rmsprop(lr=lr)),
}


# The network ---------------------------------------------------------------------------------------------


def init_params(key: jax.Array) -> Params:
    """Kernels are matrices, [inputs, outputs]: those of the convolutions act on 3x3 patches."""
    shapes = {"conv1": (9 * 1, 16), "conv2": (9 * 16, 32), "dense": (2 * 2 * 32, 10)}
    he_normal = jax.nn.initializers.he_normal()
    return {
        name: {"kernel": he_normal(key, shape), "bias": jnp.zeros(shape[1])}
        for key, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
    }


def patches(images: jax.Array) -> jax.Array:
    """The 3x3 neighbourhood of every pixel, as the last axis. A convolution is then a matrix product."""
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1)


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of every 2x2 pixels."""
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def logits_of(params: Params, x: jax.Array) -> jax.Array:
    x = x.reshape(-1, 8, 8, 1)
    for name in ("conv1", "conv2"):
        x = max_pool(jax.nn.relu(patches(x) @ params[name]["kernel"] + params[name]["bias"]))
    return x.reshape(len(x), -1) @ params["dense"]["kernel"] + params["dense"]["bias"]


def loss_of(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, images), labels).mean()


def accuracy_of(params: Params, data: Data) -> jax.Array:
    return jnp.mean(logits_of(params, data.test_images).argmax(axis=-1) == data.test_labels)


# Training ------------------------------------------------------------------------------------------------


def run_epoch(
    optimizer: optax.GradientTransformation, data: Data, carry: Carry, key: jax.Array
) -> tuple[Carry, jax.Array]:
    """One pass over the shuffled training set; returns the mean loss too."""

    def step(carry: Carry, batch: jax.Array) -> tuple[Carry, jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, data.train_images[batch], data.train_labels[batch])
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    order = jax.random.permutation(key, len(data.train_labels))
    batches = order[: len(order) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
    carry, losses = jax.lax.scan(step, carry, batches)
    return carry, losses.mean()


def decaying(name: str, lr: Any, epochs: int, data: Data) -> optax.GradientTransformation:
    """The optimizer of that name, its rate falling from ``lr`` to zero along a cosine."""
    steps = epochs * (len(data.train_labels) // BATCH_SIZE)
    return OPTIMIZERS[name].make(optax.cosine_decay_schedule(lr, steps))


def train(name: str, lr: float, epochs: int, data: Data, bar: tqdm) -> tuple[list[float], float]:
    """The loss of every epoch and the final test accuracy, from one jitted call per epoch."""
    optimizer = decaying(name, lr, epochs, data)
    epoch = jax.jit(functools.partial(run_epoch, optimizer, data), donate_argnums=0)
    params = init_params(jax.random.key(0))
    carry, losses = (params, optimizer.init(params)), []
    for key in jax.random.split(jax.random.key(1), epochs):
        carry, loss = epoch(carry, key)
        losses.append(float(loss))
        bar.update()
    return losses, float(accuracy_of(carry[0], data))


def sweep(name: str, data: Data) -> np.ndarray:
    """The test accuracy at every rate of ``SWEEP_RATES``: all the trainings are one compiled program."""

    def accuracy_at(lr: jax.Array) -> jax.Array:
        optimizer = decaying(name, lr, SWEEP_EPOCHS, data)
        params = init_params(jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), SWEEP_EPOCHS)
        carry = (params, optimizer.init(params))
        (params, _), _ = jax.lax.scan(functools.partial(run_epoch, optimizer, data), carry, keys)
        return accuracy_of(params, data)

    return np.asarray(jax.jit(jax.vmap(accuracy_at))(jnp.asarray(SWEEP_RATES)))


# The command ---------------------------------------------------------------------------------------------


def plot(losses: dict[str, list[float]], accuracies: dict[str, np.ndarray], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, style in zip(losses, ("o-", "s-", "v--", "^-", "D-"), strict=False):
        left.semilogy(range(1, len(losses[name]) + 1), losses[name], style, markersize=4, label=name)
        right.semilogx(SWEEP_RATES, 100 * accuracies[name], style, markersize=4, label=name)
    left.set(title="Training", xlabel="epoch", ylabel="training loss")
    left.xaxis.get_major_locator().set_params(integer=True)
    right.set(
        title=f"Sweep: {len(SWEEP_RATES)} learning rates in one program, {SWEEP_EPOCHS} epochs",
        xlabel="learning rate",
        ylabel="test accuracy (%)",
        ylim=(0, 102),
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=110)


def optimizer_names(text: str) -> list[str]:
    names = text.lower().split(",")
    if unknown := [name for name in names if name not in OPTIMIZERS]:
        raise argparse.ArgumentTypeError(
            f"no optimizer is called {', '.join(unknown)!r}. Choose from {', '.join(OPTIMIZERS)}."
        )
    return names


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--optimizer",
        type=optimizer_names,
        action="extend",
        metavar="NAME[,NAME]",
        help=f"which of {', '.join(OPTIMIZERS)} to train (default: all)",
    )
    parser.add_argument("--lr", type=float, help="the learning rate, in the place of each optimizer's own")
    parser.add_epochs(default=15)
    parser.add_out()
    arguments = parser.parse_args()
    arguments.optimizer = list(dict.fromkeys(arguments.optimizer or OPTIMIZERS))
    try:
        if arguments.lr is not None:
            for name in arguments.optimizer:
                OPTIMIZERS[name].make(arguments.lr)  # raises for a rate that the optimizer does not take
    except ValueError as error:
        parser.error(str(error))
    parser.make_directory(arguments.out)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    data = load_data()
    losses, accuracies, rows = {}, {}, []
    with tqdm(total=len(arguments.optimizer) * (arguments.epochs + 1), unit="epoch") as bar:
        for name in arguments.optimizer:
            bar.set_description(f"{name}: training")
            lr = OPTIMIZERS[name].lr if arguments.lr is None else arguments.lr
            start = time.perf_counter()
            losses[name], accuracy = train(name, lr, arguments.epochs, data, bar)
            rows.append(f"{name:<10}{accuracy:>15.2%}{time.perf_counter() - start:>10.1f}")
            bar.set_description(f"{name}: sweep")
            accuracies[name] = sweep(name, data)
            bar.update()
    print(f"{'optimizer':<10}{'test accuracy':>15}{'seconds':>10}", *rows, sep="\n")
    path = arguments.out / "train_digits.png"
    plot(losses, accuracies, path)
    print(f"The loss curves and the sweep are in {path}.")


if __name__ == "__main__":
    main()
