"""Time of a step on many groups, shapes and late parameters, and of the first step in a fresh process: ``make bench``.

The first step of a contender includes making the optimizer and compiling; it has a process of its own. Then the
processes take turns, and the medians over rounds count. For the parameters that arrive one at a time there is only a
first step: the whole loop. Where Pyro or torch has fewer cores than the machine, its threads waited for each other
because others had the rest, and its times mean little.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from contenders import Builders, jax_run, torch, torch_run, torch_runs_here
from fresh import Fresh, all_steps
from jaxoptim import optim
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim as pyro_face
from step import Target
from tables import asked
from timing import Effort, Run, Times, duration
from trees import Shapes, gpt2, numbers_in, random_tree

try:
    import pyro.optim

    from pyro_optim import SIZES, pyro_param
    from pyro_optim import contenders as on_names
except ImportError:
    pyro = None

Rates = dict[str, dict[str, float]]
"""The options of each parameter."""

FIRST_STEPS_SECONDS = 10.0
"""First steps of one contender are repeated until they have taken so long."""

IN_GROUPS, IN_ONE = "jaxoptim.optim, groups", "jaxoptim.optim, one group"
CALLED, UPDATED = "jaxoptim.pyro, optim(params)", "jaxoptim.pyro, update(params, grads)"
MINIMIZED, WRITTEN = "jaxoptim.optim, minimize", "optax, a step written by hand"
CLIPPED, WRITTEN_CLIPPED = "jaxoptim.optim, minimize, clipped", "optax, by hand, clipped"
PYRO = "Pyro"


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        title: what it is, for reading.
        builders: makes the data, and returns the contenders.
        reference: the contender with which the others are compared.
        repeats: whether there are later steps.
    """

    title: str
    builders: Callable[[], Builders]
    reference: str
    repeats: bool = True


# Contenders ----------------------------------------------------------------------------------------------


def own_rates(names: Sequence[str]) -> Rates:
    """A rate for each parameter."""
    return {name: {"lr": 1e-3 * (number + 1) / len(names)} for number, name in enumerate(names)}


def layerwise(names: Sequence[str]) -> Rates:
    """Rates that fall from layer to layer towards the tokens, with weight decay for all but biases and positions."""

    def layer(name: str) -> int:
        return int(name.split(".")[1]) + 1 if name.startswith("h.") else 13 if name.startswith("ln_f") else 0

    def decay(name: str) -> float:
        return 0.0 if name.endswith("bias") or name.startswith("wpe") else 0.1

    return {name: {"lr": 1e-3 * 0.75 ** (13 - layer(name)), "weight_decay": decay(name)} for name in names}


def by_options(rates: Rates) -> list[tuple[dict[str, float], list[str]]]:
    """The options that there are, each with the names of its parameters."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, options in rates.items():
        groups.setdefault(tuple(options.items()), []).append(name)
    return [(dict(options), names) for options, names in groups.items()]


def in_jaxoptim(kind: str, values: Any, grads: Any, rates: Rates | None) -> Run:
    """The torch-style class, with a group for each of the options."""
    groups = [(frozenset(names).__contains__, options) for options, names in by_options(rates or {})]
    optimizer = getattr(optim, kind)(values, lr=1e-3, groups=groups)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.step(grads)
        # One of the parameters: to read them all would take hundreds of small calls.
        jax.block_until_ready(optimizer.param_groups[0]["params"][-1].value)

    return run


def in_optax(transformation: Callable[..., Any], values: Any, grads: Any, rates: Rates | None) -> Run:
    """A transformation, or a partition into one for each of the options; the values are given away."""
    if rates is None:
        tx = transformation(1e-3)
    else:
        groups = by_options(rates)
        labels = {name: number for number, (_, names) in enumerate(groups) for name in names}
        rules = {number: transformation(o["lr"], **_without_lr(o)) for number, (o, _) in enumerate(groups)}
        tx = optax.partition(rules, labels)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax_run(step, values, tx.init(values), grads)


def _without_lr(options: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in options.items() if name != "lr"}


def in_torch(kind: str, values: Any, grads: Any, rates: Rates, **options: bool) -> Run:
    """The parent of the torch-style class."""
    params = {name: torch.nn.Parameter(torch.from_dlpack(value).clone()) for name, value in values.items()}
    for name, param in params.items():
        param.grad = torch.from_dlpack(grads[name])
    groups = [{"params": [params[name] for name in names], **own} for own, names in by_options(rates)]
    return torch_run(getattr(torch.optim, kind)(groups, **options))


def named(values: Any, grads: Any) -> list[Parameter]:
    """Parameters with gradients."""
    params = [Parameter(value, name) for name, value in values.items()]
    for param in params:
        param.grad = grads[param.name]
    return params


def named_in_pyro(values: Any, grads: Any) -> list[Any]:
    """Parameters of Pyro's, which has no others then."""
    pyro.clear_param_store()
    return [pyro_param(name, value, grads[name]) for name, value in values.items()]


