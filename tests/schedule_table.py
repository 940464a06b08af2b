"""The one table of option sets of torch's learning-rate schedulers that drives the tests.

A row is a class of torch with its keywords. It builds the class, torch's or one of the same name, around an
optimizer, and the pure schedule that should give the same rates. A scheduler made of schedulers has rows among
its options, so that both are built in the same way at any depth.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import torch

from jaxoptim import schedules

LR = 0.1
"""The base rate: the rate of the optimizer that a scheduler is built around."""

TORCH = types.SimpleNamespace(**vars(torch.optim.lr_scheduler), SWALR=torch.optim.swa_utils.SWALR)
"""torch's classes, in one namespace."""

PURE = {
    "LambdaLR": schedules.lambda_lr,
    "MultiplicativeLR": schedules.multiplicative_lr,
    "StepLR": schedules.step_lr,
    "MultiStepLR": schedules.multi_step_lr,
    "ConstantLR": schedules.constant_lr,
    "LinearLR": schedules.linear_lr,
    "ExponentialLR": schedules.exponential_lr,
    "PolynomialLR": schedules.polynomial_lr,
    "CosineAnnealingLR": schedules.cosine_annealing_lr,
    "CosineAnnealingWarmRestarts": schedules.cosine_annealing_warm_restarts,
    "CyclicLR": schedules.cyclic_lr,
    "OneCycleLR": schedules.one_cycle_lr,
    "SWALR": schedules.swa_lr,
    "SequentialLR": schedules.sequential_lr,
    "ChainedScheduler": schedules.chained,
}
"""The function for each class."""

BASE = {"CyclicLR": "base_lr", "OneCycleLR": "max_lr"}
"""The keyword in which a schedule takes its base rate, where it is not ``lr``."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A scheduler: the name of torch's class, and its keywords.

    Attributes:
        name: the name of the class.
        options: its keywords; ``schedulers`` are rows.
    """

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> str:
        """A readable name, such as ``StepLR-step_size=7-gamma=0.5``."""
        return "-".join([self.name, *(f"{name}={_shown(value)}" for name, value in self.options.items())])

    def __str__(self) -> str:
        return self.id

    @property
    def has_momentum(self) -> bool:
        """Whether the class cycles the momentum of its optimizer too."""
        return self.name in BASE and self.options.get("cycle_momentum", True)

    def values(self, most: int) -> int:
        """How many values can be compared, at most ``most``: one cycle has an end, past which torch goes wrong."""
        if self.name != "OneCycleLR":
            return most
        total = self.options.get("total_steps")
        return min(most, total or self.options["epochs"] * self.options["steps_per_epoch"])

    def scheduler(self, classes: Any, optimizer: Any) -> Any:
        """The class around an optimizer whose rate is :data:`LR`; ``classes`` has the classes as attributes."""
        options = self.options
        if "schedulers" not in options:
            return getattr(classes, self.name)(optimizer, **options)
        options = options | {"schedulers": [part.scheduler(classes, optimizer) for part in options["schedulers"]]}
        return getattr(classes, self.name)(optimizer=optimizer, **options)

    def schedule(self, lr: Any = LR) -> schedules.Schedule:
        """The pure schedule for a base rate."""
        options = dict(self.options)
        if "schedulers" in options:
            options["schedulers"] = [part.schedule(lr) for part in options["schedulers"]]
        keyword = BASE.get(self.name, "lr")
        scale = options.pop(keyword, LR) / LR
        return PURE[self.name](**{keyword: lr * scale}, **options)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(_shown(item) for item in value)}]"
    return value.__name__ if callable(value) else str(value)


# The functions take Python's integers from torch and traced arrays from JAX.


def inverse_time(n):
    return 1.0 / (1.0 + 0.1 * n)


