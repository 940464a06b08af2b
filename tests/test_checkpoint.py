"""Checkpoints on disk: every value comes back as it was, in files that stay readable."""

import dataclasses
import math
import os
import pickle
import re
from collections import Counter, OrderedDict, defaultdict
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import checkpoint_files
import jaxoptim
from checkpoint_files import NAME, assert_identical, forbidden, header_of, reloaded
from jaxoptim import checkpoint, optim
from jaxoptim.optim.state_dicts import StateDict
from jaxoptim.optim.swa_utils import AveragedModel

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


# Round trips.


@pytest.mark.costly
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


def test_loaded_numpy_arrays_may_be_written_to_whatever_their_dtype(tmp_path):
    loaded = reloaded({dtype: np.zeros(2, jnp.dtype(dtype)) for dtype in DTYPES}, tmp_path)
    assert [dtype for dtype, x in loaded.items() if not x.flags.writeable] == []


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


@pytest.mark.costly
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
    "keys": {1: 1, "1": 2, (1, ("a", None)): 3, None: 4, False: 5, 0.5: 6, "b.c": 7, "__metadata__": 8, "dict": 9},
    "arrays-of-one-name": OrderedDict([("a.b", np.ones(1)), ("a", {"b": np.zeros(2), 1: np.ones(3), "1": np.ones(4)})]),
    "metadata": {"__metadata__": np.ones(2), "": np.zeros(1), "array": np.ones(1), "__metadata__ (2)": np.ones(3)},
    "order": [{"b": 1, "a": np.ones(1)}, OrderedDict([(2, 0), (1, 0)]), Counter({"z": 3, "y": 7})],
    "tags": [{"tuple": [1]}, {"array": "x"}, {"float": "nan"}, {"dict": [["a", 1]]}, {"node": [], "type": "OptState"}],
    "StateDict": StateDict({"state": {0: {"m": np.ones(2)}}}, made_by="Adam", names=[["a", None], []]),
    "OptState": jaxoptim.OptState(jnp.int32(1), {"m": {"w": jnp.ones(2), "v": None}}, (1, [2])),
    "OptState-with-counts": jaxoptim.OptState(jnp.int32(2), {}, {}, {"w": jnp.int32(1), "v": None}),
    "root-array": np.arange(3),
    "root-number": -0.0,
    "root-None": None,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_data_of_every_kind_comes_back_exactly(value, tmp_path):
    assert_identical(reloaded(value, tmp_path), value)


PLAINER = [np.float32(0.1), ml_dtypes.bfloat16(1.5), np.uint64(2**64 - 1), np.bool_(True), np.complex64(1j)]
PLAINER += [np.longdouble(0.5), defaultdict(list, {"a": [1]})]


@pytest.mark.parametrize("value", PLAINER, ids=lambda value: type(value).__name__)
def test_what_may_come_back_in_a_plainer_type_is_equal(value, tmp_path):
    assert reloaded({"x": value}, tmp_path) == {"x": value}


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


def nested(leaves, *more, most=8):
    """Trees of leaves in containers of every kind."""
    return st.recursive(
        leaves,
        lambda trees: st.one_of(
            st.lists(trees, max_size=3),
            st.lists(trees, max_size=3).map(tuple),
            st.dictionaries(NAMES, trees, max_size=3),
            st.dictionaries(NAMES, trees, max_size=3).map(OrderedDict),
            st.dictionaries(NAMES, st.integers(), max_size=3).map(Counter),
            *(kind(trees) for kind in more),
        ),
        max_leaves=most,
    )


