"""Every kind of optimizer in the interface of multi-optimizers: what a step reads, writes and leaves alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

from jaxoptim import optim as torch_style
from jaxoptim import rules
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim
from jaxoptim.pyro.optim import multi
from jaxoptim.pyro.optim.multi import MixedMultiOptimizer, MultiOptimizer, Newton, as_multi_optimizer
from multi_kinds import (
    KINDS,
    SEARCHES,
    TORCH_STYLE,
    arrays,
    assert_equal,
    kinds,
    loss,
    pair,
    slow,
    started,
)

pytestmark = pytest.mark.usefixtures("x64")


class TestGetStep:
    @pytest.mark.slow
    @kinds(*TORCH_STYLE)
    def test_is_the_step_and_changes_nothing(self, kind):
        (optimizer, params), (twin, others) = pair(kind)
        for _ in range(3):
            before = arrays(params)
            new = optimizer.get_step(loss, params, 1.0)
            assert_equal(arrays(params), before)
            assert float(optimizer.step(loss, params, 1.0)) == float(twin.step(loss, others, 1.0))
            assert_equal(arrays(params), arrays(others))
            assert_equal(new, arrays(params), 1e-13)

    @slow
    @kinds(*TORCH_STYLE)
    @pytest.mark.parametrize("steps_before", [0, 2])
    def test_under_jit(self, kind, steps_before):
        params = started()
        optimizer = as_multi_optimizer(KINDS[kind](params))
        for _ in range(steps_before):
            optimizer.step(loss, params, 1.0)
        new = jax.jit(lambda values, target: optimizer.get_step(loss, values, target))(arrays(params), 1.0)
        optimizer.step(loss, params, 1.0)
        assert_equal(new, arrays(params), 1e-13)

    @slow
    @kinds(*TORCH_STYLE, *SEARCHES)
    @pytest.mark.parametrize("steps_before", [0, 2])
    def test_derivatives(self, kind, steps_before):
        params = started()
        optimizer = as_multi_optimizer(KINDS[kind](params))
        for _ in range(steps_before):
            optimizer.step(loss, params, 1.0)

        @jax.jit
        def result(values, target):
            new = optimizer.get_step(loss, values, target)
            return jnp.sum(new["x"] * jnp.array([1.0, 2.0])) + 3 * new["y"]

        values = {name: jnp.asarray(value) for name, value in arrays(params).items()}
        of_values, of_target = jax.grad(result, (0, 1))(values, 0.8)
        h = 1e-5
        differences = (result(values, 0.8 + h) - result(values, 0.8 - h)) / (2 * h)
        assert float(of_target) == pytest.approx(float(differences), rel=1e-5, abs=1e-8)
        up, down = (result(values | {"y": values["y"] + s}, 0.8) for s in (h, -h))
        assert float(of_values["y"]) == pytest.approx(float((up - down) / (2 * h)), rel=1e-5, abs=1e-8)

    @pytest.mark.slow
    def test_derivative_of_a_minimum(self):
        """Of a quadratic by its own target: the identity; by the point that it starts from: zero."""
        quadratic = lambda values, target: jnp.sum((values["x"] - target) ** 2 * jnp.array([1.0, 3.0]))  # noqa: E731
        target = jnp.array([0.3, -2.0])
        for optimizer in (Newton(), Newton({"x": 0.5}), MixedMultiOptimizer([(["x"], Newton({"x": 10.0}))])):
            of_target, of_start = jax.jacobian(
                lambda target, x, opt=optimizer: opt.get_step(quadratic, {"x": x}, target)["x"], (0, 1)
            )(target, target)
            np.testing.assert_allclose(of_target, np.eye(2), atol=1e-7)
            np.testing.assert_allclose(of_start, np.zeros((2, 2)), atol=1e-7)

    @slow
    def test_searches_have_forward_derivatives_only(self):
        optimizer = as_multi_optimizer(rules.LBFGS(max_iter=2))
        result = lambda target: optimizer.get_step(loss, {"x": jnp.array([3.0, -1.0])}, target)["x"][0]  # noqa: E731
        _, tangent = jax.jvp(result, (1.0,), (1.0,))
        h = 1e-6
        assert float(tangent) == pytest.approx(float(result(1.0 + h) - result(1.0 - h)) / (2 * h), rel=1e-4)
        with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
            jax.grad(result)(1.0)

    @pytest.mark.parametrize("kind", TORCH_STYLE)
    def test_torch_style_has_none(self, kind):
        params = started()
        with pytest.raises(NotImplementedError):
            as_multi_optimizer(KINDS[kind](params)).get_step(loss, params, 1.0)

    def test_base_class(self):
        with pytest.raises(NotImplementedError, match="get_step"):
            MultiOptimizer().step(loss, started(), 1.0)


class TestNotFinite:
    @staticmethod
    def awkward(values, target, mode):
        """Mode 0 as it is, 1 and 2 a loss of NaN and inf, 3 and 4 gradients of NaN and inf with a finite loss."""
        extra = jnp.where(mode == 1, jnp.nan, 0.0) + jnp.where(mode == 2, jnp.inf, 0.0)
        zero = values["x"][0] - jax.lax.stop_gradient(values["x"][0])
        wild = jnp.where(mode == 3, jnp.nan, jnp.where(mode == 4, jnp.inf, 0.0))
        bad = _with_derivative(zero, wild)
        return loss(values, target) + jax.lax.stop_gradient(extra) + bad

    @pytest.mark.slow
    @kinds("torch_lbfgs", "own", "mixed_own", "horovod")
    def test_skipped(self, kind):
        (optimizer, params), (twin, others) = pair(kind)
        for mode in (1, 0, 2, 3, 4, 0, 3, 0):
            before = arrays(params)
            given = optimizer.step(self.awkward, params, 1.0, mode, skip_nonfinite=True)
            assert np.isnan(given) == (mode != 0)
            if mode:
                assert_equal(arrays(params), before)
            else:
                twin.step(self.awkward, others, 1.0, 0, skip_nonfinite=True)
                assert_equal(arrays(params), arrays(others))

    @pytest.mark.slow
    def test_state_and_rate_stay(self):
        params, own = started(), optim.ClippedAdam({"lr": 0.1, "lrd": 0.5})
        optimizer = multi.PyroMultiOptimizer(own)
        optimizer.step(self.awkward, params, 1.0, 0, skip_nonfinite=True)
        before = own.get_state()
        for mode in (1, 2, 3, 4):
            optimizer.step(self.awkward, params, 1.0, mode, skip_nonfinite=True)
        assert own.get_state()["x"]["param_groups"] == before["x"]["param_groups"]
        assert own.get_state()["x"]["param_groups"][0]["lr"] == 0.05
        chex.assert_trees_all_equal(own.get_state()["x"]["state"], before["x"]["state"])

    def test_one_bad_gradient_stops_all_parts(self):
        """The gradient of x is NaN, that of y is not."""
        params = started()
        before = arrays(params)
        parts = [(["x"], optim.Adam({"lr": 0.1})), (["y"], rules.Adam(lr=0.1))]
        MixedMultiOptimizer(parts).step(self.awkward, params, 1.0, 3, skip_nonfinite=True)
        assert_equal(arrays(params), before)

    def test_not_asked_for(self):
        params = started()
        as_multi_optimizer(rules.SGD(lr=0.1)).step(self.awkward, params, 1.0, 3)
        assert np.isnan(arrays(params)["x"]).any()

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["own", "mixed_own"])
    def test_gradient_of_a_users_own(self, kind):
        params = started()
        before = arrays(params)
        as_multi_optimizer(KINDS[kind](params)).step(self.awkward, params, 1.0, 3, skip_nonfinite=True)
        assert_equal(arrays(params), before)

    @pytest.mark.slow
    def test_loss_with_horovod(self):
        params = started()
        before = arrays(params)
        as_multi_optimizer(KINDS["horovod"](params)).step(self.awkward, params, 1.0, 1, skip_nonfinite=True)
        assert_equal(arrays(params), before)


@jax.custom_jvp
def _with_derivative(x, derivative):
    return x


@_with_derivative.defjvp
def _(primals, tangents):
    return primals[0], primals[1] * tangents[0]


class TestParameters:
    @pytest.mark.slow
    @kinds()
    def test_assigned_replaced_and_kept(self, kind):
        """A value that is assigned is where the next step begins; one that was read stays as it was."""
        (optimizer, params), (twin, others) = pair(kind)
        for _ in range(2):
            optimizer.step(loss, params, 1.0)
            twin.step(loss, others, 1.0)
        held, copies = {name: param.value for name, param in params.items()}, arrays(params)
        new = np.array([1.5, 0.25])
        others["x"].value = new
        params["x"].value = new
        expected = float(loss({"x": new, "y": copies["y"]}, 1.0))
        assert float(optimizer.step(loss, params, 1.0)) == pytest.approx(expected, rel=1e-13)
        twin.step(loss, others, 1.0)
        optimizer.step(loss, params, 1.0)
        twin.step(loss, others, 1.0)
        assert_equal(arrays(params), arrays(others))
        assert_equal(held, copies)

    @kinds("instance")
    def test_another_fit_begins_afresh(self, kind):
        """New parameters under the names of others: another fold, another restart."""
        (optimizer, params), (twin, others) = pair(kind)
        for _ in range(2):
            optimizer.step(loss, params, 1.0)
        old, before = params, arrays(params)
        params = started()
        for _ in range(3):
            optimizer.step(loss, params, 1.0)
            twin.step(loss, others, 1.0)
        assert_equal(arrays(params), arrays(others), 1e-14)
        assert_equal(arrays(old), before)

    @pytest.mark.slow
    @kinds("mixed_own", "instance", "mixed", "torch_lbfgs")
    def test_new_later(self, kind):
        params = started("x")
        optimizer = as_multi_optimizer(KINDS[kind](params))
        losses = [float(optimizer.step(loss, params, 1.0)) for _ in range(2)]
        x, value = np.array(params["x"].value), started("y")["y"].value
        params["y"] = Parameter(value, "y")
        losses.append(float(optimizer.step(loss, params, 1.0)))
        assert losses[-1] == pytest.approx(float(loss({"x": x, "y": value}, 1.0)), rel=1e-13)
        assert float(params["y"].value) != float(value)
        for _ in range(10):
            losses.append(float(optimizer.step(loss, params, 1.0)))
        assert losses[-1] < losses[2]

    def test_new_to_a_pyro_optim_begins_by_itself(self):
        """Its count is its own: its first step is that of a new optimizer."""
        params, optimizer = started("x"), as_multi_optimizer(optim.Adam({"lr": 0.1}))
        for _ in range(5):
            optimizer.step(loss, params, 1.0)
        params["y"] = started("y")["y"]
        fresh = as_multi_optimizer(optim.Adam({"lr": 0.1})).get_step(loss, params, 1.0)
        optimizer.step(loss, params, 1.0)
        assert float(params["y"].value) == pytest.approx(float(fresh["y"]), rel=1e-14)

    @pytest.mark.slow
    @kinds("torch_lbfgs")
    def test_failures_change_nothing(self, kind):
        (optimizer, params), (twin, others) = pair(kind)
        optimizer.step(loss, params, 1.0)
        twin.step(loss, others, 1.0)

        def raises(values):
            raise ArithmeticError("own")

        failures = [
            (raises, ArithmeticError, "own"),
            (lambda values: values["x"], ValueError, r"scalar, actual shape \(2,\)"),
            (lambda values: jnp.int32(1), TypeError, "real number, actual dtype int32"),
            (lambda values: jnp.sum(values["x"]) * 1j, TypeError, "real number, actual dtype complex128"),
            (lambda values: values["z"], KeyError, "z"),
        ]
        before = arrays(params)
        for bad, error, message in failures:
            other = kind in (*TORCH_STYLE, "own", "mixed_own")  # jax.grad raises a TypeError
            with pytest.raises((error, TypeError) if other else error, match=None if other else message):
                optimizer.step(bad, params)
            assert_equal(arrays(params), before)
        optimizer.step(loss, params, 1.0)
        twin.step(loss, others, 1.0)
        assert_equal(arrays(params), arrays(others))

    def test_schedule_moves_between_steps(self):
        params = {"x": Parameter(8.0, "x")}
        scheduler = optim.ExponentialLR({"optimizer": torch_style.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5})
        optimizer = as_multi_optimizer(scheduler)

        def height(values):
            return values["x"]

        for expected in (7.0, 6.5, 6.25, 6.125):
            optimizer.step(height, params)
            scheduler.step()
            assert float(params["x"].value) == expected

    def test_torch_style_of_a_dict_of_arrays(self):
        """It has parameters of its own, which take their places in the dict."""
        own = torch_style.SGD({"x": jnp.array([3.0, -1.0]), "y": jnp.array(0.5)}, lr=0.1)
        params, optimizer = started(), as_multi_optimizer(own)
        optimizer.step(loss, params, 1.0)
        assert (np.asarray(params["x"].value) == np.asarray(own.params["x"])).all()
        assert not (np.asarray(params["x"].value) == [3.0, -1.0]).any()

    @pytest.mark.parametrize("cls", ["Adam", pytest.param("SparseAdam", marks=slow)])
    def test_mixed_shapes_and_sparse_rules(self, cls):
        params = {"x": Parameter(np.ones((4, 2)), "x"), "y": Parameter(np.ones((3, 2)), "y")}
        optimizer = as_multi_optimizer(getattr(optim, cls)({"lr": 0.1}))
        losses = [float(optimizer.step(loss, params, 0.0)) for _ in range(10)]
        assert losses[-1] < losses[0]
        assert not any(isinstance(param.value, sparse.BCOO) for param in params.values())
