"""Optimizers in ``numpyro.infer.SVI``: against loops written out, numpyro's own adapter, and exact solutions."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen as nn
from numpyro.contrib.module import flax_module
from numpyro.infer import SVI, Trace_ELBO, autoguide

import jaxoptim
from jaxoptim import pyro, rules
from jaxoptim.interop.numpyro import by_path, required, to_numpyro

KEY = jax.random.key(0)
DATA = jnp.array([1.0, 2.5, 3.0])
MEAN = float(DATA.sum()) / 4  # of the posterior of a standard normal mean with unit noise


def model(data):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", data.shape[0]):
        numpyro.sample("data", dist.Normal(mean, 1.0), obs=data)


def guide(data):
    loc = numpyro.param("loc", 0.5)
    scale = numpyro.param("scale", lambda key: 1 + jax.random.uniform(key), constraint=dist.constraints.positive)
    numpyro.sample("mean", dist.Normal(loc, scale))


def plateau():
    return optax.chain(optax.adam(0.05), optax.contrib.reduce_on_plateau(patience=2, cooldown=0, factor=0.5))


TRANSFORMATIONS = {
    "adam": lambda: jaxoptim.adam(lr=0.05),
    "sgd": lambda: jaxoptim.sgd(lr=0.01, momentum=0.9),
    "clipped_adam": lambda: jaxoptim.clipped_adam(lr=0.05, lrd=0.99, clip_norm=0.5),
    "schedule": lambda: jaxoptim.adamw(lr=jaxoptim.schedules.exponential_lr(0.1, 0.9)),
    "optax": lambda: optax.chain(optax.clip(1.0), optax.adam(0.05)),
    "plateau": plateau,
}
LINE_SEARCH = {
    "lbfgs": lambda: jaxoptim.lbfgs(line_search_fn="strong_wolfe"),
    "rule": lambda: rules.LBFGS(line_search_fn="strong_wolfe", max_iter=5),
    "optax": optax.lbfgs,
}


def each(cases, fast=("adam", "plateau")):
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in cases]


def signature(state):
    return jax.tree.structure(state), [
        (x.shape, x.dtype, getattr(x, "weak_type", False)) for x in map(jnp.asarray, jax.tree.leaves(state))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", each(TRANSFORMATIONS))
def test_steps_are_those_of_a_loop_written_out(name):
    tx = optax.with_extra_args_support(TRANSFORMATIONS[name]())
    svi = SVI(model, guide, to_numpyro(TRANSFORMATIONS[name]()), Trace_ELBO())
    state = svi.init(KEY, DATA)
    before = signature(state)
    params = svi.optim.get_params(state.optim_state)
    inner, key, update = tx.init(params), state.rng_key, jax.jit(svi.update)

    @jax.jit
    def step(params, inner, key):
        def loss_of(params):
            scale = dist.biject_to(dist.constraints.positive)(params["scale"])
            return Trace_ELBO().loss(key, {"loc": params["loc"], "scale": scale}, model, guide, DATA)

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, inner = tx.update(grads, inner, params, value=loss)
        return loss, optax.apply_updates(params, updates), inner

    for _ in range(6):
        key, step_key = jax.random.split(key)
        expected, params, inner = step(params, inner, step_key)
        state, loss = update(state, DATA)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        for path, value in params.items():
            np.testing.assert_allclose(svi.optim.get_params(state.optim_state)[path], value, rtol=1e-6)
        assert signature(state) == before


@pytest.mark.slow
def test_agrees_with_numpyros_own_adapter():
    ours, theirs = (SVI(model, guide, tx, Trace_ELBO()) for tx in (to_numpyro(optax.adam(0.1)), optax.adam(0.1)))
    mine, parents = (svi.run(KEY, 20, DATA, progress_bar=False) for svi in (ours, theirs))
    np.testing.assert_allclose(mine.losses, parents.losses, rtol=1e-6)
    for name, value in parents.params.items():
        np.testing.assert_allclose(mine.params[name], value, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", each(LINE_SEARCH, ["rule"]))
@pytest.mark.parametrize("stable", [False, True])
def test_the_loss_itself_reaches_line_searches(name, stable):
    svi = SVI(model, autoguide.AutoDelta(model), to_numpyro(LINE_SEARCH[name]()), Trace_ELBO())
    result = svi.run(KEY, 10, DATA, progress_bar=False, stable_update=stable)
    np.testing.assert_allclose(result.params["mean_auto_loc"], MEAN, rtol=1e-5)
    assert result.losses[-1] <= result.losses[0]


def test_the_learning_rate_falls_on_a_plateau():
    svi = SVI(model, autoguide.AutoDelta(model), to_numpyro(plateau()), Trace_ELBO())
    result = svi.run(KEY, 300, DATA, progress_bar=False)
    assert result.state.optim_state[1][1][-1].scale < 0.6
    np.testing.assert_allclose(result.params["mean_auto_loc"], MEAN, rtol=0.05)


def test_the_adapter_also_takes_gradients():
    optim = to_numpyro(jaxoptim.sgd(lr=0.5))
    state = optim.update({"x": jnp.ones(2)}, optim.init({"x": jnp.ones(2)}), value=1.0)
    assert int(state[0]) == 1
    np.testing.assert_array_equal(optim.get_params(state)["x"], [0.5, 0.5])


def test_parameters_are_strongly_typed():
    state = to_numpyro(jaxoptim.adam()).init({"x": 1.0, "y": jnp.asarray(2.0)})
    assert not any(weak for _, _, weak in signature(state)[1])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_float32_parameters_stay_float32():
    optim = to_numpyro(optax.chain(plateau(), optax.scale_by_schedule(lambda count: 1 / (1 + count))))
    state = optim.init({"x": jnp.ones(2, jnp.float32), "y": jnp.ones(2)})
    _, new = optim.eval_and_update(lambda p: ((p["x"] ** 2).sum() + (p["y"] ** 2).sum(), None), state)
    assert signature(new) == signature(state)


@pytest.mark.slow
def test_complex_parameters_descend():
    optim = to_numpyro(jaxoptim.sgd(lr=0.1))
    state = optim.init({"z": jnp.array(1.0 + 2.0j)})
    _, state = optim.eval_and_update(lambda p: (jnp.abs(p["z"]) ** 2, None), state)
    np.testing.assert_allclose(optim.get_params(state)["z"], 0.8 + 1.6j, rtol=1e-6)


@pytest.mark.slow
def test_a_state_goes_on_after_pickling_with_another_object():
    first, second = (SVI(model, guide, to_numpyro(jaxoptim.adam(lr=0.1)), Trace_ELBO()) for _ in range(2))
    state = first.run(KEY, 5, DATA, progress_bar=False).state
    second.init(KEY, DATA)
    arrays = jax.device_get(state.optim_state)
    state_again = state._replace(optim_state=jax.tree.map(jnp.asarray, pickle.loads(pickle.dumps(arrays))))
    expected = first.run(KEY, 5, DATA, progress_bar=False, init_state=state)
    result = second.run(KEY, 5, DATA, progress_bar=False, init_state=state_again)
    np.testing.assert_array_equal(result.losses, expected.losses)


@pytest.mark.slow
def test_a_model_without_parameters():
    def nothing(data):
        numpyro.sample("mean", dist.Normal(0.0, 1.0))

    for tx in (jaxoptim.adam(), jaxoptim.sgd(), optax.adam(0.1)):
        result = SVI(model, nothing, to_numpyro(tx), Trace_ELBO()).run(KEY, 3, DATA, progress_bar=False)
        assert result.params == {}
        assert result.losses.shape == (3,)


@pytest.mark.slow
def test_the_progress_bar_compiles_once(capsys):
    traces = []

    def counted(data):
        traces.append(1)
        model(data)

    SVI(counted, guide, to_numpyro(jaxoptim.adam()), Trace_ELBO()).run(KEY, 20, DATA)
    assert len(traces) == 2  # one in init


def delta(data):
    numpyro.sample("mean", dist.Delta(numpyro.param("mean_auto_loc", 0.1)))


class Net(nn.Module):
    normalise: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        if self.normalise:
            x = nn.BatchNorm(use_running_average=False, momentum=0.5)(x)
        return nn.Dense(1)(x)[..., 0]


X = jnp.linspace(-1.0, 1.0, 12).reshape(6, 2)


def regression(x, y, normalise=False):
    net = flax_module("net", Net(normalise), input_shape=(1, 2), mutable=["batch_stats"] if normalise else None)
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(net(x), 0.1), obs=y)


def empty(*args, **kwargs):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("tx", [jaxoptim.adam(lr=0.05), rules.LBFGS(line_search_fn="strong_wolfe")])
def test_networks_have_nested_parameters(tx):
    svi = SVI(regression, empty, to_numpyro(tx), Trace_ELBO())
    result = svi.run(KEY, 30, X, X[:, 0] - X[:, 1], progress_bar=False)
    assert result.losses[-1] < 0.1 * result.losses[0]
    assert result.params["net$params"]["Dense_0"]["kernel"].shape == (2, 3)


@pytest.mark.slow
def test_mutable_state_is_handed_back():
    svi = SVI(regression, empty, to_numpyro(jaxoptim.adam(lr=0.0)), Trace_ELBO(), normalise=True)
    result = svi.run(KEY, 4, X, X[:, 0], progress_bar=False)
    # init runs the network too
    dense = result.params["net$params"]["Dense_0"]
    mean = (X @ dense["kernel"] + dense["bias"]).mean(0)
    averaged = result.state.mutable_state["net$state"]["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(averaged, mean * (1 - 0.5**5), rtol=1e-5)


def iterated(data):
    """A model that only forward differentiation goes through."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    halves = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] / 2), (0, mean))[1]
    numpyro.sample("data", dist.Normal(8 * halves, 1.0).expand([3]).to_event(1), obs=data)