def halving(n):
    return 0.5 ** (n // 30)


def warmup(n):
    return (n < 10) * (0.1 * (n + 1)) + (n >= 10) * 1.0


def counting(n):
    return n // 30


def constant(n):
    return 0.95


def three_quarters_now_and_then(n):
    return 1.0 - 0.25 * (n % 4 == 0)


def by_cycle(cycle):
    return 0.8 ** (cycle - 1.0)


def by_iteration(n):
    return 1.0 / (1.0 + 0.01 * n)


SIMPLE = [
    Row("LambdaLR", {"lr_lambda": inverse_time}),
    Row("LambdaLR", {"lr_lambda": halving}),
    Row("LambdaLR", {"lr_lambda": warmup}),
    Row("LambdaLR", {"lr_lambda": counting}),
    Row("MultiplicativeLR", {"lr_lambda": constant}),
    Row("MultiplicativeLR", {"lr_lambda": three_quarters_now_and_then}),
    Row("StepLR", {"step_size": 30}),
    Row("StepLR", {"step_size": 7, "gamma": 0.5}),
    Row("StepLR", {"step_size": 1, "gamma": 0.97}),
    Row("StepLR", {"step_size": 20, "gamma": 1.3}),
    Row("StepLR", {"step_size": 20, "gamma": 0.0}),
    Row("MultiStepLR", {"milestones": [30, 80]}),
    Row("MultiStepLR", {"milestones": [20, 10, 20, 50, 20], "gamma": 0.3}),
    Row("MultiStepLR", {"milestones": [0, 5], "gamma": 0.5}),
    Row("MultiStepLR", {"milestones": []}),
    Row("MultiStepLR", {"milestones": list(range(1, 200, 10)), "gamma": 0.93}),
    Row("ConstantLR"),
    Row("ConstantLR", {"factor": 0.5, "total_iters": 40}),
    Row("ConstantLR", {"factor": 1.0, "total_iters": 1}),
    Row("ConstantLR", {"factor": 0.25, "total_iters": 0}),
    Row("ConstantLR", {"factor": 0.0, "total_iters": 10**7}),
    Row("LinearLR"),
    Row("LinearLR", {"start_factor": 1.0, "end_factor": 0.1, "total_iters": 100}),
    Row("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 250}),
    Row("LinearLR", {"start_factor": 0.01, "end_factor": 1.0, "total_iters": 70}),
    Row("LinearLR", {"start_factor": 0.7, "end_factor": 0.2, "total_iters": 1}),
    Row("LinearLR", {"start_factor": 0.7, "end_factor": 0.2, "total_iters": 0}),
    Row("ExponentialLR", {"gamma": 0.95}),
    Row("ExponentialLR", {"gamma": 0.999}),
    Row("ExponentialLR", {"gamma": 1.0}),
    Row("ExponentialLR", {"gamma": 1.02}),
    Row("ExponentialLR", {"gamma": 0.5}),
    Row("ExponentialLR", {"gamma": 0.0}),
    Row("PolynomialLR"),
    Row("PolynomialLR", {"total_iters": 100, "power": 2.0}),
    Row("PolynomialLR", {"total_iters": 250, "power": 0.5}),
    Row("PolynomialLR", {"total_iters": 250, "power": 1.0}),
    Row("PolynomialLR", {"total_iters": 250, "power": 0.9}),
    Row("PolynomialLR", {"total_iters": 50, "power": 0.0}),
    Row("PolynomialLR", {"total_iters": 1, "power": 3.0}),
    Row("PolynomialLR", {"total_iters": 0}),
    Row("CosineAnnealingLR", {"T_max": 50}),
    Row("CosineAnnealingLR", {"T_max": 50, "eta_min": 0.01}),
    Row("CosineAnnealingLR", {"T_max": 299}),
    Row("CosineAnnealingLR", {"T_max": 7, "eta_min": 0.3}),
    Row("CosineAnnealingLR", {"T_max": 2, "eta_min": 1e-3}),
    Row("CosineAnnealingLR", {"T_max": 1}),
    Row("CosineAnnealingWarmRestarts", {"T_0": 40}),
    Row("CosineAnnealingWarmRestarts", {"T_0": 10, "T_mult": 2, "eta_min": 0.01}),
    Row("CosineAnnealingWarmRestarts", {"T_0": 4, "T_mult": 3, "eta_min": 1e-4}),
    Row("CosineAnnealingWarmRestarts", {"T_0": 1, "T_mult": 2}),
    Row("CosineAnnealingWarmRestarts", {"T_0": 1}),
    Row("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5}),
    Row("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 20}),
    Row("CyclicLR", {"base_lr": 0.0, "max_lr": 0.5, "step_size_up": 70}),
    Row("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 20, "step_size_down": 7}),
    Row("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 20, "step_size_down": 0}),
    Row("CyclicLR", {"base_lr": 0.5, "max_lr": 0.1, "step_size_up": 1, "step_size_down": 10}),
    Row("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 10, "mode": "triangular2"}),
    Row("CyclicLR", {"base_lr": 0.01, "max_lr": 0.5, "step_size_up": 10, "mode": "exp_range", "gamma": 0.99}),
    Row("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 10, "scale_fn": by_cycle}),
    Row(
        "CyclicLR",
        {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 10, "scale_fn": by_iteration, "scale_mode": "iterations"},
    ),
    Row("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 10, "cycle_momentum": False}),
    Row(
        "CyclicLR",
        {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 13, "base_momentum": 0.5, "max_momentum": 0.99},
    ),
    Row("OneCycleLR", {"max_lr": 0.5, "total_steps": 300}),
    Row(
        "OneCycleLR",
        {"max_lr": 0.5, "epochs": 10, "steps_per_epoch": 25, "base_momentum": 0.5, "max_momentum": 0.99},
    ),
    Row("OneCycleLR", {"max_lr": 0.5, "total_steps": 300, "anneal_strategy": "linear"}),
    Row("OneCycleLR", {"max_lr": 0.5, "total_steps": 300, "three_phase": True}),
    Row("OneCycleLR", {"max_lr": 0.5, "total_steps": 300, "three_phase": True, "anneal_strategy": "linear"}),
    Row("OneCycleLR", {"max_lr": 0.5, "total_steps": 100, "three_phase": True, "pct_start": 0.6}),
    Row(
        "OneCycleLR",
        {"max_lr": 0.5, "total_steps": 201, "pct_start": 0.25, "div_factor": 10.0, "final_div_factor": 100.0},
    ),
    Row("OneCycleLR", {"max_lr": 0.5, "total_steps": 100, "pct_start": 0.0}),
    Row("OneCycleLR", {"max_lr": 0.5, "total_steps": 100, "pct_start": 1.0, "cycle_momentum": False}),
    Row("OneCycleLR", {"max_lr": 0.5, "total_steps": 1}),
    Row("SWALR", {"swa_lr": 0.05}),
    Row("SWALR", {"swa_lr": 0.3, "anneal_epochs": 200}),
    Row("SWALR", {"swa_lr": 0.05, "anneal_strategy": "linear"}),
    Row("SWALR", {"swa_lr": 1e-4, "anneal_epochs": 200, "anneal_strategy": "linear"}),
    Row("SWALR", {"swa_lr": 0.05, "anneal_epochs": 0}),
    Row("SWALR", {"swa_lr": 0.05, "anneal_epochs": 1}),
    Row("SWALR", {"swa_lr": 0.05, "anneal_epochs": 1, "anneal_strategy": "linear"}),
]
"""Every class with every option."""


def sequential(*parts: Row, at: list[int]) -> Row:
    return Row("SequentialLR", {"schedulers": list(parts), "milestones": at})


def chained(*parts: Row) -> Row:
    return Row("ChainedScheduler", {"schedulers": list(parts)})


CONSTANT = Row("ConstantLR", {"factor": 0.5, "total_iters": 20})
LINEAR = Row("LinearLR", {"start_factor": 0.1, "total_iters": 10})
EXPONENTIAL = Row("ExponentialLR", {"gamma": 0.97})
STEP = Row("StepLR", {"step_size": 7, "gamma": 0.5})
MULTISTEP = Row("MultiStepLR", {"milestones": [0, 40, 40, 90], "gamma": 0.6})
COSINE = Row("CosineAnnealingLR", {"T_max": 30})
RAISED_COSINE = Row("CosineAnnealingLR", {"T_max": 30, "eta_min": 0.01})
RESTARTS = Row("CosineAnnealingWarmRestarts", {"T_0": 10, "T_mult": 2, "eta_min": 0.001})
LAMBDA = Row("LambdaLR", {"lr_lambda": inverse_time})
MULTIPLICATIVE = Row("MultiplicativeLR", {"lr_lambda": three_quarters_now_and_then})
POLYNOMIAL = Row("PolynomialLR", {"total_iters": 150, "power": 2.0})
CYCLIC = Row("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 6, "step_size_down": 9})
ONE_CYCLE = Row("OneCycleLR", {"max_lr": 2.5, "total_steps": 50})  # begins at LR, so the base rate stays what it is
AVERAGING = Row("SWALR", {"swa_lr": 0.05})

COMPOSITE = [
    sequential(EXPONENTIAL, at=[]),
    sequential(CONSTANT, EXPONENTIAL, at=[20]),
    sequential(LINEAR, RAISED_COSINE, at=[10]),
    sequential(CONSTANT, STEP, MULTISTEP, at=[10, 35]),
    sequential(LINEAR, RESTARTS, LAMBDA, at=[10, 60]),
    sequential(LINEAR, CYCLIC, POLYNOMIAL, at=[8, 90]),
    sequential(ONE_CYCLE, STEP, at=[50]),
    sequential(CONSTANT, EXPONENTIAL, at=[0]),
    sequential(CONSTANT, EXPONENTIAL, STEP, at=[12, 12]),
    sequential(MULTIPLICATIVE, EXPONENTIAL, at=[30]),
    sequential(AVERAGING, COSINE, at=[15]),
    chained(EXPONENTIAL),
    chained(CONSTANT, EXPONENTIAL),
    chained(LINEAR, STEP, MULTISTEP),
    chained(STEP, STEP),
    chained(POLYNOMIAL, MULTISTEP),
    chained(CONSTANT, COSINE),
    chained(EXPONENTIAL, LAMBDA),
    chained(LAMBDA, EXPONENTIAL),
    chained(RESTARTS, STEP),
    chained(STEP, CYCLIC, MULTISTEP, LINEAR),
    chained(LAMBDA, Row("CosineAnnealingWarmRestarts", {"T_0": 40}), CONSTANT),
    chained(EXPONENTIAL, CYCLIC),
    chained(CYCLIC, LINEAR),
    chained(chained(CONSTANT, EXPONENTIAL), STEP),
    # torch's cosine rises from its minimum to the base rate, whatever the others have done until then.
    chained(STEP, COSINE),
    # A factor that has come to 0 and stays there is 1 from then on to what starts from the base rate.
    chained(RESTARTS, Row("PolynomialLR", {"total_iters": 50})),
    chained(RESTARTS, Row("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 50})),
    # torch's sequence starts from the base rate at each milestone and when it is made.
    chained(sequential(CONSTANT, EXPONENTIAL, at=[20]), STEP),
    chained(CONSTANT, sequential(CONSTANT, EXPONENTIAL, at=[20])),
    # A chain that starts from the base rate at each step does so inside another chain too.
    chained(EXPONENTIAL, chained(LAMBDA, STEP)),
    chained(chained(LAMBDA, STEP), EXPONENTIAL),
]
"""Schedulers made of others."""

ROWS = [*SIMPLE, *COMPOSITE]
"""Every class with every option, and their compositions."""

DISPUTED = [
    sequential(CONSTANT, AVERAGING, at=[10]),
    sequential(COSINE, MULTIPLICATIVE, at=[10]),
    # torch's sequence asks the closed form for the first value, which passes over the factor here.
    sequential(EXPONENTIAL, Row("ConstantLR", {"total_iters": 0}), at=[10]),
]
"""Sequences of torch's classes in which a scheduler starts from the rate that it finds, and not from the base rate."""

CLASS_ONLY = [
    chained(LAMBDA, COSINE),
    chained(STEP, RAISED_COSINE),
    chained(EXPONENTIAL, AVERAGING),
    chained(AVERAGING, EXPONENTIAL),
]
"""Compositions of which there is no pure schedule, because what a step does depends on all steps before."""

LONG = [
    Row("StepLR", {"step_size": 1000, "gamma": 0.97}),
    Row("ExponentialLR", {"gamma": 0.999}),
    Row("PolynomialLR", {"total_iters": 9000, "power": 0.9}),
    Row("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 9000}),
    Row("CosineAnnealingLR", {"T_max": 50}),
    Row("CosineAnnealingLR", {"T_max": 777, "eta_min": 0.01}),
    Row("CosineAnnealingLR", {"T_max": 999, "eta_min": 0.01}),
    Row("CosineAnnealingWarmRestarts", {"T_0": 10, "T_mult": 3, "eta_min": 1e-4}),
    Row("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 7, "step_size_down": 3}),
    # torch's 2.0**(cycle - 1) overflows at 1,024 cycles, which are a million steps here.
    Row("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 600, "step_size_down": 400, "mode": "triangular2"}),
    Row("OneCycleLR", {"max_lr": 0.5, "total_steps": 10**4}),
    Row("SWALR", {"swa_lr": 0.01, "anneal_epochs": 9000, "anneal_strategy": "linear"}),
    chained(RESTARTS, Row("StepLR", {"step_size": 700, "gamma": 0.99})),
]
"""Schedules of thousands of steps."""

LONGER = [
    Row("LambdaLR", {"lr_lambda": inverse_time}),
    Row("MultiStepLR", {"milestones": list(range(5000, 10**6, 45000)), "gamma": 0.7}),
    Row("ConstantLR", {"factor": 0.3, "total_iters": 3000}),
    Row("LinearLR", {"start_factor": 1e-3, "total_iters": 10**5}),
    Row("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 10**6}),
    Row("ExponentialLR", {"gamma": 0.99999}),
    Row("PolynomialLR", {"total_iters": 10**6, "power": 2.0}),
    Row("CosineAnnealingLR", {"T_max": 10**6}),
    Row("CosineAnnealingLR", {"T_max": 4999}),
    Row("CosineAnnealingLR", {"T_max": 10**5, "eta_min": 0.01}),
    Row("CosineAnnealingLR", {"T_max": 10**6, "eta_min": 0.001}),
    Row("CosineAnnealingWarmRestarts", {"T_0": 999}),
    Row("CosineAnnealingWarmRestarts", {"T_0": 1000, "T_mult": 2, "eta_min": 1e-4}),
    Row("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5}),
    Row("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "mode": "exp_range", "gamma": 0.99999}),
    Row("OneCycleLR", {"max_lr": 0.5, "total_steps": 10**6}),
    Row("OneCycleLR", {"max_lr": 0.5, "total_steps": 10**6 - 3, "three_phase": True, "pct_start": 0.4321}),
    Row("OneCycleLR", {"max_lr": 0.5, "total_steps": 10**6, "anneal_strategy": "linear"}),
    Row("SWALR", {"swa_lr": 0.01, "anneal_epochs": 10**6}),
    sequential(
        Row("LinearLR", {"start_factor": 0.01, "total_iters": 2000}),
        Row("CosineAnnealingLR", {"T_max": 10**6 - 2000}),
        at=[2000],
    ),
    chained(
        Row("LinearLR", {"start_factor": 0.01, "total_iters": 2000}),
        Row("ExponentialLR", {"gamma": 0.99999}),
    ),
    chained(
        Row("CosineAnnealingWarmRestarts", {"T_0": 1000}),
        Row("StepLR", {"step_size": 3000, "gamma": 0.9}),
    ),
]
"""Schedules of a million steps."""
