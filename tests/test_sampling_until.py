"""A run that stops itself when its standard error is small enough."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxoptim import rules, sampling
from jaxoptim.sampling import until
from traced_runs import FEW, tempered

pytest.importorskip("numpyro")

NBETA, LR, SIZE = 100.0, 1e-2, 10
EXACT = SIZE / 2 / (1 - LR * NBETA / 4)  # of SGLD at this step size
SAMPLER = rules.SGLD(lr=LR, nbeta=NBETA)
RUN = {"num_chains": 4, "num_burnin_steps": 50, "num_draws": 500}


def quadratic(w):
    return jnp.sum(w**2) / 2


def estimated(seed=0, **options):
    options = RUN | options
    return sampling.estimate_llc(quadratic, jnp.zeros(SIZE), SAMPLER, key=jax.random.key(seed), **options)


def sampled(seed=0, **options):
    return sampling.sample(quadratic, jnp.zeros(SIZE), SAMPLER, key=jax.random.key(seed), **RUN | options)


def same(one, other):
    np.testing.assert_array_equal(one.loss, other.loss)
    np.testing.assert_array_equal(one.observables["w"], other.observables["w"])
    np.testing.assert_array_equal(one.params, other.params)


def test_it_looks_at_64_draws_and_then_at_a_quarter_more():
    looks = [draws for draws in range(200) if until.is_look(draws)]
    assert looks == [64, 80, 100, 125, 157, 197]
    assert until.next_look(0) == 64
    assert until.next_look(64) == 80


@pytest.mark.slow
def test_it_stops_at_the_first_look_below_the_bound():
    whole, bound = estimated(), 0.15
    found = estimated(until_mcse=bound)
    draws = found.loss.shape[1]
    np.testing.assert_array_equal(found.loss, whole.loss[:, :draws])
    looks = [look for look in range(draws + 1) if until.is_look(look)]
    errors = [NBETA * float(sampling.mcse(whole.loss[:, :look])) for look in looks]
    assert found.mcse <= bound < min(errors[:-1])
    assert errors[-1] == pytest.approx(found.mcse)
    assert looks[-1] == draws < RUN["num_draws"]


@pytest.mark.slow
def test_the_error_is_what_the_estimates_are_off_by():
    found = [estimated(seed, until_mcse=0.2) for seed in range(32)]
    off = np.array([(of.mean - EXACT) / of.mcse for of in found])
    assert len({of.loss.shape for of in found}) > 1  # each takes what it needs
    assert 0.4 < np.mean(off**2) < 2
    assert abs(off.mean()) < 4 / np.sqrt(len(off))


@pytest.mark.slow
def test_a_bound_that_is_not_reached_takes_all_draws():
    np.testing.assert_array_equal(estimated(until_mcse=1e-6, num_draws=150).loss, estimated(num_draws=150).loss)


@pytest.mark.slow
def test_all_selections_are_to_have_it():
    where = [jnp.zeros(SIZE).at[:2].set(1), jnp.ones(SIZE)]
    found = estimated(until_mcse=0.2, selections=where)
    assert found.mcse.max() <= 0.2
    assert found.mcse.argmax() == 1
    assert found.loss.shape[-1] == estimated(until_mcse=0.2, selections=where[1:]).loss.shape[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["checkpoint", "store"])
def test_it_goes_on_under_a_smaller_bound(tmp_path, kept):
    pytest.importorskip("zarr")
    options = {"observables": {"w": lambda w: w[:2]}}
    saved = options | {kept: tmp_path / "run"}
    low, high = 0.12 / NBETA, 0.2 / NBETA
    one, both = sampled(until_mcse=high, **saved), sampled(until_mcse=low, **saved)
    same(one, sampled(until_mcse=high, **options))
    same(both, sampled(until_mcse=low, **options))
    same(both, sampled(until_mcse=high, **saved))  # and takes back none of its draws
    same(sampled(num_draws=500, **options), sampled(**saved))
    assert one.loss.shape[1] < both.loss.shape[1] < 500


@pytest.mark.slow
def test_all_temperatures_are_to_have_it(tmp_path):
    """In the loss of all data, of which the steps take batches."""
    pytest.importorskip("zarr")
    options, bounds = FEW | {"num_draws": 300, "num_chains": 6, "lr": [0.3, 0.2, 0.1]}, (0.2, 0.1)
    whole, store = tempered(**options).loss, tmp_path / "run.zarr"
    lengths = []
    for bound in bounds:
        found = tempered(**options, until_mcse=bound, store=store).loss
        lengths.append(found.shape[-1])
        np.testing.assert_array_equal(found, whole[..., : lengths[-1]])
        looks = [look for look in range(lengths[-1] + 1) if until.is_look(look)]
        errors = [max(float(sampling.mcse(of)) for of in whole[..., :look]) for look in looks]
        assert errors[-1] <= bound < min(errors[:-1])
        assert looks[-1] == lengths[-1]
    assert 64 < lengths[0] < lengths[1] < 300


@pytest.mark.slow
def test_files_of_safetensors_are_looked_at_too(tmp_path):
    options = {"observables": {"w": lambda w: w[:2]}, "until_mcse": 0.2 / NBETA, "num_steps_bw_draws": 3}
    same(sampled(**options), sampled(store=tmp_path / "run.safetensors", **options))


def test_chains_that_diverge_are_left_out():
    loss = np.random.default_rng(0).normal(size=(2, 4, 100))
    error = until.largest_mcse(loss)
    assert error == max(map(sampling.mcse, loss))
    loss[:, 1, 50:] = np.nan
    assert until.largest_mcse(loss) == max(sampling.mcse(of[[0, 2, 3]]) for of in loss)
    loss[0] = np.inf
    assert until.largest_mcse(loss) == np.inf


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), float("inf"), "small", True, [0.1]])
def test_errors(bound):
    with pytest.raises(ValueError, match=r"Invalid until_mcse: .* It is a finite number > 0, or None"):
        sampled(until_mcse=bound)
