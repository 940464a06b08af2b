"""Newton's method against Pyro's, and against NumPy where Pyro has none or gives NaN."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from pyro.ops import newton as pyro

import jaxoptim
from jaxoptim.rules.newton import Newton, hessian, newton, newton_step, smallest_eigenvalue, solve

RADII = [None, 0.1, 3.0]
CURVATURES = ["positive", "indefinite", "negative"]
slow = pytest.mark.slow
by_radius = pytest.mark.parametrize("radius", RADII, ids=lambda radius: f"radius_{radius}")
by_curvature = pytest.mark.parametrize("curvature", CURVATURES)


def symmetric(eigenvalues, seed=0):
    """Random symmetric matrices with these eigenvalues."""
    size = eigenvalues.shape[-1]
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(*eigenvalues.shape, size)))
    matrix = np.einsum("...ij,...j,...kj->...ik", rotation, eigenvalues, rotation)
    return (matrix + np.swapaxes(matrix, -1, -2)) / 2


def quartic(matrix, slope):
    """A loss for both libraries, of problems with one curvature each."""
    return lambda x: 0.5 * ((matrix * x[..., None, :]).sum(-1) * x).sum() + (slope * x).sum() + 0.1 * (x**4).sum()


def problem(size, batch, curvature, seed=0):
    """Matrix, slope and start; the eigenvalues are apart, as Pyro needs them."""
    rng = np.random.default_rng(seed)
    eigenvalues = np.linspace(1, 3, size) + rng.uniform(0, 0.5, size=(*batch, size))
    signs = {"positive": 1.0, "indefinite": np.where(np.arange(size) % 2, 1.0, -1.0), "negative": -1.0}
    matrix = symmetric(signs[curvature] * eigenvalues, seed)
    return matrix, rng.normal(size=(*batch, size)), rng.normal(size=(*batch, size))


def in_pyro(matrix, slope, x, radius, steps=1):
    """Mode and covariance after some steps, in the dtype of ``x``."""
    loss = quartic(torch.as_tensor(matrix), torch.as_tensor(slope))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NaN
        for _ in range(steps):
            x = torch.as_tensor(x).detach().clone().requires_grad_()
            x, cov = pyro.newton_step(loss(x), x, radius)
    return x.detach().numpy(), cov.detach().numpy()


@jax.jit
def step(matrix, slope, x, radius):
    """One step; compiled once for all tests of the same shapes."""
    return newton_step(quartic(matrix, slope), x, radius)


@jax.jit
def gradient(weights, radius, *inputs):
    """The derivative of a weighted sum of modes, with respect to matrix, slope and start."""
    return jax.grad(lambda inputs: jnp.sum(weights * step(*inputs, radius)[0]))(inputs)


def ours(matrix, slope, x, radius, steps=1):
    for _ in range(steps):
        x, cov = step(matrix, slope, x, radius)
    return np.asarray(x), np.asarray(cov)


def close(given, expected, tolerance):
    """Close relative to the largest number."""
    given, expected = np.asarray(given, np.float64), np.asarray(expected, np.float64)
    assert given.shape == expected.shape
    np.testing.assert_allclose(given, expected, rtol=0, atol=tolerance * max(np.max(np.abs(expected)), 1e-300))


def reference(g, H, radius):
    """The trust rule in NumPy's float64."""
    g, H = np.asarray(g, np.float64), np.asarray(H, np.float64)
    if radius is not None:
        smallest = np.linalg.eigvalsh(H)[..., 0]
        reg = np.maximum(np.linalg.norm(g, axis=-1) / radius - smallest, 1e-8)
        H = H + reg[..., None, None] * np.eye(g.shape[-1])
    cov = np.linalg.inv(H)
    return -np.einsum("...ij,...j->...i", cov, g), cov


