"""Variational inference: step for step against numpyro's SVI, and what numpyro's cannot do."""

import functools
import hashlib
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen as nn
from numpyro import handlers
from numpyro.contrib.module import flax_module, random_flax_module
from numpyro.distributions import constraints
from numpyro.infer import SVI as Parent
from numpyro.infer import Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, autoguide

import jaxoptim
from infer_networks import Normalised
from jaxoptim import optim, pyro, rules
from jaxoptim.interop.numpyro import to_numpyro
from jaxoptim.pyro.infer import SVI, differentiable_loss

KEY = jax.random.key(7)
DATA = jnp.array([1.0, 2.5, 3.0])


def model(data):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", data.shape[0]):
        numpyro.sample("data", dist.Normal(mean, 1.0), obs=data)


def guide(data):
    loc = numpyro.param("loc", 0.5)
    scale = numpyro.param("scale", lambda key: 1 + jax.random.uniform(key), constraint=constraints.positive)
    numpyro.sample("mean", dist.Normal(loc, scale))


def many(data):
    loc = numpyro.param("loc", jnp.array(0.5))
    with numpyro.plate("samples", 4):
        numpyro.sample("mean", dist.Normal(loc, 1.0))


def learned(data):
    """A model with a parameter of its own."""
    noise = numpyro.param("noise", 2.0, constraint=constraints.interval(0.1, 5.0))
    mean = numpyro.sample("mean", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    with numpyro.plate("n", data.shape[0]):
        numpyro.sample("data", dist.Normal(mean.sum(), noise), obs=data)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(3)(x)))


X = jnp.linspace(-1.0, 1.0, 12).reshape(6, 2)


def decoder(x):
    net = flax_module("decoder", Net(), input_shape=(1, 2))
    with numpyro.plate("n", x.shape[0]):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)


def encoder(x):
    net = flax_module("encoder", Net(), input_shape=(1, 2))
    with numpyro.plate("n", x.shape[0]):
        numpyro.sample("z", dist.Normal(net(x), 0.3).to_event(1))


def bayesian(x):
    net = random_flax_module("net", nn.Dense(1), dist.Normal(0.0, 1.0), input_shape=(1, 2))
    with numpyro.plate("n", x.shape[0]):
        numpyro.sample("y", dist.Normal(net(x)[..., 0], 0.1), obs=x[:, 0])


def scaled_elbo(model, guide, *args, **kwargs):
    """``Trace_ELBO`` written out."""
    guide_trace = handlers.trace(guide).get_trace(*args, **kwargs)
    model_trace = handlers.trace(handlers.replay(model, guide_trace)).get_trace(*args, **kwargs)
    elbo = 0.0
    for trace, sign in ((model_trace, 1), (guide_trace, -1)):
        for site in trace.values():
            if site["type"] == "sample":
                elbo += sign * jnp.sum(site["fn"].log_prob(site["value"]))
    return -elbo


class Twice(Trace_ELBO):
    """An ELBO of the user's own."""

    def loss(self, *args, **kwargs):
        return 2 * super().loss(*args, **kwargs)


CASES = {
    "written": (model, lambda: guide, Trace_ELBO(), DATA),
    "particles": (model, lambda: guide, Trace_ELBO(num_particles=3), DATA),
    "unvectorized": (model, lambda: guide, Trace_ELBO(num_particles=2, vectorize_particles=False), DATA),
    "many": (model, lambda: many, Trace_ELBO(multi_sample_guide=True), DATA),
    "mean field": (model, lambda: guide, TraceMeanField_ELBO(), DATA),
    "renyi": (model, lambda: guide, RenyiELBO(num_particles=3), DATA),
    "graph": (model, lambda: guide, TraceGraph_ELBO(), DATA),
    "own": (model, lambda: guide, Twice(), DATA),
    "normal": (learned, lambda: autoguide.AutoNormal(learned), Trace_ELBO(), DATA),
    "delta": (learned, lambda: autoguide.AutoDelta(learned), Trace_ELBO(), DATA),
    "multivariate": (learned, lambda: autoguide.AutoMultivariateNormal(learned), Trace_ELBO(), DATA),
    "network": (decoder, lambda: encoder, TraceMeanField_ELBO(), X),
    "bayesian": (bayesian, lambda: autoguide.AutoNormal(bayesian), Trace_ELBO(), X),
}
FAST = ["written", "pyro", "mixed", "torch", "Adam"]


