"""Susceptibilities: against closed forms, linear response, and the traces of the same chains."""

import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxoptim import rules, sampling
from jaxoptim.sampling import chains

module = importlib.import_module("jaxoptim.sampling.susceptibilities")
KEY = jax.random.key(5)
SIZE, NBETA, LR, GAMMA = 6, 10.0, 0.02, 2.0
SGLD = rules.SGLD(lr=LR, localization=GAMMA)
PARTS = {"two": np.arange(SIZE) < 2, "three": np.arange(SIZE) >= 3, "all": True}
MOVED = {"two": [0, 1], "three": [3, 4, 5], "all": list(range(SIZE))}
LONG = {"nbeta": NBETA, "num_chains": 8, "num_draws": 1500, "num_burnin_steps": 50, "selections": PARTS}


def positive(seed, count):
    """Matrices whose eigenvalues are between 1 and 4."""
    rng = np.random.default_rng(seed)
    turns = np.linalg.qr(rng.normal(size=(count, SIZE, SIZE)))[0]
    return np.einsum("nab,nb,ncb->nac", turns, rng.uniform(1, 4, size=(count, SIZE)), turns)


HESSIAN, HESSIANS = positive(0, 1)[0], positive(1, 4)
SLOPES = np.random.default_rng(2).normal(size=(4, SIZE)) / 8
PROBES = {"x": {"h": HESSIANS, "g": SLOPES}, "y": {"h": HESSIAN[None] * [[[0.5]], [[2.0]]], "g": SLOPES[:2] * 0}}


def quadratic(w, hessian):
    return w @ hessian @ w / 2


def of_each(w, batch):
    return jnp.einsum("a,nab,b->n", w, batch["h"], w) / 2 + batch["g"] @ w


def run(baseline, hessian=HESSIAN, probes=PROBES, key=KEY, **changes):
    options = LONG | {"probes": probes, "loss_of_each": of_each, "baseline": baseline, "key": key} | changes
    return sampling.susceptibilities(quadratic, jnp.zeros(SIZE), SGLD, hessian, **options)


def spread(hessian, part, lr=LR):
    """The stationary covariance of SGLD that moves some parameters: (K (1 - lr K / 4))^-1."""
    own = NBETA * hessian[np.ix_(part, part)] + GAMMA * np.eye(len(part))
    return np.linalg.inv(own @ (np.eye(len(part)) - lr * own / 4))


def exact(hessian, other, part, baseline, lr=LR):
    """-tr(A S B S) / 2 - tr(A S) (tr(B S) - tr(B S) of all) / 4, with B = H_x - H."""
    inside, cov, excess = np.ix_(part, part), spread(hessian, part, lr), other - hessian
    value = -np.trace(hessian[inside] @ cov @ excess[inside] @ cov) / 2
    if baseline == "full":
        gap = np.trace(excess[inside] @ cov) - np.trace(excess @ spread(hessian, list(range(SIZE)), lr))
        value -= np.trace(hessian[inside] @ cov) * gap / 4
    return value


@pytest.mark.costly
@pytest.mark.parametrize("baseline", module.BASELINES)
def test_susceptibilities_of_a_quadratic_are_the_closed_form(baseline):
    found = run(baseline)
    assert found.names == ("two", "three", "all")
    assert found.baseline == baseline
    for probe, of in PROBES.items():
        value = np.array([[exact(HESSIAN, h, MOVED[name], baseline) for h in of["h"]] for name in found.names])
        assert found.chi[probe].shape == found.std_error[probe].shape == value.shape
        assert (np.abs(found.chi[probe] - value) < 5 * found.std_error[probe]).all()
        assert (found.std_error[probe] < 0.2 * np.abs(value).max(1, keepdims=True)).all()
        column = found.response.columns.index(probe)
        np.testing.assert_allclose(found.response.matrix[:, column], found.chi[probe].mean(1), rtol=1e-6)
        gap = np.abs(found.response.matrix[:, column] - value.mean(1))
        assert (gap < 5 * found.response.std_error[:, column]).all()


