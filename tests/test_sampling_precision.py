"""Chains of float16 and bfloat16 parameters: they move in float32, and the loss gets them in their own dtype."""

import copy
import dataclasses
import functools
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxoptim
from jaxoptim import checkpoint, optim, rules, sampling
from jaxoptim.core.precision import widened

pytestmark = pytest.mark.numbers

KEY = jax.random.key(0)
FEW = {"key": KEY, "num_chains": 2, "num_draws": 4}
SGLD = rules.SGLD(lr=1e-6, nbeta=100.0, localization=1.0)
slow = pytest.mark.slow
LOW = pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=slow)])
SAMPLERS = [rules.SGLD, rules.SGNHT, *(pytest.param(cls, marks=slow) for cls in (rules.SGHMC, rules.PSGLD))]
CLASSES = [optim.SGLD, optim.SGNHT, optim.SGHMC, optim.PSGLD]


def quadratic(w):
    return jnp.sum((w.astype(jnp.float32) - 1) ** 2) / 2


def squares(params):
    return sum(quadratic(x) for x in jax.tree.leaves(params))


def equal(a, b):
    """Whether two trees are the same to the last bit, dtypes and all."""
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return [x.dtype for x in a] == [x.dtype for x in b] and all(map(np.array_equal, a, b))


# One distribution in all dtypes.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
@pytest.mark.parametrize("lr", [1e-3, 1e-5, 1e-4, 1e-6, 1e-7])
@pytest.mark.parametrize("is_coarse", [False, True], ids=["loss32", "loss16"])
def test_estimates_agree_in_all_dtypes(lr, is_coarse):
    """With one key all have the same noise, so that they differ by much less than the error of each."""

    def loss(w):
        return jnp.sum((w - 1) ** 2) / 2 if is_coarse else quadratic(w)

    options = {"nbeta": 1e3, "key": KEY, "num_chains": 4, "num_draws": 1000, "num_burnin_steps": 200}
    wide, *narrow = (
        sampling.estimate_llc(loss, jnp.ones(50, dtype), rules.SGLD(lr=lr), num_steps_bw_draws=3, **options)
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    )
    assert 0 < wide.mcse < 0.2 * wide.mean
    for llc in narrow:
        assert llc.init_loss == 0
        assert abs(llc.mean - wide.mean) < min(2 * wide.mcse, 0.03 * wide.mean)
        assert llc.std == pytest.approx(wide.std, rel=0.1)


@pytest.mark.slow
@LOW
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda cls: cls.__name__)
def test_a_run_is_that_of_float32_whose_loss_casts(sampler, dtype):
    """To the last bit: losses, positions between the draws, what the sampler keeps, and the end."""
    start, rule = jnp.linspace(0.5, 1.5, 5).astype(dtype), sampler(lr=1e-6, nbeta=100.0, localization=10.0)
    options = FEW | {"observables": {"all": State()}, "num_steps_bw_draws": 20}
    ours = sampling.sample(quadratic, start, rule, **options)
    exact = sampling.sample(lambda w: quadratic(w.astype(dtype)), start.astype(jnp.float32), rule, **options)
    assert equal((ours.loss, ours.observables), (exact.loss, exact.observables))
    assert equal(ours.params, exact.params.astype(dtype))
    positions = ours.observables["all"][0]
    assert positions.dtype == jnp.float32
    assert (positions != positions.astype(dtype)).any()


@dataclasses.dataclass(frozen=True)
class State(sampling.Observable):
    """The positions, and what the sampler keeps of them."""

    def update(self, memory, draw):
        return memory, (draw.arrays, draw.grads, draw.state.slots)


@dataclasses.dataclass(frozen=True)
class Positions(sampling.Observable):
    """The positions alone, whatever the sampler."""

    def update(self, memory, draw):
        return memory, draw.arrays


