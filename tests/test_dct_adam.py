"""DCTAdam's transform and subsamples, against Pyro and against what they mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from pyro.optim.dct_adam import DCTAdam as PyroDCTAdam

import jaxoptim
from comparisons import assert_same
from jaxoptim import rules
from parity import distance

pytestmark = pytest.mark.numbers

STEPS = 100
OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "clip_norm": 1.0, "lrd": 0.995}


def run_pyro(start, noise, options, marks):
    """Pyro's trajectory; ``marks(t)`` are the attributes that its messengers would set before step t."""
    param = torch.tensor(start)
    optimizer = PyroDCTAdam([param], **options)
    for t in range(len(noise)):
        for name, value in marks(t).items():
            setattr(param, name, value)
        param.grad = torch.tensor(noise[t]) + 0.1 * param
        optimizer.step()
    return param.numpy(), optimizer.state[param]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((8,), -1),
        ((2, 17, 2), -2),
        ((1,), -1),
        ((7,), -1),
        ((11, 3), -2),
        ((4, 13), -1),
    ],
)
def test_the_transform_agrees_with_pyro(shape, axis, x64):
    rng = np.random.default_rng(0)
    start, noise = rng.normal(size=shape), rng.normal(size=(STEPS, *shape))
    expected, state = run_pyro(start, noise, OPTIONS, lambda t: {"_pyro_dct_dim": axis})
    rule = rules.DCTAdam(**OPTIONS, dct_dim=axis)

    def body(carry, noise):
        params, state = carry
        return jaxoptim.step(rule, params, noise + 0.1 * params, state), None

    params = jnp.asarray(start)
    (params, ours), _ = jax.lax.scan(body, (params, jaxoptim.init(rule, params)), jnp.asarray(noise))
    assert distance([np.asarray(params)], [expected]) < 1e-12
    for name, slot in ours.slots.items():
        assert slot.shape == tuple(state[name].shape)
        np.testing.assert_allclose(slot, state[name].numpy(), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("axes", [(-1,), (-2,), (-1, -2)], ids=str)
def test_subsamples_agree_with_pyro(axes, x64):
    rng = np.random.default_rng(0)
    shape, sizes = (9, 6), {-1: 2, -2: 4}
    start, noise = rng.normal(size=shape), rng.normal(size=(STEPS, *shape))
    picks = [{a: rng.choice(shape[a], sizes[a], replace=False) for a in axes} for _ in range(STEPS)]
    options = OPTIONS | {"subsample_aware": True}
    marks = [{"_pyro_subsample": {a: torch.tensor(i) for a, i in pick.items()}} for pick in picks]
    expected, state = run_pyro(start, noise, options, marks.__getitem__)

    tx = jaxoptim.dct_adam(**options)
    params = jnp.asarray(start)
    ours, compiled = tx.init(params), []

    @jax.jit
    def step(params, state, noise, pick):
        compiled.append(1)
        updates, state = tx.update(noise + 0.1 * params, state, params, subsample=pick)
        return params + updates, state

    for t in range(STEPS):
        params, ours = step(params, ours, noise[t], {a: jnp.asarray(i) for a, i in picks[t].items()})
    assert len(compiled) == 1
    assert distance([np.asarray(params)], [expected]) < 1e-12
    np.testing.assert_array_equal(ours.slots["step"], state["step"].numpy())


def test_a_mask_is_a_subsample_by_other_means():
    params, grad = jnp.ones((4, 3)), jnp.full((4, 3), 0.5)
    by_index = rules.DCTAdam(subsample_aware=True, subsample={-2: jnp.array([0, 2])})
    by_mask = rules.DCTAdam(subsample_aware=True, subsample=jnp.array([True, False, True, False])[:, None])
    state = jaxoptim.init(by_index, params)
    one, one_state = jaxoptim.step(by_index, params, grad, state)
    other, other_state = jaxoptim.step(by_mask, params, grad, state)
    assert jnp.array_equal(one, other)
    assert_same(one_state, other_state)
    assert jnp.array_equal(one[1::2], params[1::2])


def test_all_numbers_sampled_is_no_subsample():
    params = jnp.arange(6.0).reshape(2, 3)
    plain, aware = rules.DCTAdam(lrd=0.9), rules.DCTAdam(lrd=0.9, subsample_aware=True)
    ours, theirs = (params, jaxoptim.init(aware, params)), (params, jaxoptim.init(plain, params))
    for _ in range(5):
        ours, theirs = (
            jaxoptim.step(aware, ours[0], params, ours[1]),
            jaxoptim.step(plain, theirs[0], params, theirs[1]),
        )
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)


@pytest.mark.slow
def test_a_transform_and_a_subsample_of_another_axis_act_on_the_sampled_series():
    # Pyro fails here. Each sampled row is a series of its own, updated as if it were alone.
    params, grad = jnp.ones((4, 7)), jnp.linspace(-1, 1, 28).reshape(4, 7)
    rule = rules.DCTAdam(lr=0.1, subsample_aware=True, dct_dim=-1, subsample={-2: jnp.array([1, 3])})
    state = jaxoptim.init(rule, params)
    new, state = jaxoptim.step(rule, params, grad, state)
    alone = rules.DCTAdam(lr=0.1, dct_dim=-1)
    expected, _ = jaxoptim.step(alone, params[1], grad[1], jaxoptim.init(alone, params[1]))
    np.testing.assert_allclose(new[1], expected, rtol=1e-6)
    assert jnp.array_equal(new[::2], params[::2])
    assert state.slots["step"].shape == (4, 1)


@pytest.mark.slow
def test_errors_say_which_axis():
    with pytest.raises(ValueError, match=r"dct_dim=-2, but 'bias' of shape \(3,\) has no such axis"):
        jaxoptim.dct_adam(dct_dim=-2).init({"bias": jnp.ones(3)})
    aware = {"subsample_aware": True}
    with pytest.raises(ValueError, match=r"subsample along axis -2, but 'bias' has shape \(3,\)"):
        jaxoptim.dct_adam(**aware, subsample={-2: jnp.array([0])}).init({"bias": jnp.ones(3)})
    params = jnp.ones((4, 3))

    def update(**options):
        tx = jaxoptim.dct_adam(**aware, **options)
        tx.update(params, tx.init(params), params)

    with pytest.raises(ValueError, match="frequencies need the whole time axis"):
        update(dct_dim=-1, subsample={-1: jnp.array([0])})
    with pytest.raises(ValueError, match=r"mask of shape \(3, 1\), which does not broadcast to \(4, 3\)"):
        update(subsample=jnp.ones((3, 1), bool))
    with pytest.raises(ValueError, match="It may not vary along dct_dim"):
        update(dct_dim=-1, subsample=jnp.ones((4, 3), bool))
