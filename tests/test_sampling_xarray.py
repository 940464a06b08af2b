"""Draws with named axes, as xarray and arviz read them."""

import builtins
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxoptim
from jaxoptim import rules, sampling

xarray = pytest.importorskip("xarray")

X = jax.random.normal(jax.random.key(0), (7, 2))
FEW = {"key": jax.random.key(3), "num_chains": 2, "num_draws": 5}
PROBES = {"code": X, "text": X[:4]}


def of_each(w, x):
    return jnp.sum((x - w) ** 2, -1) / 2


def of_tokens(w, x):
    return of_each(w, x)[:, None] * jnp.arange(3)


def loss(w, x):
    return jnp.mean(of_each(w, x))


@dataclasses.dataclass(frozen=True)
class Summed(sampling.Observable):
    """An observable whose result is not its trace."""

    def update(self, memory, draw):
        return memory, draw.loss

    def result(self, memory, trace):
        return {"sum": trace.sum(), "path": trace.cumsum()}


@dataclasses.dataclass(frozen=True)
class Named(Summed):
    """One that names its axes."""

    def result(self, memory, trace):
        return jnp.stack([trace, trace], 1)

    def axes(self, name):
        return f"pairs of {name}", ("draw", "pair")


OBSERVABLES = {
    "w": lambda w: w,
    "both": lambda w: {"half": w.astype(jnp.bfloat16), "b": (w[0], w[1] > 0)},
    "code": sampling.Losses(of_tokens, "code"),
    "text": sampling.Losses(of_tokens, "text"),
    "whole": sampling.Losses(of_each, "code"),
    "covariance": sampling.Covariance(),
    "summed": Summed(),
    "named": Named(),
}
SGLD = rules.SGLD(lr=0.02, nbeta=5.0, weight_norm=True)


@pytest.fixture(scope="module")
def samples():
    return sampling.sample(loss, jnp.ones(2), SGLD, X, observables=OBSERVABLES, probes=PROBES, **FEW)


@pytest.mark.slow
def test_traces_are_variables_with_the_names_of_devinterp(samples):
    found = samples.to_xarray()
    draws = ("chain", "draw")
    assert {name: of.dims for name, of in found.data_vars.items()} == {
        "sampling_loss": draws,
        "weight_norm": draws,
        "w": (*draws, "w_dim_0"),
        "both.half": (*draws, "both.half_dim_0"),
        "both.b.0": draws,
        "both.b.1": draws,
        "loss_code": (*draws, "batch_code", "token_pos"),
        "loss_text": (*draws, "batch_text", "token_pos"),
        "loss_whole": (*draws, "batch_whole"),
        "pairs of named": (*draws, "pair"),
    }
    np.testing.assert_array_equal(found["sampling_loss"], samples.loss)
    np.testing.assert_array_equal(found["loss_code"], samples.observables["code"])
    np.testing.assert_array_equal(found["both.b.1"], samples.observables["both"]["b"][1])
    assert found["both.half"].dtype == np.float32
    assert found["both.b.1"].dtype == bool
    assert found.sizes["draw"] == 5
    assert found.indexes["chain"].tolist() == [0, 1]
    assert found.attrs["inference_library"] == "jaxoptim"
    assert found.attrs["inference_library_version"] == jaxoptim.__version__


def test_what_each_chain_has_one_of_is_a_coordinate(samples):
    found = samples.to_xarray(init_loss=0.5)
    coordinates = {name: of.dims for name, of in found.coords.items() if name not in ("chain", "draw")}
    assert coordinates == {
        "diverged": ("chain",),
        "init_loss": ("chain",),
        "covariance": ("chain", "covariance_dim_0", "covariance_dim_1"),
        "summed.sum": ("chain",),
        "summed.path": ("chain", "summed.path_dim_0"),
    }
    assert found.coords["init_loss"].to_numpy().tolist() == [0.5, 0.5]
    np.testing.assert_array_equal(found.coords["covariance"], samples.observables["covariance"])
    assert "init_loss" not in samples.to_xarray().coords


def test_another_number_of_tokens_is_another_axis(samples):
    some = samples.observables | {"text": samples.observables["text"][..., :2]}
    found = dataclasses.replace(samples, observables=some).to_xarray()
    assert found["loss_code"].dims[-1] == "token_pos"
    assert found["loss_text"].dims[-1] == "token_pos_text"


