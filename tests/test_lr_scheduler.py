"""The learning-rate schedulers over our optimizers, against live torch: every number, key, warning and error.

A program is a generator over a side, ours or torch's. It yields what a user can see, and both sides must yield
the same: numbers equal as Python's floats are, and the warnings on the way.
"""

import contextlib
import copy
import functools
import inspect
import io
import json
import math
import pickle
import re
import types
import warnings
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jaxoptim import optim
from jaxoptim.engine import programs as program
from jaxoptim.optim import lr_scheduler
from schedule_table import (
    CLASS_ONLY,
    COMPOSITE,
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
    ROWS,
    SIMPLE,
    STEP,
    TORCH,
    Row,
    by_cycle,
    by_iteration,
    chained,
    constant,
    counting,
    halving,
    inverse_time,
    sequential,
    three_quarters_now_and_then,
    warmup,
)

RATES = (LR, 0.37)
"""The rates of the two groups."""
OPTIONS = {"SGD": {"momentum": 0.9}, "Adam": {"betas": (0.9, 0.999)}}
"""What a scheduler of the momentum needs of an optimizer."""

# Schedulers need no steps of the optimizer; the tests of the warnings look at what is said about that.
without_steps = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")


# The same program on both sides.


class Ours:
    """jaxoptim.optim."""

    optim = optim
    classes = types.SimpleNamespace(**vars(lr_scheduler), SWALR=optim.swa_utils.SWALR)
    array = functools.partial(jnp.asarray, dtype=jnp.float32)

    @staticmethod
    def param(value: Any = 1.0) -> Any:
        return optim.Parameter(np.asarray(value, np.float32))


class Theirs:
    """torch.optim."""

    optim = torch.optim
    classes = TORCH
    array = functools.partial(torch.tensor, dtype=torch.float32)

    @staticmethod
    def param(value: Any = 1.0) -> Any:
        return torch.nn.Parameter(torch.tensor(np.asarray(value, np.float32)))


SIDES = (Ours, Theirs)


def by_side(name: str = "side") -> Any:
    return pytest.mark.parametrize(name, SIDES, ids=lambda side: side.__name__)


def optimizer(side: Any, name: str = "SGD", rates: Any = RATES, **options: Any) -> Any:
    """An optimizer with a group for each rate."""
    groups = [{"params": [side.param()], "lr": rate} for rate in rates]
    return getattr(side.optim, name)(groups, **(OPTIONS.get(name, {}) | options))


def built(row: Row, side: Any, name: str = "SGD", **options: Any) -> Any:
    """The scheduler of a row around an optimizer of its own."""
    return row.scheduler(side.classes, optimizer(side, name, **options))


def options_of(opt: Any) -> list[dict[str, Any]]:
    """The groups without their parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]


def seen(scheduler: Any) -> Any:
    """What can be seen of a scheduler and its optimizer after a step, with the order of the keys."""
    groups = options_of(scheduler.optimizer)
    return groups, [list(group) for group in groups], scheduler.get_last_lr(), getattr(scheduler, "last_epoch", None)


def exact(x: Any) -> str:
    """A text in which values of other types, or another bit, are another text; the order of keys is left out."""
    if isinstance(x, dict):
        return f"{type(x).__name__}({', '.join(sorted(f'{key!r}: {exact(value)}' for key, value in x.items()))})"
    if isinstance(x, list | tuple):
        return f"{type(x).__name__}({', '.join(map(exact, x))})"
    return repr(x)


def advance(scheduler: Any, steps: int) -> Any:
    for _ in range(steps):
        scheduler.step()
    return scheduler


def following(scheduler: Any, steps: int) -> list[Any]:
    """What is seen now, and after each of some steps."""
    return [seen(scheduler), *(seen(advance(scheduler, 1)) for _ in range(steps))]


def outcome(side: Any, run: Any) -> tuple[list[Any], list[Any]]:
    """What a program yields, an error as its type, and the beginnings of its warnings."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for item in run(side):
                found.append(item)
        except Exception as error:
            found.append(type(error))
    return found, [(warning.category, str(warning.message)[:60]) for warning in caught]


def equal(ours: list[Any], theirs: list[Any]) -> None:
    """Two lists of what was seen are the same, NaN included."""
    for epoch, (mine, parents) in enumerate(zip(ours, theirs, strict=True)):
        assert mine == parents or repr(mine) == repr(parents), f"number {epoch} is the first that differs"


