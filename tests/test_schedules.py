"""The pure schedules: their values against torch's schedulers, their use as a rate, and the plateau machine."""

import copy
import dataclasses
import functools
import inspect
import math
import pickle
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.experimental.sparse import BCOO

import jaxoptim
from jaxoptim import rules, schedules
from jaxoptim.core import Hyperparameters
from schedule_table import (
    BASE,
    CLASS_ONLY,
    CONSTANT,
    CYCLIC,
    DISPUTED,
    EXPONENTIAL,
    LAMBDA,
    LINEAR,
    LONG,
    LONGER,
    LR,
    ONE_CYCLE,
    PURE,
    RESTARTS,
    ROWS,
    SIMPLE,
    STEP,
    TORCH,
    Row,
    chained,
    inverse_time,
    sequential,
)

matplotlib.use("agg")

STEPS = 300
MANY = 10**4
MILLION = 10**6
BY_ID = {row.id: row for row in [*ROWS, *DISPUTED, *LONG, *LONGER]}
# For each class, the row that sets the most.
EXAMPLES = [
    max(
        (row for row in ROWS if row.name == name),
        key=lambda row: len(row.options) + len(row.options.get("schedulers", [])),
    )
    for name in PURE
]


def quick(cases, every):
    """All cases, of which the fast suite runs one in ``every``."""
    return [
        case if index % every == 0 else pytest.param(case, marks=pytest.mark.slow) for index, case in enumerate(cases)
    ]


MOMENTA = [row for row in SIMPLE if row.has_momentum]


def rate_of(group):
    return group["lr"]


def momentum_of(group):
    return group["momentum"] if "momentum" in group else group["betas"][0]


def run_parent(row, steps, read=rate_of, optimizer=torch.optim.SGD):
    """What torch's scheduler sets, before its first step and after each."""
    momentum = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    optimizer = optimizer([torch.zeros(1, requires_grad=True)], lr=LR, **momentum)
    scheduler = row.scheduler(TORCH, optimizer)
    optimizer.step()  # torch warns of a scheduler that is stepped first
    (group,) = optimizer.param_groups
    values = [read(group)]
    for _ in range(steps - 1):
        scheduler.step()
        values.append(read(group))
    return np.array(values)


@functools.cache
def parents(name, steps):
    return run_parent(BY_ID[name], BY_ID[name].values(steps))


def counted(steps):
    """The steps as the state of an optimizer has them: in int32, in float64 too."""
    return jnp.arange(steps, dtype=jnp.int32)


def values_of(rows, steps, schedule_of=Row.schedule):
    """The values of all rows in one program, with the steps as its argument: known ones would be folded."""

    @jax.jit
    def run(steps):
        return {row.id: jax.vmap(schedule_of(row))(steps[: row.values(len(steps))]) for row in rows}

    return jax.tree.map(np.asarray, run(counted(steps)))


def values_of_arguments(rows, steps):
    """The same with the schedules as arguments, so that no number is known when the program is made."""

    @jax.jit
    def run(schedules, steps):
        return {row.id: jax.vmap(schedules[row.id])(steps[: row.values(len(steps))]) for row in rows}

    return jax.tree.map(np.asarray, run({row.id: row.schedule() for row in rows}, counted(steps)))


def assert_close(ours, parent, relative, absolute, name):
    """Every value within a relative tolerance of its own, and within an absolute one in units of the largest."""
    assert ours.shape == parent.shape
    top = np.abs(parent).max()
    error, allowed = np.abs(ours.astype(np.float64) - parent), relative * np.abs(parent) + absolute * top
    wrong = ~(error <= allowed)
    if wrong.any():
        with np.errstate(divide="ignore", invalid="ignore"):
            worst = np.argmax(np.where(wrong, error / allowed, 0))
            own = error[worst] / np.abs(parent[worst])
            largest = error[worst] / top
        pytest.fail(
            f"{name}: {wrong.sum()} of {len(wrong)} values differ from torch's, at first at step {wrong.argmax()}; at "
            f"worst at step {worst}: {ours[worst]!r} instead of {parent[worst]!r}, relative error {own:.2g}, "
            f"{largest:.2g} of the largest value",
            pytrace=False,
        )


def assert_double(ours, parent, tolerance=1e-12, name="float64"):
    assert ours.dtype == np.float64
    assert_close(ours, parent, 0.0, tolerance, name)


def assert_single(ours, parent, name="float32"):
    # Below 1e-12 of the largest rate, torch's own values are the rounding errors of a difference.
    assert ours.dtype == np.float32
    there = np.abs(parent) <= np.finfo(np.float32).max
    assert_close(ours[there], parent[there], 1e-6, 1e-12, name)


# The values.


@functools.cache
def doubles():
    with jax.enable_x64(True):
        return values_of_arguments(ROWS, STEPS)


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_value_in_float64(row):
    assert_double(doubles()[row.id], parents(row.id, STEPS))


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize("row", DISPUTED, ids=str)
def test_a_sequence_starts_every_schedule_from_the_base_rate(row, x64):
    (first, second), (milestone,) = row.options["schedulers"], row.options["milestones"]
    ours = jax.vmap(row.schedule())(jnp.arange(milestone + 30))
    parts = [jax.vmap(first.schedule())(jnp.arange(milestone)), jax.vmap(second.schedule())(jnp.arange(30))]
    np.testing.assert_allclose(ours, np.concatenate(parts), rtol=1e-12)


@functools.cache
def singles():
    return values_of_arguments(ROWS, STEPS)


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_value_in_float32(row):
    assert_single(singles()[row.id], parents(row.id, STEPS))


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize("rows", [[*EXAMPLES], SIMPLE], ids=["examples", "rows"])
def test_every_value_in_float32_of_schedules_that_the_compiler_knows(rows):
    for name, values in values_of(rows, STEPS).items():
        assert_single(values, parents(name, STEPS), name)


# The others of thousands of steps have come to their end within ten thousand.
A_MILLION = [row for row in LONG if row.name.startswith(("Step", "Cosine", "Cyclic"))] + LONGER


@functools.cache
def long_values(steps, double):
    with jax.enable_x64(double):
        return values_of_arguments(LONG if steps == MANY else A_MILLION, steps)


