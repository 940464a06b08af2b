"""Parts of transformers by name, in modules of flax (linen and nnx) and equinox."""

import functools
from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxoptim import rules, sampling
from jaxoptim.core import trees
from jaxoptim.core.modules import parts_of

WIDTH, TOKENS = 6, 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(TOKENS, WIDTH)), jnp.float32)


def filled(arrays):
    """The tree with random numbers, also where biases begin at zero."""
    leaves, treedef = jax.tree.flatten(arrays)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(treedef, [jnp.asarray(rng.normal(size=x.shape) / 2, jnp.float32) for x in leaves])


class LinenBlock(linen.Module):
    """Heads of size 4 in a width of 6."""

    @linen.compact
    def __call__(self, x):
        x = x + linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(linen.LayerNorm()(x))
        return x + linen.Dense(WIDTH)(linen.gelu(linen.Dense(5)(linen.LayerNorm()(x))))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(7, WIDTH)(tokens)
        for number in range(2):
            x = LinenBlock(name=f"block_{number}")(x)
        return linen.Dense(7, name="lm_head")(linen.LayerNorm()(x))


class NnxBlock(nnx.Module):
    """Four heads that share two keys and values."""

    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, 8, num_kv_heads=2, normalize_qk=True, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 5, rngs=rngs), nnx.Linear(5, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class EquinoxBlock(eqx.Module):
    """Sizes of keys and of values that are set apart."""

    attn: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    ln_1: eqx.nn.LayerNorm
    ln_2: eqx.nn.LayerNorm

    def __call__(self, x):
        y = jax.vmap(self.ln_1)(x)
        x = x + self.attn(y, y, y)
        return x + jax.vmap(lambda x: self.mlp(self.ln_2(x)))(x)


class FusedBlock(eqx.Module):
    """Grouped queries, in a projection that is one with that of keys and values."""

    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    layout: str = eqx.field(static=True)

    def __call__(self, x):
        sizes = (4, 2, 2) if self.layout == "concatenated" else (2, 1, 1)
        qkv = jax.vmap(self.qkv)(x).reshape(TOKENS, -1, sum(sizes), 2)
        query, key, value = jnp.split(qkv, np.cumsum(sizes)[:2], axis=2)
        query, key, value = (x.reshape(TOKENS, -1, 2) for x in (query, key, value))
        heads = jax.nn.dot_product_attention(query[None], key[None], value[None])[0]
        x = x + jax.vmap(self.out)(heads.reshape(TOKENS, -1))
        return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(x)))


class Case(NamedTuple):
    """A transformer of one block.

    Attributes:
        arrays: of the block, random.
        apply: of arrays and inputs.
        out: the path of the output's weights, and the axis of the heads.
        heads: how many there are.
        common: the paths of what all heads have in common.
        options: of the restrictions.
    """

    arrays: Any
    apply: Any
    out: tuple[str, int]
    heads: int
    common: set[str]
    options: dict[str, Any]


class Stack(eqx.Module):
    layers: list[Any]


