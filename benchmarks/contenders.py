"""The same optimizer from each library, as functions that build something to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.sparse import BCOO

import jaxoptim
from jaxoptim import optim
from timing import Run

try:
    import torch
except ImportError:
    torch = None

Builders = dict[str, Callable[[], Run]]

STREAM_SIZE = 2**25
"""Numbers in each array of the stream: far more than a cache holds."""
STREAM_BYTES = 3 * 4 * STREAM_SIZE

TABLE_ROWS, TABLE_WIDTH, TOUCHED_ROWS = 10**6, 32, 1024


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One algorithm with the same hyperparameters in three libraries, and the traffic it cannot do without.

    Attributes:
        class_name: of the class in torch and in ``jaxoptim.optim``.
        options: what both classes take.
        bytes_per_number: what must be read and written for each float32 parameter: the gradient read, the
            parameter and every moment read and written.
    """

    rule: jaxoptim.Rule
    optax: optax.GradientTransformation
    class_name: str
    options: dict[str, float]
    bytes_per_number: int
    has_fused: bool


OPTIMIZERS = {
    "adam": Optimizer(jaxoptim.rules.Adam(lr=1e-3), optax.adam(1e-3), "Adam", {"lr": 1e-3}, 28, True),
    "sgd": Optimizer(
        jaxoptim.rules.SGD(lr=1e-3, momentum=0.9),
        optax.sgd(1e-3, momentum=0.9),
        "SGD",
        {"lr": 1e-3, "momentum": 0.9},
        20,
        True,
    ),
    "rmsprop": Optimizer(
        jaxoptim.rules.RMSprop(lr=1e-3),
        optax.rmsprop(1e-3, decay=0.99, eps_in_sqrt=False),
        "RMSprop",
        {"lr": 1e-3},
        20,
        False,
    ),
}


def torch_runs_here() -> bool:
    """Whether torch is installed and sees the device that JAX uses."""
    return torch is not None and (jax.default_backend() == "cpu" or torch.cuda.is_available())


def stream() -> Run:
    """Read two large arrays and write one."""
    x = jnp.ones(STREAM_SIZE)
    return jax_run(lambda total, nothing, x: (total + x, nothing), jnp.zeros(STREAM_SIZE), None, x)


def on_tree(optimizer: Optimizer, params: dict[str, jax.Array], grads: dict[str, jax.Array]) -> Builders:
    """Every contender on one tree. They share the gradients; each has its own parameters and moments."""
    rule, tx = optimizer.rule, optimizer.optax
    leaves, treedef = jax.tree.flatten(rule)
    numbers = jnp.array(leaves)

    def step(params: Any, state: Any, grads: Any, rule: jaxoptim.Rule = rule) -> tuple[Any, Any]:
        return jaxoptim.step(rule, params, grads, state)

    def step_with_numbers(params: Any, state: Any, grads: Any, numbers: jax.Array) -> tuple[Any, Any]:
        return jaxoptim.step(jax.tree.unflatten(treedef, list(numbers)), params, grads, state)

    def train(params: jaxoptim.Packed, state: Any, numbers: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda params: loss_of_squares(params.unpack()))(params)
        return *jaxoptim.step(jax.tree.unflatten(treedef, list(numbers)), params, grads, state), loss

    def optax_step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def plain() -> Any:
        return jax.tree.map(jnp.copy, params)

    def packed() -> Any:
        return jaxoptim.pack(plain())

    def builder(
        step: Callable[..., Any], start: Callable[[], Any], init: Callable[[Any], Any], *rest: Any
    ) -> Callable[[], Run]:
        def build() -> Run:
            params = start()
            return jax_run(step, params, init(params), *rest)

        return build

    def init(params: Any) -> Any:
        return jaxoptim.init(rule, params)

    builders = {
        "jaxoptim": builder(step, plain, init, grads),
        "jaxoptim, traced rule": builder(step, plain, init, grads, rule),
        "jaxoptim, hyperparameters as an array": builder(step_with_numbers, plain, init, grads, numbers),
        "jaxoptim, packed": builder(step, packed, init, grads),
        "jaxoptim, packed, with loss and gradient": builder(train, packed, init, numbers),
        "jaxoptim.optim, step": _optim_builder(optimizer, params, lambda opt: opt.step(grads)),
        "jaxoptim.optim, minimize": _optim_builder(optimizer, params, lambda opt: opt.minimize(loss_of_squares)),
        "optax": builder(optax_step, plain, tx.init, grads),
    }
    if torch_runs_here():
        kinds = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}}
        kinds |= {"fused": {"fused": True}} if optimizer.has_fused else {}
        for kind, options in kinds.items():
            builders[f"torch {kind}"] = _torch_builder(optimizer, params, grads, options)
    return builders


