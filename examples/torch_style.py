"""torch's training loop and the same loop over JAX arrays, side by side on scikit-learn's handwritten digits.

Run ``python examples/torch_style.py --help`` for the options. From the same weights, on the same batches and with
the same optimizer options, three loops print the mean loss of every epoch: torch's; ``optimizer.step(grads)``,
which replaces it line by line; and ``optimizer.minimize(loss_fn, x, y)``, the one to prefer, because loss,
gradient and update are one compiled program. The columns must agree to ``TOLERANCE``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from digits import OneLineParser, check_difference, load_data, loss_of, shuffled
from jaxoptim import optim

try:
    import torch
except ImportError:
    raise SystemExit("This example compares with torch, which is not installed: pip install torch.") from None

TOLERANCE = 1e-4
"""How far a loss may be from torch's, relative. Ten epochs come to 1e-5, from what float32 rounds differently."""

Batches = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]  # one epoch, (images, labels) after (images, labels)


# The network ---------------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    """Two layers, for torch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(64, 32)
        self.output = torch.nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of a batch of images."""
        return self.output(torch.relu(self.hidden(x)))


def initial_model() -> Network:
    torch.manual_seed(0)
    return Network()


def initial_params() -> Any:
    """The weights of the same network as a pytree, ``params["hidden"]["weight"]``."""
    layers = initial_model().named_children()
    return {name: {key: jnp.array(p.detach().numpy()) for key, p in layer.named_parameters()} for name, layer in layers}


# The optimizers ------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """One optimizer with the same options for both: torch's of a model, ours of a pytree."""

    title: str
    theirs: Callable[[Network], torch.optim.Optimizer]
    ours: Callable[[Any], optim.Optimizer]


RECIPES = [
    Recipe(
        "SGD with momentum",
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        lambda params: optim.SGD(params, lr=0.05, momentum=0.9),
    ),
    Recipe(
        "AdamW, weights decayed, biases not",
        lambda model: torch.optim.AdamW(
            [
                {"params": [model.hidden.weight, model.output.weight], "weight_decay": 0.1},
                {"params": [model.hidden.bias, model.output.bias], "weight_decay": 0.0},
            ],
            lr=0.001,
        ),
        lambda params: optim.AdamW(
            params,
            groups=[(r".*\.weight", {"weight_decay": 0.1}), (r".*\.bias", {"weight_decay": 0.0})],
            lr=0.001,
        ),
    ),
]


# The three loops -----------------------------------------------------------------------------------------


def train_in_torch(recipe: Recipe, epochs: int, batches: Batches) -> list[float]:
    model = initial_model()
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = recipe.theirs(model)
    means = []
    for _ in range(epochs):
        losses = []
        for x, y in batches():
            optimizer.zero_grad()
            loss = criterion(model(torch.from_numpy(x)), torch.from_numpy(y).long())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(np.mean(losses))
    return means


def train_with_step(recipe: Recipe, epochs: int, batches: Batches) -> list[float]:
    loss_and_grads = jax.jit(jax.value_and_grad(loss_of))
    optimizer = recipe.ours(initial_params())
    means = []
    for _ in range(epochs):
        losses = []
        for x, y in batches():
            optimizer.zero_grad()  # allowed, and not needed: gradients are values here, nothing accumulates
            loss, grads = loss_and_grads(optimizer.params, x, y)
            optimizer.step(grads)
            losses.append(loss.item())
        means.append(np.mean(losses))
    return means


def train_with_minimize(recipe: Recipe, epochs: int, batches: Batches) -> list[float]:
    optimizer = recipe.ours(initial_params())
    means = []
    for _ in range(epochs):
        losses = [optimizer.minimize(loss_of, x, y) for x, y in batches()]
        means.append(np.mean(losses))
    return means


# The command ---------------------------------------------------------------------------------------------


def load_batches() -> Batches:
    """What gives the same epochs to whoever asks for it: every loop starts with a fresh one."""
    data, rng = load_data(), np.random.default_rng(0)
    images, labels = np.asarray(data.train_images), np.asarray(data.train_labels)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in shuffled(rng, len(labels)):
            yield images[batch], labels[batch]

    return batches


def compare(recipe: Recipe, epochs: int) -> float:
    """Print the losses of the three loops, and return the largest relative difference from torch's."""
    loops = (train_in_torch, train_with_step, train_with_minimize)
    columns = np.array([train(recipe, epochs, load_batches()) for train in loops])
    print(f"{recipe.title}\n{'epoch':>5}{'torch':>14}{'step':>14}{'minimize':>14}")
    for epoch, row in enumerate(columns.T, start=1):
        print(f"{epoch:>5}" + "".join(f"{loss:>14.7f}" for loss in row))
    difference = float(np.max(np.abs(columns / columns[0] - 1)))
    print(f"largest relative difference: {difference:.1e}\n")
    return difference


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_epochs(default=10)
    epochs = parser.parse_args().epochs
    check_difference("losses", max(compare(recipe, epochs) for recipe in RECIPES), TOLERANCE)
    print(f"All losses agree with torch's to {TOLERANCE:.0e}.")


if __name__ == "__main__":
    main()