class TestAgainstPyro:
    @pytest.mark.costly
    @by_radius
    @by_curvature
    @pytest.mark.parametrize("size", [1, 2, 3])
    @pytest.mark.parametrize("batch", [pytest.param((), marks=slow, id="single"), pytest.param((3, 2), id="3x2")])
    def test_steps(self, x64, size, batch, curvature, radius):
        if size == 1 and curvature == "negative" and radius is None:
            pytest.skip("a step of 1e8")
        given = problem(size, batch, curvature)
        # Plain steps over indefinite curvature multiply the rounding errors.
        for steps in (1,) if radius is None and curvature != "positive" else (1, 4):
            mode, cov = ours(*given, radius, steps)
            expected_mode, expected_cov = in_pyro(*given, radius, steps)
            close(mode, expected_mode, 1e-12)
            close(cov, expected_cov, 1e-12)

    @pytest.mark.slow
    @by_radius
    @by_curvature
    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_many_problems(self, x64, size, curvature, radius):
        for seed in range(1, 20):
            given = problem(size, (50,), curvature, seed)
            (mode, cov), (expected_mode, expected_cov) = ours(*given, radius), in_pyro(*given, radius)
            close(mode, expected_mode, 1e-12)
            close(cov, expected_cov, 1e-12)

    def test_long_step_of_negative_curvature_in_one_dimension(self, x64):
        given = np.array([[[-1.0]]]), np.array([[1.0]]), np.array([[0.0]])
        close(ours(*given, None)[0], in_pyro(*given, None)[0], 1e-12)
        assert ours(*given, None)[0][0, 0] == pytest.approx(-1e8)

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_dimension_functions(self, x64, size):
        matrix, slope, start = problem(size, (3, 2), "positive")
        x = torch.tensor(start, requires_grad=True)
        loss = quartic(torch.as_tensor(matrix), torch.as_tensor(slope))(x)
        mode, cov = getattr(pyro, f"newton_step_{size}d")(loss, x, 0.2)
        close(ours(matrix, slope, start, 0.2)[0], mode.detach(), 1e-12)
        close(ours(matrix, slope, start, 0.2)[1], cov.detach(), 1e-12)

    @pytest.mark.costly
    @pytest.mark.numbers
    @pytest.mark.parametrize(
        "radius", [pytest.param(None, marks=slow, id="radius_None"), 0.1, pytest.param(3.0, marks=slow)]
    )
    @by_curvature
    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_float32_is_no_worse(self, size, curvature, radius):
        if size == 1 and curvature != "positive" and radius is None:
            pytest.skip("a step of 1e8")
        matrix, slope, x = (np.float32(part) for part in problem(size, (200,), curvature))
        single = [torch.tensor(part) for part in (matrix, slope, x)]
        exact = in_pyro(*(np.float64(part) for part in (matrix, slope, x)), radius)
        for result, parent, true in zip(ours(matrix, slope, x, radius), in_pyro(*single, radius), exact, strict=True):
            assert result.dtype == np.float32
            error, parents_error = np.abs(result - true), np.abs(parent - true)
            assert error.mean() <= 1.3 * parents_error.mean() + 1e-7 * np.abs(true).mean()
            assert error.max() <= 4 * parents_error.max() + 1e-6 * np.abs(true).max()


