"""Multi-optimizers against Pyro's, and by hand where Pyro fails: one evaluation, and all at the old point."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pyro
import pytest
import torch

import jaxoptim
from jaxoptim import optim as torch_style
from jaxoptim import rules
from jaxoptim.engine import programs
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim
from jaxoptim.pyro.optim import multi

slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("x64")

START = {
    "x": np.array([0.5, -1.0, 2.0]),
    "pair": np.array([[0.3, 1.2], [-0.5, 0.8], [1.4, -0.2]]),
    "triple": np.array([[[0.2, -0.3, 0.9]], [[1.1, 0.4, -0.7]]]),
    "single": np.array([[0.7], [-1.5]]),
}


def separable(values):
    """A loss for both libraries that is a sum over names, convex, of problems along the last axes."""
    total = 0.0
    for k, name in enumerate(sorted(values)):
        x = values[name]
        total = total + ((x - 0.3 * k) ** 2).sum() * (1 + k) + 0.1 * (x**4).sum() + 0.4 * (x.sum(-1) ** 2).sum()
    return total


def coupled(values):
    """The same with products of all parameters."""
    product = 1.0
    for name in sorted(values):
        product = product * (values[name] ** 2).sum()
    return separable(values) + 0.05 * product


def made(names):
    return {name: Parameter(START[name], name) for name in names}


def read(params):
    return {name: np.asarray(param.value) for name, param in params.items()}


def in_pyro(optimizer, loss_fn, names, steps):
    """Losses and final values of Pyro."""
    pyro.clear_param_store()
    params = {name: pyro.param(name, torch.tensor(START[name])).unconstrained() for name in names}
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            loss = loss_fn(params)
            losses.append(float(loss))
            optimizer.step(loss, params)
    return losses, {name: param.detach().numpy() for name, param in params.items()}


def assert_same(optimizer, parent, loss_fn, names, steps=30):
    params = made(names)
    losses = [float(optimizer.step(loss_fn, params)) for _ in range(steps)]
    expected_losses, expected = in_pyro(parent, loss_fn, names, steps)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-11)
    chex.assert_trees_all_close(read(params), expected, rtol=1e-11, atol=1e-12)


OPTIONS = {
    "adam": ("Adam", {"lr": 0.1, "weight_decay": 0.01, "amsgrad": True}),
    "clipped_adam": ("ClippedAdam", {"lr": 0.1, "lrd": 0.97, "clip_norm": 0.5}),
    "sgd_clip_norm": ("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True}, {"clip_norm": 1.0}),
    "rmsprop_clip_value": ("RMSprop", {"lr": 0.02}, {"clip_value": 0.3}),
    "by_name": (
        "Adam",
        lambda name: {"lr": 0.1, "betas": (0.8, 0.9)} if name == "x" else {"lr": 0.02},
        lambda module, name: {"clip_norm": 0.5} if name == "x" else {},
    ),
}


class TestAgainstPyro:
    @pytest.mark.slow
    @pytest.mark.parametrize("case", OPTIONS)
    def test_pyro_multi_optimizer(self, case):
        name, *options = OPTIONS[case]
        ours = multi.PyroMultiOptimizer(getattr(optim, name)(*options))
        parent = pyro.optim.multi.PyroMultiOptimizer(getattr(pyro.optim, name)(*options))
        assert_same(ours, parent, coupled, ["x", "pair"])

    def test_torch_multi_optimizer(self):
        ours = multi.TorchMultiOptimizer(torch_style.Adam, {"lr": 0.1})
        parent = pyro.optim.multi.TorchMultiOptimizer(torch.optim.Adam, {"lr": 0.1})
        assert_same(ours, parent, coupled, ["x", "pair"])

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "radii",
        [
            pytest.param({}, id="plain"),
            pytest.param({"pair": 0.1, "triple": 0.2, "single": 0.05}, id="radii"),
            pytest.param({"pair": 0.1}, id="one_radius"),
        ],
    )
    def test_newton(self, radii):
        ours, parent = multi.Newton(radii), pyro.optim.multi.Newton(radii)
        assert_same(ours, parent, separable, ["pair", "triple", "single"])

    @pytest.mark.slow
    def test_mixed(self):
        def parts_of(library, other):
            return [
                (["x"], library.Adam({"lr": 0.1}, {"clip_norm": 1.0})),
                (["pair"], other.Newton({"pair": 0.2})),
                (["single", "triple"], library.ClippedAdam({"lr": 0.05, "lrd": 0.95})),
            ]

        ours = multi.MixedMultiOptimizer(parts_of(optim, multi))
        parent = pyro.optim.multi.MixedMultiOptimizer(parts_of(pyro.optim, pyro.optim.multi))
        assert_same(ours, parent, separable, list(START))


def saddle(values, weight=1.0):
    """Coupled, with the derivatives by hand below."""
    return weight * values["x"] ** 2 * values["y"] + values["y"] ** 4 + values["x"] ** 2


class TestAtTheOldPoint:
    def params(self):
        return {"x": Parameter(1.5, "x"), "y": Parameter(0.5, "y")}

    def test_pyro_raises(self):
        """To see that there was something to mend."""
        params = {name: torch.tensor(1.5, requires_grad=True) for name in "xy"}
        params["y"] = params["y"].detach().reshape(1).requires_grad_()
        loss = (params["x"] ** 2 * params["y"] + params["y"] ** 4).sum()
        mixed = pyro.optim.multi.MixedMultiOptimizer(
            [(["y"], pyro.optim.multi.Newton()), (["x"], pyro.optim.SGD({"lr": 0.1}))]
        )
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            mixed.step(loss, params)

    @pytest.mark.parametrize("newton_first", [False, True], ids=["sgd_first", "newton_first"])
    def test_sgd_and_newton(self, newton_first):
        params, x, y = self.params(), 1.5, 0.5
        pieces = [(["x"], optim.SGD({"lr": 0.1})), (["y"], multi.Newton())]
        mixed = multi.MixedMultiOptimizer(pieces[::-1] if newton_first else pieces)
        for _ in range(10):
            loss = mixed.step(saddle, params)
            assert float(loss) == pytest.approx(x**2 * y + y**4 + x**2, rel=1e-12)
            x, y = x - 0.1 * (2 * x * y + 2 * x), y - (x**2 + 4 * y**3) / max(12 * y**2, 1e-8)
            assert float(params["x"].value) == pytest.approx(x, rel=1e-12)
            assert float(params["y"].value) == pytest.approx(y, rel=1e-12)

    def test_two_of_the_same_kind(self):
        """As one optimizer of both, which takes all gradients first."""
        mixed = multi.MixedMultiOptimizer(
            [(["x"], optim.ClippedAdam({"lr": 0.1})), (["y"], optim.ClippedAdam({"lr": 0.1}))]
        )
        one, params, others = optim.ClippedAdam({"lr": 0.1}), self.params(), self.params()
        for _ in range(10):
            mixed.step(saddle, params)
            multi.PyroMultiOptimizer(one).step(saddle, others)
        for name, value in read(others).items():
            np.testing.assert_allclose(read(params)[name], value, rtol=1e-12)

    def test_newton_holds_the_others(self):
        """Block diagonal: of x y + x^2 + y^2 each minimum at the other's old value."""
        params = self.params()
        multi.Newton().step(lambda v: v["x"] * v["y"] + v["x"] ** 2 + v["y"] ** 2, params)
        assert float(params["x"].value) == pytest.approx(-0.25, abs=1e-12)
        assert float(params["y"].value) == pytest.approx(-0.75, abs=1e-12)

    @slow
    def test_lbfgs_and_newton(self):
        """L-BFGS evaluates the loss again, at other values of its own parameters only."""
        params = self.params()
        loss = lambda v: (v["x"] - v["y"]) ** 2 + (v["y"] - 3.0) ** 2  # noqa: E731
        multi.MixedMultiOptimizer([(["x"], rules.LBFGS()), (["y"], multi.Newton())]).step(loss, params)
        assert float(params["x"].value) == pytest.approx(0.5, abs=1e-6)
        assert float(params["y"].value) == pytest.approx((1.5 + 3.0) / 2, abs=1e-12)


