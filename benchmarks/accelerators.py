"""What steps cost on accelerators that this machine has not got: ``make accelerators`` writes ``docs/accelerators.md``.

XLA compiles every program for an H100 and for TPU slices ahead of time; the compiled text says its kernels, what they
read and write, its collectives and its memory. Nothing is timed but the compiler. ``optim`` steps and chains are run on
the CPU, at the same shapes, to learn which programs they call.

    python benchmarks/accelerators.py                  # all chips, each in a process of its own, and the document
    python benchmarks/accelerators.py --resume         # without the chips that a stopped run has done
    python benchmarks/accelerators.py --chip h100      # one chip, its rows as lines of JSON
    python benchmarks/accelerators.py --chip h100 --only "elementwise"
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from chips import SMALL, Cost, NotInstalled, cost, h100, tpu
from recording import Recorder
from trees import Shapes, gpt2, numbers_in, random_tree, resnet50

ROOT = Path(__file__).parent.parent
DOCUMENT, KEPT = ROOT / "docs" / "accelerators.md", ROOT / "out" / "accelerators"
CHIPS: dict[str, tuple[str, Callable[[], list[jax.Device]]]] = {
    "h100": ("one H100", h100),
    "h100x8": ("8 H100s", lambda: h100(8)),
    "v5e": ("one chip of a TPU v5e", lambda: tpu("v5e:2x4")[:1]),
    "v5e:2x4": ("TPU v5e 2x4, 8 chips", lambda: tpu("v5e:2x4")),
    "v5e:16x16": ("TPU v5e 16x16, 256 chips", lambda: tpu("v5e:16x16")),
    "v5p:8x8x8": ("TPU v5p 8x8x8, 512 chips", lambda: tpu("v5p:8x8x8")),
}
LARGE: Shapes = {f"p{i}": (1024, 1024) for i in range(4)}
SPREAD: Shapes = {f"p{i}": (8192, 4096) for i in range(4)}
HUGE: Shapes = {f"p{i}": (8192, 28672) for i in range(6)}
ELEMENTWISE = ("SGD", "Adagrad", "RMSprop", "ASGD", "AdagradRMSProp", "Adam", "AdamW", "NAdam", "RAdam", "Adamax")
ELEMENTWISE += ("Adadelta", "Rprop", "ClippedAdam", "DCTAdam", "SGLD", "SGHMC", "PSGLD", "SGNHT")
SOME = ("SGD", "Adam", "AdamW", "SGLD")
OPTIONS = {"SGD": {"momentum": 0.9}}
BY_SHAPE = ("Adafactor", "Muon")
TWINS = {
    "SGD": optax.sgd(1e-3, momentum=0.9),
    "Adam": optax.adam(1e-3),
    "AdamW": optax.adamw(1e-3),
    "Adafactor": optax.adafactor(1e-3),
    "Muon": optax.contrib.muon(1e-3),
}


class Row(NamedTuple):
    """A program on a chip.

    Attributes:
        table: where it stands in the document.
        title: what it is.
        cost: what it costs on each device.
        numbers: of the parameters.
        floor: the bytes that a step must move on each device, None where that is not known.
    """

    table: str
    title: str
    cost: Cost
    numbers: int
    floor: int | None = None


def rows(devices: list[jax.Device], recorder: Recorder, only: str) -> Iterator[Row]:
    """The rows of a chip, of the tables whose titles contain a text."""
    tables = {
        "elementwise rules": elementwise,
        "rules that look at shapes": by_shape,
        "many arrays": many,
        "training steps": training,
        "chains": chains,
        "large matrices": huge,
    }
    everywhere = (elementwise, by_shape, chains if len(devices) == 1 else huge)
    for title, make in tables.items():
        if only in title and (make in everywhere or (len(devices) == 1 and devices[0].platform == "gpu")):
            yield from (row._replace(table=title) for row in make(devices, recorder))


def elementwise(devices: list[jax.Device], recorder: Recorder) -> Iterator[Row]:
    """Steps of rules that take each number by itself, on large arrays."""
    names, shapes = (ELEMENTWISE, LARGE) if len(devices) == 1 else (SOME, SPREAD)
    for name in names:
        yield pure(name, shapes, devices, **OPTIONS.get(name, {}))
    if len(devices) == 1:
        yield pure("SGLD", shapes, devices, noise_impl="hash")._replace(title="SGLD, noise by a hash")


def by_shape(devices: list[jax.Device], recorder: Recorder) -> Iterator[Row]:
    """Steps of rules that look at shapes, and the same in optax."""
    matrices = {name: shape for name, shape in gpt2().items() if len(shape) == 2 and name.startswith("h.")}
    trees = {"4 matrices": LARGE if len(devices) == 1 else SPREAD}
    if len(devices) == 1 and devices[0].platform == "gpu":
        trees["48 matrices of GPT-2 small"] = matrices
    for title, shapes in trees.items():
        for name in BY_SHAPE:
            made = pure if len(devices) == 1 else over_mesh
            yield made(name, shapes, devices)._replace(title=f"{name}, {title}")
            yield with_optax(name, shapes, devices)._replace(title=f"optax: {name}, {title}")


def huge(devices: list[jax.Device], recorder: Recorder) -> Iterator[Row]:
    """Steps of large matrices on many chips."""
    if len(devices) > 8:
        for name in ("Adam", *BY_SHAPE):
            yield over_mesh(name, HUGE, devices)._replace(title=f"{name}, 6 matrices of 8192 x 28672")


def many(devices: list[jax.Device], recorder: Recorder) -> Iterator[Row]:
    """Steps of many arrays."""
    small, few = arrays_of_100(1000), arrays_of_100(200)
    yield pure("Adam", small, devices, packed=True)._replace(title="Adam, 1000 arrays of 100, packed")
    yield with_class("Adam", small, devices, recorder)._replace(title="optim.Adam, 1000 arrays of 100, one group")
    groups = with_class("Adam", few, devices, recorder, groups=True)
    yield groups._replace(title="optim.Adam, 200 arrays of 100, 200 groups")
    for title, shapes in (("GPT-2 small", gpt2()), ("ResNet-50", resnet50())):
        yield pure("AdamW", shapes, devices)._replace(title=f"AdamW, {title}")
        yield pure("AdamW", shapes, devices, packed=True)._replace(title=f"AdamW, {title}, packed")
        yield with_optax("AdamW", shapes, devices)._replace(title=f"optax: AdamW, {title}")


def training(devices: list[jax.Device], recorder: Recorder) -> Iterator[Row]:
    """Loss, gradient and update of a network in one program, written by hand and by ``minimize``."""
    import gpt2 as language
    import resnet as vision

    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    images = jax.ShapeDtypeStruct((32, 3, 224, 224), jnp.float32), jax.ShapeDtypeStruct((32,), jnp.int32)
    small = jnp.zeros((2, 3, 32, 32)), jnp.zeros(2, jnp.int32)
    for title, shapes, loss, batch, example in (
        ("GPT-2 small", gpt2(), language.loss, (tokens,), (jnp.zeros((1, 8), jnp.int32),)),
        ("ResNet-50", resnet50(), vision.loss, images, small),
    ):
        yield from trained(title, shapes, loss, batch, devices)
        yield minimized(title, shapes, loss, batch, example, devices, recorder)


def trained(
    title: str, shapes: Shapes, loss: Callable[..., Any], batch: tuple[Any, ...], devices: list[jax.Device]
) -> Iterator[Row]:
    """Training steps by ``jaxoptim.step``, with parameters as they are and packed, and by optax."""
    import jaxoptim

    params, rule, tx = described(shapes), jaxoptim.rules.AdamW(lr=1e-3), TWINS["AdamW"]

    def step(params: Any, state: Any, *batch: Any) -> Any:
        return jaxoptim.step(rule, params, jax.grad(loss)(params, *batch), state)

    def packed(params: Any, state: Any, *batch: Any) -> Any:
        return jaxoptim.step(rule, params, jax.grad(lambda p: loss(p.unpack(), *batch))(params), state)

    def twin(params: Any, state: Any, *batch: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    buffers = jax.eval_shape(jaxoptim.pack, params)
    for name, function, tree, init in (
        (f"AdamW, {title}", step, params, lambda params: jaxoptim.init(rule, params)),
        (f"AdamW, {title}, packed", packed, buffers, lambda params: jaxoptim.init(rule, params)),
        (f"optax: AdamW, {title}", twin, params, tx.init),
    ):
        found = cost(jax.jit(function, donate_argnums=(0, 1)), devices, tree, jax.eval_shape(init, tree), *batch)
        yield Row("", name, found, numbers_in(shapes))


def minimized(
    title: str,
    shapes: Shapes,
    loss: Callable[..., Any],
    batch: tuple[Any, ...],
    example: tuple[jax.Array, ...],
    devices: list[jax.Device],
    recorder: Recorder,
) -> Row:
    """A later ``minimize``, which is one program; it is run on a small example, and compiled for the batch."""
    from jaxoptim import optim

    optimizer = optim.AdamW(random_tree(shapes, 0), lr=1e-3)
    optimizer.minimize(loss, *example)
    [(program, args, kwargs)] = recorder.calls(lambda: optimizer.minimize(loss, *example))
    whole = {(x.shape, x.dtype): like for x, like in zip(example, batch, strict=True)}
    args = jax.tree.map(lambda x: whole.get((getattr(x, "shape", None), getattr(x, "dtype", None)), x), args)
    return Row("", f"optim.AdamW, {title}, minimize", cost(program, devices, *args, **kwargs), numbers_in(shapes))


def chains(devices: list[jax.Device], recorder: Recorder) -> Iterator[Row]:
    """64 chains of a sampler."""
    import jaxoptim

    shapes: Shapes = {"w": (64, 64), "b": (64,)}
    rule, one = jaxoptim.rules.SGLD(lr=1e-3, nbeta=1.0), described(shapes)
    params = {name: jax.ShapeDtypeStruct((64, *shape), jnp.float32) for name, shape in shapes.items()}
    state = jax.eval_shape(lambda p: jax.vmap(lambda _: jaxoptim.init(rule, p))(jnp.arange(64)), one)

    def step(params: Any, state: Any, grads: Any) -> Any:
        return jax.vmap(lambda p, g, s: jaxoptim.step(rule, p, g, s))(params, grads, state)

    found = cost(jax.jit(step, donate_argnums=(0, 1)), devices, params, state, params)
    numbers = 64 * numbers_in(shapes)
    yield Row("", "SGLD, one step of 64 chains of 4160 numbers", found, numbers, 12 * numbers)
    yield sampled(rule, shapes, devices, recorder)


def sampled(rule: Any, shapes: Shapes, devices: list[jax.Device], recorder: Recorder) -> Row:
    """The chunk of draws that ``sample`` calls again and again, whose steps are a loop."""
    from jaxoptim import sampling

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((jnp.tanh(batch @ params["w"] + params["b"]) - 1) ** 2)

    params, data = random_tree(shapes, 0), jnp.ones((256, 64))
    options = {"key": jax.random.key(0), "num_chains": 64, "num_draws": 100, "batch_size": 32, "chain_method": "vmap"}
    calls = recorder.calls(lambda: sampling.sample(loss, params, rule, data, **options))
    program, args, kwargs = next(call for call in calls if call[0].__name__ == "run_steps")
    return Row(
        "", "sample, 64 chains of 4160 numbers", cost(program, devices, *args, **kwargs), 64 * numbers_in(shapes)
    )


def pure(name: str, shapes: Shapes, devices: list[jax.Device], *, packed: bool = False, **options: Any) -> Row:
    """A step of ``jaxoptim.step``, jitted and donated, with gradients as leaves."""
    import jaxoptim

    grads = described(shapes)
    params = jax.eval_shape(jaxoptim.pack, grads) if packed else grads
    rule = getattr(jaxoptim.rules, name)(**options)
    state = jax.eval_shape(lambda params: jaxoptim.init(rule, params), params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        return jaxoptim.step(rule, params, grads, state)

    found = cost(jax.jit(step, donate_argnums=(0, 1)), devices, params, state, grads)
    return Row("", name, found, numbers_in(shapes), floor_of(grads, state) // len(devices))


def over_mesh(name: str, shapes: Shapes, devices: list[jax.Device]) -> Row:
    """A step of ``distributed.zero``, which is told how the parameters are sharded."""
    import jaxoptim

    grads, mesh = described(shapes), Mesh(devices, "chips")
    rule = getattr(jaxoptim.rules, name)()
    optimizer = jaxoptim.distributed.zero(rule, mesh, "chips", specs=PartitionSpec("chips"))
    state = jax.eval_shape(lambda params: jaxoptim.init(rule, params), grads)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    found = cost(jax.jit(step, donate_argnums=(0, 1)), devices, grads, state, grads)
    return Row("", name, found, numbers_in(shapes), floor_of(grads, state) // len(devices))


def floor_of(grads: dict[str, Any], state: Any) -> int:
    """The bytes that a step must move."""
    slots = [slot for name, slot in state.slots.items() if name != "initial_param"]  # which is read for metrics alone
    ways = [(3, grads), (2, slots)]
    return sum(times * x.size * x.dtype.itemsize for times, tree in ways for x in jax.tree.leaves(tree))


def with_optax(name: str, shapes: Shapes, devices: list[jax.Device]) -> Row:
    """A step of the optimizer of optax."""
    tx, params = TWINS[name], described(shapes)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    found = cost(jax.jit(step, donate_argnums=(0, 1)), devices, params, jax.eval_shape(tx.init, params), params)
    return Row("", f"optax: {name}", found, numbers_in(shapes))


def with_class(
    kind: str, shapes: Shapes, devices: list[jax.Device], recorder: Recorder, *, groups: bool = False
) -> Row:
    """A later ``optim`` step, which is one program."""
    from jaxoptim import optim

    rates = [(name.__eq__, {"lr": 1e-3 * (number + 1)}) for number, name in enumerate(shapes)]
    optimizer = getattr(optim, kind)(random_tree(shapes, 0), lr=1e-3, groups=rates if groups else None)
    grads = random_tree(shapes, 1)
    optimizer.step(grads)
    [(program, args, kwargs)] = recorder.calls(lambda: optimizer.step(grads))
    return Row("", kind, cost(program, devices, *args, **kwargs), numbers_in(shapes))


def described(shapes: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays of float32, on paper."""
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def arrays_of_100(number: int) -> Shapes:
    """So many arrays of 100 numbers."""
    return {f"p{i:03d}": (100,) for i in range(number)}


