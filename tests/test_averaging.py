"""Averages of the parameters, against the live torch class, exact means, and a real network's batch statistics."""

import copy
import functools
import gc
import itertools
import logging
import pickle
import re
from collections import OrderedDict

import chex
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from comparisons import assert_same
from jaxoptim import Decay, averaging, optim, pack
from jaxoptim.optim import swa_utils
from jaxoptim.optim.swa_utils import SWALR, AveragedModel, averaged_model, update_bn

theirs = torch.optim.swa_utils

SHAPES = {"dense": {"kernel": (4, 3), "bias": (3,)}, "large": (200, 100), "scale": ()}
"""Arrays that are packed, one that stands by itself, and a scalar."""
DECAYS = [0.0, 0.5, 0.9, 0.999, 1.0]
UPDATES = 120


def is_shape(x):
    return isinstance(x, tuple)


def draws(count, seed=0, dtype=np.float64, shapes=SHAPES):
    """Trees of normal numbers, which drift so that their averages are not near zero."""
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda shape, n=n: (rng.normal(size=shape) + 0.01 * n).astype(dtype), shapes, is_leaf=is_shape)
        for n in range(count)
    ]


@functools.cache
def long_run(dtype):
    """The parameters of many updates, the same for all tests."""
    return draws(UPDATES, dtype=dtype)


def tensor(x):
    """A NumPy array as a tensor of the same dtype, bfloat16 included."""
    x = np.asarray(x)
    return torch.tensor(x.astype(np.float32)).bfloat16() if x.dtype == jnp.bfloat16 else torch.tensor(x)


def numpy(x):
    """A tensor as a NumPy array."""
    return x.detach().float().numpy() if x.dtype == torch.bfloat16 else x.detach().numpy()


def module_of(tree, is_buffer=lambda name: False):
    """A torch model whose names are the dotted paths of a tree of dicts."""
    module = torch.nn.Module()
    for name, value in tree.items():
        if isinstance(value, dict):
            module.add_module(name, module_of(value, is_buffer))
        elif is_buffer(name):
            module.register_buffer(name, tensor(value))
        else:
            module.register_parameter(name, torch.nn.Parameter(tensor(value)))
    return module


def named(tree):
    """The arrays of a tree of dicts by dotted path."""
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def fill(module, tree):
    """Give a torch model the numbers of a tree."""
    values = named(tree)
    for name, x in itertools.chain(module.named_parameters(), module.named_buffers()):
        x.data.copy_(tensor(values[name]))


def averaged_by_torch(trees, is_buffer=lambda name: False, **options):
    """torch's average of trees, as a dict by dotted path."""
    module = module_of(trees[0], is_buffer)
    averaged = theirs.AveragedModel(module, **options)
    for tree in trees:
        fill(module, tree)
        averaged.update_parameters(module)
    return {name.removeprefix("module."): numpy(x) for name, x in averaged.state_dict().items() if name != "n_averaged"}


def averaged_by_us(trees, **options):
    """Our average of trees, as a dict by dotted path."""
    averaged = AveragedModel(trees[0], **options)
    for tree in trees:
        averaged.update_parameters(tree)
    assert int(averaged.n_averaged) == len(trees)
    return {name: np.asarray(x) for name, x in named(averaged.module).items()}


assert_close = functools.partial(chex.assert_trees_all_close, rtol=0.0)
"""Without a relative tolerance where none is given."""


def snapshot(averaged):
    """Everything that a failed call must not change, as NumPy arrays of our own."""
    return jax.tree.map(lambda x: np.array(x), (averaged.state_dict(), averaged.module))


def root_mean_square(arrays):
    return np.sqrt(np.mean(np.concatenate([np.ravel(x).astype(np.float64) for x in arrays]) ** 2))


# Functions that a user may write, in the words that arrays and tensors share.


def weighted(average, param, num_averaged):
    return (average * (num_averaged + 2) + 3 * param) / (num_averaged + 5)


def larger_by_modulus(average, param, num_averaged):
    return average + abs(param - average)


def our_multi(averaged, current, num_averaged):
    norm = sum((x**2).sum() for x in current) ** 0.5
    return [a + (p - a) / (norm + num_averaged) for a, p in zip(averaged, current, strict=True)]


def their_multi(averaged, current, num_averaged):
    for x, new in zip(averaged, our_multi(averaged, current, num_averaged), strict=True):
        x.copy_(new)


def both(kind, name, *args):
    """The same function of torch's and ours, as the options of each side."""
    return tuple({kind: getattr(side, name)(*args)} for side in (swa_utils, theirs))


PAIRS = {
    "default": ({}, {}),
    "swa": both("avg_fn", "get_swa_avg_fn"),
    **{f"ema-{decay}": both("avg_fn", "get_ema_avg_fn", decay) for decay in DECAYS},
    **{f"ema-multi-{decay}": both("multi_avg_fn", "get_ema_multi_avg_fn", decay) for decay in DECAYS},
    "custom": ({"avg_fn": weighted}, {"avg_fn": weighted}),
    "custom-modulus": ({"avg_fn": larger_by_modulus}, {"avg_fn": larger_by_modulus}),
    "custom-multi": ({"multi_avg_fn": our_multi}, {"multi_avg_fn": their_multi}),
}
by_pair = pytest.mark.parametrize("name", PAIRS)


# Against torch.


@by_pair
def test_averages_agree_with_torch(name, x64):
    ours, torchs = PAIRS[name]
    trees = long_run(np.float64)
    assert_close(averaged_by_us(trees, **ours), averaged_by_torch(trees, **torchs), atol=1e-12)


def test_the_multi_mean_is_the_mean_where_torchs_weight_is_single(x64):
    # torch's 1 / (n + 1) of an integer tensor has float32's digits, whatever the parameters are.
    trees = long_run(np.float64)
    ours = averaged_by_us(trees, multi_avg_fn=swa_utils.get_swa_multi_avg_fn())
    mean = named(jax.tree.map(lambda *xs: np.mean(np.stack(xs).astype(np.longdouble), 0), *trees))
    assert_close(ours, mean, atol=1e-12)
    assert_close(ours, averaged_by_torch(trees), atol=1e-12)
    torchs = averaged_by_torch(trees, multi_avg_fn=theirs.get_swa_multi_avg_fn())
    assert_close(ours, torchs, atol=1e-7)
    assert root_mean_square([torchs[name] - mean[name] for name in mean]) > 1e-10


TINY = {"a": (3,), "b": {"c": (2, 2)}}


@settings(max_examples=30, deadline=None)
@given(
    decay=st.one_of(st.sampled_from(DECAYS), st.floats(0, 1)),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-100, 100),
    count=st.integers(1, 40),
    kind=st.sampled_from(["avg_fn", "multi_avg_fn"]),
)
def test_any_decay_and_any_scale_agree_with_torch(decay, seed, exponent, count, kind):
    name = "get_ema_avg_fn" if kind == "avg_fn" else "get_ema_multi_avg_fn"
    ours, torchs = both(kind, name, decay)
    trees = [jax.tree.map(lambda x: x * 10.0**exponent, tree) for tree in draws(count, seed, shapes=TINY)]
    largest = max(np.abs(x).max() for x in jax.tree.leaves(trees))
    with jax.enable_x64(True):
        assert_close(averaged_by_us(trees, **ours), averaged_by_torch(trees, **torchs), atol=1e-12 * largest)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-100, 100), count=st.integers(1, 150))
def test_the_mean_of_any_parameters_agrees_with_torch(seed, exponent, count):
    trees = [jax.tree.map(lambda x: x * 10.0**exponent, tree) for tree in draws(count, seed, shapes=TINY)]
    largest = max(np.abs(x).max() for x in jax.tree.leaves(trees))
    with jax.enable_x64(True):
        ours = averaged_by_us(trees)
        assert_close(ours, averaged_by_torch(trees), atol=1e-12 * largest)
        exact = named(jax.tree.map(lambda *xs: np.mean(np.stack(xs).astype(np.longdouble), 0), *trees))
        assert_close(ours, exact, atol=1e-12 * largest)


def in_double(name, trees):
    """The average by its formula in float64."""
    trees = [jax.tree.map(lambda x: x.astype(np.float64), tree) for tree in trees]
    if name in ("default", "swa"):
        return named(jax.tree.map(lambda *xs: np.mean(np.stack(xs), 0), *trees))
    decay = float(name.rpartition("-")[2])
    average = trees[0]
    for tree in trees[1:]:
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, tree)
    return named(average)


OURS = [name for name in PAIRS if not name.startswith("custom")]


@pytest.mark.parametrize("name", OURS)
def test_single_precision_loses_no_more_than_torch(name):
    ours, torchs = PAIRS[name]
    trees = long_run(np.float32)
    expected = in_double(name, trees)
    errors = [
        root_mean_square([result[key].astype(np.float64) - expected[key] for key in expected])
        for result in (averaged_by_us(trees, **ours), averaged_by_torch(trees, **torchs))
    ]
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["default", "swa", "ema-0.9", "ema-0.999", "ema-multi-0.5", "ema-multi-0.999"])
def test_half_precision_is_averaged_in_single(name, dtype):
    ours, torchs = PAIRS[name]
    trees = draws(UPDATES, dtype=dtype, shapes={"w": (40, 50)})
    expected = in_double(name, trees)
    result, torchs = averaged_by_us(trees, **ours), averaged_by_torch(trees, **torchs)
    assert all(x.dtype == dtype for x in result.values())
    # What is left is one rounding, half a unit in the last of eight or eleven digits.
    half_unit = float(jnp.finfo(dtype).eps) / 2
    assert_close({key: x.astype(np.float64) for key, x in result.items()}, expected, rtol=1.01 * half_unit, atol=1e-6)
    errors = [root_mean_square([x[key].astype(np.float64) - expected[key] for key in x]) for x in (result, torchs)]
    assert errors[0] < errors[1]


def test_a_step_that_bfloat16_would_lose_is_kept():
    trees = [{"w": np.full(3, 1 + (n > 0), jnp.bfloat16)} for n in range(1000)]
    ours, torchs = both("multi_avg_fn", "get_ema_multi_avg_fn", 0.999)
    np.testing.assert_allclose(averaged_by_us(trees, **ours)["w"].astype(float), 2 - 0.999**999, rtol=4e-3)
    assert averaged_by_torch(trees, **torchs)["w"].tolist() == [1, 1, 1]  # it never leaves the first


