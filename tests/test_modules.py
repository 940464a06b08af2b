"""Modules of equinox and nnx as parameters: what is trained, what is kept, and what a step changes besides."""

import copy
import pickle

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxoptim import optim
from jaxoptim.core import trees
from jaxoptim.core.modules import module_of

X = jax.random.normal(jax.random.key(0), (16, 6))
Y = jax.random.randint(jax.random.key(1), (16,), 0, 3)


class Scaled(eqx.Module):
    """A module with a number, a function and integers beside its weights."""

    mlp: eqx.nn.MLP
    scale: float
    order: jax.Array

    def __call__(self, x):
        return self.mlp(x[self.order]) * self.scale


def equinox_model():
    return Scaled(eqx.nn.MLP(6, 3, 8, 1, key=jax.random.key(2)), 2.0, jnp.arange(6)[::-1])


def equinox_loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


class Net(nnx.Module):
    """A module with batch statistics and dropout."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, use_bias=False, rngs=rngs)  # a norm takes a bias away
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def nnx_loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def arrays(model):
    """All variables of an nnx module by path, keys as their numbers."""
    flat = nnx.to_flat_state(nnx.state(model))
    values = {".".join(map(str, path)): var[...] for path, var in flat}
    return {
        path: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for path, x in values.items()
    }


# equinox.


@pytest.mark.slow
def test_equinox_is_trained_as_optax_trains_its_inexact_arrays():
    model, tx = equinox_model(), optax.adamw(0.05, weight_decay=0.1)
    opt = optim.AdamW(model, lr=0.05, weight_decay=0.1)
    other = optim.AdamW(model, lr=0.05, weight_decay=0.1)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for _ in range(20):
        loss, grads = eqx.filter_value_and_grad(equinox_loss)(model, X, Y)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        model = eqx.apply_updates(model, updates)
        chex.assert_trees_all_close(opt.minimize(equinox_loss, X, Y), loss, rtol=1e-4)
        other.step(eqx.filter_grad(equinox_loss)(other.params, X, Y))
    for ours in (opt.params, other.params):
        assert isinstance(ours, Scaled)
        assert ours.mlp.activation is model.mlp.activation
        assert ours.scale == 2.0
        chex.assert_trees_all_equal(ours.order, model.order)
        chex.assert_trees_all_close(
            eqx.filter(ours, eqx.is_inexact_array), eqx.filter(model, eqx.is_inexact_array), rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_equinox_options_frozen_parts_and_copies():
    opt = optim.SGD(equinox_model(), lr=0.1, groups=[(r".*bias", {"lr": 0.5})], frozen=r"mlp\.layers\.0")
    assert [(row.name, row.rate, row.trained) for row in opt.describe()] == [
        ("mlp.layers.0.weight", 0.1, False),
        ("mlp.layers.0.bias", 0.5, False),
        ("mlp.layers.1.weight", 0.1, True),
        ("mlp.layers.1.bias", 0.5, True),
    ]
    before = opt.params
    opt.minimize(equinox_loss, X, Y)
    after = opt.params
    chex.assert_trees_all_equal(after.mlp.layers[0].weight, before.mlp.layers[0].weight)
    assert not np.array_equal(after.mlp.layers[1].weight, before.mlp.layers[1].weight)
    other = copy.deepcopy(opt)
    assert float(other.minimize(equinox_loss, X, Y)) == float(opt.minimize(equinox_loss, X, Y))
    assert other.params.scale == 2.0


def test_a_part_of_an_equinox_module_leaves_the_rest_to_the_user():
    part, _ = eqx.partition(equinox_model(), eqx.is_inexact_array)
    part = eqx.tree_at(lambda tree: tree.mlp.layers[0], part, None)
    opt = optim.SGD(part, lr=0.1)
    assert len(opt.param_groups[0]["params"]) == 2
    assert isinstance(opt.params, Scaled)
    with pytest.raises(TypeError, match=r"Give the arrays alone, eqx\.partition"):
        optim.SGD([{"params": equinox_model()}], lr=0.1)


# nnx.


def by_hand(opt_of, steps):
    """The loop of nnx's own optimizer, in float32."""
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, opt_of, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(nnx_loss)(model, X, Y)
        optimizer.update(model, grads)
        return loss

    return model, [float(step(model, optimizer)) for _ in range(steps)]


