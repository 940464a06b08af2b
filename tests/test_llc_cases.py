"""The exact answers of `llc_cases`, each against a second way: simulation, quadrature, another formula."""

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import dblquad, quad

import llc_cases as cases

H = np.array([0.02, 1.0, 7.0])
SGLD = {"localization": 3.0, "weight_decay": 0.5, "grad_noise": np.array([0.0, 0.4, 2.0]), "start": 0.3}
ORDERS = ("kick_friction", "ding", "badodab")


def sgld_run(rng, chains, draws, nbeta, lr, localization, weight_decay, grad_noise, start, burnin=0, every=1):
    """nbeta L of SGLD on H, averaged over the draws of each chain."""
    w = np.full((chains, 3), start)
    total = np.zeros(chains)
    for step in range(burnin + draws * every):
        if step >= burnin and (step + 1 - burnin) % every == 0:
            total += nbeta * np.sum(H * w**2, axis=1) / 2
        drift = nbeta * (H * w + np.sqrt(grad_noise) * rng.standard_normal(w.shape))
        drift += localization * (w - start) + weight_decay * w
        w = w - lr / 2 * drift + np.sqrt(lr) * rng.standard_normal(w.shape)
    return total / draws


def z_score(samples, expected):
    return abs(np.mean(samples) - expected) / (np.std(samples, ddof=1) / math.sqrt(len(samples)))


# SGLD


@pytest.mark.parametrize(
    ("lr", "localization", "expected"), [(1e-3, 0.0, 0.5128), (1e-2, 0.0, 0.6667), (1e-2, 50.0, 0.5333)]
)
def test_sgld_of_one_coordinate_is_the_known_value(lr, localization, expected):
    assert cases.sgld_quadratic(1.0, 100.0, lr, localization) == pytest.approx(expected, abs=5e-5)


def test_sgld_transient_is_the_closed_form():
    nbeta, lr, draws = 30.0, 4e-3, 17
    k = nbeta * H
    terms = 1 / (1 - lr * k / 4) / 2
    rho = 1 - lr * k / 2
    expected = np.mean([np.sum(terms * (1 - rho ** (2 * t))) for t in range(draws)])
    assert cases.sgld_quadratic(H, nbeta, lr, draws=draws) == pytest.approx(expected, rel=1e-12)
    assert cases.sgld_quadratic(H, nbeta, lr) == pytest.approx(np.sum(terms), rel=1e-12)
    assert cases.sgld_quadratic(H, nbeta, lr, draws=1) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("burnin", "every"), [(0, 1), (5, 3)])
def test_sgld_draws_and_their_error_are_those_of_a_simulation(burnin, every):
    lr, nbeta, draws = 0.02, 20.0, 12
    options = SGLD | {"burnin": burnin, "every": every}
    samples = sgld_run(np.random.default_rng(0), 40_000, draws, nbeta, lr, **options)
    assert z_score(samples, cases.sgld_quadratic(H, nbeta, lr, draws=draws, **options)) < 3.5
    error = cases.sgld_quadratic_mcse(H, nbeta, lr, draws=draws, chains=len(samples), **options)
    assert np.std(samples) / math.sqrt(len(samples)) == pytest.approx(error, rel=0.03)


def test_sgld_forgets_its_start():
    late = cases.sgld_quadratic(H, 20.0, 0.02, draws=1, burnin=5000, **SGLD)
    assert cases.sgld_quadratic(H, 20.0, 0.02, **SGLD) == pytest.approx(late, rel=1e-12)


def test_sgld_stationary_law_is_a_fixed_point_of_the_step():
    nbeta, lr = 20.0, 0.02
    mean, variance = cases.sgld_moments(H, nbeta, lr, **SGLD)
    k = nbeta * H + SGLD["localization"] + SGLD["weight_decay"]
    rho = 1 - lr * k / 2
    np.testing.assert_allclose(rho * mean + lr / 2 * SGLD["localization"] * SGLD["start"], mean, rtol=1e-12)
    np.testing.assert_allclose(
        rho**2 * variance + lr + (lr * nbeta / 2) ** 2 * SGLD["grad_noise"], variance, rtol=1e-12
    )


