"""The Pyro-style optimizers against live ``pyro.optim``: values, states, options by name, late parameters, clipping."""

import inspect

import jax.numpy as jnp
import numpy as np
import pyro
import pyro.optim
import pytest
import torch

import parity
from jaxoptim import optim as torch_style
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim
from parity import distance, problem, rms_error, touched_rows
from pyro_twins import Twins
from table import CASES, FIRST, STATES, of_numbers_if_muon

STEPS = 40
ARRIVAL = 12
NAMES = ("net$$$0.weight", "loc", "AutoNormal.scales.z", "net$$$0.bias", "late")
"""The last two come later."""
DOTTED = {name.replace("$$$", ".") for name in NAMES}
CLIPS = [
    {},
    {"clip_norm": 0.5},
    {"clip_value": 0.3},
    {"clip_norm": 1.0, "clip_value": 0.2},
    {"clip_norm": 0.0},
    {"clip_value": 0.0},
    {"clip_norm": 1e-30, "clip_value": 1e-30},
    {"clip_norm": 1e30},
    {"clip_norm": None, "clip_value": 0.3},
    {"clip_norm": 1},
]


def rate(case):
    """The learning rate's name, and its value."""
    name = "eta" if case.row.name == "AdagradRMSProp" else "lr"
    return name, case.options.get(name, 0.01)


def options_by_name(case, seen):
    """A function of one name, which gives some parameters half the rate."""
    key, value = rate(case)

    def options(name):
        seen.append(name)
        return case.options | {key: value * (0.5 if name in ("loc", "net.0.bias") else 1.0)}

    return options


def parents(case, options, clip=None):
    """Live Pyro around the class of the table, on its single-tensor path."""
    if callable(options):
        return pyro.optim.PyroOptim(case.row.parent, lambda name: case.row.flags | options(name), clip)
    return pyro.optim.PyroOptim(case.row.parent, case.row.flags | options, clip)


def gradient(case, noise, rows, t):
    """Noise; with the rows it belongs to if the case is of sparse gradients."""
    return (noise[t][: parity.ROWS_TOUCHED], rows[t][: len(noise[t])]) if case.row.sparse else noise[t]


def run(case, dtype="float64", steps=STEPS):
    """Parameters of equal and of different shapes; some arrive late, some are left out, some have no gradient."""
    shapes = (*case.row.shapes[:2], case.row.shapes[0], *case.row.shapes[:2])
    start, noise = problem(shapes, dtype.startswith("complex"))
    rows = touched_rows(shapes) if case.row.sparse else shapes
    seen: list[str] = []
    options = options_by_name(case, seen)
    twins = Twins(getattr(optim, case.row.name)(options), parents(case, options), dtype)
    for t in range(steps):
        for name, value in zip(NAMES, start, strict=True):
            if t == (ARRIVAL if name in NAMES[3:] else 0):
                twins.add(name, value)
        noises = {name: gradient(case, noise[i], rows[i], t) for i, name in enumerate(twins.cells)}
        if t % 7 == 3:
            del noises["net$$$0.weight"]
        if t % 11 == 5:
            noises["AutoNormal.scales.z"] = None
        twins.step(noises)
    assert set(seen) == DOTTED
    assert len(seen) == 2 * len(NAMES)  # each name once in ours, once in Pyro
    return twins


@pytest.mark.slow
@pytest.mark.parametrize("case", of_numbers_if_muon(CASES))
def test_a_run_agrees_with_pyro(case, x64):
    with torch.sparse.check_sparse_tensor_invariants():
        twins = run(case)
    assert twins.distance() < 1e-12
    twins.check_states()


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in STATES if case.row.complex and not case.row.sparse], ids=str)
def test_a_complex_run_agrees_with_pyro(case, x64):
    twins = run(case, "complex128")
    assert twins.distance() < 1e-12
    twins.check_states()


