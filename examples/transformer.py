"""A patch transformer on scikit-learn's handwritten digits in nnx, equinox and plain pytrees, with one training loop.

Run ``python examples/transformer.py --help`` for the options; ``--torch`` trains it in torch too. The network has
dropout and batch statistics. The loop has AdamW without decay on vectors, warmup and a cosine, clipping, two
micro-batches to a step, and an exponential moving average of the weights. Halfway each run is saved; it goes on from
the file in new objects, and must end as the run that was not interrupted, to the last bit. Without dropout the losses
of the networks must agree to ``TOLERANCE``. A table has accuracies and steps per second, a figure the curves.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from digits import BATCH_SIZE, Data, OneLineParser, check_difference, load_data, shuffled
from jaxoptim import checkpoint, groups, optim

try:
    import equinox as eqx
    from flax import nnx
except ImportError:
    raise SystemExit("This example needs equinox and flax: pip install equinox flax.") from None

WIDTH, HEADS, BLOCKS, PATCHES, PIXELS = 32, 4, 2, 16, 4
DROPOUT, EPS, MOMENTUM = 0.1, 1e-5, 0.9

LR, WEIGHT_DECAY, CLIP_NORM, MICRO_BATCHES, EMA_DECAY = 0.01, 0.1, 1.0, 2, 0.98

COMPARED, TOLERANCE = 20, 1e-11
"""How many losses without dropout are compared, in float64, and how far apart they may be. They come to 1e-15; another
epsilon in one norm comes to 8e-7."""


# The data and the weights --------------------------------------------------------------------------------


def in_patches(data: Data) -> Data:
    """NumPy's arrays, which every library takes, with the images as 16 patches of 2x2 pixels."""
    train, test, *labels = map(np.asarray, data)
    images = (x.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, PATCHES, PIXELS) for x in (train, test))
    return Data(*images, *labels)


def init_params(rng: np.random.Generator) -> Any:
    """The initial weights of all four networks, in torch's names and layout."""

    def linear(outputs: int, inputs: int) -> Any:
        return {"weight": rng.normal(scale=inputs**-0.5, size=(outputs, inputs)), "bias": np.zeros(outputs)}

    def norm() -> Any:
        return {"weight": np.ones(WIDTH), "bias": np.zeros(WIDTH)}

    def block() -> Any:
        attention = {"norm1": norm(), "qkv": linear(3 * WIDTH, WIDTH), "out": linear(WIDTH, WIDTH)}
        return attention | {"norm2": norm(), "up": linear(2 * WIDTH, WIDTH), "down": linear(WIDTH, 2 * WIDTH)}

    return {
        "embed": {"weight": linear(WIDTH, PIXELS)["weight"]},  # a norm takes a bias away
        "batch_norm": norm(),
        "position": rng.normal(scale=0.1, size=(PATCHES, WIDTH)),
        "blocks": [block() for _ in range(BLOCKS)],
        "norm": norm(),
        "head": linear(10, WIDTH),
    }


def path_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named(params: Any) -> dict[str, Any]:
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}


def filled(arrays: Any, params: Any) -> Any:
    """A tree of arrays with the numbers of those weights that have its names; flax's kernels are transposed."""
    weights = named(jax.tree.map(jnp.asarray, params))

    def weight(path: Any, _: Any) -> jax.Array:
        *parents, last = path_name(path).removesuffix(".value").split(".")
        name = ".".join([*parents, {"kernel": "weight", "scale": "weight"}.get(last, last)])
        return weights[name].T if last == "kernel" else weights[name]

    return jax.tree_util.tree_map_with_path(weight, arrays)


# The network, three times --------------------------------------------------------------------------------


