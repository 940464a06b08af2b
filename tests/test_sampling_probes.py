"""Probes: data sets of observables, which are arguments of the program, and the losses of their data at the draws."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxoptim import rules, sampling
from jaxoptim.sampling import chains, run
from jaxoptim.sampling.chain import ChainSpec, Thinning
from jaxoptim.sampling.target import Given, Target

KEY = jax.random.key(3)
X = jax.random.normal(jax.random.key(0), (7, 2))
OTHERS = {"x": X[:5] + 1.0, "shift": jnp.arange(5.0)}
START = jnp.array([0.5, -0.5])
SGLD = rules.SGLD(lr=0.02, nbeta=5.0, localization=1.0)
FEW = {"key": KEY, "num_chains": 2, "num_draws": 4, "num_burnin_steps": 2, "num_steps_bw_draws": 2}


def of_each(w, x):
    return jnp.sum((x - w) ** 2, -1) / 2


def of_tokens(w, batch):
    return jnp.cosh(batch["x"] @ w + batch["shift"])[:, None] * jnp.arange(3)


def loss(w, x):
    return jnp.mean(of_each(w, x))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vmap", "map"])
@pytest.mark.parametrize("size", [None, 7, 3, 1], ids=["all", "one batch", "a smaller last batch", "one by one"])
def test_losses_are_those_of_the_parameters_of_the_draw(size, method):
    observables = {
        "w": lambda w: w,
        "train": sampling.Losses(of_each, "train", size),
        "tokens": sampling.Losses(of_tokens, "others", None if size is None else min(size, 5)),
    }
    probes = {"others": OTHERS, "train": np.asarray(X)}
    found = sampling.sample(loss, START, SGLD, X, probes=probes, observables=observables, chain_method=method, **FEW)
    seen = found.observables
    assert seen["train"].shape == (2, 4, 7)
    assert seen["tokens"].shape == (2, 4, 5, 3)
    np.testing.assert_allclose(seen["train"].mean(-1), found.loss, rtol=1e-6)
    for name, function, data in (("train", of_each, X), ("tokens", of_tokens, OTHERS)):
        expected = jax.vmap(jax.vmap(lambda w, f=function, data=data: f(w, data)))(seen["w"])
        np.testing.assert_allclose(seen[name], expected, rtol=1e-6, atol=1e-6)
    plain = sampling.sample(loss, START, SGLD, X, **FEW)
    np.testing.assert_allclose(found.loss, plain.loss, rtol=1e-6)


@pytest.mark.slow
def test_covariances_of_losses_are_the_influence_of_data_on_one_another():
    r"""Of losses :math:`|w - a_i|^2/2` under :math:`N(m, v I)` they are :math:`d v^2/2 + v (m - a_i)(m - a_j)`."""
    nbeta, lr, number, at = 20.0, 0.02, 20_011, jnp.zeros(2)
    variance = 1 / (nbeta * (1 - lr * nbeta / 4))
    probe = jnp.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.5]])
    found = sampling.sample(
        loss, at, rules.SGLD(lr=lr, nbeta=nbeta), X - X.mean(0), key=KEY, num_chains=number, num_draws=1,
        num_burnin_steps=60, probes={"probe": probe}, observables={"losses": sampling.Losses(of_each, "probe")},
    )  # fmt: skip
    exact = variance**2 + variance * np.asarray(probe @ probe.T, np.float64)
    losses = np.asarray(found.observables["losses"][:, 0], np.float64)
    products = np.einsum("ci,cj->cij", *[losses - losses.mean(0)] * 2)
    error = products.std(0) / np.sqrt(number)
    assert (abs(products.mean(0) - exact) < 4 * error).all()
    assert (error < 0.02 * abs(exact).max()).all()


class Net(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(START)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))


def nnx_each(model, x):
    model.calls[...] += 1  # dropped, as what a loss changes
    return of_each(model.w[...], x)


@pytest.mark.slow
def test_losses_of_a_module_are_those_of_its_arrays():
    options = FEW | {"probes": {"x": X}}
    found = sampling.sample(
        lambda model, x: nnx_each(model, x).mean(), Net(), SGLD, X,
        observables={"each": sampling.Losses(nnx_each, "x", 3)}, **options,
    )  # fmt: skip
    plain = sampling.sample(loss, START, SGLD, X, observables={"each": sampling.Losses(of_each, "x", 3)}, **options)
    np.testing.assert_allclose(found.observables["each"], plain.observables["each"], rtol=1e-6)


class Far(sampling.Observable):
    """An observable of a user's own, which reads a probe."""

    def update(self, memory, draw):
        return memory, jnp.max(abs(draw.probes["x"] - draw.params))


FAR = Far()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
def test_estimates_and_sweeps_take_probes():
    options = FEW | {"probes": {"x": X}, "observables": {"each": sampling.Losses(of_each, "x"), "far": FAR}}
    llc = sampling.estimate_llc(loss, START, SGLD, X, **options)
    np.testing.assert_allclose(llc.observables["each"].mean(-1), llc.loss, rtol=1e-6)
    assert llc.observables["far"].shape == (2, 4)
    several = sampling.estimate_llc(loss, START, SGLD, X, selections=[True, np.array([1, 0])], **options)
    np.testing.assert_allclose(several.observables["each"].mean(-1), several.loss, rtol=1e-6)
    sweep = sampling.calibrate(loss, START, SGLD, X, lr=[0.01, 0.02], localization=[1.0], **options)
    assert sweep.observables["each"].shape == (2, 1, 2, 4, 7)
    np.testing.assert_allclose(sweep.observables["each"][1, 0], llc.observables["each"], rtol=1e-5)


