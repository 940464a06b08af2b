"""One of two processes with one mesh, for test_checkpoint.py: ``processes_run.py ADDRESS PROCESSES INDEX FOLDER``.

It saves a sharded state with orbax, restores it and compares the bits; asks our ``save``, which must refuse; and trains
with state in parts over both.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
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
    try:
        checkpoint.save(folder / "ours.safetensors", {"opt": state})
    except ValueError as error:
        print("refused:", error, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