STATE_DICTS = st.dictionaries(NAMES, nested(LEAVES, most=3), max_size=2)
STATE_DICTS = STATE_DICTS.map(lambda x: StateDict(x, made_by="Mine", names=[["a"], []]))
TREES = nested(
    LEAVES | STATE_DICTS, lambda trees: st.tuples(trees, trees, trees, trees).map(lambda x: jaxoptim.OptState(*x))
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
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
        (np.datetime64(10**9, "ns"), "'a.0.f'"),
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


@pytest.mark.slow
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


@pytest.mark.costly
@pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES)
def test_any_tree_comes_back_in_the_structure_of_another(make, tmp_path):
    tree = make()
    other = jax.tree.map(lambda x: jnp.zeros_like(x) if isinstance(x, jax.Array) else x, tree)
    for like in (tree, other):
        loaded = reloaded(tree, tmp_path, like)
        chex.assert_trees_all_equal_structs(loaded, tree)
        assert_identical(jax.tree.leaves(loaded), jax.tree.leaves(tree))
    arrays, rest = eqx.partition(tree, eqx.is_array)
    loaded = reloaded(tree, tmp_path, eqx.combine(jax.eval_shape(lambda: arrays), rest))
    chex.assert_trees_all_equal_structs(loaded, tree)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
        assert_identical(x, jnp.asarray(y) if isinstance(y, np.ndarray) else y)


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
        ({"k": jax.random.key(0)}, {"k": jnp.zeros(2, jnp.uint32)}, "'k' is key<fry> in the checkpoint, uint32"),
        ({"k": jnp.zeros(2, jnp.uint32)}, {"k": jax.random.key(0)}, "'k' is uint32 in the checkpoint, key<fry>"),
        ({"k": jax.random.key(0)}, {"k": jax.random.key(0, impl="rbg")}, "'k' is key<fry> .*, key<rbg>"),
        ({"k": jax.random.split(jax.random.key(0))}, {"k": jax.random.key(0)}, "'k' has shape"),
        (OrderedDict([(1, W), ("1", W)]), OrderedDict([(1, W), ("1", W)]), "'1.w'"),
    ],
    ids=[
        "another-name", "below-a-leaf", "longer-list", "None-in-like", "None-in-file", "array-for-dict", "turned",
        "0-d", "float-to-int", "complex-to-real", "int-to-bool", "array-overflows", "number-overflows", "huge-integer",
        "text-for-array", "text-for-float", "array-for-float", "key-for-data", "data-for-key", "another-key",
        "batch-of-keys", "one-path-twice",
    ],
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


@pytest.mark.slow
def test_a_file_is_plain_safetensors_and_json(tmp_path, monkeypatch):
    run, path = run_of(), tmp_path / NAME
    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load"), (np, "load")):
        monkeypatch.setattr(module, name, forbidden)
    for name in ("dumps", "dump", "Pickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    checkpoint.save(path, run)
    assert_identical(checkpoint.load(path), run)
    header, content = header_of(path)
    assert content["format"] == checkpoint.FORMAT_VERSION == 2
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


# Files of released versions.


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(checkpoint_files.FOLDER.glob("*")), ids=lambda path: path.stem)
def test_files_of_released_formats_stay_loadable(path):
    version = int(path.stem.removeprefix("format-"))
    assert header_of(path)[1]["format"] == version
    expected = checkpoint_files.CONTENTS[version]()
    run = checkpoint.load(path)
    assert run.pop("NumPy's") == expected.pop("NumPy's")
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


def test_like_takes_state_dicts_as_they_were_saved(tmp_path):
    params = FrozenDict({"w": jnp.ones(2)})
    opt = optim.SGD(params, momentum=0.9)
    opt.step(params)
    saved = {"params": opt.params, "opt": opt.state_dict(), "step": 3}
    loaded = reloaded(saved, tmp_path, {"params": params, "opt": optim.SGD(params).state_dict(), "step": 0})
    assert_identical(loaded["opt"], saved["opt"])
    assert isinstance(loaded["params"], FrozenDict)


@pytest.mark.parametrize("given", ["opt", "scheduler", "tensor", "cycle"])
def test_what_is_no_data_comes_with_advice(given, tmp_path):
    opt = optim.SGD([jnp.ones(1)])
    cycle: list[Any] = []
    cycle.append(cycle)
    trees = {
        "opt": (opt, TypeError, r"'x' is SGD. Save its state_dict\(\)"),
        "scheduler": (optim.lr_scheduler.StepLR(opt, 1), TypeError, r"'x' is StepLR. Save its state_dict\(\)"),
        "tensor": (torch.ones(1), TypeError, "'x' is Tensor. Make it an array of JAX or NumPy"),
        "cycle": (cycle, ValueError, "nested too deeply, or holds itself"),
    }
    value, error, message = trees[given]
    with pytest.raises(error, match=message):
        checkpoint.save(tmp_path / NAME, {"x": value})
