"""Runs of an optimizer and of its parent on the same numbers, and the table of how far they part.

``python tests/parity.py`` measures every case and writes ``docs/parity.md``; the tests make the same
measurements and compare them with what that file says.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.experimental.sparse import BCOO

import jaxoptim
from table import CASES, ROWS, SPARSE, Case, Row

STEPS = 300
SLOPE = 0.1
"""Share of the parameter in its gradient, so that an error would feed back into the trajectory."""
ROWS_TOUCHED = 4
COLUMNS = ("float64", "float32", "bfloat16", "optax")
"""What is measured for the table, in its order."""
TABLE = Path(__file__).parent.parent / "docs" / "parity.md"

Arrays = list[np.ndarray]
TORCH_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
TORCH_DTYPES |= {"complex128": torch.complex128}


@functools.cache
def problem(shapes: tuple[tuple[int, ...], ...], is_complex: bool = False) -> tuple[Arrays, Arrays]:
    """Parameters, and as many noisy gradients as there are steps, all exact in bfloat16."""
    rng = np.random.default_rng(0)

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        real = rng.normal(size=shape).astype(jnp.bfloat16).astype(np.float64)
        return real + 1j * rng.normal(size=shape).astype(jnp.bfloat16).astype(np.float64) if is_complex else real

    return [normal(shape) for shape in shapes], [normal((STEPS, *shape)) for shape in shapes]


def touched_rows(shapes: tuple[tuple[int, ...], ...]) -> Arrays:
    """For each step the rows with a gradient: unsorted, some twice."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, shape[0], size=(STEPS, ROWS_TOUCHED)) for shape in shapes]


# The numbers of a rule are arguments: option sets that differ in numbers alone share a program.
@functools.partial(jax.jit, static_argnames=("advance", "slope"))
def _scan(advance: Callable[..., Any], rule: Any, params: Any, state: Any, noises: Any, slope: float) -> Any:
    def body(carry: Any, noise: Any) -> tuple[Any, None]:
        params, state = carry
        grads = [n + slope * p for n, p in zip(noise, params, strict=True)] if slope else noise
        return advance(rule, params, grads, state), None

    return jax.lax.scan(body, (params, state), noises)[0]


def _as_numpy(params: Any) -> Arrays:
    widen = {jnp.dtype(jnp.bfloat16): np.float32}
    return [
        np.asarray(x).astype(widen.get(x.dtype, x.dtype)).astype(np.result_type(x.dtype, np.float64)) for x in params
    ]


def run_ours(rule: jaxoptim.Rule, start: Arrays, noise: Arrays, dtype: str, slope: float) -> Arrays:
    """The parameters after all steps of ``jaxoptim.step``, in one compiled scan."""
    params = [jnp.asarray(x, dtype) for x in start]
    state = jaxoptim.init(rule, params)
    return _as_numpy(_scan(jaxoptim.step, rule, params, state, [jnp.asarray(x, dtype) for x in noise], slope)[0])


