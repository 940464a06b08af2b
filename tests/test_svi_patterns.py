"""The patterns of Pyro's "Customizing SVI objectives and training loops", on models whose posterior is known."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import SVI as Parent
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO, autoguide

import jaxoptim
from jaxoptim import optim, pyro, rules
from jaxoptim.interop.numpyro import to_numpyro
from jaxoptim.pyro.infer import SVI, differentiable_loss
from jaxoptim.pyro.optim import multi

KEY = jax.random.key(7)
DATA = jnp.array([1.5, 2.5, 3.0, 4.0])
NOISE = 0.8
PRECISION = float(1 + len(DATA) / NOISE**2)
LOC = float(DATA.sum() / NOISE**2 / PRECISION)
SCALE = PRECISION**-0.5


def model(data):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", data.shape[0]):
        numpyro.sample("data", dist.Normal(mean, NOISE), obs=data)
    return mean


def guide(data):
    loc = numpyro.param("loc", 0.5)
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    numpyro.sample("mean", dist.Normal(loc, scale))


def weighted(data, factor=1.0):
    """The model with a factor on the prior, and so on the KL divergence when the guide has it too."""
    with handlers.scale(scale=factor):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", data.shape[0]):
        numpyro.sample("data", dist.Normal(mean, NOISE), obs=data)


def weighted_guide(data, factor=1.0):
    with handlers.scale(scale=factor):
        guide(data)


def decaying(steps, lr=0.05, **clip):
    """Adam whose rate falls to a hundredth."""
    return pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / steps)}, clip or None)


def fitted(steps, model, guide, *args, elbo=None, **kwargs):
    svi = SVI(model, guide, decaying(steps), elbo or Trace_ELBO(num_particles=10), key=KEY)
    svi.run(steps, *args, progress_bar=False, **kwargs)
    return svi.get_params()


def near(found, atol=0.01, **expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=atol, err_msg=name)


def loop(steps, loss_fn, params, optimizer, key, *args, seen=None):
    """The low-level loop: one call for loss and gradient, one for the update."""
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    losses = []
    for _ in range(steps):
        key, step_key = jax.random.split(key)
        loss, grads = value_and_grad(params, step_key, *args)
        params = optimizer.update(params, grads)
        losses.append(float(loss))
        if seen is not None:
            seen.append({name: np.asarray(value) for name, value in params.items()})
    return params, losses


# Basic SVI.


@pytest.mark.slow
def test_a_mean_of_normal_data():
    svi = SVI(model, guide, decaying(600), Trace_ELBO(num_particles=10), key=KEY)
    losses = svi.run(600, DATA, progress_bar=False)
    near(svi.get_params(), loc=LOC, scale=SCALE)
    # At the posterior, and only there, every particle gives the evidence.
    covariance = NOISE**2 * jnp.eye(len(DATA)) + 1
    evidence = dist.MultivariateNormal(jnp.zeros(len(DATA)), covariance).log_prob(DATA)
    np.testing.assert_allclose(losses[-1], -evidence, atol=0.01)


@pytest.mark.slow
def test_a_rate_of_coins():
    def model(flips):
        rate = numpyro.sample("rate", dist.Beta(2.0, 2.0))
        with numpyro.plate("n", flips.shape[0]):
            numpyro.sample("flips", dist.Bernoulli(rate), obs=flips)

    def guide(flips):
        a, b = (numpyro.param(name, 4.0, constraint=constraints.positive) for name in ("a", "b"))
        numpyro.sample("rate", dist.Beta(a, b))

    found = fitted(1000, model, guide, jnp.array([1.0] * 7 + [0.0] * 3), elbo=TraceMeanField_ELBO(num_particles=10))
    near(found, a=9.0, b=5.0, atol=0.3)
    posterior, exact = dist.Beta(found["a"], found["b"]), dist.Beta(9.0, 5.0)
    np.testing.assert_allclose(posterior.mean, exact.mean, atol=0.005)
    np.testing.assert_allclose(posterior.variance**0.5, exact.variance**0.5, atol=0.005)


@pytest.mark.slow
def test_a_rate_of_events():
    def model(counts):
        rate = numpyro.sample("rate", dist.Gamma(3.0, 1.0))
        with numpyro.plate("n", counts.shape[0]):
            numpyro.sample("counts", dist.Poisson(rate), obs=counts)

    def guide(counts):
        shape = numpyro.param("shape", 5.0, constraint=constraints.positive)
        rate = numpyro.param("rate_of_rate", 3.0, constraint=constraints.positive)
        numpyro.sample("rate", dist.Gamma(shape, rate))

    found = fitted(3000, model, guide, jnp.array([4.0, 2.0, 6.0, 3.0]), elbo=TraceMeanField_ELBO(num_particles=20))
    posterior, exact = dist.Gamma(found["shape"], found["rate_of_rate"]), dist.Gamma(18.0, 5.0)
    np.testing.assert_allclose(posterior.mean, exact.mean, rtol=0.01)
    np.testing.assert_allclose(posterior.variance**0.5, exact.variance**0.5, rtol=0.03)


X = jnp.array([[1.0, 0.5], [1.0, -1.0], [1.0, 1.5], [1.0, 3.0]])
WEIGHT_PRECISION = np.asarray(X.T @ X / NOISE**2 + jnp.eye(2), np.float64)
WEIGHTS = np.linalg.solve(WEIGHT_PRECISION, np.asarray(X.T @ DATA / NOISE**2, np.float64))


def regression(x, y):
    weights = numpyro.sample("weights", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    with numpyro.plate("n", len(x)):
        numpyro.sample("y", dist.Normal(x @ weights, NOISE), obs=y)


@pytest.mark.slow
def test_regression_with_a_multivariate_guide():
    found = fitted(1500, regression, autoguide.AutoMultivariateNormal(regression), X, DATA)
    near(found, auto_loc=WEIGHTS, atol=0.02)
    covariance = found["auto_scale_tril"] @ found["auto_scale_tril"].T
    np.testing.assert_allclose(covariance, np.linalg.inv(WEIGHT_PRECISION), atol=0.01)


@pytest.mark.slow
def test_regression_with_a_guide_that_cannot_be_the_posterior():
    found = fitted(1500, regression, autoguide.AutoNormal(regression), X, DATA, elbo=TraceMeanField_ELBO(10))
    # The best of the independent normals has the posterior's mean, and its conditional scales.
    near(found, weights_auto_loc=WEIGHTS, weights_auto_scale=np.diag(WEIGHT_PRECISION) ** -0.5, atol=0.02)


# The loop of one's own.


def two(data):
    """A model whose parameters have several shapes and constraints."""
    mean = numpyro.sample("mean", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    noise = numpyro.sample("noise", dist.Gamma(2.0, 2.0))
    with numpyro.plate("n", data.shape[0]):
        numpyro.sample("data", dist.Normal(mean.sum(), noise), obs=data)


GUIDES = {
    "written": (model, lambda: guide),
    "normal": (two, lambda: autoguide.AutoNormal(two)),
    "multivariate": (two, lambda: autoguide.AutoMultivariateNormal(two)),
}
MAKERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.05}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99, "clip_norm": 2.0}),
    "clipped": lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 3.0, "clip_value": 1.0}),
    "SGD": lambda: pyro.optim.SGD({"lr": 0.005, "momentum": 0.9}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 0.01, "momentum": 0.9}),
}


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize(
    ("which", "maker", "seed"),
    [*(("written", maker, 5) for maker in MAKERS), *((guide, "Adam", 1) for guide in GUIDES)],
)
def test_the_low_level_loop_is_the_step_to_the_bit(which, maker, seed):
    model, make_guide = GUIDES[which]
    guide, make, key = make_guide(), MAKERS[maker], jax.random.key(seed)
    params, constrain, loss_fn = differentiable_loss(model, guide, Trace_ELBO(), key, DATA)
    svi, seen = SVI(model, guide, make(), Trace_ELBO(), key=key), []
    svi.evaluate_loss(DATA)
    params, losses = loop(60, loss_fn, params, make(), svi.key, DATA, seen=seen)
    for loss, values in zip(losses, seen, strict=True):
        assert svi.step(DATA) == loss
        for name, value in values.items():
            np.testing.assert_array_equal(svi.params[name].value, value)
    for name, value in svi.get_params().items():
        np.testing.assert_array_equal(constrain(params)[name], value)


@pytest.mark.slow
def test_the_low_level_loop_reaches_the_posterior_with_optax_too():
    params, constrain, loss_fn = differentiable_loss(model, guide, Trace_ELBO(num_particles=10), KEY, DATA)
    tx = jaxoptim.adam(lr=jaxoptim.schedules.exponential_lr(0.05, 0.01 ** (1 / 600)))

    @jax.jit
    def train(params):
        def body(carry, key):
            params, state = carry
            grads = jax.grad(loss_fn)(params, key, DATA)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), jax.random.split(KEY, 600))[0][0]

    near(constrain(train(params)), loc=LOC, scale=SCALE)


# A regularizer.


@pytest.mark.slow
def test_a_regularizer_of_unconstrained_values_shifts_the_optimum():
    # Up to a constant the loss is PRECISION / 2 ((loc - LOC)^2 + scale^2) - log(scale), and the scale is exp(u).
    params, constrain, loss_fn = differentiable_loss(model, guide, Trace_ELBO(num_particles=10), KEY, DATA)
    weight = 4.0

    def regularized(params, key, data):
        return loss_fn(params, key, data) + 0.5 * weight * sum(jnp.sum(u**2) for u in params.values())

    params, _ = loop(600, regularized, params, decaying(600), KEY, DATA)
    found = constrain(params)
    near(found, loc=PRECISION * LOC / (PRECISION + weight))
    np.testing.assert_allclose(found["scale"], jnp.exp(params["scale"]), rtol=1e-6)
    u = np.linspace(-5.0, 5.0, 1_000_001)
    near(found, scale=np.exp(u[np.argmin(PRECISION / 2 * np.exp(2 * u) - u + weight / 2 * u**2)]))


def test_a_regularizer_of_constrained_values_has_another_optimum():
    params, constrain, loss_fn = differentiable_loss(model, guide, Trace_ELBO(num_particles=10), KEY, DATA)
    weight = 4.0

    def regularized(params, key, data):
        return loss_fn(params, key, data) + 0.5 * weight * sum(jnp.sum(x**2) for x in constrain(params).values())

    params, _ = loop(600, regularized, params, decaying(600), KEY, DATA)
    near(constrain(params), loc=PRECISION * LOC / (PRECISION + weight), scale=(PRECISION + weight) ** -0.5)


# Clipped gradients.


def clipped_by_hand(grad, clip_norm=None, clip_value=None):
    grad = np.asarray(grad)
    if clip_norm is not None:
        grad = grad * np.float32(min(1.0, clip_norm / (np.linalg.norm(grad) + 1e-6)))
    return jnp.asarray(grad if clip_value is None else np.clip(grad, -clip_value, clip_value))


@pytest.mark.slow
@pytest.mark.parametrize(
    "clips",
    [
        pytest.param({"loc": {"clip_norm": 2.0}, "scale": {"clip_norm": 2.0}}, id="norm"),
        pytest.param({"loc": {"clip_value": 1.0}, "scale": {}}, id="by name"),
        pytest.param({"loc": {"clip_norm": 3.0, "clip_value": 1.0}, "scale": {"clip_norm": 0.5}}, id="both"),
    ],
)
def test_clipping_in_the_optimizer_is_clipping_by_hand(clips):
    same = clips["loc"] if clips["loc"] == clips["scale"] else None
    clip_args = same or (lambda module, name: clips[name])
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.02, "momentum": 0.5}, clip_args), Trace_ELBO(), key=KEY)
    params, _, loss_fn = differentiable_loss(model, guide, Trace_ELBO(), KEY, DATA)
    svi.evaluate_loss(DATA)
    key, by_hand, value_and_grad = svi.key, pyro.optim.SGD({"lr": 0.02, "momentum": 0.5}), jax.value_and_grad(loss_fn)
    value_and_grad, bound = jax.jit(value_and_grad), 0
    for _ in range(50):
        key, step_key = jax.random.split(key)
        loss, grads = value_and_grad(params, step_key, DATA)
        clipped = {name: clipped_by_hand(grad, **clips[name]) for name, grad in grads.items()}
        bound += any(clipped[name] != grads[name] for name in grads)
        params = by_hand.update(params, clipped)
        np.testing.assert_allclose(svi.step(DATA), loss, rtol=1e-5)
    assert 5 < bound < 50, "the bound takes part in some steps, and not in all"
    for name, value in params.items():
        np.testing.assert_allclose(svi.params[name].value, value, rtol=1e-5)


@pytest.mark.slow
def test_the_posterior_with_clipped_gradients():
    # Few particles: many gradients are beyond the bound, and those at the optimum are symmetric or rarely clipped.
    svi = SVI(model, guide, decaying(800, clip_norm=5.0), Trace_ELBO(num_particles=10), key=KEY)
    svi.run(800, DATA, progress_bar=False)
    near(svi.get_params(), loc=LOC, scale=SCALE, atol=0.02)


# A loss by the number of data.


@pytest.mark.slow
def test_a_scaled_loss_has_the_same_posterior():
    size = len(DATA)  # a power of two: gradients scale without rounding

    def make():
        return pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / 600), "eps": 1e-30, "clip_norm": 1e30})

    elbo = Trace_ELBO(num_particles=10)
    plain = SVI(model, guide, make(), elbo, key=KEY)
    scaled = SVI(handlers.scale(model, scale=1 / size), handlers.scale(guide, scale=1 / size), make(), elbo, key=KEY)
    params, constrain, loss_fn = differentiable_loss(model, guide, elbo, KEY, DATA)
    plain.evaluate_loss(DATA)
    params, by_hand = loop(
        600, lambda params, key, data: loss_fn(params, key, data) / size, params, make(), plain.key, DATA
    )
    losses = plain.run(600, DATA, progress_bar=False)
    # Adam does not see the factor.
    np.testing.assert_allclose(scaled.run(600, DATA, progress_bar=False), losses / size, rtol=1e-3)
    np.testing.assert_allclose(by_hand, losses / size, rtol=1e-3)
    for found in (plain.get_params(), scaled.get_params(), constrain(params)):
        near(found, loc=LOC, scale=SCALE)


# The KL divergence weighted by beta.


@pytest.mark.parametrize("elbo", [Trace_ELBO(10), pytest.param(TraceMeanField_ELBO(10), marks=pytest.mark.slow)])
def test_beta_weakens_the_data(elbo):
    svi = SVI(weighted, weighted_guide, decaying(800), elbo, key=KEY)
    svi.run(800, DATA, factor=4.0, progress_bar=False)
    precision = 1 + len(DATA) / NOISE**2 / 4
    near(svi.get_params(), loc=DATA.sum() / NOISE**2 / 4 / precision, scale=precision**-0.5)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_a_beta_vae_of_linear_networks(beta):
    noise, variance = 0.5, 3.0
    x = jnp.sqrt(variance) * jnp.array([-1.0, 1.0, -1.5, 1.5, 0.5, -0.5]) / jnp.sqrt(7 / 6)
    np.testing.assert_allclose(jnp.mean(x**2), variance, rtol=1e-6)

    def model(x, beta):
        weight = numpyro.param("decoder", 0.5)
        with numpyro.plate("n", len(x)):
            with handlers.scale(scale=beta):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(weight * z, noise), obs=x)

    def guide(x, beta):
        weight = numpyro.param("encoder", 0.5)
        scale = numpyro.param("scale", 0.5, constraint=constraints.positive)
        with numpyro.plate("n", len(x)), handlers.scale(scale=beta):
            numpyro.sample("z", dist.Normal(weight * x, scale))

    found = fitted(1500, model, guide, x, beta, elbo=TraceMeanField_ELBO(num_particles=20))
    # Beta acts like so many times the variance of the noise: what is left of the data's is the decoder's.
    square = variance - beta * noise**2
    near(
        found, decoder=square**0.5, encoder=square**0.5 / variance, scale=(beta * noise**2 / variance) ** 0.5, atol=0.02
    )


# Several optimizers.


def pair(data):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", data.shape[0]):
        numpyro.sample("of a", dist.Normal(a, NOISE), obs=data)
        numpyro.sample("of b", dist.Normal(b, NOISE), obs=-data)


def pair_guide(data):
    numpyro.sample("a", dist.Delta(numpyro.param("a_loc", 10.0)))
    scale = numpyro.param("b_scale", 1.0, constraint=constraints.positive)
    numpyro.sample("b", dist.Normal(numpyro.param("b_loc", 0.0), scale))


@pytest.mark.slow
def test_newton_for_one_parameter_and_adam_for_the_others():
    mixed = multi.MixedMultiOptimizer([(["a_loc"], multi.Newton()), (["b_loc", "b_scale"], decaying(600))])
    svi = SVI(pair, pair_guide, mixed, Trace_ELBO(num_particles=10), key=KEY)
    svi.step(DATA)
    near(svi.get_params(), a_loc=LOC, atol=1e-5)  # a quadratic takes one step
    svi.run(599, DATA, progress_bar=False)
    near(svi.get_params(), a_loc=LOC, atol=1e-5)
    near(svi.get_params(), b_loc=-LOC, b_scale=SCALE)


@pytest.mark.slow
def test_newton_and_adam_by_hand():
    params, constrain, loss_fn = differentiable_loss(pair, pair_guide, Trace_ELBO(num_particles=10), KEY, DATA)
    adam, newton, key = decaying(300, lr=0.1), multi.Newton(), KEY
    grad = jax.jit(jax.grad(loss_fn))

    @jax.jit
    def newton_step(a, params, key):
        return newton.get_step(lambda a: loss_fn(params | a, key, DATA), a)

    for _ in range(300):
        key, step_key = jax.random.split(key)
        grads = grad(params, step_key, DATA)
        others = {name: params[name] for name in ("b_loc", "b_scale")}
        moved = newton_step({"a_loc": params["a_loc"]}, params, step_key)
        params = moved | adam.update(others, {name: grads[name] for name in others})
    near(constrain(params), a_loc=LOC, atol=1e-5)
    near(constrain(params), b_loc=-LOC, b_scale=SCALE, atol=0.02)


@pytest.mark.slow
@pytest.mark.numbers
def test_two_optimizers_by_hand_are_the_mixed_one_to_the_bit():
    def make():
        return pyro.optim.SGD({"lr": 0.01}), pyro.optim.Adam({"lr": 0.05})

    sgd, adam = make()
    parts = [(["a_loc"], sgd), (["b_loc", "b_scale"], adam)]
    svi = SVI(pair, pair_guide, multi.MixedMultiOptimizer(parts), Trace_ELBO(), key=KEY)
    params, _, loss_fn = differentiable_loss(pair, pair_guide, Trace_ELBO(), KEY, DATA)
    svi.evaluate_loss(DATA)
    key, by_hand, value_and_grad = svi.key, make(), jax.jit(jax.value_and_grad(loss_fn))
    for _ in range(50):
        key, step_key = jax.random.split(key)
        loss, grads = value_and_grad(params, step_key, DATA)
        for (names, _), optimizer in zip(parts, by_hand, strict=True):
            params |= optimizer.update({n: params[n] for n in names}, {n: grads[n] for n in names})
        assert svi.step(DATA) == loss
        for name, value in params.items():
            np.testing.assert_array_equal(svi.params[name].value, value)


# An ELBO of one's own.


def simple_elbo(model, guide, *args, **kwargs):
    """One particle, weights of plates and handlers included."""
    guide_trace = handlers.trace(guide).get_trace(*args, **kwargs)
    model_trace = handlers.trace(handlers.replay(model, guide_trace)).get_trace(*args, **kwargs)
    elbo = 0.0
    for trace, sign in ((model_trace, 1.0), (guide_trace, -1.0)):
        for site in trace.values():
            if site["type"] == "sample":
                weight = 1.0 if site["scale"] is None else site["scale"]
                elbo += sign * jnp.sum(weight * site["fn"].log_prob(site["value"]))
    return -elbo


def averaged_elbo(model, guide, *args, **kwargs):
    return sum(simple_elbo(model, guide, *args, **kwargs) for _ in range(8)) / 8


@pytest.mark.slow
def test_an_elbo_of_ones_own():
    near(fitted(800, model, guide, DATA, elbo=averaged_elbo), loc=LOC, scale=SCALE)


@pytest.mark.slow
def test_an_elbo_of_ones_own_with_batches_of_data():
    many = jnp.concatenate([DATA + shift for shift in jnp.linspace(-0.5, 0.5, 8)])

    def model(data):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", data.shape[0], subsample_size=8):
            numpyro.sample("data", dist.Normal(mean, NOISE), obs=numpyro.subsample(data, 0))

    found = fitted(2000, model, guide, many, elbo=averaged_elbo)
    precision = 1 + len(many) / NOISE**2
    near(found, loc=many.sum() / NOISE**2 / precision, scale=precision**-0.5, atol=0.02)


# KL annealing.


def annealed(data, annealing_factor=1.0, latents_to_anneal=()):
    with handlers.scale(scale=annealing_factor if "mean" in latents_to_anneal else 1.0):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", data.shape[0]):
        numpyro.sample("data", dist.Normal(mean, NOISE), obs=data)


def annealed_guide(data, annealing_factor=1.0, latents_to_anneal=()):
    with handlers.scale(scale=annealing_factor if "mean" in latents_to_anneal else 1.0):
        guide(data)


def compiled_by(caplog, function):
    """The names of all programs that a call compiles."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        function()
    return re.findall(r"Compiling (\S+)", caplog.text)


