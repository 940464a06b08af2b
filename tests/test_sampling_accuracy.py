"""The samplers against exact answers, at their finite step sizes: what is left is Monte-Carlo error."""

import math
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from devinterp.slt import mala as devinterp
from numpyro import diagnostics
from scipy.stats import norm

import jaxoptim
import llc_cases as cases
from jaxoptim import rules, sampling

pytestmark = pytest.mark.numbers

KEY = jax.random.key(0)
slow = pytest.mark.slow
WARNING = "jaxoptim.sampling.LLCWarning"
# What is exact is so from any start: estimates warn that it is no minimum.
away = pytest.mark.filterwarnings(f"ignore:params is not near a minimum:{WARNING}")
# Most numbers of chains are primes: not spread over the eight devices of a test session, small steps take less time.


def some(names, fast):
    """All names, but those that are not among the fast ones are slow."""
    return [name if name in fast else pytest.param(name, marks=slow) for name in names]


def check(found, exact, error, precision=0.01):
    """Within four standard errors, which are small enough to notice a wrong constant."""
    found, exact, error = (np.asarray(x, np.float64) for x in (found, exact, error))
    assert np.all(error < precision * abs(exact)), error / exact
    assert np.all(abs(found - exact) < 4 * error), (found - exact) / error


def check_chains(found, exact, precision=0.01):
    """The same for numbers of independent chains, the first axis, whose spread says how large the error is."""
    found = np.asarray(found, np.float64)
    assert len(found) >= 100
    check(found.mean(0), exact, found.std(0, ddof=1) / math.sqrt(len(found)), precision)


def quadratic(w, h):
    """The curvature is data, so that all quadratics of one dimension share a program."""
    return jnp.sum(h[0] * w**2) / 2


# SGLD on quadratics

LOG_SPACED = np.logspace(-2, 2, 10)
HALF = np.arange(10) % 2
QUADRATICS = {
    "one": (np.ones(1), 1009, {}),
    "ten": (np.ones(10), 503, {}),
    "thousand": (np.ones(1000), 17, {}),
    "anisotropic": (LOG_SPACED, 1009, {}),
    "localized": (LOG_SPACED, 1009, {"localization": 1.0}),
    "localized_much": (LOG_SPACED, 1009, {"localization": 100.0}),
    "masked": (LOG_SPACED, 1009, {"mask": HALF}),
    "decaying": (LOG_SPACED, 1009, {"weight_decay": 300.0, "start": 0.01}),
    "all_at_once": (LOG_SPACED, 1009, {"weight_decay": 300.0, "localization": 100.0, "start": 0.01, "mask": HALF}),
}


def sgld(lr, mask=None, **options):
    return rules.SGLD(lr=lr, optimize_over=None if mask is None else jnp.asarray(mask), **options)


@pytest.mark.slow
@away
@pytest.mark.parametrize("case", QUADRATICS)
def test_sgld_on_a_quadratic(case):
    h, chains, options = QUADRATICS[case]
    terms = {name: value for name, value in options.items() if name != "start"}
    nbeta, start = 100.0, options.get("start", 0.0)
    lr = 1 / (nbeta * h.max())
    times = {"draws": 150, "burnin": 5, "every": 2}
    llc = sampling.estimate_llc(
        quadratic, jnp.full(h.shape, start), sgld(lr, **terms), h[None], nbeta=nbeta, key=KEY, num_chains=chains,
        num_draws=150, num_burnin_steps=5, num_steps_bw_draws=2,
    )  # fmt: skip
    at_start = nbeta * np.sum(h * options.get("mask", 1) * start**2) / 2
    exact = cases.sgld_quadratic(h, nbeta, lr, **options, **times) - at_start
    check(llc.mean, exact, cases.sgld_quadratic_mcse(h, nbeta, lr, chains=chains, **options, **times))


STIFF = {"localization": 30.0, "weight_decay": 5.0}
PATH = {"num_burnin_steps": 10, "num_steps_bw_draws": 3}


@pytest.mark.slow
def test_sgld_in_every_coordinate():
    """Second moments, and the covariance over the draws of each chain."""
    h, nbeta, lr, draws = np.array([0.01, 0.5, 10.0, 100.0]), 3.0, 2e-3, 40
    samples = sampling.sample(
        quadratic, jnp.full(4, 0.3), sgld(lr, nbeta=nbeta, **STIFF), h[None], key=KEY, num_chains=4001,
        num_draws=draws,
        observables={"squares": jnp.square, "covariance": sampling.Covariance()}, **PATH,
    )  # fmt: skip
    times = cases.draw_times(draws, 10, 3)
    moments = [cases.sgld_moments(h, nbeta, lr, int(t), start=0.3, **STIFF) for t in times]
    mean, variance = np.moveaxis(moments, 1, 0)
    check_chains(samples.observables["squares"].mean(1), np.mean(mean**2 + variance, axis=0))
    rho = 1 - lr * (nbeta * h + sum(STIFF.values())) / 2
    first, lag = np.minimum.outer(np.arange(draws), np.arange(draws)), abs(times[:, None] - times)
    together = np.sum(rho ** lag[..., None] * variance[first], axis=(0, 1)) / draws
    exact = np.cov(mean.T) + np.diag((variance.sum(0) - together) / (draws - 1))
    found = np.float64(samples.observables["covariance"])
    check_chains(np.diagonal(found, axis1=1, axis2=2), np.diag(exact))
    assert np.all(abs(found.mean(0) - exact) < 4 * found.std(0) / math.sqrt(len(found)))