@pytest.mark.slow
def test_with_a_metropolis_step_they_are_those_of_the_posterior():
    """The closed form of a step of no size; that of plain steps is many errors off."""
    found = run("component", metropolis=True)
    of_all = found.chi["y"][2], found.std_error["y"][2]
    exactly, plain = (
        np.array([exact(HESSIAN, h, MOVED["all"], "component", lr) for h in PROBES["y"]["h"]]) for lr in (0, LR)
    )
    assert (np.abs(of_all[0] - exactly) < 5 * of_all[1]).all()
    assert (np.abs(of_all[0] - plain) > 5 * of_all[1]).any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
def test_with_control_variates_batches_are_as_good_as_all_data():
    """The gradients of these batches differ by a constant, which the center tells."""
    data = jnp.asarray(np.random.default_rng(3).normal(size=(32, SIZE)))

    def loss(w, x):
        return jnp.mean(jnp.sum((w - x) ** 2, -1)) / 2

    def chi(**changes):
        options = {"nbeta": NBETA, "key": KEY, "num_chains": 3, "num_draws": 50, "probes": {"x": data[:4]}}
        return sampling.susceptibilities(loss, jnp.mean(data, 0), SGLD, data, **options | changes).chi["x"]

    of_batches = chi(batch_size=2, control_variates=sampling.ControlVariates())
    np.testing.assert_allclose(of_batches, chi(), rtol=1e-3, atol=1e-5)
    assert np.abs(chi(batch_size=2) / chi() - 1).max() > 0.1


def test_the_full_baseline_turns_the_sign_of_a_small_part():
    """With the same curvature everywhere it is -d_C h b v^2 / 2 times 1 - (d - d_C) / 2, which is -1 for 2 of 6."""
    h, b = 2.0, 1.0
    probes = {"x": {"h": np.tile((h + b) * np.eye(SIZE), (4, 1, 1)), "g": SLOPES * 0}, "y": PROBES["y"]}
    v = spread(h * np.eye(SIZE), [0])[0, 0]
    size = 2 * h * b * v**2 / 2
    for baseline, value in (("component", -size), ("full", size)):
        found = run(baseline, h * np.eye(SIZE), probes)
        assert abs(found.chi["x"][0, 0] - value) < 4 * found.std_error["x"][0, 0]
        assert found.std_error["x"][0, 0] < 0.2 * size


def test_other_data_probes_and_keys_compile_nothing_new():
    run("full")
    before = chains.run_steps._cache_size(), chains.init_chains._cache_size(), chains.results._cache_size()
    others = jax.tree.map(lambda x: x + 0.1, PROBES)
    found = run("component", HESSIAN * 1.1, others, jax.random.key(8))
    assert (chains.run_steps._cache_size(), chains.init_chains._cache_size(), chains.results._cache_size()) == before
    assert (found.chi["x"] != run("component").chi["x"]).all()


@pytest.mark.slow
def test_errors_are_as_large_as_the_spread_of_repeated_runs():
    found = [run("full", key=key) for key in jax.random.split(jax.random.key(1), 16)]
    values, errors = (np.stack([getattr(of, name)["x"] for of in found]) for name in ("chi", "std_error"))
    ratio = np.sqrt((errors**2).mean(0) / values.var(0, ddof=1))
    assert 0.75 < np.exp(np.log(ratio).mean()) < 1.35


ROWS = np.random.default_rng(3).normal(size=(12, 3))
TARGETS = np.random.default_rng(4).normal(size=12)


def of_rows(w, rows, targets):
    return jnp.log(jnp.cosh(rows @ w - targets)) + jnp.sum(w**2) / 2


def weighted(w, batch):
    return jnp.sum(batch["weight"] * of_rows(w, batch["row"], batch["target"]))


def one_row(w, batch):
    return of_rows(w, batch["row"], batch["target"])


def mean_of_rows(w):
    return of_rows(w, ROWS, TARGETS).mean()


