"""The pure functions of averages, against their formulas."""

import copy
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from averaging_pairs import (
    DECAYS,
    PAIRS,
    SPECIAL,
    UPDATES,
    assert_close,
    averaged_by_us,
    batches,
    draws,
    larger_by_modulus,
    named,
    reused,
)
from comparisons import assert_same
from jaxoptim import Decay, averaging, pack
from jaxoptim.optim.swa_utils import AveragedModel, update_bn


def by_formula(trees, decay=None, debias=False):
    """The averages after each update, in float64."""
    sums = moment = None
    average, found = None, []
    for n, tree in enumerate(trees):
        x = np.asarray(tree, np.complex128 if np.iscomplexobj(tree) else np.float64)
        if decay is None:
            sums = x if n == 0 else sums + x
            average = sums / (n + 1)
        elif debias:
            moment = (1 - decay) * x if n == 0 else decay * moment + (1 - decay) * x
            average = moment / (1 - decay ** (n + 1))
        else:
            average = x if n == 0 else decay * average + (1 - decay) * x
        found.append(average)
    return found


PURE = {
    "swa": (averaging.swa, {}),
    **{f"ema-{decay}": (averaging.ema, {"decay": decay}) for decay in DECAYS},
    **{f"debiased-{decay}": (averaging.ema, {"decay": decay, "debias": True}) for decay in DECAYS[:-1]},
}
by_few = pytest.mark.parametrize("kind", ["swa", "ema-0.9", "debiased-0.9"])


def made(kind):
    function, options = PURE[kind]
    return function(**options)


@pytest.mark.costly
@pytest.mark.parametrize(
    ("kind", "compiled"),
    [(kind, True) for kind in PURE] + [(kind, False) for kind in ("swa", "ema-0.9", "debiased-0.9")],
    ids=lambda x: {True: "jit", False: "eager"}.get(x, x),
)
def test_the_pure_functions_follow_their_formulas(kind, compiled, x64):
    average = made(kind)
    xs = [tree["a"] for tree in draws(UPDATES if compiled else 10, shapes={"a": (5,)})]
    state = average.init({"a": jnp.asarray(xs[0]) * 3})
    assert_same(state.average, {"a": xs[0] * 3})
    update = jax.jit(average.update, donate_argnums=0) if compiled else average.update
    for n, (x, expected) in enumerate(zip(xs, by_formula(xs, **PURE[kind][1]), strict=True)):
        state = update(state, {"a": jnp.asarray(x)})
        np.testing.assert_allclose(state.average["a"], expected, rtol=0, atol=1e-12)
        assert int(state.n_averaged) == n + 1


@settings(max_examples=25, deadline=None)
@given(
    decay=st.one_of(st.sampled_from(DECAYS[:-1]), st.floats(0, 1 - 1e-6)),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-30, 30),
)
def test_debiasing_is_adams(decay, seed, exponent):
    xs = np.random.default_rng(seed).normal(size=(50, 3)) * 10.0**exponent
    expected = by_formula(xs, decay, True)[-1]
    # One float32 rounding in each step, of numbers as large as the largest.
    for wide, digits in ((True, 1e-9), (False, 3e-6)):
        with jax.enable_x64(wide):
            state = final_average(Decay.of(decay), True, xs.astype(jnp.result_type(float)))
            np.testing.assert_allclose(state.average, expected, rtol=0, atol=digits * np.abs(xs).max())


@functools.partial(jax.jit, static_argnums=1)
def final_average(decay, debias, xs):
    average = averaging.ema(decay, debias)
    return jax.lax.scan(lambda state, x: (average.update(state, x), None), average.init(xs[0]), xs)[0]


def test_debiased_weights_tend_to_the_mean():
    xs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    for decay in (1 - 1e-7, 1.0):
        state = final_average(Decay.of(decay), True, xs)
        np.testing.assert_allclose(state.average, xs.astype(np.float64).mean(0), rtol=0, atol=3e-6, err_msg=str(decay))