@pytest.mark.slow
def test_a_transformation_moves_in_float32_too():
    numbers, options = {"lr": 1e-9, "nbeta": 100.0}, FEW | {"observables": {"all": Positions()}}
    by_rule, by_tx = (
        sampling.sample(quadratic, jnp.ones(3, jnp.bfloat16), sampler, **options)
        for sampler in (rules.SGLD(**numbers), jaxoptim.sgld(**numbers))
    )
    np.testing.assert_allclose(by_tx.observables["all"], by_rule.observables["all"], rtol=0, atol=2e-7)
    assert len(np.unique(by_tx.observables["all"])) > 10


# What is seen of them.


@pytest.mark.slow
@LOW
def test_losses_and_functions_get_the_dtype_that_was_given(dtype):
    start = {"low": jnp.full(3, 0.5, dtype), "full": jnp.ones(2), "none": None}
    seen = []

    def loss(params, batch):
        seen.append(jax.tree.map(lambda x: x.dtype, params))
        return (squares(params) * batch.mean()).astype(dtype)

    def same(params):
        seen.append(jax.tree.map(lambda x: x.dtype, params))
        return params

    watched = {"same": same, "state": State(), "seen": Seen()}
    found = sampling.sample(loss, start, SGLD, jnp.ones(4), batch_size=2, observables=watched, **FEW)
    given = jax.tree.map(lambda x: x.dtype, start)
    assert all(dtypes == given for dtypes in seen)
    assert jax.tree.map(lambda x: x.dtype, (found.params, found.observables["same"])) == (given, given)
    positions, grads, slots = found.observables["state"]
    kept = jax.tree.leaves((positions, grads, slots["initial_param"], found.loss))
    assert all(x.dtype == jnp.float32 for x in kept)
    assert equal(found.observables["same"], jax.tree.map(lambda x, y: x.astype(y.dtype), positions, start))
    assert equal(found.observables["seen"], found.observables["same"])
    # The localization pulls toward the start.
    assert equal(slots["initial_param"]["low"], jnp.full((2, 4, 3), 0.5))


@dataclasses.dataclass(frozen=True)
class Seen(sampling.Observable):
    """The parameters as the loss gets them."""

    def update(self, memory, draw):
        return memory, draw.params


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
def test_a_mean_over_many_batches_does_not_overflow():
    """In float16 the sum of the losses of all data would."""
    data = jnp.full(3001, 50.0, jnp.float16)
    llc = sampling.estimate_llc(
        lambda w, x: jnp.mean(x) + jnp.sum(w**2), jnp.zeros(2, jnp.float16), SGLD, data, batch_size=2, **FEW
    )
    assert llc.init_loss == pytest.approx(50)


@pytest.mark.slow
def test_the_covariance_is_of_positions_in_float32():
    watched = {"all": sampling.Covariance(), "some": sampling.Covariance(lambda w: w[:2])}
    low, full = (
        sampling.sample(quadratic, jnp.ones(3, dtype), SGLD, observables=watched, **FEW | {"num_draws": 300})
        for dtype in (jnp.float16, jnp.float32)
    )
    np.testing.assert_allclose(low.observables["all"], full.observables["all"], rtol=0.01, atol=1e-8)
    assert low.observables["some"].dtype == jnp.float32
    assert (low.observables["some"] != low.observables["all"][:, :2, :2]).any()


@pytest.mark.slow
def test_acceptance_rates_the_step_size_in_every_dtype():
    rates = []
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        found = sampling.sample(
            quadratic, jnp.ones(20, dtype), rules.SGLD(lr=1e-3, nbeta=1e3), num_burnin_steps=50,
            observables={"accepted": sampling.MalaAcceptance()}, **FEW | {"num_draws": 500},
        )  # fmt: skip
        rates.append(float(found.observables["accepted"].mean()))
    assert rates[0] == pytest.approx(0.78, abs=0.1)
    np.testing.assert_allclose(rates[1:], rates[0], rtol=0.01)