@pytest.mark.slow
def test_a_component_answers_to_weights_of_data_as_its_susceptibility_says():
    r"""d E[L] / dh of the loss (1 - h) L + h l_x is n beta chi_x, by differences of chains with the same noise."""
    data = {"row": ROWS, "target": TARGETS, "weight": np.full(12, 1 / 12)}
    solve = jax.jit(jax.grad(mean_of_rows))
    best = jnp.zeros(3)
    for _ in range(200):
        best -= 0.5 * solve(best)
    nbeta, step, number = 10.0, 0.1, 3
    options = {"num_chains": 256, "num_draws": 160, "num_burnin_steps": 100, "num_steps_bw_draws": 4, "key": KEY}
    sampler = rules.SGLD(lr=0.01, nbeta=nbeta)
    probe = {"row": ROWS[number:][:1], "target": TARGETS[number:][:1]}
    chi = sampling.susceptibilities(
        weighted, best, sampler, data, probes={"x": probe}, loss_of_each=one_row, nbeta=nbeta, **options
    )
    means = []
    for h in (step, -step):
        weights = (1 - h) * data["weight"] + h * (np.arange(12) == number)
        samples = sampling.sample(
            weighted, best, sampler, data | {"weight": weights}, observables={"L": mean_of_rows}, **options
        )
        means.append(np.asarray(samples.observables["L"], np.float64).mean(1))
    response = (means[0] - means[1]) / (2 * step * nbeta)
    value, error = chi.chi["x"][0, 0], chi.std_error["x"][0, 0]
    bound = 4 * np.hypot(error, response.std(ddof=1) / np.sqrt(256))
    assert abs(value) > 3 * bound
    # The law of the chains is that of the loss to first order in lr, which is a twentieth of its greatest stable value.
    assert abs(response.mean() - value) < bound + 0.1 * abs(value)


TRAIN = np.random.default_rng(6).normal(size=(10, 3)).astype(np.float32)
TOKENS = np.random.default_rng(7).normal(size=(5, 4, 3)).astype(np.float32)
PART = np.array([1, 0, 1])
START = jnp.array([0.3, -0.2, 0.1])
FEW = {"key": KEY, "nbeta": 5.0, "num_chains": 3, "num_draws": 6, "num_burnin_steps": 2, "num_steps_bw_draws": 2}


def squares(w, batch):
    return (batch @ w - 0.5) ** 2 / 2


def mean_square(w, batch):
    return squares(w, batch).mean()


def by_hand(phi, excess, whole, baseline):
    """The estimator from traces, (chains, draws) and (chains, draws, ...)."""
    mean, size = phi.mean(), phi.size
    shape = phi.shape + (1,) * (excess.ndim - 2)
    covariance = ((phi - mean).reshape(shape) * (excess - excess.mean((0, 1)))).sum((0, 1)) / (size - 1)
    return -covariance - (mean * (excess.mean((0, 1)) - whole.mean((0, 1))) if baseline == "full" else 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
@pytest.mark.parametrize(
    ("baseline", "reference", "size"),
    [("full", None, 3), ("component", "train", None)],
    ids=["full", "component"],
)
def test_online_moments_are_those_of_the_traces(baseline, reference, size):
    """With batches, an axis of tokens, and L of all data, or of a probe."""
    probes = {"tokens": TOKENS, "train": TRAIN}
    found = sampling.susceptibilities(
        mean_square, START, rules.SGLD(lr=0.05), TRAIN, probes=probes, loss_of_each=squares, batch_size=4,
        microbatches=2, probe_batch_size=size, baseline=baseline, reference=reference, selections=["params", PART],
        observables={name: sampling.Losses(squares, name) for name in probes}, **FEW,
    )  # fmt: skip
    assert found.names == ("0", "1")
    assert found.llc.loss.shape == (2, 3, 6)
    traces = {name: np.asarray(of, np.float64) for name, of in found.llc.observables.items()}
    loss = traces["train"].mean(-1)
    phi = loss - float(mean_square(START, TRAIN))
    for name, trace in traces.items():
        excess = trace - loss.reshape(loss.shape + (1,) * (trace.ndim - 3))
        for i in range(2):
            args = phi[i], excess[i], excess[0]
            np.testing.assert_allclose(found.chi[name][i], by_hand(*args, baseline), rtol=2e-4, atol=1e-7)
            others = np.stack([by_hand(*(np.delete(x, c, 0) for x in args), baseline) for c in range(3)])
            error = np.sqrt(((others - others.mean(0)) ** 2).sum(0) * 2 / 3)
            np.testing.assert_allclose(found.std_error[name][i], error, rtol=2e-3, atol=1e-7)


def few(params=START, loss=mean_square, each=squares, **changes):
    """A short run, whose warnings do not matter."""
    options = FEW | {"probes": {"x": TOKENS[:, 0]}, "loss_of_each": each, "probe_batch_size": 2} | changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sampling.LLCWarning)
        return sampling.susceptibilities(loss, params, rules.SGLD(lr=0.05), TRAIN, **options)


