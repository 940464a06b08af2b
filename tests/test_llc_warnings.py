"""Estimates that are no answer are warned of, once for each reason, and those that are one are not."""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxoptim
from jaxoptim import rules, sampling
from jaxoptim.sampling import diagnostics, minimum
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.target import problem

KEY = jax.random.key(0)
H = jnp.array([1.0, 4.0, 10.0])
LONG = {"nbeta": 10.0, "key": KEY, "num_chains": 8, "num_draws": 400, "num_burnin_steps": 100}
SGLD = rules.SGLD(lr=0.02)
NO_MINIMUM, NEGATIVE, DISAGREE, FEW = "not near a minimum", "negative beyond", "chains disagree", "too few independent"


def quadratic(w):
    return jnp.sum(H * w**2) / 2


def warned(*args, **options):
    """The estimate, and the messages of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        llc = sampling.estimate_llc(*args, **options)
    assert all(issubclass(one.category, sampling.LLCWarning) for one in caught)
    assert all(one.filename == __file__ for one in caught)
    return llc, [str(one.message) for one in caught]


def reasons(messages):
    found = [reason for text in messages for reason in (NO_MINIMUM, NEGATIVE, DISAGREE, FEW) if reason in text]
    assert len(found) == len(messages) == len(set(found))
    return set(found)


@pytest.mark.costly
@pytest.mark.parametrize(
    ("start", "sampler", "changes", "expected"),
    [
        (0.0, SGLD, {}, set()),
        (0.01, SGLD, {}, set()),
        (1.0, SGLD, {}, {NO_MINIMUM, NEGATIVE}),
        # Where chains are held, they say nothing of it.
        (0.08, rules.SGLD(lr=0.01, localization=100.0), {}, {NO_MINIMUM}),
        (0.0, SGLD, {"init_loss": 1.0}, {NEGATIVE}),
        (0.0, rules.SGLD(lr=1e-4), {"num_burnin_steps": 0}, {DISAGREE, FEW}),
        (0.0, SGLD, {"num_draws": 30, "num_chains": 2}, {FEW}),
        (0.0, SGLD, {"num_draws": 3}, {FEW}),
        (0.0, SGLD, {"num_draws": 1}, {FEW}),
        (0.0, rules.SGLD(lr=0.0), {}, {FEW}),
        (0.0, jaxoptim.sgld(lr=0.02, nbeta=10.0, key=KEY), {}, set()),
        (1.0, jaxoptim.sgld(lr=0.02, nbeta=10.0, key=KEY), {}, {NO_MINIMUM, NEGATIVE}),
    ],
    ids=[
        "at the minimum", "near it", "far from it", "held far from it", "init_loss too high", "steps too small",
        "few draws", "three draws", "one draw", "no steps", "transformation", "transformation far from it",
    ],
)  # fmt: skip
def test_each_reason_is_warned_of_once(start, sampler, changes, expected):
    llc, messages = warned(quadratic, jnp.full(3, start), sampler, **LONG | changes)
    assert reasons(messages) == expected, (llc, messages)
    for text in messages:
        assert "\n" not in text
        assert len(text) <= 300


@pytest.mark.needs("numpyro")
def test_the_messages_say_what_was_found_and_what_to_do():
    llc, messages = warned(quadratic, jnp.ones(3), SGLD, **LONG)
    norm = np.linalg.norm(H)
    assert f"(gradient norm {norm:.3g}). " in messages[0]
    assert "train further, or raise localization" in messages[0]
    assert f"{llc.mean:.3g} +- {llc.mcse:.2g}. " in messages[1]


def test_warnings_are_silenced_by_their_category():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=sampling.LLCWarning)
        sampling.estimate_llc(quadratic, jnp.ones(3), SGLD, **LONG | {"num_draws": 4})


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True], ids=["numbers", "names"])
def test_a_warning_names_its_selections(named):
    start = {"far": jnp.ones(1), "near": jnp.zeros(1)}
    selections = {"one": "far", "other": "near"} if named else ["far", "near"]
    llc, messages = warned(
        lambda w: (w["far"][0] ** 2 + w["near"][0] ** 2) / 2, start, rules.SGLD(lr=0.05), selections=selections, **LONG
    )
    assert reasons(messages) == {NO_MINIMUM, NEGATIVE}
    for text in messages:
        assert f"for selection {'one' if named else 0!r}. " in text
        assert f"selection {'other' if named else 1!r}" not in text
    assert ("mean=[one: -" in repr(llc)) is named


@pytest.mark.slow
def test_calibrate_warns_of_nothing():
    options = LONG | {"num_draws": 3}
    sweep = sampling.calibrate(quadratic, jnp.ones(3), rules.SGLD(), lr=[1e-3], localization=[0.0], **options)
    assert sweep.mean < 0


def fall(rule, start, wanted, nbeta=10.0, loss=quadratic, data=None, batch_size=None):
    given = problem(loss, start, data, RunOptions(KEY, batch_size=batch_size))
    stacked = None if rule is None else jax.tree.map(lambda x: jnp.broadcast_to(x, (1, *jnp.shape(x))), rule)
    gradient = minimum.full_gradient(given, batch_size)
    return minimum.descent(given, stacked, 0, nbeta, gradient, wanted, batch_size)


@pytest.mark.slow
def test_the_fall_is_as_wanted_where_the_minimum_on_the_line_is_that_far_below(x64):
    """On a quadratic: the best fall along the gradient is |g|^4 / (2 g'Hg), of the potential with all its terms."""
    h, start, nbeta = np.asarray(H), np.array([0.3, -0.2, 0.1]), 10.0
    for mask in (np.ones(3), np.array([1.0, 0.0, 1.0])):
        rule = rules.SGLD(lr=1.0, localization=7.0, weight_decay=2.0, optimize_over=mask)
        force, curvature = mask * (nbeta * h + 2.0) * start, nbeta * h + 9.0
        best = (force @ force) ** 2 / (2 * force @ (curvature * force))
        found, norm = fall(rule, jnp.asarray(start), best)
        assert found == pytest.approx(best, rel=1e-6)
        assert norm == pytest.approx(np.linalg.norm(mask * h * start), rel=1e-6)
        assert fall(rule, jnp.asarray(start), 0.99 * best)[0] > 0.99 * best
        assert fall(rule, jnp.asarray(start), 1.01 * best)[0] < 1.01 * best
    best = nbeta * (h**2 @ start**2) ** 2 / (2 * h**3 @ start**2)
    assert fall(None, jnp.asarray(start), best)[0] == pytest.approx(best, rel=1e-6)


def test_a_minimum_on_the_face_of_a_box_is_one(x64):
    start = jnp.array([1.0])
    free, held = (fall(rules.SGLD(bounding_box_size=b), start, 0.05, loss=lambda w: w[0])[0] for b in (None, 1e-9))
    assert free > 0.05 > held


@pytest.mark.slow
def test_the_fall_is_of_all_data_whatever_the_batches(x64):
    data = np.random.default_rng(0).normal(size=7)
    found = [
        fall(None, jnp.zeros(2), 0.1, loss=lambda w, x: jnp.mean(jnp.cosh(w[0] - x)), data=data, batch_size=size)
        for size in (None, 1, 3, 7)
    ]
    np.testing.assert_allclose(found, [found[0]] * 4, rtol=1e-10)
    assert found[0][1] == pytest.approx(abs(np.mean(np.sinh(data))))


def test_complex_and_missing_parameters_have_a_fall():
    start = {"z": jnp.array([1.0 + 1.0j, 2.0j]), "none": None}
    found, norm = fall(rules.SGLD(), start, 5.0, nbeta=1.0, loss=lambda p: jnp.sum(jnp.abs(p["z"]) ** 2))
    assert norm == pytest.approx(2 * np.sqrt(6), rel=1e-5)
    assert found > 5.0
    boxed = rules.SGLD(bounding_box_size=0.25, localization=1.0)  # each part moves at most so far
    inside, _ = fall(boxed, start, 5.0, nbeta=1.0, loss=lambda p: jnp.sum(jnp.abs(p["z"]) ** 2))
    assert inside == pytest.approx(2 * (1 - 0.75**2) + 2**2 - 1.75**2 - 3 * 0.25**2 / 2, rel=1e-5)


def estimate(loss, names=None, diverged=None):
    loss = np.asarray(loss, float)
    diverged = np.full(loss.shape[:-1], -1) if diverged is None else np.asarray(diverged)
    return sampling.LLC(loss, 0.0, 2.0, diverged, {}, names)


@pytest.mark.needs("numpyro")
def test_repr_has_three_digits():
    loss = np.random.default_rng(0).normal(10.0, 1.0, (4, 500))
    llc = estimate(loss)
    assert repr(llc) == "LLC(mean=19.9, mcse=0.0450, rhat=1.00, 4 chains of 500 draws)"
    assert repr(estimate(loss, diverged=[3, -1, -1, -1])).endswith("4 chains of 500 draws, 1 of them diverged)")
    two = estimate(np.stack([loss, loss + 1]), ("a", "b"))
    assert repr(two).startswith("LLC(mean=[a: 19.9, b: 21.9], mcse=[a: 0.0450, b: 0.0450], rhat=[a: 1.00, ")
    assert repr(estimate(loss[:, :2])).startswith("LLC(mean=")


def test_without_numpyro_what_needs_it_is_left_out(monkeypatch):
    monkeypatch.setattr(diagnostics, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "numpyro", None)
    llc, messages = warned(quadratic, jnp.ones(3), rules.SGLD(lr=1e-4), **LONG | {"num_burnin_steps": 0})
    assert reasons(messages) == {NO_MINIMUM}
    assert repr(llc) == f"LLC(mean={llc.mean:.3g}, 8 chains of 400 draws)"
    for name in ("mcse", "rhat"):
        with pytest.raises(ImportError, match=r"^[^\n]*pip install numpyro, or pip install 'jaxoptim\[numpyro\]'$"):
            getattr(llc, name)
    assert reasons(warned(quadratic, jnp.zeros(3), SGLD, **LONG | {"num_draws": 3})[1]) == {FEW}