@pytest.mark.slow
def test_nnx_is_trained_as_its_own_optimizer_trains_it():
    model, losses = by_hand(optax.adam(0.01), 10)
    given = Net(nnx.Rngs(0))
    before = arrays(given)
    opt = optim.Adam(given, lr=0.01)
    mine = [float(opt.minimize(nnx_loss, X, Y)) for _ in range(10)]
    np.testing.assert_allclose(mine, losses, rtol=1e-4)
    ours, theirs = arrays(opt.params), arrays(model)
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        np.testing.assert_allclose(x, theirs[path], rtol=1e-4, atol=1e-5, err_msg=path)
    assert int(ours["dropout.rngs.count"]) == 10
    for path, x in arrays(given).items():
        np.testing.assert_array_equal(x, before[path], err_msg=path)  # what was given stays


@pytest.mark.slow
def test_nnx_gradients():
    model = Net(nnx.Rngs(0))
    opt, other = optim.SGD(model, lr=0.1), optim.SGD(nnx.state(model, nnx.Param), lr=0.1)
    grads = nnx.grad(nnx_loss)(model, X, Y)
    opt.step(grads)
    other.step(grads)
    assert isinstance(opt.params, Net)
    assert isinstance(other.params, nnx.State)
    chex.assert_trees_all_equal(jax.tree.leaves(nnx.state(opt.params, nnx.Param)), jax.tree.leaves(other.params))


@pytest.mark.slow
def test_nnx_aux_keywords_and_micro_batches():
    def loss(model, x, y, *, weight):
        return weight * nnx_loss(model, x, y), model.norm.mean[...]

    opt = optim.SGD(Net(nnx.Rngs(0)), lr=0.1)
    value, mean = opt.minimize(loss, X, Y, weight=2.0, has_aux=True)
    chex.assert_trees_all_equal(mean, opt.params.norm.mean[...])
    value, means = opt.minimize(loss, X, Y, weight=2.0, has_aux=True, accumulate=4)
    assert means.shape == (4, 8)
    chex.assert_trees_all_equal(means[-1], opt.params.norm.mean[...])  # carried from one to the next
    assert int(arrays(opt.params)["dropout.rngs.count"]) == 5
    assert np.isfinite(float(value))


@pytest.mark.slow
def test_a_skipped_step_keeps_the_statistics():
    opt = optim.SGD(Net(nnx.Rngs(0)), lr=0.1)
    opt.minimize(nnx_loss, X, Y, skip_nonfinite=True)
    before = arrays(opt.params)
    opt.minimize(nnx_loss, X * jnp.nan, Y, skip_nonfinite=True)
    assert bool(opt.last.skipped)
    for path, x in arrays(opt.params).items():
        np.testing.assert_array_equal(x, before[path], err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda m: optim.LBFGS(m, max_iter=4), lambda m: optim.SGLD(m, lr=1e-4, nbeta=2.0)])
def test_other_optimizers(make):
    opt = make(Net(nnx.Rngs(0)))
    first = float(opt.minimize(nnx_loss, X, Y))
    assert np.isfinite(first)
    assert int(arrays(opt.params)["dropout.rngs.count"]) == 1
    assert isinstance(opt.params, Net)


