"""State over a mesh of eight devices: where it is, ZeRO, and the numbers of one device."""

import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxoptim
from jaxoptim import pyro, rules
from jaxoptim.distributed import state_shardings, zero
from programs import collectives
from table import FORMS, STATES, slow_unless

AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
KEY = jax.random.key(0)
SAMPLERS = [rule(lr=1e-3, nbeta=1.0, key=KEY) for rule in (rules.SGLD, rules.SGNHT, rules.SGHMC, rules.PSGLD)]
DENSE = [case for case in STATES if not case.row.sparse]
ONE_SAMPLER = SAMPLERS[1]


def each_rule():
    """Every rule of dense gradients, fast for a row of each form."""
    cases = slow_unless(FORMS.__contains__, DENSE)
    made = [pytest.param(case.values[0].ours(), id=case.id, marks=case.marks) for case in cases]
    marks = {True: [], False: [pytest.mark.slow]}
    return made + [pytest.param(x, id=type(x).__name__, marks=marks[x is ONE_SAMPLER]) for x in SAMPLERS]


def mesh_of(shape=(8,), names=("data",), axis_type=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


def values():
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
        "h": jnp.asarray(rng.normal(size=(8, 24)), jnp.bfloat16),
    }


BATCH = np.random.default_rng(1).normal(size=(32, 16)).astype(np.float32)


def loss(params, batch):
    return jnp.mean(((batch @ params["w"]) @ params["h"].astype(jnp.float32) / 8) ** 2)


def train(tx, params, batch, steps, state=None):
    """The parameters and the state after some steps, and the compiled step with how often it was compiled."""

    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params) if state is None else state
    step = jax.jit(step, donate_argnums=(0, 1))
    text = step.lower(params, state, batch).compile().as_text()
    for _ in range(steps):
        params, state = step(params, state, batch)
    return params, state, text


def assert_shardings(tree, shardings):
    for x, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(wanted, x.ndim), (x.sharding, wanted)


# Where state is.


@pytest.mark.slow
@AXIS_TYPES
@pytest.mark.parametrize("rule", each_rule())
def test_state_is_on_its_mesh_from_init_on_and_steps_are_one_program(rule, axis_type, caplog):
    mesh = mesh_of((4, 2), ("x", "y"), axis_type)
    params = jax.device_put(values(), {"w": NamedSharding(mesh, P("x", "y")), "h": NamedSharding(mesh, P(None, "x"))})
    wanted = state_shardings(rule, params)
    for init in (jaxoptim.init, jax.jit(lambda rule, params: jaxoptim.init(rule, params))):
        state, here = init(rule, params), params
        assert_shardings(state, wanted)

        def one_step(*args):
            return jaxoptim.step(*args)

        step = jax.jit(one_step)
        with jax.log_compiles():
            for _ in range(3):
                here, state = step(rule, here, params, state)
        assert caplog.text.count("Compiling jit(one_step)") == 1
        caplog.clear()
        assert_shardings(state, wanted)
        assert_shardings(here, jax.tree.map(lambda x: x.sharding, params))


def placed(mesh, axis="x", other="y"):
    """Parameters in parts, one whole, and one missing."""
    given = {**values(), "b": jnp.ones(5), "none": None}
    specs = {"w": P(axis, other), "h": P(None, axis), "b": P(), "none": None}
    return {
        name: None if x is None else jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in given.items()
    }


def test_shardings_of_a_state_follow_the_dimensions_that_an_array_shares_with_its_parameter():
    mesh = mesh_of((4, 2), ("x", "y"))
    slots = state_shardings(rules.Adafactor(), placed(mesh)).slots
    specs = jax.tree.map(lambda x: x.spec, slots)
    assert specs["row_var"] == {"w": P("x"), "h": P(), "b": None, "none": None}
    assert specs["col_var"] == {"w": P(None, "y"), "h": P(None, "x"), "b": None, "none": None}
    assert specs["variance"] == {"w": None, "h": None, "b": P(), "none": None}


