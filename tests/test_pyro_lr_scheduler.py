"""The Pyro-style schedulers against live ``pyro.optim``, and against schedulers of torch for each parameter by hand."""

import jax.numpy as jnp
import numpy as np
import pyro
import pyro.optim
import pytest
import torch

from jaxoptim import optim as torch_style
from jaxoptim.optim import Parameter, lr_scheduler
from jaxoptim.pyro import optim
from parity import distance, problem
from pyro_twins import Twins
from schedule_table import CLASS_ONLY, COMPOSITE, LR, SIMPLE, TORCH

pytestmark = pytest.mark.numbers

STEPS = 100
ARRIVAL = 30
NAMES = ("net$$$0.weight", "loc", "late")
OF_TORCH = [row for row in SIMPLE if row.name != "SWALR"]
"""SWALR is no scheduler of ``torch.optim.lr_scheduler``, and Pyro does not wrap it."""
FIRSTS = [next(row for row in OF_TORCH if row.name == name) for name in dict.fromkeys(row.name for row in OF_TORCH)]
ROWS = [pytest.param(row, id=row.id, marks=[] if row in FIRSTS else pytest.mark.slow) for row in OF_TORCH]
LISTS = [row for row in [*COMPOSITE, *CLASS_ONLY] if "SWALR" not in row.id]
LOSSES = [1.0, 0.9, 0.9, 0.95, 0.9, 0.9, 0.9, 0.8, 0.85, 0.9, 0.95, 0.9, 0.9, 0.9, 0.9, 0.2]


def inner(row):
    """Options of the optimizer: with a momentum, which cycles turn."""
    return {"lr": LR, "momentum": 0.9} if row.has_momentum else {"lr": LR}


def both(row, options=None, clip=None):
    """Ours and Pyro's, with dicts of their own because Pyro takes its dict apart."""
    options = inner(row) if options is None else options
    ours = {"optimizer": torch_style.SGD, "optim_args": options, **row.options}
    theirs = {"optimizer": torch.optim.SGD, "optim_args": options, **row.options}
    return getattr(optim, row.name)(ours, clip), getattr(pyro.optim, row.name)(theirs, clip)


def rates(of):
    """The learning rates and momenta in force."""
    groups = [scheduler.optimizer.param_groups[0] for scheduler in of.optim_objs.values()]
    return [(group["lr"], group["momentum"]) for group in groups]


