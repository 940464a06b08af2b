"""The learning-rate schedulers over our optimizers and over torch's: the same program on both sides.

A program is a generator over a side, ours or torch's. It yields what a user can see, and both sides must yield
the same: numbers equal as Python's floats are, and the warnings on the way.
"""

import functools
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st

from jaxoptim import optim
from jaxoptim.optim import lr_scheduler
from schedule_table import (
    CLASS_ONLY,
    CONSTANT,
    CYCLIC,
    EXPONENTIAL,
    LAMBDA,
    LINEAR,
    LR,
    MULTIPLICATIVE,
    MULTISTEP,
    ONE_CYCLE,
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
    for group in groups:  # one gradient that came and went: ours warns of steps before there was any
        group["params"][0].grad = side.array(0.0)
        group["params"][0].grad = None
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
slow_to_draw = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


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


def parts_of(row: Row) -> list[Row]:
    """A row and all that it is made of."""
    return [row, *(part for child in row.options.get("schedulers", []) for part in parts_of(child))]


def no_length(row: Row) -> bool:
    """Whether torch divides by the length of a phase that has none."""
    return ZeroDivisionError in outcome(Theirs, lambda side: iter([advance(built(row, side), 200)]))[0]


def values_of(shown: Any) -> Any:
    groups, _, last, _ = shown
    return [(group["lr"], group.get("momentum"), group.get("betas")) for group in groups], last


RESUMABLE = [row for row in [*SIMPLE, *MORE] if row.name not in ("SequentialLR", "ChainedScheduler")]


def sum_of_squares(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


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
