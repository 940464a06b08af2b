"""Checkpoints on disk: every value comes back, damage and malice give an error, and runs go on bit for bit."""

import ast
import dataclasses
import errno
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import checkpoint_files
import jaxoptim
from jaxoptim import checkpoint, optim
from jaxoptim.checkpoint.file import _checksum
from jaxoptim.optim.state_dicts import StateDict
from jaxoptim.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from table import FIRST, STATES

NAME = "run.safetensors"
DTYPES = [*checkpoint_files.NUMPY, "int2", "uint2", "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e8m0fnu"]
WIDE = ("int64", "uint64", "float64", "complex128")
KEYS = {
    "threefry": lambda: jax.random.key(7),
    "rbg": lambda: jax.random.key(7, impl="rbg"),
    "unsafe_rbg": lambda: jax.random.key(7, impl="unsafe_rbg"),
    "batch": lambda: jax.random.split(jax.random.key(7), (2, 3)),
    "rbg-batch": lambda: jax.random.split(jax.random.key(7, impl="rbg"), 3),
    "no-keys": lambda: jax.random.split(jax.random.key(7), 4)[:0],
}


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
        assert struct.pack("d", a) == struct.pack("d", b) or math.isnan(a) and math.isnan(b), path
    elif isinstance(a, complex):
        assert_identical((a.real, a.imag), (b.real, b.imag), path)
    else:
        assert a == b, path


def reloaded(x, folder, like=None):
    checkpoint.save(folder / NAME, x)
    return checkpoint.load(folder / NAME, like)


def crafted(path, tree, arrays=None, **changes):
    """A file of anybody, with a checksum that is right."""
    arrays = {} if arrays is None else arrays
    content = changes.pop("text", None) or json.dumps({"format": 1, "jaxoptim": "0", "tree": tree} | changes)
    metadata = {"jaxoptim": content, "sha256": _checksum(content, arrays)}
    safetensors.numpy.save_file(arrays, path, metadata=metadata)
    return path


