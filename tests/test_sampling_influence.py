"""What traces tell: covariances of losses, and the numbers of singular learning theory, against exact answers."""

import importlib
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxoptim import rules, sampling

module = importlib.import_module("jaxoptim.sampling.influence")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 50, 3, 2)) + RNG.normal(size=(4, 1, 1, 1))
Y = RNG.normal(size=(4, 50, 5)) + X[..., :1, 0]


def by_hand(x, y, kind, chains):
    """The same with NumPy's covariance, chain by chain."""
    x, y = (of.reshape(*of.shape[:2], -1) for of in (x, y))
    if chains == "mean":
        x, y = x.mean(0)[None], y.mean(0)[None]
    if chains == "pooled":
        x, y = (of.reshape(1, -1, of.shape[-1]) for of in (x, y))

    def covariance(a, b):
        return np.mean([np.cov(u.T, v.T)[: u.shape[1], u.shape[1] :] for u, v in zip(a, b, strict=True)], 0)

    value = covariance(x, y)
    if kind == "correlation":
        value = value / np.sqrt(np.outer(np.diag(covariance(x, x)), np.diag(covariance(y, y))))
    return value


@pytest.mark.costly
@pytest.mark.parametrize("kind", module.KINDS)
@pytest.mark.parametrize("chains", module.CHAINS)
@pytest.mark.parametrize("rows", [None, 4], ids=["in one block", "in blocks"])
def test_influence_and_its_error_are_those_of_numpy(kind, chains, rows, monkeypatch):
    if rows is not None:
        monkeypatch.setattr(module, "_BLOCK", rows * 20)
    found = sampling.influence(X, Y, kind=kind, chains=chains)
    assert found.value.shape == found.error.shape == (3, 2, 5)
    np.testing.assert_allclose(found.value.reshape(6, 5), by_hand(X, Y, kind, chains), atol=1e-6)
    fewer = np.array([by_hand(np.delete(X, c, 0), np.delete(Y, c, 0), kind, chains) for c in range(4)])
    error = np.sqrt(((fewer - fewer.mean(0)) ** 2).sum(0) * 3 / 4)
    np.testing.assert_allclose(found.error.reshape(6, 5), error, atol=1e-6)


def loss_of_each(w, batch):
    return jnp.sum((batch - w) ** 2, -1) / 2


def squares(w):
    return w[:2] ** 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("x", "y", "shape"),
    [
        (sampling.Losses(loss_of_each, "here", batch_size=3), None, (7, 7)),
        (sampling.Losses(loss_of_each, "here"), sampling.Losses(loss_of_each, "there"), (7, 4)),
        (squares, sampling.Losses(loss_of_each, "there"), (2, 4)),
    ],
    ids=["losses", "two probes", "function"],
)
def test_the_online_form_is_that_of_the_traces(x, y, shape):
    probes = {"here": jnp.asarray(RNG.normal(size=(7, 3))), "there": jnp.asarray(RNG.normal(size=(4, 3)))}
    traced = {"x": x} if y is None else {"x": x, "y": y}
    samples = sampling.sample(
        lambda w: jnp.sum(w**2) / 2,
        jnp.zeros(3),
        rules.SGLD(lr=0.02, nbeta=10.0),
        key=jax.random.key(0),
        num_chains=3,
        num_draws=50,
        num_burnin_steps=7,
        num_steps_bw_draws=2,
        probes=probes,
        observables={**traced, "online": sampling.CrossCovariance(x, y)},
    )
    online, traces = np.asarray(samples.observables["online"]), [samples.observables[name] for name in traced]
    assert online.shape == (3, *shape)
    np.testing.assert_allclose(online.mean(0), sampling.influence(*traces).value, rtol=2e-4, atol=1e-6)


def test_the_online_form_is_of_functions_and_losses():
    with pytest.raises(TypeError, match="CrossCovariance is of functions of the parameters and of Losses"):
        sampling.sample(
            lambda w: jnp.sum(w**2) / 2,
            jnp.zeros(3),
            rules.SGLD(),
            key=jax.random.key(0),
            observables={"online": sampling.CrossCovariance(sampling.Covariance())},
        )


def test_small_deviations_from_large_losses_are_not_lost():
    deviations = RNG.normal(size=(3, 40, 6)) * 1e-4
    found = sampling.influence(1000.0 + deviations, chains="pooled")
    np.testing.assert_allclose(found.value, np.cov(deviations.reshape(-1, 6).T), rtol=1e-4, atol=1e-13)