@pytest.mark.slow
def test_annealing_compiles_once_and_ends_at_the_posterior(caplog):
    svi = SVI(annealed, annealed_guide, decaying(500), Trace_ELBO(num_particles=10), key=KEY)

    def step(factor):
        return svi.step(DATA, annealing_factor=float(factor), latents_to_anneal=("mean",))

    assert any("minimize" in name for name in compiled_by(caplog, lambda: [step(0.05), step(0.06)]))
    assert compiled_by(caplog, lambda: [step(factor) for factor in np.linspace(0.1, 1.0, 100)]) == []
    assert compiled_by(caplog, lambda: [step(1.0) for _ in range(400)]) == []
    near(svi.get_params(), loc=LOC, scale=SCALE, atol=0.02)


@pytest.mark.slow
def test_annealing_in_the_low_level_loop_compiles_once(caplog):
    params, constrain, loss_fn = differentiable_loss(
        weighted, weighted_guide, Trace_ELBO(num_particles=10), KEY, DATA, factor=0.1
    )
    value_and_grad, optimizer, keys = jax.jit(jax.value_and_grad(loss_fn)), decaying(500), jax.random.split(KEY, 500)

    def steps(factors, keys):
        nonlocal params
        for factor, key in zip(factors, keys, strict=True):
            params = optimizer.update(params, value_and_grad(params, key, DATA, factor=factor)[1])

    factors = [float(factor) for factor in np.minimum(np.linspace(0.01, 5.0, 500), 1.0)]
    keys = list(keys)
    steps(factors[:2], keys[:2])
    assert compiled_by(caplog, lambda: steps(factors[2:], keys[2:])) == []
    assert value_and_grad._cache_size() == 1
    near(constrain(params), loc=LOC, scale=SCALE, atol=0.02)


