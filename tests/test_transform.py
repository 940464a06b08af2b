"""Trees, dtypes, missing and sparse gradients, complex parameters, and what users get wrong."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.sparse import BCOO

import jaxoptim
from comparisons import assert_same
from jaxoptim import rules
from jaxoptim.core import trees
from table import FIRST, STATES, slow_unless

DENSE = [case for case in STATES if not case.row.sparse]
SHAPE = (3, 2)


def ones(dtype=jnp.float32):
    return jnp.ones(SHAPE, dtype)


@pytest.mark.costly
@pytest.mark.parametrize("case", slow_unless(FIRST.__contains__, DENSE))
def test_none_leaves_are_left_alone(case):
    rule = case.ours()
    params = {"a": ones(), "frozen": None, "skipped": ones()}
    grads = {"a": ones(), "frozen": None, "skipped": None}
    state = jaxoptim.init(rule, params)
    new, after = jaxoptim.step(rule, params, grads, state)
    updates, _ = jaxoptim.update(rule, grads, state, params)
    alone, _ = jaxoptim.step(rule, ones(), ones(), jaxoptim.init(rule, ones()))
    assert jnp.array_equal(new["a"], alone)
    assert new["frozen"] is None is updates["frozen"]
    assert new["skipped"] is params["skipped"]
    assert updates["skipped"] is None
    for name, slot in state.slots.items():
        assert slot["frozen"] is None
        assert_same(slot["skipped"], after.slots[name]["skipped"])


@pytest.mark.costly
@pytest.mark.numbers
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", slow_unless(FIRST.__contains__, DENSE))
def test_low_precision_is_computed_in_float32_and_rounded_once(case, dtype):
    rule = case.ours()
    params, grads = ones(dtype) * 1.5, ones(dtype) * 0.3
    state = jaxoptim.init(rule, params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.slots))
    new, after = jaxoptim.step(rule, params, grads, state)
    wide, wide_after = jaxoptim.step(rule, params.astype(jnp.float32), grads.astype(jnp.float32), state)
    assert new.dtype == dtype
    assert jnp.array_equal(new, wide.astype(dtype))
    assert_same(after, wide_after)
    updates, _ = jaxoptim.update(rule, grads, state, params)
    assert updates.dtype == dtype


@pytest.mark.costly
@pytest.mark.parametrize("case", slow_unless(FIRST.__contains__, DENSE))
def test_updates_have_the_dtype_of_the_gradients(case):
    rule, params = case.ours(), ones(jnp.bfloat16)
    updates, _ = jaxoptim.update(rule, ones(jnp.float32), jaxoptim.init(rule, params), params)
    assert updates.dtype == jnp.float32


@pytest.mark.costly
@pytest.mark.parametrize(
    "case", slow_unless(FIRST.__contains__, [case for case in DENSE if "lr" in case.row.rule.specs])
)
def test_hyperparameters_never_take_a_low_precision_dtype(case):
    # inject_hyperparams casts numbers to the dtype of the parameters.
    rule = case.ours(lr=jnp.asarray(0.0078125, jnp.bfloat16))
    expected, _ = jaxoptim.step(case.ours(lr=0.0078125), ones(), ones() * 0.3, jaxoptim.init(rule, ones()))
    new, _ = jaxoptim.step(rule, ones(), ones() * 0.3, jaxoptim.init(rule, ones()))
    np.testing.assert_allclose(new, expected, rtol=1e-6)


@pytest.mark.parametrize("case", [c for c in DENSE if c.row.complex], ids=str)
def test_complex_state_has_the_dtype_of_the_parameter(case):
    state = jaxoptim.init(case.ours(), ones(jnp.complex64))
    for slot in state.slots.values():
        assert slot.dtype == (jnp.complex64 if slot.shape == SHAPE else jnp.float32)


@pytest.mark.parametrize("case", [c for c in FIRST if not c.row.complex], ids=str)
def test_complex_parameters_are_refused_by_name(case):
    error = ValueError if case.row.name == "SparseAdam" else RuntimeError  # as torch
    with pytest.raises(error, match=f"{case.row.name} does not support complex parameters, but 'w' has dtype"):
        jaxoptim.init(case.ours(), {"w": ones(jnp.complex64)})


def test_rules_that_use_params_ask_for_them():
    for rule in (rules.AdamW(), rules.SGD(weight_decay=0.1), rules.ASGD(), rules.Adafactor(), rules.Muon()):
        state = jaxoptim.init(rule, ones())
        with pytest.raises(ValueError, match=rf"{type(rule).__name__} uses the current parameters.*third argument"):
            jaxoptim.update(rule, ones(), state)


@pytest.mark.parametrize(
    "rule", [rules.SGD(momentum=0.9), rules.Adam(), rules.RMSprop()], ids=lambda r: type(r).__name__
)
def test_rules_that_do_not_use_params_work_without(rule):
    state = jaxoptim.init(rule, {"w": ones()})
    with_params, _ = jaxoptim.update(rule, {"w": ones()}, state, {"w": ones()})
    without, _ = jaxoptim.update(rule, {"w": ones()}, state)
    assert jnp.array_equal(with_params["w"], without["w"])


def other_tree(message, *, params=None, grads=None, state=None, error=ValueError):
    rule = rules.Adam()
    right = {"layer": {"kernel": ones(), "bias": jnp.ones(2)}}
    params = right if params is None else params
    state = jaxoptim.init(rule, right) if state is None else state
    with pytest.raises(error, match=message):
        jaxoptim.step(rule, params, right if grads is None else grads, state)


def test_errors_name_the_parameter():
    other_tree("grads has nothing for 'layer.bias'", grads={"layer": {"kernel": ones()}})
    other_tree(
        "grads has 'layer.scale', which params lacks",
        grads={"layer": {"kernel": ones(), "bias": jnp.ones(2), "scale": ones()}},
    )
    other_tree(
        re.escape("gradient of 'layer.bias' has shape (3,), but the parameter has (2,)"),
        grads={"layer": {"kernel": ones(), "bias": jnp.ones(3)}},
    )
    other_tree("grads has the containers", params=[ones()], grads=(ones(),))
    other_tree(
        r"'layer.bias' has dtype int32.*put None",
        grads={"layer": {"kernel": ones(), "bias": jnp.ones(2, int)}},
        error=TypeError,
    )
    other_tree(
        "'layer.bias' is complex",
        grads={"layer": {"kernel": ones(), "bias": jnp.ones(2, complex)}},
        error=TypeError,
    )
    other_tree(
        re.escape("state.slots['exp_avg'] has nothing for 'layer.bias'"),
        state=jaxoptim.init(rules.Adam(), {"layer": {"kernel": ones()}}),
    )
    with pytest.raises(TypeError, match=re.escape("parameter 'layer.count' has dtype int32")):
        jaxoptim.init(rules.Adam(), {"layer": {"count": jnp.ones((), int)}})


def test_muon_names_what_is_not_a_matrix():
    with pytest.raises(
        ValueError, match=re.escape("Muon only supports 2D parameters, but 'layer.bias' has shape (3,)")
    ):
        jaxoptim.muon().init({"layer": {"kernel": ones(), "bias": jnp.ones(3)}})


@pytest.mark.parametrize("leaf", [1.0, np.ones(SHAPE), np.float32(2)], ids=["float", "numpy", "numpy scalar"])
def test_array_likes_are_accepted(leaf):
    params = {"w": leaf}
    state = jaxoptim.init(rules.Adam(lr=0.1), params)
    new, _ = jaxoptim.step(rules.Adam(lr=0.1), params, params, state)
    np.testing.assert_allclose(new["w"], np.asarray(leaf) - 0.1, rtol=1e-6)


def test_a_bare_array_is_a_tree():
    new, state = jaxoptim.step(rules.SGD(lr=0.5), ones(), ones(), jaxoptim.init(rules.SGD(), ones()))
    assert jnp.all(new == 0.5)
    assert state.slots == {}


def test_a_tree_without_arrays_has_the_slots_of_any_other():
    for case in STATES:
        empty, full = jaxoptim.init(case.ours(), {"w": None}), jaxoptim.init(case.ours(), {"w": ones()})
        assert set(empty.slots) == set(full.slots)


# Sparse gradients.


def rows(indices, values, shape=(6, 2)):
    return BCOO((jnp.asarray(values), jnp.asarray(indices)[:, None]), shape=shape)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    indices=st.lists(st.integers(0, 6), min_size=6, max_size=6),
    rule=st.sampled_from([rules.SGD(lr=0.1), rules.SGD(lr=0.1, momentum=0.9), rules.Adagrad(lr=0.1)]),
    seed=st.integers(0, 3),
)
def test_sparse_gradients_act_as_their_dense_sum(indices, rule, seed):
    # Row 6 is past the end of the table: padding, as BCOO has it.
    values = np.random.default_rng(seed).normal(size=(len(indices), 2)).astype(np.float32)
    table = jnp.ones((6, 2))
    state = jaxoptim.init(rule, table)
    sparse = rows(indices, values)
    new, after = jaxoptim.step(rule, table, sparse, state)
    expected, expected_after = jaxoptim.step(rule, table, sparse.todense(), state)
    np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(after, expected_after, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.numbers
def test_sparse_adam_leaves_untouched_rows_alone_to_the_bit():
    table, rule = jnp.linspace(0, 1, 12).reshape(6, 2), rules.SparseAdam()
    new, state = jaxoptim.step(rule, table, rows([4, 1, 4], jnp.ones((3, 2))), jaxoptim.init(rule, table))
    untouched = jnp.array([0, 2, 3, 5])
    assert jnp.array_equal(new[untouched], table[untouched])
    assert not jnp.any(state.slots["exp_avg"][untouched])
    assert jnp.all(new[jnp.array([1, 4])] != table[jnp.array([1, 4])])


@pytest.mark.slow
def test_sparse_updates_add_to_the_parameters_as_optax_adds_them():
    table, tx = {"w": jnp.ones((6, 2))}, jaxoptim.sparse_adam(lr=0.1)
    grads = {"w": rows([4, 1, 4], jnp.ones((3, 2)))}
    updates, _ = jax.jit(tx.update)(grads, tx.init(table), table)
    assert isinstance(updates["w"], BCOO)
    rule = rules.SparseAdam(lr=0.1)
    expected, _ = jaxoptim.step(rule, table, grads, jaxoptim.init(rule, table))
    np.testing.assert_allclose(optax.apply_updates(table, updates)["w"], expected["w"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.numbers
def test_the_work_of_a_sparse_step_is_in_proportion_to_the_rows():
    def flops(rows_of_table):
        table = jnp.ones((rows_of_table, 8))
        rule = rules.SparseAdam()
        grad = rows(np.arange(4), np.ones((4, 8), np.float32), table.shape)
        step = jax.jit(jaxoptim.step, donate_argnums=(1, 3))
        compiled = step.lower(rule, table, grad, jaxoptim.init(rule, table)).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    small, large = flops(1_000), flops(100_000)
    assert large[0] < 2 * small[0]
    assert large[1] < 2 * small[1] + 10_000


@pytest.mark.slow
def test_sparse_gradients_are_refused_by_name():
    dense, sparse = {"w": jnp.ones((6, 2))}, {"w": rows([1], jnp.ones((1, 2)))}
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients, but that of 'w'"):
        jaxoptim.step(rules.SparseAdam(), dense, dense, jaxoptim.init(rules.SparseAdam(), dense))
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients, but that of 'w' is a BCOO"):
        jaxoptim.step(rules.Adam(), dense, sparse, jaxoptim.init(rules.Adam(), dense))
    rule = rules.Adagrad(weight_decay=0.1)
    with pytest.raises(RuntimeError, match="weight_decay is not compatible with sparse gradients"):
        jaxoptim.step(rule, dense, sparse, jaxoptim.init(rule, dense))
    scattered = {"w": BCOO.fromdense(jnp.ones((6, 2)))}
    with pytest.raises(ValueError, match=r"sparse gradient of 'w'.*Dense rows are allowed"):
        jaxoptim.step(rules.SGD(), dense, scattered, jaxoptim.init(rules.SGD(), dense))
    tall = {"w": rows([1], jnp.ones((1, 2)), (7, 2))}
    with pytest.raises(ValueError, match=re.escape("sparse gradient of 'w' has shape (7, 2)")):
        jaxoptim.step(rules.SGD(), dense, tall, jaxoptim.init(rules.SGD(), dense))


def test_names_of_parameters_are_dotted_paths():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        kernel: jax.Array

    assert trees.names({"encoder": [Layer(ones()), None]}) == ["encoder.0.kernel", "encoder.1"]
    assert trees.names(ones()) == ["params"]


def test_a_sparse_gradient_without_rows_changes_nothing_but_the_count():
    table, rule = jnp.ones((6, 2)), rules.SparseAdam()
    empty = BCOO((jnp.zeros((0, 2)), jnp.zeros((0, 1), jnp.int32)), shape=(6, 2))
    new, state = jaxoptim.step(rule, table, empty, jaxoptim.init(rule, table))
    assert jnp.array_equal(new, table)
    assert int(state.step) == 1
