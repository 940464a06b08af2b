"""Averages of the parameters against the live torch class and exact means: numbers, saving and loading, buffers."""

import copy
import functools
import itertools
import pickle
import re
from collections import OrderedDict

import chex
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from averaging_pairs import (
    DECAYS,
    PAIRS,
    SPECIAL,
    UPDATES,
    TorchNet,
    assert_close,
    averaged_by_us,
    both,
    draws,
    module_of,
    named,
    numpy,
    our_multi,
    snapshot,
    tensor,
    their_multi,
    theirs,
    variables_of,
    weighted,
)
from comparisons import assert_same
from jaxoptim import averaging, pack
from jaxoptim.optim import swa_utils
from jaxoptim.optim.swa_utils import AveragedModel

pytestmark = pytest.mark.numbers


@functools.cache
def long_run(dtype):
    """The parameters of many updates, the same for all tests."""
    return draws(UPDATES, dtype=dtype)


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


def root_mean_square(arrays):
    return np.sqrt(np.mean(np.concatenate([np.ravel(x).astype(np.float64) for x in arrays]) ** 2))


by_pair = pytest.mark.parametrize("name", PAIRS)


# Against torch.


@pytest.mark.costly
@by_pair
def test_averages_agree_with_torch(name, x64):
    ours, torchs = PAIRS[name]
    trees = long_run(np.float64)
    assert_close(averaged_by_us(trees, **ours), averaged_by_torch(trees, **torchs), atol=1e-12)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.costly
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


@pytest.mark.costly
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