def documented(row):
    """The tolerance of a row in float64: two docstrings state a larger one, for what torch's recursion rounds."""
    if row.name == "CosineAnnealingLR" and "eta_min" in row.options:
        return max(1e-12, 1e-10 * (row.options["T_max"] / 5000) ** 2)
    return 1e-11 if row.name == "LinearLR" and row.options["total_iters"] >= 10**6 else 1e-12


@pytest.mark.costly
@pytest.mark.numbers
@pytest.mark.parametrize("row", LONG, ids=str)
def test_ten_thousand_values_in_float64(row):
    assert_double(long_values(MANY, True)[row.id], parents(row.id, MANY), documented(row))


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize("row", LONG, ids=str)
def test_ten_thousand_values_in_float32(row):
    assert_single(long_values(MANY, False)[row.id], parents(row.id, MANY))


@pytest.mark.numbers
@pytest.mark.slow
@pytest.mark.parametrize("row", A_MILLION, ids=str)
def test_a_million_values(row):
    parent = run_parent(row, row.values(MILLION))  # once for both precisions, and not kept
    assert_double(long_values(MILLION, True)[row.id], parent, documented(row))
    assert_single(long_values(MILLION, False)[row.id], parent)


@pytest.mark.numbers
@pytest.mark.parametrize("steps", [MANY, pytest.param(MILLION, marks=pytest.mark.slow)])
def test_a_product_of_many_factors(steps):
    # One call multiplies all factors before its step, so a call at every step would be their square.
    schedule = schedules.multiplicative_lr(LR, lambda n: 0.99999)
    assert float(jax.jit(schedule)(steps)) == pytest.approx(LR * 0.99999**steps, rel=1e-6)
    with jax.enable_x64(True):
        assert float(jax.jit(schedule)(steps)) == pytest.approx(
            LR * 0.99999**steps, rel=1e-10 if steps > MANY else 1e-12
        )


def floats(low, high):
    """Numbers of some size: XLA takes those below the smallest normal one for 0."""
    return st.floats(low or 1e-6, high) | st.just(low)


def inverse_power(rate):
    return lambda n: 1.0 / (1.0 + rate * n)


RATES = floats(0.0, 1.0)
STRATEGIES = {
    "LambdaLR": {"lr_lambda": RATES.map(inverse_power)},
    "MultiplicativeLR": {"lr_lambda": RATES.map(inverse_power)},
    "StepLR": {"step_size": st.integers(1, 50), "gamma": floats(0.0, 1.1)},
    "MultiStepLR": {"milestones": st.lists(st.integers(0, 50), max_size=10), "gamma": floats(0.0, 1.1)},
    # torch divides by the factor; in a sequence it passes over one that is never taken back.
    "ConstantLR": {"factor": floats(1e-3, 1.0), "total_iters": st.integers(1, 50)},
    "LinearLR": {"start_factor": floats(1e-3, 1.0), "end_factor": floats(0.0, 1.0), "total_iters": st.integers(1, 50)},
    "ExponentialLR": {"gamma": floats(0.0, 1.1)},
    "PolynomialLR": {"total_iters": st.integers(1, 50), "power": floats(0.0, 4.0)},
    "CosineAnnealingLR": {"T_max": st.integers(1, 50), "eta_min": floats(0.0, 0.5)},
    "CosineAnnealingWarmRestarts": {"T_0": st.integers(1, 30), "T_mult": st.integers(1, 4), "eta_min": floats(0, 0.5)},
    "CyclicLR": {
        "base_lr": RATES,
        "max_lr": RATES,
        "step_size_up": st.integers(1, 30),
        "step_size_down": st.none() | st.integers(0, 30),
        "mode": st.sampled_from(["triangular", "triangular2", "exp_range"]),
        "gamma": floats(0.0, 1.1),
    },
    "OneCycleLR": {
        "max_lr": floats(1e-6, 1.0),
        "total_steps": st.integers(1, 60),
        "pct_start": floats(0.0, 1.0),
        "anneal_strategy": st.sampled_from(["cos", "linear"]),
        "div_factor": floats(1.0, 50.0),
        "final_div_factor": floats(1.0, 1e5),
        "three_phase": st.booleans(),
    },
    "SWALR": {
        "swa_lr": RATES,
        "anneal_epochs": st.integers(0, 50),
        "anneal_strategy": st.sampled_from(["cos", "linear"]),
    },
}


def rows_of(name):
    return st.fixed_dictionaries(STRATEGIES[name]).map(functools.partial(Row, name))


def generated(row, steps=60):
    """Compare a row, operation by operation: nothing is compiled for the numbers of one example."""
    if row.name == "OneCycleLR":
        # torch divides by the length of the first phase, 0 here.
        assume(row.options["pct_start"] * row.options["total_steps"] != 1)
    parent = run_parent(row, row.values(steps))
    with jax.enable_x64(True):
        schedule = PURE[row.name](**row.options) if row.name in BASE else row.schedule()
        assert_double(np.asarray(jax.vmap(schedule)(jnp.arange(steps)))[: len(parent)], parent)


@pytest.mark.costly
@pytest.mark.numbers
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "MultiplicativeLR"])
def test_generated_options(name):
    @settings(max_examples=6, deadline=None)
    @given(rows_of(name))
    def check(row):
        generated(row)

    check()


@pytest.mark.numbers
@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_more_generated_options(name):
    # The loop of multiplicative_lr is compiled for each function.
    @settings(max_examples=15 if name == "MultiplicativeLR" else 150, deadline=None)
    @given(rows_of(name))
    def check(row):
        generated(row)

    check()


PARTS = ["LambdaLR", "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR"]
SEQUENTIAL = [*PARTS, "CosineAnnealingLR", "CosineAnnealingWarmRestarts"]


@st.composite
def sequences(draw):
    parts = draw(st.lists(st.sampled_from(SEQUENTIAL).flatmap(rows_of), min_size=1, max_size=3))
    at = draw(st.lists(st.integers(0, 40), min_size=len(parts) - 1, max_size=len(parts) - 1))
    return sequential(*parts, at=sorted(at))


@pytest.mark.slow
@pytest.mark.numbers
@settings(max_examples=10, deadline=None)
@given(sequences())
def test_generated_sequences(row):
    generated(row)


@pytest.mark.slow
@pytest.mark.numbers
@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(PARTS).flatmap(rows_of), min_size=1, max_size=3))
def test_generated_chains(parts):
    # What starts from the base rate takes the last factor of those after it, and 0 has none.
    first = next((i for i, part in enumerate(parts) if part.name == "LambdaLR"), len(parts))
    for part in parts[first:]:
        assume(part.options.get("gamma", 1) > 0.1 and part.options.get("end_factor", 1) > 0)
        assume(part.name != "PolynomialLR")
    generated(chained(*parts))