class Network(NamedTuple):
    """A network for JAX, in one of the ways to write it.

    Attributes:
        model: what the optimizer is given. It is a module of nnx, or a dict of ``"params"`` and ``"batch_stats"``,
            which ``minimize`` hands from one micro-batch to the next.
        apply: the logits in training of a model, patches and a key, and new ``"batch_stats"`` for the dict.
        predict: the logits after training of a model and patches.
    """

    model: Any
    apply: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
    predict: Callable[[Any, jax.Array], jax.Array]


def attend(qkv: jax.Array) -> jax.Array:
    """The values of all patches, weighted by queries and keys, [..., patches, 3 * width] to [..., patches, width]."""
    query, key, value = jnp.split(qkv.reshape(*qkv.shape[:-1], 3 * HEADS, WIDTH // HEADS), 3, axis=-2)
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key) / (WIDTH // HEADS) ** 0.5
    heads = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), value)
    return heads.reshape(*qkv.shape[:-1], WIDTH)


# In nnx: the module has weights, batch statistics and the random numbers of dropout.

Linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.zeros_init())  # ``in_nnx`` fills it


class NnxBlock(nnx.Module):
    """Attention and two layers."""

    def __init__(self, dropout: float, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, epsilon=EPS, rngs=rngs) for _ in range(2))
        self.qkv, self.out = Linear(WIDTH, 3 * WIDTH, rngs=rngs), Linear(WIDTH, WIDTH, rngs=rngs)
        self.up, self.down = Linear(WIDTH, 2 * WIDTH, rngs=rngs), Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """What the next block takes."""
        x = x + self.dropout(self.out(attend(self.qkv(self.norm1(x)))))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm2(x)))))