def header_of(path):
    """The header of a file by the definition of safetensors, and the JSON of ours in it."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header, json.loads(header["__metadata__"]["jaxoptim"])


# Round trips.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", ["numpy", "jax"])
def test_arrays_of_every_dtype_come_back(dtype, library, tmp_path):
    numbers = np.random.default_rng(0).integers(0, 2, (2, 3, 4)).astype(jnp.dtype(dtype))
    with jax.enable_x64(dtype in WIDE):
        cuts = [numbers, numbers[:, 0], numbers[0, 0, 0], numbers[:, :0], numbers.T, numbers[::-1, ::2, ::-2]]
        arrays = [np.asarray(x) if library == "numpy" else jnp.asarray(x) for x in cuts]
        assert arrays[0].dtype == dtype
        loaded = reloaded(arrays, tmp_path)
        assert_identical(loaded, arrays)
        assert all(x.flags.writeable for x in loaded if library == "numpy")


@pytest.mark.parametrize("bits", [">i2", ">f4", ">c16"])
def test_arrays_of_the_other_byte_order_keep_their_numbers(bits, tmp_path):
    x = np.arange(6).reshape(2, 3).astype(bits)
    loaded = reloaded({"x": x}, tmp_path)["x"]
    np.testing.assert_array_equal(loaded, x)
    assert loaded.dtype.newbyteorder("=") == x.dtype.newbyteorder("=")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "bfloat16", "float32", "float8_e5m2"])
def test_all_bit_patterns_survive_nan_payloads_included(dtype, tmp_path):
    raw = np.random.default_rng(0).bytes(4096)
    x = np.frombuffer(raw, jnp.dtype(dtype))
    loaded = reloaded([x, jnp.asarray(x)], tmp_path)
    assert [np.asarray(y).tobytes() for y in loaded] == [raw, np.asarray(jnp.asarray(x)).tobytes()]


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_typed_keys_come_back_and_go_on(key, tmp_path):
    loaded = reloaded({"key": key()}, tmp_path)["key"]
    assert_identical(loaded, key())
    if key().size:
        first, expected = (jax.random.normal(x.reshape(-1)[0], (3,)) for x in (loaded, key()))
        assert_identical(first, expected)


VALUES = {
    "floats": [0.1, -0.0, 0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf],
    "integers": [0, -1, 2**63, -(2**64), 10**4000],
    "huge-integer": 10**5000,
    "complex": [1 - 2j, complex(math.nan, -0.0), complex(math.inf, -math.inf), 1e-320j],
    "others": [True, False, None, "", "é\0\n\ud7ff\U0001f600", "nan"],
    "surrogates": {"\udc80": "\udcff", "w": np.ones(2)},
    "surrogate-over-an-array": {"\udc80": np.ones(2)},
    "empty": [[], (), {}, OrderedDict(), Counter(), [[]], ((),), {"": {}}],
    "keys": {1: 1, "1": 2, (1, ("a", None)): 3, None: 4, True: 5, 0.5: 6, "b.c": 7, "__metadata__": 8, "dict": 9},
    "arrays-of-one-name": OrderedDict([("a.b", np.ones(1)), ("a", {"b": np.zeros(2), 1: np.ones(3), "1": np.ones(4)})]),
    "metadata": {"__metadata__": np.ones(2), "": np.zeros(1), "array": np.ones(1), "__metadata__ (2)": np.ones(3)},
    "order": [{"b": 1, "a": np.ones(1)}, OrderedDict([(2, 0), (1, 0)]), Counter({"z": 3, "y": 7})],
    "tags": [{"tuple": [1]}, {"array": "x"}, {"float": "nan"}, {"dict": [["a", 1]]}, {"node": [], "type": "OptState"}],
    "StateDict": StateDict({"state": {0: {"m": np.ones(2)}}}, made_by="Adam", names=[["a", None], []]),
    "OptState": jaxoptim.OptState(jnp.int32(1), {"m": {"w": jnp.ones(2), "v": None}}, (1, [2])),
    "root-array": np.arange(3),
    "root-number": -0.0,
    "root-None": None,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_data_of_every_kind_comes_back_exactly(value, tmp_path):
    assert_identical(reloaded(value, tmp_path), value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.float32(0.1), float(np.float32(0.1))),
        (ml_dtypes.bfloat16(1.5), 1.5),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(True), True),
        (np.complex64(1 + 2j), 1 + 2j),
        (np.longdouble(0.5), 0.5),
        (defaultdict(list, {"a": [1]}), {"a": [1]}),
    ],
    ids=["float32", "bfloat16", "uint64", "bool", "complex64", "longdouble", "defaultdict"],
)
def test_what_has_no_entry_of_its_own_comes_back_as_the_plain_thing(given, expected, tmp_path):
    assert_identical(reloaded({"x": given}, tmp_path)["x"], expected)


def arrays_of(drawn):
    seed, dtype, shape, is_jax = drawn
    x = np.random.default_rng(seed).integers(0, 2, shape).astype(jnp.dtype(dtype))
    return jnp.asarray(x) if is_jax and dtype not in WIDE else x


SHAPES = st.lists(st.integers(0, 3), max_size=3)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text()
    | st.tuples(st.integers(0, 99), st.sampled_from(DTYPES), SHAPES, st.booleans()).map(arrays_of)
)  # fmt: skip
NAMES = st.text(max_size=3) | st.integers() | st.sampled_from(["a.b", "a", "b", "__metadata__", "0"])
NAMES |= st.tuples(NAMES, NAMES)
TREES = st.recursive(
    LEAVES,
    lambda trees: (
        st.lists(trees, max_size=3)
        | st.lists(trees, max_size=3).map(tuple)
        | st.dictionaries(NAMES, trees, max_size=3)
        | st.dictionaries(NAMES, trees, max_size=3).map(OrderedDict)
        | st.dictionaries(NAMES, st.integers(), max_size=3).map(Counter)
        | st.dictionaries(NAMES, trees, max_size=2).map(lambda x: StateDict(x, made_by="Mine", names=[["a"], []]))
        | st.tuples(trees, trees, trees).map(lambda x: jaxoptim.OptState(*x))
    ),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(tree=TREES)
def test_generated_trees_come_back(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "generated.safetensors"
    checkpoint.save(path, tree)
    assert_identical(checkpoint.load(path), tree)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (lambda: 0, "'a.0.f' is function"),
        (b"bytes", "'a.0.f' is bytes"),
        ({1, 2}, "'a.0.f' is set"),
        (np.array(["x"]), "'a.0.f' has dtype"),
        (np.array([object()]), "'a.0.f' has dtype object"),
        (np.zeros(1, [("x", "f4")]), "'a.0.f' has dtype"),
        (np.array(["2020"], "M8[D]"), "'a.0.f' has dtype"),
        (np.datetime64(10**9, "ns"), "'a.0.f' is datetime64"),
        (jax.ShapeDtypeStruct((), jnp.float32), "'a.0.f' is ShapeDtypeStruct"),
    ],
    ids=["function", "bytes", "set", "strings", "objects", "records", "dates", "date", "abstract"],
)
def test_what_is_no_data_is_refused_with_its_path(value, where, tmp_path):
    with pytest.raises(TypeError, match=re.escape(where)):
        checkpoint.save(tmp_path / NAME, {"a": [{"f": value}]})
    assert os.listdir(tmp_path) == []


def test_saving_inside_of_a_compiled_function_is_refused(tmp_path):
    with pytest.raises(TypeError, match="'w' is traced"):
        jax.jit(lambda x: checkpoint.save(tmp_path / NAME, {"w": x}))(1.0)


@pytest.mark.parametrize("dtype", WIDE)
def test_wide_arrays_are_not_narrowed_in_silence(dtype, tmp_path):
    with jax.enable_x64(True):
        checkpoint.save(tmp_path / NAME, {"a": [jnp.ones(2, dtype)], "n": np.ones(2, dtype)})
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match=rf"'a\.0' has dtype {dtype}.*jax_enable_x64"):
            checkpoint.load(tmp_path / NAME)
        half = {"complex128": jnp.complex64, "float64": jnp.float32}.get(dtype, jnp.int32)
        like = {"a": [jnp.zeros(2, half)], "n": np.zeros(2, half)}
        assert_identical(checkpoint.load(tmp_path / NAME, like), jax.tree.map(lambda x: x + 1, like))
    with jax.enable_x64(True):
        assert checkpoint.load(tmp_path / NAME)["a"][0].dtype == dtype


# Structures that only like= can make.


class Pair(NamedTuple):
    left: object
    right: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Point:
    x: object
    y: object
    name: str = dataclasses.field(default="here", metadata={"static": True})


def train_state():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16)}
    tx = optax.chain(optax.clip(1.0), jaxoptim.adam(0.1), optax.trace(0.9), optax.masked(optax.adam(0.1), True))
    return params, tx.update(params, tx.init(params), params)[1]


STRUCTURES = {
    "OptState": lambda: jaxoptim.adam(0.1).init({"w": jnp.ones((2, 3)), "v": {"x": jnp.ones(2)}}),
    "optax": train_state,
    "NamedTuple": lambda: Pair(jnp.arange(3), Pair({"k": jax.random.key(3)}, None)),
    "dataclass": lambda: [Point(jnp.ones(2), Point(None, (jnp.arange(2),))), 3, "text", 0.5, True],
    "equinox": lambda: eqx.filter(eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0)), eqx.is_array),
    "flax": lambda: nn.BatchNorm(use_running_average=False).init(jax.random.key(0), jnp.ones((2, 3))),
    "nnx": lambda: nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
    "packed": lambda: jaxoptim.pack({"w": jnp.arange(6.0), "b": jnp.ones(2, jnp.bfloat16)}),
    "keys": lambda: {"a": jax.random.split(jax.random.key(0), (2, 3)), "b": [jax.random.key(1, impl="rbg")]},
    "containers": lambda: OrderedDict(z=[jnp.ones(1)], a=defaultdict(list, {1: (np.ones(2), None)})),
    "StateDict": lambda: optim.Adam({"w": jnp.ones(2)}).state_dict(),
    "root": lambda: jnp.arange(3.0),
}


@pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES)
def test_any_tree_comes_back_in_the_structure_of_another(make, tmp_path):
    tree = make()
    other = jax.tree.map(lambda x: jnp.zeros_like(x) if isinstance(x, jax.Array) else x, tree)
    for like in (tree, other):
        loaded = reloaded(tree, tmp_path, like)
        assert jax.tree.structure(loaded) == jax.tree.structure(tree)
        assert_identical(jax.tree.leaves(loaded), jax.tree.leaves(tree))
    arrays, rest = eqx.partition(tree, eqx.is_array)
    loaded = reloaded(tree, tmp_path, eqx.combine(jax.eval_shape(lambda: arrays), rest))
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    expected = [jnp.asarray(x) if isinstance(x, np.ndarray) and x.dtype not in WIDE else x for x in jax.tree.leaves(tree)]
    for x, y in zip(jax.tree.leaves(loaded), expected, strict=True):
        if eqx.is_array(y) and not jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        else:
            assert_identical(x, y)


@pytest.mark.parametrize("abstract", [False, True], ids=["concrete", "abstract"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def test_arrays_go_where_those_of_like_are(axis_type, abstract, tmp_path):
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    places = [NamedSharding(mesh, P(*spec)) for spec in (("x", "y"), ("y",), (None, "x"), ())]
    values = [np.random.default_rng(n).normal(size=(8, 4)).astype(np.float32) for n in range(4)]
    tree = [jax.device_put(x, place) for x, place in zip(values, places, strict=True)]
    tree.append(jax.device_put(jax.random.split(jax.random.key(0), 8), NamedSharding(mesh, P("x"))))
    tree.append(jax.device_put(jnp.ones(2, jnp.bfloat16), jax.devices()[5]))
    turned = [*tree[1:4], tree[0], *tree[4:]]
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in turned] if abstract else turned
    loaded = reloaded(tree, tmp_path, like)
    assert [x.sharding for x in loaded] == [x.sharding for x in turned]
    assert_identical([jax.device_get(x) for x in loaded[:4]], values)
    assert_identical(loaded[4:], tree[4:])
    assert_identical([np.asarray(x) for x in checkpoint.load(tmp_path / NAME)[:4]], values)


W = {"w": jnp.ones((2, 3))}


@pytest.mark.parametrize(
    ("saved", "like", "message"),
    [
        (W, {"v": jnp.ones((2, 3))}, "nothing at 'v'"),
        (W, {"w": {"x": jnp.ones(1)}}, "nothing at 'w.x'"),
        ({"a": [W, W]}, {"a": [W]}, "something that like lacks at 'a.1.w'"),
        (W, {"w": None}, "something that like lacks at 'w'"),
        ({"w": None}, W, "nothing at 'w'"),
        (jnp.ones(1), W, "nothing at 'w'"),
        ({"a": W}, {"a": {"w": jnp.ones((3, 2))}}, r"'a\.w' has shape \(2, 3\) in the checkpoint, \(3, 2\)"),
        ({"w": jnp.ones(())}, {"w": jnp.ones((1,))}, r"'w' has shape \(\)"),
        ({"a": [jnp.ones(2)]}, {"a": [jnp.ones(2, jnp.int32)]}, r"'a\.0' has dtype float32 .* int32 cannot hold"),
        ({"w": jnp.ones(2, jnp.complex64)}, {"w": jnp.ones(2)}, "'w' has dtype complex64"),
        ({"w": jnp.ones(2, jnp.int32)}, {"w": jnp.ones(2, bool)}, "'w' has dtype int32"),
        ({"w": np.array([300])}, {"w": jnp.ones(1, jnp.int8)}, "'w' .*int8"),
        ({"n": 300}, {"n": jnp.zeros((), jnp.int8)}, "'n' .*int8"),
        ({"n": 10**30}, {"n": jnp.zeros(())}, "'n'"),
        ({"n": "text"}, {"n": jnp.zeros(())}, "'n'"),
        ({"n": "text"}, {"n": 1.0}, "'n' is str in the checkpoint, float in like"),
        ({"n": jnp.ones(())}, {"n": 1.0}, "'n' is .*Array.* in the checkpoint, float in like"),
        ({"k": jax.random.key(0)}, {"k": jnp.zeros(2, jnp.uint32)}, "'k' is a PRNG key in the checkpoint"),
        ({"k": jnp.zeros(2, jnp.uint32)}, {"k": jax.random.key(0)}, "'k' is no PRNG key in the checkpoint"),
        ({"k": jax.random.key(0)}, {"k": jax.random.key(0, impl="rbg")}, "'k' is a key<fry> in the checkpoint, key<rbg>"),
        ({"k": jax.random.split(jax.random.key(0))}, {"k": jax.random.key(0)}, "'k' has shape"),
        (OrderedDict([(1, W), ("1", W)]), OrderedDict([(1, W), ("1", W)]), "'1.w'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_an_error_with_its_path(saved, like, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        reloaded(saved, tmp_path, like)


def test_dtypes_follow_like_within_what_they_can_hold(tmp_path):
    saved = [np.ones(2, bool), np.arange(2), np.float64([0.1, 1e-3]), np.ones(2, np.complex128), 7, 0.25, True]
    like = [jnp.zeros(2, x) for x in (jnp.int8, jnp.bfloat16, jnp.float32, jnp.complex64)]
    like += [jnp.zeros((), x) for x in (jnp.float32, jnp.float16, jnp.int32)]
    expected = [jnp.asarray(x, y.dtype) for x, y in zip(saved, like, strict=True)]
    assert_identical(reloaded(saved, tmp_path, like), expected)


@pytest.mark.parametrize("node", [Pair(1, 2), Point(1, 2), optax.EmptyState()], ids=lambda node: type(node).__name__)
def test_a_node_without_like_is_an_error_that_asks_for_it(node, tmp_path):
    with pytest.raises(ValueError, match=rf"a {type(node).__name__} at 'a\.0'.*like="):
        reloaded({"a": [node]}, tmp_path)


# What is in a file.


def forbidden(*args, **kwargs):
    raise AssertionError("something that can run code was called")


def run_of(steps=2):
    """Everything that a run has."""
    opt = optim.Adam({"b": jnp.ones(1), "w": jnp.ones(2)}, lr=0.25, betas=(0.5, 0.75))
    scheduler, averaged = optim.lr_scheduler.MultiStepLR(opt, [1, 9]), AveragedModel(opt)
    for _ in range(steps):
        opt.step({"b": None, "w": jnp.ones(2)})
        scheduler.step()
        averaged.update_parameters(opt)
    return {
        "params": opt.params, "opt": opt.state_dict(), "scheduler": scheduler.state_dict(),
        "averaged": averaged.state_dict(), "key": jax.random.key(0), "lr": float("nan"),
    }  # fmt: skip


def test_a_file_is_plain_safetensors_and_json(tmp_path, monkeypatch):
    run, path = run_of(), tmp_path / NAME
    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load"), (np, "load")):
        monkeypatch.setattr(module, name, forbidden)
    for name in ("dumps", "dump", "Pickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    checkpoint.save(path, run)
    assert_identical(checkpoint.load(path), run)
    header, content = header_of(path)
    assert content["format"] == checkpoint.FORMAT_VERSION == 1
    assert content["jaxoptim"] == jaxoptim.__version__
    tree = dict(content["tree"]["dict"])
    assert (tree["opt"]["class"], tree["opt"]["names"]) == ("Adam", [["b", "w"]])
    (group,) = dict(tree["opt"]["dict"])["param_groups"]
    options = dict(group["dict"])
    assert (options["lr"], options["betas"], options["amsgrad"]) == (0.025, {"tuple": [0.5, 0.75]}, False)
    assert dict(tree["scheduler"]["dict"])["last_epoch"] == 2
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == header.keys() - {"__metadata__"}
    assert {"params.w", "opt.state.1.exp_avg", "averaged.module.w", "key"} <= set(tensors)
    np.testing.assert_array_equal(tensors["opt.state.1.exp_avg"], run["opt"]["state"][1]["exp_avg"])


# Damage, and files of others.


def small(folder):
    """A small file, and one before it."""
    tree = {"f": jnp.arange(2.0), "c": np.ones(1, complex), "k": jax.random.key(0), "t": (1, None, "x", -0.5)}
    for _ in range(2):
        checkpoint.save(folder / NAME, tree, keep=2)
    return folder / NAME, (folder / NAME).read_bytes()


def check_damaged(path, raw):
    path.write_bytes(raw)
    try:
        checkpoint.load(path)
    except ValueError as error:
        assert str(path) in str(error), error
        assert str(path.with_name("run.1.safetensors")) in str(error), error
    else:
        raise AssertionError(f"loaded in silence: {raw}")


BITS = [pytest.param(slice(part, None, 8), id=f"{part}/8", marks=pytest.mark.slow) for part in range(8)]


@pytest.mark.parametrize("some", [pytest.param(slice(3, None, 13), id="sample"), *BITS])
def test_every_flipped_bit_is_seen(some, tmp_path):
    path, raw = small(tmp_path)
    for bit in range(8 * len(raw))[some]:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        check_damaged(path, flipped)


def test_every_truncation_and_extension_is_seen(tmp_path):
    path, raw = small(tmp_path)
    for size in range(len(raw)):
        check_damaged(path, raw[:size])
    for more in (b"\0", b"x" * 1000, raw):
        check_damaged(path, raw + more)
    rng = random.Random(0)
    for _ in range(200):
        start = rng.randrange(len(raw))
        zeroed = raw[:start] + bytes(min(64, len(raw) - start)) + raw[start + 64 :]
        if zeroed != raw:
            check_damaged(path, zeroed)


def test_arrays_that_change_places_are_seen(tmp_path):
    path = tmp_path / NAME
    checkpoint.save(path, {"aaaa": np.arange(2.0), "bbbb": np.arange(2.0) + 5})
    path.write_bytes(path.read_bytes().replace(b'"aaaa"', b'"cccc"').replace(b'"bbbb"', b'"aaaa"').replace(b"cccc", b"bbbb"))
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(path)


def test_an_error_through_a_link_names_the_earlier_checkpoint_too(tmp_path):
    (tmp_path / "real").mkdir()
    path, raw = small(tmp_path / "real")
    path.write_bytes(raw[:-1])
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    with pytest.raises(ValueError, match=re.escape("run.1.safetensors")):
        checkpoint.load(link)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def by_torch(path, payload, zipped=True):
    torch.save({"w": torch.ones(2), "x": payload}, path, _use_new_zipfile_serialization=zipped)


FOREIGN = {
    "torch": (by_torch, r"torch\.save or pickle.*weights_only"),
    "torch-legacy": (lambda path, x: by_torch(path, x, zipped=False), r"torch\.save or pickle"),
    "pickle": (lambda path, x: path.write_bytes(pickle.dumps(x)), r"torch\.save or pickle"),
    "pickle-0": (lambda path, x: path.write_bytes(pickle.dumps(x, 0)), "no checkpoint"),
    "npy": (lambda path, x: np.save(path.open("wb"), np.array([x]), allow_pickle=True), "no checkpoint"),
    "npz": (lambda path, x: np.savez(path.open("wb"), x=np.ones(2)), "."),
    "empty": (lambda path, x: path.write_bytes(b""), "no checkpoint"),
    "random": (lambda path, x: path.write_bytes(random.Random(0).randbytes(5000)), "no checkpoint"),
    "zeros": (lambda path, x: path.write_bytes(bytes(5000)), "no checkpoint"),
    "text": (lambda path, x: path.write_text("import os; os.mkdir('x')"), "no checkpoint"),
    "safetensors": (lambda path, x: safetensors.numpy.save_file({"w": np.ones(2)}, path), "no checkpoint of jaxoptim"),
    "no-arrays": (lambda path, x: safetensors.numpy.save_file({}, path, {"format": "pt"}), "no checkpoint of jaxoptim"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("write", "message"), FOREIGN.values(), ids=FOREIGN)
def test_files_of_others_are_named_and_not_run(write, message, tmp_path):
    path, made = tmp_path / NAME, tmp_path / "made"
    write(path, Payload(made))
    for like in (None, {"w": jnp.ones(2)}):
        with pytest.raises(ValueError, match=message) as caught:
            checkpoint.load(path, like)
        assert str(path) in str(caught.value)
    assert not made.exists()


def test_a_file_that_is_not_there_is_that_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / NAME)
    with pytest.raises(FileNotFoundError, match="folder"):
        checkpoint.save(tmp_path / "none" / NAME, {})


NEWER = {
    "same-body": '{"format": 2, "jaxoptim": "9.0", "tree": {"dict": []}}',
    "other-body": '{"format": 2, "jaxoptim": "9.0", "tree": {"quantum": 1}}',
    "no-tree": '{"format": 2, "jaxoptim": "9.0", "body": []}',
    "much-newer": '{"format": 1000, "jaxoptim": "9.0", "tree": 1}',
}


@pytest.mark.parametrize("text", NEWER.values(), ids=NEWER)
def test_a_newer_format_says_what_to_upgrade(text, tmp_path):
    path = crafted(tmp_path / NAME, None, {"w": np.ones(2)}, text=text)
    with pytest.raises(ValueError, match=r"format 1?0*2?, of jaxoptim 9\.0.*Upgrade") as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)


ARRAYS = {"a": np.arange(4, dtype=np.uint8).reshape(1, 4), "u": np.zeros(2, np.uint32), "e": np.zeros((0, 4), np.uint8)}
HOSTILE = r"""
{} {"x": 1} {"list": []} {"__class__": "os.system"} {"__reduce__": ["os.system", ["true"]]}
{"dict": 5} {"dict": None} {"dict": "ab"} {"dict": {"a": 1}} {"dict": ["ab"]} {"dict": [["a"]]} {"dict": [["a", 1, 2]]}
{"dict": [[[1], 2]]} {"dict": [[{"dict": []}, 2]]} {"dict": [[{"array": "a"}, 2]]} {"dict": [[{"numpy": "a"}, 2]]}
{"dict": [], "class": "os.system"} {"dict": [], "class": {"a": 1}, "names": []} {"dict": [], "class": "A", "names": 5}
{"dict": [], "class": "A", "names": [5]} {"dict": [], "class": "A", "names": [[{"x": 1}]]} {"Counter": [[["x"], 1]]}
{"tuple": 5} {"tuple": {"a": 1}} {"OrderedDict": 1} {"Counter": {}} {"defaultdict": []} {"set": [1]}
{"float": []} {"float": "1"} {"float": 1} {"float": None} {"complex": 1} {"complex": [1, 2, 3]} {"complex": ["1", 2]}
{"complex": ["abc"]} {"complex": [[1], 0]} {"complex": [None, 0]} {"complex": [10**400, 0]} {"complex": []}
{"array": "no"} {"array": 5} {"array": None} {"array": ["a"]} {"numpy": "no"} {"numpy": {"array": "a"}}
{"array": "a", "dtype": "object"} {"numpy": "a", "dtype": "object"} {"numpy": "a", "dtype": "O"}
{"array": "a", "dtype": "datetime64"} {"numpy": "a", "dtype": "datetime64[s]"} {"numpy": "a", "dtype": "M8[D]"}
{"array": "a", "dtype": "S4"} {"numpy": "a", "dtype": "S4"} {"numpy": "a", "dtype": "V4"} {"numpy": "a", "dtype": "<U1"}
{"array": "a", "dtype": "i2,i2"} {"numpy": "a", "dtype": "i2,i2"} {"numpy": "a", "dtype": [["a", "i4"]]}
{"numpy": "a", "dtype": {"names": ["a"], "formats": ["i4"]}} {"numpy": "a", "dtype": 5} {"numpy": "a", "dtype": None}
{"numpy": "a", "dtype": "(,f4"} {"array": "a", "dtype": "(1,f4"} {"numpy": "a", "dtype": "(2,)i2"} {"numpy": "a", "dtype": ""}
{"numpy": "a", "dtype": "(99999999999,)f4"} {"numpy": "a", "dtype": "float64"} {"array": "a", "dtype": ">f4"}
{"numpy": "a", "dtype": "os.system"} {"numpy": "e", "dtype": "(2,)V2"} {"array": "u", "dtype": "float32"}
{"array": "u", "key": "os.system"} {"array": "u", "key": 5} {"array": "u", "key": None} {"array": "u", "key": []}
{"array": "u", "key": {"a": 1}} {"array": "u", "key": "rbg"} {"array": "a", "key": "threefry2x32"} {"numpy": "u", "key": "rbg"}
{"node": 5, "type": "OptState"} {"node": None, "type": "OptState"} {"node": "", "type": "OptState"} {"node": []}
{"node": [["foo", 1]], "type": "OptState"} {"node": [["step", 1]], "type": "OptState"} {"node": [], "type": "OptState"}
{"node": [[["x"], 1]], "type": "OptState"} {"node": [[1, 1]], "type": "OptState"} {"node": [["a", 1]], "type": "os.system"}
{"node": [["a", 1]], "type": ["x"]} {"node": [["a", 1]], "type": 5} {"node": [["a", 1]], "type": None}
"""  # the grammar of Python's literals, so that integers may be huge
LIKES = [None, *({"q": x} for x in (jnp.zeros(()), jnp.zeros(1), 1.0, np.zeros((1, 4)), jaxoptim.OptState(1, 2, 3)))]


def hostile():
    for text in re.findall(r"\{.*?\}(?= \{|\n|$)", HOSTILE):
        tree = ast.literal_eval(text.replace("10**400", "1" + "0" * 400))
        yield pytest.param(tree, id=text)


@pytest.mark.parametrize("tree", hostile())
def test_malice_with_a_right_checksum_is_only_an_error(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "system", forbidden)
    for root in (tree, {"dict": [["q", tree]]}, {"tuple": [[tree]]}):
        path = crafted(tmp_path / NAME, root, ARRAYS)
        with pytest.raises(ValueError, match="checkpoint"):
            checkpoint.load(path)
    path = crafted(tmp_path / NAME, {"dict": [["q", tree]]}, ARRAYS)
    for like in (*LIKES, {"q": jax.random.key(0)}):
        with pytest.raises(ValueError, match="checkpoint|in like"):
            checkpoint.load(path, like)


TEXTS = {
    "no-object": "[1]",
    "no-version": '{"tree": 1}',
    "version-is-text": '{"format": "1", "tree": 1}',
    "version-is-a-list": '{"format": [], "tree": 1}',
    "no-tree": '{"format": 1}',
    "deep-lists": f'{{"format": 1, "tree": {"[" * 100_000}{"]" * 100_000}}}',
    "deep-tuples": f'{{"format": 1, "tree": {chr(123) + chr(34) + "tuple" + chr(34) + ":[" * 1}{"1]}"}}}',
    "deeper-than-the-stack": f'{{"format": 1, "tree": {"[" * 900}{"]" * 900}}}',
    "deep-complex": '{"format": 1, "tree": ' + '{"complex": [' * 400 + "]}" * 400 + "}",
    "deep-nodes": '{"format": 1, "tree": ' + '{"node": [["a", ' * 20_000 + "1" + ']], "type": "T"}' * 20_000 + "}",
    "huge-integer": f'{{"format": 1, "tree": {"9" * 100_000}}}',
    "huge-version": f'{{"format": {"9" * 4000}, "tree": 1}}',
}
del TEXTS["deep-tuples"]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_metadata_of_no_sense_is_an_error(text, tmp_path):
    with pytest.raises(ValueError, match=re.escape(NAME)) as caught:
        checkpoint.load(crafted(tmp_path / NAME, None, text=text))
    assert len(str(caught.value)) < 10_000


def raw_file(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(shape, begin=0, end=8, dtype="F32"):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


HEADERS = {
    "huge-header": raw_file({}, size=2**63),
    "large-header": raw_file({}, size=2**33),
    "huge-shape": raw_file(entry([2**40]), bytes(8)),
    "overflowing-shape": raw_file(entry([2**32, 2**32, 2]), bytes(8)),
    "empty-huge": raw_file(entry([0, 2**62, 2**62], 0, 0)),
    "negative": raw_file(entry([-2]), bytes(8)),
    "outside": raw_file(entry([2], 2**40, 2**40 + 8), bytes(8)),
    "overlapping": raw_file(entry([2]) | {"v": entry([2], 4, 12)["w"]}, bytes(12)),
    "dtype": raw_file(entry([1], dtype="OBJECT"), bytes(8)),
    "list": raw_file([1]),
    "no-json": raw_file(b"\xff{}"),
    "metadata-of-lists": raw_file({"__metadata__": {"jaxoptim": [1], "sha256": "0"}}),
    "deep": raw_file(b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
}


@pytest.mark.parametrize("raw", HEADERS.values(), ids=HEADERS)
def test_a_header_of_no_sense_takes_no_memory(raw, tmp_path):
    (tmp_path / NAME).write_bytes(raw)
    checkpoint.load(checkpoint_files.path_of(1))  # the imports
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=re.escape(NAME)):
            checkpoint.load(tmp_path / NAME)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


NASTY = [None, True, -1, 10**30, 1e308, "", "a", "object", [], {}, [[]], [1, 2], {"a": 1}, [["a", 1]], {"array": "a"}]


def mutated(x, rng):
    """The tree with one place changed, chosen so that each depth has its share."""
    if rng.random() < 0.15 or not isinstance(x, list | dict) or not x:
        return rng.choice(NASTY)
    x = x.copy()
    key = rng.choice(list(x) if isinstance(x, dict) else range(len(x)))
    kind = rng.random()
    if kind < 0.08:
        x.pop(key)
    elif kind < 0.16 and isinstance(x, dict):
        x = {rng.choice(["dict", "tuple", "node", "complex", "numpy", "float", "Counter"]): x.pop(key), **x}
    else:
        x[key] = mutated(x[key], rng)
    return x


@pytest.mark.parametrize("seed", range(4))
def test_mutations_of_a_file_load_or_are_an_error(seed, tmp_path):
    tree = header_of(checkpoint_files.path_of(1))[1]["tree"]
    arrays, rng, like = safetensors.numpy.load_file(checkpoint_files.path_of(1)), random.Random(seed), None
    arrays = {name: x for name, x in arrays.items() if x.size < 100}
    others, errors = {}, 0
    for _ in range(100):
        bad = mutated(tree, rng)
        path = crafted(tmp_path / NAME, bad, arrays)
        for like in (None, {"JAX": jnp.zeros(1)}):
            try:
                checkpoint.load(path, like)
            except ValueError:
                errors += 1
            except Exception as error:
                others.setdefault((type(error).__name__, str(error)[:80]), bad)
    assert errors > 50
    assert not others, list(others)


# Whole or not at all.


class Full(OSError):
    pass


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


FAILURES = {
    "replace": lambda patch: patch.setattr(Path, "replace", raising(Full())),
    "fsync": lambda patch: patch.setattr(os, "fsync", raising(Full())),
    "write": lambda patch: patch.setattr(safetensors.numpy, "save_file", raising(Full())),
    "interrupt": lambda patch: patch.setattr(os, "fsync", raising(KeyboardInterrupt())),
    "memory": lambda patch: patch.setattr(json, "dumps", raising(MemoryError())),
    "mode": lambda patch: patch.setattr("shutil.copymode", raising(Full())),
}


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_save_that_fails_leaves_all_as_it_was(failure, keep, tmp_path, monkeypatch):
    path = tmp_path / NAME
    for n in (1, 2):
        checkpoint.save(path, n, keep=keep)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch, pytest.raises((Full, KeyboardInterrupt, MemoryError)):
        failure(patch)
        checkpoint.save(path, 3, keep=keep)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(TypeError, match="'a.1'"):
        checkpoint.save(path, {"w": np.ones(2), "a": [1, print]}, keep=keep)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    checkpoint.save(path, 4, keep=keep)
    assert checkpoint.load(path) == 4


def test_a_full_disk_is_an_error_of_the_disk_and_the_old_file_stays(tmp_path):
    checkpoint.save(tmp_path / NAME, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(NAME)) as caught:
            checkpoint.save(tmp_path / NAME, np.ones(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno in (None, errno.EFBIG)
    assert os.listdir(tmp_path) == [NAME]
    assert checkpoint.load(tmp_path / NAME) == 1


def kept(path):
    """What the checkpoints hold, the newest first."""
    names = [path, *(path.with_name(f"{path.stem}.{n}{path.suffix}") for n in range(1, 9))]
    return [checkpoint.load(name) if name.exists() else None for name in names]


@pytest.mark.parametrize("name", [NAME, "run", "run.v2.safetensors", "r[1]*.safetensors"])
def test_the_last_checkpoints_are_kept_in_order(name, tmp_path):
    path = tmp_path / name
    for n in range(1, 7):
        checkpoint.save(path, n, keep=3)
        assert kept(path)[:4] == [n, *(n - k if n > k else None for k in (1, 2)), None]
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize("crash", range(1, 5))
@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_no_checkpoint_is_lost_when_keeping_is_cut_short(crash, links, tmp_path, monkeypatch):
    path, replace, done = tmp_path / NAME, Path.replace, []

    def replace_some(self, target):
        if len(done) == crash - 1:
            raise Full
        done.append(target)
        return replace(self, target)

    if not links:
        monkeypatch.setattr(os, "link", raising(OSError(errno.EPERM, "no links")))
    for n in range(1, 6):
        checkpoint.save(path, n, keep=4)
    with monkeypatch.context() as patch, pytest.raises(Full):
        patch.setattr(Path, "replace", replace_some)
        checkpoint.save(path, 6, keep=4)
    assert kept(path)[0] == 5
    left = [n for n in kept(path) if n is not None]
    assert left == sorted(left, reverse=True)
    assert set(left) >= {5, 4, 3}
    checkpoint.save(path, 7, keep=4)
    assert kept(path) == [7, 5, 4, 3, *[None] * 5]


@pytest.mark.parametrize("keep", [0, -1, True, 1.0, "2", None], ids=repr)
def test_keep_must_be_a_positive_integer(keep, tmp_path):
    with pytest.raises(ValueError, match="keep is the number of checkpoints"):
        checkpoint.save(tmp_path / NAME, 1, keep=keep)


def test_a_reader_always_finds_a_whole_checkpoint(tmp_path):
    path, seen, errors, stop = tmp_path / NAME, [], [], threading.Event()
    checkpoint.save(path, {"n": 0, "w": np.zeros(30_000)}, keep=2)
    checkpoint.save(path, {"n": 0, "w": np.zeros(30_000)}, keep=2)

    def read():
        while not stop.is_set():
            try:
                for name in (NAME, "run.1.safetensors"):
                    run = checkpoint.load(tmp_path / name)
                    assert (run["w"] == run["n"]).all()
                    seen.append(run["n"]) if name == NAME else None
            except BaseException as error:
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(1, 301):
        checkpoint.save(path, {"n": n, "w": np.full(30_000, n)}, keep=2)
    stop.set()
    reader.join()
    assert errors == []
    assert seen == sorted(seen)
    assert len(set(seen)) > 10


def test_leftovers_of_dead_processes_are_removed_and_no_others(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    name, host = "run[1].safetensors", socket.gethostname()
    stays = [
        f".{name}.{host}.{os.getppid()}.a.partial",  # of a process that runs
        f".{name}.{host}.1.a.partial",
        f".{name}.another-{host}.{process.pid}.a.partial",  # of another machine
        f".other-{name}.{host}.{process.pid}.a.partial",  # of another checkpoint
        f".{name}.{host}.{process.pid}.a.part",
    ]
    goes = [f".{name}.{host}.{process.pid}.{part}.partial" for part in "ab"]
    for left in (*stays, *goes):
        (tmp_path / left).mkdir()
        (tmp_path / left / name).write_bytes(b"half")
    checkpoint.save(tmp_path / name, 1)
    assert sorted(os.listdir(tmp_path)) == sorted([name, *stays])


def test_the_mode_of_the_old_file_is_kept(tmp_path):
    checkpoint.save(tmp_path / NAME, 1)
    for mode in (0o640, 0o444, 0o600):
        (tmp_path / NAME).chmod(mode)
        checkpoint.save(tmp_path / NAME, 2, keep=2)
        assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == mode


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    checkpoint.save(tmp_path / NAME, 1)
    assert (tmp_path / NAME).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    link, path = tmp_path / "link.safetensors", tmp_path / "real" / NAME
    link.symlink_to(Path("real") / NAME)
    for n in range(3):
        checkpoint.save(link, n, keep=2)
    assert link.is_symlink()
    assert kept(path)[:3] == [2, 1, None]
    assert checkpoint.load(link) == 2
    assert sorted(os.listdir(tmp_path)) == ["link.safetensors", "real"]


# Runs that go on.


class Run:
    """A training run: optimizer, schedulers, averaged model and key."""

    def __init__(self, make, params, schedule=None, sparse=False, loss=None):
        self.make, self.schedule, self.sparse, self.loss = make, schedule, sparse, loss
        self.begin(params)
        self.key, self.done = jax.random.key(5), 0

    def begin(self, params):
        self.opt = self.make(params)
        self.schedulers = self.schedule(self.opt) if self.schedule else []
        self.averaged = AveragedModel(self.opt, multi_avg_fn=get_ema_multi_avg_fn(0.75))

    def gradient(self, name, x, noise):
        if name == "late" and self.done % 3:
            return None
        values = np.resize(noise, x.shape)
        if self.sparse:
            return BCOO((jnp.asarray(values[:2]), jnp.array([[3], [1]])), shape=x.shape)
        return (values * (1 + 2j) if jnp.iscomplexobj(x) else values).astype(x.dtype)

    def steps(self, count):
        for _ in range(count):
            self.key, subkey = jax.random.split(self.key)
            noise = np.asarray(jax.random.normal(subkey, (40,)))
            if self.loss:
                self.opt.minimize(self.loss, noise)
            else:
                self.opt.step({name: self.gradient(name, x, noise) for name, x in self.opt.params.items()})
            for scheduler in self.schedulers:
                is_plateau = isinstance(scheduler, optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*[float(noise[0]) + 3] if is_plateau else [])
            self.averaged.update_parameters(self.opt)
            self.done += 1

    def everything(self):
        return {
            "params": self.opt.params, "opt": self.opt.state_dict(), "averaged": self.averaged.state_dict(),
            "schedulers": [x.state_dict() for x in self.schedulers], "key": self.key, "done": self.done,
        }  # fmt: skip

    def resumed(self, path):
        """The same run in new objects, from a file."""
        run = checkpoint.load(path)
        new = Run(self.make, run["params"], self.schedule, self.sparse, self.loss)
        new.opt.load_state_dict(run["opt"])
        new.averaged.load_state_dict(run["averaged"])
        for scheduler, state in zip(new.schedulers, run["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        new.key, new.done = run["key"], run["done"]
        return new


def assert_resumes(run, folder, before=4, after=4):
    run.steps(before)
    checkpoint.save(folder / NAME, run.everything())
    resumed = run.resumed(folder / NAME)
    assert_identical(resumed.everything(), run.everything())
    run.steps(after)
    resumed.steps(after)
    assert_identical(resumed.everything(), run.everything())
    assert [g["lr"] for g in resumed.opt.param_groups] == [g["lr"] for g in run.opt.param_groups]


def parameters(row):
    """Parameters of several dtypes; gradients of "late" come every third step."""
    rng = np.random.default_rng(0)
    params = {"late": rng.normal(size=(5, 3)), "w": rng.normal(size=(5, 3))}
    params = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}
    params["half"] = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32 if row.sparse else jnp.bfloat16)
    if row.complex:
        params["complex"] = jnp.asarray(rng.normal(size=3) + 1j, jnp.complex64)
    return params


FAST = ("Adam", "SGD", "Rprop", "DCTAdam")
ALL = [*FIRST, *(case for case in STATES if case not in FIRST)]


@pytest.mark.parametrize(
    "case",
    [pytest.param(x, id=str(x), marks=() if x in FIRST and x.row.name in FAST else pytest.mark.slow) for x in ALL],
)
def test_a_resumed_optimizer_goes_on_bit_for_bit(case, tmp_path):
    run = Run(
        lambda params: getattr(optim, case.row.name)(params, groups=[("half", {})], **case.options),
        parameters(case.row),
        lambda opt: [] if "lr" not in opt.defaults else [optim.lr_scheduler.ExponentialLR(opt, 0.9)],
        sparse=case.row.sparse,
    )
    assert_resumes(run, tmp_path)


def quartic(params, noise):
    return jnp.sum((params["w"] - noise[:3]) ** 4) + jnp.sum((params["v"] * params["w"][:2] - 1) ** 2)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_resumed_lbfgs_goes_on_bit_for_bit(line_search, tmp_path):
    params = {"v": jnp.ones(2), "w": jnp.array([1.0, -2.0, 0.5])}
    options = {"max_iter": 4, "history_size": 3, "line_search_fn": line_search, "lr": 0.5}
    run = Run(lambda params: optim.LBFGS(params, **options), params, loss=quartic)
    assert_resumes(run, tmp_path, 3, 3)


lrs = optim.lr_scheduler
SCHEDULES = {
    "OneCycleLR": lambda opt: [lrs.OneCycleLR(opt, max_lr=0.3, total_steps=20)],
    "ReduceLROnPlateau": lambda opt: [lrs.ReduceLROnPlateau(opt, patience=1, cooldown=1)],
    "MultiStepLR": lambda opt: [lrs.MultiStepLR(opt, [2, 5, 5, 7], gamma=0.3)],
    "LambdaLR": lambda opt: [lrs.LambdaLR(opt, [lambda n: 0.9**n, lambda n: 1 / (1 + n)])],
    "CyclicLR": lambda opt: [lrs.CyclicLR(opt, 0.01, 0.3, step_size_up=3, mode="exp_range", gamma=0.9)],
    "WarmRestarts": lambda opt: [lrs.CosineAnnealingWarmRestarts(opt, 3, T_mult=2)],
    "SWALR": lambda opt: [SWALR(opt, 0.7, anneal_epochs=6)],
    "SequentialLR": lambda opt: [
        lrs.SequentialLR(opt, [lrs.LinearLR(opt, 0.1, total_iters=3), lrs.CosineAnnealingLR(opt, 9)], [3])
    ],
    "Chained": lambda opt: [lrs.ChainedScheduler([lrs.ConstantLR(opt, 0.5, 3), lrs.ExponentialLR(opt, 0.9)])],
    "two": lambda opt: [lrs.StepLR(opt, 2), lrs.MultiplicativeLR(opt, lambda n: 0.95)],
}


@pytest.mark.parametrize("before", [1, 3, 5])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_resumed_schedulers_go_on_bit_for_bit(schedule, before, tmp_path):
    params = {"w": jnp.arange(4.0), "v": jnp.ones(2)}
    run = Run(lambda params: optim.SGD(params, lr=0.1, momentum=0.9, groups=[("v", {"lr": 0.2})]), params, schedule)
    assert_resumes(run, tmp_path, before, 6)


def started(*command, **environment):
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(kills, tmp_path):
    script, steps, rng = Path(__file__).parent / "killed_run.py", 60 * kills, random.Random(kills)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    (tmp_path / "killed").mkdir()
    undisturbed = started(script, tmp_path / NAME, steps, **cache)
    path, done, saving = tmp_path / "killed" / NAME, 0, 0
    for _ in range(kills):
        process = started(script, path, steps, **cache)
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines[1] == "saved\n", process.communicate()
        resumed = int(lines[0].removeprefix("from "))
        assert resumed >= done
        time.sleep(rng.uniform(0, 0.5))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert "digest" not in rest, errors
        done = resumed + 1
        saving += any(left.name.endswith(".partial") for left in path.parent.iterdir())
        assert checkpoint.load(path)["done"] >= done
    assert saving >= kills // 4
    outputs = [process.communicate() for process in (started(script, path, steps, **cache), undisturbed)]
    digests = [output.splitlines()[-1:] for output, _ in outputs]
    assert digests[0] == digests[1], outputs
    assert digests[0][0].startswith("digest ")
    assert sorted(os.listdir(path.parent)) == ["run.1.safetensors", NAME]


# Sharded and multi-process runs.


@pytest.mark.parametrize("case", [case for case in FIRST if case.row.name in ("Adam", "Adafactor", "Muon")], ids=str)
def test_a_sharded_state_comes_back_from_orbax_and_from_us(case, tmp_path):
    assert len(jax.devices()) == 8
    meshes = [jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto)) for shape in ((4, 2), (2, 4))]
    values = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)

    def state_on(mesh):
        params = {"w": jax.device_put(values, NamedSharding(mesh, P("x", "y"))), "h": jnp.ones((2, 2), jnp.bfloat16)}
        return jax.jit(jaxoptim.step)(case.ours(), params, params, jaxoptim.init(case.ours(), params))[1]

    state, other = map(state_on, meshes)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        checkpoint.save(tmp_path / NAME, state)
        for like in (state, other):
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
            for restored in (checkpointer.restore(tmp_path / "state", abstract), checkpoint.load(tmp_path / NAME, abstract)):
                assert type(restored) is jaxoptim.OptState
                assert_identical(jax.tree.leaves(restored), jax.tree.leaves(state))
                assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)


@pytest.mark.slow
def test_two_processes_save_with_orbax_and_ours_points_there(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    script = Path(__file__).parent / "processes_run.py"
    two_devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [started(script, address, index, tmp_path, **two_devices) for index in range(2)]
    for output, errors in [process.communicate(timeout=120) for process in processes]:
        assert "restored" in output, errors
        assert re.search(r"refused: The array 'opt\..*several processes.*orbax", output), errors
    assert not (tmp_path / "ours.safetensors").exists()


# Files of released versions.


@pytest.mark.parametrize("path", sorted(checkpoint_files.FOLDER.glob("*")), ids=lambda path: path.stem)
def test_files_of_released_formats_stay_loadable(path):
    version = int(path.stem.removeprefix("format-"))
    assert header_of(path)[1]["format"] == version
    expected = checkpoint_files.CONTENTS[version]()
    expected["NumPy's"] = [x.item() if isinstance(x, np.generic) else x for x in expected["NumPy's"]]
    run = checkpoint.load(path)
    assert_identical(run, expected)
    params = {name: jnp.ones(shape) for name, shape in checkpoint_files.PARAMS.items()}
    for make in (optim.Adam, lambda params: optim.LBFGS(params, history_size=3, max_iter=2)):
        opt = make(params)
        saved = run[type(opt).__name__]
        opt.load_state_dict(saved)
        assert_identical(jax.tree.leaves(opt.state_dict()["state"]), jax.tree.leaves(saved["state"]))
    opt = optim.Adam(params)
    scheduler = optim.lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=10)
    scheduler.load_state_dict(run["OneCycleLR"])
    assert_identical(scheduler.state_dict(), run["OneCycleLR"])
    averaged = AveragedModel(params)
    averaged.load_state_dict(run["AveragedModel"])
    assert_identical(averaged.state_dict(), run["AveragedModel"])


def test_the_format_of_today_has_its_file(tmp_path):
    versions = {int(path.stem.removeprefix("format-")) for path in checkpoint_files.FOLDER.glob("*")}
    assert versions == set(range(1, checkpoint.FORMAT_VERSION + 1)) == set(checkpoint_files.CONTENTS)
    latest = checkpoint_files.path_of(checkpoint.FORMAT_VERSION)
    checkpoint.save(tmp_path / NAME, checkpoint_files.CONTENTS[checkpoint.FORMAT_VERSION]())
    (header, content), (new_header, new) = header_of(latest), header_of(tmp_path / NAME)
    assert content["tree"] == new["tree"]
    assert header.keys() == new_header.keys()
