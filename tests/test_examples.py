"""The demo as its users run it: a command with a table, a figure and errors of one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "train_digits.py"
NAMES = ["sgd", "adam", "adamw", "muon", "rmsprop"]


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


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


@pytest.mark.slow
def test_the_benchmark_runs_and_says_which_targets_it_reaches(tmp_path):
    script = SCRIPT.parent.parent / "benchmarks" / "step.py"
    command = [sys.executable, str(script), "--quick", "--json", str(tmp_path / "numbers.json")]
    done = subprocess.run([*command, "--trees", "mlp", "--optimizers", "sgd"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^(reached|NOT REACHED) +mlp, sgd: step of jaxoptim / optax", done.stdout, re.M)
    assert json.loads((tmp_path / "numbers.json").read_text())["results"][0]["tree"] == "mlp"
    wrong = subprocess.run([*command, "--trees", "forest"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].endswith("allowed are gpt2, resnet50, 1000x100, 1000-scalars, mlp, table")