def test_sgld_error_is_the_double_sum_over_draws():
    nbeta, lr, draws, every, burnin = 20.0, 0.02, 9, 2, 3
    times = cases.draw_times(draws, burnin, every)
    assert list(times) == [i for i in range(burnin + draws * every) if i >= burnin and (i + 1 - burnin) % every == 0]
    rho = 1 - lr / 2 * (nbeta * H + SGLD["localization"] + SGLD["weight_decay"])
    moments = [cases.sgld_moments(H, nbeta, lr, int(t), **SGLD) for t in times]
    total = 0.0
    for i, j in itertools.product(range(draws), repeat=2):
        c = rho ** abs(times[i] - times[j]) * moments[min(i, j)][1]
        total += np.sum((nbeta * H / 2) ** 2 * (2 * c**2 + 4 * moments[i][0] * moments[j][0] * c))
    found = cases.sgld_quadratic_mcse(H, nbeta, lr, draws=draws, chains=4, burnin=burnin, every=every, **SGLD)
    assert found == pytest.approx(math.sqrt(total / 4) / draws, rel=1e-12)


def test_sgld_counts_only_what_the_mask_frees():
    options = {"localization": 2.0, "draws": 6}
    for function in (cases.sgld_quadratic, cases.sgld_quadratic_mcse):
        masked = function(H, 10.0, 0.01, mask=np.array([1, 0, 1]), **options)
        assert masked == pytest.approx(function(H[[0, 2]], 10.0, 0.01, **options), rel=1e-14)
        assert masked != function(H, 10.0, 0.01, **options)
    # A coordinate that would diverge if it were free does not matter.
    assert cases.sgld_quadratic(np.array([1.0, 1e6]), 1.0, 0.1, mask=[1, 0]) == cases.sgld_quadratic(1.0, 1.0, 0.1)


def test_sgld_of_a_flat_direction_diffuses():
    assert cases.sgld_moments(0.0, 5.0, 0.1, 30)[1] == pytest.approx(3.0)
    for lr in (0.0, 4.0):
        with pytest.raises(ValueError, match="no stationary law"):
            cases.sgld_quadratic(1.0, 1.0, lr)


def test_psgld_is_sgld_with_a_rate_for_each_coordinate():
    g = np.array([30.0, 1.0, 0.2])
    found = cases.psgld_quadratic(H, 20.0, 0.02, g, localization=3.0, grad_noise=0.4, start=0.1, draws=7)
    alone = [
        cases.sgld_quadratic(h, 20.0, 0.02 * gi, localization=3.0, grad_noise=0.4, start=0.1, draws=7)
        for h, gi in zip(H, g, strict=True)
    ]
    assert found == pytest.approx(sum(alone), rel=1e-12)
    # G = 1/k makes every term 1/(2 (1 - lr/4)).
    assert cases.psgld_quadratic(H, 20.0, 0.4, 1 / (20 * H)) == pytest.approx(3 / 1.8, rel=1e-12)


def test_effective_sample_size_is_that_of_the_covariance_matrix():
    for rho in (-0.4, 0.0, 0.9):
        covariance = rho ** abs(np.subtract.outer(np.arange(40), np.arange(40)))
        assert cases.effective_sample_size_ar1(rho, 40) == pytest.approx(40**2 / covariance.sum(), rel=1e-12)
    assert cases.effective_sample_size_ar1(0.9, 100_000) == pytest.approx(100_000 * 0.1 / 1.9, rel=1e-3)
    # The error of a long stationary chain is the one of as many independent draws of chi-squared losses.
    rho, draws = 1 - 0.1 / 2, 2000
    size = cases.effective_sample_size_ar1(rho**2, draws)
    variance = 0.1 / (1 - rho**2)
    error = cases.sgld_quadratic_mcse(1.0, 1.0, 0.1, draws=draws, burnin=1000)
    assert error == pytest.approx(variance / math.sqrt(2 * size), rel=1e-9)


