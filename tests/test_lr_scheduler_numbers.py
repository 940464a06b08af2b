"""The rates of the schedulers over our optimizers, against live torch: every number is the same."""

import copy
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxoptim import optim
from jaxoptim.engine import programs as program
from jaxoptim.optim import lr_scheduler
from schedule_table import (
    CONSTANT,
    CYCLIC,
    EXPONENTIAL,
    LAMBDA,
    LINEAR,
    LR,
    MULTISTEP,
    ONE_CYCLE,
    POLYNOMIAL,
    RAISED_COSINE,
    RESTARTS,
    STEP,
    Row,
    constant,
    halving,
    sequential,
)
from scheduler_sides import (
    ALL,
    GENERATED,
    OPTIONS,
    RATES,
    SIDES,
    TWO_SEQUENCES,
    Ours,
    Theirs,
    advance,
    built,
    by_row,
    by_side,
    described,
    each,
    exact,
    following,
    names,
    no_length,
    number,
    optimizer,
    options,
    options_of,
    outcome,
    parts_of,
    rows,
    same,
    same_error,
    seen,
    slow_to_draw,
    sum_of_squares,
    without_steps,
)

pytestmark = pytest.mark.numbers

# The numbers.


@pytest.mark.costly
@pytest.mark.parametrize("name", OPTIONS)
@by_row(ALL)
def test_two_hundred_epochs_are_torchs(row, name):
    def run(side):
        scheduler = built(row, side, name)
        yield seen(scheduler)
        for epoch in range(1, row.values(201)):
            scheduler.step()
            yield seen(scheduler)
            if epoch % 50 == 3:
                yield exact(scheduler.state_dict())
        yield exact(options_of(scheduler.optimizer)), exact(scheduler.get_last_lr()), exact(scheduler.state_dict())

    same(run)


@pytest.mark.costly
@without_steps
@by_row([row for row in ALL if row.values(25) == 25])
def test_a_rate_in_an_array_stays_one(row):
    sides = []
    for side in SIDES:
        opt = optimizer(side, rates=(side.array(LR), side.array(0.37)))
        scheduler = row.scheduler(side.classes, opt)
        sides.append([])
        for _ in range(24):
            scheduler.step()
            # A tensor is filled in place.
            sides[-1].append((copy.deepcopy([group["lr"] for group in opt.param_groups]), scheduler.get_last_lr()))
    for ours, theirs in zip(*sides, strict=True):
        assert all(isinstance(rate, jax.Array) for rates in ours for rate in rates)
        assert {(rate.dtype, rate.shape, rate.weak_type) for rates in ours for rate in rates} == {
            (jnp.dtype("float32"), (), False)
        }
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=2e-6, atol=1e-9)


@without_steps
def test_arrays_of_one_element_and_of_float64_stay_what_they_are(x64):
    for shape in ((), (1,)):
        start = jnp.full(shape, 0.1)
        opt = optimizer(Ours, rates=(start, 0.37))
        scheduler = advance(lr_scheduler.ExponentialLR(opt, 0.5), 3)
        assert start.item() == opt.param_groups[0]["initial_lr"].item() == 0.1
        assert (opt.param_groups[0]["lr"].dtype, opt.param_groups[0]["lr"].shape) == (np.float64, shape)
        assert (opt.param_groups[0]["lr"].item(), opt.param_groups[1]["lr"]) == (0.1 / 8, 0.37 / 8)
        held = scheduler.get_last_lr()
        scheduler.step()
        assert held[0].item() == 0.1 / 8


@by_row([STEP, LINEAR, RAISED_COSINE, LAMBDA, CYCLIC, ONE_CYCLE, TWO_SEQUENCES, Row("ReduceLROnPlateau")])
def test_rates_may_be_whole_numbers(row):
    def run(side):
        scheduler = built(row, side, rates=(1, 2))
        arguments = [1] if row.name == "ReduceLROnPlateau" else []
        for _ in range(30):
            scheduler.step(*arguments)
            yield exact(seen(scheduler))

    same(run)


