"""Time of an estimate of the local learning coefficient against devinterp 1.1.0: ``make bench``.

The estimate is that of a network on scikit-learn's handwritten digits, with batches of 256. Each contender has a
process with cores of its own (``sampling_workers.py``), and all take turns. A ratio is the median of the ratios in each
round. The processor time is next to the wall time: where others use the machine, it says more on a single core.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from typing import NamedTuple

from sampling_workers import Task, Times, Worker

SMALL, LARGE = [64, 64, 10], [64, 960, 960, 10]
COUNTS = (10, 100, 1000, 5000)
METHODS_HEAD = (
    "| | vmap key | map key | map / vmap | vmap hash | map hash | map / vmap |\n|---|---|---|---|---|---|---|"
)
NETWORKS = {650: [64, 10], 1285: [64, 17, 10], 2410: [64, 32, 10], 4810: SMALL}


class Contender(NamedTuple):
    """One row of a table.

    Attributes:
        name: what the row is called.
        worker: the kind of its process.
        task: what it runs.
        fresh: whether every run is the first of a new process, compilation included.
        target: how many times as fast as the reference it is meant to be, None for any.
    """

    name: str
    worker: str
    task: Task
    fresh: bool = False
    target: float | None = None


class Table(NamedTuple):
    """Contenders that do the same.

    Attributes:
        title: what they do.
        unit: the name of the third column.
        units: how many units a run has.
        reference: the row that the others are compared with.
        rows: the contenders.
    """

    title: str
    unit: str
    units: float
    reference: str
    rows: list[Contender]


def main() -> None:
    """Measure, and print the tables. A tenth of the draws is no run to judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--quick", action="store_true", help="two rounds of a tenth of the draws: for a look")
    parser.add_argument("--tables", default="", help="only tables whose title has these words")
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    shorter = 10 if options.quick else 1
    alive: dict[str, Worker] = {}
    print(f"Load of the machine at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.", flush=True)
    for table in tables(shorter):
        if options.tables in table.title:
            print("\n" + "\n".join(markdown(table, measure(table, rounds, alive), shorter == 1)), flush=True)
    if options.tables in "methods":
        print(f"\n**methods: us for a step, and map / vmap**\n\n{METHODS_HEAD}", flush=True)
        for name, table in methods(shorter):
            print(method_row(name, table, measure(table, rounds, alive)), flush=True)
    for worker in alive.values():
        worker.close()


