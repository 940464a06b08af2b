"""Models that can be differentiated forward only."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI as Parent
from numpyro.infer import Trace_ELBO

import jaxoptim
from jaxoptim import pyro, rules
from jaxoptim.interop.numpyro import to_numpyro
from jaxoptim.pyro.infer import SVI

KEY = jax.random.key(7)
DATA = jnp.array([1.3, 1.4, 1.5])


def root(a):
    """The square root by Newton's method, until it stops changing."""

    def moves(pair):
        return jnp.abs(pair[0] - pair[1]) > 1e-6

    return jax.lax.while_loop(moves, lambda pair: ((pair[0] + a / pair[0]) / 2, pair[0]), (a, a + 1.0))[0]


def model(data, root=root):
    state = numpyro.primitives.mutable("state", {"calls": jnp.array(0.0)})
    a = numpyro.sample("a", dist.LogNormal(0.0, 1.0))
    state["calls"] = state["calls"] + 1
    with numpyro.plate("n", data.shape[0]):
        numpyro.sample("data", dist.Normal(root(a), 0.1), obs=data)


def guide(data, root=root):
    scale = numpyro.param("scale", 0.1, constraint=dist.constraints.positive)
    numpyro.sample("a", dist.LogNormal(numpyro.param("loc", 0.0), scale))


def fit(optimizer, **kwargs):
    return SVI(model, guide, optimizer, Trace_ELBO(), key=KEY, **kwargs)


@pytest.mark.slow
def test_losses_and_parameters_are_numpyros():
    adam = jaxoptim.adam(lr=0.05)
    parent = Parent(model, guide, to_numpyro(adam), Trace_ELBO())
    result = parent.run(KEY, 5, DATA, progress_bar=False, forward_mode_differentiation=True)
    svi = fit(adam, forward_mode_differentiation=True)
    np.testing.assert_allclose(svi.run(5, DATA, progress_bar=False), result.losses, rtol=2e-5)
    chex.assert_trees_all_close(svi.get_params(), result.params, rtol=1e-5)
    assert svi.mutable_state["state"]["calls"] == 6.0


@pytest.mark.costly
@pytest.mark.parametrize(
    "make",
    [
        lambda: pyro.optim.Adam({"lr": 0.05}),
        lambda: rules.Newton({"loc": 0.1, "scale": 0.1}),
        lambda: lambda params: jaxoptim.optim.LBFGS(params, max_iter=3),
    ],
    ids=["pyro", "newton", "lbfgs"],
)
def test_forward_is_reverse_where_both_go_through(make):
    svi, other = fit(make(), forward_mode_differentiation=True), fit(make())
    losses = [svi.step(DATA) for _ in range(2)]
    np.testing.assert_allclose(losses, [other.step(DATA, root=jnp.sqrt) for _ in range(2)], rtol=1e-4)
    chex.assert_trees_all_close(svi.get_params(), other.get_params(), rtol=1e-4)


def test_without_it_the_loop_is_refused():
    with pytest.raises(ValueError, match="Reverse-mode"):
        fit(rules.SGD(lr=0.1)).step(DATA)