def same(run: Any) -> None:
    """A program gives the same on both sides."""
    (ours, warned), (theirs, expected) = outcome(Ours, run), outcome(Theirs, run)
    equal(ours, theirs)
    assert warned == expected


def described(x: Any) -> str:
    """A readable name of a row, or of one of its options."""
    if isinstance(x, Row):
        return "-".join([x.name, *(f"{name}={described(value)}" for name, value in x.options.items())])
    if isinstance(x, list | tuple):
        return f"[{','.join(map(described, x))}]"
    return getattr(x, "__name__", str(x))


def by_row(rows: Any, name: str = "row") -> Any:
    return pytest.mark.parametrize(name, rows, ids=described)


class Power:
    """A callable object, whose attributes a state dict has."""

    def __init__(self, base: float) -> None:
        self.base = base

    def __call__(self, n: Any) -> Any:
        return self.base**n

    def __str__(self) -> str:
        return f"Power({self.base})"


TWO_SEQUENCES = sequential(sequential(LINEAR, EXPONENTIAL, at=[4]), RESTARTS, at=[40])
MORE = [
    Row("LambdaLR", {"lr_lambda": [inverse_time, halving]}),
    Row("LambdaLR", {"lr_lambda": (Power(0.95), constant)}),
    Row("MultiplicativeLR", {"lr_lambda": [constant, three_quarters_now_and_then]}),
    Row("MultiplicativeLR", {"lr_lambda": (Power(0.999), constant)}),
    Row("StepLR", {"step_size": 60, "gamma": 2}),
    Row("MultiStepLR", {"milestones": (20, 30), "gamma": 2}),
    Row("LinearLR", {"start_factor": 1, "end_factor": 0, "total_iters": 30}),
    Row("ExponentialLR", {"gamma": 1}),
    Row("PolynomialLR", {"total_iters": 30, "power": 2}),
    Row("CosineAnnealingLR", {"T_max": 84}),  # where pi / T is not pi * (1 / T)
    Row("CosineAnnealingLR", {"T_max": 30, "eta_min": -0.01}),
    Row("CosineAnnealingLR", {"T_max": 30, "eta_min": 1}),
    Row("CosineAnnealingWarmRestarts", {"T_0": 7, "T_mult": 5, "eta_min": 0}),
    Row(
        "CyclicLR",
        {
            "base_lr": [0.01, 0.02],
            "max_lr": [0.1, 0.3],
            "step_size_up": 5,
            "step_size_down": 3,
            "base_momentum": [0.8, 0.7],
            "max_momentum": [0.9, 0.95],
        },
    ),
    Row("CyclicLR", {"base_lr": 0.01, "max_lr": (0.1, 0.3), "step_size_up": 2.5}),
    Row("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 9, "scale_fn": Power(0.9), "mode": "mine"}),
    Row("CyclicLR", {"base_lr": 1, "max_lr": 2, "step_size_up": 9, "mode": "exp_range", "gamma": 1}),
    Row(
        "OneCycleLR",
        {"max_lr": [0.5, 0.3], "total_steps": 250, "base_momentum": [0.8, 0.7], "max_momentum": [0.9, 0.95]},
    ),
    Row("OneCycleLR", {"max_lr": 1, "epochs": 21, "steps_per_epoch": 10, "div_factor": 3, "final_div_factor": 7}),
    Row("SWALR", {"swa_lr": [0.05, 0.01], "anneal_epochs": 20}),
    TWO_SEQUENCES,
    sequential(sequential(TWO_SEQUENCES, STEP, at=[60]), EXPONENTIAL, at=[120]),
    sequential(sequential(CONSTANT, MULTIPLICATIVE, at=[1]), STEP, at=[30]),
    sequential(LAMBDA, MULTIPLICATIVE, CYCLIC, at=[5, 30]),
    sequential(CONSTANT, ONE_CYCLE, STEP, at=[10, 60]),
    sequential(CYCLIC, EXPONENTIAL, CYCLIC, at=[33, 50]),
    chained(TWO_SEQUENCES, RAISED_COSINE),
    chained(sequential(LINEAR, EXPONENTIAL, at=[3]), chained(STEP, sequential(CONSTANT, MULTISTEP, at=[50]))),
]
"""Lists with one value for each group, ints, callable objects, and sequences in sequences."""

ALL = [*ROWS, *CLASS_ONLY, *MORE]


# The numbers.


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


def number(least: float, most: float) -> Any:
    return st.floats(least, most, allow_nan=False, allow_subnormal=False)


def each(values: Any) -> Any:
    """One value, or one for each group."""
    return values | st.lists(values, min_size=2, max_size=2)


def options(**strategies: Any) -> Any:
    """Keywords, of which those whose names begin with an underscore may be left out."""
    needed = {name: value for name, value in strategies.items() if not name.startswith("_")}
    optional = {name[1:]: value for name, value in strategies.items() if name.startswith("_")}
    return st.fixed_dictionaries(needed, optional=optional)


whole = st.integers(1, 90)
functions = st.sampled_from([inverse_time, halving, warmup, counting, constant, three_quarters_now_and_then])
by_group = functions | st.lists(functions, min_size=2, max_size=2)
GENERATED = {
    "LambdaLR": options(lr_lambda=by_group),
    "MultiplicativeLR": options(lr_lambda=by_group),
    "StepLR": options(step_size=whole, _gamma=number(0, 1.2)),
    "MultiStepLR": options(milestones=st.lists(st.integers(0, 150), max_size=6), _gamma=number(0, 1.5)),
    "ConstantLR": options(_factor=number(0.01, 1), _total_iters=whole),
    "LinearLR": options(_start_factor=number(0.001, 1), _end_factor=number(0, 1), _total_iters=whole),
    "ExponentialLR": options(gamma=number(0, 1.05)),
    "PolynomialLR": options(_total_iters=whole, _power=number(0, 4)),
    "CosineAnnealingLR": options(T_max=whole, _eta_min=number(-0.1, 0.5)),
    "CosineAnnealingWarmRestarts": options(T_0=whole, _T_mult=st.integers(1, 4), _eta_min=number(-0.1, 0.5)),
    "CyclicLR": options(
        base_lr=each(number(0, 1)),
        max_lr=each(number(0, 1)),
        _step_size_up=whole,
        _step_size_down=st.none() | st.integers(0, 90),
        _mode=st.sampled_from(["triangular", "triangular2", "exp_range"]),
        _gamma=number(0.5, 1.01),
        _scale_fn=st.sampled_from([None, by_cycle, by_iteration, Power(0.9)]),
        _scale_mode=st.sampled_from(["cycle", "iterations"]),
        _cycle_momentum=st.booleans(),
        _base_momentum=each(number(0, 0.9)),
        _max_momentum=each(number(0, 0.99)),
    ),
    "OneCycleLR": options(
        max_lr=each(number(0.001, 1)),
        total_steps=st.integers(201, 500),
        _pct_start=number(0, 1),
        _anneal_strategy=st.sampled_from(["cos", "linear"]),
        _cycle_momentum=st.booleans(),
        _base_momentum=each(number(0, 0.9)),
        _max_momentum=each(number(0, 0.99)),
        _div_factor=number(1, 1000),
        _final_div_factor=number(1, 1e6),
        _three_phase=st.booleans(),
    ),
}
"""What every class can be given."""

names = st.sampled_from(list(OPTIONS))
rates = st.lists(number(1e-4, 1), min_size=2, max_size=2)
changes = st.dictionaries(
    st.integers(0, 49),
    st.tuples(st.integers(0, 1), st.none() | number(0, 1), st.none() | st.integers(0, 200)),
    max_size=5,
)
slow_to_draw = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


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


@pytest.mark.parametrize("kind", GENERATED)
@settings(max_examples=25, deadline=None, suppress_health_check=slow_to_draw)
@given(data=st.data())
def test_generated_options_give_torchs_numbers(kind, data):
    check(Row(kind, data.draw(GENERATED[kind])), data.draw(names), data.draw(rates), 200)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GENERATED)