@functools.cache
def case(kind):
    if kind == "linen":
        variables = jax.eval_shape(LinenBlock().init, jax.random.key(0), X)
        arrays = filled({"layer_0": variables["params"]})
        path = "layer_0.MultiHeadDotProductAttention_0.out"
        apply = lambda arrays, x: LinenBlock().apply({"params": arrays["layer_0"]}, x)  # noqa: E731
        return Case(arrays, apply, (f"{path}.kernel", 0), 2, {f"{path}.bias"}, {})
    if kind == "nnx":
        parts = parts_of(nnx.Dict(blocks=nnx.List([NnxBlock(nnx.Rngs(0))])))
        path = "blocks.0.attention"
        apply = lambda arrays, x: parts.definition.joined(arrays, parts.rest)["blocks"][0](x)  # noqa: E731
        common = {f"{path}.{name}" for name in ("out.bias", "query_ln.scale", "key_ln.scale")}
        return Case(filled(parts.trained), apply, (f"{path}.out.kernel", 0), 4, common, {})
    keys = jax.random.split(jax.random.key(0), 4)
    if kind == "equinox":
        biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        attention = eqx.nn.MultiheadAttention(2, WIDTH, qk_size=4, vo_size=5, **biases, key=keys[0])
        mlp = eqx.nn.MLP(WIDTH, WIDTH, 5, 1, key=keys[1])
        block = EquinoxBlock(attention, mlp, eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH))
        out, heads, options = "layers.0.attn.output_proj", 2, {"num_heads": 2}
    else:
        sizes = ((WIDTH, 16), (8, WIDTH), (WIDTH, 5), (5, WIDTH))
        layers = (eqx.nn.Linear(*size, key=key) for size, key in zip(sizes, keys, strict=True))
        block, out, heads = FusedBlock(*layers, layout=kind), "layers.0.out", 4
        options = {"num_heads": 4, "num_kv_heads": 2, "qkv": kind}
    parts = parts_of(Stack([block]))
    apply = lambda arrays, x: parts.definition.joined(arrays, parts.rest).layers[0](x)  # noqa: E731
    return Case(filled(parts.trained), apply, (f"{out}.weight", 1), heads, {f"{out}.bias"}, options)


KINDS = ["linen", "nnx", "equinox", "concatenated", "interleaved"]


def by_path(tree, arrays):
    """The arrays of a tree in the shapes of others, by path."""
    pairs = zip(trees.array_names(arrays), jax.tree.leaves(tree), jax.tree.leaves(arrays), strict=True)
    return {name: np.broadcast_to(np.asarray(x), like.shape) for name, x, like in pairs}


def mask_of(of, names):
    return by_path(sampling.restriction(of.arrays, names, **of.options), of.arrays)


@pytest.mark.costly
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_what_its_output_depends_on(kind):
    """Where the output of no other head counts, and the residual stream is not read again, the gradient is in the mask.

    A bias of keys adds one number to all scores of a query, on which nothing depends: it goes with the others.
    """
    of = case(kind)
    path, axis = of.out

    @jax.jit
    def gradient(head):
        def output(arrays):
            leaves, treedef = jax.tree.flatten(arrays)
            at = trees.array_names(arrays).index(path)
            out = jnp.moveaxis(leaves[at], axis, 0)
            ours = jnp.arange(len(out)) * of.heads // len(out) == head
            leaves[at] = jnp.moveaxis(jnp.where(ours.reshape(-1, *[1] * (out.ndim - 1)), out, 0), 0, axis)
            attention_only = [
                jnp.zeros_like(x) if any(part in name for part in ("mlp", "Dense_", "up", "down")) else x
                for name, x in zip(trees.array_names(arrays), leaves, strict=True)
            ]
            return jnp.sum(jnp.sin(of.apply(jax.tree.unflatten(treedef, attention_only), X)))

        return jax.grad(output)(of.arrays)

    attention = [name for name, mask in mask_of(of, "layer0 attn").items() if mask.any()]
    for head in range(of.heads):
        found, mask = by_path(gradient(head), of.arrays), mask_of(of, f"layer0 head{head}")
        for name in attention:
            if name in of.common:
                assert not mask[name].any()
            elif ("key" in name or "qkv" in name) and name.endswith("bias"):
                kernel = mask.get(name.replace("bias", "kernel"))
                outputs = mask[name.replace("bias", "weight")][:, 0] if kernel is None else kernel[0]
                np.testing.assert_array_equal(mask[name], outputs)
            else:
                np.testing.assert_array_equal(mask[name], found[name] != 0, err_msg=f"{name} head{head}")
        assert not any(mask[name].any() for name in mask if name not in attention)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_groups_make_the_attention(kind):
    of = case(kind)
    whole = mask_of(of, "layer0 attn")
    for part, count in (("head", of.heads), ("group", 2)):
        every = mask_of(of, [*(f"layer0 {part}{number}" for number in range(count)), *of.common])
        for name, mask in whole.items():
            np.testing.assert_array_equal(every[name], mask, err_msg=name)
    if of.heads == 4:  # a group has the key that its heads share, once
        group, pair = mask_of(of, "layer0 group1"), mask_of(of, ["layer0 head2", "layer0 head3"])
        assert all((group[name] == pair[name]).all() for name in group)
        assert sum(mask.sum() for mask in group.values()) * 2 + sum(whole[name].size for name in of.common) == sum(
            mask.sum() for mask in whole.values()
        )
    layer = sum(mask_of(of, f"layer0 {part}")[name].astype(int) for part in ("attn", "mlp") for name in [of.out[0]])
    assert (layer == 1).all()