def on_named(params: list[Parameter], options: Callable[[str], dict[str, float]]) -> Run:
    """The Pyro-style class."""
    optimizer = pyro_face.Adam(options)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer(params)
        jax.block_until_ready(params[-1].value)

    return run


def in_pyro(params: list[Any], options: Callable[[str], dict[str, float]]) -> Run:
    """The parent of the Pyro-style class."""
    optimizer = pyro.optim.Adam(options)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer(params)

    return run


def arriving(optimizer: Any, params: list[Any]) -> Run:
    """A loop in which the parameters arrive one at a time, with a call after each; it can run once."""

    def run(steps: int) -> None:
        for number in range(len(params)):
            optimizer(params[: number + 1])
        if isinstance(params[-1], Parameter):
            jax.block_until_ready(params[-1].value)

    return run


def minimizing(values: Any, loss: Callable[..., jax.Array], x: jax.Array, **options: float) -> Run:
    """Loss, gradient and update by ``minimize``."""
    optimizer = optim.Adam(values, lr=1e-3)

    def run(steps: int) -> None:
        for _ in range(steps):
            value = optimizer.minimize(loss, x, **options)
        jax.block_until_ready(value)

    return run


def written_by_hand(tx: optax.GradientTransformation, values: Any, loss: Callable[..., jax.Array], x: jax.Array) -> Run:
    """Loss, gradient and update as optax's users write them."""

    def step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax_run(step, values, tx.init(values), x)


# Cases ---------------------------------------------------------------------------------------------------


def with_own_rates(shapes: Shapes) -> Builders:
    """Every face on parameters of which each has a rate of its own."""
    values, grads, rates = random_tree(shapes, 0), random_tree(shapes, 1), own_rates(list(shapes))
    builders: Builders = {
        IN_GROUPS: lambda: in_jaxoptim("Adam", values, grads, rates),
        IN_ONE: lambda: in_jaxoptim("Adam", values, grads, None),
        "optax, partition": lambda: in_optax(optax.adam, values, grads, rates),
        "optax, one group": lambda: in_optax(optax.adam, values, grads, None),
    }
    return builders | _torch_builders("Adam", values, grads, rates)


def with_layerwise_rates() -> Builders:
    """A small transformer: 148 arrays with layer-wise rates, against one rate for all."""
    shapes = gpt2(width=96, tokens=256, positions=256)
    values, grads, rates = random_tree(shapes, 0), random_tree(shapes, 1), layerwise(list(shapes))
    builders: Builders = {
        IN_GROUPS: lambda: in_jaxoptim("AdamW", values, grads, rates),
        IN_ONE: lambda: in_jaxoptim("AdamW", values, grads, None),
        "optax, partition": lambda: in_optax(optax.adamw, values, grads, rates),
        "optax, one group": lambda: in_optax(optax.adamw, values, grads, None),
    }
    return builders | _torch_builders("AdamW", values, grads, rates)


def _torch_builders(kind: str, values: Any, grads: Any, rates: Rates) -> Builders:
    if not torch_runs_here():
        return {}
    return {
        f"torch {way}, groups": functools.partial(in_torch, kind, values, grads, rates, **{way: True})
        for way in ("foreach", "fused")
    }


def of_many_shapes() -> Builders:
    """The Pyro-style class on 160 arrays of 160 shapes with a rate each."""
    shapes: Shapes = {f"p{i:03d}": (64 + 3 * i,) for i in range(160)}
    values, grads, rates = random_tree(shapes, 0), random_tree(shapes, 1), own_rates(list(shapes))
    params = named(values, grads)
    builders: Builders = {CALLED: lambda: on_named(params, lambda name: rates[name])}
    if pyro is not None:
        theirs = named_in_pyro(values, grads)
        builders[PYRO] = lambda: in_pyro(theirs, lambda name: rates[name])
    return builders


def that_arrive() -> Builders:
    """The Pyro-style class on 100 parameters of 10 shapes that arrive one at a time."""
    shapes: Shapes = {f"p{i:03d}": (10 + i % 10,) for i in range(100)}
    values, grads = random_tree(shapes, 0), random_tree(shapes, 1)
    params = named(values, grads)
    builders: Builders = {CALLED: lambda: arriving(pyro_face.Adam({"lr": 1e-3}), params)}
    if pyro is not None:
        theirs = named_in_pyro(values, grads)
        builders[PYRO] = lambda: arriving(pyro.optim.Adam({"lr": 1e-3}), theirs)
    return builders


def network(layers: int) -> Builders:
    """A network of layers of 32 x 32 with biases, loss included."""
    shapes: Shapes = {
        f"{i:03d}.{name}": s for i in range(layers) for name, s in [("weight", (32, 32)), ("bias", (32,))]
    }
    values = {name: 0.1 * value for name, value in random_tree(shapes, 0).items()}
    x = jnp.asarray(np.random.default_rng(1).standard_normal((16, 32), np.float32))

    def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        for i in range(layers):
            x = jnp.tanh(x @ params[f"{i:03d}.weight"] + params[f"{i:03d}.bias"])
        return jnp.mean(x**2)

    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return {
        MINIMIZED: lambda: minimizing(values, loss, x),
        CLIPPED: lambda: minimizing(values, loss, x, clip_norm=1.0),
        WRITTEN: lambda: written_by_hand(optax.adam(1e-3), values, loss, x),
        WRITTEN_CLIPPED: lambda: written_by_hand(clipped, values, loss, x),
    }


