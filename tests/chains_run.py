"""One of some processes that run chains over one mesh: ``chains_run.py ADDRESS PROCESSES INDEX FOLDER``.

With one process it saves what the others are to find; each of those compares.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim import rules, sampling

RNG = np.random.default_rng(0)
START = {"a": RNG.normal(size=(3, 4)).astype("f"), "b": RNG.normal(size=4).astype("f")}
X = RNG.normal(size=(64, 3)).astype("f")
DATA = {"x": X, "y": np.tanh(X @ START["a"]) @ START["b"] + RNG.normal(size=64).astype("f")}


def loss(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["a"]) @ params["b"] - batch["y"]) ** 2) / 2


def found(mesh):
    """What chains on eight devices come to, by each of the functions that take a mesh over processes."""
    common = {"key": jax.random.key(0), "num_chains": 16, "num_draws": 70, "mesh": mesh}
    sampler = rules.SGLD(lr=1e-3, nbeta=30.0, localization=5.0)
    samples = sampling.sample(
        loss, START, sampler, DATA, batch_size=8, observables={"covariance": sampling.Covariance()}, **common
    )
    llc = sampling.estimate_llc(loss, START, sampler, DATA, until_mcse=100.0, **common)
    swapped = sampling.parallel_tempering(loss, START, sampler, DATA, nbeta=[1.0, 2.0], **common)
    return {
        "loss": samples.loss,
        "covariance": samples.observables["covariance"],
        "llc": llc.per_chain,
        "swapped": swapped.loss,
    }, samples


def main(address, processes, index, folder):
    if processes > 1:
        jax.distributed.initialize(address, processes, index)
    results, samples = found(jax.make_mesh((8,), ("chains",)))
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
