"""Local learning coefficients over checkpoints: those of each alone, in one program."""

import os
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llc_cases as cases
from jaxoptim import checkpoint, rules, sampling
from jaxoptim.sampling import chains

pytestmark = pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")

X = jax.random.normal(jax.random.key(0), (24, 3))
SGLD = rules.SGLD(lr=1e-3, localization=10.0, nbeta=20.0)
SHORT = {"key": jax.random.key(1), "num_chains": 4, "num_draws": 20, "num_burnin_steps": 5}


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - x[:, 0]) ** 2)


def params_of(seed):
    one, other = jax.random.split(jax.random.key(seed))
    return {"in": jax.random.normal(one, (3, 5)), "out": jax.random.normal(other, (5,))}


TRAINING = {100: params_of(1), 200: params_of(2), 400: params_of(3)}


def over(checkpoints=TRAINING, loss_fn=loss, sampler=SGLD, data=X, **changes):
    return sampling.llc_over_checkpoints(loss_fn, checkpoints, sampler, data, **SHORT | changes)


def alone(params, loss_fn=loss, sampler=SGLD, data=X, **changes):
    return sampling.estimate_llc(loss_fn, params, sampler, data, **SHORT | changes)


def assert_equal(found, expected, rtol):
    for name in ("loss", "init_loss", "nbeta", "diverged"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=rtol, err_msg=name)
    for x, y in zip(*map(jax.tree.leaves, (found.observables, expected.observables)), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


# The estimates


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"batch_size": 8}, {"same_batches": True, "batch_size": 8, "microbatches": 2}])
@pytest.mark.parametrize("method", ["vmap", "map"])
def test_each_estimate_is_that_of_its_checkpoint_alone(method, changes):
    changes = changes | {"chain_method": method, "start_noise": 0.01, "observables": {"w": lambda w: w}}
    found = over(**changes)
    assert found.names == tuple(found) == (100, 200, 400)
    for step, params in TRAINING.items():
        assert_equal(found[step], alone(params, **changes), rtol=1e-5)


@pytest.mark.slow
def test_one_at_a_time_is_equal_to_the_last_bit_and_needs_the_program_of_one():
    expected = [alone(params) for params in TRAINING.values()]
    before = chains.run_steps._cache_size()
    found = over(at_once=1)
    assert chains.run_steps._cache_size() == before
    for step, of in zip(TRAINING, expected, strict=True):
        assert_equal(found[step], of, rtol=0)


@pytest.mark.slow
def test_groups_of_any_size_are_the_same_also_the_last_one():
    whole = over()
    for size in (2, 3, 7):
        found = over(at_once=size)
        assert found.loss.shape == whole.loss.shape
        np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-5)


def test_a_stacked_tree_is_a_list_of_its_parts():
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *TRAINING.values())
    assert_equal(over(stacked, stacked=True, names=[100, 200, 400]), over(), rtol=0)
    assert over(stacked, stacked=True).names == (0, 1, 2)


@pytest.mark.slow
def test_all_checkpoints_are_one_program_and_others_need_no_other():
    def of_one(params, x):  # each a program of its own
        return loss(params, x)

    def of_all(params, x):
        return loss(params, x)

    def size():
        return chains.run_steps._cache_size(), chains.init_chains._cache_size()

    before = size()
    alone(params_of(1), of_one)
    between = size()
    over(loss_fn=of_all)
    after = size()
    assert np.subtract(after, between).tolist() == np.subtract(between, before).tolist()
    over([params_of(seed) for seed in (7, 8, 9)], of_all, SGLD.replace(lr=2e-3), X + 1, num_draws=30)
    over([params_of(seed) for seed in range(6)], of_all, at_once=3)
    over([params_of(seed) for seed in range(5)], of_all, at_once=3)  # the last group has two
    assert size() == after


