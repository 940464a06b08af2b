"""Time of one update and time to the first, against optax and torch: ``make bench``.

For each tree and optimizer, every contender runs in turn in each round, and the medians over rounds count. The
floor is the least traffic of the update by the bandwidth of a plain stream in the same rounds; trees that fit
in a cache can be faster than that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax

import contenders
from contenders import OPTIMIZERS
from timing import Effort, Times, duration, measure
from trees import TREES, numbers_in, random_tree

LARGE, MANY, TABLE = ("gpt2", "resnet50"), ("1000x100", "1000-scalars"), "table"
PACKED, THROUGH_UNPACK = "jaxoptim, packed", "jaxoptim, packed, with loss and gradient"
WITH_NUMBERS = "jaxoptim, hyperparameters as an array"
STEP, MINIMIZE = "jaxoptim.optim, step", "jaxoptim.optim, minimize"


@dataclasses.dataclass(frozen=True)
class Target:
    """On some trees, a contender needs at most ``limit`` times what its reference needs.

    Without a reference, the limit is a number of seconds.
    """

    trees: tuple[str, ...]
    contender: str
    reference: str | None
    limit: float
    quantity: str = "step"

    def applies(self, tree: str, times: dict[str, Times]) -> bool:
        """Whether what it compares was measured."""
        return tree in self.trees and {self.contender, self.reference} <= {*times, None}

    def verdict(self, tree: str, optimizer: str, times: dict[str, Times]) -> str:
        """One line: how the two compare, and whether that reaches the target."""
        value = getattr(times[self.contender], self.quantity)
        compared = f"{self.quantity} of {self.contender}"
        if self.reference is None:
            compared += f" = {duration(value)} (at most {duration(self.limit)})"
        else:
            value /= getattr(times[self.reference], self.quantity)
            compared += f" / {self.reference} = {value:.3f} (at most {self.limit:.3f})"
        return f"{'reached    ' if value <= self.limit else 'NOT REACHED'}  {tree}, {optimizer}: {compared}"


TARGETS = [
    Target((*LARGE, "mlp"), "jaxoptim", "optax", 1.05),
    Target(MANY, PACKED, "optax", 1 / 12),
    Target(MANY, PACKED, "torch fused", 1 / 5),
    Target(MANY, PACKED, "optax", 1 / 6, "first_step"),
    Target(MANY, THROUGH_UNPACK, "optax", 1 / 12),
    Target(("mlp", "resnet50"), STEP, WITH_NUMBERS, 1.15),
    Target(MANY, STEP, "optax", 1 / 10),
    Target(MANY, STEP, "torch foreach", 1 / 10),
    Target(MANY, STEP, "torch fused", 1 / 4),
    Target(("mlp", "resnet50", *MANY), MINIMIZE, THROUGH_UNPACK, 1.1),
    Target(MANY, STEP, None, 2.0, "first_step"),
]


@dataclasses.dataclass(frozen=True)
class Result:
    """The times of one tree and optimizer; ``floor`` in seconds, ``bandwidth`` in bytes a second."""

    tree: str
    optimizer: str
    floor: float
    bandwidth: float
    times: dict[str, Times]

    def table(self) -> str:
        """The rows of all contenders, for reading."""
        title = f"{self.tree}, {self.optimizer}: floor {duration(self.floor)} at {self.bandwidth / 1e9:.1f} GB/s"
        header = f"  {'':42}{'step':>11}{'/ floor':>10}{'bandwidth':>11}{'cores':>7}{'first step':>12}"
        rows = [
            f"  {name:42}{duration(t.step):>11}{t.step / self.floor:>10.2f}{self.floor / t.step:>11.1%}"
            f"{t.cores:>7.1f}{duration(t.first_step):>12}"
            for name, t in self.times.items()
        ]
        return "\n".join([title, header, *rows])


def on_tree(tree: str, optimizer: str, effort: Effort) -> Result:
    """Measure one optimizer on one tree."""
    shapes, algorithm = TREES[tree](), OPTIMIZERS[optimizer]
    builders = contenders.on_tree(algorithm, random_tree(shapes, 0), random_tree(shapes, 1))
    if tree == "gpt2":  # there the loss would cost as much as the update, and seconds in each round
        del builders[THROUGH_UNPACK], builders[MINIMIZE]
    return _result(tree, optimizer, algorithm.bytes_per_number * numbers_in(shapes), builders, effort)


def on_table(effort: Effort) -> Result:
    """Measure row-wise Adam on an embedding table."""
    moved = OPTIMIZERS["adam"].bytes_per_number * contenders.TOUCHED_ROWS * contenders.TABLE_WIDTH
    return _result(TABLE, "sparse adam", moved, contenders.on_table(), effort)


def _result(tree: str, optimizer: str, moved: int, builders: contenders.Builders, effort: Effort) -> Result:
    times = measure({"stream": contenders.stream, **builders}, effort)
    bandwidth = contenders.STREAM_BYTES / times.pop("stream").step
    return Result(tree, optimizer, moved / bandwidth, bandwidth, times)


def verdicts(results: Iterable[Result]) -> list[str]:
    """One line for each target that was measured."""
    return [
        target.verdict(result.tree, result.optimizer, result.times)
        for target in TARGETS
        for result in results
        if target.applies(result.tree, result.times)
    ]


def _names(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of an option that takes some of the allowed names, separated by commas."""
    allowed = list(allowed)

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"unknown name {unknown[0]!r}: allowed are {', '.join(allowed)}")
        return names

    return parse


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    trees = [*TREES, TABLE]
    parser.add_argument("--trees", type=_names(trees), default=trees, help=f"some of {','.join(trees)}")
    names = _names(OPTIMIZERS)
    parser.add_argument("--optimizers", type=names, default=list(OPTIMIZERS), help=f"some of {','.join(OPTIMIZERS)}")
    parser.add_argument("--rounds", type=int, default=Effort.rounds, help="turns of each contender")
    parser.add_argument("--json", type=Path, default=Path("out/benchmarks.json"), help="where the numbers go")
    parser.add_argument("--quick", action="store_true", help="three short rounds and one first step: for a look")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and the targets, and write the numbers."""
    options = _options(arguments)
    effort = Effort(3, 0.05, 1) if options.quick else Effort(options.rounds)
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} processors, {platform.platform()}"
    print(f"{device}, jax {jax.__version__}")
    if not contenders.torch_runs_here():
        print("torch is not measured: it is not installed, or does not see the device that JAX uses.")

    results = []
    for tree in options.trees:
        for optimizer in options.optimizers if tree != TABLE else ["sparse adam"]:
            results.append(on_table(effort) if tree == TABLE else on_tree(tree, optimizer, effort))
            print("\n" + results[-1].table(), flush=True)
    print("\nTargets")
    print("\n".join(verdicts(results)))

    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"device": device, "results": [dataclasses.asdict(r) for r in results]}, indent=1)
    )
    print(f"\nThe numbers are in {options.json}.")


if __name__ == "__main__":
    main()