ATTRIBUTES = [
    (STEP, {5: {"gamma": 0.7}, 10: {"step_size": 3}, 20: {"last_epoch": 0}}),
    (MULTISTEP, {5: {"gamma": 0.7}, 10: {"milestones": Counter([15, 30, 30])}}),
    (CONSTANT, {5: {"total_iters": 9}, 12: {"factor": 0.3, "last_epoch": -1}}),
    (LINEAR, {3: {"end_factor": 0.25}, 8: {"total_iters": 20}}),
    (POLYNOMIAL, {5: {"power": 1.5}, 10: {"total_iters": 30}}),
    (EXPONENTIAL, {5: {"gamma": 0.9}}),
    (RAISED_COSINE, {5: {"eta_min": 0.02}, 10: {"T_max": 17}, 15: {"base_lrs": [0.5, 0.6]}}),
    (RESTARTS, {5: {"eta_min": 0.02}, 10: {"T_mult": 3}, 12: {"T_cur": 0}, 15: {"base_lrs": [0.5, 0.6]}}),
    (LAMBDA, {5: {"lr_lambdas": [halving, constant]}, 15: {"base_lrs": [0.5, 0.6]}}),
    (CYCLIC, {5: {"base_lrs": [0.01, 0.02]}, 10: {"max_lrs": [0.5, 0.6]}, 25: {"cycle_momentum": False}}),
    (ONE_CYCLE, {5: {"cycle_momentum": False}, 10: {"last_epoch": 3}}),
]


@pytest.mark.parametrize(("row", "changes"), [pytest.param(*case, id=described(case[0])) for case in ATTRIBUTES])
def test_attributes_can_be_changed_on_the_way(row, changes):
    def run(side):
        scheduler = built(row, side)
        for epoch in range(40):
            vars(scheduler).update(changes.get(epoch, {}))
            scheduler.step()
            yield seen(scheduler)

    same(run)


rates = st.lists(number(1e-4, 1), min_size=2, max_size=2)
changes = st.dictionaries(
    st.integers(0, 49),
    st.tuples(st.integers(0, 1), st.none() | number(0, 1), st.none() | st.integers(0, 200)),
    max_size=5,
)


def check(row: Row, name: str, rates: Any, epochs: int, doing: Any = ()) -> None:
    """A run of a row; ``doing`` has changes of a rate, and jumps, by their epochs."""
    doing = dict(doing)

    def run(side: Any) -> Any:
        scheduler = built(row, side, name, rates=rates)
        yield seen(scheduler)
        for epoch in range(epochs):
            group, rate, jump = doing.get(epoch, (0, None, None))
            if rate is not None:
                scheduler.optimizer.param_groups[group]["lr"] = rate
            if jump is None:
                scheduler.step()
            else:
                scheduler.step(jump)
            yield seen(scheduler)
        yield exact(scheduler.state_dict())

    if row.name == "OneCycleLR":
        # torch divides by the length of a phase that has none, and its rate rises again in the last step.
        found = outcome(Theirs, run)[0]
        assume(ZeroDivisionError not in found)
        assume(max(item[3] for item in found if isinstance(item, tuple)) < row.options["total_steps"])
    same(run)


@pytest.mark.costly
@pytest.mark.parametrize("kind", GENERATED)
@settings(max_examples=25, deadline=None, suppress_health_check=slow_to_draw)
@given(data=st.data())
def test_generated_options_give_torchs_numbers(kind, data):
    check(Row(kind, data.draw(GENERATED[kind])), data.draw(names), data.draw(rates), 200)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GENERATED)
@settings(max_examples=100, deadline=None, suppress_health_check=slow_to_draw)
@given(data=st.data())
def test_many_generated_options_give_torchs_numbers(kind, data):
    check(Row(kind, data.draw(GENERATED[kind])), data.draw(names), data.draw(rates), 200, data.draw(changes))