@pytest.mark.slow
@pytest.mark.parametrize("given", [[0.1, 0.2, None], {100: 0.1, 400: None, 200: 0.2}], ids=["in order", "by name"])
@pytest.mark.parametrize("at_once", [None, 2])
def test_initial_losses_may_be_given(given, at_once):
    np.testing.assert_allclose(over(init_loss=given, at_once=at_once).init_loss, [0.1, 0.2, over().init_loss[2]])


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [None, 2])
def test_a_run_goes_on_from_its_checkpoint(at_once, tmp_path):
    changes = {"at_once": at_once, "observables": {"out": lambda params: params["out"]}}
    over(checkpoint=tmp_path / "run", num_draws=7, **changes)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["run"] if at_once is None else ["run.0", "run.1"])
    assert_equal(over(checkpoint=tmp_path / "run", **changes), over(**changes), rtol=0)


@pytest.mark.slow
def test_what_has_ended_is_read_from_its_file(tmp_path, monkeypatch):
    two = dict(list(TRAINING.items())[:2])
    over(two, at_once=1, checkpoint=tmp_path / "run")
    steps, made = chains.run_steps, []
    monkeypatch.setattr(chains, "run_steps", lambda *args: made.append(args[8]) or steps(*args))
    assert_equal(over(at_once=1, checkpoint=tmp_path / "run"), over(at_once=1), rtol=0)
    assert made.count(0) == 1 + 3  # begins: the last one, and those without files


def test_a_file_of_other_checkpoints_is_refused(tmp_path):
    over(checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="is of another run: its params is not what was given"):
        over(TRAINING | {400: params_of(9)}, checkpoint=tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (0.1, TypeError, "init_loss is a list of numbers, or a mapping of names, but got 0.1"),
        ([0.1], ValueError, "init_loss has 1 numbers, but there are 3 checkpoints. Give one for each"),
        (
            {100: 0.1, 200: 0.1, 3: 0.1},
            ValueError,
            "init_loss has none of the checkpoint 400. Its names are 100, 200, 3",
        ),
        ([0.1, "0.2", 0.3], ValueError, "Invalid init_loss: '0.2'"),
    ],
    ids=["one number", "too few", "another name", "text"],
)
def test_wrong_initial_losses_are_refused(given, error, match):
    with pytest.raises(error, match=match):
        over(init_loss=given)


SELECTIONS = {"in": "in", "out": "out", "half": {"in": jnp.arange(5) < 3, "out": False}}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vmap", "map"])
def test_selections_are_those_of_each_checkpoint_and_hold_its_own_arrays(method):
    changes = {"selections": SELECTIONS, "chain_method": method, "num_chains": 2}
    found = over(**changes)
    assert found.loss.shape == (3, 3, 2, 20)
    assert found.mean.shape == found.std.shape == found.rhat.shape == (3, 3)
    for step, params in TRAINING.items():
        of_one = alone(params, **changes)
        assert_equal(found[step], of_one, rtol=1e-5)
        assert found[step]["half"].mean == pytest.approx(of_one["half"].mean, rel=1e-3)
    assert found.selections == ("in", "out", "half")
    held = over(**changes | {"selections": ["out"]})
    np.testing.assert_allclose(held.loss[:, 0], found.loss[:, 1], rtol=1e-5)


@pytest.mark.slow
def test_of_quadratics_they_are_exact():
    """Each checkpoint has a curvature of its own in an array that is held."""

    def quadratic(params):
        return jnp.exp(params["log_h"]) * jnp.sum(params["w"] ** 2) / 2

    training = {log_h: {"log_h": jnp.asarray(log_h), "w": jnp.zeros(50)} for log_h in (-2.0, 0.0, 1.0)}
    found = over(
        training, quadratic, rules.SGLD(lr=5e-3, localization=5.0), None, nbeta=30.0, selections=["w"],
        num_chains=8, num_draws=600, num_burnin_steps=500, num_steps_bw_draws=5,
    )  # fmt: skip
    for log_h, mean, mcse in zip(found, found.mean[:, 0], found.mcse[:, 0], strict=True):
        exact = cases.sgld_quadratic(np.full(50, np.exp(log_h)), 30.0, 5e-3, localization=5.0)
        assert abs(mean - exact) < 4 * mcse
        assert mcse < 0.02 * exact + 0.02