@pytest.mark.parametrize("kind", ["avg_fn", "multi_avg_fn"])
def test_complex_parameters_agree_with_torch(kind, x64):
    rng = np.random.default_rng(0)
    trees = [{"z": rng.normal(size=4) + 1j * rng.normal(size=4), "x": rng.normal(size=2)} for _ in range(UPDATES)]
    name = "get_ema_avg_fn" if kind == "avg_fn" else "get_ema_multi_avg_fn"
    for ours, torchs in (both(kind, name, 0.9), ({}, {})):
        assert_close(averaged_by_us(trees, **ours), averaged_by_torch(trees, **torchs), atol=1e-12)


@pytest.mark.parametrize("single", [True, False], ids=["avg_fn", "multi_avg_fn"])
def test_a_decay_of_zero_follows_and_of_one_stays(single):
    # Exactly, as in torch: also where the average was a hundred million times as large.
    make = swa_utils.get_ema_avg_fn if single else swa_utils.get_ema_multi_avg_fn
    trees = [{"w": np.float32(x)} for x in (1e8, 1.0, -3e-5, 7e20, 0.1)]
    for decay, expected in ((0.0, trees[-1]), (1.0, trees[0])):
        assert_same(averaged_by_us(trees, **{"avg_fn" if single else "multi_avg_fn": make(decay)}), expected)


SPECIAL = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, 3.4e38, 1 / 3], np.float32)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["default", "ema-0.9", "ema-multi-0.0", "ema-multi-0.999", "custom"])
def test_the_first_update_copies_whatever_there_was(name, dtype):
    ours, _ = PAIRS[name]
    first = {"w": SPECIAL.astype(dtype), "large": np.resize(SPECIAL, (200, 100)).astype(dtype)}
    averaged = AveragedModel(jax.tree.map(lambda x: x[..., ::-1], first), **ours)
    assert int(averaged.n_averaged) == 0
    assert averaged.module["w"].tobytes() == first["w"][::-1].tobytes()
    averaged.update_parameters(first)
    for key, x in first.items():
        np.testing.assert_array_equal(np.asarray(averaged.module[key], np.float32), x.astype(np.float32))
        np.testing.assert_array_equal(np.signbit(averaged.module[key])[x == 0], np.signbit(x[x == 0]))
    assert int(averaged.n_averaged) == 1


def test_what_is_not_finite_stays_as_in_torch():
    trees = [{"w": SPECIAL}, {"w": np.ones(8, np.float32)}, {"w": SPECIAL[::-1].copy()}]
    for name in ("default", "ema-0.5", "ema-multi-0.9"):
        ours, torchs = PAIRS[name]
        for count in (2, 3):
            result, expected = (averaged_by_us(trees[:count], **ours), averaged_by_torch(trees[:count], **torchs))
            assert np.isfinite(result["w"]).tolist() == np.isfinite(expected["w"]).tolist()


def test_a_function_that_fails_on_no_models_is_not_asked_for_the_first():
    def average(averaged, param, num_averaged):
        return averaged + (param - averaged) / num_averaged

    assert averaged_by_us([{"w": np.float32(x)} for x in (3, 5)], avg_fn=average)["w"] == 5


def test_the_functions_also_take_numbers():
    for side in (swa_utils, theirs):
        assert side.get_swa_avg_fn()(1.0, 4.0, 2) == 2.0
        assert side.get_ema_avg_fn(0.5)(1.0, 4.0, 2) == 2.5
    assert swa_utils.get_swa_multi_avg_fn()([1.0, 0.0], [4.0, 3.0], 2) == [2.0, 1.0]
    assert swa_utils.get_ema_multi_avg_fn(0.5)([1.0, 0.0], [4.0, 3.0], 2) == [2.5, 1.5]
    assert swa_utils.get_ema_multi_avg_fn()([1.0], [2.0], 7)[0] == pytest.approx(1.001)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), np.float32(-1), jnp.array(2.0)], ids=str)
def test_a_decay_out_of_range_raises_what_torch_raises(decay):
    makers = [averaging.ema, swa_utils.get_ema_avg_fn, swa_utils.get_ema_multi_avg_fn]
    for make in makers:
        with pytest.raises(ValueError, match=re.escape(f"Invalid decay value {decay} provided.")):
            make(decay)
    if not isinstance(decay, jax.Array) and decay == decay:  # torch lets NaN pass
        for make in (theirs.get_ema_avg_fn, theirs.get_ema_multi_avg_fn):
            with pytest.raises(ValueError, match="in \\[0,1\\] range") as raised:
                make(decay)
            with pytest.raises(ValueError, match=re.escape(str(raised.value))):
                swa_utils.get_ema_avg_fn(decay)


def test_two_functions_at_once_are_refused():
    message = "Only one of avg_fn and multi_avg_fn should be provided"
    with pytest.raises(AssertionError, match=message):
        theirs.AveragedModel(torch.nn.Linear(1, 1), avg_fn=weighted, multi_avg_fn=their_multi)
    with pytest.raises(ValueError, match=message):
        AveragedModel({"w": jnp.ones(1)}, avg_fn=weighted, multi_avg_fn=our_multi)


# Saving and loading.


def both_trained(ours, torchs, trees):
    module = module_of(trees[0])
    theirs_averaged, averaged = theirs.AveragedModel(module, **torchs), AveragedModel(trees[0], **ours)
    advance(averaged, theirs_averaged, module, trees)
    return averaged, theirs_averaged, module


def advance(averaged, theirs_averaged, module, trees):
    for tree in trees:
        fill(module, tree)
        theirs_averaged.update_parameters(module)
        averaged.update_parameters(tree)


def same_state(averaged, theirs_averaged, atol):
    ours, torchs = averaged.state_dict(), theirs_averaged.state_dict()
    assert_close({key: np.asarray(x) for key, x in ours.items()}, {k: numpy(x) for k, x in torchs.items()}, atol=atol)


@pytest.mark.parametrize("name", ["default", "ema-multi-0.9", "custom"])
def test_the_state_dict_goes_to_torch_and_back(name, x64):
    ours, torchs = PAIRS[name]
    trees = draws(12, shapes=TINY)
    averaged, theirs_averaged, module = both_trained(ours, torchs, trees[:6])
    assert next(iter(averaged.state_dict())) == "n_averaged"
    assert set(averaged.state_dict()) == set(theirs_averaged.state_dict()) == {"n_averaged", "module.a", "module.b.c"}
    same_state(averaged, theirs_averaged, 1e-12)
    # Theirs as it is into ours, and ours as tensors into theirs.
    loaded, theirs_loaded = AveragedModel(trees[-1], **ours), theirs.AveragedModel(module, **torchs)
    loaded.load_state_dict(theirs_averaged.state_dict())
    theirs_loaded.load_state_dict({key: torch.tensor(np.asarray(x)) for key, x in averaged.state_dict().items()})
    assert {key: (x.shape, x.dtype) for key, x in loaded.state_dict().items()} == {
        key: (x.shape, x.dtype) for key, x in averaged.state_dict().items()
    }
    for one in (loaded, averaged):
        same_state(one, theirs_loaded, 1e-12)
    module_2 = module_of(trees[0])
    advance(loaded, theirs_averaged, module, trees[6:])
    advance(averaged, theirs_loaded, module_2, trees[6:])
    same_state(loaded, theirs_loaded, 1e-12)
    same_state(averaged, theirs_averaged, 1e-12)
    assert int(loaded.n_averaged) == 12


