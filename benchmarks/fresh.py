"""Contenders in processes of their own, whose first step finds nothing traced, compiled or imported by another.

``python fresh.py MODULE CASE CONTENDER`` makes the data of ``MODULE.CASES[CASE]`` and then reads numbers of steps, one
in a line; the first makes the contender. It answers each with its processor time when the steps are made.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from timing import Effort, Times, elapsed, interleaved

LIMIT = 600.0
"""Seconds after which an answer is no longer waited for."""


class NoAnswer(RuntimeError):
    """The process ended, or needed more than the limit."""


class Fresh:
    """A contender in a process of its own, which is called like a :data:`timing.Run`."""

    def __init__(self, module: str, case: str, contender: str, library: Path | None = None) -> None:
        """Start it; ``library`` is where it imports jaxoptim from if not from where it is installed."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, module, case, contender],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ({} if library is None else {"PYTHONPATH": str(library)}),
        )
        self._wait()  # its imports are done and its data are made

    def __call__(self, steps: int) -> None:
        """Make so many steps and wait for the last; the first call makes the contender too."""
        assert self._process.stdin is not None  # noqa: S101
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self._wait()

    def cpu_seconds(self) -> float:
        """Processor time of the process until its last answer."""
        return self._cpu_seconds

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _wait(self) -> None:
        assert self._process.stdout is not None  # noqa: S101
        timer = threading.Timer(LIMIT, self._process.kill)
        timer.start()
        answer = self._process.stdout.readline()
        timer.cancel()
        if not answer.strip():
            self.close()
            raise NoAnswer(f"{' '.join(self._process.args[2:])}: ended, or needed more than {LIMIT:.0f} s.")  # type: ignore
        self._cpu_seconds = float(answer)


def first_steps(starts: Mapping[str, Callable[[], Fresh]], effort: Effort) -> tuple[dict[str, Fresh], dict[str, float]]:
    """Contenders after their first step, and the seconds it took: the median of as many as are affordable.

    In each round every contender has a new process; the last one stays alive. A contender that fails is left out.
    """
    alive: dict[str, Fresh] = {}
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    shuffle, order = random.Random(0).shuffle, list(starts)
    for _ in range(effort.first_steps):
        shuffle(order)
        for name in list(order):
            if sum(seconds[name]) >= effort.first_steps_seconds:
                continue
            if name in alive:
                alive.pop(name).close()
            try:
                alive[name] = starts[name]()
                seconds[name].append(elapsed(alive[name], 1))
            except (NoAnswer, BrokenPipeError) as error:
                print(error, file=sys.stderr, flush=True)
                alive.pop(name, None)
                order.remove(name)
    return alive, {name: statistics.median(seconds[name]) for name in alive}


def all_steps(starts: Mapping[str, Callable[[], Fresh]], effort: Effort, repeats: bool = True) -> dict[str, Times]:
    """The times of contenders' first steps, and of later ones if there are some, in turns.

    They are infinite for one that failed or took too long.
    """
    runs, first = first_steps(starts, effort)
    steps: dict[str, tuple[float, float]] = {}
    try:
        steps = interleaved(dict(runs), effort) if repeats else {}
    except (NoAnswer, BrokenPipeError) as error:
        print(error, file=sys.stderr, flush=True)
    finally:
        for run in runs.values():
            run.close()
    failed = (math.inf, math.nan)
    return {name: Times(*steps.get(name, failed), first.get(name, math.inf)) for name in starts}


def _serve(module: str, case: str, contender: str) -> None:
    """Make the steps that are asked for, as the module says."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        build = importlib.import_module(module).CASES[case].builders()[contender]
        jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))  # JAX itself is ready
        print(time.process_time(), file=answers, flush=True)
        run = None
        for line in sys.stdin:
            run = build() if run is None else run
            run(int(line))
            print(time.process_time(), file=answers, flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
