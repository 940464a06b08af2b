"""One of some processes of a training whose state is in parts over all of their devices.

``trained_run.py ADDRESS PROCESSES INDEX FOLDER STEPS``: goes on from the checkpoint in the folder if there is one,
saves one after each step, and prints the step from which it goes on, and a line after each save. At the end process 0
writes the parameters beside it.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxoptim import checkpoint, optim

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 16)).astype("f")
Y = np.sin(X[:, :4])


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)


def main(folder, steps):
    path = folder / "run.safetensors"
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    x, y = (jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in (X, Y))
    rng = np.random.default_rng(1)
    params = {"a": rng.normal(size=(16, 32)).astype("f"), "b": rng.normal(size=(32, 4)).astype("f")}
    run = checkpoint.load(path) if path.exists() else {"params": params, "done": 0}
    opt = optim.AdamW(run["params"], lr=0.01, mesh=mesh, zero="data")
    scheduler = optim.lr_scheduler.ExponentialLR(opt, 0.99)
    if "opt" in run:
        opt.load_state_dict(run["opt"])
        scheduler.load_state_dict(run["scheduler"])
    print("from", run["done"], flush=True)  # noqa: T201
    for done in range(run["done"] + 1, steps + 1):
        opt.minimize(loss, x, y)
        scheduler.step()
        everything = {"params": opt.params, "opt": opt.state_dict(), "scheduler": scheduler.state_dict(), "done": done}
        checkpoint.save(path, everything, keep=2)
        print("saved", flush=True)  # noqa: T201
    if jax.process_index() == 0:
        np.savez(folder / "end.npz", **{name: np.asarray(x) for name, x in opt.params.items()})


if __name__ == "__main__":
    address, processes, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if processes > 1:
        limits = {"heartbeat_timeout_seconds": 20, "shutdown_timeout_seconds": 20}
        jax.distributed.initialize(address, processes, index, **limits)
    main(Path(sys.argv[4]), int(sys.argv[5]))
