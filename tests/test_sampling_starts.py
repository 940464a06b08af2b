"""Chains that begin apart, about a center that stays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llc_cases as cases
from jaxoptim import rules, sampling
from jaxoptim.sampling import chains

KEY = jax.random.key(5)
slow = pytest.mark.slow


def quadratic(w, h):
    return jnp.sum(h[0] * w**2) / 2


def positions(params, sampler, data=None, loss=quadratic, **options):
    options = {"key": KEY, "num_draws": 1, "observables": {"w": lambda w: w}} | options
    return sampling.sample(loss, params, sampler, data, **options).observables["w"]


def check_moments(found, mean, variance):
    """Mean and variance over chains, the first axis, within four standard errors of Gaussian numbers."""
    found, number = np.asarray(found, np.float64), len(found)
    assert (abs(found.mean(0) - mean) < 4 * np.sqrt(variance / number)).all()
    assert (abs(found.var(0, ddof=1) - variance) < 4 * variance * math.sqrt(2 / number)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "terms",
    [{"localization": 30.0, "weight_decay": 5.0}, {}],
    ids=["localized about the center", "free"],
)
def test_the_transient_draw_by_draw(terms):
    r"""The start's variance goes as :math:`(1 - \epsilon k/2)^{2t}`; all else is as from the center."""
    h, nbeta, lr, s, every = np.array([0.5, 5.0, 40.0]), 3.0, 5e-3, 0.7, 4
    sampler = rules.SGLD(lr=lr, nbeta=nbeta, **terms)
    found = positions(
        jnp.full(3, 0.3), sampler, h[None], start_noise=s, num_chains=20_011, num_draws=5, num_steps_bw_draws=every
    )
    rho = 1 - lr * (nbeta * h + sum(terms.values())) / 2
    for draw, t in enumerate(cases.draw_times(5, every=every)):
        mean, variance = cases.sgld_moments(h, nbeta, lr, int(t), start=0.3, **terms)
        check_moments(found[:, draw], mean, variance + s**2 * rho ** (2 * t))


def test_in_the_end_the_center_is_that_of_the_parameters():
    """With the force of localization alone, chains about centers of their own would be spread by these too."""
    lr, localization = 0.01, 50.0
    found = positions(
        jnp.full(3, 2.0), rules.SGLD(lr=lr, nbeta=0.0, localization=localization), jnp.zeros((1, 3)), start_noise=1.0,
        num_chains=4001, num_burnin_steps=100,
    )  # fmt: skip
    check_moments(found[:, 0], np.full(3, 2.0), np.full(3, 1 / (localization * (1 - lr * localization / 4))))


def tree_loss(params):
    return sum(jnp.sum(abs(x) ** 2) for x in jax.tree.leaves(params))


