"""A small run with traces of every kind, for tests of where its traces are kept."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp

from jaxoptim import rules, sampling

X = jax.random.normal(jax.random.key(0), (7, 2))
KEY = jax.random.key(3)
FEW = {"key": KEY, "num_chains": 2, "num_draws": 20, "num_burnin_steps": 3, "num_steps_bw_draws": 2}
SGLD = rules.SGLD(lr=0.02, nbeta=5.0, weight_norm=True)


def of_tokens(w, x):
    return (jnp.sum((x - w) ** 2, -1) / 2)[:, None] * jnp.arange(3)


def loss(w, x):
    return jnp.mean(jnp.sum((x - w) ** 2, -1) / 2)


@dataclasses.dataclass(frozen=True)
class Path(sampling.Observable):
    """An observable whose result needs its whole trace."""

    def update(self, memory, draw):
        return memory, draw.loss

    def result(self, memory, trace):
        return {"sum": trace.sum(), "path": trace.cumsum()}


FULL = FEW | {
    "probes": {"code": X},
    "observables": {
        "both": lambda w: {"half": w.astype(jnp.bfloat16), "sign": w > 0},
        "code": sampling.Losses(of_tokens, "code"),
        "covariance": sampling.Covariance(),
        "path": Path(),
    },
}
sample = functools.partial(sampling.sample, loss, jnp.ones(2), SGLD, X)


tempered = functools.partial(
    sampling.parallel_tempering, loss, jnp.ones(2), SGLD, X, nbeta=[1.0, 3.0, 5.0], num_steps_bw_swaps=3, batch_size=4
)


def same(found, expected):
    """To the last bit, in the same dtypes."""
    for field in dataclasses.fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "axes":
            assert one == other
        else:
            chex.assert_trees_all_equal(one, other)
            chex.assert_trees_all_equal_dtypes(one, other)
