"""Kernels and memory traffic of a step on an H100, compiled on a machine without one.

It needs the CUDA plugin of the installed jax and ptxas, but none of CUDA's libraries::

    pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION nvidia-cuda-nvcc-cu12
    python benchmarks/kernels.py

where VERSION is that of jax. To leave an environment as it is, make another one that sees it: ``python -m venv gpu``,
with the path of the first one's ``site-packages`` in a file ``gpu/lib/python3.11/site-packages/first.pth``.

``optim`` steps are run on the CPU, and the programs that they call are compiled for the H100 with the same shapes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from h100 import Cost, NotInstalled, cost, h100
from recording import Recorder
from trees import Shapes, numbers_in, random_tree

LARGE: Shapes = {f"p{i}": (1024, 1024) for i in range(4)}


@dataclasses.dataclass(frozen=True)
class Row:
    """One step, and what it may cost at most.

    Attributes:
        title: what it is, for reading.
        shapes: of the parameters.
        cost: kernels and traffic on a device.
        kernels: the most kernels wanted (None: any number).
        bytes_per_number: the most traffic wanted (None: any).
    """

    title: str
    shapes: Shapes
    cost: Callable[[Shapes, jax.Device, Recorder], Cost]
    kernels: int | None = None
    bytes_per_number: float | None = None


def pure(rule: str, shapes: Shapes, device: jax.Device, recorder: Recorder, *, packed: bool = False) -> Cost:
    """The cost of ``jaxoptim.step``, jitted and donated, with gradients as leaves."""
    import jaxoptim  # while the recorder is at work

    grads = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    params = jax.eval_shape(jaxoptim.pack, grads) if packed else grads
    made = getattr(jaxoptim.rules, rule)(lr=1e-3)
    state = jax.eval_shape(lambda params: jaxoptim.init(made, params), params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        return jaxoptim.step(made, params, grads, state)

    return cost(jax.jit(step, donate_argnums=(0, 1)), device, params, state, grads)


def with_class(kind: str, shapes: Shapes, device: jax.Device, recorder: Recorder, *, groups: bool = False) -> Cost:
    """The cost of a later ``optim`` step: that of all programs which it calls."""
    from jaxoptim import optim  # while the recorder is at work

    rates = [(name.__eq__, {"lr": 1e-3 * (number + 1)}) for number, name in enumerate(shapes)]
    optimizer = getattr(optim, kind)(random_tree(shapes, 0), lr=1e-3, groups=rates if groups else None)
    grads = random_tree(shapes, 1)
    optimizer.step(grads)
    calls = recorder.calls(lambda: optimizer.step(grads))
    return sum((cost(program, device, *args, **kwargs) for program, args, kwargs in calls), Cost())


def arrays_of_100(number: int) -> Shapes:
    """So many arrays of 100 numbers."""
    return {f"p{i:03d}": (100,) for i in range(number)}


ROWS = [
    Row("Adam, 4 arrays of 1024 x 1024", LARGE, lambda *a: pure("Adam", *a), bytes_per_number=28.0),
    Row("Adam, 1000 arrays of 100, packed", arrays_of_100(1000), lambda *a: pure("Adam", *a, packed=True), 34),
    Row("optim.Adam, 1000 arrays of 100, one group", arrays_of_100(1000), lambda *a: with_class("Adam", *a), 34),
    Row("optim.Adam, 200 arrays, 200 groups", arrays_of_100(200), lambda *a: with_class("Adam", *a, groups=True), 20),
    Row("Muon, 4 matrices of 1024 x 1024", LARGE, lambda *a: pure("Muon", *a)),
    Row("optim.Muon, 4 matrices of 1024 x 1024", LARGE, lambda *a: with_class("Muon", *a)),
]


def verdicts(row: Row, found: Cost) -> list[str]:
    """One line for each of a row's targets."""
    lines = []
    traffic = round(found.moved / numbers_in(row.shapes), 1)
    for what, value, limit in [
        ("kernels", found.kernels, row.kernels),
        ("bytes a number", traffic, row.bytes_per_number),
    ]:
        if limit is not None:
            reached = "reached    " if value <= limit else "NOT REACHED"
            lines.append(f"{reached}  {row.title}: {what} = {value} (at most {limit})")
    return lines


def main() -> None:
    """Compile, and print the table and the targets."""
    try:
        device = h100()
    except NotInstalled as error:
        sys.exit(str(error))
    recorder, targets = Recorder(), []
    print(f"{device.device_kind}, jax {jax.__version__}\n  {'':44}{'kernels':>8}{'bytes a number':>16}{'seconds':>9}")
    with recorder.at_work():
        for row in ROWS:
            start = time.perf_counter()
            found = row.cost(row.shapes, device, recorder)
            traffic, seconds = found.moved / numbers_in(row.shapes), time.perf_counter() - start
            print(f"  {row.title:44}{found.kernels:>8}{traffic:>16.1f}{seconds:>9.1f}", flush=True)
            targets += verdicts(row, found)
    print("\nTargets\n" + "\n".join(targets))


if __name__ == "__main__":
    main()
