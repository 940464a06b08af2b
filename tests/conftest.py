"""Settings for the whole test session, made before JAX starts."""

import gc
import os

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