@pytest.mark.slow
@pytest.mark.parametrize(("burnin", "every"), [(0, 1), (0, 3), (7, 1), (5, 4)])
def test_sgld_transient_draw_by_draw(burnin, every):
    """Each step changes what is expected by a good part: a draw one step early or late is noticed."""
    h, nbeta, lr, chains = np.full(10, 2.0), 10.0, 0.01, 8009
    samples = sampling.sample(
        quadratic, jnp.full(10, 0.05), rules.SGLD(lr=lr, nbeta=nbeta), h[None], key=KEY, num_chains=chains, num_draws=6,
        num_burnin_steps=burnin, num_steps_bw_draws=every,
    )  # fmt: skip
    moments = [cases.sgld_moments(h, nbeta, lr, int(t), start=0.05) for t in cases.draw_times(6, burnin, every)]
    mean, variance = np.moveaxis(moments, 1, 0)
    exact = np.sum(h * (mean**2 + variance), axis=1) / 2
    error = np.sqrt(np.sum(h**2 * (variance**2 / 2 + mean**2 * variance), axis=1) / chains)
    loss = np.asarray(samples.loss, np.float64).mean(0)
    if burnin == 0 and every == 1:
        assert loss[0] == pytest.approx(exact[0], rel=1e-6)  # the loss at the start
        loss, exact, error = loss[1:], exact[1:], error[1:]
    check(loss, exact, error)


def noisy(w, z):
    return 2 * jnp.sum(w**2) / 2 + jnp.mean(z) * jnp.sum(w)


@slow
@pytest.mark.parametrize(
    ("data", "batch"),
    [(3, 2), (4, 1), (5, 2)],
    ids=["one_batch_an_epoch", "single_data", "with_left_over"],
)
def test_sgld_with_minibatches(data, batch):
    """Batches without replacement: those of one epoch are anticorrelated, and so are weights and batch."""
    nbeta, lr, draws, chains = 50.0, 0.01, 20, 4001
    z = np.linspace(-1, 1, data)
    llc = sampling.estimate_llc(
        noisy, jnp.zeros(1), rules.SGLD(lr=lr), z, nbeta=nbeta, key=KEY, num_chains=chains, num_draws=draws,
        batch_size=batch,
    )  # fmt: skip
    assert llc.init_loss == pytest.approx(0, abs=1e-7)
    s = z.var(ddof=1)
    step = np.arange(draws)
    same_epoch = step[:, None] // (data // batch) == step // (data // batch)
    gradient = -s / data * same_epoch + s / batch * np.eye(draws)  # the covariances of the batches' means
    reach = np.tril((1 - lr * nbeta) ** np.maximum(step[:, None] - step - 1, 0), -1)  # h = 2
    weights = reach @ (lr * np.eye(draws) + (lr * nbeta / 2) ** 2 * gradient) @ reach.T
    together = -lr * nbeta / 2 * reach @ gradient
    exact = nbeta * np.mean(np.diag(weights) + np.diag(together))
    if data // batch == 1:
        noise = s / batch * (1 - batch / data)
        assert exact == pytest.approx(cases.sgld_quadratic(2.0, nbeta, lr, draws=draws, grad_noise=noise))
    check_chains(llc.per_chain, exact)


# Samplers with momentum

THREE = np.array([1.0, 5.0, 20.0])


@pytest.mark.slow
@pytest.mark.parametrize("order", ["kick_friction", "ding", "badodab"])
def test_sgnht_on_a_quadratic(order):
    """Many coordinates, which hold the thermostat at its mean."""
    lr, diffusion, each, chains = 0.05, 0.15, 400, 101
    llc = sampling.estimate_llc(
        quadratic, jnp.zeros(3 * each), rules.SGNHT(lr=lr, diffusion_factor=diffusion, order=order),
        np.repeat(THREE, each)[None], nbeta=1.0, key=KEY, num_chains=chains, num_draws=100, num_burnin_steps=300,
    )  # fmt: skip
    terms, alpha = cases.sgnht_quadratic(THREE, lr, diffusion, order)
    error = cases.momentum_quadratic_mcse(THREE, lr, alpha, order, 100, chains * each, diffusion) * each
    check(llc.mean, each * terms.sum(), error, 0.002)
    check_chains(llc.observables["thermostat"].mean(1), alpha, 0.002)


@slow
@pytest.mark.parametrize(("order", "share"), [("euler", 0.0), ("baoab", 0.0), ("euler", 0.3), ("baoab", 0.3)])
def test_sghmc_on_a_quadratic(order, share):
    """An estimate of the gradient's noise takes its share of the heat."""
    lr, alpha, chains = 0.08, 0.3, 1009
    llc = sampling.estimate_llc(
        quadratic, jnp.zeros(3), rules.SGHMC(lr=lr, alpha=alpha, beta=share * alpha, order=order), THREE[None],
        nbeta=1.0, key=KEY, num_chains=chains, num_draws=100, num_burnin_steps=200,
    )  # fmt: skip
    exact = cases.sghmc_quadratic(THREE, lr, alpha, order).sum() * (1 - share)
    error = cases.momentum_quadratic_mcse(THREE, lr, alpha, order, 100, chains) * (1 - share)
    check(llc.mean, exact, error)


