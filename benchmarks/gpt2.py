"""The loss of GPT-2, over the tree of its parameters in ``trees.py``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

HEADS = 12
Params = dict[str, jax.Array]


def loss(params: Params, tokens: jax.Array) -> jax.Array:
    """The mean cross-entropy of each next token.

    Args:
        params: the weights.
        tokens: int32, of shape (batch, length).
    """
    x = params["wte.weight"][tokens] + params["wpe.weight"][: tokens.shape[1]]
    for block in range(12):
        x = x + _attention(params, f"h.{block}.attn", _normalized(params, f"h.{block}.ln_1", x))
        hidden = _linear(params, f"h.{block}.mlp.c_fc", _normalized(params, f"h.{block}.ln_2", x))
        x = x + _linear(params, f"h.{block}.mlp.c_proj", jax.nn.gelu(hidden))
    logits = _normalized(params, "ln_f", x) @ params["wte.weight"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def _linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def _normalized(params: Params, name: str, x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x, epsilon=1e-5) * params[f"{name}.weight"] + params[f"{name}.bias"]


def _attention(params: Params, name: str, x: jax.Array) -> jax.Array:
    parts = jnp.split(_linear(params, f"{name}.c_attn", x), 3, axis=-1)
    query, key, value = (part.reshape(*x.shape[:-1], HEADS, -1) for part in parts)
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return _linear(params, f"{name}.c_proj", mixed.reshape(x.shape))
