"""States of the Pyro-style optimizers: saved, gone on with here and in live Pyro, refused where they do not fit."""

import copy
import pickle

import jax.numpy as jnp
import numpy as np
import pyro.optim
import pytest
import torch

from jaxoptim import optim as torch_style
from jaxoptim.interop.torch import to_torch
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim
from parity import distance, problem
from pyro_twins import Twins, check_states
from table import FIRST, STATES, slow_unless

NAMES = ("net$$$0.weight", "loc", "scale")
FAST = ("SGD", "Adam", "AdagradRMSProp", "ClippedAdam")
DENSE = slow_unless(
    lambda case: case.row.name in FAST and case.options == case.row.options[0],
    [case for case in STATES if not case.row.sparse],
)


def halved(case):
    """Options by name."""
    key = "eta" if case.row.name == "AdagradRMSProp" else "lr"
    rate = case.options.get(key, 0.01)
    return lambda name: case.options | {key: rate * (0.5 if name == "loc" else 1.0)}


def make(case):
    return getattr(optim, case.row.name)(halved(case))


def make_parent(case):
    options = halved(case)
    return pyro.optim.PyroOptim(case.row.parent, lambda name: case.row.flags | options(name))


def shapes_of(case):
    return (case.row.shapes[0],) * 2 + (case.row.shapes[1],)


def started(case, steps=5):
    """Ours and Pyro's in mid-run, and the gradients to come."""
    start, noise = problem(shapes_of(case))
    twins = Twins(make(case), make_parent(case))
    for name, value in zip(NAMES, start, strict=True):
        twins.add(name, value)
    for t in range(steps):
        twins.step(at(noise, t))
    return twins, noise


def at(noise, t):
    return {name: noise[i][t] for i, name in enumerate(NAMES)}


def bits(values):
    return [np.asarray(value).tobytes() for value in values]


@pytest.mark.costly
@pytest.mark.numbers
@pytest.mark.parametrize("way", ["state", "file", "known"])
@pytest.mark.parametrize("case", DENSE)
def test_a_run_goes_on_bit_for_bit(case, way, x64, tmp_path):
    twins, noise = started(case)
    ours, other = twins.ours, make(case)
    cells = {name: Parameter(cell.value, name) for name, cell in twins.cells.items()}
    if way == "known":
        for cell in cells.values():
            cell.grad = jnp.ones_like(cell.value)
        other(cells.values())
        for name, cell in cells.items():
            cell.value = twins.cells[name].value
    if way == "file":
        ours.save(tmp_path / "state")
        other.load(tmp_path / "state")
    else:
        other.set_state(ours.get_state())
    for t in range(5, 9):
        twins.set_grads(at(noise, t))
        for name, cell in cells.items():
            cell.grad = twins.cells[name].grad
        twins.ours(list(twins.cells.values()))
        other(list(cells.values()))
    assert bits(cell.value for cell in cells.values()) == bits(cell.value for cell in twins.cells.values())


@pytest.mark.costly
@pytest.mark.parametrize("way", ["state", "file"])
@pytest.mark.parametrize("case", DENSE)
def test_a_state_of_pyro_goes_on_here(case, way, x64, tmp_path):
    twins, noise = started(case)
    theirs = twins.theirs
    twins.ours = make(case)
    if way == "file":
        theirs.save(tmp_path / "pyro.pt")
        twins.ours.load(tmp_path / "pyro.pt")
    else:
        twins.ours.set_state(copy.deepcopy(theirs.get_state()))
    for t in range(5, 30):
        twins.step(at(noise, t))
    assert twins.distance() < 1e-12
    twins.check_states()


def gone_on_in_pyro(case, values, state, noise):
    """Values and state after live Pyro went on from here. (torch changes some dtypes when it loads, its own too.)"""
    twins = Twins(make(case), make_parent(case))
    for name, value in values.items():
        twins.add(name, value)
    twins.theirs.set_state(state)
    for t in range(5, 30):
        twins.set_grads(at(noise, t), slope=0.0)
        twins.theirs(list(twins.tensors.values()))
    return [tensor.detach().numpy() for tensor in twins.tensors.values()], twins.theirs.get_state()