@pytest.mark.slow
def test_without_a_loss_of_each_a_datum_is_a_batch_of_its_own():
    np.testing.assert_allclose(few(each=None).chi["x"], few().chi["x"], rtol=1e-5)


class Net(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(START)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))


def nnx_each(model, batch):
    model.calls[...] += 1  # dropped, as what a loss changes
    return squares(model.w[...], batch)


@pytest.mark.slow
def test_modules_whose_counts_a_loss_changes():
    both = sampling.CrossCovariance(sampling.Losses(nnx_each, "x", 2))
    found = few(Net(), lambda model, batch: nnx_each(model, batch).mean(), nnx_each, observables={"both": both})
    np.testing.assert_allclose(found.chi["x"], few().chi["x"], rtol=1e-5)
    assert found.llc.observables["both"].shape == (3, 5, 5)


@pytest.mark.slow
def test_chains_of_all_parameters_are_run_beside_parts():
    part = {"part": PART}
    beside, among = few(selections=part), few(selections=part | {"every": True})
    assert beside.llc.names == ("part", "full")
    assert beside.names == beside.response.rows == ("part",)
    np.testing.assert_allclose(beside.chi["x"], among.chi["x"][:1], rtol=1e-5)
    own, alone = few(selections=part, baseline="component"), few()
    assert own.llc.names == ("part",)
    assert alone.names == ("full",)
    assert alone.llc.loss.shape == (3, 6)
    np.testing.assert_allclose(alone.chi["x"][0], among.chi["x"][1], rtol=1e-5)


@pytest.mark.slow
def test_a_run_continues_to_the_last_bit_and_no_other(tmp_path):
    options = {"checkpoint": tmp_path / "run"}
    few(num_draws=3, **options)
    np.testing.assert_array_equal(few(**options).chi["x"], few().chi["x"])
    for changes in ({"each": lambda w, batch: 2 * squares(w, batch)}, {"reference": "x"}):
        with pytest.raises(ValueError, match="its functions to observe is not what was given"):
            few(**options, **changes)


def test_small_deviations_from_large_losses_are_not_lost():
    rng = np.random.default_rng(8)
    loss, excess = (10 + 1e-4 * rng.normal(size=(2000, *shape)).astype(np.float32) for shape in ((), (3,)))
    zeros = jnp.zeros(()), jnp.zeros(3)
    memory = module.ExcessMoments(*zeros, sampling.observables.Moments.none(*zeros))
    memory, _ = jax.lax.scan(lambda memory, x: (memory.after(*x), None), memory, (loss, excess))
    memory, loss, excess = jax.tree.map(lambda x: np.asarray(x, np.float64), (memory, loss, excess))
    np.testing.assert_allclose(memory.loss + memory.moments.x, loss.mean(), rtol=1e-9)
    np.testing.assert_allclose(memory.excess + memory.moments.y, excess.mean(0), rtol=1e-9)
    products = (loss - loss.mean()) @ (excess - excess.mean(0))
    np.testing.assert_allclose(memory.moments.products, products, atol=1e-4 * 2000 * excess.var())


def test_chains_that_have_diverged_are_left_out():
    rng = np.random.default_rng(9)
    loss, excess, products = rng.normal(size=(2, 4)), rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 4, 3))

    def chi(loss, excess, products, good):
        zeros = np.zeros(loss.shape)
        moments = module.ExcessMoments(zeros, excess * 0, sampling.observables.Moments(zeros, loss, excess, products))
        return module._chi(moments, 0.1, good, 5, 1, 2)

    good = np.ones((2, 4), bool)
    good[:, 2] = False
    for x in (loss, excess, products):
        x[:, 2] = np.nan
    found = chi(loss, excess, products, good)
    kept = chi(*(np.delete(x, 2, 1) for x in (loss, excess, products, good)))
    np.testing.assert_allclose(found, kept)
    assert np.isnan(chi(*(x[:, :1] for x in (loss, excess, products, good)))[1]).all()


def far(w, batch):
    return jnp.where(batch[:, 0] > 10, jnp.inf, squares(w, batch))