ONE_CYCLES = [row for row in ROWS if row.name == "OneCycleLR"]


@functools.cache
def ends_of_cycles():
    """Rate and momentum at the last step of the cycle and at steps after it."""

    @jax.jit
    def run(steps):
        found = {}
        for row in ONE_CYCLES:
            schedule, after = row.schedule(), row.values(MILLION) - 1 + steps
            found[row.id] = [jax.vmap(schedule)(after)]
            if row in EXAMPLES:
                found[row.id].append(jax.vmap(schedule.momentum)(after))
        return found

    return run(jnp.array([0, 1, 2, 10, 30, 1000, MILLION]))


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize("row", ONE_CYCLES, ids=str)
def test_one_cycle_stays_at_its_end(row):
    for values in ends_of_cycles()[row.id]:
        np.testing.assert_allclose(values, values[0], rtol=1e-6)


@pytest.mark.numbers
@pytest.mark.parametrize("row", SIMPLE, ids=str)
def test_no_value_is_negative(row):
    assert (singles()[row.id] >= 0).all()


# Derivatives by the base rate.


def derivatives(rows):
    """Value and derivative at every step, at two base rates, in one program."""

    @jax.jit
    def run(lr, steps):
        def of(row):
            value_and_grad = jax.value_and_grad(lambda lr, step: row.schedule(lr)(step))
            return jax.vmap(value_and_grad, (None, 0))(lr, steps[: row.values(len(steps))])

        return {row.id: of(row) for row in rows}

    return [jax.tree.map(np.asarray, run(lr, counted(100))) for lr in (LR, 2 * LR)]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [EXAMPLES, ROWS], ids=["examples", "rows"])
def test_the_derivative_by_the_base_rate_is_the_finite_difference(rows, x64):
    behind, ahead = derivatives(rows)
    for row in rows:
        # The rate is an affine function of the base rate, so the difference has no error but its rounding.
        difference = (ahead[row.id][0] - behind[row.id][0]) / LR
        tolerance = 1e-12 * max(np.abs(difference).max(), np.abs(ahead[row.id][0]).max() / LR)
        for _, slope in (behind[row.id], ahead[row.id]):
            np.testing.assert_allclose(slope, difference, rtol=1e-10, atol=tolerance, err_msg=row.id)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "step", "double"),
    [
        (sequential(CONSTANT, EXPONENTIAL, at=[10]), 3, False),
        (sequential(LINEAR, Row("ExponentialLR", {"gamma": 0.5}), at=[5000]), 100, True),
        (sequential(Row("ExponentialLR", {"gamma": 1.5}), STEP, at=[10]), 5000, True),
        (sequential(LINEAR, LAMBDA, at=[10]), 0, True),
    ],
    ids=str,
)
def test_the_derivative_of_a_sequence_is_that_of_its_current_part(row, step, double):
    # The others may be infinite outside of their own steps, and 0 times that is NaN.
    with jax.enable_x64(double):
        slope = jax.grad(lambda lr: row.schedule(lr)(step))(LR)
        assert float(slope) == pytest.approx(float(row.schedule()(step)) / LR, rel=1e-6)


# Momentum.


@functools.cache
def momenta():
    with jax.enable_x64(True):
        return values_of(MOMENTA, STEPS, lambda row: row.schedule().momentum)


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam], ids=["momentum", "beta"])
@pytest.mark.parametrize("row", MOMENTA, ids=str)
def test_every_value_of_the_momentum(row, optimizer):
    assert_double(momenta()[row.id], run_parent(row, row.values(STEPS), momentum_of, optimizer))


@pytest.mark.slow
def test_rate_and_momentum_of_one_schedule():
    rate = schedules.one_cycle_lr(0.5, total_steps=20)
    rule = rules.SGD(lr=rate, momentum=rate.momentum)
    params, state = PARAMS, jaxoptim.init(rule, PARAMS)
    expected, expected_state = params, state
    step = jax.jit(jaxoptim.step)
    for n in range(4):
        params, state = step(rule, params, GRADS, state)
        now = rules.SGD(lr=rate(n), momentum=rate.momentum(n))
        expected, expected_state = step(now, expected, GRADS, expected_state)
    np.testing.assert_allclose(params["w"], expected["w"], rtol=1e-6)


def test_a_schedule_without_a_momentum_says_who_has_one():
    with pytest.raises(AttributeError, match="step_lr has no momentum; cyclic_lr and one_cycle_lr have one"):
        _ = schedules.step_lr(0.1, 30).momentum
    with pytest.raises(AttributeError, match="cyclic_lr was made with cycle_momentum=False"):
        _ = schedules.cyclic_lr(0.1, 0.5, cycle_momentum=False).momentum
    assert not hasattr(schedules.step_lr(0.1, 30), "momentum")


# Composition.


@pytest.mark.slow
def test_a_chain_inside_a_sequence_is_what_it_is_alone(x64):
    # torch's own applies the first factors twice, or raises NotImplementedError at the milestone.
    chain = chained(CONSTANT, EXPONENTIAL)
    expected = np.r_[run_parent(chain, 15), run_parent(STEP, 20), run_parent(chain, 45)]
    schedule = schedules.sequential_lr(LR, [chain.schedule(), STEP.schedule(), chain.schedule()], [15, 35])
    assert_double(np.asarray(jax.vmap(schedule)(jnp.arange(80))), expected)


@pytest.mark.slow
def test_a_sequence_inside_a_sequence_is_what_it_is_alone(x64):
    inner = sequential(EXPONENTIAL, STEP, at=[5])
    expected = np.r_[run_parent(inner, 15), run_parent(RESTARTS, 20), run_parent(inner, 45)]
    schedule = schedules.sequential_lr(LR, [inner.schedule(), RESTARTS.schedule(), inner.schedule()], [15, 35])
    assert_double(np.asarray(jax.vmap(schedule)(jnp.arange(80))), expected)


@pytest.mark.slow
def test_one_cycle_after_a_warmup_of_the_rate_that_it_begins_with(x64):
    row = sequential(CONSTANT, ONE_CYCLE, at=[10])
    assert_double(np.asarray(jax.vmap(row.schedule())(jnp.arange(60))), run_parent(row, 60))