# Metropolis acceptance


@pytest.mark.parametrize("x", [1e-4, 0.1, 1.0, 2.5, 3.9])
def test_acceptance_in_one_coordinate(x):
    b = x**1.5 / (4 * math.sqrt(1 - x / 4))
    closed = math.acos(b) / math.sqrt(1 - b**2) if b < 1 else math.acosh(b) / math.sqrt(b**2 - 1)
    found = cases.mala_quadratic(5.0, x / 5)
    assert found == pytest.approx(0.5 + closed / math.pi, abs=1e-10)

    def lower(q, p):
        """The part where y^2 > x^2: p = (y+x)/sqrt2 and q = (y-x)/sqrt2 in units of their deviations."""
        return math.exp(-b * p * q - (p**2 + q**2) / 2) / (2 * math.pi)

    assert found == pytest.approx(0.5 + 2 * dblquad(lower, 0, 9, 0, 9)[0], abs=1e-6)


@pytest.mark.costly
@pytest.mark.parametrize(
    ("k", "lr"), [(np.array([4.0]), 0.3), (np.array([0.1, 1.0, 6.0]), 0.4), (np.full(50, 3.0), 0.1)]
)
def test_acceptance_is_that_of_a_simulation(k, lr):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((100_000, len(k))) / np.sqrt(k * (1 - lr * k / 4))
    y = x - lr / 2 * k * x + math.sqrt(lr) * rng.standard_normal(x.shape)

    def log_q(to, at):
        return -np.sum((to - at + lr / 2 * k * at) ** 2, axis=1) / (2 * lr)

    log_alpha = np.sum(k * (x**2 - y**2), axis=1) / 2 + log_q(x, y) - log_q(y, x)
    np.testing.assert_allclose(log_alpha, -lr / 8 * np.sum(k**2 * (y**2 - x**2), axis=1), atol=1e-9)
    assert z_score(np.exp(np.minimum(log_alpha, 0)), cases.mala_quadratic(k, lr)) < 3.5


# Momentum


def momentum_run(rng, order, k, lr, alpha, diffusion, coordinates, steps, moving):
    """Mean of k w^2/2 of each coordinate, and of the thermostat, after a burn-in of a tenth."""
    w = rng.standard_normal(coordinates) / math.sqrt(k)
    u = rng.standard_normal(coordinates) * math.sqrt(lr)
    total, thermostat, burnin = np.zeros(coordinates), 0.0, steps // 10
    for step in range(steps + burnin):
        noise = rng.standard_normal(coordinates)
        if order in ("kick_friction", "ding"):
            if order == "ding":
                u = (1 - alpha) * u - lr * k * w
            else:
                u = (1 - alpha) * (u - lr * k * w)
            u += math.sqrt(2 * lr * diffusion) * noise
            w = w + u
            heat = np.mean(u**2)
        else:
            u = u - lr * k * w
            heat = np.mean(u**2) / 2
            w = w + u / 2
            u = math.exp(-alpha) * u + math.sqrt(lr * diffusion / alpha * (1 - math.exp(-2 * alpha))) * noise
            heat += np.mean(u**2) / 2
            w = w + u / 2
        if moving:
            alpha += heat - lr
        if step >= burnin:
            total += k * w**2 / 2
            thermostat += alpha
    return total / steps, thermostat / steps


@pytest.mark.parametrize(
    ("lr", "diffusion", "kick_friction", "thermostat", "ding"),
    [
        (1e-3, 0.01, 0.5026, 0.0103, 0.4974),
        (1e-3, 0.1, 0.5304, 0.1083, 0.4728),
        (1e-2, 0.1, 0.5406, 0.1399, 0.4630),
        (1e-4, 0.1, 0.5296, None, 0.4735),
    ],
)
def test_sgnht_has_the_known_values(lr, diffusion, kick_friction, thermostat, ding):
    value, alpha = cases.sgnht_quadratic(100.0, lr, diffusion, "kick_friction")
    assert value == pytest.approx(kick_friction, abs=6e-5)
    assert thermostat is None or alpha == pytest.approx(thermostat, abs=6e-5)
    assert cases.sgnht_quadratic(100.0, lr, diffusion, "ding")[0] == pytest.approx(ding, abs=6e-5)
    value, alpha = cases.sgnht_quadratic(100.0, lr, diffusion, "badodab")
    assert (value, alpha) == (pytest.approx(0.5, rel=1e-9), pytest.approx(diffusion, rel=1e-9))


