"""A real Ctrl-C at any moment of a step, in every face: what is there then is that of before or after the step."""

import gc
import os
import signal
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Trace_ELBO

from jaxoptim import optim, rules
from jaxoptim.optim import Parameter
from jaxoptim.pyro import infer
from jaxoptim.pyro import optim as pyro_style

SHAPES = {"large": (200, 100), "small": (3,), "one": ()}
SIGNALS = 40


def start():
    return {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def grads():
    return {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def bowl(params, scale=1.0):
    return scale * sum(jnp.sum(x**2) for x in params.values())


class Face:
    """An optimizer of some face: one step, and everything that it has."""

    def __init__(self, step, everything):
        self.step, self.everything = step, everything


def torch_style(make, step):
    def face():
        opt = make()
        return Face(lambda: step(opt), lambda: (opt.params, opt.state_dict()["state"]))

    return face


def with_closure(opt):
    def closure():
        for param in opt.param_groups[0]["params"]:
            param.grad = 2 * param.value
        return 0.0

    opt.step(closure)


def pyro_call(make, options):
    def face():
        params = [Parameter(x, name) for name, x in start().items()]
        opt = make(options)

        def step():
            for param in params:
                param.grad = jnp.ones(param.shape)
            opt(params)

        return Face(step, lambda: ([param.value for param in params], opt.get_state()))

    return face


def multi():
    params = {name: Parameter(x, name) for name, x in start().items()}
    parts = [(["large"], pyro_style.Adam({"lr": 0.01})), (["small", "one"], rules.Adam(lr=0.01))]
    opt = pyro_style.multi.MixedMultiOptimizer(parts)
    return Face(lambda: opt.step(bowl, params, 1.0), lambda: [param.value for param in params.values()])


def svi():
    def model():
        numpyro.sample("x", dist.Normal(0.0, 1.0))

    def guide():
        scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
        numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.5), scale))

    made = infer.SVI(model, guide, pyro_style.Adam({"lr": 0.01}), Trace_ELBO())
    made.evaluate_loss()
    return Face(made.step, lambda: {name: param.value for name, param in made.params.items()})


FACES = {
    "step": torch_style(lambda: optim.Adam(start()), lambda opt: opt.step(grads())),
    "step of groups": torch_style(
        lambda: optim.Adam(start(), groups=[("one", {"lr": 0.1})]), lambda opt: opt.step(grads())
    ),
    "closure": torch_style(lambda: optim.Adam(start()), with_closure),
    "minimize": torch_style(lambda: optim.Adam(start()), lambda opt: opt.minimize(bowl)),
    "ClippedAdam": torch_style(lambda: optim.ClippedAdam(start(), lrd=0.9), lambda opt: opt.step(grads())),
    "L-BFGS": torch_style(lambda: optim.LBFGS(start(), lr=0.1, max_iter=2), lambda opt: opt.minimize(bowl)),
    "L-BFGS, closure": torch_style(lambda: optim.LBFGS(start(), lr=0.1, max_iter=2), with_closure),
    "sampler": torch_style(
        lambda: optim.SGLD(start(), lr=1e-4, nbeta=2.0, key=jax.random.key(0)), lambda opt: opt.minimize(bowl)
    ),
    "PyroOptim": pyro_call(pyro_style.Adam, {"lr": 0.01}),
    "PyroOptim, decaying": pyro_call(pyro_style.ClippedAdam, {"lr": 0.01, "lrd": 0.999}),
    "MultiOptimizer": multi,
    "SVI": svi,
}


@pytest.fixture
def ctrl_c():
    """Python's own handler, which a process in the background may not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()
    yield
    gc.enable()
    signal.signal(signal.SIGINT, before)


def bits(tree):
    return jax.tree.map(np.array, tree)


def same(left, right):
    try:
        chex.assert_trees_all_equal(left, right)
    except (AssertionError, ValueError):
        return False
    return True


def steps_before_ctrl_c(step, wait):
    """The steps that were made before a signal came, which may have broken the next one or come just after it."""
    timer, count = threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT)), 0
    try:
        timer.start()
        end = time.monotonic() + 1
        while time.monotonic() < end:
            step()
            count += 1
    except KeyboardInterrupt:
        pass
    # Python drops what a signal raises within a finalizer, and then the steps have come to their end.
    timer.join()
    return count


@pytest.mark.costly
@pytest.mark.parametrize("face", [*FACES.values()], ids=FACES)
def test_everything_is_readable_after_ctrl_c(face, ctrl_c):
    undisturbed, disturbed = face(), face()
    for _ in range(3):  # what is compiled at the first steps is compiled
        undisturbed.step()
        disturbed.step()
    after = bits(undisturbed.everything())
    for wait in np.random.default_rng(0).uniform(0, 2e-3, SIGNALS):
        for _ in range(steps_before_ctrl_c(disturbed.step, wait)):
            undisturbed.step()
            after = bits(undisturbed.everything())
        found, before = bits(disturbed.everything()), after
        if not same(found, before):
            undisturbed.step()
            after = bits(undisturbed.everything())
            chex.assert_trees_all_equal(found, after)
