"""Runs over a mesh of eight devices have the numbers of one device, and leave parameters and state where they are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxoptim
from jaxoptim import optim, rules, schedules

SPECS = {"w": P("x", "y"), "v": P(None, "x"), "b": P("x")}
SHAPES = {"w": (16, 8), "v": (8, 16), "b": (16,)}
KEY = jax.random.key(0)


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))


def values(names="wvb"):
    rng = np.random.default_rng(0)
    every = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    return {name: every[name] for name in names}


def placed(params, mesh):
    return {name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in params.items()}


def loss(params, factor=1.0):
    """A convex loss in which all numbers depend on each other."""
    leaves = jax.tree.leaves(params.unpack() if isinstance(params, jaxoptim.Packed) else params)
    squares = sum(jnp.sum((x - 0.5) ** 2 * (1 + jnp.arange(x.shape[-1]) / 4)) for x in leaves)
    return factor * (jnp.log1p(squares) + sum(jnp.sum(jnp.cosh(x)) for x in leaves) / 8)


def assert_close(found, expected):
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-9, atol=1e-12)


def assert_placed(params, mesh):
    for name, x in params.items():
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[name]), x.ndim), (name, x.sharding)


TRANSFORMATIONS = {
    "clipping": optax.chain(optax.clip_by_global_norm(0.1), jaxoptim.adamw(lr=0.1)),
    "scaled": jaxoptim.scale_loss(jaxoptim.adam(lr=0.1), jaxoptim.LossScale(init_scale=4.0, growth_interval=2)),
    "lbfgs": jaxoptim.lbfgs(lr=0.5, history_size=4, max_iter=4),
    "lbfgs with search": jaxoptim.lbfgs(history_size=4, max_iter=4, line_search_fn="strong_wolfe"),
    "newton": jaxoptim.newton({"b": 1.0}),
    "packed": jaxoptim.nadam(lr=0.1),
    "packed lbfgs": jaxoptim.lbfgs(lr=0.5, history_size=4, max_iter=4),
    "adafactor": jaxoptim.adafactor(lr=0.1, weight_decay=0.1),
    "muon": jaxoptim.muon(lr=0.1),
}


@pytest.mark.costly
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations(name, axis_type, x64, caplog):
    """Six steps, the third of which has a gradient that is not finite where it is skipped."""
    tx, mesh = TRANSFORMATIONS[name], mesh_of(axis_type)
    begin = values({"newton": "b", "muon": "wv"}.get(name, "wvb"))

    def run(params):
        def one_step(params, state, factor):
            value, grads = jax.value_and_grad(loss)(params, factor)
            extra = {"value": value, "grad": grads, "value_fn": loss}
            updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        params = jaxoptim.pack(params) if "packed" in name else params
        state, step = tx.init(params), jax.jit(one_step)
        for t in range(6):
            params, state = step(params, state, jnp.inf if name == "scaled" and t == 2 else 1.0)
        return params.unpack() if "packed" in name else params

    expected = run(begin)
    with jax.log_compiles():
        found = run(placed(begin, mesh))
    assert caplog.text.count("Compiling jit(one_step)") == 1
    assert_close(found, expected)
    assert_placed(found, mesh)
    assert all(not np.allclose(found[name], x, atol=1e-3) for name, x in begin.items())


def test_a_plateau_of_a_sharded_loss(x64):
    plateau = schedules.reduce_lr_on_plateau(patience=1, threshold=0.2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        params, _ = jaxoptim.step(rules.SGD(lr=state.lr), params, grads, jaxoptim.init(rules.SGD(), params))
        return params, plateau.step(state, value)

    runs = []
    for params in (values(), placed(values(), mesh_of())):
        state, rates = plateau.init(0.2), []
        for _ in range(12):
            params, state = step(params, state)
            rates.append(float(state.lr))
        runs.append((params, rates))
    assert runs[0][1] == runs[1][1]
    assert len(set(runs[0][1])) > 2
    assert_close(runs[1][0], runs[0][0])


CLASSES = {
    "Adam": (optim.Adam, {"lr": 0.1}),
    "SGD": (optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "NAdam": (optim.NAdam, {"lr": 0.1}),
    "Adafactor": (optim.Adafactor, {"lr": 0.1}),
    "Muon": (optim.Muon, {"lr": 0.1}),
    "LBFGS": (optim.LBFGS, {"lr": 0.5, "history_size": 4}),
    "LBFGS with search": (optim.LBFGS, {"history_size": 4, "line_search_fn": "strong_wolfe"}),
    "SGNHT": (optim.SGNHT, {"lr": 1e-3, "nbeta": 10.0, "key": KEY}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_classes(name, x64):
    """Losses, gradients by hand, a step that is skipped, and a state that is loaded from the host."""
    cls, options = CLASSES[name]
    mesh, begin, whole_step = mesh_of(), values("wv" if name == "Muon" else "wvb"), cls is not optim.LBFGS

    def run(place):
        opt = cls(place(begin), **options)
        for factor in (1.0, jnp.nan, 2.0) if whole_step else (1.0, 2.0):
            opt.minimize(loss, factor, **{"clip_norm": 0.5, "skip_nonfinite": True} if whole_step else {})
        if whole_step:
            opt.step(place(jax.tree.map(jnp.sin, values(begin))))
        state_dict = jax.tree.map(lambda x: np.asarray(x) if is_dense(x) else x, opt.state_dict())
        other = cls(opt.params, **options)
        other.load_state_dict(state_dict)
        loaded = other.state_dict()["state"]
        for _ in range(2):
            other.minimize(loss)
        return other, loaded

    expected, _ = run(lambda params: dict(params))
    found, loaded = run(lambda params: placed(params, mesh))
    assert_close(found.params, expected.params)
    assert_placed(found.params, mesh)
    for state in (loaded, found.state_dict()["state"]):
        for param, own in zip(found.params, state.values(), strict=False):
            for slot in own.values():
                if getattr(slot, "shape", None) == SHAPES[param] and whole_step:
                    assert slot.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[param]), slot.ndim)


def is_dense(x):
    return isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


# Classes over a mesh.

OVER_A_MESH = {
    name: (getattr(optim, name), options)
    for name, options in {
        "Adadelta": {},
        "Adafactor": {"lr": 0.1},
        "Adagrad": {"lr": 0.1},
        "Adam": {"lr": 0.1, "amsgrad": True},
        "AdamW": {"lr": 0.1},
        "Adamax": {"lr": 0.1},
        "ASGD": {"lr": 0.1},
        "Muon": {"lr": 0.1},
        "NAdam": {"lr": 0.1},
        "RAdam": {"lr": 0.1},
        "RMSprop": {"lr": 0.1},
        "Rprop": {"lr": 0.1},
        "SGD": {"lr": 0.05, "momentum": 0.9},
        "AdagradRMSProp": {},
        "ClippedAdam": {"lr": 0.1},
        "DCTAdam": {"lr": 0.1},
    }.items()
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OVER_A_MESH)
def test_classes_over_a_mesh(name, x64):
    """State is in parts over the data axis, from the first step on and once it is loaded; parameters are whole."""
    cls, options = OVER_A_MESH[name]
    mesh, begin = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), values("wv" if name == "Muon" else "wvb")

    def run(**more):
        opt = cls(begin, **options, **more)
        schedulers = [optim.lr_scheduler.ExponentialLR(opt, 0.9)] if "lr" in opt.defaults else []
        for factor in (1.0, jnp.nan, 2.0):
            opt.minimize(loss, factor, clip_norm=0.5, skip_nonfinite=True)
            for scheduler in schedulers:
                scheduler.step()
        opt.step(jax.tree.map(jnp.sin, begin))
        other = cls(opt.params, **options, **more)
        other.load_state_dict(jax.tree.map(lambda x: np.asarray(x) if is_dense(x) else x, opt.state_dict()))
        loaded = state_of(other)
        other.step(jax.tree.map(jnp.cos, begin))
        other.minimize(loss)
        return opt, other, loaded

    def state_of(opt):
        return dict(zip(opt.params, opt.state_dict()["state"].values(), strict=True))

    _, expected, _ = run()
    first, found, loaded = run(mesh=mesh, zero="data")
    assert_close(found.params, expected.params)
    assert_close(without_shapes(state_of(found)), without_shapes(state_of(expected)))
    assert all(x.is_fully_replicated and len(x.sharding.device_set) == 8 for x in found.params.values())
    for state in (state_of(first), loaded, state_of(found)):
        for param, slots in state.items():
            for slot in slots.values():
                if getattr(slot, "shape", None) == SHAPES[param]:
                    assert slot.size == 8 * slot.addressable_shards[0].data.size, (param, slot.sharding)


def without_shapes(state):
    return {param: {name: np.asarray(x) for name, x in slots.items()} for param, slots in state.items()}


def squares(params):
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in params.values())


def test_steps_of_a_class_over_a_mesh_are_one_program(caplog):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(jnp.ones((16, 8), jnp.bfloat16), NamedSharding(mesh, P(None, "data")))
    params = {"whole": jnp.ones((4, 16)), "sharded": sharded}
    opt = optim.Adam(params, mesh=mesh, zero=("data",), master_weights=True)
    with jax.log_compiles():
        for _ in range(3):
            opt.minimize(squares)
    assert caplog.text.count("Compiling jit(minimized)") == 1
    assert opt.params["sharded"].sharding.is_equivalent_to(sharded.sharding, 2)
    (whole,) = [slots for slots in opt.state.values() if "master_weights" not in slots]
    assert whole["exp_avg"].sharding.spec == P(None, "data")
    (sharded_state,) = [slots for slots in opt.state.values() if "master_weights" in slots]
    assert sharded_state["master_weights"].sharding.is_equivalent_to(sharded.sharding, 2)
    opt.add_param_group({"params": jnp.ones((8, 3))})
    opt.step([jax.tree.map(jnp.ones_like, params), jnp.ones((8, 3))])
    added = list(opt.state.values())[-1]
    assert added["exp_avg"].sharding.spec == P("data")


def test_errors_and_warnings_of_classes_over_a_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(TypeError, match="no mesh was given"):
        optim.Adam(jnp.ones(8), zero="data")
    with pytest.raises(TypeError, match="mesh takes a Mesh"):
        optim.Adam(jnp.ones(8), mesh="data")
    with pytest.raises(ValueError, match="Invalid axis: 'model'"):
        optim.Adam(jnp.ones(8), mesh=mesh, zero="model")
    with pytest.warns(UserWarning, match=r"of 1 arrays, whose state, 24 bytes, .*: 'b' \(3,\)"):
        optim.Adam({"w": jnp.ones((8, 2)), "b": jnp.ones(3), "s": jnp.ones(())}, mesh=mesh, zero="data")
    with pytest.raises(TypeError, match="unexpected keyword argument 'mesh'"):
        optim.LBFGS(jnp.ones(8), mesh=mesh, zero="data")
