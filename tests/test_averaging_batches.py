"""The batch statistics of an averaged network."""

from collections import OrderedDict

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from averaging_pairs import (
    Net,
    TorchNet,
    assert_close,
    averaged_by_us,
    batches,
    bowl,
    named,
    numpy,
    raising,
    snapshot,
    tensor,
    theirs,
    variables_of,
)
from comparisons import assert_same
from jaxoptim import optim
from jaxoptim.optim import swa_utils
from jaxoptim.optim.swa_utils import AveragedModel, update_bn


def apply_of(net):
    return lambda variables, x: net.apply(variables, x, mutable=["batch_stats"])


MOMENTA = [(0.99, 0.9), (0.0, 0.999)]


def statistics_of(variables, xs, dtype=np.float64):
    """The mean over batches of each layer's batch statistics, from its definition, and the sizes of the batches."""
    params = jax.tree.map(lambda x: np.asarray(x, dtype), variables["params"])
    found = []
    for x in xs:
        x = np.asarray(x, dtype) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
        stats = {}
        for name in ("BatchNorm_0", "BatchNorm_1"):
            stats[name] = {"mean": x.mean(0), "var": x.var(0)}
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * params[name]["scale"] + params[name]["bias"]
            x = np.maximum(x, 0)
        found.append(stats)
    return jax.tree.map(lambda *values: np.mean(values, 0), *found)


@pytest.mark.slow
@pytest.mark.parametrize("momenta", MOMENTA, ids=str)
def test_batch_statistics_are_the_mean_over_batches(momenta):
    net, variables, xs = Net(*momenta), variables_of(), batches([16, 9, 16, 16, 9])
    averaged = AveragedModel(variables)
    averaged.update_parameters(variables)
    new = update_bn(((x, "label") for x in xs), averaged, apply_of(net))
    # A layer without momentum passes the statistics of its batch on.
    direct = jax.jit(apply_of(Net(0.0, 0.0)))
    single = [jax.tree.map(np.float64, direct(variables, x)[1]["batch_stats"]) for x in xs]
    assert_close(named(new), named(jax.tree.map(lambda *s: np.mean(s, 0), *single)), rtol=1e-6)
    assert_close(named(new), named(statistics_of(variables, xs)), rtol=1e-5)
    assert_same(averaged.module, {"params": variables["params"], "batch_stats": new})
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(new))


@pytest.mark.slow
@pytest.mark.parametrize("momenta", MOMENTA, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-12)], ids=["float32", "float64"])
def test_batch_statistics_agree_with_torch(momenta, dtype, rtol):
    with jax.enable_x64(dtype is np.float64):
        size, variables = 16, variables_of(3, dtype)
        xs = batches([size] * 7, dtype)
        module = TorchNet(*momenta).to(torch.float64 if dtype is np.float64 else torch.float32)
        module.fill(variables)
        theirs_averaged, averaged = theirs.AveragedModel(module), AveragedModel(variables)
        theirs_averaged.update_parameters(module)
        averaged.update_parameters(variables)
        theirs.update_bn([tensor(x) for x in xs], theirs_averaged)
        update_bn(xs, averaged, apply_of(Net(*momenta, dtype=dtype)))
        torchs = theirs_averaged.module.variables()["batch_stats"]
        for name, stats in averaged.module["batch_stats"].items():
            assert stats["mean"].dtype == dtype
            np.testing.assert_allclose(stats["mean"], torchs[name]["mean"], rtol=rtol)
            # torch's variance is the unbiased one.
            np.testing.assert_allclose(stats["var"], torchs[name]["var"] * (size - 1) / size, rtol=rtol)
        x = xs[0]
        ours = Net(*momenta, dtype=dtype).apply(averaged.module, x, train=False)
        theirs_averaged.eval()
        for name in ("BatchNorm_0", "BatchNorm_1"):
            getattr(theirs_averaged.module, name).running_var.mul_((size - 1) / size)
        np.testing.assert_allclose(ours, numpy(theirs_averaged(tensor(x))), rtol=100 * rtol)


def linear_apply(momentum, form="flax"):
    """A model that keeps the mean of its batches."""

    def apply(variables, x):
        old, batch = variables["batch_stats"]["mean"], x.mean(0)
        new = momentum * old + (1 - momentum) * batch if form == "flax" else old + (1 - momentum) * (batch - old)
        return x - batch, {"batch_stats": {"mean": new}}

    return apply


def linear_variables(width=3):
    return {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.zeros(width)}}


# 0.987654321 has more digits than float32, in which 1 - momentum is off by 2e-6.
@pytest.mark.costly
@pytest.mark.parametrize(
    ("momentum", "form"),
    [(momentum, "flax") for momentum in (0.0, 0.1, 0.9, 0.99, 0.9999, 0.987654321)]
    + [(momentum, "torch") for momentum in (0.0, 0.999, 1 - 2**-7)],
    ids=str,
)
def test_the_momentum_of_a_layer_is_found(momentum, form):
    averaged = AveragedModel(linear_variables())
    xs = batches([4, 5, 6])
    new = update_bn(xs, averaged, linear_apply(momentum, form))
    # What float32 has lost of the momentum shows in the statistics, divided by 1 - momentum.
    lost = abs(float(np.float32(momentum)) - momentum) / (1 - momentum) if momentum == 0.987654321 else 0
    np.testing.assert_allclose(new["mean"], np.mean([x.mean(0) for x in xs], 0), rtol=1e-6 + 2 * lost)


