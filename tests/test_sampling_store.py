"""Stores: traces on disk, which grow between the pieces of a run, of which the device holds one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxoptim import sampling
from jaxoptim.sampling import chains, pieces, run, store
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.target import problem
from traced_runs import FEW, FULL, SGLD, X, loss, same, sample, tempered

xarray = pytest.importorskip("xarray")

KINDS = ["run.zarr", "run.safetensors"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Room for a few draws."""
    monkeypatch.setattr(pieces, "BYTES_ON_DEVICE", 1000)
    monkeypatch.setattr(run, "_SECONDS_BETWEEN_SAVES", -1.0)


@pytest.fixture(scope="module", params=[sample, tempered], ids=["sample", "parallel_tempering"])
def made(request):
    """A function that makes a run, and what it returns without a store."""
    return request.param, request.param(**FULL)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_run_with_a_store_is_the_run_without(name, tmp_path, made):
    runs, whole = made
    found = runs(store=tmp_path / name, **FULL)
    same(found, whole)
    assert isinstance(found.loss, np.ndarray)


@pytest.mark.costly
def test_the_store_is_the_dataset(tmp_path, made):
    runs, whole = made
    runs(store=tmp_path / "run.zarr", **FULL)
    found, expected = xarray.open_zarr(tmp_path / "run.zarr", consolidated=False).load(), whole.to_xarray()
    assert found.coords.keys() == expected.coords.keys() - {"diverged"}  # which the losses tell
    assert found.data_vars.keys() == expected.data_vars.keys() | {"trace_path"}
    for name, variable in expected.drop_vars("diverged").variables.items():
        assert found[name].dims == variable.dims
        np.testing.assert_array_equal(found[name], variable)
    assert found.indexes["draw"].tolist() == list(range(20))
    assert found.attrs["completed"] == 1


def test_the_device_has_room_for_the_draws_of_a_piece(tmp_path):
    """2 chains with 4 + 4 + 2 * 2 + 2 + 7 * 3 * 4 + 4 bytes at each draw."""
    options = RunOptions(store=tmp_path / "run.zarr", **FULL)
    prepared = run.prepare(problem(loss, jnp.ones(2), X, options), SGLD, run.stacked(SGLD, 1), 1, options)
    assert prepared.spec.room == 1000 // (2 * 102)
    assert {x.shape[1] for x in jax.tree.leaves(prepared.state.traces)} == {prepared.spec.room}
    args = prepared.spec, prepared.method, prepared.mesh, prepared.rules, prepared.settings, prepared.state
    after = jax.eval_shape(chains.run_steps, *args, prepared.problem.given, run.Thinning(3, 2), 0, 5)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(after.traces)) <= 1000


class Interrupted(Exception):
    """What ends a run in the middle."""


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_was_cut_goes_on_from_its_store(name, tmp_path, made, monkeypatch):
    (runs, whole), path, cuts = made, tmp_path / name, [9, 22]
    take = store.Store.take

    def failing(self, step, traces):
        take(self, step, traces)
        if cuts and step >= cuts[0]:
            del cuts[0]
            raise Interrupted  # before the chains are saved, which the draws are then ahead of

    monkeypatch.setattr(store.Store, "take", failing)
    for _ in range(2):
        with pytest.raises(Interrupted):
            runs(store=path, **FULL)
    same(runs(store=path, **FULL), whole)
    same(runs(store=path, **FULL), whole)  # nothing is left to do
    more = FULL | {"num_draws": 27}
    same(runs(store=path, **more), runs(**more))


@pytest.mark.slow
def test_a_store_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.zarr"
    sample(store=path, **FEW)
    others = {
        "key": {"key": jax.random.key(4)},
        "observables": {"observables": {"w": lambda w: w}},
        "num_steps_bw_draws": {"num_steps_bw_draws": 1},
    }
    for name, change in others.items():
        with pytest.raises(ValueError, match=f"is of another run: its {name} is not what was given"):
            sample(store=path, **FEW | change)
    with pytest.raises(ValueError, match="is of another run: its data is not what was given"):
        sampling.sample(loss, jnp.ones(2), SGLD, X + 1, store=path, **FEW)
    with pytest.raises(ValueError, match="is of another run: its store is not what was given"):
        sample(checkpoint=f"{path}.run", **FEW)
    (tmp_path / "other.zarr").mkdir()
    with pytest.raises(ValueError, match=r"other.zarr exists, but there is no .*other.zarr.run.* Give another path"):
        sample(store=tmp_path / "other.zarr", **FEW)
    path.rename(tmp_path / "moved.zarr")
    with pytest.raises(ValueError, match=r"has 0 draws, but its run has made 20. .* remove .*run.zarr.run to begin"):
        sample(store=path, **FEW)


def test_a_store_and_a_checkpoint(tmp_path):
    """The one has the draws, the other the chains."""
    paths = {"store": tmp_path / "run.safetensors", "checkpoint": tmp_path / "chains"}
    sample(**paths, **FEW | {"num_draws": 5})
    same(sample(**paths, **FEW), sample(**FEW))
    assert not (tmp_path / "run.safetensors.run").exists()


@pytest.mark.slow
def test_batches_that_come_and_a_store(tmp_path):
    def batches():
        return iter([X + number for number in range(100)])

    run = functools.partial(sampling.sample, loss, jnp.ones(2), SGLD)
    expected = run(batches(), **FEW)
    run(batches(), store=tmp_path / "run.zarr", **FEW | {"num_draws": 7})
    same(run(batches(), store=tmp_path / "run.zarr", **FEW), expected)


@pytest.mark.parametrize(
    ("path", "error", "match"),
    [
        (3, TypeError, "store is the path of a folder, but got int. Give a str or a Path"),
        ("/nowhere/run", FileNotFoundError, "The folder /nowhere, where the store should go, does not exist"),
        (__file__, NotADirectoryError, "The store .* is a file. Give the path of a folder"),
    ],
    ids=["number", "no folder", "file"],
)
def test_wrong_paths_are_refused(path, error, match):
    with pytest.raises(error, match=match):
        sample(store=path, **FEW)