@functools.cache
def adam():
    return jaxoptim.adam(lr=0.05)


def each(cases):
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in cases]


same = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def frozen(svi):
    """All that a refused call must not change."""
    params = {name: np.asarray(param.value) for name, param in svi.params.items()}
    return jax.random.key_data(svi.key).tolist(), {n: hashlib.sha1(x.tobytes()).hexdigest() for n, x in params.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", each(CASES))
def test_losses_and_parameters_are_numpyros(case):
    model, make, elbo, data = CASES[case]
    parent, ours = Parent(model, make(), to_numpyro(adam()), elbo), SVI(model, make(), adam(), elbo, key=KEY)
    state = parent.init(KEY, data)
    update = jax.jit(parent.update)
    for _ in range(4):
        np.testing.assert_allclose(ours.evaluate_loss(data), parent.evaluate(state, data), rtol=2e-5)
        state, expected = update(state, data)
        np.testing.assert_allclose(ours.step(data), expected, rtol=1e-5)
        same(ours.get_params(), parent.get_params(state))
        np.testing.assert_array_equal(jax.random.key_data(ours.key), jax.random.key_data(state.rng_key))


@pytest.mark.numbers
@pytest.mark.parametrize("case", each(CASES))
def test_the_plain_loss_is_numpyros_to_the_bit(case):
    model, make, elbo, data = CASES[case]
    guide = make()
    params, constrain, loss_fn = differentiable_loss(model, guide, elbo, KEY, data)
    assert all(isinstance(x, jax.Array) and not x.weak_type for x in params.values())
    parent = Parent(model, guide, to_numpyro(adam()), elbo)
    state = parent.init(KEY, data)
    theirs = parent.get_params(state)
    chex.assert_trees_all_equal(constrain(params), theirs)
    assert loss_fn(params, KEY, data) == elbo.loss(KEY, theirs, model, guide, data)
    grads = jax.jit(jax.grad(loss_fn))(params, KEY, data)
    assert grads.keys() == params.keys()


@pytest.mark.slow
def test_names_of_networks_are_paths():
    params, constrain, _ = differentiable_loss(decoder, encoder, Trace_ELBO(), KEY, X)
    parts = [f"Dense_{i}.{part}" for i in (0, 1) for part in ("bias", "kernel")]
    assert sorted(params) == [f"{net}$params.{part}" for net in ("decoder", "encoder") for part in parts]
    assert constrain(params)["decoder$params"]["Dense_0"]["kernel"].shape == (3, 2)
    svi = SVI(decoder, encoder, adam(), Trace_ELBO(), key=KEY)
    svi.step(X)
    assert sorted(svi.params) == sorted(params)
    assert all(isinstance(p, optim.Parameter) and p.name == name for name, p in svi.params.items())


@pytest.mark.slow
def test_a_loop_of_ones_own_is_the_step():
    params, constrain, loss_fn = differentiable_loss(model, guide, Trace_ELBO(), KEY, DATA)
    svi = SVI(model, guide, adam(), Trace_ELBO(), key=KEY)
    svi.evaluate_loss(DATA)
    key, state, value_and_grad = svi.key, adam().init(params), jax.jit(jax.value_and_grad(loss_fn))
    for _ in range(5):
        key, step_key = jax.random.split(key)
        loss, grads = value_and_grad(params, step_key, DATA)
        updates, state = adam().update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(svi.step(DATA), loss, rtol=1e-6)
    same(svi.get_params(), constrain(params))


@pytest.mark.numbers
@pytest.mark.slow
@pytest.mark.parametrize("kind", each(["Adam", "ClippedAdam"]))
def test_a_loop_of_pyros_is_the_step_to_the_bit(kind):
    def make():
        return getattr(pyro.optim, kind)({"lr": 0.05})

    params, _, loss_fn = differentiable_loss(decoder, encoder, TraceMeanField_ELBO(), KEY, X)
    svi, optimizer = SVI(decoder, encoder, make(), TraceMeanField_ELBO(), key=KEY), make()
    svi.evaluate_loss(X)
    key, value_and_grad = svi.key, jax.jit(jax.value_and_grad(loss_fn))
    for _ in range(5):
        key, step_key = jax.random.split(key)
        loss, grads = value_and_grad(params, step_key, X)
        params = optimizer.update(params, grads)
        assert svi.step(X) == loss
    for name, value in params.items():
        np.testing.assert_array_equal(svi.params[name].value, value)


OPTIMIZERS = {
    "pyro": lambda: pyro.optim.Adam({"lr": 0.05}),
    "by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.05}),
    "multi": lambda: pyro.optim.multi.PyroMultiOptimizer(pyro.optim.Adam({"lr": 0.05})),
    "mixed": lambda: pyro.optim.multi.MixedMultiOptimizer(
        [(["loc"], pyro.optim.Adam({"lr": 0.05})), (["scale"], pyro.optim.Adam({"lr": 0.05}))]
    ),
    "rule": lambda: rules.Adam(lr=0.05),
    "optax": lambda: optax.adam(0.05),
    "torch": lambda: lambda params: optim.Adam(params, lr=0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", each(OPTIMIZERS))
def test_every_kind_of_optimizer(name):
    svi = SVI(model, guide, OPTIMIZERS[name](), Trace_ELBO(), key=KEY)
    parent = Parent(model, guide, to_numpyro(adam()), Trace_ELBO())
    result = parent.run(KEY, 4, DATA, progress_bar=False)
    np.testing.assert_allclose(svi.run(4, DATA, progress_bar=False), result.losses, rtol=1e-5)
    same(svi.get_params(), result.params)


@pytest.mark.slow
def test_an_optimizer_of_torchs_kind_brings_its_own_parameters():
    adam = optim.Adam({"loc": jnp.array(3.0), "scale": jnp.array(0.0)}, lr=0.05)
    svi = SVI(model, guide, adam, Trace_ELBO(), key=KEY)
    for _ in range(2):
        svi.step(DATA)
    np.testing.assert_allclose(svi.params["loc"].value, 2.9, rtol=1e-2)
    assert svi.params["loc"].value == adam.params["loc"]


@pytest.mark.slow
def test_LBFGS_of_torchs_kind_has_no_gradient_of_what_a_step_does_not_reach():
    def parabolas(late):
        numpyro.factor("f", -((numpyro.param("a", 1.0) - 2.0) ** 2))
        if late:
            numpyro.factor("g", -((numpyro.param("b", 3.0) - 1.0) ** 2))

    svi = SVI(parabolas, nothing, lambda params: optim.LBFGS(params, lr=0.5, max_iter=2), Trace_ELBO())
    svi.step(False)
    svi.step(True)
    svi.step(False)  # the loss takes no "b" here
    for _ in range(25):
        svi.step(True)
    np.testing.assert_allclose([svi.params["a"].value, svi.params["b"].value], [2.0, 1.0], atol=1e-3)


def test_a_parameter_in_no_part_is_named():
    mixed = pyro.optim.multi.MixedMultiOptimizer([(["loc"], pyro.optim.Adam({"lr": 0.05}))])
    with pytest.raises(ValueError, match="'scale'"):
        SVI(model, guide, mixed, Trace_ELBO()).step(DATA)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_double_precision():
    data = jnp.array([1.0, 2.5, 3.0])
    params, _, _ = differentiable_loss(model, guide, Trace_ELBO(), KEY, data)
    assert all(x.dtype == jnp.float64 for x in params.values())
    parent, ours = Parent(model, guide, to_numpyro(adam()), Trace_ELBO()), SVI(model, guide, adam(), Trace_ELBO())
    state = parent.init(jax.random.key(0), data)
    for _ in range(3):
        state, expected = parent.update(state, data)
        np.testing.assert_allclose(ours.step(data), expected, rtol=1e-12)


@pytest.mark.slow
def test_the_posterior_of_a_conjugate_model():
    svi = SVI(
        model, guide, jaxoptim.adam(lr=jaxoptim.schedules.exponential_lr(0.1, 0.99)), Trace_ELBO(num_particles=20)
    )
    losses = svi.run(250, DATA, progress_bar=False)
    assert losses.shape == (250,)
    found = svi.get_params()
    np.testing.assert_allclose(found["loc"], DATA.sum() / 4, atol=0.02)
    np.testing.assert_allclose(found["scale"], 0.5, atol=0.02)
    # At the posterior the ELBO of each particle is the evidence.
    evidence = dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3) + 1).log_prob(DATA)
    np.testing.assert_allclose(losses[-1], -evidence, atol=0.01)
    draws = Predictive(guide, params=found, num_samples=5)(KEY, DATA)
    assert draws["mean"].shape == (5,)


@pytest.mark.slow
def test_run_is_a_loop_of_steps(capsys):
    first, second = (SVI(model, guide, adam(), Trace_ELBO(), key=KEY) for _ in range(2))
    losses = first.run(45, DATA)
    np.testing.assert_array_equal(losses, [second.step(DATA) for _ in range(45)])
    assert "45/45" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least 1"):
        first.run(0, DATA)
    with pytest.raises(TypeError):
        first.run(1.5, DATA)


@pytest.mark.slow
def test_keys_old_and_new():
    typed, raw = (
        SVI(model, guide, adam(), Trace_ELBO(), key=KEY),
        SVI(model, guide, adam(), Trace_ELBO(), key=jax.random.key_data(KEY)),
    )
    assert [typed.step(DATA) for _ in range(3)] == [raw.step(DATA) for _ in range(3)]


# A plain function as loss.


@pytest.mark.slow
def test_a_function_as_loss_draws_as_trace_elbo_does():
    ours, other = SVI(model, guide, adam(), scaled_elbo, key=KEY), SVI(model, guide, adam(), Trace_ELBO(), key=KEY)
    for _ in range(3):
        np.testing.assert_allclose(ours.step(DATA), other.step(DATA), rtol=1e-5)
    same(ours.get_params(), other.get_params())
    params, _, loss_fn = differentiable_loss(model, guide, scaled_elbo, KEY, DATA)
    _, _, expected = differentiable_loss(model, guide, Trace_ELBO(), KEY, DATA)
    np.testing.assert_allclose(loss_fn(params, KEY, DATA), expected(params, KEY, DATA), rtol=1e-6)


def test_each_call_of_a_guide_draws_anew():
    drawn = []

    def loss(model, guide, data):
        drawn.append([handlers.trace(guide).get_trace(data)["mean"]["value"] for _ in range(3)])
        return drawn[-1][0]

    params, _, loss_fn = differentiable_loss(model, guide, loss, KEY, DATA)
    loss_fn(params, KEY, DATA)
    loss_fn(params, KEY, DATA)
    assert drawn[0] == drawn[1]
    assert len({float(x) for x in drawn[0]}) == 3


# Static and traced arguments.


def counting(fn):
    """A model that counts how often it is traced."""
    calls = []

    @functools.wraps(fn)
    def counted(*args, **kwargs):
        calls.append(1)
        return fn(*args, **kwargs)

    counted.calls = calls
    return counted


def annealed(data, factor=1.0, names=(), size=3, use=None, flag=False):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0 if use is None else use(1.0)))
    for name in names:
        numpyro.deterministic(name, mean)
    with numpyro.plate("n", size), handlers.scale(scale=factor):
        numpyro.sample("data", dist.Normal(mean, 2.0 if flag else 1.0), obs=data)