class TestDerivatives:
    @pytest.mark.slow
    @pytest.mark.parametrize("radius", [pytest.param(None, id="radius_None"), 0.1, 3.0])
    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_converged_with_respect_to_inputs(self, x64, size, radius):
        matrix, slope, x = problem(size, (3, 2), "positive")
        x, _ = ours(matrix, slope, x, radius, steps=40)
        weights = np.random.default_rng(1).normal(size=x.shape)

        # Pyro's derivative is NaN where the gradient is exactly zero.
        x = x + 1e-8 * weights
        grads = gradient(weights, radius, matrix, slope, x)
        inputs = [torch.tensor(part, requires_grad=True) for part in (matrix, slope, x)]
        mode, _ = pyro.newton_step(quartic(*inputs[:2])(inputs[2]), inputs[2], radius)
        expected = torch.autograd.grad((torch.as_tensor(weights) * mode).sum(), inputs[:2])
        close(grads[0], expected[0], 1e-9)
        close(grads[1], expected[1], 1e-9)
        # The true derivative of the minimum: the inverse of the Hessian there.
        at_minimum = matrix + 1.2 * np.einsum("...i,ij->...ij", x**2, np.eye(size))
        close(grads[1], -np.linalg.solve(at_minimum, weights[..., None])[..., 0], 1e-6)
        assert np.max(np.abs(grads[2])) < 1e-6

    @pytest.mark.slow
    @pytest.mark.parametrize("radius", [pytest.param(None, id="radius_None"), 0.3])
    @pytest.mark.parametrize("curvature", ["positive", "indefinite"])
    @pytest.mark.parametrize("size", [1, 2, 3, 4])
    def test_finite_differences(self, x64, size, curvature, radius):
        if size == 1 and curvature != "positive" and radius is None:
            pytest.skip("a step of 1e8")

        @jax.jit
        def result(matrix, slope, x):
            return step((matrix + jnp.swapaxes(matrix, -1, -2)) / 2, slope, x, radius)

        given = [jnp.asarray(part) for part in problem(size, (3,), curvature, seed=2)]
        check_grads(result, given, order=1, modes=("rev",), atol=1e-4, rtol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [2, 3, 4])
    def test_with_respect_to_the_radius(self, x64, size):
        given = [jnp.asarray(part) for part in problem(size, (3,), "indefinite", seed=2)]
        result = jax.jit(lambda radius: step(*given, radius)[0])
        check_grads(result, (jnp.array([0.1, 0.5, 0.9]),), order=1, modes=("rev",), atol=1e-5, rtol=1e-5)

    @slow
    @pytest.mark.parametrize("size", [2, 3])
    def test_second_order(self, x64, size):
        matrix, slope, x = (jnp.asarray(part) for part in problem(size, (), "indefinite", seed=2))
        result = jax.jit(lambda slope, x: newton_step(quartic(matrix, slope), x, 0.3)[0])
        check_grads(result, (slope, x), order=2, modes=("rev",), atol=1e-4, rtol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("radius", [pytest.param(None, id="plain"), 0.5])
    @pytest.mark.parametrize(
        "eigenvalues",
        [
            (1, 1),
            (-1, -1),
            (1, 1, 1),
            (-1, -1, -1),
            (-1, -1, 2),
            (-1, 2, 2),
            (1, 1, 2),
            (-1, 1),
            (2, 2, 2, 2),
        ],
        ids=lambda eigenvalues: "_".join(map(str, eigenvalues)),
    )
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_finite_at_multiple_eigenvalues_and_zero_gradients(self, dtype, eigenvalues, radius):
        size = len(eigenvalues)
        with jax.enable_x64(dtype == "float64"):
            for matrix in (np.diag(eigenvalues), symmetric(np.array(eigenvalues, float))):
                for slope in (np.zeros(size), np.arange(1.0, size + 1)):
                    inputs = [jnp.asarray(part, dtype) for part in (matrix, slope, np.zeros(size))]
                    assert np.isfinite(step(*inputs, radius)[1]).all()
                    chex.assert_tree_all_finite(gradient(1.0, radius, *inputs))

    @slow
    def test_isotropic_with_radius(self, x64):
        """Of the step -r g / |g|, which is what an isotropic Hessian gives outside of the radius."""
        slope = jnp.array([3.0, 4.0, 12.0])
        step = jax.jit(jax.jacobian(lambda slope: newton_step(lambda x: x @ x + slope @ x, jnp.zeros(3), 0.5)[0]))(
            slope
        )
        unit = slope / 13
        close(step, -0.5 / 13 * (jnp.eye(3) - jnp.outer(unit, unit)), 1e-12)


def isotropic(x):
    return (x * x).sum() + x.sum()


class TestWherePyroFails:
    """Each test begins with what Pyro does, to see that there was something to mend."""

    @pytest.fixture(autouse=True)
    def _quiet(self, x64):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Encountered NaN")
            yield

    @pytest.mark.slow
    def test_derivative_of_isotropic_problem_in_two_dimensions(self):
        scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        mode, _ = pyro.newton_step(scale * isotropic(x), x, 0.1)
        assert torch.autograd.grad(mode.sum(), scale)[0].isnan()

        @jax.jit
        def sum_of_mode(scale):
            return newton_step(lambda x: scale * isotropic(x), jnp.zeros(2), 0.1)[0].sum()

        # The step has the length of the radius, whatever the scale.
        mode, derivative = jax.jit(jax.value_and_grad(sum_of_mode))(1.0)
        assert float(derivative) == pytest.approx(0, abs=1e-12)
        assert float(mode) == pytest.approx(-0.1 * 2**0.5)

    def test_isotropic_problem_in_three_dimensions(self):
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        assert pyro.newton_step(isotropic(x), x, 0.1)[0].isnan().all()
        mode, cov = jax.jit(lambda x: newton_step(isotropic, x, 0.1))(jnp.zeros(3))
        close(mode, -0.1 * np.ones(3) / 3**0.5, 1e-12)
        close(cov, np.eye(3) * 0.1 / 3**0.5, 1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [2, 3])
    def test_saddle(self, size):
        """At a zero gradient the norm adds nothing, and the matrix is singular."""
        eigenvalues = np.array([-1.0, 1.0, 2.0][:size])
        H = np.diag(eigenvalues)
        _, cov = in_pyro(H, np.zeros(size), np.zeros(size), 0.5)
        assert not np.isfinite(cov).all() or cov[0, 0] < 0
        mode, cov = ours(H, np.zeros(size), np.zeros(size), 0.5)
        assert (mode == 0).all()
        close(np.diag(cov)[1:], 1 / (1 + eigenvalues[1:]), 1e-9)
        assert 1e12 < cov[0, 0] < 1e16

    @slow
    def test_derivative_at_double_eigenvalue_in_three_dimensions(self):
        slope = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
        scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        loss = quartic(scale * torch.diag(torch.tensor([-1.0, -1, 2], dtype=torch.float64)), slope)
        mode, _ = pyro.newton_step(loss(x), x, 0.5)
        assert not torch.autograd.grad(mode.sum(), scale)[0].isfinite()

        @jax.jit
        def sum_of_mode(scale):
            loss = quartic(scale * jnp.diag(jnp.array([-1.0, -1, 2])), jnp.array([1.0, 2, 3]))
            return newton_step(loss, jnp.zeros(3), 0.5)[0].sum()

        check_grads(sum_of_mode, (1.0,), order=1, modes=("rev",), atol=1e-7, rtol=1e-7)

    def test_nearly_double_eigenvalue_in_three_dimensions(self):
        """Pyro sets an angle to zero, and its smallest eigenvalue is wrong in the fourth digit."""
        H = np.diag([1.0, 1.001, 3.0])
        expected = reference(np.array([1.0, 0, 0]), H, 0.1)
        wrong = in_pyro(H, np.array([1.0, 0, 0]), np.zeros(3), 0.1)
        assert np.abs(wrong[0] - expected[0]).max() > 1e-6
        close(ours(H, np.array([1.0, 0, 0]), np.zeros(3), 0.1)[0], expected[0], 1e-12)

    def test_four_dimensions(self):
        x = torch.zeros(4, requires_grad=True)
        with pytest.raises(NotImplementedError):
            pyro.newton_step(isotropic(x), x)
        close(jax.jit(lambda x: newton_step(isotropic, x)[0])(jnp.zeros(4)), -0.5 * np.ones(4), 1e-12)

    def test_derivative_with_respect_to_x(self):
        """Pyro's is that of a constant, because it detaches x; of a minimum it should be zero."""
        x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        grad = torch.autograd.grad(pyro.newton_step(isotropic(x), x)[0].sum(), x)[0]
        assert (grad == -1).all()
        close(jax.jit(jax.grad(lambda x: newton_step(isotropic, x)[0].sum()))(jnp.zeros(2)) + 1, np.ones(2), 1e-12)


class TestAnyDimension:
    @pytest.mark.costly
    @by_radius
    @by_curvature
    @pytest.mark.parametrize("size", [1, 2, 3, pytest.param(4, marks=slow), pytest.param(5, marks=slow), 10])
    def test_against_numpy(self, x64, size, curvature, radius):
        if size == 1 and curvature != "positive":
            pytest.skip("one dimension has its own rule")
        H, g, _ = problem(size, (7,), curvature)
        g = g if size > 1 or radius is None else 1e-3 * g
        dx, cov = solve(g, H, radius)
        expected = reference(g, H, None if size == 1 else radius)
        close(dx, expected[0], 1e-12)
        close(cov, expected[1], 1e-12)
        if size > 3:
            assert (cov == jnp.swapaxes(cov, -1, -2)).all()

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [2, 3, 4])
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_smallest_eigenvalue(self, dtype, size):
        eigenvalues = np.random.default_rng(0).normal(size=(6, 200, size))
        eigenvalues[1, :] = np.linspace(-1, 2, size)
        eigenvalues[2, :] = np.where(np.arange(size) == 0, 2, -1)
        eigenvalues[3, :] = np.where(np.arange(size) == 0, -1, 2)
        eigenvalues[4, :] = np.where(np.arange(size) == 0, 2, -1) + 1e-4 * eigenvalues[0]
        eigenvalues[5, :] = 1
        with jax.enable_x64(dtype == "float64"):
            H = jnp.asarray(symmetric(eigenvalues), dtype)
            error = np.abs(smallest_eigenvalue(H) - np.linalg.eigvalsh(np.asarray(H, np.float64))[..., 0])
        assert error.max() < 20 * np.abs(eigenvalues).max() * jnp.finfo(dtype).eps

    @pytest.mark.parametrize("size", [2, 3])
    def test_plain_step_to_a_saddle(self, x64, size):
        """A zero on the diagonal does not matter without a radius."""
        H = np.ones((size, size)) - np.eye(size)
        close(solve(np.ones(size), H)[0], -np.linalg.solve(H, np.ones(size)), 1e-12)

    @pytest.mark.numbers
    @pytest.mark.parametrize(
        "shape",
        [
            pytest.param((), marks=slow, id="scalar"),
            pytest.param((1,), id="single"),
            pytest.param((4, 2), marks=slow, id="batch"),
        ],
    )
    @pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=slow)])
    def test_low_precision_is_computed_in_float32(self, dtype, shape):
        x = jnp.full(shape, 1.5, dtype)
        loss = lambda x: jnp.sum(jnp.cosh(x))  # noqa: E731
        mode, cov = newton_step(loss, x, 0.3)
        expected = newton_step(loss, x.astype(jnp.float32), 0.3)
        assert mode.dtype == x.dtype
        assert cov.dtype == jnp.float32
        assert (mode == expected[0].astype(x.dtype)).all()
        assert (cov == expected[1]).all()

    @pytest.mark.slow
    def test_scalar(self):
        mode, cov = newton_step(lambda x: (x - 3) ** 2, 0.0)
        assert mode.shape == ()
        assert float(mode) == 3
        assert cov.tolist() == [[0.5]]

    @pytest.mark.slow
    def test_empty_batch(self):
        mode, cov = newton_step(isotropic, jnp.zeros((0, 3)), 0.1)
        assert mode.shape == (0, 3)
        assert cov.shape == (0, 3, 3)

    @pytest.mark.slow
    def test_radius_of_each_problem(self, x64):
        matrix, slope, x = problem(2, (3, 4), "indefinite")
        radii = np.array([0.1, 0.2, 0.4])[:, None]
        mode, _ = ours(matrix, slope, x, radii)
        for i, radius in enumerate(radii[:, 0]):
            close(mode[i], in_pyro(matrix[i], slope[i], x[i], radius)[0], 1e-12)

    @pytest.mark.slow
    def test_infinite_radius(self, x64):
        H, g, _ = problem(3, (4,), "positive")
        close(solve(g, H, np.inf)[0], reference(g, H + 1e-8 * np.eye(3), None)[0], 1e-12)

    @pytest.mark.slow
    def test_nan_in_one_problem(self):
        """The others go on; in one dimension the step of NaN is not made, as in Pyro."""
        g, H = np.array([[1.0, 1.0], [np.nan, 1.0]]), np.stack([np.eye(2)] * 2)
        for radius in (None, 0.1):
            dx, _ = solve(g, H, radius)
            assert np.isfinite(dx[0]).all()
            assert np.isnan(dx[1]).all()
        assert float(solve(np.array([np.nan]), np.eye(1))[0][0]) == 0


