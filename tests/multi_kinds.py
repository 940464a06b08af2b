"""Every kind of optimizer that a multi-optimizer is made of, and a loss for all of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxoptim import optim as torch_style
from jaxoptim import rules
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim
from jaxoptim.pyro.optim.multi import MixedMultiOptimizer, MultiOptimizer, Newton, as_multi_optimizer

slow = pytest.mark.slow


class Descent(MultiOptimizer):
    """A user's own."""

    def get_step(self, loss_fn, params, *args):
        values = {name: jnp.asarray(getattr(param, "value", param)) for name, param in params.items()}
        grads = jax.grad(loss_fn)(values, *args)
        return {name: values[name] - 0.05 * grads[name] for name in values}


def mixed(params):
    """Its parts name the parameters that there are."""
    parts = [(["x"], optim.ClippedAdam({"lr": 0.1, "lrd": 0.9})), (["y"], Newton({"y": 0.5}))]
    return MixedMultiOptimizer([(names, part) for names, part in parts if names[0] in params])


KINDS = {
    "pyro": lambda params: optim.ClippedAdam({"lr": 0.1, "lrd": 0.9}, {"clip_norm": 2.0}),
    "schedule": lambda params: optim.ExponentialLR(
        {"optimizer": torch_style.SGD, "optim_args": {"lr": 0.02, "momentum": 0.9}, "gamma": 0.5}
    ),
    "horovod": lambda params: optim.HorovodOptimizer(optim.Adam({"lr": 0.1})),
    "rule": lambda params: rules.Adam(lr=0.1),
    "lbfgs": lambda params: rules.LBFGS(max_iter=2),
    "newton": lambda params: rules.Newton({"x": 0.5}),
    "optax": lambda params: optax.adam(0.1),
    "optax_lbfgs": lambda params: optax.lbfgs(),
    "plateau": lambda params: optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    "instance": lambda params: torch_style.ClippedAdam(params, lr=0.1, lrd=0.9),
    "function": lambda params: lambda params: torch_style.Adam(params, lr=0.1),
    "torch_lbfgs": lambda params: lambda params: torch_style.LBFGS(params, lr=0.1, max_iter=2),
    "mixed": mixed,
    "own": lambda params: Descent(),
    "mixed_own": lambda params: MixedMultiOptimizer([(["x"], optim.Adam({"lr": 0.1})), (["y"], Descent())]),
}
TORCH_STYLE = ("instance", "function", "torch_lbfgs")
OF_PYRO = ("pyro", "schedule", "horovod", "mixed", "mixed_own")
SEARCHES = ("lbfgs", "optax_lbfgs")
FAST = ("pyro", "rule", "newton", "function", "mixed", "own")


def kinds(*without):
    return pytest.mark.parametrize(
        "kind", [pytest.param(kind, marks=() if kind in FAST else slow) for kind in KINDS if kind not in without]
    )


def loss(values, target, weight=1.0):
    """Coupled, convex, and of as many parameters as there are."""
    total = sum(jnp.sum((x - target) ** 2) + 0.1 * jnp.sum(x**4) for x in values.values())
    return weight * (total + 0.1 * sum(jnp.sum(x) for x in values.values()) ** 2)


def started(names="xy"):
    start = {"x": np.array([3.0, -1.0]), "y": np.array(0.5)}
    return {name: Parameter(start[name], name) for name in names}


def arrays(params):
    return {name: np.array(param.value) for name, param in params.items()}


def pair(kind):
    """Two times the same, with parameters of their own."""
    for _ in range(2):
        params = started()
        yield as_multi_optimizer(KINDS[kind](params)), params


def assert_equal(given, expected, tolerance=0.0):
    chex.assert_trees_all_close(given, expected, rtol=tolerance, atol=tolerance)
