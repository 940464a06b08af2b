"""Localization about another point than the start, and the parts of the steps in the traces of a run."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxoptim
import llc_cases as cases
from jaxoptim import rules, sampling
from jaxoptim.sampling import chains, minimum, run
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.target import problem

KEY = jax.random.key(5)
slow = pytest.mark.slow
step = jax.jit(jaxoptim.step)
START = {"w": jnp.array([0.3, -0.2]), "b": jnp.array([0.5]), "frozen": None}
CENTER = {"w": jnp.array([2.0, -1.0]), "b": None, "frozen": None}
H = {"w": jnp.array([1.0, 4.0]), "b": jnp.array([2.0])}
MINIMUM = {"w": jnp.array([-1.0, 1.0]), "b": jnp.array([1.5])}
FEW = {"key": KEY, "num_chains": 2, "num_draws": 4}
SAMPLERS = {
    "SGLD": rules.SGLD(lr=0.02),
    "PSGLD": rules.PSGLD(lr=0.02, frozen_after=1),
    "SGHMC": rules.SGHMC(lr=0.01, alpha=0.3),
    "SGNHT": rules.SGNHT(lr=0.01, diffusion_factor=0.3),
}
of_sampler = pytest.mark.parametrize("name", [x if x == "SGLD" else pytest.param(x, marks=slow) for x in SAMPLERS])


def loss(params):
    return sum(jnp.sum(H[name] * (params[name] - MINIMUM[name]) ** 2) / 2 for name in H)


def flat(of):
    return np.concatenate([np.asarray(of["w"], np.float64), np.asarray(of["b"], np.float64)], -1)


@pytest.mark.slow
@of_sampler
def test_chains_settle_between_the_minimum_and_the_center(name):
    r"""The stationary mean is :math:`K^{-1}(n\beta H w^* + \gamma c)`, and c the start where the center has None."""
    nbeta, localization, number = 3.0, 5.0, 4001
    sampler = SAMPLERS[name].replace(nbeta=nbeta, localization=localization, center=CENTER)
    observables = {"accepted": sampling.MalaAcceptance()} if name == "SGLD" else None
    samples = sampling.sample(
        loss, START, sampler, key=KEY, num_chains=number, num_draws=1, num_burnin_steps=300, observables=observables
    )
    found, h, center = flat(samples.params), flat(H), flat(CENTER | {"b": START["b"]})
    k = nbeta * h + localization
    mean = (nbeta * h * flat(MINIMUM) + localization * center) / k
    assert (abs(found.mean(0) - mean) < 4 * found.std(0) / np.sqrt(number)).all()
    if name == "SGLD":
        variance = 1 / (k * (1 - 0.02 * k / 4))
        assert (abs(found.var(0) - variance) < 4 * variance * np.sqrt(2 / number)).all()
        accepted = np.asarray(samples.observables["accepted"], np.float64)
        assert abs(accepted.mean() - cases.mala_quadratic(k, 0.02)) < 4 * accepted.std() / np.sqrt(number)


@pytest.mark.costly
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_box_stays_about_the_start(name):
    far = {"w": START["w"] + 100, "b": START["b"] - 100, "frozen": None}
    sampler = SAMPLERS[name].replace(center=far, localization=jnp.array(1e4), bounding_box_size=0.25)
    state = jaxoptim.init(sampler, START)
    grads = jax.tree.map(jnp.zeros_like, START)
    moved, after = step(sampler, START, grads, state)
    np.testing.assert_allclose(flat(moved) - flat(START), [0.25, 0.25, -0.25], rtol=1e-5)
    np.testing.assert_array_equal(flat(after.slots["initial_param"]), flat(START))


@pytest.mark.slow
def test_another_center_compiles_nothing_new_and_continues_only_its_own_run(tmp_path):
    sampler = rules.SGLD(lr=0.01, nbeta=3.0, localization=5.0, center=CENTER)
    other = sampler.replace(center=CENTER | {"w": jnp.array([5.0, 5.0])})
    whole = sampling.sample(loss, START, sampler, **FEW)
    sizes = chains.run_steps._cache_size(), chains.init_chains._cache_size()
    moved = sampling.sample(loss, START, other, **FEW)
    assert (chains.run_steps._cache_size(), chains.init_chains._cache_size()) == sizes
    assert (moved.loss[:, 1:] != whole.loss[:, 1:]).all()
    path = tmp_path / "run"
    sampling.sample(loss, START, sampler, checkpoint=path, **FEW | {"num_draws": 2})
    np.testing.assert_array_equal(sampling.sample(loss, START, sampler, checkpoint=path, **FEW).loss, whole.loss)
    with pytest.raises(ValueError, match="of another run: its numbers of the sampler is not what was given"):
        sampling.sample(loss, START, other, checkpoint=path, **FEW)


@pytest.mark.slow
def test_no_center_and_that_of_the_start_are_the_same():
    plain, ends = rules.SGLD(lr=0.01, localization=5.0), []
    for sampler in (plain, plain.replace(center=START), plain.replace(center=dict.fromkeys(START))):
        params, state = START, jaxoptim.init(sampler, START)
        for _ in range(2):
            params, state = step(sampler, params, START, state)
        ends.append(flat(params))
    np.testing.assert_allclose(ends[1:], ends[:1] * 2, rtol=1e-6)


@pytest.mark.parametrize("center", [None, jnp.full(3, 2.0)], ids=["the start", "another"])
def test_the_fall_of_the_potential_is_that_about_the_center(center):
    r"""Along the gradient g a fall of :math:`2s - 2 s^2\,gKg/|g|^4` for the step that is to make one of s."""
    h, nbeta, localization, wanted, start = np.array([1.0, 2.0, 5.0]), 3.0, 4.0, 0.1, np.array([0.5, -0.3, 0.2])

    def quadratic(w):
        return jnp.sum(h * w**2) / 2

    sampler = rules.SGLD(nbeta=nbeta, localization=localization, center=center)
    given = problem(quadratic, jnp.asarray(start), None, RunOptions(KEY))
    fall, _ = minimum.descent(given, run.stacked(sampler, 1), 0, nbeta, jnp.asarray(h * start), wanted, None)
    g = nbeta * h * start + localization * (0 if center is None else start - np.asarray(center))
    exact = 2 * wanted - 2 * wanted**2 * (g @ ((nbeta * h + localization) * g)) / (g @ g) ** 2
    assert fall == pytest.approx(exact, rel=1e-4)


class Net(nnx.Module):
    def __init__(self, value):
        self.w = nnx.Param(jnp.full(3, value))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))


class Linear(eqx.Module):
    w: jax.Array
    act: object

    def __init__(self, value):
        self.w, self.act = jnp.full(3, value), jnp.tanh


@pytest.mark.slow
@pytest.mark.parametrize("module", [Net, Linear], ids=["nnx", "equinox"])
def test_of_a_module_the_center_is_a_module(module):
    sampler = rules.SGLD(lr=0.1, nbeta=0.0, noise_level=0.0, localization=4.0, center=module(3.0))
    end = sampling.sample(lambda model: jnp.sum(model.w[...]), module(1.0), sampler, **FEW | {"num_draws": 1}).params
    np.testing.assert_allclose(end.w[...], np.full((2, 3), 1 + 0.2 * (3 - 1)), rtol=1e-6)


WRONG = {
    "structure": ({"w": jnp.ones(2)}, ValueError, "center has nothing for 'b'"),
    "one array": (jnp.ones(2), ValueError, r"center is an array of shape \(2,\), params is a dict"),
    "shape": (
        CENTER | {"w": jnp.ones(1)},
        ValueError,
        r"The center of 'w' has shape \(1,\), but the parameter has \(2,\)",
    ),
    "complex": (CENTER | {"b": jnp.ones(1, complex)}, TypeError, "center of 'b' is complex, the parameter is not"),
    "ints": (CENTER | {"b": jnp.ones(1, int)}, TypeError, "center of 'b' has dtype int32"),
}


@pytest.mark.costly
@pytest.mark.parametrize(("center", "error", "match"), WRONG.values(), ids=WRONG)
def test_centers_that_do_not_fit(center, error, match):
    sampler = rules.SGLD(localization=1.0, center=center)
    for wrong in (
        lambda: jaxoptim.init(sampler, START),
        lambda: sampling.sample(loss, START, sampler, **FEW),
        lambda: sampling.estimate_llc(loss, START, sampler, nbeta=5.0, **FEW),
    ):
        with pytest.raises(error, match=match) as caught:
            wrong()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("center", "what"),
    [
        ([jnp.array([1.0, jnp.nan])], "numbers that are not finite"),
        ("start", "a str in it"),
        ([jnp.tanh], "a .* in it"),
    ],
    ids=["nan", "string", "function"],
)
def test_centers_that_are_no_numbers(name, center, what):
    with pytest.raises(ValueError, match=f"Invalid center, with {what}. {name} takes a tree like the parameters"):
        SAMPLERS[name].replace(center=center)


# The parts of the steps.

VARIANCE = {
    "SGLD": lambda rule: rule.lr,
    "PSGLD": None,
    "SGHMC": lambda rule: 2 * rule.alpha * rule.lr,
    "SGNHT": lambda rule: 2 * rule.diffusion_factor * rule.lr,
}


@pytest.mark.slow
@of_sampler
def test_parts_are_traces_of_a_run(name):
    r"""The square of the noise is :math:`\epsilon d` in the mean, and its products with gradient and prior zero."""
    masks = {"w": jnp.array([1.0, 0.0]), "b": None, "frozen": None}
    sampler = SAMPLERS[name].replace(
        nbeta=3.0, localization=5.0, center=CENTER, optimize_over=masks, metrics="components"
    )
    seen = sampling.sample(
        loss, START, sampler, key=KEY, num_chains=50, num_draws=60, observables={"w": lambda params: params}
    ).observables
    parts = {key: np.asarray(x, np.float64) for key, x in seen.items() if key.endswith("_norm") or "_dot_" in key}
    assert len(parts) == 9
    assert all(x.shape == (50, 60) for x in parts.values())
    away = (flat(seen["w"]) - flat(START)) * [1, 0, 1]
    np.testing.assert_allclose(parts["distance_norm"], np.linalg.norm(away, axis=-1), rtol=1e-4, atol=1e-6)
    for product in ("grad_dot_noise", "prior_dot_noise"):
        x = parts[product]
        assert abs(x.mean()) < 4 * x.std() / np.sqrt(x.size)
    if (variance := VARIANCE[name]) is not None:
        squares = parts["scaled_noise_norm"] ** 2
        assert abs(squares.mean() - 2 * float(variance(sampler))) < 4 * squares.std() / np.sqrt(squares.size)
    assert not parts["weight_decay_norm"].any()
    assert (parts["scaled_grad_norm"] * parts["localization_norm"] >= abs(parts["grad_dot_prior"]) * (1 - 1e-5)).all()