class TestTransforms:
    @pytest.mark.slow
    def test_loss_is_evaluated_once(self):
        calls = []

        def loss(x):
            jax.debug.callback(lambda: calls.append(1))
            return jnp.sum(jnp.cosh(x))

        def eager(x):
            return newton_step(loss, x, 0.1)[0]

        for call in (eager, jax.jit(eager)):
            calls.clear()
            call(jnp.ones((4, 1)))
            jax.effects_barrier()
            assert len(calls) == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [1, 2, 3, 4])
    def test_vmap(self, x64, size):
        given = (*problem(size, (6,), "indefinite"), np.linspace(0.1, 0.6, 6))
        jax.tree.map(lambda x, y: close(x, y, 1e-12), jax.jit(jax.vmap(step))(*given), step(*given))

    @slow
    @pytest.mark.parametrize("size", [1, 2, 3, 4])
    def test_jit(self, x64, size):
        matrix, slope, x = problem(size, (6,), "indefinite")
        radii = np.linspace(0.1, 0.6, 6)
        expected = newton_step(quartic(jnp.asarray(matrix), jnp.asarray(slope)), x, radii)
        jax.tree.map(lambda x, y: close(x, y, 1e-12), step(matrix, slope, x, radii), expected)

    @pytest.mark.slow
    def test_loss_of_arrays_in_a_scan(self):
        def train(centers):
            def body(x, _):
                return jax.lax.stop_gradient(newton_step(lambda x: jnp.sum(jnp.cosh(x - centers)), x, 1.0)[0]), None

            x, _ = jax.lax.scan(body, jnp.zeros_like(centers), length=10)
            return newton_step(lambda x: jnp.sum(jnp.cosh(x - centers)), x, 1.0)[0]

        def both(centers):
            mode, pull = jax.vjp(train, centers)
            return mode, pull(jnp.ones_like(mode))[0]

        centers = jnp.array([[3.0, -2.0], [0.5, 1.0]])
        mode, derivative = jax.jit(both)(centers)
        np.testing.assert_allclose(mode, centers, atol=1e-5)
        np.testing.assert_allclose(derivative, np.ones((2, 2)), atol=1e-5)

    @pytest.mark.slow
    def test_hessian_of_dependent_problems_is_summed_as_in_pyro(self):
        _, push = jax.linearize(
            jax.grad(lambda x: jnp.sum(x, 0) @ jnp.array([[1.0, 2], [2, 3]]) @ x[0]), jnp.ones((3, 2))
        )
        x = torch.ones(3, 2, requires_grad=True)
        loss = x.sum(0) @ torch.tensor([[1.0, 2], [2, 3]]) @ x[0]
        g = torch.autograd.grad(loss, x, create_graph=True)[0]
        expected = torch.stack([torch.autograd.grad(g[..., i].sum(), x, retain_graph=True)[0] for i in range(2)], -1)
        np.testing.assert_allclose(hessian(push, jnp.ones((3, 2))), expected)