def test_other_probes_compile_nothing_new():
    def losses(probe):
        observables = {"each": sampling.Losses(of_each, "x", 3)}
        found = sampling.sample(loss, START, SGLD, X, probes={"x": probe}, observables=observables, **FEW)
        return found.observables["each"]

    one = losses(X)
    before = chains.run_steps._cache_size(), chains.init_chains._cache_size(), chains.results._cache_size()
    other = losses(np.asarray(X) + 1.0)
    assert (chains.run_steps._cache_size(), chains.init_chains._cache_size(), chains.results._cache_size()) == before
    assert (one != other).all()


def test_no_probes_are_written_into_the_program():
    given = Given(X, probes={"x": jnp.ones((1000, 2))})
    spec = ChainSpec(Target(loss), None, 4, (("each", sampling.Losses(of_each, "x", 300)),), 5)
    args = (run.stacked(SGLD, 1), jnp.zeros(2, int), KEY, jnp.arange(2), START, given)
    state = jax.eval_shape(chains.init_chains, spec, None, *args)
    assert state.traces["each"].shape == (2, 5, 1000)
    lowered = chains.run_steps.lower(spec, "vmap", None, *args[:2], state, given, Thinning(0, 1), 0, 5)
    for text in (lowered.as_text(), chains.init_chains.lower(spec, None, *args).as_text()):
        constants = [line for line in text.splitlines() if "stablehlo.constant" in line]
        assert not any("x1000" in line or "<1000" in line for line in constants if 'dense<"' in line)
        assert len(text) < 400_000


@pytest.mark.slow
def test_a_run_with_probes_continues_to_the_last_bit(tmp_path):
    path = tmp_path / "run"
    base = FEW | {"probes": {"x": X, "y": X}, "observables": {"each": sampling.Losses(of_each, "x", 3)}}
    whole = sampling.sample(loss, START, SGLD, X, **base)
    sampling.sample(loss, START, SGLD, X, checkpoint=path, **base | {"num_draws": 2})
    found = sampling.sample(loss, START, SGLD, X, checkpoint=path, **base)
    chex.assert_trees_all_equal((found.loss, found.observables), (whole.loss, whole.observables))
    others = {
        "probes": {"probes": {"x": X, "y": X.at[3, 1].add(1e-3)}},
        "functions to observe": {"observables": {"each": sampling.Losses(lambda w, x: 2 * of_each(w, x), "x", 3)}},
    }
    for name, change in others.items():
        with pytest.raises(ValueError, match=f"is of another run: its {name} is not what was given"):
            sampling.sample(loss, START, SGLD, X, checkpoint=path, **base | change)


def losses_of(function=of_each, probe="x", size=None):
    return {"observables": {"each": sampling.Losses(function, probe, size)}}


WRONG = {
    "unknown": (losses_of(probe="z"), ValueError, r"Losses: there is no probe 'z'\. The probes are 'x', 'y'\."),
    "none": (losses_of() | {"probes": None}, ValueError, r"there is no probe 'x'\. Give probes=\{name: data\}\."),
    "no mapping": ({"probes": [X]}, TypeError, "probes is a mapping of names to data, but got list"),
    "no name": ({"probes": {0: X}}, TypeError, "a mapping of names to data, but 0 is no name"),
    "no arrays": ({"probes": {"x": {}}}, ValueError, r"probes\['x'\] has no arrays\. Give a pytree"),
    "lengths": (
        {"probes": {"x": {"a": X, "b": X[:5]}}},
        ValueError,
        r"first axes of probes\['x'\] must have one length, but they have a: 7, b: 5",
    ),
    "batch of none": (losses_of(size=0), ValueError, r"Losses: invalid batch_size 0\. It is an int from 1 to"),
    "large batch": (losses_of(size=8), ValueError, r"invalid batch_size 8\. .*of the probe 'x', 7, or None"),
    "half a batch": (losses_of(size=1.5), ValueError, r"invalid batch_size 1\.5\."),
    "mean": (losses_of(loss), ValueError, r"runs over the batch, but of a batch of 7 it returned shape \(\)"),
    "mean of a batch": (losses_of(loss, size=3), ValueError, r"but of a batch of 3 it returned shape \(\)"),
    "other axis": (losses_of(lambda w, x: x.T), ValueError, r"of a batch of 7 it returned shape \(2, 7\)"),
    "tuple": (losses_of(lambda w, x: (x, x)), ValueError, "of a batch of 7 it returned tuple"),
}


@pytest.mark.costly
@pytest.mark.parametrize(("changes", "error", "match"), WRONG.values(), ids=WRONG)
def test_wrong_probes_are_refused(changes, error, match):
    with pytest.raises(error, match=match) as caught:
        sampling.sample(loss, START, SGLD, X, **FEW | {"probes": {"x": X, "y": X}} | changes)
    assert "\n" not in str(caught.value)