def test_influence_of_a_quadratic_is_the_closed_form():
    """Cov(l_i, l_j) = tr(H_i S H_j S) / 2 + (m - a_i)' H_i S H_j (m - a_j) for l_i = (w - a_i)' H_i (w - a_i) / 2."""
    size, data, draws = 3, 4, 40_000
    root = RNG.normal(size=(size, size)) / 2
    spread, centers = root @ root.T, RNG.normal(size=(data, size))
    hessians = np.array([h @ h.T for h in RNG.normal(size=(data, size, size))])
    mean = RNG.normal(size=size)
    weights = mean + RNG.normal(size=(8, draws // 8, size)) @ root.T
    away = weights[..., None, :] - centers
    losses = np.einsum("ctia,iab,ctib->cti", away, hessians, away) / 2
    found = sampling.influence(losses)
    slopes = np.einsum("iab,ib->ia", hessians, mean - centers)
    products = np.einsum("iab,bc->iac", hessians, spread)
    exact = np.einsum("iab,jba->ij", products, products) / 2 + slopes @ spread @ slopes.T
    assert (np.abs(found.value - exact) < 6 * found.error).all()
    assert (found.error < 0.1 * np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))).all()


def test_one_chain_has_no_error_and_what_does_not_move_no_correlation():
    found = sampling.influence(X[:1], Y[:1])
    assert np.isnan(found.error).all()
    assert np.isfinite(found.value).all()
    still = np.concatenate([Y, np.ones((4, 50, 1))], 2)
    correlation = sampling.influence(still, kind="correlation").value
    assert np.isnan(correlation[-1]).all()
    assert np.isfinite(correlation[:-1, :-1]).all()


@pytest.mark.parametrize(
    ("args", "options", "problem"),
    [
        ((X,), {"kind": "cov"}, "Invalid kind: 'cov'. It is one of 'covariance', 'correlation'"),
        ((X,), {"chains": "stack"}, "Invalid chains: 'stack'. It is one of 'within', 'pooled', 'mean'"),
        ((X, Y[:, :-1]), {}, "of the same chains and draws"),
        ((X[:, :1],), {}, "two draws at least"),
        ((np.where(X > 2, np.nan, X),), {}, "not finite"),
    ],
    ids=["kind", "chains", "other draws", "one draw", "NaN"],
)
def test_traces_that_have_no_influence(args, options, problem):
    with pytest.raises(ValueError, match=problem):
        sampling.influence(*args, **options)