def test_tensors_of_torch_are_copied_in_any_dtype():
    tree = {"w": jnp.ones((2, 3), jnp.bfloat16), "n": jnp.zeros((), jnp.int32)}
    module = module_of(
        {"w": np.arange(6).reshape(2, 3).astype(jnp.bfloat16), "n": np.array(5)}, lambda name: name == "n"
    )
    module.w = torch.nn.Parameter(module.w.detach().T.contiguous().T)  # as some layers lay it out
    theirs_averaged = theirs.AveragedModel(module)
    averaged = AveragedModel(tree)
    saved = theirs_averaged.state_dict()
    averaged.load_state_dict(saved)
    for x in saved.values():
        x.fill_(9)
    assert averaged.module["w"].dtype == jnp.bfloat16
    assert averaged.module["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert int(averaged.module["n"]) == 5
    assert int(averaged.n_averaged) == 0


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("name", ["default", "ema-multi-0.9", "custom"])
def test_a_saved_average_goes_on_bit_for_bit(name, way):
    ours, _ = PAIRS[name]
    trees = draws(10, dtype=np.float32)
    averaged = AveragedModel(trees[0], **ours)
    for tree in trees[:5]:
        averaged.update_parameters(tree)
    twin = copied(averaged, way, AveragedModel(trees[-1], **ours))
    assert_same(twin.state_dict(), averaged.state_dict())
    for tree in trees[5:]:
        averaged.update_parameters(tree)
    for tree in trees[5:]:
        twin.update_parameters(tree)
    assert_same(twin.state_dict(), averaged.state_dict())


def copied(averaged, way, other):
    if way == "state_dict":
        other.load_state_dict(averaged.state_dict())
        return other
    return pickle.loads(pickle.dumps(averaged)) if way == "pickle" else copy.deepcopy(averaged)


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_copied_average_of_bfloat16_goes_on_bit_for_bit(way):
    # The state dict has the parameters' dtype, as torch's. A copy has no reason to forget the digits below it.
    trees = [{"w": np.full(3, x, jnp.bfloat16)} for x in (1.0, *[2.0] * 40)]
    averaged = AveragedModel(trees[0], avg_fn=swa_utils.get_ema_avg_fn(0.999))
    for tree in trees:
        averaged.update_parameters(tree)
        averaged = copied(averaged, way, None)
    straight = averaged_by_us(trees, avg_fn=swa_utils.get_ema_avg_fn(0.999))
    assert_same(named(averaged.module), straight)


BAD_STATES = {
    "missing": (lambda sd: sd.pop("module.b.c"), ["Missing key", "'module.b.c'"]),
    "no count": (lambda sd: sd.pop("n_averaged"), ["Missing key", "'n_averaged'"]),
    "unexpected": (lambda sd: sd.update({"module.other": np.ones(3)}), ["Unexpected key", "'module.other'"]),
    "unprefixed": (lambda sd: sd.update(a=sd.pop("module.a")), ["Missing key", "'module.a'", "Unexpected key", "'a'"]),
    "mismatched": (lambda sd: sd.update({"module.a": np.ones((4,))}), ["size mismatch for module.a", "(4,)", "(3,)"]),
    "all": (
        lambda sd: (sd.pop("n_averaged"), sd.update({"module.b.c": np.ones(2), "b.c": 0})),
        ["Missing key", "'n_averaged'", "Unexpected key", "'b.c'", "size mismatch for module.b.c", "(2,)", "(2, 2)"],
    ),
}


@pytest.mark.parametrize("edit", BAD_STATES)
def test_loading_what_does_not_fit_names_it_and_changes_nothing(edit):
    change, messages = BAD_STATES[edit]
    trees = draws(4, dtype=np.float32, shapes=TINY)
    averaged, theirs_averaged, _ = both_trained({}, {}, trees)
    saved, torchs = averaged.state_dict(), theirs_averaged.state_dict()
    change(saved)
    change(torchs)
    heading = r"Error\(s\) in loading state_dict for AveragedModel"
    with pytest.raises(RuntimeError, match=heading):
        theirs_averaged.load_state_dict({key: torch.as_tensor(x) for key, x in torchs.items()})
    for given_state in (saved, torchs):
        before, keys = snapshot(averaged), list(given_state)
        with pytest.raises(RuntimeError, match=heading) as raised:
            averaged.load_state_dict(given_state)
        assert all(message in str(raised.value) for message in messages)
        assert_same(snapshot(averaged), before)
        assert list(given_state) == keys
    averaged.update_parameters(trees[0])
    assert int(averaged.n_averaged) == 5


def test_loading_without_strict_takes_what_there_is():
    trees = draws(4, dtype=np.float32, shapes=TINY)
    source, averaged = AveragedModel(trees[0]), AveragedModel(trees[1])
    for tree in trees:
        source.update_parameters(tree)
    saved = source.state_dict()
    del saved["module.a"]
    averaged.load_state_dict(saved | {"module.other": np.ones(3)}, strict=False)
    assert_same(averaged.module, {"a": trees[1]["a"], "b": source.module["b"]})
    assert int(averaged.n_averaged) == 4
    with pytest.raises(RuntimeError, match=r"size mismatch for module\.a"):  # as torch, which is not lenient there
        averaged.load_state_dict({"module.a": np.ones(9)}, strict=False)


# Buffers.


def test_integers_are_averaged_as_torch_does_where_it_is_exact(x64):
    # torch's multi function for the mean divides integers and raises; its default does not.
    rng = np.random.default_rng(0)
    counts = np.cumsum(rng.integers(0, 40, size=(100, 3)), 0)
    for dtype in (np.int32, np.int64):
        trees = [{"n": row.astype(dtype), "w": np.full(2, n, np.float64)} for n, row in enumerate(counts)]
        pairs = [PAIRS["default"], both("multi_avg_fn", "get_ema_multi_avg_fn", 0.5), PAIRS["ema-0.5"]]
        for ours, torchs in pairs:
            result = averaged_by_us(trees, use_buffers=True, **ours)
            expected = averaged_by_torch(trees, lambda name: name == "n", use_buffers=True, **torchs)
            assert result["n"].dtype == expected["n"].dtype == dtype
            assert_close(result, expected, atol=1e-12)
        multi = averaged_by_us(trees, use_buffers=True, multi_avg_fn=swa_utils.get_swa_multi_avg_fn())
        assert_same(multi, averaged_by_us(trees, use_buffers=True))


class Net(nn.Module):
    """A network with two layers of batch normalization."""

    momentum: float = 0.99
    second: float = 0.9
    dtype: type = np.float32

    @nn.compact
    def __call__(self, x, train=True):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, use_fast_variance=False)
        x = nn.Dense(5, param_dtype=self.dtype)(x)
        x = norm(momentum=self.momentum, param_dtype=self.dtype)(x)
        x = nn.relu(x)
        x = norm(momentum=self.second, param_dtype=self.dtype)(x)
        return nn.Dense(2, param_dtype=self.dtype)(x)


class TorchNet(torch.nn.Module):
    """The same network with the same names, as far as torch's layers allow."""

    def __init__(self, momentum=0.99, second=0.9):
        super().__init__()
        self.Dense_0, self.Dense_1 = torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)
        self.BatchNorm_0 = torch.nn.BatchNorm1d(5, momentum=1 - momentum)
        self.BatchNorm_1 = torch.nn.BatchNorm1d(5, momentum=1 - second)

    def forward(self, x):
        return self.Dense_1(self.BatchNorm_1(torch.relu(self.BatchNorm_0(self.Dense_0(x)))))

    def fill(self, variables):
        """Take over flax's variables."""
        for name, layer in variables["params"].items():
            module = getattr(self, name)
            weight = layer["kernel"].T if "kernel" in layer else layer["scale"]
            module.weight.data.copy_(tensor(weight))
            module.bias.data.copy_(tensor(layer["bias"]))
        for name, layer in variables["batch_stats"].items():
            getattr(self, name).running_mean.copy_(tensor(layer["mean"]))
            getattr(self, name).running_var.copy_(tensor(layer["var"]))

    def variables(self):
        """The numbers of this network in flax's structure."""
        params, stats = {}, {}
        for name in ("Dense_0", "Dense_1", "BatchNorm_0", "BatchNorm_1"):
            module = getattr(self, name)
            weight = {"kernel": numpy(module.weight).T} if "Dense" in name else {"scale": numpy(module.weight)}
            params[name] = weight | {"bias": numpy(module.bias)}
            if "Batch" in name:
                stats[name] = {"mean": numpy(module.running_mean), "var": numpy(module.running_var)}
        return {"params": params, "batch_stats": stats}


@functools.cache
def variables_of(seed=0, dtype=np.float32):
    """Variables of the network, with random numbers everywhere, as NumPy arrays."""
    shapes = jax.eval_shape(Net().init, jax.random.key(0), jax.ShapeDtypeStruct((4, 3), np.float32))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) ** 2 + 0.1).astype(dtype), shapes)


@pytest.mark.parametrize("use_buffers", [False, True], ids=["last", "averaged"])
@pytest.mark.parametrize("name", ["default", "ema-multi-0.9"])
def test_flax_variables_agree_with_torchs_module(name, use_buffers, x64):
    ours, torchs = PAIRS[name]
    module = TorchNet().double()
    theirs_averaged = theirs.AveragedModel(module, use_buffers=use_buffers, **torchs)
    averaged = AveragedModel(variables_of(0, np.float64), use_buffers=use_buffers, **ours)
    for seed in range(1, 30):
        variables = variables_of(seed, np.float64)
        module.fill(variables)
        theirs_averaged.update_parameters(module)
        averaged.update_parameters(variables)
    assert_close(named(averaged.module), named(theirs_averaged.module.variables()), atol=1e-12)
    if not use_buffers:
        assert_same(averaged.module["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("freeze", [dict, flax.core.freeze, OrderedDict], ids=["dict", "FrozenDict", "OrderedDict"])
def test_everything_beside_params_is_a_buffer(freeze):
    trees = [
        freeze({"params": {"w": jnp.full(2, x), "n": jnp.asarray(int(x))}, "cache": {"k": jnp.full(3, x)}})
        for x in (1.0, 3.0, 8.0)
    ]
    last, mean = AveragedModel(trees[0]), AveragedModel(trees[0], use_buffers=True)
    for tree in trees:
        last.update_parameters(tree)
        mean.update_parameters(tree)
    for averaged, k, n in ((last, 8.0, 8), (mean, 4.0, 4)):
        assert type(averaged.module) is type(trees[0])
        assert averaged.module["params"]["w"].tolist() == [4, 4]
        assert averaged.module["cache"]["k"].tolist() == [k] * 3
        assert int(averaged.module["params"]["n"]) == n  # an integer is a buffer wherever it stands


def test_a_tree_without_params_has_integers_as_buffers():
    averaged = AveragedModel({"w": jnp.ones(2), "batch_stats": jnp.ones(2), "n": jnp.asarray(1), "key": None})
    for x in (1, 3):
        averaged.update_parameters(
            {"w": jnp.full(2, x, float), "batch_stats": jnp.full(2, x, float), "n": jnp.asarray(x), "key": None}
        )
    assert averaged.module["batch_stats"].tolist() == [2, 2]
    assert (int(averaged.module["n"]), averaged.module["key"]) == (3, None)


@pytest.mark.parametrize("tree", [{}, [], None, {"w": np.ones((0, 3), np.float32), "v": np.ones(2)}], ids=repr)
def test_trees_with_little_in_them(tree):
    averaged = AveragedModel(tree)
    for _ in range(2):
        averaged.update_parameters(tree)
    chex.assert_trees_all_equal_shapes(averaged.module, tree)
    chex.assert_trees_all_equal(averaged.module, tree)
    assert int(copy.deepcopy(averaged).n_averaged) == 2


def test_packed_parameters_are_averaged():
    trees = draws(5, dtype=np.float32)
    packed = AveragedModel(pack(trees[0]))
    for tree in trees:
        packed.update_parameters(pack(tree))
    assert_close(named(packed.module.unpack()), averaged_by_us(trees), rtol=1e-6, atol=1e-6)


# Over an optimizer.


def cells():
    return [optim.Parameter(x) for x in jax.tree.leaves(START)]


START = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3), "none": None, "large": jnp.full((200, 100), 2.0)}
GIVEN = {
    "pytree": lambda: START,
    "parameters": cells,
    "named": lambda: [(f"p{i}", cell) for i, cell in enumerate(cells())],
    "groups": lambda: [{"params": {"w": START["w"]}, "lr": 0.01}, {"params": [START["b"], START["large"]]}],
    "array": lambda: START["w"],
}