def compile_for(chip: str, only: str) -> None:
    """Print the rows of a chip as lines of JSON."""
    try:
        devices = CHIPS[chip][1]()
    except NotInstalled as error:
        sys.exit(str(error))
    warnings.filterwarnings("error", message="Some donated buffers were not usable")
    recorder = Recorder()
    with recorder.at_work():
        for row in rows(devices, recorder, only):
            print(json.dumps(row._asdict() | {"cost": dataclasses.asdict(row.cost)}), flush=True)


def rows_of(chip: str, only: str) -> list[Row]:
    """The rows of a chip, those on disk if there are; compiled in a process of its own, which a compiler may end."""
    path = KEPT / f"{chip}.jsonl"
    if not path.exists():
        command = [sys.executable, __file__, "--chip", chip, "--only", only]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"})
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        KEPT.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line for line in done.stdout.splitlines(keepends=True) if line.startswith("{")))
    found = map(json.loads, path.read_text().splitlines())
    return [Row(**(row | {"cost": Cost(**row["cost"])})) for row in found]


INTRODUCTION = """\
# Steps on accelerators

Written by `make accelerators` with jax {version}, on a machine without any of these chips: XLA compiles for them ahead
of time, and the compiled programs are counted. Nothing was run.

A kernel is an operation of the entry computation or of the body of a loop, where it counts once; a small one moves
less than {small} bytes. Bytes are those that
kernels read and write in the memory of one device, for each of its numbers. The floor is what a step must move: values,
gradients and state read once, values and state written once. Scratch is memory beside arguments and results. On several
devices all arrays are spread along their first axis, and rules that look at shapes are told so by `distributed.zero`.
Seconds are those of the compiler here. Parameters and state are
donated, and a buffer that is donated in vain is an error.
"""
HEADER = """
| program | kernels | small | bytes a number | floor | scratch, MB | collectives (bytes) | seconds |
|---|---|---|---|---|---|---|---|
"""


