"""Steps of one large array by kernels of one pass, by XLA's code, and by torch or devinterp, in turn: ``make bench``.

``python benchmarks/one_pass.py --plot docs/images/one_pass.png`` draws them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import devinterp.optim
import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxoptim

RULES: dict[str, dict[str, Any]] = {
    "Adam": {},
    "AdamW": {},
    "SGD": {"momentum": 0.9},
    "RMSprop": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Adagrad": {},
    "Adadelta": {},
    "ASGD": {},
    "Rprop": {},
    "SGLD": {"nbeta": 10.0, "localization": 1.0},
    "SGLD, metrics": {
        "nbeta": 10.0,
        "localization": 1.0,
        **dict.fromkeys(("noise_norm", "grad_norm", "weight_norm", "distance"), True),
    },
    "SGNHT": {"nbeta": 10.0},
}
"""The options of each optimizer and sampler, beside the learning rate; those of devinterp have the same names."""
FUSED = ("Adam", "AdamW", "SGD", "Adagrad")
"""Those of which torch has a fused kernel."""
ONE_PASS, XLA, TORCH = "one pass", "XLA", "torch"


def ours(mode: str, name: str, gradient: np.ndarray) -> Callable[[], None]:
    """A step of ours, compiled under a setting."""
    jaxoptim.config.native = mode
    rule = getattr(jaxoptim.rules, kind(name))(lr=1e-3, **RULES[name])
    grads, params = jnp.asarray(gradient), jnp.ones(gradient.shape)
    held = [params, jaxoptim.init(rule, params)]
    step = jax.jit(jaxoptim.step, donate_argnums=(1, 3)).lower(rule, params, grads, held[1]).compile()

    def run() -> None:
        held[:] = step(rule, held[0], grads, held[1])
        jax.block_until_ready(held)

    return run


def kind(name: str) -> str:
    """The class of a row."""
    return name.partition(",")[0]


def torchs(name: str, gradient: np.ndarray) -> Callable[[], None]:
    """A step of torch's, fused if it can be; of devinterp's for samplers."""
    param = torch.nn.Parameter(torch.ones(gradient.shape))
    param.grad = torch.from_numpy(gradient.copy())
    flags = {"fused": True} if name in FUSED else {}
    library: Any = torch.optim if hasattr(torch.optim, kind(name)) else devinterp.optim
    optimizer: Any = getattr(library, kind(name))([param], lr=1e-3, **RULES[name], **flags)
    return lambda: optimizer.step()


def timed(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median of the milliseconds of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.05)  # torch's threads wait for more work on their cores, some milliseconds long
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(of_one[1:]) for name, of_one in times.items()}


def drawn(measured: dict[str, dict[str, float]], size: int, path: str) -> None:
    """Draw bars of each optimizer."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    for at, (side, colour) in enumerate({ONE_PASS: "#1b6ca8", XLA: "#9dc3e6", TORCH: "#ee8434"}.items()):
        places = [place + 0.27 * (at - 1) for place in range(len(measured))]
        axes.bar(places, [times[side] for times in measured.values()], 0.25, label=side, color=colour)
    axes.set_xticks(range(len(measured)), [f"{name}\n(fused)" if name in FUSED else name for name in measured])
    axes.set(
        yscale="log", ylabel="ms a step", title=f"{size / 1e6:g}M numbers of float32, {torch.get_num_threads()} cores"
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=25_000_000, help="numbers in the array")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="", help="only rows whose name has this")
    parser.add_argument("--plot", help="where to draw them")
    options = parser.parse_args()
    gradient = np.random.default_rng(0).normal(size=options.size).astype(np.float32)
    print(f"{'ms a step':12}{ONE_PASS:>10}{XLA:>10}{TORCH:>10}{'/ torch':>10}{'/ XLA':>10}")
    measured = {}
    for name in (name for name in RULES if options.only in name):
        runs = {ONE_PASS: ours("on", name, gradient), XLA: ours("off", name, gradient), TORCH: torchs(name, gradient)}
        times = measured[name] = timed(runs, options.rounds)
        ratios = times[ONE_PASS] / times[TORCH], times[ONE_PASS] / times[XLA]
        columns = "".join(f"{times[side]:10.1f}" for side in runs) + "".join(f"{ratio:10.2f}" for ratio in ratios)
        print(f"{name:12}{columns}{'  fused' if name in FUSED else ''}", flush=True)
    if options.plot:
        drawn(measured, options.size, options.plot)


if __name__ == "__main__":
    main()