OPTIMIZERS = {
    "pyro": lambda: multi.PyroMultiOptimizer(optim.Adam({"lr": 0.1})),
    "rule": lambda: multi.as_multi_optimizer(rules.Adam(lr=0.1)),
    "newton": multi.Newton,
    "mixed": lambda: multi.MixedMultiOptimizer([(["x"], optim.Adam({"lr": 0.1})), (["y"], multi.Newton())]),
    "torch_style": lambda: multi.as_multi_optimizer(lambda params: torch_style.Adam(params, lr=0.1)),
}


class TestOneEvaluation:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["mixed", "newton", "pyro", "rule", "torch_style"])
    def test_executed_once_a_step(self, kind):
        calls, optimizer = [], OPTIMIZERS[kind]()
        params = {"x": Parameter([1.0, 2.0], "x"), "y": Parameter([0.5, 0.25, 2.0], "y")}

        def loss(values):
            jax.debug.callback(lambda: calls.append(1))
            return jnp.sum(values["x"] ** 2) * jnp.sum(jnp.cosh(values["y"]))

        for count in range(1, 4):
            optimizer.step(loss, params)
            jax.effects_barrier()
            assert len(calls) == count

    @pytest.mark.slow
    def test_one_program(self):
        def loss(values, target):
            return sum(jnp.sum((x - target) ** 2) for x in values.values())

        adam, newton = optim.Adam({"lr": 0.1}), multi.Newton({"y": 0.3})
        mixed = multi.MixedMultiOptimizer([(["x"], adam), (["y"], newton), (["z"], rules.Adam(lr=0.1))])
        params = {name: Parameter(np.ones(2), name) for name in "xyz"}
        before = programs.minimize._cache_size()
        for step in range(20):
            mixed.step(loss, params, jnp.array(float(step)))
        assert programs.minimize._cache_size() == before + 1
        adam.optim_objs["x"].param_groups[0]["lr"] = 0.2
        newton.trust_radii["y"] = 0.1
        old = read(params)
        mixed.step(loss, params, jnp.array(7.0))
        assert programs.minimize._cache_size() == before + 1
        assert np.linalg.norm(read(params)["y"] - old["y"]) == pytest.approx(0.1, rel=1e-6)
        mixed.parts[0][0].append("new")
        params["new"] = Parameter(np.ones(3), "new")
        for _ in range(3):
            mixed.step(loss, params, jnp.array(1.0))
        assert programs.minimize._cache_size() == before + 2

    def test_aux(self):
        params = {"x": Parameter([1.0, 2.0], "x")}
        loss, aux = multi.PyroMultiOptimizer(optim.SGD({"lr": 0.25})).step(
            lambda v, scale: (scale * jnp.sum(v["x"] ** 2), {"max": jnp.max(v["x"])}), params, 2.0, has_aux=True
        )
        assert (float(loss), float(aux["max"])) == (10.0, 2.0)
        assert read(params)["x"].tolist() == [0.0, 0.0]


