"""Saving and loading schedulers."""

import copy
import functools
import io
import json
import pickle
from typing import Any

import jax
import numpy as np
import pytest
import torch

from schedule_table import (
    EXPONENTIAL,
    STEP,
    Row,
    chained,
    constant,
)
from scheduler_sides import (
    ALL,
    SIDES,
    Ours,
    Theirs,
    advance,
    built,
    by_row,
    equal,
    exact,
    following,
    optimizer,
    parts_of,
    same,
    seen,
    without_steps,
)


@pytest.mark.costly
@pytest.mark.parametrize(("source", "target"), [SIDES, SIDES[::-1]], ids=["out", "in"])
@by_row(ALL)
@without_steps
def test_a_state_dict_is_loaded_and_goes_on_exactly(row, source, target):
    done = min(23, row.values(24) - 1)
    old = advance(built(row, source), done)
    optimizers, schedulers = copy.deepcopy((old.optimizer.state_dict(), old.state_dict()))
    given = exact(schedulers)
    new = built(row, target)
    new.optimizer.load_state_dict(optimizers)
    new.load_state_dict(schedulers)
    if target is Ours:  # torch takes the function out of that of CyclicLR
        assert exact(schedulers) == given
    steps = row.values(124) - 1 - done
    equal(following(new, steps), following(old, steps))
    assert exact(new.state_dict()) == exact(old.state_dict())


@without_steps
def test_torchs_rates_in_tensors_are_loaded_as_arrays():
    theirs = advance(Theirs.classes.CosineAnnealingLR(optimizer(Theirs, rates=[torch.tensor(0.1)]), 9), 4)
    ours = Ours.classes.CosineAnnealingLR(optimizer(Ours, rates=[0.3]), 9)
    ours.optimizer.load_state_dict(theirs.optimizer.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for _ in range(20):
        (rate,) = ours.get_last_lr()
        assert isinstance(rate, jax.Array)
        assert isinstance(ours.optimizer.param_groups[0]["lr"], jax.Array)
        assert isinstance(ours.base_lrs[0], jax.Array)
        np.testing.assert_allclose(rate, theirs.get_last_lr()[0], rtol=2e-6, atol=1e-9)
        ours.step()
        theirs.step()


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def through_torch(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_pickle(state: Any) -> Any:
    return pickle.loads(pickle.dumps(state))


PLATEAU_ROW = Row("ReduceLROnPlateau", {"patience": 3})


def begun(row: Row, steps: int = 13) -> tuple[Any, Any]:
    """A scheduler after some steps, and what makes the next."""
    scheduler = built(row, Ours)
    arguments = [1.0] if row is PLATEAU_ROW else []

    def step(scheduler: Any) -> Any:
        scheduler.step(*arguments)
        return seen(scheduler)

    for _ in range(min(steps, row.values(steps + 1) - 1)):
        step(scheduler)
    return scheduler, step


@pytest.mark.costly
@by_row([*ALL, PLATEAU_ROW])
@without_steps
def test_a_state_dict_is_what_json_pickle_and_torch_can_write(row):
    # torch counts milestones in a dict by numbers, which JSON makes texts of.
    in_json = not any(part.name == "MultiStepLR" for part in parts_of(row))
    for way in [through_json] * in_json + [through_torch, through_pickle]:
        old, step = begun(row)
        new = built(row, Ours)
        new.load_state_dict(way(old.state_dict()))
        assert exact(new.state_dict()) == exact(old.state_dict())
        new.optimizer.load_state_dict(old.optimizer.state_dict())
        for _ in range(min(20, row.values(34) - 14)):
            assert step(new) == step(old)


@by_row([*ALL, PLATEAU_ROW])
@without_steps
def test_a_copied_scheduler_has_the_copied_optimizer(row):
    for way in (copy.deepcopy, through_pickle):
        scheduler, step = begun(row)
        before = seen(scheduler)
        twin, opt = way((scheduler, scheduler.optimizer))
        assert all(part.optimizer is opt for part in schedulers_in(twin))
        assert seen(twin) == before
        shown = [step(twin) for _ in range(min(20, row.values(34) - 14))]
        assert seen(scheduler) == before
        assert [step(scheduler) for _ in shown] == shown


def schedulers_in(scheduler: Any) -> list[Any]:
    parts = getattr(scheduler, "_schedulers", [])
    return [scheduler, *(one for part in parts for one in schedulers_in(part))]


class Counting:
    """A function with a state that changes."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, n: Any) -> float:
        self.calls += 1
        return 0.99**self.calls


@pytest.mark.parametrize("kind", ["LambdaLR", "MultiplicativeLR", "CyclicLR"])
def test_the_state_of_a_callable_object_is_saved_and_loaded(kind):
    def made(side):
        opt = optimizer(side)
        if kind == "CyclicLR":
            return side.classes.CyclicLR(opt, 0.1, 0.5, 4, scale_fn=Counting())
        return getattr(side.classes, kind)(opt, [Counting(), constant])

    def run(side):
        scheduler = advance(made(side), 7)
        yield seen(scheduler), exact(scheduler.state_dict())
        again = made(side)
        state = scheduler.state_dict()
        again.load_state_dict(state)
        again.optimizer.load_state_dict(scheduler.optimizer.state_dict())
        scheduler.step()  # the object that was saved is not the one that was loaded
        yield from following(again, 5)
        yield exact(again.state_dict())

    same(run)


def test_a_partial_has_an_empty_state():
    partial = functools.partial(pow, 0.9)
    same(lambda side: [exact(advance(side.classes.LambdaLR(optimizer(side), partial), 3).state_dict())])


def test_a_state_dict_of_another_number_of_schedulers_is_refused():
    states = [built(chained(*parts), Ours).state_dict() for parts in ([STEP], [STEP, EXPONENTIAL])]
    for mine, other in (states, states[::-1]):
        scheduler = built(chained(*[STEP] * len(mine["_schedulers"])), Ours)
        before = exact(scheduler.state_dict())
        with pytest.raises(ValueError, match=r"The state dict has \d schedulers, but this ChainedScheduler has \d"):
            scheduler.load_state_dict(other)
        assert exact(scheduler.state_dict()) == before
