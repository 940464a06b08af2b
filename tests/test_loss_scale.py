"""A factor on the loss that follows what float16 can hold, against torch's GradScaler."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jaxoptim
from jaxoptim import optim
from jaxoptim.engine import programs

pytestmark = pytest.mark.numbers

NUMBERS = {"init_scale": 64.0, "growth_factor": 3.0, "backoff_factor": 0.25, "growth_interval": 4}
RNG = np.random.default_rng(0)
START = RNG.normal(size=(4, 3)).astype(np.float32)
X = RNG.normal(size=(40, 3)).astype(np.float32)
FACTORS = [1.0, 1.0, np.inf, 1.0, 1.0, 1.0, 1.0, 1.0, np.nan, np.inf, *[1.0] * 12, np.inf, *[1.0] * 7]
"""What the loss of each step is multiplied with."""


def loss(params, x, factor):
    return jnp.mean(jnp.cosh(x @ params["w"].T)) * factor


def torch_run():
    """Parameters, factors and trackers after each step of torch's loop, with clipping."""
    weight, scaler = torch.nn.Parameter(torch.tensor(START)), torch.amp.GradScaler("cpu", **NUMBERS)
    optimizer, rows = torch.optim.AdamW([weight], lr=0.02), []
    for factor in FACTORS:
        optimizer.zero_grad()
        scaler.scale(torch.cosh(torch.tensor(X) @ weight.T).mean() * factor).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([weight], 0.5)
        scaler.step(optimizer)
        scaler.update()
        rows.append((weight.detach().numpy().copy(), scaler.get_scale(), scaler.state_dict()["_growth_tracker"]))
    return rows, scaler


@pytest.fixture(scope="module")
def theirs():
    return torch_run()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"accumulate": 4}], ids=["whole", "accumulated"])
def test_minimize_is_torchs_loop(theirs, options):
    opt, scaler = optim.AdamW({"w": START}, lr=0.02), optim.GradScaler(**NUMBERS)
    for factor, (weight, scale, tracker) in zip(FACTORS, theirs[0], strict=True):
        value = opt.minimize(loss, X, factor, loss_scale=scaler, clip_norm=0.5, **options)
        assert bool(opt.last.skipped) == (not np.isfinite(factor))
        assert np.isfinite(value) == np.isfinite(factor)
        assert (scaler.get_scale(), int(scaler.state.growth_tracker)) == (scale, tracker)
        np.testing.assert_allclose(opt.params["w"], weight, rtol=0, atol=2e-6)
    assert int(opt.last.num_skipped) == 4


def test_a_loss_that_is_not_finite_says_nothing_of_the_factor():
    opt, scaler = optim.SGD({"w": jnp.ones(2)}, lr=0.5), optim.GradScaler(init_scale=8.0)
    opt.minimize(lambda params: jnp.sum(params["w"]) + jnp.inf, skip_nonfinite=True, loss_scale=scaler)
    chex.assert_trees_all_equal(opt.params["w"], jnp.ones(2))
    assert (bool(opt.last.skipped), scaler.get_scale()) == (True, 8.0)


def test_a_loop_that_is_written_out_is_torchs(theirs):
    opt, scaler = optim.AdamW({"w": START}, lr=0.02), optim.GradScaler(**NUMBERS)
    gradient = jax.jit(jax.grad(lambda params, factor, scale: loss(params, X, factor) * scale))
    for factor, (weight, scale, _) in zip(FACTORS, theirs[0], strict=True):
        grads = gradient(opt.params, factor, scaler.state.scale)
        norm = jnp.linalg.norm(grads["w"]) / scaler.state.scale
        scaler.step(opt, jax.tree.map(lambda grad: grad * jnp.minimum(1, 0.5 / (norm + 1e-6)), grads))  # noqa: B023
        scaler.update()
        assert scaler.get_scale() == scale
        np.testing.assert_allclose(opt.params["w"], weight, rtol=0, atol=2e-6)
    with pytest.raises(RuntimeError, match="There was no step"):
        scaler.update()