# Every kind of optimizer.


def exact_elbo(model, guide, data):
    """The ELBO of a normal guide without sampling: what it converges to has no noise."""
    q = handlers.trace(guide).get_trace(data)["mean"]["fn"]
    misfit = (data - q.loc) ** 2 + q.scale**2
    return dist.kl_divergence(q, dist.Normal(0.0, 1.0)) + 0.5 * jnp.sum(misfit) / NOISE**2


KINDS = {
    "Adadelta": ({"lr": 0.3, "eps": 1e-4}, 600),
    "Adagrad": ({"lr": 0.5}, 600),
    "AdagradRMSProp": ({"eta": 0.3}, 600),
    "Adam": ({"lr": 0.05}, 600),
    "Adamax": ({"lr": 0.1}, 600),
    "AdamW": ({"lr": 0.05, "weight_decay": 0.0}, 600),
    "ASGD": ({"lr": 0.02}, 600),
    "ClippedAdam": ({"lr": 0.05, "lrd": 0.995}, 600),
    "NAdam": ({"lr": 0.05}, 600),
    "RAdam": ({"lr": 0.05}, 600),
    "RMSprop": ({"lr": 0.002, "momentum": 0.9}, 800),
    "Rprop": ({"lr": 0.05}, 200),
    "SGD": ({"lr": 0.05}, 400),
}
OPTIMIZERS = {
    **{
        name: (functools.partial(getattr(pyro.optim, name), options), steps) for name, (options, steps) in KINDS.items()
    },
    "by name": (lambda: pyro.optim.Adam(lambda name: {"lr": {"loc": 0.05, "scale": 0.03}[name]}), 600),
    "rule": (lambda: rules.Adam(lr=0.05), 600),
    "rule of SGD": (lambda: rules.SGD(lr=0.05), 400),
    "transformation": (lambda: jaxoptim.adam(lr=0.05), 600),
    "optax": (lambda: optax.adam(0.05), 600),
    "LBFGS": (lambda: rules.LBFGS(line_search_fn="strong_wolfe"), 5),
    "transformation of LBFGS": (lambda: jaxoptim.lbfgs(line_search_fn="strong_wolfe"), 5),
    "Newton": (lambda: multi.Newton({"scale": 1.0}), 20),
    "rule of Newton": (lambda: rules.Newton({"scale": 1.0}), 20),
    "multi": (lambda: multi.PyroMultiOptimizer(pyro.optim.Adam({"lr": 0.05})), 600),
    "mixed": (lambda: multi.MixedMultiOptimizer([(["loc"], multi.Newton()), (["scale"], rules.SGD(lr=0.05))]), 400),
    "torch": (lambda: lambda params: optim.Adam(params, lr=0.05), 600),
}
QUICK = ["Adam", "rule", "LBFGS", "mixed", "torch"]


