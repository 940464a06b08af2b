"""One of two processes that train together, for test_pyro_horovod.py: ``horovod_run.py ADDRESS INDEX FOLDER``.

Each has gradients of its own, one parameter without a gradient in the second process, one without any, and gives the
parameters in another order. The values and the state after the run are written to a file for each ``op``, and by the
first process those of one that has the reduced gradients.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim import checkpoint
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim

STEPS = 6
SHAPES = {"a": (3,), "b": (2, 2), "c": (3,), "half": (4,), "large": (20_000,), "never": (2,)}


def gradient(name, process, t):
    """The gradient of one process, exact in every precision; None where it has none."""
    if name == "never" or (name == "b" and process == 1) or (name == "c" and t % 2 == process):
        return None
    rng = np.random.default_rng([sorted(SHAPES).index(name), process, t])
    return rng.integers(-8, 9, size=SHAPES[name]) / 4.0


def new_parameters():
    """The parameters as all processes begin."""
    return {
        name: Parameter(jnp.linspace(-1, 1, int(np.prod(shape))).reshape(shape).astype(dtype_of(name)), name)
        for name, shape in SHAPES.items()
    }


def dtype_of(name):
    return "bfloat16" if name == "half" else "float32"


def new_optimizer():
    """Options and clipping by name."""
    return optim.Adam(lambda name: {"lr": 0.1 if name == "a" else 0.05}, {"clip_norm": 1.0})


def train(op, index):
    """The run of one process."""
    optimizer = optim.HorovodOptimizer(new_optimizer(), op=op)
    params = new_parameters()
    for t in range(STEPS):
        for name, param in params.items():
            grad = gradient(name, index, t)
            param.grad = None if grad is None else jnp.asarray(grad, param.dtype)
        cells = list(params.values())
        optimizer(cells if index == 0 else cells[::-1])
    return {name: param.value for name, param in params.items()}, optimizer.get_state()


def train_alone(op):
    """The run that the two should make, in one process from gradients reduced by hand."""
    optimizer, params = new_optimizer(), new_parameters()
    for t in range(STEPS):
        for name, param in params.items():
            grads = [grad for index in range(2) if (grad := gradient(name, index, t)) is not None]
            param.grad = jnp.asarray(sum(grads) / (2 if op == "average" else 1), param.dtype) if grads else None
        optimizer(list(params.values()))
    return {name: param.value for name, param in params.items()}, optimizer.get_state()


def main(address, index, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, index)
    for op in ("average", "sum"):
        values, state = train(op, index)
        checkpoint.save(folder / f"{op}-{index}", {"values": values, "state": state})
        if index == 0:
            values, state = train_alone(op)
            checkpoint.save(folder / f"{op}-alone", {"values": values, "state": state})
    print("trained", flush=True)  # noqa: T201
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