def written(chips: dict[str, list[Row]]) -> str:
    """The document."""
    text = INTRODUCTION.format(version=jax.__version__, small=SMALL)
    for chip, found in chips.items():
        title, _ = CHIPS[chip]
        text += f"\n## {title[0].upper()}{title[1:]}\n"
        for table in dict.fromkeys(row.table for row in found):
            text += f"\n### {table[0].upper()}{table[1:]}: {title}\n{HEADER}"
            text += "".join(formatted(row, devices_in(chip)) for row in found if row.table == table)
    return text


def devices_in(chip: str) -> int:
    """The number of devices that share the arrays."""
    return {"h100x8": 8, "v5e:2x4": 8, "v5e:16x16": 256, "v5p:8x8x8": 512}.get(chip, 1)


def formatted(row: Row, devices: int) -> str:
    """A line of a table."""
    found, own = row.cost, row.numbers / devices
    floor = "" if row.floor is None else f"{row.floor / own:.1f}"
    moves = ", ".join(f"{number} {name}" for name, number in found.collectives.items())
    moves = f"{moves} ({found.sent})" if moves else "none"
    cells = (row.title, found.kernels, found.small, f"{found.moved / own:.1f}", floor, f"{found.scratch / 1e6:.1f}")
    return f"| {' | '.join(map(str, cells))} | {moves} | {found.seconds:.1f} |\n"


def main() -> None:
    """Compile for one chip, or for all, and write the document."""
    parser = argparse.ArgumentParser(description="Count the kernels, bytes and collectives of compiled steps.")
    parser.add_argument("--chip", choices=CHIPS, help="print the rows of one chip as JSON, and write nothing")
    parser.add_argument("--only", default="", help="a text in the titles of tables to make (default: all)")
    parser.add_argument("--resume", action="store_true", help="go on after a run that was stopped")
    options = parser.parse_args()
    if options.chip:
        compile_for(options.chip, options.only)
        return
    if not options.resume:
        shutil.rmtree(KEPT, ignore_errors=True)
    found = {}
    for chip, (title, _) in CHIPS.items():
        found[chip] = rows_of(chip, options.only)
        DOCUMENT.write_text(written(found))
        print(f"{title}: {len(found[chip])} programs", flush=True)


if __name__ == "__main__":
    main()