@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox"])
def test_a_layer_is_attention_mlp_and_norms(kind):
    of = case(kind)
    parts = [mask_of(of, f"layer0 {part}") for part in ("attn", "mlp", "norm")]
    for name, mask in mask_of(of, "layer0").items():
        assert (sum(part[name].astype(int) for part in parts) == 1).all(), name
        assert mask.all()
    norms = {name for name, mask in parts[2].items() if mask.any()}
    assert len(norms) == 4  # two, each with a scale and a bias
    assert all("orm" in name or "ln_" in name for name in norms)


def test_masks_are_no_larger_than_they_need_to_be():
    mask = sampling.restriction(case("nnx").arrays, "layer0 head3")
    attention = mask["blocks"][0]["attention"]
    shapes = [attention[name]["kernel"][...].shape for name in ("query", "key", "value", "out")]
    assert shapes == [(1, 4, 1), (1, 2, 1), (1, 2, 1), (4, 1, 1)]
    assert attention["query"]["bias"][...].shape == (4, 1)
    assert attention["out"]["bias"][...].shape == ()
    both = sampling.restriction(case("nnx").arrays, ["layer0 head3", "blocks.0.attention.query"])
    assert both["blocks"][0]["attention"]["query"]["kernel"][...].shape == ()


def model():
    return jax.eval_shape(LinenModel().init, jax.random.key(0), jnp.zeros(TOKENS, int))


@pytest.mark.parametrize(
    ("names", "paths"),
    [
        ("embed", {"params.Embed_0.embedding"}),
        ("unembed", {"params.lm_head.bias", "params.lm_head.kernel"}),
        ("params.lm_head.bias", {"params.lm_head.bias"}),
        ("params.LayerNorm_0", {"params.LayerNorm_0.bias", "params.LayerNorm_0.scale"}),
        (["embed", "layer1 mlp"], {"params.Embed_0.embedding", *(f"params.block_1.Dense_{i}" for i in range(2))}),
    ],
    ids=["embed", "unembed", "array", "subtree", "union"],
)
def test_what_is_outside_of_layers(names, paths):
    mask = sampling.restriction(model(), names)
    pairs = zip(trees.names(mask), jax.tree.leaves(mask), strict=True)
    chosen = {name for name, part in pairs if part.all()}
    assert {next((path for path in paths if name.startswith(path)), name) for name in chosen} == paths
    everything = sampling.restriction(model(), "full")
    assert all(part.all() for part in jax.tree.leaves(everything))


def test_arrays_with_names_of_their_own():
    params = {"stage1": {"a": jnp.ones((4, 6)), "b": jnp.ones((4, 6)), "c": jnp.ones((4, 6)), "d": jnp.ones((6, 4))}}
    roles = {"query": r".*\.a", "key": r".*\.b", "value": r".*\.c", "out": r".*\.d"}
    mask = sampling.restriction(params, "layer1 head2", num_heads=3, layers=r"stage(\d+)\.", roles=roles)
    expected = sampling.slices(params, {r".*\.[abc]": (1, 3, 2), r".*\.d": (0, 3, 2)})
    chex.assert_trees_all_equal(mask, expected)


