"""What users of the Pyro-style optimizers do besides: Ctrl-C, copies, functions of every kind, numbers as gradients."""

import copy
import functools
import gc
import pickle
import signal
import weakref
from types import MappingProxyType

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import Trace_ELBO

import jaxoptim
from jaxoptim import optim as torch_style
from jaxoptim import rules
from jaxoptim.core.interrupts import Uninterrupted
from jaxoptim.engine import programs as steps
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim
from jaxoptim.pyro.infer import SVI
from jaxoptim.pyro.optim.multi import MixedMultiOptimizer, Newton, as_multi_optimizer


@pytest.fixture
def ctrl_c():
    """Python's own handler, which a process in the background may not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_what_a_step_returns(monkeypatch, ctrl_c):
    """The arrays that a step was given are gone when it runs; what it returns must be kept whatever comes."""
    params = {name: Parameter(jnp.ones(3), name) for name in "ab"}
    optimizer = optim.Adam({"lr": 0.1})
    for param in params.values():
        param.grad = jnp.ones(3)
    advance = steps.advance

    def interrupted(*args):
        contents = advance(*args)
        signal.raise_signal(signal.SIGINT)
        return contents

    monkeypatch.setattr(steps, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer(list(params.values()))
    monkeypatch.undo()
    optimizer(list(params.values()))
    assert [round(float(param.value[0]), 3) for param in params.values()] == [0.8, 0.8]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait(ctrl_c):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        twice_interrupted(seen)
    assert seen == ["first"]


def twice_interrupted(seen):
    with Uninterrupted():
        signal.raise_signal(signal.SIGINT)
        seen.append("first")
        signal.raise_signal(signal.SIGINT)
        seen.append("second")


def test_options_are_asked_for_again_after_they_have_failed():
    options = {"lr": -1.0}
    optimizer = optim.SGD(lambda name: options)
    with pytest.raises(ValueError, match="'a'"):
        optimizer.update({"a": jnp.ones(2)}, {"a": jnp.ones(2)})
    options = {"lr": 0.5}
    assert optimizer.update({"a": jnp.ones(2)}, {"a": jnp.ones(2)})["a"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "function",
    [
        lambda name, **unused: {"lr": 0.5},
        functools.partial(lambda name, lr: {"lr": lr}, lr=0.5),
        lambda *names: {"lr": 0.5 / len(names)},
        lambda name: MappingProxyType({"lr": 0.5}),
    ],
    ids=["keywords", "partial", "star", "mapping"],
)
def test_options_from_a_function_of_one_name(function):
    values = optim.SGD(function).update({"a": jnp.ones(2)}, {"a": jnp.ones(2)})
    assert values["a"].tolist() == [0.5, 0.5]


def test_a_rate_that_is_a_schedule_decays_too():
    schedule = jaxoptim.schedules.step_lr(0.1, 1, 0.5)
    values, tx = {"a": jnp.array(1.0)}, jaxoptim.clipped_adam(lr=schedule, lrd=0.9)
    optimizer, pure, state = optim.ClippedAdam({"lr": schedule, "lrd": 0.9}), dict(values), tx.init(values)
    for _ in range(3):
        values = optimizer.update(values, {"a": jnp.array(1.0)})
        updates, state = tx.update({"a": jnp.array(1.0)}, state, pure)
        pure = optax.apply_updates(pure, updates)
    assert float(values["a"]) == pytest.approx(float(pure["a"]), rel=1e-6)


def test_weak_gradients_and_numbers_need_no_programs_of_their_own():
    optimizer = optim.SGD({"lr": 0.5})
    values = {name: jnp.ones(()) for name in "abc"}
    values = optimizer.update(values, dict.fromkeys("abc", jnp.ones(())))
    values = optimizer.update(values, {"a": jnp.ones(()), "b": None, "c": None})
    programs = steps.advance._cache_size()
    for grads in ({"a": 1.0, "b": None, "c": jnp.array(1.0)}, {"a": None, "b": 1.0, "c": None}):
        values = optimizer.update(values, grads)
    assert steps.advance._cache_size() == programs


def test_states_with_options_in_another_order():
    state = {}
    for name, (lr, weight_decay) in {"a": (0.1, 0.5), "b": (0.5, 0.1)}.items():
        made = optim.SGD({"lr": lr, "weight_decay": weight_decay})
        made.update({name: jnp.ones(())}, {name: jnp.ones(())})
        state |= made.get_state()
    group = state["b"]["param_groups"][0]
    swapped = {"lr": "weight_decay", "weight_decay": "lr"}
    state["b"]["param_groups"] = [{swapped.get(key, key): group[swapped.get(key, key)] for key in group}]
    optimizer, one = optim.SGD({}), {"a": jnp.ones(()), "b": jnp.ones(())}
    optimizer.set_state(state)
    assert float(optimizer.update(one, one)["b"]) == pytest.approx(0.45)


def test_a_state_of_a_schedule_in_an_optimizer_without():
    scheduler = optim.ExponentialLR({"optimizer": torch_style.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5})
    values = scheduler.update({"a": jnp.ones(())}, {"a": jnp.ones(())})
    optimizer = optim.SGD({})
    optimizer.set_state(scheduler.get_state())
    with pytest.raises(ValueError, match="'a' is of a PyroLRScheduler"):
        optimizer.update(values, {"a": jnp.ones(())})


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copied_schedule_moves_on_before_its_parameters_come(way):
    scheduler = optim.ExponentialLR({"optimizer": torch_style.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5})
    values = scheduler.update({"a": jnp.ones(())}, {"a": jnp.ones(())})
    twin = way(scheduler)
    for of in (scheduler, twin):
        of.step()
        of.step()
    assert scheduler.update(values, {"a": jnp.ones(())})["a"] == twin.update(values, {"a": jnp.ones(())})["a"] == -0.25


def parabola(values):
    return sum(jnp.sum((value - 1) ** 2) for value in values.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda: rules.Adam(lr=0.1),
        lambda: optax.adam(0.1),
        lambda: Newton({"x": 0.1}),
        lambda: optim.Adam({"lr": 0.1}),
        lambda: MixedMultiOptimizer([(["x"], rules.Adam(lr=0.1))]),
    ],
    ids=["rule", "optax", "newton", "pyro", "mixed"],
)
def test_a_copy_of_optimizer_and_parameters_goes_on_by_itself(make):
    optimizer, params = as_multi_optimizer(make()), {"x": Parameter([3.0, 4.0], "x")}
    optimizer.step(parabola, params)
    other, others = copy.deepcopy((optimizer, params))
    for _ in range(3):
        optimizer.step(parabola, params)
        other.step(parabola, others)
    assert params["x"].value.tolist() == others["x"].value.tolist() != [3.0, 4.0]


def model(data):
    numpyro.sample("data", dist.Normal(numpyro.param("loc", 0.0), 1.0), obs=data)


@pytest.mark.slow
def test_data_of_a_step_is_not_kept():
    svi, data = SVI(model, lambda data: None, rules.SGD(lr=0.1), Trace_ELBO()), jnp.ones(3)
    svi.step(data)
    alive = weakref.ref(data)
    del data
    gc.collect()
    assert alive() is None