TREE = {"w": jnp.array([1.0, 2.0]), "b": jnp.ones(()), "frozen": None, "z": jnp.array([1 + 1j])}
MASK = {"w": jnp.array([1, 0]), "b": 0.0, "frozen": None, "z": None}
SAMPLERS = {
    "SGLD": (rules.SGLD(optimize_over=MASK), True),
    "SGNHT": (rules.SGNHT(optimize_over=MASK), True),
    "SGHMC": (rules.SGHMC(optimize_over=MASK), True),
    "PSGLD": (rules.PSGLD(optimize_over=MASK), True),
    "without mask": (rules.SGLD(), False),
    "no sampler": (rules.SGD(lr=0.1), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_chains_begin_apart_where_the_mask_lets_them(name):
    sampler, is_masked = SAMPLERS[name]
    found = positions(TREE, sampler, loss=tree_loss, start_noise=0.5, num_chains=2003)
    start = jax.tree.map(lambda x: np.asarray(x[:, 0]), found)
    free = [start["w"][:, 0], start["z"].real[:, 0], start["z"].imag[:, 0]]
    held = [start["w"][:, 1] - 1, start["b"]]
    for x in free if is_masked else free + held:
        check_moments(x, 1.0 if x is not start["w"][:, 1] else 2.0, 0.25)
    assert not is_masked or all((x == 1).all() for x in held)
    draws = np.stack(free)
    assert abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 4 / math.sqrt(2003)


@pytest.mark.costly
@pytest.mark.parametrize("box", ["clamp", "reflect"])
def test_chains_begin_in_the_box(box):
    sampler = rules.SGLD(lr=1e-4, bounding_box_size=0.1, box=box)
    start = positions(jnp.ones(3), sampler, jnp.ones((1, 3)), start_noise=1.0, num_chains=101)
    assert (abs(start - 1) <= 0.1 + 1e-6).all()
    assert len(np.unique(start)) > (100 if box == "reflect" else 1)


@pytest.mark.slow
def test_without_noise_all_begin_at_the_parameters_and_chains_are_as_they_were():
    base = {"num_chains": 3, "num_draws": 4}
    plain, zero = (
        positions(jnp.ones(2), rules.SGLD(), jnp.ones((1, 2)), **base, **x) for x in ({}, {"start_noise": 0})
    )
    np.testing.assert_array_equal(plain, zero)
    assert (plain[:, 0] == 1).all()
    apart = positions(jnp.ones(2), rules.SGLD(), jnp.ones((1, 2)), start_noise=0.1, **base)
    one = positions(jnp.ones(2), rules.SGLD(), jnp.ones((1, 2)), start_noise=0.1, **base | {"num_chains": 1})
    np.testing.assert_allclose(apart[:1], one, rtol=1e-6)


class Centers(sampling.Observable):
    """Remembers the parameters that it was made with."""

    def init(self, params):
        return params

    def update(self, memory, draw):
        return memory, draw.params - memory

    def result(self, memory, trace):
        return {"center": memory, "away": trace}


CENTERS = Centers()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
def test_estimates_and_sweeps_begin_apart_and_compare_with_the_loss_at_the_center():
    h, base = np.ones((1, 4)), {"key": KEY, "num_chains": 3, "num_draws": 4, "observables": {"at": CENTERS}}
    llc = sampling.estimate_llc(quadratic, jnp.zeros(4), rules.SGLD(), h, nbeta=5.0, start_noise=1.0, **base)
    before = chains.run_steps._cache_size(), chains.init_chains._cache_size()
    assert llc.init_loss == 0
    assert (llc.observables["at"]["center"] == 0).all()
    np.testing.assert_allclose((llc.observables["at"]["away"] ** 2).sum(-1) / 2, llc.loss, rtol=1e-6)
    assert len(np.unique(llc.loss[:, 0])) == 3
    far = sampling.estimate_llc(quadratic, jnp.zeros(4), rules.SGLD(), h, nbeta=5.0, start_noise=10.0, **base)
    assert (chains.run_steps._cache_size(), chains.init_chains._cache_size()) == before
    np.testing.assert_allclose(far.loss[:, 0], 100 * llc.loss[:, 0], rtol=1e-5)
    masks = [np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])]
    parts = sampling.estimate_llc(
        quadratic, jnp.zeros(4), rules.SGLD(), h, nbeta=5.0, start_noise=1.0, selections=masks, **base
    )
    np.testing.assert_allclose(parts.loss[:, :, 0].sum(0), llc.loss[:, 0], rtol=1e-6)
    sweep = sampling.calibrate(
        quadratic, jnp.zeros(4), rules.SGLD(), h, nbeta=5.0, lr=[0.01, 0.1], localization=[0.0], start_noise=1.0, **base
    )
    np.testing.assert_allclose(sweep.trace[0, 0], llc.trace, rtol=1e-5)
    np.testing.assert_allclose(sweep.trace[1, 0, :, 0], sweep.trace[0, 0, :, 0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
def test_rhat_tells_chains_that_have_not_met():
    """From one point they look as if they had."""

    def rhat(noise):
        return sampling.estimate_llc(
            quadratic, jnp.zeros(4), rules.SGLD(lr=1e-4), np.ones((1, 4)), nbeta=1.0, key=KEY, num_chains=8,
            num_draws=200, start_noise=noise,
        ).rhat  # fmt: skip

    assert rhat(0.0) < 3
    assert rhat(3.0) > 20


@pytest.mark.slow
def test_a_run_that_begins_apart_continues_to_the_last_bit(tmp_path):
    path, base = tmp_path / "run", {"start_noise": 0.5, "num_chains": 2, "num_draws": 4, "key": KEY}
    args = quadratic, jnp.ones(3), rules.SGLD(), np.ones((1, 3))
    whole = sampling.sample(*args, **base)
    sampling.sample(*args, checkpoint=path, **base | {"num_draws": 2})
    np.testing.assert_array_equal(sampling.sample(*args, checkpoint=path, **base).loss, whole.loss)
    for name, value in (("start_noise", 0.6), ("start_noise", 0), ("same_batches", True)):
        with pytest.raises(ValueError, match=f"is of another run: its {name} is not what was given"):
            sampling.sample(*args, checkpoint=path, **base | {name: value})


@pytest.mark.parametrize("noise", [-0.1, math.inf, math.nan, True, "a", None, np.ones(2)], ids=str)
def test_wrong_noise_is_refused(noise):
    with pytest.raises(ValueError, match=r"Invalid start_noise: .*\. It is a finite number >= 0\.") as caught:
        positions(jnp.ones(3), rules.SGLD(), jnp.ones((1, 3)), start_noise=noise)
    assert "\n" not in str(caught.value)