@slow
@pytest.mark.parametrize("sampler", [rules.SGNHT, rules.SGHMC])
def test_momentum_with_all_terms(sampler):
    """Mask, localization and weight decay, about a start that is not the minimum; splittings are exact."""
    h, k, chains, free = np.repeat(THREE, 200), np.repeat(THREE, 200) + 6.0, 101, np.arange(600) % 2
    options = {"order": "badodab", "diffusion_factor": 0.2} if sampler is rules.SGNHT else {"order": "baoab"}
    samples = sampling.sample(
        quadratic, jnp.full(600, 0.5),
        sampler(lr=0.05, localization=4.0, weight_decay=2.0, optimize_over=jnp.asarray(free), **options), h[None],
        key=KEY, num_chains=chains, num_draws=100, num_burnin_steps=300,
    )  # fmt: skip
    mean = np.where(free, 4 * 0.5 / k, 0.5)
    check_chains(samples.loss.mean(1), np.sum(h * (mean**2 + free / k)) / 2, 0.002)


# Preconditioned SGLD


@pytest.mark.filterwarnings(f"ignore::{WARNING}")
@pytest.mark.parametrize("corrected", some([False, True], []), ids=["plain", "corrected"])
def test_psgld_frozen_after_its_first_update(corrected):
    """Its preconditioner is then that of the gradient at the start."""
    h, nbeta, lr, eps, start, chains = THREE, 10.0, 2e-3, 0.1, 0.2, 2003
    sampler = rules.PSGLD(lr=lr, eps=eps, alpha=0.99, frozen_after=1, localization=3.0, bias_correction=corrected)
    llc = sampling.estimate_llc(
        quadratic, jnp.full(3, start), sampler, h[None], nbeta=nbeta, key=KEY, num_chains=chains, num_draws=100,
        init_loss=0.0,
    )  # fmt: skip
    size = 1.0 if corrected else math.sqrt(0.01)
    preconditioner = 1 / (eps + size * h * start)
    check_chains(llc.per_chain, cases.psgld_quadratic(h, nbeta, lr, preconditioner, 3.0, draws=100, start=start))


class SquareAvg(sampling.Observable):
    def update(self, memory, draw):
        return memory, draw.state.slots["square_avg"]


@slow
def test_psgld_frozen_on_its_way():
    """Each chain is exact SGLD with the preconditioner that it has come to."""
    h, nbeta, lr, eps, chains = THREE, 10.0, 4e-3, 0.1, 2003
    llc = sampling.estimate_llc(
        quadratic, jnp.zeros(3), rules.PSGLD(lr=lr, eps=eps, alpha=0.9, frozen_after=30), h[None], nbeta=nbeta, key=KEY,
        num_chains=chains, num_draws=100, num_burnin_steps=300, observables={"square_avg": SquareAvg()},
    )  # fmt: skip
    square_avg = llc.observables["square_avg"]
    assert np.all(square_avg[:, :1] == square_avg)
    exact = [cases.psgld_quadratic(h, nbeta, lr, 1 / (eps + np.sqrt(v))) for v in np.float64(square_avg[:, 0])]
    assert np.std(exact) > 0.01
    check(*(lambda x: (x.mean(), np.mean(exact), np.std(x - exact) / math.sqrt(chains)))(llc.per_chain))


def gauss(low, high, points=150):
    """Gauss-Legendre points and weights of the two halves of an interval."""
    node, weight = np.polynomial.legendre.leggauss(points)
    half = (high - low) / 4
    left, weight = low + half * (1 + node), half * weight
    return np.concatenate([left, left + 2 * half]), np.tile(weight, 2)


def stationary(transition):
    """The probabilities that a Markov chain tends to; it all but never leaves the points."""
    kept = transition.sum(1)
    system = (transition / kept[:, None]).T - np.eye(len(transition))
    system[-1] = 1
    law = np.linalg.solve(system, np.eye(len(transition))[-1])
    assert law @ abs(1 - kept) < 1e-5
    return law


def quartic(w):
    return w**4 / 4 + w**2 / 2


@pytest.mark.filterwarnings(f"ignore:The chains disagree:{WARNING}")
@slow
@pytest.mark.parametrize("gamma", [True, False], ids=["with_gamma", "without"])
def test_psgld_needs_gamma_where_alpha_is_zero(gamma):
    """A Markov chain whose law is computed: near the posterior, or near the posterior divided by the preconditioner."""
    lr, eps, nbeta = 0.01, 0.5, 2.0
    llc = sampling.estimate_llc(
        quartic, jnp.zeros(()), rules.PSGLD(lr=lr, eps=eps, alpha=0.0, gamma=gamma), nbeta=nbeta, key=KEY,
        num_chains=3001, num_draws=100, num_burnin_steps=500, num_steps_bw_draws=8,
    )  # fmt: skip
    w, weight = gauss(-2.3, 2.3)
    slope, bend = w**3 + w, 3 * w**2 + 1
    g = 1 / (eps + abs(slope))
    center = w - lr / 2 * (nbeta * g * slope + gamma * g**2 * np.sign(slope) * bend)
    law = stationary(norm.pdf(w, center[:, None], np.sqrt(lr * g)[:, None]) * weight)
    exact = nbeta * law @ quartic(w)
    check_chains(llc.per_chain, exact)
    limit = weight * np.exp(-nbeta * quartic(w)) * (1 if gamma else 1 / g)
    assert exact == pytest.approx(nbeta * limit @ quartic(w) / limit.sum(), rel=0.03)
    assert exact < 0.42 if gamma else exact > 0.7


