"""Rules as dataclasses and pytrees: conversion, checks, tracing, sweeps and derivatives."""

import dataclasses
import decimal
import functools
import inspect
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxoptim
from jaxoptim import Decay, rules
from jaxoptim.core import Rule, Scalar, enabled, rule
from table import CASES, FIRST, OWN_OPTIONS, ROWS, Case

PARAMS = {"a": jnp.arange(6.0).reshape(2, 3) + 1, "b": jnp.ones((3, 2))}


def loss(params):
    return sum(jnp.sum((x - 3.0) ** 2) for x in jax.tree.leaves(params))


def grads_of(rule, params):
    grads = jax.grad(loss)(params)
    if rule.sparse != "required":
        return grads
    return jax.tree.map(lambda g: jax.experimental.sparse.BCOO.fromdense(g, n_dense=1, nse=2), grads)


@functools.partial(jax.jit, static_argnames="steps")
def train(rule, params=PARAMS, steps=5):
    def body(carry, _):
        params, state = carry
        params, state = jaxoptim.step(rule, params, grads_of(rule, params), state)
        return (params, state), loss(params)

    (params, _), losses = jax.lax.scan(body, (params, jaxoptim.init(rule, params)), length=steps)
    return losses[-1]


def counting_step():
    """A jitted step and the list that grows whenever it is compiled."""
    compiled = []

    def step(rule, params, grads, state):
        compiled.append(rule)
        return jaxoptim.step(rule, params, grads, state)

    return jax.jit(step), compiled


def numbers(rule):
    """The numeric hyperparameters of a rule that are traced, as plain keywords."""
    found = {}
    for name, spec in rule.specs.items():
        value = getattr(rule, name)
        if isinstance(spec, tuple) and None not in value:
            found[name] = tuple(x.rate if isinstance(x, Decay) else x for x in value)
        elif not isinstance(spec, tuple) and value is not None and enabled(value):
            found[name] = value.rate if isinstance(value, Decay) else value
    return found


def nudged(value, factor):
    if isinstance(value, tuple):
        return tuple(nudged(x, factor) for x in value)
    return value * factor


# One setting per row, with every number that a user may want to change switched on.
TUNED = [
    Case(row, max(row.options, key=lambda o: len([k for k in o if k not in ("maximize", "nesterov")]))) for row in ROWS
]


@pytest.mark.costly
@pytest.mark.parametrize("case", TUNED, ids=str)
def test_changing_any_number_of_a_rule_compiles_nothing_new(case):
    step, compiled = counting_step()
    rule = case.ours()
    state = jaxoptim.init(rule, PARAMS)
    for factor in (1.0, 0.99, 0.97):
        changed = rule.replace(**{name: nudged(value, factor) for name, value in numbers(rule).items() if name != "d"})
        step(changed, PARAMS, grads_of(rule, PARAMS), state)
    assert len(compiled) == 1


def test_an_int_or_a_numpy_number_compiles_nothing_new():
    (step, compiled), state = counting_step(), jaxoptim.init(rules.SGD(), PARAMS)
    for lr in (0.5, 1, np.float32(0.1), np.float64(0.1), np.int64(2), np.asarray(0.3)):
        step(rules.SGD(lr=lr), PARAMS, PARAMS, state)
    assert len(compiled) == 1


def test_switching_a_term_on_compiles_another_program():
    step, compiled = counting_step()
    for momentum in (0, 0.0, 0.5, 0.9):
        rule = rules.SGD(momentum=momentum)
        step(rule, PARAMS, PARAMS, jaxoptim.init(rule, PARAMS))
    assert len(compiled) == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in FIRST if "lr" in case.row.rule.specs], ids=str)
def test_vmap_over_a_rule_equals_a_loop_over_its_settings(case):
    settings = [case.ours(lr=lr) for lr in (0.01, 0.02, 0.05)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x, jnp.float32) for x in leaves]), *settings)
    swept = jax.vmap(train)(stacked)
    looped = jnp.stack([train(rule) for rule in settings])
    np.testing.assert_allclose(swept, looped, rtol=1e-5)