@pytest.mark.slow
@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize(
    "tx",
    [jaxoptim.sgd(lr=0.2), jaxoptim.lbfgs(line_search_fn="strong_wolfe"), optax.lbfgs()],
    ids=["sgd", "ours", "optax"],
)
def test_forward_differentiation(tx, stable):
    svi = SVI(iterated, delta, to_numpyro(tx), Trace_ELBO())
    options = {"progress_bar": False, "stable_update": stable}
    with pytest.raises(ValueError, match="Reverse-mode differentiation"):
        svi.run(KEY, 20, DATA, **options)
    result = svi.run(KEY, 20, DATA, forward_mode_differentiation=True, **options)
    np.testing.assert_allclose(result.params["mean_auto_loc"], MEAN, rtol=1e-4)


@pytest.mark.slow
def test_forward_and_reverse_agree():
    svi = SVI(model, guide, to_numpyro(jaxoptim.adam(lr=0.1)), Trace_ELBO())
    runs = [svi.run(KEY, 5, DATA, progress_bar=False, forward_mode_differentiation=f) for f in (False, True)]
    np.testing.assert_allclose(runs[0].losses, runs[1].losses, rtol=1e-5)


def second_order():
    """A transformation that needs the Hessian of the loss."""

    def update(grads, state, params, *, value_fn, **extra):
        hessian = jax.hessian(value_fn)(params)
        return {name: -grads[name] / hessian[name][name] for name in grads}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.slow