@pytest.mark.costly
@pytest.mark.parametrize("kind", GENERATED)
@settings(max_examples=20, deadline=None, suppress_health_check=slow_to_draw)
@given(data=st.data())
def test_changed_rates_and_jumps_to_an_epoch_give_torchs_numbers(kind, data):
    check(Row(kind, data.draw(GENERATED[kind])), data.draw(names), data.draw(rates), 50, data.draw(changes))


@settings(max_examples=30, deadline=None, suppress_health_check=slow_to_draw)
@given(
    options=GENERATED["CosineAnnealingWarmRestarts"],
    jumps=st.dictionaries(
        st.integers(0, 49), st.tuples(st.just(0), st.none() | number(0, 1), number(0, 300)), max_size=8
    ),
    rates=rates,
)
def test_warm_restarts_go_to_any_fraction_of_an_epoch(options, jumps, rates):
    check(Row("CosineAnnealingWarmRestarts", options), "SGD", rates, 50, jumps)


def test_warm_restarts_by_batches_are_torchs():
    def run(side):
        scheduler = side.classes.CosineAnnealingWarmRestarts(optimizer(side), 3, 2)
        for batch in range(200):
            scheduler.step(batch / 7)
            yield seen(scheduler)
        scheduler.step()
        yield seen(scheduler)

    same(run)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=slow_to_draw)
@given(row=rows(), name=names, rates=rates)
def test_generated_trees_of_schedulers_give_torchs_numbers(row, name, rates):
    check_tree(row, name, rates, 90)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=slow_to_draw)
@given(row=rows(), name=names, rates=rates, doing=changes)
def test_many_generated_trees_of_schedulers_give_torchs_numbers(row, name, rates, doing):
    check_tree(row, name, rates, 120, {epoch: (group, rate, None) for epoch, (group, rate, _) in doing.items()})


def check_tree(row: Row, name: str, rates: Any, epochs: int, doing: Any = ()) -> None:
    assume(not any(one.name == "OneCycleLR" and no_length(one) for one in parts_of(row)))
    check(row, name, rates, epochs, doing)


@pytest.mark.slow
def test_every_length_of_a_cosine_is_torchs():
    def run(side):
        for length in range(1, 200):
            scheduler = side.classes.CosineAnnealingLR(optimizer(side), length, 0.01)
            yield length, seen(advance(scheduler, length + 3))

    same(run)


@pytest.mark.slow
@pytest.mark.parametrize("eta_min", [0.0, 0.01])
def test_every_long_cosine_is_torchs(eta_min):
    def run(side):
        opt = optimizer(side)
        for length in range(200, 1000):
            scheduler = side.classes.CosineAnnealingLR(opt, length, eta_min)
            advance(scheduler, length)
            yield length, following(scheduler, 3)

    same(run)


@pytest.mark.slow
def test_every_small_cycle_is_torchs():
    def run(side):
        opt = optimizer(side)
        for up in range(1, 16):
            for down in range(16):
                yield up, down, following(side.classes.CyclicLR(opt, 0.1, 0.7, up, down), 70)
        for total in range(1, 60):
            for pct in (0.1, 0.25, 0.3, 0.45, 0.7):
                for three in (False, True):
                    if pct * total == 1:  # a phase without length
                        continue
                    scheduler = side.classes.OneCycleLR(opt, 0.7, total, pct_start=pct, three_phase=three)
                    yield total, pct, three, following(scheduler, total - 1)
        for first in range(1, 30):
            for factor in range(1, 5):
                yield first, factor, following(side.classes.CosineAnnealingWarmRestarts(opt, first, factor), 130)

    same(run)


@pytest.mark.parametrize("milestones", [[9, 4], [4, 9, 4], [30, 2, 15]], ids=str)
def test_milestones_out_of_order_are_passed_as_in_torch(milestones):
    parts = [CONSTANT, EXPONENTIAL, STEP, RAISED_COSINE][: len(milestones) + 1]
    same(lambda side: following(built(sequential(*parts, at=milestones), side), 50))