def test_the_averages_are_the_classes():
    trees = draws(20, dtype=np.float32)
    for average, options in ((averaging.swa(), {}), (averaging.ema(0.9), PAIRS["ema-multi-0.9"][0])):
        state = average.init(trees[0])
        update = jax.jit(average.update)
        for tree in trees:
            state = update(state, tree)
        assert_close(named(jax.tree.map(np.asarray, state.average)), averaged_by_us(trees, **options), atol=1e-6)


@by_few
def test_the_first_update_copies_what_there_is(kind):
    average = made(kind)
    state = average.init(jnp.asarray(SPECIAL[::-1]))
    state = jax.jit(average.update)(state, jnp.asarray(SPECIAL))
    np.testing.assert_array_equal(state.average, SPECIAL)
    assert np.signbit(state.average[3])


@pytest.mark.slow
@by_few
def test_leaves_of_every_kind(kind):
    average = made(kind)
    decay, debias = PURE[kind][1].get("decay"), PURE[kind][1].get("debias", False)
    values = np.random.default_rng(0).normal(size=(6, 3)) + 2

    def tree(x):
        return {
            "none": None,
            "half": jnp.asarray(x, jnp.bfloat16),
            "complex": jnp.asarray(x * (1 + 2j), jnp.complex64),
            "count": jnp.asarray(np.round(x * 100), jnp.int32),
            "flag": jnp.asarray(x > 2),
            "number": float(x[0]),
        }

    state = average.init(tree(values[0]))
    update = jax.jit(average.update)
    begun = state
    for x in values:
        state = update(state, tree(x))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, begun)
    assert state.average["none"] is None
    assert state.average["half"].dtype == state.average["number"].dtype == np.float32
    assert state.average["count"].tolist() == np.round(values[-1] * 100).tolist()
    assert state.average["flag"].tolist() == (values[-1] > 2).tolist()
    halves = [np.asarray(x.astype(jnp.bfloat16), np.float64) for x in values]
    np.testing.assert_allclose(state.average["half"], by_formula(halves, decay, debias)[-1], rtol=1e-6)
    expected = by_formula([x * (1 + 2j) for x in values], decay, debias)[-1]
    np.testing.assert_allclose(state.average["complex"], expected, rtol=1e-6)
    np.testing.assert_allclose(state.average["number"], by_formula(values, decay, debias)[-1][0], rtol=1e-6)


@pytest.mark.slow
def test_keys_of_random_numbers_are_copied():
    trees = [{"w": jnp.full(2, float(n)), "rng": jax.random.key(n)} for n in range(4)]
    averaged, average = AveragedModel(trees[0]), averaging.swa()
    state = average.init(trees[0])
    for tree in trees:
        averaged.update_parameters(tree)
        state = average.update(state, tree)
    for result in (averaged.module, copy.deepcopy(averaged).module, state.average):
        assert result["w"].tolist() == [1.5, 1.5]
        assert jnp.array_equal(jax.random.key_data(result["rng"]), jax.random.key_data(trees[-1]["rng"]))


@pytest.mark.slow
@by_few
def test_a_donated_scan_carries_the_average(kind):
    average = made(kind)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(8, 200, 100)), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, xs):
        return jax.lax.scan(lambda state, x: (average.update(state, {"w": x, "n": jnp.int32(3)}), None), state, xs)[0]

    state = average.init({"w": xs[0], "n": 2})
    result = run(state, xs)
    assert state.average["w"].is_deleted()
    assert not xs.is_deleted()
    state, update = average.init({"w": xs[0], "n": 2}), jax.jit(average.update)
    for x in xs:
        state = update(state, {"w": x, "n": 3})
    np.testing.assert_allclose(result.average["w"], state.average["w"], rtol=0, atol=1e-6)
    assert (int(result.n_averaged), int(result.average["n"])) == (8, 3)


