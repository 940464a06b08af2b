"""The Metropolis step: exact against quadrature where plain steps are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxoptim import rules, sampling

KEY = jax.random.key(11)
slow = pytest.mark.slow


def double_well(w):
    return jnp.sum(w**2 / 2 - jnp.log(jnp.cosh(2 * w)) + w / 8)


def winding_valley(w):
    x, y = w
    return x**2 / 2 + 2 * jnp.log(jnp.cosh(2 * (y - jnp.sin(2 * x))))


CASES = {  # the loss, the dimension, the temperature and step size, and how far the grid goes
    "double well": (double_well, 1, 1.5, 1.0, 8.0),
    "winding valley": (winding_valley, 2, 1.0, 0.15, 9.0),
}


def quadrature(loss, dimension, nbeta, reach):
    """Points, and their probabilities."""
    axis = np.linspace(-reach, reach, 4001 if dimension == 1 else 1201)
    points = np.stack(np.meshgrid(*[axis] * dimension, indexing="ij"), -1).reshape(-1, dimension)
    potential = nbeta * np.asarray(jax.vmap(loss)(points), float)
    weights = np.exp(potential.min() - potential)
    return points, weights / weights.sum()


def functions(w):
    """What is averaged: moments and probabilities of sets."""
    first, last = w[..., 0], w[..., -1]
    return np.stack([first, first**2, last, last**2, first > 0.5, first < -1, np.abs(last) < 0.3], -1).astype(float)


def run(case, *, metropolis=True, **options):
    loss, dimension, nbeta, lr, _ = CASES[case]
    options = {
        "num_chains": 400, "num_draws": 100, "num_burnin_steps": 300, "num_steps_bw_draws": 5, "start_noise": 0.5,
    } | options  # fmt: skip
    sampler = rules.SGLD(lr=lr, nbeta=nbeta)
    return sampling.sample(
        loss, jnp.full(dimension, 0.5), sampler, key=KEY, observables={"w": position}, metropolis=metropolis, **options
    )


def position(w):
    return w


@pytest.mark.slow
@pytest.mark.parametrize("case", ["double well", "winding valley"])
def test_it_is_exact_against_quadrature_and_plain_steps_are_not(case):
    loss, dimension, nbeta, _, reach = CASES[case]
    points, probabilities = quadrature(loss, dimension, nbeta, reach)
    exact = probabilities @ functions(points)
    off = {}
    for metropolis in (True, False):
        found = run(case, metropolis=metropolis)
        means = functions(np.asarray(found.observables["w"], float)).mean(1)  # chains are independent
        off[metropolis] = (means.mean(0) - exact) / (means.std(0, ddof=1) / np.sqrt(len(means)))
    assert (abs(off[True]) < 4).all()
    assert abs(off[False]).max() > 10


@pytest.mark.slow
def test_the_probability_that_is_recorded_is_how_often_chains_move():
    found = run("double well", num_steps_bw_draws=1, num_draws=200)
    w, alpha = (np.asarray(found.observables[name], float) for name in ("w", "metropolis_acceptance"))
    moved = (w[:, 1:] != w[:, :-1]).any(-1)
    assert 0.3 < moved.mean() < 0.95
    expected, spread = alpha[:, :-1].sum(), (alpha * (1 - alpha))[:, :-1].sum()
    assert abs(moved.sum() - expected) < 4 * np.sqrt(spread)


@pytest.mark.slow
def test_the_potential_has_all_its_terms():
    """A Gaussian with decay and localization about a center, of which some directions are held."""
    h, nbeta, decay, localization, center = np.array([0.5, 2.0, 9.0]), 3.0, 2.0, 4.0, np.array([1.0, -1.0, 0.5])
    sampler = rules.SGLD(
        lr=0.1, nbeta=nbeta, weight_decay=decay, localization=localization,
        center={"w": jnp.asarray(center), "v": None}, optimize_over={"w": jnp.array([1, 1, 1]), "v": 0.0},
    )  # fmt: skip

    def loss(params, data):
        return jnp.mean(data * params["w"] ** 2) * 3 / 2 + jnp.sum(params["v"])

    found = sampling.sample(
        loss, {"w": jnp.zeros(3), "v": jnp.ones(2)}, sampler, jnp.asarray(np.tile(h, (4, 1))), key=KEY,
        num_chains=4000, num_draws=1, num_burnin_steps=150, observables={"w": lambda params: params["w"]},
        metropolis=True, microbatches=2,
    )  # fmt: skip
    w, stiffness = np.asarray(found.observables["w"][:, 0], float), nbeta * h + decay + localization
    assert float(found.observables["metropolis_acceptance"].mean()) < 0.95
    assert (abs(w.mean(0) - localization * center / stiffness) < 4 / np.sqrt(stiffness * len(w))).all()
    np.testing.assert_allclose(w.var(0), 1 / stiffness, rtol=4 * np.sqrt(2 / len(w)))
    assert (np.asarray(found.params["v"]) == 1).all()


@pytest.mark.slow
def test_a_coefficient_has_no_error_of_the_step_size():
    """That of a quadratic is half its dimension, with steps for which SGLD finds a third more."""
    options = {"nbeta": 100.0, "key": KEY, "num_chains": 8, "num_draws": 800, "num_burnin_steps": 100}
    arguments = (lambda w: jnp.sum(w**2) / 2), jnp.zeros(10), rules.SGLD(lr=0.01)
    found, plain = (sampling.estimate_llc(*arguments, metropolis=which, **options) for which in (True, False))
    assert abs(found.mean - 5) < 4 * found.mcse < 1
    assert plain.mean > 6


def test_a_proposal_where_the_loss_is_not_finite_is_rejected():
    found = sampling.sample(
        lambda w: jnp.sum(jnp.where(w < 1, w**2 / 2, jnp.nan)), jnp.zeros(2), rules.SGLD(lr=1.0), key=KEY,
        num_draws=200, metropolis=True, observables={"w": lambda w: w},
    )  # fmt: skip
    assert (found.diverged < 0).all()
    assert float(found.observables["w"].max()) < 1
    assert np.isfinite(found.observables["metropolis_acceptance"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vmap", "map"])
def test_a_run_goes_on_where_it_was(tmp_path, method):
    options = {"num_chains": 3, "num_burnin_steps": 0, "chain_method": method}
    path = tmp_path / "run"
    run("winding valley", num_draws=10, checkpoint=path, **options)
    both = (
        run("winding valley", num_draws=30, checkpoint=path, **options),
        run("winding valley", num_draws=30, **options),
    )
    np.testing.assert_array_equal(*(of.observables["w"] for of in both))
    with pytest.raises(ValueError, match="its metropolis is not what was given"):
        run("winding valley", metropolis=False, num_draws=30, checkpoint=path, **options)


def test_errors():
    def given(sampler=None, data=None, loss=double_well, w=(0.0, 0.0), metropolis=True, **options):
        sampler = rules.SGLD() if sampler is None else sampler
        sampling.sample(loss, jnp.asarray(w), sampler, data, key=KEY, metropolis=metropolis, **options)

    with pytest.raises(TypeError, match=r"steps of the rule SGLD, but the sampler is SGNHT"):
        given(rules.SGNHT())
    with pytest.raises(ValueError, match="has no box"):
        given(rules.SGLD(bounding_box_size=1.0))
    with pytest.raises(ValueError, match=r"with noise_level=1, but it is 0.5"):
        given(rules.SGLD(noise_level=0.5))
    with pytest.raises(ValueError, match="the loss of all data"):
        given(data=jnp.zeros((4, 2)), loss=lambda w, batch: double_well(w), batch_size=2)
    with pytest.raises(ValueError, match="the loss of all data"):
        given(data=lambda key: jnp.zeros((4, 2)), loss=lambda w, batch: double_well(w))
    with pytest.raises(ValueError, match=r"Invalid metropolis: 1. It is True or False"):
        given(metropolis=1)


@pytest.mark.slow
def test_a_calibration_has_the_rates_of_its_step_sizes_and_their_bias_is_gone():
    """Of plain steps the coefficient is 5 / 2 / (1 - lr * nbeta / 4): 4.2 and 2.5 at these sizes."""
    found = sampling.calibrate(
        lambda w: jnp.sum(w**2) / 2, jnp.zeros(5), rules.SGLD(), lr=[1e-2, 1e-4], localization=[0.0], nbeta=160.0,
        key=KEY, num_chains=20, num_draws=500, num_burnin_steps=100, start_noise=0.08, metropolis=True,
    )  # fmt: skip
    rates = found.observables["metropolis_acceptance"]
    assert rates.shape == found.trace.shape
    assert rates[0].mean() < 0.95 < 0.99 < rates[1].mean()
    assert abs(found.mean[0, 0] - 2.5) < 4 * found.std[0, 0] / np.sqrt(20)
