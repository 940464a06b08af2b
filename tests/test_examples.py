"""The examples as their users run them: commands with tables, a figure and errors of one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ["sgd", "adam", "adamw", "muon", "rmsprop"]


def python(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def run(*arguments):
    return python(ROOT / "examples" / "train_digits.py", *arguments)


def accuracies(stdout):
    """Optimizer to test accuracy in percent, from the printed table."""
    return {name: float(percent) for name, percent in re.findall(r"^(\w+) +(\d+\.\d+)% +\d+\.\d+$", stdout, re.M)}


def assert_png(path):
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 10_000


def test_one_optimizer_for_a_few_epochs_prints_its_row_and_writes_the_figure(tmp_path):
    done = run("--optimizer", "sgd", "--lr", 0.1, "--epochs", 2, "--out", tmp_path / "new" / "folder")
    assert done.returncode == 0, done.stderr
    assert list(accuracies(done.stdout)) == ["sgd"]
    assert accuracies(done.stdout)["sgd"] > 70
    assert_png(tmp_path / "new" / "folder" / "train_digits.png")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--optimizer", "adam,lion"], ["'lion'", *NAMES], id="unknown-optimizer"),
        pytest.param(["--lr", -1, "--optimizer", "muon"], ["Invalid lr: -1.0", "lr >= 0"], id="negative-lr"),
        pytest.param(["--epochs", 0], ["'0'", ">= 1"], id="no-epochs"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, said, tmp_path):
    done = run(*arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert all(words in done.stderr for words in said), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_optimizer_is_above_97_percent(tmp_path):
    done = run("--out", tmp_path)
    assert done.returncode == 0, done.stderr
    reached = accuracies(done.stdout)
    assert list(reached) == NAMES
    assert min(reached.values()) > 97, reached
    assert_png(tmp_path / "train_digits.png")


TORCH_STYLE = ROOT / "examples" / "torch_style.py"


def test_the_torch_style_loops_print_the_losses_of_torch():
    done = python(TORCH_STYLE, "--epochs", 3)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ *(\d+) +(\d+\.\d+) +(\d+\.\d+) +(\d+\.\d+)$", done.stdout, re.M)
    assert [int(epoch) for epoch, *_ in rows] == [1, 2, 3] * 2
    for _, torch, step, minimize in rows:
        assert float(step) == pytest.approx(float(torch), rel=1e-5)
        assert float(minimize) == pytest.approx(float(torch), rel=1e-5)
    assert float(rows[2][1]) < float(rows[0][1]) / 2, "it learns"


def test_the_torch_style_example_fails_if_the_losses_differ():
    code = "import torch_style; torch_style.TOLERANCE = 0.0; torch_style.main()"
    done = python("-c", code, "--epochs", 1, PYTHONPATH=str(TORCH_STYLE.parent))
    assert done.returncode == 1
    assert re.fullmatch(r"The losses differ by \S+, more than 0e\+00\.\n", done.stderr)


def test_the_torch_style_example_says_that_it_needs_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    done = python(TORCH_STYLE, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "This example compares with torch, which is not installed: pip install torch.\n"


@pytest.mark.slow
def test_the_benchmark_runs_and_says_which_targets_it_reaches(tmp_path):
    command = [ROOT / "benchmarks" / "step.py", "--quick", "--json", tmp_path / "numbers.json"]
    done = python(*command, "--trees", "mlp", "--optimizers", "sgd")
    assert done.returncode == 0, done.stderr
    for compared in ("jaxoptim / optax", "jaxoptim.optim, step / jaxoptim,", "jaxoptim.optim, minimize / jaxoptim,"):
        assert re.search(rf"^(reached|NOT REACHED) +mlp, sgd: step of {compared}", done.stdout, re.M)
    assert json.loads((tmp_path / "numbers.json").read_text())["results"][0]["tree"] == "mlp"
    wrong = python(*command, "--trees", "forest")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].endswith("allowed are gpt2, resnet50, 1000x100, 1000-scalars, mlp, table")


@pytest.mark.slow
def test_the_benchmark_of_lbfgs_ends_where_torch_ends():
    done = python(ROOT / "benchmarks" / "lbfgs.py", "--quick")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^  \w.* (\d+) +(0\.\d+)$", done.stdout, re.M)
    assert len(rows) == 6, done.stdout
    for table in (rows[:3], rows[3:]):
        evaluations, losses = zip(*table, strict=True)
        assert len(set(evaluations)) == 1
        assert [float(loss) for loss in losses] == pytest.approx([float(losses[0])] * 3, abs=1e-10)