@pytest.mark.parametrize("forward", [False, True])
def test_the_loss_can_be_differentiated_twice(forward):
    target = iterated if forward else model
    svi = SVI(target, delta, to_numpyro(second_order()), Trace_ELBO())
    result = svi.run(KEY, 1, DATA, progress_bar=False, forward_mode_differentiation=forward)
    np.testing.assert_allclose(result.params["mean_auto_loc"], MEAN, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tx", [jaxoptim.adam(lr=0.1), jaxoptim.lbfgs(), optax.lbfgs()], ids=["adam", "lbfgs", "optax"])
def test_a_stable_update_leaves_the_state_where_the_loss_is_not_finite(tx):
    svi = SVI(model, delta, to_numpyro(tx), Trace_ELBO())
    state = svi.init(KEY, DATA)
    update = jax.jit(svi.stable_update)
    state, loss = update(state, DATA)
    assert jnp.isfinite(loss)
    for bad in (DATA.at[0].set(jnp.nan), DATA.at[0].set(jnp.inf)):
        new, loss = update(state, bad)
        assert jnp.isnan(loss)
        chex.assert_trees_all_equal(new.optim_state, state.optim_state)
    new, loss = update(state, DATA)
    assert jnp.isfinite(loss)
    assert int(new.optim_state[0]) == 2


def test_a_stable_update_looks_at_the_gradient():
    optim = to_numpyro(jaxoptim.sgd(lr=0.1))
    state = optim.init({"x": jnp.zeros(2)})
    (loss, aux), new = optim.eval_and_stable_update(lambda p: (jnp.sqrt(p["x"]).sum(), "aux"), state)
    assert jnp.isnan(loss)
    assert aux == "aux"
    assert int(new[0]) == 0


def test_what_is_refused():
    with pytest.raises(TypeError, match="rule"):
        to_numpyro(3.0)
    with pytest.raises(TypeError):
        to_numpyro(rules.Adam)
    with pytest.raises(ValueError, match=r"'a\.b'"):
        by_path({"a": {"b": 1.0}, "a.b": 2.0})


def test_without_numpyro(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "numpyro", None)
    with pytest.raises(ImportError, match=r"pip install numpyro, or pip install 'jaxoptim\[numpyro\]'"):
        required()


# The Pyro-style optimizers.


@pytest.mark.slow
def test_pyro_style_options_are_asked_for_by_name():
    asked = []

    def options(name):
        asked.append(name)
        return {"lr": 0.0 if "bias" in name else 0.05}

    svi = SVI(regression, empty, to_numpyro(pyro.optim.Adam(options)), Trace_ELBO())
    state = svi.init(KEY, X, X[:, 0])
    before = svi.get_params(state)["net$params"]
    result = svi.run(KEY, 5, X, X[:, 0], progress_bar=False, init_state=state)
    assert sorted(set(asked)) == [f"net$params.Dense_{i}.{part}" for i in (0, 1) for part in ("bias", "kernel")]
    for name, layer in result.params["net$params"].items():
        np.testing.assert_array_equal(layer["bias"], before[name]["bias"])
        assert (layer["kernel"] != before[name]["kernel"]).all()


@pytest.mark.slow
def test_pyro_style_steps_are_those_of_the_rule():
    runs = [
        SVI(model, guide, to_numpyro(optim), Trace_ELBO()).run(KEY, 10, DATA, progress_bar=False)
        for optim in (pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), jaxoptim.clipped_adam(lr=0.05, lrd=0.99))
    ]
    np.testing.assert_allclose(runs[0].losses, runs[1].losses, rtol=1e-5)


def test_newton_is_exact_in_one_step():
    newton = pyro.optim.multi.Newton({})
    svi = SVI(model, delta, to_numpyro(newton), Trace_ELBO())
    result = svi.run(KEY, 1, DATA, progress_bar=False)
    np.testing.assert_allclose(result.params["mean_auto_loc"], MEAN, rtol=1e-5)


def test_mixed_optimizers():
    adam, sgd = (
        pyro.optim.multi.PyroMultiOptimizer(o) for o in (pyro.optim.Adam({"lr": 0.05}), pyro.optim.SGD({"lr": 0.0}))
    )
    mixed = pyro.optim.multi.MixedMultiOptimizer([(["loc"], adam), (["scale"], sgd)])
    svi = SVI(model, guide, to_numpyro(mixed), Trace_ELBO())
    state = svi.init(KEY, DATA)
    before = svi.get_params(state)
    result = svi.run(KEY, 10, DATA, progress_bar=False, init_state=state)
    assert result.params["loc"] != before["loc"]
    np.testing.assert_array_equal(result.params["scale"], before["scale"])