def bowl(params):
    return sum(jnp.sum((x - 1) ** 2) for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("given_params", "cls", "name"),
    [("pytree", optim.SGD, "default"), ("groups", optim.SGD, "default"), ("parameters", optim.Adam, "ema-multi-0.9")]
    + [pytest.param(x, optim.SGD, "default", marks=pytest.mark.slow) for x in ("parameters", "named", "array")]
    + [pytest.param(x, optim.Adam, "ema-multi-0.9", marks=pytest.mark.slow) for x in ("pytree", "groups", "named")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_the_parameters_of_an_optimizer_are_averaged(given_params, cls, name):
    ours, _ = PAIRS[name]
    opt = cls(GIVEN[given_params](), lr=0.1)
    averaged = AveragedModel(opt, **ours)
    assert_same(averaged.module, opt.params)
    seen = []
    for n in range(6):
        if n % 2:
            opt.minimize(bowl)
        else:
            opt.step(jax.tree.map(jnp.ones_like, opt.params))
        averaged.update_parameters(opt)
        seen.append(jax.tree.map(np.asarray, opt.params))
        if n == 3:
            averaged.update_parameters(opt)  # the same ones once more
            seen.append(seen[-1])
    twin = AveragedModel(seen[0], **ours)
    for tree in seen:
        twin.update_parameters(tree)
    assert_same(averaged.module, twin.module)
    chex.assert_trees_all_equal_structs(averaged.module, opt.params)
    decay = float(name.rpartition("-")[2]) if "ema" in name else None
    first, *rest = [np.asarray(jax.tree.leaves(tree)[0], np.float64) for tree in seen]
    expected = (
        functools.reduce(lambda a, p: decay * a + (1 - decay) * p, rest, first) if decay else np.mean([first, *rest], 0)
    )
    np.testing.assert_allclose(jax.tree.leaves(averaged.module)[0], expected, rtol=1e-5)
    assert int(averaged.n_averaged) == 7


def test_an_optimizers_average_continues_with_its_tree_and_goes_back_into_it():
    opt = optim.SGD({"w": jnp.zeros(2), "b": {"c": jnp.zeros(())}}, lr=0.5)
    averaged = AveragedModel(opt)
    for n in range(3):
        opt.step(jax.tree.map(jnp.ones_like, opt.params))
        averaged.update_parameters(opt.params if n else opt)
    assert averaged.module["w"].tolist() == [-1, -1]
    assert set(averaged.state_dict()) == {"n_averaged", "module.w", "module.b.c"}
    other = optim.Adam(averaged.module)
    other.minimize(bowl)
    averaged.update_parameters(other)
    opt.step(jax.tree.map(jnp.ones_like, opt.params))
    averaged.update_parameters(opt)
    assert int(averaged.n_averaged) == 5


def test_a_group_that_is_added_later_is_refused():
    opt = optim.SGD({"w": jnp.zeros(2)}, lr=0.5)
    averaged = AveragedModel(opt)
    averaged.update_parameters(opt)
    opt.add_param_group({"params": jnp.ones(3)})
    before = snapshot(averaged)
    with pytest.raises(ValueError, match="the model and the average are different trees"):
        averaged.update_parameters(opt)
    assert_same(snapshot(averaged), before)


# Ownership.


def ones(x=1.0):
    return {
        "params": {"small": jnp.full(3, x), "large": jnp.full((200, 100), x), "none": None},
        "batch_stats": {"count": jnp.asarray(int(x)), "mean": jnp.full((200, 100), x)},
    }


MODES = {
    "default": {},
    "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.5)},
    "custom": {"avg_fn": weighted},
    "custom-multi": {"multi_avg_fn": our_multi},
    "buffers": {"use_buffers": True},
}
by_mode = pytest.mark.parametrize("mode", MODES)


def pointers(averaged):
    return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(averaged._average)}


@by_mode
def test_an_update_is_donated(mode):
    averaged = AveragedModel(ones(), **MODES[mode])
    averaged.update_parameters(ones(2.0))
    before = pointers(averaged)
    for n in range(3):
        averaged.state_dict()  # what is read does not keep the buffers
        averaged.update_parameters(ones(2.0 + n))
        assert pointers(averaged) == before  # the new averages stand where the old ones stood


def test_memory_does_not_grow(only_new_garbage):
    models = [AveragedModel(ones(), **options) for options in MODES.values()]
    counts = []
    for n in range(3):
        for averaged in models:
            averaged.update_parameters(ones(float(n)))
            averaged.state_dict()
        gc.collect()
        counts.append(len(jax.live_arrays()))
    assert counts[1] == counts[2]
    del models, averaged
    gc.collect()
    assert len(jax.live_arrays()) < counts[0]


def compiled_by(caplog, function):
    """The names of all programs that a call compiles."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        function()
    return re.findall(r"Compiling (\S+)", caplog.text)


@by_mode
def test_one_program_serves_all_updates(mode, caplog):
    shapes = {"w": (7,), "v": (5, 3), "u": (100 + list(MODES).index(mode),)}  # that no other test has
    trees = [jax.tree.map(jnp.asarray, tree) for tree in draws(5, dtype=np.float32, shapes=shapes)]
    averaged = AveragedModel(trees[0], **MODES[mode])
    before = averaged_model._update._cache_size()
    assert len(compiled_by(caplog, lambda: averaged.update_parameters(trees[0]))) == 1
    later = compiled_by(caplog, lambda: [averaged.update_parameters(tree) for tree in trees])
    assert later == []
    assert averaged_model._update._cache_size() == before + 1


@pytest.mark.parametrize("kind", ["avg_fn", "multi_avg_fn"])
@pytest.mark.parametrize(
    "decays", [(0.5, 0.99, 0.0, 1.0), (1, 0), (np.float64(0.25), np.float32(0.5))], ids=["floats", "ints", "numpy"]
)
def test_averages_of_other_decays_share_the_program(kind, decays, caplog):
    make = swa_utils.get_ema_avg_fn if kind == "avg_fn" else swa_utils.get_ema_multi_avg_fn
    tree = {"w": jnp.ones(11 + len(decays)), "v": jnp.ones((2, len(kind)))}
    AveragedModel(tree, **{kind: make(0.9)}).update_parameters(tree)
    results = {}

    def others():
        for decay in decays:
            averaged = AveragedModel(tree, **{kind: make(decay)})
            averaged.update_parameters(tree)
            averaged.update_parameters(jax.tree.map(jnp.zeros_like, tree))
            results[float(decay)] = float(averaged.module["w"][0])

    assert "jit(_update)" not in compiled_by(caplog, others)
    assert results == pytest.approx({decay: decay for decay in results})


@by_mode
def test_what_was_read_stays_as_it_was(mode):
    averaged, held = AveragedModel(ones(), **MODES[mode]), []
    for n in range(4):
        read = (averaged.module, averaged.n_averaged, averaged.state_dict())
        held.append((read, jax.tree.map(lambda x: np.array(x), read)))
        averaged.update_parameters(ones(float(n)))
    assert averaged.module is averaged.module
    for read, then in held:
        assert_same(read, then)
        assert not any(x.is_deleted() for x in jax.tree.leaves(read))


def deleted(tree):
    for x in jax.tree.leaves(tree):
        assert not x.is_deleted()
        x.delete()


@functools.partial(jax.jit, donate_argnums=0)
def donated(tree):
    return jax.tree.map(lambda x: x + 1, tree)


by_use = pytest.mark.parametrize("spend", [deleted, donated], ids=["deleted", "donated"])


@by_mode
@by_use
def test_the_users_arrays_are_the_users(mode, spend):
    mine = ones()
    averaged, reference = AveragedModel(mine, **MODES[mode]), AveragedModel(ones(), **MODES[mode])
    spend(mine)
    for x in (2.0, 3.0, 4.0):
        mine = ones(x)
        averaged.update_parameters(mine)
        spend(mine)
        reference.update_parameters(ones(x))
    assert_same(averaged.state_dict(), reference.state_dict())


@by_use
def test_the_arrays_of_a_loaded_state_dict_are_the_users(spend):
    averaged, reference = AveragedModel(ones()), AveragedModel(ones())
    reference.update_parameters(ones(2.0))
    saved = {key: jnp.array(x, copy=True) for key, x in reference.state_dict().items()}
    averaged.load_state_dict(saved)
    spend(saved)
    averaged.update_parameters(ones(5.0))
    reference.update_parameters(ones(5.0))
    assert_same(averaged.state_dict(), reference.state_dict())


def reused(shape, value, dtype=np.float32):
    """A NumPy array at an address at which JAX reads arrays in place."""
    space = np.empty(np.prod(shape) * 4 + 64, np.uint8)
    start = -space.ctypes.data % 64
    array = space[start : start + np.prod(shape) * 4].view(dtype).reshape(shape)
    array[:] = value
    return array


@pytest.mark.parametrize("mode", ["default", "custom-multi", "buffers"])
def test_numpy_arrays_may_change_after_each_call(mode):
    def given_tree(x):
        return {"a": reused((1000, 700), x), "b": reused((3,), x), "n": reused((1000, 700), x, np.int32)}

    def spoilt(tree):
        for x in jax.tree.leaves(tree):
            x[:] = 99

    for _ in range(8):  # whether a copy is late is a matter of chance
        mine = given_tree(1)
        averaged = AveragedModel(mine, **MODES[mode])
        spoilt(mine)
        assert_same(averaged.module, given_tree(1))
        mine = given_tree(2)
        averaged.update_parameters(mine)
        spoilt(mine)
        assert_same(averaged.module, given_tree(2))
        mine = given_tree(3)
        averaged.load_state_dict({"n_averaged": 2} | {f"module.{name}": x for name, x in mine.items()})
        spoilt(mine)
        assert_same(averaged.module, given_tree(3))


def raising(average, param, num_averaged):
    raise RuntimeError("no average today")


FAILURES = {
    "another tree": ({"w": jnp.ones(3)}, None, ValueError, "the model has nothing for 'b'"),
    "more arrays": ({"w": jnp.ones(3), "b": 1.0, "c": 1.0}, None, ValueError, "the model has 'c', which the average"),
    "None": ({"w": None, "b": 1.0}, None, ValueError, "the model has nothing for 'w'"),
    "another shape": ({"w": jnp.ones(4), "b": 1.0}, None, ValueError, r"'w' has shape \(4,\) in the model"),
    "a raising function": (None, {"avg_fn": raising}, RuntimeError, "no average today"),
    "a raising multi function": (None, {"multi_avg_fn": raising}, RuntimeError, "no average today"),
    "torch's way": (None, {"multi_avg_fn": lambda a, p, n: None}, TypeError, "a list of 2 arrays.*returned NoneType"),
    "too few": (None, {"multi_avg_fn": lambda a, p, n: a[:1]}, TypeError, "must return the new averages, a list of 2"),
    "no array": (None, {"avg_fn": lambda a, p, n: None}, (TypeError, AttributeError), "None"),
    "a larger result": (None, {"avg_fn": lambda a, p, n: jnp.stack([a, p])}, (TypeError, ValueError), "shape"),
    "a larger list": (None, {"multi_avg_fn": lambda a, p, n: [jnp.stack([x, x]) for x in a]}, Exception, "shape"),
    "a traced condition": (None, {"avg_fn": lambda a, p, n: a if n < 3 else p}, jax.errors.JAXTypeError, "traced"),
}


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "fresh"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_update_changes_nothing(failure, begun):
    tree, options, error, message = FAILURES[failure]
    good = [{"w": jnp.full(3, x), "b": jnp.asarray(x)} for x in (1.0, 2.0, 3.0)]
    averaged, reference = AveragedModel(good[0]), AveragedModel(good[0])
    for one in (averaged, reference):
        if begun:
            one.update_parameters(good[1])
    if options:
        broken = AveragedModel(good[0], **options)
        broken.load_state_dict(averaged.state_dict())
    else:
        broken = averaged
    before = snapshot(broken)
    with pytest.raises(error, match=f"(?s){message}"):
        broken.update_parameters(good[2] if tree is None else tree)
    assert_same(snapshot(broken), before)
    if options is None:
        broken.update_parameters(good[2])
        reference.update_parameters(good[2])
        assert_same(snapshot(averaged), snapshot(reference))


def test_a_function_that_fails_once_can_be_used_again():
    fail = [True]

    def average(averaged, param, num_averaged):
        if fail[0]:
            raise RuntimeError("not yet")
        return (averaged + param) / 2

    averaged = AveragedModel(ones(), avg_fn=average)
    with pytest.raises(RuntimeError, match="not yet"):
        averaged.update_parameters(ones(2.0))
    fail[0] = False
    averaged.update_parameters(ones(2.0))
    averaged.update_parameters(ones(4.0))
    assert averaged.module["params"]["small"].tolist() == [3, 3, 3]


def test_a_copy_goes_its_own_way():
    averaged = AveragedModel(ones(), **MODES["ema"])
    averaged.update_parameters(ones())
    for twin in (copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged))):
        twin.update_parameters(ones(5.0))
        assert (int(twin.n_averaged), int(averaged.n_averaged)) == (2, 1)
        assert (float(twin.module["params"]["small"][0]), float(averaged.module["params"]["small"][0])) == (3, 1)


# Batch statistics.


def apply_of(net):
    return lambda variables, x: net.apply(variables, x, mutable=["batch_stats"])


def batches(sizes, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(size, 3)) * 2 + 3).astype(dtype) for size in sizes]


MOMENTA = [(0.99, 0.9), (0.0, 0.999)]


def statistics_of(variables, xs, dtype=np.float64):
    """The mean over batches of each layer's batch statistics, from its definition, and the sizes of the batches."""
    params = jax.tree.map(lambda x: np.asarray(x, dtype), variables["params"])
    found = []
    for x in xs:
        x = np.asarray(x, dtype) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
        stats = {}
        for name in ("BatchNorm_0", "BatchNorm_1"):
            stats[name] = {"mean": x.mean(0), "var": x.var(0)}
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * params[name]["scale"] + params[name]["bias"]
            x = np.maximum(x, 0)
        found.append(stats)
    return jax.tree.map(lambda *values: np.mean(values, 0), *found)


@pytest.mark.parametrize("momenta", MOMENTA, ids=str)
def test_batch_statistics_are_the_mean_over_batches(momenta):
    net, variables, xs = Net(*momenta), variables_of(), batches([16, 9, 16, 16, 9])
    averaged = AveragedModel(variables)
    averaged.update_parameters(variables)
    new = update_bn(((x, "label") for x in xs), averaged, apply_of(net))
    # A layer without momentum passes the statistics of its batch on.
    direct = jax.jit(apply_of(Net(0.0, 0.0)))
    single = [jax.tree.map(np.float64, direct(variables, x)[1]["batch_stats"]) for x in xs]
    assert_close(named(new), named(jax.tree.map(lambda *s: np.mean(s, 0), *single)), rtol=1e-6)
    assert_close(named(new), named(statistics_of(variables, xs)), rtol=1e-5)
    assert_same(averaged.module, {"params": variables["params"], "batch_stats": new})
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(new))


