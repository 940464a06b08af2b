"""Data that do not fit: batches that come one after another, and batches that a function of a key makes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxoptim import rules, sampling
from jaxoptim.core import arriving
from jaxoptim.core.batches import batch_at, shuffled
from jaxoptim.sampling import chains
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.streams import ArrivingStream

KEY = jax.random.key(3)
N = 10
DATA = {"x": jax.random.normal(jax.random.key(0), (N, 2)), "y": jnp.linspace(-1.0, 1.0, N)}
START = {"w": jnp.array([0.5, -0.5]), "b": jnp.ones(())}
SGLD = rules.SGLD(lr=0.02, nbeta=5.0, localization=1.0)
FEW = {"key": KEY, "num_chains": 2, "num_draws": 40, "num_burnin_steps": 3}
few_draws = pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")


def fit(params, batch):
    return jnp.mean(jnp.cosh(batch["x"] @ params["w"] + params["b"] - batch["y"]))


def level(w, batch):
    """A loss that tells the batch, where chains do not move."""
    return jnp.mean(batch) * jnp.sum(w)


class Epochs:
    """An iterable that begins anew each time, and counts what is taken from it."""

    def __init__(self, batches):
        self.batches, self.taken = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.taken += 1
            yield batch


def drawn(same, steps=43, num_chains=2, size=4):
    """The batches of a run of arrays, in the order in which a stream has to give them."""
    shared = RunOptions(KEY, same_batches=same).batch_key
    keys = [jax.random.fold_in(KEY, chain) for chain in range(num_chains)] if shared is None else [shared]
    take = jax.jit(batch_at, static_argnames="batch_size")
    return [take(t, key, DATA, batch_size=size) for t in range(steps) for key in keys]


def agree(found, expected):
    chex.assert_trees_all_close(
        (found.loss, found.observables, found.params),
        (expected.loss, expected.observables, expected.params),
        rtol=2e-6,
        atol=1e-6,
    )


@pytest.mark.slow
@pytest.mark.parametrize("same", [False, True], ids=["own", "same"])
@pytest.mark.parametrize("method", ["vmap", "map"])
def test_batches_in_the_order_of_arrays_give_the_run_of_arrays(method, same):
    options = FEW | {"chain_method": method, "same_batches": same, "observables": {"w": lambda params: params["w"]}}
    found = sampling.sample(fit, START, SGLD, iter(drawn(same)), **options)
    agree(found, sampling.sample(fit, START, SGLD, DATA, batch_size=4, **options))


@few_draws
def test_chains_of_all_settings_have_the_same_batches():
    batches = jnp.arange(24.0).reshape(12, 2)  # of which each has a mean of its own
    options = {"key": KEY, "num_chains": 3, "num_draws": 4, "chain_method": "map"}
    sweep = sampling.calibrate(
        level, jnp.ones(1), rules.SGLD(), Epochs(batches), lr=[0.0], localization=[1.0, 2.0], nbeta=1.0,
        init_loss=0.0, **options,
    )  # fmt: skip
    expected = np.asarray(batches.mean(1)).reshape(4, 3).T
    np.testing.assert_allclose(sweep.trace[0], [expected, expected], rtol=1e-6)


def whole(key):
    return jax.tree.map(lambda x: x[shuffled(jnp.arange(N, dtype=jnp.uint32), N, key)], DATA)


@pytest.mark.slow
@pytest.mark.parametrize("same", [False, True], ids=["own", "same"])
def test_a_function_of_keys_gives_the_run_of_arrays(same):
    """Where a batch is an epoch of arrays, the key of a step is that of the epoch."""
    options = FEW | {"same_batches": same}
    found = sampling.sample(fit, START, SGLD, whole, **options)
    agree(found, sampling.sample(fit, START, SGLD, DATA, batch_size=N, **options))


def as_torch(x):
    return torch.from_numpy(np.array(x))


def loader(**options):
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(as_torch(DATA["x"]), as_torch(DATA["y"])), batch_size=5, **options
    )


@pytest.mark.slow
def test_iterables_of_all_kinds_are_alike():
    def loss(params, batch):
        return fit(params, dict(zip("xy", batch, strict=True)))

    halves = [(DATA["x"][:5], DATA["y"][:5]), (DATA["x"][5:], DATA["y"][5:])]
    options = FEW | {"num_draws": 4, "same_batches": True}
    kinds = {
        "loader": loader(),
        "iterable": Epochs(halves),
        "iterator": iter(halves * 4),
        "generator": (jax.tree.map(np.asarray, half) for half in halves * 4),
        "lists": Epochs([list(half) for half in halves]),
    }
    runs = {name: sampling.sample(loss, START, SGLD, data, **options) for name, data in kinds.items()}
    for found in runs.values():
        chex.assert_trees_all_equal((found.loss, found.params), (runs["loader"].loss, runs["loader"].params))


@pytest.mark.slow
def test_micro_batches_are_parts_of_batches_that_come():
    options = FEW | {"num_draws": 4, "same_batches": True}
    found, expected = (
        sampling.sample(fit, START, SGLD, iter(drawn(True)), microbatches=count, **options) for count in (2, 1)
    )
    agree(found, expected)


# Memory.


def test_a_piece_has_as_many_steps_as_fit(monkeypatch):
    def shapes(size):
        stream = ArrivingStream(Epochs([np.ones((size, 2), np.float32)]), 3, 1)
        ahead = stream.ahead(1000)
        return ahead, stream.given(7, 7 + min(ahead, 2)).batches.shape

    assert shapes(4) == (32, (32, 3, 4, 2))
    monkeypatch.setattr(arriving, "_BYTES_AT_ONCE", 1000)
    assert shapes(10) == (4, (4, 3, 10, 2))
    assert shapes(1000) == (1, (1, 3, 1000, 2))


def test_batches_that_come_are_taken_when_they_are_needed():
    data = Epochs([DATA] * 1000)
    sampling.sample(fit, START, SGLD, data, key=KEY, num_chains=2, num_draws=5)
    assert data.taken == 10


def test_other_batches_compile_nothing_new():
    def go(batches, **changes):
        sampling.sample(fit, START, SGLD, iter(batches), **FEW | {"same_batches": True} | changes)

    go(drawn(True))
    before = chains.run_steps._cache_size(), chains.init_chains._cache_size()
    go([jax.tree.map(lambda x: x + 1, batch) for batch in drawn(True)], key=jax.random.key(9))
    go(drawn(True), num_draws=30)
    assert (chains.run_steps._cache_size(), chains.init_chains._cache_size()) == before


# Runs on disk.

STREAMS = {
    "function": lambda: whole,
    "iterable": lambda: Epochs(drawn(False)[:7]),
    "iterator": lambda: iter(drawn(False)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STREAMS)
def test_a_run_continues_to_the_last_bit(kind, tmp_path):
    run = functools.partial(sampling.sample, fit, START, SGLD)
    expected = run(STREAMS[kind](), **FEW)
    run(STREAMS[kind](), checkpoint=tmp_path / "run", **FEW | {"num_draws": 17})
    found = run(STREAMS[kind](), checkpoint=tmp_path / "run", **FEW)
    chex.assert_trees_all_equal((found.loss, found.params), (expected.loss, expected.params))
    others = {"another function": lambda key: DATA, "another order": Epochs(drawn(False)[1:]), "arrays": DATA}
    for other in others.values():
        with pytest.raises(ValueError, match="is of another run: its data is not what was given"):
            run(other, checkpoint=tmp_path / "run", **FEW)


# Estimates.


@pytest.mark.slow
@few_draws
def test_the_first_batches_stand_for_all_data():
    batches = [jnp.full(2, float(number)) for number in range(40)]
    options = {"key": KEY, "nbeta": 1.0, "num_chains": 2, "num_draws": 4}
    of = functools.partial(sampling.estimate_llc, level, jnp.ones(1), rules.SGLD(lr=0.0))
    assert of(Epochs(batches), **options).init_loss == pytest.approx(np.arange(32).mean())
    short = of(Epochs(batches[:5]), **options)  # one epoch
    assert short.init_loss == pytest.approx(2.0)
    np.testing.assert_array_equal(short.loss, np.arange(8).reshape(4, 2).T % 5)  # from the first batch on

    def normal(key):
        return jax.random.normal(key, (100,))

    made = of(normal, **options)
    assert 0 < abs(made.init_loss) < 4 / np.sqrt(3200)
    assert len(np.unique(made.loss)) == 8  # each chain has its own batches


@pytest.mark.slow
@few_draws
def test_an_estimate_of_batches_is_that_of_arrays():
    options = FEW | {"microbatches": 2, "nbeta": 5.0}
    found = sampling.estimate_llc(fit, START, SGLD, Epochs([DATA] * 3), **options)
    expected = sampling.estimate_llc(fit, START, SGLD, DATA, **options)
    np.testing.assert_allclose(found.trace, expected.trace, rtol=1e-4, atol=1e-5)
    assert found.init_loss == pytest.approx(expected.init_loss, rel=1e-6)


@pytest.mark.parametrize("data", [lambda: iter([DATA]), lambda: whole], ids=["iterable", "function"])
def test_data_that_cannot_be_counted_need_a_temperature(data):
    sampler, grid = rules.SGLD(lr=0.01), {"lr": [0.01], "localization": [1.0]}
    for run in (sampling.estimate_llc, functools.partial(sampling.calibrate, **grid)):
        with pytest.raises(
            ValueError, match=r"cannot count the data of an? .*: give nbeta, such as default_nbeta\(n\)"
        ):
            run(fit, START, sampler, data(), key=KEY)


# What is wrong with a later batch.

LATER = {
    "ended": (lambda: iter([DATA] * 5), "ended after 5, before the last step, and each step takes 2. Give an iterable"),
    "exhausted": (lambda: Again(iter([DATA] * 5)), "ended after 5, before the last step"),
    "smaller": (
        lambda: iter([DATA] * 4 + [jax.tree.map(lambda x: x[:3], DATA)]),
        r"Batch number 5 of data has shape \(3, 2\) .*but the first one \(10, 2\) .*drop_last=True",
    ),
    "other dtype": (lambda: iter([DATA, DATA | {"y": np.arange(N)}]), "number 2 of data has shape .* and dtype int32"),
    "other tree": (lambda: iter([DATA, {"x": DATA["x"]}]), "Batch number 2 of data is another tree than the first one"),
}


class Again:
    """An iterable that does not begin anew, though its iterator is another object."""

    def __init__(self, iterator):
        self.iterator = iterator

    def __iter__(self):
        return self.iterator


@pytest.mark.parametrize(("data", "match"), LATER.values(), ids=LATER)
def test_later_batches_are_refused(data, match):
    with pytest.raises(ValueError, match=match) as caught:
        sampling.sample(fit, START, SGLD, data(), **FEW)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300