def on_table() -> Builders:
    """An embedding table of which a batch touches few rows: row-wise against dense Adam."""
    key = jax.random.key(0)
    rows = jax.random.choice(key, TABLE_ROWS, (TOUCHED_ROWS,), replace=False)
    values = jax.random.normal(key, (TOUCHED_ROWS, TABLE_WIDTH))
    shape = (TABLE_ROWS, TABLE_WIDTH)
    rule, tx = jaxoptim.rules.SparseAdam(), optax.adam(1e-3)

    def step(table: Any, state: Any, rows: Any, values: Any) -> tuple[Any, Any]:
        return jaxoptim.step(rule, table, BCOO((values, rows[:, None]), shape=shape), state)

    def optax_step(table: Any, state: Any, rows: Any, values: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jnp.zeros(shape).at[rows].add(values), state, table)
        return optax.apply_updates(table, updates), state

    def sparse() -> Run:
        return jax_run(step, jnp.ones(shape), jaxoptim.init(rule, jnp.ones(shape)), rows, values)

    def dense() -> Run:
        return jax_run(optax_step, jnp.ones(shape), tx.init(jnp.ones(shape)), rows, values)

    def torch_sparse() -> Run:
        table = torch.nn.Parameter(torch.from_dlpack(jnp.ones(shape)).clone())
        indices = torch.from_dlpack(rows)[None].long()
        table.grad = torch.sparse_coo_tensor(indices, torch.from_dlpack(values), shape, check_invariants=False)
        return torch_run(torch.optim.SparseAdam([table]))

    builders = {"jaxoptim": sparse, "optax, dense": dense}
    return builders | ({"torch": torch_sparse} if torch_runs_here() else {})


def loss_of_squares(tree: dict[str, jax.Array]) -> jax.Array:
    """The cheapest of losses, so that what is timed is the way through ``unpack``."""
    return sum(jnp.sum((x - 1) ** 2) for x in tree.values())


def jax_run(step: Callable[..., Any], params: Any, state: Any, *rest: Any) -> Run:
    """Repeat ``params, state, ... = step(params, state, *rest)``, jitted and donated."""
    # A function of its own, so that this run compiles whatever another has compiled.
    compiled = jax.jit(lambda *args: step(*args), donate_argnums=(0, 1))

    def run(steps: int) -> None:
        nonlocal params, state
        for _ in range(steps):
            params, state, *_ = compiled(params, state, *rest)
        jax.block_until_ready((params, state))

    return run


def _optim_builder(
    optimizer: Optimizer, params: dict[str, jax.Array], step: Callable[[optim.Optimizer], Any]
) -> Callable[[], Run]:
    def build() -> Run:
        # Made at the first step and not before, because making it belongs to what a user waits for.
        made: list[optim.Optimizer] = []

        def run(steps: int) -> None:
            if not made:
                made.append(getattr(optim, optimizer.class_name)(params, **optimizer.options))
            for _ in range(steps):
                step(made[0])
            # One of the parameters: to read them all would take a thousand small calls.
            jax.block_until_ready(made[0].param_groups[0]["params"][-1].value)

        return run

    return build


def _torch_builder(optimizer: Optimizer, params: Any, grads: Any, options: dict[str, bool]) -> Callable[[], Run]:
    def build() -> Run:
        parameters = []
        for name, value in params.items():
            parameters.append(torch.nn.Parameter(torch.from_dlpack(value).clone()))
            parameters[-1].grad = torch.from_dlpack(grads[name])
        return torch_run(getattr(torch.optim, optimizer.class_name)(parameters, **optimizer.options, **options))

    return build


def torch_run(optimizer: Any) -> Run:
    """Repeat torch's ``optimizer.step()``."""

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run