MOMENTA = sorted(
    name
    for name in set(torch.optim.__all__) & set(vars(optim))
    if name not in ("Optimizer", "lr_scheduler", "swa_utils")
)


@pytest.mark.parametrize("name", MOMENTA)
@pytest.mark.parametrize("kind", ["CyclicLR", "OneCycleLR"])
def test_every_optimizer_with_momentum_has_it_cycled_and_others_refuse(kind, name):
    def run(side):
        options = {"base_lr": 0.1} if kind == "CyclicLR" else {"total_steps": 50}
        opt = getattr(side.optim, name)([side.param([[1.0]])], lr=0.1)
        for cycled in (False, True):
            scheduler = getattr(side.classes, kind)(opt, max_lr=0.5, cycle_momentum=cycled, **options)
            yield from following(scheduler, 5)

    same(run)


# A rate is what the optimizer steps with.


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("SGD", Row("OneCycleLR", {"max_lr": 0.3, "total_steps": 9})),
        ("Adam", Row("CyclicLR", {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 3})),
    ],
    ids=["momentum", "beta1"],
)
def test_the_optimizer_steps_with_the_scheduled_numbers_and_compiles_nothing_new(name, row, x64):
    start = np.linspace(-1, 2, 6).reshape(2, 3)
    param, tensor = optim.Parameter(start), torch.nn.Parameter(torch.tensor(start))
    ours, theirs = (getattr(side.optim, name)([cell], lr=0.1) for side, cell in ((Ours, param), (Theirs, tensor)))
    schedulers = row.scheduler(Ours.classes, ours), row.scheduler(Theirs.classes, theirs)
    for step in range(9):
        grad = np.random.default_rng(step).normal(size=start.shape)
        tensor.grad = torch.tensor(grad)
        ours.step([jnp.asarray(grad)])
        theirs.step()
        np.testing.assert_allclose(param.value, tensor.detach(), rtol=1e-12, atol=1e-12)
        for scheduler in schedulers:
            scheduler.step()
        if step == 1:
            compiled = program.advance._cache_size()
    assert program.advance._cache_size() == compiled


@without_steps
def test_a_rate_in_an_array_compiles_nothing_new():
    opt = optim.SGD({"w": jnp.ones(3)}, lr=jnp.asarray(0.1), momentum=0.9)
    scheduler = lr_scheduler.CyclicLR(opt, 0.01, 0.1, 2)
    sizes = []
    for _ in range(5):
        opt.minimize(sum_of_squares)
        scheduler.step()
        sizes.append(program.minimize._cache_size())
    assert sizes[1:] == sizes[:1] * 4


# Waiting for a metric.


values = st.floats(-2, 2, width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0])
kinds = [float, np.float32, np.float64, jnp.asarray, torch.tensor, lambda x: torch.tensor([x])]
metrics = st.builds(lambda kind, x: kind(x), st.sampled_from(kinds), values)
PLATEAU = options(
    _mode=st.sampled_from(["min", "max"]),
    _factor=number(0, 0.99),
    _patience=st.integers(0, 4),
    _threshold=st.sampled_from([0.0, 1e-4, 0.1, 0.5, -0.1]),
    _threshold_mode=st.sampled_from(["rel", "abs"]),
    _cooldown=st.integers(0, 3),
    _min_lr=each(number(0, 0.2)),
    _eps=st.sampled_from([1e-8, 0.0, 1e-3, 0.05, -1.0]),
)


def check_plateau(options: Any, metrics: Any, rates: Any, name: str, added: int | None) -> None:
    def run(side: Any) -> Any:
        scheduler = side.classes.ReduceLROnPlateau(optimizer(side, name, rates=rates), **options)
        for n, metric in enumerate(metrics):
            if n == added:
                scheduler.optimizer.add_param_group({"params": [side.param()], "lr": 0.3})
            yield seen(scheduler), exact(scheduler.state_dict()), scheduler.in_cooldown
            scheduler.step(metric)
        yield seen(scheduler), exact(scheduler.state_dict()), scheduler.in_cooldown

    same(run)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=slow_to_draw)