@pytest.mark.slow
@pytest.mark.parametrize("debias", [False, True], ids=["plain", "debiased"])
def test_vmap_over_decays_equals_a_loop(debias):
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(10, 4)), jnp.float32)
    decays = jnp.array([0.0, 0.3, 0.9, 0.99])
    swept = jax.vmap(lambda decay: final_average(decay, debias, xs).average)(decays)
    for row, decay in zip(swept, decays, strict=True):
        expected = by_formula(np.asarray(xs), float(decay), debias)[-1]
        # A decay in float32 has lost the digits of its complement: 3e-8 of 0.01 is 3e-6.
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5)
    exact = jax.vmap(jax.tree_util.Partial(one_average, debias=debias, xs=xs))(Decay.of(np.asarray(decays, np.float64)))
    for row, decay in zip(exact, np.asarray(decays, np.float64), strict=True):
        np.testing.assert_allclose(row, by_formula(np.asarray(xs), decay, debias)[-1], rtol=0, atol=2e-6)


def one_average(decay, debias, xs):
    return final_average(decay, debias, xs).average


@functools.partial(jax.jit, static_argnums=1)
def slopes(decay, debias, xs):
    """The sum of squares of the average, and its derivatives by the decay and by all parameters."""

    def loss(decay, xs):
        return jnp.sum(final_average(decay, debias, xs).average ** 2)

    return loss(decay, xs), *jax.grad(loss, (0, 1))(decay, xs)


SERIES = np.random.default_rng(0).normal(size=(6, 4))


@pytest.mark.slow
@pytest.mark.parametrize("debias", [False, True], ids=["plain", "debiased"])
@pytest.mark.parametrize("decay", [0.1, 0.4, 0.7, 0.999])
def test_the_derivative_by_the_decay_is_the_finite_difference(decay, debias, x64):
    h = 1e-6
    ahead, behind = (slopes(decay + step, debias, SERIES)[0] for step in (h, -h))
    assert float(slopes(decay, debias, SERIES)[1]) == pytest.approx(float((ahead - behind) / (2 * h)), rel=1e-6)


@pytest.mark.parametrize("debias", [False, True], ids=["plain", "debiased"])
def test_derivatives_are_finite_at_the_ends(debias, x64):
    for decay in (0.0, 1.0):
        assert np.isfinite(slopes(decay, debias, SERIES)[1]), decay


def test_the_derivative_by_the_parameters_is_their_weight(x64):
    for debias, weights in ((False, [1, 1, 2, 4, 8, 16]), (True, [1, 2, 4, 8, 16, 32])):
        weights = np.array(weights)[:, None] / np.sum(weights)
        expected = 2 * weights * np.sum(weights * SERIES, 0)
        np.testing.assert_allclose(slopes(0.5, debias, SERIES)[2], expected, rtol=1e-12)