@pytest.mark.parametrize("row", CLASS_ONLY, ids=str)
def test_a_chain_without_a_closed_form_is_refused(row):
    run_parent(row, 3)
    with pytest.raises(ValueError, match=r"does not multiply the rate by a factor of the step.*optim\.lr_scheduler"):
        row.schedule()


def test_functions_of_other_libraries_are_parts_too():
    decay = schedules.exponential_lr(0.1, gamma=0.5)
    joined = schedules.sequential_lr(0.1, [optax.linear_schedule(0.0, 0.1, 4), decay], milestones=[4])
    np.testing.assert_allclose([joined(n) for n in range(6)], [0, 0.025, 0.05, 0.075, 0.1, 0.05], rtol=1e-6)
    product = schedules.chained(0.1, [lambda step: 0.2, decay])
    np.testing.assert_allclose([product(n) for n in range(3)], [0.2, 0.1, 0.05], rtol=1e-6)
    again = optax.join_schedules([optax.constant_schedule(0.3), decay], [2])
    np.testing.assert_allclose([again(n) for n in range(4)], [0.3, 0.3, 0.1, 0.05], rtol=1e-6)


@pytest.mark.parametrize("make", [schedules.chained, functools.partial(schedules.sequential_lr, milestones=[5])])
def test_parts_of_another_base_rate_are_refused(make):
    parts = [schedules.step_lr(0.1, 30), schedules.exponential_lr(0.2, 0.5)]
    with pytest.raises(ValueError, match=r"need the base rate 0.1, but exponential_lr\(lr=0.2, .* at index 1 was made"):
        make(lr=0.1, schedulers=parts)
    # A traced rate cannot be compared.
    assert float(jax.jit(lambda lr: make(lr=0.1, schedulers=[schedules.step_lr(lr, 30)] * 2)(0))(0.1)) > 0


# As functions that JAX transforms.


@functools.cache
def examples():
    """The examples at one step, in one program, and the list that grows whenever it is compiled."""
    compiled = []

    @jax.jit
    def run(schedules, step):
        compiled.append(schedules)
        return {name: schedule(step) for name, schedule in schedules.items()}

    return run, compiled


def all_examples(**lr):
    return {row.id: row.schedule(**lr) for row in EXAMPLES}


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize("row", quick(EXAMPLES, 4), ids=str)
def test_a_jitted_value_is_the_eager_one(row):
    schedule, (jitted, _) = row.schedule(), examples()
    for step in (0, 1, 9, 40):
        value = schedule(step)
        assert isinstance(value, jax.Array)
        assert (value.shape, value.dtype) == ((), jnp.float32)
        np.testing.assert_allclose(jitted(all_examples(), np.int32(step))[row.id], value, rtol=1e-6, atol=1e-12)


@pytest.mark.costly
@pytest.mark.parametrize(("kind", "double"), [(np.float32, False), (np.int64, True), (np.float64, True)])
@pytest.mark.parametrize("row", quick(EXAMPLES, 5), ids=str)
def test_any_kind_of_number_is_a_step(row, kind, double):
    with jax.enable_x64(double):
        schedule = row.schedule()
        value, expected = jax.jit(lambda steps: [schedule(step) for step in steps])([kind(13), np.int32(13)])
        assert value.dtype == expected.dtype == (jnp.float64 if double else jnp.float32)
        np.testing.assert_allclose(value, expected, rtol=1e-12 if double else 1e-6)


@pytest.mark.numbers
def test_a_step_in_float32_costs_no_digits_in_float64(x64):
    schedule = schedules.linear_lr(0.1, total_iters=30)
    assert float(schedule(np.float32(13))) == pytest.approx(float(schedule(13)), rel=1e-12)


def test_python_and_numpy_numbers_are_steps():
    schedule = schedules.exponential_lr(0.1, 0.5)
    for step in (2, 2.0, np.int32(2), np.float64(2), np.array(2), jnp.uint32(2), jnp.float32(2)):
        assert float(schedule(step)) == pytest.approx(0.025)
        assert schedule(step).dtype == jnp.float32


def nudged(value):
    """Other options of the same kind: every real number is another one."""
    if isinstance(value, Row):
        return Row(value.name, {name: nudged(option) for name, option in value.options.items()})
    if isinstance(value, list):
        return [nudged(item) for item in value]
    return value * 0.9 if isinstance(value, float) else value


@pytest.mark.costly
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_only_counts_and_switches_are_structure(row):
    leaves, structure = jax.tree.flatten(row.schedule())
    others, other_structure = jax.tree.flatten(nudged(row).schedule(0.2))
    assert structure == other_structure
    assert all(isinstance(leaf, float) for leaf in [*leaves, *others])


@pytest.mark.slow
def test_changing_any_number_compiles_nothing_new():
    run, compiled = examples()
    values = run(all_examples(), np.int32(40))
    count = len(compiled)
    others = run({row.id: nudged(row).schedule(0.2) for row in EXAMPLES}, np.int32(40))
    same = run(all_examples(lr=np.float32(LR)), np.int32(40))
    assert len(compiled) == count
    for name, value in values.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-6)
    assert all(others[row.id] != values[row.id] for row in EXAMPLES)


def test_changing_a_count_compiles_another_program():
    value = jax.jit(lambda schedule, step: schedule(step))
    assert float(value(schedules.step_lr(0.1, 30), 40)) == pytest.approx(0.01)
    assert float(value(schedules.step_lr(0.1, 50), 40)) == pytest.approx(0.1)


