"""Clipping of all gradients together, against ``torch.nn.utils``."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.sparse import BCOO

from jaxoptim import optim
from jaxoptim.optim.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

pytestmark = pytest.mark.numbers

GRADS = [np.array([[3.0, -0.5], [0.0, 7.0]]), np.array([-2.0, 1.0, 1e-3]), np.array(4.0)]
NORMS = [2.0, 1, 3.5, "inf", math.inf, -math.inf, 0.5, 0]


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def theirs():
    params = [torch.zeros(grad.shape, dtype=torch.float64, requires_grad=True) for grad in GRADS]
    for param, grad in zip(params, GRADS, strict=True):
        param.grad = torch.tensor(grad)
    return [*params, torch.zeros(1)]


def ours():
    params = [optim.Parameter(np.zeros(grad.shape)) for grad in GRADS]
    for param, grad in zip(params, GRADS, strict=True):
        param.grad = grad
    return [*params, optim.Parameter([0.0])]


def grads_of(params):
    return [None if param.grad is None else np.asarray(param.grad) for param in params]


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("max_norm", [0.5, 100.0, 0])
def test_norms_are_clipped_as_in_torch(norm_type, max_norm):
    a, b = ours(), theirs()
    norm, expected = clip_grad_norm_(a, max_norm, norm_type), torch.nn.utils.clip_grad_norm_(b, max_norm, norm_type)
    np.testing.assert_allclose(norm, expected, rtol=1e-14)
    assert_equal(grads_of(a), grads_of(b))
    total = get_total_norm(GRADS, norm_type)
    np.testing.assert_allclose(total, torch.nn.utils.get_total_norm(map(torch.tensor, GRADS), norm_type), rtol=1e-14)


def test_values_are_clipped_as_in_torch():
    a, b = ours(), theirs()
    assert clip_grad_value_(a, 1.5) is None
    torch.nn.utils.clip_grad_value_(b, 1.5)
    assert_equal(grads_of(a), grads_of(b))


def test_a_trajectory_is_torchs():
    a, b = ours(), theirs()
    opts = optim.AdamW(a, lr=0.1), torch.optim.AdamW(b, lr=0.1)
    for step in range(5):
        for params in (a, b):
            for param, grad in zip(params[:3], GRADS, strict=True):
                grad = grad * (step + 1)
                param.grad = torch.tensor(grad) if params is b else grad
        assert float(clip_grad_norm_(a, 1.0)) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(b, 1.0)), rel=1e-14)
        for opt in opts:
            opt.step()
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x.value, y.detach().numpy(), rtol=1e-12)


def test_trees_come_back():
    tree = {"w": jnp.asarray(GRADS[0]), "b": [jnp.asarray(GRADS[1]), None]}
    clipped, norm = jax.jit(clip_grad_norm_)(tree, 1.0)
    chex.assert_trees_all_close(clipped, jax.tree.map(lambda x: x / (norm + 1e-6), tree))
    assert clip_grad_value_(tree, 0.5)["b"][0].tolist() == [-0.5, 0.5, 1e-3]
    given, norm = clip_grad_norm_({"w": np.array([3.0, 4.0], np.float32)}, 1.0)
    assert float(norm) == 5.0
    assert given["w"].dtype == jnp.float32


def test_single_parameters_iterators_and_nothing():
    (param, *_), expected = ours(), np.linalg.norm(GRADS[0])
    assert float(clip_grad_norm_(param, 1.0)) == pytest.approx(expected)
    assert float(clip_grad_norm_(iter(ours()), 1.0)) == pytest.approx(float(get_total_norm(GRADS)))
    assert float(clip_grad_norm_([], 1.0)[1]) == 0 == float(clip_grad_norm_([optim.Parameter(1.0)], 1.0))
    with pytest.warns(UserWarning, match="`parameters` is an empty generator"):
        clip_grad_norm_(iter([]), 1.0)


def test_a_parameter_given_twice_is_clipped_once():
    (param, *_) = ours()
    norm = clip_grad_norm_([param, param], 1.0)
    np.testing.assert_allclose(param.grad, GRADS[0] / (float(norm) + 1e-6))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norms_that_are_not_finite(bad):
    a, b = ours(), theirs()
    a[0].grad = a[0].grad.at[0, 0].set(bad)
    b[0].grad[0, 0] = bad
    before = grads_of(a)
    for params, clip in ((a, clip_grad_norm_), (b, torch.nn.utils.clip_grad_norm_)):
        with pytest.raises(
            RuntimeError, match=r"^The total norm of order 2\.0 for gradients from `parameters` is non-f"
        ):
            clip(params, 1.0, error_if_nonfinite=True)
    assert_equal(grads_of(a), before)
    clip_grad_norm_(a, 1.0)
    torch.nn.utils.clip_grad_norm_(b, 1.0)
    assert_equal(grads_of(a), grads_of(b))


@pytest.mark.slow
def test_rows_complex_numbers_and_low_precision():
    rows = BCOO((jnp.array([[3.0, 0.0], [0.0, 2.0], [0.0, 2.0]]), jnp.array([[0], [1], [1]])), shape=(4, 2))
    clipped, norm = clip_grad_norm_([rows], 1.0)
    assert float(norm) == 5.0
    np.testing.assert_allclose(clipped[0].todense(), rows.todense() / (5 + 1e-6))
    assert clip_grad_value_([rows], 2.5)[0].todense().tolist() == [[2.5, 0], [0, 2.5], [0, 0], [0, 0]]
    (z,), norm = clip_grad_norm_([jnp.array([3 + 4j])], 1.0)
    assert float(norm) == 5.0
    np.testing.assert_allclose(z, np.array([3 + 4j]) / (5 + 1e-6))
    with pytest.raises(TypeError, match="a gradient is complex"):
        clip_grad_value_([z], 1.0)
    many = jnp.full(100_000, 0.01, jnp.bfloat16)
    (small,), norm = clip_grad_norm_([many], 1.0)
    assert norm.dtype == jnp.float32
    assert float(norm) == pytest.approx(math.sqrt(100_000) * float(many[0]), rel=1e-5)
    assert small.dtype == jnp.bfloat16


def test_in_compiled_functions_only_trees_are_clipped():
    a = ours()
    with pytest.raises(TypeError, match="give it the tree of gradients"):
        jax.jit(lambda x: clip_grad_norm_(a, x))(1.0)
    with pytest.raises(TypeError, match="error_if_nonfinite reads the norm"):
        jax.jit(lambda x: clip_grad_norm_({"w": x}, 1.0, error_if_nonfinite=True))(jnp.ones(2))


def test_another_bound_compiles_nothing(caplog):
    tree = {"w": jnp.ones(17)}
    clip_grad_norm_(tree, 1.0)
    with jax.log_compiles():
        clip_grad_norm_(tree, 2.0)
        clip_grad_norm_(tree, 3.0)
        assert caplog.text == ""
        clip_grad_norm_({"w": jnp.ones(19)}, 3.0)
    assert "Compiling" in caplog.text
