"""Steps of another revision of the library and of this one, in one run: what a change made slower or faster.

``python benchmarks/revisions.py REVISION [CASE ...]``. Every contender has a process of its own for each of the two;
both run the benchmarks of this revision, so that only the library differs. First steps include making the optimizer
and compiling. Ratios are those of this revision to the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import averaging
import checkpoint
import contenders
import groups
import lbfgs
import newton
import sampling_workers
from contenders import OPTIMIZERS, Builders
from fresh import Fresh, all_steps
from jaxoptim import optim
from timing import Effort, Run, Times, duration
from trees import TREES, random_tree

try:
    import pyro_optim
    import variational
except ImportError:
    pyro_optim = variational = None

HERE = Path(__file__).resolve().parent.parent
OTHER, THIS = "other", "this"


@dataclasses.dataclass(frozen=True)
class Case:
    """Contenders of one kind; ``builders`` makes their data."""

    builders: Callable[[], Builders]


def _ours(builders: Callable[[], Builders]) -> Case:
    """The contenders that belong to the library."""
    return Case(lambda: {name: build for name, build in builders().items() if name.startswith("jaxoptim")})


def _on_tree(make: Callable[..., Builders], tree: str) -> Builders:
    return make(random_tree(TREES[tree](), 0), random_tree(TREES[tree](), 1))


def _plain(optimizer: str, tree: str) -> Builders:
    return _on_tree(functools.partial(contenders.on_tree, OPTIMIZERS[optimizer]), tree)


def _fits(line_search: str | None) -> Builders:
    jax.config.update("jax_enable_x64", True)
    data, options = lbfgs.load_data(), {"line_search_fn": line_search}
    makers = {"jaxoptim.optim, minimize": lbfgs.with_minimize, "jaxoptim.optim, step(closure)": lbfgs.with_closure}
    return {name: functools.partial(lbfgs.built, make, options, *data) for name, make in makers.items()}


def _newton(size: int, radius: float | None) -> Builders:
    data = [jnp.asarray(array) for array in newton.batch(size)]
    return {"jaxoptim.newton_step, jitted": functools.partial(newton.one_by_one, radius, *data)}


def _sampled() -> Builders:
    prepared = sampling_workers.in_jaxoptim(1)
    task = {"network": [64, 64, 10], "chains": 4, "draws": 100}
    tasks = {"jaxoptim, estimate_llc": task, 'jaxoptim, estimate_llc, "hash"': task | {"impl": "hash"}}
    return {name: functools.partial(_repeated, prepared, task) for name, task in tasks.items()}


def _repeated(prepared: Callable[..., Callable[[], Any]], task: dict[str, Any]) -> Run:
    call = prepared(task)

    def run(calls: int) -> None:
        for _ in range(calls):
            call()

    return run


def _sampler_classes() -> Builders:
    params, grads = random_tree(TREES["mlp"](), 0), random_tree(TREES["mlp"](), 1)
    makers = {name: functools.partial(getattr(optim, name), params, lr=1e-5) for name in ("SGLD", "SGNHT")}
    return {
        f"jaxoptim.optim, {name}, {way}": functools.partial(_optim_run, make, call)
        for name, make in makers.items()
        for way, call in {
            "step": lambda optimizer: optimizer.step(grads),
            "minimize": lambda optimizer: optimizer.minimize(contenders.loss_of_squares),
        }.items()
    }


def _optim_run(make: Callable[[], optim.Optimizer], call: Callable[[optim.Optimizer], Any]) -> Run:
    made: list[optim.Optimizer] = []

    def run(steps: int) -> None:
        if not made:
            made.append(make())
        for _ in range(steps):
            call(made[0])
        jax.block_until_ready(made[0].param_groups[0]["params"][-1].value)

    return run


TREE_NAMES = ("mlp", "1000x100", "1000-scalars", "resnet50")
CASES = {
    **{f"{t}, {o}": _ours(functools.partial(_plain, o, t)) for t in TREE_NAMES for o in OPTIMIZERS},
    "table": _ours(contenders.on_table),
    **{
        f"{name}, {tree}": _ours(functools.partial(_on_tree, make, tree))
        for tree in ("mlp", "1000x100", "resnet50")
        for name, make in {
            "averaging": lambda params, _: averaging.averages(params),
            "scheduler": averaging.schedulers,
            "saving": checkpoint.in_a_folder(checkpoint.saving),
            "resuming": checkpoint.in_a_folder(checkpoint.resuming),
        }.items()
    },
    **{f"groups, {name}": _ours(case.builders) for name, case in groups.CASES.items() if case.repeats},
    **{f"L-BFGS, {search}": Case(functools.partial(_fits, search)) for search in lbfgs.LINE_SEARCHES},
    **{f"newton, {n}, {r}": Case(functools.partial(_newton, n, r)) for n in newton.SIZES for r in newton.RADII},
    "sampling": Case(_sampled),
    "sampler classes": Case(_sampler_classes),
}
if pyro_optim is not None:
    CASES |= {
        f"pyro.optim, {setting}, {size}": _ours(functools.partial(pyro_optim.contenders, setting, shapes))
        for setting in pyro_optim.SETTINGS
        for size, shapes in pyro_optim.SIZES.items()
    }
    CASES |= {"SVI": _ours(variational.contenders)}


def measured(case: str, contender: str, libraries: dict[str, Path], effort: Effort) -> dict[str, Times]:
    """The times of a contender with both revisions; infinite for one that failed or took too long."""
    start = functools.partial(Fresh, "revisions", case, contender)
    return all_steps({name: functools.partial(start, library) for name, library in libraries.items()}, effort)


def line(case: str, contender: str, times: dict[str, Times]) -> str:
    """What this revision needs, and its ratio to the other, for the first step and a later one."""
    other, this = times[OTHER], times[THIS]
    text = f"{case + ': ' + contender.removeprefix('jaxoptim'):72}"
    text += f"{duration(this.first_step):>9}{this.first_step / other.first_step:>7.2f}"
    return text + f"{duration(this.step):>10}{this.step / other.step:>7.2f}{this.cores:>6.1f}"


def main() -> None:
    """Measure what the command line asks for, and print one line for each contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", help="of the library, as git names it")
    parser.add_argument("cases", nargs="*", default=list(CASES), help="regular expressions; without any, all")
    parser.add_argument("--contenders", default="", help="a regular expression")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    parser.add_argument("--first-steps", type=int, default=1, help="processes that make a first step")
    options = parser.parse_args()
    effort = Effort(options.rounds, first_steps=options.first_steps, first_steps_seconds=10.0)
    print(f"{'':72}{'first step':>10}{'ratio':>6}{'later step':>12}{'ratio':>5}{'cores':>6}")
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, options.revision], check=True)
        try:
            libraries = {OTHER: Path(folder), THIS: HERE}
            for case in [name for name in CASES if any(re.search(pattern, name) for pattern in options.cases)]:
                for contender in filter(re.compile(options.contenders).search, CASES[case].builders()):
                    print(line(case, contender, measured(case, contender, libraries, effort)), flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


if __name__ == "__main__":
    main()
