"""Fair times on a machine that is not quiet: contenders take turns, and the median of their turns counts."""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable

import jax

Run = Callable[[int], None]
"""Make so many steps and wait for the last."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int = 7
    block_seconds: float = 0.15
    first_steps: int = 3
    first_steps_seconds: float = 2.0


@dataclasses.dataclass(frozen=True)
class Times:
    """What one contender needed.

    Attributes:
        step: seconds for one step.
        cores: processor time by elapsed time. Less than what the contender can use: others had the machine.
        first_step: seconds from the first call of a fresh function, traced and compiled by it, to its result.
    """

    step: float
    cores: float
    first_step: float


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    for unit, scale in [("s", 1.0), ("ms", 1e-3)]:
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def heading(step: str, reference: str) -> str:
    """The names of the columns of :func:`row`; ``step`` is what is timed."""
    return f"  {'':42}{step:>11}{'/ ' + reference:>10}{'cores':>7}{'first ' + step:>12}"


def row(name: str, times: Times, reference: Times | None) -> str:
    """The times of one contender, and their ratio to another's."""
    ratio = "" if reference is None else f"{times.step / reference.step:.3f}"
    return f"  {name:42}{duration(times.step):>11}{ratio:>10}{times.cores:>7.1f}{duration(times.first_step):>12}"


def measure(contenders: dict[str, Callable[[], Run]], effort: Effort) -> dict[str, Times]:
    """Times of contenders, each given as a function that builds it with a state of its own."""
    runs, first_steps = {}, {}
    for name, build in contenders.items():
        runs[name], first_steps[name] = _first_step(build, effort)
    steps = interleaved(runs, effort)
    return {name: Times(*steps[name], first_steps[name]) for name in contenders}


def _first_step(build: Callable[[], Run], effort: Effort) -> tuple[Run, float]:
    """A contender and its time to the first step, the median of as many as are affordable."""
    seconds: list[float] = []
    while len(seconds) < effort.first_steps and sum(seconds) < effort.first_steps_seconds:
        run = None  # frees the state of the one before
        gc.collect()
        jax.clear_caches()
        run = build()
        seconds.append(elapsed(run, 1))
    return run, statistics.median(seconds)


def interleaved(runs: dict[str, Run], effort: Effort) -> dict[str, tuple[float, float]]:
    """Seconds for one step, and cores: medians over rounds, in which each contender runs one block of steps."""
    chunks = {}
    for name, run in runs.items():
        run(2)  # compiles again what another contender's clear_caches dropped
        chunks[name] = max(1, round(effort.block_seconds / 4 / min(elapsed(run, 1) for _ in range(3))))
    blocks: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    # Another order in each round: torch's threads go on spinning for a while and slow whoever comes next.
    shuffle, order = random.Random(0).shuffle, list(runs)
    for _ in range(effort.rounds):
        shuffle(order)
        for name in order:
            blocks[name].append(_block(runs[name], chunks[name], effort.block_seconds))
    return {name: _medians(rows) for name, rows in blocks.items()}


def _block(run: Run, chunk: int, seconds: float) -> tuple[float, float]:
    """Seconds for one step, and processor time by elapsed time, over chunks of steps that take ``seconds`` or more."""
    cpu_seconds = getattr(run, "cpu_seconds", time.process_time)  # a run in another process has its own
    steps, cpu, start = 0, cpu_seconds(), time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        run(chunk)
        steps += chunk
    return elapsed / steps, (cpu_seconds() - cpu) / elapsed


def _medians(rows: list[tuple[float, float]]) -> tuple[float, float]:
    steps, cores = zip(*rows, strict=True)
    return statistics.median(steps), statistics.median(cores)


def elapsed(run: Run, steps: int) -> float:
    """Seconds that some steps take."""
    start = time.perf_counter()
    run(steps)
    return time.perf_counter() - start