@pytest.mark.slow
def test_nnx_without_anything_else():
    opt = optim.Adam(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), lr=0.1)
    losses = [float(opt.minimize(nnx_loss, X, Y)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert opt.params(X).shape == (16, 3)


def test_one_program_for_all_steps():
    counted = chex.assert_max_traces(nnx_loss, n=1)
    chex.clear_trace_counter()
    opt = optim.Adam(Net(nnx.Rngs(0)), lr=0.1)
    for _ in range(3):
        opt.minimize(counted, X, Y)


def test_variables_that_come_and_go_are_an_error_and_change_nothing():
    def loss(model, x, y):
        model.new = nnx.BatchStat(jnp.zeros(()))
        return nnx_loss(model, x, y)

    opt = optim.Adam(Net(nnx.Rngs(0)), lr=0.1)
    with pytest.raises(TypeError, match="has changed which variables the module has, 'new' among them"):
        opt.minimize(loss, X, Y)
    opt.minimize(nnx_loss, X, Y)
    with pytest.raises(TypeError, match="A module of nnx stands alone"):
        optim.SGD([{"params": Net(nnx.Rngs(0))}], lr=0.1)
    opt.add_param_group({"params": jnp.ones(2)})
    assert isinstance(opt.params[0], Net)
    with pytest.raises(TypeError, match="A loss takes one module"):
        opt.minimize(nnx_loss, X, Y)


def test_variables_of_nnx_among_the_arguments_may_be_changed():
    structure, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, rest, x, y):
        model = nnx.merge(structure, params, rest)
        return nnx_loss(model, x, y), nnx.state(model, nnx.Not(nnx.Param))

    opt, whole = optim.Adam(params, lr=0.01), optim.Adam(Net(nnx.Rngs(0)), lr=0.01)
    for _ in range(3):
        value, rest = opt.minimize(loss, rest, X, Y, has_aux=True)
        chex.assert_trees_all_close(value, whole.minimize(nnx_loss, X, Y), rtol=1e-6)


# Some variables of an nnx module.


class Adapted(nnx.Module):
    """A module with a low-rank adaptation, and batch statistics."""

    def __init__(self, rngs):
        self.first = nnx.LoRA(6, 2, 8, base_module=nnx.Linear(6, 8, rngs=rngs), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(self.first(x)))


FILTERS = {
    "type": (nnx.LoRAParam, ["first.lora_a", "first.lora_b"]),
    "path": (nnx.All(nnx.Param, nnx.PathContains("last")), ["last.bias", "last.kernel"]),
    "several": ([nnx.LoRAParam, nnx.PathContains("scale")], ["first.lora_a", "first.lora_b", "norm.scale"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["minimize", "step", "step along all"])
@pytest.mark.parametrize("wrt", FILTERS)
def test_some_variables_are_trained_as_nnx_trains_them(wrt, way):
    chosen, names = FILTERS[wrt]
    chosen = nnx.Any(*chosen) if isinstance(chosen, list) else chosen
    model = Adapted(nnx.Rngs(0))
    theirs = nnx.Optimizer(model, optax.adam(0.01), wrt=chosen)
    opt = optim.Adam(Adapted(nnx.Rngs(0)), lr=0.01, wrt=FILTERS[wrt][0])
    before = arrays(opt.params)
    assert [row.name for row in opt.describe()] == names
    for _ in range(3):
        theirs.update(model, nnx.grad(nnx_loss, argnums=nnx.DiffState(0, chosen))(model, X, Y))
        if way == "minimize":
            opt.minimize(nnx_loss, X, Y)
        else:
            of = nnx.DiffState(0, opt.wrt if way == "step" else nnx.Param)
            opt.step(nnx.grad(nnx_loss, argnums=of)(opt.params, X, Y))
    after, expected = arrays(opt.params), arrays(model)
    for path, x in after.items():
        if path in names:
            np.testing.assert_allclose(x, expected[path], rtol=1e-3, atol=1e-5, err_msg=path)
            assert (x != before[path]).any()
        elif path in ("norm.mean", "norm.var") and way == "minimize":
            np.testing.assert_allclose(x, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)
        else:
            np.testing.assert_array_equal(x, before[path], err_msg=path)


@pytest.mark.slow
def test_variables_that_are_kept_are_neither_cut_nor_copied():
    opt = optim.SGD(Adapted(nnx.Rngs(0)), lr=0.1, wrt=nnx.LoRAParam)
    kept = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(module_of(opt.params, nnx.LoRAParam).rest.kept)]
    whole = copy.deepcopy(opt)
    whole.minimize(nnx_loss, X[:8], Y[:8], skip_nonfinite=True)
    opt.minimize(nnx_loss, jnp.concatenate([X[:8], X[:8]]), jnp.concatenate([Y[:8], Y[:8]]), accumulate=2)
    after = jax.tree.leaves(module_of(opt.params, nnx.LoRAParam).rest.kept)
    assert [x.unsafe_buffer_pointer() for x in after] == kept
    chex.assert_trees_all_close(opt.params.first.lora_a[...], whole.params.first.lora_a[...], rtol=1e-5)


@pytest.mark.slow
def test_wrt_is_of_every_class_and_stays():
    for make in (optim.LBFGS, optim.Adagrad, optim.ClippedAdam, optim.SGNHT, optim.SGHMC):
        options = {"nbeta": 2.0} if issubclass(make, optim.Sampler) else {}
        opt = make(Adapted(nnx.Rngs(0)), wrt=nnx.LoRAParam, **options)
        assert len(jax.tree.leaves(opt.to_functional()[1])) == 2
    opt = optim.SGD(Adapted(nnx.Rngs(0)), lr=0.5, wrt=nnx.LoRAParam)
    average = optim.swa_utils.AveragedModel(opt)
    other = pickle.loads(pickle.dumps(opt))
    assert other.wrt == opt.wrt == nnx.filterlib.to_predicate(nnx.LoRAParam)
    first = opt.params.first.lora_a[...]
    for _ in range(2):
        assert float(other.minimize(nnx_loss, X, Y)) == float(opt.minimize(nnx_loss, X, Y))
        average.update_parameters(opt)
    assert [name for name in average.state_dict() if "params" in name] == [
        "module.params.first.lora_a",
        "module.params.first.lora_b",
    ]
    assert average.module.first.lora_b[...].any()
    chex.assert_trees_all_equal(average.module.last.kernel[...], opt.params.last.kernel[...])
    chex.assert_trees_all_equal(average.module.norm.mean[...], opt.params.norm.mean[...])
    again = pickle.loads(pickle.dumps(average))
    again.update_parameters(opt)
    assert again.state_dict().keys() == average.state_dict().keys()
    assert (opt.params.first.lora_a[...] != first).any()


@pytest.mark.parametrize(
    ("params", "wrt", "error", "match"),
    [
        ({"w": jnp.ones(2)}, nnx.Param, TypeError, "wrt says which variables of an nnx module are trained, .* a dict"),
        (equinox_model(), nnx.Param, TypeError, r"params is a Scaled\. .*eqx\.partition"),
        (Adapted(nnx.Rngs(0)), 3, TypeError, "wrt is a filter of nnx, such as nnx.Param .*, but got 3"),
        (Adapted(nnx.Rngs(0)), nnx.Cache, ValueError, "selects no variable .* has BatchStat, LoRAParam, Param"),
    ],
    ids=["tree", "equinox", "no filter", "nothing"],
)
def test_wrt_is_a_filter_of_an_nnx_module(params, wrt, error, match):
    with pytest.raises(error, match=match) as caught:
        optim.AdamW(params, wrt=wrt)
    assert "\n" not in str(caught.value)


def test_pickles_keep_the_module():
    opt = optim.Adam(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), lr=0.1)
    other = pickle.loads(pickle.dumps(opt))
    assert float(other.minimize(nnx_loss, X, Y)) == float(opt.minimize(nnx_loss, X, Y))


def test_trees_are_no_modules():
    for tree in ({"w": jnp.ones(2)}, [jnp.ones(2)], jnp.ones(2)):
        assert module_of(tree) is None


# linen.


class LinenNet(linen.Module):
    """A module with batch statistics."""

    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8, use_bias=False)(x))
        return linen.Dense(3)(linen.relu(x))