@pytest.mark.slow
def test_vmap_over_an_array_given_for_one_number():
    rates = jnp.array([0.01, 0.1])
    looped = [train(rules.Adam(lr=0.01)), train(rules.Adam(lr=0.1))]
    np.testing.assert_allclose(jax.vmap(lambda lr: train(rules.Adam(lr=lr)))(rates), looped, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(train)(jax.vmap(rules.Adam)(rates)), looped, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    # Rprop moves by the sign alone and Muon rounds to bfloat16; their rates still act linearly.
    [case for case in FIRST if "lr" in case.row.rule.specs],
    ids=str,
)
def test_derivative_by_the_learning_rate_is_the_finite_difference(case, x64):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    rule = case.ours(lr=0.3 if case.row.rule is rules.Adadelta else 0.01)
    steps = 1 if case.row.rule is rules.Muon else 3  # Newton-Schulz in bfloat16 is a staircase in its input
    derivative = jax.grad(lambda rule: train(rule, params, steps))(rule).lr
    h = 1e-4 if case.row.rule is rules.ASGD else 1e-6  # ASGD keeps its rate in float32: wider steps of the staircase
    ahead, behind = (train(rule.replace(lr=rule.lr + sign * h), params, steps) for sign in (1, -1))
    assert float(derivative) == pytest.approx(float((ahead - behind) / (2 * h)), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rate", "total"])
def test_derivative_by_a_decay_rate(name, x64):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)

    def final(beta):
        return train(rules.Adam(lr=0.1, betas=(beta, 0.999)), params)

    if name == "rate":
        derivative = jax.grad(final)(0.8)
    else:
        decay = jax.grad(lambda rule: train(rule, params))(rules.Adam(lr=0.1, betas=(0.8, 0.999))).betas[0]
        derivative = decay.rate - decay.complement
    h = 1e-6
    assert float(derivative) == pytest.approx(float((final(0.8 + h) - final(0.8 - h)) / (2 * h)), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in TUNED if c.row.rule is not rules.SparseAdam], ids=str)