@pytest.mark.slow  # every momentum is another program
@settings(max_examples=40, deadline=None)
@given(momentum=st.floats(0, 0.9999), form=st.sampled_from(["flax", "torch"]))
@example(momentum=1.6395889532038418e-16, form="torch")
@example(momentum=9.440177373486125e-240, form="flax")
def test_any_momentum_is_found_in_float64(momentum, form):
    with jax.enable_x64(True):
        averaged = AveragedModel(linear_variables())
        xs = batches([4, 5], np.float64)
        new = update_bn(xs, averaged, linear_apply(momentum, form))
        np.testing.assert_allclose(new["mean"], np.mean([x.mean(0) for x in xs], 0), rtol=1e-11)


LOADERS = {
    "arrays": lambda xs: xs,
    "tuples": lambda xs: [(x, np.zeros(len(x))) for x in xs],
    "lists": lambda xs: [[x, None] for x in xs],
    "generator": lambda xs: (x for x in xs),
    "jax": lambda xs: map(jnp.asarray, xs),
    "torch": lambda xs: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.tensor(np.concatenate(xs))), batch_size=4, collate_fn=collated
    ),
}


def collated(samples):
    return [np.stack([x.numpy() for (x,) in samples])]


@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_give_batches_or_tuples_of_them(loader):
    xs = batches([4, 4, 4, 2])
    averaged = AveragedModel(linear_variables())
    update_bn(LOADERS[loader](xs), averaged, linear_apply(0.9))
    np.testing.assert_allclose(averaged.module["batch_stats"]["mean"], np.mean([x.mean(0) for x in xs], 0), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_statistics_in_half_precision_are_right_to_their_digits(dtype):
    variables = linear_variables()
    variables["batch_stats"]["mean"] = variables["batch_stats"]["mean"].astype(dtype)
    averaged, xs = AveragedModel(variables), batches([4, 5, 6])

    def apply(variables, x):
        updates = linear_apply(0.99)(variables, x)[1]
        return x, jax.tree.map(lambda x: x.astype(dtype), updates)

    new = update_bn(xs, averaged, apply)
    assert averaged.module["batch_stats"]["mean"].dtype == dtype
    expected = np.mean([x.mean(0) for x in xs], 0)
    np.testing.assert_allclose(np.asarray(new["mean"], float), expected, rtol=4 * float(jnp.finfo(dtype).eps))


def test_flax_takes_frozen_variables():
    variables, xs = flax.core.freeze(variables_of()), batches([16, 9])
    averaged = AveragedModel(variables)
    new = update_bn(xs, averaged, apply_of(Net()))
    assert_close(named(flax.core.unfreeze(new)), named(statistics_of(variables, xs)), rtol=1e-5)
    assert isinstance(averaged.module, flax.core.FrozenDict)


def test_a_batch_may_be_a_tree():
    def apply(variables, batch):
        return None, {"batch_stats": {"mean": 0.9 * variables["batch_stats"]["mean"] + 0.1 * batch["x"].mean(0)}}

    averaged = AveragedModel(linear_variables())
    new = update_bn([{"x": np.ones((4, 3))}, {"x": 3 * np.ones((2, 3))}], averaged, apply)
    np.testing.assert_allclose(new["mean"], 2, rtol=1e-6)


def test_a_model_without_batch_statistics_is_left_alone():
    for tree in ({"params": {"w": jnp.ones(2)}}, {"params": {"w": jnp.ones(2)}, "batch_stats": {}}, {"w": jnp.ones(2)}):
        averaged = AveragedModel(tree)
        before, loader = snapshot(averaged), iter([1])
        assert update_bn(loader, averaged, raising) is None
        assert_same(snapshot(averaged), before)
        assert next(loader) == 1  # nothing was read
    theirs.update_bn([1], torch.nn.Linear(1, 1))  # as in torch


def bad_statistics(variables, x):
    raise RuntimeError("no statistics today")


def largest(variables, x):
    return x, {"batch_stats": {"mean": jnp.maximum(variables["batch_stats"]["mean"], x.max(0))}}


@pytest.mark.parametrize(
    ("loader", "apply_fn", "error", "message"),
    [
        ([], linear_apply(0.9), ValueError, "without batches"),
        ([np.ones((4, 3))], bad_statistics, RuntimeError, "no statistics"),
        ([np.ones((4, 3)), np.ones((4, 2))], linear_apply(0.9), (TypeError, ValueError), "shape"),
        ([np.ones((4, 3))], largest, ValueError, "momentum"),
        ([np.ones((4, 3))], lambda v, x: (x, v), ValueError, "momentum"),
        ([np.ones((4, 3))], linear_apply(1.0), ValueError, "momentum"),
        ([np.ones((4, 3))], linear_apply(-0.5), ValueError, "momentum"),
    ],
    ids=["empty", "raising", "shape", "maximum", "unchanged", "momentum of one", "negative momentum"],
)
def test_statistics_that_cannot_be_computed_change_nothing(loader, apply_fn, error, message):
    averaged = AveragedModel(linear_variables())
    averaged.update_parameters(linear_variables())
    before = snapshot(averaged)
    with pytest.raises(error, match=message):
        update_bn(loader, averaged, apply_fn)
    assert_same(snapshot(averaged), before)
    averaged.update_parameters(linear_variables())


@pytest.mark.slow
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("freeze", [dict, flax.core.FrozenDict, OrderedDict], ids=["dict", "FrozenDict", "OrderedDict"])
def test_the_statistics_find_their_place_in_any_mapping(freeze, use_buffers):
    tree = freeze(
        {"params": {"w": jnp.full(3, 7.0)}, "cache": {"k": jnp.full(3, 5.0)}, "batch_stats": {"mean": jnp.zeros(3)}}
    )
    averaged = AveragedModel(tree, use_buffers=use_buffers)
    averaged.update_parameters(tree)
    update_bn([np.full((2, 3), 4.0, np.float32)], averaged, linear_apply(0.9))
    assert type(averaged.module) is type(tree)
    found = {name: float(jax.tree.leaves(averaged.module[name])[0][0]) for name in tree}
    assert found == pytest.approx({"params": 7.0, "cache": 5.0, "batch_stats": 4.0})
    assert int(averaged.n_averaged) == 1
    averaged.update_parameters(tree)  # and goes on
    stats = float(averaged.module["batch_stats"]["mean"][0])
    assert stats == pytest.approx(2.0 if use_buffers else 0.0)


def test_statistics_do_not_round_an_average_of_bfloat16():
    trees = [
        {"params": {"w": np.full(3, x, jnp.bfloat16)}, "batch_stats": {"mean": np.zeros(3)}} for x in [1, *[2] * 40]
    ]
    averaged = AveragedModel(trees[0], avg_fn=swa_utils.get_ema_avg_fn(0.999))
    for tree in trees:
        averaged.update_parameters(tree)
        update_bn([np.ones((2, 3), np.float32)], averaged, HALF)
    expected = averaged_by_us([{"w": tree["params"]["w"]} for tree in trees], avg_fn=swa_utils.get_ema_avg_fn(0.999))
    assert_same({"w": averaged.module["params"]["w"]}, expected)


HALF = linear_apply(0.5)


def test_the_model_is_compiled_once_for_all_batches():
    calls = []

    def apply(variables, x):
        calls.append(x)
        return linear_apply(0.9)(variables, x)

    averaged = AveragedModel(linear_variables())
    update_bn(batches([8] * 5), averaged, apply)
    first = len(calls)
    update_bn(batches([8] * 9), averaged, apply)
    assert first <= 4  # once compiled, the others for the momentum
    assert len(calls) - first < first


@pytest.mark.slow
def test_statistics_of_an_optimizers_average():
    variables, xs = variables_of(1), batches([8, 8])
    opt = optim.SGD(variables["params"], lr=0.1)
    averaged = AveragedModel(opt)
    averaged.update_parameters(opt)
    for _ in range(2):
        opt.minimize(bowl)
        averaged.update_parameters(opt)
    before, mine = snapshot(averaged), jax.tree.map(jnp.asarray, variables["batch_stats"])
    new = update_bn(xs, averaged, apply_of(Net()), batch_stats=mine)
    assert_close(named(new), named(statistics_of({"params": averaged.module}, xs)), rtol=1e-5)
    assert_same(snapshot(averaged), before)  # it has no place for them
    assert_same(mine, variables["batch_stats"])
    out = Net().apply({"params": averaged.module, "batch_stats": new}, xs[0], train=False)
    assert np.all(np.isfinite(out))
    assert update_bn(xs, averaged, raising) is None


@pytest.mark.slow
def test_statistics_of_an_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 5, rngs=rngs)
            self.norm = nnx.BatchNorm(5, momentum=0.95, use_fast_variance=False, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    graphdef, params, stats = nnx.split(Model(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def apply(variables, x):
        model = nnx.merge(graphdef, variables["params"], variables["batch_stats"])
        return model(x), {"batch_stats": nnx.state(model, nnx.BatchStat)}

    xs = batches([8, 5])
    averaged = AveragedModel({"params": params, "batch_stats": stats})
    averaged.update_parameters({"params": params, "batch_stats": stats})
    update_bn(xs, averaged, apply)
    assert "module.batch_stats.norm.mean" in averaged.state_dict()
    linear = params["linear"]
    outputs = [np.asarray(x @ linear["kernel"][...] + linear["bias"][...], np.float64) for x in xs]
    expected = {"mean": np.mean([x.mean(0) for x in outputs], 0), "var": np.mean([x.var(0) for x in outputs], 0)}
    model = nnx.merge(graphdef, averaged.module["params"], averaged.module["batch_stats"])
    for name in expected:
        np.testing.assert_allclose(getattr(model.norm, name)[...], expected[name], rtol=2e-5, atol=1e-6)
