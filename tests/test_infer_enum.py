"""Discrete sites that are summed out: numpyro's TraceEnum_ELBO, which needs funsor."""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import logsumexp
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import SVI as Parent
from numpyro.infer import TraceEnum_ELBO
from numpyro.infer.autoguide import AutoNormal

import jaxoptim
from jaxoptim.interop.numpyro import to_numpyro
from jaxoptim.pyro import optim
from jaxoptim.pyro.infer import SVI, differentiable_loss

KEY = jax.random.key(3)
DATA = np.array([-2.1, -1.8, 1.9, 2.2, 2.4])
SCALE = 0.7


class OwnELBO(TraceEnum_ELBO):
    pass


def observed(locs, data):
    """Observations of a mixture of two normal distributions."""
    weight = numpyro.param("weight", 0.4, constraint=constraints.unit_interval)
    with numpyro.plate("n", len(data)):
        component = numpyro.sample("component", dist.Categorical(jnp.stack([weight, 1 - weight])))
        numpyro.sample("data", dist.Normal(locs[component], SCALE), obs=data)


def model(data):
    observed(numpyro.sample("locs", dist.Normal(jnp.array([-1.0, 1.0]), 3.0).to_event(1)), data)


def guide(data):
    loc = numpyro.param("loc", jnp.array([-1.0, 1.5]))
    numpyro.sample("locs", dist.Normal(loc, 0.3).to_event(1))


def point_model(data):
    observed(numpyro.param("locs", jnp.array([-1.0, 1.5])), data)


def nothing(data):
    pass


@pytest.fixture
def enumerated(x64):
    """Marks the discrete sites of a model as those to sum out."""
    pytest.importorskip("funsor")
    from numpyro.contrib.funsor import config_enumerate

    return config_enumerate


def automatic(mixture):
    return AutoNormal(handlers.block(mixture, hide=["component"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "particles"),
    [
        pytest.param(lambda mixture: guide, 1, id="written"),
        pytest.param(lambda mixture: guide, 3, id="particles"),
        pytest.param(automatic, 1, id="automatic"),
    ],
)
def test_losses_and_parameters_are_numpyros(make, particles, enumerated):
    mixture, adam = enumerated(model), jaxoptim.adam(lr=0.05)
    parent = Parent(mixture, make(mixture), to_numpyro(adam), TraceEnum_ELBO(particles))
    ours = SVI(mixture, make(mixture), adam, TraceEnum_ELBO(particles), key=KEY)
    state, update = parent.init(KEY, DATA), jax.jit(parent.update)
    for _ in range(4):
        state, expected = update(state, DATA)
        np.testing.assert_allclose(ours.step(DATA), expected, rtol=1e-12)
        chex.assert_trees_all_close(ours.get_params(), parent.get_params(state), rtol=1e-10)
    np.testing.assert_allclose(ours.evaluate_loss(DATA), parent.evaluate(state, DATA), rtol=1e-12)
    np.testing.assert_array_equal(jax.random.key_data(ours.key), jax.random.key_data(state.rng_key))


def marginal(weight, locs):
    """The negative logarithm of the density of the data, summed over components by hand."""
    weights = jnp.stack([weight, 1 - weight])
    each = jnp.log(weights) + dist.Normal(locs, SCALE).log_prob(DATA[:, None])
    return -logsumexp(each, axis=-1).sum()


@pytest.mark.slow
def test_the_loss_is_the_marginal_density(enumerated):
    mixture = enumerated(point_model)
    params, constrain, loss_fn = differentiable_loss(mixture, nothing, TraceEnum_ELBO(), KEY, DATA)
    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params, KEY, DATA)
    expected, slopes = jax.value_and_grad(lambda params: marginal(**constrain(params)))(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    chex.assert_trees_all_close(grads, slopes, rtol=1e-10)


def test_the_mixture_is_found(enumerated):
    svi = SVI(enumerated(point_model), nothing, optim.Adam({"lr": 0.1}), TraceEnum_ELBO())
    svi.run(150, DATA, progress_bar=False)
    found = svi.get_params()
    np.testing.assert_allclose(found["locs"], [DATA[:2].mean(), DATA[2:].mean()], atol=0.02)
    np.testing.assert_allclose(found["weight"], 0.4, atol=0.01)


@pytest.mark.parametrize("elbo", [TraceEnum_ELBO, OwnELBO], ids=["numpyro", "subclass"])
@pytest.mark.parametrize(
    "take",
    [
        lambda elbo: SVI(model, guide, optim.Adam({}), elbo),
        lambda elbo: differentiable_loss(model, guide, elbo, KEY, DATA),
    ],
    ids=["SVI", "differentiable_loss"],
)
def test_without_funsor(take, elbo, monkeypatch):
    monkeypatch.setitem(sys.modules, "funsor", None)
    with pytest.raises(ImportError) as error:
        take(elbo())
    assert str(error.value) == (
        "numpyro.infer.TraceEnum_ELBO sums over discrete sites with the package funsor, which is not installed. Run: "
        "pip install funsor, or pip install 'jaxoptim[enum]'."
    )
