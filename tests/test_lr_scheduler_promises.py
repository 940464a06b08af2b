"""Schedulers where torch's documentation promises what its code does not do."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxoptim.optim import lr_scheduler
from schedule_table import (
    CONSTANT,
    CYCLIC,
    EXPONENTIAL,
    LAMBDA,
    LINEAR,
    LR,
    MULTIPLICATIVE,
    MULTISTEP,
    ONE_CYCLE,
    POLYNOMIAL,
    RAISED_COSINE,
    RESTARTS,
    STEP,
    Row,
    chained,
    sequential,
)
from scheduler_sides import (
    ALL,
    GENERATED,
    OPTIONS,
    RATES,
    RESUMABLE,
    Ours,
    Theirs,
    advance,
    built,
    by_row,
    exact,
    following,
    names,
    no_length,
    optimizer,
    options_of,
    parts_of,
    rows,
    same,
    same_error,
    slow_to_draw,
    values_of,
    without_steps,
)


def alone(row: Row, name: str = "SGD") -> Any:
    """The rates and momenta of a row by itself."""
    return [values_of(shown) for shown in following(built(row, Ours, name), 60)]


# torch's CyclicLR begins at the rate of the group if another scheduler was there first: here they are the same.
CYCLE = Row("CyclicLR", CYCLIC.options | {"base_lr": list(RATES)})
CHAINS = [
    chained(EXPONENTIAL),
    chained(CONSTANT, EXPONENTIAL),
    chained(STEP, RAISED_COSINE),
    chained(LAMBDA, STEP),
    chained(RESTARTS, STEP),
    chained(MULTIPLICATIVE, POLYNOMIAL),
    chained(MULTISTEP, LINEAR),
    chained(EXPONENTIAL, CYCLE),
    chained(chained(CONSTANT, EXPONENTIAL), STEP),
    chained(sequential(CONSTANT, EXPONENTIAL, at=[5]), STEP),
]


@without_steps
@by_row(CHAINS)
def test_a_chain_that_comes_first_in_a_sequence_is_the_chain_alone(row):
    expected = alone(row)
    for parts, at in (([row], []), ([row, EXPONENTIAL], [40])):
        shown = following(built(sequential(*parts, at=at), Ours), 39)
        assert [values_of(x) for x in shown] == expected[:40]


@without_steps
@by_row(CHAINS)
def test_what_comes_after_a_chain_begins_from_the_initial_rate(row):
    scheduler = advance(built(sequential(row, EXPONENTIAL, at=[40]), Ours), 40)
    reference = built(EXPONENTIAL, Ours)
    for _ in range(20):
        assert [group["lr"] for group in options_of(scheduler.optimizer)] == reference.get_last_lr()
        scheduler.step()
        reference.step()


SEQUENCES = [
    sequential(CONSTANT, EXPONENTIAL, at=[20]),
    sequential(LINEAR, RAISED_COSINE, STEP, at=[10, 35]),
    sequential(LINEAR, RESTARTS, LAMBDA, at=[10, 60]),
    sequential(EXPONENTIAL, CYCLE, at=[8]),
    sequential(CONSTANT, EXPONENTIAL, at=[0]),
    sequential(CYCLE, MULTISTEP, at=[9]),
    sequential(CONSTANT, sequential(STEP, EXPONENTIAL, at=[3]), at=[5]),
    sequential(sequential(LINEAR, STEP, at=[3]), EXPONENTIAL, at=[20]),
    sequential(chained(CONSTANT, EXPONENTIAL), STEP, at=[20]),
]


@pytest.mark.slow
@without_steps
@by_row([EXPONENTIAL, CYCLE, sequential(LINEAR, STEP, at=[3])], "before")
@by_row([*CHAINS, *SEQUENCES])
def test_a_chain_or_sequence_that_comes_later_begins_anew(row, before):
    expected = alone(row)
    scheduler = advance(built(sequential(before, row, at=[25]), Ours), 25)
    shown = [values_of(x) for x in following(scheduler, 60)]
    assert [rates for _, rates in shown] == [rates for _, rates in expected]
    # The momentum stays where the first one left it until there is a cycle.
    cycle = next((n for n, (groups, _) in enumerate(expected) if groups[0][1] != 0.9), None)
    if cycle is not None:
        assert shown[cycle:] == expected[cycle:]


@without_steps
def test_torch_still_gets_wrong_what_is_not_compared_with_it():
    for later in (chained(STEP), sequential(STEP, at=[])):
        with pytest.raises(NotImplementedError):
            advance(built(sequential(EXPONENTIAL, later, at=[2]), Theirs), 2)
    assert built(sequential(chained(EXPONENTIAL), at=[]), Theirs).get_last_lr()[0] == LR * 0.97
    assert advance(one_cycle(Theirs), 10).get_last_lr()[0] > 0.01


def one_cycle(side: Any, **options: Any) -> Any:
    return side.classes.OneCycleLR(optimizer(side), 0.5, total_steps=10, **options)


@without_steps
@pytest.mark.parametrize("three_phase", [False, True], ids=["two", "three"])
@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("pct", [0.0, 0.1, 0.3, 0.5])
def test_the_step_after_one_cycle_holds_the_least_rate(name, strategy, three_phase, pct):
    for total in (1, 2, 9, 50):
        opt = optimizer(Ours, name)
        options = {"anneal_strategy": strategy, "three_phase": three_phase, "pct_start": pct}
        scheduler = advance(lr_scheduler.OneCycleLR(opt, 0.5, total_steps=total, **options), total - 1)
        before = options_of(opt)
        if pct * total != 1:  # torch has no phase without length
            assert before[0]["lr"] == pytest.approx(before[0]["min_lr"], rel=1e-9, abs=1e-17)
        scheduler.step()
        assert scheduler.last_epoch == total
        assert options_of(opt) == before
        state = exact(scheduler.state_dict())
        for _ in range(2):  # in torch the number grows with each attempt
            with pytest.raises(ValueError, match=rf"^Tried to step {total + 1} times\. The specified number of total"):
                scheduler.step()
            assert (options_of(opt), exact(scheduler.state_dict())) == (before, state)


def test_the_error_after_one_cycle_is_torchs():
    same_error(lambda side: advance(one_cycle(side), 11))


@without_steps
def test_the_step_after_a_cycle_whose_peak_is_late_changes_nothing():
    # The third phase would begin after the end. torch goes on with the second.
    same(lambda side: following(one_cycle(side, three_phase=True, pct_start=0.8), 9))
    scheduler = one_cycle(Ours, three_phase=True, pct_start=0.8)
    advance(scheduler, 9)
    before = [dict(group) for group in scheduler.optimizer.param_groups]
    advance(scheduler, 1)
    assert scheduler.optimizer.param_groups == before


def test_a_phase_without_length_is_passed_over():
    """torch divides by zero."""
    with pytest.raises(ZeroDivisionError):
        one_cycle(Theirs, pct_start=0.1)
    opt = optimizer(Ours)
    scheduler = lr_scheduler.OneCycleLR(opt, 0.5, total_steps=10, pct_start=0.1)
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.5]
    assert scheduler.optimizer.param_groups[0]["momentum"] == 0.85


def poisoned(epoch: int) -> float:
    if epoch == 3:
        raise KeyboardInterrupt
    return 0.9


class Poisoned(lr_scheduler.LRScheduler):
    def get_lr(self):
        return [group["lr"] * poisoned(self.last_epoch) for group in self.optimizer.param_groups]


FAILING = {
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 0.5, total_steps=2),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, poisoned),
    "multiplicative": lambda opt: lr_scheduler.MultiplicativeLR(opt, poisoned),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.1, 0.2, 5, scale_fn=poisoned, scale_mode="iterations"),
    "subclass": Poisoned,
    "sequence": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt), lr_scheduler.OneCycleLR(opt, 0.5, total_steps=1)], [1]
    ),
    "first step of a later part": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt), lr_scheduler.LambdaLR(opt, lambda n: 1.0 / n if opt.ready else 1.0)], [3]
    ),
    "chain": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(opt, 0.9), lr_scheduler.LambdaLR(opt, poisoned)]
    ),
}


@without_steps
@pytest.mark.parametrize("failing", FAILING)
def test_a_step_that_fails_leaves_rates_and_counts_as_they_were(failing):
    opt = optimizer(Ours)
    opt.ready = False
    scheduler = advance(FAILING[failing](opt), 2)
    opt.ready = True
    fails_without_effect(scheduler)


@without_steps
@by_row([LAMBDA, RESTARTS, CYCLIC, ONE_CYCLE, chained(STEP, LAMBDA), sequential(CONSTANT, LAMBDA, at=[3])])
def test_a_step_that_misses_a_group_leaves_rates_and_counts_as_they_were(row):
    scheduler = advance(built(row, Ours), 4)
    scheduler.optimizer.add_param_group({"params": [Ours.param()], "lr": 0.2})
    fails_without_effect(scheduler)


def fails_without_effect(scheduler: Any) -> None:
    before = exact(options_of(scheduler.optimizer)), exact(scheduler.state_dict())
    for _ in range(2):
        with pytest.raises((KeyboardInterrupt, KeyError, ValueError, ZeroDivisionError)):
            scheduler.step()
        assert (exact(options_of(scheduler.optimizer)), exact(scheduler.state_dict())) == before


def resumed(row: Row, epoch: int, name: str = "SGD") -> tuple[Any, Any]:
    """An uninterrupted run after an epoch, and a scheduler made with that ``last_epoch`` on other rates."""
    run = advance(built(row, Ours, name), epoch + 1)
    opt = optimizer(Ours, name, rates=(0.777, 0.0))
    for mine, group in zip(options_of(run.optimizer), opt.param_groups, strict=True):
        # Cyclic ones keep their bounds in the group; of the others only the initial rate is known.
        group.update(mine if row.name in ("CyclicLR", "OneCycleLR") else {"initial_lr": mine["initial_lr"]})
        group["lr"] = 0.777
    return run, Row(row.name, row.options | {"last_epoch": epoch}).scheduler(Ours.classes, opt)


SEQUENTIAL = [row for row in ALL if row.name == "SequentialLR"]


@pytest.mark.costly
@by_row([*RESUMABLE, *SEQUENTIAL])
@without_steps
def test_a_scheduler_resumed_with_last_epoch_goes_on_exactly(row):
    for epoch in (0, 5, 29, 48):
        if row.values(epoch + 32) < epoch + 32:  # the cycle is over
            break
        run, again = resumed(row, epoch)
        assert again.last_epoch == epoch + 1
        expected, shown = following(run, 30), following(again, 30)
        assert [values_of(x) for x in shown] == [values_of(x) for x in expected]
        assert [x[3] for x in shown] == [x[3] for x in expected]
        states = [scheduler.state_dict() for scheduler in (run, again)]
        if row.name in ("LambdaLR", "CyclicLR", "OneCycleLR"):
            for state in states:
                del state["_step_count"]  # what depends on the base rate alone need not repeat the steps
        if row.name != "SequentialLR":  # whose parts have rates from before they began
            assert exact(states[0]) == exact(states[1])


@settings(max_examples=40, deadline=None, suppress_health_check=slow_to_draw)
@given(data=st.data(), epoch=st.integers(0, 120), name=names)
@without_steps
def test_generated_schedulers_resumed_with_last_epoch_go_on_exactly(data, epoch, name):
    kind = data.draw(st.sampled_from([*GENERATED, "SequentialLR"]))
    row = Row(kind, data.draw(GENERATED[kind])) if kind in GENERATED else data.draw(rows(2))
    assume(row.name != "ChainedScheduler" and not any(x.name == "OneCycleLR" and no_length(x) for x in parts_of(row)))
    run, again = resumed(row, epoch, name)
    assert [values_of(x) for x in following(again, 40)] == [values_of(x) for x in following(run, 40)]


@without_steps
def test_sequences_of_chains_are_resumed_too():
    row = sequential(chained(CONSTANT, EXPONENTIAL), chained(STEP, RAISED_COSINE), at=[20])
    for epoch in (0, 18, 19, 20, 21, 35):
        run, again = resumed(row, epoch)
        assert [values_of(x) for x in following(again, 40)] == [values_of(x) for x in following(run, 40)]


@without_steps
def test_a_cyclic_rate_is_resumed_from_its_base_after_another_scheduler():
    # Another scheduler was there first, so the groups' initial rate is not the base of the cycle.
    def made(opt, **options):
        return lr_scheduler.CyclicLR(opt, 0.01, 0.5, 7, **options)

    opt = optimizer(Ours)
    lr_scheduler.StepLR(opt, 100)
    run = advance(made(opt), 4)
    copied = optimizer(Ours)
    for group, options in zip(copied.param_groups, options_of(opt), strict=True):
        group.update(options)
    again = made(copied, last_epoch=3)
    assert [values_of(x) for x in following(again, 20)] == [values_of(x) for x in following(run, 20)]


def test_resuming_says_nothing_of_the_order_of_steps():
    for row in (EXPONENTIAL, RESTARTS, LAMBDA, RAISED_COSINE):
        opt = optimizer(Ours)
        for group in opt.param_groups:
            group["initial_lr"] = group["lr"]
        Row(row.name, row.options | {"last_epoch": 5}).scheduler(Ours.classes, opt)


@without_steps
def test_a_constant_of_zero_is_taken_back():
    """torch divides by zero."""
    with pytest.raises(ZeroDivisionError):
        advance(Theirs.classes.ConstantLR(optimizer(Theirs), 0, 3), 3)
    scheduler = lr_scheduler.ConstantLR(optimizer(Ours), 0, 3)
    assert [scheduler.get_last_lr(), *(advance(scheduler, 1).get_last_lr() for _ in range(5))] == [
        *[[0.0, 0.0]] * 3,
        *[list(RATES)] * 3,
    ]
    assert advance(lr_scheduler.ConstantLR(optimizer(Ours), 0.0, 0), 5).get_last_lr() == [0.0, 0.0]
    arrays = optimizer(Ours, rates=(jnp.asarray(0.1), 0.37))
    rates = advance(lr_scheduler.ConstantLR(arrays, 0.0, 2), 2).get_last_lr()
    assert rates[0] == np.float32(0.1)
    assert rates[1] == 0.37


@by_row([Row("LinearLR", {"total_iters": 0}), Row("PolynomialLR", {"total_iters": 0})])
@without_steps
def test_a_line_or_power_without_length_may_come_later(row):
    """torch divides by zero in the closed form."""
    with pytest.raises(ZeroDivisionError):
        advance(built(sequential(CONSTANT, row, at=[3]), Theirs), 3)
    rates = advance(built(sequential(CONSTANT, row, at=[3]), Ours), 3).get_last_lr()
    assert rates == built(row, Ours).get_last_lr()