class NnxTransformer(nnx.Module):
    """The whole network, for a batch."""

    def __init__(self, dropout: float, rngs: nnx.Rngs) -> None:
        self.embed = Linear(PIXELS, WIDTH, use_bias=False, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(WIDTH, momentum=MOMENTUM, epsilon=EPS, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((PATCHES, WIDTH)))
        self.blocks = nnx.List([NnxBlock(dropout, rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, epsilon=EPS, rngs=rngs)
        self.head = Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits of a batch."""
        x = self.batch_norm(self.embed(x)) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=-2))


def in_nnx(params: Any, dropout: float) -> Network:
    model = NnxTransformer(dropout, nnx.Rngs(0))
    dtype = params["position"].dtype
    statistics = jax.tree.map(lambda x: x.astype(dtype), nnx.state(model, nnx.BatchStat))
    nnx.update(model, filled(nnx.state(model, nnx.Param), params), statistics)

    def predict(model: NnxTransformer, x: jax.Array) -> jax.Array:
        return nnx.view(model, deterministic=True, use_running_average=True)(x)

    # Its dropout has random numbers of its own, and needs no key.
    return Network(model, lambda model, x, key: (model(x), {}), predict)


# In equinox: the module is of one image, its batch statistics are a state that is handed around.


class EquinoxBlock(eqx.Module):
    """Attention and two layers."""

    norm1: eqx.nn.LayerNorm
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, dropout: float, key: jax.Array) -> None:
        self.norm1, self.norm2 = (eqx.nn.LayerNorm(WIDTH, eps=EPS) for _ in range(2))
        self.qkv, self.out = eqx.nn.Linear(WIDTH, 3 * WIDTH, key=key), eqx.nn.Linear(WIDTH, WIDTH, key=key)
        self.up, self.down = eqx.nn.Linear(WIDTH, 2 * WIDTH, key=key), eqx.nn.Linear(2 * WIDTH, WIDTH, key=key)
        self.dropout = eqx.nn.Dropout(dropout)

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """What the next block takes."""
        one, other = jax.random.split(key)
        heads = attend(jax.vmap(self.qkv)(jax.vmap(self.norm1)(x)))
        x = x + self.dropout(jax.vmap(self.out)(heads), key=one)
        hidden = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm2)(x)))
        return x + self.dropout(jax.vmap(self.down)(hidden), key=other)


class EquinoxTransformer(eqx.Module):
    """The whole network, for one image."""

    embed: eqx.nn.Linear
    batch_norm: eqx.nn.BatchNorm
    position: jax.Array
    blocks: list[EquinoxBlock]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, dropout: float, key: jax.Array) -> None:
        self.embed = eqx.nn.Linear(PIXELS, WIDTH, use_bias=False, key=key)
        self.batch_norm = eqx.nn.BatchNorm(WIDTH, "batch", eps=EPS, momentum=MOMENTUM, mode="batch")
        self.position = jnp.zeros((PATCHES, WIDTH))
        self.blocks = [EquinoxBlock(dropout, key) for _ in range(BLOCKS)]
        self.norm = eqx.nn.LayerNorm(WIDTH, eps=EPS)
        self.head = eqx.nn.Linear(WIDTH, 10, key=key)

    def __call__(self, x: jax.Array, state: eqx.nn.State, key: jax.Array) -> tuple[jax.Array, eqx.nn.State]:
        """The logits of an image, and the new state."""
        x, state = self.batch_norm(jax.vmap(self.embed)(x).T, state)
        x = x.T + self.position
        for block, its_key in zip(self.blocks, jax.random.split(key, BLOCKS), strict=True):
            x = block(x, its_key)
        return self.head(jax.vmap(self.norm)(x).mean(axis=0)), state


def in_equinox(params: Any, dropout: float) -> Network:
    module, state = eqx.nn.make_with_state(EquinoxTransformer)(dropout, jax.random.key(0))
    arrays, others = eqx.partition(module, eqx.is_inexact_array)

    def of_batch(module: Any, state: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        in_axes, out_axes = (0, None, 0), (0, None)
        return jax.vmap(module, in_axes, out_axes, axis_name="batch")(x, state, jax.random.split(key, len(x)))

    def apply(model: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        logits, state = of_batch(eqx.combine(model["params"], others), model["batch_stats"], x, key)
        return logits, {"batch_stats": state}

    def predict(model: Any, x: jax.Array) -> jax.Array:
        module = eqx.nn.inference_mode(eqx.combine(model["params"], others))
        return of_batch(module, model["batch_stats"], x, jax.random.key(0))[0]

    return Network({"params": filled(arrays, params), "batch_stats": state}, apply, predict)


# In plain pytrees: functions of weights and statistics, that return the new statistics.


def linear(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["weight"].T + params["bias"]


def standardized(params: Any, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
    return (x - mean) / jnp.sqrt(var + EPS) * params["weight"] + params["bias"]


def layer_norm(params: Any, x: jax.Array) -> jax.Array:
    return standardized(params, x, x.mean(-1, keepdims=True), x.var(-1, keepdims=True))


def in_pytrees(params: Any, dropout: float) -> Network:
    def dropped(x: jax.Array, key: jax.Array | None) -> jax.Array:
        return x if key is None else x * jax.random.bernoulli(key, 1 - dropout, x.shape) / (1 - dropout)

    def forward(params: Any, x: jax.Array, mean: jax.Array, var: jax.Array, keys: Any) -> jax.Array:
        x = standardized(params["batch_norm"], x, mean, var) + params["position"]
        for block, (one, other) in zip(params["blocks"], keys, strict=True):
            heads = attend(linear(block["qkv"], layer_norm(block["norm1"], x)))
            x = x + dropped(linear(block["out"], heads), one)
            hidden = jax.nn.gelu(linear(block["up"], layer_norm(block["norm2"], x)))
            x = x + dropped(linear(block["down"], hidden), other)
        return linear(params["head"], layer_norm(params["norm"], x).mean(axis=-2))

    def apply(model: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        x = x @ model["params"]["embed"]["weight"].T
        new = {"mean": x.mean((0, 1)), "var": x.var((0, 1))}
        logits = forward(model["params"], x, *new.values(), jax.random.split(key, (BLOCKS, 2)))
        mix = functools.partial(jax.tree.map, lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * new)
        return logits, {"batch_stats": mix(model["batch_stats"], new)}

    def predict(model: Any, x: jax.Array) -> jax.Array:
        x, stats = x @ model["params"]["embed"]["weight"].T, model["batch_stats"]
        return forward(model["params"], x, stats["mean"], stats["var"], [(None, None)] * BLOCKS)

    params = jax.tree.map(jnp.asarray, params)
    dtype = params["position"].dtype
    statistics = {"mean": jnp.zeros(WIDTH, dtype), "var": jnp.ones(WIDTH, dtype)}
    return Network({"params": params, "batch_stats": statistics}, apply, predict)


# Training ------------------------------------------------------------------------------------------------


def warmup_and_cosine(lr_scheduler: Any, optimizer: Any, steps: int) -> Any:
    """The schedule, of the classes that torch and this library both have."""
    warmup = max(1, steps // 10)
    rise = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=warmup)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup])


def loss_of(apply: Any, model: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
    logits, statistics = apply(model, x, key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), statistics


class JaxTraining:
    """A training in JAX, however the network is written."""

    def __init__(self, make: Callable[..., Network], params: Any, dropout: float, steps: int) -> None:
        network = make(params, dropout)
        self.steps = steps
        self.loss_of = functools.partial(loss_of, network.apply)
        self.predict = jax.jit(network.predict)
        self.start(network.model)

    def start(self, model: Any) -> None:
        """Begin with a model, nothing of a training in it but its weights and statistics."""
        no_decay = groups.no_decay(model, r".*position")
        self.optimizer = optim.AdamW(model, lr=LR, weight_decay=WEIGHT_DECAY, groups=no_decay)
        self.scheduler = warmup_and_cosine(optim.lr_scheduler, self.optimizer, self.steps)
        ema = optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
        self.averaged = optim.swa_utils.AveragedModel(self.optimizer, multi_avg_fn=ema)

    def step(self, x: Any, y: Any, number: int) -> jax.Array:
        """Make a step with a batch, and return its loss."""
        key, options = jax.random.key(number), {"clip_norm": CLIP_NORM, "accumulate": MICRO_BATCHES}
        loss, _ = self.optimizer.minimize(self.loss_of, x, y, key, has_aux=True, **options)
        self.scheduler.step()
        self.averaged.update_parameters(self.optimizer)
        return loss

    def logits(self, x: Any) -> tuple[jax.Array, jax.Array]:
        """The logits of the last weights and of their average."""
        return self.predict(self.optimizer.params, x), self.predict(self.averaged.module, x)

    def state(self) -> dict[str, Any]:
        """What a checkpoint has."""
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "averaged": self.averaged}
        return {"model": self.optimizer.params} | {name: part.state_dict() for name, part in parts.items()}

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        checkpoint.save(path, self.state())

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        saved = checkpoint.load(path, like=self.state())
        self.start(saved["model"])
        for name in ("optimizer", "scheduler", "averaged"):
            getattr(self, name).load_state_dict(saved[name])


# The same in torch, which is imported only here.


def torch_transformer(dropout: float) -> Any:
    from torch import nn, zeros
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=EPS) for _ in range(2))
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
            self.dropout = nn.Dropout(dropout)

        def forward(self, x: Any) -> Any:
            qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
            heads = functional.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(-2)
            x = x + self.dropout(self.out(heads))
            return x + self.dropout(self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh")))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(PIXELS, WIDTH, bias=False)
            self.batch_norm = nn.BatchNorm1d(WIDTH, eps=EPS, momentum=1 - MOMENTUM)
            self.position = nn.Parameter(zeros(PATCHES, WIDTH))
            self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
            self.norm = nn.LayerNorm(WIDTH, eps=EPS)
            self.head = nn.Linear(WIDTH, 10)

        def forward(self, x: Any) -> Any:
            x = self.batch_norm(self.embed(x).mT).mT + self.position
            return self.head(self.norm(self.blocks(x)).mean(dim=-2))

    return Transformer()


class TorchTraining:
    """The same training in torch."""

    def __init__(self, params: Any, dropout: float, steps: int) -> None:
        import torch

        self.torch = torch
        torch.set_num_threads(1)  # with more, so small a network waits for its threads
        torch.manual_seed(0)
        weights = {name: torch.tensor(x) for name, x in named(params).items()}
        self.model = torch_transformer(dropout).to(weights["position"].dtype)
        self.model.load_state_dict(weights, strict=False)  # buffers stay
        kinds = [], []
        for name, param in self.model.named_parameters():
            kinds[param.ndim <= 1 or name == "position"].append(param)
        param_groups = [{"params": kinds[0]}, {"params": kinds[1], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(param_groups, lr=LR, weight_decay=WEIGHT_DECAY)
        self.scheduler = warmup_and_cosine(torch.optim.lr_scheduler, self.optimizer, steps)
        ema = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
        self.averaged = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=ema)

    def step(self, x: Any, y: Any, number: int) -> Any:
        """Make a step with a batch, and return its loss."""
        x, y = self.torch.tensor(x), self.torch.tensor(y).long()
        self.model.train()
        self.optimizer.zero_grad()
        losses = []
        for part, labels in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True):
            losses.append(self.torch.nn.functional.cross_entropy(self.model(part), labels) / MICRO_BATCHES)
            losses[-1].backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.scheduler.step()
        self.averaged.update_parameters(self.model)
        return sum(losses).detach()

    def logits(self, x: Any) -> tuple[Any, Any]:
        """The logits of the last weights and of their average."""
        with self.torch.no_grad():
            return self.model.eval()(self.torch.tensor(x)), self.averaged.eval()(self.torch.tensor(x))

    def save(self, path: Path) -> None:
        """Write a checkpoint, with the state of the random numbers of dropout."""
        parts = {name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "averaged")}
        saved = {name: part.state_dict() for name, part in parts.items()}
        self.torch.save(saved | {"random": self.torch.get_rng_state()}, path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        saved = self.torch.load(path)
        self.torch.set_rng_state(saved.pop("random"))
        for name, state in saved.items():
            getattr(self, name).load_state_dict(state)


# The command ---------------------------------------------------------------------------------------------


class Curves(NamedTuple):
    """What a training gives: a loss and a time for each step, two accuracies for each epoch, the last logits."""

    losses: np.ndarray
    seconds: np.ndarray
    accuracies: np.ndarray  # of the last weights and of their average
    logits: np.ndarray


def train(run: Any, data: Data, batches: np.ndarray, first: int = 0, path: Path | None = None) -> Curves:
    """Train from a step on, and save the run halfway if there is a path."""
    losses, seconds, accuracies = [], [], []
    for number, batch in enumerate(batches[first:], start=first):
        if path is not None and number == len(batches) // 2:
            run.save(path)
        begin = time.perf_counter()
        losses.append(float(run.step(data.train_images[batch], data.train_labels[batch], number)))
        seconds.append(time.perf_counter() - begin)
        if (number + 1) % (len(data.train_labels) // BATCH_SIZE) == 0:
            logits = np.stack(run.logits(data.test_images))
            accuracies.append((logits.argmax(axis=-1) == data.test_labels).mean(axis=-1))
    return Curves(np.array(losses), np.array(seconds), np.array(accuracies), logits)


def difference_without_dropout(ways: dict[str, Any], params: Any, data: Data, batches: np.ndarray) -> float:
    """The largest difference between the losses of two networks after the same steps, in float64."""
    images, labels = data.train_images.astype(float), data.train_labels
    with jax.enable_x64(True):
        runs = [make(params, dropout=0.0, steps=len(batches)) for make in ways.values()]
        losses = [[float(run.step(images[batch], labels[batch], 0)) for batch in batches] for run in runs]
    return float(np.max(np.ptp(losses, axis=0)))


def check_resumed(name: str, whole: Curves, again: Curves) -> None:
    """Exit with one line if a run that goes on from a file has other losses or logits than the whole one."""
    pairs = (whole.losses[-len(again.losses) :], again.losses), (whole.logits, again.logits)
    largest = np.max([np.max(np.abs(one - other)) for one, other in pairs])
    check_difference(f"run in {name} and the one that goes on from its file", float(largest), 0.0)


def plot(curves: dict[str, Curves], resumed: dict[str, Curves], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, whole), again, color in zip(curves.items(), resumed.values(), ("C0", "C1", "C2", "C3"), strict=False):
        window = min(20, len(again.losses))
        looks = {"linewidth": 3, "alpha": 0.4, "label": name}, {"linewidth": 1, "linestyle": "--"}
        for losses, look in zip((whole.losses, again.losses), looks, strict=True):
            mean = np.convolve(losses, np.ones(window) / window, "valid")
            left.semilogy(np.arange(len(mean)) + len(whole.losses) - len(mean) + 1, mean, color=color, **look)
        for column, (label, style) in enumerate({"last weights": "o:", "average": ".-"}.items()):
            values = whole.accuracies[:, column]
            right.plot(np.arange(len(values)) + 1, values, style, color=color, markersize=4, label=f"{name}, {label}")
    left.axvline(len(whole.losses) // 2, color="black", linewidth=1, linestyle=":")
    left.set(title="Wide: not interrupted, dashed: resumed", xlabel="step", ylabel=f"training loss (mean of {window})")
    right.set(title="After every epoch", xlabel="epoch", ylabel="test accuracy")
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_epochs(default=10)
    parser.add_out()
    parser.add_argument("--torch", action="store_true", help="train the network in torch too")
    arguments = parser.parse_args()
    if arguments.torch and importlib.util.find_spec("torch") is None:
        parser.error("--torch needs torch, which is not installed: pip install torch")
    parser.make_directory(arguments.out)
    data, rng = in_patches(load_data()), np.random.default_rng(0)
    params = init_params(rng)
    batches = np.concatenate([shuffled(rng, len(data.train_labels)) for _ in range(arguments.epochs)])
    networks = {"nnx": in_nnx, "equinox": in_equinox, "pytrees": in_pytrees}
    ways: dict[str, Any] = {name: functools.partial(JaxTraining, make) for name, make in networks.items()}
    ways |= {"torch": TorchTraining} if arguments.torch else {}

    difference = difference_without_dropout(ways, params, data, batches[:COMPARED])
    print(f"largest difference between the losses without dropout: {difference:.1e}, {COMPARED} steps in float64")
    check_difference("losses without dropout", difference, TOLERANCE)

    params = jax.tree.map(np.float32, params)
    curves, resumed = {}, {}
    print(f"{'':<10}{'first step':>12}{'steps per second':>20}{'test accuracy':>16}{'of the average':>18}")
    for name, make in ways.items():
        path = arguments.out / f"transformer_{name}.{'pt' if name == 'torch' else 'safetensors'}"
        curves[name] = whole = train(make(params, DROPOUT, len(batches)), data, batches, path=path)
        run = make(params, DROPOUT, len(batches))
        run.load(path)
        resumed[name] = again = train(run, data, batches, first=len(batches) // 2)
        accuracy, of_average = whole.accuracies[-1]
        speed = 1 / np.median(whole.seconds)
        print(f"{name:<10}{whole.seconds[0]:>10.1f} s{speed:>20.0f}{accuracy:>16.2%}{of_average:>18.2%}", flush=True)
        check_resumed(name, whole, again)
    picture = arguments.out / "transformer.png"
    plot(curves, resumed, picture)
    print(f"Each run ends the same if it goes on from its file in {arguments.out}. The curves are in {picture}.")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as programs:
        # The resumed runs take from here what the first ones have compiled, unless programs are kept anyway.
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", programs)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        main()
