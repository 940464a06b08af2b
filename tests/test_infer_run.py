"""Many steps of variational inference in one compiled call: to the last bit those of a loop of steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import jaxoptim
from infer_networks import Normalised
from jaxoptim import optim, rules, schedules
from jaxoptim.core.batches import batch_at
from jaxoptim.engine import loops
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim as named
from jaxoptim.pyro.infer import SVI
from jaxoptim.pyro.optim.multi import MixedMultiOptimizer, MultiOptimizer, Newton

pytestmark = pytest.mark.numbers

KEY = jax.random.key(7)
DATA = np.random.default_rng(0).normal(1.5, 1.0, (12, 2)).astype(np.float32)


def model(data, scale=1.0):
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    with numpyro.plate("n", 12, subsample_size=len(data)):
        numpyro.sample("x", dist.Normal(mean, scale).to_event(1), obs=data)


def guide(data, scale=1.0):
    loc = numpyro.param("loc", jnp.zeros(2))
    width = numpyro.param("width", jnp.ones(2), constraint=constraints.positive)
    numpyro.sample("mean", dist.Normal(loc, width).to_event(1))


def delta(data, scale=1.0):
    numpyro.sample("mean", dist.Delta(numpyro.param("loc", jnp.zeros(2)), event_dim=1))


class Descent(MultiOptimizer):
    """An optimizer of a user's own."""

    def get_step(self, loss_fn, params, *args):
        values = {name: param.value for name, param in params.items()}
        grads = jax.grad(loss_fn)(values, *args)
        return {name: values[name] - 0.01 * grads[name] for name in values}


def growing():
    """A transformation whose state is of another form after the first step."""
    return optax.GradientTransformation(
        lambda params: (),
        lambda grads, state, params=None: (jax.tree.map(lambda g: -0.01 * g, grads), (jnp.zeros(2),)),
    )


OPTIMIZERS = {
    "pyro": lambda: named.Adam({"lr": 0.05}),
    "by name": lambda: named.Adam(lambda name: {"lr": 0.05 if name == "loc" else 0.01}, {"clip_norm": 2.0}),
    "decaying": lambda: named.ClippedAdam(lambda name: {"lr": 0.05, "lrd": 0.98 if name == "loc" else 1.0}),
    "scheduled": lambda: named.ExponentialLR({"optimizer": optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.9}),
    "mixed": lambda: MixedMultiOptimizer(
        [(["loc"], named.ClippedAdam({"lr": 0.05, "lrd": 0.98})), (["width"], rules.Adam(lr=0.01))]
    ),
    "rule": lambda: rules.NAdam(lr=0.05),
    "rule with schedule": lambda: rules.Adam(lr=schedules.exponential_lr(0.1, 0.99)),
    "optax": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 100), weight_decay=0.1)
    ),
    "torch": lambda: lambda params: optim.Adam(params, lr=0.05),
    "LBFGS rule": lambda: rules.LBFGS(line_search_fn="strong_wolfe"),
    "optax LBFGS": optax.lbfgs,
    "own": Descent,
    "changing state": growing,
}
SECOND_ORDER = {
    "Newton": lambda: Newton({"loc": 1.0}),
    "Newton rule": rules.Newton,
    "torch LBFGS": lambda: lambda params: optim.LBFGS(params, lr=0.5),
}
SINGLE_STEPS = {"own": 38, "changing state": 1, "torch LBFGS": 38}
"""Those that many steps are not one program for: how many of 38 are made one after another."""


def pairs(optimizer, model=model, guide=guide, **options):
    """Two fits that begin alike."""
    return [SVI(model, guide, optimizer(), Trace_ELBO(), key=KEY, **options) for _ in range(2)]


def assert_same(first, second, unit=0.0):
    """Both are where the other is, to the last bit, what a model changes to a relative unit."""
    values = [{name: param.value for name, param in svi.params.items()} for svi in (first, second)]
    chex.assert_trees_all_equal(*values)
    chex.assert_trees_all_equal(*(jax.random.key_data(svi.key) for svi in (first, second)))
    chex.assert_trees_all_close(first.mutable_state, second.mutable_state, rtol=unit)