def test_losses_that_are_not_finite_are_warned_of():
    probe = TOKENS[:, 0].copy()
    probe[1, 0] = 11.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = sampling.susceptibilities(
            mean_square, jnp.zeros(3), rules.SGLD(lr=0.05), TRAIN, probes={"x": probe}, loss_of_each=far, **FEW
        )
    text = "1 losses of the probe 'x' are not finite at some draws"
    assert [one.filename == __file__ and text in str(one.message) for one in caught].count(True) == 1
    assert np.isnan(found.chi["x"]).tolist() == [[False, True, False, False, False]]
    with pytest.raises(ValueError, match=r"The response to 1 columns, 'x\[1\]' first, is not finite\. Leave them out"):
        found.response_of_each.pseudo_inverse()


@pytest.mark.slow
def test_the_response_matrix_has_singular_vectors_and_an_inverse():
    found = few(probes={"x": TOKENS[:, 0], "tokens": TOKENS[:2]}, selections=["params", PART])
    assert found.response.columns == ("x", "tokens")
    whole = found.response_of_each
    assert whole.columns[4:7] == ("x[4]", "tokens[0, 0]", "tokens[0, 1]")
    np.testing.assert_array_equal(whole.matrix[:, 5:], found.chi["tokens"].reshape(2, 8))
    np.testing.assert_array_equal(whole.std_error[:, :5], found.std_error["x"])
    left, values, right = whole.singular_vectors
    np.testing.assert_allclose(left * values @ right.T, whole.matrix, atol=1e-9)
    wanted = np.array([1.0, -2.0])
    np.testing.assert_allclose(whole.matrix @ whole.pseudo_inverse() @ wanted, wanted, rtol=1e-6)
    np.testing.assert_allclose(whole.pseudo_inverse(rtol=1.0 - 1e-9), np.outer(right[:, 0], left[:, 0]) / values[0])
    with pytest.raises(ValueError, match=r"Invalid rtol: 2\. It is a number from 0 to 1, or None\."):
        whole.pseudo_inverse(rtol=2)


def test_repr_has_three_digits():
    chi, response = np.ones((2, 3)), np.array([[0.012345], [-2.0]])
    matrix = sampling.Response(response, abs(response) / 10, ("a", "b"), ("code",))
    llc = sampling.LLC(np.zeros((2, 4, 500)), 0.0, 2.0, np.full((2, 4), -1), {}, ("a", "b"))
    found = sampling.Susceptibilities({"code": chi}, {"code": chi}, matrix, ("a", "b"), "full", llc)
    assert repr(found) == (
        "Susceptibilities(code=[a: 0.0123 +- 0.0012, b: -2 +- 0.2], baseline='full', 4 chains of 500 draws)"
    )


WRONG = {
    "baseline": ({"baseline": "all"}, ValueError, r"Invalid baseline: 'all'\. It is one of 'full', 'component'\."),
    "no probes": ({"probes": {}}, ValueError, r"There are no probes, .*Give probes=\{name: data\}\."),
    "reference": ({"reference": "z"}, ValueError, r"Invalid reference: 'z'\. It is one of the probes, 'x', or None\."),
    "one draw": ({"num_draws": 1}, ValueError, r"Invalid num_draws: 1\. Covariances are of two draws at least\."),
    "no loss": ({"each": 3}, TypeError, "loss_of_each is a function, but got int. Give loss_of_each"),
    "mean": ({"each": mean_square}, ValueError, r"runs over the batch, but of a batch of 2 it returned shape \(\)"),
    "size": ({"probe_batch_size": 0}, ValueError, r"Invalid probe_batch_size: 0\. It is an int >= 1, or None for all"),
    "name": ({"selections": {"full": PART}}, ValueError, "'full' is the name of all parameters.*another name"),
    "nothing": ({"selections": [PART * 0]}, ValueError, "selections: number 0 selects nothing"),
    "observable": ({"observables": {"susceptibilities": squares}}, ValueError, "the name 'susceptibilities' is taken"),
}


@pytest.mark.parametrize(("changes", "error", "match"), WRONG.values(), ids=WRONG)
def test_wrong_inputs_are_refused(changes, error, match):
    with pytest.raises(error, match=match) as caught:
        few(**changes)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_without_data_the_loss_of_each_is_needed():
    with pytest.raises(ValueError, match="There are no data, so that loss_fn takes no batch"):
        sampling.susceptibilities(lambda w: w @ w, jnp.zeros(3), SGLD, probes={"x": TRAIN}, **FEW)