def test_hypergradients_are_finite_where_a_gradient_was_always_zero(case):
    def final(rule):
        params, state = {"w": jnp.ones((2, 2))}, jaxoptim.init(rule, {"w": jnp.ones((2, 2))})
        for _ in range(2):
            grads = {"w": jax.grad(lambda p: jnp.sum(p["w"][:, 0] ** 2))(params)["w"]}
            params, state = jaxoptim.step(rule, params, grads, state)
        return jnp.sum(params["w"])

    chex.assert_tree_all_finite(jax.jit(jax.grad(final))(case.ours()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rule_survives_flattening_with_anything_in_its_leaves(case):
    rule = case.ours()
    leaves, treedef = jax.tree.flatten(rule)
    assert jax.tree.unflatten(treedef, leaves) == rule
    assert jax.tree.structure(jax.tree.map(lambda _: object(), rule)) == treedef
    assert not any(isinstance(leaf, bool | str | int) for leaf in leaves)


@pytest.mark.needs("torch")
@pytest.mark.needs("pyro")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_signature_follows_the_parent(row):
    parent = inspect.signature(row.parent).parameters
    ours = inspect.signature(row.rule).parameters
    flags = {"params", "foreach", "fused", "capturable", "differentiable"}
    names = [name for name in parent if name not in flags]
    assert [name for name in ours if name not in OWN_OPTIONS.get(row.name, [])] == names
    for name in names:
        expected = parent[name].default
        assert ours[name].default == expected, name
        assert ours[name].kind == parent[name].kind, name


# What the parents refuse. Pyro's own three refuse nothing; ours refuse what has no meaning.
BAD = [
    (rules.SGD, {"lr": -1.0}, "Invalid lr: -1.0. SGD takes lr >= 0."),
    (rules.SGD, {"momentum": -0.1}, "SGD takes momentum >= 0"),
    (rules.SGD, {"weight_decay": -0.1}, "SGD takes weight_decay >= 0"),
    (rules.SGD, {"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    (rules.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Set momentum > 0 and dampening=0"),
    *((row.rule, {"lr": -1.0}, f"{row.name} takes lr >") for row in ROWS if "lr" in row.rule.specs),
    (rules.SparseAdam, {"lr": 0.0}, "SparseAdam takes lr > 0"),
    (rules.SparseAdam, {"eps": 0.0}, "SparseAdam takes eps > 0"),
    (rules.Adam, {"betas": (1.0, 0.9)}, "Invalid betas[0]: 1.0. Adam takes betas[0] >= 0 and < 1."),
    (rules.Adam, {"betas": (0.9, -0.1)}, "Invalid betas[1]: -0.1"),
    (rules.Adam, {"eps": -1e-8}, "Adam takes eps >= 0"),
    (rules.AdamW, {"weight_decay": -1.0}, "AdamW takes weight_decay >= 0"),
    (rules.NAdam, {"momentum_decay": -1.0}, "NAdam takes momentum_decay >= 0"),
    (rules.RAdam, {"betas": (0.9, 1.0)}, "RAdam takes betas[1] >= 0 and < 1"),
    (rules.Adamax, {"betas": (0.9, 1.0)}, "Adamax takes betas[1] >= 0 and < 1"),
    (rules.Adadelta, {"rho": 1.1}, "Adadelta takes rho >= 0 and <= 1"),
    (rules.Adagrad, {"lr_decay": -1.0}, "Adagrad takes lr_decay >= 0"),
    (rules.Adagrad, {"initial_accumulator_value": -1.0}, "Adagrad takes initial_accumulator_value >= 0"),
    (rules.RMSprop, {"alpha": -1.0}, "RMSprop takes alpha >= 0"),
    (rules.RMSprop, {"momentum": -1.0}, "RMSprop takes momentum >= 0"),
    (rules.Rprop, {"etas": (1.5, 1.2)}, "Rprop takes etas[0] > 0 and < 1"),
    (rules.Rprop, {"etas": (0.5, 0.9)}, "Rprop takes etas[1] > 1"),
    (rules.Adafactor, {"beta2_decay": 0.1}, "Adafactor takes beta2_decay <= 0"),
    (rules.Adafactor, {"eps": (-1.0, 1e-3)}, "Adafactor takes eps[0] >= 0"),
    (rules.Adafactor, {"eps": (None, -1.0)}, "Adafactor takes eps[1] >= 0"),
    (rules.Adafactor, {"d": 0.5}, "Adafactor takes d >= 1"),
    (rules.Muon, {"momentum": -1.0}, "Muon takes momentum >= 0"),
    (rules.Muon, {"weight_decay": -1.0}, "Muon takes weight_decay >= 0"),
    (rules.Muon, {"adjust_lr_fn": "other"}, "Muon takes None, 'original' or 'match_rms_adamw'"),
]
PARENTS = {row.rule: row for row in ROWS}


@pytest.mark.needs("torch")
@pytest.mark.parametrize(("cls", "options", "message"), BAD, ids=lambda x: getattr(x, "__name__", str(x)))
def test_bad_numbers_raise_what_the_parent_raises(cls, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        cls(**options)
    row = PARENTS[cls]
    if row.path.startswith("torch."):
        import torch

        with pytest.raises(type(raised.value)):
            row.parent([torch.ones((2, 2), requires_grad=True)], **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": float("nan")}, ValueError, "Invalid lr: nan"),
        ({"lr": None}, TypeError, "takes a number, a scalar array or a schedule"),
        ({"lr": "0.1"}, TypeError, "Invalid lr: '0.1' (str)"),
        ({"lr": True}, TypeError, "Invalid lr: True (bool)"),
        ({"lr": jnp.array([0.1, -0.1])}, ValueError, "Adam takes lr >= 0"),
        ({"betas": 0.9}, ValueError, "Adam takes a tuple of 2 numbers for betas"),
        ({"betas": (0.9,)}, ValueError, "Adam takes a tuple of 2 numbers for betas"),
        ({"betas": (0.9, "x")}, TypeError, "Invalid betas[1]: 'x' (str)"),
        ({"learning_rate": 0.1}, TypeError, "learning_rate"),
    ],
    ids=str,
)
def test_what_is_not_a_hyperparameter_is_named(options, error, message):
    with pytest.raises(error) as raised:
        rules.Adam(**options)
    assert message in str(raised.value)


def test_the_factory_lists_what_it_takes():
    with pytest.raises(
        TypeError, match=r"adam\(\) got an unexpected keyword argument 'learning_rate'. It takes lr, betas"
    ):
        jaxoptim.adam(learning_rate=0.1)
    with pytest.raises(TypeError, match=r"Adam has no hyperparameter momentum. It has lr, betas"):
        rules.Adam().replace(momentum=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in FIRST if "lr" in c.row.rule.specs], ids=str)
def test_traced_numbers_are_never_checked(case):
    lr = jax.jit(lambda lr: jnp.asarray(case.ours(lr=lr).lr))(-1.0)
    assert float(lr) == -1.0


def test_nesterov_with_traced_momentum_is_not_checked():
    jax.jit(lambda m, d: rules.SGD(momentum=m, dampening=d, nesterov=True).momentum)(0.0, 0.5)
    rules.SGD(momentum=jnp.asarray(0.9), dampening=jnp.asarray(0.0), nesterov=True)


def test_a_rule_is_frozen_and_replace_checks_again():
    rule = rules.Adam()
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.lr = 0.1
    with pytest.raises(ValueError, match="Adam takes lr >= 0"):
        rule.replace(lr=-1.0)
    assert rule.replace(weight_decay=0.1).replace(weight_decay=0) == rule


def test_rules_compare_and_hash_by_their_numbers():
    assert rules.Adam(lr=0.1) == rules.Adam(lr=0.1) != rules.Adam(lr=0.2)
    assert len({rules.Adam(lr=0.1), rules.Adam(lr=0.1)}) == 1
    assert repr(rules.SGD(lr=1)).startswith("SGD(lr=1.0, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False")


@pytest.mark.costly
@pytest.mark.parametrize("field", ["lr", "weight_decay", "eps"])
def test_a_schedule_stands_for_any_number(field):
    def schedule(step):
        return 0.1 / (1 + step)

    rule, reference = rules.Adam(**{field: schedule}), rules.Adam()
    params, state = PARAMS, jaxoptim.init(rule, PARAMS)
    expected, expected_state = PARAMS, state
    for t in range(4):
        params, state = jax.jit(jaxoptim.step)(rule, params, jax.grad(loss)(params), state)
        constant = reference.replace(**{field: 0.1 / (1 + t)})
        expected, expected_state = jaxoptim.step(constant, expected, jax.grad(loss)(expected), expected_state)
    np.testing.assert_allclose(params["a"], expected["a"], rtol=1e-6)


def test_a_schedule_of_a_decay_rate():
    rule = rules.Adam(betas=(lambda step: 0.9, optax.constant_schedule(0.999)))
    params, _ = jaxoptim.step(rule, PARAMS, PARAMS, jaxoptim.init(rule, PARAMS))
    expected, _ = jaxoptim.step(rules.Adam(), PARAMS, PARAMS, jaxoptim.init(rules.Adam(), PARAMS))
    np.testing.assert_allclose(params["a"], expected["a"], rtol=1e-6)


def test_a_schedule_that_is_a_pytree_is_traced():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Linear:
        slope: float

        def __call__(self, step):
            return self.slope * (step + 1)

    step, compiled = counting_step()
    for slope in (0.1, 0.2):
        rule = rules.SGD(lr=Linear(slope))
        params, _ = step(rule, PARAMS, PARAMS, jaxoptim.init(rule, PARAMS))
        np.testing.assert_allclose(params["a"], PARAMS["a"] * (1 - slope), rtol=1e-6)
    assert len(compiled) == 1


def test_asgd_starts_its_rate_from_the_schedule():
    state = jaxoptim.asgd(lr=lambda step: 0.5 + step).init(PARAMS)
    assert float(state.slots["eta"]["a"]) == 0.5


def test_a_user_writes_a_rule_of_their_own():
    @rule
    class SignDescent(Rule):
        lr: Scalar = 0.1

        def init(self, param):
            return {}

        def update(self, grad, slots, param, step):
            return -self.lr * jnp.sign(grad), slots

    tx = jaxoptim.transformation(SignDescent(lr=0.5))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    assert jnp.all(updates["a"] == -0.5)
    with pytest.raises(TypeError, match="decorates a subclass of Rule"):
        rule(object)
    with pytest.raises(TypeError, match="got the class SignDescent"):
        jaxoptim.transformation(SignDescent)
    with pytest.raises(TypeError, match="abstract"):
        Rule()


correction = jax.jit(Decay.bias_correction)


@settings(max_examples=50, deadline=None)
@given(rate=st.floats(0.0, 0.9999999), t=st.integers(1, 100_000))
def test_decay_keeps_its_digits_in_float32(rate, t):
    decay = Decay.of(rate)
    with decimal.localcontext(prec=60):
        power = decimal.Decimal(rate) ** t
        exact = float(1 - power)
    assert float(decay.bias_correction(t)) == pytest.approx(exact, rel=1e-6)
    assert float(correction(decay, t)) == pytest.approx(exact, rel=1e-6)
    # The exponent t log(rate) is rounded to float32, and its size multiplies that rounding.
    size = max(1.0, -t * math.log(rate)) if rate else 1.0
    assert float(decay.power(t)) == pytest.approx(float(power), rel=3e-7 * size, abs=1e-37)


def test_decay_is_accepted_as_it_is():
    beta = Decay(0.999, 1e-3)
    assert rules.Adam(betas=(0.9, beta)).betas[1] is beta
    assert np.allclose(Decay.of(np.array([0.9, 0.99])).complement, [0.1, 0.01])