FLOATS = st.floats(-1, 1, width=32)
EXPONENTS = st.sampled_from([-30, -10, -4, 0, 0, 1, 4, 10, 25])


@st.composite
def any_problem(draw):
    """Gradients and Hessians of any rank and scale."""
    size = draw(st.sampled_from([1, 2, 3, 4]))
    if draw(st.booleans()):
        scales = np.array([10.0 ** draw(EXPONENTS) for _ in range(size)])
        H = symmetric(np.array([draw(FLOATS) for _ in range(size)]) * scales, draw(st.integers(0, 5)))
    else:
        entries = np.array(draw(st.lists(FLOATS, min_size=size * size, max_size=size * size))).reshape(size, size)
        H = (entries + entries.T) * 10.0 ** draw(EXPONENTS)
    g = np.array([draw(FLOATS) for _ in range(size)]) * 10.0 ** draw(EXPONENTS)
    return g, H, draw(st.sampled_from([1e-3, 0.1, 1.0, 1e3]))


class TestWithinTheRadius:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [pytest.param("float32", 1e-5, id="f32"), pytest.param("float64", 1e-12, id="f64")],
    )
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(given=any_problem())
    @example(given=(np.zeros(3), np.zeros((3, 3)), 1.0))
    @example(given=(np.zeros(3), np.ones((3, 3)), 1.0))
    @example(given=(np.ones(3), -np.ones((3, 3)), 1.0))
    @example(given=(1e-12 * np.array([1.0, -2, 1]), np.ones((3, 3)), 1e-3))
    @example(given=(1e-10 * np.array([1.0, -1]), -np.ones((2, 2)), 1e-3))
    def test_any_hessian(self, dtype, tolerance, given):
        with jax.enable_x64(dtype == "float64"):
            g, H, radius = jnp.asarray(given[0], dtype), jnp.asarray(given[1], dtype), given[2]
            dx, cov = solve(g, H, radius)
        chex.assert_tree_all_finite((dx, cov))
        assert np.linalg.norm(np.asarray(dx, np.float64)) <= radius * (1 + tolerance)
        assert np.asarray(g, np.float64) @ np.asarray(dx, np.float64) <= 0

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [2, 3, 4])
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_rank_deficient(self, dtype, size):
        rng = np.random.default_rng(0)
        v = rng.normal(size=(3000, size))
        g = rng.normal(size=(3000, size)) * 10.0 ** rng.uniform(-20, 3, size=(3000, 1))
        sign = rng.choice([-1.0, 1.0], size=(3000, 1, 1))
        with jax.enable_x64(dtype == "float64"):
            H = jnp.asarray(sign * v[:, :, None] * v[:, None, :], dtype)
            dx, cov = solve(jnp.asarray(g, dtype), H, 0.1)
        assert np.isfinite(cov).all()
        assert (np.linalg.eigvalsh(np.asarray(cov, np.float64))[..., 0] > 0).all()
        assert np.linalg.norm(np.asarray(dx, np.float64), axis=-1).max() <= 0.1 * (1 + 1e-5)