class Net(eqx.Module):
    weight: jax.Array
    sign: jax.Array  # not sampled, and another one at each checkpoint

    def __init__(self, seed):
        self.weight = jax.random.normal(jax.random.key(seed), (3,))
        self.sign = jnp.asarray(seed % 2 * 2 - 1)


def net_loss(net, x):
    return jnp.mean((net.sign * jnp.tanh(x @ net.weight) - x[:, 0]) ** 2)


@pytest.mark.slow
def test_modules_have_their_own_other_arrays():
    nets = [Net(seed) for seed in (1, 2, 3)]
    found = over(nets, net_loss)
    for number, net in enumerate(nets):
        assert_equal(found[number], alone(net, net_loss), rtol=1e-5)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *nets)
    assert_equal(over(stacked, net_loss, stacked=True), found, rtol=0)


@pytest.mark.slow
def test_bfloat16_parameters_are_sampled_as_alone():
    low = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), params) for params in TRAINING.values()]
    found = over(low)
    for number, params in enumerate(low):
        assert_equal(found[number], alone(params), rtol=1e-2)


# Data that come


def batches():
    return [X[i : i + 6] for i in range(0, 24, 6)]


class Loader:
    def __iter__(self):
        return iter(batches())


def draw(key):
    return jax.random.normal(key, (6, 3))


@pytest.mark.slow
@pytest.mark.parametrize("data", [Loader(), draw], ids=["iterable", "function"])
@pytest.mark.parametrize("at_once", [None, 2])
def test_streams_begin_anew_for_each_group(data, at_once):
    found = over(data=data, at_once=at_once)
    for step, params in TRAINING.items():
        assert_equal(found[step], alone(params, data=data), rtol=1e-5)


def endless():
    while True:
        yield from batches()


def test_what_does_not_begin_anew_takes_all_at_once():
    found = over(data=endless(), batch_size=None)
    assert_equal(found[400], alone(TRAINING[400], data=endless()), rtol=1e-5)
    with pytest.raises(ValueError, match=r"data is a generator, which does not begin anew, but 2 of the checkpoints"):
        over(data=endless(), at_once=2)
    with pytest.raises(ValueError, match="does not begin anew"):
        over((params for params in TRAINING.values()), data=endless())


# Files, and iterables


def test_files_are_read_when_it_is_their_turn(tmp_path):
    paths = {step: tmp_path / f"{step}.safetensors" for step in TRAINING}
    for step, params in TRAINING.items():
        checkpoint.save(paths[step], params)
    expected = over(at_once=1)
    assert_equal(over(paths), expected, rtol=0)
    of_list = over(list(map(str, paths.values())))
    assert of_list.names == tuple(map(str, paths.values()))
    assert_equal(over(list(paths.values()), names=[100, 200, 400]), expected, rtol=0)
    assert_equal(over(paths, at_once=3), over(), rtol=0)


def test_files_of_other_programs_are_read_by_a_function(tmp_path):
    for step, params in TRAINING.items():
        np.savez(tmp_path / f"{step}.npz", **params)
    asked = []

    def read(path):
        asked.append(path.name)
        return dict(np.load(path))

    paths = {step: tmp_path / f"{step}.npz" for step in TRAINING}
    assert_equal(over(paths, read=read), over(at_once=1), rtol=0)
    assert asked == ["100.npz", "200.npz", "400.npz"]
    with pytest.raises(ValueError, match="read by read=, a function of its path"):
        over(paths)


@pytest.mark.slow
def test_of_an_iterable_only_what_is_sampled_is_there():
    events = []

    def training():
        for step, params in TRAINING.items():
            events.append(f"made {step}")
            yield params

    def watched(params, x):
        jax.debug.callback(lambda: events.append("sampled") if events[-1] != "sampled" else None)
        return loss(params, x)

    found = over(training(), watched, names=list(TRAINING))
    assert events == [at for step in TRAINING for at in (f"made {step}", "sampled")]
    assert found.names == (100, 200, 400)


