"""Every kind of state through the transformations of JAX, over devices, and to disk."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import export
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxoptim
from table import FORMS, STATES, slow_unless


def problem(case, shape=(8, 4)):
    """A rule with parameters and gradients that fit it."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    values = jnp.asarray(rng.normal(size=shape), jnp.float32)
    if case.row.sparse:
        return case.ours(), params, {"w": BCOO((values[:2], jnp.array([[5], [1]])), shape=shape)}
    return case.ours(), params, {"w": values}


def assert_trees_equal(ours, expected, rtol=1e-6):
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, expected)
    chex.assert_trees_all_close(ours, expected, rtol=rtol, atol=1e-7)


def two_steps(rule, params, grads):
    state = jaxoptim.init(rule, params)
    for _ in range(2):
        params, state = jaxoptim.step(rule, params, grads, state)
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize("case", STATES, ids=str)
def test_state_is_carried_by_scan(case):
    rule, params, grads = problem(case)

    def body(carry, _):
        return jaxoptim.step(rule, carry[0], grads, carry[1]), None

    scanned, _ = jax.lax.scan(body, (params, jaxoptim.init(rule, params)), length=2)
    assert_trees_equal(scanned, two_steps(rule, params, grads))


@pytest.mark.costly
@pytest.mark.parametrize("case", slow_unless(FORMS.__contains__, STATES))
def test_state_is_the_same_on_both_sides_of_cond(case):
    rule, params, grads = problem(case)

    @jax.jit
    def step_if(wanted, params, state):
        return jax.lax.cond(wanted, lambda p, s: jaxoptim.step(rule, p, grads, s), lambda p, s: (p, s), params, state)

    state = jaxoptim.init(rule, params)
    assert_trees_equal(step_if(False, params, state), (params, state))
    assert_trees_equal(step_if(True, params, state), jaxoptim.step(rule, params, grads, state))


@pytest.mark.costly
@pytest.mark.parametrize("case", slow_unless(FORMS.__contains__, STATES))
def test_state_is_exported_and_serialized(case):
    rule, params, grads = problem(case)
    state = jaxoptim.init(rule, params)
    dense = jax.tree.map(lambda g: g.todense() if case.row.sparse else g, grads, is_leaf=lambda x: isinstance(x, BCOO))

    def step(params, grads, state):
        if case.row.sparse:
            grads = {"w": BCOO((grads["w"][jnp.array([1, 5])], jnp.array([[1], [5]])), shape=params["w"].shape)}
        return jaxoptim.step(rule, params, grads, state)

    exported = export.export(jax.jit(step))(params, dense, state)
    restored = export.deserialize(exported.serialize())
    assert_trees_equal(restored.call(params, dense, state), jaxoptim.step(rule, params, grads, state))


@pytest.mark.parametrize("case", slow_unless(FORMS.__contains__, STATES))
def test_state_is_initialised_without_arrays(case):
    rule, params, _ = problem(case)
    state = jaxoptim.init(rule, params)
    shapes = jax.eval_shape(lambda params: jaxoptim.init(rule, params), params)
    described = jaxoptim.init(rule, jax.eval_shape(lambda: params))
    for abstract in (shapes, described):
        assert jax.tree.structure(abstract) == jax.tree.structure(state)
        leaves = zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True)
        assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in leaves)


def assert_sharded_like_params(state, params):
    for name, slot in state.slots.items():
        if slot["w"] is not None and slot["w"].shape == params["w"].shape:
            assert slot["w"].sharding.is_equivalent_to(params["w"].sharding, 2), name


@pytest.mark.costly
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
@pytest.mark.parametrize("case", slow_unless(FORMS.__contains__, STATES))
def test_state_is_sharded_like_its_parameter(case, axis_type):
    assert len(jax.devices()) == 8
    rule, params, grads = problem(case)
    expected = two_steps(rule, params, grads)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    sharding = NamedSharding(mesh, P("x", "y"))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding)
        if not case.row.sparse:
            grads = jax.device_put(grads, sharding)
        for init in (jaxoptim.init, jax.jit(jaxoptim.init, static_argnums=0)):
            state = init(rule, params)
            assert_sharded_like_params(state, params)
        step = jax.jit(jaxoptim.step)
        new_params = params
        for _ in range(2):
            new_params, state = step(rule, new_params, grads, state)
    assert_sharded_like_params(state, params)
    assert new_params["w"].sharding.is_equivalent_to(sharding, 2)
    assert_trees_equal(jax.device_get((new_params, state)), jax.device_get(expected), rtol=2e-5)


@pytest.mark.parametrize("case", slow_unless(FORMS.__contains__, STATES))
def test_state_is_saved_and_restored_by_orbax(case, tmp_path):
    rule, params, grads = problem(case)
    _, state = jaxoptim.step(rule, params, grads, jaxoptim.init(rule, params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda params: jaxoptim.init(rule, params), params)
        restored = checkpointer.restore(tmp_path / "state", target)
    assert type(restored) is jaxoptim.OptState
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("case", STATES, ids=str)
def test_state_and_parameters_are_updated_in_place_when_donated(case):
    rule, params, grads = problem(case)
    params = jax.tree.map(lambda x: x + 0, params)
    step = jax.jit(jaxoptim.step, donate_argnums=(1, 3))
    state = jaxoptim.init(rule, params)
    new_params, new_state = step(rule, params, grads, state)
    assert params["w"].is_deleted()
    assert all(x.is_deleted() for x in jax.tree.leaves(state.slots) if x.shape == (8, 4))
    assert_trees_equal(new_params, jaxoptim.step(rule, *problem(case)[1:], jaxoptim.init(rule, new_params))[0])
    assert int(new_state.step) == 1


def test_the_count_does_not_overflow():
    state = jaxoptim.init(jaxoptim.rules.SGD(), jnp.ones(2))._replace(step=jnp.asarray(2**31 - 1, jnp.int32))
    assert int(jaxoptim.step(jaxoptim.rules.SGD(), jnp.ones(2), jnp.ones(2), state)[1].step) == 2**31 - 1