MADE = {
    "pyro_optim": lambda options: optim.ClippedAdam(options, {"clip_norm": 1.0}),
    "pyro_multi": lambda options: multi.PyroMultiOptimizer(optim.Adam(options)),
    "newton": lambda options: multi.Newton({"pair": 0.2}),
    "mixed": lambda options: multi.MixedMultiOptimizer([(["x"], optim.Adam(options)), (["pair"], multi.Newton())]),
    "nested": lambda options: multi.MixedMultiOptimizer(
        [(["pair", "x"], multi.MixedMultiOptimizer([(["x"], optim.Adam(options)), (["pair"], rules.Adam())]))]
    ),
}


class TestTransformation:
    """The pure form of each, for compiled loops."""

    @staticmethod
    def asked(log):
        def options(name):
            log.append(name)
            return {"lr": 0.1 if name == "x" else 0.05}

        return options

    @pytest.mark.costly
    @pytest.mark.parametrize("in_scan", [False, True], ids=["jit", "scan"])
    @pytest.mark.parametrize(
        "kind", ["pyro_multi", "mixed", *(pytest.param(k, marks=slow) for k in ("pyro_optim", "newton", "nested"))]
    )
    def test_as_the_step(self, kind, in_scan):
        log, params = [], made(["x", "pair"])
        tx = jaxoptim.transformation(MADE[kind](self.asked(log)))

        def one(carry, _):
            values, state = carry
            value, grads = jax.value_and_grad(coupled)(values)
            updates, state = tx.update(grads, state, values, value=value, grad=grads, value_fn=coupled)
            return (jax.tree.map(jnp.add, values, updates), state), value

        values = {name: jnp.asarray(value) for name, value in read(params).items()}
        carry = values, tx.init(values)
        if in_scan:
            carry, _ = jax.jit(lambda carry: jax.lax.scan(one, carry, length=20))(carry)
        else:
            compiled = jax.jit(one)
            for _ in range(20):
                carry, _ = compiled(carry, None)
        assert len(log) == len(set(log))
        optimizer = multi.as_multi_optimizer(MADE[kind](self.asked([])))
        for _ in range(20):
            optimizer.step(coupled, params)
        for name, value in read(params).items():
            np.testing.assert_allclose(carry[0][name], value, rtol=1e-11, atol=1e-13)

    def test_state_goes_on_elsewhere(self):
        """State from one object's transformation continues in that of another, also of another order of names."""
        values, grads = {"x": jnp.ones(2)}, {"x": jnp.array([0.1, -3.0])}
        first, second = (jaxoptim.transformation(optim.Adam({"lr": 0.1})) for _ in range(2))
        state = first.init(values)
        for _ in range(3):
            _, state = first.update(grads, state, values)
        expected, _ = first.update(grads, state, values)
        given, _ = second.update(grads, jax.tree.map(np.asarray, state), values)
        assert (expected["x"] == given["x"]).all()

    def test_refusals(self):
        scheduled = optim.ExponentialLR({"optimizer": torch_style.SGD, "optim_args": {"lr": 0.1}, "gamma": 0.5})
        for frozen in (scheduled, multi.PyroMultiOptimizer(scheduled), multi.MixedMultiOptimizer([(["x"], scheduled)])):
            with pytest.raises(TypeError, match=r"PyroLRScheduler.*step"):
                jaxoptim.transformation(frozen)
        with pytest.raises(TypeError, match="no pure form"):
            jaxoptim.transformation(multi.MultiOptimizer())
        mixed = jaxoptim.transformation(multi.MixedMultiOptimizer([(["x"], rules.Adam())]))
        with pytest.raises(ValueError, match="'y' is in no part"):
            mixed.init({"x": jnp.ones(2), "y": jnp.ones(2)})