def linen_loss(variables, x, y):
    out, updates = LinenNet().apply(variables, x, train=True, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(out, y).mean(), updates


@pytest.mark.slow
@pytest.mark.parametrize("way", ["minimize", "step"])
def test_linen_variables_are_trained_as_optax_trains_their_params(way):
    variables = LinenNet().init(jax.random.key(0), X, train=True)
    opt, tx = optim.AdamW(variables, lr=0.01), optax.adamw(0.01, weight_decay=0.01)
    params, stats = variables["params"], variables["batch_stats"]
    state = tx.init(params)
    gradient = jax.jit(jax.grad(lambda p, s: linen_loss({"params": p, "batch_stats": s}, X, Y), has_aux=True))
    for _ in range(5):
        if way == "step":
            opt.step(jax.grad(linen_loss, has_aux=True)(opt.params, X, Y)[0])
            assert opt.params["batch_stats"] is not None
        else:
            _, updates = opt.minimize(linen_loss, X, Y, has_aux=True)
            chex.assert_trees_all_equal(dict(updates), {"batch_stats": opt.params["batch_stats"]})
        grads, updates = gradient(params, stats)
        change, state = tx.update(grads, state, params)
        params, stats = optax.apply_updates(params, change), updates["batch_stats"]
    chex.assert_trees_all_close(opt.params["params"], params, rtol=1e-4, atol=1e-5)
    if way == "minimize":
        chex.assert_trees_all_close(opt.params["batch_stats"], stats, rtol=1e-4, atol=1e-5)
    assert [row.name for row in opt.describe()] == [f"params.{name}" for name in trees.names(params)]


@pytest.mark.slow
def test_linen_collections_go_from_one_micro_batch_to_the_next():
    variables = LinenNet().init(jax.random.key(0), X, train=True)
    opt = optim.SGD(variables, lr=0.1)
    _, updates = opt.minimize(linen_loss, X, Y, has_aux=True, accumulate=2)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[-1], updates["batch_stats"]), opt.params["batch_stats"])
    with pytest.raises(ValueError, match="the loss's batch_stats"):
        opt.minimize(lambda variables, x: (jnp.sum(x), {"batch_stats": {"other": x}}), X, has_aux=True)