@pytest.mark.slow
def test_vmap_over_the_base_rate():
    @jax.jit
    def run(rates):
        swept = jax.vmap(lambda lr: {row.id: row.schedule(lr)(40) for row in EXAMPLES})(rates)
        stacked = jax.vmap(lambda lr: all_examples(lr=lr))(rates)
        return swept, jax.vmap(lambda schedules: {name: schedules[name](40) for name in schedules})(stacked)

    rates = [0.05, 0.1, 0.4]
    swept, stacked = run(jnp.array(rates))
    for i, lr in enumerate(rates):
        values, _ = examples()
        for name, value in values(all_examples(lr=lr), np.int32(40)).items():
            np.testing.assert_allclose([swept[name][i], stacked[name][i]], value, rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_vmap_over_the_base_of_a_power():
    gammas, steps = np.array([0.0, 0.5, 0.9, 1.0, 1.1]), np.array([0, 40, 60])

    def powers(gamma):
        makers = [
            schedules.step_lr(LR, 3, gamma),
            schedules.multi_step_lr(LR, [5, 7, 45], gamma),
            schedules.exponential_lr(LR, gamma),
            schedules.cyclic_lr(0.0, 0.5, step_size_up=7, mode="exp_range", gamma=gamma),
        ]
        return jnp.stack([jax.vmap(schedule)(steps) for schedule in makers])

    exponents = np.stack([steps // 3, np.searchsorted([5, 7, 45], steps, "right"), steps, steps])
    scale = np.array([[LR] * 3] * 3 + [[0.5 * (1 - abs(n % 14 / 7 - 1)) for n in steps]])
    swept = jax.jit(jax.vmap(powers))(gammas.astype(np.float32))
    # The logarithm of a traced base has the digits of a float32, and 60 steps multiply its error.
    np.testing.assert_allclose(swept, scale * gammas[:, None, None] ** exponents, rtol=6e-6, atol=1e-12)


@pytest.mark.slow
def test_derivatives_by_other_numbers(x64):
    functions = [
        (0.9, lambda gamma: schedules.exponential_lr(LR, gamma)(20)),
        (0.5, lambda gamma: schedules.step_lr(LR, 3, gamma)(20)),
        (0.01, lambda eta: schedules.cosine_annealing_lr(LR, 10, eta)(4)),
        (0.01, lambda eta: schedules.cosine_annealing_lr(LR, 10, eta)(27)),
        (1.5, lambda power: schedules.polynomial_lr(LR, 30, power)(20)),
        (0.5, lambda factor: schedules.linear_lr(LR, factor, total_iters=30)(20)),
        (0.5, lambda factor: schedules.constant_lr(LR, factor, total_iters=30)(20)),
        (0.05, lambda rate: schedules.swa_lr(LR, rate, 30)(20)),
        (0.5, lambda rate: schedules.cyclic_lr(LR, rate, 30)(20)),
        (0.41, lambda part: schedules.one_cycle_lr(LR, 60, pct_start=part)(20)),
        (0.1, lambda slope: schedules.lambda_lr(LR, Inverse(slope))(20)),
    ]

    @jax.jit
    def run(xs):
        return jnp.stack([function(x) for (_, function), x in zip(functions, xs, strict=True)])

    xs, h = jnp.array([x for x, _ in functions]), 1e-6
    slopes = jax.grad(lambda xs: run(xs).sum())(xs)
    np.testing.assert_allclose(slopes, (run(xs + h) - run(xs - h)) / (2 * h), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_no_derivative_by_any_number_is_nan():
    # Powers of 0, quotients by 0 and parts that have not begun.
    names = (
        "StepLR",
        "PolynomialLR",
        "CosineAnnealingLR",
        "CyclicLR",
        "OneCycleLR",
        "SequentialLR",
        "ChainedScheduler",
    )
    rows = [row for row in EXAMPLES if row.name in names]

    @jax.jit
    def run(schedules, steps):
        grad = jax.vmap(jax.grad(lambda schedule, step: schedule(step)), (None, 0))
        return {name: grad(schedule, steps) for name, schedule in schedules.items()}

    slopes = run({row.id: row.schedule() for row in rows}, counted(100))
    wrong = [name for name, tree in slopes.items() if not all(jnp.isfinite(x).all() for x in jax.tree.leaves(tree))]
    assert wrong == []


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Inverse:
    """A function with a number of its own."""

    slope: float

    def __call__(self, step):
        return 1 / (1 + self.slope * step)


@pytest.mark.parametrize("row", EXAMPLES, ids=str)
def test_a_schedule_survives_flattening_copying_and_pickling(row):
    schedule = row.schedule()
    leaves, treedef = jax.tree.flatten(schedule)
    assert jax.tree.structure(jax.tree.map(lambda _: object(), schedule)) == treedef
    again = [jax.tree.unflatten(treedef, leaves), copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))]
    assert {str(other) for other in again} == {str(schedule)}
    assert {jax.tree.structure(other) for other in again} == {treedef}
    assert all(jax.tree.leaves(other) == leaves for other in again)


@pytest.mark.slow
def test_a_function_that_is_a_pytree_is_traced():
    schedule = schedules.lambda_lr(LR, Inverse(0.5))
    assert jax.tree.leaves(schedule) == [LR, 0.5]
    slopes = jax.grad(lambda schedule: schedule(2))(schedule)
    assert float(slopes.arguments["lr_lambda"].slope) == pytest.approx(-0.1 * 2 / 4)


# As the rate of an optimizer.

PARAMS = {"w": jnp.arange(6.0).reshape(3, 2) / 10 + 1}
GRADS = {"w": jnp.array([[0.5, -1.0], [0.2, 0.3], [-2.0, 1.0]])}
FACTORIES = [
    factory
    for factory in vars(jaxoptim).values()
    if inspect.isclass(rule := getattr(factory, "__wrapped__", None))
    and issubclass(rule, Hyperparameters)
    and rule is not rules.Newton  # which has no rate
]


def loss(params):
    return jnp.sum((params["w"] - 3.0) ** 2)


@pytest.mark.costly
@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_a_schedule_gives_the_rate_of_each_step(factory):
    name = "eta" if factory is jaxoptim.adagrad_rmsprop else "lr"
    schedule = schedules.cosine_annealing_lr(0.4, T_max=4)

    def grads_of(params):
        grads = jax.grad(loss)(params)
        rows = jnp.arange(3)[:, None]
        return {"w": BCOO((grads["w"], rows), shape=(3, 2))} if factory is jaxoptim.sparse_adam else grads

    def update(rate, state, params):
        more = {"value_fn": loss} if factory is jaxoptim.lbfgs else {}
        changes, state = factory(**{name: rate}).update(grads_of(params), state, params, **more)
        return optax.apply_updates(params, changes), state

    if factory in (jaxoptim.lbfgs, jaxoptim.sparse_adam):
        update = jax.jit(update)  # the others compile the update of one array by themselves
    params, state = PARAMS, factory(**{name: schedule}).init(PARAMS)
    expected, expected_state = PARAMS, factory(**{name: schedule(0)}).init(PARAMS)
    for n in range(3):
        params, state = update(schedule, state, params)
        expected, expected_state = update(schedule(n), expected_state, expected)
    assert jnp.array_equal(params["w"], expected["w"])
    assert not jnp.array_equal(params["w"], PARAMS["w"])


def test_there_is_a_factory_for_every_rule():
    assert {factory.__wrapped__ for factory in FACTORIES} == {
        rule for rule in vars(rules).values() if inspect.isclass(rule) and rule is not rules.Newton
    }


def trained(tx, steps=5):
    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), length=steps)[0][0]["w"]