@pytest.mark.parametrize("case", DENSE)
def test_a_state_of_ours_goes_on_in_pyro(case, x64):
    twins, noise = started(case)
    values = {name: np.asarray(cell.value) for name, cell in twins.cells.items()}
    theirs = copy.deepcopy(twins.theirs.get_state())
    ours = {name: to_torch(state) for name, state in twins.ours.get_state().items()}
    first, second = (gone_on_in_pyro(case, values, state, noise) for state in (ours, theirs))
    assert distance(first[0], second[0]) < 1e-12
    check_states(first[1], second[1])


def scheduled():
    options = {"optim_args": {"lr": 0.1, "momentum": 0.9}, "step_size": 3, "gamma": 0.5}
    return (
        optim.StepLR({"optimizer": torch_style.SGD, **options}),
        pyro.optim.StepLR({"optimizer": torch.optim.SGD, **options}),
    )


@pytest.mark.parametrize("way", ["file", "state", "to-pyro"])
def test_a_scheduled_run_crosses_over(way, x64, tmp_path):
    start, noise = problem(((3,),) * 3)
    twins = Twins(*scheduled())
    for name, value in zip(NAMES, start, strict=True):
        twins.add(name, value)
    for t in range(14):
        if t == 7:
            ours, theirs = scheduled()
            if way == "file":
                twins.theirs.save(tmp_path / "pyro.pt")
                ours.load(tmp_path / "pyro.pt")
                twins.ours = ours
            elif way == "state":
                ours.set_state(copy.deepcopy(twins.theirs.get_state()))
                twins.ours = ours
            else:
                theirs.set_state({name: to_torch(state) for name, state in twins.ours.get_state().items()})
                twins.theirs = theirs
        twins.step(at(noise, t))
        twins.ours.step()
        twins.theirs.step()
    assert twins.distance() < 1e-12
    twins.check_states()


def test_options_come_from_the_state(x64):
    old, new = optim.Adam({"lr": 0.1}), optim.Adam({"lr": 0.7, "betas": (0.5, 0.5)})
    values = old.update({"a": jnp.ones(3)}, {"a": jnp.ones(3)})
    new.set_state(old.get_state())
    new.update(values, {"a": jnp.ones(3)})
    (group,) = new.get_state()["a"]["param_groups"]
    assert (group["lr"], group["betas"]) == (0.1, (0.9, 0.999))


