"""Long traces, which go to the memory of the host between the pieces of a run."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxoptim.sampling import chains, pieces, run
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.target import problem
from traced_runs import FEW, FULL, SGLD, X, loss, same, sample, tempered

SMALL = 1000  # bytes on the device


@pytest.fixture(scope="module")
def whole():
    return sample(**FULL)


@pytest.fixture
def small(monkeypatch, whole):
    """Room for a few draws on the device, once the run with room for all is there."""
    monkeypatch.setattr(pieces, "BYTES_ON_DEVICE", SMALL)


def prepared_of(sampler=SGLD, **options):
    options = RunOptions(**options)
    return run.prepare(problem(loss, jnp.ones(2), X, options), sampler, run.stacked(sampler, 1), 1, options)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_run_in_pieces_is_the_run_in_one(whole):
    same(sample(**FULL), whole)


@pytest.mark.usefixtures("small")
def test_its_traces_are_arrays_of_the_host(whole):
    found = sample(**FULL)
    traces = found.loss, found.observables["both"], found.observables["code"], found.observables["weight_norm"]
    assert {type(x) for x in jax.tree.leaves(traces)} == {np.ndarray}


def test_short_traces_stay_on_the_device(whole):
    assert isinstance(whole.loss, jax.Array)
    assert prepared_of(**FULL).pieces is None


@pytest.mark.usefixtures("small")
def test_the_device_has_room_for_the_draws_of_a_piece():
    """2 chains with 4 + 4 + 2 * 2 + 2 + 7 * 3 * 4 + 4 bytes at each draw."""
    prepared = prepared_of(**FULL)
    assert {x.shape[1] for x in jax.tree.leaves(prepared.state.traces)} == {SMALL // (2 * 102)}


@pytest.mark.usefixtures("small")
def test_the_memory_of_the_program_does_not_grow_with_the_draws():
    def size_of(draws):
        prepared = prepared_of(**FULL | {"num_draws": draws})
        args = prepared.spec, prepared.method, prepared.mesh, prepared.rules, prepared.settings, prepared.state
        lowered = chains.run_steps.lower(*args, prepared.problem.given, run.Thinning(3, 2), 0, 5)
        memory = lowered.compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    assert size_of(5000) == size_of(20)


@pytest.mark.usefixtures("small")
def test_nothing_is_compiled_for_the_last_piece_or_another_number_of_draws():
    sample(**FEW)
    before = chains.run_steps._cache_size()
    sample(**FEW | {"num_draws": 173})
    assert chains.run_steps._cache_size() == before


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_draw_larger_than_a_piece_leaves_by_itself():
    def large(w):
        return jnp.concatenate([w] * 200)

    found = sample(**FEW | {"observables": {"large": large}})
    chex.assert_shape(found.observables["large"], (2, 20, 400))
    np.testing.assert_array_equal(found.observables["large"][..., :2], found.observables["large"][..., -2:])
    assert (np.diff(found.observables["large"][..., 0]) != 0).all()


class Interrupted(Exception):
    """What ends a run in the middle."""


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_from_its_checkpoint(tmp_path, whole, small, monkeypatch):
    monkeypatch.setattr(run, "_SECONDS_BETWEEN_SAVES", -1.0)
    path, cuts, take = tmp_path / "run", [9, 22], pieces.Host.take

    def failing(self, step, traces):
        if cuts and step >= cuts[0]:
            del cuts[0]
            raise Interrupted
        take(self, step, traces)

    monkeypatch.setattr(pieces.Host, "take", failing)
    for _ in range(2):
        with pytest.raises(Interrupted):
            sample(checkpoint=path, **FULL)
    same(sample(checkpoint=path, **FULL), whole)
    same(sample(checkpoint=path, **FULL), whole)  # nothing is left to do


@pytest.mark.costly
@pytest.mark.parametrize("sizes", [(2**26, SMALL), (SMALL, 2**26)], ids=["then in pieces", "then in one"])
def test_a_checkpoint_goes_on_with_another_room(sizes, tmp_path, whole, monkeypatch):
    for size, draws in zip(sizes, (7, 20), strict=True):
        monkeypatch.setattr(pieces, "BYTES_ON_DEVICE", size)
        found = sample(checkpoint=tmp_path / "run", **FULL | {"num_draws": draws})
    same(found, whole)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_run_in_pieces_stops_itself(monkeypatch):
    pytest.importorskip("numpyro")
    options = FEW | {"num_draws": 300, "until_mcse": 0.1}
    found = sample(**options)
    monkeypatch.undo()
    same(found, sample(**options))
    assert found.loss.shape[1] < 300


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_temperatures_swap_in_pieces(monkeypatch):
    found = tempered(**FEW | {"num_draws": 70})
    monkeypatch.undo()
    same(found, tempered(**FEW | {"num_draws": 70}))
