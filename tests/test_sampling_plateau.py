"""The setting of a sweep whose estimate depends least on the step size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxoptim import rules, sampling

LR = np.array([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
RISING = np.array([0.1, 0.9, 2.4, 2.5, 4.0])
"""Estimates of steps that do not arrive, that are on a plateau, and that have an error of their own."""


def sweep(mean, lr=LR, std=0.01, **changes):
    """A grid with one localization, as of 4 chains of 8 draws that have mixed."""
    mean = np.asarray(mean, float)[:, None]
    trace = mean[..., None, None] + np.tile([0.01, -0.01], (4, 4))
    fields = {"std": np.full(mean.shape, std), "diverged": np.zeros(mean.shape), "trace": trace} | changes
    return sampling.Calibration(np.asarray(lr), np.array([1.0]), mean, **fields)


def column(*numbers):
    return np.array(numbers, float)[:, None]


CASES = {
    "rising": (sweep(RISING), 1e-2),
    "flat at the end": (sweep([0.1, 0.9, 2.4, 2.5, 2.51]), 1e-1),
    "falling lr": (sweep(RISING[::-1], LR[::-1]), 1e-2),
    "diverged": (sweep([0.1, 0.9, 2.4, 2.5, np.nan], diverged=column(0, 0, 0, 0.25, 1)), 1e-3),
    "with errors": (sweep([2.0, 2.0, 2.0, 2.2, 2.4], std=column(2.0, 2.0, 2.0, 0.01, 0.01)), 1e-1),
    "two steps": (sweep([2.0, 2.1], [1e-4, 1e-3]), 1e-3),
    "one step": (sweep([2.0], [1e-5]), 1e-5),
    "steps of zero": (sweep([2.0, 2.0], [0.0, 1e-3], column(0.5, 0.1)), 1e-3),
}


@pytest.mark.needs("numpyro")
@pytest.mark.parametrize("name", CASES)
def test_best(name):
    given, lr = CASES[name]
    assert given.best.lr == lr
    assert given.best in given.settings


def test_best_of_two_localizations():
    mean = np.array([[1.0, 2.0], [2.0, 2.1], [3.0, 2.15]])
    zero = np.zeros((3, 2))
    several = sampling.Calibration(
        np.array([1e-3, 1e-2, 1e-1]), np.array([1.0, 5.0]), mean, zero, zero, np.zeros((3, 2, 2, 3))
    )
    assert several.best[:3] == (1e-1, 5.0, 2.15)


@pytest.mark.needs("numpyro")
def test_chains_that_have_not_mixed_are_left_out():
    given = sweep(RISING)
    given.trace[3, 0, :2] += 5.0
    assert given.settings[3].rhat > 1.1
    assert given.best.lr == 1e-3


@pytest.mark.parametrize(
    "given", [sweep(-RISING), sweep(RISING, diverged=np.ones((5, 1))), sweep(RISING, std=50.0)],
    ids=["negative", "diverged", "noise"],
)  # fmt: skip
def test_no_setting_has_an_estimate(given):
    with pytest.raises(ValueError, match=r"No setting has an estimate: .* or more draws\."):
        given.best  # noqa: B018
    assert "*" not in str(given)


def test_the_table_has_a_star_at_the_best():
    lines = str(sweep(RISING)).splitlines()
    assert lines[0].split() == ["lr", "localization", "mean", "std", "diverged", "R-hat"]
    assert [line[0] for line in lines] == [" ", " ", " ", " ", "*", " "]
    assert lines[4].split()[1:6] == ["0.01", "1", "2.5", "0.01", "0%"]
    assert repr(sweep(RISING)).startswith("Calibration(lr=[1e-05, ")


def test_a_table_without_rhat_has_a_star_too():
    given = sweep(RISING, trace=np.zeros((5, 1, 1, 3)))
    assert np.isnan(given.settings[3].rhat)
    assert [line[0] for line in str(given).splitlines()] == [" ", " ", " ", " ", "*", " "]


@pytest.mark.slow
def test_the_best_of_a_quadratic_is_near_its_coefficient():
    """Half the dimension, of steps from far too small to unstable."""
    found = sampling.calibrate(
        lambda w: jnp.sum(w**2) / 2, jnp.zeros(20), rules.SGLD(), lr=[1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0],
        localization=[0.0], nbeta=100.0, key=jax.random.key(0), num_chains=8, num_draws=100, num_burnin_steps=100,
    )  # fmt: skip
    best = found.best
    assert best.lr in (1e-3, 1e-2)
    assert best.mean == pytest.approx(10.0, rel=0.35)