def test_arviz_reads_them(samples):
    arviz = pytest.importorskip("arviz")
    table = arviz.summary(samples.to_xarray(), kind="stats")
    assert table.loc["sampling_loss", "mean"] == pytest.approx(float(samples.loss.mean()), abs=6e-4)
    assert len(table) == 1 + 1 + 2 + 2 + 2 + 7 * 3 + 4 * 3 + 7 + 2


def test_variables_of_one_name_are_refused(samples):
    for name in ("chain", "loss_code", "sampling_loss"):
        found = dataclasses.replace(samples, observables=samples.observables | {name: samples.loss})
        with pytest.raises(ValueError, match=f"the variable '{name}' of .* is taken. Choose another name"):
            found.to_xarray()


def test_without_xarray_it_says_what_to_install(samples, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "xarray":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"need xarray: pip install xarray, or pip install 'jaxoptim\[sampling\]'"):
        samples.to_xarray()


NEAR = rules.SGLD(lr=0.01, localization=1.0, nbeta=10.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
@pytest.mark.parametrize("selections", [None, {"first": ["x"], "both": ["x", "y"]}, [["x"], ["x", "y"], ["y"]]])
def test_an_llc_has_the_dataset_of_its_samples_and_its_trace(selections):
    def both(w, x):
        return loss(jnp.stack([w["x"], w["y"]]), x)

    if selections is not None:
        as_masks = [
            {"x": "x" in part, "y": "y" in part}
            for part in (selections if isinstance(selections, list) else selections.values())
        ]
        selections = as_masks if isinstance(selections, list) else dict(zip(selections, as_masks, strict=True))
    at = {"x": jnp.zeros(()), "y": jnp.ones(())}
    observables = {
        "w": lambda w: w,
        "code": sampling.Losses(lambda w, x: of_tokens(jnp.stack([w["x"], w["y"]]), x), "code"),
    }
    llc = sampling.estimate_llc(
        both, at, NEAR, X, selections=selections, observables=observables, probes=PROBES, **FEW
    )  # fmt: skip
    found = llc.to_xarray()
    first = () if selections is None else ("selection",)
    assert found["llc"].dims == found["sampling_loss"].dims == (*first, "chain", "draw")
    assert found["loss_code"].dims == (*first, "chain", "draw", "batch_code", "token_pos")
    assert found["w.x"].dims == (*first, "chain", "draw")
    np.testing.assert_array_equal(found["llc"], llc.trace)
    np.testing.assert_array_equal(found["sampling_loss"], llc.loss)
    np.testing.assert_array_equal(found["w.y"], llc.observables["w"]["y"])
    assert found.attrs["nbeta"] == 10.0
    np.testing.assert_array_equal(found["init_loss"], np.full((*llc.loss.shape[:-2], 2), llc.init_loss))
    np.testing.assert_array_equal(found["diverged"], llc.diverged)
    np.testing.assert_allclose(found["llc"].mean(("chain", "draw")), llc.mean, rtol=1e-6)
    if selections is not None:
        assert found["selection"].values.tolist() == (list(selections) if isinstance(selections, dict) else [0, 1, 2])
        one = llc[1].to_xarray()
        xarray.testing.assert_equal(one, found.isel(selection=1).drop_vars("selection"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
def test_an_llc_refuses_an_observable_by_a_name_of_its_own():
    llc = sampling.estimate_llc(loss, jnp.zeros(2), NEAR, X, observables={"llc": lambda w: w[0]}, **FEW)
    with pytest.raises(ValueError, match=r"the variable 'llc' of 'llc' is taken"):
        llc.to_xarray()


@pytest.mark.needs("numpyro")
@pytest.mark.filterwarnings("ignore::jaxoptim.sampling.LLCWarning")
def test_arviz_has_the_error_and_the_r_hat_of_an_llc():
    arviz = pytest.importorskip("arviz")
    llc = sampling.estimate_llc(loss, jnp.zeros(2), NEAR, X, **FEW | {"num_draws": 400})
    row = arviz.summary(llc.to_xarray(), var_names="llc", round_to="none").loc["llc"]
    assert row["mean"] == pytest.approx(llc.mean)
    assert row["mcse_mean"] == pytest.approx(llc.mcse, rel=0.3)
    assert row["r_hat"] == pytest.approx(llc.rhat, abs=0.05)
