"""Arrays of one shape under a rule that looks at shapes: one stack, with the numbers of each array alone."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxoptim
from jaxoptim import optim, rules
from jaxoptim.core import stacks
from jaxoptim.engine import programs

RULES = {
    "Muon": rules.Muon(lr=0.1),
    "Adafactor": rules.Adafactor(lr=0.1, weight_decay=0.1),
    "DCTAdam": rules.DCTAdam(lr=0.1, dct_dim=-1),
}
SHAPES = {"a": (3, 4), "b": (4, 3), "c": (3, 4), "d": (3, 4)}
LARGE = (160, 128)
"""The shape of an array that an optimizer keeps by itself."""


@pytest.fixture
def on_accelerators(monkeypatch):
    """Update arrays here as on accelerators."""
    stacks._dense.clear_cache()
    monkeypatch.setattr(stacks, "_one_by_one", stacks._together)
    yield
    stacks._dense.clear_cache()


def tree(seed, dtype=None, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def steps(rule, params, number=3, skipped=None, **options):
    state, step = jaxoptim.init(rule, params, **options), jax.jit(lambda *args: jaxoptim.step(*args))
    for seed in range(number):
        grads = tree(seed + 1, jax.tree.leaves(params)[0].dtype)
        grads = {name: None if (seed, name) == skipped else grads[name] for name in params}
        params, state = step(rule, params, grads, state)
    return params, state.slots


def part(name, result):
    params, slots = result
    return params[name], {key: slot[name] for key, slot in slots.items()}


@pytest.mark.slow
@pytest.mark.parametrize("missed", [{}, {"skipped": (1, "c")}, {"skipped": (1, "c"), "counts": True}], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_an_array_is_updated_as_if_it_were_alone(rule, missed, x64, on_accelerators):
    params = tree(0)
    together = steps(rule, params, **missed)
    for name in SHAPES:
        alone = steps(rule, {name: params[name]}, **missed)
        chex.assert_trees_all_close(part(name, together), part(name, alone), rtol=1e-15, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [{"master_weights": True}, {"rounding": "stochastic"}], ids=str)
def test_arrays_of_few_bits_keep_what_they_keep_alone(precision, on_accelerators):
    rule, params = RULES["Muon"].with_precision(**precision), tree(0, jnp.bfloat16)
    together = steps(rule, params)
    for name in SHAPES:
        chex.assert_trees_all_equal(part(name, together), part(name, steps(rule, {name: params[name]})))


def test_a_rate_of_each_array_is_its_own(on_accelerators):
    params, rates = tree(0), dict(zip(SHAPES, (0.1, 0.2, 0.3, 0.4), strict=True))
    together = steps(rules.Muon(lr=rates), params)
    for name in SHAPES:
        alone = steps(rules.Muon(lr=rates[name]), {name: params[name]})
        chex.assert_trees_all_close(part(name, together), part(name, alone), rtol=1e-6)


def grams(function, *args, platform="cpu"):
    """The shapes of the Gram matrices in the program for a platform, with the height of their stack in front."""
    text = function.trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return set(re.findall(r"dot_general .*-> tensor<(\w+)xbf16>", text))


@pytest.mark.parametrize(("platform", "shape"), [("cuda", "3x128x128"), ("tpu", "3x128x128"), ("cpu", "128x128")])
def test_matrices_are_one_batch_on_accelerators(platform, shape, monkeypatch):
    rule, params = RULES["Muon"], {name: jnp.ones(LARGE) for name in "abc"}
    state, tx = jaxoptim.init(rule, params), jaxoptim.transformation(rule)
    assert grams(jax.jit(jaxoptim.step), rule, params, params, state, platform=platform) == {shape}
    assert grams(jax.jit(tx.update), params, state, params, platform=platform) == {shape}
    found, advance = [], programs.advance
    opt = optim.Muon(params)

    def looked_at(*args):
        found.append(grams(advance, *args, platform=platform))
        return advance(*args)

    monkeypatch.setattr(programs, "advance", looked_at)
    opt.step(params)
    assert found == [{shape}]


def test_a_stack_takes_no_more_memory_than_allowed(monkeypatch):
    monkeypatch.setattr(stacks, "_STACK", 3 * 20)
    rule, params = rules.Muon(lr=0.125), {name: jnp.ones((4, 5)) for name in "abcdefg"}
    state = jaxoptim.init(rule, params)
    assert grams(jax.jit(jaxoptim.step), rule, params, params, state, platform="tpu") == {"3x4x4", "4x4"}
