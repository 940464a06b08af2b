"""Hyperparameters that are trees like the parameters: each array is updated by its own numbers."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO

import jaxoptim
from comparisons import assert_same
from jaxoptim import optim, rules, schedules
from jaxoptim.core import Numeric, is_known
from table import ROWS

PARAMS = {"a": {"w": jnp.arange(6.0).reshape(3, 2) - 2, "b": jnp.ones((2, 2))}, "c": jnp.full((2, 3), 0.5), "n": None}


def loss(params):
    return sum(jnp.sum((x - 3.0) ** 2) for x in jax.tree.leaves(params))


@functools.partial(jax.jit, static_argnames="steps")
def train(rule, params=PARAMS, steps=4):
    state = jaxoptim.init(rule, params)
    for _ in range(steps):
        params, state = jaxoptim.step(rule, params, jax.grad(loss)(params), state)
    return params, state


def one_by_one(rules_, params=PARAMS, steps=4):
    """Each array by a rule of its own."""
    done = [train(rule, leaf, steps)[0] for rule, leaf in zip(rules_, jax.tree.leaves(params), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), done)


RULES = [row.rule for row in ROWS if issubclass(row.rule, jaxoptim.Rule) and row.rule.sparse != "required"]


def three_values(cls, name):
    """Three numbers that a rule admits, the first its default."""
    default = getattr(cls(), name)
    default = 0.0 if default is None else float(getattr(default, "rate", default))
    others = [x for x in (0.9 * default, 1.1 * default, 1.5 * default, 0.01) if cls.specs[name].admits(x)]
    return [default, *others, default, default][:3]


@pytest.mark.slow
@pytest.mark.parametrize("cls", RULES, ids=lambda cls: cls.__name__)
def test_every_number_of_every_rule_may_be_a_tree(cls):
    names = [name for name, spec in cls.specs.items() if isinstance(spec, Numeric)]
    values = {name: three_values(cls, name) for name in names if name not in cls.of_tree}
    trees = {name: {"a": {"b": x, "w": y}, "c": z, "n": None} for name, (x, y, z) in values.items()}
    params, _ = train(cls(**trees), steps=2)
    expected = one_by_one([cls(**{name: of[at] for name, of in values.items()}) for at in range(3)], steps=2)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


@pytest.mark.slow
def test_prefixes_and_tuples():
    prefix = {"a": 0.0, "c": 0.1, "n": 0.2}
    params, _ = train(rules.AdamW(weight_decay=prefix, betas=({"a": 0.9, "c": 0.5, "n": 0.5}, 0.999), lr=0.1))
    plain, other = rules.AdamW(lr=0.1, weight_decay=0), rules.AdamW(lr=0.1, weight_decay=0.1, betas=(0.5, 0.999))
    chex.assert_trees_all_close(params, one_by_one([plain, plain, other]), rtol=1e-6)
    pair = (jnp.ones(2), [jnp.ones(3), jnp.ones(1)])
    lr = (0.5, [0.25, 0.125])
    new, _ = jaxoptim.step(rules.SGD(lr=lr), pair, pair, jaxoptim.init(rules.SGD(lr=lr), pair))
    assert [float(x[0]) for x in jax.tree.leaves(new)] == [0.5, 0.75, 0.875]


def test_a_term_that_some_have_gives_those_a_slot():
    rule = rules.SGD(lr=0.1, momentum={"a": {"b": 0.0, "w": 0.9}, "c": 0.0, "n": 0.0})
    params, state = train(rule)
    assert state.slots["momentum_buffer"]["a"]["w"].shape == (3, 2)
    assert state.slots["momentum_buffer"]["a"]["b"] is None is state.slots["momentum_buffer"]["c"]
    off, on = rules.SGD(lr=0.1), rules.SGD(lr=0.1, momentum=0.9)
    assert_same(params, one_by_one([off, on, off]))


@pytest.mark.slow
def test_schedules_in_trees():
    schedule = schedules.step_lr(0.5, 2)
    lr = {"a": schedule, "c": lambda step: 0.1 / (1 + step), "n": 0.1}
    expected = one_by_one([rules.SGD(lr=schedule)] * 2 + [rules.SGD(lr=lr["c"])])
    assert_same(train(rules.SGD(lr=lr))[0], expected)


@pytest.mark.slow
def test_transformations_take_trees():
    tx = jaxoptim.adamw(lr=0.1, weight_decay={"a": 0.1, "c": 0.0, "n": 0.0})
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(4):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    rule = rules.AdamW(lr=0.1, weight_decay={"a": 0.1, "c": 0.0, "n": 0.0})
    chex.assert_trees_all_close(params, train(rule)[0], rtol=1e-6)
    masked = optax.masked(jaxoptim.sgd(lr={"a": 0.5, "c": 0.0, "n": 0.0}), {"a": True, "c": False, "n": False})
    updates, _ = masked.update(PARAMS, masked.init(PARAMS), PARAMS)
    assert_same(updates["a"], jax.tree.map(lambda x: -0.5 * x, PARAMS["a"]))
    tree_map = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, tx.init(PARAMS))
    assert float(tree_map.slots["exp_avg"]["c"][0, 0]) == 1


@pytest.mark.slow
def test_numbers_sweep_under_vmap():
    rates = jnp.array([0.1, 0.2])
    swept = jax.vmap(lambda x: rules.AdamW(lr={"a": x, "c": 0.5, "n": 0.5}, weight_decay={"a": 0.1, "c": x, "n": 0.0}))
    params = jax.vmap(lambda rule: train(rule)[0])(swept(rates))
    for i, x in enumerate([0.1, 0.2]):
        rule = rules.AdamW(lr={"a": x, "c": 0.5, "n": 0.5}, weight_decay={"a": 0.1, "c": x, "n": 0.0})
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=i: leaf[i], params), train(rule)[0], rtol=1e-5)


@pytest.mark.slow
def test_hypergradients_by_leaf():
    def after(rule):
        return loss(train(rule)[0])

    lr = {"a": {"b": 0.01, "w": 0.02}, "c": 0.03, "n": 0.0}
    gradient = jax.grad(after)(rules.SGD(lr=lr, momentum=0.5))
    with jax.enable_x64(True):
        for path in (("a", "b"), ("a", "w"), ("c",)):
            sides = []
            for sign in (1, -1):
                moved = jax.tree.map(lambda x: x, lr)
                inner = moved if len(path) == 1 else moved["a"]
                inner[path[-1]] += sign * 1e-4
                wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), PARAMS)
                sides.append(float(loss(train(rules.SGD(lr=moved, momentum=0.5), wide)[0])))
            found = gradient.lr["a"][path[1]] if len(path) == 2 else gradient.lr["c"]
            np.testing.assert_allclose(found, (sides[0] - sides[1]) / 2e-4, rtol=1e-4)
    assert float(gradient.lr["n"]) == 0


@pytest.mark.slow
def test_packed_parameters_are_updated_the_same():
    for rule in (
        rules.AdamW(lr=0.1, weight_decay={"a": 0.1, "c": 0.0, "n": 0.0}),
        rules.SGD(lr={"a": 0.1, "c": 0.2, "n": 0.2}, momentum={"a": 0.9, "c": 0.0, "n": 0.0}),
    ):
        params, state = jaxoptim.pack(PARAMS), jaxoptim.init(rule, jaxoptim.pack(PARAMS))
        for _ in range(4):
            params, state = jaxoptim.step(rule, params, jax.grad(lambda p: loss(p.unpack()))(params), state)
        chex.assert_trees_all_close(params.unpack(), train(rule)[0], rtol=1e-6)


def test_other_numbers_do_not_compile_again():
    compiled = []

    @jax.jit
    def step(rule, params, state):
        compiled.append(rule)
        return jaxoptim.step(rule, params, params, state)

    for x in (0.1, 0.2, np.float32(0.3)):
        rule = rules.AdamW(lr={"a": x, "c": 0.1, "n": 0.1})
        step(rule, PARAMS, jaxoptim.init(rule, PARAMS))
    assert len(compiled) == 1


@pytest.mark.slow
def test_sparse_low_precision_complex_and_missing_gradients():
    params = {"t": jnp.ones((3, 2)), "h": jnp.ones(2, jnp.bfloat16), "z": jnp.ones(2, complex), "s": jnp.ones(1)}
    grads = {
        "t": BCOO((jnp.ones((1, 2)), jnp.array([[1]])), shape=(3, 2)),
        "h": params["h"],
        "z": params["z"],
        "s": None,
    }
    rule = rules.SGD(lr={"t": 0.5, "h": 0.25, "z": 0.125, "s": 1.0}, momentum={"t": 0.0, "h": 0.9, "z": 0.9, "s": 0.0})
    new, state = jaxoptim.step(rule, params, grads, jaxoptim.init(rule, params))
    new, state = jaxoptim.step(rule, new, grads | {"h": None}, state)
    assert new["t"].tolist() == [[1, 1], [0, 0], [1, 1]]
    assert new["h"].tolist() == [0.75, 0.75]
    assert new["h"].dtype == jnp.bfloat16
    np.testing.assert_allclose(new["z"], 1 - 0.125 - 0.125 * 1.9, rtol=1e-6)
    assert new["s"].tolist() == [1.0]


def test_samplers_take_trees():
    rule = rules.SGLD(lr={"a": 1e-2, "c": 0.0, "n": 0.0}, key=jax.random.key(1))
    state = jaxoptim.init(rule, PARAMS)
    params, _ = jaxoptim.step(rule, PARAMS, jax.grad(loss)(PARAMS), state)
    one, _ = jaxoptim.step(rule.replace(lr=1e-2), PARAMS, jax.grad(loss)(PARAMS), state)
    assert_same(params["a"], one["a"])
    assert_same(params["c"], PARAMS["c"])
    with pytest.raises(TypeError, match=r"SGNHT takes a number or a schedule .* for diffusion_factor, one for all"):
        rules.SGNHT(diffusion_factor={"a": 0.1})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rules.AdamW(weight_decay={"w": -1.0}), ValueError, "Invalid weight_decay.w: -1.0. AdamW takes"),
        (lambda: rules.AdamW(weight_decay={"w": True}), TypeError, "Invalid weight_decay.w: True (bool)"),
        (lambda: rules.AdamW(betas=(0.9, [0.9, 2.0])), ValueError, "Invalid betas[1].1: 2.0"),
        (
            lambda: rules.LBFGS(lr={"w": 0.1}),
            TypeError,
            "LBFGS takes a number or a schedule (step -> value) for lr, one",
        ),
        (lambda: jaxoptim.init(rules.SGD(lr={"a": 0.1}), PARAMS), ValueError, "lr has nothing for 'c'"),
        (
            lambda: jaxoptim.init(rules.SGD(lr={"a": 0.1, "c": 0.1, "n": 1, "d": 1}), PARAMS),
            ValueError,
            "has 'd', which",
        ),
        (lambda: jaxoptim.init(rules.SGD(lr={"a": 0.1, "c": None, "n": 1}), PARAMS), ValueError, "None for 'c'"),
        (
            lambda: jaxoptim.init(rules.SGD(nesterov=True, momentum={"a": 0.9, "c": 0, "n": 0.9}), PARAMS),
            ValueError,
            "Nesterov momentum requires a momentum",
        ),
        (lambda: optim.SGD({"w": 1.0}, lr={"w": 0.1}), TypeError, "Invalid lr: {'w': 0.1}. A class takes one number"),
    ],
)
def test_wrong_trees_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_rules_without_trees_are_compiled_as_before():
    """A tree of one number for all gives the program of that number."""
    plain, tree = rules.AdamW(lr=0.1), rules.AdamW(lr={"a": 0.1, "c": 0.1, "n": 0.1})
    state = jaxoptim.init(plain, PARAMS)
    programs = [
        str(jax.make_jaxpr(lambda p, s, rule=rule: jaxoptim.step(rule, p, p, s))(PARAMS, state))
        for rule in (plain, tree)
    ]
    assert programs[0] == programs[1]
    assert is_known(plain.lr)


# A mask, as optax has it.


def vectors_stay(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "mask",
    [{"inner": {"b": False, "w": True}, "v": False}, {"inner": True, "v": False}, vectors_stay],
    ids=["tree", "prefix", "function"],
)
def test_a_mask_is_optaxs(mask):
    params = {"inner": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "v": jnp.ones(2)}
    ours, theirs = jaxoptim.adamw(lr=0.1, weight_decay=0.3, mask=mask), optax.adamw(0.1, weight_decay=0.3, mask=mask)
    mine, state = params, ours.init(params)
    parents, their_state = params, theirs.init(params)
    for _ in range(20):
        updates, state = ours.update(jax.tree.map(jnp.cos, mine), state, mine)
        mine = optax.apply_updates(mine, updates)
        updates, their_state = theirs.update(jax.tree.map(jnp.cos, parents), their_state, parents)
        parents = optax.apply_updates(parents, updates)
    chex.assert_trees_all_close(mine, parents, rtol=1e-12)


def test_what_a_mask_is_not_for():
    with pytest.raises(TypeError, match="mask= is for one weight_decay of all parameters"):
        jaxoptim.adamw(weight_decay={"w": 0.1}, mask={"w": True})
    with pytest.raises(TypeError, match=r"rprop\(\) got an unexpected keyword argument 'mask'"):
        jaxoptim.rprop(mask=True)
    with pytest.raises(ValueError, match="A mask that is a function is called with the parameters"):
        jaxoptim.adamw(mask=vectors_stay).update(jnp.ones(2), jaxoptim.adamw().init(jnp.ones(2)))
    assert "mask: which parameters decay" in jaxoptim.adamw.__doc__
    assert "mask" not in jaxoptim.rprop.__doc__
