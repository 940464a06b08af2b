"""One of some processes that run chains and fits over one mesh: ``chains_run.py ADDRESS PROCESSES INDEX FOLDER``.

With one process it saves what the others are to find; each of those compares.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Trace_ELBO

from jaxoptim import rules, sampling
from jaxoptim.pyro.infer import SVI

RNG = np.random.default_rng(0)
START = {"a": RNG.normal(size=(3, 4)).astype("f"), "b": RNG.normal(size=4).astype("f")}
X = RNG.normal(size=(64, 3)).astype("f")
DATA = {"x": X, "y": np.tanh(X @ START["a"]) @ START["b"] + RNG.normal(size=64).astype("f")}


def loss(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["a"]) @ params["b"] - batch["y"]) ** 2) / 2


def model():
    x = numpyro.sample("x", dist.Normal(0.0, 10.0))
    numpyro.factor("two valleys", -((x**2 - 4.0) ** 2) + x)


def guide():
    numpyro.sample("x", dist.Delta(numpyro.param("start", lambda key: 3 * jax.random.normal(key))))


def found(mesh, file):
    """What chains and fits on eight devices come to."""
    common = {"key": jax.random.key(0), "num_chains": 16, "num_draws": 70, "mesh": mesh}
    sampler = rules.SGLD(lr=1e-3, nbeta=30.0, localization=5.0)
    whole, saved = (
        {"num_chains": 16, "num_draws": 60, "batch_size": 8, "key": jax.random.key(1), "mesh": mesh, "checkpoint": x}
        for x in (None, file)
    )
    if jax.process_count() > 1:  # goes on from what one process has saved, and from what it has
        sampling.sample(loss, START, sampler, DATA, **saved | {"num_draws": 40})
    else:
        sampling.sample(loss, START, sampler, DATA, **saved | {"num_draws": 20})
        saved = whole
    resumed = sampling.sample(loss, START, sampler, DATA, **saved)
    samples = sampling.sample(
        loss, START, sampler, DATA, batch_size=8, observables={"covariance": sampling.Covariance()}, **common
    )
    llc = sampling.estimate_llc(loss, START, sampler, DATA, until_mcse=100.0, **common)
    swapped = sampling.parallel_tempering(loss, START, sampler, DATA, nbeta=[1.0, 2.0], **common)
    svi = SVI(model, guide, rules.Adam(lr=0.05), Trace_ELBO())
    fits = svi.run_many(16, 500, progress_bar=False, mesh=mesh)
    svi.run(10, progress_bar=False)
    return {
        "loss": samples.loss,
        "covariance": samples.observables["covariance"],
        "resumed": resumed.loss,
        "llc": llc.per_chain,
        "swapped": swapped.loss,
        "fits": fits.losses,
        "best": svi.get_params()["start"],
    }, samples


def main(address, processes, index, folder):
    if processes > 1:
        jax.distributed.initialize(address, processes, index)
    results, samples = found(jax.make_mesh((8,), ("chains",)), folder / "chains.safetensors")
    assert samples.params["a"].sharding.spec[0] == "chains"
    path = folder / "alone.npz"
    if processes == 1:
        np.savez(path, **{name: np.asarray(x) for name, x in results.items()})
    else:
        alone = np.load(path)
        for name, x in results.items():
            np.testing.assert_array_equal(np.asarray(x), alone[name], name)
    print("done", flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
