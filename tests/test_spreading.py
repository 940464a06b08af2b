"""Muon over eight devices that divide its work on whole matrices: the numbers of one device, in few collectives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxoptim
from jaxoptim import optim, rules
from jaxoptim.core import stacks
from jaxoptim.distributed import zero
from jaxoptim.rules import muon
from programs import collectives

pytestmark = pytest.mark.numbers

BOTH = ("x", "y")
CASES = {
    "wide by rows": (3, (16, 40), P(BOTH), (4, 8)),
    "tall by rows": (3, (40, 16), P(BOTH), (1, 4)),
    "one matrix by both sides": (1, (16, 40), P("x", "y"), (1, 2)),
    "square by columns": (5, (16, 16), P(None, BOTH), (2, 8)),
    "square by rows, over one axis": (2, (12, 12), P("x"), (2,)),
    "a short side that does not divide": (2, (10, 24), P(None, BOTH), (1,)),
    "a long side that does not divide": (9, (8, 13), P(BOTH), (2, 8)),
}
"""The number of matrices, their shape and layout, and in how many groups of devices they are tried."""
ROUNDING = 3 * 0.1 * 2**-8
"""Of three steps with rate 0.1 along numbers below one, which are rounded to bfloat16."""


@pytest.fixture
def divided(monkeypatch):
    """A function that fixes the number of groups, which compiled programs know, and returns for what it was asked."""

    def into(groups):
        asked = []
        monkeypatch.setattr(muon, "_groups", lambda *args: asked.append(args) or groups)
        stacks._spread.clear_cache()
        return asked

    yield into
    stacks._spread.clear_cache()


def matrices(number, shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {f"m{at}": jnp.asarray(rng.normal(size=shape), dtype) for at in range(number)}


def mesh_of(axis_type):
    return jax.make_mesh((4, 2), BOTH, axis_types=(axis_type,) * 2)


def trained(tx, params, steps=3):
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    state, step = jax.jit(tx.init)(params), jax.jit(step)
    text = step.lower(params, state).compile().as_text()
    for _ in range(steps):
        params, state = step(params, state)
    return params, state, text


@pytest.mark.costly
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
@pytest.mark.parametrize(("case", "groups"), [(case, groups) for case, its in CASES.items() for groups in its[3]])
def test_the_run_is_that_of_one_device(case, groups, axis_type, divided):
    number, shape, spec, _ = CASES[case]
    divided(groups)
    tx, begin, mesh = jaxoptim.muon(lr=0.1), matrices(number, shape), mesh_of(axis_type)
    expected, expected_state, _ = trained(tx, begin)
    full = P(*spec, *[None] * (2 - len(spec)))
    placed = jax.device_put(begin, NamedSharding(mesh, full))
    over = tx if axis_type == AxisType.Explicit else zero(tx, mesh, BOTH, specs=spec)
    found, state, text = trained(over, placed)
    for a, b in ((found, expected), (state, expected_state)):
        chex.assert_trees_all_close(jax.device_get(a), jax.device_get(b), atol=ROUNDING)
    assert all(x.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2) for x in found.values())
    in_iterations = 0 if groups == 8 else 5 * 3 + 1
    assert 0 < sum(collectives(text).values()) <= in_iterations + (4 if case == "one matrix by both sides" else 2)


def test_one_program_has_two_collectives_for_all_small_matrices_of_a_shape():
    mesh, tx = mesh_of(AxisType.Auto), jaxoptim.muon(lr=0.1)
    begin = matrices(6, (16, 32))
    expected, _, _ = trained(tx, begin)
    found, _, text = trained(zero(tx, mesh, BOTH, specs=P(BOTH)), jax.device_put(begin, NamedSharding(mesh, P(BOTH))))
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(expected))
    assert collectives(text) == {"all-to-all": 2}


@pytest.mark.parametrize(
    ("height", "rows", "columns", "devices", "groups"),
    [
        pytest.param(6, 8192, 28672, 256, 8, id="large matrices on a pod: a group for each"),
        pytest.param(512, 4096, 4096, 256, 256, id="more matrices than devices: whole ones"),
        pytest.param(4, 1024, 1024, 8, 8, id="small ones: whole"),
        pytest.param(1, 8192, 28672, 8, 1, id="one large matrix: all devices"),
    ],
)
def test_devices_are_divided_by_what_is_computed_and_sent(height, rows, columns, devices, groups):
    assert muon._groups(height, rows, columns, devices, 5) == groups
    assert muon._groups(height, columns, rows, devices, 5) == groups


@pytest.mark.slow
@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_classes_divide_the_work_too(dtype, groups, divided):
    """Parameters that are sharded, and parameters that are whole with their state in parts."""
    mesh, begin = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), matrices(3, (16, 40), dtype)

    def run(params, **more):
        opt = optim.Muon(params, lr=0.1, **more)
        for _ in range(3):
            opt.minimize(lambda params: sum(jnp.sum(jnp.cosh(x.astype(jnp.float32))) for x in params.values()))
        return jax.device_get(opt.params)

    expected = run(begin)
    sharded = jax.device_put(begin, NamedSharding(mesh, P("data")))
    for params, more in ((sharded, {}), (begin, {"mesh": mesh, "zero": "data"})):
        asked = divided(groups)
        found = run(params, **more)
        assert asked == [(3, 16, 40, 8, 5)]
        chex.assert_trees_all_close(found, expected, atol=ROUNDING if dtype == jnp.float32 else 2**-7)


@pytest.mark.slow
def test_the_derivative_of_a_run_is_that_of_one_device(divided):
    divided(2)
    mesh, begin = mesh_of(AxisType.Explicit), matrices(3, (8, 16))

    def end(lr, params):
        rule = rules.Muon(lr=lr, weight_decay=0.5)
        state = jaxoptim.init(rule, params)
        for _ in range(2):
            params, state = jaxoptim.step(rule, params, jax.tree.map(jnp.sin, params), state)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    placed = jax.device_put(begin, NamedSharding(mesh, P(BOTH, None)))
    expected, found = (jax.jit(jax.grad(end))(0.1, params) for params in (begin, placed))
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-3)
