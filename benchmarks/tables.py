"""The command line of the benchmarks that print one table for each tree and task."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from contenders import Builders
from timing import Effort, heading, measure, row
from trees import TREES, random_tree


def asked(description: str) -> Effort:
    """How long to measure, as the command line says."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=Effort.rounds, help="turns of each contender")
    parser.add_argument("--quick", action="store_true", help="three short rounds and one first step: for a look")
    options = parser.parse_args()
    return Effort(3, 0.05, 1) if options.quick else Effort(options.rounds)


def print_tables(description: str, unit: str, tasks: Mapping[str, Callable[[Any, Any], Builders]]) -> None:
    """Measure what the command line asks for; each task makes its contenders of parameters and gradients."""
    effort = asked(description)
    for tree in ("mlp", "1000x100", "resnet50"):
        params, grads = random_tree(TREES[tree](), 0), random_tree(TREES[tree](), 1)
        for task, contenders in tasks.items():
            builders = contenders(params, grads)
            times = measure(builders, effort)
            reference = times.get(next(reversed(builders)))
            rows = [row(name, times[name], reference) for name in builders]
            print("\n".join(["", f"{task}, {tree}", heading(unit, "last"), *rows]), flush=True)
