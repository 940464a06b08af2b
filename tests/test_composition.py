"""The transformations inside the libraries that people use them with."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxoptim
from jaxoptim import rules
from table import FIRST, FORMS, STATES, slow_unless

PARAMS = {"w": jnp.arange(12.0).reshape(4, 3) / 10 + 1, "v": jnp.ones((2, 2))}
GRADS = {"w": jnp.full((4, 3), 0.5), "v": jnp.full((2, 2), -2.0)}
DENSE = [case for case in STATES if not case.row.sparse]


assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-7)


def run(tx, steps=3, params=PARAMS, grads=GRADS):
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@functools.cache
def transformed(case):
    """The transformation of a case and its compiled update, which all tests share."""
    tx = jaxoptim.transformation(case.ours())
    return tx, jax.jit(tx.update)


def run_alone(case, steps=3, grads=GRADS, scale=1.0):
    """The parameters after steps along the updates of a case, each of which is scaled."""
    tx, update = transformed(case)
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(steps):
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + scale * u, params, updates)
    return params


def factory_of(rule):
    """The function of the pure face for a rule."""
    return next(value for value in vars(jaxoptim).values() if getattr(value, "__wrapped__", None) is rule)


@pytest.mark.costly
@pytest.mark.parametrize("case", slow_unless(FORMS.__contains__, DENSE))
def test_chain(case):
    tx, _ = transformed(case)
    chained, _ = run(optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.5)))
    clipped, _ = optax.clip_by_global_norm(1.0).update(GRADS, optax.EmptyState())
    assert_close(chained, run_alone(case, grads=clipped, scale=0.5))


@pytest.mark.costly
@pytest.mark.parametrize("case", slow_unless(FORMS.__contains__, DENSE))
def test_partition_and_masked(case):
    tx, _ = transformed(case)
    expected = {"w": run_alone(case)["w"], "v": PARAMS["v"]}
    parts, _ = run(optax.partition({"ours": tx, "frozen": optax.set_to_zero()}, {"w": "ours", "v": "frozen"}))
    assert_close(parts, expected)
    masked, _ = run(
        optax.chain(
            optax.masked(tx, {"w": True, "v": False}), optax.masked(optax.set_to_zero(), {"w": False, "v": True})
        )
    )
    assert_close(masked, expected)


@pytest.mark.costly
@pytest.mark.parametrize("case", slow_unless(FORMS.__contains__, DENSE))
def test_inject_hyperparams(case):
    factory = factory_of(case.row.rule)
    static = ("ns_steps", "dct_dim")
    injected = optax.inject_hyperparams(
        factory, static_args=[name for name in static if name in case.row.rule.__annotations__]
    )
    tx = injected(**case.options)
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, run_alone(case), rtol=1e-4)
    name = "lr" if "lr" in case.row.rule.specs else "eta"
    compiled = []
    for value in (0.5, 0.25):
        state.hyperparams[name] = jnp.asarray(value)
        updates, _ = update(GRADS, state, params)
        compiled.append(update._cache_size())
    assert compiled[0] == compiled[1]
    if case.row.rule is rules.SGD:
        at_quarter, _ = factory(**case.options | {"lr": 0.25}).update(GRADS, state.inner_state, params)
        assert_close(updates, at_quarter)


def test_inject_hyperparams_takes_schedules():
    tx = optax.inject_hyperparams(jaxoptim.sgd)(lr=optax.linear_schedule(1.0, 0.0, 2))
    params, _ = run(tx)
    assert_close(params["v"], PARAMS["v"] + 2.0 * 1.5)


def test_muon_names_the_switch_that_cannot_be_injected():
    with pytest.raises(TypeError, match="name it in static_args"):
        optax.inject_hyperparams(jaxoptim.muon)().init(PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_multi_steps(case):
    tx, _ = transformed(case)
    accumulated, _ = run(optax.MultiSteps(tx, 2).gradient_transformation(), steps=4)
    assert_close(accumulated, run_alone(case, steps=2))


@pytest.mark.slow
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_apply_if_finite(case):
    tx, update_alone = transformed(case)
    guarded = optax.apply_if_finite(tx, 5)
    state, update = guarded.init(PARAMS), jax.jit(guarded.update)
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    updates, state = update(bad, state, PARAMS)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    updates, state = update(GRADS, state, PARAMS)
    expected, _ = update_alone(GRADS, tx.init(PARAMS), PARAMS)
    assert_close(updates, expected)


@pytest.mark.parametrize("case", slow_unless(FORMS.__contains__, DENSE))
def test_map_params(case):
    tx = optax.chain(optax.clip(1.0), jaxoptim.transformation(case.ours()))
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(tx, lambda slot: "slot", state, transform_non_params=lambda _: "count")
    assert jax.tree.leaves(mapped).count("count") == 1
    assert jax.tree.leaves(mapped).count("slot") == len(jax.tree.leaves(state)) - 1


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_unknown_keywords_are_ignored(case):
    tx = jaxoptim.transformation(case.ours())
    if not case.row.sparse:
        tx.update(GRADS, tx.init(PARAMS), PARAMS, value=1.0, grad=GRADS, value_fn=None)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(8)(x)))


X, Y = jax.random.normal(jax.random.key(0), (16, 3)), jax.random.normal(jax.random.key(1), (16, 2))


@pytest.mark.slow
def test_flax_train_state():
    network = Network()
    state = TrainState.create(
        apply_fn=network.apply, params=network.init(jax.random.key(2), X)["params"], tx=jaxoptim.adamw(lr=0.05)
    )

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((state.apply_fn({"params": p}, X) - Y) ** 2))(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = [(state, loss) for state, loss in [step(state)]]
    for _ in range(30):
        losses.append(step(losses[-1][0]))
    assert losses[-1][1] < 0.5 * losses[0][1]
    assert int(losses[-1][0].opt_state.step) == 31


@pytest.mark.costly
@pytest.mark.parametrize(
    "make", [jaxoptim.adamw, jaxoptim.sgd, jaxoptim.nadam, jaxoptim.adafactor], ids=lambda f: f.__name__
)
def test_flax_nnx_optimizer(make):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(lr=0.05), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, grads, value=loss)
        return loss

    start = {"kernel": model.kernel[...], "bias": model.bias[...]}
    losses = [step(model, optimizer) for _ in range(3)]
    rule = make.__wrapped__(lr=0.05)
    params, state = start, jaxoptim.init(rule, start)
    for _ in range(3):
        grads = jax.grad(lambda p: jnp.mean((X @ p["kernel"] + p["bias"] - Y) ** 2))(params)
        params, state = jaxoptim.step(rule, params, grads, state)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(model.kernel[...], params["kernel"], rtol=1e-4)


@pytest.mark.slow
def test_equinox():
    model = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))
    tx = jaxoptim.adam(lr=0.05)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        loss, grads = eqx.filter_value_and_grad(lambda m: jnp.mean((jax.vmap(m)(X) - Y) ** 2))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(30):
        model, state, loss = step(model, state)
        losses.append(loss)
    assert losses[-1] < 0.5 * losses[0]


def test_equinox_filters_take_rules_apart():
    rule = rules.Adam(lr=0.1)
    dynamic, static = eqx.partition(rule, eqx.is_array)
    assert eqx.combine(dynamic, static) == rule
    assert jax.tree.leaves(eqx.filter(rule, lambda x: False)) == []


@pytest.mark.slow
@pytest.mark.parametrize("make", [jaxoptim.adam, jaxoptim.rprop, jaxoptim.adadelta], ids=lambda f: f.__name__)
def test_optimistix(make):
    solver = optimistix.OptaxMinimiser(make(lr=0.05 if make is not jaxoptim.adadelta else 50.0), rtol=1e-6, atol=1e-6)
    solution = optimistix.minimise(lambda x, _: jnp.sum((x - 2.0) ** 2), solver, jnp.zeros(3), max_steps=5000)
    np.testing.assert_allclose(solution.value, 2.0, atol=1e-2)


def test_a_subsample_is_given_for_one_update():
    tx = jaxoptim.dct_adam(lr=0.1, subsample_aware=True)
    updates, state = jax.jit(lambda i: tx.update(PARAMS["w"], tx.init(PARAMS["w"]), PARAMS["w"], subsample={-2: i}))(
        jnp.array([1, 3])
    )
    assert jnp.array_equal(jnp.any(updates != 0, axis=1), jnp.array([False, True, False, True]))
    assert jnp.array_equal(state.slots["step"][:, 0], jnp.array([0.0, 1.0, 0.0, 1.0]))
