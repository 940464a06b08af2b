"""Draws of models within a function as loss: as many as its author means, and new ones at each step."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import Trace_ELBO, autoguide, init_to_value
from numpyro.infer.util import log_density

from jaxoptim import rules
from jaxoptim.pyro.infer import SVI, differentiable_loss

KEY = jax.random.key(7)
DATA = jnp.array([1.0, 2.5, 3.0])
KEYS = jax.random.split(jax.random.key(0), 1000)
LOC, VARIANCE = DATA.sum() / 4, 1 / 4
EVIDENCE = dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3) + 1).log_prob(DATA)


def model(data):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", data.shape[0]):
        numpyro.sample("data", dist.Normal(mean, 1.0), obs=data)


def guide(data):
    numpyro.sample("mean", dist.Normal(numpyro.param("loc", 0.5), 1.0))


def posterior(data):
    numpyro.sample("mean", dist.Normal(LOC, VARIANCE**0.5))


def drawn(guide, data, name="mean"):
    return handlers.trace(guide).get_trace(data)[name]["value"]


def compiled(loss, guide=guide):
    params, _, loss_fn = differentiable_loss(model, guide, loss, KEY, DATA)
    return jax.jit(lambda key: loss_fn(params, key, DATA))


@pytest.mark.slow
@pytest.mark.parametrize("particles", [1, 16])
def test_particles_within_a_function_are_as_many(particles):
    elbo = Trace_ELBO(num_particles=particles)

    def regularised(model, guide, data):
        return elbo.loss(jax.random.key(0), {}, model, guide, data) + 3.0

    found, expected = (jax.vmap(compiled(loss))(KEYS) for loss in (regularised, elbo))
    np.testing.assert_allclose(jnp.std(found), jnp.std(expected), rtol=0.1)
    np.testing.assert_allclose(jnp.mean(found) - 3.0, jnp.mean(expected), atol=5 * jnp.std(expected) / len(KEYS) ** 0.5)


def by_seed(guide, data):
    return lambda key: drawn(handlers.seed(guide, key), data)


def in_context(model, guide, data):
    with handlers.seed(rng_seed=0):
        return jnp.stack([drawn(guide, data) for _ in range(200)])


DRAWS = {
    "loop over seeds": lambda m, g, x: jnp.stack([by_seed(g, x)(seed) for seed in range(200)]),
    "vmap over seeds": lambda m, g, x: jax.vmap(by_seed(g, x))(KEYS),
    "nested vmap over seeds": lambda m, g, x: jax.vmap(jax.vmap(by_seed(g, x)))(KEYS.reshape(10, 100)),
    "scan over seeds": lambda m, g, x: jax.lax.scan(lambda c, key: (c, by_seed(g, x)(key)), 0, KEYS)[1],
    "map over vmap": lambda m, g, x: jax.lax.map(jax.vmap(by_seed(g, x)), KEYS.reshape(10, 100)),
    "loop without seeds": lambda m, g, x: jnp.stack([drawn(g, x) for _ in range(200)]),
    "two models without seeds": lambda m, g, x: (
        jnp.stack([drawn(f, x) for f in (m, g) * 100]) - jnp.array([0, 0.5] * 100)
    ),
    "a seed around a loop": in_context,
}


@pytest.mark.slow
@pytest.mark.parametrize("draws", DRAWS)
def test_draws_of_a_loss_are_independent(draws):
    values = []

    def loss(model, guide, data):
        values.append(DRAWS[draws](model, guide, data).ravel())
        return 0.0 * values[-1].sum()

    params, _, loss_fn = differentiable_loss(model, guide, loss, KEY, DATA)
    for key in jax.random.split(KEY):
        loss_fn(params, key, DATA)
    first, second = values
    np.testing.assert_allclose(jnp.var(first), 1.0, atol=5 * (2 / len(first)) ** 0.5)
    np.testing.assert_allclose(jnp.corrcoef(first, second)[0, 1], 0.0, atol=5 / len(first) ** 0.5)
    np.testing.assert_allclose(jnp.corrcoef(first[1:], first[:-1])[0, 1], 0.0, atol=5 / len(first) ** 0.5)


def test_equal_seeds_give_equal_draws_within_a_step():
    def loss(model, guide, data):
        first, second = (by_seed(guide, data)(3) for _ in range(2))
        return first - second

    assert compiled(loss)(KEY) == 0.0


def test_each_step_draws_anew_from_a_constant_seed():
    svi = SVI(model, guide, rules.SGD(lr=0.0), lambda model, guide, data: by_seed(guide, data)(0))
    first, second = svi.evaluate_loss(DATA), svi.step(DATA)
    np.testing.assert_allclose(first, second, rtol=1e-6)
    assert svi.step(DATA) != second


@pytest.mark.slow
def test_weights_of_a_replayed_model_need_no_seed():
    """At the posterior each weight is the evidence, whatever is drawn."""

    def importance_weighted(model, guide, data):
        def log_weight(key):
            log_q, trace = log_density(handlers.seed(guide, key), (data,), {}, {})
            log_p, _ = log_density(handlers.replay(model, trace), (data,), {}, {})
            return log_p - log_q

        return -jax.nn.logsumexp(jax.vmap(log_weight)(KEYS[:5])) + jnp.log(5.0)

    np.testing.assert_allclose(compiled(importance_weighted, posterior)(KEY), -EVIDENCE, rtol=1e-6)


@pytest.mark.parametrize(
    "draws",
    [
        lambda g, x: jax.vmap(lambda _: drawn(g, x))(KEYS),
        lambda g, x: jax.lax.scan(lambda c, _: (c, drawn(g, x)), 0, length=5)[1],
        lambda g, x: jax.vmap(lambda _: drawn(handlers.block(g, hide=["mean"]), x, "loc"))(KEYS),
    ],
    ids=["vmap", "scan", "block"],
)
def test_one_draw_for_many_evaluations_is_refused(draws):
    with pytest.raises(ValueError, match=r"of the guide would be one draw .*numpyro.handlers.seed\(guide, key\)"):
        differentiable_loss(model, guide, lambda m, g, x: jnp.sum(draws(g, x)), KEY, DATA)[2](
            {"loc": jnp.array(0.5)}, KEY, DATA
        )


@pytest.mark.slow
def test_a_seed_around_the_step_is_not_one_of_the_losss():
    """It would be there when the program is compiled, and never again."""
    first, second = (SVI(model, guide, rules.SGD(lr=0.0), lambda m, g, x: drawn(g, x), key=KEY) for _ in range(2))
    with handlers.seed(rng_seed=0):
        seeded = [first.step(DATA) for _ in range(3)]
    chex.assert_trees_all_equal(seeded, [second.step(DATA) for _ in range(3)])


@pytest.mark.slow
def test_subsamples_of_a_plate_are_the_seeds():
    def subsampled(data):
        with numpyro.plate("n", 100, subsample_size=10) as rows:
            numpyro.deterministic("rows", rows)

    def loss(model, guide, data):
        rows = jax.vmap(lambda key: drawn(handlers.seed(guide, key), data, "rows"))(KEYS[:20])
        return 0.0 + len(np.unique(rows))

    params, _, loss_fn = differentiable_loss(model, subsampled, loss, KEY, DATA)
    assert loss_fn(params, KEY, DATA) > 60


NAMES = ["self", "rng_key", "init_params", "model", "guide", "param_map"]


@pytest.mark.slow
@pytest.mark.parametrize("elbo", [Trace_ELBO(), lambda model, guide, **kwargs: drawn_of(model, guide, **kwargs)])
def test_arguments_of_a_model_have_any_name(elbo):
    def summed(**kwargs):
        numpyro.factor("sum", -sum(kwargs.values()) * numpyro.param("loc", 1.0))

    svi = SVI(summed, lambda **kwargs: None, rules.SGD(lr=0.1), elbo)
    arguments = {name: 10.0**power for power, name in enumerate([*NAMES, "data"])}
    assert svi.evaluate_loss(**arguments) == 1111111.0
    assert svi.step(**arguments) == 1111111.0


def of_self(self):
    numpyro.sample("data", dist.Normal(numpyro.sample("mean", dist.Normal(0.0, 1.0)), 1.0), obs=self)


def guide_of_self(self):
    numpyro.sample("mean", dist.Delta(numpyro.param("loc", 0.5)))


@pytest.mark.parametrize(
    ("model", "guide", "name"),
    [
        pytest.param(of_self, autoguide.AutoNormal(of_self), "AutoNormal", id="guide"),
        pytest.param(handlers.scale(of_self, 2.0), guide_of_self, "scale", id="model"),
    ],
)
def test_an_argument_called_self_to_an_object_of_numpyro(model, guide, name):
    """Which has a self of its own."""
    message = f"^{name} cannot take the argument 'self' by keyword, .* Give it by position, or rename it"
    with pytest.raises(TypeError, match=message):
        SVI(model, guide, rules.SGD(lr=0.1), Trace_ELBO()).step(self=2.0)
    with pytest.raises(TypeError, match=message):
        differentiable_loss(model, guide, Trace_ELBO(), KEY, self=2.0)


AT_HALF = autoguide.AutoDelta(of_self, init_loc_fn=init_to_value(values={"mean": 0.5}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guide", "args", "kwargs"),
    [
        pytest.param(guide_of_self, (), {"self": 2.0}, id="keyword"),
        pytest.param(guide_of_self, (2.0,), {}, id="position"),
        pytest.param(AT_HALF, (2.0,), {}, id="automatic"),
    ],
)
def test_an_argument_called_self(guide, args, kwargs):
    svi = SVI(of_self, guide, rules.SGD(lr=0.1), Trace_ELBO())
    assert svi.step(*args, **kwargs) == pytest.approx((0.5**2 + 1.5**2) / 2 + math.log(2 * math.pi), rel=1e-6)
    (value,) = svi.get_params().values()
    assert float(value) == pytest.approx(0.5 - 0.1 * (0.5 - 1.5), rel=1e-6)


def drawn_of(model, guide, **kwargs):
    """The loss, of which some of the arguments are for the model alone."""
    assert "data" in kwargs
    return -handlers.trace(model).get_trace(**kwargs)["sum"]["fn"].log_factor


def test_an_elbo_of_ones_own_sees_the_other_arguments():
    class Tempered(Trace_ELBO):
        def loss(self, key, values, model, guide, *args, beta):
            return beta * super().loss(key, values, model, guide, *args, beta=beta)

    def tempered(data, beta, key, rng_key):
        numpyro.factor("all", -numpyro.param("loc", 1.0) * (beta + key + rng_key))

    svi = SVI(tempered, lambda *args, **kwargs: None, rules.SGD(lr=0.1), Tempered())
    assert svi.evaluate_loss(DATA, beta=2.0, key=3.0, rng_key=4.0) == 18.0
