"""The mechanics of sampling: which steps are draws, batches, observables, checkpoints, programs, and errors."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from matplotlib import pyplot as plt

import jaxoptim
from jaxoptim import rules, sampling
from jaxoptim.core.batches import batch_at, shuffled
from jaxoptim.sampling import chains, run
from jaxoptim.sampling.chain import ChainSpec, Thinning
from jaxoptim.sampling.target import Given, Target

KEY = jax.random.key(3)
N = 10
DATA = {"x": jax.random.normal(jax.random.key(0), (N, 2)), "y": jnp.linspace(-1.0, 1.0, N)}
START = {"w": jnp.array([0.5, -0.5]), "b": jnp.ones(())}
SGLD = rules.SGLD(lr=0.02, nbeta=5.0, localization=1.0)
FEW = {"key": KEY, "num_chains": 2, "num_draws": 5}


few_draws = pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")


def loss(params):
    return jnp.sum(jnp.cosh(params["w"])) + params["b"] ** 2


def fit(params, batch):
    return jnp.mean(jnp.cosh(batch["x"] @ params["w"] + params["b"] - batch["y"]))


def at_most(params):
    """A loss that ends where a chain has gone too far."""
    return jnp.where(jnp.sum(params["w"] ** 2) < 1.5, loss(params), jnp.nan)


trees_close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=1e-6)


def same(a, b):
    """Whether two runs are the same to the last bit."""
    chex.assert_trees_all_equal(
        (a.loss, a.observables, a.params, a.diverged), (b.loss, b.observables, b.params, b.diverged)
    )


# Which steps are draws.


def by_hand(loss_fn, params, sampler, data, batch_size, steps, key):
    """The losses, parameters and states before every step of chain 0 of ``sample``, and those at the end."""
    chain_key = jax.random.fold_in(key, 0)
    rule = sampler.replace(key=jax.random.fold_in(chain_key, 2**32 - 1))
    state, losses, path, batch = jaxoptim.init(rule, params), [], [], data
    step, grads_of = jax.jit(jaxoptim.step), jax.jit(jax.value_and_grad(loss_fn))
    for t in range(steps):
        if batch_size is not None:
            epoch, place = divmod(t, N // batch_size)
            order = shuffled(jnp.arange(N, dtype=jnp.uint32), N, jax.random.fold_in(chain_key, epoch))
            batch = jax.tree.map(lambda x, o=order, p=place: x[o[p * batch_size : (p + 1) * batch_size]], data)
        value, grads = grads_of(params, *([] if data is None else [batch]))
        losses.append(value)
        path.append((params, state))
        params, state = step(rule, params, grads, state)
    return np.array(losses), path, params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "data", "batch_size"),
    [
        (SGLD.replace(grad_norm=True), None, None),
        (SGLD, DATA, None),
        pytest.param(rules.SGNHT(lr=0.01, nbeta=5.0), DATA, 4),
        (rules.SGHMC(lr=0.01), DATA, 3),
        (rules.PSGLD(lr=0.01), DATA, 10),
    ],
    ids=["SGLD", "SGLD with data", "SGNHT with batches", "SGHMC with batches", "PSGLD with one batch"],
)
def test_draws_are_those_of_a_loop(sampler, data, batch_size):
    burnin, every, draws = 3, 2, 4
    loss_fn = loss if data is None else fit
    options = {"num_chains": 2, "num_draws": draws, "num_burnin_steps": burnin, "num_steps_bw_draws": every}
    observables = {"w": lambda params: params["w"]}
    found = sampling.sample(
        loss_fn, START, sampler, data, key=KEY, batch_size=batch_size, observables=observables, **options
    )
    losses, path, end = by_hand(loss_fn, START, sampler, data, batch_size, burnin + draws * every, KEY)
    at = [burnin + (j + 1) * every - 1 for j in range(draws)]
    assert found.loss.shape == (2, draws)
    np.testing.assert_allclose(found.loss[0], losses[at], rtol=2e-6)
    trees_close(found.observables["w"][0], np.stack([path[t][0]["w"] for t in at]))
    trees_close(jax.tree.map(lambda x: x[0], found.params), end)
    after = [state.shared for _, state in path[1:]] + [None]
    for name in {"thermostat", "grad_norm"} & found.observables.keys():
        expected = [after[t][name] for t in at[:-1]]
        trees_close(found.observables[name][0, :-1], np.array(expected))
    assert (found.diverged == -1).all()


@pytest.mark.slow
def test_a_chain_depends_on_its_number_alone():
    many, one = (sampling.sample(loss, START, SGLD, key=KEY, num_chains=n, num_draws=5) for n in (3, 1))
    trees_close(many.loss[:1], one.loss)
    assert len(np.unique(many.loss[:, -1])) == 3
    assert one.loss.shape == (1, 5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vmap", "map"])
def test_methods_agree(method):
    expected = sampling.sample(loss, START, SGLD, **FEW)
    found = sampling.sample(loss, START, SGLD, chain_method=method, **FEW)
    trees_close((found.loss, found.params), (expected.loss, expected.params))


@pytest.mark.numbers
def test_a_repeated_run_is_the_same_to_the_last_bit():
    same(*(sampling.sample(loss, START, SGLD, **FEW) for _ in range(2)))


@pytest.mark.slow
def test_float64(x64):
    start = jax.tree.map(lambda x: x.astype(float), START)
    found = sampling.sample(loss, start, SGLD, **FEW)
    losses, _, end = by_hand(loss, start, SGLD, None, None, 5, KEY)
    assert found.loss.dtype == jnp.float64
    np.testing.assert_allclose(found.loss[0], losses, rtol=1e-14)
    np.testing.assert_allclose(found.params["w"][0], end["w"], rtol=1e-13)


@pytest.mark.slow
def test_parameters_that_are_none_stay_none():
    found = sampling.sample(lambda p: loss(p), START | {"frozen": None}, SGLD, **FEW)
    assert found.params["frozen"] is None
    # The noise of an array is that of its number in the tree, and None has one.
    assert np.isfinite(found.loss).all()


@pytest.mark.costly
@pytest.mark.parametrize("size", [3, 5, 10, 1])
def test_batches_take_each_datum_at_most_once_in_an_epoch(size):
    data, per_epoch = jnp.arange(N), N // size
    take = jax.jit(batch_at, static_argnames="batch_size")
    epochs = []
    for epoch in range(3):
        seen = []
        for place in range(per_epoch):
            batch = take(epoch * per_epoch + place, KEY, data, batch_size=size)
            assert batch.shape == (size,)
            seen += batch.tolist()
        assert len(set(seen)) == per_epoch * size
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.slow
@pytest.mark.parametrize("count", [10, 16, 33])
def test_every_order_is_as_likely(count):
    """Each datum at each place, and each pair at the first two places, as often as chance has it."""
    keys = jax.random.split(KEY, 20_000)
    orders = np.asarray(jax.jit(jax.vmap(lambda key: shuffled(jnp.arange(count, dtype=jnp.uint32), count, key)))(keys))
    assert np.array_equal(np.sort(orders[:100], 1), np.tile(np.arange(count), (100, 1)))
    at_places = np.stack([np.bincount(place, minlength=count) for place in orders.T])
    pairs = np.bincount(orders[:, 0] * count + orders[:, 1], minlength=count**2).reshape(count, count)
    pairs = pairs[~np.eye(count, dtype=bool)]
    for found in (at_places.ravel(), pairs):
        expected = found.mean()
        freedom = found.size - 1
        assert abs(((found - expected) ** 2 / expected).sum() - freedom) < 5 * np.sqrt(2 * freedom)


# Observables.


@dataclasses.dataclass(frozen=True)
class Last(sampling.Observable):
    """Counts steps and draws, and writes down a tree."""

    start: float = 0.0

    def init(self, params):
        return {"steps": jnp.zeros(()) + self.start, "draws": jnp.zeros((), jnp.int32)}

    def update(self, memory, draw):
        memory = {"steps": memory["steps"] + 1, "draws": memory["draws"] + draw.is_recorded}
        return memory, {"loss": draw.loss, "pull": draw.grads["b"], "step": draw.state.step}

    def result(self, memory, trace):
        return memory | trace


@pytest.mark.slow
def test_observables():
    observed = {
        "w": lambda params: params["w"],
        "both": lambda params: {"sum": params["w"].sum(), "b": params["b"]},
        "covariance": sampling.Covariance(),
        "of b": sampling.Covariance(lambda params: params["b"]),
        "accepted": sampling.MalaAcceptance(),
        "last": Last(2.0),
    }
    sampler = SGLD.replace(weight_norm=True)
    options = FEW | {"num_burnin_steps": 2, "num_steps_bw_draws": 3, "num_draws": 6}
    found = sampling.sample(loss, START, sampler, observables=observed, **options)
    seen = found.observables
    assert seen.keys() == observed.keys() | {"weight_norm"}
    assert seen["weight_norm"].shape == (2, 6)
    np.testing.assert_allclose(seen["both"]["sum"], seen["w"].sum(-1), rtol=1e-6)
    for chain in range(2):
        flat = np.concatenate([seen["both"]["b"][chain][:, None], seen["w"][chain]], 1)
        np.testing.assert_allclose(seen["covariance"][chain], np.cov(flat.T), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(seen["of b"][chain], [[np.var(flat[:, 0], ddof=1)]], rtol=1e-4)
    last = seen["last"]
    np.testing.assert_array_equal(last["loss"], found.loss)
    np.testing.assert_array_equal(last["steps"], [22, 22])  # 2 of the start and 20 steps
    np.testing.assert_array_equal(last["draws"], [6, 6])
    np.testing.assert_array_equal(last["step"][0], [4, 7, 10, 13, 16, 19])
    np.testing.assert_allclose(last["pull"], 2 * seen["both"]["b"], rtol=1e-6)
    same_loss = sampling.sample(loss, START, sampler, **options)
    trees_close(same_loss.loss, found.loss)


@pytest.mark.slow
def test_acceptance_is_that_of_each_step():
    sampler = rules.SGLD(lr=0.3, nbeta=3.0, localization=1.0, weight_decay=0.5, optimize_over={"w": None, "b": 0.0})
    found = sampling.sample(loss, START, sampler, observables={"accepted": sampling.MalaAcceptance()}, **FEW)
    _, path, _ = by_hand(loss, START, sampler, None, None, 5, KEY)

    def potential(w):
        params = {"w": w, "b": START["b"]}
        return 3 * loss(params) + 0.5 / 2 * jnp.sum(w**2) + jnp.sum((w - START["w"]) ** 2) / 2

    gradient = jax.grad(potential)
    accepted = found.observables["accepted"][0]
    assert np.isnan(accepted[0])
    for t in range(1, 5):
        x, y = path[t - 1][0]["w"], path[t][0]["w"]

        def log_density(to, of):
            return -jnp.sum((to - of + 0.3 / 2 * gradient(of)) ** 2) / (2 * 0.3)

        expected = min(1.0, float(jnp.exp(potential(x) - potential(y) + log_density(x, y) - log_density(y, x))))
        assert float(accepted[t]) == pytest.approx(expected, rel=1e-4)


def test_acceptance_is_of_sgld():
    with pytest.raises(TypeError, match="MalaAcceptance is of the rule SGLD"):
        sampling.sample(loss, START, optax.sgd(0.1), observables={"a": sampling.MalaAcceptance()}, **FEW)


# Transformations as samplers.


@pytest.mark.slow
def test_a_transformation_is_a_sampler():
    tx = jaxoptim.sgld(lr=0.02, nbeta=5.0, localization=1.0, key=jax.random.key(99))
    found, expected = (sampling.sample(loss, START, sampler, **FEW) for sampler in (tx, SGLD))
    trees_close((found.loss, found.params), (expected.loss, expected.params))
    descent = sampling.sample(loss, START, optax.sgd(0.1), **FEW)
    assert (np.diff(descent.loss) < 0).all()
    chex.assert_trees_all_equal(descent.loss[0], descent.loss[1])


# Progress, and runs on disk.


def test_progress_shows_a_bar_and_changes_nothing(capsys):
    found, quiet = (sampling.sample(loss, START, SGLD, progress=shown, **FEW) for shown in (True, False))
    same(found, quiet)
    shown = capsys.readouterr().err
    assert "sampling" in shown
    assert "5/5" in shown


class Interrupted(Exception):
    """What ends a run in the middle."""


@pytest.mark.slow
@pytest.mark.numbers
def test_an_interrupted_run_continues_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_SECONDS_BETWEEN_SAVES", -1.0)
    monkeypatch.setattr(run, "_SECONDS_OF_A_PIECE", 0.0)
    sampler = rules.SGNHT(lr=0.01, nbeta=5.0)
    observables = {"w": lambda p: p["w"], "covariance": sampling.Covariance()}
    options = FEW | {"num_draws": 40, "num_burnin_steps": 7, "batch_size": 4, "observables": observables}
    whole = sampling.sample(fit, START, sampler, DATA, **options)
    path = tmp_path / "run"
    real_bar, stops = run.bar, iter([13, 31])

    def failing(total, start, shown):
        last = next(stops, None)

        class Bar:
            def __enter__(self):
                self.inner = real_bar(total, start, shown)
                show = self.inner.__enter__()

                def count(step):
                    show(step)
                    if last is not None and step >= last:
                        raise Interrupted

                return count

            def __exit__(self, *error):
                self.inner.__exit__(None, None, None)

        return Bar()

    monkeypatch.setattr(run, "bar", failing)
    for _ in range(2):
        with pytest.raises(Interrupted):
            sampling.sample(fit, START, sampler, DATA, checkpoint=path, **options)
    resumed = sampling.sample(fit, START, sampler, DATA, checkpoint=path, **options)
    same(resumed, whole)
    same(sampling.sample(fit, START, sampler, DATA, checkpoint=path, **options), whole)  # nothing is left to do


@pytest.mark.slow
def test_a_run_continues_with_more_draws(tmp_path):
    path, options = tmp_path / "run", FEW | {"observables": {"covariance": sampling.Covariance()}}
    whole = sampling.sample(loss, START, SGLD, **options | {"num_draws": 8})
    first = sampling.sample(loss, START, SGLD, checkpoint=path, **options)
    chex.assert_trees_all_equal(first.loss, whole.loss[:, :5])
    same(sampling.sample(loss, START, SGLD, checkpoint=path, **options | {"num_draws": 8}), whole)
    with pytest.raises(ValueError, match=r"is of 8 draws, but num_draws is 5\. A run may continue with more"):
        sampling.sample(loss, START, SGLD, checkpoint=path, **options)


OTHER_RUNS = {
    "key": {"key": jax.random.key(4)},
    "data": {"data": DATA | {"y": DATA["y"].at[3].add(1e-3)}},
    "params": {"params": START | {"b": jnp.zeros(())}},
    "numbers of the sampler": {"sampler": SGLD.replace(lr=0.03)},
    "num_burnin_steps": {"num_burnin_steps": 1},
    "num_steps_bw_draws": {"num_steps_bw_draws": 2},
}
MORE_OTHER_RUNS = {
    "loss function": {"loss_fn": lambda params, batch: 2 * fit(params, batch)},
    "kind of sampler": {"sampler": SGLD.replace(localization=0)},
    "num_chains": {"num_chains": 3},
    "batch_size": {"batch_size": 5},
    "observables": {"observables": {"w": lambda params: params["w"]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [OTHER_RUNS, MORE_OTHER_RUNS], ids=["", "more"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changes):
    path = tmp_path / "run"
    base = {"loss_fn": fit, "params": START, "sampler": SGLD, "data": DATA, "batch_size": 4, "checkpoint": path} | FEW
    sampling.sample(**base)
    for name, change in changes.items():
        with pytest.raises(ValueError, match=f"is of another run: its {name} is not what was given"):
            sampling.sample(**base | change)
    jaxoptim.checkpoint.save(path, {"other": jnp.ones(3)})
    with pytest.raises(ValueError, match="is not of a run of sample"):
        sampling.sample(**base)


# Divergence.


@pytest.mark.slow
@few_draws
def test_divergence_is_reported_and_left_out():
    sampler = rules.SGLD(lr=0.05, nbeta=1.0)
    options = {"key": KEY, "num_chains": 8, "num_draws": 6}
    found = sampling.sample(at_most, START, sampler, **options)
    bad = ~np.isfinite(found.loss)
    first = [row.argmax() if row.any() else -1 for row in bad]
    assert found.diverged.tolist() == first
    assert 0 < sum(x >= 0 for x in first) < 8
    chain = next(i for i, x in enumerate(first) if x >= 0)
    with pytest.warns(sampling.LLCWarning, match=rf"chains diverged: chain {chain} at draw {first[chain]}\b.*left out"):
        llc = sampling.estimate_llc(at_most, START, sampler, nbeta=1.0, **options)
    good = np.asarray(found.loss, np.float64)[np.array(first) < 0]
    init_loss = float(loss(START))
    assert llc.mean == pytest.approx((good - init_loss).mean(), rel=1e-5)
    assert llc.std == pytest.approx((good - init_loss).mean(1).std(ddof=1), rel=1e-4)
    assert np.isfinite([llc.mean, llc.std, llc.mcse, llc.rhat, llc.effective_sample_size]).all()
    assert np.isnan(llc.per_chain).tolist() == [x >= 0 for x in first]


@pytest.mark.slow
def test_all_chains_diverged():
    with pytest.raises(FloatingPointError, match=r"2 of 2 chains diverged: chain 0 at draw .*smaller lr"):
        sampling.estimate_llc(at_most, START, rules.SGLD(lr=10.0), nbeta=5.0, **FEW)
    found = sampling.sample(at_most, START, rules.SGLD(lr=10.0), **FEW)
    assert (found.diverged >= 0).all()


# The estimate.


@pytest.mark.slow
@few_draws
def test_the_estimate_is_that_of_its_draws():
    llc = sampling.estimate_llc(fit, START, SGLD.replace(nbeta=1.0), DATA, batch_size=4, **FEW)
    draws = sampling.sample(fit, START, SGLD.replace(nbeta=llc.nbeta), DATA, batch_size=4, **FEW)
    np.testing.assert_array_equal(llc.loss, np.asarray(draws.loss, np.float64))
    assert llc.nbeta == pytest.approx(N / np.log(N))
    assert llc.init_loss == pytest.approx(float(fit(START, DATA)), rel=1e-6)
    np.testing.assert_allclose(llc.trace, llc.nbeta * (llc.loss - llc.init_loss))
    np.testing.assert_allclose(llc.per_chain, llc.trace.mean(1))
    assert llc.mean == pytest.approx(llc.trace.mean())
    assert llc.std == pytest.approx(llc.trace.mean(1).std(ddof=1))
    assert sampling.estimate_llc(fit, START, SGLD, DATA, batch_size=4, **FEW).nbeta == SGLD.nbeta
    given = sampling.estimate_llc(fit, START, SGLD, DATA, batch_size=4, init_loss=2.0, nbeta=llc.nbeta, **FEW)
    np.testing.assert_allclose(given.trace, llc.nbeta * (llc.loss - 2.0))


@pytest.mark.slow
@few_draws
def test_one_chain_has_no_deviation():
    llc = sampling.estimate_llc(loss, START, SGLD, nbeta=5.0, key=KEY, num_chains=1, num_draws=5)
    assert np.isnan(llc.std)
    assert llc.mean == pytest.approx(llc.trace.mean())


@few_draws
@pytest.mark.slow
def test_selections_are_named():
    llc, by_name = (
        sampling.estimate_llc(loss, START, SGLD, nbeta=5.0, selections=chosen, **FEW)
        for chosen in ([{"w": True, "b": False}, np.ones(())], ["w", lambda name: True])
    )
    np.testing.assert_allclose(by_name.loss, llc.loss, rtol=1e-5)


@pytest.mark.slow
@few_draws
def test_selections_move_their_parameters_only():
    masks = {"w": {"w": np.ones(2), "b": np.zeros(())}, "half": {"w": np.array([1, 0]), "b": None}}
    options = FEW | {"observables": {"at": lambda params: params}}
    llc = sampling.estimate_llc(loss, START, SGLD, nbeta=5.0, selections=masks, **options)
    assert llc.loss.shape == (2, 2, 5)
    assert llc.mean.shape == (2,)
    at = llc.observables["at"]
    assert (at["b"][0] == START["b"]).all()
    assert (at["w"][1, :, :, 1] == START["w"][1]).all()
    assert (at["w"][0, :, 1:] != START["w"]).all()
    alone = sampling.estimate_llc(loss, START, SGLD.replace(optimize_over=masks["half"]), nbeta=5.0, **FEW)
    np.testing.assert_allclose(llc[1].loss, alone.loss, rtol=1e-5)
    assert llc[1].mean == pytest.approx(alone.mean, rel=1e-4)
    with pytest.raises(TypeError, match="one selection"):
        llc[0][0]


@pytest.mark.slow
@few_draws
def test_a_sweep_is_each_of_its_settings():
    rates, strengths = [0.01, 0.03, 100.0], [0.0, 2.0]
    sweep = sampling.calibrate(loss, START, SGLD, lr=rates, localization=strengths, nbeta=1.0, **FEW)
    assert sweep.trace.shape == (3, 2, 2, 5)
    assert (sweep.diverged[2] == 1).all()
    assert np.isnan(sweep.mean[2]).all()
    sampler = rules.SGLD(lr=0.03, localization=2.0)
    llc = sampling.estimate_llc(loss, START, sampler, nbeta=1.0, **FEW)
    assert sweep.mean[1, 1] == pytest.approx(llc.mean, rel=1e-4)
    assert sweep.std[1, 1] == pytest.approx(llc.std, rel=1e-3)
    np.testing.assert_allclose(sweep.trace[1, 1], llc.trace, rtol=1e-4, atol=1e-5)


# Programs.


@few_draws
def test_other_numbers_compile_nothing_new():
    def go(**changes):
        options = {"sampler": SGLD, "nbeta": 5.0, "num_burnin_steps": 2, "num_steps_bw_draws": 1} | FEW | changes
        sampling.estimate_llc(fit, START, options.pop("sampler"), DATA, init_loss=0.0, batch_size=4, **options)

    go()
    before = chains.run_steps._cache_size(), chains.init_chains._cache_size(), chains.results._cache_size()
    go(key=jax.random.key(9))
    go(sampler=SGLD.replace(lr=0.01, localization=2, key=jax.random.key(1)))
    go(nbeta=7)
    go(num_burnin_steps=5, num_steps_bw_draws=3)
    go(num_burnin_steps=0)
    assert (chains.run_steps._cache_size(), chains.init_chains._cache_size(), chains.results._cache_size()) == before


@pytest.mark.slow
def test_no_data_are_written_into_the_program():
    data = {"x": jnp.ones((1000, 2)), "y": jnp.ones(1000)}
    spec = ChainSpec(Target(fit), None, 4, (), 5)
    stacked = run.stacked(SGLD, 1)
    args = (stacked, jnp.zeros(2, int), KEY, jnp.arange(2), START, Given(data))
    state = jax.eval_shape(chains.init_chains, spec, None, *args)
    lowered = chains.run_steps.lower(spec, "vmap", None, *args[:2], state, args[-1], Thinning(0, 1), 0, 5)
    for text in (lowered.as_text(), chains.init_chains.lower(spec, None, *args).as_text()):
        constants = [line for line in text.splitlines() if "stablehlo.constant" in line]
        assert not any("x1000" in line or "<1000" in line for line in constants if 'dense<"' in line)
        assert len(text) < 400_000


# The errors.

WRONG = {
    "raw key": ({"key": np.zeros(2, np.uint32)}, TypeError, "typed key"),
    "no chains": ({"num_chains": 0}, ValueError, r"Invalid num_chains: 0\. It is an int >= 1"),
    "no draws": ({"num_draws": 0}, ValueError, r"Invalid num_draws: 0\. It is an int >= 1"),
    "half a step": ({"num_burnin_steps": 0.5}, ValueError, r"Invalid num_burnin_steps: 0\.5\. It is an int >= 0"),
    "true": ({"num_steps_bw_draws": True}, ValueError, r"Invalid num_steps_bw_draws: True"),
    "method": (
        {"chain_method": "pmap"},
        ValueError,
        "Invalid chain_method: 'pmap'. It is one of 'auto', 'vmap', 'map'",
    ),
    "batch": ({"batch_size": 11}, ValueError, "Invalid batch_size: 11. It is an int from 1 to the number of data, 10"),
    "batch without data": ({"batch_size": 4, "data": None}, ValueError, "batch_size is 4, but there are no data"),
    "lengths": ({"data": DATA | {"y": jnp.ones(9)}}, ValueError, r"one length, but they have x: 10, y: 9"),
    "no data": ({"data": {}}, ValueError, "data has no arrays"),
    "class": ({"sampler": rules.SGLD}, TypeError, r"Give an instance: jaxoptim\.rules\.SGLD\(lr"),
    "no sampler": ({"sampler": 3}, TypeError, "sampler is a rule or a transformation, but got 3"),
    "vector": ({"loss_fn": lambda p, b: p["w"]}, TypeError, r"loss is a real scalar.*shape \(2,\)"),
    "complex": ({"loss_fn": lambda p, b: p["b"] + 0j}, TypeError, "loss is a real scalar.*complex64"),
    "no function": ({"loss_fn": 3}, TypeError, "loss_fn is a function of the parameters, but got int"),
    "no params": ({"params": {}, "loss_fn": lambda p, b: jnp.zeros(())}, ValueError, "params has no arrays"),
    "integers": ({"params": {"w": jnp.arange(2), "b": jnp.ones(())}}, TypeError, "parameter 'w'"),
    "observable": ({"observables": {"o": 3}}, TypeError, "observables: 'o' is int. Give a function"),
    "name": ({"observables": {"loss": len}}, ValueError, "the name 'loss' is taken"),
}


def calibrate(**options):
    return sampling.calibrate(lr=[0.01], localization=[1.0], **options)


@pytest.mark.parametrize(("changes", "error", "match"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("run", [sampling.sample, sampling.estimate_llc, calibrate], ids=lambda run: run.__name__)
def test_what_is_wrong_is_refused(run, changes, error, match):
    options = {"loss_fn": fit, "params": START, "sampler": SGLD, "data": DATA} | FEW | changes
    with pytest.raises(error, match=match):
        run(**options)


WRONG_ESTIMATES = {
    "no nbeta": ({"data": None, "loss_fn": loss, "sampler": rules.SGLD()}, ValueError, "no data to count: give nbeta"),
    "nbeta of zero": ({"nbeta": 0.0}, ValueError, r"Invalid nbeta: 0\.0\. It is a finite number > 0"),
    "rule without nbeta": ({"sampler": rules.SGD()}, TypeError, "SGD has no nbeta"),
    "no selections": ({"selections": []}, ValueError, "selections is empty"),
    "nothing selected": ({"selections": ["other"]}, ValueError, "'other' selects no parameter.*The paths are b, w"),
    "mask": ({"selections": [np.ones(3)]}, ValueError, "does not broadcast to 'b'"),
    "masks of a transformation": (
        {"sampler": optax.sgd(0.1), "selections": ["w"]},
        TypeError,
        "selections can be set in a rule only",
    ),
    "unknown": ({"batch": 3}, TypeError, "batch"),
    "batch": ({"batch_size": 4.0}, ValueError, r"Invalid batch_size: 4\.0"),
    "aux": ({"loss_fn": lambda p, b: (fit(p, b), {})}, TypeError, "loss is a real scalar.*returned a tuple of 2"),
}


@pytest.mark.parametrize(("changes", "error", "match"), WRONG_ESTIMATES.values(), ids=WRONG_ESTIMATES)
def test_estimate_llc_refuses(changes, error, match):
    options = {"loss_fn": fit, "params": START, "sampler": SGLD, "data": DATA} | FEW | changes
    with pytest.raises(error, match=match):
        sampling.estimate_llc(**options)


def test_calibrate_and_default_nbeta_refuse():
    with pytest.raises(ValueError, match=r"Invalid lr: \[-1\.0\]"):
        sampling.calibrate(loss, START, SGLD, lr=[-1.0], localization=[0.0], nbeta=1.0, key=KEY)
    with pytest.raises(ValueError, match=r"Invalid localization: \[\]"):
        sampling.calibrate(loss, START, SGLD, lr=[1.0], localization=[], nbeta=1.0, key=KEY)
    with pytest.raises(ValueError, match="no data to count"):
        sampling.calibrate(loss, START, rules.SGLD(), lr=[1.0], localization=[0.0], key=KEY)
    with pytest.raises(ValueError, match=r"n/log n is a temperature for n > 2\.72, but n is 2"):
        sampling.default_nbeta(2)


# Pictures.


@pytest.fixture
def axes():
    matplotlib.use("agg")
    yield plt.figure().add_subplot()
    plt.close("all")


def estimate(trace):
    return sampling.LLC(np.asarray(trace), 1.0, 2.0, np.array([-1] * len(trace)), {})


def test_plots_of_an_estimate(axes):
    llc = estimate([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    assert llc.plot(ax=axes) is axes
    lines = [line.get_ydata().tolist() for line in axes.get_lines()]
    assert lines == [[0.0, 2.0, 4.0], [4.0, 6.0, 8.0], [2.0, 3.0, 4.0]]
    assert type(llc.plot()).__name__ == "Axes"
    several = sampling.LLC(np.ones((2, 2, 3)), 1.0, 2.0, -np.ones((2, 2), int), {})
    with pytest.raises(ValueError, match=r"one selection: llc\[0\]\.plot"):
        several.plot()


def test_plots_of_a_sweep(axes):
    mean = np.array([[1.0, 2.0], [3.0, np.nan]])
    sweep = sampling.Calibration(np.array([0.1, 0.2]), np.array([0.0, 5.0]), mean, mean / 10, 0 * mean, mean)
    assert sweep.plot(ax=axes) is axes
    assert axes.get_xscale() == "log"
    drawn = [container.lines[0].get_ydata() for container in axes.containers]
    np.testing.assert_array_equal(drawn, mean.T)
    assert type(sweep.plot()).__name__ == "Axes"
