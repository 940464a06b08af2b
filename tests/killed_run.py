"""A training run that may be killed at any moment, for test_checkpoint.py.

``killed_run.py PATH STEPS``: goes on from the checkpoint at PATH if there is one, saves one after each step, and
prints the step from which it goes on, a line after its first save, and at the end a digest of everything.
"""

import hashlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim import checkpoint, optim
from jaxoptim.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


@jax.jit
def gradients(params, key):
    return jax.tree.map(lambda x: x - jax.random.normal(key, x.shape, x.dtype), params)


def main(path, steps):
    run = checkpoint.load(path) if path.exists() else None
    params = run["params"] if run else {"w": jnp.ones((500, 400)), "b": jnp.zeros(7, jnp.bfloat16)}
    opt = optim.AdamW(params, lr=0.01)
    scheduler = optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=steps + 1)
    averaged, key, done = AveragedModel(opt, multi_avg_fn=get_ema_multi_avg_fn(0.9)), jax.random.key(0), 0
    if run:
        opt.load_state_dict(run["opt"])
        scheduler.load_state_dict(run["scheduler"])
        averaged.load_state_dict(run["averaged"])
        key, done = run["key"], run["done"]
    print("from", done, flush=True)  # noqa: T201
    while done < steps:
        key, subkey = jax.random.split(key)
        opt.step(gradients(opt.params, subkey))
        scheduler.step()
        averaged.update_parameters(opt)
        done += 1
        everything = {"params": opt.params, "opt": opt.state_dict(), "scheduler": scheduler.state_dict()}
        everything |= {"averaged": averaged.state_dict(), "key": key, "done": done}
        checkpoint.save(path, everything, keep=2)
        print("saved", flush=True)  # noqa: T201
    run = checkpoint.load(path)
    keys, rates = jax.random.key_data(run.pop("key")), repr((run["scheduler"], run["opt"]["param_groups"]))
    digest = hashlib.sha256(rates.encode())
    for x in jax.tree.leaves((run["params"], run["opt"]["state"], run["averaged"], keys, run["done"])):
        digest.update(np.asarray(x).tobytes())
    print("digest", digest.hexdigest(), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