@pytest.mark.costly
@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_sgnht_is_that_of_a_simulation(order, moving):
    k, lr, diffusion, coordinates, steps = 100.0, 1e-2, 0.1, 2000, 1500
    expected, alpha = cases.sgnht_quadratic(k, lr, diffusion, order)
    samples, thermostat = momentum_run(
        np.random.default_rng(2), order, k, lr, alpha, diffusion, coordinates, steps, moving
    )
    error = cases.momentum_quadratic_mcse(k, lr, alpha, order, steps, coordinates, diffusion)
    assert abs(np.mean(samples) - expected) < 3.5 * error < 0.01
    assert thermostat == pytest.approx(alpha, rel=0.02)
    assert np.std(samples) / math.sqrt(coordinates) == pytest.approx(error, rel=0.07)


def test_sgnht_shares_one_thermostat_between_coordinates():
    k, lr, diffusion = np.array([1.0, 40.0, 150.0]), 1e-2, 0.1
    value, alpha = cases.sgnht_quadratic(k, lr, diffusion, "ding")
    alone = [cases.sgnht_quadratic(one, lr, diffusion, "ding")[1] for one in k]
    assert min(alone) < alpha < max(alone)
    assert value.shape == (3,)
    same, _ = cases.sgnht_quadratic(np.full(2, 40.0), lr, diffusion, "ding")
    np.testing.assert_allclose(same, cases.sgnht_quadratic(40.0, lr, diffusion, "ding")[0], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "twin"), [("euler", "ding"), ("baoab", "badodab")])
def test_sghmc_is_that_of_a_simulation(order, twin):
    k, lr, alpha, coordinates, steps = 100.0, 1e-2, 0.3, 2000, 1500
    expected = cases.sghmc_quadratic(k, lr, alpha, order)
    samples, _ = momentum_run(np.random.default_rng(3), twin, k, lr, alpha, alpha, coordinates, steps, moving=False)
    error = cases.momentum_quadratic_mcse(k, lr, alpha, order, steps, coordinates)
    assert abs(np.mean(samples) - expected) < 3.5 * error < 0.01


def test_sghmc_by_splitting_is_exact_and_by_euler_is_not():
    k = np.array([1.0, 100.0, 390.0])
    np.testing.assert_allclose(cases.sghmc_quadratic(k, 1e-2, 0.1, "baoab"), 0.5, rtol=1e-9)
    # Without v it is w'' = (2 - alpha - lr k) w' - (1 - alpha) w + noise, an AR(2) process.
    k, one, two = k[:2], 2 - 0.1 - 1e-2 * k[:2], -(1 - 0.1)
    euler = k / 2 * (1 - two) * (2 * 0.1 * 1e-2) / ((1 + two) * ((1 - two) ** 2 - one**2))
    np.testing.assert_allclose(euler, 0.5 / (1 - 1e-2 * k / (2 * (2 - 0.1))), rtol=1e-12)
    np.testing.assert_allclose(cases.sghmc_quadratic(k, 1e-2, 0.1, "euler"), euler, rtol=1e-9)
    with pytest.raises(ValueError, match="unstable"):
        cases.sghmc_quadratic(500.0, 1e-2, 0.1, "euler")
    with pytest.raises(ValueError, match="unknown order"):
        cases.sghmc_quadratic(k, 1e-2, 0.1, "ding")


# Potentials that are not quadratic