# Boxes


def folded(path, b):
    return abs((path - b) % (4 * b) - 2 * b) - b


@pytest.mark.parametrize("box", some(["reflect", "clamp"], []))
def test_sgld_in_a_box(box):
    """A minimum beside the centre of the box, at a finite step; clamping leaves atoms on the faces, which we know."""
    b, k, lr, top = 1.0, 3.0, 0.05, 0.5
    samples = sampling.sample(
        lambda w: k * (w - top) ** 2 / 2, jnp.zeros(()), rules.SGLD(lr=lr, bounding_box_size=b, box=box), key=KEY,
        num_chains=4001, num_draws=100, num_burnin_steps=150, num_steps_bw_draws=3,
        observables={"w": lambda w: w, "face": lambda w: jnp.abs(w) == b},
    )  # fmt: skip
    w, weight = gauss(-b, b)
    if box == "clamp":
        w = np.append(w, [-b, b])
    center = (w - lr * k / 2 * (w - top))[:, None]
    if box == "clamp":
        inside = norm.pdf(w[:-2], center, math.sqrt(lr)) * weight
        tails = norm.cdf(-b, center, math.sqrt(lr)), norm.sf(b, center, math.sqrt(lr))
        transition = np.concatenate([inside, *tails], axis=1)
    else:
        images = [norm.pdf(x + 4 * b * m, center, math.sqrt(lr)) for m in (-1, 0, 1) for x in (w, 2 * b - w)]
        transition = sum(images) * weight
    law = stationary(transition)
    check_chains(samples.loss.mean(1), law @ (k * (w - top) ** 2 / 2))
    check_chains(samples.observables["w"].mean(1), law @ w)
    faces = np.asarray(samples.observables["face"], float).mean(1)
    if box == "clamp":
        check_chains(faces, law[-2] + law[-1])
    else:
        assert not faces.any()


BOXED = {
    "sgld": rules.SGLD(lr=0.002),
    "psgld": rules.PSGLD(lr=0.001, eps=0.5, frozen_after=1),
    "sgnht": rules.SGNHT(lr=0.002, diffusion_factor=0.02),
    "sgnht_ding": rules.SGNHT(lr=0.002, diffusion_factor=0.02, order="ding"),
    "sgnht_badodab": rules.SGNHT(lr=0.002, diffusion_factor=0.1, order="badodab"),
    "sghmc": rules.SGHMC(lr=0.002, alpha=0.05),
    "sghmc_baoab": rules.SGHMC(lr=0.002, alpha=0.1, order="baoab"),
}


@slow
@pytest.mark.parametrize("name", BOXED)
def test_reflecting_box_cuts_the_gaussian(name):
    """At steps whose error is below that of the draws."""
    h, b = np.full(300, 4.0), 0.5
    found = sampling.sample(
        quadratic, jnp.zeros(300), BOXED[name].replace(bounding_box_size=b, box="reflect"), h[None], key=KEY,
        num_chains=101, num_draws=20, num_burnin_steps=300, num_steps_bw_draws=10,
        observables={"face": lambda w: jnp.mean(jnp.abs(w) >= b)},
    )  # fmt: skip
    check_chains(found.loss.mean(1), 600 * cases.reflected_gaussian(4.0, b), 0.004)
    assert np.mean(found.observables["face"]) < 1e-5  # where it is rounded there


# Potentials that are not quadratic

POWERS, SCALES = (1, 2, 3), np.array([1.0, 2.0, 0.5])


def quasi(w):
    return sum(c * w[i] ** (2 * power) for i, (c, power) in enumerate(zip(SCALES, POWERS, strict=True)))


@slow
def test_sgld_equipartition():
    """Every coordinate is a Markov chain whose law is computed, and is near 1/(2 k)."""
    lr, nbeta = 6e-3, 10.0
    llc = sampling.estimate_llc(
        quasi, jnp.zeros(3), rules.SGLD(lr=lr), nbeta=nbeta, key=KEY, num_chains=3001, num_draws=100,
        num_burnin_steps=400, num_steps_bw_draws=8, observables={"w": lambda w: w},
    )  # fmt: skip
    exact = []
    for power, scale in zip(POWERS, SCALES, strict=True):
        w, weight = gauss(-1.8, 1.8)
        center = w - lr / 2 * nbeta * scale * 2 * power * w ** (2 * power - 1)
        law = stationary(norm.pdf(w, center[:, None], math.sqrt(lr)) * weight)
        exact.append(nbeta * law @ (scale * w ** (2 * power)))
        assert exact[-1] == pytest.approx(1 / (2 * power), rel=0.035)
    assert sum(exact) == pytest.approx(cases.quasi_homogeneous(POWERS), rel=0.035)
    check_chains(llc.per_chain, sum(exact))
    energy = nbeta * SCALES * np.float64(llc.observables["w"]) ** (2 * np.array(POWERS))
    check_chains(energy.mean(1), exact)


