"""What schedulers refuse, how they are called, and what is written about them."""

import copy
import functools
import inspect
import re
from typing import Any

import pytest
import torch

from jaxoptim import optim
from jaxoptim.optim import lr_scheduler
from schedule_table import (
    CLASS_ONLY,
    COMPOSITE,
    LINEAR,
    SIMPLE,
    STEP,
    chained,
    sequential,
)
from scheduler_sides import (
    RATES,
    RESUMABLE,
    SIDES,
    Ours,
    Theirs,
    advance,
    built,
    by_row,
    exact,
    optimizer,
    options_of,
    outcome,
    raised,
    same_error,
    seen,
    without_steps,
)

# Errors.


def f(n: Any) -> float:
    return 0.9


def made(kind: str, args: Any, kwargs: Any, side: Any, opt: Any = None) -> Any:
    """A class around an optimizer."""
    return getattr(side.classes, kind)(opt or optimizer(side), *args, **kwargs)


def call(kind: str, *args: Any, **kwargs: Any) -> Any:
    return functools.partial(made, kind, args, kwargs)


def stepped(kind: str, *args: Any, steps: int = 1, **kwargs: Any) -> Any:
    """A class whose step fails."""
    return lambda side: advance(getattr(side.classes, kind)(optimizer(side), *args, **kwargs), steps)


def composed(kind: str, parts: Any, **kwargs: Any) -> Any:
    """A composite of what a function of the classes, an optimizer and another one makes."""

    def run(side: Any) -> Any:
        opt = optimizer(side)
        options = {"optimizer": opt} if kind == "SequentialLR" else {}
        return getattr(side.classes, kind)(schedulers=parts(side.classes, opt, optimizer(side)), **(options | kwargs))

    return run


def with_another_group(plateau: Any, side: Any) -> None:
    plateau.optimizer.add_param_group({"params": [side.param()]})
    for _ in range(2):
        plateau.step(1.0)


