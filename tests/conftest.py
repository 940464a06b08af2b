"""Settings for the whole test session, made before JAX starts."""

import gc
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# Nobody reads from which lines of the source a program is: to write that down is a quarter of the time of lowering it.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import jax
import pytest

from parents import MISSING, left_out, used_in

if "torch" not in MISSING:
    import torch

    torch.set_num_threads(1)
    # oneDNN sums products of bfloat16 in another order on each kind of CPU, so that torch's Muon differs from machine
    # to machine by a unit in the last place of bfloat16 in one number of thousands. torch's own order is the same
    # on all.
    torch.backends.mkldnn.enabled = False

collect_ignore = left_out()

# A program is compiled once for all tests, workers and sessions: most of the time of a test is that of its compiler.
PROGRAMS = Path(__file__).parent.parent / ".pytest_cache" / "programs"
PROGRAMS_BYTES = 2_000_000_000
jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# Examples, notebooks and other processes that tests start compile for each other too.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(PROGRAMS)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_configure(config):
    """Begin anew, once for all workers, when there are more programs on disk than a session has."""
    if MISSING:
        config.option.doctest_ignore_import_errors = True
    is_worker = hasattr(config, "workerinput")
    if not is_worker and PROGRAMS.exists() and sum(x.stat().st_size for x in PROGRAMS.iterdir()) > PROGRAMS_BYTES:
        shutil.rmtree(PROGRAMS)


def pytest_report_header():
    """Say which files of tests are left out because they compare with what is not installed."""
    if not MISSING:
        return []
    return [f"without {', '.join(sorted(MISSING))}: {len(collect_ignore)} files of tests are left out"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave all but the first case of a costly test to the slow suite; skip what needs a parent that is missing."""
    seen = set()
    for item in items:
        marks = [mark.args[0] for mark in item.iter_markers("needs")]
        if isinstance(item, pytest.DoctestItem):
            marks += used_in("".join(example.source for example in item.dtest.examples))
        for name in MISSING.intersection(marks):
            item.add_marker(pytest.mark.skip(reason=f"needs {name}, which is not installed"))
        if item.get_closest_marker("costly") and not item.get_closest_marker("slow"):
            test = item.nodeid.partition("[")[0]
            if test in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(test)


def pytest_collection_finish():
    """Leave all modules and tests out of what the collector looks at: it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def started():
    """Start Python on a script; what is left of it at the end of the test is killed."""
    processes = []

    def start(*command, **environment):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([sys.executable, *map(str, command)], env=os.environ | environment, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
            process.communicate()


@pytest.fixture
def together(started):
    """Start Python on a script as each of some processes, with the arguments ADDRESS PROCESSES INDEX and others."""

    def start(script, count, *arguments, devices):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
        return [started(script, address, count, index, *arguments, XLA_FLAGS=flags) for index in range(count)]

    return start


@pytest.fixture
def only_new_garbage():
    """Let the collector look at what the test makes, and not at all modules each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


_checked = time.monotonic()


@pytest.fixture(autouse=True)
def few_enough_programs():
    """Drop compiled programs before they use up what a process may map into memory, at which XLA crashes.

    A test of random scripts maps thousands of regions in half a minute: time says when to look, not a number of tests.
    """
    yield
    global _checked
    if time.monotonic() - _checked > 5:
        maps = Path("/proc/self/maps")
        if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
            jax.clear_caches()
            gc.collect()
        _checked = time.monotonic()