@settings(max_examples=300, deadline=None, suppress_health_check=slow_to_draw)
@given(data=st.data())
def test_many_generated_options_give_torchs_numbers(kind, data):
    check(Row(kind, data.draw(GENERATED[kind])), data.draw(names), data.draw(rates), 200, data.draw(changes))


@pytest.mark.parametrize("kind", GENERATED)
@settings(max_examples=20, deadline=None, suppress_health_check=slow_to_draw)
@given(data=st.data())
def test_changed_rates_and_jumps_to_an_epoch_give_torchs_numbers(kind, data):
    check(Row(kind, data.draw(GENERATED[kind])), data.draw(names), data.draw(rates), 50, data.draw(changes))


@settings(max_examples=60, deadline=None, suppress_health_check=slow_to_draw)
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


@st.composite
def rows(draw: Any, depth: int = 3, chains: bool = True) -> Row:
    """A tree of schedulers without what torch gets wrong: chains in sequences, later sequences in sequences."""
    kind = draw(st.sampled_from(["leaf", "leaf", "SequentialLR"] + ["ChainedScheduler"] * chains)) if depth else "leaf"
    if kind == "ChainedScheduler":
        return chained(*draw(st.lists(rows(depth - 1), min_size=1, max_size=3)))
    if kind == "SequentialLR":
        first = draw(rows(depth - 1, chains=False))
        later = draw(st.lists(rows(0), max_size=3))
        at = draw(st.lists(st.integers(0, 60), min_size=len(later), max_size=len(later)))
        return sequential(first, *later, at=sorted(at))
    name = draw(st.sampled_from(list(GENERATED)))
    return Row(name, draw(GENERATED[name]))