@pytest.mark.parametrize("momenta", MOMENTA, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-12)], ids=["float32", "float64"])
def test_batch_statistics_agree_with_torch(momenta, dtype, rtol):
    with jax.enable_x64(dtype is np.float64):
        size, variables = 16, variables_of(3, dtype)
        xs = batches([size] * 7, dtype)
        module = TorchNet(*momenta).to(torch.float64 if dtype is np.float64 else torch.float32)
        module.fill(variables)
        theirs_averaged, averaged = theirs.AveragedModel(module), AveragedModel(variables)
        theirs_averaged.update_parameters(module)
        averaged.update_parameters(variables)
        theirs.update_bn([tensor(x) for x in xs], theirs_averaged)
        update_bn(xs, averaged, apply_of(Net(*momenta, dtype=dtype)))
        torchs = theirs_averaged.module.variables()["batch_stats"]
        for name, stats in averaged.module["batch_stats"].items():
            assert stats["mean"].dtype == dtype
            np.testing.assert_allclose(stats["mean"], torchs[name]["mean"], rtol=rtol)
            # torch's variance is the unbiased one.
            np.testing.assert_allclose(stats["var"], torchs[name]["var"] * (size - 1) / size, rtol=rtol)
        x = xs[0]
        ours = Net(*momenta, dtype=dtype).apply(averaged.module, x, train=False)
        theirs_averaged.eval()
        for name in ("BatchNorm_0", "BatchNorm_1"):
            getattr(theirs_averaged.module, name).running_var.mul_((size - 1) / size)
        np.testing.assert_allclose(ours, numpy(theirs_averaged(tensor(x))), rtol=100 * rtol)


def linear_apply(momentum, form="flax"):
    """A model that keeps the mean of its batches."""

    def apply(variables, x):
        old, batch = variables["batch_stats"]["mean"], x.mean(0)
        new = momentum * old + (1 - momentum) * batch if form == "flax" else old + (1 - momentum) * (batch - old)
        return x - batch, {"batch_stats": {"mean": new}}

    return apply


def linear_variables(width=3):
    return {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.zeros(width)}}


# 0.987654321 has more digits than float32, in which 1 - momentum is off by 2e-6.
@pytest.mark.parametrize(
    ("momentum", "form"),
    [(momentum, "flax") for momentum in (0.0, 0.1, 0.9, 0.99, 0.9999, 0.987654321)]
    + [(momentum, "torch") for momentum in (0.0, 0.999, 1 - 2**-7)],
    ids=str,
)
def test_the_momentum_of_a_layer_is_found(momentum, form):
    averaged = AveragedModel(linear_variables())
    xs = batches([4, 5, 6])
    new = update_bn(xs, averaged, linear_apply(momentum, form))
    # What float32 has lost of the momentum shows in the statistics, divided by 1 - momentum.
    lost = abs(float(np.float32(momentum)) - momentum) / (1 - momentum) if momentum == 0.987654321 else 0
    np.testing.assert_allclose(new["mean"], np.mean([x.mean(0) for x in xs], 0), rtol=1e-6 + 2 * lost)


@pytest.mark.slow  # every momentum is another program
@settings(max_examples=40, deadline=None)
@given(momentum=st.floats(0, 0.9999), form=st.sampled_from(["flax", "torch"]))
@example(momentum=1.6395889532038418e-16, form="torch")
def test_any_momentum_is_found_in_float64(momentum, form):
    with jax.enable_x64(True):
        averaged = AveragedModel(linear_variables())
        xs = batches([4, 5], np.float64)
        new = update_bn(xs, averaged, linear_apply(momentum, form))
        np.testing.assert_allclose(new["mean"], np.mean([x.mean(0) for x in xs], 0), rtol=1e-11)


LOADERS = {
    "arrays": lambda xs: xs,
    "tuples": lambda xs: [(x, np.zeros(len(x))) for x in xs],
    "lists": lambda xs: [[x, None] for x in xs],
    "generator": lambda xs: (x for x in xs),
    "jax": lambda xs: map(jnp.asarray, xs),
    "torch": lambda xs: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.tensor(np.concatenate(xs))), batch_size=4, collate_fn=collated
    ),
}


def collated(samples):
    return [np.stack([x.numpy() for (x,) in samples])]


