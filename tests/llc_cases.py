"""Problems whose local learning coefficient is known, and the exact answers for each sampler's finite step.

Conventions, those of the samplers: a loss L, an inverse temperature nbeta, a step size lr; the posterior is
exp(-nbeta L(w) - localization/2 |w - start|^2 - weight_decay/2 |w|^2), and the coefficient is
nbeta (E[L] - L(start)). Every quadratic has its minimum, of value 0, at the origin. "Exact" means up to rounding: what
is left in a comparison is Monte-Carlo error, and `sgld_quadratic_mcse` and `momentum_quadratic_mcse` say how large.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import brentq
from scipy.special import gammainc

Array = NDArray[np.float64]

# SGLD on a quadratic: a Gaussian AR(1) process in every coordinate.


def draw_times(draws: int, burnin: int = 0, every: int = 1) -> NDArray[np.int64]:
    """How many steps the weights have taken when draw j is evaluated: burnin + (j + 1) every - 1.

    A draw is the loss before its step, so the first of a run without burn-in is the loss at the start.
    """
    return burnin + (np.arange(draws) + 1) * every - 1


def _geometric(ratio: Array, terms: int) -> Array:
    """1 + ratio + ... + ratio^(terms-1)."""
    flat = ratio == 1
    return np.where(flat, terms, (1 - ratio**terms) / np.where(flat, 1, 1 - ratio))


def sgld_moments(
    h: ArrayLike,
    nbeta: float,
    lr: ArrayLike,
    steps: int | None = None,
    *,
    localization: ArrayLike = 0.0,
    weight_decay: ArrayLike = 0.0,
    grad_noise: ArrayLike = 0.0,
    start: ArrayLike = 0.0,
) -> tuple[Array, Array]:
    """Mean and variance of every weight after `steps` steps of SGLD on L = sum(h w^2)/2; None: once stationary.

    w <- w - lr/2 (nbeta (h w + sqrt(grad_noise) N') + localization (w - start) + weight_decay w) + sqrt(lr) N.
    With k = nbeta h + localization + weight_decay and rho = 1 - lr k/2, the stationary mean is
    localization start / k and the stationary variance (lr + (lr nbeta/2)^2 grad_noise) / (1 - rho^2), which is
    1 / (k (1 - lr k/4)) without gradient noise. It exists if 0 < lr k < 4.
    """
    h, lr, localization, weight_decay, grad_noise, start = np.broadcast_arrays(
        *(np.asarray(x, np.float64) for x in (h, lr, localization, weight_decay, grad_noise, start))
    )
    k = nbeta * h + localization + weight_decay
    rho = 1 - lr * k / 2
    shift = lr / 2 * localization * start
    kick = lr + (lr * nbeta / 2) ** 2 * grad_noise
    if steps is not None:
        return rho**steps * start + shift * _geometric(rho, steps), kick * _geometric(rho**2, steps)
    if not np.all(abs(rho) < 1):
        raise ValueError(f"no stationary law: lr k must be between 0 and 4, and is {lr * k}")
    return localization * start / k, kick / (lr * k * (1 - lr * k / 4))


def _free(mask: ArrayLike | None, *values: ArrayLike) -> list[Array]:
    """The values, broadcast to one shape, at the coordinates that move."""
    full = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in values), 0.0 if mask is None else mask)[:-1]
    free = np.ones(full[0].shape, bool) if mask is None else np.broadcast_to(np.asarray(mask, bool), full[0].shape)
    return [x[free] for x in full]


def sgld_quadratic(
    h: ArrayLike,
    nbeta: float,
    lr: ArrayLike,
    localization: ArrayLike = 0.0,
    weight_decay: ArrayLike = 0.0,
    draws: int | None = None,
    mask: ArrayLike | None = None,
    *,
    grad_noise: ArrayLike = 0.0,
    start: ArrayLike = 0.0,
    burnin: int = 0,
    every: int = 1,
) -> float:
    """E[nbeta L] of SGLD on L = sum(h w^2)/2, as in `sgld_moments`: nbeta sum(h (mean^2 + variance))/2.

    `draws=None` is the stationary value; otherwise the expectation of the average over the draws of a run from
    `start`, at `draw_times`. Started at 0 without gradient noise, the stationary value is
    sum(nbeta h / (k (1 - lr k/4)))/2, and term i of it is multiplied by 1 - rho_i^(2t) after t steps. Coordinates
    whose mask is 0 stay put and are left out. From another start the coefficient is this less
    nbeta sum(h start^2)/2 over the free coordinates.
    """
    h, lr, localization, weight_decay, grad_noise, start = _free(
        mask, h, lr, localization, weight_decay, grad_noise, start
    )

    def at(steps: int | None) -> float:
        mean, variance = sgld_moments(
            h,
            nbeta,
            lr,
            steps,
            localization=localization,
            weight_decay=weight_decay,
            grad_noise=grad_noise,
            start=start,
        )
        return float(nbeta * np.sum(h * (mean**2 + variance)) / 2)

    return at(None) if draws is None else math.fsum(at(int(t)) for t in draw_times(draws, burnin, every)) / draws


def sgld_quadratic_mcse(
    h: ArrayLike,
    nbeta: float,
    lr: ArrayLike,
    localization: ArrayLike = 0.0,
    weight_decay: ArrayLike = 0.0,
    draws: int = 1,
    chains: int = 1,
    mask: ArrayLike | None = None,
    *,
    grad_noise: ArrayLike = 0.0,
    start: ArrayLike = 0.0,
    burnin: int = 0,
    every: int = 1,
) -> float:
    """Standard deviation of the average of nbeta L over `draws` draws of each of `chains` independent chains.

    Exact, transient included: with mean m_s and variance v_s at draw s, cov(w_s, w_t) = rho^(steps between) v_s = c
    for s <= t, and cov(w_s^2, w_t^2) = 2 c^2 + 4 m_s m_t c. The double sum over s and t is one pass backwards.
    """
    h, lr, localization, weight_decay, grad_noise, start = _free(
        mask, h, lr, localization, weight_decay, grad_noise, start
    )
    ratio = (1 - lr / 2 * (nbeta * h + localization + weight_decay)) ** every
    later, pulled, total = np.zeros_like(h), np.zeros_like(h), np.zeros_like(h)
    for steps in draw_times(draws, burnin, every)[::-1]:
        mean, variance = sgld_moments(
            h,
            nbeta,
            lr,
            int(steps),
            localization=localization,
            weight_decay=weight_decay,
            grad_noise=grad_noise,
            start=start,
        )
        later = 1 + ratio**2 * later
        pulled = mean + ratio * pulled
        total += 2 * variance**2 * (2 * later - 1) + 4 * mean * variance * (2 * pulled - mean)
    return float(np.sqrt(np.sum((nbeta * h / 2) ** 2 * total) / chains) / draws)


def psgld_quadratic(
    h: ArrayLike,
    nbeta: float,
    lr: float,
    preconditioner: ArrayLike,
    localization: ArrayLike = 0.0,
    weight_decay: ArrayLike = 0.0,
    draws: int | None = None,
    mask: ArrayLike | None = None,
    *,
    grad_noise: ArrayLike = 0.0,
    start: ArrayLike = 0.0,
) -> float:
    """E[nbeta L] of preconditioned SGLD with a frozen diagonal G: `sgld_quadratic` with the rates lr G_i."""
    rates = lr * np.asarray(preconditioner, np.float64)
    return sgld_quadratic(h, nbeta, rates, localization, weight_decay, draws, mask, grad_noise=grad_noise, start=start)


def effective_sample_size_ar1(rho: float, draws: int) -> float:
    """Independent draws worth the mean of a stationary AR(1) run: T / (1 + 2 sum_{j<T} (1 - j/T) rho^j).

    Towards T (1 - rho)/(1 + rho) for long runs. The loss of a one-dimensional SGLD chain is correlated like rho^2.
    """
    lags = np.arange(1, draws)
    return float(draws / (1 + 2 * np.sum((1 - lags / draws) * rho**lags)))


def mala_quadratic(k: ArrayLike, lr: float) -> float:
    """Mean Metropolis acceptance E[min(1, alpha)] of SGLD's own steps, once stationary, on U = sum(k w^2)/2.

    log alpha = -lr/8 sum(k^2 (y^2 - x^2)). In one coordinate (y+x)/sqrt2 and (y-x)/sqrt2 are independent Gaussians, so
    that log alpha is -sum(b_i P_i) with P_i the product of two standard normals and
    b = (lr k)^(3/2) / (4 sqrt(1 - lr k/4)). As P has characteristic function (1 + t^2)^(-1/2),
    E[min(1, alpha)] = 1/2 + 1/pi int_0^inf prod_i (1 + b_i^2 t^2)^(-1/2) / (1 + t^2) dt, by the trapezoidal rule in
    log t, whose error is below rounding. With one coordinate this is 1/2 + arccos(b) / (pi sqrt(1 - b^2)).
    """
    x = lr * np.atleast_1d(np.asarray(k, np.float64))
    if not np.all((x >= 0) & (x < 4)):
        raise ValueError(f"no stationary law: lr k must be between 0 and 4, and is {x}")
    b2 = x**3 / (16 * (1 - x / 4))
    t = np.exp(np.arange(-40, 40, 0.1))
    damping = np.exp(-0.5 * sum(np.log1p(b * t**2) for b in b2))
    return float(0.5 + np.sum(0.1 * t * damping / (1 + t**2)) / math.pi)


# Samplers with momentum on a quadratic: a linear recursion of (w, u) in every coordinate.


def _stages(order: str, k: float, lr: float, alpha: float, diffusion: float) -> list[tuple[Array, float]]:
    """A step as maps of (w, u), each followed by Gaussian noise of the given variance on u."""
    kick = np.array([[1, 0], [-lr * k, 1.0]])
    drift = np.array([[1, 1], [0, 1.0]])
    if order == "kick_friction":
        return [(np.diag([1, 1 - alpha]) @ kick, 2 * lr * diffusion), (drift, 0.0)]
    if order in ("ding", "euler"):
        return [(np.array([[1, 0], [-lr * k, 1 - alpha]]), 2 * lr * diffusion), (drift, 0.0)]
    if order in ("badodab", "baoab"):
        half = np.array([[1, 0.5], [0, 1.0]])
        noise = lr * diffusion / alpha * -math.expm1(-2 * alpha)
        return [(kick, 0.0), (half, 0.0), (np.diag([1, math.exp(-alpha)]), noise), (half, 0.0)]
    raise ValueError(f"unknown order {order!r}")


def _stationary(stages: Sequence[tuple[Array, float]]) -> list[Array]:
    """The stationary covariance of (w, u) after each of the stages; the last is that of the whole step."""
    step, noise = np.eye(2), np.zeros((2, 2))
    for matrix, variance in stages:
        step, noise = matrix @ step, matrix @ noise @ matrix.T + np.diag([0, variance])
    if max(abs(np.linalg.eigvals(step))) >= 1:
        raise ValueError("no stationary law: the step is unstable")
    found = [solve_discrete_lyapunov(step, noise)]
    for matrix, variance in stages:
        found.append(matrix @ found[-1] @ matrix.T + np.diag([0, variance]))
    return found[1:]


def sgnht_quadratic(k: ArrayLike, lr: float, diffusion: float, order: str = "kick_friction") -> tuple[Array, float]:
    """(E[nbeta L] of every coordinate, thermostat) of SGNHT on nbeta L = sum(k w^2)/2, once stationary.

    kick_friction:  u <- (1-alpha) (u - lr k w) + sqrt(2 lr a) N;  w <- w + u
    ding:           u <- (1-alpha) u - lr k w + sqrt(2 lr a) N;  w <- w + u
    badodab:        u <- u - lr k w;  w <- w + u/2;  u <- exp(-alpha) u + sqrt(lr a/alpha (1-exp(-2 alpha))) N;
                    w <- w + u/2
    The thermostat is held at the alpha at which E[u^2], averaged over the coordinates, is lr; in badodab E[u^2] is the
    mean of its values after the kick and after the noise. Exact for many coordinates: with d of them alpha moves about
    its mean with variance near lr/d. badodab is exact, 1/2 with alpha = a, at every lr k < 4.
    """
    k = np.asarray(k, np.float64)

    def covariances(alpha: float) -> list[list[Array]]:
        return [_stationary(_stages(order, float(one), lr, alpha, diffusion)) for one in k.ravel()]

    def excess(log_alpha: float) -> float:
        heat = [
            (after[0][1, 1] + after[2][1, 1]) / 2 if order == "badodab" else after[-1][1, 1]
            for after in covariances(math.exp(log_alpha))
        ]
        return float(np.mean(heat)) / lr - 1

    # E[u^2] is about lr a/alpha. In the orders of Euler's kind the friction must stay below 1.
    low, high = math.log(diffusion) - 3, math.log(diffusion) + 3
    alpha = math.exp(brentq(excess, low, high if order == "badodab" else min(high, math.log(0.99)), xtol=1e-13))
    squares = np.array([after[-1][0, 0] for after in covariances(alpha)])
    return k * squares.reshape(k.shape) / 2, alpha


def sghmc_quadratic(k: ArrayLike, lr: float, alpha: float, order: str = "euler") -> Array:
    """E[nbeta L] of every coordinate of SGHMC with friction alpha on nbeta L = sum(k w^2)/2, once stationary.

    euler:  v <- (1-alpha) v - lr k w + sqrt(2 alpha lr) N;  w <- w + v  (Chen et al. 2014)
    baoab:  v <- v - lr k w;  w <- w + v/2;  v <- exp(-alpha) v + sqrt(lr (1-exp(-2 alpha))) N;  w <- w + v/2
    The latter is exact, 1/2, at every lr k < 4.
    """
    if order not in ("euler", "baoab"):
        raise ValueError(f"unknown order {order!r}")
    k = np.asarray(k, np.float64)
    squares = [_stationary(_stages(order, float(one), lr, alpha, alpha))[-1][0, 0] for one in k.ravel()]
    return k * np.reshape(squares, k.shape) / 2


def momentum_quadratic_mcse(
    k: ArrayLike,
    lr: float,
    alpha: float,
    order: str,
    draws: int,
    chains: int = 1,
    diffusion: float | None = None,
) -> float:
    """Standard deviation of the average of nbeta L = sum(k w^2)/2 over stationary chains with friction alpha.

    Any order of `sgnht_quadratic` and `sghmc_quadratic`; `diffusion` is alpha unless given. With c_n = cov(w_0, w_n),
    the variance for one chain and coordinate is k^2/4 sum_n (T - |n|) 2 c_n^2 / T^2. For SGNHT, whose alpha moves, it
    is the value for many coordinates.
    """
    total = 0.0
    for one in np.ravel(np.asarray(k, np.float64)):
        stages = _stages(order, float(one), lr, alpha, alpha if diffusion is None else diffusion)
        step = deep_linear_product([matrix for matrix, _ in stages])
        covariance = _stationary(stages)[-1]
        for lag in range(draws):
            total += one**2 / 2 * (draws - lag) * (2 if lag else 1) * covariance[0, 0] ** 2
            covariance = step @ covariance
    return math.sqrt(total / chains) / draws


# Potentials that are not quadratic.


def reflected_gaussian(k: float, b: float) -> float:
    """E[w^2] of a centred Gaussian of precision k cut to [-b, b], the law in a reflecting box as lr -> 0.

    With z = k b^2/2 and P the regularised incomplete gamma function: P(3/2, z) / P(1/2, z) / k.
    """
    z = k * b**2 / 2
    return float(gammainc(1.5, z) / gammainc(0.5, z) / k) if z > 1e-12 else b**2 / 3


def quasi_homogeneous(powers: Sequence[int]) -> float:
    """E[nbeta K] = sum(1/(2 k_i)) of K = sum(c_i w_i^(2 k_i)) under exp(-nbeta K), at every nbeta and c > 0."""
    return sum(1 / (2 * k) for k in powers)


def _log_panels(low: float, high: float, panels: int) -> tuple[Array, Array]:
    """Points w and weights for integrals over log w, by Gauss-Legendre of order 8 on equal panels."""
    node, weight = np.polynomial.legendre.leggauss(8)
    edges = np.linspace(low, high, panels + 1)
    half = (edges[1] - edges[0]) / 2
    return np.exp((edges[:-1, None] + half * (1 + node)).ravel()), np.tile(half * weight, panels)


def normal_crossing(a: int, b: int, nbeta: float, box: float, localization: float = 0.0, panels: int = 128) -> float:
    """E[nbeta K] of K = (w1^a w2^b)^2 under exp(-nbeta K - localization/2 |w|^2) on [-box, box]^2.

    Gauss-Legendre of order 8 in log w, on equal panels down to 1e-14 box. Twice the panels change it by less than 1e-9.
    """
    w, weight = _log_panels(math.log(1e-14 * box), math.log(box), panels)
    measure = weight * w * np.exp(-localization / 2 * w**2)
    energy = nbeta * np.outer(w ** (2 * a), w ** (2 * b))
    density = np.exp(-energy) * np.outer(measure, measure)
    return float(np.sum(density * energy) / np.sum(density))


def normal_crossing_theory(a: int, b: int) -> tuple[float, int]:
    """(lambda, multiplicity) of (w1^a w2^b)^2 at the origin: 1/(2 max(a, b)), and 2 if a = b, else 1."""
    return 1 / (2 * max(a, b)), 2 if a == b else 1


# Deep linear networks.


def deep_linear(widths: Sequence[int], rank: int) -> tuple[float, int]:
    """(lambda, multiplicity) of a linear network of layer sizes H_0..H_M whose true map has rank r (Aoyagi 2024).

    D_s = H_s - r. S is the set of layers with max_S D < min_rest D, sum_S D >= l max_S D and sum_S D < l min_rest D,
    l = |S| - 1; T = sum_S D and a = T - l (ceil(T/l) - 1). Then
    lambda = (r (H_0 + H_M) - r^2)/2 + a (l - a)/(4 l) - l (l - 1)/4 (T/l)^2 + 1/2 sum_{i<j in S} D_i D_j, and the
    multiplicity is a (l - a) + 1. This is the least over the zeros of the loss, taken at `balanced_factors`.
    """
    if not 0 <= rank <= min(widths):
        raise ValueError(f"no map of rank {rank} through widths {widths}")
    excess = sorted(width - rank for width in widths)
    # S holds the smallest: each condition compares all of S with all of the rest.
    for size in range(2, len(excess) + 1):
        inside, rest = excess[:size], excess[size:]
        ell, total, least = size - 1, sum(inside), min(rest, default=math.inf)
        if inside[-1] < least and ell * inside[-1] <= total < ell * least:
            a = total - ell * (-(-total // ell) - 1)
            pairs = sum(x * y for x, y in itertools.combinations(inside, 2))
            singular = (a * (ell - a) - (ell - 1) * total**2 + 2 * ell * pairs) / (4 * ell)
            return (rank * (widths[0] + widths[-1]) - rank**2) / 2 + singular, a * (ell - a) + 1
    raise AssertionError("every network has such a set")


def balanced_factors(widths: Sequence[int], rank: int) -> list[Array]:
    """[A_1, ..., A_M], A_s of shape (H_s, H_(s-1)): each the identity of size `rank` padded by zeros.

    The most degenerate zero of the loss for the target A_M ... A_1.
    """
    unit = np.arange(max(widths)) < rank
    return [np.diag(unit.astype(np.float64))[:rows, :columns] for columns, rows in itertools.pairwise(widths)]


def deep_linear_product(factors: Sequence[Array]) -> Array:
    """A_M ... A_1, of shape (H_M, H_0)."""
    product = factors[0]
    for factor in factors[1:]:
        product = factor @ product
    return product


def deep_linear_loss(factors: Sequence[Array], target: Array) -> float:
    """Half the squared Frobenius norm of A_M ... A_1 - target: the population loss for whitened inputs."""
    return float(np.sum((deep_linear_product(factors) - target) ** 2) / 2)


def rank_zero_network(widths: tuple[int, int, int], nbeta: float, localization: float, panels: int = 80) -> float:
    """E[nbeta L] of L = |B A|^2 / 2 under exp(-nbeta L - localization/2 (|A|^2 + |B|^2)): two layers, rank 0, exact.

    With A (H, M) and B (N, H), integrating B out leaves the p = min(H, M) eigenvalues x/localization of A A^T
    with density prod_{i<j} |x_i - x_j| prod w(x_i), w = x^((|M-H|-1)/2) e^(-x/2) (1 + c x)^(-N/2) and
    c = nbeta/localization^2. Its integral is the Pfaffian (de Bruijn 1955) of
    Q_ij = int int_{x<y} (x^i y^j - x^j y^i) w(x) w(y), bordered by int x^i w for odd p, and
    E[nbeta L] = -d log Pf(Q)/d log c = -tr(Q^-1 dQ/dlog c)/2. It tends to the lambda of `deep_linear(widths, 0)`.
    """
    m, h, n = widths
    p, c = min(h, m), nbeta / localization**2

    def law(x: Array) -> tuple[Array, Array]:
        """w(x) x, for integrals over log x, and minus its logarithmic derivative by c."""
        weight = x ** ((abs(m - h) + 1) / 2) * np.exp(-x / 2) * (1 + c * x) ** (-n / 2)
        return weight, n / 2 * c * x / (1 + c * x)

    y, y_weight = _log_panels(-math.log1p(c) - 55, math.log(200), panels)
    ratio, ratio_weight = _log_panels(-55, 0, panels)
    x = np.outer(ratio, y)
    (at_x, fall_x), (at_y, fall_y) = law(x), law(y)
    pair = at_x * np.outer(ratio_weight, y_weight * at_y)
    size = p + p % 2
    q, dq = np.zeros((size, size)), np.zeros((size, size))
    for i, j in itertools.combinations(range(size), 2):
        if j < p:
            terms = pair * (x**i * y**j - x**j * y**i)
            q[i, j], dq[i, j] = np.sum(terms), -np.sum(terms * (fall_x + fall_y))
        else:
            terms = y_weight * at_y * y**i
            q[i, j], dq[i, j] = np.sum(terms), -np.sum(terms * fall_y)
    return float(-np.trace(np.linalg.solve(q - q.T, dq - dq.T)) / 2)
