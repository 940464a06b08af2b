"""A training that begins in torch and goes on in JAX, on scikit-learn's handwritten digits: its loss has no kink.

Run ``python examples/resume_from_torch.py --help`` for the options; it needs ``pip install torch==2.13.0``. A network
of two layers trains in torch with ``AdamW`` and ``OneCycleLR``, which changes rate and first beta after every batch.
Halfway the run is saved with ``torch.save``. From that file it goes on twice, over the same batches: in torch, and in
JAX with the classes of the same names. The run in JAX is saved and loaded once more on its way, which must not change
a bit, and goes back into torch at the end. A table and a figure show the losses of both: they must agree to
``TOLERANCE`` at every step, and where the run changes over the loss must go on as it does in torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from digits import Data, OneLineParser, check_difference, load_data, shuffled
from jaxoptim import checkpoint, interop, optim

try:
    import torch
except ImportError:
    raise SystemExit("This example begins in torch, which is not installed: pip install torch==2.13.0") from None

MAX_LR = 0.01

TOLERANCE = 1e-3
"""How far a loss may be from torch's, relative to the mean of its epoch. Ten epochs come to 3e-6 and a hundred to 9e-5,
from what float32 rounds differently; a scheduler that is late by one step comes to 2e-2."""

AROUND, KINK = 10, 1e-4
"""The loss has a kink if its mean changes, from ``AROUND`` steps before the run changes over to as many after it, by
more or less than in torch, and by more than ``KINK`` of itself. Ten epochs come to 1e-7; with a scheduler that is late
by one step they come to 6e-4, and without the state of AdamW to 2e-2."""

NAMES = {"hidden.kernel": "0.weight", "hidden.bias": "0.bias", "output.kernel": "2.weight", "output.bias": "2.bias"}
TRANSFORMS = {r".*\.kernel": jnp.transpose}  # torch has the weights as [outputs, inputs]


class Run(NamedTuple):
    """What a training changes. In JAX the optimizer has the parameters, and there is no model."""

    model: Any
    optimizer: Any
    scheduler: Any


def accuracy(logits: Any, data: Data) -> float:
    return float(np.mean(np.asarray(logits).argmax(axis=-1) == np.asarray(data.test_labels)))


# In torch, with tensors for data -------------------------------------------------------------------------


def new_in_torch(steps: int) -> Run:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    return Run(model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=MAX_LR, total_steps=steps))


def train_in_torch(run: Run, data: Data, batches: np.ndarray) -> np.ndarray:
    """A row for each step: its loss, its rate, and the test accuracy after it."""
    rows = []
    for batch in batches:
        rate = run.optimizer.param_groups[0]["lr"]
        run.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(run.model(data.train_images[batch]), data.train_labels[batch].long())
        loss.backward()
        run.optimizer.step()
        run.scheduler.step()
        rows.append((loss.item(), rate, accuracy(run.model(data.test_images).detach(), data)))
    return np.array(rows)


def load_in_torch(path: Path, steps: int) -> Run:
    run, saved = new_in_torch(steps), torch.load(path, weights_only=True)
    for name, part in run._asdict().items():
        part.load_state_dict(saved[name])
    return run


# In JAX --------------------------------------------------------------------------------------------------


@jax.jit
def logits_of(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return x @ params["output"]["kernel"] + params["output"]["bias"]


def loss_of(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, x), y).mean()


def new_in_jax(params: Any, steps: int) -> Run:
    optimizer = optim.AdamW(params)
    return Run(None, optimizer, optim.lr_scheduler.OneCycleLR(optimizer, max_lr=MAX_LR, total_steps=steps))


def train_in_jax(run: Run, data: Data, batches: np.ndarray) -> np.ndarray:
    """A row for each step, as in torch."""
    rows = []
    for batch in batches:
        rate = run.optimizer.param_groups[0]["lr"]
        loss = run.optimizer.minimize(loss_of, data.train_images[batch], data.train_labels[batch])
        run.scheduler.step()
        rows.append((loss, rate, accuracy(logits_of(run.optimizer.params, data.test_images), data)))
    return np.array(rows, np.float64)


def load_in_jax(path: Path, steps: int) -> Run:
    saved = checkpoint.load(path)
    run = new_in_jax(saved["params"], steps)
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scheduler.load_state_dict(saved["scheduler"])
    return run


# From one to the other -----------------------------------------------------------------------------------


def change_over(path: Path, steps: int) -> Run:
    """Go on in JAX from a file of torch."""
    saved, shapes = torch.load(path, weights_only=True), {"hidden": (64, 32), "output": (32, 10)}
    zeros = {name: {"kernel": jnp.zeros(n), "bias": jnp.zeros(n[1])} for name, n in shapes.items()}
    run = new_in_jax(zeros, steps)
    # A new scheduler sets the first rate, here as in torch; so it is made before the state is loaded.
    interop.torch.carry_over(run.optimizer, saved["model"], saved["optimizer"], names=NAMES, transforms=TRANSFORMS)
    run.scheduler.load_state_dict(saved["scheduler"])
    return run


def change_back(run: Run, steps: int) -> Run:
    """Go on in torch from a run in JAX."""
    new = new_in_torch(steps)
    tensors, state = interop.torch.carry_back(run.optimizer, new.model.state_dict(), names=NAMES, transforms=TRANSFORMS)
    new.model.load_state_dict(tensors)
    interop.torch.load_state_dict(new.optimizer, state)
    new.scheduler.load_state_dict(interop.torch.to_torch(run.scheduler.state_dict()))
    return new


# The command ---------------------------------------------------------------------------------------------


def kink(alone: np.ndarray, crossing: np.ndarray, change: int) -> float:
    """By how much the losses jump differently where the run changes over, relative to them."""
    before, after = slice(change - AROUND, change), slice(change, change + AROUND)
    jump, expected = (losses[after].mean() - losses[before].mean() for losses in (crossing, alone))
    return float(abs(jump - expected) / alone[before].mean())


def plot(alone: np.ndarray, crossing: np.ndarray, differences: np.ndarray, change: int, path: Path) -> None:
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(4, 2, 2))
    looks = {"linewidth": 4, "alpha": 0.4, "color": "C0"}, {"linewidth": 1, "color": "C3"}
    for name, rows, look in zip(("torch alone", "torch, then JAX"), (alone, crossing), looks, strict=True):
        top.semilogy(rows[:, 0], label=name, **look)
        bottom.plot(rows[:, 1], **look)
    middle.semilogy(np.where(differences > 0, differences, np.nan), ".", color="C3", markersize=4)
    middle.axhline(TOLERANCE, color="black", linewidth=1, label="tolerance")
    for text, side, offset in ("in torch", "right", -6), ("in JAX", "left", 6):
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": side, "va": "top"}
        top.annotate(text, (change, 1), (offset, -6), **place)
    top.set(title="AdamW and OneCycleLR, from torch to JAX", ylabel="training loss of the batch")
    middle.set(ylabel="relative difference\nof the losses")
    bottom.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    for axes in (top, middle, bottom):
        axes.axvline(change, color="black", linewidth=1, linestyle=":")
        axes.grid(alpha=0.3)
    top.legend()
    middle.legend(loc="center left")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_epochs(default=10)
    parser.add_out()
    arguments = parser.parse_args()
    parser.make_directory(arguments.out)
    torch_file, jax_file, picture = (arguments.out / f"resume_from_torch.{x}" for x in ("pt", "safetensors", "png"))
    torch.set_num_threads(1)  # with more, so small a network waits for its threads
    data, rng, epochs = load_data(), np.random.default_rng(0), arguments.epochs
    tensors = Data(*(torch.tensor(np.asarray(array)) for array in data))
    batches = np.concatenate([shuffled(rng, len(data.train_labels)) for _ in range(epochs)])
    steps, change = len(batches), len(batches) // 2
    first, second, third = np.split(batches, [change, (change + steps) // 2])

    run = new_in_torch(steps)
    begun = train_in_torch(run, tensors, first)
    torch.save({name: part.state_dict() for name, part in run._asdict().items()}, torch_file)
    alone = np.concatenate([begun, train_in_torch(load_in_torch(torch_file, steps), tensors, batches[change:])])

    run = change_over(torch_file, steps)
    crossed = train_in_jax(run, data, second)
    state_dicts = {"optimizer": run.optimizer.state_dict(), "scheduler": run.scheduler.state_dict()}
    checkpoint.save(jax_file, {"params": run.optimizer.params, **state_dicts})
    ended, loaded = train_in_jax(run, data, third), load_in_jax(jax_file, steps)
    is_same = np.array_equal(train_in_jax(loaded, data, third), ended)
    is_same &= jax.tree.all(jax.tree.map(np.array_equal, loaded.optimizer.params, run.optimizer.params))
    crossing = np.concatenate([begun, crossed, ended])
    back = accuracy(change_back(loaded, steps).model(tensors.test_images).detach(), data)

    means = [rows[:, 0].reshape(epochs, -1).mean(axis=1) for rows in (alone, crossing)]
    differences = np.abs(crossing - alone)[:, 0] / means[0].repeat(steps // epochs)
    print(f"{'':>5}{'mean loss':>24}{'largest':>14}{'test accuracy':>26}")
    print(f"{'epoch':>5}{'torch':>12}{'torch, JAX':>12}{'difference':>14}{'torch':>14}{'torch, JAX':>12}")
    accuracies = [rows[:, 2].reshape(epochs, -1)[:, -1] for rows in (alone, crossing)]
    table = zip(*means, differences.reshape(epochs, -1).max(axis=1), *accuracies, strict=True)
    for epoch, (one, other, largest, one_accuracy, other_accuracy) in enumerate(table, start=1):
        print(f"{epoch:>5}{one:>12.7f}{other:>12.7f}{largest:>14.1e}{one_accuracy:>14.2%}{other_accuracy:>12.2%}")
    jump = kink(alone[:, 0], crossing[:, 0], change)
    print(f"largest relative difference between the losses: {differences.max():.1e}")
    print(f"kink where the run changes over, after step {change}: {jump:.1e}")
    print(f"test accuracy at the end: {crossing[-1, 2]:.2%} in JAX, {back:.2%} back in torch")
    plot(alone, crossing, differences, change, picture)
    print(f"The losses and the rate are in {picture}, the runs in {torch_file} and {jax_file}.")
    check_difference("jumps of the losses where the run changes over", jump, KINK)
    check_difference("losses", float(differences.max()), TOLERANCE)
    if not is_same:
        raise SystemExit(f"The run that was loaded from {jax_file} went on otherwise than the one that was saved.")
    if back != crossing[-1, 2]:
        raise SystemExit(f"The test accuracy is {crossing[-1, 2]:.2%} in JAX, but {back:.2%} back in torch.")


if __name__ == "__main__":
    main()
