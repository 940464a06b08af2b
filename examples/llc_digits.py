"""The local learning coefficient of a network while it learns scikit-learn's handwritten digits.

Run ``python examples/llc_digits.py --help`` for the options. A network of 64-64-10 units is trained, and at some of its
steps the coefficient is estimated by chains of SGLD around the weights. The last estimate is refined by layer. A second
table compares estimates with the theory, on singular losses whose coefficient is known: the exact value at a finite
inverse temperature, and what it tends to.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from digits import Data, OneLineParser, Params, accuracy_of, load_data, loss_of, shuffled
from jaxoptim import optim, rules, sampling

CHECKPOINTS, FIRST = 8, 150
CROSSINGS = [(1, 1), (2, 1), (2, 2), (3, 1)]
NBETAS = (1e2, 1e4)

AROUND_WEIGHTS = rules.SGLD(lr=2e-4, localization=100.0)
"""From a sweep with ``sampling.calibrate``: see ``notebooks/llc.ipynb``. Larger steps have an error of their
own, smaller ones need more draws, and with weaker localization the chains wander off for thousands of steps."""

CHAINS: dict[str, Any] = {"num_chains": 8, "num_burnin_steps": 200, "num_draws": 400, "batch_size": 256}
"""The chains forget their start in about 2 / (lr localization) = 100 steps."""


# Training ------------------------------------------------------------------------------------------------


def init_params(rng: np.random.Generator) -> Params:
    shapes = {"hidden": (64, 64), "output": (10, 64)}
    return {
        name: {
            "weight": jnp.asarray(rng.normal(scale=(2 / shape[1]) ** 0.5, size=shape), jnp.float32),
            "bias": jnp.zeros(shape[0]),
        }
        for name, shape in shapes.items()
    }


def loss_fn(params: Params, batch: Any) -> jax.Array:
    return loss_of(params, *batch)


def train(images: jax.Array, labels: jax.Array, epochs: int) -> dict[int, Params]:
    """The parameters after some of the steps, equally spaced in their logarithm."""
    rng = np.random.default_rng(0)
    optimizer = optim.Adam(init_params(rng), lr=1e-3)
    last = epochs * len(shuffled(rng, len(images)))
    kept = np.unique(np.geomspace(min(FIRST, last), last, CHECKPOINTS).round().astype(int))
    checkpoints, step = {}, 0
    for _ in range(epochs):
        for batch in shuffled(rng, len(images)):
            optimizer.minimize(loss_fn, (images[batch], labels[batch]))
            step += 1
            if step in kept:
                checkpoints[step] = optimizer.params  # later steps leave these arrays as they are
    return checkpoints


# Estimates -----------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A checkpoint and its estimate."""

    step: int
    accuracy: float
    llc: sampling.LLC


def estimates(checkpoints: dict[int, Params], data: Data) -> list[Row]:
    """The first one compiles the program of all, as only numbers change."""
    train_data = (data.train_images, data.train_labels)
    print(f"{'step':>6}{'train loss':>12}{'test accuracy':>15}{'LLC':>9}{'mcse':>7}{'R-hat':>7}")
    rows = []
    for step, params in checkpoints.items():
        with warnings.catch_warnings(record=True) as reasons:
            warnings.simplefilter("always")
            llc = sampling.estimate_llc(loss_fn, params, AROUND_WEIGHTS, train_data, key=jax.random.key(0), **CHAINS)
        rows.append(Row(step, float(accuracy_of(params, data)), llc))
        print(
            f"{step:>6}{llc.init_loss:>12.4f}{rows[-1].accuracy:>15.2%}{llc.mean:>9.2f}{llc.mcse:>7.2f}{llc.rhat:>7.2f}"
            f"{' *' if reasons else ''}"
        )
    print("* with a warning: early in training there is no minimum yet, and the number is no coefficient")
    return rows


def refine(params: Params, data: Data) -> None:
    """Coefficients of chains that move one layer and hold the other, both in one program."""
    selections = {"hidden layer": "hidden.*", "output layer": "output.*"}
    train_data = (data.train_images, data.train_labels)
    llc = sampling.estimate_llc(
        loss_fn, params, AROUND_WEIGHTS, train_data, selections=selections, key=jax.random.key(0), **CHAINS
    )
    for name, mean, mcse in zip(selections, llc.mean, llc.mcse, strict=True):
        print(f"{name:>33}{mean:>9.2f}{mcse:>7.2f}")


# Normal crossings ----------------------------------------------------------------------------------------


def crossing(w: jax.Array, powers: jax.Array) -> jax.Array:
    r"""The loss :math:`K(w) = (w_1^a w_2^b)^2`. The powers are data, so that one program serves all of them."""
    return jnp.prod((w**2) ** powers)


