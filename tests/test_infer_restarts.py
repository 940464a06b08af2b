"""Several fits in one program: each that of an SVI of its own, the best kept."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_uniform

from infer_networks import Normalised
from jaxoptim import optim, rules
from jaxoptim.engine import loops
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim as named
from jaxoptim.pyro.infer import SVI
from jaxoptim.pyro.optim.multi import MixedMultiOptimizer, Newton
from programs import collectives

KEY = jax.random.key(11)
KEYS = jax.random.split(KEY, 5)


def valleys(data):
    """Two of them, of which the right one is deeper."""
    x = numpyro.sample("x", dist.Normal(0.0, 10.0))
    numpyro.factor("f", -((x**2 - 4.0) ** 2) + x * data.mean())


def somewhere(data):
    start = numpyro.param("start", lambda key: 3 * jax.random.normal(key))
    width = numpyro.param("width", 0.2, constraint=constraints.positive)
    numpyro.sample("x", dist.Normal(start, width))


def point(data):
    numpyro.sample("x", dist.Delta(numpyro.param("start", lambda key: 3 * jax.random.normal(key))))


DATA = jnp.ones(6)
OPTIMIZERS = {
    "by name": lambda: named.Adam(lambda name: {"lr": 0.05 if name == "start" else 0.01}, {"clip_norm": 5.0}),
    "decaying": lambda: named.ClippedAdam({"lr": 0.05, "lrd": 0.99}),
    "torch": lambda: lambda params: optim.NAdam(params, lr=0.02),
    "rule": lambda: rules.ASGD(lr=0.01),
    "optax": lambda: optax.contrib.schedule_free_adamw(0.05),  # whose state begins with the values
    "mixed": lambda: MixedMultiOptimizer([(["start"], named.Adam({"lr": 0.05})), (["width"], optax.adam(0.01))]),
    "Newton": lambda: Newton({"start": 0.5}),
}


def of(optimizer, guide, key, **options):
    return SVI(valleys, guide, optimizer(), Trace_ELBO(), key=key, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_fit_is_that_of_its_key(name):
    guide = point if name == "Newton" else somewhere
    together = of(OPTIMIZERS[name], guide, KEY)
    found = together.run_many(5, 40, DATA, progress_bar=False)
    alone = [of(OPTIMIZERS[name], guide, key) for key in KEYS]
    losses = np.stack([svi.run(40, DATA, progress_bar=False) for svi in alone])
    np.testing.assert_allclose(found.losses, losses, rtol=2e-5, atol=2e-5)
    every = [svi.get_params() for svi in alone]
    chex.assert_trees_all_close(found.params, jax.tree.map(lambda *x: jnp.stack(x), *every), rtol=2e-5, atol=2e-5)
    assert found.best == losses[:, -4:].mean(1).argmin()
    # It goes on as the best one does, its optimizer and key too.
    best = alone[found.best]
    chex.assert_trees_all_close(together.get_params(), best.get_params(), rtol=2e-5)
    np.testing.assert_array_equal(together.losses, found.losses[found.best])
    assert jax.random.key_data(together.key).tolist() == jax.random.key_data(best.key).tolist()
    for _ in range(2):
        np.testing.assert_allclose(together.step(DATA), best.step(DATA), rtol=1e-4)
    np.testing.assert_allclose(
        together.run(20, DATA, progress_bar=False), best.run(20, DATA, progress_bar=False), rtol=1e-3, atol=1e-4
    )


def test_the_deeper_valley_is_found_and_any_number_of_steps_is_one_program():
    svi = of(OPTIMIZERS["rule"], point, KEY)
    before = loops.minimize_fits._cache_size()
    found = svi.run_many(8, 300, DATA, progress_bar=False)
    chex.assert_shape((found.losses, found.params["start"]), [(8, 300), (8,)])
    assert {round(float(x)) for x in found.params["start"]} == {-2, 2}
    assert round(float(svi.get_params()["start"])) == 2
    assert loops.minimize_fits._cache_size() == before + 1


@pytest.mark.slow
def test_an_automatic_guide_begins_elsewhere_in_each_fit():
    def both(run):
        guide = AutoNormal(valleys, init_loc_fn=init_to_uniform(radius=3.0))
        return SVI(valleys, guide, rules.Adam(lr=0.02), Trace_ELBO(), key=run)

    together = both(KEY)
    found = together.run_many(5, 20, DATA, progress_bar=False)
    losses = np.stack([both(key).run(20, DATA, progress_bar=False) for key in KEYS])
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4, atol=1e-4)
    assert len(np.unique(found.losses[:, 0])) == 5
    again = SVI(valleys, together._guide, rules.Adam(), Trace_ELBO())
    with pytest.raises(ValueError, match="AutoNormal has run already"):
        again.run_many(2, 3, DATA)


def normalised(x):
    net = flax_module("net", Normalised(), input_shape=(1, 2), mutable=["batch_stats"])
    numpyro.sample("y", dist.Normal(net(x), 1.0).to_event(1), obs=x[:, 0])


@pytest.mark.slow
def test_mutable_state_and_batches():
    x = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    batches = [x[:4], x[4:8], x[8:]]

    def made(key):
        return SVI(normalised, lambda x: None, rules.Adam(lr=0.02), Trace_ELBO(), key=key)

    together = made(KEY)
    found = together.run_many(5, 9, (batch for batch in batches * 3), progress_bar=False)
    alone = [made(key) for key in KEYS]
    losses = np.stack([[svi.step(batch) for batch in batches * 3] for svi in alone])
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(together.mutable_state, alone[found.best].mutable_state, rtol=1e-4)
    drawn = made(KEY)
    assert drawn.run_many(3, 7, x, batch_size=4, progress_bar=False).losses.shape == (3, 7)
    with pytest.raises(ValueError, match="must have one shape"):
        made(KEY).run_many(2, 3, iter([x[:4], x[:5], x[:4]]), progress_bar=False)


@pytest.mark.slow
def test_fits_that_blow_up_are_not_the_best():
    def model(data):
        x = numpyro.param("start", lambda key: jax.random.normal(key))
        numpyro.factor("f", jnp.where(x > 0, jnp.nan, -(x**2)))

    svi = SVI(model, lambda data: None, rules.SGD(lr=0.1), Trace_ELBO(), key=KEY)
    with np.errstate(all="ignore"):
        found = svi.run_many(6, 10, DATA, progress_bar=False)
    last = np.asarray(found.losses[:, -1])
    assert 0 < np.isnan(last).sum() < 6
    assert np.isfinite(last[found.best])

    never = SVI(
        lambda data: numpyro.factor("f", numpyro.param("x", 1.0) * jnp.nan),
        lambda data: None,
        rules.SGD(),
        Trace_ELBO(),
    )
    with pytest.raises(ValueError, match=r"None of the 3 fits has a finite loss"):
        never.run_many(3, 2, DATA, progress_bar=False)
    assert not never.params


@pytest.mark.slow
def test_ctrl_c_keeps_the_best_so_far():
    def until(count):
        for _ in range(count):
            yield DATA
        raise KeyboardInterrupt

    svi = of(OPTIMIZERS["rule"], point, KEY)
    with pytest.raises(KeyboardInterrupt):
        svi.run_many(5, 100, until(20), progress_bar=False)
    assert 0 < len(svi.losses) <= 20
    alone = [of(OPTIMIZERS["rule"], point, key).run(len(svi.losses), DATA, progress_bar=False) for key in KEYS]
    assert min(np.abs(svi.losses - losses).max() for losses in alone) < 1e-4
    svi.step(DATA)


class Begun:
    """What run_many does not begin with."""

    @staticmethod
    def stepped():
        svi = of(OPTIMIZERS["rule"], point, KEY)
        svi.step(DATA)
        return svi

    @staticmethod
    def sharing():
        return of(OPTIMIZERS["rule"], point, KEY, params=of(OPTIMIZERS["rule"], point, KEY).params)

    @staticmethod
    def given():
        svi = of(OPTIMIZERS["rule"], point, KEY)
        svi.params["start"] = Parameter(1.0, "start")
        return svi


@pytest.mark.costly
@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (Begun.stepped, "have values already"),
        (Begun.sharing, "are shared"),
        (Begun.given, "svi.params has some"),
        (lambda: of(lambda: optim.Adam({"start": 1.0}), point, KEY), "no instance"),
        (lambda: of(lambda: optim.LBFGS, point, KEY), "no instance"),
        (lambda: of(OPTIMIZERS["decaying"], point, KEY, skip_nonfinite=True), "lrd"),
    ],
    ids=["after a step", "shared", "values given", "torch-style instance", "LBFGS", "decaying and skipping"],
)
def test_what_many_fits_cannot_begin_with(made, problem):
    svi = made()
    before = dict(svi.params)
    with pytest.raises((ValueError, TypeError), match=problem):
        svi.run_many(2, 3, DATA, progress_bar=False)
    assert dict(svi.params) == before
    with pytest.raises(ValueError, match="0 and 3"):
        svi.run_many(0, 3, DATA)
    svi.step(DATA)  # which still works


@pytest.mark.slow
def test_values_to_begin_with_are_those_of_all_fits():
    svi = of(OPTIMIZERS["rule"], point, KEY, init_params={"start": 1.5})
    found = svi.run_many(3, 1, DATA, progress_bar=False)
    assert len(np.unique(found.losses)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decaying", pytest.param("Newton", marks=pytest.mark.slow)])
def test_fits_are_spread_over_a_mesh(name, monkeypatch):
    """With the numbers of one device, no word between the fits, and the best goes on on one."""
    texts, program = [], loops.minimize_fits

    def minimize_fits(*args, mesh):
        if mesh is not None and not texts:
            texts.append(program.lower(*args, mesh=mesh).compile().as_text())
        return program(*args, mesh=mesh)

    monkeypatch.setattr(loops, "minimize_fits", minimize_fits)
    guide, mesh = point if name == "Newton" else somewhere, jax.make_mesh((8,), ("fits",))
    here, there = (of(OPTIMIZERS[name], guide, KEY) for _ in range(2))
    expected = here.run_many(16, 40, DATA, progress_bar=False)
    found = there.run_many(16, 40, DATA, progress_bar=False, mesh=mesh)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-5, atol=1e-5)
    assert [shard.data.shape for shard in found.params["start"].addressable_shards] == [(2,)] * 8
    assert found.best == expected.best
    assert not collectives(*texts)
    np.testing.assert_allclose(there.run(5, DATA, progress_bar=False), here.run(5, DATA, progress_bar=False), rtol=1e-4)
    assert len(there.get_params()["start"].sharding.device_set) == 1


def test_fits_do_not_divide_over_a_mesh():
    with pytest.raises(ValueError, match="The mesh has 8 devices, which do not divide 5 fits"):
        of(OPTIMIZERS["rule"], point, KEY).run_many(5, 3, DATA, mesh=jax.make_mesh((8,), ("fits",)))