# Warnings


@pytest.mark.slow
def test_a_warning_names_its_checkpoints_once_for_each_reason():
    def quadratic(w):
        return jnp.sum(w**2) / 2

    changes = {"num_draws": 500, "num_burnin_steps": 200, "nbeta": 10.0, "num_chains": 4}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", sampling.LLCWarning)
        over({"far": jnp.full(3, 5.0), "near": jnp.zeros(3)}, quadratic, rules.SGLD(lr=0.1), None, **changes)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    for text in messages:
        assert "for checkpoint 'far'" in text
        assert "near'" not in text
        assert "\n" not in text
    assert {warning.filename for warning in caught} == {__file__}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", sampling.LLCWarning)
        over([jnp.full(3, 5.0)], quadratic, rules.SGLD(lr=0.1), None, selections={"one": jnp.arange(3) < 1}, **changes)
    assert "for selection 'one' of checkpoint 0" in str(caught[0].message)


@pytest.mark.slow
def test_a_checkpoint_whose_chains_all_diverge_is_left_out():
    def steep(w):
        return w[0] ** 4

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = over({1: jnp.zeros(1), 2: jnp.full(1, 50.0)}, steep, rules.SGLD(lr=0.1), None, nbeta=10.0)
        shown, of_two = repr(found), found[2].mean
    assert all(issubclass(warning.category, sampling.LLCWarning) for warning in caught), [str(x) for x in caught]
    assert "4 of 8 chains diverged: chain 0 of checkpoint 2 at draw" in str(caught[0].message)
    assert not any("checkpoint 2" in str(warning.message) for warning in caught[1:])
    assert np.isfinite(found.mean[0])
    assert np.isnan(found.mean[1])
    assert np.isnan(of_two)
    assert shown.splitlines()[2].split() == ["2", "6.25e+06", "nan", "nan", "nan", "4", "of", "4"]


# What comes back


@pytest.mark.slow
def test_the_table():
    lines = repr(over()).splitlines()
    assert lines[0].split() == ["checkpoint", "loss", "LLC", "mcse", "R-hat"]
    assert [line.split()[0] for line in lines[1:]] == ["100", "200", "400"]
    assert len(set(map(len, lines))) == 1
    lines = repr(over(selections=SELECTIONS)).splitlines()
    assert len(lines) == 1 + 9
    assert lines[0].split()[:2] == ["checkpoint", "selection"]
    assert lines[5].split()[:2] == ["200", "out"]


@pytest.mark.needs("numpyro")
def test_the_numbers_are_those_of_each_and_a_name_is_needed():
    found = over()
    for name in ("mean", "mcse", "rhat", "std", "per_chain", "effective_sample_size", "trace"):
        expected = [getattr(found[step], name) for step in found]
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-12, err_msg=name)
    assert len(found) == 3
    with pytest.raises(KeyError, match=r"There is no checkpoint 0. Their names are \(100, 200, 400\)"):
        found[0]


@pytest.mark.slow
@pytest.mark.parametrize("selections", [None, SELECTIONS])
def test_the_dataset(selections):
    pytest.importorskip("xarray")
    names = ["first", "second", "third"]
    found = over(list(TRAINING.values()), names=names, selections=selections, observables={"w": lambda w: w["out"]})
    dataset = found.to_xarray()
    first = ("checkpoint",) if selections is None else ("checkpoint", "selection")
    assert dataset["llc"].dims == (*first, "chain", "draw")
    assert dataset["w"].dims == (*first, "chain", "draw", "w_dim_0")
    assert dataset["checkpoint"].values.tolist() == names
    np.testing.assert_array_equal(dataset["sampling_loss"], found.loss)
    np.testing.assert_array_equal(dataset["llc"], found.trace)
    np.testing.assert_array_equal(dataset["w"], found.observables["w"])
    np.testing.assert_allclose(dataset["llc"].mean(("chain", "draw")), found.mean, rtol=1e-6)
    for name, start in zip(names, found.init_loss, strict=True):
        assert (dataset["init_loss"].sel(checkpoint=name) == start).all()
    assert over().to_xarray()["checkpoint"].values.tolist() == [100, 200, 400]
    if selections is not None:
        assert dataset["selection"].values.tolist() == list(SELECTIONS)
        one = found["second"].to_xarray()
        np.testing.assert_array_equal(one["llc"], dataset["llc"].sel(checkpoint="second"))


