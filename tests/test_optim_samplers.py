"""The torch-style samplers against devinterp's, with groups, masks, schedulers, and states that change sides."""

import copy
import pickle
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from devinterp.optim.sgld import SGLD as TheirSGLD
from devinterp.optim.sgnht import SGNHT as TheirSGNHT

import jaxoptim
from jaxoptim import checkpoint, interop, optim, rules
from jaxoptim.optim.lr_scheduler import ExponentialLR

pytestmark = pytest.mark.numbers

SHAPES = [(6, 4), (5,), ()]
STEPS = 40
PARAMS = {"a": jnp.ones(3), "b": jnp.zeros((2, 2))}
METRICS = ("noise_norm", "grad_norm", "weight_norm", "distance")
ALL = dict.fromkeys((*METRICS, "save_noise", "save_mala_vars"), True)
MASK = np.array([1.0, 0.0, 1.0, 1.0])

CASES = {
    "SGLD": (TheirSGLD, optim.SGLD, {"lr": 0.01, "nbeta": 3.0}, [{}, {}]),
    "SGLD with everything": (
        TheirSGLD,
        optim.SGLD,
        {"lr": 0.01, "nbeta": 3.0, "localization": 2.0, "weight_decay": 0.3, "bounding_box_size": 0.3} | ALL,
        [{"lr": 0.02, "optimize_over": MASK}, {"noise_norm": False, "nbeta": 2.0}],
    ),
    "SGNHT": (TheirSGNHT, optim.SGNHT, {"lr": 0.01, "nbeta": 3.0, "diffusion_factor": 0.1}, [{}, {"lr": 0.02}]),
    "SGNHT in a box": (TheirSGNHT, optim.SGNHT, {"nbeta": 3.0, "bounding_box_size": 0.4}, [{}, {}]),
}


def grouped(params, changes, mask=lambda x: x):
    """The first parameter in one group, the others in another."""
    options = [{k: mask(x) if k == "optimize_over" else x for k, x in of.items()} for of in changes]
    return [{"params": params[:1], **options[0]}, {"params": params[1:], **options[1]}]


def both(theirs, ours, options, changes):
    """Two samplers that have made the same steps with the same noise and schedules."""
    rng = np.random.default_rng(0)
    start, slopes = ([rng.normal(size=s) for s in SHAPES] for _ in range(2))
    noise = [[rng.normal(size=s) for s in SHAPES] for _ in range(STEPS + 1)]
    flat = iter([x for of_step in noise for x in of_step])

    def normal(mean=0.0, std=1.0, size=None, device=None, generator=None):
        return torch.tensor(next(flat)) * std

    def like(param):
        return torch.tensor(next(flat))

    with mock.patch("torch.normal", normal), mock.patch("torch.randn_like", like):
        tensors = [torch.nn.Parameter(torch.tensor(x)) for x in start]
        cells = [optim.Parameter(x) for x in start]
        parent = theirs(grouped(tensors, changes, torch.tensor), **options)
        chain = ours(grouped(cells, changes), **options)
        first = int(theirs is TheirSGNHT)
        if first:
            for cell, x in zip(cells, noise[0], strict=True):
                chain.state[cell]["momentum"] = jnp.sqrt(options.get("lr", 0.01)) * x
        schedules = torch.optim.lr_scheduler.ExponentialLR(parent, 0.97), ExponentialLR(chain, 0.97)
        for t in range(STEPS):
            for p, slope in zip(tensors, slopes, strict=True):
                p.grad = torch.cos(p.data) * torch.tensor(slope)
            for p, slope in zip(cells, slopes, strict=True):
                p.grad = jnp.cos(p.value) * slope
            parent.step()
            chain.step(noise=[noise[t + first][:1], noise[t + first][1:]])
            for schedule in schedules:
                schedule.step()
    return parent, chain, tensors, cells


@pytest.fixture(params=CASES)
def pair(request, x64):
    theirs, ours, options, changes = CASES[request.param]
    return (*both(theirs, ours, options, changes), options)