TRANSFORMATIONS = {
    "ours": jaxoptim.adamw(lr=0.1),
    "masters": jaxoptim.transformation(rules.Adam().with_precision(master_weights=True)),
    "pyro": jaxoptim.transformation(pyro.optim.Adam({"lr": 0.1})),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), jaxoptim.nadam()),
    "masked": optax.masked(jaxoptim.adam(), {"w": True, "h": False, "b": True}),
    "partition": optax.partition(
        {"matrix": jaxoptim.adafactor(), "rest": optax.adam(1e-3)}, {"w": "matrix", "h": "rest", "b": "rest"}
    ),
    "accumulation": optax.MultiSteps(jaxoptim.sgd(lr=0.1, momentum=0.9), 2).gradient_transformation(),
    "factored": optax.adafactor(1e-3, min_dim_size_to_factor=4),
    "scaled": jaxoptim.scale_loss(jaxoptim.adam()),
    "history": optax.scale_by_lbfgs(memory_size=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_shardings_of_a_state_are_those_of_any_transformation(tx):
    """All arrays of a parameter's shape have its sharding, stacks of them too."""
    mesh = mesh_of((4, 2), ("x", "y"))
    params = {name: x for name, x in placed(mesh).items() if x is not None}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    shardings = state_shardings(tx, like)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(tx.init, params))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, state), shardings)
    of_shape = {x.shape: x.sharding for x in jax.tree.leaves(params)}
    for x in jax.tree.leaves(state):
        if x.shape[-2:] in of_shape:
            wanted = of_shape[x.shape[-2:]].spec
            assert x.sharding.spec == P(*[None] * (x.ndim - 2), *wanted)


