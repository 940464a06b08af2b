"""The batches of chains: in parts, and the same for all of them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxoptim import rules, sampling
from jaxoptim.sampling.microbatches import mean_over_parts

KEY = jax.random.key(3)
DATA = {"x": jax.random.normal(jax.random.key(0), (12, 2)), "y": jnp.linspace(-1.0, 1.0, 12)}
START = {"w": jnp.array([0.5, -0.5]), "b": jnp.ones(()), "frozen": None}
SGLD = rules.SGLD(lr=0.02, nbeta=5.0, localization=1.0)
slow = pytest.mark.slow
FEW = {"key": KEY, "num_chains": 2, "num_draws": 5}


def fit(params, batch):
    return jnp.mean(jnp.cosh(batch["x"] @ params["w"] + params["b"] - batch["y"]))


# Micro-batches.

SAMPLERS = {
    "SGLD": SGLD,
    "SGNHT": rules.SGNHT(lr=0.01, nbeta=5.0),
    "PSGLD with curvature": rules.PSGLD(lr=0.01, gamma=True),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch_size", "count"),
    [
        ("SGLD", 6, 3),
        ("SGLD", None, 4),
        ("SGLD", 6, 6),
        ("SGNHT", None, 4),
        ("PSGLD with curvature", None, 4),
    ],
    ids=["SGLD", "SGLD with all data", "SGLD one by one", "SGNHT with all data", "PSGLD with all data"],
)
def test_micro_batches_are_one_batch(x64, name, batch_size, count):
    sampler = SAMPLERS[name]
    start = jax.tree.map(lambda x: x.astype(float), START)
    observables = {"accepted": sampling.MalaAcceptance()} if name == "SGLD" else None
    options = FEW | {"batch_size": batch_size, "observables": observables}
    found, whole = (sampling.sample(fit, start, sampler, DATA, microbatches=k, **options) for k in (np.int64(count), 1))
    chex.assert_trees_all_close(
        (found.loss, found.params, found.observables), (whole.loss, whole.params, whole.observables), rtol=1e-10
    )


def test_the_mean_over_parts_is_a_loop_in_the_precision_of_the_whole():
    batch = jnp.arange(1.0, 13.0)
    calls = []

    def mean(part):
        calls.append(part.shape)
        return {"half": jnp.mean(part).astype(jnp.bfloat16), "mean": jnp.mean(part)}

    found = mean_over_parts(mean, batch, 4)
    assert set(calls) == {(3,)}
    assert float(found["mean"]) == 6.5
    assert found["half"].dtype == jnp.bfloat16
    assert float(found["half"]) == 6.5
    assert mean_over_parts(mean, batch, 1)["mean"] == 6.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
def test_the_loss_at_the_start_is_evaluated_in_parts_too():
    sizes = set()

    def seen(params, batch):
        sizes.add(len(batch["y"]))
        return fit(params, batch)

    llc = sampling.estimate_llc(seen, START, SGLD, DATA, microbatches=3, **FEW)
    assert sizes == {4}
    assert llc.init_loss == pytest.approx(float(fit(START, DATA)), rel=1e-6)
    sweep = sampling.calibrate(fit, START, SGLD, DATA, lr=[0.02], localization=[1.0], microbatches=3, **FEW)
    np.testing.assert_allclose(sweep.trace[0, 0], llc.trace, rtol=1e-4, atol=1e-5)


# The same batches in all chains.


def mean_of(w, x):
    """A loss whose gradient, and whose value at the same parameters, tells the batch."""
    return jnp.mean(x) * jnp.sum(w)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vmap", "map"])
def test_all_chains_see_the_same_batches(method):
    options = {"key": KEY, "num_chains": 4, "num_draws": 8, "batch_size": 3, "chain_method": method}
    still = rules.SGLD(lr=0.0)
    data = 2.0 ** jnp.arange(12)
    run = functools.partial(sampling.sample, mean_of, jnp.ones(1), still, data, **options)
    own, shared = run().loss, run(same_batches=True).loss
    assert len(np.unique(own[:, 0])) == 4
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[0], shared.shape))
    assert len(np.unique(shared[0])) == 8
    for epoch in (shared[0, :4], shared[0, 4:]):  # each datum once
        assert 3 * float(epoch.sum()) == pytest.approx(2**12 - 1)
    assert not (shared[0] == own).all(1).any()
    assert (run(same_batches=True, key=jax.random.key(4)).loss[0] != shared[0]).any()
    moved = run(same_batches=True, num_chains=2) if method == "vmap" else None
    assert moved is None or (moved.loss == shared[:2]).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
def test_chains_on_the_same_batches_differ_in_their_noise_alone():
    data = 2.0 ** jnp.arange(12)
    options = {"key": KEY, "num_chains": 3, "num_draws": 6, "batch_size": 5, "same_batches": True}
    watched = options | {"observables": {"w": lambda w: w}}
    silent, loud = (
        sampling.sample(mean_of, jnp.ones(1), rules.SGLD(lr=1e-3, noise_level=level), data, **watched)
        for level in (0.0, 1.0)
    )
    paths = silent.observables["w"]
    np.testing.assert_array_equal(paths, np.broadcast_to(paths[0], paths.shape))
    assert len(np.unique(loud.observables["w"][:, -1])) == 3
    llc = sampling.estimate_llc(
        mean_of, jnp.ones(1), rules.SGLD(lr=0.0), data, selections=[True, np.ones(1)], **options
    )
    np.testing.assert_array_equal(llc.loss, np.broadcast_to(llc.loss[0, 0], llc.loss.shape))


INVALID = "Invalid microbatches:"
WRONG = {
    "same": ({"same_batches": 1}, r"Invalid same_batches: 1\. It is True or False"),
    "not of the batch": ({"batch_size": 6, "microbatches": 4}, rf"{INVALID} 4\. It divides batch_size, which is 6"),
    "not of the data": ({"microbatches": 5}, rf"{INVALID} 5\. It divides the number of data, which is 12"),
    "no data": ({"data": None, "microbatches": 2}, "microbatches is 2, but there are no data"),
    "none": ({"microbatches": 0}, rf"{INVALID} 0\. It is an int >= 1"),
    "half": ({"microbatches": 1.5}, rf"{INVALID} 1\.5\. It is an int >= 1"),
}


@pytest.mark.parametrize(("changes", "match"), WRONG.values(), ids=WRONG)
def test_wrong_batches_are_refused(changes, match):
    with pytest.raises(ValueError, match=match) as caught:
        sampling.sample(**{"loss_fn": fit, "params": START, "sampler": SGLD, "data": DATA} | FEW | changes)
    assert "\n" not in str(caught.value)