@pytest.mark.slow
@pytest.mark.parametrize("case", of_numbers_if_muon(FIRST))
def test_every_wrapper_makes_pyros_steps(case, x64):
    shape = case.row.shapes[0]
    start, noise = problem((shape, shape))
    rows = touched_rows((shape, shape)) if case.row.sparse else start
    twins = Twins(getattr(optim, case.row.name)(dict(case.options)), parents(case, case.options))
    for name, value in zip("ab", start, strict=True):
        twins.add(name, value)
    with torch.sparse.check_sparse_tensor_invariants():
        for t in range(3):
            twins.step({name: gradient(case, noise[i], rows[i], t) for i, name in enumerate("ab")})
    assert twins.distance() < 1e-12
    twins.check_states()


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in FIRST if not case.row.sparse], ids=str)
def test_low_precision_is_no_worse_than_pyro(case, dtype):
    start, noise = problem(case.row.wide_shapes)
    reference = parity.wide_reference(case)
    twins = Twins(getattr(optim, case.row.name)(case.options), parents(case, case.options), dtype)
    for i, value in enumerate(start):
        twins.add(f"p{i}", value)
    for t in range(parity.STEPS):
        twins.step({f"p{i}": noise[i][t] for i in range(len(start))}, slope=0.0)
    ours = [np.asarray(cell.value.astype(jnp.float32)).astype(np.float64) for cell in twins.cells.values()]
    theirs = [tensor.detach().double().numpy() for tensor in twins.tensors.values()]
    assert rms_error(ours, reference) <= 1.05 * rms_error(theirs, reference)


# Options.


def module_lr(module, name):
    return {"lr": 0.1 if module == "net" else 0.01, "betas": (0.9, 0.99) if name.endswith("weight") else (0.5, 0.9)}


def dotted_lr(name):
    return {"lr": 0.1 if name.startswith("net.") else 0.01}


def optional_second(name, other="unused"):
    return {"lr": 0.1 if name == other else 0.02}


FORMS = [{"lr": 0.05}, {}, dotted_lr, module_lr, optional_second]


def three_parameters(ours, theirs, steps=10, dtype="float64"):
    """A short run with three names of one shape."""
    twins = Twins(ours, theirs, dtype)
    start, noise = problem(((2, 3),) * 3)
    for name, value in zip(NAMES, start, strict=False):
        twins.add(name, value)
    for t in range(steps):
        twins.step({name: 5 * noise[i][t] for i, name in enumerate(twins.cells)})
    return twins


@pytest.mark.costly
@pytest.mark.parametrize("form", FORMS, ids=["dict", "empty-dict", "one-argument", "two-arguments", "default-argument"])
def test_options_are_asked_as_in_pyro(form, x64):
    twins = three_parameters(optim.Adam(form), pyro.optim.Adam(form))
    assert twins.distance() < 1e-12
    twins.check_states()


def recorder(calls, result):
    def one(name):
        calls.append(name)
        return result

    def two(module, name):
        calls.append((module, name))
        return result

    return one, two


@pytest.mark.parametrize("form", [0, 1], ids=["one-argument", "two-arguments"])
def test_functions_get_pyros_arguments_once(form, x64):
    ours, theirs = [], []
    twins = three_parameters(
        optim.SGD(recorder(ours, {"lr": 0.1})[form], recorder(ours, {})[1]),
        pyro.optim.SGD(recorder(theirs, {"lr": 0.1})[form], recorder(theirs, {})[1]),
        steps=3,
    )
    assert ours == theirs
    assert len(ours) == 6
    assert twins.distance() < 1e-12


def test_the_dict_of_options_is_not_changed():
    options, clip = {"lr": 0.5, "betas": (0.5, 0.5)}, {"clip_norm": 1.0}
    optimizer = optim.Adam(options, clip)
    optimizer.update({"a": jnp.ones(3)}, {"a": jnp.ones(3)})
    assert (options, clip) == ({"lr": 0.5, "betas": (0.5, 0.5)}, {"clip_norm": 1.0})


# Clipping.


@pytest.mark.slow
@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: "-".join(f"{k}={v}" for k, v in clip.items()) or "none")
def test_clipping_agrees_with_pyro(clip, x64):
    twins = three_parameters(optim.Adam({"lr": 0.1}, clip), pyro.optim.Adam({"lr": 0.1}, dict(clip)), STEPS)
    assert twins.distance() < 1e-12
    twins.check_states()


def by_name(module, name):
    return {"net": {"clip_norm": 0.1}, "loc": {"clip_value": 0.1}}.get(module, {})


