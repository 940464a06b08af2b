"""Masks of parts of arrays, and chains that move these alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxoptim import rules, sampling
from jaxoptim.sampling.selections import stacked_masks

PARAMS = {"attention": {"query": jnp.ones((4, 6)), "out": jnp.ones((6, 4))}, "norm": jnp.ones(4), "none": None}
HEAD = {r"attention\.query": (1, 3, 1), r"attention\.out": (0, 3, 1)}


def full(mask):
    """A mask as numbers of the arrays' shapes."""
    pairs = PARAMS["attention"].items()
    return {name: np.broadcast_to(mask["attention"][name], x.shape).astype(int) for name, x in pairs}


def test_a_head_is_columns_of_one_array_and_rows_of_another():
    mask = sampling.slices(PARAMS, HEAD)
    assert mask["attention"]["query"].shape == (1, 6)
    assert mask["attention"]["out"].shape == (6, 1)
    wide = full(mask)
    np.testing.assert_array_equal(wide["query"], np.tile([0, 0, 1, 1, 0, 0], (4, 1)))
    np.testing.assert_array_equal(wide["out"], np.tile([0, 0, 1, 1, 0, 0], (4, 1)).T)
    assert not mask["norm"]
    assert mask["none"] is None


@pytest.mark.parametrize(
    ("selection", "query"),
    [
        ({".*query": True}, [1] * 6),
        ({".*query": (-1, 3, [0, 2])}, [1, 1, 0, 0, 1, 1]),
        ({".*query": [(1, 6, 0), (1, 2, 1)]}, [1, 0, 0, 1, 1, 1]),
        ({".*query": (1, 6, 5), "attention.*": (1, 2, 0)}, [1, 1, 1, 0, 0, 1]),
        ({"norm": True}, [0] * 6),
    ],
    ids=["all", "two parts", "two triples", "two expressions", "another"],
)
def test_parts_add_up(selection, query):
    np.testing.assert_array_equal(full(sampling.slices(PARAMS, selection))["query"], np.tile(query, (4, 1)))


def test_modules():
    network = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    mask = sampling.slices(network, {r"layers\.0\.weight": (0, 4, 2)})
    np.testing.assert_array_equal(mask.layers[0].weight, np.array([[0], [0], [1], [0]], bool))
    assert not mask.layers[1].bias
    state = nnx.state(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), nnx.Param)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    mask = sampling.slices(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), {"kernel": (1, 2, 0)})
    assert len(jax.tree.leaves(mask)) == len(names)
    assert sum(np.asarray(leaf).sum() for leaf in jax.tree.leaves(mask)) == 2


@pytest.mark.slow
def test_coefficients_of_parts_are_those_of_their_dimensions():
    """Of L = |w|^2 / 2 each number that moves has a coefficient of nearly 1/2."""

    def loss(params):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params)) / 2

    params = {"query": jnp.zeros((4, 6)), "out": jnp.zeros((6, 4)), "norm": jnp.zeros(4)}
    selections = {
        "head": sampling.slices(params, {"query": (1, 3, 1), "out": (0, 3, 1)}),
        "two heads": sampling.slices(params, {"query": (1, 3, [0, 1]), "out": (0, 3, [0, 1])}),
        "norm": sampling.slices(params, {"norm": True}),
    }
    llc = sampling.estimate_llc(
        loss,
        params,
        rules.SGLD(lr=1e-3),
        nbeta=400.0,
        key=jax.random.key(0),
        selections=selections,
        num_chains=4,
        num_draws=1500,
        num_burnin_steps=100,
    )
    exact = np.array([16, 32, 4]) / (2 * (1 - 0.4 / 4))
    assert (np.abs(llc.mean - exact) < 5 * llc.mcse).all()


def test_masks_of_many_selections_stay_small():
    params = {"query": jnp.zeros((64, 64)), "bias": jnp.zeros(64)}
    masks = stacked_masks([sampling.slices(params, {"query": (1, 8, head)}) for head in range(8)], params)
    assert (masks["query"].shape, masks["bias"].shape) == ((8, 1, 64), (8,))
    mixed = stacked_masks(
        [sampling.slices(params, {"query": (1, 8, 0)}), "bias", np.ones((64, 64)) > 0],
        {"query": params["query"]} | {"bias": jnp.zeros((64, 64))},
    )
    assert mixed["query"].shape == (3, 64, 64)
    with pytest.raises(ValueError, match="does not broadcast"):
        stacked_masks([np.ones((65,)) > 0], params)


@pytest.mark.parametrize(
    ("selection", "error", "problem"),
    [
        ({"attn.*": True}, ValueError, r"'attn\.\*' matches no parameter.* attention\.out"),
        ({".*query": (2, 3, 0)}, ValueError, r"'attention\.query' has shape \(4, 6\), and so no axis 2"),
        ({".*query": (1, 4, 0)}, ValueError, "length 6, which is not 4 equal parts"),
        ({".*query": (1, 3, 3)}, ValueError, "no part 3 among the 3 of axis 1"),
        ({".*query": (1, 3)}, TypeError, r"is \(axis, parts, index\) or True, but got \(1, 3\)"),
        (["query"], TypeError, "is a dict"),
    ],
    ids=["no match", "axis", "unequal", "index", "pair", "list"],
)
def test_parts_that_there_are_not(selection, error, problem):
    with pytest.raises(error, match=problem):
        sampling.slices(PARAMS, selection)
