"""Every optimizer with every option set against its live parent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jaxoptim
import parity
from jaxoptim import rules
from parity import distance, problem, run_optax, run_ours, run_sparse
from table import CASES, FIRST, FORMS, ROWS, SPARSE, Case, Row, of_numbers_if_muon, slow_unless

DENSE = [case for case in CASES if not case.row.sparse]
TWINS = [pytest.param(row, options, tx, id=f"{Case(row, options)}") for row in ROWS for options, tx in row.twins]
CHANCE = 1.05
"""How much two equally good roundings of the same trajectory may differ, in root mean square."""


@pytest.mark.costly
@pytest.mark.parametrize("case", of_numbers_if_muon(DENSE))
def test_float64_agrees_with_the_parent(case):
    assert parity.float64_distance(case) < 1e-12


@pytest.mark.parametrize("case", slow_unless(FORMS.__contains__, [case for case in DENSE if case.row.complex]))
def test_complex_parameters_agree_with_the_parent(case):
    assert parity.float64_distance(case, is_complex=True) < 1e-12


@pytest.mark.numbers
@pytest.mark.costly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", slow_unless(lambda case: case in FIRST and case.row.rule is not rules.Muon, DENSE))
def test_low_precision_is_no_worse_than_the_parent(case, dtype):
    ours, theirs = parity.low_precision_errors(case, dtype)
    assert ours <= CHANCE * theirs


@pytest.mark.costly
@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_sparse_gradients_agree_with_the_parent(case, x64):
    assert distance(*run_sparse(case, "float64")) < 1e-12


@pytest.mark.parametrize(("row", "options", "tx"), TWINS)
def test_optax_agrees_where_the_options_can_be_made_equal(row, options, tx, x64):
    start, noise = problem(row.shapes)
    ours = run_ours(row.rule(**options), start, noise, "float64", parity.SLOPE)
    assert distance(ours, run_optax(tx, start, noise, "float64", parity.SLOPE)) < 1e-12


@pytest.mark.parametrize(
    "case", slow_unless(FORMS.__contains__, [case for case in DENSE if case.row.rule is not rules.Muon])
)
def test_the_optax_form_agrees_with_the_exact_form(case, x64):
    start, noise = problem(case.row.shapes)
    exact = run_ours(case.ours(), start, noise, "float64", parity.SLOPE)
    tx = jaxoptim.transformation(case.ours())
    assert distance(run_optax(tx, start, noise, "float64", parity.SLOPE), exact) < 1e-12


@pytest.mark.numbers
@pytest.mark.costly
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 3), (1, 7), (32, 64), (100, 80)])
def test_muon_orthogonalizes_as_torch(shape):
    # torch sums products of more than 4096 multiplications in another order.
    exact = shape[0] * shape[1] * min(shape) <= 4096
    orthogonalized = jax.jit(rules.Muon().orthogonalized)
    rng = np.random.default_rng(0)
    for _ in range(300 if exact else 10):
        matrix = rng.normal(size=shape).astype(np.float32)
        ours, theirs = torch.zeros(shape, requires_grad=True), torch.tensor(matrix)
        parent = torch.optim.Muon([ours], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
        ours.grad = theirs
        parent.step()
        scale = max(1, shape[0] / shape[1]) ** 0.5
        expected = -ours.detach().numpy() / np.float32(scale)
        got = np.asarray(orthogonalized(jnp.asarray(matrix)))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 if exact else 1e-2)


def test_adafactor_takes_the_epsilon_of_each_array(x64):
    # torch lets the first parameter of a group decide for all: after a float32 one it would give 0.9921.
    params, grads = [jnp.ones((), jnp.float32), jnp.ones(())], [jnp.float32(1e-9), jnp.asarray(1e-9)]
    rule = rules.Adafactor()
    new, _ = jaxoptim.step(rule, params, grads, jaxoptim.init(rule, params))
    alone = torch.ones((), dtype=torch.float64, requires_grad=True)
    alone.grad = torch.tensor(1e-9, dtype=torch.float64)
    torch.optim.Adafactor([alone]).step()
    assert float(new[1]) == pytest.approx(alone.item(), abs=1e-14)


def test_centered_rmsprop_stays_finite_where_torch_gives_nan():
    # A constant gradient leaves a variance of zero, which rounding makes negative.
    rule, grad = rules.RMSprop(alpha=0.5, centered=True), [np.full((50,), 0.1) * np.arange(1, 51)]
    noise = [np.broadcast_to(grad[0], (parity.STEPS, 50))]
    assert np.isfinite(run_ours(rule, [np.zeros(50)], noise, "float32", 0.0)[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "columns"),
    [
        *(
            pytest.param(case.values[0].row, ("float64", "optax"), marks=case.marks)
            for case in of_numbers_if_muon(FIRST)
        ),
        *(pytest.param(row, ("float32", "bfloat16"), marks=pytest.mark.numbers) for row in ROWS),
    ],
    ids=lambda x: x.name if isinstance(x, Row) else " ".join(x),
)
def test_the_table_of_parity_says_what_is_measured(row, columns):
    stated = parity.read_table()[row.name]
    assert stated[:2] == parity.about(row)
    for column in columns:
        said = stated[2 + parity.COLUMNS.index(column)]
        found = parity.formatted(column, parity.measured(row, column))
        try:
            said, found = float(said), float(found)
        except ValueError:
            assert said == found
        else:
            # Rounding differs between machines: the power of ten is what the table promises.
            assert max(said, found) <= 10 * min(said, found) or max(said, found) < 1e-12


def test_optax_transformation_is_the_real_type():
    assert isinstance(jaxoptim.adam(), optax.GradientTransformationExtraArgs)