def annealed_guide(data, **kwargs):
    numpyro.sample("mean", dist.Normal(numpyro.param("loc", 0.5), 1.0))


def test_an_annealing_factor_compiles_once():
    counted = counting(annealed)
    svi = SVI(counted, annealed_guide, adam(), Trace_ELBO())
    svi.step(DATA, factor=0.1, names=("a", "b"))
    before = len(counted.calls)
    losses = [svi.step(DATA, factor=0.1 * k, names=("a", "b")) for k in range(2, 8)]
    assert len(counted.calls) == before
    assert len(set(losses)) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"names": ("a",)}, {"names": ("b",)}),
        ({"flag": True}, {"flag": False}),
        ({"flag": True}, {"flag": 1}),
        ({"use": jnp.exp}, {"use": jnp.cosh}),
        ({"use": None}, {"use": jnp.exp}),
    ],
)
def test_static_arguments_have_their_own_programs(first, second):
    counted = counting(annealed)
    svi = SVI(counted, annealed_guide, adam(), Trace_ELBO())
    svi.step(DATA, **first)
    svi.step(DATA, **second)
    before = len(counted.calls)
    svi.step(DATA, **first)
    svi.step(DATA, **second)
    assert len(counted.calls) == before


@pytest.mark.slow
def test_ints_are_static_so_that_plates_can_have_their_size():
    svi = SVI(annealed, annealed_guide, adam(), Trace_ELBO())
    for size in (3, np.int64(2)):
        svi.step(DATA[:size], size=size)


