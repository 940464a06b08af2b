"""The loss of ResNet-50, over the tree of its parameters in ``trees.py``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

Params = dict[str, jax.Array]


def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy of the labels, with statistics of the batch in every normalization.

    Args:
        params: the weights.
        images: float32, of shape (batch, 3, height, width).
        labels: int32, of shape (batch,).
    """
    x = jax.nn.relu(_convolution(params, "stem", images, stride=2))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), "SAME")
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            stride, name = 2 if block == 0 and layer > 1 else 1, f"layer{layer}.{block}"
            hidden = jax.nn.relu(_convolution(params, f"{name}.1", x))
            hidden = jax.nn.relu(_convolution(params, f"{name}.2", hidden, stride=stride))
            straight = _convolution(params, f"{name}.downsample", x, stride=stride) if block == 0 else x
            x = jax.nn.relu(_convolution(params, f"{name}.3", hidden) + straight)
    logits = x.mean((2, 3)) @ params["fc.weight"].T + params["fc.bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _convolution(params: Params, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    x = jax.lax.conv(x, params[f"{name}.conv.weight"], (stride, stride), "SAME")
    shape = (1, -1, 1, 1)
    scale, shift = params[f"{name}.bn.weight"].reshape(shape), params[f"{name}.bn.bias"].reshape(shape)
    return jax.nn.standardize(x, axis=(0, 2, 3), epsilon=1e-5) * scale + shift
