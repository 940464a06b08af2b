"""HorovodOptimizer: gradients averaged over devices, over a named axis of a compiled function, and over processes."""

import copy
import os
import pickle
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import horovod_run
import jaxoptim
from jaxoptim import checkpoint
from jaxoptim import optim as torch_style
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim
from jaxoptim.pyro.optim import horovod

REPLICAS = 8
OPTIONS = {"lr": 0.1}
CLIP = {"clip_norm": 0.5}


@pytest.fixture
def mesh():
    return jax.make_mesh((REPLICAS,), ("data",), axis_types=(AxisType.Auto,))


def stacked(t, shape=(3,)):
    """A gradient for each replica."""
    return jnp.asarray(np.random.default_rng(t).normal(size=(REPLICAS, *shape)), jnp.float32)


def reduced(grads, op):
    return grads.mean(0) if op == "average" else grads.sum(0)


def bits(values):
    return [np.asarray(value).tobytes() for value in values]


@pytest.mark.slow
@pytest.mark.parametrize("op", ["average", "sum"])
@pytest.mark.parametrize("spread", [False, True], ids=["one-device", "sharded"])
def test_gradients_of_replicas_are_reduced_and_then_clipped(op, spread, mesh):
    of_all = optim.HorovodOptimizer(optim.Adam(OPTIONS, CLIP), op=op)
    alone = optim.Adam(OPTIONS, CLIP)
    values = [{"a": jnp.ones(3), "b": jnp.ones(3)}] * 2
    for t in range(5):
        grads = {"a": stacked(t), "b": stacked(t + 100)}
        given = jax.device_put(grads, NamedSharding(mesh, P("data"))) if spread else grads
        values = [
            of_all.update(values[0], given),
            alone.update(values[1], {name: reduced(grad, op) for name, grad in grads.items()}),
        ]
    for name in "ab":
        np.testing.assert_allclose(values[0][name], values[1][name], rtol=1e-6)


@pytest.mark.numbers
def test_sharded_gradients_are_reduced_by_one_all_reduce(mesh):
    grads = {t: jax.device_put(stacked(t), NamedSharding(mesh, P("data"))) for t in range(2)}
    text = horovod._over_devices.lower(grads, op="average").compile().as_text()
    assert "all-reduce" in text


def test_gradients_of_replicas_are_added_adaptively():
    """Equal gradients are averaged, orthogonal ones added."""
    optimizer = optim.HorovodOptimizer(optim.SGD({"lr": 1.0}), op="adasum")
    values = optimizer.update({"a": jnp.zeros(4), "b": jnp.zeros(3)}, {"a": jnp.eye(4), "b": jnp.ones((4, 3))})
    np.testing.assert_allclose(values["a"], -np.ones(4), rtol=1e-6)
    np.testing.assert_allclose(values["b"], -np.ones(3), rtol=1e-6)


def test_a_gradient_without_an_axis_more_is_taken_as_it_is():
    of_all, alone = optim.HorovodOptimizer(optim.SGD(OPTIONS)), optim.SGD(OPTIONS)
    values, grads = (
        {"a": jnp.ones(3), "b": jnp.ones(()), "c": jnp.ones(2)},
        {"a": jnp.ones(3), "b": jnp.ones(()), "c": None},
    )
    assert bits(of_all.update(values, grads).values()) == bits(alone.update(values, grads).values())


def test_the_call_takes_parameters_in_any_order():
    optimizer = optim.HorovodOptimizer(optim.Adam(lambda name: {"lr": 0.5 if name == "a" else 0.25}))
    a, b = Parameter(jnp.ones(3), "a"), Parameter(jnp.ones(3), "b")
    a.grad = b.grad = jnp.ones(3)
    optimizer([b, a])
    optimizer({a, b})
    np.testing.assert_allclose([a.value[0], b.value[0]], [0.0, 0.5], atol=1e-6)
    assert isinstance(optimizer, optim.PyroOptim)


@pytest.mark.numbers
@pytest.mark.parametrize("op", ["average", "sum"])
def test_a_compiled_step_reduces_over_a_named_axis(op, mesh):
    base = optim.Adam(lambda name: {"lr": 0.1 if name == "a" else 0.2}, CLIP)
    tx = jaxoptim.transformation(optim.HorovodOptimizer(base, op=op, axis_name="data"))
    alone = jaxoptim.transformation(base)
    values = {"a": jnp.ones(3), "b": jnp.ones(3)}

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
    def step(values, state, grads):
        updates, state = tx.update(jax.tree.map(lambda g: g[0], grads), state, values)
        return optax.apply_updates(values, updates), state

    mine, state = values, tx.init(values)
    other, its_state = values, alone.init(values)
    for t in range(4):
        grads = {"a": stacked(t), "b": stacked(t + 50)}
        mine, state = step(mine, state, grads)
        updates, its_state = alone.update({n: reduced(g, op) for n, g in grads.items()}, its_state, other)
        other = optax.apply_updates(other, updates)
    for name in values:
        np.testing.assert_allclose(mine[name], other[name], rtol=1e-6)
    assert "all-reduce" in step.lower(mine, state, grads).compile().as_text()


