"""What a step costs on many devices: ``python benchmarks/scaling.py`` writes ``docs/scaling.md``.

Formulas for replicated, ZeRO and FSDP layouts, and beside them what XLA's programs for 8 and 512 chips of a TPU v5p
take, compiled on a machine that has none (``make accelerators`` makes the environment). No array is made.

    .venv-accelerators/bin/python benchmarks/scaling.py                 # 8 and 512 chips, and the document
    .venv-accelerators/bin/python benchmarks/scaling.py --chips 8       # the rows of 8 chips, as lines of JSON
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chips import COLLECTIVE, NotInstalled, bytes_of, tpu

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "scaling.md"
SLICES = {8: "v5p:2x2x2", 512: "v5p:8x8x8"}
MATRICES, SIDE = 4, 16384
"""The model that is compiled: so many square matrices, 1.07 thousand million numbers."""
ROWS = 8
"""Of the batch on each device."""
STATE = {"Adam": 2.0, "Adafactor": 0.0, "Muon": 1.0, "SGLD": 1.0}
"""Numbers of state for each parameter; SGLD keeps where it began. The factors of Adafactor are small."""
LAYOUTS = ("replicated", "ZeRO", "FSDP")
WIDTH = 4
"""Bytes of a number: everything is float32."""


class Row(NamedTuple):
    """A step on one of several devices.

    Attributes:
        rule: the optimizer.
        layout: where parameters and state are.
        devices: how many.
        memory: bytes of arguments, results and scratch; None where the compiler refused.
        sent: bytes that a ring sends for the collectives.
        moves: the number of each kind of collective.
        refused: what the compiler said.
    """

    rule: str
    layout: str
    devices: int
    memory: int | None = None
    sent: int = 0
    moves: dict[str, int] | None = None
    refused: str = ""


def memory(rule: str, layout: str, numbers: float, devices: int) -> float:
    """The bytes of weights, gradient and state on each device, by the formula."""
    weight, other = WIDTH * numbers, WIDTH * numbers * (1 + STATE[rule])
    shared = {"replicated": (1, 1), "ZeRO": (1, devices), "FSDP": (devices, devices)}[layout]
    return weight / shared[0] + other / shared[1]


def sent(layout: str, numbers: float, devices: int) -> float:
    """The bytes that each device sends for a step, by the formula, without what the rule itself needs."""
    passes = {"replicated": 2, "ZeRO": 2, "FSDP": 3}[layout]
    return passes * WIDTH * numbers * (devices - 1) / devices


def compiled(rule: str, layout: str, devices: list[jax.Device]) -> Row:
    """The row of a training step: gradient, reduction, update."""
    import jaxoptim

    row, mesh = Row(rule, layout, len(devices)), Mesh(devices, "data")
    optimizer = jaxoptim.transformation(getattr(jaxoptim.rules, rule)())
    spec = PartitionSpec("data") if layout == "FSDP" else PartitionSpec()
    whole, along = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    one = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32, sharding=NamedSharding(mesh, spec))
    weights = {f"w{at}": one for at in range(MATRICES)}
    if layout != "replicated":
        optimizer = jaxoptim.distributed.zero(optimizer, mesh, "data", specs=spec)
    shardings = jaxoptim.distributed.state_shardings(optimizer, weights)
    state = jax.tree.map(
        lambda x, its: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=its),
        jax.eval_shape(optimizer.init, weights),
        shardings,
    )
    batch = jax.ShapeDtypeStruct((ROWS * len(devices), SIDE), jnp.float32, sharding=along)

    def loss(weights: Any, batch: Any) -> Any:
        @jax.checkpoint
        def layer(weight: Any, x: Any) -> Any:
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, whole))

        for weight in weights.values():
            batch = layer(weight, batch)
        return jnp.mean(batch**2)

    def step(weights: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(loss)(weights, batch)
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    results = jax.tree.map(lambda x: x.sharding, (weights, state))
    program = jax.jit(step, donate_argnums=(0, 1), out_shardings=results)
    try:
        done = program.lower(weights, state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        amounts = re.findall(r"[\d.]+[KMGT]\b", str(error))  # what it needs, and what there is
        if "RESOURCE_EXHAUSTED" not in str(error) or len(amounts) < 2:
            raise
        return row._replace(refused=f"needs {amounts[0]} of {amounts[1]}")
    held = done.memory_analysis()
    total = held.argument_size_in_bytes + held.output_size_in_bytes - held.alias_size_in_bytes + held.temp_size_in_bytes
    moves, bytes_sent = traffic(done.as_text(), len(devices))
    return row._replace(memory=total, moves=moves, sent=bytes_sent)


def traffic(text: str, devices: int) -> tuple[dict[str, int], int]:
    """The collectives of a compiled program by kind, and the bytes that each device sends for them around a ring.

    TPUs write a reduce-scatter as an all-reduce inside a fusion of that name.
    """
    moves: dict[str, int] = {}
    total, inside = 0.0, ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            inside = line.split(" ")[0]
        if not (found := COLLECTIVE.search(line)):
            continue
        kind, operation = found.groups()
        ring = ring_of(line, devices)
        size = bytes_of(re.sub(r"S\(\d+\)", "", kind))  # also of arrays that are in scratch memory
        if operation == "all-gather" and "-start(" in line:  # whose type has the operand too
            size = size * ring // (ring + 1)
        if "all-reduce-scatter" in inside:
            operation = "reduce-scatter"
        elif operation == "reduce-scatter":
            size *= ring
        moves[operation] = moves.get(operation, 0) + 1
        total += size * (2 if operation == "all-reduce" else 1) * (ring - 1) / ring
    return moves, round(total)


def ring_of(line: str, devices: int) -> int:
    """The number of devices that a collective is among: those of its groups, or all."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return found[1].count(",") + 1 if found else devices


