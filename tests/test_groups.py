"""Options by parameter: selectors, and the helpers that make lists of them."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxoptim import groups, optim, schedules

TREE = {
    "blocks": [{"w": np.ones((2, 2)), "b": np.ones(2)}, {"w": np.ones((2, 2)), "b": np.ones(2)}],
    "embed": np.ones((3, 2)),
    "frozen": None,
    "head": {"w": np.ones((2, 1)), "b": np.ones(1)},
}
VECTORS = ["blocks.0.b", "blocks.1.b", "head.b"]
PATTERN = r"blocks\.(\d+)\."


def names(opt):
    return [[param.name for param in group["params"]] for group in opt.param_groups]


def chosen(selector, tree=TREE):
    return names(optim.SGD(tree, groups=[(selector, {})]))[0]


def test_a_predicate_of_two_sees_the_array():
    assert chosen(lambda path, x: x.ndim == 1) == VECTORS
    assert chosen(lambda path, x: isinstance(x, jnp.ndarray) and path == "embed") == ["embed"]
    assert chosen(lambda path, flag=True: path == "embed") == ["embed"]  # one that is required, one with a default
    assert chosen({"embed"}.__contains__) == ["embed"]
    pairs = [("a", optim.Parameter([1.0])), ("b", optim.Parameter(2.0))]
    assert names(optim.SGD(pairs, groups=[(lambda name, x: x.ndim == 0, {})])) == [["b"], ["a"]]


def test_masks_are_like_the_parameters_or_a_prefix():
    mask = {"blocks": [{"w": False, "b": True}, {"w": False, "b": np.True_}], "embed": False, "frozen": None}
    assert chosen({**mask, "head": {"w": False, "b": True}}) == VECTORS
    assert chosen({**mask, "head": True}) == [*VECTORS[:2], "head.b", "head.w"]
    assert chosen({"blocks": False, "embed": True, "frozen": True, "head": False}) == ["embed"]
    assert len(chosen(True)) == 7
    assert names(optim.SGD([jnp.ones(1), jnp.ones(2)], groups=[([False, True], {})])) == [["1"], ["0"]]


def test_a_mask_that_can_be_called_is_a_mask():
    model = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    mask = jax.tree.map(lambda x: x.ndim == 1, model)
    assert callable(mask)
    assert chosen(mask, model) == ["bias"]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"blocks": True}, ValueError, r"the mask of groups is no prefix of params: .* has nothing for 'embed'"),
        (
            {"blocks": True, "embed": True, "frozen": None, "head": {"w": True, "b": True, "c": True}},
            ValueError,
            r"has 'head\.c', which params lacks",
        ),
        ([True], ValueError, "the containers differ, list at the top|has '0', which params lacks"),
        ("blocks(", ValueError, r"^'blocks\(' is no regular expression: .*\.$"),
        ("blokcs.*", ValueError, r"no parameter is left that 'blokcs\.\*' selects.*The paths are blocks\.0\.b, "),
        (False, ValueError, "no parameter is left that the mask selects"),
        (lambda path, array: False, ValueError, "no parameter is left"),
        (3, TypeError, "A selector is a regular expression or a predicate"),
    ],
)
def test_wrong_selectors_name_themselves(wrong, error, message):
    with pytest.raises(error, match=message) as caught:
        chosen(wrong)
    assert "\n" not in str(caught.value)


def test_no_decay_is_for_vectors_and_names():
    (selector, options), *rest = groups.no_decay(TREE, "emb.*", lambda path: path == "head.w")
    assert rest == []
    assert options == {"weight_decay": 0.0}
    assert [x for x in ("blocks.0.b", "embed", "head.w", "blocks.0.w", "blocksx0xb") if re.fullmatch(selector, x)] == [
        "blocks.0.b",
        "embed",
        "head.w",
    ]
    opt = optim.AdamW(TREE, groups=groups.no_decay(TREE))
    assert names(opt) == [VECTORS, ["blocks.0.w", "blocks.1.w", "embed", "head.w"]]
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 1e-2]
    assert groups.no_decay({"w": jnp.ones((2, 2))}) == []
    assert groups.no_decay({"w": jnp.ones((2, 2)), "s": 1.0}, max_ndim=0) == [("s", {"weight_decay": 0.0})]
    with pytest.raises(ValueError, match=r"no_decay: 'tabel' selects none of blocks\.0\.b"):
        groups.no_decay(TREE, "tabel")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["equinox", "nnx", "linen"])
def test_helpers_name_what_a_module_trains(kind, bias):
    if kind == "equinox":
        model = eqx.nn.MLP(2, 1, 2, 1, use_bias=bias, use_final_bias=bias, key=jax.random.key(0))
    elif kind == "nnx":
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.Linear(2, 2, use_bias=bias, rngs=rngs))
    else:
        params = {"kernel": jnp.ones((2, 2))} | ({"bias": jnp.ones(2)} if bias else {})
        model = {"params": params, "batch_stats": {"mean": jnp.ones(2)}}
    opt = optim.AdamW(model, groups=groups.no_decay(model))
    assert {row.name: row.decay for row in opt.describe()} == {
        row.name: 0.0 if "bias" in row.name else 0.01 for row in opt.describe()
    }
    every = "|".join(selector for selector, _ in groups.no_decay(model, ".*"))
    assert all(re.fullmatch(every, row.name) for row in opt.describe())
    assert len(every.split("|")) == len(opt.describe())  # and nothing else


def test_layer_decay_is_timms_formula():
    def scale(layer, count=4, decay=0.5):
        return decay ** (count - 1 - layer)

    made = groups.layer_decay(TREE, PATTERN, 0.5, lr=0.1)
    opt = optim.AdamW(TREE, groups=made)
    assert names(opt) == [["embed"], ["blocks.0.b", "blocks.0.w"], ["blocks.1.b", "blocks.1.w"], ["head.b", "head.w"]]
    assert [group["lr"] for group in opt.param_groups] == [0.1 * scale(layer) for layer in range(4)]
    least = groups.layer_decay(TREE, PATTERN, 0.5, lr=0.1, min_scale=0.3)
    assert [options["lr"] for _, options in least] == [0.1 * max(0.3, scale(layer)) for layer in range(4)]
    other = groups.layer_decay(
        {"layer1": {"w": 1.0}, "layer2": {"w": 1.0}, "x": 1.0}, r"layer(\d)", 0.5, lr=1, embedding="x"
    )
    assert [options["lr"] for _, options in other] == [0.125, 0.25, 0.5]


def test_wrong_layers_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"'layers.* is found in none of blocks\.0\.b"):
        groups.layer_decay(TREE, r"layers\.(\d+)", 0.5, lr=0.1)
    with pytest.raises(ValueError, match="no group of digits"):
        groups.layer_decay(TREE, r"blocks\.\d+", 0.5, lr=0.1)
    with pytest.raises(ValueError, match=r"Invalid decay: 1\.5"):
        groups.layer_decay(TREE, PATTERN, 1.5, lr=0.1)
    for lr in (0.0, schedules.exponential_lr(0.1, 0.5)):
        with pytest.raises(ValueError, match=r"Invalid lr: .* schedulers of optim.lr_scheduler multiply"):
            groups.layer_decay(TREE, PATTERN, 0.5, lr=lr)


def test_lists_combine():
    made = groups.combined(TREE, groups.layer_decay(TREE, PATTERN, 0.5, lr=0.1), groups.no_decay(TREE))
    opt = optim.AdamW(TREE, weight_decay=0.3, groups=made)
    seen = {
        name: (group["lr"], group["weight_decay"])
        for group, its in zip(opt.param_groups, names(opt), strict=True)
        for name in its
    }
    assert seen["embed"] == (0.0125, 0.3)
    assert seen["blocks.1.b"] == (0.05, 0.0)
    assert seen["blocks.1.w"] == (0.05, 0.3)
    assert seen["head.b"] == (0.1, 0.0)
    assert len(opt.param_groups) == 7
    with pytest.raises(ValueError, match=r"two lists give 'blocks\.0\.b' the option 'lr'"):
        groups.combined(TREE, [(".*", {"lr": 1.0})], [(".*b", {"lr": 2.0})])


S = optim.lr_scheduler
SCHEDULERS = [
    lambda opt: S.LambdaLR(opt, lambda epoch: 0.9**epoch),
    lambda opt: S.MultiplicativeLR(opt, lambda epoch: 0.9),
    lambda opt: S.StepLR(opt, 2),
    lambda opt: S.MultiStepLR(opt, [1, 3]),
    lambda opt: S.ConstantLR(opt),
    lambda opt: S.LinearLR(opt),
    lambda opt: S.ExponentialLR(opt, 0.9),
    lambda opt: S.PolynomialLR(opt, 8),
    lambda opt: S.CosineAnnealingLR(opt, 8),
    lambda opt: S.CosineAnnealingWarmRestarts(opt, 3),
    lambda opt: S.SequentialLR(opt, [S.LinearLR(opt), S.CosineAnnealingLR(opt, 5)], [2]),
    lambda opt: S.OneCycleLR(opt, [g["lr"] / 0.1 for g in opt.param_groups], total_steps=9, cycle_momentum=False),
    lambda opt: S.CyclicLR(
        opt,
        [g["lr"] for g in opt.param_groups],
        [2 * g["lr"] for g in opt.param_groups],
        step_size_up=2,
        cycle_momentum=False,
    ),
    lambda opt: optim.swa_utils.SWALR(opt, [g["lr"] / 2 for g in opt.param_groups], 3),
]


@pytest.mark.parametrize("make", SCHEDULERS)
def test_schedulers_keep_the_factors(make):
    opt = optim.SGD(TREE, groups=groups.layer_decay(TREE, PATTERN, 0.5, lr=0.1))
    scheduler = make(opt)
    grads = {"blocks": [{"w": None, "b": None}] * 2, "embed": None, "frozen": None, "head": {"w": None, "b": None}}
    for _ in range(6):
        opt.step(grads)
        scheduler.step()
        rates = [group["lr"] / opt.param_groups[-1]["lr"] for group in opt.param_groups]
        np.testing.assert_allclose(rates, [0.125, 0.25, 0.5, 1.0], rtol=1e-12)


def test_the_plateau_keeps_the_factors():
    opt = optim.SGD(TREE, groups=groups.layer_decay(TREE, PATTERN, 0.5, lr=0.1))
    scheduler = S.ReduceLROnPlateau(opt, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    np.testing.assert_allclose([group["lr"] for group in opt.param_groups], [1.25e-4, 2.5e-4, 5e-4, 1e-3], rtol=1e-12)


def test_a_predicate_of_the_array_alone_says_what_it_takes():
    with pytest.raises(TypeError, match=r"selects by the path, a str, and failed: .*'ndim'. A predicate that looks at"):
        optim.SGD({"w": jnp.ones((2, 2))}, groups=[(lambda x: x.ndim > 1, {"lr": 0.1})])
