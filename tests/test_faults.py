"""Processes that die: the others end, and say why; the run goes on from its last checkpoint, to the same numbers."""

import random
import re
import signal
import time
from pathlib import Path

import chex
import numpy as np
import pytest

from jaxoptim import checkpoint

SCRIPT = Path(__file__).parent / "trained_run.py"
SAID = re.compile(
    r"another task died|Gloo .* failed|heartbeat timeout|coordination service|Shutdown barrier has failed"
)
KILLS = 2


def wait_for_a_save(process):
    """Read what a process prints until its first save; the step from which it has gone on."""
    begun = None
    for line in process.stdout:
        if line.startswith("from "):
            begun = int(line.removeprefix("from "))
        if line == "saved\n":
            return begun
    raise AssertionError(process.communicate())


def ended(processes):
    for output, errors in [process.communicate(timeout=120) for process in processes]:
        assert "saved" in output, errors


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_ends_as_an_undisturbed_one(together, tmp_path):
    rng, folder, done = random.Random(0), tmp_path / "killed", 0
    folder.mkdir()
    for number in range(KILLS):
        processes = together(SCRIPT, 2, folder, 1000, devices=4)
        begun = [wait_for_a_save(process) for process in processes]
        assert begun[0] == begun[1] >= done
        time.sleep(rng.uniform(0, 2))
        victim, other = processes if number % 2 else reversed(processes)
        victim.send_signal(signal.SIGKILL)
        _, errors = other.communicate(timeout=60)
        assert other.returncode not in (0, None)
        assert SAID.search(errors), errors
        victim.communicate()
        done = begun[0] + 1
        assert checkpoint.load(folder / "run.safetensors")["done"] >= done
    steps = checkpoint.load(folder / "run.safetensors")["done"] + 2
    ended(together(SCRIPT, 2, folder, steps - 1, devices=4))
    same = dict(np.load(folder / "end.npz"))
    ended(together(SCRIPT, 1, folder, steps, devices=8))
    fewer = dict(np.load(folder / "end.npz"))
    alone, expected = tmp_path / "undisturbed", []
    alone.mkdir()
    for count in (steps - 1, steps):
        ended(together(SCRIPT, 2, alone, count, devices=4))
        expected.append(dict(np.load(alone / "end.npz")))
    chex.assert_trees_all_equal(same, expected[0])
    chex.assert_trees_all_close(fewer, expected[1], rtol=1e-5, atol=1e-6)
    assert len(list(folder.glob("*.parts"))) <= 2