def compile_for(devices: int, only: str) -> None:
    """Print the rows of a slice, those whose titles contain a text, as lines of JSON."""
    try:
        chips = tpu(SLICES[devices])
    except NotInstalled as error:
        sys.exit(str(error))
    for rule in STATE:
        for layout in LAYOUTS:
            if only in f"{rule} {layout}":
                print(json.dumps(compiled(rule, layout, chips)._asdict()), flush=True)


def rows_of(devices: int) -> list[Row]:
    """The rows of a slice, compiled in a process of its own: one process knows one slice."""
    command = [sys.executable, __file__, "--chips", str(devices)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return [Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


INTRODUCTION = """\
# Memory and traffic over many devices

Written by `benchmarks/scaling.py` with jax {version}. The first table is arithmetic. The second is what XLA's
programs for 8 and 512 chips of a TPU v5p (2x2x2 and 8x8x8, 95.7 GB each) take, compiled on a machine that has none.
Nothing was run.

## By the formula

For N parameters and D devices, of which each has its part of the batch; everything is float32, 4 bytes a number. A
step holds weights, gradient and state: k numbers of state for a parameter are 2 for Adam, 1 for Muon, 1 for SGLD
(where it began) and hardly any for Adafactor (a row and a column for each matrix).

| layout | bytes on each device | bytes that each sends for a step |
|---|---|---|
| replicated | 4N (2 + k) | all-reduce of the gradient: 8N (D-1)/D |
| ZeRO, `distributed.zero` | 4N + 4N (1 + k)/D | reduce-scatter of the gradient, gather of the weights: 8N (D-1)/D |
| FSDP, sharded parameters | 4N (2 + k)/D | gather of the weights twice, reduce-scatter: 12N (D-1)/D |

Beside these stand activations, and what a rule needs to see of other devices: Adafactor the sums over the rows of
each matrix, a few numbers; Muon whole matrices, or products of their parts; Adam and SGLD nothing, as they take
each number by itself, and noise is a function of the key and of the place.

GB on each device, and GB that each sends for a step:
"""
COMPILED = """
## By the compiled programs

A training step of a chain of {matrices} square matrices of {side} x {side}, 1.07 thousand million parameters, which
stand for the many of a model: with 70B in four matrices each would be 69 GB, and with many the compiler takes minutes
for a program. {rows} rows of the batch are on each chip; each layer is computed again
for the gradient, and asks for its whole matrix. Memory is that of arguments, results and scratch; what is sent is
that of the collectives, around a ring. Those that stand in a loop count once. They are all-reduces (AR),
reduce-scatters (RS), all-gathers (AG), permutes (CP) and all-to-alls (AA).

| chips | rule | layout | GB a chip (formula) | GB sent (formula) | collectives |
|---|---|---|---|---|---|
"""
WHY = """
## Where they differ

- **Replicated**: what is sent is the formula. Memory is below it, as a gradient is reduced, used and forgotten
  before the last ones are there.
- **ZeRO**: these compilers keep the all-reduce of a large gradient and cut its part out, where the formula has a
  reduce-scatter: half as much again is sent. On 512 chips they write the gathers as all-reduces too, of arrays that
  are zero outside of their own part, which doubles them.
- **FSDP**: the weights are gathered in bfloat16, in which TPUs multiply unless they are told otherwise: half of the
  bytes. Gradients are all-reduced as with ZeRO, for twice the bytes; on 8 chips the two cancel.
- **Memory of ZeRO and FSDP** above the formula is whole gradients, 1.07 GB for a matrix: one or two with Adam,
  two to four with SGLD and with Muon, whose iterates are among them, four to six with Adafactor. Where gradients are
  all-reduced, the compiler is free to have all of them before the updates.
- **Adafactor** sends half a megabyte for its sums over rows. Its state is too small for ZeRO to save any of it.
- **Muon** takes each matrix to a group of chips, with one all-to-all of bfloat16 numbers for all of them, and back.
  At every iteration the chips of a group sum the rows of a Gram matrix in float32, and gather them twice in bfloat16:
  for these four square matrices each sends 15N (D-4)/D bytes in that way, as these compilers keep all-reduces here too
  (10N with the reduce-scatters that H100s have). Wider matrices send less for each number.
- **SGLD** sends nothing for its noise.
"""
SHORT = {
    "all-reduce": "AR",
    "reduce-scatter": "RS",
    "all-gather": "AG",
    "collective-permute": "CP",
    "all-to-all": "AA",
}


def written(rows: list[Row]) -> str:
    """The document."""
    text = INTRODUCTION.format(version=jax.__version__)
    counts = (1, 8, 64, 512)
    text += "\n| model | rule | layout | " + " | ".join(f"D = {count}" for count in counts) + " |\n"
    text += "|---" * (3 + len(counts)) + "|\n"
    for title, numbers in (("1B", 1e9), ("70B", 70e9)):
        for rule in STATE:
            for layout in LAYOUTS:
                cells = [
                    f"{shown(memory(rule, layout, numbers, count))}, {shown(sent(layout, numbers, count))}"
                    for count in counts
                ]
                text += f"| {title} | {rule} | {layout} | {' | '.join(cells)} |\n"
    return text + COMPILED.format(matrices=MATRICES, side=SIDE, rows=ROWS) + "".join(map(formatted, rows)) + WHY


def formatted(row: Row) -> str:
    """A line of the second table."""
    numbers = MATRICES * SIDE**2
    found = row.refused if row.memory is None else shown(row.memory)
    place = f"{found} ({shown(memory(row.rule, row.layout, numbers, row.devices))})"
    expected, moves = shown(sent(row.layout, numbers, row.devices)), "refused"
    network = f"({expected})"
    if row.moves is not None:
        network = f"{shown(row.sent)} ({expected})"
        moves = ", ".join(f"{number} {SHORT[kind]}" for kind, number in row.moves.items())
    return f"| {row.devices} | {row.rule} | {row.layout} | {place} | {network} | {moves} |\n"


def shown(size: float) -> str:
    """A number of GB in three digits."""
    return f"{size / 1e9:.3g}" if size < 1e12 else f"{size / 1e9:.0f}"


def main() -> None:
    """Compile for one slice, or for all, and write the document."""
    parser = argparse.ArgumentParser(
        description="Memory and traffic of steps on many devices, by formula and compiled."
    )
    parser.add_argument("--chips", type=int, choices=SLICES, help="print the rows of one slice, and write nothing")
    parser.add_argument("--only", default="", help="a text in the titles of these rows, such as 'Adam ' (default: all)")
    options = parser.parse_args()
    if options.chips:
        compile_for(options.chips, options.only)
        return
    DOCUMENT.write_text(written([row for devices in SLICES for row in rows_of(devices)]))


if __name__ == "__main__":
    main()
