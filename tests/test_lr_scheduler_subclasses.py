"""Schedulers of one's own, as subclasses."""

import warnings

import numpy as np
import pytest

from jaxoptim.optim import lr_scheduler
from schedule_table import (
    STEP,
    chained,
    inverse_time,
    sequential,
)
from scheduler_sides import (
    RATES,
    Ours,
    advance,
    built,
    by_side,
    exact,
    following,
    optimizer,
    same,
    values_of,
    without_steps,
)


def by_group_rates(side):
    class Mine(side.classes.LRScheduler):
        def __init__(self, optimizer, decay, last_epoch=-1):
            self.decay = decay
            super().__init__(optimizer, last_epoch)

        def get_lr(self):
            if not self._get_lr_called_within_step:
                warnings.warn("To get the last learning rate, use get_last_lr.", stacklevel=2)
            if self._is_initial:
                return [group["lr"] for group in self.optimizer.param_groups]
            return [group["lr"] * self.decay for group in self.optimizer.param_groups]

    return lambda opt, **options: Mine(opt, 0.97, **options)


def by_base_rates(side):
    class Mine(side.classes.LRScheduler):
        def get_lr(self):
            return [base / (1 + self.last_epoch) ** 0.5 for base in self.base_lrs]

    return Mine


def with_closed_form(side):
    class Mine(side.classes.LRScheduler):
        def get_lr(self):
            return [group["lr"] * (1 - 0.5 / (self.last_epoch + 1)) for group in self.optimizer.param_groups]

        def _get_closed_form_lr(self):
            return [base * 0.9**self.last_epoch for base in self.base_lrs]

    return Mine


def upon_super(side):
    class Mine(side.classes.ExponentialLR):
        def get_lr(self):
            return [max(rate, 0.01) for rate in super().get_lr()]

        def _get_closed_form_lr(self):
            return [max(rate, 0.02) for rate in super()._get_closed_form_lr()]

    return lambda opt, **options: Mine(opt, 0.9, **options)


def by_steps_counted(side):
    class Mine(side.classes.LambdaLR):
        def get_lr(self):
            return [rate * min(1.0, self._step_count / 10) for rate in super().get_lr()]

    return lambda opt, **options: Mine(opt, inverse_time, **options)


def with_a_step_of_its_own(side):
    class Mine(side.classes.LRScheduler):
        def get_lr(self):
            return [base * 0.95**self.last_epoch for base in self.base_lrs]

        def step(self, epoch=None):
            self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                group["lr"] = rate
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    return Mine


def warming_up(side):
    class Mine(side.classes.LRScheduler):
        """A ramp, and another scheduler after it, as users write it."""

        def __init__(self, optimizer, after, last_epoch=-1):
            self.after = after
            super().__init__(optimizer, last_epoch)

        def get_lr(self):
            if self.last_epoch <= 5:
                return [base * (self.last_epoch + 1) / 6 for base in self.base_lrs]
            return self.after.get_last_lr()

        def step(self, epoch=None):
            if self.last_epoch > 5:
                self.after.step(epoch)
            super().step(epoch)

        def state_dict(self):
            return {key: value for key, value in super().state_dict().items() if key != "after"}

    return lambda opt, **options: Mine(opt, side.classes.ExponentialLR(opt, 0.9), **options)


def of_any_iterable(side):
    class Mine(side.classes.LRScheduler):
        def get_lr(self):
            return (base * 0.9**self.last_epoch for base in self.base_lrs)

    return Mine


def of_numpy(side):
    class Mine(side.classes.LRScheduler):
        def get_lr(self):
            return np.asarray(self.base_lrs) * 0.9**self.last_epoch

    return Mine


SUBCLASSES = [
    by_group_rates,
    by_base_rates,
    with_closed_form,
    upon_super,
    by_steps_counted,
    with_a_step_of_its_own,
    warming_up,
    of_any_iterable,
    of_numpy,
]


@pytest.mark.parametrize("define", SUBCLASSES, ids=lambda define: define.__name__)
def test_a_scheduler_of_ones_own_is_what_it_is_in_torch(define):
    def run(side):
        scheduler = define(side)(optimizer(side))
        yield from following(scheduler, 30)
        yield exact(scheduler.state_dict())
        scheduler.step(7)
        yield from following(scheduler, 5)
        scheduler.optimizer.param_groups[1]["lr"] = 0.2
        yield from following(scheduler, 5)
        yield [float(rate) for rate in scheduler.get_lr()]
        fresh = define(side)(optimizer(side))
        fresh.load_state_dict(scheduler.state_dict())
        fresh.optimizer.load_state_dict(scheduler.optimizer.state_dict())
        yield from following(fresh, 5)

    same(run)


@pytest.mark.parametrize("define", SUBCLASSES, ids=lambda define: define.__name__)
def test_a_scheduler_of_ones_own_is_part_of_sequences_and_chains(define):
    def run(side):
        for order in (1, -1):
            opt = optimizer(side)
            parts = [define(side)(opt), side.classes.StepLR(opt, 7, 0.5)][::order]
            yield from following(side.classes.SequentialLR(opt, parts, [11]), 40)
            opt = optimizer(side)
            parts = [define(side)(opt), side.classes.StepLR(opt, 7, 0.5)][::order]
            yield from following(side.classes.ChainedScheduler(parts), 40)

    same(run)


@pytest.mark.parametrize("define", [d for d in SUBCLASSES if d is not warming_up], ids=lambda define: define.__name__)
@without_steps
def test_a_scheduler_of_ones_own_is_resumed_with_last_epoch(define):
    run = advance(define(Ours)(optimizer(Ours)), 8)
    opt = optimizer(Ours, rates=(0.777, 0.5))
    for group, rate in zip(opt.param_groups, RATES, strict=True):
        group["initial_lr"] = rate
    again = define(Ours)(opt, last_epoch=7)
    assert [values_of(x) for x in following(again, 20)] == [values_of(x) for x in following(run, 20)]


@by_side()
def test_a_scheduler_without_get_lr_cannot_be_made(side):
    with pytest.raises(NotImplementedError):
        side.classes.LRScheduler(optimizer(side))

    class Mine(side.classes.LRScheduler):
        pass

    with pytest.raises(NotImplementedError):
        Mine(optimizer(side))
    for composite in (chained(STEP), sequential(STEP, at=[])):
        with pytest.raises(NotImplementedError):
            built(composite, side).get_lr()
    with pytest.raises(NotImplementedError):
        side.classes.ReduceLROnPlateau(optimizer(side)).get_lr()


def test_a_missing_get_lr_is_named():
    class Mine(lr_scheduler.LRScheduler):
        pass

    with pytest.raises(NotImplementedError, match=r"^Mine has no get_lr\. Define it to return"):
        Mine(optimizer(Ours))