@pytest.mark.parametrize(("k", "b"), [(2.0, 0.7), (1.0, 10.0), (1e-6, 3.0), (0.0, 2.0), (100.0, 0.05)])
def test_reflected_gaussian_is_the_quotient_of_integrals(k, b):
    over, under = (quad(lambda w, p=p: w**p * math.exp(-k * w**2 / 2), 0, b)[0] for p in (2, 0))
    assert cases.reflected_gaussian(k, b) == pytest.approx(over / under, rel=1e-7)


def test_quasi_homogeneous_holds_at_every_temperature():
    for nbeta in (3.0, 1e4):
        total = 0.0
        for power, c in [(1, 2.0), (2, 0.5), (3, 7.0)]:
            end = (40 / (nbeta * c)) ** (1 / (2 * power))
            over, under = (
                quad(lambda w, p=p: (f := nbeta * c * w ** (2 * power)) ** p * math.exp(-f), 0, end)[0]  # noqa: B023
                for p in (1, 0)
            )
            total += over / under
        assert cases.quasi_homogeneous((1, 2, 3)) == pytest.approx(total, rel=1e-7)


@pytest.mark.costly
@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (3, 3)])
@pytest.mark.parametrize(("box", "localization"), [(1.0, 0.0), (5.0, 1.0)])
@pytest.mark.parametrize("nbeta", [100.0, 1e6])
def test_normal_crossing_has_converged(a, b, nbeta, box, localization):
    values = [cases.normal_crossing(a, b, nbeta, box, localization, panels) for panels in (128, 256)]
    assert values[0] == pytest.approx(values[1], rel=1e-8)
    assert values[0] == cases.normal_crossing(a, b, nbeta, box, localization)


@pytest.mark.parametrize(("a", "b", "localization"), [(1, 1, 0.0), (2, 1, 0.0), (1, 1, 3.0), (1, 2, 3.0)])
def test_normal_crossing_is_the_quotient_of_integrals(a, b, localization):
    nbeta, box = 20.0, 1.5

    def integral(power):
        def density(y, x):
            energy = nbeta * (x**a * y**b) ** 2
            return energy**power * math.exp(-energy - localization / 2 * (x**2 + y**2))

        return dblquad(density, 0, box, 0, box, epsabs=1e-10, epsrel=1e-10)[0]

    expected = integral(1) / integral(0)
    assert cases.normal_crossing(a, b, nbeta, box, localization) == pytest.approx(expected, rel=1e-7)


def test_normal_crossing_approaches_its_theory():
    # With multiplicity 1 the gap falls like nbeta to the difference of the two candidate lambdas.
    for a, b in [(2, 1), (1, 3), (3, 2)]:
        value, multiplicity = cases.normal_crossing_theory(a, b)
        assert multiplicity == 1
        gaps = [value - cases.normal_crossing(a, b, nbeta, 1.0) for nbeta in (1e12, 1e18)]
        assert 0 < gaps[1] < gaps[0] < 0.04 * value
        assert math.log10(gaps[0] / gaps[1]) == pytest.approx(6 * (1 / (2 * min(a, b)) - value), rel=0.05)
    # With multiplicity 2, d log Z / d log nbeta = -lambda + 1/(log nbeta + constant): the gap falls like 1/log nbeta.
    for a in (1, 2):
        value, multiplicity = cases.normal_crossing_theory(a, a)
        assert multiplicity == 2
        near, far = (1 / (value - cases.normal_crossing(a, a, n, 1.0)) for n in (1e8, 1e12))
        assert far - near == pytest.approx(math.log(1e4), rel=0.01)


# Deep linear networks


