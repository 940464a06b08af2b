"""Packed trees: the view itself, and every rule on it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxoptim
from comparisons import assert_same
from jaxoptim import pack, rules
from table import FORMS, STATES, slow_unless

DENSE = [case for case in STATES if not case.row.sparse]

shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=12)
dtypes = st.sampled_from(["float32", "bfloat16", "float16", "complex64"])


def tree_of(shapes, dtypes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"p{i}": jnp.asarray(rng.normal(size=s).astype(jnp.dtype(d)))
        for i, (s, d) in enumerate(zip(shapes, dtypes, strict=False))
    }


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(shapes=shapes, dtypes=st.lists(dtypes, min_size=12, max_size=12), max_size=st.integers(0, 20))
def test_unpack_returns_what_was_packed(shapes, dtypes, max_size):
    tree = tree_of(shapes, dtypes) | {"none": None}
    packed = pack(tree, max_size)
    assert_same(packed.unpack(), tree)
    kept = [x for x in jax.tree.leaves(tree) if x.size > max_size]
    small = {x.dtype for x in jax.tree.leaves(tree) if x.size <= max_size}
    assert len(jax.tree.leaves(packed)) == len(small) + len(kept)


def test_two_arrays_of_one_dotted_name_and_a_bare_array_are_packed():
    tree = {"a.b": jnp.ones(2), "a": {"b": jnp.zeros(3)}}
    assert_same(pack(tree).unpack(), tree)
    assert_same(pack(jnp.arange(3.0)).unpack(), jnp.arange(3.0))
    with pytest.raises(ValueError, match="tree of 'params' has shape"):
        pack(jnp.ones(3)).pack(jnp.ones(4))


def params_of(count=8):
    rng = np.random.default_rng(0)
    sizes = [(3, 2), (4, 3), (2, 2)]
    return {f"w{i}": jnp.asarray(rng.normal(size=sizes[i % 3]), jnp.float32) for i in range(count)} | {
        "large": jnp.asarray(rng.normal(size=(30, 20)), jnp.float32)
    }


@pytest.mark.costly
@pytest.mark.parametrize("case", slow_unless(FORMS.__contains__, DENSE))
def test_packed_training_equals_plain_training(case):
    rule = case.ours()
    params = params_of(4 if rule.elementwise else 2)  # the others are left as they are, and slow to compile
    packed, packed_state = pack(params, 100), jaxoptim.init(rule, pack(params, 100))
    state = jaxoptim.init(rule, params)
    step = jax.jit(jaxoptim.step)
    for t in range(3):
        grads = jax.tree.map(lambda x, t=t: x * 0.1 + t, params)
        params, state = step(rule, params, grads, state)
        packed, packed_state = step(rule, packed, grads if t else packed.pack(grads), packed_state)
    chex.assert_trees_all_close(packed.unpack(), params, rtol=1e-5, atol=1e-6)
    if rule.elementwise:
        assert len(jax.tree.leaves(packed_state.slots)) <= 2 * len(state.slots)
        slots = {name: slot.unpack() for name, slot in packed_state.slots.items()}
    else:
        slots = packed_state.slots
    chex.assert_trees_all_close(slots, state.slots, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_packed_updates_are_those_of_optax():
    params = params_of()
    packed, tx = pack(params), jaxoptim.adam(lr=0.1)
    updates, _ = tx.update(params, tx.init(packed), packed)
    expected, _ = tx.update(params, tx.init(params), params)
    assert_same(optax.apply_updates(packed, updates).unpack(), optax.apply_updates(params, expected))


@pytest.mark.slow
def test_gradients_through_unpack_are_packed():
    params = params_of()

    def loss(params):
        return sum(jnp.sum(jnp.sin(x) * (i + 1)) for i, x in enumerate(jax.tree.leaves(params)))

    grads = jax.grad(lambda packed: loss(packed.unpack()))(pack(params))
    assert isinstance(grads, jaxoptim.Packed)
    assert_same(grads.unpack(), jax.grad(loss)(params))


@pytest.mark.slow
def test_the_transpose_of_unpack_concatenates_few_arrays_at_a_time():
    packed = pack({f"w{i}": jnp.full(3, i, jnp.float32) for i in range(300)})
    text = str(jax.make_jaxpr(jax.grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p.unpack()))))(packed))
    assert "scatter" not in text
    assert " pad[" not in text
    joined = [line.split("]")[-1].split() for line in text.splitlines() if "concatenate" in line]
    assert joined
    assert max(len(operands) for operands in joined) <= 32


def test_packed_programs_are_compiled_once():
    compiled = []

    @jax.jit
    def step(params, grads, state):
        compiled.append(params)
        return jaxoptim.step(rules.Adam(), params, grads, state)

    params = params_of()
    packed = pack(params)
    state = jaxoptim.init(rules.Adam(), packed)
    for _ in range(3):
        packed, state = step(packed, params, state)
    step(pack(params), params, state)
    assert len(compiled) == 1
    assert hash(jax.tree.structure(packed)) == hash(jax.tree.structure(pack(params)))


def test_packed_is_donated():
    packed = pack(params_of())
    state = jaxoptim.init(rules.Adam(), packed)
    jax.jit(jaxoptim.step, donate_argnums=(1, 3))(rules.Adam(), packed, params_of(), state)
    assert all(x.is_deleted() for x in jax.tree.leaves((packed, state.slots)))


def test_sharded_arrays_stay_as_they_are():
    mesh = jax.make_mesh((8,), ("x",))
    params = {"w": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P("x"))), "a": jnp.ones(2), "b": jnp.ones(3)}
    packed = pack(params)
    assert len(jax.tree.leaves(packed)) == 2
    assert packed.unpack()["w"].sharding == params["w"].sharding


@pytest.mark.slow
def test_a_stack_of_packed_trees_is_unpacked_to_stacks():
    params = params_of()
    stacked = jax.vmap(lambda scale: pack(jax.tree.map(lambda x: scale * x, params)))(jnp.array([1.0, 2.0]))
    assert_same(stacked.unpack(), jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params))


@pytest.mark.slow
def test_packed_state_is_saved_and_restored_by_orbax(tmp_path):
    packed = pack(params_of(), 100)
    _, state = jaxoptim.step(rules.NAdam(), packed, params_of(), jaxoptim.init(rules.NAdam(), packed))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert_same(restored, state)
    assert_same(restored.slots["exp_avg"].unpack(), state.slots["exp_avg"].unpack())


def test_packed_state_has_names_for_checkpoints():
    paths = jax.tree_util.tree_flatten_with_path(pack(params_of(), 100))[0]
    assert [jax.tree_util.keystr(path, simple=True) for path, _ in paths] == ["float32", "large"]
    assert repr(pack(params_of(), 100)) == "Packed(9 arrays in 2 leaves)"


def test_errors_name_the_parameter():
    packed, grads = pack({"a": jnp.ones(2), "b": jnp.ones(3)}), {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = jaxoptim.init(rules.SGD(), packed)
    for wrong, message in (
        ({"a": jnp.ones(2)}, "grads has nothing for 'b'"),
        (grads | {"b": None}, "grads is None at 'b'"),
        (grads | {"b": jnp.ones(4)}, r"grads of 'b' has shape \(4,\), but the parameter has \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxoptim.step(rules.SGD(), packed, wrong, state)
    with pytest.raises(TypeError, match="packed already"):
        pack(packed)


@pytest.mark.slow
def test_a_sweep_and_a_hypergradient_go_through_packing():
    params = {f"w{i}": jnp.full(2, i + 1.0) for i in range(40)}

    def final(rule):
        packed = pack(params)
        packed, _ = jaxoptim.step(
            rule, packed, jax.tree.map(lambda x: rule.lr * x, params), jaxoptim.init(rule, packed)
        )
        return sum(jnp.sum(x) for x in jax.tree.leaves(packed.unpack()))

    total = sum(jnp.sum(x) for x in jax.tree.leaves(params))
    rates = jnp.array([0.1, 0.2])
    swept = jax.vmap(final)(jax.vmap(rules.SGD)(rates))
    np.testing.assert_allclose(swept, total * (1 - rates**2), rtol=1e-5)
    assert float(jax.grad(final)(rules.SGD(lr=0.1)).lr) == pytest.approx(float(-0.2 * total), rel=1e-5)
