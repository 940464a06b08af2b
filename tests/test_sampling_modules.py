"""Modules as the parameters of chains: what is sampled, what is fixed, and what comes back."""

import dataclasses
from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxoptim import optim, rules, sampling
from jaxoptim.core import trees
from jaxoptim.sampling import chains

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 3))
DATA = {"x": X, "y": X.sum(-1)}
KEY = jax.random.key(3)
SGLD = rules.SGLD(lr=1e-3, nbeta=5.0, localization=1.0)
FEW = {"key": KEY, "num_chains": 2, "num_draws": 3, "batch_size": 4}
few_draws = pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")


class Scaled(eqx.Module):
    """A module with a number, a function and integers beside its weights."""

    mlp: eqx.nn.MLP
    scale: float
    order: jax.Array

    def __call__(self, x):
        return self.mlp(x[self.order])[0] * self.scale


def scaled(seed=2, scale=2.0):
    return Scaled(eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(seed)), scale, jnp.arange(3)[::-1])


class Net(nnx.Module):
    """A module with batch statistics and dropout, in training mode."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))[:, 0]


def net(seed=0, mean=0.5, trains=True):
    model = Net(nnx.Rngs(seed))
    floats = nnx.state(model, (nnx.Param, nnx.BatchStat))
    nnx.update(model, jax.tree.map(lambda x: x.astype(float), floats))
    model.norm.mean[...] = jnp.full(4, mean)
    if not trains:
        model.eval()
    return model


class LinenNet(linen.Module):
    """A module with batch statistics, used as they are."""

    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=True, param_dtype=float)(linen.Dense(4, param_dtype=float)(x))
        return linen.Dense(1, param_dtype=float)(linen.relu(x))[:, 0]


def variables():
    """In float64 all, because the compiler rounds a constant otherwise than a number that it is given."""
    made = LinenNet().init(jax.random.key(0), X)
    return made | {"batch_stats": jax.tree.map(lambda x: x.astype(float) + 0.5, made["batch_stats"])}


def equinox_loss(model, batch):
    return jnp.mean((jax.vmap(model)(batch["x"]) - batch["y"]) ** 2)


def nnx_loss(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def linen_loss(variables, batch):
    return jnp.mean((LinenNet().apply(variables, batch["x"]) - batch["y"]) ** 2)


class Case(NamedTuple):
    """A module, and the same by hand: its arrays, and a function that makes the module of them."""

    model: Any
    loss: Any
    arrays: Any
    joined: Any
    predict: Any
    last: str

    def loss_of_arrays(self, arrays, batch):
        return self.loss(self.joined(arrays), batch)


def case(kind, trains=True):
    if kind == "equinox":
        model = scaled()
        arrays, rest = eqx.partition(model, eqx.is_inexact_array)
        functions = (lambda x: eqx.combine(x, rest), lambda model: jax.vmap(model)(X[:2]))
        return Case(model, equinox_loss, arrays, *functions, r"mlp\.layers\.1.*")
    if kind == "nnx":
        model = net(trains=trains)
        structure, arrays, rest = nnx.split(model, nnx.Param, ...)
        functions = (lambda x: nnx.merge(structure, x, rest, copy=True), lambda model: model(X[:2]))
        return Case(model, nnx_loss, arrays, *functions, r"last.*")
    model = variables()
    functions = (lambda x: model | x, lambda variables: LinenNet().apply(variables, X[:2]))
    return Case(model, linen_loss, {"params": model["params"]}, *functions, r"params\.Dense_1.*")


def leaves(tree):
    """The arrays of a tree, keys as their numbers."""
    found = [x for x in jax.tree.leaves(tree) if eqx.is_array(x)]
    return [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in found]


KINDS = ["equinox", "nnx", "linen"]


def same(ours, theirs):
    """To the last bit but for constants: by hand what is fixed is one, which a compiler may fold."""
    chex.assert_trees_all_close(ours, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_a_module_is_that_of_its_arrays(kind):
    of = case(kind)
    watched = {"covariance": sampling.Covariance(), "accepted": sampling.MalaAcceptance()}
    seen = {"predicted": of.predict, "some": sampling.Covariance(of.predict), "all": lambda model: model}
    by_hand = {
        "predicted": lambda x: of.predict(of.joined(x)),
        "some": sampling.Covariance(lambda x: of.predict(of.joined(x))),
        "all": lambda x: x,
    }
    before = [np.array(x) for x in leaves(of.model)]
    options = FEW | {"batch_size": None}
    found = sampling.sample(of.loss, of.model, SGLD, DATA, observables=watched | seen, **options)
    plain = sampling.sample(of.loss_of_arrays, of.arrays, SGLD, DATA, observables=watched | by_hand, **options)
    same(found.loss, plain.loss)
    assert found.loss.dtype == float
    draws = found.observables.pop("all")
    ours = {name: leaves(x) for name, x in (found.observables | {"all": draws}).items()}
    theirs = {name: leaves(x) for name, x in plain.observables.items()}
    if kind == "linen":  # a dict of arrays comes back as it is
        ours["all"] = leaves(draws["params"])
    same(ours, theirs)
    # What comes back is a module, all arrays of which have an axis of chains.
    assert type(found.params) is type(of.model)
    sizes = [np.shape(x) for x in leaves(found.params)]
    assert sizes == [(2, *np.shape(x)) for x in before]
    predicted = eqx.filter_vmap(of.predict)(found.params)
    for chain in range(2):
        arrays = jax.tree.map(lambda x, c=chain: x[c], plain.params)
        chex.assert_trees_all_close(predicted[chain], of.predict(of.joined(arrays)), rtol=1e-12)
    chex.assert_trees_all_equal(leaves(of.model), before)


@pytest.mark.slow
@few_draws
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_of_a_module_are_those_of_its_arrays(kind):
    of, sampler = case(kind), SGLD.replace(nbeta=1.0)
    options = FEW | {"nbeta": 3.0}
    ours, plain = (
        sampling.estimate_llc(*one, sampler, DATA, selections={"last": of.last, "all": ".*"}, **options)
        for one in ((of.loss, of.model), (of.loss_of_arrays, of.arrays))
    )
    same((ours.init_loss, ours.loss), (plain.init_loss, plain.loss))
    assert (ours["last"].loss[:, 1:] != ours["all"].loss[:, 1:]).all()
    observables = {"predicted": of.predict}
    sweep = sampling.calibrate(
        of.loss, of.model, sampler, DATA, lr=[1e-3], localization=[1.0, 2.0], observables=observables, **options
    )
    np.testing.assert_allclose(sweep.trace[0, 0], ours["all"].trace, rtol=1e-9, atol=1e-12)
    assert sweep.observables["predicted"].shape == (1, 2, 2, 3, 2)


@pytest.mark.slow
@few_draws
def test_a_mask_of_an_equinox_module_is_a_module_of_bools():
    mask = eqx.tree_at(lambda model: model.mlp.layers[1], jax.tree.map(lambda _: False, scaled()), replace_fn=_yes)
    llc = sampling.estimate_llc(
        equinox_loss, scaled(), SGLD, DATA, selections=[mask, r"mlp\.layers\.1.*"], observables={"all": _same}, **FEW
    )
    np.testing.assert_allclose(llc[0].loss, llc[1].loss, rtol=1e-12)
    held = llc.observables["all"].mlp.layers[0].weight
    chex.assert_trees_all_equal(held, np.broadcast_to(scaled().mlp.layers[0].weight, held.shape))


def _yes(layer):
    return jax.tree.map(lambda _: True, layer)


def _same(model):
    return model


@dataclasses.dataclass(frozen=True)
class Changes(sampling.Observable):
    """Sees a module, and changes it, as a loss in training mode does."""

    def init(self, params):
        return jnp.zeros(()) + params(X[:2]).sum() * 0

    def update(self, memory, draw):
        params = draw.params
        params(X[:2])
        change = jnp.sum((params.norm.mean[...] - draw.params.norm.mean[...]) ** 2)
        fall = jax.tree.map(jnp.multiply, draw.grads, draw.arrays)
        return memory + change, {
            "fall": nnx.to_pure_dict(fall)["last"]["bias"],
            "count": params.dropout.rngs.count[...],
        }

    def result(self, memory, trace):
        return memory, trace


@pytest.mark.slow
def test_what_a_loss_changes_in_a_module_is_dropped():
    """Each step has the statistics and the random counts that were given, and so has each observable."""
    observables = {"changes": Changes(), "means": lambda model: (model(X[:2]), model.norm.mean[...])[1]}
    options = FEW | {"batch_size": None, "observables": observables}
    found = sampling.sample(nnx_loss, net(), SGLD.replace(lr=0.0), DATA, **options)
    change, trace = found.observables["changes"]
    assert (change > 0).all()
    assert trace["count"].tolist() == [[1, 1, 1]] * 2
    grads = nnx.grad(nnx_loss)(net(), DATA)
    fall = (grads.last.bias * net().last.bias)[...]
    chex.assert_trees_all_close(trace["fall"], jnp.broadcast_to(fall, (2, 3, 1)), rtol=1e-12)
    one = net()
    one(X[:2])
    means = jnp.broadcast_to(one.norm.mean[...], (2, 3, 4))
    chex.assert_trees_all_close(found.observables["means"], means, rtol=1e-12)
    first = nnx_loss(net(), DATA)
    chex.assert_trees_all_close(found.loss, jnp.broadcast_to(first, (2, 3)), rtol=1e-12)
    chex.assert_trees_all_equal(found.params.norm.mean[...], jnp.full((2, 4), 0.5))
    assert found.params.dropout.rngs.count[...].tolist() == [0, 0]
    one, other = (sampling.sample(nnx_loss, net(mean=x, trains=False), SGLD, DATA, **FEW) for x in (0.5, 0.0))
    assert (one.loss != other.loss).all()  # where they are used, they are those given


@pytest.mark.slow
@pytest.mark.usefixtures("only_new_garbage")  # what is collected takes its programs along
def test_modules_of_one_structure_share_a_program():
    """Weights, integers, statistics and keys are data; a number of Python is not."""

    def losses(loss, *models):
        return {float(sampling.sample(loss, model, SGLD, DATA, **FEW).loss[0, 0]) for model in models}

    def compiled():
        return chains.run_steps._cache_size(), chains.init_chains._cache_size()

    some = losses(equinox_loss, scaled()) | losses(nnx_loss, net(trains=False))
    before = compiled()
    turned = eqx.tree_at(lambda model: model.order, scaled(), jnp.arange(3))
    some |= losses(equinox_loss, scaled(seed=5), turned)
    some |= losses(nnx_loss, net(seed=5, trains=False), net(mean=1.0, trains=False))
    assert compiled() == before
    some |= losses(equinox_loss, scaled(scale=3.0))
    assert compiled() > before
    assert len(some) == 7


@pytest.mark.slow
@pytest.mark.numbers
def test_a_module_without_other_arrays_runs_as_its_arrays_to_the_last_bit():
    model = eqx.nn.MLP(3, "scalar", 4, 1, key=jax.random.key(2))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_of_arrays(arrays, batch):
        return equinox_loss(eqx.combine(arrays, static), batch)

    found = sampling.sample(equinox_loss, model, SGLD, DATA, **FEW)
    plain = sampling.sample(loss_of_arrays, arrays, SGLD, DATA, **FEW)
    chex.assert_trees_all_equal((found.loss, leaves(found.params)), (plain.loss, leaves(plain.params)))
    assert found.params.activation is model.activation


@pytest.mark.slow
def test_a_run_of_a_module_continues_from_a_checkpoint(tmp_path):
    path, model = tmp_path / "run", net(trains=False)
    options = FEW | {"observables": {"all": _same}}
    whole = sampling.sample(nnx_loss, model, SGLD, DATA, **options)
    sampling.sample(nnx_loss, model, SGLD, DATA, checkpoint=path, **options | {"num_draws": 2})
    found = sampling.sample(nnx_loss, model, SGLD, DATA, checkpoint=path, **options)
    chex.assert_trees_all_equal(found.loss, whole.loss)
    chex.assert_trees_all_equal(leaves((found.params, found.observables)), leaves((whole.params, whole.observables)))
    with pytest.raises(ValueError, match="is of another run: its params is not what was given"):
        sampling.sample(nnx_loss, net(mean=0.0, trains=False), SGLD, DATA, checkpoint=path, **options)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"a": scaled()}, r"'a\.mlp\.activation' is a \w+\. .*eqx\.partition\(model"),
        ([net()], r"has a module of nnx in it\. .*nnx\.split\(model, nnx\.Param, \.\.\.\)\[1\]"),
    ],
    ids=["equinox", "nnx"],
)
@pytest.mark.parametrize("run", [sampling.sample, sampling.estimate_llc])
def test_a_module_among_other_parameters_is_refused(run, params, match):
    with pytest.raises(TypeError, match=match) as error:
        run(lambda params, batch: 0.0, params, SGLD, DATA, key=KEY)
    assert len(str(error.value)) <= 300


@pytest.mark.slow
def test_a_part_of_a_module_leaves_the_rest_to_the_loss():
    of = case("equinox")
    part = eqx.tree_at(lambda tree: tree.mlp.layers[0], of.arrays, None)

    def loss(part, batch):
        return of.loss(eqx.combine(part, of.model), batch)

    found = sampling.sample(loss, part, SGLD, DATA, **FEW)
    assert found.params.mlp.layers[0] is None
    assert found.params.mlp.layers[1].weight.shape == (2, 1, 4)


# The torch-style samplers.


@pytest.mark.costly
@pytest.mark.parametrize("make", [optim.SGLD, optim.SGNHT, optim.SGHMC, optim.PSGLD], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("kind", ["equinox", "nnx"])
def test_torch_style_samplers_take_modules(kind, make):
    of = case(kind, trains=False)
    ours, plain = (make(x, lr=1e-3, nbeta=5.0, key=KEY) for x in (of.model, of.arrays))
    for _ in range(3):
        same(ours.minimize(of.loss, DATA), plain.minimize(of.loss_of_arrays, DATA))
    assert type(ours.params) is type(of.model)
    names = [row.name for row in ours.describe() if row.shape is not None]
    assert names == trees.array_names(of.arrays)
    trained = nnx.state(ours.params, nnx.Param) if kind == "nnx" else eqx.filter(ours.params, eqx.is_inexact_array)
    same(leaves(trained), leaves(plain.params))
    assert (np.asarray(leaves(trained)[-1]) != leaves(of.arrays)[-1]).any()