@pytest.mark.slow
def test_clipping_by_name_agrees_with_pyro(x64):
    twins = three_parameters(optim.SGD({"lr": 0.1}, by_name), pyro.optim.SGD({"lr": 0.1}, by_name), STEPS)
    assert twins.distance() < 1e-12
    for cell in twins.cells.values():
        assert np.abs(np.asarray(cell.grad)).max() > 0.3  # ours is as the user gave it


@pytest.mark.costly
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("clip", CLIPS[:4], ids=str)
def test_clipping_of_no_numbers_agrees_with_pyro(clip, bad, x64):
    twins = Twins(optim.SGD({"lr": 0.1}, clip), pyro.optim.SGD({"lr": 0.1}, dict(clip)))
    for name in "ab":
        twins.add(name, np.ones(3))
    twins.step({"a": np.array([1.0, bad, -2.0]), "b": np.array([1.0, 2.0, 3.0])}, slope=0.0)
    for name in "ab":
        np.testing.assert_array_equal(
            np.isfinite(np.asarray(twins.cells[name].value)), torch.isfinite(twins.tensors[name]).numpy()
        )
        np.testing.assert_allclose(twins.cells[name].value, twins.tensors[name].detach().numpy(), rtol=1e-14)


@pytest.mark.slow
def test_complex_gradients_are_clipped_by_their_norm(x64):
    twins = Twins(
        optim.Adam({"lr": 0.1}, {"clip_norm": 0.5}), pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 0.5}), "complex128"
    )
    start, noise = problem(((4,), (4,)), True)
    for name, value in zip("ab", start, strict=True):
        twins.add(name, value)
    for t in range(20):
        twins.step({name: noise[i][t] for i, name in enumerate("ab")})
    assert twins.distance() < 1e-12
    with pytest.raises(TypeError, match=r"clip_value.*complex.*clip_norm"):
        optim.SGD({}, {"clip_value": 1.0}).update({"a": jnp.ones(2, complex)}, {"a": jnp.ones(2, complex)})


@pytest.mark.slow
def test_sparse_gradients_are_clipped_as_their_sum(x64):
    clip = {"clip_norm": 0.5, "clip_value": 0.2}
    values, rows = np.arange(6.0).reshape(3, 2), np.array([2, 0, 2])
    sparse, dense = optim.SGD({"lr": 0.1}, clip), optim.SGD({"lr": 0.1}, clip)
    cells = [Parameter(jnp.ones((4, 2)), "a") for _ in range(2)]
    twins = Twins(sparse, pyro.optim.SGD({"lr": 0.1}))
    with torch.sparse.check_sparse_tensor_invariants():
        twins.add("a", np.ones((4, 2)))
        twins.set_grads({"a": (values, rows)})
    cells[0].grad = twins.cells["a"].grad
    cells[1].grad = cells[0].grad.todense()
    sparse([cells[0]])
    dense([cells[1]])
    np.testing.assert_allclose(cells[0].value, cells[1].value, rtol=1e-14)


# DCTAdam.


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 7, 8, 13])
def test_a_transformed_axis_agrees_with_pyro(length, x64):
    options = {"lr": 0.02, "lrd": 0.99}
    shapes = ((2, length), (length, 2), (2, length))
    start, noise = problem(shapes)
    twins = Twins(optim.DCTAdam(options), pyro.optim.DCTAdam(options))
    for name, value, dim in zip("abc", start, (-1, -2, None), strict=True):
        twins.add(name, value)
        twins.cells[name].dct_dim = dim
        if dim is not None:
            twins.tensors[name]._pyro_dct_dim = dim
    for t in range(STEPS):
        twins.step({name: noise[i][t] for i, name in enumerate("abc")})
    assert twins.distance() < 1e-12
    twins.check_states()


@pytest.mark.slow
def test_subsamples_that_change_agree_with_pyro(x64):
    options = {"lr": 0.02, "subsample_aware": True, "clip_norm": 0.7}
    rng = np.random.default_rng(3)
    start, noise = problem(((6, 4), (6, 4)))
    twins = Twins(optim.DCTAdam(options), pyro.optim.DCTAdam(options))
    for name, value in zip("ab", start, strict=True):
        twins.add(name, value)
    for t in range(STEPS):
        for name in "ab":
            picked = {-1: rng.permutation(4)[:2], -2: rng.permutation(6)[:3]}
            if name == "b":
                del picked[-1]
            twins.cells[name].subsample = picked
            twins.tensors[name]._pyro_subsample = {dim: torch.tensor(at) for dim, at in picked.items()}
        twins.step({name: noise[i][t] for i, name in enumerate("ab")})
    assert twins.distance() < 1e-12
    for name, theirs in twins.theirs.get_state().items():
        ours = twins.ours.get_state()[name]["state"][0]
        for key, slot in theirs["state"][0].items():
            np.testing.assert_allclose(np.asarray(ours[key]), slot.numpy(), rtol=1e-12)


