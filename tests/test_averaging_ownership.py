"""Averages over an optimizer, and who owns their arrays."""

import copy
import functools
import gc
import logging
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from averaging_pairs import PAIRS, bowl, draws, our_multi, raising, reused, snapshot, weighted
from comparisons import assert_same
from jaxoptim import optim
from jaxoptim.optim import swa_utils
from jaxoptim.optim.swa_utils import AveragedModel, averaged_model

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given_params", "cls", "name"),
    [("pytree", optim.SGD, "default"), ("groups", optim.SGD, "default"), ("parameters", optim.Adam, "ema-multi-0.9")]
    + [(x, optim.SGD, "default") for x in ("parameters", "named", "array")]
    + [(x, optim.Adam, "ema-multi-0.9") for x in ("pytree", "groups", "named")],
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


STARTS = {
    "dict": lambda: {"w": jnp.zeros(2)},
    "list": lambda: [jnp.zeros(2), jnp.zeros((2, 3))],
    "groups": lambda: [{"params": {"w": jnp.zeros(2)}}, {"params": jnp.zeros(3), "lr": 1.0}],
}


@pytest.mark.costly
@pytest.mark.parametrize("mode", ["default", "ema", "custom"])
@pytest.mark.parametrize("start", STARTS)
def test_the_average_follows_groups_that_are_added_later(start, mode):
    opt = optim.SGD(STARTS[start](), lr=1.0)
    late, of_late = AveragedModel(opt, **MODES[mode]), AveragedModel(jnp.zeros(4), **MODES[mode])
    early, tree = AveragedModel(opt, **MODES[mode]), opt.params
    for n in range(5):
        opt.step(jax.tree.map(jnp.ones_like, opt.params))
        if n == 2:
            opt.add_param_group({"params": {"new": jnp.full(4, 7.0)}})
            of_late.n_averaged = jnp.asarray(2)  # the others have as many; the new one begins as it is
            of_late.load_state_dict(of_late.state_dict() | {"module.params": jnp.full(4, 7.0)})
        late.update_parameters(opt)
        if n >= 2:
            of_late.update_parameters(opt.params[-1]["new"])
        early.update_parameters(
            jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(opt.params)[: len(jax.tree.leaves(tree))])
        )
    leaves = jax.tree.leaves(late.module)
    assert jax.tree.structure(late.module) == jax.tree.structure(opt.params)
    chex.assert_trees_all_equal(leaves, [*jax.tree.leaves(early.module), of_late.module])
    again = AveragedModel(opt, **MODES[mode])
    again.load_state_dict(late.state_dict())
    chex.assert_trees_all_equal(again.module, late.module)


def test_a_group_that_cannot_be_averaged_changes_nothing():
    opt = optim.SGD({"w": jnp.zeros(2)}, lr=0.5)
    averaged = AveragedModel(opt, multi_avg_fn=lambda averages, params, n: averages[:1])
    averaged.update_parameters(opt)
    opt.add_param_group({"params": jnp.ones(3)})
    before = snapshot(averaged)
    with pytest.raises(TypeError, match="a list of 2 arrays, but it returned"):
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.costly
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


@pytest.mark.slow
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
