"""Sketches: products of trees from a few numbers, and of the draws of chains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxoptim import rules, sampling
from jaxoptim.core import sketches
from jaxoptim.core.flat import flatten
from jaxoptim.core.noise import hashed

TREE = {"a": jnp.linspace(-1.0, 2.0, 8).reshape(4, 2), "b": jnp.array(0.3), "frozen": None, "c": jnp.arange(3.0)}
OTHER = jax.tree.map(lambda x: jnp.cos(7 * x) + 0.5, TREE)
DIM = 6
KEY = jax.random.key(3)


def of(tree, seed=1):
    return sampling.sketch(tree, DIM, seed)


def test_it_is_linear():
    combined = jax.tree.map(lambda x, y: 2 * x - 3 * y, TREE, OTHER)
    np.testing.assert_allclose(of(combined), 2 * of(TREE) - 3 * of(OTHER), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_each_number_has_one_place_and_a_sign():
    """The places are uniform and the signs even: each count within five standard errors."""
    size, dim = 4096, 8
    columns = np.asarray(jax.jit(jax.vmap(lambda x: sampling.sketch(x, dim)))(jnp.eye(size)))
    assert (np.sort(abs(columns), 1) == [0] * (dim - 1) + [1]).all()
    counts = np.stack([(columns > 0).sum(0), (columns < 0).sum(0)])
    assert (abs(counts - size / 16) < 5 * np.sqrt(size / 16)).all()
    pairs = np.roll(columns, 1, 0) * columns  # of neighbours, which share a place in one case of eight
    assert abs(abs(pairs).sum() - size / 8) < 5 * np.sqrt(size / 8)
    assert abs(pairs.sum()) < 5 * np.sqrt(size / 8)


def test_products_have_the_mean_and_the_variance_of_the_formula():
    number = 20_000
    seeds = jnp.arange(number, dtype=jnp.uint32)
    a, b = (np.asarray(jax.vmap(lambda seed, x=x: of(x, seed))(seeds), np.float64) for x in (TREE, OTHER))
    v, u = (np.asarray(flatten(x), np.float64) for x in (TREE, OTHER))
    exact = ((v @ v) * (u @ u) + (v @ u) ** 2 - 2 * np.sum(v**2 * u**2)) / DIM
    found = (a * b).sum(1)
    assert abs(found.mean() - v @ u) < 4 * np.sqrt(exact / number)
    squares = (found - v @ u) ** 2
    assert abs(squares.mean() - exact) < 4 * squares.std() / np.sqrt(number)
    assert squares.std() / np.sqrt(number) < 0.03 * exact


@pytest.mark.slow
def test_numbers_count_on_from_leaf_to_leaf_whatever_their_dtypes():
    np.testing.assert_allclose(of(TREE), of(flatten(TREE)), rtol=1e-6)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), TREE)
    assert of(low).dtype == jnp.float32
    np.testing.assert_array_equal(of(low), of(jax.tree.map(lambda x: x.astype(jnp.float32), low)))
    mixed = TREE | {"a": low["a"]}
    np.testing.assert_array_equal(of(mixed), of(jax.tree.map(lambda x: x.astype(jnp.float32), mixed)))
    z = jnp.array([1 + 2j, -3j])
    np.testing.assert_array_equal(of(z), of(jnp.array([1.0, 2.0, 0.0, -3.0])))
    assert of({}).tolist() == [0] * DIM


@pytest.mark.slow
def test_it_is_float64_where_the_tree_is(x64):
    tree = jax.tree.map(lambda x: x.astype(jnp.float64), TREE)
    assert of(tree).dtype == jnp.float64
    np.testing.assert_allclose(of(tree), of(TREE), rtol=1e-6)


@pytest.mark.slow
def test_numbers_past_32_bits_go_on():
    key = jax.random.key_data(jax.random.key(1))
    across = sketches.words(key, sketches.place(2**32 - 2), (2, 2)).reshape(-1)
    np.testing.assert_array_equal(across[2:], sketches.words(key, sketches.place(2**32), (2,)))
    np.testing.assert_array_equal(
        across[:1], hashed(key, 3, jnp.zeros(1, jnp.uint32), jnp.array([2**32 - 2], "uint32"))
    )
    assert (across[2:] != sketches.words(key, sketches.place(0), (2,))).all()


def test_seeds_are_data_and_make_other_sketches():
    before = sketches.sketched._cache_size()
    found = np.stack([of(TREE, seed) for seed in (0, 1, 2**32 - 1, np.uint32(7))])
    assert sketches.sketched._cache_size() <= before + 1
    assert len(np.unique(found, axis=0)) == 4
    np.testing.assert_array_equal(jax.vmap(functools.partial(of, TREE))(jnp.array([0, 1], "uint32")), found[:2])


@pytest.mark.slow
def test_vmap_is_map():
    many = jax.tree.map(lambda x: jnp.stack([x, 2 - x, x * x]), TREE)
    one_by_one = jax.lax.map(of, many)
    np.testing.assert_allclose(jax.vmap(of)(many), one_by_one, rtol=1e-6)
    np.testing.assert_allclose(one_by_one[0], of(TREE), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: sampling.sketch(TREE, 0), ValueError, r"Invalid dim: 0\. A sketch has an int >= 1"),
        (lambda: sampling.sketch(TREE, 2.0), ValueError, "Invalid dim: 2.0"),
        (lambda: sampling.sketch(TREE, 3, -1), ValueError, r"Invalid seed: -1\. It is an int from 0"),
        (lambda: sampling.sketch({"n": jnp.arange(3)}, 3), TypeError, "The leaf 'n' has dtype int32"),
        (lambda: sampling.Sketch(True), ValueError, "Invalid dim: True"),
        (lambda: sampling.Sketch(3, "w"), ValueError, "Invalid of: 'w'. Sketch takes 'displacement' or 'gradient'"),
        (lambda: sampling.Sketch(3, seed="a"), ValueError, "Invalid seed: 'a'"),
    ],
    ids=["no numbers", "no int", "seed", "ints", "bool", "of", "seed of an observable"],
)
def test_wrong_sketches(make, error, match):
    with pytest.raises(error, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)


# Of chains.


def loss(params):
    return sum(jnp.sum((x - 1) ** 2) for x in jax.tree.leaves(params))


START = {"w": jnp.linspace(0.0, 1.0, 5), "x": jnp.ones(3)}
SGLD = rules.SGLD(lr=0.01, nbeta=2.0)
WATCHED = {
    "w": lambda params: params,
    "away": sampling.Sketch(DIM, seed=1),
    "grads": sampling.Sketch(DIM, of="gradient", seed=1),
}
FEW = {"key": KEY, "num_chains": 3, "num_draws": 4, "num_burnin_steps": 1, "num_steps_bw_draws": 2}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vmap", "map"])
def test_chains_have_one_sketch_of_displacement_and_gradient(method):
    seen = sampling.sample(
        loss, START, SGLD, observables=WATCHED, start_noise=0.1, chain_method=method, **FEW
    ).observables
    assert seen["away"].shape == (3, 4, DIM)
    away = jax.tree.map(lambda x, x0: x - x0, seen["w"], START)
    grads = jax.tree.map(lambda x: 2 * (x - 1), seen["w"])
    each = jax.jit(jax.vmap(jax.vmap(of)))
    np.testing.assert_allclose(seen["away"], each(away), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["grads"], each(grads), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_continues_with_the_same_sketch_only(tmp_path):
    path, options = tmp_path / "run", FEW | {"observables": WATCHED, "chain_method": "vmap"}
    whole = sampling.sample(loss, START, SGLD, **options)
    sampling.sample(loss, START, SGLD, checkpoint=path, **options | {"num_draws": 2})
    found = sampling.sample(loss, START, SGLD, checkpoint=path, **options)
    np.testing.assert_array_equal(found.observables["away"], whole.observables["away"])
    options["observables"] = WATCHED | {"away": sampling.Sketch(DIM, seed=2)}
    with pytest.raises(ValueError, match="its observables is not what was given"):
        sampling.sample(loss, START, SGLD, checkpoint=path, **options)


@pytest.mark.slow
def test_of_low_precision_it_is_that_of_the_positions():
    """The positions in float32 move where the parameters, rounded, do not."""
    start, observables = {"low": jnp.ones(3, jnp.bfloat16)}, {"away": sampling.Sketch(1)}
    found = sampling.sample(loss, start, rules.SGLD(lr=1e-7), observables=observables, **FEW).observables["away"]
    assert found.dtype == jnp.float32
    assert len(np.unique(found)) == 12
    assert (abs(found) < 0.01).all()


def test_a_sampler_without_initial_parameters_is_told_what_to_do():
    with pytest.raises(TypeError, match=r"keeps its initial parameters, such as.*sampling\.sketch\(") as caught:
        sampling.sample(loss, START, optax.sgd(0.1), observables={"away": sampling.Sketch(3)}, **FEW)
    assert "\n" not in str(caught.value)