@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_give_batches_or_tuples_of_them(loader):
    xs = batches([4, 4, 4, 2])
    averaged = AveragedModel(linear_variables())
    update_bn(LOADERS[loader](xs), averaged, linear_apply(0.9))
    np.testing.assert_allclose(averaged.module["batch_stats"]["mean"], np.mean([x.mean(0) for x in xs], 0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_statistics_in_half_precision_are_right_to_their_digits(dtype):
    variables = linear_variables()
    variables["batch_stats"]["mean"] = variables["batch_stats"]["mean"].astype(dtype)
    averaged, xs = AveragedModel(variables), batches([4, 5, 6])

    def apply(variables, x):
        updates = linear_apply(0.99)(variables, x)[1]
        return x, jax.tree.map(lambda x: x.astype(dtype), updates)

    new = update_bn(xs, averaged, apply)
    assert averaged.module["batch_stats"]["mean"].dtype == dtype
    expected = np.mean([x.mean(0) for x in xs], 0)
    np.testing.assert_allclose(np.asarray(new["mean"], float), expected, rtol=4 * float(jnp.finfo(dtype).eps))


def test_flax_takes_frozen_variables():
    variables, xs = flax.core.freeze(variables_of()), batches([16, 9])
    averaged = AveragedModel(variables)
    new = update_bn(xs, averaged, apply_of(Net()))
    assert_close(named(flax.core.unfreeze(new)), named(statistics_of(variables, xs)), rtol=1e-5)
    assert isinstance(averaged.module, flax.core.FrozenDict)


def test_a_batch_may_be_a_tree():
    def apply(variables, batch):
        return None, {"batch_stats": {"mean": 0.9 * variables["batch_stats"]["mean"] + 0.1 * batch["x"].mean(0)}}

    averaged = AveragedModel(linear_variables())
    new = update_bn([{"x": np.ones((4, 3))}, {"x": 3 * np.ones((2, 3))}], averaged, apply)
    np.testing.assert_allclose(new["mean"], 2, rtol=1e-6)


def test_a_model_without_batch_statistics_is_left_alone():
    for tree in ({"params": {"w": jnp.ones(2)}}, {"params": {"w": jnp.ones(2)}, "batch_stats": {}}, {"w": jnp.ones(2)}):
        averaged = AveragedModel(tree)
        before, loader = snapshot(averaged), iter([1])
        assert update_bn(loader, averaged, raising) is None
        assert_same(snapshot(averaged), before)
        assert next(loader) == 1  # nothing was read
    theirs.update_bn([1], torch.nn.Linear(1, 1))  # as in torch


def bad_statistics(variables, x):
    raise RuntimeError("no statistics today")


def largest(variables, x):
    return x, {"batch_stats": {"mean": jnp.maximum(variables["batch_stats"]["mean"], x.max(0))}}


@pytest.mark.parametrize(
    ("loader", "apply_fn", "error", "message"),
    [
        ([], linear_apply(0.9), ValueError, "without batches"),
        ([np.ones((4, 3))], bad_statistics, RuntimeError, "no statistics"),
        ([np.ones((4, 3)), np.ones((4, 2))], linear_apply(0.9), (TypeError, ValueError), "shape"),
        ([np.ones((4, 3))], largest, ValueError, "momentum"),
        ([np.ones((4, 3))], lambda v, x: (x, v), ValueError, "momentum"),
        ([np.ones((4, 3))], linear_apply(1.0), ValueError, "momentum"),
        ([np.ones((4, 3))], linear_apply(-0.5), ValueError, "momentum"),
    ],
    ids=["empty", "raising", "shape", "maximum", "unchanged", "momentum of one", "negative momentum"],
)
def test_statistics_that_cannot_be_computed_change_nothing(loader, apply_fn, error, message):
    averaged = AveragedModel(linear_variables())
    averaged.update_parameters(linear_variables())
    before = snapshot(averaged)
    with pytest.raises(error, match=message):
        update_bn(loader, averaged, apply_fn)
    assert_same(snapshot(averaged), before)
    averaged.update_parameters(linear_variables())


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("freeze", [dict, flax.core.FrozenDict, OrderedDict], ids=["dict", "FrozenDict", "OrderedDict"])
def test_the_statistics_find_their_place_in_any_mapping(freeze, use_buffers):
    tree = freeze(
        {"params": {"w": jnp.full(3, 7.0)}, "cache": {"k": jnp.full(3, 5.0)}, "batch_stats": {"mean": jnp.zeros(3)}}
    )
    averaged = AveragedModel(tree, use_buffers=use_buffers)
    averaged.update_parameters(tree)
    update_bn([np.full((2, 3), 4.0, np.float32)], averaged, linear_apply(0.9))
    assert type(averaged.module) is type(tree)
    found = {name: float(jax.tree.leaves(averaged.module[name])[0][0]) for name in tree}
    assert found == pytest.approx({"params": 7.0, "cache": 5.0, "batch_stats": 4.0})
    assert int(averaged.n_averaged) == 1
    averaged.update_parameters(tree)  # and goes on
    stats = float(averaged.module["batch_stats"]["mean"][0])
    assert stats == pytest.approx(2.0 if use_buffers else 0.0)


def test_statistics_do_not_round_an_average_of_bfloat16():
    trees = [
        {"params": {"w": np.full(3, x, jnp.bfloat16)}, "batch_stats": {"mean": np.zeros(3)}} for x in [1, *[2] * 40]
    ]
    averaged = AveragedModel(trees[0], avg_fn=swa_utils.get_ema_avg_fn(0.999))
    for tree in trees:
        averaged.update_parameters(tree)
        update_bn([np.ones((2, 3), np.float32)], averaged, HALF)
    expected = averaged_by_us([{"w": tree["params"]["w"]} for tree in trees], avg_fn=swa_utils.get_ema_avg_fn(0.999))
    assert_same({"w": averaged.module["params"]["w"]}, expected)


HALF = linear_apply(0.5)


def test_the_model_is_compiled_once_for_all_batches():
    calls = []

    def apply(variables, x):
        calls.append(x)
        return linear_apply(0.9)(variables, x)

    averaged = AveragedModel(linear_variables())
    update_bn(batches([8] * 5), averaged, apply)
    first = len(calls)
    update_bn(batches([8] * 9), averaged, apply)
    assert first <= 4  # once compiled, the others for the momentum
    assert len(calls) - first < first


def test_statistics_of_an_optimizers_average():
    variables, xs = variables_of(1), batches([8, 8])
    opt = optim.SGD(variables["params"], lr=0.1)
    averaged = AveragedModel(opt)
    averaged.update_parameters(opt)
    for _ in range(2):
        opt.minimize(bowl)
        averaged.update_parameters(opt)
    before, mine = snapshot(averaged), jax.tree.map(jnp.asarray, variables["batch_stats"])
    new = update_bn(xs, averaged, apply_of(Net()), batch_stats=mine)
    assert_close(named(new), named(statistics_of({"params": averaged.module}, xs)), rtol=1e-5)
    assert_same(snapshot(averaged), before)  # it has no place for them
    assert_same(mine, variables["batch_stats"])
    out = Net().apply({"params": averaged.module, "batch_stats": new}, xs[0], train=False)
    assert np.all(np.isfinite(out))
    assert update_bn(xs, averaged, raising) is None


def test_statistics_of_an_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 5, rngs=rngs)
            self.norm = nnx.BatchNorm(5, momentum=0.95, use_fast_variance=False, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    graphdef, params, stats = nnx.split(Model(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def apply(variables, x):
        model = nnx.merge(graphdef, variables["params"], variables["batch_stats"])
        return model(x), {"batch_stats": nnx.state(model, nnx.BatchStat)}

    xs = batches([8, 5])
    averaged = AveragedModel({"params": params, "batch_stats": stats})
    averaged.update_parameters({"params": params, "batch_stats": stats})
    update_bn(xs, averaged, apply)
    assert "module.batch_stats.norm.mean" in averaged.state_dict()
    linear = params["linear"]
    outputs = [np.asarray(x @ linear["kernel"][...] + linear["bias"][...], np.float64) for x in xs]
    expected = {"mean": np.mean([x.mean(0) for x in outputs], 0), "var": np.mean([x.var(0) for x in outputs], 0)}
    model = nnx.merge(graphdef, averaged.module["params"], averaged.module["batch_stats"])
    for name in expected:
        np.testing.assert_allclose(getattr(model.norm, name)[...], expected[name], rtol=2e-5, atol=1e-6)


# SWALR.


def pair(lrs=(0.1,), dtype=None):
    """An optimizer of torch and one of ours, with a group for each rate."""
    ours = optim.SGD([{"params": [np.zeros(1)], "lr": lr if dtype is None else jnp.asarray(lr, dtype)} for lr in lrs])
    torchs = torch.optim.SGD(
        [
            {
                "params": [torch.zeros(1, requires_grad=True)],
                "lr": lr if dtype is None else torch.tensor(lr, dtype=torch.float64),
            }
            for lr in lrs
        ]
    )
    for opt in (ours, torchs):
        opt.step([[np.zeros(1)]] * len(lrs)) if opt is ours else opt.step()
    return ours, torchs


def after(opt):
    """A step of the optimizer, which schedulers want to see first."""
    opt.step([[np.zeros(1)] for _ in opt.param_groups]) if isinstance(opt, optim.Optimizer) else opt.step()


def rates(opt):
    return [float(group["lr"]) for group in opt.param_groups]


def same_rates(ours, torchs, schedulers, steps=200):
    for n in range(steps + 1):
        assert rates(ours) == rates(torchs), n
        for scheduler, opt in zip(schedulers, (ours, torchs), strict=True):
            assert scheduler.get_last_lr() == rates(opt)
            if n == 0:
                after(opt)
            scheduler.step()


OPTIONS = [
    {"swa_lr": 0.05},
    {"swa_lr": 0.05, "anneal_strategy": "linear"},
    *({"swa_lr": 0.3, "anneal_epochs": n, "anneal_strategy": s} for n in (0, 1, 2, 7, 300) for s in ("cos", "linear")),
    {"swa_lr": 0.0},
    {"swa_lr": 1e-5, "anneal_epochs": 150},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_rates_are_torchs_exactly(options):
    ours, torchs = pair()
    same_rates(ours, torchs, (SWALR(ours, **options), theirs.SWALR(torchs, **options)))
    assert ours.param_groups[0]["swa_lr"] == torchs.param_groups[0]["swa_lr"]


@settings(max_examples=40, deadline=None)
@given(
    lr=st.floats(1e-8, 1e3),
    swa_lr=st.floats(0, 1e3),
    anneal_epochs=st.integers(0, 60),
    anneal_strategy=st.sampled_from(["cos", "linear"]),
)
def test_any_rates_are_torchs_exactly(lr, **options):
    ours, torchs = pair((lr,))
    same_rates(ours, torchs, (SWALR(ours, **options), theirs.SWALR(torchs, **options)), 70)


@pytest.mark.parametrize("swa_lr", [0.05, [0.05, 0.01, 0.2], (0.0, 1.0, 0.1)], ids=str)
def test_each_group_has_its_rate(swa_lr):
    ours, torchs = pair((0.1, 0.01, 1.0))
    options = {"swa_lr": swa_lr, "anneal_epochs": 30}
    same_rates(ours, torchs, (SWALR(ours, **options), theirs.SWALR(torchs, **options)))
    assert [group["swa_lr"] for group in ours.param_groups] == [group["swa_lr"] for group in torchs.param_groups]


def test_rates_that_are_arrays_stay_arrays(x64):
    ours, torchs = pair((0.1, 0.2), np.float64)
    same_rates(ours, torchs, (SWALR(ours, 0.05), theirs.SWALR(torchs, 0.05)), 20)
    assert all(isinstance(group["lr"], jax.Array) for group in ours.param_groups)


@pytest.mark.parametrize("when", [0, 3, 12])
@pytest.mark.parametrize("anneal_strategy", ["cos", "linear"])
def test_a_change_of_the_rate_by_hand_is_followed_as_in_torch(when, anneal_strategy):
    ours, torchs = pair()
    schedulers = [
        cls(opt, 0.05, anneal_strategy=anneal_strategy) for cls, opt in ((SWALR, ours), (theirs.SWALR, torchs))
    ]
    for opt in (ours, torchs):
        after(opt)
    for n in range(20):
        for scheduler, opt in zip(schedulers, (ours, torchs), strict=True):
            if n == when:
                opt.param_groups[0]["lr"] = 0.7
            if n == when + 2:
                opt.param_groups[0]["swa_lr"] = 0.02
            scheduler.step()
        assert rates(ours) == rates(torchs)


BAD = [
    ({"swa_lr": 0.1, "anneal_strategy": "x"}, "anneal_strategy must be one of 'cos' or 'linear', instead got x"),
    ({"swa_lr": 0.1, "anneal_epochs": -1}, "anneal_epochs must be equal or greater than 0, got -1"),
    ({"swa_lr": 0.1, "anneal_epochs": 1.5}, "anneal_epochs must be equal or greater than 0, got 1.5"),
    (
        {"swa_lr": [0.1, 0.2]},
        "swa_lr must have the same length as optimizer.param_groups. swa_lr has 2 values, param_groups has 1.",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda x: str(x)[:30])
def test_bad_options_raise_what_torch_raises(options, message):
    ours, torchs = pair()
    before = dict(ours.param_groups[0])
    for cls, opt in ((SWALR, ours), (theirs.SWALR, torchs)):
        with pytest.raises(ValueError, match=re.escape(message)):
            cls(opt, **options)
    assert dict(ours.param_groups[0]) == before


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="int is not an Optimizer"):
        SWALR(3, 0.1)
    ours, _ = pair()
    with pytest.raises(KeyError, match="initial_lr"):
        SWALR(ours, 0.1, last_epoch=3)


def test_reading_the_next_rate_is_warned_about():
    for cls, opt in zip((SWALR, theirs.SWALR), pair(), strict=True):
        scheduler = cls(opt, 0.05)
        with pytest.warns(UserWarning, match="please use `get_last_lr") as caught:
            scheduler.get_lr()
        assert caught[0].filename == __file__


@pytest.mark.parametrize("steps", [0, 4, 15])
def test_the_schedulers_state_goes_to_torch_and_back(steps):
    ours, torchs = pair((0.1, 0.3))
    schedulers = [cls(opt, [0.05, 0.01], 9, "linear") for cls, opt in ((SWALR, ours), (theirs.SWALR, torchs))]
    for scheduler, opt in zip(schedulers, (ours, torchs), strict=True):
        after(opt)
        for _ in range(steps):
            scheduler.step()
    saved, torchs_saved = (scheduler.state_dict() for scheduler in schedulers)
    assert saved == torchs_saved
    new_ours, new_torchs = pair((1.0, 1.0))
    new = [SWALR(new_ours, 0.5), theirs.SWALR(new_torchs, 0.5)]
    for opt, source in ((new_ours, torchs), (new_torchs, ours)):
        after(opt)
        for group, other in zip(opt.param_groups, source.param_groups, strict=True):
            group.update({key: other[key] for key in ("lr", "swa_lr", "initial_lr")})
    new[0].load_state_dict(copy.deepcopy(torchs_saved))
    new[1].load_state_dict(copy.deepcopy(saved))
    for _ in range(20):
        for scheduler in (*schedulers, *new):
            scheduler.step()
        assert rates(ours) == rates(torchs) == rates(new_ours) == rates(new_torchs)
    assert new[0].state_dict() == new[1].state_dict() == schedulers[0].state_dict()
    assert pickle.loads(pickle.dumps(saved)) == saved


def test_a_state_dict_is_not_changed_by_loading_it():
    ours, _ = pair()
    scheduler = SWALR(ours, 0.05)
    after(ours)
    saved = scheduler.state_dict()
    kept = copy.deepcopy(saved)
    scheduler.load_state_dict(saved)
    scheduler.step()
    assert saved == kept


def test_a_resumed_scheduler_has_the_rate_of_that_many_steps():
    # torch's is one step behind there.
    ours, _ = pair((0.1, 0.4))
    scheduler, seen = SWALR(ours, 0.05, 6), []
    after(ours)
    for _ in range(10):
        seen.append(rates(ours))
        scheduler.step()
    for last_epoch in (0, 2, 5, 8):
        resumed, _ = pair((1.0, 1.0))
        for group, lr in zip(resumed.param_groups, (0.1, 0.4), strict=True):
            group["initial_lr"] = lr
        other = SWALR(resumed, 0.05, 6, last_epoch=last_epoch)
        after(resumed)
        assert rates(resumed) == seen[last_epoch + 1]
        for n in range(last_epoch + 2, 10):
            other.step()
            assert rates(resumed) == seen[n]


def side_of(opt):
    """The schedulers that belong to an optimizer."""
    return (optim.lr_scheduler, SWALR) if isinstance(opt, optim.Optimizer) else (torch.optim.lr_scheduler, theirs.SWALR)


COMBINED = {
    "second": lambda lib, swa, opt: lib.SequentialLR(
        opt, [lib.ExponentialLR(opt, 0.9), swa(opt, 0.05, 7)], milestones=[20]
    ),
    "first": lambda lib, swa, opt: lib.SequentialLR(
        opt, [swa(opt, 0.05, 7, "linear"), lib.StepLR(opt, 10)], milestones=[30]
    ),
    "after a warmup": lambda lib, swa, opt: lib.SequentialLR(
        opt, [lib.LinearLR(opt), lib.CosineAnnealingLR(opt, 40), swa(opt, 0.03)], milestones=[5, 45]
    ),
    "at once": lambda lib, swa, opt: lib.SequentialLR(opt, [lib.ConstantLR(opt), swa(opt, 0.05)], milestones=[1]),
    "chained": lambda lib, swa, opt: lib.ChainedScheduler([lib.ExponentialLR(opt, 0.99), swa(opt, 0.05, 30)]),
    "chained first": lambda lib, swa, opt: lib.ChainedScheduler([swa(opt, 0.05, 30, "linear"), lib.StepLR(opt, 50)]),
    "twice": lambda lib, swa, opt: lib.ChainedScheduler([swa(opt, 0.05, 30), swa(opt, 0.2, 10)]),
}


@pytest.mark.parametrize("combined", COMBINED)
def test_combinations_have_torchs_rates_exactly(combined):
    ours, torchs = pair((0.1, 0.5))
    schedulers = []
    for opt in (ours, torchs):
        schedulers.append(COMBINED[combined](*side_of(opt), opt))
    same_rates(ours, torchs, schedulers)


@pytest.mark.parametrize("start", [0, 1, 25])
def test_it_takes_over_from_another_scheduler(start):
    # The example of torch's documentation: both exist from the beginning, and one at a time is stepped.
    ours, torchs = pair()
    schedulers = []
    for opt in (ours, torchs):
        lib, swa = side_of(opt)
        first = lib.MultiplicativeLR(opt, lambda epoch: 0.9)
        schedulers.append((first, swa(opt, anneal_strategy="linear", anneal_epochs=20, swa_lr=0.05)))
        after(opt)
    for n in range(60):
        for first, second in schedulers:
            (second if n >= start else first).step()
        assert rates(ours) == rates(torchs)


def test_a_new_rate_compiles_nothing():
    ours, _ = pair()
    scheduler = SWALR(ours, 0.05)
    after(ours)
    before = optim.program.advance._cache_size()
    for _ in range(12):
        scheduler.step()
        after(ours)
    assert optim.program.advance._cache_size() == before


# The pure functions.


def by_formula(trees, decay=None, debias=False):
    """The averages after each update, in float64."""
    sums = moment = None
    average, found = None, []
    for n, tree in enumerate(trees):
        x = np.asarray(tree, np.complex128 if np.iscomplexobj(tree) else np.float64)
        if decay is None:
            sums = x if n == 0 else sums + x
            average = sums / (n + 1)
        elif debias:
            moment = (1 - decay) * x if n == 0 else decay * moment + (1 - decay) * x
            average = moment / (1 - decay ** (n + 1))
        else:
            average = x if n == 0 else decay * average + (1 - decay) * x
        found.append(average)
    return found


PURE = {
    "swa": (averaging.swa, {}),
    **{f"ema-{decay}": (averaging.ema, {"decay": decay}) for decay in DECAYS},
    **{f"debiased-{decay}": (averaging.ema, {"decay": decay, "debias": True}) for decay in DECAYS[:-1]},
}
by_few = pytest.mark.parametrize("kind", ["swa", "ema-0.9", "debiased-0.9"])


def made(kind):
    function, options = PURE[kind]
    return function(**options)


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [(kind, True) for kind in PURE] + [(kind, False) for kind in ("swa", "ema-0.9", "debiased-0.9")],
    ids=lambda x: {True: "jit", False: "eager"}.get(x, x),
)
def test_the_pure_functions_follow_their_formulas(kind, compiled, x64):
    average = made(kind)
    xs = [tree["a"] for tree in draws(UPDATES if compiled else 10, shapes={"a": (5,)})]
    state = average.init({"a": jnp.asarray(xs[0]) * 3})
    assert_same(state.average, {"a": xs[0] * 3})
    update = jax.jit(average.update, donate_argnums=0) if compiled else average.update
    for n, (x, expected) in enumerate(zip(xs, by_formula(xs, **PURE[kind][1]), strict=True)):
        state = update(state, {"a": jnp.asarray(x)})
        np.testing.assert_allclose(state.average["a"], expected, rtol=0, atol=1e-12)
        assert int(state.n_averaged) == n + 1


@settings(max_examples=25, deadline=None)
@given(
    decay=st.one_of(st.sampled_from(DECAYS[:-1]), st.floats(0, 1 - 1e-6)),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-30, 30),
)
def test_debiasing_is_adams(decay, seed, exponent):
    xs = np.random.default_rng(seed).normal(size=(50, 3)) * 10.0**exponent
    expected = by_formula(xs, decay, True)[-1]
    # One float32 rounding in each step, of numbers as large as the largest.
    for wide, digits in ((True, 1e-9), (False, 3e-6)):
        with jax.enable_x64(wide):
            state = final_average(Decay.of(decay), True, xs.astype(jnp.result_type(float)))
            np.testing.assert_allclose(state.average, expected, rtol=0, atol=digits * np.abs(xs).max())


@functools.partial(jax.jit, static_argnums=1)
def final_average(decay, debias, xs):
    average = averaging.ema(decay, debias)
    return jax.lax.scan(lambda state, x: (average.update(state, x), None), average.init(xs[0]), xs)[0]


def test_debiased_weights_tend_to_the_mean():
    xs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    for decay in (1 - 1e-7, 1.0):
        state = final_average(Decay.of(decay), True, xs)
        np.testing.assert_allclose(state.average, xs.astype(np.float64).mean(0), rtol=0, atol=3e-6, err_msg=str(decay))


def test_the_averages_are_the_classes():
    trees = draws(20, dtype=np.float32)
    for average, options in ((averaging.swa(), {}), (averaging.ema(0.9), PAIRS["ema-multi-0.9"][0])):
        state = average.init(trees[0])
        update = jax.jit(average.update)
        for tree in trees:
            state = update(state, tree)
        assert_close(named(jax.tree.map(np.asarray, state.average)), averaged_by_us(trees, **options), atol=1e-6)


@by_few
def test_the_first_update_copies_what_there_is(kind):
    average = made(kind)
    state = average.init(jnp.asarray(SPECIAL[::-1]))
    state = jax.jit(average.update)(state, jnp.asarray(SPECIAL))
    np.testing.assert_array_equal(state.average, SPECIAL)
    assert np.signbit(state.average[3])


@by_few
def test_leaves_of_every_kind(kind):
    average = made(kind)
    decay, debias = PURE[kind][1].get("decay"), PURE[kind][1].get("debias", False)
    values = np.random.default_rng(0).normal(size=(6, 3)) + 2

    def tree(x):
        return {
            "none": None,
            "half": jnp.asarray(x, jnp.bfloat16),
            "complex": jnp.asarray(x * (1 + 2j), jnp.complex64),
            "count": jnp.asarray(np.round(x * 100), jnp.int32),
            "flag": jnp.asarray(x > 2),
            "number": float(x[0]),
        }

    state = average.init(tree(values[0]))
    update = jax.jit(average.update)
    begun = state
    for x in values:
        state = update(state, tree(x))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, begun)
    assert state.average["none"] is None
    assert state.average["half"].dtype == state.average["number"].dtype == np.float32
    assert state.average["count"].tolist() == np.round(values[-1] * 100).tolist()
    assert state.average["flag"].tolist() == (values[-1] > 2).tolist()
    halves = [np.asarray(x.astype(jnp.bfloat16), np.float64) for x in values]
    np.testing.assert_allclose(state.average["half"], by_formula(halves, decay, debias)[-1], rtol=1e-6)
    expected = by_formula([x * (1 + 2j) for x in values], decay, debias)[-1]
    np.testing.assert_allclose(state.average["complex"], expected, rtol=1e-6)
    np.testing.assert_allclose(state.average["number"], by_formula(values, decay, debias)[-1][0], rtol=1e-6)


def test_keys_of_random_numbers_are_copied():
    trees = [{"w": jnp.full(2, float(n)), "rng": jax.random.key(n)} for n in range(4)]
    averaged, average = AveragedModel(trees[0]), averaging.swa()
    state = average.init(trees[0])
    for tree in trees:
        averaged.update_parameters(tree)
        state = average.update(state, tree)
    for result in (averaged.module, copy.deepcopy(averaged).module, state.average):
        assert result["w"].tolist() == [1.5, 1.5]
        assert jnp.array_equal(jax.random.key_data(result["rng"]), jax.random.key_data(trees[-1]["rng"]))


@by_few
def test_a_donated_scan_carries_the_average(kind):
    average = made(kind)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(8, 200, 100)), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, xs):
        return jax.lax.scan(lambda state, x: (average.update(state, {"w": x, "n": jnp.int32(3)}), None), state, xs)[0]

    state = average.init({"w": xs[0], "n": 2})
    result = run(state, xs)
    assert state.average["w"].is_deleted()
    assert not xs.is_deleted()
    state, update = average.init({"w": xs[0], "n": 2}), jax.jit(average.update)
    for x in xs:
        state = update(state, {"w": x, "n": 3})
    np.testing.assert_allclose(result.average["w"], state.average["w"], rtol=0, atol=1e-6)
    assert (int(result.n_averaged), int(result.average["n"])) == (8, 3)


