"""Parallel tempering: what is swapped, what it crosses, and free energies against exact ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxoptim import rules, sampling
from jaxoptim.sampling.swaps import Swaps, Tried, partners

KEY = jax.random.key(17)
slow = pytest.mark.slow

H, BEST, LOCALIZATION = np.array([0.5, 1.0, 2.0]), np.array([0.4, -0.3, 0.2]), 1.0
NBETA = np.array([0.0, 0.2, 0.5, 1.0, 1.8, 3.0, 5.0, 8.0])


def quadratic(w):
    return jnp.sum(H * (w - BEST) ** 2) / 2 + 0.3


def tempered(loss, start, nbeta, *, localization=LOCALIZATION, **options):
    options = {"key": KEY, "metropolis": True, "num_chains": 40, "num_draws": 250, "num_burnin_steps": 150} | options
    sampler = rules.SGLD(lr=0.1, localization=localization)
    return sampling.parallel_tempering(loss, start, sampler, nbeta=nbeta, **options)


def quadratics(**options):
    """Step sizes as the curvature is."""
    return tempered(quadratic, jnp.zeros(3), NBETA, lr=0.8 / (LOCALIZATION + 2 * NBETA), **options)


def mean_and_error(x):
    """Over chains, which are independent, and draws."""
    chains = np.asarray(x, float).mean(2)
    return chains.mean(1), chains.std(1, ddof=1) / np.sqrt(chains.shape[1])


def exact_moments(nbeta):
    """Mean and variance of the loss, and the free energy, of the quadratic."""
    stiff = nbeta[:, None] * H + LOCALIZATION
    off = LOCALIZATION * BEST / stiff  # of the mean from the minimum
    mean = (H * (1 / stiff + off**2)).sum(1) / 2 + 0.3
    variance = (H**2 * (1 / (2 * stiff**2) + off**2 / stiff)).sum(1)
    energy = np.log(stiff / LOCALIZATION).sum(1) / 2 + nbeta * 0.3
    return mean, variance, energy + (nbeta[:, None] * H * LOCALIZATION / stiff * BEST**2).sum(1) / 2


@pytest.mark.slow
def test_the_free_energy_of_a_gaussian():
    found = quadratics(observables={"w": lambda w: w})
    means, variances, energies = exact_moments(NBETA)
    mean, error = mean_and_error(found.loss)
    assert (abs(mean - means) < 4 * error).all()
    value, error, correction = found.free_energy
    assert value[0] == error[0] == correction[0] == 0
    assert (abs(value - energies)[1:] < 4 * error[1:]).all()
    assert error[-1] < 0.1
    gaps = np.diff(NBETA)
    plain = np.cumsum(gaps / 2 * (means[1:] + means[:-1]))
    whole = plain + np.cumsum(gaps**2 / 12 * np.diff(variances))
    assert abs(whole - energies[1:]).max() < error[-1] / 4  # quadrature adds nothing to that
    assert abs(plain - energies[1:]).max() > 2 * abs(whole - energies[1:]).max()
    stiff = NBETA[:, None] * H + LOCALIZATION
    w = np.asarray(found.observables["w"], float)
    assert w.shape == (8, 40, 250, 3)
    np.testing.assert_allclose(w.mean((1, 2)), NBETA[:, None] * H * BEST / stiff, atol=0.15)


@pytest.mark.slow
def test_the_errors_are_those_of_repeated_runs():
    runs = [quadratics(key=jax.random.key(seed), num_chains=8, num_draws=60).free_energy for seed in range(20)]
    off = np.array([(of.value - exact_moments(NBETA)[2])[1:] / of.error[1:] for of in runs])
    assert 0.5 < np.mean(off**2) < 2.2


@pytest.mark.slow
def test_positions_are_swapped_at_the_exact_rate():
    found = quadratics()
    rng, size, rates = np.random.default_rng(0), 200_000, []
    stiff = NBETA[:, None] * H + LOCALIZATION
    w = NBETA[:, None] * H * BEST / stiff + rng.normal(size=(size, len(NBETA), 3)) / np.sqrt(stiff)
    loss = (H * (w - BEST) ** 2).sum(-1) / 2
    for i in range(len(NBETA) - 1):
        gain = (NBETA[i] - NBETA[i + 1]) * (loss[:, i] - loss[:, i + 1])
        rates.append(np.exp(np.minimum(0, gain)).mean())
    rate = np.asarray(found.swap_rate, float)
    error = rate.std(1, ddof=1) / np.sqrt(rate.shape[1])
    assert rate.shape == (7, 40)
    assert (abs(rate.mean(1) - rates) < 4 * error + 2e-3).all()


def wells(w):
    """Two of them, the deeper one to the right."""
    return jnp.sum((w**2 - 4) ** 2 / 16 - w / 20)


@pytest.mark.slow
def test_it_crosses_a_barrier_that_chains_do_not():
    nbeta = np.array([0.0, 1.0, 2.0, 4.0, 7.0, 11.0, 16.0])
    options = {"lr": 0.4 / (1 + nbeta), "localization": 0.25, "num_draws": 400, "observables": {"w": lambda w: w}}
    found = tempered(wells, jnp.array([-2.0]), nbeta, **options)
    axis = np.linspace(-12, 12, 40_001)
    potential = nbeta[:, None] * np.asarray(jax.vmap(wells)(axis), float) + 0.125 * (axis + 2) ** 2
    weights = np.exp(-potential)
    probability = weights[:, axis > 0].sum(1) / weights.sum(1)
    mean, error = mean_and_error(found.observables["w"][..., 0] > 0)
    assert (abs(mean - probability) < 4 * error).all()
    energies = -np.log(weights.sum(1) / weights[0].sum())
    value, error, _ = found.free_energy
    assert (abs(value - energies)[2:] < 4 * error[2:] + 0.05).all()
    alone = sampling.sample(
        wells, jnp.array([-2.0]), rules.SGLD(lr=0.4 / 17, nbeta=16.0, localization=0.25), key=KEY, num_chains=40,
        num_draws=400, num_burnin_steps=150, observables={"w": lambda w: w}, metropolis=True,
    )  # fmt: skip
    assert probability[-1] > 0.5
    assert (alone.observables["w"] > 0).mean() < probability[-1] / 5


@pytest.mark.slow
def test_pairs_take_turns_and_swap_with_the_metropolis_ratio():
    nbeta, chains = jnp.array([0.5, 1.0, 3.0, 4.0]), 20_000
    loss = jnp.repeat(jnp.array([1.0, 1.4, 1.2, jnp.nan]), chains)
    for turn, pairs in ((0, [(0, 1), (2, 3)]), (1, [(1, 2)])):
        none = Tried(jnp.zeros(4 * chains), jnp.zeros(4 * chains, int))
        places, tried = partners(nbeta, loss, Swaps(KEY, 1), turn, none)
        places = np.asarray(places)
        np.testing.assert_array_equal(places[places], np.arange(len(places)))  # two change places with each other
        went = (places - np.arange(len(places))).reshape(4, chains) // chains
        expected = {(0, 1): 1.0, (1, 2): np.exp(-2 * 0.2), (2, 3): 0.0}
        for i, j in pairs:
            p = expected[i, j]
            assert abs((went[i] == 1).mean() - p) <= 4 * np.sqrt(p * (1 - p) / chains)
            np.testing.assert_array_equal(went[i], -went[j])
            np.testing.assert_allclose(tried.rate.reshape(4, chains)[i], p, rtol=1e-5)
        assert set(np.flatnonzero(tried.number.reshape(4, chains)[:, 0])) == {i for i, _ in pairs}


DATA = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)


def of_data(w, batch):
    return jnp.mean((batch - w) ** 2)


def of_batches(**options):
    options = {
        "num_draws": 12,
        "num_chains": 3,
        "batch_size": 10,
        "num_steps_bw_swaps": 5,
        "num_burnin_steps": 2,
    } | options
    sampler = rules.SGLD(lr=0.01, localization=1.0)
    return sampling.parallel_tempering(
        of_data, jnp.zeros(2), sampler, DATA, nbeta=[1.0, 2.0, 4.0], key=KEY, observables={"w": lambda w: w}, **options
    )


@pytest.mark.slow
def test_the_loss_is_that_of_all_data():
    found = of_batches(num_steps_bw_draws=2)
    expected = jax.vmap(jax.vmap(jax.vmap(lambda w: of_data(w, DATA))))(found.observables["w"])
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    assert found.loss.shape == (3, 3, 12)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vmap", "map"])
def test_a_run_goes_on_where_it_was(tmp_path, method):
    path, options = tmp_path / "run", {"chain_method": method}
    of_batches(num_draws=6, checkpoint=path, **options)
    one, both = of_batches(checkpoint=path, **options), of_batches(**options)
    np.testing.assert_array_equal(one.observables["w"], both.observables["w"])
    np.testing.assert_array_equal(one.swap_rate, both.swap_rate)
    with pytest.raises(ValueError, match="its num_steps_bw_swaps is not what was given"):
        of_batches(num_steps_bw_swaps=2, checkpoint=path, **options)


@slow
def test_the_same_chains_whatever_the_method_and_their_number():
    found = of_batches()
    np.testing.assert_allclose(found.loss, of_batches(chain_method="map").loss, rtol=1e-4)
    np.testing.assert_allclose(found.loss[:, :2], of_batches(num_chains=2).loss, rtol=1e-4)


@slow
def test_with_batches_and_control_variates_it_is_right_up_to_the_step_size():
    found = sampling.parallel_tempering(
        of_data, jnp.zeros(2), rules.SGLD(lr=0.02, localization=1.0), DATA, nbeta=[1.0, 2.0, 4.0, 8.0], key=KEY,
        num_chains=40, num_draws=500, num_burnin_steps=500, num_steps_bw_draws=4, num_steps_bw_swaps=2, batch_size=10,
        control_variates=sampling.ControlVariates(),
    )  # fmt: skip
    mean, error = mean_and_error(found.loss)
    stiff, best = 2 * found.nbeta[:, None] / 2 + 1, DATA.mean(0)
    expected = ((1 / stiff + (best / stiff) ** 2).sum(1)) / 2 + ((DATA - best) ** 2).mean()
    assert (abs(mean - expected) < 4 * error + 0.03 * expected).all()


def test_chains_that_diverge_are_left_out():
    loss = np.random.default_rng(0).normal(size=(3, 6, 40))
    nbeta, rate = np.array([1.0, 2.0, 3.0]), np.ones((2, 6))
    diverged = np.full((3, 6), -1)
    diverged[1, 2] = 5
    with_bad = loss.copy()
    with_bad[:, 2] = np.nan
    found = sampling.Tempering(nbeta, with_bad, rate, diverged, {}).free_energy
    without = sampling.Tempering(nbeta, np.delete(loss, 2, 1), rate, np.delete(diverged, 2, 1), {}).free_energy
    np.testing.assert_array_equal(found, without)
    nothing = sampling.Tempering(nbeta, with_bad, rate, np.zeros((3, 6), int), {}).free_energy
    assert np.isnan(nothing).all()
    single = sampling.Tempering(nbeta, loss[:, :1], rate, diverged[:, :1], {}).free_energy
    assert np.isfinite(single.value).all()
    assert np.isnan(single.error).all()


def test_errors():
    for nbeta in ([1.0], 2.0, [2.0, 1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, np.inf], [1.0, np.nan]):
        with pytest.raises(ValueError, match=r"Invalid nbeta: .* two or more finite numbers >= 0"):
            tempered(quadratic, jnp.zeros(3), nbeta)
    with pytest.raises(ValueError, match="sample the prior, but there is none"):
        tempered(quadratic, jnp.zeros(3), [0.0, 1.0], localization=0.0)
    for lr in ([0.1], [0.1, -0.1], 0.1):
        with pytest.raises(ValueError, match=r"Invalid lr: .* a list of 2 numbers >= 0"):
            tempered(quadratic, jnp.zeros(3), [0.5, 1.0], lr=lr)
    with pytest.raises(ValueError, match=r"Invalid num_steps_bw_swaps: 0. It is an int >= 1"):
        tempered(quadratic, jnp.zeros(3), [0.5, 1.0], num_steps_bw_swaps=0)
    with pytest.raises(ValueError, match="observables: the name 'swap_rate' is taken"):
        tempered(quadratic, jnp.zeros(3), [0.5, 1.0], observables={"swap_rate": lambda w: w})
    arguments = {"nbeta": [0.5, 1.0], "key": KEY}
    for sampler, name in ((optax.sgd(0.1), "GradientTransformation"), (rules.SGNHT(), "SGNHT")):
        with pytest.raises(TypeError, match=f"for the rule SGLD, but the sampler is {name}"):
            sampling.parallel_tempering(quadratic, jnp.zeros(3), sampler, **arguments)
    with pytest.raises(ValueError, match="data is a stream of batches"):
        sampling.parallel_tempering(of_data, jnp.zeros(2), rules.SGLD(), lambda key: DATA, **arguments)
