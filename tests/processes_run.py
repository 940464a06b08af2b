"""One of two processes with one mesh, for test_checkpoint.py: ``processes_run.py ADDRESS PROCESSES INDEX FOLDER``.

It saves a sharded state with orbax, restores it and compares the bits; does so with ours; and trains with state in
parts over both.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxoptim
from jaxoptim import checkpoint, optim
from jaxoptim.distributed import zero


def loss(w):
    return jnp.sum(w**2)


def train_in_parts(mesh, w):
    """A class, from whole parameters of this process, and a transformation, from sharded ones, make the same run."""
    assert jaxoptim.init(jaxoptim.rules.NAdam(), w).step.sharding.mesh.size == 4
    tx = zero(jaxoptim.adamw(lr=0.1), mesh, "x", P("x"))
    state, update = tx.init(w), jax.jit(tx.update)
    opt = optim.AdamW(jnp.asarray(multihost_utils.process_allgather(w, tiled=True)), lr=0.1, mesh=mesh, zero="x")
    for _ in range(3):
        updates, state = update(jax.grad(loss)(w), state, w)
        w = w + updates
        opt.minimize(loss)
    (slots,) = opt.state.values()
    for slot in (slots["exp_avg"], state.slots["exp_avg"]):
        assert slot.sharding.spec == P("x")
    here = multihost_utils.process_allgather(w, tiled=True)
    np.testing.assert_allclose(np.asarray(opt.params.addressable_data(0)), here, rtol=1e-5, atol=1e-6)


def save_with_ours(folder, mesh, state):
    """One call on all processes; it comes back in other parts, and whole, and an error of one is one of all."""
    key_data = jax.device_put(np.arange(16, dtype=np.uint32).reshape(8, 2), NamedSharding(mesh, P("x")))
    tree = {"opt": state, "keys": jax.random.wrap_key_data(key_data), "count": 3}
    path = folder / "ours.safetensors"
    for _ in range(2):
        checkpoint.save(path, tree, keep=2)
    assert len(list(folder.glob("ours.safetensors.*.parts"))) == 2
    for spec in (P("x"), P()):  # those that were whole too, where the axis divides them
        place = NamedSharding(mesh, spec)
        like = {name: placed_otherwise(tree[name], place) for name in ("opt", "keys")} | {"count": 0}
        loaded = checkpoint.load(path, like)
        for x, y, its in zip(*map(jax.tree.leaves, (loaded, tree, like)), strict=True):
            assert isinstance(x, int) or (x.dtype == y.dtype and x.sharding.is_equivalent_to(its.sharding, x.ndim))
        assert_equal(loaded, tree)
    half = jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=NamedSharding(mesh, P("x")))
    slots = {**like["opt"].slots, "exp_avg": {**like["opt"].slots["exp_avg"], "w": half}}
    loaded = checkpoint.load(path, like | {"opt": like["opt"]._replace(slots=slots)})
    assert loaded["opt"].slots["exp_avg"]["w"].dtype == jnp.bfloat16
    whole = checkpoint.load(path)
    assert all(x.is_fully_addressable for x in jax.tree.leaves(whole["opt"]))
    assert_equal(whole, tree)
    taken = folder / "taken"
    taken.mkdir(exist_ok=True)
    (taken / "file").touch()
    message = "Is a directory|rename" if jax.process_index() == 0 else "taken could not be written by process 0"
    with pytest.raises(OSError, match=message):
        checkpoint.save(taken, tree)


def placed_otherwise(tree, place):
    """What stands for a tree whose arrays are under a sharding, but for counts."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) if x.shape else x, tree)


def assert_equal(a, b):
    """All of their bits, whole."""

    def bits(x):
        x = jax.random.key_data(x) if jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key) else jnp.asarray(x)
        return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)).tobytes()

    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert bits(x) == bits(y)


def main(address, processes, index, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, index)
    assert (len(jax.devices()), len(jax.local_devices())) == (4, 2)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    values = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    params = {
        "w": jax.make_array_from_callback(values.shape, NamedSharding(mesh, P("x")), lambda at: values[at]),
        "h": jax.make_array_from_callback((8,), NamedSharding(mesh, P()), lambda at: jnp.ones(8, jnp.bfloat16)[at]),
    }
    rule = jaxoptim.rules.Adam(lr=0.1)
    _, state = jax.jit(jaxoptim.step)(rule, params, params, jax.jit(jaxoptim.init, static_argnums=0)(rule, params))
    assert not state.slots["exp_avg"]["w"].is_fully_replicated
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        restored = checkpointer.restore(folder / "state", like)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert (a.sharding, a.dtype) == (b.sharding, b.dtype)
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert np.asarray(x.data).tobytes() == np.asarray(y.data).tobytes()
    train_in_parts(mesh, params["w"])
    print("restored", flush=True)  # noqa: T201
    save_with_ours(folder, mesh, state)
    print("saved", flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
