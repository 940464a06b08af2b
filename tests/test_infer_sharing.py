"""Parameters that are given to SVI: values to begin with, and those of another SVI."""

import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pyro as parent
import pytest
import torch
from numpyro.infer import SVI as Parent
from numpyro.infer import Trace_ELBO

from jaxoptim import optim, pyro, rules
from jaxoptim.interop.numpyro import to_numpyro
from jaxoptim.optim import Parameter
from jaxoptim.pyro.infer import SVI

DATA = np.array([1.0, 2.5, 3.0], np.float32)
positive = dist.constraints.positive


def main(x):
    numpyro.sample("x", dist.Normal(numpyro.param("mean", 0.0), 1.0).expand(x.shape).to_event(1), obs=x)


def auxiliary(x):
    """Of the same parameter, and one more."""
    mean, scale = numpyro.param("mean", 0.0), numpyro.param("scale", 0.1, constraint=positive)
    numpyro.sample("label", dist.Normal(mean, scale), obs=jnp.float32(4.0))


def nothing(x):
    pass


def pair(first, second, **shared):
    fits = SVI(main, nothing, first, Trace_ELBO()), SVI(auxiliary, nothing, second, Trace_ELBO())
    return fits if not shared else (fits[0], SVI(auxiliary, nothing, second, Trace_ELBO(), params=fits[0].params))


def alternate(fits, steps=8):
    for _ in range(steps):
        for svi in fits:
            svi.step(DATA)
    return [{name: np.asarray(value) for name, value in svi.get_params().items()} for svi in fits]


OPTIMIZERS = {
    "pyro": lambda: pyro.optim.Adam({"lr": 0.05}),
    "decay": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9}),
    "rule": lambda: rules.Adam(lr=0.05),
    "optax": lambda: optax.adam(0.05),
    "torch": lambda: lambda params: optim.Adam(params, lr=0.05),
    "mixed": lambda: pyro.optim.multi.MixedMultiOptimizer([(["mean"], rules.Adam(lr=0.05))]),
}


def theirs(kind, options):
    """Pyro's values after the same steps of the two models, of one store."""
    parent.clear_param_store()
    adam = getattr(parent.optim, kind)(options)

    def main(x):
        mean = parent.param("mean", torch.tensor(0.0))
        parent.sample("x", parent.distributions.Normal(mean, 1.0).expand(x.shape).to_event(1), obs=x)

    def auxiliary(x):
        mean = parent.param("mean", torch.tensor(0.0))
        scale = parent.param("scale", torch.tensor(0.1), constraint=torch.distributions.constraints.positive)
        parent.sample("label", parent.distributions.Normal(mean, scale), obs=torch.tensor(4.0))

    fits = [parent.infer.SVI(model, nothing, adam, parent.infer.Trace_ELBO()) for model in (main, auxiliary)]
    for _ in range(8):
        for svi in fits:
            svi.step(torch.tensor(DATA))
    return {name: parent.param(name).detach().numpy() for name in ("mean", "scale")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [("pyro", "Adam", {"lr": 0.05}), ("decay", "ClippedAdam", {"lr": 0.05, "lrd": 0.9})],
    ids=["Adam", "ClippedAdam"],
)
def test_shared_parameters_are_pyros(name, kind, options):
    optimizer = OPTIMIZERS[name]()
    first, second = alternate(pair(optimizer, optimizer, shared=True))
    expected = theirs(kind, options)
    chex.assert_trees_all_close(second, expected, rtol=2e-5)
    assert first == {"mean": second["mean"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rule", "optax", "torch"])
def test_shared_state_is_that_of_a_pyro_style_optimizer(name):
    optimizer = OPTIMIZERS[name]()

    first = SVI(main, nothing, optimizer, Trace_ELBO())
    fits = first, SVI(main, nothing, optimizer, Trace_ELBO(), params=first.params)
    (found, _), (expected,) = alternate(fits), alternate([SVI(main, nothing, OPTIMIZERS["pyro"](), Trace_ELBO())], 16)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pyro", "decay", "rule", "torch"])
def test_what_is_not_shared_is_separate(name):
    optimizer = OPTIMIZERS[name]()
    found = alternate(pair(optimizer, optimizer))
    chex.assert_trees_all_equal(found, alternate(pair(OPTIMIZERS[name](), OPTIMIZERS[name]())))


@pytest.mark.slow
def test_an_optimizer_that_brings_parameters_brings_them_to_both():
    adam = optim.Adam({"mean": jnp.array(3.0)}, lr=0.05)
    first = SVI(main, nothing, adam, Trace_ELBO())
    second = SVI(main, nothing, adam, Trace_ELBO(), params=first.params)
    first.evaluate_loss(DATA)
    second.step(DATA)
    first.step(DATA)
    np.testing.assert_allclose(adam.params["mean"], 2.9, rtol=1e-3)
    assert first.get_params() == second.get_params() == {"mean": adam.params["mean"]}


@pytest.mark.slow
def test_a_multi_optimizer_of_two_fits_keeps_their_states():
    def fit(optimizer):
        return SVI(main, nothing, optimizer, Trace_ELBO())

    one = OPTIMIZERS["mixed"]()
    found = alternate([fit(one), fit(one)])
    chex.assert_trees_all_equal(found, alternate([fit(OPTIMIZERS["mixed"]()) for _ in range(2)]))


@pytest.mark.slow
def test_a_schedule_moves_on_in_both_fits():
    def make():
        return pyro.optim.ExponentialLR({"optimizer": optim.SGD, "optim_args": {"lr": 0.05}, "gamma": 0.5})

    one, *each = make(), make(), make()
    together, apart = pair(one, one), pair(*each)
    for _ in range(3):
        found, expected = alternate(together, 2), alternate(apart, 2)
        for optimizer in (one, *each):
            optimizer.step()
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.slow
def test_the_state_of_a_fit_goes_with_it():
    optimizer = pyro.optim.Adam({"lr": 0.05})
    first = Parameter(1.0, "x")
    for param in (first, Parameter(2.0, "x")):
        param.grad = jnp.ones(())
        optimizer([param])
    alive = weakref.ref(first)
    del first
    optimizer([Parameter(3.0, "x")])  # the rows of the first are left to others
    gc.collect()
    assert alive() is None


def test_a_failed_step_leaves_what_was_put_aside():
    """An option that does not work lets no parameter in."""
    options = {"lr": 0.05}
    optimizer, twin = (pyro.optim.Adam(lambda name: options if name == "x" else {"lr": -1.0}) for _ in range(2))
    first, second, alone = (Parameter(1.0, "x") for _ in range(3))
    for param in (first, second, alone):
        param.grad = jnp.ones(())
    wrong = Parameter(1.0, "wrong")
    wrong.grad = jnp.ones(())
    optimizer([first]), optimizer([second]), twin([alone])
    with pytest.raises(ValueError, match="'wrong'"):
        optimizer([first, wrong])
    optimizer([first]), twin([alone])
    assert first.value == alone.value
    assert int(optimizer.get_state()["x"]["state"][0]["step"]) == 2


# Values to begin with.


def latent(x):
    numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x[0])


def guide(x):
    numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0), numpyro.param("scale", 1.0, constraint=positive)))


