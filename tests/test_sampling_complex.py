"""Complex parameters are pairs of real ones: chains, and what is observed and estimated along them, are the same."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxoptim import rules, sampling

slow = pytest.mark.slow

X = jax.random.normal(jax.random.key(0), (12, 2))
START = {"r": jnp.ones(3), "z": jnp.array([1.0 + 1.0j, 2.0j]), "none": None}
RUN = {"key": jax.random.key(1), "num_chains": 3, "num_draws": 6, "num_burnin_steps": 2}
NUMBERS = {"lr": 1e-3, "nbeta": 10.0}
MASK = {"r": None, "z": jnp.array([1.0, 0.0]), "none": None}
CENTER = {"r": None, "z": jnp.array([1.0j, 2.0]), "none": None}
HELD = {"r": 1.0, "z": 0.0, "none": None}


def of_each(p, x):
    """Of other curvature along imaginary parts."""
    away = p["z"] * x - 1
    return jnp.sum(away.real**2 + 3 * away.imag**2, -1) + jnp.sum(p["r"] ** 2)


def loss(p, x):
    return jnp.mean(of_each(p, x))


def joined(p):
    return p | {"z": jax.lax.complex(p["z"][..., 0], p["z"][..., 1])}


def of_each_pair(p, x):
    return of_each(joined(p), x)


def loss_of_pairs(p, x):
    return loss(joined(p), x)


def in_pairs(tree):
    return jax.tree.map(lambda x: jnp.stack([x.real, x.imag], -1) if jnp.iscomplexobj(x) else x, tree)


def rule_of_pairs(rule):
    mask = rule.optimize_over
    if mask is not None:
        mask = mask | {"z": jnp.asarray(mask["z"])[..., None]}
    return rule.replace(optimize_over=mask, center=in_pairs(rule.center))


def arrays_of(found):
    """All numbers of a result."""
    attributes = {name: x for name, x in vars(found).items() if name not in ("axes", "names")}
    return jax.tree.map(np.asarray, in_pairs(jax.tree.map(jnp.asarray, attributes)))


SAMPLERS = {
    "curvature": (rules.PSGLD(**NUMBERS, gamma=True), {}),
    "acceptance": (
        rules.SGLD(**NUMBERS, localization=3.0, weight_decay=2.0, optimize_over=MASK, center=CENTER),
        {"metropolis": True, "observables": {"rate": sampling.MalaAcceptance()}},
    ),
    "box": (
        rules.SGNHT(**NUMBERS, bounding_box_size=0.02, box="reflect", metrics="components"),
        {"start_noise": 0.3, "observables": {"covariance": sampling.Covariance(), "sketch": sampling.Sketch(8)}},
    ),
    "held": (
        rules.SGLD(**NUMBERS, optimize_over=HELD, localization=3.0),
        {"batch_size": 4, "microbatches": 2, "control_variates": sampling.ControlVariates()},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["curvature", "acceptance", "box", "held"])
def test_chains(name):
    rule, options = SAMPLERS[name]
    found = sampling.sample(loss, START, rule, X, **RUN, **options)
    expected = sampling.sample(loss_of_pairs, in_pairs(START), rule_of_pairs(rule), X, **RUN, **options)
    chex.assert_trees_all_close(arrays_of(found), arrays_of(expected), rtol=1e-5, atol=1e-6)


BOXED = rules.SGLD(**NUMBERS, localization=3.0, bounding_box_size=0.02)


def estimates(loss, of_each, start, boxed, call):
    options = RUN | {"num_draws": 12}
    if call == "estimate_llc":
        return sampling.estimate_llc(loss, start, boxed, X, selections=["z", "r|z"], **options)
    if call == "calibrate":
        return sampling.calibrate(loss, start, boxed, X, lr=[1e-3, 2e-3], localization=[1.0], **options)
    if call == "susceptibilities":
        probes = {"loss_of_each": of_each, "probes": {"x": X}}
        return sampling.susceptibilities(loss, start, boxed, X, selections=["z", "r"], **probes, **options).llc
    return sampling.llc_over_checkpoints(loss, [start, jax.tree.map(lambda x: 2 * x, start)], boxed, X, **options)


@pytest.mark.costly
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
@pytest.mark.parametrize(
    "call",
    [
        "estimate_llc",
        *(pytest.param(call, marks=slow) for call in ("calibrate", "susceptibilities", "llc_over_checkpoints")),
    ],
)
def test_coefficients(call):
    found = estimates(loss, of_each, START, BOXED, call)
    expected = estimates(loss_of_pairs, of_each_pair, in_pairs(START), rule_of_pairs(BOXED), call)
    chex.assert_trees_all_close(arrays_of(found), arrays_of(expected), rtol=1e-5, atol=1e-6)