@pytest.mark.slow
def test_a_state_is_restored_on_another_mesh(tmp_path):
    """The shardings of the target are those that the state would have there."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), jaxoptim.transformation(ONE_SAMPLER), jaxoptim.adafactor())
    first, second = placed(mesh_of((4, 2), ("x", "y"))), placed(mesh_of((2, 4), ("y", "x")))
    shardings = state_shardings(tx, first)
    state = jax.jit(tx.init, out_shardings=shardings)(first)
    there = state_shardings(tx, second)
    like = jax.tree.map(
        lambda x, its: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=its), jax.eval_shape(tx.init, second), there
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", like)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, restored), there)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        chex.assert_trees_all_equal(
            *(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
        )


def test_counts_of_averages_and_of_whole_trees_are_on_the_mesh():
    mesh = mesh_of()
    params = {"w": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P("data")))}
    packed = jaxoptim.pack(params | {"small": jnp.ones(2)})
    for state in (
        jaxoptim.averaging.swa().init(params),
        jaxoptim.lbfgs().init(params),
        jaxoptim.newton().init({"w": params["w"][:, 0]}),
        jaxoptim.adam().init(packed),
        jaxoptim.init(rules.ASGD(), params, counts=True),
    ):
        assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(state) if not x.ndim)


def test_shardings_of_a_state_need_parameters_on_one_mesh():
    mesh = mesh_of()
    on_mesh, alone = (jax.device_put(jnp.ones(8), x) for x in (NamedSharding(mesh, P()), jax.devices()[1]))
    for params in ({"w": jnp.ones(8)}, {"w": on_mesh, "b": alone}, {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}):
        with pytest.raises(ValueError, match="on no mesh, or not all on one"):
            state_shardings(jaxoptim.adam(), params)
    state = jaxoptim.init(rules.Adam(), {"w": on_mesh, "b": alone})
    assert len(state.step.sharding.device_set) == 1  # either place would do for one of them only
    with pytest.raises(TypeError, match="A rule is expected"):
        state_shardings("adam", {"w": on_mesh})


# ZeRO.


def on_mesh(params, mesh, specs=None):
    specs = {name: P() for name in params} if specs is None else specs
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in params.items()}


def state_bytes(state):
    """Of all arrays with dimensions: on the first device, and in all."""
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    return sum(x.addressable_shards[0].data.nbytes for x in arrays), sum(x.nbytes for x in arrays)


@pytest.mark.slow
@AXIS_TYPES
@pytest.mark.parametrize("rule", each_rule())
def test_zero_makes_the_run_of_one_device_with_a_part_of_the_state(rule, axis_type, caplog):
    """Sixteen steps; where the state is, how much, what is sent, and that all steps are one program."""
    mesh = mesh_of(axis_type=axis_type)
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    tx = zero(rule, mesh, "data")
    params = on_mesh(values(), mesh)
    shardings = state_shardings(tx, params)
    assert_shardings(tx.init(params), shardings)
    with jax.log_compiles():
        after, state, text = train(tx, params, batch, 16)
    assert caplog.text.count("Compiling jit(step)") == 1
    assert_shardings(state, shardings)
    assert all(x.is_fully_replicated for x in after.values())
    expected, its_state, _ = train(jaxoptim.transformation(rule), values(), jnp.asarray(BATCH), 16)
    assert jax.tree.structure(state) == jax.tree.structure(its_state)
    chex.assert_trees_all_close(jax.device_get(after), jax.device_get(expected), rtol=2e-5, atol=2e-6)
    of_one, whole = state_bytes(state)
    if not isinstance(rule, rules.Adafactor):  # whose means over the parts are whole
        assert of_one * 8 == whole
    sent = collectives(text)
    assert sent["all-gather"] >= 2
    if rule.elementwise and not isinstance(rule, (jaxoptim.Sampler, rules.ClippedAdam, rules.DCTAdam)):
        assert sent == {"all-reduce": 1, "all-gather": 2}  # CPUs keep the reduction whole


LAYOUTS = {
    "fsdp": ((8,), ("data",), {"w": P("data"), "h": P(None, "data")}, {"w": P("data"), "h": P(None, "data")}),
    "tensor parallel": (
        (4, 2),
        ("data", "model"),
        {"w": P(None, "model"), "h": P("model")},
        {"w": P("data", "model"), "h": P("model", "data")},
    ),
    "both dimensions taken": (
        (2, 2, 2),
        ("data", "x", "y"),
        {"w": P("x", "y"), "h": P("y", "x")},
        {"w": P(("x", "data"), "y"), "h": P("y", ("x", "data"))},
    ),
}


@pytest.mark.costly
@AXIS_TYPES
@pytest.mark.parametrize(("shape", "names", "specs", "parts"), LAYOUTS.values(), ids=LAYOUTS)
def test_zero_keeps_parameters_as_they_are_sharded(shape, names, specs, parts, axis_type):
    mesh = mesh_of(shape, names, axis_type)
    params, rule = on_mesh(values(), mesh, specs), rules.AdamW(lr=0.01).with_precision(master_weights=True)
    tx = zero(optax.chain(optax.clip_by_global_norm(0.1), jaxoptim.transformation(rule)), mesh, "data", specs)
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data") if axis_type == AxisType.Auto else P()))
    if axis_type == AxisType.Explicit:
        step = jax.jit(lambda grads, state, params: tx.update(grads, state, params))
        updates, state = step(params, tx.init(params), params)
        after = jax.tree.map(jnp.add, params, updates)
    else:
        after, state, _ = train(tx, params, batch, 12)
        alone = optax.chain(optax.clip_by_global_norm(0.1), jaxoptim.transformation(rule))
        expected, _, _ = train(alone, values(), jnp.asarray(BATCH), 12)
        chex.assert_trees_all_close(jax.device_get(after), jax.device_get(expected), rtol=2e-5, atol=2e-6)
    assert_shardings(after, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})
    slots = state[1].slots
    for slot in (slots["exp_avg"], slots["exp_avg_sq"]):
        assert_shardings(slot, {name: NamedSharding(mesh, spec) for name, spec in parts.items()})
    assert slots["master_weights"]["h"].sharding.is_equivalent_to(NamedSharding(mesh, parts["h"]), 2)


def test_zero_warns_once_of_what_the_axis_does_not_divide():
    mesh = mesh_of()
    params = on_mesh({"w": jnp.ones((16, 3)), "b": jnp.ones(12), "c": jnp.ones((3, 5)), "s": jnp.ones(())}, mesh)
    tx = zero(jaxoptim.adam(), mesh, "data")
    with pytest.warns(UserWarning, match=r"axis 'data' of zero, 8 devices, .* of 2 arrays") as caught:
        state = tx.init(params)
    assert len(caught) == 1
    assert re.search(r"216 bytes, is whole on every device: 'b' \(12,\), 'c' \(3, 5\)\. ", str(caught[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updates, _ = jax.jit(tx.update)(params, state, params)
    assert updates["c"].is_fully_replicated
    assert not state.slots["exp_avg"]["w"].is_fully_replicated


def test_zero_in_a_jitted_init_and_without_jit():
    mesh = mesh_of()
    params, tx = on_mesh(values(), mesh), zero(rules.NAdam(), mesh, ("data",))
    shardings = state_shardings(tx, params)
    assert_shardings(jax.jit(tx.init)(params), shardings)
    updates, state = tx.update(params, tx.init(params), params)
    assert_shardings(state, shardings)
    jitted, its_state = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_close((updates, state), (jitted, its_state), rtol=1e-6)


def test_zero_of_state_that_belongs_to_no_parameter():
    """The vectors of L-BFGS are in parts where the axis divides them."""
    mesh = mesh_of()
    params = on_mesh({"a": jnp.ones(24), "b": jnp.ones(40)}, mesh)
    with pytest.warns(UserWarning, match=r"of 1 arrays, .*: 'shared.ro' \(5,\)"):
        state = zero(jaxoptim.lbfgs(history_size=5), mesh, "data").init(params)
    assert state.shared["old_dirs"].sharding.spec == P(None, "data")
    assert state.shared["d"].sharding.spec == P("data")


@pytest.mark.slow
def test_zero_takes_sparse_gradients():
    mesh, rows = mesh_of(), jnp.array([[1], [9], [14]])
    grads = {"w": BCOO((jnp.ones((3, 4)), rows), shape=(16, 4))}
    params, tx = {"w": jnp.ones((16, 4))}, zero(rules.SparseAdam(lr=0.1), mesh, "data")
    state = tx.init(on_mesh(params, mesh))
    updates, state = jax.jit(tx.update)(grads, state, on_mesh(params, mesh))
    assert state.slots["exp_avg"]["w"].sharding.spec == P("data")
    expected, _ = jaxoptim.update(rules.SparseAdam(lr=0.1), grads, jaxoptim.init(rules.SparseAdam(), params), params)
    chex.assert_trees_all_close(updates["w"].todense(), expected["w"].todense(), rtol=1e-6)


def test_errors_of_zero():
    mesh = mesh_of()
    params = {"w": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P("data")))}
    with pytest.raises(ValueError, match=r"Invalid axis: 'model'\. zero takes an axis of the mesh: 'data'"):
        zero(jaxoptim.adam(), mesh, "model")
    with pytest.raises(ValueError, match="'w' is sharded as P\\(\\), but it is sharded as P\\('data',\\)"):
        zero(jaxoptim.adam(), mesh, "data").init(params)
    with pytest.raises(ValueError, match="specs is no prefix of params"):
        zero(jaxoptim.adam(), mesh, "data", {"v": P("data")}).init(params)
    with pytest.raises(TypeError, match="A rule is expected"):
        zero(rules.Adam, mesh, "data")
    inside = optax.chain(optax.clip(1.0), zero(jaxoptim.adam(), mesh, "data"))
    with pytest.raises(ValueError, match="stands inside another transformation"):
        state_shardings(inside, on_mesh({"w": jnp.ones((8, 2))}, mesh))