SCHEDULE = schedules.sequential_lr(
    0.1, [schedules.linear_lr(0.1, 0.1, total_iters=2), schedules.exponential_lr(0.1, 0.5)], [2]
)


@pytest.mark.costly
@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip(100.0), jaxoptim.sgd(lr=SCHEDULE)),
        optax.sgd(SCHEDULE),
        optax.chain(optax.identity(), optax.scale_by_learning_rate(SCHEDULE)),
        optax.inject_hyperparams(optax.sgd)(learning_rate=SCHEDULE),
        optax.inject_hyperparams(jaxoptim.sgd)(lr=SCHEDULE),
    ],
    ids=["chain", "optax", "scale_by", "inject_optax", "inject_ours"],
)
def test_schedules_in_optax(tx):
    expected = PARAMS["w"]
    for n in range(5):
        expected = expected - SCHEDULE(n) * 2 * (expected - 3.0)
    np.testing.assert_allclose(trained(tx), expected, rtol=1e-6)


def descended(rule, steps=6):
    params = jax.tree.map(lambda x: x.astype(float), PARAMS)

    def body(carry, _):
        params, state = carry
        return jaxoptim.step(rule, params, jax.grad(loss)(params), state), None

    return loss(jax.lax.scan(body, (params, jaxoptim.init(rule, params)), length=steps)[0][0])


@pytest.mark.slow
def test_the_hypergradient_of_the_base_rate(x64):
    both, h = jax.jit(jax.value_and_grad(descended)), 1e-6

    def at(lr):
        value, slopes = both(rules.Adam(lr=schedules.cosine_annealing_lr(lr, 10), betas=(0.8, 0.9)))
        return float(value), float(slopes.lr.arguments["lr"])

    difference = (at(0.1 + h)[0] - at(0.1 - h)[0]) / (2 * h)
    assert at(0.1)[1] == pytest.approx(difference, rel=1e-7)


@pytest.mark.slow
def test_vmap_over_the_base_rate_of_a_rule():
    def final(lr):
        return descended(rules.SGD(lr=schedules.step_lr(lr, 2, gamma=0.5)))

    rates = jnp.array([0.01, 0.1, 0.2])
    one = jax.jit(final)
    np.testing.assert_allclose(jax.jit(jax.vmap(final))(rates), [one(lr) for lr in rates], rtol=1e-5)


@pytest.mark.slow
def test_a_rule_with_another_rate_in_its_schedule_compiles_nothing_new():
    compiled = []

    @jax.jit
    def final(rule):
        compiled.append(rule)
        return descended(rule)

    for lr, gamma in ((0.1, 0.5), (0.2, 0.25)):
        rule = rules.SGD(lr=schedules.exponential_lr(lr, gamma))
        assert float(final(rule)) == pytest.approx(float(descended(rule)), rel=1e-5)
    assert len(compiled) == 1


# Arguments.


@pytest.mark.parametrize("name", [name for name in PURE if name not in ("SequentialLR", "ChainedScheduler")])
def test_the_arguments_are_those_of_the_class(name):
    parent = inspect.signature(getattr(TORCH, name)).parameters
    ours = inspect.signature(PURE[name]).parameters
    names = [key for key in parent if key not in ("optimizer", "last_epoch")]
    assert [key for key in ours if key != "lr" or name in BASE] == names
    for key in names:
        assert ours[key].default == parent[key].default, key


