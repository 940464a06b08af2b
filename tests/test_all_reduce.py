"""all_reduce: gradients reduced over the devices of a named axis."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxoptim
from jaxoptim import rules
from jaxoptim.distributed import all_reduce


def gradients(count=8):
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(count, 4, 3)), jnp.float32),
        "z": jnp.asarray(rng.normal(size=(count, 5)) + 1j * rng.normal(size=(count, 5)), jnp.complex64),
        "zero": jnp.zeros((count, 2)),
        "none": None,
    }


def adasum(grads):
    """The adaptive sum by its definition, in float64."""
    grads = [np.asarray(grad, np.result_type(grad.dtype, np.float64)) for grad in grads]
    while len(grads) > 1:
        pairs = zip(grads[::2], grads[1::2], strict=True)
        grads = [
            sum((1 - (np.vdot(a, b).real / (2 * np.vdot(x, x).real) if x.any() else 0)) * x for x in (a, b))
            for a, b in pairs
        ]
    return grads[0]


DEFINITIONS = {"mean": lambda x: np.mean(x, 0), "sum": lambda x: np.sum(x, 0), "adasum": adasum}


def by_shard_map(function, grads, check_vma=True, count=8):
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    own = lambda grads: function(jax.tree.map(lambda g: g[0], grads))  # noqa: E731
    return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check_vma))(grads)


def by_vmap(function, grads):
    return jax.vmap(function, axis_name="data", out_axes=None)(grads)


@pytest.mark.parametrize("op", DEFINITIONS)
@pytest.mark.parametrize(
    "run", [by_shard_map, lambda f, g: by_shard_map(f, g, False), by_vmap], ids=["checked", "unchecked", "vmap"]
)
def test_gradients_are_reduced(run, op):
    tx, grads = all_reduce("data", op), gradients()
    found = run(lambda grads: tx.update(grads, tx.init(None))[0], grads)
    expected = jax.tree.map(lambda x: DEFINITIONS[op](np.asarray(x)).astype(x.dtype), grads)
    chex.assert_trees_all_close(found, expected, rtol=2e-6, atol=1e-6)


def test_adasum_adds_what_is_orthogonal_and_averages_what_is_equal():
    tx = all_reduce("data", "adasum")
    reduce = lambda grads: tx.update(grads, tx.init(None))[0]  # noqa: E731
    np.testing.assert_allclose(by_vmap(reduce, jnp.eye(4)), jnp.ones(4), rtol=1e-6)
    np.testing.assert_allclose(by_vmap(reduce, jnp.ones((4, 3))), jnp.ones(3), rtol=1e-6)


@pytest.mark.numbers
def test_fewer_bits_are_sent():
    tx = all_reduce("data", dtype=jnp.bfloat16)
    reduce = lambda grads: tx.update(grads, tx.init(None))[0]  # noqa: E731
    grads = {"w": gradients()["w"], "half": jnp.ones((8, 2), jnp.float16)}
    found = by_shard_map(reduce, grads)
    assert (found["w"].dtype, found["half"].dtype) == (jnp.float32, jnp.float16)
    np.testing.assert_allclose(found["w"], grads["w"].mean(0), rtol=0.02, atol=0.01)
    assert (found["w"] == found["w"].astype(jnp.bfloat16)).all()


def test_sparse_gradients_have_the_rows_of_all():
    rows = jnp.arange(8).reshape(8, 1, 1) % 3
    grads = {"table": BCOO((jnp.arange(8.0).reshape(8, 1, 1) * jnp.ones((1, 1, 4)), rows), shape=(8, 5, 4))}
    dense = np.zeros((5, 4), np.float32)
    np.add.at(dense, np.asarray(rows).ravel(), np.arange(8.0)[:, None])

    def one(grads, tx):
        data, indices = grads
        update, _ = tx.update({"table": BCOO((data, indices), shape=(5, 4))}, optax.EmptyState())
        return update["table"].todense()

    given = (grads["table"].data, rows)
    for op, factor in (("sum", 1.0), ("mean", 1 / 8)):
        tx = all_reduce("data", op)
        for run in (by_vmap, by_shard_map):
            np.testing.assert_allclose(run(lambda grads, tx=tx: one(grads, tx), given), dense * factor, rtol=1e-6)
    with pytest.raises(TypeError, match="'table' is a BCOO"):
        by_vmap(lambda grads: one(grads, all_reduce("data", "adasum")), given)


def test_a_gradient_that_jax_has_summed_is_named():
    """A mean of sums would be larger by the number of devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = optax.chain(all_reduce("data"), optax.clip_by_global_norm(1.0), jaxoptim.transformation(rules.Adam(lr=0.1)))

    def step(params, batch, vary):
        seen = jax.lax.pcast(params, "data", to="varying") if vary else params
        grads = jax.grad(lambda params: jnp.mean((batch @ params["w"]) ** 2))(seen)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    def run(vary, check_vma=True):
        specs = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": P(), "check_vma": check_vma}
        return jax.jit(jax.shard_map(lambda params, batch: step(params, batch, vary), **specs))(params, batch)

    params, batch = {"w": jnp.arange(3.0)}, jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    with pytest.raises(ValueError, match=re.escape("The gradient of 'w' is the same on all devices along 'data'")):
        run(vary=False)
    alone = optax.chain(*(optax.clip_by_global_norm(1.0), jaxoptim.adam(lr=0.1)))
    grads = jax.grad(lambda params: jnp.mean((batch @ params["w"]) ** 2))(params)
    expected = optax.apply_updates(params, alone.update(grads, alone.init(params), params)[0])
    for found in (run(vary=True), run(vary=False, check_vma=False)):
        chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"Invalid op: 'average'\. all_reduce takes 'mean', 'sum', 'adasum'"):
        all_reduce("data", "average")
    tx = all_reduce("data", "adasum")
    with pytest.raises(ValueError, match="the axis 'data' has 6 devices"):
        by_vmap(lambda grads: tx.update(grads, tx.init(None))[0], jnp.ones((6, 2)))