def each(skip=()):
    return [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in OPTIMIZERS if name not in skip
    ]


@pytest.mark.costly
@pytest.mark.parametrize("name", each())
def test_every_optimizer_reaches_the_posterior(name):
    make, steps = OPTIMIZERS[name]
    svi = SVI(model, guide, make(), exact_elbo, key=KEY)
    svi.run(steps, DATA, progress_bar=False)
    near(svi.get_params(), loc=LOC, scale=SCALE, atol=2e-3)


@pytest.mark.slow
def test_a_scheduler_of_pyros_steps_beside_the_loop():
    scheduler = pyro.optim.ExponentialLR({"optimizer": optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9})
    svi = SVI(model, guide, scheduler, Trace_ELBO(num_particles=10), key=KEY)
    for _ in range(50):
        svi.run(10, DATA, progress_bar=False)
        scheduler.step()
    near(svi.get_params(), loc=LOC, scale=SCALE)


class Exact(Trace_ELBO):
    """:func:`exact_elbo` for numpyro."""

    def loss(self, key, params, model, guide, data):
        return exact_elbo(model, handlers.seed(handlers.substitute(guide, data=params), key), data)


@pytest.mark.slow
@pytest.mark.parametrize("name", each(skip=["torch"]))
def test_every_optimizer_reaches_the_posterior_in_numpyro(name):
    make, steps = OPTIMIZERS[name]
    result = Parent(model, guide, to_numpyro(make()), Exact()).run(KEY, steps, DATA, progress_bar=False)
    near(result.params, loc=LOC, scale=SCALE, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", [rules.LBFGS(line_search_fn="strong_wolfe"), rules.Newton()], ids=["LBFGS", "Newton"]
)
def test_the_mode_of_a_regression(optimizer):
    guide = autoguide.AutoDelta(regression)
    svi = SVI(regression, guide, optimizer, Trace_ELBO(), key=KEY)
    svi.run(2, X, DATA, progress_bar=False)
    near(svi.get_params(), weights_auto_loc=WEIGHTS, atol=1e-4)
    parent = Parent(regression, autoguide.AutoDelta(regression), to_numpyro(optimizer), Trace_ELBO())
    near(parent.run(KEY, 2, X, DATA, progress_bar=False).params, weights_auto_loc=WEIGHTS, atol=1e-4)