@pytest.mark.slow
def test_it_is_devinterps(pair):
    parent, chain, tensors, cells, options = pair
    for theirs, mine in zip(tensors, cells, strict=True):
        np.testing.assert_allclose(mine.value, theirs.detach().numpy(), rtol=1e-12, atol=1e-12)
    for theirs, mine in zip(parent.param_groups, chain.param_groups, strict=True):
        assert mine["lr"] == theirs["lr"]
        assert mine.get("num_el") == theirs.get("num_el")
        assert int(mine["step"]) == STEPS
        for name in METRICS:
            assert (mine.get(name) is False) == (theirs.get(name) is False)
        for name in (*METRICS, "thermostat"):
            if name in theirs and theirs[name] is not False:
                np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-6)
    if options.get("save_mala_vars"):
        np.testing.assert_allclose(chain.localization_loss, parent.localization_loss, rtol=1e-6)
        for name in ("lr", *METRICS):
            np.testing.assert_allclose(getattr(chain, name), getattr(parent, name), rtol=1e-6)
        for mine, theirs in zip(chain.dws, parent.dws, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)
        for group, arrays in parent.noise.items():
            for mine, theirs in zip(chain.noise[group], arrays, strict=True):
                np.testing.assert_array_equal(mine, theirs)


@pytest.mark.costly
def test_states_change_sides(pair):
    parent, chain, _, cells, options = pair
    ours = type(chain)(grouped([optim.Parameter(x.value) for x in cells], [{}, {}]), nbeta=3.0)
    ours.load_state_dict(parent.state_dict(), strict=not options.get("save_noise"))
    for mine, theirs in zip(ours.param_groups, parent.param_groups, strict=True):
        assert mine["lr"] == theirs["lr"]
        assert mine.get("localization", 0) == theirs.get("localization", 0)
    for group, theirs in zip(ours.param_groups, parent.param_groups, strict=True):
        for cell, tensor in zip(group["params"], theirs["params"], strict=True):
            for name, slot in parent.state[tensor].items():
                np.testing.assert_array_equal(ours.state[cell][name], slot)
    parent.load_state_dict(interop.torch.to_torch(chain.state_dict()))
    again = type(chain)(grouped([optim.Parameter(x.value) for x in cells], [{}, {}]), nbeta=3.0, **saves(options))
    again.load_state_dict(parent.state_dict())
    assert [int(group["step"]) for group in again.param_groups] == [STEPS, STEPS]
    for group, other in zip(again.param_groups, chain.param_groups, strict=True):
        assert bool(group["key"] == other["key"])


def saves(options):
    return {name: options[name] for name in ("save_noise", "save_mala_vars") if name in options}


SAMPLERS = {
    "SGLD": (optim.SGLD, rules.SGLD, {"noise_norm": True}),
    "SGNHT": (optim.SGNHT, rules.SGNHT, {"metrics": "components"}),
    "SGHMC": (optim.SGHMC, rules.SGHMC, {"localization": 2.0, "center": {"a": jnp.arange(3.0), "b": None}}),
    "PSGLD": (optim.PSGLD, rules.PSGLD, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "rule", "options"), SAMPLERS.values(), ids=SAMPLERS)
def test_it_draws_what_the_pure_face_draws_and_goes_there_and_back(cls, rule, options):
    options = {"lr": 0.01, "nbeta": 2.0, "key": jax.random.key(4)} | options
    chain, rule = cls(PARAMS, **options), rule(**options)
    params, state, step = PARAMS, jaxoptim.init(rule, PARAMS), jax.jit(jaxoptim.step)
    for _ in range(3):
        chain.step(chain.params)
        params, state = step(rule, params, params, state)
    chex.assert_trees_all_equal(chain.params, params)
    tx, mine, of = chain.to_functional()
    updates, of = tx.update(mine, of, mine)
    chain.from_functional(optax.apply_updates(mine, updates), of)
    params, state = step(rule, params, params, state)
    chex.assert_trees_all_close(chain.params, params, rtol=1e-6, atol=1e-7)
    assert int(chain.param_groups[0]["step"]) == 4