@pytest.mark.slow
@LOW
def test_mala_acceptance_computes_in_float32(dtype):
    x, y = (jax.random.normal(key, (1000,)).astype(dtype) for key in jax.random.split(KEY))
    U = quadratic(x).astype(dtype), quadratic(y).astype(dtype)
    found = sampling.mala_acceptance(x, x - 1, U[0], y, y - 1, U[1], lr=0.01)
    wide = [widened(a) for a in (x, x - 1, U[0], y, y - 1, U[1])]
    assert equal(found, sampling.mala_acceptance(*wide, lr=0.01))
    assert found.dtype == jnp.float32


# Estimates, with what they take.


@pytest.mark.slow
def test_calibrate_agrees():
    options = {"lr": [1e-6, 1e-4], "localization": [0.0, 10.0], "nbeta": 1e3, "key": KEY, "num_chains": 2}
    wide, low = (
        sampling.calibrate(quadratic, jnp.ones(50, dtype), SGLD, num_draws=300, **options)
        for dtype in (jnp.float32, jnp.float16)
    )
    assert (wide.mean > 0.01).all()
    np.testing.assert_allclose(low.mean, wide.mean, rtol=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
def test_selections_hold_the_others():
    start = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    llc = sampling.estimate_llc(
        squares, start, SGLD, nbeta=10.0, selections=["a", "b"], observables={"all": State()}, **FEW
    )
    positions = llc.observables["all"][0]
    assert (positions["a"][1] == 1).all()
    assert (positions["b"][0] == 1).all()
    assert (positions["a"][0, :, 1:] != 1).all()


# Modules.


class Net(nnx.Module):
    """A module of half precision with statistics of float32."""

    def __init__(self, dtype):
        self.linear = nnx.Linear(3, 2, param_dtype=dtype, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(2, use_running_average=True, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.norm(self.linear(x))


class LinenNet(linen.Module):
    """The same in linen."""

    dtype: str

    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(use_running_average=True)(linen.Dense(2, param_dtype=self.dtype)(x))


def module(kind, dtype):
    """A module, and a loss of it."""
    x = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
    if kind == "equinox":
        made = jax.tree.map(lambda x: x.astype(dtype), eqx.nn.Linear(3, 2, key=KEY))
        return made, lambda model: jnp.mean(jax.vmap(model)(x) ** 2)
    if kind == "nnx":
        return Net(dtype), lambda model: jnp.mean(model(x) ** 2)
    net = LinenNet(jnp.dtype(dtype).name)
    return net.init(KEY, x), lambda variables: jnp.mean(net.apply(variables, x) ** 2)


def dtypes(tree):
    return sorted((jax.tree_util.keystr(path), str(x.dtype)) for path, x in jax.tree_util.tree_leaves_with_path(tree))


@pytest.mark.slow
@LOW
@pytest.mark.parametrize("kind", ["equinox", "nnx", "linen"])
def test_modules_keep_their_dtypes_and_move_in_float32(kind, dtype, tmp_path):
    model, loss = module(kind, dtype)
    state = nnx.state if kind == "nnx" else lambda x: x
    watched = {"all": State(), "model": lambda model: model, "accepted": sampling.MalaAcceptance()}
    options = FEW | {"observables": watched, "num_steps_bw_draws": 10}
    found = sampling.sample(loss, model, SGLD, **options)
    assert dtypes(state(found.params)) == dtypes(state(model))
    positions = jax.tree.leaves(found.observables["all"][0])
    assert all(x.dtype == jnp.float32 and (x != x.astype(dtype)).any() for x in positions)
    assert np.isfinite(np.asarray(found.observables["accepted"])[:, 1:]).all()
    assert str(jnp.dtype(dtype)) in {x for _, x in dtypes(found.observables["model"])}
    sampling.sample(loss, model, SGLD, checkpoint=tmp_path / "run", **options | {"num_draws": 2})
    resumed = sampling.sample(loss, model, SGLD, checkpoint=tmp_path / "run", **options)
    same = (
        (state(resumed.params), resumed.observables, resumed.loss),
        (state(found.params), found.observables, found.loss),
    )
    assert all(np.array_equal(x, y, equal_nan=True) for x, y in zip(*map(jax.tree.leaves, same), strict=True))


# Runs that go on.


@pytest.mark.slow
@LOW
def test_a_resumed_run_equals_the_undisturbed_one(dtype, tmp_path):
    """Each stretch is too short to move a number of the dtype, so positions that were rounded would be seen."""
    start, path, options = jnp.ones(4, dtype), tmp_path / "run", FEW | {"observables": {"all": State()}}
    run = functools.partial(sampling.sample, quadratic, start, rules.SGLD(lr=1e-9, nbeta=100.0))
    whole = run(**options)
    run(checkpoint=path, **options | {"num_draws": 2})
    resumed = run(checkpoint=path, **options)
    assert equal((resumed.loss, resumed.observables, resumed.params), (whole.loss, whole.observables, whole.params))
    positions = whole.observables["all"][0]
    assert (positions.astype(dtype) == start).all()
    assert len(np.unique(positions)) > 20
    other = start.astype(jnp.float32)
    with pytest.raises(ValueError, match="is of another run: its params is not what was given"):
        sampling.sample(quadratic, other, rules.SGLD(lr=1e-9, nbeta=100.0), checkpoint=path, **options)


@pytest.mark.slow
def test_a_checkpoint_of_rounded_chains_is_refused(tmp_path):
    """Such as this library once wrote."""
    path = tmp_path / "run"
    sampling.sample(quadratic, jnp.ones(2, jnp.bfloat16), SGLD, checkpoint=path, **FEW)
    content = checkpoint.load(path)
    content["chains"] = [x.astype(jnp.bfloat16) if x.shape == (2, 2) else x for x in content["chains"]]
    checkpoint.save(path, content)
    with pytest.raises(ValueError, match=r"has chains in the dtype of their parameters.*remove it") as error:
        sampling.sample(quadratic, jnp.ones(2, jnp.bfloat16), SGLD, checkpoint=path, **FEW)
    assert len(str(error.value)) - len(str(path)) <= 300


# The torch-style samplers, and loops of one's own.

ROUNDS = "rounds each step to the parameter's dtype, bfloat16.*Give float32 parameters and cast them in the loss"


@pytest.mark.slow
@pytest.mark.parametrize("make", CLASSES, ids=lambda cls: cls.__name__)
def test_torch_style_samplers_warn_of_rounding_once(make):
    params = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2, jnp.bfloat16)}
    with pytest.warns(UserWarning, match=f"{make.__name__} {ROUNDS}") as caught:
        chain = make(params, lr=1e-6, nbeta=50.0)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(str(caught[0].message)) <= 300
    chain.minimize(squares)
    chain.add_param_group({"params": [jnp.ones(2, jnp.bfloat16)]})
    copy.deepcopy(chain)
    pickle.loads(pickle.dumps(chain))


def test_torch_style_samplers_warn_of_what_moves_only():
    params = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16)}
    for given in (params, [{"params": params}]):
        optim.SGLD(given, nbeta=50.0, frozen=lambda name: name.endswith("b"))
    chain = optim.SGLD(jax.tree.map(widened, params), nbeta=50.0)
    with pytest.warns(UserWarning, match=ROUNDS) as caught:
        chain.add_param_group({"params": [jnp.ones(2, jnp.bfloat16)]})
    assert caught[0].filename == __file__


@LOW
def test_a_loop_with_master_weights_moves_in_float32(dtype):
    """What the docstring of the samplers gives as the way; to the last bit the run of ``sample``."""
    rule = rules.SGLD(lr=1e-6, nbeta=100.0, key=KEY)

    def run(rule, params, loss):
        def body(_, carry):
            params, state = carry
            return jaxoptim.step(rule, params, jax.grad(loss)(params), state)

        return jax.lax.fori_loop(0, 200, body, (params, jaxoptim.init(rule, params)))

    params, state = run(rule.with_precision(master_weights=True), jnp.ones(50, dtype), quadratic)
    exact, _ = run(rule, jnp.ones(50), lambda w: quadratic(w.astype(dtype)))
    assert equal(state.slots["master_weights"], exact)
    assert equal(params, exact.astype(dtype))