@settings(max_examples=120, deadline=None, suppress_health_check=slow_to_draw)
@given(row=rows(), name=names, rates=rates)
def test_generated_trees_of_schedulers_give_torchs_numbers(row, name, rates):
    check_tree(row, name, rates, 90)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=slow_to_draw)
@given(row=rows(), name=names, rates=rates, doing=changes)
def test_many_generated_trees_of_schedulers_give_torchs_numbers(row, name, rates, doing):
    check_tree(row, name, rates, 120, {epoch: (group, rate, None) for epoch, (group, rate, _) in doing.items()})


def check_tree(row: Row, name: str, rates: Any, epochs: int, doing: Any = ()) -> None:
    assume(not any(one.name == "OneCycleLR" and no_length(one) for one in parts_of(row)))
    check(row, name, rates, epochs, doing)


def parts_of(row: Row) -> list[Row]:
    """A row and all that it is made of."""
    return [row, *(part for child in row.options.get("schedulers", []) for part in parts_of(child))]


def no_length(row: Row) -> bool:
    """Whether torch divides by the length of a phase that has none."""
    return ZeroDivisionError in outcome(Theirs, lambda side: iter([advance(built(row, side), 200)]))[0]


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


# What torch gets wrong, and its documentation promises.


def alone(row: Row, name: str = "SGD") -> Any:
    """The rates and momenta of a row by itself."""
    return [values_of(shown) for shown in following(built(row, Ours, name), 60)]


def values_of(shown: Any) -> Any:
    groups, _, last, _ = shown
    return [(group["lr"], group.get("momentum"), group.get("betas")) for group in groups], last


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
RESUMABLE = [row for row in [*SIMPLE, *MORE] if row.name not in ("SequentialLR", "ChainedScheduler")]


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


# Saving and loading.


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
@settings(max_examples=1000, deadline=None, suppress_health_check=slow_to_draw)
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


# Schedulers of one's own.


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


# Warnings.


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


def sum_of_squares(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


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


# Errors.


def raised(side: Any, run: Any) -> BaseException:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run(side)
        except Exception as error:
            return error
    pytest.fail(f"{side.__name__} raises nothing")


def same_error(run: Any) -> None:
    """``run(side)`` raises the same type on both sides, and ours begins with torch's message."""
    mine, parents = raised(Ours, run), raised(Theirs, run)
    assert type(mine) is type(parents)
    if parents.args:
        assert str(mine.args[0]).startswith(str(parents.args[0]))


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
    assert doc.count("\nArgs:\n") == doc.count("\nExample:\n") == doc.count("\nErrors:\n") == 1
    assert doc.count(".. math::") == 1
    arguments = re.findall(r"^    (\w+): ", doc.split("\nArgs:\n")[1].split("\n\n")[0], re.MULTILINE)
    assert arguments == list(inspect.signature(cls).parameters)
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            text = re.search(rf"^    {parameter.name}: (.*(?:\n        .*)*)", doc, re.MULTILINE)[1]
            assert "default" in text or "-1 for a new scheduler" in text
    assert ">>> " in doc.split("\nExample:\n")[1]


KINDS = list({row.name: row for row in [*SIMPLE, sequential(STEP, LINEAR, at=[5]), chained(STEP, LINEAR)]}.values())
"""A row of every class."""


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