def exact_coefficient(a: int, b: int, nbeta: float) -> float:
    r"""The mean of :math:`n\beta K` under :math:`e^{-n\beta K}` on the box, by quadrature in :math:`\log w`."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    w = np.exp(15 * (nodes - 1))  # from exp(-30) to 1; the other quadrants are the same
    energy = nbeta * np.outer(w ** (2 * a), w ** (2 * b))
    density = np.outer(weights * w, weights * w) * np.exp(-energy)
    return float(np.sum(density * energy) / np.sum(density))


def theory(a: int, b: int) -> tuple[float, int]:
    """The coefficient and its multiplicity, in the limit of many data."""
    return 1 / (2 * max(a, b)), 1 + (a == b)


def compare_crossings() -> dict[tuple[int, int], list[sampling.LLC]]:
    """Estimates beside their theory, by powers, for each inverse temperature.

    The limit is far off where a = b. The free energy grows as lambda log(n) - (m - 1) log(log(n)) with the multiplicity
    m, and the estimate is its slope in log(n), lambda - (m - 1) / log(n): for m = 2 and n = 10^4 about 0.1 less than
    lambda, and no number of data in practice makes that small.
    """
    print(f"\n{'K(w)':>14}{'nbeta':>8}{'estimate':>11}{'mcse':>8}{'exact':>8}{'limit':>8}{'multiplicity':>14}")
    found = {}
    for a, b in CROSSINGS:
        found[a, b] = []
        for nbeta in NBETAS:
            # The curvature is up to 2 nbeta; the paths between two draws are free along the axes, and long.
            sampler = rules.SGLD(lr=0.1 / nbeta, bounding_box_size=1.0, box="reflect", noise_impl="hash")
            llc = sampling.estimate_llc(
                crossing,
                jnp.zeros(2),
                sampler,
                jnp.array([a, b], jnp.float32),
                nbeta=nbeta,
                key=jax.random.key(0),
                num_chains=64,
                num_burnin_steps=60_000,
                num_draws=1000,
                num_steps_bw_draws=100,
            )
            found[a, b].append(llc)
            exact, (limit, multiplicity) = exact_coefficient(a, b, nbeta), theory(a, b)
            print(
                f"{f'(w1^{a} w2^{b})^2':>14}{nbeta:>8.0e}{llc.mean:>11.4f}{llc.mcse:>8.4f}{exact:>8.4f}{limit:>8.4f}"
                f"{multiplicity:>14}"
            )
    return found


# The command ---------------------------------------------------------------------------------------------


def plot(rows: list[Row], crossings: dict[tuple[int, int], list[sampling.LLC]], path: Path) -> None:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [row.step for row in rows]
    left.plot(steps, [row.llc.init_loss for row in rows], "s--", color="C1")
    left.set(xscale="log", yscale="log", xlabel="step")
    left.set_xticks(steps, map(str, steps))
    left.minorticks_off()
    left.set_ylabel("training loss", color="C1")
    twin = left.twinx()
    twin.errorbar(steps, [row.llc.mean for row in rows], [2 * row.llc.mcse for row in rows], fmt="o-", capsize=3)
    twin.axhline(0, color="gray", linewidth=0.6)
    twin.set_ylabel("local learning coefficient, ± 2 mcse", color="C0")
    nbetas = np.geomspace(10, 1e6, 25)
    for number, ((a, b), llcs) in enumerate(crossings.items()):
        color, name = f"C{number}", rf"$(w_1^{a} w_2^{b})^2$"
        right.plot(nbetas, [exact_coefficient(a, b, nbeta) for nbeta in nbetas], color=color, label=name)
        right.errorbar(NBETAS, [llc.mean for llc in llcs], [2 * llc.mcse for llc in llcs], fmt="o", color=color)
        right.axhline(theory(a, b)[0], color=color, linestyle=":", linewidth=1)
    right.set(
        xscale="log", ylim=(0.05, 0.64), xlabel=r"$n\beta$", title="lines: exact, dotted: limits, points: estimates"
    )
    right.legend(ncols=4, loc="upper center", columnspacing=1.0, handlelength=1.2)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_epochs(default=100)
    parser.add_out()
    arguments = parser.parse_args()
    parser.make_directory(arguments.out)
    # A device for each core: the chains are spread over them.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    data = load_data()

    checkpoints = train(data.train_images, data.train_labels, arguments.epochs)
    rows = estimates(checkpoints, data)
    refine(list(checkpoints.values())[-1], data)
    crossings = compare_crossings()
    path = arguments.out / "llc.png"
    plot(rows, crossings, path)
    print(f"The curves are in {path}.")


if __name__ == "__main__":
    main()