def test_a_vmapped_axis_is_reduced_too():
    tx = jaxoptim.transformation(optim.HorovodOptimizer(optim.SGD({"lr": 1.0}), axis_name="chains"))
    values = {"a": jnp.zeros(3)}
    grads = {"a": stacked(0)}
    updates, _ = jax.vmap(lambda g: tx.update(g, tx.init(values), values), axis_name="chains")(grads)
    np.testing.assert_allclose(updates["a"], np.tile(-np.asarray(grads["a"]).mean(0), (REPLICAS, 1)), rtol=1e-5)


def test_copies_keep_what_they_reduce_by():
    optimizer = optim.HorovodOptimizer(optim.Adam(OPTIONS, CLIP), op="sum", axis_name="data")
    values = optimizer.update({"a": jnp.ones(3)}, {"a": stacked(0)})
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (other.op, other.axis_name, other.pt_clip_args) == ("sum", "data", CLIP)
        assert other.get_state().keys() == {"a"}
        one, two = (of.update(values, {"a": stacked(1)}) for of in (other, copy.deepcopy(optimizer)))
        assert bits(one.values()) == bits(two.values())


def test_its_state_begins_anew():
    base = optim.Adam(OPTIONS)
    base.update({"a": jnp.ones(3)}, {"a": jnp.ones(3)})
    assert optim.HorovodOptimizer(base).get_state() == {}


SCHEDULER = {"optimizer": torch_style.SGD, "optim_args": {}, "step_size": 1}


@pytest.mark.parametrize(
    "given",
    [torch_style.SGD, 3, optim.SGD, lambda: optim.StepLR(SCHEDULER)],
    ids=["class", "number", "wrapper", "schedule"],
)
def test_what_is_wrapped_is_an_optimizer_without_schedule(given):
    made = given() if getattr(given, "__name__", "") == "<lambda>" else given
    with pytest.raises(TypeError, match="Expected a PyroOptim object"):
        optim.HorovodOptimizer(made)


def test_errors():
    with pytest.raises(ValueError, match="Invalid op: 'mean'"):
        optim.HorovodOptimizer(optim.SGD({}), op="mean")
    with pytest.raises(ValueError, match="axis_name"):
        jaxoptim.transformation(optim.HorovodOptimizer(optim.SGD({})))
    optimizer = optim.HorovodOptimizer(optim.SGD(OPTIONS))
    values = {"a": jnp.ones(3), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match="leading axes of different lengths"):
        optimizer.update(values, {"a": jnp.ones((8, 3)), "b": jnp.ones((4, 3))})
    with pytest.raises(ValueError, match="'a'"):
        optimizer.update(values, {"a": jnp.ones((8, 4)), "b": jnp.ones((8, 3))})
    with pytest.raises(ValueError, match="'a'"):
        optimizer.update(values, {"a": jnp.ones((2, 8, 3)), "b": jnp.ones((8, 3))})
    assert not optimizer.optim_objs


def started(*command):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What two processes have made of their own gradients, by ``op`` and process."""
    folder = tmp_path_factory.mktemp("horovod")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [started(horovod_run.__file__, address, index, folder) for index in range(2)]
    try:
        for output, errors in [process.communicate(timeout=120) for process in processes]:
            assert "trained" in output, errors
    finally:
        for process in processes:
            process.kill()
    return {(op, i): checkpoint.load(folder / f"{op}-{i}") for op in ("average", "sum") for i in (0, 1, "alone")}


@pytest.mark.slow
@pytest.mark.parametrize("op", ["average", "sum"])
def test_two_processes_make_one_run(op, trained):
    first, second, alone = (trained[op, run] for run in (0, 1, "alone"))
    for name in horovod_run.SHAPES:
        for other in (second, alone):
            assert bits([first["values"][name]]) == bits([other["values"][name]])
            mine, its = (of["state"][name]["state"] for of in (first, other))
            assert bits(jax.tree.leaves(mine)) == bits(jax.tree.leaves(its))
    assert first["state"].keys() == second["state"].keys() == alone["state"].keys()
    assert first["state"]["never"]["state"] == {}