@pytest.fixture
def singles(monkeypatch):
    """How many steps runs make one after another."""
    made = []

    def counted(self, data, count, skips):
        made.extend([1] * count)
        return singly(self, data, count, skips)

    singly = SVI._made_singly
    monkeypatch.setattr(SVI, "_made_singly", counted)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS | SECOND_ORDER)
def test_a_run_is_a_loop_of_steps(name, singles):
    own = delta if name in SECOND_ORDER else guide
    looped, run = pairs((OPTIMIZERS | SECOND_ORDER)[name], guide=own)
    for count in (1, 30, 7):
        losses = [looped.step(DATA) for _ in range(count)]
        np.testing.assert_array_equal(run.run(count, DATA, progress_bar=False), np.float32(losses))
        assert_same(looped, run)
    assert len(singles) == SINGLE_STEPS.get(name, 0)
    assert run.step(DATA) == looped.step(DATA)  # also what the optimizer keeps


@pytest.mark.slow
def test_any_number_of_steps_is_one_program_and_the_model_is_not_traced_again():
    traces = []

    def counted(data):
        traces.append(1)
        return model(data)

    svi = SVI(counted, guide, rules.Adam(lr=0.01), Trace_ELBO(), key=KEY)
    svi.run(3, DATA, progress_bar=False)
    before, programs = len(traces), loops.minimize_many._cache_size()
    for count in (1, 100, loops.CAPACITY + 77):
        chex.assert_shape(svi.run(count, DATA, progress_bar=False), (count,))
    assert (len(traces), loops.minimize_many._cache_size()) == (before, programs)


@pytest.mark.slow
@pytest.mark.parametrize("num_data", [12, 150], ids=["one thread", "many"])
def test_losses_of_more_steps_than_a_block(num_data):
    def model(data):
        mean = numpyro.sample("mean", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
        with numpyro.plate("n", num_data):
            numpyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=data)

    data = jnp.asarray(np.resize(DATA, (num_data, 2)))
    assert (data.nbytes > 4 * loops.BLOCK) == (num_data > 12)
    run, loop = pairs(OPTIMIZERS["rule"], model)
    steps = loops.BLOCK + 20
    run.run(1, data, progress_bar=False)
    loop.step(data)
    losses = run.run(steps, data, progress_bar=False)
    np.testing.assert_array_equal(losses, [np.float32(loop.step(data)) for _ in range(steps)])
    assert_same(run, loop)


@pytest.mark.slow
def test_large_arrays_are_replaced_in_place(monkeypatch):
    size, texts, program = 100_000, [], loops.minimize_many

    def large():
        numpyro.sample("mean", dist.Normal(jnp.ones(size), 5.0).to_event(1))

    def guide():
        numpyro.sample("mean", dist.Delta(numpyro.param("loc", jnp.zeros(size)), event_dim=1))

    def seen(*args):
        texts.append(program.lower(*args).compile().as_text())
        return program(*args)

    monkeypatch.setattr(loops, "minimize_many", seen)
    run, loop = (SVI(large, guide, named.Adam({"lr": 0.01}), Trace_ELBO(), key=KEY) for _ in range(2))
    losses = run.run(4, progress_bar=False)
    np.testing.assert_array_equal(losses, [np.float32(loop.step()) for _ in range(4)])
    assert_same(run, loop)
    assert texts
    text = texts[-1]
    assert not [line for line in text.splitlines() if f"f32[{size}]" in line and " copy(" in line]


def test_options_that_decay_are_one_program_from_the_first_step_on():
    traces = []

    def counted(data):
        traces.append(1)
        return model(data)

    svi = SVI(counted, guide, named.ClippedAdam({"lr": 0.05, "lrd": 0.9}), Trace_ELBO(), key=KEY)
    programs = loops.minimize_many._cache_size()
    svi.run(30, DATA, progress_bar=False)
    assert (len(traces), loops.minimize_many._cache_size()) == (2, programs + 1)


