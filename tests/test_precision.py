"""Parameters and state of few bits: values kept in float32, and rounding that loses nothing in the mean."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO

import jaxoptim
from jaxoptim import optim, rules
from jaxoptim.core.precision import kept
from jaxoptim.pyro.optim import PyroOptim
from table import FIRST

pytestmark = pytest.mark.numbers

LOW = [jnp.bfloat16, jnp.float16]
LARGE = 70_000
"""So many numbers stand by themselves, and not among small arrays."""
RNG = np.random.default_rng(0)


def start(shapes, dtype):
    rng = np.random.default_rng(1)
    return {str(at): jnp.asarray(rng.normal(size=shape), dtype) for at, shape in enumerate(shapes)}


def loss(params):
    """Of parameters of any dtype, computed in float32."""
    return sum(jnp.sum(jnp.cosh(x.astype(jnp.float32) - 0.3)) for x in jax.tree.leaves(params))


def rounded(params, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), params)


def run(rule, params, loss_fn, steps):
    """Values and state after some steps, each of the rule and then of the sum, which no compiler makes one of."""
    gradient, state = jax.jit(jax.grad(loss_fn)), jaxoptim.init(rule, params)
    for _ in range(steps):
        grads = gradient(params)
        if rule.sparse == "required":
            grads = jax.tree.map(rows_of, grads)
        params, state = jaxoptim.step(rule, params, grads, state)
    return params, state


def rows_of(grad):
    return BCOO((grad, jnp.arange(len(grad))[:, None]), shape=grad.shape)


# Values in float32 beside the parameters.


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_run_with_master_weights_is_that_in_float32_with_a_cast_in_the_loss(case):
    dtype = LOW[FIRST.index(case) % 2]
    rule, params = case.ours(), start(case.row.shapes, dtype)
    new, state = run(rule.with_precision(master_weights=True), params, loss, 100)
    full, full_state = run(rule, rounded(params, jnp.float32), lambda params: loss(rounded(params, dtype)), 100)
    chex.assert_trees_all_equal(state.slots["master_weights"], full)
    chex.assert_trees_all_equal(new, rounded(full, dtype))
    chex.assert_trees_all_equal({k: x for k, x in state.slots.items() if k != "master_weights"}, full_state.slots)
    assert state.slots["master_weights"].keys() == params.keys()


@pytest.mark.slow
def test_the_transformation_gives_the_same_parameters():
    rule = rules.AdamW(lr=1e-3).with_precision(master_weights=True)
    tx, params = jaxoptim.transformation(rule), start([(6, 4), (5,)], jnp.bfloat16)
    state = tx.init(params)
    mine, its = params, jaxoptim.init(rule, params)
    for _ in range(50):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        mine, its = jaxoptim.step(rule, mine, jax.grad(loss)(mine), its)
    chex.assert_trees_all_equal((params, state), (mine, its))
    assert params["0"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_packed_and_mixed_trees():
    rule, params = rules.Adam().with_precision(master_weights=True), start([(6, 4), (5,), (2,)], jnp.bfloat16)
    params |= {"full": jnp.ones(3), "none": None}
    packed = jaxoptim.pack(params)
    whole, own = jaxoptim.init(rule, params), jaxoptim.init(rule, packed)
    assert whole.slots["master_weights"]["full"] is None
    for _ in range(5):
        grads = jax.grad(loss)(params)
        params, whole = jaxoptim.step(rule, params, grads, whole)
        packed, own = jaxoptim.step(rule, packed, grads, own)
    chex.assert_trees_all_equal(packed.unpack(), params)


def test_a_value_that_somebody_assigns_counts():
    rule = rules.SGD(lr=1e-4).with_precision(master_weights=True)
    params = jnp.array([1.0, 2.0], jnp.bfloat16)
    state = jaxoptim.init(rule, params)
    params, state = jaxoptim.step(rule, params, jnp.ones(2, jnp.bfloat16), state)
    params = params.at[1].set(5.0)
    params, state = jaxoptim.step(rule, params, jnp.ones(2, jnp.bfloat16), state)
    chex.assert_trees_all_close(state.slots["master_weights"], jnp.array([0.9998, 4.9999]), rtol=1e-6)


@pytest.mark.slow
def test_sparse_rows():
    rule = rules.SGD(lr=1e-4).with_precision(master_weights=True)
    params = jnp.ones((4, 2), jnp.bfloat16)
    state = jaxoptim.init(rule, params)
    grad = BCOO((jnp.ones((2, 2), jnp.bfloat16), jnp.array([[1], [3]])), shape=(4, 2))
    for _ in range(100):
        params, state = jaxoptim.step(rule, params, grad, state)
    chex.assert_trees_all_close(state.slots["master_weights"][:, 0], jnp.array([1, 0.99, 1, 0.99]), rtol=1e-5)
    assert params[:, 0].tolist() == [1.0, 0.98828125, 1.0, 0.98828125]


CLASSES = [
    (optim.AdamW, {}),
    (optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    (optim.Adagrad, {"lr": 0.01}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "options"), CLASSES, ids=[cls.__name__ for cls, _ in CLASSES])
def test_classes(cls, options):
    params = start([(6, 4), (5,), (LARGE,)], jnp.bfloat16) | {"full": jnp.ones(3)}
    full = cls(rounded(params, jnp.float32), **options)
    make = functools.partial(cls, master_weights=True, **options)
    opt = make(params)

    def loss_of_full(params):
        return loss(rounded({k: x for k, x in params.items() if k != "full"}, jnp.bfloat16)) + loss(params["full"])

    def loss_of(params):
        return loss({k: x for k, x in params.items() if k != "full"}) + loss(params["full"])

    for index in range(60):
        if index % 2:
            opt.minimize(loss_of)
            full.minimize(loss_of_full)
        else:
            opt.step(jax.grad(loss_of)(opt.params))
            full.step(jax.grad(loss_of_full)(full.params))
        if index == 15:
            opt = pickle.loads(pickle.dumps(opt))
        elif index == 30:
            saved, opt = opt.state_dict(), make(opt.params)
            opt.load_state_dict(saved)
        elif index == 40:
            opt.param_groups[0]["lr"] = full.param_groups[0]["lr"] = 0.02
        elif index == 50:
            _, params, state = opt.to_functional()
            opt.from_functional(params, state)
    states = {param.name: opt.state[param] for param in opt.param_groups[0]["params"]}
    masters = {name: state["master_weights"] for name, state in states.items() if name != "full"}
    expected = dict(full.params)
    chex.assert_trees_all_equal(opt.params.pop("full"), expected.pop("full"))
    chex.assert_trees_all_equal(masters, expected)
    assert "master_weights" not in states["full"]


@pytest.mark.needs("torch")
def test_a_state_of_torch_goes_on_with_master_weights():
    import torch

    values = RNG.normal(size=(3, 2)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(values).bfloat16())
    their_optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    theirs.grad = torch.ones_like(theirs)
    their_optimizer.step()
    opt = optim.SGD([jnp.ones((3, 2), jnp.bfloat16)], master_weights=True)
    opt.load_state_dict(their_optimizer.state_dict())
    opt.step([jnp.ones((3, 2), jnp.bfloat16)])
    (state,) = opt.state.values()
    chex.assert_trees_all_close(state["momentum_buffer"], jnp.full((3, 2), 1.9))
    chex.assert_trees_all_close(state["master_weights"], jnp.full((3, 2), 1 - 0.19))


@pytest.mark.needs("torch")
@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{"master_weights": True}, {"rounding": "stochastic"}, {"state_dtype": jnp.bfloat16}], ids=str
)
def test_the_pure_face_goes_to_torch_and_back(how):
    import torch

    shapes = [(3, 2), (4,)]
    rule, params = rules.AdamW(lr=0.1).with_precision(**how), start(shapes, jnp.bfloat16)
    state = jaxoptim.init(rule, params)
    for _ in range(3):
        params, state = jaxoptim.step(rule, params, params, state)
    there = jaxoptim.interop.torch.to_torch_state_dict(rule, params, state)
    torch.optim.AdamW([torch.ones(shape, dtype=torch.bfloat16) for shape in shapes]).load_state_dict(there)
    back = jaxoptim.interop.torch.from_torch(rule, params, there)
    chex.assert_trees_all_equal_dtypes(back, state)
    chex.assert_trees_all_equal(back, state)


def test_pyro_style_optimizers_pass_it_on():
    optimizer = PyroOptim(optim.SGD, {"lr": 1e-5, "master_weights": True})
    param = optim.Parameter(jnp.ones(3, jnp.bfloat16), "a")
    for _ in range(100):
        param.grad = jnp.ones(3, jnp.bfloat16)
        optimizer([param])
    chex.assert_trees_all_close(optimizer.get_state()["a"]["state"][0]["master_weights"], jnp.full(3, 0.999), rtol=1e-5)


# Stochastic rounding.


@pytest.mark.parametrize("dtype", LOW, ids=["bfloat16", "float16"])
def test_stochastic_rounding_is_to_a_neighbour_and_right_in_the_mean(dtype):
    steps, spread = 2000, 6 if dtype == jnp.bfloat16 else 3
    x = jnp.asarray(RNG.normal(size=1000) * np.exp(RNG.normal(size=1000) * spread), jnp.float32)
    draws = jax.jit(jax.vmap(lambda step: kept(x, dtype, "stochastic", step)))(jnp.arange(steps))
    draws, exact = np.asarray(draws.astype(jnp.float32), np.float64), np.asarray(x, np.float64)
    low, high = draws.min(0), draws.max(0)
    assert np.all((low <= exact) & (exact <= high) | (low == high))
    assert all(len(np.unique(of)) <= 2 for of in draws.T)
    chance = (exact - low) / np.where(high > low, high - low, 1)
    sure = (chance > 0.02) & (chance < 0.98)
    z = (draws.mean(0) - exact)[sure] / ((high - low) * np.sqrt(chance * (1 - chance) / steps))[sure]
    assert sure.sum() > 900
    assert abs(z.mean()) < 4 / np.sqrt(sure.sum())
    assert 0.9 < z.std() < 1.1
    assert np.corrcoef(draws[: steps // 2, sure][:, :300].T)[~np.eye(300, dtype=bool)].std() < 2 / np.sqrt(steps // 2)


@pytest.mark.slow
def test_numbers_that_have_no_neighbours_stay():
    x = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 1.5], jnp.float32)
    for dtype in LOW:
        chex.assert_trees_all_equal(kept(x, dtype, "stochastic", 3), x.astype(dtype))
    assert jnp.signbit(kept(x, jnp.bfloat16, "stochastic", 3)[1])


@pytest.mark.slow
def test_ten_thousand_small_steps():
    start, rate = jnp.asarray(RNG.uniform(1, 2, size=4000), jnp.bfloat16), 1e-5
    grads = jnp.ones(4000, jnp.bfloat16)

    def moved(rule):
        state = jaxoptim.init(rule, start)
        body = lambda _, carry: jaxoptim.step(rule, carry[0], grads, carry[1])  # noqa: E731
        params, _ = jax.jit(lambda carry: jax.lax.fori_loop(0, 10_000, body, carry))((start, state))
        return np.asarray(start - params, np.float64) / (rate * 10_000)

    plain = rules.SGD(lr=rate)
    assert np.all(moved(plain) == 0)  # half the distance of neighbours is 390 times the step
    drawn = moved(plain.with_precision(rounding="stochastic"))
    assert abs(drawn.mean() - 1) < 4 * drawn.std() / np.sqrt(drawn.size)
    assert drawn.std() < 0.5


def test_state_of_few_bits():
    def second_moment(**how):
        rule, params = rules.Adam(lr=0.0, betas=(0.9, 0.999)).with_precision(**how), jnp.ones(2000, jnp.bfloat16)
        state = jaxoptim.init(rule, params)
        state = state._replace(slots=jax.tree.map(lambda x: jnp.full_like(x, 1.0), state.slots))
        body = lambda _, carry: jaxoptim.step(rule, carry[0], jnp.full(2000, 2.0, jnp.bfloat16), carry[1])  # noqa: E731
        _, state = jax.jit(lambda carry: jax.lax.fori_loop(0, 300, body, carry))((params, state))
        return state.slots["exp_avg_sq"]

    exact = float(second_moment()[0])
    assert exact == pytest.approx(4 - 3 * 0.999**300)
    nearest = second_moment(state_dtype=jnp.bfloat16)
    assert nearest.dtype == jnp.bfloat16
    assert float(nearest[0]) == 1.0  # 0.003 is less than half the distance of neighbours
    drawn = np.asarray(second_moment(state_dtype="bfloat16", rounding="stochastic"), np.float64)
    assert abs(drawn.mean() - exact) < 4 * drawn.std() / np.sqrt(drawn.size)


@pytest.mark.slow
def test_a_class_rounds_and_keeps_state_as_its_rule_does():
    params = start([(LARGE,)], jnp.bfloat16)
    how = {"rounding": "stochastic", "state_dtype": jnp.bfloat16}
    opt, rule = optim.Adam(params, **how), rules.Adam().with_precision(**how)
    state = jaxoptim.init(rule, params)
    step = jax.jit(jaxoptim.step)
    for _ in range(10):
        grads = jax.grad(loss)(params)
        opt.step(grads)
        params, state = step(rule, params, grads, state)
    chex.assert_trees_all_equal(opt.params, params)
    (entry,) = opt.state.values()
    assert (entry["exp_avg"].dtype, entry["exp_avg_sq"].dtype) == (jnp.bfloat16, jnp.bfloat16)
    plain = optim.Adam(start([(LARGE,)], jnp.bfloat16))
    plain.step(grads)
    assert not jnp.array_equal(plain.params["0"], opt.params["0"])


# How it is said.


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"rounding": "up"}, ValueError, "rounding is 'nearest' or 'stochastic', but got 'up'"),
        ({"master_weights": 1}, TypeError, "master_weights is True or False, but got 1"),
        ({"state_dtype": jnp.float32}, ValueError, "state_dtype is bfloat16, float16 or None, but got float32"),
    ],
)
def test_wrong_options(how, error, message):
    for make in (lambda: optim.Adam({"w": 1.0}, **how), lambda: rules.Adam().with_precision(**how)):
        with pytest.raises(error, match=message):
            make()


def test_an_update_without_parameters_says_that_it_needs_them():
    rule, params = rules.Adam().with_precision(master_weights=True), jnp.ones(2, jnp.bfloat16)
    with pytest.raises(ValueError, match="Adam needs the parameters to keep their value in more or other bits"):
        jaxoptim.update(rule, params, jaxoptim.init(rule, params))


def test_a_rule_keeps_its_precision():
    rule = rules.Adam().with_precision(master_weights=True)
    for same in (rule.replace(lr=0.1), rule.at(3), jax.tree.map(lambda x: x, rule), pickle.loads(pickle.dumps(rule))):
        assert same.precision.master_weights
    assert not rules.Adam().precision.master_weights
    assert not rule.with_precision().precision.master_weights
