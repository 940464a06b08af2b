"""Settings for the whole test session, made before JAX starts."""

import gc
import itertools
import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def only_new_garbage():
    """Let the collector look at what the test makes, and not at all modules each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


_TESTS = itertools.count()


@pytest.fixture(autouse=True)
def few_enough_programs():
    """Drop compiled programs before they use up what a process may map into memory, at which XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if next(_TESTS) % 20 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
