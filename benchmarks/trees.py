"""The trees of parameters that the benchmark updates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import jax
import numpy as np

Shapes = dict[str, tuple[int, ...]]


def gpt2(width: int = 768, tokens: int = 50257, positions: int = 1024) -> Shapes:
    """GPT-2 with 12 layers, 148 arrays; by default GPT-2 small, 124.4 million numbers."""
    block = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, 4 * width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (4 * width, width),
        "mlp.c_proj.bias": (width,),
    }
    blocks = {f"h.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    ends = {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    return {"wte.weight": (tokens, width), "wpe.weight": (positions, width)} | blocks | ends


def resnet50() -> Shapes:
    """ResNet-50: 161 arrays, 25.6 million numbers."""
    shapes: Shapes = {}

    def convolution(name: str, size: int, inputs: int, outputs: int) -> None:
        shapes[f"{name}.conv.weight"] = (outputs, inputs, size, size)
        shapes[f"{name}.bn.weight"] = shapes[f"{name}.bn.bias"] = (outputs,)

    convolution("stem", 7, 3, 64)
    inputs = 64
    for layer, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            convolution(f"{name}.1", 1, inputs, width)
            convolution(f"{name}.2", 3, width, width)
            convolution(f"{name}.3", 1, width, 4 * width)
            if block == 0:
                convolution(f"{name}.downsample", 1, inputs, 4 * width)
            inputs = 4 * width
    return shapes | {"fc.weight": (1000, inputs), "fc.bias": (1000,)}


def arrays_of_100() -> Shapes:
    """1000 arrays of 100 numbers."""
    return {f"p{i:03d}": (100,) for i in range(1000)}


def scalars() -> Shapes:
    """1000 scalars."""
    return {f"p{i:03d}": () for i in range(1000)}


def mlp() -> Shapes:
    """A small digit classifier: 6 arrays, 53 thousand numbers."""
    widths = [784, 64, 32, 10]
    layers = enumerate(itertools.pairwise(widths))
    return {f"{i}.{name}": s for i, (m, n) in layers for name, s in [("weight", (m, n)), ("bias", (n,))]}


TREES: dict[str, Callable[[], Shapes]] = {
    "gpt2": gpt2,
    "resnet50": resnet50,
    "1000x100": arrays_of_100,
    "1000-scalars": scalars,
    "mlp": mlp,
}


def numbers_in(shapes: Shapes) -> int:
    """How many numbers a tree holds."""
    return sum(math.prod(shape) for shape in shapes.values())


def random_tree(shapes: Shapes, seed: int) -> dict[str, jax.Array]:
    """Normal deviates of the given shapes, in buffers that JAX owns."""
    rng = np.random.default_rng(seed)
    return {name: jax.numpy.array(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