@pytest.mark.slow
def test_data_of_numpy_is_read_at_the_call():
    svi, other = (SVI(model, guide, adam(), Trace_ELBO()) for _ in range(2))
    data = np.array([1.0, 2.5, 3.0])
    for _ in range(3):
        assert svi.step(data) == other.step(jnp.asarray(data))


@pytest.mark.parametrize(
    ("args", "kwargs", "name"),
    [
        ((DATA, {1, 2}), {}, "number 2"),
        ((DATA,), {"names": {1}}, "'names'"),
        ((DATA,), {"options": {"sets": [{1}]}}, r"'options'\['sets'\]\[0\]"),
        ((np.array(["a"]),), {}, "number 1"),
        ((pytest.importorskip("torch").ones(3),), {}, "number 1 is a torch.Tensor"),
    ],
)
def test_arguments_that_are_neither_arrays_nor_hashable(args, kwargs, name):
    svi = SVI(model, guide, adam(), Trace_ELBO())
    with pytest.raises(TypeError, match=f"argument {name}"):
        svi.step(*args, **kwargs)


@pytest.mark.slow
def test_a_count_as_static_argument_is_warned_of():
    def guide(data, step):
        numpyro.sample("mean", dist.Normal(numpyro.param("loc", 0.5), 1.0))

    def loss(model, guide, data, step):
        return handlers.trace(guide).get_trace(data, step)["loc"]["value"]

    svi = SVI(nothing, guide, adam(), loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(15):
            svi.evaluate_loss(DATA, step)
    with pytest.warns(UserWarning, match="argument number 2 had 16 values"):
        svi.evaluate_loss(DATA, 15)


# Parameters that appear later.


def late(data, stage):
    loc = numpyro.param("loc", 0.5)
    if stage > 0:
        loc = loc + numpyro.param("late", lambda key: jax.random.normal(key, (2,))).sum()
    scale = numpyro.param("scale", 2.0, constraint=constraints.positive) if stage > 1 else 1.0
    numpyro.sample("mean", dist.Normal(loc, scale))


@pytest.mark.slow
@pytest.mark.parametrize("name", each(["pyro", "rule", "optax"]))
def test_parameters_are_created_when_they_are_reached(name):
    svi = SVI(lambda data, stage: model(data), late, OPTIMIZERS[name](), Trace_ELBO())
    svi.step(DATA, 0)
    assert sorted(svi.params) == ["loc"]
    loc = svi.params["loc"]
    svi.step(DATA, 1)
    assert sorted(svi.params) == ["late", "loc"]
    assert svi.params["loc"] is loc
    svi.step(DATA, 2)
    assert sorted(svi.get_params()) == ["late", "loc", "scale"]
    np.testing.assert_allclose(svi.get_params()["scale"], 2.0, rtol=0.1)
    assert svi.get_params()["scale"] != 2.0
    before = {name: param.value for name, param in svi.params.items()}
    svi.step(DATA, 0)
    # A step updates what it reaches.
    assert [name for name, x in before.items() if (x == svi.params[name].value).all()] == ["late", "scale"]


@pytest.mark.slow
def test_other_shapes_may_reach_other_parameters():
    def guide(data):
        scale = numpyro.param("scale", jnp.array(2.0), constraint=constraints.positive) if len(data) > 2 else 1.0
        numpyro.sample("mean", dist.Normal(numpyro.param("loc", 0.5), scale))

    svi = SVI(model, guide, adam(), Trace_ELBO())
    svi.step(DATA[:2])
    svi.step(DATA)
    assert sorted(svi.params) == ["loc", "scale"]
    assert svi.params["scale"].value != jnp.log(2.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", each(["written", "normal"]))
def test_a_smaller_batch_goes_on_with_numpyros_keys(name):
    model, make, elbo, data = CASES[name]
    parent, ours = Parent(model, make(), to_numpyro(adam()), elbo), SVI(model, make(), adam(), elbo, key=KEY)
    state = parent.init(KEY, data)
    for size in (3, 2, 3, 1):
        state, expected = parent.update(state, data[:size])
        np.testing.assert_allclose(ours.step(data[:size]), expected, rtol=1e-5)
    same(ours.get_params(), parent.get_params(state))


@pytest.mark.slow
def test_an_automatic_guide_may_begin_late():
    auto = autoguide.AutoNormal(learned)

    def guide(data, automatic):
        if automatic:
            return auto(data)
        numpyro.sample("mean", dist.Normal(numpyro.param("loc", jnp.zeros(2)), 1.0).to_event(1))

    svi = SVI(lambda data, automatic: learned(data), guide, adam(), Trace_ELBO())
    for automatic in (False, True, True, False):
        svi.step(DATA, automatic)
    assert sorted(svi.get_params()) == ["loc", "mean_auto_loc", "mean_auto_scale", "noise"]
    svi.step(DATA[:2], True)


def test_evaluation_creates_parameters_and_changes_none():
    svi = SVI(model, guide, adam(), Trace_ELBO(), key=KEY)
    loss = svi.evaluate_loss(DATA)
    before = frozen(svi)
    assert svi.evaluate_loss(DATA) == loss
    assert frozen(svi) == before
    np.testing.assert_allclose(svi.step(DATA), loss, rtol=1e-6)
    assert svi.evaluate_loss(DATA) != loss


@pytest.mark.slow
def test_nothing_to_optimise():
    def guide(data):
        numpyro.sample("mean", dist.Normal(0.5, 1.0))

    svi = SVI(model, guide, adam(), Trace_ELBO(), key=KEY)
    parent = Parent(model, guide, to_numpyro(adam()), Trace_ELBO())
    result = parent.run(KEY, 3, DATA, progress_bar=False)
    np.testing.assert_allclose(svi.run(3, DATA, progress_bar=False), result.losses, rtol=1e-6)
    assert svi.get_params() == {}


# Mutable state.


def normalised(x, y):
    net = flax_module("net", Normalised(), input_shape=(1, 2), mutable=["batch_stats"])
    with numpyro.plate("n", x.shape[0]):
        numpyro.sample("y", dist.Normal(net(x), 0.1), obs=y)


def nothing(*args):
    pass


@pytest.mark.slow
def test_mutable_state_is_numpyros():
    # The gradient of a bias before a normalisation is rounding noise, which Adam would take for a direction.
    sgd = jaxoptim.sgd(lr=1e-4)
    svi, parent = (
        SVI(normalised, nothing, sgd, Trace_ELBO(), key=KEY),
        Parent(normalised, nothing, to_numpyro(sgd), Trace_ELBO()),
    )
    state, update = parent.init(KEY, X, X[:, 0]), jax.jit(parent.update)
    svi.evaluate_loss(X, X[:, 0])
    same(svi.mutable_state, state.mutable_state)
    for _ in range(3):
        state, expected = update(state, X, X[:, 0])
        np.testing.assert_allclose(svi.step(X, X[:, 0]), expected, rtol=1e-5)
        same(svi.mutable_state, state.mutable_state)
    before = jax.device_get(svi.mutable_state)
    svi.evaluate_loss(X, X[:, 0])
    same(svi.mutable_state, before, rtol=0)
    svi.step(X[:4], X[:4, 0])  # a smaller batch goes on with it
    assert not np.allclose(jax.tree.leaves(svi.mutable_state)[0], jax.tree.leaves(before)[0])


@pytest.mark.slow
def test_the_plain_loss_takes_mutable_state():
    params, _, loss_fn = differentiable_loss(normalised, nothing, Trace_ELBO(), KEY, X, X[:, 0])
    with pytest.raises(ValueError, match="with_mutable_state"):
        loss_fn(params, KEY, X, X[:, 0])
    step = jax.jit(jax.value_and_grad(loss_fn.with_mutable_state, has_aux=True))
    (loss, mutable), grads = step(params, loss_fn.mutable_state, KEY, X, X[:, 0])
    assert jnp.isfinite(loss)
    assert grads.keys() == params.keys()
    chex.assert_trees_all_equal_structs(mutable, loss_fn.mutable_state)


def test_a_function_as_loss_has_no_mutable_state():
    with pytest.raises(ValueError, match="loss_with_mutable_state"):
        SVI(normalised, nothing, adam(), scaled_elbo).step(X, X[:, 0])


# What goes wrong.


@pytest.mark.slow
def test_a_step_without_finite_loss_changes_nothing_but_the_key():
    svi = SVI(model, guide, adam(), Trace_ELBO(), skip_nonfinite=True)
    svi.step(DATA)
    key, before = frozen(svi)
    assert not np.isfinite(svi.step(DATA.at[0].set(jnp.nan)))
    assert frozen(svi)[1] == before
    assert frozen(svi)[0] != key
    assert np.isfinite(svi.step(DATA))
    plain = SVI(model, guide, adam(), Trace_ELBO())
    plain.step(DATA.at[0].set(jnp.nan))
    assert np.isnan(plain.params["loc"].value)


@pytest.mark.slow
def test_a_skipped_step_keeps_the_mutable_state():
    svi = SVI(normalised, nothing, adam(), Trace_ELBO(), skip_nonfinite=True)
    svi.step(X, X[:, 0])
    before = jax.device_get(svi.mutable_state)
    svi.step(X.at[0].set(jnp.nan), X[:, 0])
    same(svi.mutable_state, before, rtol=0)
    svi.step(X, X[:, 0])
    assert not np.allclose(jax.tree.leaves(svi.mutable_state)[0], jax.tree.leaves(before)[0])


def test_a_failed_step_changes_nothing():
    def fails(data, how="", extra=False):
        if extra:
            numpyro.param("extra", 1.0)
        if how == "raise":
            raise RuntimeError("the model is wrong")
        model(data)
        if how == "late":
            raise RuntimeError("the model is wrong")

    def guide_of(data, **kwargs):
        guide(data)

    svi, other = (SVI(fails, guide_of, adam(), Trace_ELBO(), key=KEY) for _ in range(2))
    with pytest.raises(RuntimeError, match="the model is wrong"):
        svi.step(DATA, how="raise")
    assert svi.params == {}
    svi.step(DATA)
    before = frozen(svi)
    for kwargs in ({"how": "raise"}, {"how": "late", "extra": True}):
        with pytest.raises(RuntimeError, match="the model is wrong"):
            svi.step(DATA, **kwargs)
        with pytest.raises(RuntimeError, match="the model is wrong"):
            svi.evaluate_loss(DATA, **kwargs)
    with pytest.raises(TypeError):
        svi.step()
    assert frozen(svi) == before
    other.step(DATA)
    assert [svi.step(DATA) for _ in range(3)] == [other.step(DATA) for _ in range(3)]


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"Trace_ELBO\(\)"):
        SVI(model, guide, adam(), Trace_ELBO)
    with pytest.raises(TypeError, match="an ELBO of numpyro"):
        SVI(model, guide, adam(), 3.0)
    with pytest.raises(TypeError):
        SVI(model, guide, 3.0, Trace_ELBO())
    with pytest.raises(TypeError, match="guide"):
        SVI(model, None, adam(), Trace_ELBO())
    for key in (0, jnp.ones(2), jax.random.split(KEY)):
        with pytest.raises(TypeError, match="JAX key"):
            SVI(model, guide, adam(), Trace_ELBO(), key=key)
    with pytest.raises(ValueError, match="before model and guide have run"):
        SVI(model, guide, adam(), Trace_ELBO()).get_params()
    with pytest.raises(TypeError, match="sum_sites=True"):
        SVI(model, guide, adam(), Trace_ELBO(sum_sites=False)).step(DATA)
    with pytest.raises(TypeError, match=r"'count' has dtype int32"):
        differentiable_loss(lambda: numpyro.param("count", 1), nothing, Trace_ELBO(), KEY)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (DATA, r"an array of shape \(3,\) and dtype float32"),
        (DATA[:1], r"an array of shape \(1,\)"),
        (3, r"an array of shape \(\) and dtype int32"),
        (1j, r"an array of shape \(\) and dtype complex64"),
        (None, "a NoneType"),
        ((jnp.array(1.0), 2.0), "a tuple"),
    ],
    ids=["vector", "one number", "int", "complex", "None", "tuple"],
)
@pytest.mark.parametrize("method", ["step", "evaluate_loss"])
def test_a_loss_that_is_no_scalar(returned, words, method):
    def wrong(model, guide, data):
        return returned

    svi = SVI(model, guide, adam(), wrong)
    with pytest.raises(TypeError, match=f"wrong returned {words}.* A loss is a real scalar: sum it"):
        getattr(svi, method)(DATA)
    assert svi.params == {}


