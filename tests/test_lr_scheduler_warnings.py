"""What schedulers warn of, as torch's do."""

import contextlib
import functools
import types
from typing import Any

import jax.numpy as jnp
import pytest

from jaxoptim import optim
from jaxoptim.optim import lr_scheduler
from schedule_table import (
    CONSTANT,
    CYCLIC,
    EXPONENTIAL,
    LAMBDA,
    LINEAR,
    MULTIPLICATIVE,
    ONE_CYCLE,
    RAISED_COSINE,
    RESTARTS,
    STEP,
    Row,
    chained,
    sequential,
)
from scheduler_sides import Ours, advance, built, by_row, following, optimizer, same, seen, sum_of_squares


def replaced(opt: Any, how: str) -> None:
    """Another function in the place of the optimizer's step."""
    original = opt.step
    if how == "function":
        opt.step = lambda *args: None
    elif how == "method":
        opt.step = types.MethodType(lambda self, *args: original(*args), opt)
    else:
        opt.step = functools.wraps(original)(lambda *args: original(*args))


def no_step(side, make, opt):
    make(opt)


def a_step(side, make, opt):
    make(opt)
    opt.step()


def a_step_before_the_scheduler(side, make, opt):
    opt.step()
    make(opt)


def a_step_between_two_schedulers(side, make, opt):
    make(opt)
    opt.step()
    make(opt)


def a_step_after_two_schedulers(side, make, opt):
    make(opt)
    make(opt)
    opt.step()


def a_step_that_fails(side, make, opt):
    make(opt)
    with contextlib.suppress(ZeroDivisionError):
        opt.step(lambda: 1 / 0)


def a_function_for_step(side, make, opt):
    make(opt)
    replaced(opt, "function")
    opt.step()


def a_method_for_step(side, make, opt):
    make(opt)
    replaced(opt, "method")
    opt.step()


def a_wrapped_step(side, make, opt):
    make(opt)
    replaced(opt, "wraps")
    opt.step()


def a_wrapped_step_that_is_not_called(side, make, opt):
    make(opt)
    replaced(opt, "wraps")


def a_method_for_step_before_the_scheduler(side, make, opt):
    replaced(opt, "method")
    make(opt)
    opt.step()


def a_method_for_step_before_the_scheduler_that_is_not_called(side, make, opt):
    replaced(opt, "method")
    make(opt)


def a_new_state(side, make, opt):
    make(opt).load_state_dict(make(optimizer(side)).state_dict())


def a_stepped_state(side, make, opt):
    scheduler, other = make(opt), make(optimizer(side))
    scheduler.load_state_dict(advance(other, 1).state_dict())


ORDERS = [
    no_step,
    a_step,
    a_step_before_the_scheduler,
    a_step_between_two_schedulers,
    a_step_after_two_schedulers,
    a_step_that_fails,
    a_function_for_step,
    a_method_for_step,
    a_wrapped_step,
    a_wrapped_step_that_is_not_called,
    a_method_for_step_before_the_scheduler,
    a_method_for_step_before_the_scheduler_that_is_not_called,
    a_new_state,
    a_stepped_state,
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@by_row([EXPONENTIAL, RESTARTS, chained(STEP, CYCLIC), sequential(LINEAR, STEP, at=[2])])
def test_warnings_about_the_order_of_steps_are_torchs(row, order):
    def run(side):
        made = []

        def make(opt):
            made.append(row.scheduler(side.classes, opt))
            return made[-1]

        order(side, make, optimizer(side))
        yield from following(made[0], 3)

    same(run)


@by_row([EXPONENTIAL, LAMBDA, RESTARTS, CONSTANT, RAISED_COSINE, CYCLIC, ONE_CYCLE])
def test_get_lr_outside_a_step_is_warned_about_as_in_torch(row):
    def run(side):
        scheduler = built(row, side)
        scheduler.optimizer.step()
        for _ in range(2):
            yield scheduler.get_lr(), seen(scheduler)
            scheduler.step()

    same(run)


@by_row([Row("ReduceLROnPlateau"), RESTARTS, EXPONENTIAL])
def test_an_epoch_is_warned_about_as_in_torch(row):
    def run(side):
        scheduler = built(row, side)
        scheduler.optimizer.step()
        arguments = (0.5, 4) if row.name == "ReduceLROnPlateau" else (4,)
        for _ in range(2):
            scheduler.step(*arguments)
            yield seen(scheduler)

    same(run)


@pytest.mark.parametrize("make", ["step", "minimize"])
def test_each_step_or_minimize_counts(make):
    opt = optimizer(Ours)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.9)
    with pytest.warns(UserWarning, match="Detected call of `lr_scheduler.step"):
        scheduler.step()
    opt = optimizer(Ours)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.9)
    if make == "step":
        opt.step([[jnp.ones(())], [jnp.ones(())]])
    else:
        opt.minimize(sum_of_squares)
    scheduler.step()


def test_an_optimizer_class_with_a_step_of_its_own_is_not_overridden():
    class Mine(optim.SGD):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    opt = Mine([1.0], lr=0.1)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.9)
    opt.step([0.5])
    scheduler.step()


@by_row([MULTIPLICATIVE, STEP, CONSTANT, LINEAR, RAISED_COSINE, CYCLIC, ONE_CYCLE])
def test_a_warning_points_to_the_users_line(row):
    scheduler = built(row, Ours)
    for act, arguments, start in (
        (scheduler.step, (), "Detected call"),
        (scheduler.step, (3,), "The epoch parameter"),
        (scheduler.get_lr, (), "To get the last"),
    ):
        with pytest.warns(UserWarning, match=start) as caught:
            act(*arguments)
        assert [warning.filename for warning in caught] == [__file__]