ERRORS = {
    **{
        f"{kind} of no optimizer": lambda side, kind=kind, args=args: getattr(side.classes, kind)(5, *args)
        for kind, args in {
            "LambdaLR": (f,),
            "MultiplicativeLR": (f,),
            "StepLR": (3,),
            "MultiStepLR": ([3],),
            "ConstantLR": (),
            "LinearLR": (),
            "ExponentialLR": (0.9,),
            "PolynomialLR": (),
            "CosineAnnealingLR": (3,),
            "CosineAnnealingWarmRestarts": (3,),
            "CyclicLR": (0.1, 0.2),
            "OneCycleLR": (0.1, 10),
            "ReduceLROnPlateau": (),
            "SequentialLR": ([], []),
            "LRScheduler": (),
        }.items()
    },
    "the optimizer of the other library": lambda side: side.classes.StepLR(
        optimizer(Theirs if side is Ours else Ours), 3
    ),
    "too few functions": call("LambdaLR", [f]),
    "too many functions": call("MultiplicativeLR", [f, f, f]),
    "no function": call("MultiplicativeLR", 0.9),
    "no function in a list": call("MultiplicativeLR", [f, "f"]),
    **{
        f"{kind} without initial_lr": call(kind, *args, last_epoch=3)
        for kind, args in {
            "LambdaLR": (f,),
            "StepLR": (3,),
            "CosineAnnealingWarmRestarts": (3,),
            "CyclicLR": (0.1, 0.2),
            "OneCycleLR": (0.1, 10),
        }.items()
    },
    "step_size of zero": stepped("StepLR", 0),
    "T_max of zero": stepped("CosineAnnealingLR", 0),
    "no step_size": call("StepLR"),
    "an unknown keyword": call("StepLR", 3, verbose=True),
    "too many arguments": call("ExponentialLR", 0.9, -1, False),
    "a factor below 0": call("ConstantLR", -0.1),
    "a factor above 1": call("ConstantLR", 1.1),
    "a start of 0": call("LinearLR", 0.0),
    "a start above 1": call("LinearLR", 1.1),
    "an end below 0": call("LinearLR", 0.5, -0.1),
    "an end above 1": call("LinearLR", 0.5, 1.1),
    "T_0 of 0": call("CosineAnnealingWarmRestarts", 0),
    "T_0 of 2.0": call("CosineAnnealingWarmRestarts", 2.0),
    "T_mult of 0": call("CosineAnnealingWarmRestarts", 2, 0),
    "T_mult of 1.5": call("CosineAnnealingWarmRestarts", 2, 1.5),
    "eta_min of a text": call("CosineAnnealingWarmRestarts", 2, 1, "0"),
    "a negative epoch": lambda side: side.classes.CosineAnnealingWarmRestarts(optimizer(side), 2).step(-1),
    "base_lr of another length": call("CyclicLR", [0.1], 0.2),
    "max_lr of another length": call("CyclicLR", 0.1, [0.1, 0.2, 0.3]),
    "an unknown mode": call("CyclicLR", 0.1, 0.2, mode="up"),
    "base_momentum of another length": call("CyclicLR", 0.1, 0.2, base_momentum=[0.1]),
    "max_momentum of another length": call("CyclicLR", 0.1, 0.2, max_momentum=[0.1]),
    "no step up": stepped("CyclicLR", 0.1, 0.2, 0, 3),
    "no momentum to cycle": lambda side: side.classes.CyclicLR(optimizer(side, "Adagrad"), 0.1, 0.2),
    "no momentum for one cycle": lambda side: side.classes.OneCycleLR(optimizer(side, "Adagrad"), 0.1, 10),
    "no length": call("OneCycleLR", 0.1),
    "half a length": call("OneCycleLR", 0.1, epochs=3),
    "total_steps of 0": call("OneCycleLR", 0.1, 0),
    "total_steps of 10.0": call("OneCycleLR", 0.1, 10.0),
    "epochs of 0": call("OneCycleLR", 0.1, epochs=0, steps_per_epoch=3),
    "epochs of 1.5": call("OneCycleLR", 0.1, epochs=1.5, steps_per_epoch=3),
    "steps_per_epoch of 0": call("OneCycleLR", 0.1, epochs=3, steps_per_epoch=0),
    "steps_per_epoch of 1.5": call("OneCycleLR", 0.1, epochs=3, steps_per_epoch=1.5),
    "pct_start of 1": call("OneCycleLR", 0.1, 10, pct_start=1),
    "pct_start of 1.5": call("OneCycleLR", 0.1, 10, pct_start=1.5),
    "pct_start of -0.1": call("OneCycleLR", 0.1, 10, pct_start=-0.1),
    "an unknown strategy": call("OneCycleLR", 0.1, 10, anneal_strategy="exp"),
    "one cycle's max_lr of another length": call("OneCycleLR", [0.1], 10),
    "one cycle's base_momentum of another length": call("OneCycleLR", 0.1, 10, base_momentum=[0.1]),
    "one cycle's max_momentum of another length": call("OneCycleLR", 0.1, 10, max_momentum=[0.1]),
    "one cycle after its end": stepped("OneCycleLR", 0.1, 10, steps=11),
    "a factor of 1": call("ReduceLROnPlateau", factor=1.0),
    "min_lr of another length": call("ReduceLROnPlateau", min_lr=[0.1]),
    "an unknown mode of the plateau": call("ReduceLROnPlateau", "up"),
    "an unknown threshold mode": call("ReduceLROnPlateau", threshold_mode="ratio"),
    "no metric": lambda side: side.classes.ReduceLROnPlateau(optimizer(side)).step(),
    "a metric that is no number": lambda side: side.classes.ReduceLROnPlateau(optimizer(side)).step("low"),
    "another group for a list of min_lr": lambda side: with_another_group(
        side.classes.ReduceLROnPlateau(optimizer(side), patience=0, min_lr=[0.1, 0.2]), side
    ),
    "no schedulers": composed("SequentialLR", lambda c, opt, other: [], milestones=[]),
    "no schedulers to chain": composed("ChainedScheduler", lambda c, opt, other: []),
    "a number among schedulers": composed("SequentialLR", lambda c, opt, other: [c.StepLR(opt, 3), 5], milestones=[3]),
    "a number among chained ones": composed("ChainedScheduler", lambda c, opt, other: [c.StepLR(opt, 3), 5]),
    "a plateau in a sequence": composed(
        "SequentialLR", lambda c, opt, other: [c.StepLR(opt, 3), c.ReduceLROnPlateau(opt)], milestones=[3]
    ),
    "a plateau in a chain": composed("ChainedScheduler", lambda c, opt, other: [c.ReduceLROnPlateau(opt)]),
    "a sequence for two optimizers": composed(
        "SequentialLR", lambda c, opt, other: [c.StepLR(opt, 3), c.StepLR(other, 3)], milestones=[3]
    ),
    "a chain for two optimizers": composed(
        "ChainedScheduler", lambda c, opt, other: [c.StepLR(opt, 3), c.StepLR(other, 3)]
    ),
    "too many milestones": composed("SequentialLR", lambda c, opt, other: [c.StepLR(opt, 3)], milestones=[3]),
    "too few milestones": composed("SequentialLR", lambda c, opt, other: [c.StepLR(opt, 3)] * 3, milestones=[3]),
    "a sequence's step to an epoch": lambda side: built(sequential(STEP, at=[]), side).step(3),
    "a chain's step to an epoch": lambda side: built(chained(STEP), side).step(3),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_torchs(error):
    same_error(ERRORS[error])


@pytest.mark.parametrize("error", [error for error, run in ERRORS.items() if isinstance(run, functools.partial)])
def test_a_scheduler_that_cannot_be_made_leaves_the_groups_as_they_were(error):
    opt = optimizer(Ours)
    before = exact(options_of(opt))
    with pytest.raises((ValueError, TypeError, KeyError, ZeroDivisionError)):
        ERRORS[error](Ours, opt)
    assert exact(options_of(opt)) == before


def test_what_is_no_function_is_named():
    """torch calls it."""
    mine, parents = (raised(side, call("LambdaLR", 0.9)) for side in SIDES)
    assert type(mine) is type(parents) is TypeError
    assert str(mine) == "lr_lambda should be a function, but got float"


@by_row([row for row in [*RESUMABLE, *COMPOSITE, *CLASS_ONLY] if row.name != "SWALR"])
@without_steps
def test_after_add_param_group_a_scheduler_goes_on_or_names_the_numbers_of_groups(row):
    """It goes on where torch does."""
    ours, theirs = (advance(built(row, side), min(2, row.values(3) - 1)) for side in SIDES)
    for side, scheduler in ((Ours, ours), (Theirs, theirs)):
        scheduler.optimizer.add_param_group({"params": [side.param()], "lr": 0.2})
    for _ in range(min(60, row.values(63) - 3)):
        expected = outcome(Theirs, lambda side: [theirs.step()])[0]
        if expected == [None]:
            ours.step()
            assert seen(ours) == seen(theirs)
            continue
        with pytest.raises(expected[0]) as error:
            ours.step()
        if error.type is ValueError:  # torch's is that of zip
            assert "has the rates of 2 parameter groups, but the optimizer has 3 now" in str(error.value)
        break


# Names and documentation.


CLASSES = torch.optim.lr_scheduler.__all__


def test_every_class_is_there():
    ours = {name for name, value in vars(lr_scheduler).items() if inspect.isclass(value)}
    assert ours == set(CLASSES)
    assert optim.lr_scheduler is lr_scheduler
    assert all(issubclass(getattr(lr_scheduler, name), lr_scheduler.LRScheduler) for name in CLASSES)


def signature(function: Any) -> list[Any]:
    return [(p.name, p.kind, p.default, type(p.default)) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", CLASSES)
def test_the_signature_is_torchs(name):
    assert signature(getattr(lr_scheduler, name)) == signature(getattr(torch.optim.lr_scheduler, name))


@pytest.mark.parametrize("name", CLASSES)
def test_the_methods_are_torchs(name):
    ours, theirs = getattr(lr_scheduler, name), getattr(torch.optim.lr_scheduler, name)
    for method, value in inspect.getmembers(theirs):
        if method.startswith("_"):
            continue
        assert hasattr(ours, method), method
        if inspect.isfunction(value):
            assert signature(getattr(ours, method)) == signature(value)


@pytest.mark.parametrize("name", CLASSES)
def test_the_documentation_has_every_argument_and_an_example(name):
    cls = getattr(lr_scheduler, name)
    doc = inspect.getdoc(cls)
    assert cls.__doc__
    assert doc.count("\nArgs:\n") == doc.count("\nExamples:\n") == doc.count("\nRaises:\n") == 1
    assert doc.count(".. math::") == 1
    arguments = re.findall(r"^    (\w+): ", doc.split("\nArgs:\n")[1].split("\n\n")[0], re.MULTILINE)
    assert arguments == list(inspect.signature(cls).parameters)
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            text = re.search(rf"^    {parameter.name}: (.*(?:\n        .*)*)", doc, re.MULTILINE)[1]
            assert "default" in text or "-1 for a new scheduler" in text
    assert ">>> " in doc.split("\nExamples:\n")[1]


KINDS = list({row.name: row for row in [*SIMPLE, sequential(STEP, LINEAR, at=[5]), chained(STEP, LINEAR)]}.values())
"""A row of every class."""


@pytest.mark.slow
@pytest.mark.parametrize("row", KINDS, ids=lambda row: row.name)
def test_the_state_of_another_class_is_refused_and_changes_nothing(row):
    scheduler = built(row, Ours)
    before = copy.deepcopy(scheduler.state_dict())
    for other in KINDS:
        twins = {"LambdaLR", "MultiplicativeLR"}  # the same options, functions that are not saved
        if other.name == row.name or {row.name, other.name} == twins:
            continue
        for side in (Ours, Theirs):
            with pytest.raises(ValueError, match=rf"not of {row.name}: it (lacks|has) '|has [02] schedulers"):
                scheduler.load_state_dict(built(other, side).state_dict())
    one = row.scheduler(Ours.classes, optimizer(Ours, rates=RATES[:1]))
    with pytest.raises(ValueError, match=r"of an optimizer with 1 parameter groups, but this .* schedules 2"):
        scheduler.load_state_dict(one.state_dict())
    assert scheduler.state_dict() == before


def test_composites_check_the_states_of_their_parts():
    scheduler = built(chained(STEP, LINEAR), Ours)
    with pytest.raises(ValueError, match="not of StepLR: it lacks 'step_size', 'gamma' and has"):
        scheduler.load_state_dict(built(chained(LINEAR, STEP), Ours).state_dict())
    with pytest.raises(ValueError, match="has 1 schedulers, but this ChainedScheduler has 2"):
        scheduler.load_state_dict(built(chained(STEP), Ours).state_dict())


def test_state_of_older_versions_of_torch_is_loaded():
    scheduler = built(STEP, Ours)
    old = {name: value for name, value in scheduler.state_dict().items() if name != "_is_initial"} | {"verbose": False}
    scheduler.load_state_dict(old | {"gamma": 0.7})
    assert scheduler.gamma == 0.7