def run_optax(tx: optax.GradientTransformation, start: Arrays, noise: Arrays, dtype: str, slope: float) -> Arrays:
    """The parameters after all steps of an optax transformation."""
    params = [jnp.asarray(x, dtype) for x in start]

    def advance(_: None, params: Any, grads: Any, state: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    noises = [jnp.asarray(x, dtype) for x in noise]
    return _as_numpy(_scan(advance, None, params, tx.init(params), noises, slope)[0])


def run_parent(case: Case, start: Arrays, noise: Arrays, dtype: str, slope: float) -> Arrays:
    """The parameters after all steps of the parent's own optimizer."""
    params = [torch.tensor(x, dtype=TORCH_DTYPES[dtype]) for x in start]
    noises = [torch.tensor(x, dtype=TORCH_DTYPES[dtype]) for x in noise]
    optimizer = case.parents(params)
    for t in range(STEPS):
        for param, values in zip(params, noises, strict=True):
            param.grad = values[t] + slope * param if slope else values[t].clone()
        optimizer.step()
    return [param.to(torch.promote_types(param.dtype, torch.float64)).numpy() for param in params]


def _sparse_step(rule: jaxoptim.Rule, params: Any, grads: Any, state: Any) -> Any:
    values, indices = grads
    sparse = [BCOO((v, i[:, None]), shape=p.shape) for v, i, p in zip(values, indices, params, strict=True)]
    return jaxoptim.step(rule, params, sparse, state)


def run_sparse(case: Case, dtype: str) -> tuple[Arrays, Arrays]:
    """The parameters of ours and of the parent after all steps with sparse gradients."""
    shapes = case.row.shapes if case.row.sparse else ((12, 4), (9,), (7, 2, 3))
    start, rows = problem(shapes)[0], touched_rows(shapes)
    noise = problem(tuple((ROWS_TOUCHED, *shape[1:]) for shape in shapes))[1]
    rule = case.ours()

    params = [jnp.asarray(x, dtype) for x in start]
    noises = ([jnp.asarray(x, dtype) for x in noise], [jnp.asarray(x) for x in rows])
    ours = _as_numpy(_scan(_sparse_step, rule, params, jaxoptim.init(rule, params), noises, 0.0)[0])

    tensors = [torch.tensor(x, dtype=TORCH_DTYPES[dtype]) for x in start]
    optimizer = case.parents(tensors)
    with torch.sparse.check_sparse_tensor_invariants():  # torch warns unless it is told whether to check
        for t in range(STEPS):
            for tensor, values, indices in zip(tensors, noise, rows, strict=True):
                data = torch.tensor(values[t], dtype=TORCH_DTYPES[dtype])
                tensor.grad = torch.sparse_coo_tensor(torch.tensor(indices[t])[None], data, tensor.shape)
            optimizer.step()
    return ours, [tensor.double().numpy() for tensor in tensors]


def distance(ours: Arrays, theirs: Arrays) -> float:
    """The largest difference in any array, relative to that array's largest number."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))


def rms_error(values: Arrays, reference: Arrays) -> float:
    """The root-mean-square error over all numbers, relative to the root mean square of the reference."""
    error = sum(float(np.sum((a - b) ** 2)) for a, b in zip(values, reference, strict=True))
    return float(np.sqrt(error / sum(float(np.sum(b**2)) for b in reference)))


@functools.cache
def wide_reference(case: Case) -> Arrays:
    """What the parent makes of the wide shapes in float64, the gradients being noise alone."""
    return run_parent(case, *problem(case.row.wide_shapes), "float64", 0.0)


@functools.cache
def float64_distance(case: Case, is_complex: bool = False) -> float:
    """How far ours is from the parent in double precision."""
    start, noise = problem(case.row.shapes, is_complex)
    dtype = "complex128" if is_complex else "float64"
    with jax.enable_x64(True):
        ours = run_ours(case.ours(), start, noise, dtype, SLOPE)
    return distance(ours, run_parent(case, start, noise, dtype, SLOPE))


@functools.cache
def low_precision_errors(case: Case, dtype: str) -> tuple[float, float]:
    """The errors of ours and of the parent in ``dtype``, against the parent in float64, on the same gradients."""
    start, noise = problem(case.row.wide_shapes)
    reference = wide_reference(case)
    ours = run_ours(case.ours(), start, noise, dtype, 0.0)
    theirs = run_parent(case, start, noise, dtype, 0.0)
    return rms_error(ours, reference), rms_error(theirs, reference)


def optax_distance(row: Row) -> float:
    """How far ours is from the optax optimizer of the same name, with its defaults, in double precision."""
    start, noise = problem(row.shapes)
    assert row.namesake is not None
    with jax.enable_x64(True):
        ours = run_ours(Case(row, row.options[0]).ours(), start, noise, "float64", SLOPE)
        return distance(ours, run_optax(row.namesake(), start, noise, "float64", SLOPE))


def measured(row: Row, column: str) -> float | None:
    """A cell of the table: the worst case of an optimizer."""
    if column == "optax":
        return None if row.namesake is None else optax_distance(row)
    dense = [case for case in CASES if case.row is row and not row.sparse]
    if column == "float64":
        with jax.enable_x64(True):
            sparse = [distance(*run_sparse(case, "float64")) for case in SPARSE if case.row is row]
        return max([*map(float64_distance, dense), *sparse])
    errors = [low_precision_errors(case, column) for case in dense]
    return max((ours / theirs for ours, theirs in errors), default=None)


def formatted(column: str, x: float | None) -> str:
    """The text of a cell."""
    if x is None:
        return "no such optimizer" if column == "optax" else "-"
    return f"{x:.0e}" if column in ("float64", "optax") else f"{x:.2f}"


def about(row: Row) -> list[str]:
    """The cells of an optimizer that nothing is measured for: its parent, and how many option sets it has."""
    parent = f"{row.parent.__module__.split('.')[0]}.optim.{row.parent.__name__}"
    return [f"`{parent}`", str(sum(case.row is row for case in CASES))]


def read_table() -> dict[str, list[str]]:
    """The cells of ``docs/parity.md`` by optimizer."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", TABLE.read_text(), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


HEADER = """\
# Parity with the parents

Measured by `make parity`, and again by every run of the tests, which compare what they find with this table.
Each optimizer runs {steps} steps against the live parent, for every option set of `tests/table.py`; the worst is shown.

- **float64**: the largest difference of a parameter, relative to the largest parameter. The gradient depends on the
  parameter, so that errors feed back. `Muon` runs its iteration in bfloat16, as torch does; the figure is of matrices
  up to 6 x 4, where it agrees to the bit. On larger ones the order of summation differs, by up to 1e-2 of an update.
- **float32**, **bfloat16**: our error against the parent in float64, divided by the parent's own error in that
  precision. Below 1 we are nearer to the exact answer; a few percent either way is the chance of rounding.
- **optax**: the same difference from the optax optimizer of the same name with its own defaults, learning rate equal.
  Where it is large, the two are not interchangeable.

| optimizer | parent | option sets | float64 | float32 | bfloat16 | optax |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Write the table."""
    lines = []
    for row in ROWS:
        cells = [f"`{row.name}`", *about(row), *(formatted(column, measured(row, column)) for column in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
        sys.stdout.write(lines[-1] + "\n")
        sys.stdout.flush()
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(HEADER.format(steps=STEPS) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