@pytest.mark.parametrize(
    ("widths", "rank", "expected", "multiplicity"),
    [
        ((5, 3, 5), 0, 6.5, None),
        ((5, 4, 5), 0, 8.0, None),
        ((4, 3, 8), 0, 6.0, None),
        ((8, 3, 4), 0, 6.0, None),
        ((3, 8, 4), 0, 6.0, None),
        ((5, 3, 5), 2, 9.5, 2),
        ((6, 4, 5), 3, 13.0, None),
        ((4, 4, 4, 4), 0, 5.5, 3),
        ((4, 4, 4, 4), 2, 7.5, 3),
        ((10, 6, 8, 5), 3, 21.0, None),
        ((5, 5, 5, 5, 5), 1, 9.5, None),
        # One unit in each layer: a product of M weights.
        ((1, 1, 1), 0, *cases.normal_crossing_theory(1, 1)),
        ((1, 1, 1, 1), 0, 0.5, 3),
    ],
)
def test_deep_linear_has_the_known_values(widths, rank, expected, multiplicity):
    value, found = cases.deep_linear(widths, rank)
    assert value == pytest.approx(expected, abs=1e-12)
    assert multiplicity is None or found == multiplicity


def reduced_rank(m, h, n, r):
    """Aoyagi and Watanabe 2005: (lambda, multiplicity) of m inputs, h hidden units, n outputs and true rank r."""
    if m + h < n + r:
        return (h * m - h * r + n * r) / 2, 1
    if n + h < m + r:
        return (h * n - h * r + m * r) / 2, 1
    if m + n < h + r:
        return m * n / 2, 1
    odd = (m + h + n + r) % 2
    return (-((h + r) ** 2) - m**2 - n**2 + 2 * (h + r) * (m + n) + 2 * m * n + odd) / 8, 1 + odd


def test_deep_linear_of_two_layers_is_reduced_rank_regression():
    count = 0
    for m, h, n in itertools.product(range(1, 7), repeat=3):
        for r in range(min(m, h, n) + 1):
            value, multiplicity = cases.deep_linear((m, h, n), r)
            expected, times = reduced_rank(m, h, n, r)
            assert (value, multiplicity) == (pytest.approx(expected, abs=1e-12), times), (m, h, n, r)
            count += 1
    assert count == 657


def test_deep_linear_has_one_set_of_layers():
    """The formula as it is printed, over every set of layers."""
    for widths in itertools.product(range(1, 6), repeat=4):
        for rank in range(min(widths) + 1):
            excess = [width - rank for width in widths]
            found = []
            for size in range(2, 5):
                for inside in itertools.combinations(range(4), size):
                    d = [excess[i] for i in inside]
                    rest = min((excess[i] for i in range(4) if i not in inside), default=math.inf)
                    ell, total = size - 1, sum(d)
                    if max(d) < rest and total >= ell * max(d) and total < ell * rest:
                        a = total - ell * (math.ceil(total / ell) - 1)
                        value = (-(rank**2) + rank * (widths[0] + widths[-1])) / 2 + a * (ell - a) / (4 * ell)
                        value -= ell * (ell - 1) / 4 * (total / ell) ** 2
                        value += sum(x * y for x, y in itertools.combinations(d, 2)) / 2
                        found.append((pytest.approx(value, abs=1e-12), a * (ell - a) + 1))
            assert found == [cases.deep_linear(widths, rank)]


def test_deep_linear_does_not_depend_on_the_order_of_layers_but_by_the_rank():
    for widths in itertools.product(range(1, 5), repeat=4):
        for rank in range(min(widths) + 1):
            value, multiplicity = cases.deep_linear(widths, rank)
            regular = (rank * (widths[0] + widths[-1]) - rank**2) / 2
            reduced = tuple(sorted(width - rank for width in widths))
            if reduced[0]:
                expected, times = cases.deep_linear(reduced, 0)
                assert (value, multiplicity) == (pytest.approx(regular + expected, abs=1e-12), times)
            else:
                assert (value, multiplicity) == (pytest.approx(regular, abs=1e-12), 1)
            # Never above the regular model of the matrices that the network can be, or of its weights.
            assert value <= min(widths[0] * widths[-1], sum(x * y for x, y in itertools.pairwise(widths))) / 2


