"""What the examples share: scikit-learn's handwritten digits, a network of two layers, the options of a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

BATCH_SIZE = 32

Params = dict[str, dict[str, jax.Array]]


# The data ------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Images of 8x8 pixels with values in [0, 1], as rows of 64 numbers, and labels 0 to 9."""

    train_images: jax.Array
    test_images: jax.Array
    train_labels: jax.Array
    test_labels: jax.Array


def load_data() -> Data:
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    return Data(*map(jnp.asarray, train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)))


def shuffled(rng: np.random.Generator, number: int) -> np.ndarray:
    """The indices of one epoch over ``number`` images: a row for each batch."""
    return rng.permutation(number)[: number // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)


# The network ---------------------------------------------------------------------------------------------


def init_params(rng: np.random.Generator) -> Params:
    """The weights, in torch's layout [outputs, inputs], with He's variance."""
    shapes = {"hidden": (32, 64), "output": (10, 32)}
    return {
        name: {
            "weight": jnp.asarray(rng.normal(scale=(2 / shape[1]) ** 0.5, size=shape), jnp.float32),
            "bias": jnp.zeros(shape[0]),
        }
        for name, shape in shapes.items()
    }


def stacked(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one tree, for ``vmap``."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def logits_of(params: Params, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x @ params["hidden"]["weight"].T + params["hidden"]["bias"])
    return x @ params["output"]["weight"].T + params["output"]["bias"]


def loss_of(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, x), y).mean()


@jax.jit
def accuracy_of(params: Params, data: Data) -> jax.Array:
    return jnp.mean(logits_of(params, data.test_images).argmax(axis=-1) == data.test_labels)


# The command ---------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, with the options that most examples have."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message, without the usage in front of it."""
        self.exit(2, f"{self.prog}: {message}\n")

    def add_epochs(self, default: int) -> None:
        """Give the command the option ``--epochs``."""
        text = f"passes over the data (default: {default})"
        self.add_argument("--epochs", type=epoch_count, default=default, help=text)

    def add_out(self, default: str = "out") -> None:
        """Give the command the option ``--out``."""
        text = f"the figure's directory (default: {default})"
        self.add_argument("--out", type=Path, default=Path(default), help=text)

    def make_directory(self, path: Path) -> None:
        """Make the directory of ``--out``, before there is a figure to lose."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error(str(error))


def epoch_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of epochs. Give a whole number >= 1.")
    return int(text)


def check_difference(what: str, difference: float, tolerance: float) -> None:
    """Exit with one line if two faces differ."""
    if not difference <= tolerance:  # NaN must not pass
        raise SystemExit(f"The {what} differ by {difference:.1e}, more than {tolerance:.0e}.")


def mean_and_spread(accuracies: Any) -> str:
    """The accuracies of several trainings as their mean and standard deviation."""
    return f"{np.mean(accuracies):.2%} ± {np.std(accuracies):.2%}"