class Regression:
    """Linear regression with unit noise, whose posterior is normal at every temperature, and draws from it."""

    def __init__(self, nbeta, n=300, size=4, draws=20_000, seed=1):
        rng = np.random.default_rng(seed)
        self.n, self.size, self.nbeta, self.beta = n, size, nbeta, nbeta / n
        x = rng.normal(size=(n, size))
        y = x @ rng.normal(size=size) + rng.normal(size=n)
        self.best = np.linalg.lstsq(x, y, rcond=None)[0]
        root = np.linalg.cholesky(np.linalg.inv(self.beta * x.T @ x))
        weights = self.best + rng.normal(size=(8, draws // 8, size)) @ root.T
        self.losses = (y - weights @ x.T) ** 2 / 2 + math.log(2 * math.pi) / 2
        self.residual, self.spread = y - x @ self.best, np.einsum("ia,ab,ib->i", x, root @ root.T, x)
        self.init_loss = float((self.residual**2 / 2).mean() + math.log(2 * math.pi) / 2)

    def variances(self):
        """Var(l_i), exactly."""
        return self.spread**2 / 2 + self.residual**2 * self.spread

    def prediction(self):
        """-log E[p_i], exactly."""
        width = 1 + self.spread
        return self.residual**2 / (2 * width) + np.log(2 * math.pi * width) / 2


@pytest.mark.slow
@pytest.mark.parametrize("nbeta", [300.0, 300 / math.log(300)], ids=["beta 1", "WBIC"])
def test_the_numbers_of_a_regression_are_the_exact_ones(nbeta):
    given = Regression(nbeta)
    found = sampling.singular_learning(given.losses, nbeta, init_loss=given.init_loss)
    exact = {
        "llc": given.size / 2,
        "llc_of_variance": given.size / 2,
        "singular_fluctuation": nbeta / 2 * given.variances().mean(),
        "waic": given.prediction().mean() + given.beta * given.variances().mean(),
    }
    if nbeta < 300:
        exact["wbic"] = given.n * given.init_loss + given.size / (2 * given.beta)
    else:
        assert math.isnan(found.wbic.value)
    for name, value in exact.items():
        estimate = getattr(found, name)
        assert abs(estimate.value - value) < 5 * estimate.error, name
        assert estimate.error < 0.05 * abs(value), name


def test_two_temperatures_give_the_coefficient_without_a_loss_to_compare_with():
    runs = [Regression(nbeta, seed=1) for nbeta in (50.0, 200.0)]
    found = sampling.llc_of_two_temperatures(runs[0].losses, 50.0, runs[1].losses, 200.0)
    assert abs(found.value - 2.0) < 5 * found.error
    assert found.error < 0.1
    other = sampling.llc_of_two_temperatures(runs[1].losses.mean(2), 200.0, runs[0].losses.mean(2), 50.0)
    np.testing.assert_allclose(other.value, found.value)


def walked(h, nbeta, lr, *, localization=0.0, burnin=100, start=0.0, draws=500, chains=8):
    """nbeta-free losses of chains of SGLD on sum(h w^2) / 2, each draw 5 steps after the last, of a datum (no axis)."""
    rng, h = np.random.default_rng(2), np.asarray(h)
    w, losses = np.full((chains, len(h)), start), []
    for step in range(burnin + 5 * draws):
        if step >= burnin and step % 5 == 0:
            losses.append((h * w**2).sum(1) / 2)
        force = nbeta * h * w + localization * (w - start)
        w = w - lr / 2 * force + math.sqrt(lr) * rng.normal(size=w.shape)
    return np.stack(losses, 1)[..., None]


H = np.array([1.0, 2.0, 4.0])
RUNS = {
    "good": ({"lr": 0.01}, None),
    "a long step": ({"lr": 0.06}, "the mean above init_loss, 2."),
    "held": ({"lr": 0.01, "localization": 20.0}, "the mean above init_loss, 0."),
    "no burn-in": ({"lr": 1e-4, "burnin": 0, "start": 3.0}, "the mean above init_loss, "),
    "few chains": ({"lr": 0.06, "chains": 1}, None),
}


@pytest.mark.parametrize(("options", "text"), RUNS.values(), ids=RUNS)
def test_the_coefficients_from_mean_and_variance_disagree_where_a_run_is_set_badly(options, text):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = sampling.singular_learning(walked(H, 10.0, **options), 10.0, init_loss=0.0)
    messages = [str(one.message) for one in caught]
    assert len(messages) == (text is not None), (found, messages)
    for one in caught:
        assert one.category is sampling.LLCWarning
        assert one.filename == __file__
    for message in messages:
        assert text in message
        assert f"from the variance, {found.llc_of_variance.value:.3g} +- " in message
        assert "\n" not in message
        assert len(message) <= 300


@pytest.mark.parametrize("burnin", [500, 0], ids=["good", "no burn-in"])
def test_two_temperatures_disagree_with_the_variances_before_the_chains_are_stationary(burnin):
    runs = [walked(H, nbeta, 0.1 / nbeta, burnin=burnin, start=3.0) for nbeta in (10.0, 20.0)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampling.llc_of_two_temperatures(runs[0], 10.0, runs[1], 20.0)
    texts = [str(one.message) for one in caught]
    assert ["The learning coefficient from two temperatures, " in text for text in texts] == [True] * (burnin == 0)


def test_numbers_without_a_loss_to_compare_with_and_of_one_chain():
    given = Regression(300.0, draws=160)
    found = sampling.singular_learning(given.losses[:1], 300.0)
    assert math.isnan(found.llc.value)
    assert math.isnan(found.waic.error)
    tokens = given.losses.reshape(*given.losses.shape[:2], 100, 3)
    np.testing.assert_allclose(
        [of.value for of in sampling.singular_learning(tokens, 300.0)],
        [of.value for of in sampling.singular_learning(given.losses, 300.0)],
    )


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: sampling.singular_learning(X[..., 0, 0], 10.0), r"\(chains, draws, data\)"),
        (lambda: sampling.singular_learning(np.where(X > 2, np.inf, X), 10.0), "not finite"),
        (lambda: sampling.singular_learning(X, 0.0), "Invalid nbeta: 0.0"),
        (lambda: sampling.llc_of_two_temperatures(X, 10.0, Y, 10.0), "must differ"),
        (lambda: sampling.llc_of_two_temperatures(X, 10.0, Y[:3], 20.0), "as many chains"),
    ],
    ids=["axes", "infinite", "temperature", "equal", "chains"],
)
def test_traces_that_tell_nothing(call, problem):
    with pytest.raises(ValueError, match=problem):
        call()
