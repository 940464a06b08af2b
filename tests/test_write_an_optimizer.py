"""The optimizer of docs/write_an_optimizer.md, made by the first block of that page, outside the package."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxoptim
from jaxoptim import optim
from jaxoptim.pyro.optim import PyroOptim

PAGE = Path(__file__).parent.parent / "docs" / "write_an_optimizer.md"
PARAMS = {"w": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "b": jnp.ones(4)}
OPTIONS = {"lr": 0.003, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def page():
    namespace = {"__name__": "lion"}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1], namespace)
    return namespace


def gradients(step):
    rng = np.random.default_rng(step)
    return {name: jnp.asarray(rng.normal(size=x.shape), x.dtype) for name, x in PARAMS.items()}


@pytest.fixture(scope="module")
def wanted():
    """Ten steps of optax's."""
    tx, params = optax.lion(OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"]), PARAMS
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(10):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def as_rule(page, params):
    rule, step = page["Lion"](**OPTIONS), jax.jit(jaxoptim.step)
    state = jaxoptim.init(rule, params)
    for number in range(10):
        params, state = step(rule, params, gradients(number), state)
    return params


def packed(page):
    params = as_rule(page, jaxoptim.pack(PARAMS))
    assert isinstance(params, jaxoptim.Packed)
    return params.unpack()


def as_transformation(page):
    tx, params = page["lion"](**OPTIONS), PARAMS
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(10):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def as_class(page):
    optimizer = type("LionOptimizer", (optim.Optimizer,), {"rule": page["Lion"]})(PARAMS, **OPTIONS)
    for step in range(10):
        optimizer.step(gradients(step))
    return optimizer.params


def in_pyros_style(page):
    optimizer = PyroOptim(type("LionOptimizer", (optim.Optimizer,), {"rule": page["Lion"]}), OPTIONS)
    params = PARAMS
    for step in range(10):
        params = optimizer.update(params, gradients(step))
    return params


FACES = {
    "rule": lambda page: as_rule(page, PARAMS),
    "packed": packed,
    "transformation": as_transformation,
    "class": as_class,
    "pyro": in_pyros_style,
}


@pytest.mark.parametrize("face", FACES)
def test_the_lion_of_the_page_is_optaxs_in_every_form(face, page, wanted):
    chex.assert_trees_all_close(FACES[face](page), wanted, rtol=1e-6)


def test_its_numbers_are_checked_by_name(page):
    with pytest.raises(ValueError, match=r"Invalid betas\[1\]: 1.0. Lion takes betas\[1\] >= 0 and < 1"):
        page["lion"](betas=(0.9, 1.0))