@by_few
def test_packed_trees_are_averaged_as_they_are(kind):
    average, trees = made(kind), draws(6, dtype=np.float32)
    state, packed = average.init(trees[0]), average.init(pack(trees[0]))
    update = jax.jit(average.update)
    for tree in trees:
        state, packed = update(state, tree), update(packed, pack(tree))
    assert len(jax.tree.leaves(packed.average)) == 2
    assert_close(named(packed.average.unpack()), named(state.average), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def test_averages_are_sharded_like_their_parameters(axis_type):
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    sharding = NamedSharding(mesh, P("x", "y"))
    values = [np.full((8, 4), x, np.float32) for x in (1.0, 2.0, 6.0)]

    def on_mesh(x):
        return {"w": jax.device_put(jnp.asarray(x), sharding), "b": jnp.asarray(x)[0]}

    with jax.set_mesh(mesh):
        for average, expected in ((averaging.swa(), 3.0), (averaging.ema(0.5, debias=True), 29 / 7)):
            state, update = average.init(on_mesh(values[0])), jax.jit(average.update)
            for x in values:
                state = update(state, on_mesh(x))
                assert state.average["w"].sharding.is_equivalent_to(sharding, 2)
            np.testing.assert_allclose(state.average["w"], expected, rtol=1e-6)
        for options, expected in (({}, 3.0), ({"avg_fn": larger_by_modulus}, 6.0)):
            averaged = AveragedModel(on_mesh(values[0]), **options)
            for x in values:
                averaged.update_parameters(on_mesh(x))
                assert averaged.module["w"].sharding.is_equivalent_to(sharding, 2)
            np.testing.assert_allclose(averaged.module["w"], expected, rtol=1e-6)
            saved = averaged.state_dict()
            averaged.load_state_dict(saved)
            assert copy.deepcopy(averaged).module["w"].sharding.is_equivalent_to(sharding, 2)
            averaged.update_parameters(on_mesh(values[0]))
            assert averaged.module["w"].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.ones(2)}, "params has nothing for 'b.c'"),
        ({"w": jnp.ones(2), "b": {"c": jnp.ones(1), "d": 1.0}}, "params has 'b.d', which the average lacks"),
        ({"w": jnp.ones(3), "b": {"c": jnp.ones(1)}}, r"'w' has shape \(3,\) in params, but \(2,\) in the average"),
        ({"w": None, "b": {"c": jnp.ones(1)}}, "params has nothing for 'w', but the average has an array"),
        ({"w": jnp.ones(2), "b": {"c": jnp.ones((1, 1))}}, r"'b.c' has shape \(1, 1\)"),
    ],
    ids=["missing", "extra", "shape", "None", "broadcast"],
)
def test_errors_name_the_parameter(params, message):
    for average in (averaging.swa(), averaging.ema(0.9)):
        state = average.init({"w": jnp.ones(2), "b": {"c": jnp.ones(1)}})
        for update in (average.update, jax.jit(average.update)):
            with pytest.raises(ValueError, match=message):
                update(state, params)
        with pytest.raises(ValueError, match="the average has nothing for 'x', but params has an array"):
            average.update(average.init({"x": None}), {"x": jnp.ones(1)})


def test_a_decay_may_be_given_with_its_complement():
    xs = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    for decay in (0.999, Decay(0.999, 1e-3), np.float64(0.999), np.array(0.999)):
        average = averaging.ema(decay)
        state = average.init(xs[0])
        for x in xs:
            state = average.update(state, x)
        np.testing.assert_allclose(state.average, by_formula(xs, 0.999)[-1], rtol=1e-6)


def test_arrays_given_to_the_pure_functions_are_not_aliased():
    mine = jnp.ones(3)
    average = averaging.swa()
    state = average.init(mine)
    jax.jit(average.update, donate_argnums=0)(state, mine)
    assert not mine.is_deleted()
    for _ in range(10):  # whether a copy is late is a matter of chance
        given_array = reused((1000, 700), 1)
        state = average.init(given_array)
        given_array[:] = 5
        assert np.all(np.asarray(state.average) == 1)


def test_integers_among_the_statistics_count_the_batches():
    def apply_fn(variables, x):
        old = variables["batch_stats"]
        return x, {"batch_stats": {"mean": 0.9 * old["mean"] + 0.1 * x.mean(0), "count": old["count"] + 1}}

    model = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.zeros(3), "count": jnp.int32(7)}}
    averaged, xs = AveragedModel(model), batches([4, 5, 6])
    new = update_bn(xs, averaged, apply_fn)
    assert int(new["count"]) == int(averaged.module["batch_stats"]["count"]) == 3
    np.testing.assert_allclose(new["mean"], np.mean([x.mean(0) for x in xs], 0), rtol=1e-6)


def test_a_complex_parameter_does_not_lose_its_imaginary_part():
    real, imaginary = {"w": jnp.ones(2)}, {"w": jnp.full(2, 1j)}
    averaged, average = AveragedModel(real), averaging.swa()
    state = average.init(real)
    for update in (lambda: averaged.update_parameters(imaginary), lambda: average.update(state, imaginary)):
        with pytest.raises(TypeError, match="'w' is complex"):
            update()


def test_a_complex_average_is_no_state_of_a_real_one():
    model = AveragedModel({"w": jnp.ones(2)})
    given = AveragedModel({"w": jnp.ones(2, complex)}).state_dict()
    with pytest.raises(RuntimeError, match="is complex in the state dict, but real in the model"):
        model.load_state_dict(given)
