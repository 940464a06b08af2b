"""Errors are one line that says what was given, what is allowed, and what to do."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx

import jaxoptim
from jaxoptim import optim, rules

PARAMS = {"encoder": {"weight": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
ADAM = jaxoptim.adam(lr=0.1)
STATE = ADAM.init(PARAMS)


def message(kind, run):
    """The one line of an error."""
    with pytest.raises(kind) as error:
        run()
    text = str(error.value.args[0])
    assert "\n" not in text
    assert len(text) <= 300
    return text


class TestRules:
    def test_a_class_for_a_rule(self):
        for run in (
            lambda: jaxoptim.init(rules.Adam, PARAMS),
            lambda: jaxoptim.step(rules.Adam, PARAMS, PARAMS, STATE),
            lambda: jaxoptim.update(rules.Adam, PARAMS, STATE, PARAMS),
            lambda: jaxoptim.transformation(rules.Adam),
        ):
            assert message(TypeError, run) == "A rule is expected, but got the class Adam. Give an instance: Adam(...)."

    @pytest.mark.parametrize(
        "given", [optim.Adam(PARAMS), optim.Adam, torch.optim.Adam, 0.1], ids=["ours", "class", "torch", "rate"]
    )
    def test_an_optimizer_for_a_rule(self, given):
        for run in (lambda: jaxoptim.init(given, PARAMS), lambda: jaxoptim.transformation(given)):
            assert re.match(r"A rule is expected, .* but got .*\. An optimizer of jaxoptim", message(TypeError, run))

    def test_a_transformation_for_a_rule(self):
        for tx in (ADAM, optax.adam(0.1)):
            assert "but got a transformation. Call its own init and update" in message(
                TypeError, lambda tx=tx: jaxoptim.init(tx, PARAMS)
            )

    @pytest.mark.parametrize("given", [optax.sgd(0.1), torch.optim.Adam, rules.Adam()], ids=["optax", "torch", "rule"])
    def test_what_is_no_rule_of_a_class(self, given):
        text = message(TypeError, lambda: type("Mine", (optim.Optimizer,), {"rule": given}))
        assert text.startswith("Mine.rule is the class of a rule, such as jaxoptim.rules.Adam, but got ")


SGD_STATE = jaxoptim.sgd(lr=0.1, momentum=0.9).init(PARAMS)
STATES = {
    "a dict": (ADAM, STATE._asdict(), TypeError, r"got a dict\. .*OptState\(\*\*fields\)"),
    "a list": (ADAM, list(STATE), TypeError, "got a list"),
    "None": (ADAM, None, TypeError, "got None"),
    "optax": (ADAM, optax.adam(0.1).init(PARAMS), TypeError, "state of Adam must be the OptState .* got a tuple"),
    "another rule": (ADAM, SGD_STATE, ValueError, "lacks the slot 'exp_avg'"),
    "amsgrad on": (jaxoptim.adam(lr=0.1, amsgrad=True), STATE, ValueError, "lacks the slot 'max_exp_avg_sq'"),
    "amsgrad off": (
        ADAM,
        jaxoptim.adam(lr=0.1, amsgrad=True).init(PARAMS),
        ValueError,
        "has the slot 'max_exp_avg_sq', which this one has not",
    ),
    "momentum on": (
        jaxoptim.sgd(lr=0.1, momentum=0.9),
        jaxoptim.sgd(lr=0.1).init(PARAMS),
        ValueError,
        "lacks the slot 'momentum_buffer'",
    ),
}


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_states_that_are_not_the_rules(case, wrap):
    tx, state, kind, words = STATES[case]
    text = message(kind, lambda: wrap(tx.update)(PARAMS, state, PARAMS))
    assert re.search(words, text), text


class TestGradients:
    @pytest.mark.parametrize(
        ("grads", "words"),
        [
            ([jnp.ones(3), jnp.ones((2, 3))], "grads is a list of 2, params is a dict of 1"),
            (jnp.float32(1.0), "grads is a scalar, params is a dict of 1"),
            (jnp.ones(3), "grads is an array of shape (3,), params is a dict of 1"),
            ((PARAMS, jnp.float32(1.0)), "grads is a tuple of 2, params is a dict of 1; jax.value_and_grad gives"),
            ((jnp.float32(1.0), PARAMS), "grads is a tuple of 2, params is a dict of 1; jax.value_and_grad gives"),
        ],
    )
    def test_say_what_was_got(self, grads, words):
        assert words in message(ValueError, lambda: optim.AdamW(PARAMS).step(grads))
        assert words in message(ValueError, lambda: ADAM.update(grads, STATE, PARAMS))

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ("x", "The gradient of 'encoder.bias' is the text 'x', no array"),
            (min, "The gradient of 'encoder.bias' is a builtin_function_or_method, no array"),
            (np.array(["x"]), "of dtype <U1"),
        ],
        ids=["text", "function", "array-of-text"],
    )
    @pytest.mark.parametrize("way", ["step", "sampler", "update"])
    def test_leaves_that_are_no_arrays(self, way, wrong, words):
        grads = {"encoder": {"weight": jnp.ones((2, 3)), "bias": wrong}}
        make = {
            "step": lambda: optim.AdamW(PARAMS).step,
            "sampler": lambda: optim.SGLD(PARAMS, nbeta=2.0).step,
            "update": lambda: lambda grads: ADAM.update(grads, STATE, PARAMS),
        }[way]
        step = make()
        assert words in message(TypeError, lambda: step(grads))

    def test_only_the_first_difference_of_a_large_tree(self):
        params = {f"layer_{i}": [jnp.ones(1), {"w": jnp.ones(1)}] for i in range(500)}
        grads = params | {"layer_250": (jnp.ones(1), {"w": jnp.ones(1)})}
        text = message(
            ValueError, lambda: jaxoptim.sgd(lr=0.1).update(grads, jaxoptim.sgd(lr=0.1).init(params), params)
        )
        assert "grads has the containers wrong: a tuple of 2 at 'layer_250', where params has a list of 2" in text

    def test_a_state_of_another_structure(self):
        opt = optim.Adam({f"layer_{i}": np.ones(1) for i in range(100)})
        _, params, state = opt.to_functional()
        text = message(ValueError, lambda: opt.from_functional(params, state._replace(slots={})))
        assert "it has a dict of 0 at 'slots', where that one has a dict of 2" in text


class TestNumbersInHalfPrecision:
    @pytest.mark.costly
    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    @pytest.mark.parametrize(
        "name",
        [
            *("adam", "rmsprop"),
            *(
                pytest.param(x, marks=pytest.mark.slow)
                for x in ("adamw", "nadam", "radam", "adagrad", "adadelta", "adamax")
            ),
        ],
    )
    def test_injected_defaults_are_restored(self, name, dtype):
        params, grads = {"w": jnp.ones(3, dtype)}, {"w": jnp.array([0.0, 0.5, 0.25], dtype)}
        factory = getattr(jaxoptim, name)
        for wrap in (lambda f: f, jax.jit):
            plain, injected = factory(lr=0.0078125), optax.inject_hyperparams(factory)(lr=0.0078125)
            one, _ = wrap(plain.update)(grads, plain.init(params), params)
            other, _ = wrap(injected.update)(grads, injected.init(params), params)
            np.testing.assert_allclose(one["w"].astype(float), other["w"].astype(float), rtol=1e-2)

    def test_what_cannot_be_restored_is_refused(self):
        params = {"w": jnp.ones(1, jnp.bfloat16)}
        text = message(ValueError, lambda: optax.inject_hyperparams(jaxoptim.rmsprop)(alpha=0.999).init(params))
        assert "The alpha of RMSprop is bfloat16" in text
        assert "hyperparam_dtype=jnp.float32" in text
        params = {"w": jnp.ones(1, jnp.float16)}
        text = message(ValueError, lambda: optax.inject_hyperparams(jaxoptim.adadelta)(lr=0.1, eps=1e-9).init(params))
        assert "The eps of Adadelta is float16" in text

    def test_a_rate_may_be_zero(self):
        params = {"w": jnp.ones(1, jnp.float16)}
        tx = optax.inject_hyperparams(jaxoptim.adam)(lr=optax.linear_schedule(0.0, 0.1, 4))
        updates, _ = tx.update(params, tx.init(params), params)
        assert float(updates["w"][0]) == 0


@pytest.mark.parametrize(
    "start",
    [
        ADAM.init,
        jaxoptim.lbfgs().init,
        jaxoptim.newton().init,
        jaxoptim.pack,
        lambda params: jaxoptim.init(rules.SGD(), params),
    ],
    ids=["transformation", "lbfgs", "newton", "pack", "rule"],
)
@pytest.mark.parametrize(
    ("model", "name"),
    [
        (eqx.nn.MLP(2, 1, 2, 1, key=jax.random.key(0)), "activation"),
        (linen.Dense(3), "params"),
        ({"w": jnp.ones(2), "name": "text"}, "name"),
    ],
    ids=["equinox", "linen", "text"],
)
def test_modules_in_the_pure_face_say_how_to_take_them_apart(start, model, name):
    text = message(TypeError, lambda: start(model))
    assert text.startswith(f"The parameter '{name}' is ")
    assert "eqx.partition(" in text
    assert "nnx.split(" in text


def test_counts_of_a_module_in_the_pure_face():
    text = message(TypeError, lambda: ADAM.init(nnx.Dropout(0.5, rngs=nnx.Rngs(0))))
    assert "dtype uint32" in text
    assert "nnx.split" in text


@pytest.mark.parametrize(
    "run",
    [
        lambda: optim.AdamW(PARAMS, lr=PARAMS),
        lambda: rules.Adam(lr=np.full((40, 2), "x")),
        lambda: rules.Adam(betas=np.ones((9, 9))),
        lambda: rules.Muon(ns_steps=np.ones((9, 9))),
        lambda: optim.AdamW(PARAMS, groups=[(jnp.ones((9, 9)), {})]),
        lambda: optim.AdamW(PARAMS, groups=[jnp.ones((9, 9))]),
        lambda: optim.AdamW(PARAMS, gradient_transform=nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        lambda: optim.AdamW(PARAMS, master_weights=jnp.ones((9, 9))),
        lambda: optim.AdamW(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), wrt=jnp.ones((9, 9))),
        lambda: optim.SGD(PARAMS).load_state_dict(optim.SGD(PARAMS).state_dict(), keep="lr"),
    ],
    ids=["lr", "number", "betas", "switch", "selector", "item", "transform", "precision", "wrt", "keep"],
)
def test_what_was_given_is_shown_on_one_line(run):
    message((TypeError, ValueError), run)