@pytest.mark.costly
@pytest.mark.parametrize("indices", [[1], [3, 0], [2, 2], []], ids=str)
def test_subsamples_of_any_size_agree_with_pyro(indices, x64):
    options = {"lr": 0.1, "subsample_aware": True}
    twins = Twins(optim.DCTAdam(options), pyro.optim.DCTAdam(options))
    twins.add("a", np.ones((2, 4)))
    twins.cells["a"].subsample = {-1: np.array(indices, int)}
    twins.tensors["a"]._pyro_subsample = {-1: torch.tensor(indices, dtype=torch.long)}
    for t in range(3):
        twins.step({"a": np.full((2, 4), t + 1.0)})
    assert twins.distance() < 1e-12


@pytest.mark.slow
def test_a_rate_decays_where_a_gradient_is_missing(x64):
    twins = Twins(optim.ClippedAdam({"lrd": 0.5}), pyro.optim.ClippedAdam({"lrd": 0.5}))
    start, noise = problem(((3,), (3,)))
    for name, value in zip("ab", start, strict=True):
        twins.add(name, value)
    for t in range(6):
        twins.step({"a": noise[0][t], "b": None if t < 4 else noise[1][t]})
        twins.check_states()
    twins.step({"a": noise[0][6]})
    twins.step({"b": None})
    twins.check_states()
    rates = [state["param_groups"][0]["lr"] for state in twins.ours.get_state().values()]
    assert rates == [1e-3 * 0.5**7, 1e-3 * 0.5**7]
    assert twins.distance() < 1e-12


@pytest.mark.costly
@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad", "AdagradRMSProp", "ClippedAdam"])
def test_a_parameter_that_came_without_a_gradient_has_pyros_state(name, x64):
    twins = Twins(getattr(optim, name)({}), getattr(pyro.optim, name)({}))
    for key in "ab":
        twins.add(key, np.ones(3))
    twins.step({"a": None, "b": np.ones(3)})
    twins.check_states()


# The same names as in Pyro.


def test_all_of_pyros_names_are_here():
    missing = {name for name in pyro.optim.__all__ if not hasattr(optim, name)}
    assert not missing
    assert {"MultiOptimizer", "PyroMultiOptimizer", "TorchMultiOptimizer", "MixedMultiOptimizer", "Newton"} <= set(
        dir(optim.multi)
    )


@pytest.mark.parametrize("name", [*sorted({case.row.name for case in CASES})])
def test_autowrap(name):
    wrapper = getattr(optim, name)
    made = wrapper({})
    assert isinstance(made, optim.PyroOptim)
    assert made.pt_optim_constructor is getattr(torch_style, name)
    assert (
        wrapper.__name__
        == made.pt_optim_constructor.__name__
        == getattr(pyro.optim, name)({}).pt_optim_constructor.__name__
    )
    assert list(inspect.signature(wrapper).parameters) == ["optim_args", "clip_args"]


@pytest.mark.slow
def test_many_steps_make_the_values_of_one_optimizer_per_parameter(x64):
    start, noise = problem(((3,),) * 4)
    optimizer = optim.Adam({"lr": 0.1})
    values = {f"p{i}": jnp.asarray(x) for i, x in enumerate(start)}
    single = {name: torch_style.Adam([value], lr=0.1) for name, value in values.items()}
    for t in range(20):
        grads = {f"p{i}": jnp.asarray(x[t]) for i, x in enumerate(noise)}
        values = optimizer.update(values, grads)
        for name, of in single.items():
            of.step([grads[name]])
    assert (
        distance([np.asarray(values[name]) for name in single], [np.asarray(of.params[0]) for of in single.values()])
        < 1e-14
    )
