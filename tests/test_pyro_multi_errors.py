"""What multi-optimizers refuse, by name, and what was reported about them."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxoptim import optim as torch_style
from jaxoptim import rules
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim
from jaxoptim.pyro.optim import multi
from jaxoptim.pyro.optim.multi import MixedMultiOptimizer, MultiOptimizer, Newton, as_multi_optimizer
from multi_kinds import (
    KINDS,
    arrays,
    assert_equal,
    loss,
    mixed,
    started,
)

pytestmark = pytest.mark.usefixtures("x64")


class TestErrors:
    @pytest.mark.parametrize("given", [1.0, "adam", None, [rules.Adam()], {"lr": 0.1}], ids=str)
    def test_no_optimizer(self, given):
        with pytest.raises(TypeError, match=f"Expected an optimizer but got a {type(given).__name__}"):
            as_multi_optimizer(given)

    def test_no_pyro_optim(self):
        with pytest.raises(TypeError, match="Expected a PyroOptim object but got a"):
            multi.PyroMultiOptimizer(rules.Adam())
        with pytest.raises(TypeError, match="Expected a rule or a transformation but got a function"):
            multi.TransformationMultiOptimizer(lambda: None)

    def test_function_makes_something_else(self):
        with pytest.raises(TypeError, match="made NoneType"):
            as_multi_optimizer(lambda params: None).step(loss, started(), 1.0)

    @pytest.mark.parametrize(
        "names", [[["x"], ["x", "y"]], [["x", "y", "x"]], [["x"], ["y"], ["x"]]], ids=["two", "inside_one", "third"]
    )
    def test_name_twice(self, names):
        with pytest.raises(ValueError, match="Attempted to optimize parameter 'x' by two different optimizers"):
            MixedMultiOptimizer([(its, rules.Adam()) for its in names])

    def test_names_are_a_string(self):
        with pytest.raises(TypeError, match="string 'xy'"):
            MixedMultiOptimizer([("xy", rules.Adam())])

    def test_torch_style_in_a_mixed_one(self):
        params = started("x")
        for given in (torch_style.Adam(params), torch_style.Adam):
            with pytest.raises(TypeError, match="PyroOptim"):
                MixedMultiOptimizer([(["x"], given)])

    @pytest.mark.slow
    def test_parts_and_parameters(self):
        of_x, of_both = MixedMultiOptimizer([(["x"], rules.Adam())]), mixed("xy")
        for call in ("step", "get_step"):
            with pytest.raises(ValueError, match="'y' is in no part of MixedMultiOptimizer"):
                getattr(of_x, call)(loss, started(), 1.0)
            with pytest.raises(KeyError, match="names 'y', but the parameters are 'x'"):
                getattr(of_both, call)(loss, started("x"), 1.0)

    def test_what_is_optimized(self):
        optimizer = as_multi_optimizer(rules.Adam())
        with pytest.raises(TypeError, match="dict of name to Parameter is expected, but got list"):
            optimizer.step(loss, list(started().values()), 1.0)
        with pytest.raises(TypeError, match="'x' is ArrayImpl"):
            optimizer.step(loss, {"x": jnp.ones(2)}, 1.0)
        with pytest.raises(ValueError, match="key 'x' is called 'other'"):
            optimizer.step(loss, {"x": Parameter(1.0, "other")}, 1.0)
        with pytest.raises(TypeError, match="'x' has dtype int64"):
            optimizer.get_step(loss, {"x": jnp.arange(3)}, 1.0)
        unnamed = {"x": Parameter(1.0)}
        optimizer.step(loss, unnamed, 1.0)
        assert unnamed["x"].name == "x"

    def test_radii(self):
        for radius in (0.0, -1.0, np.nan):
            with pytest.raises(ValueError, match=r"trust_radii\['x'\]"):
                Newton({"x": radius})
        for call in ("step", "get_step"):
            with pytest.raises(ValueError, match="'z'"):
                getattr(Newton({"z": 1.0}), call)(loss, started(), 1.0)

    def test_newton_of_complex(self):
        with pytest.raises(TypeError, match="'x' has dtype complex128"):
            Newton().step(lambda v: jnp.sum(jnp.abs(v["x"])), {"x": Parameter(np.ones(2, complex), "x")})

    def test_gradient_of_the_wrong_shape(self):
        with pytest.raises(ValueError, match=r"gradient of 'x' has shape \(3,\), but the parameter has \(2,\)"):
            optim.Adam({}).update({"x": jnp.ones(2)}, {"x": jnp.ones(3)})

    def test_own_returns_too_little(self):
        class Empty(MultiOptimizer):
            def get_step(self, loss_fn, params, *args):
                return {}

        params = started()
        before = arrays(params)
        with pytest.raises(ValueError, match="get_step of Empty has returned nothing for 'y'"):
            MixedMultiOptimizer([(["x"], rules.Adam(lr=0.1)), (["y"], Empty())]).step(loss, params, 1.0)
        assert_equal(arrays(params), before)

    def test_names_of_a_torch_style_instance(self):
        optimizer = as_multi_optimizer(torch_style.Adam(started("x")))
        with pytest.raises(ValueError, match="no parameter 'y'"):
            optimizer.step(loss, started(), 1.0)

    def test_horovod_in_a_mixed_one(self):
        with pytest.raises(TypeError, match="HorovodOptimizer reduces"):
            MixedMultiOptimizer([(["x"], KINDS["horovod"](None)), (["y"], Newton())]).step(loss, started(), 1.0)


class TestSurprises:
    """What a user does not expect to be hard."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "make",
        [lambda: optim.Adam({"lr": 0.1}), Newton, lambda: as_multi_optimizer(rules.Adam(lr=0.1))],
        ids=["pyro", "newton", "rule"],
    )
    def test_one_object_in_two_parts(self, make):
        shared = make()
        params = {name: Parameter(np.array([1.0, 2.0]), name) for name in "xy"}
        others = {name: Parameter(np.array([1.0, 2.0]), name) for name in "xy"}
        optimizer, twin = MixedMultiOptimizer([(["x"], shared), (["y"], shared)]), as_multi_optimizer(make())
        for _ in range(3):
            optimizer.step(loss, params, 0.0)
            twin.step(loss, others, 0.0)
        assert_equal(arrays(params), arrays(others), 1e-12)

    def test_own_returns_another_shape(self):
        class Wrong(MultiOptimizer):
            def get_step(self, loss_fn, params, *args):
                return dict.fromkeys(params, jnp.ones(3))

        params = started()
        before = arrays(params)
        with pytest.raises(ValueError, match="'y'"):
            MixedMultiOptimizer([(["x"], rules.Adam(lr=0.1)), (["y"], Wrong())]).step(loss, params, 1.0)
        assert_equal(arrays(params), before)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "radius",
        [None, np.array([0.1, 0.2])],
        ids=["none", "array"],
    )
    def test_radii_of_newton(self, radius):
        params = {"x": Parameter(np.ones((2, 3)), "x")}
        optimizer = Newton({"x": radius})
        expected = optimizer.get_step(loss, params, 0.0)
        optimizer.step(loss, params, 0.0)
        assert_equal(arrays(params), expected, 1e-13)

    @pytest.mark.parametrize("change", [{"x": -1.0}, {"q": 1.0}], ids=["negative", "unknown"])
    def test_radii_that_are_written_later(self, change):
        optimizer, params = Newton({"x": 0.5}), started()
        optimizer.step(loss, params, 1.0)
        optimizer.trust_radii |= change
        with pytest.raises(ValueError, match=next(iter(change))):
            optimizer.step(loss, params, 1.0)

    @pytest.mark.parametrize("kind", ["pyro", "rule"])
    def test_get_step_of_another_shape(self, kind):
        optimizer, params = as_multi_optimizer(KINDS[kind](None)), started("y")
        optimizer.step(loss, params, 1.0)
        with pytest.raises(ValueError, match="'y'"):
            optimizer.get_step(loss, {"y": jnp.ones(3)}, 1.0)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["rule", "optax"])
    def test_get_step_with_a_new_name(self, kind):
        params = started("x")
        optimizer = as_multi_optimizer(KINDS[kind](params))
        optimizer.step(loss, params, 1.0)
        params["y"] = started("y")["y"]
        expected = optimizer.get_step(loss, params, 1.0)
        optimizer.step(loss, params, 1.0)
        assert_equal(arrays(params), expected, 1e-13)

    def test_another_parameter_for_a_torch_style_function(self):
        params, optimizer = started(), as_multi_optimizer(KINDS["function"](None))
        optimizer.step(loss, params, 1.0)
        params["x"] = Parameter(np.array([9.0, 9.0]), "x")
        expected = float(loss({name: param.value for name, param in params.items()}, 1.0))
        assert float(optimizer.step(loss, params, 1.0)) == pytest.approx(expected, rel=1e-13)

    def test_state_after_a_first_step_that_failed(self):
        own = optim.Adam({"lr": 0.1})
        with pytest.raises(ValueError, match="scalar"):
            multi.PyroMultiOptimizer(own).step(lambda values: values["x"], started())
        assert own.get_state() == {}

    @pytest.mark.parametrize("kind", ["rule"])
    def test_state_of_a_parameter_that_was_away(self, kind):
        params = started()
        optimizer = as_multi_optimizer(KINDS[kind](params))
        optimizer.step(loss, params, 1.0)
        before = np.asarray(optimizer._owned.saved(params)[1].slots["exp_avg"]["y"])
        optimizer.step(loss, {"x": params["x"]}, 1.0)
        optimizer._open(params)
        assert (np.asarray(optimizer._owned.saved(params)[1].slots["exp_avg"]["y"]) == before).all()

    @pytest.mark.slow
    def test_a_parameter_that_is_away_stays(self):
        params, optimizer = started(), as_multi_optimizer(optax.adam(0.1))
        optimizer.step(loss, params, 1.0)
        before = np.array(params["y"].value)
        optimizer.step(loss, {"x": params["x"]}, 1.0)
        assert np.array(params["y"].value) == before

    @pytest.mark.slow
    def test_new_parameter_for_torch_style_lbfgs(self):
        params, optimizer = started("x"), as_multi_optimizer(lambda params: torch_style.LBFGS(params, lr=0.1))
        optimizer.step(loss, params, 1.0)
        params |= started("y")
        optimizer.step(loss, params, 1.0)

    def test_loss_function_made_anew_at_each_step(self):
        optimizer, params = as_multi_optimizer(rules.SGD(lr=0.1)), started("y")

        def anew():
            return lambda values: values["y"] ** 2

        for _ in range(3):
            optimizer.step(anew(), params)
        with pytest.warns(UserWarning, match=r"step got a new function .* optimizer.step\(loss_fn, params, batch\)"):
            optimizer.step(anew(), params)