# Options, the error, its message, and whether torch raises the same error.
ONE = [schedules.step_lr(0.1, 30)]
BAD = [
    ("LambdaLR", {"lr_lambda": 5}, TypeError, "lr_lambda should be a function, but got int", True),
    ("MultiplicativeLR", {"lr_lambda": 5}, TypeError, "lr_lambda should be a function, but got int", True),
    ("ConstantLR", {"factor": 1.5}, ValueError, "Constant multiplicative factor expected to be between 0 and 1.", True),
    ("ConstantLR", {"factor": -0.1}, ValueError, "Got factor=-0.1", True),
    ("ConstantLR", {"factor": "x"}, TypeError, "factor must be a number", True),
    ("LinearLR", {"start_factor": 0.0}, ValueError, "Starting multiplicative factor expected to be greater", True),
    ("LinearLR", {"start_factor": 1.5}, ValueError, "Got start_factor=1.5", True),
    ("LinearLR", {"end_factor": 1.5}, ValueError, "Ending multiplicative factor expected to be between 0 and 1.", True),
    ("LinearLR", {"end_factor": -0.5}, ValueError, "Got end_factor=-0.5", True),
    ("CosineAnnealingWarmRestarts", {"T_0": 0}, ValueError, "Expected positive integer T_0, but got 0", True),
    ("CosineAnnealingWarmRestarts", {"T_0": 2.5}, ValueError, "Expected positive integer T_0, but got 2.5", True),
    (
        "CosineAnnealingWarmRestarts",
        {"T_0": 5, "T_mult": 0},
        ValueError,
        "Expected integer T_mult >= 1, but got 0",
        True,
    ),
    ("CosineAnnealingWarmRestarts", {"T_0": 5, "T_mult": 1.5}, ValueError, "Expected integer T_mult >= 1", True),
    ("CosineAnnealingWarmRestarts", {"T_0": 5, "eta_min": "x"}, ValueError, "eta_min", True),
    (
        "CyclicLR",
        {"base_lr": 0.1, "max_lr": 0.5, "mode": "x"},
        ValueError,
        "mode is invalid and scale_fn is None",
        True,
    ),
    ("OneCycleLR", {"max_lr": 0.1}, ValueError, "You must define either total_steps OR (epochs AND steps_per_", True),
    ("OneCycleLR", {"max_lr": 0.1, "epochs": 3}, ValueError, "You must define either total_steps OR", True),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 0}, ValueError, "Expected positive integer total_steps", True),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 2.5}, ValueError, "total_steps, but got 2.5", True),
    (
        "OneCycleLR",
        {"max_lr": 0.1, "epochs": 0, "steps_per_epoch": 5},
        ValueError,
        "Expected positive integer epochs, but got 0",
        True,
    ),
    (
        "OneCycleLR",
        {"max_lr": 0.1, "epochs": 5, "steps_per_epoch": 2.5},
        ValueError,
        "Expected positive integer steps_per_epoch, but got 2.5",
        True,
    ),
    (
        "OneCycleLR",
        {"max_lr": 0.1, "total_steps": 9, "pct_start": 1},
        ValueError,
        "Expected float between 0 and 1",
        True,
    ),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 9, "pct_start": -0.1}, ValueError, "pct_start, but got -0.1", True),
    (
        "OneCycleLR",
        {"max_lr": 0.1, "total_steps": 9, "anneal_strategy": "x"},
        ValueError,
        "anneal_strategy must be one of 'cos' or 'linear', instead got x",
        True,
    ),
    (
        "SWALR",
        {"swa_lr": 0.1, "anneal_strategy": "x"},
        ValueError,
        "anneal_strategy must be one of 'cos' or 'linear', instead got x",
        True,
    ),
    ("SWALR", {"swa_lr": 0.1, "anneal_epochs": -1}, ValueError, "anneal_epochs must be equal or greater than 0", True),
    ("SWALR", {"swa_lr": 0.1, "anneal_epochs": 2.5}, ValueError, "anneal_epochs must be equal or greater", True),
    ("SequentialLR", {"schedulers": [], "milestones": []}, ValueError, "at least one schedule", True),
    ("ChainedScheduler", {"schedulers": []}, ValueError, "at least one schedule", True),
    ("SequentialLR", {"schedulers": ONE, "milestones": [5]}, ValueError, "Sequential Schedulers expects number", False),
    ("SequentialLR", {"schedulers": [5], "milestones": []}, TypeError, "should be a function, but got int", False),
    ("ChainedScheduler", {"schedulers": [5]}, TypeError, "should be a function, but got int", False),
    ("ExponentialLR", {"gamma": 0.9, "lr": -0.1}, ValueError, "lr must be >= 0, but got -0.1", False),
    ("ExponentialLR", {"gamma": 0.9, "lr": math.nan}, ValueError, "lr must be >= 0, but got nan", False),
    ("ExponentialLR", {"gamma": 0.9, "lr": "0.1"}, TypeError, "lr must be a number or a scalar array", False),
    ("ExponentialLR", {"gamma": 0.9, "lr": True}, TypeError, "lr must be a number or a scalar array", False),
    ("ExponentialLR", {"gamma": -0.9}, ValueError, "gamma must be >= 0, but got -0.9", False),
    ("ExponentialLR", {"gamma": None}, TypeError, "gamma must be a number", False),
    ("ExponentialLR", {}, TypeError, "missing a required argument: 'gamma'. It takes lr, gamma", False),
    ("ExponentialLR", {"gama": 0.9}, TypeError, "It takes lr, gamma", False),
    ("StepLR", {"step_size": 0}, ValueError, "step_size must be >= 1, but got 0", False),
    ("StepLR", {"step_size": 2.5}, TypeError, "step_size must be a whole number, but got 2.5", False),
    ("MultiStepLR", {"milestones": [5, -1]}, ValueError, "element of milestones must be >= 0, but got -1", False),
    ("LinearLR", {"total_iters": -1}, ValueError, "total_iters must be >= 0, but got -1", False),
    ("PolynomialLR", {"power": "x"}, TypeError, "power must be a number", False),
    ("CosineAnnealingLR", {"T_max": 0}, ValueError, "T_max must be >= 1, but got 0", False),
    ("CyclicLR", {"base_lr": -0.1, "max_lr": 0.5}, ValueError, "base_lr must be >= 0, but got -0.1", False),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "scale_fn": 5}, TypeError, "scale_fn should be a function", False),
    (
        "CyclicLR",
        {"base_lr": 0.1, "max_lr": 0.5, "scale_fn": inverse_time, "scale_mode": "x"},
        ValueError,
        "scale_mode must be one of 'cycle' or 'iterations', instead got 'x'",
        False,
    ),
]


@pytest.mark.parametrize(
    ("name", "options", "error", "message", "same"), BAD, ids=[f"{case[0]}-{case[3]}" for case in BAD]
)
def test_bad_arguments_raise_what_torch_raises(name, options, error, message, same):
    with pytest.raises(error) as raised:
        PURE[name](**options if name in BASE else {"lr": LR} | options)
    assert message in str(raised.value)
    if same:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR, momentum=0.9)
        options = options | ({} if name == "ChainedScheduler" else {"optimizer": optimizer})
        with pytest.raises(error):
            getattr(TORCH, name)(**options)


def test_traced_numbers_are_never_checked():
    assert float(jax.jit(lambda factor: schedules.constant_lr(LR, factor)(0))(2.0)) == pytest.approx(2 * LR)
    assert float(jax.jit(lambda lr: schedules.step_lr(lr, 30)(0))(-1.0)) == -1.0


# Plateau.

MODES = [(mode, threshold_mode) for mode in ("min", "max") for threshold_mode in ("rel", "abs")]


@functools.cache
def machine(mode, threshold_mode):
    """All states of the machine in one program, for any options of these modes."""

    @jax.jit
    def run(lr, metrics, options):
        plateau = schedules.reduce_lr_on_plateau(mode=mode, threshold_mode=threshold_mode, **options)

        def body(state, metric):
            state = plateau.step(state, metric)
            return state, state

        return jax.lax.scan(body, plateau.init(lr), metrics)[1]

    return run