def test_the_transformation_is_torchs_loop(theirs):
    scaling = jaxoptim.LossScale(**NUMBERS)
    inner = optax.chain(optax.clip_by_global_norm(0.5), jaxoptim.adamw(lr=0.02))
    tx, params = jaxoptim.scale_loss(inner, scaling), {"w": jnp.asarray(START)}

    def body(carry, factor):
        params, state = carry
        grads = jax.grad(lambda params: scaling.scaled(loss(params, X, factor), state.loss_scale))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params["w"], state.loss_scale.scale)

    _, (weights, scales) = jax.lax.scan(body, (params, tx.init(params)), jnp.array(FACTORS, jnp.float32))
    assert scales.tolist() == [scale for _, scale, _ in theirs[0]]
    np.testing.assert_allclose(weights, [weight for weight, *_ in theirs[0]], rtol=0, atol=3e-6)


def test_small_gradients_of_float16_are_not_lost():
    def small(params):
        return jnp.sum(params * jnp.float16(1.0)).astype(jnp.float32) * 1e-9

    opt = optim.SGD(jnp.ones(3, jnp.float16), lr=1e7, master_weights=True)
    opt.minimize(small)
    chex.assert_trees_all_equal(opt.params, jnp.ones(3, jnp.float16))  # 1e-9 is zero in float16
    scaler = optim.GradScaler(init_scale=2.0**20)
    opt.minimize(small, loss_scale=scaler)
    (state,) = opt.state.values()
    chex.assert_trees_all_close(state["master_weights"], jnp.full(3, 0.99), rtol=1e-3)


def test_state_dicts_cross_in_both_directions(theirs):
    scaler = optim.GradScaler()
    scaler.load_state_dict(theirs[1].state_dict())
    assert scaler.state_dict() == theirs[1].state_dict()
    back = torch.amp.GradScaler("cpu")
    back.load_state_dict(scaler.state_dict())
    assert back.get_scale() == scaler.get_scale()
    with pytest.raises(KeyError, match="loaded state dict of a GradScaler has no 'scale'"):
        scaler.load_state_dict({})


def test_the_factor_changes_without_a_new_program():
    opt, scaler = optim.SGD({"w": START}, lr=0.1), optim.GradScaler(**NUMBERS)
    opt.minimize(loss, X, 1.0, loss_scale=scaler)
    before = programs.minimize._cache_size()
    for factor in (jnp.nan, 1.0, 1.0):
        opt.minimize(loss, X, factor, loss_scale=scaler)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 8.0})
    opt.minimize(loss, X, 1.0, loss_scale=scaler)
    assert programs.minimize._cache_size() == before


def test_a_factor_does_not_grow_to_infinity():
    scaling = jaxoptim.LossScale(init_scale=2.0**127, growth_interval=1)
    state = scaling.updated(scaling.init(), is_finite=True)
    assert (float(state.scale), int(state.growth_tracker)) == (2.0**127, 0)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"init_scale": 0.0}, "Invalid init_scale: 0.0. LossScale takes init_scale > 0"),
        ({"growth_factor": 1.0}, "LossScale takes growth_factor > 1"),
        ({"backoff_factor": 1.0}, r"LossScale takes backoff_factor in \(0, 1\)"),
        ({"growth_interval": 0}, "LossScale takes growth_interval >= 1"),
    ],
)
def test_numbers_out_of_range(numbers, message):
    for make in (optim.GradScaler, jaxoptim.LossScale):
        with pytest.raises(ValueError, match=message):
            make(**numbers)


def test_what_is_no_scaler():
    opt = optim.SGD({"w": START})
    for wrong in (1024.0, jaxoptim.LossScale()):
        with pytest.raises(TypeError, match=r"loss_scale takes an optim\.GradScaler, which keeps the factor"):
            opt.minimize(loss, X, 1.0, loss_scale=wrong)
    with pytest.raises(TypeError, match="LBFGS evaluates the loss at several points"):
        optim.LBFGS({"w": START}).minimize(loss, X, 1.0, loss_scale=optim.GradScaler())