BAOAB = rules.SGHMC(order="baoab")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("a", "b", "nbeta", "sampler", "steps"),
    [
        (1, 1, 100.0, BAOAB.replace(lr=1e-3, alpha=0.05), 800),
        (1, 2, 100.0, BAOAB.replace(lr=1e-3, alpha=0.05), 800),
        (3, 2, 100.0, BAOAB.replace(lr=5e-4, alpha=0.05), 1200),
        (1, 1, 1e4, BAOAB.replace(lr=2e-5, alpha=0.01), 5000),
        (1, 1, 30.0, rules.SGLD(lr=4e-4), 6000),
    ],
    ids=["1_1", "1_2", "3_2", "1_1_cold", "1_1_sgld"],
)
def test_normal_crossing(a, b, nbeta, sampler, steps):
    """Copies of a crossing in a reflecting box, against quadrature."""
    copies = 20
    llc = sampling.estimate_llc(
        lambda w: jnp.sum((w[0] ** a * w[1] ** b) ** 2), jnp.zeros((2, copies)),
        sampler.replace(bounding_box_size=1.0, box="reflect"), nbeta=nbeta, key=KEY, num_chains=211, num_draws=50,
        num_burnin_steps=steps, num_steps_bw_draws=steps // 25,
    )  # fmt: skip
    check_chains(llc.per_chain / copies, cases.normal_crossing(a, b, nbeta, 1.0))


def network(factors, target):
    return jnp.sum((cases.deep_linear_product(factors) - target[0]) ** 2) / 2


def network_llc(widths, rank, sampler, nbeta, **options):
    factors = cases.balanced_factors(widths, rank)
    target = cases.deep_linear_product(factors)
    start = [jnp.asarray(x, jnp.float32) for x in factors]
    return sampling.estimate_llc(network, start, sampler, target[None], nbeta=nbeta, key=KEY, **options)


@slow
@pytest.mark.parametrize(
    ("widths", "nbeta", "sampler", "steps", "chains"),
    [
        ((2, 1, 3), 30.0, BAOAB.replace(lr=1e-3, alpha=0.05), 1200, 401),
        ((4, 3, 8), 1e3, BAOAB.replace(lr=2e-5, alpha=0.005), 4000, 101),
        ((3, 8, 4), 1e3, BAOAB.replace(lr=2e-5, alpha=0.005), 4000, 101),
        ((2, 2, 2), 5.0, rules.SGLD(lr=2e-4), 30_000, 401),
    ],
    ids=["2_1_3", "4_3_8", "3_8_4", "2_2_2_sgld"],
)
def test_network_of_rank_zero(widths, nbeta, sampler, steps, chains):
    """Two layers, from the origin, against the exact value at this temperature."""
    llc = network_llc(
        widths, 0, sampler.replace(localization=1.0), nbeta, num_chains=chains, num_draws=50, num_burnin_steps=steps,
        num_steps_bw_draws=steps // 25,
    )  # fmt: skip
    check_chains(llc.per_chain, cases.rank_zero_network(widths, nbeta, 1.0))


@slow
@pytest.mark.parametrize(
    ("widths", "rank", "lr"),
    [
        ((6, 4, 5), 3, 5e-6),
        ((4, 4, 4, 4), 0, 3e-7),
        ((4, 4, 4, 4), 2, 3e-7),
        ((10, 6, 8, 5), 3, 3e-7),
        ((5, 5, 5, 5, 5), 1, 1e-7),
    ],
    ids=lambda x: "_".join(map(str, x)) if isinstance(x, tuple) else f"rank_{x}" if isinstance(x, int) else "",
)
def test_deep_linear_network_from_its_most_degenerate_point(widths, rank, lr):
    """Near what it tends to as nbeta grows, from below."""
    llc = network_llc(
        widths, rank, BAOAB.replace(lr=lr, alpha=0.002, localization=1.0), 1e4, num_chains=61, num_draws=150,
        num_burnin_steps=5000, num_steps_bw_draws=50,
    )  # fmt: skip
    expected, multiplicity = cases.deep_linear(widths, rank)
    assert llc.mcse < 0.02 * expected
    assert llc.mean == pytest.approx(expected, rel=0.1 if multiplicity == 1 else 0.15)


# MALA


def test_mala_always_accepts_in_a_linear_potential(x64):
    rng = np.random.default_rng(0)
    for lr in (1e-3, 0.1, 10.0):
        slope, x, y = rng.normal(size=(3, 7))
        found = sampling.mala_acceptance(x, slope, slope @ x, y, slope, slope @ y, lr)
        assert 1 - 1e-12 < found <= 1