# Averages.


@pytest.mark.slow
def test_an_average_of_a_module_is_a_module():
    opt = optim.SGD(Net(nnx.Rngs(0)), lr=0.5)
    average = optim.swa_utils.AveragedModel(opt, avg_fn=optim.swa_utils.get_ema_avg_fn(0.5))
    expected = None
    for _ in range(4):
        opt.minimize(nnx_loss, X, Y)
        average.update_parameters(opt)
        kernel = np.asarray(opt.params.last.kernel[...])
        expected = kernel if expected is None else 0.5 * expected + 0.5 * kernel
    assert isinstance(average.module, Net)
    chex.assert_trees_all_close(average.module.last.kernel[...], expected, rtol=1e-5)
    chex.assert_trees_all_equal(average.module.norm.mean[...], opt.params.norm.mean[...])
    for other in (pickle.loads(pickle.dumps(average)), optim.swa_utils.AveragedModel(Net(nnx.Rngs(1)))):
        other.load_state_dict(average.state_dict())
        chex.assert_trees_all_equal(other.module.last.kernel[...], average.module.last.kernel[...])
    other = optim.swa_utils.AveragedModel(equinox_model())
    other.update_parameters(optim.SGD(equinox_model()))
    chex.assert_trees_all_equal(eqx.filter(other.module, eqx.is_array), eqx.filter(equinox_model(), eqx.is_array))


def test_a_module_of_nnx_among_other_parameters_says_what_to_do():
    for params in ({"net": Net(nnx.Rngs(0))}, [Net(nnx.Rngs(0)), jnp.ones(2)]):
        with pytest.raises(TypeError, match=r"has a module of nnx in it. Give the arrays alone, .* or nnx.split\("):
            optim.SGD(params, lr=0.1)