def run(row, twins, steps, losses=None):
    """Steps of the optimizer and of the schedule; one parameter comes late, and has more steps than epochs."""
    start, noise = problem(((3,),) * 3)
    last = min(row.values(steps), steps) - 1
    for t in range(steps):
        for name, value in zip(NAMES, start, strict=True):
            if t == (min(ARRIVAL, steps // 2) if name == "late" else 0):
                twins.add(name, value)
        twins.step({name: noise[i][t] for i, name in enumerate(twins.cells)})
        if t < last and t % 5 != 3:
            arguments = [] if losses is None else [losses[t % len(losses)]]
            twins.ours.step(*arguments)
            twins.theirs.step(*arguments)
        assert rates(twins.ours) == rates(twins.theirs)
    assert twins.distance() < 1e-12
    twins.check_states()


@pytest.mark.costly
@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning", "ignore:To get the last learning rate:UserWarning")
@pytest.mark.parametrize("row", ROWS)
def test_a_run_agrees_with_pyro(row, x64):
    run(row, Twins(*both(row)), STEPS)


def test_the_names_are_those_of_pyro():
    theirs = {name for name in pyro.optim.__all__ if hasattr(torch.optim.lr_scheduler, name)}
    assert {row.name for row in OF_TORCH} <= theirs
    for name in theirs - {"LRScheduler", "_LRScheduler"}:
        wrapper = getattr(optim, name)
        assert wrapper.__name__ == name
        made = wrapper({"optimizer": torch_style.SGD, "optim_args": {}})
        assert isinstance(made, optim.PyroLRScheduler)
        assert made.pt_scheduler_constructor is getattr(lr_scheduler, name)


PLATEAUS = [
    {"factor": 0.5, "patience": 1},
    {"factor": 0.5, "patience": 0, "threshold_mode": "abs", "threshold": 0.05, "cooldown": 2, "min_lr": 0.01},
    {"factor": 0.9, "patience": 2, "mode": "max"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", PLATEAUS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()))
def test_a_plateau_agrees_with_pyro(options, x64):
    ours = {"optimizer": torch_style.Adam, "optim_args": {"lr": LR}, **options}
    theirs = {"optimizer": torch.optim.Adam, "optim_args": {"lr": LR}, **options}
    twins = Twins(optim.ReduceLROnPlateau(ours), pyro.optim.ReduceLROnPlateau(theirs))
    start, noise = problem(((3,),) * 3)
    for t in range(STEPS):
        for name, value in zip(NAMES, start, strict=True):
            if t == (4 if name == "late" else 0):
                twins.add(name, value)
        twins.step({name: noise[i][t] for i, name in enumerate(twins.cells)})
        twins.ours.step(LOSSES[t % len(LOSSES)])
        twins.theirs.step(LOSSES[t % len(LOSSES)])
    assert twins.distance() < 1e-12
    twins.check_states()
    assert len({group["optimizer"]["param_groups"][0]["lr"] for group in twins.ours.get_state().values()}) > 0


def test_momentum_cycles_through_one_program(x64):
    from jaxoptim.engine import programs as steps

    row = next(row for row in SIMPLE if row.name == "OneCycleLR")
    twins = Twins(*both(row))
    twins.add("a", np.ones(3))
    twins.step({"a": np.ones(3)})
    before = steps.advance._cache_size()
    momenta = set()
    for _ in range(20):
        twins.ours.step()
        twins.theirs.step()
        twins.step({"a": np.ones(3)})
        momenta.add(twins.ours.optim_objs["a"].optimizer.param_groups[0]["momentum"])
    assert len(momenta) == 20
    assert steps.advance._cache_size() == before
    assert twins.distance() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Adam", "ClippedAdam", "NAdam"])
def test_other_optimizers_under_a_schedule_agree_with_pyro(name, x64):
    options = {"lr": 0.05, **({"lrd": 0.99} if name == "ClippedAdam" else {})}
    theirs = pyro.optim.clipped_adam.ClippedAdam if name == "ClippedAdam" else getattr(torch.optim, name)
    about = {"optim_args": options, "step_size": 3, "gamma": 0.5}
    twins = Twins(
        optim.StepLR({"optimizer": getattr(torch_style, name), **about}, {"clip_norm": 0.5}),
        pyro.optim.StepLR({"optimizer": theirs, **about}, {"clip_norm": 0.5}),
    )
    start, noise = problem(((3,),))
    twins.add("a", start[0])
    for t in range(30):
        twins.step({"a": noise[0][t]})
        twins.ours.step()
        twins.theirs.step()
    assert twins.distance() < 1e-12
    twins.check_states()


def by_dotted_name(name):
    return {"lr": 0.5 if name == "net.0.weight" else 0.1}


def by_two_names(module, name):
    return {"lr": 0.5 if (module, name) == ("net", "0.weight") else 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("options", [by_dotted_name, by_two_names])
def test_inner_options_by_name(options, x64):
    row = next(row for row in SIMPLE if row.name == "ExponentialLR")
    twins = Twins(*both(row, options, lambda module, name: {"clip_norm": 1.0} if module == "net" else {}))
    run(row, twins, 12)
    assert len({rate for rate, _ in rates(twins.ours)}) == 3


def test_the_dict_of_options_is_not_changed_and_makes_another():
    options = {"optimizer": torch_style.SGD, "optim_args": {"lr": 0.5}, "gamma": 0.5}
    before = dict(options)
    first, second = optim.ExponentialLR(options), optim.ExponentialLR(options)
    assert options == before
    assert first.kwargs == second.kwargs == {"gamma": 0.5}
    for of in (first, second):
        of.update({"a": jnp.ones(3)}, {"a": jnp.ones(3)})
        of.step()
    assert first.get_state()["a"] == second.get_state()["a"]


def test_a_late_parameter_begins_its_schedule_when_it_comes():
    scheduler = optim.ExponentialLR({"optimizer": torch_style.SGD, "optim_args": {"lr": 0.1}, "gamma": 0.5})
    scheduler.step()  # nothing is there yet
    a, b = Parameter(jnp.ones(3), "a"), Parameter(jnp.ones(3), "b")
    a.grad = b.grad = jnp.ones(3)
    scheduler([a])
    scheduler.step()
    scheduler.step()
    scheduler([a, b])
    assert rates(scheduler) == [(0.025, 0), (0.1, 0)]
    scheduler.step()
    assert rates(scheduler) == [(0.0125, 0), (0.05, 0)]
    assert [of.last_epoch for of in scheduler.optim_objs.values()] == [3, 1]


# Schedulers made of schedulers, which Pyro cannot make: against torch's, one for each parameter.


def functions(row):
    """The parts of a row as functions of the optimizer."""
    return [lambda optimizer, part=part: part.scheduler(lr_scheduler, optimizer) for part in row.options["schedulers"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning", "ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("row", LISTS, ids=lambda row: row.id)
def test_lists_of_schedulers_agree_with_torch_by_hand(row, x64):
    momentum = {"momentum": 0.9} if "Cycl" in row.id or "OneCycle" in row.id else {}
    rest = {name: value for name, value in row.options.items() if name != "schedulers"}
    about = {"optimizer": torch_style.SGD, "optim_args": {"lr": LR, **momentum}, "schedulers": functions(row), **rest}
    ours = getattr(optim, row.name)(about)
    start, noise = problem(((3,), (3,)))
    cells, tensors, hands = [], [], []
    for t in range(STEPS):
        if t in (0, ARRIVAL):
            i = len(cells)
            cells.append(Parameter(jnp.asarray(start[i]), "ab"[i]))
            tensors.append(torch.tensor(start[i], requires_grad=True))
            optimizer = torch.optim.SGD([tensors[i]], lr=LR, **momentum)
            hands.append((optimizer, row.scheduler(TORCH, optimizer)))
        for i, (cell, tensor) in enumerate(zip(cells, tensors, strict=True)):
            cell.grad, tensor.grad = jnp.asarray(noise[i][t]), torch.tensor(noise[i][t])
        ours(cells)
        for optimizer, _ in hands:
            optimizer.step()
        theirs = [(of.param_groups[0]["lr"], of.param_groups[0]["momentum"]) for of, _ in hands]
        np.testing.assert_allclose(rates(ours), theirs, rtol=1e-14)
        if t % 5 != 3 and t < 45:  # cycles of 50 steps end there
            ours.step()
            for _, scheduler in hands:
                scheduler.step()
    assert distance([np.asarray(cell.value) for cell in cells], [tensor.detach().numpy() for tensor in tensors]) < 1e-12


def test_a_list_of_schedulers_can_be_saved_in_mid_run():
    row = next(row for row in LISTS if row.name == "ChainedScheduler")
    rest = {"optimizer": torch_style.SGD, "optim_args": {"lr": LR}, "schedulers": functions(row)}
    make = lambda: optim.ChainedScheduler(dict(rest))  # noqa: E731
    whole, first = make(), make()
    values = {"a": jnp.ones(3)}
    for of in (whole, first):
        of.update(values, values)
        of.step()
    second = make()
    second.set_state(first.get_state())
    for _ in range(3):
        assert np.array_equal(whole.update(values, values)["a"], second.update(values, values)["a"])
        whole.step()
        second.step()
        assert rates(whole) == rates(second)


# State.


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning", "ignore:To get the last learning rate:UserWarning")
@pytest.mark.parametrize("row", FIRSTS, ids=lambda row: row.name)
def test_a_state_in_mid_run_goes_on_in_new_objects(row, x64):
    (start,), (noise,) = problem(((3,),))
    whole, half = both(row)[0], both(row)[0]
    values = [{"a": jnp.asarray(start)}] * 2
    for t in range(12):
        if t == 5:
            state, half = half.get_state(), both(row)[0]
            half.set_state(state)
        values = [
            of.update(value, {"a": jnp.asarray(noise[t])}) for of, value in zip((whole, half), values, strict=True)
        ]
        whole.step()
        half.step()
        assert np.array_equal(values[0]["a"], values[1]["a"])
        assert rates(whole) == rates(half)


def test_a_state_of_known_names_takes_effect_at_once():
    make = lambda: optim.StepLR({"optimizer": torch_style.SGD, "optim_args": {"lr": LR}, "step_size": 2})  # noqa: E731
    old, new = make(), make()
    values = {"a": jnp.ones(3)}
    for of in (old, new):
        of.update(values, values)
    old.step()
    old.step()
    new.set_state(old.get_state())
    assert rates(new) == rates(old) == [(LR * 0.1, 0)]
    assert new.optim_objs["a"].last_epoch == 2


def test_is_scheduler():
    scheduler = optim.StepLR({"optimizer": torch_style.SGD, "optim_args": {"lr": LR}, "step_size": 2})
    assert optim.is_scheduler(scheduler)
    assert scheduler.optimizer is torch_style.SGD
    scheduler.update({"a": jnp.ones(3)}, {"a": jnp.ones(3)})
    assert optim.is_scheduler(scheduler.optim_objs["a"])
    assert isinstance(scheduler.optim_objs["a"], lr_scheduler.StepLR)
    plain = optim.SGD({})
    plain.update({"a": jnp.ones(3)}, {"a": jnp.ones(3)})
    assert not optim.is_scheduler(plain)
    assert not optim.is_scheduler(plain.optim_objs["a"])
    assert not optim.is_scheduler(object())


def test_an_assigned_rate_is_used_until_the_next_epoch():
    scheduler = optim.ExponentialLR({"optimizer": torch_style.SGD, "optim_args": {"lr": 0.5}, "gamma": 0.5})
    values = scheduler.update({"a": jnp.ones(1)}, {"a": jnp.ones(1)})
    scheduler.optim_objs["a"].optimizer.param_groups[0]["lr"] = 0.25
    assert scheduler.update(values, {"a": jnp.ones(1)})["a"] == 0.25
    scheduler.step()
    assert rates(scheduler) == [(0.125, 0)]


ERRORS = [
    (lambda: optim.StepLR(lambda name: {}), TypeError, "dict with 'optimizer'"),
    (lambda: optim.StepLR({"optim_args": {}}), KeyError, "no 'optimizer'"),
    (lambda: optim.StepLR({"optimizer": torch_style.SGD}), KeyError, "no 'optim_args'"),
    (lambda: optim.StepLR({"optimizer": torch_style.SGD, "optim_args": 3}), TypeError, "optim_args must be"),
]


@pytest.mark.parametrize(("make", "error", "message"), ERRORS, ids=["function", "no-optimizer", "no-args", "number"])
def test_errors_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("options", [{}, {"step_size": 2, "gama": 0.5}], ids=["missing", "unknown"])
def test_options_of_a_scheduler_are_told_with_the_parameter(options):
    scheduler = optim.StepLR({"optimizer": torch_style.SGD, "optim_args": {}, **options})
    with pytest.raises(TypeError, match=r"schedule of 'a'"):
        scheduler.update({"a": jnp.ones(3)}, {"a": jnp.ones(3)})
    assert not scheduler.optim_objs
    assert scheduler.get_state() == {}