def test_mala_in_a_quadratic_potential(x64):
    """log alpha = -lr/8 sum k^2 (y^2 - x^2), the same for a tree as for one array."""
    rng = np.random.default_rng(1)
    k, lr, accepted = np.array([0.3, 1.0, 5.0, 2.0, 0.1, 7.0]), 0.3, []
    for x, y in rng.normal(size=(20, 2, 6)):
        given = x, k * x, k @ x**2 / 2, y, k * y, k @ y**2 / 2
        accepted.append(float(sampling.mala_acceptance(*given, lr)))
        assert accepted[-1] == pytest.approx(min(1, math.exp(-lr / 8 * k**2 @ (y**2 - x**2))), rel=1e-12)
        trees = [{"a": v[:2], "b": [v[2:].reshape(2, 2)]} if np.ndim(v) else v for v in given]
        assert float(sampling.mala_acceptance(*trees, lr)) == pytest.approx(accepted[-1], rel=1e-14)
    assert 0 < sum(x == 1 for x in accepted) < 20


def test_mala_is_that_of_devinterp(x64):
    """At any points, gradients and potentials, consistent or not."""
    rng, accepted = np.random.default_rng(2), []
    for _ in range(40):
        x, grad_x, y, grad_y = rng.normal(size=(4, 5))
        u_x, u_y = rng.normal(size=2)
        lr = float(rng.uniform(0.2, 2))
        accepted.append(float(sampling.mala_acceptance(x, grad_x, u_x, y, grad_y, u_y, lr)))
        theirs = devinterp.mala_acceptance_probability(*map(torch.tensor, (x, grad_x, u_x, y, grad_y, u_y)), lr)
        assert accepted[-1] == pytest.approx(float(theirs), rel=1e-12, abs=0)
    assert 0 < sum(x == 1 for x in accepted) < 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("h", "options"),
    [
        (np.ones(1), {}),
        (np.array([1.0, 0.8, 0.5, 0.1]), {}),
        (np.array([1.0, 0.8, 0.5, 0.1]), {"localization": 10.0, "weight_decay": 5.0, "mask": np.array([0, 1, 1, 0])}),
    ],
    ids=["one", "four", "all_terms"],
)
def test_mala_acceptance_of_a_run(h, options):
    """Once stationary, about a start that is not the minimum."""
    nbeta, lr = 50.0, 0.04
    samples = sampling.sample(
        quadratic, jnp.full(h.shape, 0.1), sgld(lr, nbeta=nbeta, **options), h[None], key=KEY, num_chains=1009,
        num_draws=100, num_burnin_steps=50, num_steps_bw_draws=2, observables={"accepted": sampling.MalaAcceptance()},
    )  # fmt: skip
    k = nbeta * h + options.get("localization", 0) + options.get("weight_decay", 0)
    exact = cases.mala_quadratic(k[options.get("mask", np.ones(len(h))) == 1], lr)
    assert 0.5 < exact < 0.9
    check_chains(samples.observables["accepted"].mean(1), exact, 0.003)


# Invariances, with the noise given

TERMS = {"localization": 0.7, "weight_decay": 0.3}
ELEMENTWISE = {
    "sgld": rules.SGLD(lr=0.1, nbeta=2.0, **TERMS),
    "sgld_boxed": rules.SGLD(lr=0.1, nbeta=2.0, bounding_box_size=0.4, box="reflect", **TERMS),
    "psgld": rules.PSGLD(lr=0.1, nbeta=2.0, alpha=0.5, **TERMS),
    "sghmc": rules.SGHMC(lr=0.1, nbeta=2.0, **TERMS),
    "sghmc_baoab": rules.SGHMC(lr=0.1, nbeta=2.0, order="baoab", **TERMS),
}
THERMOSTATS = {
    f"sgnht_{order}": rules.SGNHT(lr=0.1, nbeta=2.0, diffusion_factor=0.2, order=order, **TERMS)
    for order in ("kick_friction", "ding", "badodab")
}
ALL = ELEMENTWISE | THERMOSTATS


def drawn(seed):
    """Weights, curvatures, first momenta, and noise of six steps."""
    rng = np.random.default_rng(seed)
    sizes = {"a": (5,), "b": (2, 3)}
    w, h, momentum, noise = [
        {name: np.float32(rng.normal(size=(*steps, *size)) / 2) for name, size in sizes.items()}
        for steps in ((), (), (), (6,))
    ]
    return w, jax.tree.map(abs, h), momentum, noise


@jax.jit
def path(rule, w, h, momentum, noise, scale):
    """The weights after each step in the potential sum(h w^2/2 + w^4/4), of weights divided by ``scale``."""
    state = jaxoptim.init(rule, w)
    if "momentum" in state.slots:
        state = state._replace(slots=state.slots | {"momentum": momentum})

    def body(carry, noise):
        w, state = carry
        grads = jax.tree.map(lambda w, h: (h * (w / scale) + (w / scale) ** 3) / scale, w, h)
        w, state = jaxoptim.step(rule, w, grads, state, noise=noise)
        return (w, state), w

    return jax.lax.scan(body, (w, state), noise)[1]