def test_the_plot_has_a_line_for_each_selection_at_the_steps():
    plt = pytest.importorskip("matplotlib.pyplot")
    ax = over(selections=SELECTIONS).plot(ax=plt.subplots()[1])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(SELECTIONS)
    assert ax.containers[0].lines[0].get_xdata().tolist() == [100, 200, 400]
    ax = over({"a": TRAINING[100], "b": TRAINING[200]}).plot(ax=plt.subplots()[1])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["a", "b"]
    plt.close("all")


# Errors


@pytest.mark.parametrize(
    ("checkpoints", "changes", "kind", "message"),
    [
        ("run.safetensors", {}, TypeError, "checkpoints is a list, or a mapping of names, but got a str"),
        (3.0, {}, TypeError, r"got a float. Give \[params, ...\], or one tree .* with stacked=True"),
        ([], {}, ValueError, "There are no checkpoints"),
        (iter([]), {}, ValueError, "There are no checkpoints"),
        (TRAINING, {"names": [1, 2, 3]}, ValueError, "has names, but names= was given too"),
        (list(TRAINING.values()), {"names": [1, 2]}, ValueError, "There are 3 checkpoints, but 2 names"),
        (list(TRAINING.values()), {"names": [1, 2, 1]}, ValueError, "Two checkpoints have the name 1"),
        (iter(TRAINING.values()), {"names": [1, 2]}, ValueError, "There are more checkpoints than names"),
        (iter(TRAINING.values()), {"names": [1, 2, 3, 4]}, ValueError, "There are 3 checkpoints, but 4 names"),
        (TRAINING, {"at_once": 0}, ValueError, "Invalid at_once: 0. It is an int >= 1"),
        (TRAINING, {"at_once": True}, ValueError, "Invalid at_once: True"),
        (
            {"a": jnp.zeros(3), "b": jnp.ones((3, 1))},
            {},
            ValueError,
            r"The checkpoint 'b': 'params' has shape \(3, 1\)",
        ),
        ([TRAINING[100], {"in": X}], {}, ValueError, "The checkpoint 1: It is another tree"),
        ([TRAINING[100], {"in": X, "out": "x"}], {"at_once": 1}, TypeError, "The checkpoint 1: params is one module"),
        (
            [TRAINING[100], TRAINING[100] | {"out": jnp.ones(5, jnp.bfloat16)}],
            {},
            ValueError,
            "The checkpoint 1: Its arrays have other shapes or dtypes",
        ),
        (
            {"good": TRAINING[100], "bad": TRAINING[100] | {"out": jnp.full(5, jnp.nan)}},
            {},
            ValueError,
            "The loss of all data at checkpoint 'bad' is nan",
        ),
        (TRAINING[100], {"stacked": True}, ValueError, "The first axes of checkpoints must have one length"),
        (["there is none"], {}, FileNotFoundError, "there is none"),
    ],
)
def test_errors_say_what_is_wrong(checkpoints, changes, kind, message):
    def run():
        loss_fn = loss if not isinstance(checkpoints, dict) or "a" not in checkpoints else (lambda w, x: jnp.sum(w**2))
        over(checkpoints, loss_fn, **changes)

    with pytest.raises(kind, match=message) as error:
        run()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300 or os.sep in str(error.value)