def test_a_state_waits_for_its_parameter():
    old, new = optim.Adam({"lr": 0.1}), optim.Adam({"lr": 0.1})
    values = old.update({"a": jnp.ones(3), "b": jnp.ones(2)}, {"a": jnp.ones(3), "b": jnp.ones(2)})
    new.set_state(old.get_state())
    assert new.get_state().keys() == {"a", "b"}
    new.update({"a": values["a"]}, {"a": jnp.ones(3)})
    state = new.get_state()
    assert [int(state[name]["state"][0]["step"]) for name in "ab"] == [2, 1]
    third = pickle.loads(pickle.dumps(new))
    third.update({"b": values["b"]}, {"b": jnp.ones(2)})
    assert {name: int(of["state"][0]["step"]) for name, of in third.get_state().items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("passed_on", ["by state", "by pickle", "by file"])
def test_a_schedule_that_waits_goes_on_from_the_steps_it_has_missed(passed_on, tmp_path):
    def made():
        return optim.StepLR({"optimizer": torch_style.SGD, "optim_args": {"lr": 1.0}, "step_size": 2, "gamma": 0.5})

    def loaded(old):
        if passed_on == "by pickle":
            return pickle.loads(pickle.dumps(old))
        new = made()
        if passed_on == "by file":
            old.save(tmp_path / "state")
            new.load(tmp_path / "state")
        else:
            new.set_state(old.get_state())
        return new

    optimizer, values = made(), {"a": jnp.zeros(()), "b": jnp.zeros(())}
    optimizer.update(values, {"a": jnp.ones(()), "b": jnp.ones(())})
    optimizer.step()
    for _ in range(2):  # b is not there, and its schedule moves on nevertheless
        optimizer = loaded(optimizer)
        optimizer.update({"a": values["a"]}, {"a": jnp.ones(())})
        optimizer.step()
    optimizer = loaded(loaded(optimizer))
    new = optimizer.update(values, {"a": jnp.ones(()), "b": jnp.ones(())})
    assert (float(new["a"]), float(new["b"])) == (-0.5, -0.5)
    assert "late" not in optimizer.get_state()["b"]


def test_a_state_is_a_snapshot():
    optimizer = optim.Adam({"lr": 0.1})
    values = optimizer.update({"a": jnp.ones(3)}, {"a": jnp.ones(3)})
    state = optimizer.get_state()
    before = np.array(state["a"]["state"][0]["exp_avg"])
    optimizer.update(values, {"a": jnp.ones(3)})
    optimizer.optim_objs["a"].param_groups[0]["lr"] = 7.0
    assert np.array_equal(state["a"]["state"][0]["exp_avg"], before)
    assert int(state["a"]["state"][0]["step"]) == 1
    assert state["a"]["param_groups"][0]["lr"] == 0.1
    state["a"]["param_groups"][0]["lr"] = 5.0
    assert optimizer.optim_objs["a"].param_groups[0]["lr"] == 7.0


# What does not fit.


def two_known(steps=3):
    optimizer = optim.Adam({"lr": 0.1})
    values = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    for _ in range(steps):
        values = optimizer.update(values, values)
    return optimizer, values


def wrong_class():
    other = optim.SGD({"lr": 0.1, "momentum": 0.9})
    other.update({"b": jnp.ones((2, 2))}, {"b": jnp.ones((2, 2))})
    return other.get_state()["b"]


def wrong_shape():
    other = optim.Adam({"lr": 0.1})
    other.update({"b": jnp.ones(5)}, {"b": jnp.ones(5)})
    return other.get_state()["b"]


def missing_slot():
    state = copy.deepcopy(two_known()[0].get_state()["b"])
    del state["state"][0]["exp_avg"]
    return state


def of_a_schedule():
    other = optim.StepLR({"optimizer": torch_style.Adam, "optim_args": {}, "step_size": 1})
    other.update({"b": jnp.ones((2, 2))}, {"b": jnp.ones((2, 2))})
    return other.get_state()["b"]


WRONG = [wrong_class, wrong_shape, missing_slot, of_a_schedule, dict]


@pytest.mark.costly
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_state_that_does_not_fit_changes_nothing(wrong):
    optimizer, values = two_known()
    good = copy.deepcopy(two_known(1)[0].get_state()["a"])
    before = copy.deepcopy(optimizer.get_state())
    with pytest.raises((ValueError, KeyError, TypeError), match=r"'b'"):
        optimizer.set_state({"a": good, "b": wrong(), "new": good})
    check_equal(optimizer.get_state(), before)
    twin, _ = two_known()
    assert bits(optimizer.update(values, values).values()) == bits(twin.update(values, values).values())


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_waiting_state_that_does_not_fit_is_told_when_its_parameter_comes(wrong):
    optimizer = optim.Adam({"lr": 0.1})
    optimizer.set_state({"b": wrong()})
    values = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    with pytest.raises((ValueError, KeyError, TypeError), match=r"'b'"):
        optimizer.update(values, values)
    assert not optimizer.optim_objs
    assert optimizer.get_state().keys() == {"b"}


def test_a_scheduled_optimizer_refuses_a_plain_state():
    plain, _ = two_known()
    scheduler = optim.StepLR({"optimizer": torch_style.Adam, "optim_args": {}, "step_size": 1})
    values = {"a": jnp.ones(3)}
    scheduler.update(values, values)
    scheduler.step()
    before = copy.deepcopy(scheduler.get_state())
    with pytest.raises(ValueError, match=r"'a' has no 'scheduler'"):
        scheduler.set_state({"a": plain.get_state()["a"]})
    check_equal(scheduler.get_state(), before)


@pytest.mark.parametrize("given", [None, [], {"a": 3}, "file"], ids=str)
def test_what_is_no_state(given):
    optimizer, _ = two_known()
    with pytest.raises(TypeError, match=r"get_state\(\)"):
        optimizer.set_state(given)


class Evil:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"a": {"state": Evil(), "param_groups": []}}, tmp_path / "evil.pt")
    optimizer, _ = two_known()
    before = copy.deepcopy(optimizer.get_state())
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        optimizer.load(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""
    check_equal(optimizer.get_state(), before)


def test_a_file_that_is_missing_or_no_state_is_told(tmp_path):
    optimizer, _ = two_known()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        optimizer.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="text"):
        optimizer.load(tmp_path / "text")