class TestTransformation:
    def loss(self, params):
        return (
            jnp.sum(jnp.cosh(params["a"]["pairs"] - 1))
            + jnp.sum(params["a"]["pairs"][:, 0] * params["a"]["pairs"][:, 1]) * params["b"] ** 2 / 10
            + jnp.cosh(params["b"] - 1)
            + 0.5 * params["c"][0] @ jnp.diag(jnp.arange(1.0, 6)) @ params["c"][0]
        )

    def params(self):
        return {"a": {"pairs": jnp.full((3, 2), 0.5)}, "b": jnp.array(0.3), "c": (jnp.ones(5),), "held": None}

    @slow
    def test_mixed_tree(self):
        params, tx = self.params(), newton({"a.pairs": 0.2, "c.0": 0.5})
        update = jax.jit(lambda grads, state, params: tx.update(grads, state, params, value_fn=self.loss))
        updates, state = update(jax.grad(self.loss)(params), tx.init(params), params)
        pairs, _ = newton_step(lambda x: self.loss(params | {"a": {"pairs": x}}), params["a"]["pairs"], 0.2)
        b, _ = newton_step(lambda x: self.loss(params | {"b": x}), params["b"])
        c, _ = newton_step(lambda x: self.loss(params | {"c": (x,)}), params["c"][0], 0.5)
        expected = {"a": {"pairs": pairs}, "b": b, "c": (c,), "held": None}
        chex.assert_trees_all_close(jax.tree.map(jnp.add, params, updates), expected, rtol=1e-5, atol=1e-6)
        assert int(state.step) == 1
        assert (state.slots, state.shared) == ({}, {})

    @pytest.mark.slow
    def test_one_evaluation_for_all(self):
        calls, params, tx = [], self.params(), newton()

        def loss(params):
            jax.debug.callback(lambda: calls.append(1))
            return self.loss(params)

        jax.jit(lambda p: tx.update(p, tx.init(p), p, value_fn=loss))(params)
        jax.effects_barrier()
        assert len(calls) == 1

    @pytest.mark.slow
    def test_none_is_held_fixed(self):
        params, tx = self.params(), newton()
        grads = params | {"b": None}
        updates, _ = jax.jit(lambda grads: tx.update(grads, tx.init(params), params, value_fn=self.loss))(grads)
        assert updates["b"] is None
        assert (updates["c"][0] == -1).all()
        nothing = jax.tree.map(lambda x: None, params)
        assert jax.tree.leaves(tx.update(nothing, tx.init(params), params, value_fn=self.loss)[0]) == []

    @pytest.mark.slow
    def test_dtype_of_the_gradient(self):
        params, tx = {"x": jnp.full((2, 2), 1.5, jnp.bfloat16), "y": jnp.ones(3)}, newton()
        loss = lambda p: jnp.sum(jnp.cosh(p["x"])) + jnp.sum(p["y"] ** 2)  # noqa: E731
        updates, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p, value_fn=loss))(params)
        assert jax.tree.map(lambda u: u.dtype.name, updates) == {"x": "bfloat16", "y": "float32"}

    @pytest.mark.slow
    def test_chain_and_scan(self):
        tx = optax.chain(newton({"a.pairs": 0.2}), optax.scale(0.9))

        @jax.jit
        def train(params):
            def body(carry, _):
                params, state = carry
                value, grads = jax.value_and_grad(self.loss)(params)
                updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=self.loss)
                return (optax.apply_updates(params, updates), state), value

            return jax.lax.scan(body, (params, tx.init(params)), length=20)

        (params, _), losses = train(self.params())
        assert losses[-1] < losses[0]
        assert max(float(np.max(np.abs(g))) for g in jax.tree.leaves(jax.jit(jax.grad(self.loss))(params))) < 1e-4

    @pytest.mark.slow
    def test_rule_is_a_pytree(self):
        rule = Newton({"x": 1, "y": np.float32(2), "z": None})
        assert jax.tree.leaves(rule) == [1.0, 2.0]
        assert Newton().trust_radii == {}
        assert rule.replace(trust_radii={"x": 3}).trust_radii == {"x": 3.0}

        @jax.jit
        def update(rule, x):
            tx = jaxoptim.transformation(rule)
            return tx.update(x, tx.init(x), x, value_fn=lambda p: jnp.sum((p["x"] - 3) ** 2))[0]["x"]

        x, radii = {"x": jnp.zeros((4, 2))}, jnp.array([0.5, 1.0])
        sweep = jax.vmap(update, (0, None))(jax.vmap(lambda r: Newton({"x": r}))(radii), x)
        np.testing.assert_allclose(jnp.linalg.norm(sweep, axis=-1), radii[:, None] * np.ones((2, 4)), rtol=1e-5)

    @slow
    def test_packed(self):
        params = self.params() | {"held": jnp.zeros(2)}
        packed, tx = jaxoptim.pack(params), newton({"a.pairs": 0.2})
        expected, _ = tx.update(params, tx.init(params), params, value_fn=self.loss)
        loss = lambda packed: self.loss(packed.unpack())  # noqa: E731
        grads = jax.grad(loss)(packed)
        updates, _ = tx.update(grads, tx.init(packed), packed, value_fn=loss)
        chex.assert_trees_all_close(updates.unpack(), expected, rtol=1e-7, atol=1e-6)

    def test_signature(self):
        assert newton.__name__ == "newton"
        with pytest.raises(TypeError, match="trust_radii"):
            newton(radius=1.0)


