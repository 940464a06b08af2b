"""devinterp 2's SGMCMC: against the live class, the samplers that it unites, and exact distributions."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxoptim
import sgmcmc_live as live
from jaxoptim import checkpoint, optim, sampling
from jaxoptim.engine import programs
from jaxoptim.optim.prior import CompositePrior, GaussianPrior, UniformPrior
from jaxoptim.rules import sgmcmc as rules
from jaxoptim.rules._components import SKETCHES

pytestmark = pytest.mark.numbers

PARAMS = {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.ones((2, 2))}
GRADS = {"a": jnp.array([0.3, 0.1, -0.4]), "b": jnp.full((2, 2), 0.2)}
NOISE = {"a": jnp.array([0.5, -1.5, 2.0]), "b": jnp.arange(4.0).reshape(2, 2) - 1}
MASK = {"a": jnp.array([1.0, 0.0, 1.0]), "b": jnp.ones((2, 2))}
CENTER = {"a": jnp.full(3, 0.3), "b": jnp.full((2, 2), -1.0)}
KEY = jax.random.key(4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a process with devinterp 2.0.1, of which only the optimizers are used, has found."""
    folder = tmp_path_factory.mktemp("devinterp")
    packages, found = folder / "packages", folder / "results"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1", "--timeout", "20"]
    install += ["--disable-pip-version-check", "--target", str(packages), "devinterp==2.0.1"]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(
            f"devinterp 2.0.1 cannot be installed from a package index: {installed.stderr.strip().splitlines()[-1:]}"
        )
    here = Path(__file__).parent
    path = os.pathsep.join([str(packages), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "JAX_ENABLE_X64": "1"}
    # Without its assertions, which compare float32 casts of float64 metrics to the resolution of float64.
    run = [sys.executable, "-O", str(here / "sgmcmc_live.py"), str(found)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return pickle.loads(found.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("case", live.CASES)
def test_it_is_devinterps(results, case):
    found = results[case]
    theirs, *others = found["swapped"]
    for one, other in [found["values"], *[(theirs, ours) for ours in others]]:
        for x, y in zip(one, other, strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-12, atol=1e-12)
    theirs, ours = found["metrics"]
    assert ours.keys() == theirs.keys()
    for name, number in theirs.items():
        assert ours[name] == pytest.approx(number, rel=1e-5, abs=1e-9), name
    theirs, ours = found["sketches"]
    for name, sketch in theirs.items():
        np.testing.assert_allclose(ours[name], sketch, rtol=1e-5, atol=1e-6, err_msg=name)
    for theirs, ours in zip(*found["state"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, x in theirs.items():
            np.testing.assert_allclose(ours[name], x, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_it_warns_as_devinterp_and_of_the_temperature(results):
    for kind, (theirs, ours) in results["warnings"].items():
        assert ours[: len(theirs)] == theirs
        assert len(ours) == len(theirs) + (kind == "sgnht")
        assert len(theirs) == 1 + ("noise_level" in live.WARNED[kind])


TERMS = {"lr": 0.05, "nbeta": 3.0, "weight_decay": 0.3, "localization": 2.0, "bounding_box_size": 0.4, "key": KEY}
TWINS = {
    "sgld": (optim.SGMCMC.sgld, optim.SGLD, {"noise_level": 0.7}),
    "rmsprop_sgld": (optim.SGMCMC.rmsprop_sgld, optim.PSGLD, {"alpha": 0.9, "eps": 0.2}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:noise_level", "ignore:Warning. noise_level")
@pytest.mark.parametrize(("make", "twin", "options"), TWINS.values(), ids=TWINS)
def test_it_makes_the_steps_of_the_sampler_of_that_name(make, twin, options):
    chain, other = make(PARAMS, mask=MASK, **TERMS, **options), twin(PARAMS, optimize_over=MASK, **TERMS, **options)
    for step in range(4):
        for sampler in (chain, other):
            sampler.step(sampler.params | ({"b": None} if step == 2 else {}))
    chex.assert_trees_all_close(chain.params, other.params, rtol=1e-6, atol=1e-7)


BOTH = CompositePrior([GaussianPrior(1.0, center=None), GaussianPrior(3.0, center=2.0)])
RMSPROP = {"preconditioner": "rmsprop", "preconditioner_kwargs": {"alpha": 0.8, "eps": 0.1}}
NHT = {"preconditioner": "nht", "preconditioner_kwargs": {"diffusion_factor": 0.05}}
DISTRIBUTIONS = {
    "two priors": ({"prior": BOTH, "lr": 0.1, "nbeta": 2.0}, (0.0, 2.0), 8.0, 0.75, 1.0, 0.1),
    "a noise level": ({"prior": 4.0, "lr": 0.1, "noise_level": 0.5}, (1.0, 0.0), 4.0, 0.25, 0.25, 0.1),
    "a preconditioner": ({"prior": BOTH, "lr": 0.2, "nbeta": 2.0} | RMSPROP, (1.9, 0.0), 4.0, 0.55, 1.0, 0.1),
    "temperature 2A": ({"prior": GaussianPrior(4.0, center=None), "lr": 0.1} | NHT, (0.0, 1.0), 5.0, 0.0, 0.1, 0.1),
}
"""Options, slope and curvature of the loss; curvature and center of the potential, temperature, preconditioned rate."""


def slanted(params, slope, curvature):
    return jnp.sum(slope * params + curvature * params**2 / 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:preconditioner")
@pytest.mark.parametrize(("options", "loss", "k", "mean", "heat", "rate"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_it_samples_from_the_exact_distribution(options, loss, k, mean, heat, rate):
    """Each number of the array is a chain of its own; of a quadratic potential the variance is exact at any rate."""
    size, variance = 50_000, heat / (k * (1 - rate * k / 4))
    chain = optim.SGMCMC(jnp.full(size, 0.5), key=KEY, **options)
    for _ in range(60):
        chain.minimize(slanted, *loss)
    assert float(jnp.mean(chain.params)) == pytest.approx(mean, abs=4 * np.sqrt(variance / size))
    assert float(jnp.var(chain.params)) == pytest.approx(variance, rel=4 * np.sqrt(2 / size))


@pytest.mark.slow
def test_metrics_are_the_parts_of_a_step():
    options = {"lr": 0.5, "nbeta": 3.0, "noise_level": 0.5, "save_metrics": True, "key": KEY} | RMSPROP
    prior = CompositePrior([GaussianPrior(0.5, center=None), GaussianPrior(2.0, center=CENTER)])
    plain = {"prior": None, "mask": None}
    chain = optim.SGMCMC(PARAMS, prior=prior, mask=MASK["a"], groups=[("b", plain)], **options)
    assert set(chain.get_metrics()) == {0}
    chain.step(GRADS, noise=NOISE)
    parts = []
    for name, mask, strength in (("b", 1, 0), ("a", np.array([1, 0, 1]), 1)):
        w, g, xi, c = (np.asarray(tree[name], np.float64).ravel() for tree in (PARAMS, GRADS, NOISE, CENTER))
        factor = mask / (0.1 + np.sqrt(0.2) * np.abs(g))
        pull, decay = 0.25 * factor * strength * 2 * (w - c), 0.25 * factor * strength * 0.5 * w
        noise = np.sqrt(0.5 * factor) * 0.5 * xi
        parts.append((0.25 * factor * 3 * g, 0.25 * 3 * g, pull, decay, noise, 0 * w))
        change = np.asarray(chain.params[name], np.float64).ravel() - w
        np.testing.assert_allclose(change, noise - parts[-1][0] - pull - decay, rtol=1e-5, atol=1e-6)
    whole = [np.concatenate(of_groups) for of_groups in zip(*parts, strict=True)]
    descent, _, pull, decay, noise, _ = whole
    prior = pull + decay
    *found, count = chain.get_metrics()
    expected = [*map(np.linalg.norm, whole), descent @ prior, descent @ noise, prior @ noise]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert count == 6
    chain.step(GRADS)
    assert chain.get_metrics().distance == pytest.approx(np.linalg.norm(noise - descent - prior), rel=1e-5)
    with pytest.raises(RuntimeError, match="Metrics not enabled"):
        optim.SGMCMC(PARAMS).get_metrics()


DIM = 5
SKETCHED = {"lr": 0.5, "nbeta": 3.0, "prior": CompositePrior([GaussianPrior(0.5, None), GaussianPrior(2.0, CENTER)])}
"""Options of which no part of a step is zero."""


def parts_of_a_step(noise=NOISE):
    """The parts of a step of ``SKETCHED``, each a tree like the parameters."""
    return optim.sgmcmc.Sketches(
        *[jax.tree.map(lambda g: 0.25 * 3 * g, GRADS)] * 2,
        jax.tree.map(lambda w, c: 0.25 * 2 * (w - c), PARAMS, CENTER),
        jax.tree.map(lambda w: 0.25 * 0.5 * w, PARAMS),
        jax.tree.map(lambda xi: np.sqrt(0.5) * xi, noise),
    )


def sketches_of(parts, dim=DIM, seed=0):
    """For each part what ``sampling.sketch`` makes of a tree."""
    return optim.sgmcmc.Sketches(*(sampling.sketch(x, dim, seed) for x in parts))


@pytest.mark.slow
@pytest.mark.parametrize("metrics", [False, True], ids=["alone", "with metrics"])
def test_sketches_are_those_of_the_parts_of_a_step(metrics):
    chain = optim.SGMCMC(PARAMS, sketch_dim=DIM, sketch_seed=7, save_metrics=metrics, **SKETCHED)
    assert all((x == jnp.zeros(DIM)).all() for x in chain.get_sketches())
    chain.step(GRADS, noise=NOISE)
    chex.assert_trees_all_close(chain.get_sketches(), sketches_of(parts_of_a_step(), seed=7), rtol=1e-5, atol=1e-6)
    other = optim.SGMCMC(PARAMS, **SKETCHED)
    other.step(GRADS, noise=NOISE)
    chex.assert_trees_all_equal(chain.params, other.params)


@pytest.mark.slow
def test_sketches_of_the_parts_add_up_to_that_of_the_change():
    chain = optim.SGMCMC(PARAMS, sketch_dim=DIM, **SKETCHED)
    chain.step(GRADS)
    found = chain.get_sketches()
    change = sampling.sketch(jax.tree.map(jnp.subtract, chain.params, PARAMS), DIM)
    parts = found.noise - found.scaled_grad - found.localization - found.weight_decay
    np.testing.assert_allclose(parts, change, atol=1e-5)


@pytest.mark.slow
def test_products_of_sketches_are_those_of_the_metrics():
    """Over seeds the mean is exact, and the variance that of the formula; one program makes all seeds."""
    number = 4000
    rule = rules.SGMCMC(lr=0.5, nbeta=3.0, weight_decay=0.5, localization=2.0, metrics="components", sketch_dim=DIM)
    state = jaxoptim.init(rule, CENTER)

    def sketches(seed):
        rule_of_seed = rule.replace(sketch_seed=seed)
        shared = jaxoptim.step(rule_of_seed, PARAMS, GRADS, state, noise=NOISE)[1].shared
        return [shared[name] for name in SKETCHES], shared

    found, shared = jax.jit(jax.vmap(sketches))(jnp.arange(number, dtype=jnp.uint32))
    descent, unscaled, pull, decay, noise = np.asarray(found, np.float64)
    prior = pull + decay
    exact = [np.concatenate([x["a"], x["b"].ravel()]).astype(np.float64) for x in parts_of_a_step()]
    of = {"scaled": (descent, exact[0]), "prior": (prior, exact[2] + exact[3]), "noise": (noise, exact[4])}
    of |= {"unscaled": (unscaled, exact[1]), "pull": (pull, exact[2]), "decay": (decay, exact[3])}
    names = {
        ("scaled", "scaled"): "scaled_grad_norm",
        ("unscaled", "unscaled"): "unscaled_grad_norm",
        ("pull", "pull"): "localization_norm",
        ("decay", "decay"): "weight_decay_norm",
        ("noise", "noise"): "scaled_noise_norm",
        ("scaled", "prior"): "grad_dot_prior",
        ("scaled", "noise"): "grad_dot_noise",
        ("prior", "noise"): "prior_dot_noise",
    }
    for pair, name in names.items():
        (a, v), (b, u) = (of[one] for one in pair)
        metric = float(shared[name][0]) ** (2 if name.endswith("norm") else 1)
        assert metric == pytest.approx(v @ u, rel=1e-5)
        variance = ((v @ v) * (u @ u) + (v @ u) ** 2 - 2 * np.sum(v**2 * u**2)) / DIM
        products = (a * b).sum(1)
        assert abs(products.mean() - metric) < 4 * np.sqrt(variance / number), name
        squares = (products - metric) ** 2
        assert abs(squares.mean() - variance) < 4 * squares.std() / np.sqrt(number), name


@pytest.mark.slow
def test_sketches_of_groups_are_one_of_all_parameters():
    z = optim.Parameter(jnp.array([1 + 2j, -3j]))
    groups = [{"params": [z]}, {"params": [optim.Parameter(x) for x in PARAMS.values()], "lr": 0.25, **RMSPROP}]
    chain = optim.SGMCMC(groups, lr=0.5, sketch_dim=DIM, sketch_seed=3)
    chain.add_param_group({"params": [optim.Parameter(jnp.ones(2))]})
    assert [group["sketch_start"] for group in chain.param_groups] == [0, 4, 11]
    grads = [[jnp.array([2 + 1j, 1j])], list(GRADS.values()), [jnp.ones(2)]]
    chain.step(grads)
    scaled = [[0.25 * grads[0][0]], [0.125 * g / (0.1 + np.sqrt(0.2) * abs(g)) for g in grads[1]], [0.25 * grads[2][0]]]
    unscaled = [[0.25 * grads[0][0]], [0.125 * g for g in grads[1]], [0.25 * grads[2][0]]]
    expected = [sampling.sketch(x, DIM, 3) for x in (scaled, unscaled)]
    np.testing.assert_allclose(chain.get_sketches()[:2], expected, rtol=1e-5, atol=1e-6)
    # The first group rests, and of the second one parameter.
    chain.step([[None], [None, grads[1][1]], grads[2]])
    kept = [[jnp.zeros(2, complex)], [jnp.zeros(3), unscaled[1][1]], unscaled[2]]
    np.testing.assert_allclose(chain.get_sketches().unscaled_grad, sampling.sketch(kept, DIM, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_group_that_rests_or_was_loaded_has_zeros_for_metrics():
    chain = optim.SGMCMC(PARAMS, groups=[("b", {})], save_metrics=True)
    chain.step(GRADS)
    chain.step({"a": GRADS["a"], "b": None})
    assert [metrics.numel for metrics in chain.iter_group_metrics()] == [0, 3]
    chain.step(GRADS)
    assert chain.get_metrics().numel == 7
    chain.load_state_dict(chain.state_dict())
    assert set(chain.get_metrics()) == {0}


@pytest.mark.slow
def test_a_mask_and_frozen_parameters_keep_their_places():
    chain = optim.SGMCMC(PARAMS, mask=MASK, frozen=["b"], sketch_dim=DIM, **SKETCHED)
    chain.step(GRADS, noise=NOISE)
    moved = {"a": MASK["a"], "b": jnp.zeros((2, 2))}
    parts = [jax.tree.map(jnp.multiply, x, moved) for x in parts_of_a_step()]
    parts[1] = jax.tree.map(lambda g, m: 0.75 * g * m, GRADS, moved | {"a": jnp.ones(3)})  # devinterp's, not masked
    chex.assert_trees_all_close(chain.get_sketches(), sketches_of(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_sketches_are_of_the_sampler_and_not_of_its_state_dict():
    chain = optim.SGMCMC(PARAMS, sketch_dim=DIM, sketch_seed=2**32 - 1, key=KEY, **SKETCHED)
    chain.step(GRADS)
    seen = chain.get_sketches()
    for other in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        chex.assert_trees_all_equal(other.get_sketches(), seen)
        other.step(GRADS, noise=NOISE)
        again = copy.deepcopy(chain)
        again.step(GRADS, noise=NOISE)
        chex.assert_trees_all_equal(other.get_sketches(), again.get_sketches())
    wider, off = (optim.SGMCMC(chain.params, sketch_dim=dim, **SKETCHED) for dim in (2 * DIM, None))
    for other in (wider, off):
        other.load_state_dict(chain.state_dict())
        other.step(GRADS)
    chain.step(GRADS)
    chex.assert_trees_all_equal(wider.params, off.params, chain.params)
    assert wider.get_sketches().noise.shape == (2 * DIM,)
    chain.load_state_dict(off.state_dict())
    assert all((x == jnp.zeros(DIM)).all() for x in chain.get_sketches())
    assert "sketch_start" not in off.param_groups[0]
    for sampler in (off, chain.__class__(PARAMS)):
        with pytest.raises(RuntimeError, match="Sketches not enabled"):
            sampler.get_sketches()


@pytest.mark.slow
def test_sketches_go_to_the_pure_face_and_back():
    chain = optim.SGMCMC(PARAMS, sketch_dim=DIM, sketch_seed=1, **SKETCHED)
    tx, params, state = chain.to_functional()
    updates, state = tx.update(GRADS, state, params, noise=NOISE)
    chain.from_functional(optax.apply_updates(params, updates), state)
    chex.assert_trees_all_close(chain.get_sketches(), sketches_of(parts_of_a_step(), seed=1), rtol=1e-5, atol=1e-6)


INITIAL = {"localization": 2.0, "weight_decay": 0.0, "center_slot": "prior_center"}
PRIORS = {
    "nothing": ({}, INITIAL | {"localization": 0.0}, None),
    "flat": ({"prior": UniformPrior()}, INITIAL | {"localization": 0.0}, None),
    "a number": ({"prior": 2.0}, INITIAL, PARAMS),
    "initial": ({"prior": "initial"}, INITIAL | {"localization": 1.0}, PARAMS),
    "of a group": ({"groups": [(".*", {"prior": "initial", "localization": 2.0})]}, INITIAL, PARAMS),
    "a tree": ({"prior": CENTER}, INITIAL | {"localization": 1.0}, CENTER),
    "a list": ({"prior": GaussianPrior(2.0, list(CENTER.values()))}, INITIAL, CENTER),
    "one center": ({"prior": GaussianPrior(2.0, 0.5)}, INITIAL, jax.tree.map(lambda x: 0 * x + 0.5, PARAMS)),
    "zero": ({"prior": GaussianPrior(2.0, None)}, INITIAL | {"localization": 0.0, "weight_decay": 2.0}, None),
    "composite": (
        {"prior": CompositePrior([UniformPrior(), GaussianPrior(0.5, None), GaussianPrior(2.0)])},
        {"localization": 2.0, "weight_decay": 0.5, "center_slot": "prior_center_1"},
        PARAMS,
    ),
}


@pytest.mark.parametrize(("options", "terms", "center"), PRIORS.values(), ids=PRIORS)
def test_priors_are_terms_of_the_potential(options, terms, center):
    chain = optim.SGMCMC(PARAMS, **options)
    group = chain.param_groups[0]
    assert {name: group[name] for name in terms} == terms
    assert "prior" not in group
    for param in chain.get_params():
        slots = chain.state[param]
        assert slots.keys() == ({terms["center_slot"]} if center else set())
        if center:
            np.testing.assert_array_equal(slots[terms["center_slot"]], center[param.name])


@pytest.mark.slow
def test_groups_may_differ_in_all():
    groups = [
        {"params": [optim.Parameter(jnp.ones(2))], "prior": 3.0, "mask": [jnp.array([0.0, 1.0])]},
        {"params": [optim.Parameter(jnp.ones(2))], **RMSPROP, "bounding_box_size": 0.0},
    ]
    chain = optim.SGMCMC(groups, lr=0.5, prior=GaussianPrior(1.0, center=0.0), key=KEY)
    chain.add_param_group({"params": [optim.Parameter(jnp.ones(2))], "prior": [jnp.full(2, 3.0)]})
    zeros = [[jnp.zeros(2)]] * 3
    chain.step(zeros, noise=zeros)
    assert [x.tolist() for [x] in chain.params] == [[1, 1], [1, 1], [1.5, 1.5]]
    chain.step([[jnp.ones(2)], [jnp.ones(2)], [None]], noise=zeros)
    assert [x.tolist() for [x] in chain.params] == [[1, 0.75], [1, 1], [1.5, 1.5]]
    states = [set(chain.state[param]) for param in chain.get_params()]
    assert states == [{"prior_center"}, {"prior_center", "square_avg", "initial_param"}, {"prior_center"}]


COPIES = ("deepcopy", "pickle", "state_dict", "checkpoint")


@pytest.mark.costly
@pytest.mark.parametrize(
    "options", [{"prior": CENTER, "sketch_dim": DIM} | RMSPROP, {}], ids=["with state", "without state"]
)
@pytest.mark.parametrize("kept", COPIES)
def test_a_copy_continues_to_the_last_bit(kept, options, tmp_path):
    chain = optim.SGMCMC(PARAMS, lr=0.1, mask=MASK, key=KEY, **options)
    chain.step(GRADS)
    if kept in ("deepcopy", "pickle"):
        other = copy.deepcopy(chain) if kept == "deepcopy" else pickle.loads(pickle.dumps(chain))
    else:
        state = chain.state_dict()
        if kept == "checkpoint":
            checkpoint.save(tmp_path / "chain", state)
            state = checkpoint.load(tmp_path / "chain")
        other = optim.SGMCMC(chain.params, **({"prior": 1.0} | RMSPROP if options else {}))
        other.load_state_dict(state)
    for _ in range(2):
        chain.step(GRADS)
        other.step(GRADS)
    chex.assert_trees_all_equal(chain.params, other.params)


def test_it_goes_to_the_pure_face_and_back():
    chain = optim.SGMCMC(PARAMS, lr=0.1, prior=CENTER, mask=MASK, key=KEY, **RMSPROP)
    chain.step(GRADS)
    other = copy.deepcopy(chain)
    tx, params, state = other.to_functional()
    updates, state = tx.update(GRADS, state, params)
    other.from_functional(optax.apply_updates(params, updates), state)
    for _ in range(2):
        chain.step(GRADS)
    other.step(GRADS)
    chex.assert_trees_all_close(chain.params, other.params, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_localization_may_be_switched_off_and_on():
    chain = optim.SGMCMC(jnp.ones(2), lr=0.5, noise_level=0.0, prior=2.0)
    for strength, end in ((2.0, 0.5), (0.0, 0.0), (2.0, 0.0)):
        chain.param_groups[0]["localization"] = strength
        chain.step(jnp.full(2, 2.0))
        assert chain.params.tolist() == [end] * 2


def test_state_has_devinterps_layout():
    chain = optim.SGMCMC.rmsprop_sgld(
        PARAMS, nbeta=2.0, weight_decay=0.1, localization=1.0, bounding_box_size=1.0, save_metrics=True
    )
    state = chain.state_dict()["state"]
    assert [entry["param_idx"] for entry in state.values()] == [0, 1]
    assert state[1].keys() == {"param_idx", "prior_center_1", "square_avg", "initial_param"}
    assert optim.SGMCMC(PARAMS).state_dict()["state"] == {0: {"param_idx": 0}, 1: {"param_idx": 1}}


@pytest.mark.slow
def test_other_numbers_compile_nothing():
    chain = optim.SGMCMC(PARAMS, prior=BOTH, save_metrics=True, **RMSPROP)
    chain.step(GRADS)
    before = programs.advance._cache_size()
    chain.param_groups[0] |= {"lr": 0.3, "localization": 7.0, "alpha": 0.5, "noise_level": 0.1}
    chain.step(GRADS)
    other = optim.SGMCMC(PARAMS, lr=0.2, prior=BOTH, save_metrics=True, **RMSPROP)
    other.step(GRADS)
    assert programs.advance._cache_size() == before


@pytest.mark.slow
def test_another_seed_of_sketches_compiles_nothing():
    found = []
    for seed in (0, 1, 2**32 - 1):
        chain = optim.SGMCMC(PARAMS, sketch_dim=DIM, sketch_seed=seed, key=KEY)
        for _ in range(2):
            chain.step(GRADS)
        found.append((programs.advance._cache_size(), chain.get_sketches().noise.tolist()))
    sizes, sketches = zip(*found, strict=True)
    assert len(set(sizes)) == 1
    assert len(set(map(tuple, sketches))) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:nbeta", "ignore:preconditioner")
@pytest.mark.parametrize("method", ["sgld", "rmsprop_sgld", "sgnht"])
def test_the_factories_sketch(method):
    chain = optim.SGMCMC.get_method(method)(PARAMS, lr=0.5, sketch_dim=DIM, sketch_seed=2)
    chain.step(GRADS)
    expected = sampling.sketch(jax.tree.map(lambda g: 0.25 * g, GRADS), DIM, 2)
    np.testing.assert_allclose(chain.get_sketches().unscaled_grad, expected, rtol=1e-5, atol=1e-6)


def test_the_factories_warn_and_are_found_by_name():
    for name, label in (("sgld", "SGLD"), ("rmsprop_sgld", "RMSProp-SGLD")):
        with pytest.warns(UserWarning, match=f"^noise_level in {label} is unequal to one") as caught:
            optim.SGMCMC.get_method(name)(PARAMS, noise_level=0.5, nbeta=2.0)
        assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="^nbeta set to 1, LLC estimates will be off"):
        optim.SGMCMC.sgld(PARAMS)
    with pytest.warns(UserWarning, match="SGLD at temperature 2A.*optim.SGNHT is the thermostat") as caught:
        optim.SGMCMC.get_method("sgnht")(PARAMS, nbeta=2.0)
    assert [warning.filename for warning in caught] == [__file__]


WRONG = {
    "a negative strength": (ValueError, r"Invalid localization: -1", {"prior": -1}),
    "a negative rate": (ValueError, r"Invalid lr: -1", {"lr": -1}),
    "another center": (ValueError, r"Invalid center: 'zero'. GaussianPrior takes 'initial'", {"prior": "zero"}),
    "a center of another shape": (ValueError, r"'a' has shape \(2,\)", {"prior": CENTER | {"a": jnp.ones(2)}}),
    "a center for some": (ValueError, "has nothing for 'b'; it has a", {"prior": {"a": jnp.ones(3)}}),
    "too few centers": (ValueError, "has 1 arrays, but the group has 2", {"prior": [jnp.ones(3)]}),
    "another preconditioner": (ValueError, "Invalid preconditioner: 'adam'.*'rmsprop'", {"preconditioner": "adam"}),
    "another option": (
        TypeError,
        "'alpha' is no option of 'identity'. It takes none",
        {"preconditioner_kwargs": {"alpha": 0.5}},
    ),
    "a correction": (
        NotImplementedError,
        "rules.PSGLD",
        {"preconditioner": "rmsprop", "preconditioner_kwargs": {"add_grad_correction": True}},
    ),
    "a mask of fractions": (ValueError, "masks of zeros and ones", {"mask": 0.5}),
    "a negative box": (ValueError, "Invalid bounding_box_size: -1", {"bounding_box_size": -1}),
    "sketches of no numbers": (ValueError, r"Invalid sketch_dim: 0\. A sketch has an int >= 1", {"sketch_dim": 0}),
    "a seed that is none": (ValueError, r"Invalid sketch_seed: -1\.", {"sketch_dim": 3, "sketch_seed": -1}),
    "a key that is none": (TypeError, "typed key", {"key": 3}),
}


@pytest.mark.parametrize(("error", "match", "options"), WRONG.values(), ids=WRONG)
def test_errors_say_what_is_taken(error, match, options):
    with pytest.raises(error, match=match):
        optim.SGMCMC(PARAMS, **options)


def test_errors_of_priors_and_names():
    with pytest.raises(ValueError, match="one prior with another center than zero, but got 2"):
        CompositePrior([GaussianPrior(1.0), GaussianPrior(1.0, center=2.0)])
    with pytest.raises(TypeError, match="takes a list of GaussianPrior and UniformPrior, but got 3"):
        CompositePrior([3])
    with pytest.raises(NotImplementedError, match="bounding_box_size"):
        UniformPrior(2.0)
    with pytest.raises(ValueError, match="Invalid localization: -1"):
        optim.SGMCMC.sgld(PARAMS, nbeta=2.0, localization=-1)
    with pytest.raises(ValueError, match="'sgld', 'rmsprop_sgld', 'sgnht'"):
        optim.SGMCMC.get_method("mala")