def arrays_of_100(number: int) -> Shapes:
    """So many arrays of 100 numbers."""
    return {f"p{i:03d}": (100,) for i in range(number)}


CASES = {
    "200-groups": Case(
        "Adam, 200 arrays of 100, each a group with its rate",
        functools.partial(with_own_rates, arrays_of_100(200)),
        "optax, partition",
    ),
    "50-groups": Case(
        "Adam, 50 arrays of 100, each a group with its rate",
        functools.partial(with_own_rates, arrays_of_100(50)),
        "optax, partition",
    ),
    "layerwise": Case(
        f"AdamW, 148 arrays of a transformer of 12 layers ({numbers_in(gpt2(96, 256, 256)):,} numbers), 28 groups",
        with_layerwise_rates,
        IN_ONE,
    ),
    "160-shapes": Case("Adam, 160 arrays of 160 shapes, rates by name", of_many_shapes, PYRO),
    "arriving": Case("Adam, 100 parameters that arrive one at a time: the whole loop", that_arrive, PYRO, False),
    "1000-scalars": Case("Adam, 1000 scalars by name", lambda: on_names("Adam", SIZES["1000 scalars"]), PYRO),
    "20-of-100k": Case("Adam, 20 arrays of 100k by name", lambda: on_names("Adam", SIZES["20 of 100k"]), PYRO),
    "40-in-loss": Case("Adam, loss of a network of 40 arrays", functools.partial(network, 20), WRITTEN),
    "200-in-loss": Case("Adam, loss of a network of 200 arrays", functools.partial(network, 100), WRITTEN),
}

LOSSES = ("40-in-loss", "200-in-loss")
TARGETS = [
    Target(("200-groups",), IN_GROUPS, None, 2.0, "first_step"),
    Target(("200-groups",), IN_GROUPS, None, 0.6e-3),
    Target(("50-groups",), IN_GROUPS, None, 1.5, "first_step"),
    Target(("50-groups",), IN_GROUPS, None, 0.2e-3),
    Target(("layerwise",), IN_GROUPS, IN_ONE, 1.3, "first_step"),
    Target(("layerwise",), IN_GROUPS, IN_ONE, 1.15),
    Target(("160-shapes",), CALLED, None, 2.0, "first_step"),
    Target(("160-shapes",), CALLED, None, 0.6e-3),
    Target(("arriving",), CALLED, None, 5.0, "first_step"),
    Target(("1000-scalars",), UPDATED, None, 8e-3),
    Target(("20-of-100k",), UPDATED, PYRO, 1.0),
    Target(LOSSES, MINIMIZED, WRITTEN, 1.5, "first_step"),
    Target(LOSSES, MINIMIZED, WRITTEN, 1.0),
    Target(LOSSES, CLIPPED, MINIMIZED, 1.15),
]


# Measuring -----------------------------------------------------------------------------------------------


def measured(name: str, effort: Effort) -> dict[str, Times]:
    """The times of the contenders of a case; infinite for one that failed or took too long."""
    case = CASES[name]
    starts = {contender: functools.partial(Fresh, "groups", name, contender) for contender in case.builders()}
    return all_steps(starts, effort, case.repeats)


def table(name: str, times: dict[str, Times]) -> str:
    """The rows of all contenders, for reading."""
    case = CASES[name]
    reference = times.get(case.reference)
    columns = f"{'first step':>12}{'ratio':>9}"
    columns += f"{'later step':>13}{'ratio':>9}{'cores':>7}" if case.repeats else ""
    lines = [f"{case.title}; ratios to {case.reference}", f"  {'':42}{columns}"]
    for contender, of in times.items():
        line = f"  {contender:42}{duration(of.first_step):>12}{_ratio(of, reference, 'first_step'):>9}"
        if case.repeats:
            line += f"{duration(of.step):>13}{_ratio(of, reference, 'step'):>9}{of.cores:>7.1f}"
        lines.append(line)
    return "\n".join(lines)


def _ratio(times: Times, reference: Times | None, quantity: str) -> str:
    return "" if reference is None else f"{getattr(times, quantity) / getattr(reference, quantity):.3f}"


def main() -> None:
    """Measure, and print the tables and the targets."""
    effort = dataclasses.replace(asked(__doc__), first_steps_seconds=FIRST_STEPS_SECONDS)
    verdicts = []
    for name in CASES:
        times = measured(name, effort)
        print("\n" + table(name, times), flush=True)
        verdicts += [t.verdict(name, "adam", times) for t in TARGETS if t.applies(name, times)]
    print("\nTargets")
    print("\n".join(verdicts))


if __name__ == "__main__":
    main()