TIED = {"embed": jnp.ones((5, 4)), "layers": [{"wq": jnp.ones((4, 6)), "up": jnp.ones((4, 4))}]}
EQUINOX = {"num_heads": None}


@pytest.mark.parametrize(
    ("params", "names", "options", "error", "problem"),
    [
        (
            TIED,
            "layer1",
            {},
            ValueError,
            r"no 'layer1'. The names are full, embed, layer0 .*head0.*paths.*layers\.0\.wq",
        ),
        (TIED, "l0", {}, ValueError, "There is no 'l0'. The names are full"),
        (TIED, "unembed", {}, ValueError, "no array known as 'unembed'. Logits may be made by the embedding itself"),
        (TIED, "layer0 norm", {}, ValueError, "There is no 'layer0 norm'.*roles"),
        (TIED, "layer0 head0", {}, ValueError, "of query, key, value .or qkv. and out its arrays have only query"),
        ("equinox", "layer0 head0", {}, ValueError, "query_proj.weight' has one axis for all heads. Give num_heads="),
        ("equinox", "layer0 head0", {"num_heads": 3}, ValueError, "length 8, which is not 3 equal parts"),
        ("linen", "layer0 head0", {"num_heads": 3}, ValueError, "num_heads is 3, but layer0 has 2 heads"),
        ("nnx", "layer0 head0", {"num_kv_heads": 4}, ValueError, "num_kv_heads is 4, but layer0 has 2 heads of keys"),
        ("linen", "layer0 head2", {}, ValueError, "no 'layer0 head2'. The heads are head0 to head1"),
        ("nnx", "layer0 group2", {}, ValueError, "no 'layer0 group2'. The last group is group1"),
        ("interleaved", "layer0 head0", {"num_heads": 4, "qkv": "mixed"}, ValueError, "Invalid qkv: 'mixed'"),
        (TIED, "full", {"roles": {"heads": "x"}}, ValueError, "no role 'heads'. The roles are query"),
        (TIED, "full", {"layers": "layers"}, ValueError, "no group of digits"),
        (TIED, 3, {}, TypeError, "a name or a list of names"),
    ],
    ids=str,
)
def test_what_there_is_not(params, names, options, error, problem):
    with pytest.raises(error, match=problem):
        sampling.restriction(case(params).arrays if isinstance(params, str) else params, names, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "linen", "equinox"])
def test_chains_move_what_is_named(kind):
    of = case(kind)
    mask = sampling.restriction(of.arrays, "layer0 head1", **of.options)
    sampler = rules.SGLD(lr=1e-3, optimize_over=mask)

    def loss(arrays):
        return jnp.mean(of.apply(arrays, X) ** 2)

    found = sampling.sample(loss, of.arrays, sampler, key=jax.random.key(0), num_chains=2, num_draws=2)
    moved = by_path(jax.tree.map(lambda x, start: (x != start).all(0), found.params, of.arrays), of.arrays)
    for name, part in by_path(mask, of.arrays).items():
        np.testing.assert_array_equal(moved[name], part, err_msg=name)


def test_a_preview_counts():
    of = case("nnx")
    lines = sampling.preview(of.arrays, sampling.restriction(of.arrays, "layer0 head0")).splitlines()
    assert [line.split()[0].rpartition("attention.")[2] for line in lines[:-1]] == [
        f"{part}.{of}" for part, of in (("key", "bias"), ("key", "kernel"), ("out", "kernel"))
    ] + [f"{part}.{of}" for part in ("query", "value") for of in ("bias", "kernel")]
    total = sum(x.size for x in jax.tree.leaves(of.arrays))
    assert lines[-1].split()[2:] == [str(4 * WIDTH * 2 + 3 * 2), "of", str(total)]
