"""Processes that run tasks of one library, with cores and threads of their own.

The number of cores, of devices and of threads is fixed before jax or torch is imported, so every contender has a
process: ``python sampling_workers.py jaxoptim-1core``. It reads tasks, one JSON object in a line, and answers each with
its times. All stay alive, so that contenders can take turns.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

LR, LOCALIZATION, NBETA, BATCH = 1e-4, 100.0, 46.2, 256
METRICS = dict.fromkeys(("noise_norm", "grad_norm", "weight_norm", "distance"), True)

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

KINDS: dict[str, tuple[int, dict[str, str]]] = {
    "jaxoptim-1core": (1, {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}),
    "jaxoptim-2devices": (2, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}),
    "jaxoptim-2cores": (2, {}),
    "devinterp-1core": (1, {"OMP_NUM_THREADS": "1"}),
    "devinterp-2cores": (2, {"OMP_NUM_THREADS": "1"}),
}
"""How many cores a process has, and its environment."""

Task = dict[str, Any]
Times = dict[str, float]


class Worker:
    """A process that measures."""

    def __init__(self, kind: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
        environment |= KINDS[kind][1] | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()  # its imports are done

    def run(self, task: Task) -> Times:
        """Run a task once; seconds of wall and processor time."""
        assert self.process.stdin is not None  # noqa: S101
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _answer(self) -> Times:
        assert self.process.stdout is not None  # noqa: S101
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)} ended.")  # type: ignore[arg-type]
        return json.loads(line)


def digits() -> Any:
    """Images and labels of scikit-learn's handwritten digits."""
    import numpy as np
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels


# jaxoptim ------------------------------------------------------------------------------------------------


def in_jaxoptim(cores: int) -> Callable[[Task], Callable[[], Any]]:
    """What makes a function of a task, to be timed."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxoptim import rules, sampling
    from jaxoptim.core import noise

    data = jax.tree.map(jnp.asarray, digits())

    def network_loss(params: Any, batch: Any) -> jax.Array:
        x, labels = batch
        for number, (weight, bias) in enumerate(params):
            x = x @ weight + bias
            x = jax.nn.relu(x) if number < len(params) - 1 else x
        return jnp.mean(jax.nn.logsumexp(x, -1) - jnp.take_along_axis(x, labels[:, None], -1)[:, 0])

    def quadratic(params: jax.Array) -> jax.Array:
        return jnp.sum(params**2) / 2

    def network(sizes: list[int]) -> Any:
        rng = np.random.default_rng(0)
        return [
            (jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32), jnp.zeros(shape[1]))
            for shape in itertools.pairwise(sizes)
        ]

    draw = {
        "jax": jax.jit(jax.random.normal, static_argnums=1),
        "key": lambda key, shape: noise.normal(key, shape, jnp.float32, "key"),
        "hash": lambda key, shape: noise.normal(key, shape, jnp.float32, "hash"),
    }

    def sampled(*args: Any, **kwargs: Any) -> None:
        jax.block_until_ready(sampling.sample(*args, **kwargs).loss)

    def prepared(task: Task) -> Callable[[], Any]:
        key = jax.random.key(0)
        if "numbers" in task:
            return lambda: jax.block_until_ready([draw[task["impl"]](key, (task["numbers"],)) for _ in range(20)])
        metrics = METRICS if task.get("metrics") else {}
        rule = rules.SGLD(lr=LR, localization=LOCALIZATION, nbeta=NBETA, noise_impl=task.get("impl", "key"), **metrics)
        estimate = functools.partial(sampling.estimate_llc, nbeta=NBETA)
        run = functools.partial(
            sampled if task.get("only_sample") else estimate,
            key=key,
            num_chains=task["chains"],
            num_draws=task["draws"],
            chain_method=task.get("method", "auto"),
        )
        if "quadratic" in task:
            return functools.partial(run, quadratic, jnp.zeros(task["quadratic"]), rule)
        return functools.partial(run, network_loss, network(task["network"]), rule, data, batch_size=BATCH)

    return prepared


# devinterp -----------------------------------------------------------------------------------------------


def evaluate(model: Any, batch: Any) -> Any:
    """The loss of a batch; devinterp's own processes import it from here."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(model(batch[0]), batch[1]), {}


def in_devinterp(cores: int) -> Callable[[Task], Callable[[], Any]]:
    """As :func:`in_jaxoptim`."""
    import torch
    from devinterp.optim.sgld import SGLD
    from devinterp.slt.llc import LLCEstimator
    from devinterp.slt.sampler import sample
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(1)
    data = TensorDataset(*map(torch.tensor, digits()))

    def prepared(task: Task) -> Callable[[], Any]:
        if "numbers" in task:
            numbers = torch.empty(task["numbers"])
            return lambda: [numbers.normal_() for _ in range(20)]
        torch.manual_seed(0)
        layers = []
        for inputs, outputs in itertools.pairwise(task["network"]):
            layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
        model = torch.nn.Sequential(*layers[:-1])
        metrics = METRICS if task.get("metrics") else {}

        def run() -> None:
            estimator = LLCEstimator(task["chains"], task["draws"], init_loss=torch.tensor(0.0), nbeta=NBETA)
            sample(
                model,
                DataLoader(data, batch_size=BATCH, shuffle=True),
                [estimator],
                evaluate=evaluate,
                sampling_method=SGLD,
                optimizer_kwargs={"lr": LR, "localization": LOCALIZATION, "nbeta": NBETA, **metrics},
                num_draws=task["draws"],
                num_chains=task["chains"],
                cores=cores,
                seed=1,
                verbose=False,
            )

        return run

    return prepared


# The process ---------------------------------------------------------------------------------------------


def processor_time() -> float:
    """Seconds of this process and of those that it has started and waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Answer tasks until there are no more."""
    kind = sys.argv[1]
    cores = KINDS[kind][0]
    if CORES:
        os.sched_setaffinity(0, CORES[:cores])
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")  # what the libraries print goes elsewhere
    os.dup2(2, 1)
    task_of = {"jaxoptim": in_jaxoptim, "devinterp": in_devinterp}[kind.split("-")[0]](cores)
    answers.write("{}\n")
    answers.flush()
    for line in sys.stdin:
        run = task_of(json.loads(line))
        start, cpu = time.perf_counter(), processor_time()
        run()
        times = {"wall": time.perf_counter() - start, "cpu": processor_time() - cpu}
        answers.write(json.dumps(times) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