@pytest.mark.parametrize(("widths", "rank"), [((5, 3, 4), 2), ((4, 4, 4, 4), 0), ((6, 3, 5, 4), 3), ((2, 7), 1)])
def test_balanced_factors_are_a_degenerate_zero_of_the_loss(widths, rank):
    factors = cases.balanced_factors(widths, rank)
    assert [factor.shape for factor in factors] == [(y, x) for x, y in itertools.pairwise(widths)]
    assert all(np.linalg.matrix_rank(factor) == rank for factor in factors)
    target = cases.deep_linear_product(factors)
    assert (target.shape, np.trace(target)) == ((widths[-1], widths[0]), rank)
    assert cases.deep_linear_loss(factors, target) == 0
    # The product moves at first order in r (H_0 + H_M) - r^2 directions only, or in all if there is one layer.
    rows = []
    for i, factor in enumerate(factors):
        for place in np.ndindex(factor.shape):
            moved = [x.copy() for x in factors]
            moved[i][place] += 1.0
            rows.append((cases.deep_linear_product(moved) - target).ravel())
    regular = rank * (widths[0] + widths[-1]) - rank**2 if len(factors) > 1 else widths[0] * widths[1]
    assert np.linalg.matrix_rank(np.array(rows)) == regular


def test_deep_linear_loss_is_half_the_mean_squared_error_of_whitened_inputs():
    rng = np.random.default_rng(4)
    factors = [rng.standard_normal((3, 4)), rng.standard_normal((2, 3))]
    target = rng.standard_normal((2, 4))
    inputs = 2 * np.eye(4)
    error = inputs @ factors[0].T @ factors[1].T - inputs @ target.T
    assert cases.deep_linear_loss(factors, target) == pytest.approx(np.mean(np.sum(error**2, axis=1)) / 2)
    with pytest.raises(ValueError, match="no map of rank"):
        cases.deep_linear((3, 2, 3), 3)


def test_rank_zero_network_of_one_unit_is_a_normal_crossing():
    for nbeta, localization in [(10.0, 1.0), (1e6, 2.0)]:
        expected = cases.normal_crossing(1, 1, nbeta / 2, 9.0 / math.sqrt(localization), localization)
        assert cases.rank_zero_network((1, 1, 1), nbeta, localization) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("m", "h", "n"), [(5, 3, 5), (2, 2, 3), (3, 4, 2), (2, 1, 4)])
def test_rank_zero_network_is_that_of_a_simulation(m, h, n):
    """A from its prior, weighted by the integral over B."""
    c, localization = 0.3, 2.0
    matrices = np.random.default_rng(5).standard_normal((40_000, h, m))
    x = np.linalg.eigvalsh(matrices @ matrices.transpose(0, 2, 1)).clip(0)
    weights = np.prod(1 + c * x, axis=1) ** (-n / 2)
    expected = cases.rank_zero_network((m, h, n), c * localization**2, localization)
    values = n / 2 * np.sum(c * x / (1 + c * x), axis=1)
    assert z_score(weights * (values - expected), 0.0) < 3.5
    assert np.average(values, weights=weights) == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(5, 3, 5), (5, 4, 5), (4, 3, 8), (3, 2, 2), (1, 2, 1)])
def test_rank_zero_network_approaches_its_theory(widths):
    """The only check here of the theory's two numbers that is not another statement of the theory."""
    value, multiplicity = cases.deep_linear(widths, 0)
    gaps = [value - cases.rank_zero_network(widths, nbeta, 1.0) for nbeta in (1e8, 1e12)]
    if multiplicity == 1:
        assert 0 < gaps[1] < gaps[0] < 0.005 * value
    else:
        assert 1 / gaps[1] - 1 / gaps[0] == pytest.approx(math.log(1e4), rel=0.01)
    assert cases.rank_zero_network(widths, 1e4, 1.0, 120) == pytest.approx(
        cases.rank_zero_network(widths, 1e4, 1.0), rel=1e-9
    )
    assert cases.rank_zero_network(widths[::-1], 1e4, 1.0) == pytest.approx(
        cases.rank_zero_network(widths, 1e4, 1.0), rel=1e-9
    )