def same(found, expected, exact):
    chex.assert_tree_all_finite(found)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        chex.assert_trees_all_close(a, b, rtol=0, atol=0 if exact else 3e-6 * np.max(np.abs(b)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_order_of_leaves_and_coordinates_does_not_matter(name):
    def other(tree):
        return {"y": np.swapaxes(tree["b"], -1, -2), "z": tree["a"][..., ::-1]}

    given = drawn(0)
    found, expected = path(ALL[name], *map(other, given), 1.0), other(path(ALL[name], *given, 1.0))
    same(found, expected, exact=name in ELEMENTWISE)


@pytest.mark.parametrize("c", [2.0, 3.0])
@pytest.mark.parametrize("name", some(ELEMENTWISE, ["psgld"]))
def test_scaling_of_weights_scales_the_rates(name, c):
    """SGLD and SGHMC: lr c^2; PSGLD, whose preconditioner scales too: lr c and eps/c."""
    rule, (w, h, momentum, noise) = ELEMENTWISE[name], drawn(1)
    changes = {name: value / c**2 for name, value in TERMS.items()}
    changes |= {"lr": 0.1 * c, "eps": 0.1 / c} if name == "psgld" else {"lr": 0.1 * c**2}
    changes |= {"bounding_box_size": 0.4 * c} if name == "sgld_boxed" else {}

    def times(tree):
        return jax.tree.map(lambda x: np.float32(c) * x, tree)

    found = path(rule.replace(**changes), times(w), h, times(momentum), noise, c)
    same(found, times(path(rule, w, h, momentum, noise, 1.0)), exact=c == 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_masked_run_is_a_smaller_model(name):
    (w, h, momentum, noise), free = drawn(2), np.array([1, 0, 0, 1, 1])
    momentum = {"a": momentum["a"] * free.astype("f"), "b": 0 * momentum["b"]}
    given = w, h, momentum, noise
    rule = ALL[name].replace(optimize_over={"a": jnp.asarray(free), "b": jnp.asarray(0)})
    masked = jax.tree.map(np.asarray, path(rule, *given, 1.0))
    smaller = path(ALL[name], *({"a": x["a"][..., free == 1]} for x in given), 1.0)
    same({"a": masked["a"][:, free == 1]}, smaller, exact=name in ELEMENTWISE)
    assert np.all(masked["a"][:, free == 0] == w["a"][free == 0])
    assert np.all(masked["b"] == w["b"])


def regression(w, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ w["a"]) @ w["b"] - batch["y"]) ** 2)


def chains(sampler, number, method="auto"):
    """Chains on minibatches; as many devices as divide their number."""
    rng = np.random.default_rng(3)
    data = {"x": rng.normal(size=(11, 2)).astype("f"), "y": rng.normal(size=11).astype("f")}
    start = {"a": jnp.ones((2, 3)) / 2, "b": jnp.ones(3) / 2}
    return sampling.sample(
        regression, start, sampler, data, key=KEY, num_chains=number, num_draws=10, num_burnin_steps=2,
        num_steps_bw_draws=2, batch_size=3, chain_method=method, observables={"covariance": sampling.Covariance()},
    )  # fmt: skip


RUN = {
    "sgld": rules.SGLD(lr=1e-3, nbeta=30.0, localization=5.0, noise_norm=True),
    "sgnht": rules.SGNHT(lr=1e-3, nbeta=30.0),
    "psgld": rules.PSGLD(lr=1e-3, nbeta=30.0, gamma=True),
}


@slow
@pytest.mark.parametrize(
    ("sampler", "number", "method"),
    [
        ("sgld", 1, "map"),
        ("sgld", 8, "map"),
        ("sgld", 11, "vmap"),
        ("sgnht", 11, "map"),
        ("psgld", 11, "map"),
    ],
)
def test_chains_do_not_depend_on_how_they_are_run(sampler, number, method):
    """Eight at once, one on each device, against one alone, one after the other, and all on one device."""
    sampler = RUN[sampler]
    found = chains(sampler, 8, "vmap")
    again = chains(sampler, 8, "vmap")
    chex.assert_trees_all_equal(vars(found), vars(again))
    cores = len(os.sched_getaffinity(0))
    assert len(found.params["a"].sharding.device_set) == max(n for n in (1, 2, 4, 8) if n <= cores)
    assert len(np.unique(found.loss[:, -1])) == 8
    other = chains(sampler, number, method)
    assert number == 8 or len(other.params["a"].sharding.device_set) == 1
    runs = ((run.loss, run.observables, run.params, run.diverged) for run in (found, other))
    first = (jax.tree.map(lambda x: x[: min(8, number)], run) for run in runs)
    chex.assert_trees_all_close(*first, rtol=1e-4, atol=1e-6)


# Results


@pytest.mark.slow
def test_diagnostics_of_an_estimate():
    """Those of numpyro, and near the exact error and effective size of an autoregressive process."""
    h, nbeta, lr, draws = np.ones(1), 100.0, 4e-3, 1500
    llc = sampling.estimate_llc(
        quadratic, jnp.zeros(1), rules.SGLD(lr=lr), h[None], nbeta=nbeta, key=KEY, num_chains=79, num_draws=draws,
        num_burnin_steps=100,
    )  # fmt: skip
    trace = nbeta * (np.float64(llc.loss) - llc.init_loss)
    means = trace.mean(1)
    size = diagnostics.effective_sample_size(trace)
    np.testing.assert_allclose(llc.trace, trace, rtol=1e-12)
    np.testing.assert_allclose(llc.per_chain, means, rtol=1e-12)
    found = [llc.mean, llc.std, llc.mcse, llc.rhat, llc.effective_sample_size]
    expected = [means.mean(), means.std(ddof=1), trace.std(ddof=1) / math.sqrt(size)]
    np.testing.assert_allclose(found, [*expected, diagnostics.split_gelman_rubin(trace), size], rtol=1e-9)
    error = cases.sgld_quadratic_mcse(h, nbeta, lr, draws=draws, chains=79, burnin=100)
    check(llc.mean, cases.sgld_quadratic(h, nbeta, lr), error)
    assert llc.mcse == pytest.approx(error, rel=0.2)
    assert llc.std == pytest.approx(error * math.sqrt(79), rel=0.4)
    exact_size = 79 * cases.effective_sample_size_ar1((1 - lr * nbeta / 2) ** 2, draws)
    assert llc.effective_sample_size == pytest.approx(exact_size, rel=0.2)
    assert abs(llc.rhat - 1) < 0.01


def layers(w, h):
    return sum(jnp.sum(h[name][0] * w[name] ** 2) for name in ("attention", "mlp")) / 2


@away
@slow
def test_refined_coefficients():
    """Each selection has the exact value of its own coordinates; the others stay where they are, and cost nothing."""
    h = {"attention": np.array([1.0, 2.0, 3.0]), "mlp": np.array([0.5, 4.0])}
    start, nbeta, lr, draws, count = 0.05, 20.0, 0.01, 100, 2003
    selections = {
        "expression": (r"attention", [1, 1, 1, 0, 0]),
        "predicate": (lambda name: name == "mlp", [0, 0, 0, 1, 1]),
        "tree": ({"attention": np.array([1, 0, 1]), "mlp": np.array([0, 1])}, [1, 0, 1, 0, 1]),
        "whole_leaf": ({"attention": np.array([0, 0, 1]), "mlp": None}, [0, 0, 1, 1, 1]),
        "all": (np.array(True), [1, 1, 1, 1, 1]),
    }
    llc = sampling.estimate_llc(
        layers, {name: jnp.full(len(x), start) for name, x in h.items()}, rules.SGLD(lr=lr, localization=10.0),
        {name: x[None] for name, x in h.items()}, nbeta=nbeta, key=KEY, num_chains=count, num_draws=draws,
        selections={name: selection for name, (selection, _) in selections.items()},
    )  # fmt: skip
    curvature = np.concatenate(list(h.values()))
    assert llc.loss.shape == (5, count, draws)
    for i, mask in enumerate(np.array([mask for _, mask in selections.values()])):
        options = {"draws": draws, "mask": mask, "start": start}
        exact = cases.sgld_quadratic(curvature, nbeta, lr, 10.0, **options) - nbeta * mask @ curvature * start**2 / 2
        error = cases.sgld_quadratic_mcse(curvature, nbeta, lr, 10.0, chains=count, **options)
        check(llc.mean[i], exact, error)
        assert llc[i].mean == llc.mean[i]


@slow
def test_calibration_is_a_grid_of_estimates():
    """Also of those that diverge; each near its exact value."""
    h, nbeta, draws, count = np.array([1.0, 0.3, 0.1]), 50.0, 60, 3001
    rates, strengths = [0.01, 0.05, 1.0], [0.0, 20.0]
    options = {"nbeta": nbeta, "key": KEY, "num_chains": count, "num_draws": draws, "num_burnin_steps": 4}
    sweep = sampling.calibrate(
        quadratic, jnp.zeros(3), rules.SGLD(), h[None], lr=rates, localization=strengths, **options
    )
    assert np.all(sweep.diverged == [[0], [0], [1]])
    for i, lr in enumerate(rates[:2]):
        for j, localization in enumerate(strengths):
            exact = cases.sgld_quadratic(h, nbeta, lr, localization, draws=draws, burnin=4)
            error = cases.sgld_quadratic_mcse(h, nbeta, lr, localization, draws=draws, chains=count, burnin=4)
            check(sweep.mean[i, j], exact, error)
    for i, j in ((0, 1), (1, 1)):
        rule = rules.SGLD(lr=rates[i], localization=strengths[j])
        llc = sampling.estimate_llc(quadratic, jnp.zeros(3), rule, h[None], **options)
        np.testing.assert_allclose(sweep.trace[i, j], llc.trace, rtol=1e-4, atol=1e-6)
        assert sweep.mean[i, j] == pytest.approx(llc.mean, rel=1e-5)
        assert sweep.std[i, j] == pytest.approx(llc.std, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings(f"ignore::{WARNING}")
@pytest.mark.parametrize("batch_size", [None, 1, 3, 7])
def test_init_loss_is_the_mean_over_all_data(batch_size):
    """Also where the last batch is smaller."""
    data = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    llc = sampling.estimate_llc(
        lambda w, x: jnp.mean((w - x) ** 2), jnp.zeros(()), rules.SGLD(lr=0.0), data, nbeta=2.0, key=KEY, num_chains=1,
        num_draws=70, batch_size=batch_size,
    )  # fmt: skip
    assert llc.init_loss == pytest.approx(np.mean(data**2), rel=1e-6)
    if batch_size != 3:  # whole epochs, of weights that stay
        assert llc.mean == pytest.approx(0, abs=1e-2)
