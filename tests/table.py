"""The one table of optimizers and option sets that drives the tests.

A new optimizer is one :class:`Row`. Everything parametrised by ``CASES`` covers it from then on: parity with
its parent in three precisions, complex and packed parameters, transformations, sharding, export, checkpoints.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
import pytest

import jaxoptim
from jaxoptim import Rule, rules

Options = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimizer: its rule, its parent, the option sets to test, and what it can be given.

    Attributes:
        rule: the class of the rule.
        path: the class of torch or Pyro, by its path, as tests of the pure face run without the two.
        options: option sets, keywords of both.
        twins: pairs of options and an optax transformation that should give the same numbers.
        namesake: the optax transformation of the same name, its own defaults but for the learning rate of
            the first option set; for the parity table.
        shapes: shapes of the parameters.
        wide_shapes: shapes with enough numbers to compare the statistics of rounding.
        complex: whether the parent takes complex parameters.
        sparse: whether the gradients must be sparse.
        sparse_options: option sets to test with sparse gradients too.
        flags: keywords that select the parent's single-tensor path.
    """

    rule: type[Rule]
    path: str
    options: list[Options]
    twins: list[tuple[Options, optax.GradientTransformation]] = dataclasses.field(default_factory=list)
    namesake: Callable[[], optax.GradientTransformation] | None = None
    shapes: tuple[tuple[int, ...], ...] = ((6, 4), (5,), ())
    wide_shapes: tuple[tuple[int, ...], ...] = ((48, 40), (600,))
    complex: bool = True
    sparse: bool = False
    sparse_options: list[Options] = dataclasses.field(default_factory=list)
    flags: Options = dataclasses.field(default_factory=lambda: {"foreach": False})

    @property
    def name(self) -> str:
        return self.rule.__name__

    @property
    def parent(self) -> Any:
        """The class of torch or Pyro."""
        return pkgutil.resolve_name(self.path)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row with one option set; printed as ``Adam-amsgrad=True``."""

    row: Row
    options: Options

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        return "-".join([self.row.name, *(f"{k}={v}".replace(" ", "") for k, v in self.options.items())])

    def ours(self, **changes: Any) -> Rule:
        return self.row.rule(**self.options | changes)

    def parents(self, params: Any) -> Any:
        return self.row.parent(params, **self.row.flags, **self.options)


ADAM_LIKE: list[Options] = [
    {},
    {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3},
    {"lr": 0.02, "betas": (0.0, 0.5)},
    {"lr": 0.02, "weight_decay": 0.1},
    {"lr": 0.02, "weight_decay": 0.1, "maximize": True},
]
DECOUPLED: list[Options] = [
    {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
]
AMSGRAD: list[Options] = [
    {"lr": 0.02, "amsgrad": True},
    {"lr": 0.02, "amsgrad": True, "weight_decay": 0.1, "maximize": True},
]

ROWS = [
    Row(
        rules.SGD,
        "torch.optim.SGD",
        [
            {"lr": 0.05},
            {},
            {"lr": 0.05, "weight_decay": 0.1},
            {"lr": 0.05, "maximize": True},
            {"lr": 0.05, "momentum": 0.9},
            {"lr": 0.05, "momentum": 0.9, "dampening": 0.5},
            {"lr": 0.05, "momentum": 0.9, "nesterov": True},
            {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1, "nesterov": True, "maximize": True},
            {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1, "dampening": 0.1, "maximize": True},
        ],
        twins=[
            ({"lr": 0.05}, optax.sgd(0.05)),
            ({"lr": 0.05, "momentum": 0.9}, optax.sgd(0.05, momentum=0.9)),
            ({"lr": 0.05, "momentum": 0.9, "nesterov": True}, optax.sgd(0.05, momentum=0.9, nesterov=True)),
            ({"lr": 0.05, "weight_decay": 0.1}, optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05))),
        ],
        namesake=lambda: optax.sgd(0.05),
        sparse_options=[{"lr": 0.05}, {"lr": 0.05, "momentum": 0.9}, {"lr": 0.05, "maximize": True}],
    ),
    Row(
        rules.Adam,
        "torch.optim.Adam",
        [*ADAM_LIKE, *AMSGRAD, *DECOUPLED],
        twins=[
            ({}, optax.adam(1e-3)),
            ({"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3}, optax.adam(0.02, 0.8, 0.95, 1e-3)),
            ({"lr": 0.02, "weight_decay": 0.1}, optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.02))),
        ],
        namesake=lambda: optax.adam(1e-3),
    ),
    Row(
        rules.AdamW,
        "torch.optim.AdamW",
        [*ADAM_LIKE, *AMSGRAD],
        twins=[
            ({}, optax.adamw(1e-3, weight_decay=1e-2)),
            ({"lr": 0.02, "weight_decay": 0.1}, optax.adamw(0.02, weight_decay=0.1)),
        ],
        namesake=lambda: optax.adamw(1e-3),
    ),
    Row(
        rules.NAdam,
        "torch.optim.NAdam",
        [*ADAM_LIKE, *DECOUPLED, {"lr": 0.02, "momentum_decay": 0.1}, {"lr": 0.02, "momentum_decay": 0.0}],
        namesake=lambda: optax.nadam(2e-3),
    ),
    Row(
        rules.RAdam,
        "torch.optim.RAdam",
        [*ADAM_LIKE, *DECOUPLED],
        twins=[({"lr": 0.02, "eps": 0.0}, optax.radam(0.02, eps=0.0))],
        namesake=lambda: optax.radam(1e-3),
    ),
    Row(
        rules.Adamax,
        "torch.optim.Adamax",
        ADAM_LIKE,
        twins=[({}, optax.adamax(2e-3))],
        namesake=lambda: optax.adamax(2e-3),
    ),
    Row(
        rules.Adadelta,
        "torch.optim.Adadelta",
        [
            {},
            {"lr": 0.5, "rho": 0.7, "eps": 1e-3},
            {"rho": 1.0},
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "maximize": True},
        ],
        twins=[({}, optax.adadelta(1.0)), ({"weight_decay": 0.1}, optax.adadelta(1.0, weight_decay=0.1))],
        namesake=lambda: optax.adadelta(1.0),
    ),
    Row(
        rules.Adagrad,
        "torch.optim.Adagrad",
        [
            {},
            {"lr": 0.1, "lr_decay": 0.05},
            {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3},
            {"lr": 0.1, "weight_decay": 0.1},
            {"lr": 0.1, "weight_decay": 0.1, "lr_decay": 0.01, "maximize": True},
        ],
        twins=[
            (
                {"lr": 0.1, "initial_accumulator_value": 0.1, "eps": 0.0},
                optax.adagrad(0.1, initial_accumulator_value=0.1, eps=0.0),
            )
        ],
        namesake=lambda: optax.adagrad(1e-2),
        sparse_options=[{}, {"lr": 0.1, "lr_decay": 0.05, "initial_accumulator_value": 0.5, "maximize": True}],
    ),
    Row(
        rules.RMSprop,
        "torch.optim.RMSprop",
        [
            {},
            {"alpha": 0.8, "eps": 1e-3},
            {"weight_decay": 0.1},
            {"momentum": 0.9},
            {"centered": True},
            {"centered": True, "momentum": 0.5, "weight_decay": 0.1, "maximize": True},
        ],
        twins=[
            ({}, optax.rmsprop(1e-2, decay=0.99, eps_in_sqrt=False)),
            ({"centered": True}, optax.rmsprop(1e-2, decay=0.99, eps_in_sqrt=False, centered=True)),
            ({"momentum": 0.9}, optax.rmsprop(1e-2, decay=0.99, eps_in_sqrt=False, momentum=0.9)),
        ],
        namesake=lambda: optax.rmsprop(1e-2),
    ),
    Row(
        rules.Rprop,
        "torch.optim.Rprop",
        [
            {},
            {"lr": 100.0},
            {"lr": 1e-9},
            {"lr": 0.05, "etas": (0.3, 1.5), "step_sizes": (1e-3, 0.2)},
            {"lr": 0.05, "maximize": True},
        ],
        namesake=lambda: optax.rprop(1e-2),
    ),
    Row(
        rules.ASGD,
        "torch.optim.ASGD",
        [
            {},
            {"lr": 0.05, "lambd": 0.1, "alpha": 0.5},
            {"lr": 0.05, "t0": 100.0},
            {"lr": 0.05, "t0": 0.0, "lambd": 0.01},
            {"lr": 0.05, "weight_decay": 0.1, "maximize": True},
        ],
    ),
    Row(
        rules.Adafactor,
        "torch.optim.Adafactor",
        [
            {},
            {"lr": 0.1, "beta2_decay": -0.5, "eps": (1e-3, 1e-2), "d": 2.0},
            {"lr": 0.1, "weight_decay": 0.1},
            {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
            {"lr": 10.0},
        ],
        namesake=lambda: optax.adafactor(1e-2),
        shapes=((6, 4), (5,), (), (2, 3, 4)),
        complex=False,
    ),
    Row(
        rules.Muon,
        "torch.optim.Muon",
        [
            {},
            {"lr": 0.02, "momentum": 0.5, "nesterov": False, "weight_decay": 0.0},
            {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
            {"lr": 0.02, "adjust_lr_fn": "original", "eps": 1e-3, "ns_coefficients": (2.0, -1.5, 0.5)},
        ],
        namesake=lambda: optax.contrib.muon(1e-3),
        shapes=((6, 4), (4, 6), (5, 3)),
        wide_shapes=((6, 4), (4, 6)) * 12,
        complex=False,
        flags={},
    ),
    Row(
        rules.SparseAdam,
        "torch.optim.SparseAdam",
        [
            {},
            {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3},
            {"lr": 0.02, "maximize": True},
        ],
        shapes=((12, 4), (9,), (7, 2, 3)),
        complex=False,
        sparse=True,
        flags={},
    ),
    Row(
        rules.AdagradRMSProp,
        "pyro.optim.adagrad_rmsprop.AdagradRMSProp",
        [{}, {"eta": 0.1, "delta": 0.1, "t": 0.5}],
        complex=False,
        flags={},
    ),
    Row(
        rules.ClippedAdam,
        "pyro.optim.clipped_adam.ClippedAdam",
        [
            {},
            {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "clip_norm": 0.5},
            {"lr": 0.02, "weight_decay": 0.1, "lrd": 0.99},
            {"lr": 0.02, "centered_variance": True},
            {"lr": 0.02, "centered_variance": True, "weight_decay": 0.1, "clip_norm": 1.0, "lrd": 0.999},
        ],
        complex=False,
        flags={},
    ),
    Row(
        rules.DCTAdam,
        "pyro.optim.dct_adam.DCTAdam",
        [
            {},
            {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "clip_norm": 0.5, "lrd": 0.99},
            {"lr": 0.02, "subsample_aware": True},
        ],
        complex=False,
        flags={},
    ),
]

OWN_OPTIONS = {"DCTAdam": ["dct_dim", "subsample"], "Muon": ["flatten"]}
"""Options of groups that the parent does not have."""

CASES = [Case(row, options) for row in ROWS for options in row.options]
"""Every row with every one of its option sets."""

FIRST = [Case(row, row.options[0]) for row in ROWS]
"""Every row once."""

FORMS = [
    case
    for case in FIRST
    if case.row.name in ("SGD", "Adam", "NAdam", "Adafactor", "Muon", "SparseAdam", "ClippedAdam")
]
"""A row for each form of state and of step, which is enough for fast tests of what stands around a rule: without slots,
with slots like the parameters, with numbers, factored, of matrices, of rows, and with a rate of its own that decays."""


def slow_unless(is_fast: Callable[[Case], bool], cases: list[Case]) -> list[Any]:
    """Cases as parameters of a test, those that are not fast left to ``make test-slow``."""
    return [pytest.param(case, id=str(case), marks=[] if is_fast(case) else pytest.mark.slow) for case in cases]


def of_numbers_if_muon(cases: list[Case]) -> list[Any]:
    """Cases as parameters of a test. Muon rounds to bfloat16 on its way: its last bits are those of the code."""
    marks = {rules.Muon: pytest.mark.numbers}
    return [pytest.param(case, id=str(case), marks=marks.get(case.row.rule, [])) for case in cases]


SPARSE = [
    *(case for case in CASES if case.row.sparse),
    *(Case(row, options) for row in ROWS for options in row.sparse_options),
]
"""The cases to run with sparse gradients."""


def one_of_each_state() -> list[Case]:
    """The first option set of each row for every set of slots that the row can have."""
    found: dict[tuple[str, ...], Case] = {}
    for case in CASES:
        slots = jaxoptim.init(case.ours(), jnp.ones((2, 2))).slots
        found.setdefault((case.row.name, *slots), case)
    return list(found.values())


STATES = one_of_each_state()
