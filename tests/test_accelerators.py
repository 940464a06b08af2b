"""Steps compiled for accelerators that are not here, by the compilers that ``make accelerators`` has installed."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = Path(os.environ.get("ACCELERATORS", ROOT / ".venv-accelerators")) / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.numbers,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"there are no compilers for accelerators: no {PYTHON}"),
]


def rows(chip, only):
    """The programs of a table, with their costs; a buffer that is donated in vain is an error there."""
    return printed_by("accelerators.py", "--chip", chip, "--only", only)


def printed_by(script, *options):
    """What a benchmark prints as lines of JSON."""
    done = subprocess.run(
        [PYTHON, ROOT / "benchmarks" / script, *options],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found
    return found


ABOVE = {("h100", "SGNHT"): 1.2, ("v5e", "SGNHT"): 1.05, ("v5e", "Adadelta"): 1.11}
"""Rules for which the compiler reads an array twice: of SGNHT the energy is summed by a kernel of its own."""


@pytest.mark.parametrize("chip", ["h100", "v5e", "v5e:2x4"])
def test_elementwise_rules_and_samplers_move_what_they_must_and_nothing_between_devices(chip):
    found = rows(chip, "elementwise")
    assert [row["title"] for row in found if row["cost"]["collectives"]] == []
    above = {row["title"]: row["cost"]["moved"] / row["floor"] for row in found}
    assert {title: ratio for title, ratio in above.items() if ratio > ABOVE.get((chip, title), 1) + 1e-3} == {}
    small = {row["title"]: row["cost"]["small"] for row in found}
    assert {title: number for title, number in small.items() if number > 40} == {}


def test_matrices_of_one_shape_are_one_batch():
    kernels = {row["title"]: row["cost"]["kernels"] for row in rows("h100", "rules that look")}
    assert kernels["Muon, 4 matrices"] <= 40
    assert kernels["Adafactor, 4 matrices"] <= 15
    assert kernels["Muon, 48 matrices of GPT-2 small"] <= 125


@pytest.mark.parametrize("chip", ["v5e:16x16", "v5p:8x8x8"])
def test_muon_of_large_matrices_on_a_pod_takes_few_collectives_and_little_memory(chip):
    costs = {row["title"]: row["cost"] for row in rows(chip, "large matrices")}
    muon = costs["Muon, 6 matrices of 8192 x 28672"]
    assert sum(muon["collectives"].values()) <= 20
    assert muon["scratch"] <= 0.4e9
    assert costs["Adam, 6 matrices of 8192 x 28672"]["collectives"] == {}


def test_steps_over_eight_chips_send_and_hold_what_the_formula_says():
    found = {row["layout"]: row for row in printed_by("scaling.py", "--chips", "8", "--only", "Adam ")}
    numbers, part = 4 * 16384**2, 7 / 8
    assert found["replicated"]["sent"] == 8 * numbers * part
    assert found["replicated"]["moves"] == {"all-reduce": 4}
    assert found["FSDP"]["sent"] <= 12 * numbers * part
    assert found["ZeRO"]["moves"].keys() <= {"all-reduce", "reduce-scatter", "all-gather"}
    matrix = 4 * numbers / 4  # what is held beside weights and moments: some gradients, or gathered weights
    for layout, held in {"replicated": 12, "ZeRO": 4 + 8 / 8, "FSDP": 12 / 8}.items():
        assert held * numbers <= found[layout]["memory"] <= held * numbers + 1.5 * matrix