@pytest.mark.slow
def test_options_that_decay_go_on_over_many_calls():
    looped, run = pairs(lambda: named.ClippedAdam({"lr": 0.05, "lrd": 0.999}))
    losses = [looped.step(DATA) for _ in range(600)]
    np.testing.assert_array_equal(run.run(600, DATA, progress_bar=False), np.float32(losses))
    rates = [svi._multi.optim.optim_objs["loc"].param_groups[0]["lr"] for svi in (looped, run)]
    assert rates[0] == rates[1] == pytest.approx(0.05 * 0.999**600)


def normalised(x):
    net = flax_module("net", Normalised(), input_shape=(1, 2), mutable=["batch_stats"])
    numpyro.sample("y", dist.Normal(net(x), 1.0).to_event(1), obs=x[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("skips", [False, True], ids=["plain", "stable"])
def test_mutable_state_goes_on(skips, singles):
    looped, run = pairs(lambda: optax.adam(0.01), normalised, lambda x: None, skip_nonfinite=skips)
    losses = [looped.step(DATA) for _ in range(9)]
    np.testing.assert_array_equal(run.run(9, DATA, progress_bar=False, stable_update=skips), np.float32(losses))
    # A moving average is a product and a sum, which XLA rounds once or twice, as the program and the processor are.
    assert_same(looped, run, unit=2**-22)
    assert not singles


def some_of_nan(count):
    """Batches, every third of which is not finite."""
    return [np.full_like(DATA, np.nan) if at % 3 == 1 else DATA + at for at in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decaying", "mixed", "optax"])
def test_a_stable_run_skips_what_is_not_finite(name, singles):
    looped, run = pairs(OPTIMIZERS[name])
    looped._skip_nonfinite = True
    losses = [looped.step(batch) for batch in some_of_nan(40)]
    found = run.run(40, iter(some_of_nan(40)), progress_bar=False, stable_update=True)
    np.testing.assert_array_equal(found, np.float32(losses))
    assert np.isnan(found).sum() == 13
    assert_same(looped, run)
    assert not singles
    assert run.step(DATA) == looped.step(DATA)


# Batches.


class Loader:
    """Batches of some sizes, from the beginning each time."""

    def __init__(self, sizes):
        self.ends = np.cumsum(sizes)
        self.sizes = sizes

    def __iter__(self):
        for size, end in zip(self.sizes, self.ends, strict=True):
            yield DATA[end - size : end]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rule", "own"])
def test_batches_come_from_an_iterable_epoch_after_epoch(name):
    looped, run = pairs(OPTIMIZERS[name])
    loader = Loader([5, 5, 2])
    batches = [batch for _ in range(3) for batch in loader][:7]
    losses = [looped.step(batch, scale=2.0) for batch in batches]
    np.testing.assert_array_equal(run.run(7, loader, scale=2.0, progress_bar=False), np.float32(losses))
    assert_same(looped, run)


@pytest.mark.slow
def test_batches_come_by_keyword_and_many_in_one_call():
    looped, run = pairs(OPTIMIZERS["rule"])
    losses = [looped.step(scale=2.0, data=batch) for batch in [*Loader([4, 4, 4])] * 30]
    found = run.run(90, scale=2.0, data=Loader([4, 4, 4]), progress_bar=False)
    np.testing.assert_array_equal(found, np.float32(losses))
    assert_same(looped, run)


def test_batches_that_end_too_early():
    looped, run = pairs(OPTIMIZERS["rule"])
    losses = [looped.step(DATA + at) for at in range(7)]
    with pytest.raises(ValueError, match=r"ended after 7, before the last step; .* such as a DataLoader"):
        run.run(8, (DATA + at for at in range(7)), progress_bar=False)
    np.testing.assert_array_equal(run.losses, np.float32(losses))
    assert_same(looped, run)
    with pytest.raises(ValueError, match="ended after 0"):
        run.run(1, iter([]))
    with pytest.raises(TypeError, match=r"argument 0 is an iterable .* no another one"):
        run.run(1, iter([DATA]), scale=iter([1.0]))
    with pytest.raises(TypeError, match=r"argument 0 is an iterable .* no batch_size=3"):
        run.run(1, iter([DATA]), batch_size=3)
    assert_same(looped, run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rule", "own"])
def test_batches_are_drawn_without_seeing_a_datum_twice(name):
    looped, run = pairs(OPTIMIZERS[name])
    key = jax.random.fold_in(KEY, 2)
    batches = [np.asarray(batch_at(at, key, jnp.asarray(DATA), 5)) for at in range(21)]
    losses = [looped.step(batch) for batch in batches]
    found = [run.run(count, DATA, batch_size=5, progress_bar=False) for count in (1, 13, 7)]
    np.testing.assert_array_equal(np.concatenate(found), np.float32(losses))
    assert_same(looped, run)
    assert len(np.unique(np.concatenate(batches[4:6]), axis=0)) == 10  # the third epoch


@pytest.mark.slow
def test_data_of_several_arrays_are_drawn_by_keyword():
    def paired(weight, data):
        x, y = data["x"], data["y"]
        slope = numpyro.param("slope", 0.0)
        with numpyro.plate("n", 12, subsample_size=len(x)):
            numpyro.sample("y", dist.Normal(slope * x * weight, 0.1), obs=y)

    data = {"x": DATA[:, 0], "y": 3 * DATA[:, 0]}
    svi = SVI(paired, lambda weight, data: None, rules.Adam(lr=0.1), Trace_ELBO(), key=KEY)
    svi.run(300, 0.5, data=data, batch_size=4, progress_bar=False)
    np.testing.assert_allclose(svi.get_params()["slope"], 6.0, rtol=1e-3)  # y of each batch is that of its x


@pytest.mark.parametrize(
    ("args", "size", "problem"),
    [
        ((), 3, "there are no data"),
        ((DATA,), 13, "Invalid batch_size: 13"),
        ((DATA,), 0, "Invalid batch_size: 0"),
        (((DATA, DATA[:3]),), 3, "must have one length"),
    ],
    ids=["no data", "too large", "zero", "two lengths"],
)
def test_a_batch_that_the_data_do_not_have(args, size, problem):
    svi, _ = pairs(OPTIMIZERS["rule"])
    with pytest.raises((TypeError, ValueError), match=problem):
        svi.run(2, *args, batch_size=size)
    assert not svi.params


# What happens in between.


@pytest.mark.slow
def test_ctrl_c_finds_everything_as_the_last_step_has_left_it():
    def until(count):
        for at in range(count):
            yield DATA + at
        raise KeyboardInterrupt

    looped, run = pairs(OPTIMIZERS["decaying"])
    losses = [looped.step(DATA + at) for at in range(37)]
    with pytest.raises(KeyboardInterrupt):
        run.run(100, until(37), progress_bar=False)
    np.testing.assert_array_equal(run.losses, np.float32(losses))
    assert_same(looped, run)
    assert run.num_steps == looped.num_steps == 37
    assert run.step(DATA) == looped.step(DATA)


def test_the_bar_shows_the_loss(capsys):
    svi, _ = pairs(OPTIMIZERS["rule"])
    losses = svi.run(45, DATA)
    shown = capsys.readouterr().err
    assert "45/45" in shown
    assert "loss" in shown
    np.testing.assert_array_equal(svi.losses, losses)


@pytest.mark.slow
def test_parameters_that_come_late_and_frozen_ones(singles):
    def wider(data, scale=1.0):
        guide(data)
        if scale == "late":
            numpyro.param("extra", 3.0)

    def with_extra(data, scale=1.0):
        model(data)
        if scale == "late":
            numpyro.factor("f", -(numpyro.param("extra", 3.0) ** 2))

    looped, run = pairs(OPTIMIZERS["by name"], with_extra, wider)
    for svi, many in ((looped, False), (run, True)):
        for scale, count in ((1.0, 5), ("late", 6), (1.0, 4), ("late", 3)):
            if many:
                svi.run(count, DATA, scale=scale, progress_bar=False)
            else:
                for _ in range(count):
                    svi.step(DATA, scale=scale)
            svi.params["width"].requires_grad = scale != "late"
    assert_same(looped, run)
    assert not singles


@pytest.mark.slow
def test_a_parameter_that_comes_late_has_a_count_of_its_own(singles):
    """Under a rule as in Pyro, also when it is not reached later on."""

    def wider(data, scale=1.0):
        guide(data)
        if scale == "late":
            numpyro.param("extra", jnp.full(2, 3.0))

    def with_extra(data, scale=1.0):
        model(data)
        if scale == "late":
            numpyro.factor("f", -(numpyro.param("extra", jnp.full(2, 3.0)) ** 2).sum())

    reference, *others = [
        SVI(with_extra, wider, optimizer, Trace_ELBO(), key=KEY)
        for optimizer in (named.Adam({"lr": 0.05}), rules.Adam(lr=0.05), optax.chain(jaxoptim.adam(lr=0.05)))
    ]

    def check(scale, count, others):
        losses = reference.run(count, DATA, scale=scale, progress_bar=False)
        for svi in others:
            np.testing.assert_allclose(svi.run(count, DATA, scale=scale, progress_bar=False), losses, rtol=1e-5)
            for name, param in reference.params.items():
                np.testing.assert_allclose(svi.params[name].value, param.value, rtol=1e-5)

    for scale, count in ((1.0, 20), ("late", 1), ("late", 5)):
        check(scale, count, others)
    assert not singles
    for scale, count in ((1.0, 4), ("late", 3)):  # a transformation of optax takes a gradient of zero here
        check(scale, count, others[:1])


@pytest.mark.slow
def test_two_fits_that_share_parameters_take_turns():
    def shared(run):
        optimizer = named.Adam({"lr": 0.05})
        first = SVI(model, guide, optimizer, Trace_ELBO(), key=KEY)
        second = SVI(model, delta, optimizer, Trace_ELBO(), key=jax.random.key(1), params=first.params)
        for _ in range(2):
            for svi in (first, second):
                if run:
                    svi.run(5, DATA, progress_bar=False)
                else:
                    for _ in range(5):
                        svi.step(DATA)
        return first

    assert_same(shared(run=True), shared(run=False))


@pytest.mark.slow
def test_an_automatic_guide_and_values_to_begin_with():
    begun = []
    for run in (True, False):
        svi = SVI(model, AutoNormal(model), rules.Adam(lr=0.05), Trace_ELBO(), key=KEY)
        svi.params["mean_auto_loc"] = Parameter(jnp.array([4.0, 5.0]), "mean_auto_loc")
        losses = svi.run(6, DATA, progress_bar=False) if run else [svi.step(DATA) for _ in range(6)]
        begun.append(np.float32(losses))
    np.testing.assert_array_equal(*begun)


def test_a_run_that_fails_has_done_nothing():
    def failing(data):
        guide(data)
        if len(data) == 3:
            raise RuntimeError("three")

    looped, run = pairs(OPTIMIZERS["decaying"], guide=failing)
    with pytest.raises(RuntimeError, match="three"):
        run.run(5, DATA[:3], progress_bar=False)
    losses = [looped.step(DATA) for _ in range(4)]
    np.testing.assert_array_equal(run.run(4, DATA, progress_bar=False), np.float32(losses))
    with pytest.raises(RuntimeError, match="three"):
        run.run(5, DATA[:3], progress_bar=False)
    assert_same(looped, run)
    assert run.step(DATA) == looped.step(DATA)