@given(
    options=PLATEAU,
    metrics=st.lists(metrics, min_size=1, max_size=40),
    rates=rates,
    name=names,
    added=st.none() | st.integers(0, 20),
)
def test_generated_metrics_give_torchs_rates(options, metrics, rates, name, added):
    check_plateau(options, metrics, rates, name, added)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=slow_to_draw)
@given(
    options=PLATEAU,
    metrics=st.lists(metrics, min_size=20, max_size=60),
    rates=rates,
    name=names,
    added=st.none() | st.integers(0, 20),
)
def test_many_generated_metrics_give_torchs_rates(options, metrics, rates, name, added):
    check_plateau(options, metrics, rates, name, added)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
def test_two_hundred_metrics_give_torchs_rates(mode, threshold_mode):
    metrics = np.random.default_rng(0).normal(size=200) * np.linspace(1, 0, 200)
    check_plateau(
        {"mode": mode, "threshold_mode": threshold_mode, "factor": 0.5, "patience": 3, "cooldown": 2, "threshold": 0.2},
        [float(x) for x in metrics],
        RATES,
        "SGD",
        None,
    )


@by_side()
def test_a_metric_may_be_an_array_of_one_element(side):
    for metric in (side.array(1.0), side.array([1.0]), side.array([[1.0]])):
        scheduler = side.classes.ReduceLROnPlateau(optimizer(side))
        scheduler.step(metric)
        assert scheduler.best == 1.0
        assert type(scheduler.best) is float


def test_a_plateau_has_nothing_of_a_schedule():
    def run(side):
        opt = optimizer(side)
        scheduler = side.classes.ReduceLROnPlateau(opt)
        yield isinstance(scheduler, side.classes.LRScheduler), hasattr(scheduler, "base_lrs")
        yield [list(group) for group in options_of(opt)]

    same(run)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_plateau_with_rates_in_arrays_is_torchs(shape):
    found = []
    for side in SIDES:
        opt = optimizer(side, rates=(side.array(np.full(shape, LR)), 0.37))
        scheduler = side.classes.ReduceLROnPlateau(opt, factor=0.3, patience=0, min_lr=[0.01, 0.02])
        found.append([])
        for metric in (1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5):
            scheduler.step(metric)
            found[-1].append([np.asarray(rate).item() for rate in scheduler.get_last_lr()])
    assert isinstance(opt.param_groups[0]["lr"], torch.Tensor)
    assert found[0] == found[1]


def test_a_loaded_plateau_checks_its_options():
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer(Ours))
    state = scheduler.state_dict()
    before = exact(state)
    same_error(lambda side: side.classes.ReduceLROnPlateau(optimizer(side)).load_state_dict(state | {"mode": "up"}))
    with pytest.raises(ValueError, match="mode up is unknown!"):
        scheduler.load_state_dict(state | {"mode": "up"})
    assert exact(scheduler.state_dict()) == before
    scheduler.load_state_dict(state | {"mode": "max"})
    assert scheduler.mode_worse == -math.inf


@by_side("source")
def test_a_plateaus_state_goes_from_one_library_to_the_other(source):
    target = Theirs if source is Ours else Ours
    options = {"patience": 1, "factor": 0.5, "cooldown": 1}
    old = source.classes.ReduceLROnPlateau(optimizer(source), **options)
    new = target.classes.ReduceLROnPlateau(optimizer(target))
    for metric in (1.0, 0.9, 0.9, 0.95, math.nan):
        old.step(metric)
    new.optimizer.load_state_dict(old.optimizer.state_dict())
    new.load_state_dict(old.state_dict())
    for metric in (0.9, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8):
        assert (seen(new), exact(new.state_dict())) == (seen(old), exact(old.state_dict()))
        old.step(metric)
        new.step(metric)