def tables(shorter: int) -> Iterator[Table]:
    """What to measure, with so many times fewer draws."""
    chains, draws = 20, 500 // shorter
    small: Task = {"network": SMALL, "chains": chains, "draws": draws}
    unit, units = "us for a step", chains * draws / 1e6

    title = f"64-64-10 (4810 numbers), {chains} chains, {draws} draws"
    rows = [
        Contender("jaxoptim", "jaxoptim-1core", small, target=5.0),
        Contender("jaxoptim, first call with compilation", "jaxoptim-1core", small, fresh=True, target=2.5),
        Contender("jaxoptim, sample alone", "jaxoptim-1core", small | {"only_sample": True}),
        *(
            Contender(f'jaxoptim, "{method}", "{impl}"', "jaxoptim-1core", small | {"method": method, "impl": impl})
            for method, impl in (("vmap", "key"), ("map", "hash"), ("vmap", "hash"))
        ),
        Contender("devinterp", "devinterp-1core", small),
    ]
    yield Table(f"{title}, one core", unit, units, "devinterp", rows)

    rows = [
        Contender("jaxoptim, 2 host devices", "jaxoptim-2devices", small, target=7.5),
        Contender("jaxoptim, 2 host devices, first call", "jaxoptim-2devices", small, fresh=True),
        Contender('jaxoptim, 2 host devices, "hash"', "jaxoptim-2devices", small | {"impl": "hash"}),
        Contender('jaxoptim, 1 host device, "map"', "jaxoptim-2cores", small | {"method": "map"}),
        Contender('jaxoptim, 1 host device, "vmap"', "jaxoptim-2cores", small | {"method": "vmap"}),
        Contender("devinterp, cores=2", "devinterp-2cores", small),
    ]
    yield Table(f"{title}, two cores", unit, units, "devinterp, cores=2", rows)

    chains, draws = 4, max(2, 25 // shorter)
    large: Task = {"network": LARGE, "chains": chains, "draws": draws}
    unit, units = "ms for a step", chains * draws / 1e3
    title = f"64-960-960-10 (994 570 numbers), {chains} chains, {draws} draws"
    rows = [
        Contender("jaxoptim", "jaxoptim-1core", large, target=1.0),
        Contender('jaxoptim, "hash"', "jaxoptim-1core", large | {"impl": "hash"}, target=1.0),
        Contender("devinterp", "devinterp-1core", large),
    ]
    yield Table(f"{title}, one core", unit, units, "devinterp", rows)
    rows = [
        Contender("jaxoptim, 2 host devices", "jaxoptim-2devices", large, target=1.0),
        Contender('jaxoptim, 2 host devices, "hash"', "jaxoptim-2devices", large | {"impl": "hash"}, target=1.0),
        Contender("jaxoptim, 1 host device", "jaxoptim-2cores", large),
        Contender('jaxoptim, 1 host device, "hash"', "jaxoptim-2cores", large | {"impl": "hash"}),
        Contender("devinterp, cores=2", "devinterp-2cores", large),
    ]
    yield Table(f"{title}, two cores", unit, units, "devinterp, cores=2", rows)

    for size, task, library, at_least in (
        ("4810", small, "jaxoptim", 1 / 1.15),
        ("4810", small, "devinterp", None),
        ("994 570", large, "jaxoptim", 1 / 1.15),
        ("994 570", large, "devinterp", None),
    ):
        steps = task["chains"] * task["draws"]
        plain, worker = f"{library}, no metrics", f"{library}-1core"
        rows = [
            Contender(f"{library}, four metrics", worker, task | {"metrics": True}, target=at_least),
            Contender(plain, worker, task),
        ]
        yield Table(f"metrics, {size} numbers, {library}, one core", "ms for a step", steps / 1e3, plain, rows)

    rows = [
        Contender("jax.random.normal", "jaxoptim-1core", {"numbers": 10**6, "impl": "jax"}),
        Contender('jaxoptim.core.noise.normal, "key"', "jaxoptim-1core", {"numbers": 10**6, "impl": "key"}),
        Contender('jaxoptim.core.noise.normal, "hash"', "jaxoptim-1core", {"numbers": 10**6, "impl": "hash"}),
        Contender("torch normal_", "devinterp-1core", {"numbers": 10**6}),
    ]
    yield Table("noise, a million numbers 20 times, one core", "ns a number", 20 * 1e6 / 1e9, "torch normal_", rows)


def methods(shorter: int) -> Iterator[tuple[str, Table]]:
    """Ways to run 20 chains of several sizes, in three settings: to choose ``_SMALL`` in ``sampling/chains.py``."""
    problems: list[tuple[str, Task]] = [(f"quadratic, {count}", {"quadratic": count}) for count in COUNTS]
    problems += [(f"network, {count}", {"network": sizes}) for count, sizes in NETWORKS.items()]
    for name, problem in problems:
        draws = (5000 if "quadratic" in problem else 250) // shorter
        task = problem | {"chains": 20, "draws": draws, "only_sample": True}
        for worker in ("jaxoptim-1core", "jaxoptim-2devices", "jaxoptim-2cores"):
            rows = [
                Contender(f"{method} {impl}", worker, task | {"method": method, "impl": impl})
                for impl in ("key", "hash")
                for method in ("vmap", "map")
            ]
            yield f"{name} numbers, {worker}", Table("", "", 20 * draws / 1e6, "map key", rows)


def measure(table: Table, rounds: int, alive: dict[str, Worker]) -> dict[str, list[Times]]:
    """The times of each row in every round."""
    for row in table.rows:
        if row.worker not in alive:
            alive[row.worker] = Worker(row.worker)
        if not row.fresh:
            alive[row.worker].run(row.task)  # compiles
    times: dict[str, list[Times]] = {row.name: [] for row in table.rows}
    for _ in range(rounds):
        for row in table.rows:
            worker = Worker(row.worker) if row.fresh else alive[row.worker]
            times[row.name].append(worker.run(row.task))
            if row.fresh:
                worker.close()
    return times


def method_row(name: str, table: Table, times: dict[str, list[Times]]) -> str:
    """The medians of one problem in one setting, by processor time where there is one core."""
    clock = "cpu" if "1core" in name else "wall"
    medians = {row.name: statistics.median(run[clock] for run in times[row.name]) / table.units for row in table.rows}
    cells = []
    for impl in ("key", "hash"):
        at_once, in_turn = medians[f"vmap {impl}"], medians[f"map {impl}"]
        cells += [f"{at_once:.3g}", f"{in_turn:.3g}", f"{in_turn / at_once:.2f}"]
    return f"| {name} | {' | '.join(cells)} |"


def markdown(table: Table, times: dict[str, list[Times]], is_judged: bool) -> list[str]:
    """A table, and whether its rows reach their targets."""
    lines = [
        f"**{table.title}**",
        "",
        f"| | wall, s | cpu, s | {table.unit} | times as fast as {table.reference} | by cpu |",
        "|---|---|---|---|---|---|",
    ]
    verdicts = []
    for row in table.rows:
        wall, cpu = (statistics.median(run[clock] for run in times[row.name]) for clock in ("wall", "cpu"))
        faster, by_cpu = (
            statistics.median(
                other[clock] / max(mine[clock], 1e-3)
                for mine, other in zip(times[row.name], times[table.reference], strict=True)
            )
            for clock in ("wall", "cpu")
        )
        lines.append(
            f"| {row.name} | {wall:.3g} | {cpu:.3g} | {wall / table.units:.3g} | {faster:.2f} | {by_cpu:.2f} |"
        )
        if is_judged and row.target is not None:
            verdict = "reached    " if faster >= row.target else "NOT REACHED"
            verdicts.append(f"{verdict}  {row.name}: {faster:.2f} times {table.reference} (at least {row.target:.2f})")
    return [*lines, "", "```", *verdicts, "```"] if verdicts else lines


if __name__ == "__main__":
    main()