@pytest.mark.parametrize("debias", [False, True], ids=["plain", "debiased"])
def test_vmap_over_decays_equals_a_loop(debias):
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(10, 4)), jnp.float32)
    decays = jnp.array([0.0, 0.3, 0.9, 0.99])
    swept = jax.vmap(lambda decay: final_average(decay, debias, xs).average)(decays)
    for row, decay in zip(swept, decays, strict=True):
        expected = by_formula(np.asarray(xs), float(decay), debias)[-1]
        # A decay in float32 has lost the digits of its complement: 3e-8 of 0.01 is 3e-6.
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5)
    exact = jax.vmap(jax.tree_util.Partial(one_average, debias=debias, xs=xs))(Decay.of(np.asarray(decays, np.float64)))
    for row, decay in zip(exact, np.asarray(decays, np.float64), strict=True):
        np.testing.assert_allclose(row, by_formula(np.asarray(xs), decay, debias)[-1], rtol=0, atol=2e-6)


def one_average(decay, debias, xs):
    return final_average(decay, debias, xs).average


@functools.partial(jax.jit, static_argnums=1)
def slopes(decay, debias, xs):
    """The sum of squares of the average, and its derivatives by the decay and by all parameters."""

    def loss(decay, xs):
        return jnp.sum(final_average(decay, debias, xs).average ** 2)

    return loss(decay, xs), *jax.grad(loss, (0, 1))(decay, xs)


