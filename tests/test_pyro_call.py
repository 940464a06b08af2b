"""Calls of the Pyro-style optimizers: what is refused, what stays as it was, and what is held."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pyro
import pytest
import torch

from jaxoptim import optim as torch_style
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim


def ones(name, shape=(3,), grad=True):
    param = Parameter(jnp.ones(shape), name)
    param.grad = jnp.ones(shape) if grad else None
    return param


def state_bits(optimizer):
    return jax.tree.map(lambda x: np.asarray(x).tobytes() if hasattr(x, "shape") else repr(x), optimizer.get_state())


# Errors.


@pytest.mark.parametrize("given", [None, 3, [("lr", 0.1)], "lr"], ids=str)
def test_options_must_be_a_dict_or_a_function(given):
    with pytest.raises(TypeError, match=r"optim_args must be function that returns defaults or a defaults dictionary"):
        optim.Adam(given)
    if given is not None:
        with pytest.raises(TypeError, match=r"clip_args must be function that returns defaults or a defaults dict"):
            optim.Adam({}, given)


@pytest.mark.parametrize("made", [3, None, torch_style.LBFGS], ids=["number", "none", "lbfgs"])
def test_the_constructor_must_be_a_class(made):
    with pytest.raises(TypeError, match="optim_constructor must be a class"):
        optim.PyroOptim(made, {})


FAULTS = {
    "unknown-option": (lambda: optim.Adam({"learning_rate": 0.1}), TypeError, r"'a'.*learning_rate"),
    "option-out-of-range": (lambda: optim.Adam(lambda n: {"lr": -1.0 if n == "b" else 0.1}), ValueError, r"'b'.*-1\.0"),
    "no-dict": (lambda: optim.Adam(lambda n: 0.1 if n == "b" else {}), TypeError, r"optim arg must return.*'b'.*0\.1"),
    "clip-no-dict": (lambda: optim.Adam({}, lambda m, n: 3), TypeError, r"clip arg must return.*3"),
    "unknown-clip": (lambda: optim.Adam({}, {"clip": 1.0}), TypeError, r"clip_args of 'a'.*clip"),
    "negative-clip": (lambda: optim.Adam({}, {"clip_norm": -1.0}), ValueError, r"clip_norm"),
    "clip-of-one-argument": (lambda: optim.Adam({}, lambda name: {}), TypeError, r"argument"),
    "three-arguments": (lambda: optim.Adam(lambda a, b, c: {}), TypeError, r"argument"),
    "no-optimizer": (lambda: optim.PyroOptim(lambda params: 3, {}), TypeError, r"must make an optimizer.*int"),
    "muon-of-a-vector": (lambda: optim.Muon({}), ValueError, r"'b'|'a'"),
    "complex": (lambda: optim.SparseAdam({}), ValueError, r"'a'|'b'"),
}


@pytest.mark.parametrize("fault", [*FAULTS.values()], ids=FAULTS)
def test_a_fault_is_named_and_changes_nothing(fault):
    make, error, message = fault
    optimizer, a, b = make(), ones("a"), ones("b")
    with pytest.raises((error, RuntimeError) if message == r"'a'|'b'" else error, match=message):
        optimizer([a, b])
    assert not np.any(np.asarray(a.value) != 1)
    assert not np.any(np.asarray(b.value) != 1)


@pytest.mark.slow
def test_one_that_fails_leaves_the_others_as_they_were():
    optimizer = optim.Adam(lambda name: {"lr": -1.0} if name == "bad" else {"lr": 0.1})
    a, b, bad = ones("a"), ones("b"), ones("bad")
    optimizer([a])
    before, values = state_bits(optimizer), np.array(a.value)
    for _ in range(2):
        with pytest.raises(ValueError, match="'bad'"):
            optimizer([a, b, bad])
        assert state_bits(optimizer) == before
        assert np.array_equal(a.value, values)
        assert optimizer.optim_objs.keys() == {"a"}
    twin = optim.Adam({"lr": 0.1})
    c, d = ones("a"), ones("b")
    twin([c])
    twin([c, d])
    optimizer([a, b])
    assert np.array_equal(a.value, c.value)
    assert np.array_equal(b.value, d.value)


def test_a_call_that_fails_while_compiling_changes_nothing():
    optimizer = optim.SGD({"lr": 0.1}, {"clip_value": 1.0})
    a, z = ones("a"), Parameter(jnp.ones(2, complex), "z")
    z.grad = jnp.ones(2, complex)
    optimizer([a])
    value = np.array(a.value)
    with pytest.raises(TypeError, match="clip_value"):
        optimizer([a, z])
    assert np.array_equal(a.value, value)
    assert np.array_equal(z.value, np.ones(2))
    optimizer([a])
    assert not np.array_equal(a.value, value)


def stepped():
    optimizer = optim.SGD({"lr": 0.1})
    optimizer([ones("a")])
    return optimizer


def test_names():
    optimizer = optim.SGD({"lr": 0.1})
    a, other = ones("a"), ones("a")
    with pytest.raises(ValueError, match="Two of the parameters are called 'a'"):
        optimizer([a, other])
    with pytest.raises(ValueError, match="twice"):
        optimizer([a, a])
    with pytest.raises(ValueError, match="has no name"):
        optimizer([Parameter(1.0)])
    for of in (optimizer, stepped()):
        with pytest.raises(TypeError, match=r"update\(params, grads\)"):
            of([jnp.ones(3)])
    for no_list in (a, 3, None):
        with pytest.raises(TypeError, match="list of parameters"):
            optimizer(no_list)
    assert not optimizer.optim_objs


@pytest.mark.parametrize("new", [(4,), "float16"], ids=["shape", "dtype"])
def test_a_name_keeps_its_shape_and_dtype(new):
    optimizer, a = optim.Adam({"lr": 0.1}), ones("a")
    optimizer([a])
    before = state_bits(optimizer)
    wrong = Parameter(jnp.ones(new) if isinstance(new, tuple) else jnp.ones(3, new), "a")
    wrong.grad = jnp.ones_like(wrong.value)
    with pytest.raises(ValueError, match=r"parameter 'a' has shape"):
        optimizer([wrong])
    with pytest.raises(ValueError, match=r"parameter 'a' has shape"):
        optimizer.update({"a": wrong.value}, {"a": wrong.grad})
    assert state_bits(optimizer) == before
    optimizer([a])


def test_a_new_parameter_under_a_known_name_begins_afresh():
    optimizer, twin = optim.Adam({"lr": 0.1}), optim.Adam({"lr": 0.1})
    a, b = ones("a"), ones("a")
    for _ in range(3):
        optimizer([a])
    fresh = Parameter(b.value, "a")
    for _ in range(2):
        fresh.grad = b.grad = jnp.arange(3.0) - 1
        optimizer([fresh])
        twin([b])
    assert np.array_equal(fresh.value, b.value)
    assert not np.array_equal(fresh.value, a.value)  # the old one stays where it was
    assert int(optimizer.get_state()["a"]["state"][0]["step"]) == 2
    optimizer([a])  # which goes on, as in Pyro
    assert int(optimizer.get_state()["a"]["state"][0]["step"]) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_folds_are_pyros():
    """A rate that decays, and parameters made anew for each fold, which begins afresh."""
    parent = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.95})
    optimizer = optim.ClippedAdam({"lr": 0.1, "lrd": 0.95})
    for _ in range(3):
        theirs, ours = torch.zeros((), dtype=torch.float64, requires_grad=True), Parameter(0.0, "loc")
        for _ in range(40):
            theirs.grad, ours.grad = theirs.detach() - 5.434, ours.value - 5.434
            pyro.get_param_store()["loc"] = theirs.detach()
            parent([theirs])
            optimizer([ours])
        assert float(ours.value) == pytest.approx(theirs.item(), abs=1e-13)


@pytest.mark.numbers
def test_rates_that_decay_are_pyros_to_the_last_bit():
    """Also after other numbers were written, a step of some of the parameters, and a step that failed."""
    options = {"a": {"lr": 0.1, "lrd": 0.97}, "b": {"lr": 0.3, "lrd": 0.9}, "c": {"lr": 0.2, "lrd": 1.0}}
    optimizer, params = optim.ClippedAdam(lambda name: dict(options[name])), [ones(name) for name in options]
    apart = {name: torch_style.ClippedAdam([ones(name)], **options[name]) for name in options}
    for step in range(24):
        moved = params[:2] if step % 8 == 5 else params
        if step == 10:
            with pytest.raises(ValueError, match="shape"):
                optimizer.advance(params, [jnp.ones(7), *(param.grad for param in params[1:])])
        optimizer(moved)
        for param in moved:
            options[param.name]["lr"] *= options[param.name]["lrd"]
            (group,) = apart[param.name].param_groups
            group["params"][0].grad = param.grad
            apart[param.name].step()
        for name, other in zip(options, apart.values(), strict=True):
            (group,) = optimizer.optim_objs[name].param_groups
            assert group["lr"] == other.param_groups[0]["lr"] == options[name]["lr"]
            if step in (8, 15, 16):  # 8: what it was at first
                group["lr"] = other.param_groups[0]["lr"] = options[name]["lr"] = {"a": 0.1, "b": 0.3, "c": 0.2}[name]
    for param in params:
        np.testing.assert_allclose(param.value, apart[param.name].param_groups[0]["params"][0].value, rtol=1e-6)


def test_state_that_was_loaded_waits_by_name_for_a_new_parameter():
    optimizer, again, a = optim.Adam({"lr": 0.1}), optim.Adam({"lr": 0.1}), ones("a")
    for _ in range(3):
        optimizer([a])
    again.set_state(optimizer.get_state())
    fresh = Parameter(a.value, "a")
    fresh.grad = a.grad
    again([fresh])
    optimizer([a])
    assert np.array_equal(fresh.value, a.value)
    assert int(again.get_state()["a"]["state"][0]["step"]) == 4


def test_a_failing_call_does_not_move_to_its_parameters():
    optimizer, a = optim.SGD({"lr": 1.0}, {"clip_value": 1.0}), ones("a")
    optimizer([a])
    z = Parameter(jnp.ones(2, complex), "z")
    z.grad = jnp.ones(2, complex)
    fresh = Parameter(jnp.full(3, 9.0), "a")
    fresh.grad = jnp.ones(3)
    with pytest.raises(TypeError, match="clip_value"):
        optimizer([fresh, z])
    assert np.array_equal(fresh.value, [9.0, 9.0, 9.0])
    assert np.array_equal(a.value, np.zeros(3))
    assert list(optimizer.optim_objs["a"].param_groups[0]["params"]) == [a]
    assert optimizer.optim_objs.keys() == {"a"}


def test_a_failing_update_leaves_the_values_that_were_given_before():
    optimizer, a = optim.SGD({"lr": 1.0}), ones("a")
    optimizer([a])
    with pytest.raises(ValueError, match="'a'"):
        optimizer.update({"a": jnp.full(3, 9.0)}, {"a": jnp.ones(4)})
    assert np.array_equal(a.value, np.zeros(3))


# What is given, and what is held.


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [list, tuple, set, iter, lambda p: (x for x in p), lambda p: {x.name: x for x in p}.values()],
    ids=["list", "tuple", "set", "iterator", "generator", "dict-view"],
)
def test_any_iterable_of_parameters(kind):
    params, optimizer = [ones("a"), ones("b", (2, 2)), ones("c")], optim.SGD({"lr": 0.5})
    for _ in range(2):
        optimizer(kind(params))
    assert [float(param.value.mean()) for param in params] == [0.0, 0.0, 0.0]


def test_no_parameters_make_no_step():
    optimizer = optim.SGD({})
    optimizer([])
    assert optimizer.update({}, {}) == {}
    assert optimizer.get_state() == {}
    optimizer([ones("a", grad=False)])
    assert optimizer.optim_objs.keys() == {"a"}


def test_gradients_are_left_as_they_are():
    optimizer, a = optim.SGD({"lr": 1.0}, {"clip_norm": 0.1, "clip_value": 0.01}), ones("a")
    given = a.grad
    optimizer([a])
    assert a.grad is given
    assert np.array_equal(given, np.ones(3))


@pytest.mark.slow
def test_values_that_are_held_stay_readable():
    optimizer, a, b = optim.SGD({"lr": 1.0}), ones("a"), ones("b", (40_000,))
    held = []
    for _ in range(4):
        optimizer([a, b])
        held.append((a.value, b.value))
    assert [(float(x[0]), float(y[0])) for x, y in held] == [(-i, -i) for i in range(4)]


@pytest.mark.slow
def test_an_optimizer_leaves_no_garbage(only_new_garbage):
    optimizer, a = optim.SGD({"lr": 1.0}), ones("a")
    optimizer([a])
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert float(a.value[0]) == 0.0


# update(params, grads).


@pytest.mark.slow
def test_update_is_the_call():
    optimizer, twin = optim.Adam({"lr": 0.1}), optim.Adam({"lr": 0.1})
    cells = [ones("a"), ones("b", (2, 2)), ones("c")]
    values = {cell.name: cell.value for cell in cells}
    given, first = dict(values), values
    for t in range(5):
        grads = {name: None if name == "c" and t % 2 else jnp.full_like(x, t - 1.5) for name, x in values.items()}
        for cell in cells:
            cell.grad = grads[cell.name]
        values = optimizer.update(values, grads)
        twin(cells)
    assert first == given
    assert list(values) == ["a", "b", "c"]
    for cell in cells:
        assert np.array_equal(values[cell.name], cell.value)
        assert np.all(np.asarray(given[cell.name]) == 1)
    assert state_bits(optimizer) == state_bits(twin)


def test_update_takes_other_values_under_known_names():
    optimizer = optim.SGD({"lr": 1.0, "momentum": 0.5})
    optimizer.update({"a": jnp.ones(2)}, {"a": jnp.ones(2)})
    elsewhere = optimizer.update({"a": np.full(2, 10.0, np.float32)}, {"a": np.ones(2, np.float32)})
    assert np.array_equal(elsewhere["a"], [8.5, 8.5])
    assert isinstance(elsewhere["a"], jax.Array)


def test_a_numpy_array_may_change_after_the_call():
    optimizer, value, grad = optim.SGD({"lr": 1.0}), np.ones(2, np.float32), np.ones(2, np.float32)
    new = optimizer.update({"a": value}, {"a": grad})
    value[:], grad[:] = 7, 7
    assert np.array_equal(new["a"], [0, 0])


UPDATES = {
    "missing": ({"a": 1}, {}, ValueError, r"nothing for 'a'"),
    "extra": ({"a": 1}, {"a": 1, "b": 1}, ValueError, r"'b', which params lacks"),
    "no-dict": ([1], {"a": 1}, TypeError, r"params is list"),
    "grads-no-dict": ({"a": 1}, [1], TypeError, r"grads is list"),
    "no-name": ({3: 1}, {3: 1}, TypeError, r"key 3"),
    "shape": ({"a": 1}, {"a": (4,)}, ValueError, r"'a'.*\(4,\).*\(3,\)"),
    "one-axis-more": ({"a": 1}, {"a": (1, 3)}, ValueError, r"'a'.*\(1, 3\).*\(3,\)"),
}


@pytest.mark.parametrize("fault", [*UPDATES.values()], ids=UPDATES)
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_update_names_what_is_wrong(fault, known):
    params, grads, error, message = fault

    def array(given):
        return {k: jnp.ones(x if isinstance(x, tuple) else 3) for k, x in given.items()} if given != [1] else given

    optimizer = optim.Adam({"lr": 0.1})
    if known:
        optimizer.update({"a": jnp.ones(3)}, {"a": jnp.ones(3)})
    before = state_bits(optimizer)
    with pytest.raises(error, match=message):
        optimizer.update(array(params), array(grads))
    assert state_bits(optimizer) == before


def test_update_inside_a_compiled_function_is_refused():
    optimizer = optim.SGD({})
    with pytest.raises(TypeError, match=r"jaxoptim\.transformation\(optimizer\)"):
        jax.jit(lambda a: optimizer.update({"a": a}, {"a": a}))(jnp.ones(3))
    assert not optimizer.optim_objs


# optim_objs.


@pytest.mark.slow
def test_options_are_written_through_optim_objs():
    optimizer, a = optim.SGD({"lr": 1.0}), ones("a")
    hand = ones("a")
    twin = torch_style.SGD([hand], lr=1.0)
    for t in range(6):
        optimizer([a])
        twin.step()
        for of in (optimizer.optim_objs["a"], twin):
            (group,) = of.param_groups
            if t == 1:
                group["lr"] = 0.5
            if t == 2:
                group["momentum"] = 0.9
            if t == 4:
                group.update(nesterov=True, lr=0.25)
        assert np.array_equal(a.value, hand.value)
    assert optimizer.optim_objs["a"].state_dict().keys() == twin.state_dict().keys()
    with pytest.raises(TypeError, match="one of many in a PyroOptim"):
        optimizer.optim_objs["a"].step()
    with pytest.raises(TypeError):
        optimizer.optim_objs["b"] = twin


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_a_state_is_written_through_optim_objs(name):
    options = {"lr": 0.1} if name == "Adam" else {"lr": 0.1, "momentum": 0.9}
    optimizer, a, b, hand = getattr(optim, name)(options), ones("a"), ones("b"), ones("a")
    twin = getattr(torch_style, name)([hand], **options)
    slot = "exp_avg" if name == "Adam" else "momentum_buffer"
    for t in range(6):
        optimizer([a, b])
        twin.step()
        for of, param in ((optimizer.optim_objs["a"], a), (twin, hand)):
            if t == 1:
                of.state[param][slot] = jnp.full(3, 5.0)
            if t == 3:
                of.state[param] = {}
        np.testing.assert_allclose(a.value, hand.value, rtol=1e-6, err_msg=str(t))


def test_a_count_that_is_set_back_leaves_the_moments():
    optimizer, a, hand = optim.Adam({"lr": 0.1}), ones("a"), ones("a")
    twin = torch_style.Adam([hand], lr=0.1)
    for t in range(4):
        optimizer([a])
        twin.step()
        for of, param in ((optimizer.optim_objs["a"], a), (twin, hand)):
            if t == 1:
                of.state[param]["step"] = jnp.asarray(0.0, jnp.float32)
        np.testing.assert_allclose(a.value, hand.value, rtol=1e-6, err_msg=str(t))
