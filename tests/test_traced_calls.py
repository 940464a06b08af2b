"""Objects that keep state, called inside functions that JAX traces: one clear error, and everything as it was."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Trace_ELBO

from jaxoptim import optim
from jaxoptim.optim import Parameter, lr_scheduler
from jaxoptim.pyro import infer
from jaxoptim.pyro import optim as pyro_style


def model():
    numpyro.sample("x", dist.Normal(0.0, 1.0))


def guide():
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.5), scale))


def bowl(params, scale=1.0):
    return scale * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def torch_style(cls, use, **options):
    def face():
        opt = cls({"w": jnp.ones(3)}, **options)
        return lambda x: use(opt, x), lambda: (opt.params, opt.state_dict()["state"])

    return face


def scheduled():
    opt = optim.SGD({"w": jnp.ones(3)}, lr=0.1)
    scheduler = lr_scheduler.StepLR(opt, 1)
    opt.step({"w": jnp.ones(3)})
    return lambda x: scheduler.step(), lambda: (opt.params, opt.state_dict(), scheduler.state_dict())


def pyro_call():
    param = Parameter(jnp.ones(3), "w")
    opt = pyro_style.Adam({"lr": 0.1})

    def use(x):
        param.grad = jnp.ones(3)
        opt([param])

    return use, lambda: (param.value, opt.get_state())


def pyro_update():
    opt = pyro_style.Adam({"lr": 0.1})
    return lambda x: opt.update({"w": jnp.ones(3)}, {"w": jnp.ones(3)}), opt.get_state


def pyro_schedule():
    opt = pyro_style.StepLR({"optimizer": optim.SGD, "optim_args": {"lr": 0.1}, "step_size": 1})
    opt.update({"w": jnp.ones(3)}, {"w": jnp.ones(3)})
    return lambda x: opt.step(), opt.get_state


def multi():
    params = {"w": Parameter(jnp.ones(3), "w")}
    opt = pyro_style.multi.as_multi_optimizer(pyro_style.Adam({"lr": 0.1}))
    return lambda x: opt.step(bowl, params), lambda: params["w"].value


def svi():
    made = infer.SVI(model, guide, pyro_style.Adam({"lr": 0.1}), Trace_ELBO())
    made.step()
    return lambda x: made.step(), lambda: made.get_params()


FACES = {
    "step": torch_style(optim.Adam, lambda opt, x: opt.step({"w": jnp.ones(3) * x})),
    "step of constants": torch_style(optim.Adam, lambda opt, x: opt.step({"w": np.ones(3, np.float32)})),
    "minimize": torch_style(optim.Adam, lambda opt, x: opt.minimize(bowl, x)),
    "minimize without data": torch_style(optim.Adam, lambda opt, x: opt.minimize(bowl)),
    "L-BFGS": torch_style(optim.LBFGS, lambda opt, x: opt.minimize(bowl)),
    "sampler": torch_style(optim.SGLD, lambda opt, x: opt.minimize(bowl), nbeta=2.0, key=jax.random.key(0)),
    "scheduler": scheduled,
    "PyroOptim": pyro_call,
    "update": pyro_update,
    "PyroLRScheduler": pyro_schedule,
    "MultiOptimizer": multi,
    "SVI": svi,
}
TRACERS = {
    "jit": lambda use: jax.jit(use)(1.0),
    "grad": lambda use: jax.grad(lambda x: (use(x), x)[1])(1.0),
    "vmap": lambda use: jax.vmap(use)(jnp.ones(2)),
    "scan": lambda use: jax.lax.scan(lambda carry, x: (carry, use(x)), 0.0, jnp.ones(2)),
}


@pytest.mark.parametrize("trace", [*TRACERS.values()], ids=TRACERS)
@pytest.mark.parametrize("face", [*FACES.values()], ids=FACES)
def test_it_is_refused_and_nothing_has_changed(face, trace):
    use, everything = face()
    before = jax.tree.map(np.array, everything())
    with pytest.raises(TypeError, match=r"inside a function that JAX traces .*Call it outside, or "):
        trace(use)
    chex.assert_trees_all_equal(jax.tree.map(np.array, everything()), before)
    use(1.0)
    jax.block_until_ready(everything())