def fit(**kwargs):
    return SVI(latent, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(), **kwargs)


@pytest.mark.slow
def test_initial_values_are_numpyros():
    initial = {"loc": 3.0, "scale": np.float32(0.2)}
    svi, begun = fit(init_params=initial), fit()
    result = Parent(latent, guide, to_numpyro(optax.sgd(0.0)), Trace_ELBO()).run(
        jax.random.key(0), 2, DATA, progress_bar=False, init_params=initial
    )
    np.testing.assert_allclose(svi.run(2, DATA, progress_bar=False), result.losses, rtol=1e-6)
    np.testing.assert_allclose(begun.run(2, DATA, progress_bar=False, init_params=initial), result.losses, rtol=1e-6)
    for found in (svi, begun):
        chex.assert_trees_all_close(found.get_params(), {"loc": 3.0, "scale": 0.2}, rtol=1e-6)
    with pytest.raises(ValueError, match="init_params are for the first call"):
        svi.run(1, DATA, progress_bar=False, init_params=initial)


def test_a_parameter_put_in_before_the_first_step_stays():
    svi = fit()
    loc = svi.params["loc"] = Parameter(3.0, "loc")
    svi.step(DATA)
    assert svi.params["loc"] is loc
    assert svi.get_params() == {"loc": 3.0, "scale": 1.0}


def given(params=(), **init):
    svi = fit(init_params=init)
    svi.params.update(params)
    return svi


REFUSED = {
    "init_params of no site": (lambda: given(lok=1.0), KeyError, "'lok'.*They reach 'loc', 'scale'"),
    "params of no site": (lambda: given({"lok": Parameter(1.0)}), KeyError, "'lok'.*They reach 'loc', 'scale'"),
    "shape": (lambda: given({"loc": Parameter([1.0, 2.0])}), ValueError, r"'loc' of shape \(2,\).*\(\)"),
    "array": (lambda: given({"loc": 3.0}), TypeError, "'loc' is float"),
    "constraint": (
        lambda: given(scale=-1.0),
        ValueError,
        "'scale' is -1.0, which is not finite or not within .*Positive",
    ),
    "int": (lambda: given(loc=1), TypeError, "'loc' has dtype int32"),
    "twice": (lambda: given({"loc": Parameter(3.0)}, loc=3.0), ValueError, "'loc', which has a value in params"),
    "brought": (
        lambda: SVI(latent, guide, optim.Adam({"loc": 1.0, "scale": 1.0}), Trace_ELBO(), init_params={"loc": 3.0}),
        ValueError,
        "'loc', which has a value in params or in the optimizer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_initial_values_that_are_refused(case):
    make, kind, words = REFUSED[case]
    svi = make()
    before, key = dict(svi.params), svi.key
    for call in (svi.step, svi.evaluate_loss):
        with pytest.raises(kind, match=words):
            call(DATA)
    assert svi.params == before
    assert svi.key is key


def test_params_are_those_of_an_svi():
    with pytest.raises(TypeError, match=r"svi\.params of another SVI, but got dict"):
        fit(params={})
    with pytest.raises(TypeError, match="init_params must be a dict of values by site, but got list"):
        fit(init_params=[3.0])
    svi = fit()
    with pytest.raises(TypeError, match="'loc' is float"):
        svi.params = {"loc": 3.0}
    svi.params = {"loc": Parameter(3.0)}
    svi.params |= {"scale": Parameter(0.0)}
    svi.step(DATA)
    assert svi.get_params() == {"loc": 3.0, "scale": 1.0}


@pytest.mark.slow
def test_the_names_of_the_other_svi_are_known():
    first, second = pair(rules.SGD(lr=0.1), rules.SGD(lr=0.1), shared=True)
    second.step(DATA)
    first.step(DATA)
    assert sorted(first.params) == ["mean", "scale"]
    assert sorted(first.get_params()) == ["mean"]