def test_ours_are_the_bits_that_were_saved(tmp_path):
    optimizer, _ = two_known()
    optimizer.save(tmp_path / "ours")
    other = optim.Adam({})
    other.load(str(tmp_path / "ours"), map_location="cpu")
    check_equal(other.get_state(), optimizer.get_state())


def test_a_function_is_pickled_by_its_name():
    optimizer = optim.Adam(lr_by_name, {"clip_norm": 0.5})
    values = {"a": jnp.ones(3)}
    values = optimizer.update(values, values)
    other = pickle.loads(pickle.dumps(optimizer))
    assert other.pt_optim_args is lr_by_name
    assert other.pt_clip_args == {"clip_norm": 0.5}
    assert bits(other.update(values, values).values()) == bits(optimizer.update(values, values).values())


def lr_by_name(name):
    return {"lr": 0.25}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_scheduled_optimizer_is_copied_in_mid_run(way):
    first = scheduled()[0]
    values = {"a": jnp.ones(3)}
    for _ in range(4):
        values = first.update(values, values)
        first.step()
    second = way(first)
    for _ in range(3):
        new = [of.update(values, values) for of in (first, second)]
        assert bits(new[0].values()) == bits(new[1].values())
        first.step()
        second.step()
    check_equal(second.get_state(), first.get_state())


def check_equal(ours, theirs):
    """Equal to the bit."""
    assert type(ours) is type(theirs) or np.ndim(ours)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            check_equal(ours[key], theirs[key])
    elif hasattr(ours, "shape"):
        assert bits([ours]) == bits([theirs])
    else:
        assert ours == theirs


def test_states_that_are_compared_are_those_of_pyro(x64):
    """The comparison that these tests rest on sees a difference."""
    twins, _ = started(FIRST[1])
    theirs = copy.deepcopy(twins.theirs.get_state())
    theirs["loc"]["state"][0]["exp_avg"] += 1e-9
    with pytest.raises(AssertionError, match="exp_avg"):
        check_states(twins.ours.get_state(), theirs)


def test_the_state_of_dct_adam_has_pyros_keys_only():
    ours, theirs = Parameter(jnp.ones(4), "w"), torch.ones(4, requires_grad=True)
    mine, parent = optim.DCTAdam({"lr": 0.1}), pyro.optim.DCTAdam({"lr": 0.1})
    pyro.clear_param_store()
    pyro.get_param_store()["w"] = theirs.detach()
    theirs = pyro.get_param_store()._params["w"]
    ours.grad, theirs.grad = jnp.ones(4), torch.ones(4)
    mine([ours])
    parent([theirs])
    (group,), (other,) = (of.get_state()["w"]["param_groups"] for of in (mine, parent))
    assert group.keys() == other.keys()
    again = optim.DCTAdam({})
    again.set_state(mine.get_state())
    values = again.update({"w": ours.value}, {"w": ours.grad})
    mine([ours])
    np.testing.assert_array_equal(values["w"], ours.value)