@pytest.mark.costly
@pytest.mark.parametrize("kept", ["deepcopy", "pickle", "state_dict", "checkpoint"])
def test_a_copy_continues_to_the_last_bit(kept, tmp_path):
    groups = [{"params": [optim.Parameter(jnp.ones(3))]}, {"params": [optim.Parameter(jnp.ones(2))], "lr": 0.1}]
    chain = optim.SGNHT(groups, lr=0.01, nbeta=2.0, key=jax.random.key(4))
    grads = [[jnp.ones(3)], [jnp.ones(2)]]
    chain.step(grads)
    other = copy.deepcopy(chain)
    if kept == "pickle":
        other = pickle.loads(pickle.dumps(chain))
    elif kept != "deepcopy":
        path = tmp_path / "chain"
        checkpoint.save(path, chain.state_dict())
        state = chain.state_dict() if kept == "state_dict" else checkpoint.load(path)
        params = [[optim.Parameter(x) for x in of] for of in chain.params]
        other = optim.SGNHT([{"params": of} for of in params], nbeta=2.0)
        other.load_state_dict(state)
    for _ in range(2):
        chain.step(grads)
        other.step(grads)
    chex.assert_trees_all_equal(chain.params, other.params)
    assert float(chain.param_groups[1]["thermostat"]) == float(other.param_groups[1]["thermostat"])


@pytest.mark.slow
def test_groups_have_noise_thermostats_and_counts_of_their_own():
    first, second = optim.Parameter(jnp.zeros(4)), optim.Parameter(jnp.zeros(4))
    chain = optim.SGNHT([{"params": [first]}, {"params": [second], "diffusion_factor": 0.5}], nbeta=2.0)
    chain.step([[jnp.zeros(4)], [None]])
    assert [int(group["step"]) for group in chain.param_groups] == [1, 0]
    assert float(chain.param_groups[1]["thermostat"]) == 0.5
    assert not second.value.any()
    chain.step([[jnp.zeros(4)], [jnp.zeros(4)]])
    assert abs(np.corrcoef(first.value, second.value)[0, 1]) < 0.999
    chain.param_groups[0]["thermostat"] = 0.25
    third = optim.Parameter(jnp.ones(2))
    chain.add_param_group({"params": [third]})
    third.value = jnp.zeros(2)
    assert chain.state[third]["initial_param"].tolist() == [1, 1]
    chain.step([[jnp.zeros(4)], [jnp.zeros(4)], [jnp.zeros(2)]])
    assert 0.2 < float(chain.param_groups[0]["thermostat"]) < 0.35


@pytest.mark.slow
def test_masks_go_by_name_and_metrics_may_be_switched():
    chain = optim.SGLD(PARAMS, nbeta=2.0, optimize_over={"b": True, "a": False}, noise_norm=True)
    chain.step(PARAMS)
    assert chain.params["a"].tolist() == [1, 1, 1]
    assert chain.params["b"].any()
    assert chain.noise_norm > 0
    chain.param_groups[0]["noise_norm"] = False
    chain.step(PARAMS)
    assert chain.noise_norm is False
    chain.param_groups[0]["noise_norm"] = True
    chain.step(PARAMS)
    assert chain.noise_norm > 0
    for masks, match in (
        ({"a": 1, "z": 0}, "not both there"),
        ([1], "has 1 masks, but the group has 2"),
        (0.5, "zeros"),
    ):
        with pytest.raises(ValueError, match=match):
            optim.SGLD(PARAMS, nbeta=2.0, optimize_over=masks).step(PARAMS)


@pytest.mark.slow
def test_centers_go_by_name_or_in_order_and_parts_are_entries_of_the_groups():
    options = {"lr": 0.1, "nbeta": 0.0, "noise_level": 0.0, "localization": 4.0, "metrics": "components"}
    ends = []
    for params, center in (
        (PARAMS, {"b": None, "a": 3 * np.ones(3)}),
        ([optim.Parameter(x) for x in PARAMS.values()], [np.full(3, 3.0), None]),
    ):
        with pytest.warns(UserWarning, match="noise_level"):
            chain = optim.SGLD(params, center=center, **options)
        chain.step(PARAMS if params is PARAMS else list(PARAMS.values()))
        again = pickle.loads(pickle.dumps(chain))
        assert float(again.param_groups[0]["localization_norm"]) == pytest.approx(0.2 * 2 * np.sqrt(3))
        assert float(chain.param_groups[0]["scaled_noise_norm"]) == 0
        ends.append(chain.params["a"] if params is PARAMS else params[0].value)
    np.testing.assert_allclose(ends, np.full((2, 3), 1.4), rtol=1e-6)
    for center, match in (
        ({"a": np.ones(3), "z": None}, "center has centers by name, but"),
        ([np.ones(3)], "has 1 centers, but the group has 2 parameters. Give one for each"),
        ({"a": np.ones(2), "b": None}, "center of 'a' has shape"),
    ):
        with pytest.raises(ValueError, match=match):
            optim.SGLD(PARAMS, center=center, nbeta=2.0).step(PARAMS)