def parent_plateau(metrics, lr=1.0, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    rows = []
    for metric in metrics:
        scheduler.step(metric)
        rows.append(
            (
                optimizer.param_groups[0]["lr"],
                scheduler.best,
                scheduler.num_bad_epochs,
                scheduler.cooldown_counter,
            )
        )
    return [np.array(column) for column in zip(*rows, strict=True)]


# Ties and thresholds are met exactly by multiples of 1/8.
METRICS = st.lists(
    st.integers(-20, 20).map(lambda k: k / 8) | st.sampled_from([math.nan, math.inf, -math.inf]) | st.floats(-3.0, 3.0),
    min_size=30,
    max_size=30,
)
PLATEAU = st.fixed_dictionaries(
    {
        "factor": floats(0.01, 0.99),
        "patience": st.integers(0, 4),
        "threshold": floats(0.0, 1.0) | st.sampled_from([0.0, 0.125, 0.5, 1.0]),
        "cooldown": st.integers(0, 4),
        "min_lr": floats(0.0, 1.5) | st.just(0.0),
        "eps": st.sampled_from([0.0, 1e-8, 1e-2, 0.3]),
    }
)


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize(("mode", "threshold_mode"), MODES)
def test_a_plateau_in_scan_is_torch_to_the_bit(mode, threshold_mode):
    @settings(max_examples=40, deadline=None)
    @given(METRICS, PLATEAU)
    def check(metrics, options):
        # XLA takes numbers below the smallest normal one for 0.
        metrics = [0.0 if abs(metric) < 1e-300 else metric for metric in metrics]
        with jax.enable_x64(True):
            ours = machine(mode, threshold_mode)(1.0, jnp.array(metrics), options)
        parent = parent_plateau(metrics, mode=mode, threshold_mode=threshold_mode, **options)
        for name, mine, theirs in zip(ours._fields, ours, parent, strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)

    check()


def test_a_plateau_with_the_defaults_of_torch():
    ours = inspect.signature(schedules.reduce_lr_on_plateau).parameters
    parent = inspect.signature(torch.optim.lr_scheduler.ReduceLROnPlateau).parameters
    assert list(ours) == [name for name in parent if name != "optimizer"]
    assert all(ours[name].default == parent[name].default for name in ours)
    plateau = schedules.reduce_lr_on_plateau()
    state, rates = plateau.init(1.0), []
    metrics = [1.0, *[2.0] * 25]
    for metric in metrics:
        state = plateau.step(state, metric)
        rates.append(float(state.lr))
    np.testing.assert_allclose(rates, parent_plateau(metrics)[0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.numbers
def test_a_plateau_in_float32():
    generator = np.random.default_rng(0)
    metrics = generator.integers(-20, 20, 200) / 8
    options = {"factor": 0.7, "patience": 3, "threshold": 0.125, "cooldown": 2, "min_lr": 0.01, "eps": 1e-8}
    for mode, threshold_mode in MODES:
        ours = machine(mode, threshold_mode)(1.0, jnp.array(metrics), options)
        assert [leaf.dtype for leaf in ours] == [jnp.float32, jnp.float32, jnp.int32, jnp.int32]
        parent = parent_plateau(metrics, mode=mode, threshold_mode=threshold_mode, **options)
        np.testing.assert_allclose(ours.lr, parent[0], rtol=1e-6)
        for mine, theirs in zip(ours[1:], parent[1:], strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
def test_vmap_makes_many_plateaus(x64):
    metrics = np.random.default_rng(0).integers(-20, 20, (5, 40)) / 8
    rates = np.geomspace(0.1, 1.0, 5)
    options = {
        "factor": np.linspace(0.1, 0.9, 5),
        "patience": np.arange(5),
        "threshold": np.linspace(0.0, 0.5, 5),
        "cooldown": np.arange(5)[::-1].copy(),
        "min_lr": np.linspace(0.0, 0.05, 5),
        "eps": np.geomspace(1e-8, 1e-2, 5),
    }
    swept = jax.vmap(machine("min", "rel"))(jnp.array(rates), jnp.array(metrics), options)
    for i in range(5):
        own = {name: values[i].item() for name, values in options.items()}
        parent = parent_plateau(metrics[i], rates[i].item(), mode="min", threshold_mode="rel", **own)
        for mine, theirs in zip(swept, parent, strict=True):
            np.testing.assert_array_equal(mine[i], theirs)


@pytest.mark.slow
def test_a_plateau_drives_a_rule_inside_scan():
    plateau = schedules.reduce_lr_on_plateau(factor=0.5, patience=0, threshold=0.0)

    def body(carry, _):
        params, state, machine = carry
        rule = rules.SGD(lr=machine.lr)
        value, grads = jax.value_and_grad(loss)(params)
        params, state = jaxoptim.step(rule, params, grads, state)
        return (params, state, plateau.step(machine, value)), (value, machine.lr)

    start = (PARAMS, jaxoptim.init(rules.SGD(), PARAMS), plateau.init(1.5))
    (params, _, _), (values, rates) = jax.jit(lambda start: jax.lax.scan(body, start, length=20))(start)
    # A rate above 1 goes away from the minimum; the machine halves it until the loss is less than ever.
    assert rates[:6].tolist() == [1.5, 1.5, 0.75, 0.375, 0.1875, 0.1875]
    assert (jnp.diff(values[3:]) < 0).all()
    np.testing.assert_allclose(params["w"], 3.0, atol=1e-3)


def test_a_plateau_refuses_what_torch_refuses():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    for options, message in (
        ({"factor": 1.0}, "Factor should be < 1.0"),
        ({"mode": "x"}, "mode x is unknown!"),
        ({"threshold_mode": "x"}, "threshold mode x is unknown!"),
    ):
        with pytest.raises(ValueError, match=message):
            schedules.reduce_lr_on_plateau(**options)
        with pytest.raises(ValueError, match=message):
            torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    with pytest.raises(ValueError, match="lr must be >= 0"):
        schedules.reduce_lr_on_plateau().init(-1.0)
    with pytest.raises(TypeError, match="lr must be a number"):
        schedules.reduce_lr_on_plateau().init("x")


# Plots.


@pytest.mark.slow
def test_plot_draws_the_values_of_the_steps():
    schedule = CYCLIC.schedule()
    ax = schedules.plot(schedule, 40)
    (line,) = ax.get_lines()
    np.testing.assert_array_equal(line.get_xdata(), np.arange(40))
    np.testing.assert_allclose(line.get_ydata(), jax.vmap(schedule)(jnp.arange(40)), rtol=1e-6)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "learning rate")
    same = schedules.plot(optax.constant_schedule(0.1), 5, ax=ax, label="constant", color="red")
    assert same is ax
    assert [line.get_label() for line in ax.get_lines()][1] == "constant"
    assert ax.get_lines()[1].get_color() == "red"
    matplotlib.pyplot.close(ax.figure)


def test_plot_refuses_what_it_cannot_draw(monkeypatch):
    with pytest.raises(TypeError, match="takes a function step -> value, but got float"):
        schedules.plot(0.1, 5)
    with pytest.raises(ValueError, match="steps must be >= 1, but got 0"):
        schedules.plot(STEP.schedule(), 0)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        schedules.plot(STEP.schedule(), 5)