class TestOneState:
    """A PyroOptim is the same whoever calls it."""

    @pytest.mark.slow
    @pytest.mark.parametrize("cls", ["ClippedAdam", "Adam"])
    def test_one_count(self, cls):
        options = {"lr": 0.1, "lrd": 0.5} if cls == "ClippedAdam" else {"lr": 0.1}
        optimizer, twin = (getattr(optim, cls)(options) for _ in range(2))
        params, others = made(["x"]), made(["x"])
        mixed = multi.MixedMultiOptimizer([(["x"], optimizer)])

        def call(optimizer, params):
            params["x"].grad = jax.grad(separable)({"x": params["x"].value})["x"]
            optimizer([params["x"]])

        multi.PyroMultiOptimizer(optimizer).step(separable, params)
        call(optimizer, params)
        mixed.step(separable, params)
        value = params["x"].value
        params["x"].value = optimizer.update({"x": value}, jax.grad(separable)({"x": value}))["x"]
        for _ in range(4):
            call(twin, others)
        np.testing.assert_allclose(read(params)["x"], read(others)["x"], rtol=1e-13)
        saved = optimizer.get_state()["x"]
        assert int(saved["state"][0]["step"]) == 4
        assert saved["param_groups"][0]["lr"] == (0.1 * 0.5**4 if cls == "ClippedAdam" else 0.1)
        assert list(optimizer.get_state()) == ["x"]

    def test_restored_in_the_middle(self):
        optimizer, params = multi.PyroMultiOptimizer(optim.ClippedAdam({"lr": 0.1, "lrd": 0.9})), made(["x", "pair"])
        for _ in range(3):
            optimizer.step(coupled, params)
        other = optim.ClippedAdam({"lr": 7.0})
        other.set_state(optimizer.optim.get_state())
        others = {name: Parameter(value, name) for name, value in read(params).items()}
        for _ in range(3):
            optimizer.step(coupled, params)
            multi.PyroMultiOptimizer(other).step(coupled, others)
        assert all((read(params)[name] == value).all() for name, value in read(others).items())