@pytest.mark.slow
def test_minimize_hooks_and_closures():
    chain = optim.SGLD(PARAMS, lr=1e-3, nbeta=20.0, key=jax.random.key(0))
    seen = []
    chain.register_step_post_hook(lambda *_: seen.append("post"))
    losses = [float(chain.minimize(lambda p: sum(jnp.sum(x**2) for x in p.values()))) for _ in range(2)]
    assert losses[0] == 3
    assert seen == ["post"] * 2
    param = optim.Parameter(jnp.ones(2))
    chain = optim.SGHMC([param])

    def closure():
        param.grad = param.value
        return 7.0

    assert chain.step(closure) == 7


def test_the_parents_warnings_and_attributes():
    with pytest.warns(UserWarning, match="nbeta set to 1, LLC estimates will be off"):
        optim.SGNHT(PARAMS)
    with pytest.warns(UserWarning, match="noise_level in SGLD is unequal to one"):
        optim.SGLD(PARAMS, nbeta=2.0, noise_level=0.5)
    with pytest.warns(UserWarning, match="Temperature is deprecated"):
        assert optim.SGLD(PARAMS, temperature=5.0).param_groups[0]["nbeta"] == 5
    for name in ("save_noise", "save_mala_vars"):
        with pytest.warns(UserWarning, match="not implemented for SGNHT"):
            optim.SGNHT(PARAMS, nbeta=2.0, **{name: True})
    chain = optim.SGLD(PARAMS, nbeta=2.0)
    assert chain.noise is None
    assert not hasattr(chain, "dws")
    with pytest.raises(AttributeError, match="'SGLD' object has no attribute 'other'"):
        _ = chain.other
    with pytest.raises(TypeError, match="typed key"):
        optim.SGLD(PARAMS, nbeta=2.0, key=3)


@pytest.mark.parametrize("cls", [optim.SGLD, optim.SGMCMC.sgld, optim.SGNHT, optim.LBFGS])
def test_a_parameter_given_twice_is_refused(cls):
    """One step has one noise, one thermostat, one set of metrics."""
    p, q = optim.Parameter([1.0, 2.0], name="p"), optim.Parameter([3.0])
    name = "LBFGS" if cls is optim.LBFGS else (cls.__self__ if cls == optim.SGMCMC.sgld else cls).__name__
    options = {} if cls is optim.LBFGS else {"nbeta": 2.0}
    for given in ([p, q, p], {"embed": p, "head": p}):
        with pytest.raises(ValueError, match=f"^{name} takes each parameter once, but 'p' stands in its group more th"):
            cls(given, **options)
    chain = cls([p, q], **options)
    before = len(chain.param_groups)
    if cls is not optim.LBFGS:
        with pytest.raises(ValueError, match=r"but 'params\[0\]' stands"):
            chain.add_param_group({"params": [optim.Parameter(2.0)] * 2})
    assert len(chain.param_groups) == before
    p.grad, q.grad = jnp.ones(2), jnp.ones(1)
    chain.param_groups[0]["params"].append(p)
    with pytest.raises(ValueError, match=f"{name} takes each parameter once, but 'p'"):
        chain.step(closure=lambda: jnp.zeros(()))
    chain.param_groups[0]["params"].pop()
    chain.step(closure=lambda: jnp.zeros(()))
    assert not jnp.array_equal(p.value, jnp.array([1.0, 2.0]))


def test_a_sampler_of_ones_own():
    with pytest.raises(TypeError, match=r"Write `class Wrong\(optim.Sampler\):`"):
        type("Wrong", (optim.Optimizer,), {"rule": rules.SGLD})
    mine = type("Mine", (optim.Sampler,), {"rule": rules.SGHMC})(PARAMS, alpha=0.5)
    mine.step(PARAMS)
    assert mine.param_groups[0]["alpha"] == 0.5