class TestErrors:
    @pytest.mark.parametrize("x", [jnp.arange(3), jnp.ones(2, jnp.complex64)], ids=["int", "complex"])
    def test_dtype(self, x):
        with pytest.raises(TypeError, match=f"'x' has dtype {x.dtype}"):
            newton_step(lambda x: jnp.sum(x), x)

    def test_loss_is_not_a_scalar(self):
        with pytest.raises(ValueError, match=r"loss of shape \(3,\)"):
            newton_step(lambda x: jnp.sum(x, -1), jnp.ones((3, 2)))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("radius", "error"),
        [
            (0, ValueError),
            (-1.0, ValueError),
            (np.nan, ValueError),
            (np.ones(2) - [0, 1], ValueError),
            ("1", TypeError),
        ],
        ids=["zero", "negative", "nan", "one_is_zero", "text"],
    )
    def test_radius(self, radius, error):
        with pytest.raises(error, match="Invalid trust_radius"):
            newton_step(lambda x: jnp.sum(x**2), jnp.ones((2, 2)), radius)
        with pytest.raises(error, match="Invalid trust_radii\\['x'\\]"):
            Newton({"x": radius})

    @pytest.mark.slow
    @pytest.mark.parametrize("shape", [(2,), (3, 1), (4, 3)], ids=str)
    def test_radius_does_not_broadcast(self, shape):
        with pytest.raises(ValueError, match="batch axes are \\(3,\\)"):
            newton_step(lambda x: jnp.sum(x**2), jnp.ones((3, 2)), jnp.ones(shape))

    def test_no_dimension(self):
        with pytest.raises(ValueError, match="D >= 1"):
            newton_step(lambda x: jnp.sum(x**2), jnp.ones((3, 0)))

    def test_shapes_of_derivatives(self):
        with pytest.raises(ValueError, match="H has shape"):
            solve(jnp.ones((3, 2)), jnp.ones((3, 3)))

    @pytest.mark.parametrize("radii", [1.0, [1.0], {0: 1.0}], ids=["number", "list", "key"])
    def test_radii(self, radii):
        with pytest.raises(TypeError, match="trust_radii"):
            Newton(radii)

    def test_unknown_names(self):
        tx, params = newton({"x": 1.0, "z": 1.0, "w": 1.0}), {"x": jnp.ones(2), "y": jnp.ones(2)}
        with pytest.raises(ValueError, match=r"trust_radii has 'z', 'w'.*'x', 'y'"):
            tx.init(params)

    def test_missing_arguments(self):
        tx, x = newton(), jnp.ones(2)
        with pytest.raises(ValueError, match="`params`"):
            tx.update(x, tx.init(x))
        with pytest.raises(ValueError, match="`value_fn`"):
            tx.update(x, tx.init(x), x)

    def test_parameters(self):
        for bad in (jnp.arange(2), jnp.ones(2, jnp.complex64)):
            with pytest.raises(TypeError, match="'x' has dtype"):
                newton().init({"x": bad})
        shapes = {"x": jax.ShapeDtypeStruct((2,), jnp.float32)}
        assert int(newton().init(shapes).step) == 0
        tx, x = newton({"x": jnp.ones(4)}), {"x": jnp.ones((3, 2))}
        with pytest.raises(ValueError, match="trust_radii\\['x'\\] has shape"):
            tx.update(x, tx.init(x), x, value_fn=lambda p: jnp.sum(p["x"] ** 2))
        with pytest.raises(ValueError, match="'x' has shape"):
            newton().update({"x": jnp.ones(2)}, newton().init(x), x, value_fn=lambda p: jnp.sum(p["x"] ** 2))
        with pytest.raises(ValueError, match=r"value_fn returned a loss of shape \(3,\)"):
            newton().update(x, newton().init(x), x, value_fn=lambda p: jnp.sum(p["x"] ** 2, -1))