# A model that breaks down now and then.


def broken(data):
    mean = model(data)
    fails = jax.random.bernoulli(numpyro.prng_key(), 0.01)
    numpyro.factor("breakdown", mean * jnp.where(fails, jnp.nan, 0.0))


@pytest.mark.slow
def test_a_posterior_in_spite_of_breakdowns():
    elbo = Trace_ELBO(num_particles=10)
    svi = SVI(broken, guide, decaying(600), elbo, key=KEY, skip_nonfinite=True)
    losses = svi.run(700, DATA, progress_bar=False)
    assert 20 < jnp.isnan(losses).sum() < 150
    near(svi.get_params(), loc=LOC, scale=SCALE)
    plain = SVI(broken, guide, decaying(600), elbo, key=KEY)
    plain.run(700, DATA, progress_bar=False)
    assert all(np.isnan(value) for value in plain.get_params().values())


@pytest.mark.slow
def test_a_posterior_in_spite_of_breakdowns_in_numpyro():
    parent = Parent(broken, guide, to_numpyro(decaying(600)), Trace_ELBO(num_particles=10))
    result = parent.run(KEY, 700, DATA, progress_bar=False, stable_update=True)
    assert jnp.isnan(result.losses).any()
    near(result.params, loc=LOC, scale=SCALE)