SERIES = np.random.default_rng(0).normal(size=(6, 4))


@pytest.mark.parametrize("debias", [False, True], ids=["plain", "debiased"])
@pytest.mark.parametrize("decay", [0.1, 0.4, 0.7, 0.999])
def test_the_derivative_by_the_decay_is_the_finite_difference(decay, debias, x64):
    h = 1e-6
    ahead, behind = (slopes(decay + step, debias, SERIES)[0] for step in (h, -h))
    assert float(slopes(decay, debias, SERIES)[1]) == pytest.approx(float((ahead - behind) / (2 * h)), rel=1e-6)


@pytest.mark.parametrize("debias", [False, True], ids=["plain", "debiased"])
def test_derivatives_are_finite_at_the_ends(debias, x64):
    for decay in (0.0, 1.0):
        assert np.isfinite(slopes(decay, debias, SERIES)[1]), decay


def test_the_derivative_by_the_parameters_is_their_weight(x64):
    for debias, weights in ((False, [1, 1, 2, 4, 8, 16]), (True, [1, 2, 4, 8, 16, 32])):
        weights = np.array(weights)[:, None] / np.sum(weights)
        expected = 2 * weights * np.sum(weights * SERIES, 0)
        np.testing.assert_allclose(slopes(0.5, debias, SERIES)[2], expected, rtol=1e-12)


@by_few
def test_packed_trees_are_averaged_as_they_are(kind):
    average, trees = made(kind), draws(6, dtype=np.float32)
    state, packed = average.init(trees[0]), average.init(pack(trees[0]))
    update = jax.jit(average.update)
    for tree in trees:
        state, packed = update(state, tree), update(packed, pack(tree))
    assert len(jax.tree.leaves(packed.average)) == 2
    assert_close(named(packed.average.unpack()), named(state.average), atol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def test_averages_are_sharded_like_their_parameters(axis_type):
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    sharding = NamedSharding(mesh, P("x", "y"))
    values = [np.full((8, 4), x, np.float32) for x in (1.0, 2.0, 6.0)]

    def on_mesh(x):
        return {"w": jax.device_put(jnp.asarray(x), sharding), "b": jnp.asarray(x)[0]}

    with jax.set_mesh(mesh):
        for average, expected in ((averaging.swa(), 3.0), (averaging.ema(0.5, debias=True), 29 / 7)):
            state, update = average.init(on_mesh(values[0])), jax.jit(average.update)
            for x in values:
                state = update(state, on_mesh(x))
                assert state.average["w"].sharding.is_equivalent_to(sharding, 2)
            np.testing.assert_allclose(state.average["w"], expected, rtol=1e-6)
        for options, expected in (({}, 3.0), ({"avg_fn": larger_by_modulus}, 6.0)):
            averaged = AveragedModel(on_mesh(values[0]), **options)
            for x in values:
                averaged.update_parameters(on_mesh(x))
                assert averaged.module["w"].sharding.is_equivalent_to(sharding, 2)
            np.testing.assert_allclose(averaged.module["w"], expected, rtol=1e-6)
            saved = averaged.state_dict()
            averaged.load_state_dict(saved)
            assert copy.deepcopy(averaged).module["w"].sharding.is_equivalent_to(sharding, 2)
            averaged.update_parameters(on_mesh(values[0]))
            assert averaged.module["w"].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.ones(2)}, "params has nothing for 'b.c'"),
        ({"w": jnp.ones(2), "b": {"c": jnp.ones(1), "d": 1.0}}, "params has 'b.d', which the average lacks"),
        ({"w": jnp.ones(3), "b": {"c": jnp.ones(1)}}, r"'w' has shape \(3,\) in params, but \(2,\) in the average"),
        ({"w": None, "b": {"c": jnp.ones(1)}}, "params has nothing for 'w', but the average has an array"),
        ({"w": jnp.ones(2), "b": {"c": jnp.ones((1, 1))}}, r"'b.c' has shape \(1, 1\)"),
    ],
    ids=["missing", "extra", "shape", "None", "broadcast"],
)
def test_errors_name_the_parameter(params, message):
    for average in (averaging.swa(), averaging.ema(0.9)):
        state = average.init({"w": jnp.ones(2), "b": {"c": jnp.ones(1)}})
        for update in (average.update, jax.jit(average.update)):
            with pytest.raises(ValueError, match=message):
                update(state, params)
        with pytest.raises(ValueError, match="the average has nothing for 'x', but params has an array"):
            average.update(average.init({"x": None}), {"x": jnp.ones(1)})


def test_a_decay_may_be_given_with_its_complement():
    xs = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    for decay in (0.999, Decay(0.999, 1e-3), np.float64(0.999), np.array(0.999)):
        average = averaging.ema(decay)
        state = average.init(xs[0])
        for x in xs:
            state = average.update(state, x)
        np.testing.assert_allclose(state.average, by_formula(xs, 0.999)[-1], rtol=1e-6)


def test_arrays_given_to_the_pure_functions_are_not_aliased():
    mine = jnp.ones(3)
    average = averaging.swa()
    state = average.init(mine)
    jax.jit(average.update, donate_argnums=0)(state, mine)
    assert not mine.is_deleted()
    for _ in range(10):  # whether a copy is late is a matter of chance
        given_array = reused((1000, 700), 1)
        state = average.init(given_array)
        given_array[:] = 5
        assert np.all(np.asarray(state.average) == 1)


def test_integers_among_the_statistics_count_the_batches():
    def apply_fn(variables, x):
        old = variables["batch_stats"]
        return x, {"batch_stats": {"mean": 0.9 * old["mean"] + 0.1 * x.mean(0), "count": old["count"] + 1}}

    model = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.zeros(3), "count": jnp.int32(7)}}
    averaged, xs = AveragedModel(model), batches([4, 5, 6])
    new = update_bn(xs, averaged, apply_fn)
    assert int(new["count"]) == int(averaged.module["batch_stats"]["count"]) == 3
    np.testing.assert_allclose(new["mean"], np.mean([x.mean(0) for x in xs], 0), rtol=1e-6)


def test_a_complex_parameter_does_not_lose_its_imaginary_part():
    real, imaginary = {"w": jnp.ones(2)}, {"w": jnp.full(2, 1j)}
    averaged, average = AveragedModel(real), averaging.swa()
    state = average.init(real)
    for update in (lambda: averaged.update_parameters(imaginary), lambda: average.update(state, imaginary)):
        with pytest.raises(TypeError, match="'w' is complex"):
            update()


def test_a_complex_average_is_no_state_of_a_real_one():
    model = AveragedModel({"w": jnp.ones(2)})
    given = AveragedModel({"w": jnp.ones(2, complex)}).state_dict()
    with pytest.raises(RuntimeError, match="is complex in the state dict, but real in the model"):
        model.load_state_dict(given)