@pytest.mark.slow
@pytest.mark.parametrize("start", [jnp.float16(1.0), jnp.ones(2, jnp.bfloat16)], ids=["0-d float16", "bfloat16"])
def test_parameters_keep_a_half_precision(start):
    def parabola():
        numpyro.factor("f", -jnp.sum((numpyro.param("x", start, constraint=constraints.positive) - 1.5) ** 2))

    svi = SVI(parabola, nothing, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
    losses = svi.run(40, progress_bar=False)
    assert svi.params["x"].dtype == svi.get_params()["x"].dtype == losses.dtype == start.dtype
    chex.assert_shape(svi.get_params()["x"], start.shape)
    np.testing.assert_allclose(np.float32(svi.get_params()["x"]), 1.5, rtol=2 * jnp.finfo(start.dtype).eps)


def test_rows_of_a_scalar():
    def parabola():
        numpyro.factor("f", -((numpyro.param("x", 1.0) - 1.5) ** 2))

    for optimizer in (rules.SparseAdam(), pyro.optim.SparseAdam({})):
        with pytest.raises(ValueError, match=r"'x' has shape \(\), which has none"):
            SVI(parabola, nothing, optimizer, Trace_ELBO()).step()


def test_parameters_of_the_plain_loss_are_checked():
    params, constrain, loss_fn = differentiable_loss(model, guide, Trace_ELBO(), KEY, DATA)
    with pytest.raises(KeyError, match="lacks 'loc'"):
        loss_fn({"scale": params["scale"]}, KEY, DATA)
    with pytest.raises(KeyError, match="has 'other'"):
        constrain(params | {"other": 1.0})


def test_model_arguments_may_have_any_name():
    def model(key, params, rate):
        numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.0), rate), obs=key + params)

    svi = SVI(model, lambda **kwargs: None, rules.SGD(lr=0.1), Trace_ELBO())
    svi.step(key=1.0, params=2.0, rate=1.0)
    np.testing.assert_allclose(svi.get_params()["loc"], 0.3, rtol=1e-6)


def test_initial_values_stay_the_users():
    start = jnp.array([1.0, 2.0])

    def model():
        numpyro.factor("f", -(numpyro.param("x", start) ** 2).sum())

    svi = SVI(model, nothing, rules.SGD(lr=0.1), Trace_ELBO())
    svi.run(3, progress_bar=False)
    params, _, _ = differentiable_loss(model, nothing, Trace_ELBO(), KEY)
    params["x"].delete()  # as a donated array is
    np.testing.assert_array_equal(start, [1.0, 2.0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", [rules.LBFGS(line_search_fn="strong_wolfe"), rules.Newton(), pyro.optim.multi.Newton()]
)
def test_second_order_optimizers(optimizer):
    def delta(data):
        numpyro.sample("mean", dist.Delta(numpyro.param("loc", 0.1)))

    svi = SVI(model, delta, optimizer, Trace_ELBO())
    svi.run(2, DATA, progress_bar=False)
    np.testing.assert_allclose(svi.get_params()["loc"], DATA.sum() / 4, rtol=1e-5)
