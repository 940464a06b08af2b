"""The checkpoints of each released format, which stay loadable: what is in them, and what wrote them; and helpers.

``python tests/checkpoint_files.py`` writes the file of the current format. Run it once when the format changes; the
files of earlier formats are never written again.
"""

import json
import math
import struct
from collections import Counter, OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxoptim
from jaxoptim import checkpoint
from jaxoptim.optim.state_dicts import StateDict

NAME = "run.safetensors"
FOLDER = Path(__file__).parent / "checkpoints"
PARAMS = {"b": (1,), "w": (2,)}
"""The shapes of the parameters whose optimizers are in the files."""

JAX = ["bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "int4", "uint4"]
JAX += ["float16", "bfloat16", "float32", "complex64"]
FLOAT8 = ["float8_e4m3fn", "float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e4m3fnuz"]
NUMPY = [*JAX, *FLOAT8, "int64", "uint64", "float64", "complex128"]


def floats(*values):
    return jnp.asarray(values, jnp.float32)


def format_1():
    """Every kind of entry that files of format 1 have."""
    options = {"lr": 0.52, "betas": (0.8999999999999999, 0.999), "eps": 1e-08, "weight_decay": 0, "amsgrad": False}
    flags = {"maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None}
    cycle = {"initial_lr": 0.04, "max_lr": 1.0, "min_lr": 4e-06, "max_momentum": 0.95, "base_momentum": 0.85}
    slots = {"step": jnp.float32(1), "exp_avg": floats(0.25, -0.5), "exp_avg_sq": floats(0.0, 1.5)}
    adam = {**options, **flags, "decoupled_weight_decay": False, **cycle, "params": [0, 1]}
    shared = {
        "func_evals": 4, "n_iter": 2, "al": [None, None, None], "d": floats(-0.25, 1.25, 1.5), "t": jnp.float32(1),
        "old_dirs": [floats(-2.5, 0.5, 0.75)], "old_stps": [floats(-0.5, 0.25, 0.25)], "ro": [jnp.float32(0.75)],
        "H_diag": jnp.float32(0.125), "prev_flat_grad": floats(1.0, -3.0, -3.5), "prev_loss": 5.753086090087891,
    }  # fmt: skip
    lbfgs = {
        "lr": 1, "max_iter": 2, "max_eval": 2, "tolerance_grad": 1e-07, "tolerance_change": 1e-09, "history_size": 3,
        "line_search_fn": None, "params": [0, 1],
    }  # fmt: skip
    counts = {"last_epoch": 1, "_step_count": 2, "_is_initial": False, "_get_lr_called_within_step": False}
    phases = [
        {"end_step": 2.0, "start_lr": "initial_lr", "end_lr": "max_lr"}
        | {"start_momentum": "max_momentum", "end_momentum": "base_momentum"},
        {"end_step": 9, "start_lr": "max_lr", "end_lr": "min_lr"}
        | {"start_momentum": "base_momentum", "end_momentum": "max_momentum"},
    ]
    one_cycle = {"total_steps": 10, "_schedule_phases": phases, "_anneal_func_type": "cos", "cycle_momentum": True}
    numbers = np.array([[0, 1, 1], [1, 0, 1]])
    return {
        "Adam": StateDict({"state": {1: slots}, "param_groups": [adam]}, made_by="Adam", names=[["b", "w"]]),
        "LBFGS": StateDict({"state": {0: shared}, "param_groups": [lbfgs]}, made_by="LBFGS", names=[["b", None]]),
        "OneCycleLR": {**one_cycle, "use_beta1": True, "base_lrs": [0.04], **counts, "_last_lr": [0.52]},
        "MultiStepLR": {"milestones": Counter({3: 1, 5: 2}), "gamma": 0.1, "base_lrs": [0.04], **counts},
        "AveragedModel": {"n_averaged": jnp.int32(1), "module.b": floats(1), "module.w": floats(0.75, 0.5)},
        "OptState": jaxoptim.OptState(jnp.int32(3), {"exp_avg": {"w": floats(1, 2), "frozen": None}}, {}),
        "keys": {
            "one": jax.random.wrap_key_data(jnp.arange(2, dtype=jnp.uint32), impl="threefry2x32"),
            "many": jax.random.wrap_key_data(jnp.arange(12, dtype=jnp.uint32).reshape(3, 4), impl="rbg"),
        },
        "JAX": {name: jnp.asarray(numbers.astype(jnp.dtype(name))) for name in (*JAX, *FLOAT8)},
        "NumPy": {name: numbers.astype(jnp.dtype(name)) for name in NUMPY},
        "shapes": [jnp.zeros((0, 3)), np.zeros((2, 0), np.complex128), np.asarray(7), jnp.asarray(1.5, jnp.bfloat16)],
        "scalars": [0.1, -0.0, float("nan"), float("-inf"), 5e-324, 10**40, -1, True, None, "é\n\x00", 1 - 2j],
        "NumPy's": [np.float32(0.1), ml_dtypes.bfloat16(1.5), np.int64(-1), np.bool_(True)],
        "containers": OrderedDict([("b.c", ()), ("a", ([], {})), ("__metadata__", np.arange(2))]),
        (1, ("x", None)): {2: "int", True: "bool", 0.5: "float"},
    }


def format_2():
    """The same, and what is new in files of format 2."""
    slots, counts = {"exp_avg": {"w": floats(1, 2), "late": floats(3)}}, {"w": None, "late": jnp.int32(1)}
    return format_1() | {"OptState with counts": jaxoptim.OptState(jnp.int32(3), slots, {}, counts)}


CONTENTS = {1: format_1, 2: format_2}
"""What the file of each format holds."""


def path_of(version):
    return FOLDER / f"format-{version}.safetensors"


# What the tests of checkpoints share.


def assert_identical(a, b, path=""):
    """Equal in every bit, every type and every order."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert_identical(list(a), list(b), f"the keys of {path}")
        for key in a:
            assert_identical(a[key], b[key], f"{path}.{key}")
        if isinstance(a, StateDict):
            assert (a.made_by, a.names) == (b.made_by, b.names), path
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{path}.{index}")
    elif isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        np.testing.assert_array_equal(jax.random.key_data(a), jax.random.key_data(b), err_msg=path)
    elif isinstance(a, jax.Array | np.ndarray):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
    elif isinstance(a, float):
        assert struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b)), path
    elif isinstance(a, complex):
        assert_identical((a.real, a.imag), (b.real, b.imag), path)
    else:
        assert a == b, path


def reloaded(x, folder, like=None):
    checkpoint.save(folder / NAME, x)
    return checkpoint.load(folder / NAME, like)


def header_of(path):
    """The header of a file by the definition of safetensors, and the JSON of ours in it."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header, json.loads(header["__metadata__"]["jaxoptim"])


def forbidden(*args, **kwargs):
    raise AssertionError("something that can run code was called")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    checkpoint.save(path_of(checkpoint.FORMAT_VERSION), CONTENTS[checkpoint.FORMAT_VERSION]())
