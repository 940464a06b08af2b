"""Control variates: what they do to gradients of batches, and to the posterior that is sampled."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxoptim import rules, sampling
from jaxoptim.sampling import ControlVariates, Observable

slow = pytest.mark.slow
KEY = jax.random.key(3)
N, SIZE, BATCH = 240, 3, 8
NOISE = 2.0
X = np.random.default_rng(0).normal(size=(N, SIZE)).astype(np.float32)
Y = (X @ np.ones(SIZE) + NOISE * np.random.default_rng(1).normal(size=N)).astype(np.float32)
DATA = {"x": X, "y": Y}
SHIFT = np.array([0.1, -0.2, 0.05], np.float32)
HESSIAN = X.T.astype(float) @ X / N
BEST = np.linalg.solve(X.T.astype(float) @ X, X.T.astype(float) @ Y)


def regression(w, batch):
    return jnp.mean((batch["x"] @ w - batch["y"]) ** 2) / (2 * NOISE**2)


def logistic(w, batch):
    return jnp.mean(jax.nn.softplus(batch["x"] @ w) - (batch["y"] > 0) * (batch["x"] @ w))


@dataclasses.dataclass(frozen=True)
class Gradient(Observable):
    def update(self, memory, draw):
        return memory, draw.grads


def at_rest(loss, w, by=None, *, draws=N // BATCH, **options):
    """Loss and gradients of the batches of one epoch, all of one chain that does not move."""
    options = {"batch_size": BATCH, "num_chains": 1, "num_draws": draws} | options
    found = sampling.sample(
        loss, jnp.asarray(w), rules.SGLD(lr=0.0), DATA, key=KEY, observables={"g": Gradient()}, control_variates=by,
        **options,
    )  # fmt: skip
    return np.asarray(found.loss[0], float), np.asarray(found.observables["g"][0], float)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [regression, logistic])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_loss_and_gradient_are_unbiased(loss, microbatches):
    """The batches of an epoch are all data, so that their mean is exact."""
    losses, grads = at_rest(loss, SHIFT, ControlVariates(jnp.full(SIZE, 0.4)), microbatches=microbatches)
    value, grad = jax.value_and_grad(loss)(jnp.asarray(SHIFT), DATA)
    np.testing.assert_allclose(losses.mean(), value, rtol=1e-5)
    np.testing.assert_allclose(grads.mean(0), grad, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_variance_of_the_gradient_is_that_of_the_closed_form():
    r"""Of a linear regression it is that of :math:`x x^T (w - c)`, which goes as the square of the distance."""
    own = np.einsum("ni,nj->nij", X, X).astype(float) / NOISE**2
    share = (1 / BATCH) * (N - BATCH) / (N - 1)  # batches without replacement
    variances = []
    for distance in (1.0, 0.5, 0.25):
        several = sampled_gradients(BEST + distance * SHIFT, ControlVariates(jnp.asarray(BEST)))
        variances.append(several.var((0, 1)))
        expected = share * (own @ (distance * SHIFT)).var(0)
        np.testing.assert_allclose(variances[-1], expected, rtol=0.05)
    np.testing.assert_allclose(variances[0], 4 * variances[1], rtol=1e-3)
    np.testing.assert_allclose(variances[1], 4 * variances[2], rtol=1e-3)
    plain = sampled_gradients(BEST + 0.25 * SHIFT).var((0, 1))
    residuals = X * (X @ (BEST + 0.25 * SHIFT) - Y)[:, None] / NOISE**2
    np.testing.assert_allclose(plain, share * residuals.astype(float).var(0), rtol=0.05)
    assert (plain > 100 * variances[2]).all()


def sampled_gradients(w, by=None):
    found = sampling.sample(
        regression, jnp.asarray(w), rules.SGLD(lr=0.0), DATA, key=KEY, observables={"g": Gradient()}, num_chains=200,
        num_draws=N // BATCH, batch_size=BATCH, control_variates=by,
    )  # fmt: skip
    return np.asarray(found.observables["g"], float)


def test_of_a_loss_that_is_no_quadratic_it_goes_as_the_square_of_the_distance_too():
    center = jnp.full(SIZE, 0.3)
    variances = [
        at_rest(logistic, center + distance * SHIFT, ControlVariates(center))[1].var(0) for distance in (0.5, 0.25)
    ]
    np.testing.assert_allclose(variances[0] / variances[1], 4, rtol=0.1)


def positions(sampler=None, data=DATA, **options):
    options = {"num_chains": 3, "num_draws": 40, "batch_size": BATCH, "start_noise": 0.3} | options
    sampler = rules.SGLD(lr=2e-3, nbeta=float(N)) if sampler is None else sampler
    return sampling.sample(
        regression, jnp.asarray(BEST, jnp.float32), sampler, data, key=KEY, observables={"w": lambda w: w}, **options
    ).observables["w"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vmap", "map"])
def test_a_center_that_is_renewed_at_each_step_gives_the_gradient_of_all_data(method):
    found = positions(control_variates=ControlVariates(renewed_every=1), chain_method=method)
    np.testing.assert_allclose(found, positions(batch_size=None, chain_method=method), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_center_that_is_not_renewed_in_time_is_where_the_chains_began():
    options = {"start_noise": 0.0}
    found = positions(control_variates=ControlVariates(renewed_every=1000), **options)
    np.testing.assert_allclose(found, positions(control_variates=ControlVariates(), **options), rtol=1e-5)


@pytest.mark.slow
def test_between_renewals_the_center_stays():
    """The first gradient after each renewal is exact, and the next ones are not."""
    w = positions(control_variates=ControlVariates(renewed_every=4), num_draws=9)
    gradient = jax.vmap(jax.vmap(lambda w: jax.grad(regression)(w, DATA)))(w)
    found = sampling.sample(
        regression, jnp.asarray(BEST, jnp.float32), rules.SGLD(lr=2e-3, nbeta=float(N)), DATA, key=KEY, num_chains=3,
        num_draws=9, batch_size=BATCH, start_noise=0.3, observables={"g": Gradient()},
        control_variates=ControlVariates(renewed_every=4),
    ).observables["g"]  # fmt: skip
    off = np.abs(found - gradient).max((0, 2))
    assert (off[::4] < 1e-5).all()
    assert (np.delete(off, [0, 4, 8]) > 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "by",
    [ControlVariates(), ControlVariates(renewed_every=10)],
    ids=["center that stays", "renewed center"],
)
def test_the_posterior_of_a_conjugate_model(by):
    """Mean and covariance are those of SGLD with the gradient of all data; without, batches add as much noise again."""
    lr = 8e-3
    k = N * HESSIAN / NOISE**2
    values, vectors = np.linalg.eigh(k)
    expected = (vectors / (values * (1 - lr * values / 4))) @ vectors.T
    options = {"num_chains": 200, "num_draws": 20, "num_steps_bw_draws": 10, "num_burnin_steps": 50, "start_noise": 0.0}
    sampler = rules.SGLD(lr=lr, nbeta=float(N))
    found = np.asarray(positions(sampler, control_variates=by, **options), float)
    error = np.sqrt(np.diag(expected) / found[..., 0].size) * 1.5  # draws ten steps apart are nearly independent
    assert (abs(found.mean((0, 1)) - BEST) < 4 * error).all()
    width = np.cov(found.reshape(-1, SIZE).T)
    np.testing.assert_allclose(np.diag(width), np.diag(expected), rtol=0.15)
    if by.renewed_every is None:
        plain = np.cov(np.asarray(positions(sampler, **options), float).reshape(-1, SIZE).T)
        assert (np.diag(plain) > 1.5 * np.diag(expected)).all()


@pytest.mark.slow
def test_an_estimate_of_the_learning_coefficient_is_better_by_it():
    options = {"key": KEY, "num_chains": 8, "num_draws": 400, "num_burnin_steps": 100, "batch_size": BATCH}
    arguments = regression, jnp.asarray(BEST, jnp.float32), rules.SGLD(lr=2e-3), DATA
    plain = sampling.estimate_llc(*arguments, nbeta=float(N), **options)
    found = sampling.estimate_llc(*arguments, nbeta=float(N), control_variates=ControlVariates(), **options)
    values = np.linalg.eigvalsh(N * HESSIAN / NOISE**2)
    exact = (1 / (1 - 2e-3 * values / 4)).sum() / 2
    assert abs(found.mean - exact) < 4 * found.mcse + 0.02 * exact
    assert found.mcse < plain.mcse / 2
    assert found.trace.std() < plain.trace.std() / 4


SAMPLERS = {"SGNHT": rules.SGNHT(), "SGHMC": rules.SGHMC(), "PSGLD": rules.PSGLD(), "SGD": rules.SGD(lr=0.1)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_them(name):
    sampler, options = SAMPLERS[name], {"start_noise": 0.1, "num_draws": 5}
    found = positions(sampler, control_variates=ControlVariates(renewed_every=1), **options)
    np.testing.assert_allclose(found, positions(sampler, batch_size=None, **options), rtol=1e-3, atol=1e-5)


TREE = {"a": jnp.array([0.3, -0.1]), "held": jnp.array([0.5]), "z": jnp.array([0.2 + 0.1j]), "none": None}


def of_tree(params, batch):
    w = jnp.concatenate([params["a"], params["held"] * jnp.abs(params["z"])])
    return regression(w, batch)


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 1])
def test_trees_with_held_and_complex_arrays(every):
    mask = {"a": None, "held": 0.0, "z": None, "none": None}
    by = ControlVariates(jax.tree.map(lambda x: x + 0.1, TREE) if every is None else None, every)
    sampler = rules.SGLD(lr=1e-3 if every else 0.0, nbeta=float(N), optimize_over=mask)
    options = {"key": KEY, "num_chains": 2, "num_draws": N // BATCH, "observables": {"g": Gradient()}}
    found = sampling.sample(of_tree, TREE, sampler, DATA, batch_size=BATCH, control_variates=by, **options)
    whole = sampling.sample(of_tree, TREE, sampler, DATA, **options)
    got, expected = (of.observables["g"] for of in (found, whole))
    if every is None:
        got, expected = (jax.tree.map(lambda g: g.mean(1), of) for of in (got, expected))
        np.testing.assert_allclose(found.loss.mean(1), whole.loss.mean(1), rtol=1e-5)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("by", [ControlVariates(jnp.zeros(SIZE)), ControlVariates(renewed_every=7)])
def test_a_run_goes_on_where_it_was(tmp_path, by):
    path, options = tmp_path / "run", {"control_variates": by}
    positions(num_draws=10, checkpoint=path, **options)
    np.testing.assert_array_equal(
        positions(num_draws=30, checkpoint=path, **options), positions(num_draws=30, **options)
    )
    for other in (ControlVariates(jnp.ones(SIZE)), ControlVariates(renewed_every=8), None):
        with pytest.raises(ValueError, match="its control_variates is not what was given"):
            positions(num_draws=30, checkpoint=path, control_variates=other)


def test_errors():
    with pytest.raises(ValueError, match="renewed_every renews it"):
        ControlVariates(jnp.zeros(3), 5)
    for every in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"Invalid renewed_every: .* It is an int >= 1"):
            ControlVariates(renewed_every=every)
    with pytest.raises(TypeError, match="an instance of ControlVariates, but got the class ControlVariates"):
        positions(control_variates=ControlVariates)
    with pytest.raises(ValueError, match="Give data and batch_size"):
        positions(control_variates=ControlVariates(), batch_size=None)
    with pytest.raises(ValueError, match="need the gradient of all data"):
        positions(control_variates=ControlVariates(), data=lambda key: DATA, batch_size=None)
    with pytest.raises(ValueError, match="shape"):
        positions(control_variates=ControlVariates(jnp.zeros(4)))
