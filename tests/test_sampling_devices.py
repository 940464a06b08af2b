"""Chains over the devices of a mesh: as many on each, with the numbers of one device, and no word between them."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from chains_run import DATA, START, loss
from jaxoptim import rules, sampling
from jaxoptim.sampling import chains
from jaxoptim.sampling.chain import Thinning
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.run import prepare, stacked
from jaxoptim.sampling.target import problem
from programs import collectives

KEY = jax.random.key(0)
SAMPLER = rules.SGLD(lr=1e-3, nbeta=30.0, localization=5.0)


def mesh_of(*shape):
    return jax.make_mesh(shape, ("a", "b")[: len(shape)])


@pytest.mark.costly
@pytest.mark.parametrize("method", ["map", "vmap"])
@pytest.mark.parametrize("where", ["on the host", "on the mesh"])
def test_chains_are_spread_over_a_mesh(method, where):
    """Wherever parameters and data are before."""
    mesh = mesh_of(4, 2)

    def run(mesh, start=START, data=DATA):
        options = {"num_chains": 64, "num_draws": 5, "batch_size": 8, "chain_method": method}
        return sampling.sample(loss, start, SAMPLER, data, key=KEY, mesh=mesh, **options)

    expected = run(mesh_of(1))
    whole, parts = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("a",)))
    given = () if where == "on the host" else (jax.device_put(START, whole), jax.device_put(DATA, parts))
    found = run(mesh, *given)
    chex.assert_trees_all_close((found.loss, found.params), (expected.loss, expected.params), rtol=1e-6, atol=1e-7)
    for x in (found.loss, *jax.tree.leaves(found.params)):
        assert [shard.data.shape[0] for shard in x.addressable_shards] == [8] * 8
    assert len(np.unique(found.loss[:, -1])) == 64


@pytest.mark.parametrize("method", ["map", pytest.param("vmap", marks=pytest.mark.slow)])
def test_devices_do_not_speak_with_each_other(method):
    options = RunOptions(KEY, 16, 5, batch_size=8, chain_method=method, mesh=mesh_of(8))
    prepared = prepare(problem(loss, START, DATA, options), SAMPLER, stacked(SAMPLER, 1), 1, options)
    its = prepared.spec, prepared.method, prepared.mesh, prepared.rules, prepared.settings, prepared.state
    program = chains.run_steps.lower(*its, prepared.problem.given, Thinning(0, 1), 0, 5, None).compile()
    text = program.as_text()
    assert "num_partitions=8" in text
    assert not collectives(text)


CALLS = {
    "estimate_llc": lambda **options: sampling.estimate_llc(loss, START, SAMPLER, DATA, **options).loss,
    "calibrate": lambda **options: (
        sampling.calibrate(loss, START, SAMPLER, DATA, lr=[1e-3], localization=[5.0, 50.0], **options).trace
    ),
    "llc_over_checkpoints": lambda **options: (
        sampling.llc_over_checkpoints(loss, [START, jax.tree.map(jnp.cos, START)], SAMPLER, DATA, **options).loss
    ),
    "parallel_tempering": lambda **options: (
        sampling.parallel_tempering(loss, START, SAMPLER, DATA, nbeta=[1.0, 2.0], **options).loss
    ),
    "susceptibilities": lambda **options: sampling.susceptibilities(
        loss, START, SAMPLER, DATA, probes={"x": DATA}, **options
    ).chi["x"],
}


@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
@pytest.mark.costly
@pytest.mark.parametrize("name", CALLS)
def test_every_function_takes_a_mesh(name):
    found, expected = (
        CALLS[name](key=KEY, num_chains=8, num_draws=5, chain_method="map", mesh=mesh_of(size)) for size in (8, 1)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_errors_of_a_mesh(tmp_path):
    with pytest.raises(ValueError, match=r"The mesh has 8 devices, which do not divide 10 chains\. Give another"):
        sampling.sample(loss, START, SAMPLER, DATA, key=KEY, num_chains=10, mesh=mesh_of(8))
    with pytest.raises(TypeError, match=r"mesh takes a Mesh, .* but got 'chains'"):
        sampling.sample(loss, START, SAMPLER, DATA, key=KEY, mesh="chains")


@pytest.mark.slow
def test_chains_over_two_processes_are_those_of_one(together, tmp_path):
    """To the last bit, whole on both but for the parameters."""
    for count in (1, 2):
        processes = together(Path(__file__).parent / "chains_run.py", count, tmp_path, devices=8 // count)
        for output, errors in [process.communicate(timeout=300) for process in processes]:
            assert output.endswith("done\n"), errors
