"""The samplers' rules: against devinterp and against the papers on the same noise, and what a sampler does in JAX."""

import functools
import re
import warnings
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from devinterp.optim import sgld as parent_sgld
from devinterp.optim import sgnht as parent_sgnht
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxoptim
from comparisons import assert_same
from jaxoptim import checkpoint, rules
from jaxoptim.rules._components import COMPONENTS
from parity import TORCH_DTYPES, rms_error
from test_parity import CHANCE

STEPS = 300
SHAPES = ((6, 4), (3, 4), (4,))
WIDE = ((48, 40), (600,))
FLOAT32 = 3e-7
"""What float32 scalars may differ by that were summed in another order, relative to the largest."""
PARENTS = {rules.SGLD: parent_sgld.SGLD, rules.SGNHT: parent_sgnht.SGNHT}
SAMPLERS = {"SGLD": rules.SGLD, "PSGLD": rules.PSGLD, "SGHMC": rules.SGHMC, "SGNHT": rules.SGNHT}

of_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def problem(shapes):
    """Parameters, a part of the gradient for each step, and noise for the start and each step; exact in bfloat16."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(jnp.bfloat16).astype(np.float64)

    return tuple([normal(*steps, *shape) for shape in shapes] for steps in ((), (STEPS,), (STEPS + 1,)))


# Ours and the parents' on the same gradients and noise; what was seen after each step.


def as_updates(rule, params, grads, state, **given):
    """A step in the form of optax."""
    updates, state = jaxoptim.transformation(rule).update(grads, state, params, **given)
    return optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnames=("form", "bent"))
def scan(form, bent, rule, params, state, kicks, given):
    def body(carry, now):
        params, state = carry
        kicks, given = now
        grads = [k + jnp.tanh(p) if bent else k for k, p in zip(kicks, params, strict=True)]
        params, state = form(rule, params, grads, state, **given)
        scalars = {name: x for name, x in state.shared.items() if name != "key"}
        return (params, state), {"params": params} | state.slots | scalars

    return lax.scan(body, (params, state), (kicks, given))[1]


def run_ours(rule, shapes=SHAPES, dtype="float64", bent=True, form=jaxoptim.step, **given):
    start, kicks, noise = ([jnp.asarray(x, dtype) for x in arrays] for arrays in problem(shapes))
    state = jaxoptim.init(rule, start)
    if "momentum" in state.slots:
        momentum = [
            jnp.sqrt(rule.lr).astype(m.dtype) * x[0] for x, m in zip(noise, state.slots["momentum"], strict=True)
        ]
        state = state._replace(slots=state.slots | {"momentum": momentum})
    given["noise"] = [x[1:] for x in noise]
    seen = scan(form, bent, rule, start, state, kicks, given)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), seen)


def run_parent(cls, options, shapes=SHAPES, dtype="float64", bent=True):
    """The parent, with a group for each parameter that has a mask of its own."""
    start, kicks, noise = problem(shapes)
    options, dtype = dict(options), TORCH_DTYPES[dtype]
    groups = params = [torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in start]
    mask = options.pop("optimize_over", None)
    if isinstance(mask, list):
        groups = [
            {"params": [p]} | ({} if m is None else {"optimize_over": torch.tensor(m)})
            for p, m in zip(params, mask, strict=True)
        ]
    elif mask is not None:
        options["optimize_over"] = torch.tensor(mask)
    first = 0 if cls is parent_sgnht.SGNHT else 1
    supply = iter([x[t] for t in range(first, STEPS + 1) for x in noise])
    found = []

    def normal(mean, std, size, device, generator=None):
        return torch.tensor(next(supply), dtype=torch.promote_types(dtype, torch.float32)) * std

    def randn_like(x):
        return torch.tensor(next(supply), dtype=x.dtype)

    with mock.patch("torch.normal", normal), mock.patch("torch.randn_like", randn_like), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = cls(groups, **options)
        for t in range(STEPS):
            for param, kick in zip(params, kicks, strict=True):
                value = torch.tensor(kick[t], dtype=dtype)
                param.grad = value + torch.tanh(param.data) if bent else value
            optimizer.step()
            found.append(seen_of_parent(optimizer, params))
    return jax.tree.map(lambda *x: np.stack(x), *found)


def seen_of_parent(optimizer, params):
    seen = {"params": params}
    if getattr(optimizer, "save_noise", False):
        seen["noise"] = [x for group in optimizer.noise.values() for x in group]
    if getattr(optimizer, "save_mala_vars", False):
        seen |= {"dws": optimizer.dws, "localization_loss": torch.as_tensor(optimizer.localization_loss)}
    group = optimizer.param_groups[0]
    for name in ("noise_norm", "grad_norm", "weight_norm", "distance"):
        if name in group and group[name] is not False:
            seen[name] = sum(group[name].double() ** 2 for group in optimizer.param_groups) ** 0.5
    if "thermostat" in group:
        seen |= {"thermostat": group["thermostat"], "momentum": [optimizer.state[p]["momentum"] for p in params]}
    return jax.tree.map(lambda x: x.detach().clone().double().numpy(), seen)


def error(a, b):
    """The largest difference in any array, relative to its largest number."""
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-300), a, b)
    return max(jax.tree.leaves(errors))


METRICS = dict.fromkeys(("noise_norm", "grad_norm", "weight_norm", "distance"), True)
ROW = np.array([1.0, 0.0, 1.0, 1.0])
MASKS = [(np.arange(24).reshape(6, 4) % 3 > 0), None, np.zeros(4)]
COLUMN = [np.array([[1], [0], [1], [1], [0], [1]]), np.array([1.0]), ROW]

# Every option of devinterp 1.1.0, alone and with those that it acts upon.
SGLD = {
    "defaults": {},
    "lr": {"lr": 0.05},
    "noise_level": {"noise_level": 0.5},
    "no noise": {"noise_level": 0.0},
    "weight_decay": {"weight_decay": 0.3},
    "localization": {"localization": 2.0},
    "nbeta": {"nbeta": 30.0},
    "bounding_box_size": {"bounding_box_size": 0.2},
    "one mask": {"optimize_over": ROW},
    "masks": {"optimize_over": MASKS},
    "masks that broadcast": {"optimize_over": COLUMN},
    "save_noise": {"save_noise": True},
    "save_mala_vars": {"save_mala_vars": True},
    "noise_norm": {"noise_norm": True},
    "grad_norm": {"grad_norm": True},
    "weight_norm": {"weight_norm": True},
    "distance": {"distance": True, "localization": 2.0},
    "distance without localization": {"distance": True},
    "distance and save_mala_vars": {"distance": True, "localization": 2.0, "save_mala_vars": True},
    "metrics in a box": METRICS | {"bounding_box_size": 0.2, "localization": 2.0, "nbeta": 5.0, "lr": 0.02},
    "metrics and masks": METRICS | {"optimize_over": MASKS, "localization": 2.0, "noise_level": 0.5},
    "all but saving": METRICS
    | {"localization": 2.0, "weight_decay": 0.3, "noise_level": 0.5, "bounding_box_size": 0.3, "nbeta": 3.0},
    "saving": {
        "save_noise": True,
        "save_mala_vars": True,
        "noise_level": 0.5,
        "localization": 2.0,
        "weight_decay": 0.3,
    },
    "saving with masks": METRICS
    | {"save_noise": True, "save_mala_vars": True, "localization": 2.0, "weight_decay": 0.3, "optimize_over": MASKS},
    "all with one mask": METRICS
    | {"save_noise": True, "save_mala_vars": True, "localization": 2.0, "weight_decay": 0.3, "noise_level": 0.5}
    | {"bounding_box_size": 0.3, "nbeta": 3.0, "lr": 0.02, "optimize_over": ROW},
}
SGNHT = {
    "defaults": {},
    "lr": {"lr": 0.05},
    "diffusion_factor": {"diffusion_factor": 0.1},
    "no diffusion": {"diffusion_factor": 0.0},
    "bounding_box_size": {"bounding_box_size": 0.2},
    "nbeta": {"nbeta": 30.0},
    "all": {"lr": 0.02, "diffusion_factor": 0.05, "bounding_box_size": 0.1, "nbeta": 3.0},
}


OPTION_SETS = [
    pytest.param(rule, options, id=f"{rule.__name__}: {name}")
    for rule, table in ((rules.SGLD, SGLD), (rules.SGNHT, SGNHT))
    for name, options in table.items()
]


WATCHING = METRICS.keys() | {"save_noise", "save_mala_vars"}
"""Options that change nothing of the way."""


def moving():
    """The option sets, without those that go the way of another one and only watch more of it."""
    ways = {}
    for param in OPTION_SETS:
        rule, options = param.values
        ways.setdefault((rule, str({name: x for name, x in options.items() if name not in WATCHING})), param)
    return list(ways.values())


@pytest.mark.numbers
@pytest.mark.slow
@pytest.mark.parametrize(("rule", "options"), OPTION_SETS)
def test_float64_agrees_with_devinterp(rule, options, x64):
    ours, theirs = run_ours(rule(**options)), run_parent(PARENTS[rule], options)
    assert theirs.keys() == ours.keys() - {"initial_param"}
    for name, expected in theirs.items():
        if name == "thermostat":
            np.testing.assert_array_equal(ours[name], expected)
        else:
            assert error(ours[name], expected) < (1e-12 if isinstance(expected, list) else FLOAT32), name


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "options"), OPTION_SETS)
def test_the_optax_form_agrees_with_the_exact_form(rule, options, x64):
    ours, exact = run_ours(rule(**options), form=as_updates), run_ours(rule(**options))
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        assert error(ours[name], expected) < (1e-12 if isinstance(expected, list) else FLOAT32), name


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize(("rule", "options"), moving())
def test_low_precision_is_no_worse_than_devinterp(rule, options):
    if "optimize_over" in options:
        options = options | {"optimize_over": [np.arange(1920).reshape(48, 40) % 3 > 0, None]}
    reference = run_parent(PARENTS[rule], options, WIDE, bent=False)["params"]
    for dtype in ("float32", "bfloat16"):
        ours = run_ours(rule(**options), WIDE, dtype, bent=False)["params"]
        theirs = run_parent(PARENTS[rule], options, WIDE, dtype, bent=False)["params"]
        assert rms_error(ours, reference) <= CHANCE * rms_error(theirs, reference), dtype


# What differs from devinterp, on purpose.


def run_both(rule, options, value, grads):
    """Ours and the parent without noise, one parameter, with these gradients; both as lists of what was seen."""
    param = torch.nn.Parameter(torch.tensor(value))
    params, theirs, ours = [jnp.asarray(value)], [], []
    sampler = rule(**options)
    state = jaxoptim.init(sampler, params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = PARENTS[rule]([param], **options)
    for grad in grads:
        param.grad = None if grad is None else torch.tensor(grad)
        optimizer.step()
        theirs.append(seen_of_parent(optimizer, [param]))
        params, state = jaxoptim.step(sampler, params, [None if grad is None else jnp.asarray(grad)], state)
        ours.append({"params": params} | state.shared)
    return ours, theirs


def test_a_parameter_without_gradient_is_not_sampled():
    value = np.ones(3, np.float32)
    (ours,), (theirs,) = run_both(rules.SGLD, {"lr": 0.1}, value, [None])
    assert (ours["params"][0] == value).all()
    assert (theirs["params"][0] != value).all()


@pytest.mark.costly
@of_sampler
def test_a_missing_gradient_leaves_all_of_its_parameter_alone(sampler):
    params = {"a": jnp.ones(3), "b": jnp.ones(2), "frozen": None}
    rule = sampler()
    state = jaxoptim.init(rule, params)
    new, after = jaxoptim.step(rule, params, {"a": None, "b": jnp.ones(2), "frozen": None}, state)
    assert (new["a"] == params["a"]).all()
    assert all((after.slots[name]["a"] == slot["a"]).all() for name, slot in state.slots.items())
    assert (new["b"] != params["b"]).all()


@pytest.mark.slow
def test_a_metric_recovers_after_an_overflow():
    big = np.array([1e38, 1e38], np.float32)
    options = {"lr": 0.1, "noise_level": 0.0, "grad_norm": True, "bounding_box_size": 1.0}
    ours, theirs = run_both(rules.SGLD, options, np.zeros(2, np.float32), [big, np.array([3.0, 4.0], np.float32)])
    assert [float(seen["grad_norm"]) for seen in ours] == [np.inf, pytest.approx(0.25)]
    assert np.isnan(theirs[1]["grad_norm"])


def test_an_update_without_any_gradient_changes_nothing():
    params = [jnp.ones(3)]
    rule = rules.SGNHT()
    state = jaxoptim.init(rule, params)
    new, after = jaxoptim.step(rule, params, [None], state)
    assert_same((new, after), (params, state))
    with pytest.raises(ZeroDivisionError):
        run_both(rules.SGNHT, {}, np.ones(3, np.float32), [None])


@pytest.mark.numbers
@pytest.mark.slow
@of_sampler
def test_a_box_of_size_zero_is_no_box(sampler, x64):
    shapes = ((3,),)
    with_zero, without = run_ours(sampler(bounding_box_size=0), shapes), run_ours(sampler(), shapes)
    assert (with_zero["params"][0] == without["params"][0]).all()


@pytest.mark.numbers
@pytest.mark.slow
@of_sampler
def test_every_number_may_be_a_schedule(sampler):
    names = [name for name in ("lr", "nbeta", "localization", "diffusion_factor", "beta") if name in sampler.specs]
    schedules = {name: lambda step, i=i: 0.02 * (1 + i) / (1 + step) for i, name in enumerate(names)}
    scheduled = sampler(**schedules)
    params = [jnp.array([1.0, -2.0])]
    state = jaxoptim.init(scheduled, params)
    for t in range(3):
        now = sampler(**{name: schedule(t) for name, schedule in schedules.items()})
        expected, state_now = jaxoptim.step(now, params, params, state)
        params, state = jaxoptim.step(scheduled, params, params, state)
        assert_same((params, state), (expected, state_now))


# Against the papers, written once more on one vector of all numbers.


def gradient_of_the_potential(o, w, w0, grad):
    return o["nbeta"] * grad + o.get("weight_decay", 0) * w + o.get("localization", 0) * (w - o.get("center", w0))


def components(o, w, w0, grad, mask, rate, noise, unscaled=None):
    """The norms of the parts of a step that moves by ``-rate * force + noise``, and their products, if asked for."""
    if o.get("metrics") != "components":
        return {}
    unscaled = rate if unscaled is None else unscaled
    a, pull = rate * mask * o["nbeta"] * grad, rate * mask * o.get("localization", 0) * (w - o.get("center", w0))
    decay, n, norm = rate * mask * o.get("weight_decay", 0) * w, mask * noise, np.linalg.norm
    return {
        "scaled_grad_norm": norm(a),
        "unscaled_grad_norm": norm(unscaled * mask * o["nbeta"] * grad),
        "localization_norm": norm(pull),
        "weight_decay_norm": norm(decay),
        "scaled_noise_norm": norm(n),
        "distance_norm": norm(mask * (w - w0)),
        "grad_dot_prior": a @ (pull + decay),
        "grad_dot_noise": a @ n,
        "prior_dot_noise": (pull + decay) @ n,
    }


def into_the_box(o, w, w0):
    """The position in the box, and the sign of the momentum."""
    size, sign = o.get("bounding_box_size", np.inf), np.ones_like(w)
    if o.get("box") != "reflect":
        return np.clip(w, w0 - size, w0 + size), np.where(np.abs(w - w0) < size, 1, -1)
    while (np.abs(w - w0) > size).any():
        above, below = w > w0 + size, w < w0 - size
        sign = np.where(above | below, -sign, sign)
        w = np.where(above, 2 * (w0 + size) - w, np.where(below, 2 * (w0 - size) - w, w))
    return w, sign


def numpy_sgld(o, w, w0, memory, grad, noise, t, mask, curvature):
    drift = -o["lr"] / 2 * gradient_of_the_potential(o, w, w0, grad)
    parts = components(o, w, w0, grad, mask, o["lr"] / 2, np.sqrt(o["lr"]) * noise)
    return into_the_box(o, w + mask * (drift + np.sqrt(o["lr"]) * noise), w0)[0], parts


def numpy_sghmc(o, w, w0, memory, grad, noise, t, mask, curvature):
    lr, alpha, beta, v = o["lr"], o["alpha"], o.get("beta", 0), memory["momentum"]
    kick, noise = -lr * mask * gradient_of_the_potential(o, w, w0, grad), mask * noise
    if o.get("order") == "baoab":
        half = v + kick
        shaken = np.sqrt(lr * (1 - beta / alpha) * (1 - np.exp(-2 * alpha))) * noise
        v = np.exp(-alpha) * half + shaken
        new, rate, shaken = w + half / 2 + v / 2, lr / 2 + lr * np.exp(-alpha) / 2, shaken / 2
    else:
        shaken = np.sqrt(2 * (alpha - beta) * lr) * noise
        v = (1 - alpha) * v + kick + shaken
        new, rate = w + v, lr
    parts = components(o, w, w0, grad, mask, rate, shaken, lr)
    w, sign = into_the_box(o, new, w0)
    return w, {"momentum": v * sign, **parts}


def numpy_sgnht(o, w, w0, memory, grad, noise, t, mask, curvature):
    lr, a, v, xi = o["lr"], o["diffusion_factor"], memory["momentum"], memory["thermostat"]
    kick, noise, count = -lr * mask * gradient_of_the_potential(o, w, w0, grad), mask * noise, mask.sum()
    order = o.get("order", "kick_friction")
    if order == "badodab":
        half = v + kick
        xi = np.float32(xi + (np.sum(half**2) / count - lr) / 2)
        friction = float(xi)
        shaken = np.sqrt(lr * a * (1 - np.exp(-2 * friction)) / friction) * noise
        v = np.exp(-friction) * half + shaken
        new, rate, shaken = w + half / 2 + v / 2, lr / 2 + lr * np.exp(-friction) / 2, shaken / 2
        xi = np.float32(xi + (np.sum(v**2) / count - lr) / 2)
    else:
        shaken = np.sqrt(2 * lr * a) * noise
        keeps = 1 - float(xi)
        v = keeps * v + kick + shaken if order == "ding" else keeps * (v + kick) + shaken
        new, rate = w + v, lr if order == "ding" else keeps * lr
        xi = np.float32(xi + (np.sum(v**2) / count - lr))
    parts = components(o, w, w0, grad, mask, rate, shaken, lr)
    w, sign = into_the_box(o, new, w0)
    return w, {"momentum": v * sign, "thermostat": xi, **parts}


def numpy_psgld(o, w, w0, memory, grad, noise, t, mask, curvature):
    lr, alpha, v, last = o["lr"], o["alpha"], memory.get("square_avg", 0), o.get("frozen_after") or np.inf
    if t <= last:
        v = alpha * v + (1 - alpha) * grad**2
    corrected = v / (1 - alpha ** min(t, last)) if o.get("bias_correction") else v
    g = 1 / (o["eps"] + np.sqrt(corrected))
    drift = g * gradient_of_the_potential(o, w, w0, grad)
    if o.get("gamma") and t <= last:
        slope_of_v = 2 * (1 - alpha) * grad * curvature / (1 - alpha**t if o.get("bias_correction") else 1)
        drift -= -(g**2) * slope_of_v / (2 * np.sqrt(corrected))
    parts = components(o, w, w0, grad, mask, lr / 2 * g, np.sqrt(lr * g) * noise, lr / 2)
    w = into_the_box(o, w + mask * (-lr / 2 * drift + np.sqrt(lr * g) * noise), w0)[0]
    return w, {"square_avg": v, **parts}


PULLED = {"localization": 2.0, "weight_decay": 0.3}
SMALL = ((6, 4), (5,), ())
MEASURED = {"center": True, "metrics": "components", "optimize_over": True, **PULLED}
TWINS = {
    "SGLD in a reflecting box, all": (
        rules.SGLD,
        numpy_sgld,
        {"lr": 0.5, "bounding_box_size": 0.1, "box": "reflect"} | MEASURED,
    ),
    "SGNHT with a mask": (rules.SGNHT, numpy_sgnht, {"lr": 0.02, **MEASURED}),
    "SGNHT in a reflecting box": (
        rules.SGNHT,
        numpy_sgnht,
        {"lr": 0.02, "diffusion_factor": 0.05, "bounding_box_size": 0.03, "box": "reflect"},
    ),
    "SGNHT of Ding": (rules.SGNHT, numpy_sgnht, {"lr": 0.02, "diffusion_factor": 0.1, "order": "ding"}),
    "SGNHT of Ding, all": (
        rules.SGNHT,
        numpy_sgnht,
        {"lr": 0.02, "diffusion_factor": 0.1, "order": "ding", "bounding_box_size": 0.3} | MEASURED,
    ),
    "BADODAB": (rules.SGNHT, numpy_sgnht, {"lr": 0.02, "diffusion_factor": 0.1, "order": "badodab"}),
    "BADODAB, all": (
        rules.SGNHT,
        numpy_sgnht,
        {"lr": 0.02, "diffusion_factor": 0.1, "order": "badodab", "bounding_box_size": 0.3}
        | {"box": "reflect", **MEASURED},
    ),
    "SGHMC": (rules.SGHMC, numpy_sghmc, {"lr": 0.02, "alpha": 0.2, "beta": 0.05}),
    "SGHMC, all": (
        rules.SGHMC,
        numpy_sghmc,
        {"lr": 0.02, "alpha": 0.2, "bounding_box_size": 0.2} | MEASURED,
    ),
    "BAOAB": (rules.SGHMC, numpy_sghmc, {"lr": 0.02, "alpha": 0.2, "beta": 0.05, "order": "baoab"}),
    "BAOAB, all": (
        rules.SGHMC,
        numpy_sghmc,
        {"lr": 0.02, "alpha": 0.2, "order": "baoab", "bounding_box_size": 0.2, "box": "reflect"} | MEASURED,
    ),
    "PSGLD": (rules.PSGLD, numpy_psgld, {"lr": 0.02, "alpha": 0.9, "eps": 0.1}),
    "PSGLD with bias correction": (
        rules.PSGLD,
        numpy_psgld,
        {"lr": 0.02, "alpha": 0.9, "eps": 0.1, "bias_correction": True, "optimize_over": True, **PULLED},
    ),
    "PSGLD frozen": (
        rules.PSGLD,
        numpy_psgld,
        {"lr": 0.02, "alpha": 0.99, "eps": 0.1, "bias_correction": True, "frozen_after": 150},
    ),
    "PSGLD with its correction": (rules.PSGLD, numpy_psgld, {"lr": 0.02, "alpha": 0.8, "eps": 0.1, "gamma": True}),
    "PSGLD, all": (
        rules.PSGLD,
        numpy_psgld,
        {"lr": 0.02, "alpha": 0.8, "eps": 0.5, "gamma": True, "bias_correction": True, "frozen_after": 100}
        | {"bounding_box_size": 0.3, "box": "reflect", **MEASURED},
    ),
}
TWIN_DEFAULTS = {"nbeta": 3.0, "diffusion_factor": 0.01}
SMALL_MASKS = [(np.arange(24).reshape(6, 4) % 3 > 0), np.array([1, 0, 1, 1, 0]), None]
SMALL_CENTERS = [np.linspace(-1.0, 1.0, 24).reshape(6, 4), None, np.array(0.7)]


def joined(arrays, axes=0):
    """All numbers of a list of arrays along one axis, after that of the steps."""
    return np.concatenate([np.reshape(x, (*np.shape(x)[:axes], -1)) for x in arrays], axes)


def run_numpy(twin, o):
    start, kicks, noise = problem(SMALL)
    w0, kicks, noise, curvature = joined(start), joined(kicks, 1), joined(noise, 1), np.cos(joined(kicks, 1))
    shown = [np.ones(shape) if m is None else m for m, shape in zip(SMALL_MASKS, SMALL, strict=True)]
    mask = joined(shown).astype(float) if "optimize_over" in o else np.ones_like(w0)
    if "center" in o:
        o = o | {"center": joined([x if c is None else c for x, c in zip(start, SMALL_CENTERS, strict=True)])}
    w, found = w0, []
    memory = {"momentum": np.sqrt(o["lr"]) * noise[0], "thermostat": np.float32(o["diffusion_factor"])}
    memory = {} if twin in (numpy_sgld, numpy_psgld) else memory
    for t in range(STEPS):
        grad = kicks[t] + np.tanh(w)
        w, memory = twin(o, w, w0, memory, grad, noise[t + 1], t + 1, mask, curvature[t])
        found.append({"params": w, **memory})
    return {name: np.stack([seen[name] for seen in found]) for name in found[0]}


def run_twins(rule, twin, options):
    """Ours and the one in numpy; a mask holds its momentum at what it was, as we write it in."""
    o = TWIN_DEFAULTS | options
    fields = {name: x for name, x in o.items() if name in rule.specs or name in options}
    if "optimize_over" in options:
        fields["optimize_over"] = SMALL_MASKS
    if "center" in options:
        fields["center"] = SMALL_CENTERS
    given = {"curvature": [jnp.asarray(np.cos(x)) for x in problem(SMALL)[1]]} if o.get("gamma") else {}
    seen = run_ours(rule(**fields), SMALL, **given)
    return {name: joined(x, 1) if isinstance(x, list) else x for name, x in seen.items()}, run_numpy(twin, o)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "twin", "options"),
    TWINS.values(),
    ids=TWINS,
)
def test_float64_agrees_with_the_paper(rule, twin, options, x64):
    ours, expected = run_twins(rule, twin, options)
    assert expected.keys() == ours.keys() - {"initial_param"}
    for name, x in expected.items():
        assert error(ours[name], x) < (FLOAT32 if name in COMPONENTS else 1e-12), name


# The noise.

KEY = jax.random.key(7)
PARAMS = {"a": jnp.linspace(-1.0, 2.0, 8).reshape(4, 2), "b": jnp.linspace(1.0, 2.0, 3)}
LOSS_SCALE = jax.tree.map(lambda x: 1 + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), PARAMS)


def loss(params):
    return sum(
        jnp.sum(s * jnp.log(jnp.cosh(p))) for s, p in zip(*map(jax.tree.leaves, (LOSS_SCALE, params)), strict=True)
    )


step = jax.jit(jaxoptim.step)
grad_of = jax.jit(jax.grad(loss))


def drawn(key, t, number, shape):
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, t), number), shape)


def noise_of(key, t, params=PARAMS):
    """Small arrays are parts of one vector; large ones have their own noise, and a number that counts None too."""
    leaves, treedef = jax.tree.flatten(params, is_leaf=lambda x: x is None)
    small = [x for x in leaves if x is not None and x.size <= 16384]
    together = drawn(key, t, 2**32 - 1, (sum(x.size for x in small),))
    parts = iter(jnp.split(together, np.cumsum([x.size for x in small])[:-1]))
    noise = [
        x if x is None else next(parts).reshape(x.shape) if x.size <= 16384 else drawn(key, t, i, x.shape)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, noise)


@functools.partial(jax.jit, static_argnames="steps")
def walk(rule, params=PARAMS, steps=3, **given):
    """Parameters and state after some steps down the loss."""

    def body(carry, _):
        params, state = carry
        return jaxoptim.step(rule, params, jax.grad(loss)(params), state, **given), None

    return lax.scan(body, (params, jaxoptim.init(rule, params)), length=steps)[0]


def assert_close(a, b):
    chex.assert_tree_all_finite(b)
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.numbers
@pytest.mark.slow
@of_sampler
def test_noise_is_that_of_the_key_the_step_and_the_array(sampler):
    rule = sampler(key=KEY)
    params, state = PARAMS, jaxoptim.init(rule, PARAMS)
    if "momentum" in state.slots:
        expected = jax.tree.map(lambda x: jnp.sqrt(0.01) * x, noise_of(KEY, 0))
        assert_close(state.slots["momentum"], expected)
    for t in (1, 2, 3):
        grads = grad_of(params)
        expected, _ = step(rule, params, grads, state, noise=noise_of(KEY, t))
        params, state = step(rule, params, grads, state)
        assert_close(params, expected)
    assert_same(state.shared["key"], KEY)


@pytest.mark.slow
def test_noise_differs_between_steps_arrays_and_keys():
    params = [jnp.zeros((2, 1000)), jnp.zeros((2, 9000)), None, jnp.zeros((2, 1000)), jnp.zeros((2, 9000))]
    seen = []
    for key in (KEY, jax.random.key(8)):
        rule = rules.SGLD(save_noise=True, noise_level=0.5, key=key)
        state = jaxoptim.init(rule, params)
        for t in (1, 2):
            _, state = step(rule, params, params, state)
            noise = state.slots["noise"]
            assert_same(noise, jax.tree.map(lambda x: x / 2, noise_of(key, t, params)))
            seen += [row[:1000] for x in noise if x is not None for row in x]
    correlation = np.corrcoef(seen) - np.eye(len(seen))
    assert np.abs(correlation).max() < 5 / np.sqrt(1000)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["key", "hash"])
def test_noise_differs_between_dtypes(impl, x64):
    params = [jnp.zeros(1000, jnp.float32), jnp.zeros(1000, jnp.float64)]
    rule = rules.SGLD(lr=1.0, key=KEY, noise_impl=impl)
    new, _ = step(rule, params, params, jaxoptim.init(rule, params))
    assert abs(np.corrcoef(new)[0, 1]) < 5 / np.sqrt(1000)


def test_without_a_key_it_is_that_of_seed_zero():
    assert_same(jaxoptim.init(rules.SGLD(), PARAMS).shared["key"], jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_any_implementation(impl):
    params = [jnp.zeros(5)]
    key = jax.random.key(1, impl=impl)
    rule = rules.SGLD(lr=1.0, key=key)
    new, _ = step(rule, params, params, jaxoptim.init(rule, params))
    assert_close(new, noise_of(key, 1, params))


@pytest.mark.slow
def test_noise_by_hash_is_other_noise():
    params, seen = [jnp.zeros(5)], []
    for impl in ("key", "hash"):
        rule = rules.SGLD(noise_impl=impl, key=KEY)
        seen.append(step(rule, params, params, jaxoptim.init(rule, params))[0][0])
    assert (seen[0] != seen[1]).all()


@pytest.mark.numbers
@pytest.mark.slow
@of_sampler
def test_low_precision_parameters_have_noise_of_full_precision(sampler):
    params = [jnp.ones(8, jnp.bfloat16)]
    rule = sampler(key=KEY)
    state = jaxoptim.init(rule, params)
    assert all(slot[0].dtype == jnp.float32 for slot in state.slots.values())
    exact, _ = step(rule, [params[0].astype(jnp.float32)], [jnp.zeros(8)], state)
    new, _ = step(rule, params, [jnp.zeros(8, jnp.bfloat16)], state)
    assert_same(new, [exact[0].astype(jnp.bfloat16)])


@pytest.mark.slow
@of_sampler
def test_complex_parameters_are_pairs_of_real_ones(sampler):
    rule = sampler(key=KEY, bounding_box_size=0.1, localization=2.0, weight_decay=0.5, lr=0.05)
    masked = rule.replace(optimize_over=[jnp.array([1.0, 0.0, 1.0])])
    pairs_masked = rule.replace(optimize_over=[jnp.array([[1.0], [0.0], [1.0]])])
    c = jnp.array([2j, 1 + 0j, -1 + 3j])
    centered, pairs_centered = (
        masked.replace(center=[c]),
        pairs_masked.replace(center=[jnp.stack([c.real, c.imag], -1)]),
    )
    for of_complex, of_pairs in ((rule, rule), (masked, pairs_masked), (centered, pairs_centered)):
        params, pairs = [jnp.array([1 + 2j, 3 - 1j, -1j])], [jnp.array([[1.0, 2.0], [3.0, -1.0], [0.0, -1.0]])]
        state, state_of_pairs = jaxoptim.init(of_complex, params), jaxoptim.init(of_pairs, pairs)
        for _ in range(2):
            params, state = step(of_complex, params, params, state)
            pairs, state_of_pairs = step(of_pairs, pairs, pairs, state_of_pairs)
        assert_close([jnp.stack([params[0].real, params[0].imag], -1)], pairs)
    params = [jnp.zeros(2, jnp.complex64)]
    given = [jnp.array([1 + 2j, 3 - 1j])]
    new, _ = step(rules.SGLD(lr=1.0), params, params, jaxoptim.init(rules.SGLD(), params), noise=given)
    assert_close(new, given)


# The metrics that tell what moves the parameters.


@pytest.mark.slow
def test_scaled_metrics_are_the_norms_of_what_moves():
    mask = {"a": jnp.array([1.0, 0.0]), "b": None}
    options = {"lr": 0.3, "nbeta": 2.0, "noise_level": 0.5, "localization": 3.0, "bounding_box_size": 0.4}
    rule = rules.SGLD(metrics="scaled", save_mala_vars=True, optimize_over=mask, key=KEY, **METRICS, **options)
    noise = noise_of(KEY, 3)
    before, state = walk(rule, steps=2, noise=noise)
    grads = grad_of(before)
    after, state = step(rule, before, grads, state, noise=noise)
    free = [np.broadcast_to(m, x.shape) for m, x in zip([mask["a"], 1], jax.tree.leaves(PARAMS), strict=True)]

    def norm(tree, masked=True):
        leaves = [x * (m if masked else 1) for x, m in zip(jax.tree.leaves(tree), free, strict=True)]
        return float(np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in leaves)))

    away = norm(jax.tree.map(jnp.subtract, before, PARAMS))
    expected = {
        "noise_norm": np.sqrt(0.3) * 0.5 * norm(noise),
        "grad_norm": 0.3 / 2 * 2.0 * norm(grads),
        "weight_norm": norm(after, masked=False),
        "distance": away,
        "localization_loss": 3.0 / 2 * away**2,
    }
    assert state.shared.keys() == expected.keys() | {"key"}
    for name, x in expected.items():
        assert float(state.shared[name]) == pytest.approx(x, rel=1e-5), name
        assert state.shared[name].dtype == jnp.float32


# The parts of a step.


def friction_before(rule, state, count):
    """The friction that acted in the step of BADODAB that led to a state."""
    excess = np.sum(np.square(state.slots["momentum"])) / count - float(rule.lr)
    return float(state.shared["thermostat"]) - excess / 2


KEPT = {
    "SGLD": (rules.SGLD(lr=0.3, noise_level=0.5), lambda rule, before, after: 0),
    "PSGLD": (rules.PSGLD(lr=0.3), lambda rule, before, after: 0),
    "Euler": (rules.SGHMC(lr=0.1, alpha=0.4, beta=0.1), lambda rule, before, after: 0.6),
    "BAOAB": (rules.SGHMC(lr=0.1, alpha=0.4, order="baoab"), lambda rule, before, after: (1 + np.exp(-0.4)) / 2),
    "kick and friction": (
        rules.SGNHT(lr=0.1, diffusion_factor=0.25),
        lambda rule, before, after: 1 - float(before.shared["thermostat"]),
    ),
    "Ding": (
        rules.SGNHT(lr=0.1, diffusion_factor=0.25, order="ding"),
        lambda rule, before, after: 1 - float(before.shared["thermostat"]),
    ),
    "BADODAB": (
        rules.SGNHT(lr=0.1, diffusion_factor=0.25, order="badodab"),
        lambda rule, before, after: (1 + np.exp(-friction_before(rule, after, 4))) / 2,
    ),
}
ALONE = {
    "gradient": "scaled_grad_norm",
    "localization": "localization_norm",
    "weight_decay": "weight_decay_norm",
    "noise": "scaled_noise_norm",
}


@pytest.mark.costly
@pytest.mark.parametrize(("rule", "kept"), KEPT.values(), ids=KEPT)
def test_the_parts_of_a_step_sum_to_it(rule, kept, x64):
    """Each alone is the whole but for the momentum there was, and so are all together, with the products."""
    mask, start = np.array([1.0, 1.0, 0.0, 1.0, 1.0]), np.linspace(-1.0, 2.0, 5)
    rule = rule.replace(
        nbeta=3.0, metrics="components", optimize_over=[mask], center=[np.full(5, -0.5)],
        localization=jnp.array(2.0), weight_decay=jnp.array(0.5),
    )  # fmt: skip
    state = jaxoptim.init(rule, [jnp.asarray(start)])
    if "momentum" in state.slots:
        state = state._replace(slots=state.slots | {"momentum": [jnp.asarray(mask * np.linspace(0.3, -0.2, 5))]})
    for on in (*ALONE, "together"):
        of = rule.replace(
            localization=jnp.array(2.0 * (on in ("localization", "together"))),
            weight_decay=jnp.array(0.5 * (on == "weight_decay")),
        )
        grad, noise = (
            x * (on in (name, "together"))
            for name, x in (("gradient", np.cos(3 * start)), ("noise", np.sin(5 * start)))
        )
        (new,), after = step(of, [jnp.asarray(start)], [jnp.asarray(grad)], state, noise=[jnp.asarray(noise)])
        momentum = np.asarray(state.slots["momentum"][0]) if "momentum" in state.slots else 0
        size = np.linalg.norm(new - start - kept(of, state, after) * momentum)
        a, _, pull, decay, n, away, with_prior, with_noise, of_prior = (float(after.shared[x]) for x in COMPONENTS)
        together = a**2 + pull**2 + decay**2 + n**2 + 2 * (with_prior - with_noise - of_prior)
        assert together == pytest.approx(size**2, rel=1e-6)
        assert away == 0
        if on in ALONE:
            assert [name for name, x in zip(COMPONENTS, (a, 0, pull, decay, n), strict=False) if x] == [ALONE[on]]
    assert min(abs(x) for x in (with_prior, with_noise, of_prior)) > 0.01 * size**2


# What JAX does with it.


@pytest.mark.slow
@of_sampler
def test_vmap_over_keys_and_over_rates_equals_a_loop(sampler):
    keys, rates = jax.random.split(KEY, 2), jnp.array([0.01, 0.03])

    def train(key, lr):
        return walk(sampler(key=key, lr=lr))[0]

    many = jax.jit(jax.vmap(jax.vmap(train, (None, 0)), (0, None)))(keys, rates)
    for i in range(2):
        for j in range(2):
            one = jax.tree.map(lambda x, i=i, j=j: x[i, j], many)
            assert_close(one, walk(sampler(key=keys[i], lr=0.01 if j == 0 else 0.03))[0])


@pytest.mark.slow
def test_vmap_over_a_rule():
    swept = jax.vmap(lambda rule: walk(rule)[0])(jax.vmap(rules.SGLD)(jnp.array([0.01, 0.03])))
    assert_close(jax.tree.map(lambda x: x[1], swept), walk(rules.SGLD(lr=0.03))[0])


@pytest.mark.slow
@of_sampler
def test_changing_any_number_or_the_key_compiles_nothing_new(sampler):
    compiled = []

    @jax.jit
    def counted(rule, params, grads, state):
        compiled.append(rule)
        return jaxoptim.step(rule, params, grads, state)

    coefficients = {"localization": 1.0, "weight_decay": 0.1, "bounding_box_size": 0.5, "lr": 0.01, "nbeta": 2.0}
    more = {"noise_level": 0.5, "diffusion_factor": 0.1, "alpha": 0.5, "beta": 0.01, "eps": 0.2}
    numbers = coefficients | {name: x for name, x in more.items() if name in sampler.specs}
    assert numbers.keys() == sampler.specs.keys() - {"optimize_over", "key", "center"}
    rule = sampler(key=KEY, center=PARAMS, **numbers)
    state = jaxoptim.init(rule, PARAMS)
    for factor in (1, 0.5, np.float32(0.25)):
        center = jax.tree.map(lambda x, factor=factor: factor * x, PARAMS)
        changed = sampler(key=jax.random.key(3), center=center, **{name: x * factor for name, x in numbers.items()})
        counted(changed, PARAMS, PARAMS, state)
    counted(sampler(key=KEY, center=PARAMS, **(numbers | {"lr": 1})), PARAMS, PARAMS, state)
    assert len(compiled) == 1


@pytest.mark.numbers
@pytest.mark.slow
@of_sampler
def test_packed_parameters_have_the_same_numbers(sampler):
    rule = sampler(key=KEY, localization=1.0)
    packed, state = jaxoptim.pack(PARAMS), jaxoptim.init(rule, jaxoptim.pack(PARAMS))
    for t in range(2):
        grads = grad_of(packed.unpack())
        given = {} if t else {"noise": packed.pack(noise_of(KEY, 1))}
        packed, state = step(rule, packed, packed.pack(grads) if t else grads, state, **given)
    params, expected = walk(rule, steps=2)
    assert_close(packed.unpack(), params)
    assert_same(state.shared, expected.shared)
    assert_close(state._replace(shared={}), expected._replace(shared={}))


@pytest.mark.slow
@of_sampler
def test_derivatives_by_the_numbers_are_finite_differences(sampler, x64):
    params, noise = (jax.tree.map(lambda x: x.astype(float), x) for x in (PARAMS, noise_of(KEY, 1)))

    def final(rule):
        return loss(walk(rule, params, steps, noise=noise)[0])

    # The thermostat is kept in float32, a staircase in what it depends on: one step, of numbers that float32 has.
    steps, h = 1 if sampler is rules.SGNHT else 3, 2**-13
    rule = sampler(lr=0.02, localization=1.0, weight_decay=0.2)
    if sampler is rules.SGNHT:
        rule = rule.replace(diffusion_factor=0.25)
    derivative = jax.jit(jax.grad(final))(rule)
    for name in rule.specs.keys() & {"lr", "nbeta", "localization", "weight_decay", "noise_level", "diffusion_factor"}:
        ahead, behind = (float(final(rule.replace(**{name: getattr(rule, name) + sign * h}))) for sign in (1, -1))
        assert float(getattr(derivative, name)) == pytest.approx((ahead - behind) / (2 * h), rel=1e-5, abs=1e-6), name


@pytest.mark.slow
@of_sampler
def test_derivatives_are_finite_where_a_gradient_is_zero(sampler):
    params = [jnp.zeros(3)]

    def final(rule):
        new, _ = jaxoptim.step(rule, params, params, jaxoptim.init(rule, params), noise=[jnp.arange(3.0)])
        return jnp.sum(new[0])

    chex.assert_tree_all_finite(jax.grad(final)(sampler()))


@pytest.mark.slow
@of_sampler
def test_it_composes_with_optax(sampler):
    factory = getattr(jaxoptim, sampler.__name__.lower())
    rule, tx = sampler(lr=0.05, key=KEY), factory(lr=0.05, key=KEY)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    grads, noise = grad_of(PARAMS), noise_of(KEY, 1)
    clipped = jax.tree.map(lambda g: jnp.clip(g, -1, 1), grads)
    expected, _ = step(rule, PARAMS, clipped, jaxoptim.init(rule, PARAMS))

    chain = optax.chain(optax.clip(1.0), tx)
    for given in ({}, {"noise": noise}):
        updates, _ = jax.jit(chain.update)(grads, chain.init(PARAMS), PARAMS, value=0.0, **given)
        assert_close(optax.apply_updates(PARAMS, updates), expected)

    held = optax.masked(optax.set_to_zero(), {"a": True, "b": False})
    masked = optax.chain(optax.masked(tx, {"a": False, "b": True}), held)
    parted = optax.partition({"moves": tx, "held": optax.set_to_zero()}, {"a": "held", "b": "moves"})
    inner, of_inner = {"b": PARAMS["b"]}, {"b": grads["b"]}
    alone, _ = step(rule, inner, of_inner, jaxoptim.init(rule, inner))
    for composed in (masked, parted):
        updates, _ = composed.update(grads, composed.init(PARAMS), PARAMS)
        assert_close(optax.apply_updates(PARAMS, updates), {"a": PARAMS["a"], **alone})


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis_type",
    [
        pytest.param(AxisType.Auto, id="automatic"),
        pytest.param(AxisType.Explicit, id="explicit"),
    ],
)
@of_sampler
def test_sharded_parameters_have_the_same_numbers(sampler, axis_type):
    rule = sampler(key=KEY, bounding_box_size=0.5, optimize_over=jnp.array([1.0, 0.0, 1.0, 1.0]))
    params = {"w": jnp.linspace(-1.0, 2.0, 32).reshape(8, 4)}
    state = jaxoptim.init(rule, params)
    expected = step(rule, *step(rule, params, params, state)[:1], params, state)[0]
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    sharding = NamedSharding(mesh, P("x", "y"))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding)
        state = jaxoptim.init(rule, params)
        new, after = step(rule, *step(rule, params, params, state)[:1], params, state)
    for x in (new["w"], *(slot["w"] for slot in after.slots.values()), *(slot["w"] for slot in state.slots.values())):
        assert x.sharding.is_equivalent_to(sharding, 2)
    assert_close(new, expected)


@pytest.mark.numbers
@pytest.mark.slow
@of_sampler
def test_a_saved_state_continues_to_the_last_bit(sampler, tmp_path):
    rule = sampler(key=KEY, **(METRICS if sampler is rules.SGLD else {}))
    params, state = walk(rule, steps=2)
    checkpoint.save(tmp_path / "state", {"params": params, "state": state})
    like = {"params": PARAMS, "state": jaxoptim.init(rule, PARAMS)}
    loaded = checkpoint.load(tmp_path / "state", like=like)
    assert_same(loaded, {"params": params, "state": state})
    grads = grad_of(params)
    assert_same(step(rule, loaded["params"], grads, loaded["state"]), step(rule, params, grads, state))


@pytest.mark.parametrize(
    "sampler",
    [pytest.param(x, id=n, marks=[] if n == "SGNHT" else pytest.mark.slow) for n, x in SAMPLERS.items()],
)
def test_donated_states_leave_the_key_of_the_rule_alone(sampler):
    key = jax.random.key(11)
    rule, params = sampler(key=key), jax.tree.map(jnp.copy, PARAMS)
    state = jaxoptim.init(rule, params)
    donating = jax.jit(jaxoptim.step, donate_argnums=(1, 3))
    for _ in range(2):
        params, state = donating(rule, params, PARAMS, state)
    assert not key.is_deleted()
    assert_same(jaxoptim.init(rule, PARAMS).shared["key"], jax.random.key(11))


def test_shapes_alone_are_enough_for_a_state():
    for rule in (rules.SGNHT(key=KEY), rules.SGLD(save_noise=True, noise_norm=True)):
        shapes = jax.eval_shape(lambda params, rule=rule: jaxoptim.init(rule, params), PARAMS)
        state = jaxoptim.init(rule, PARAMS)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


# The errors.

RANGES = [
    *(
        (sampler, name, -1.0)
        for sampler in SAMPLERS.values()
        for name in ("lr", "nbeta", "weight_decay", "localization")
    ),
    *((sampler, "bounding_box_size", -0.5) for sampler in SAMPLERS.values()),
    (rules.SGLD, "noise_level", -1.0),
    (rules.SGLD, "lr", float("nan")),
    (rules.SGNHT, "diffusion_factor", -0.1),
    (rules.SGHMC, "alpha", 0.0),
    (rules.SGHMC, "beta", -0.1),
    (rules.PSGLD, "alpha", 1.0),
    (rules.PSGLD, "eps", 0.0),
]


@pytest.mark.parametrize(("sampler", "name", "value"), RANGES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_numbers_out_of_range(sampler, name, value):
    allowed = f"{sampler.__name__} takes {name} (>|>=) 0"
    with pytest.raises(ValueError, match=rf"Invalid {name}: {re.escape(repr(value))}\. {allowed}"):
        sampler(**{name: value})
    with pytest.raises(TypeError, match=f"Invalid {name}: 'x'"):
        sampler(**{name: "x"})


CHOICES = [
    *((sampler, "box", "'clamp' or 'reflect'") for sampler in SAMPLERS.values()),
    *((sampler, "metrics", "None or 'components'") for sampler in SAMPLERS.values() if sampler is not rules.SGLD),
    (rules.SGLD, "metrics", "'devinterp' or 'scaled' or 'components'"),
    (rules.SGNHT, "order", "'kick_friction'.*'ding'.*'badodab'"),
    (rules.SGHMC, "order", "'euler' or 'baoab'"),
]


@pytest.mark.parametrize(("sampler", "name", "allowed"), CHOICES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_unknown_choices(sampler, name, allowed):
    with pytest.raises(ValueError, match=f"Invalid {name}: 'other'. {sampler.__name__} takes {allowed}"):
        sampler(**{name: "other"})


@of_sampler
def test_unknown_implementation_of_noise(sampler):
    with pytest.raises(ValueError, match="Invalid noise_impl: 'philox'"):
        sampler(noise_impl="philox")


@pytest.mark.parametrize("key", [np.zeros(2, np.uint32), 0], ids=["raw", "seed"])
@of_sampler
def test_keys_that_are_not_typed(sampler, key):
    with pytest.raises(TypeError, match="typed key"):
        sampler(key=key)


def test_numbers_that_are_wrong_together():
    with pytest.raises(ValueError, match=r"Invalid beta: 0\.2\. SGHMC takes beta of at most alpha, which is 0\.1"):
        rules.SGHMC(beta=0.2)
    with pytest.raises(ValueError, match=r"Invalid frozen_after: 0\. PSGLD takes an int >= 1, or None"):
        rules.PSGLD(frozen_after=0)


def test_unknown_options():
    with pytest.raises(
        TypeError, match=r"sgld\(\) got an unexpected keyword argument 'temperature'.*It takes lr, noise_level"
    ):
        jaxoptim.sgld(temperature=2.0)


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (jnp.ones(5), r"optimize_over has shape \(5,\) for 'a', .* parameter's \(4, 2\)\. Give one array"),
        ({"a": jnp.ones((4, 2)), "b": jnp.ones(2)}, r"optimize_over has shape \(2,\) for 'b'"),
        ({"a": None}, "optimize_over has nothing for 'b'"),
    ],
    ids=["one", "shape", "tree"],
)
@of_sampler
def test_masks_that_do_not_fit(sampler, mask, match):
    with pytest.raises(ValueError, match=match):
        jaxoptim.init(sampler(optimize_over=mask), PARAMS)


@of_sampler
def test_updates_that_lack_something(sampler):
    rule = sampler()
    state = jaxoptim.init(rule, PARAMS)
    with pytest.raises(ValueError, match="`params` was not given"):
        jaxoptim.update(rule, PARAMS, state)
    with pytest.raises(ValueError, match=r"noise of 'b' has shape \(2,\), but the parameter has \(3,\)"):
        jaxoptim.step(rule, PARAMS, PARAMS, state, noise=PARAMS | {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match="noise has nothing for 'b'"):
        jaxoptim.step(rule, PARAMS, PARAMS, state, noise=PARAMS | {"b": None})
    with pytest.raises(TypeError, match=f"{sampler.__name__} has no use for other: it takes noise"):
        jaxoptim.step(rule, PARAMS, PARAMS, state, other=PARAMS)
    if sampler is rules.PSGLD:
        with pytest.raises(
            ValueError, match=r"gamma=True uses the diagonal of the Hessian.* Give update\(\.\.\., curvature"
        ):
            jaxoptim.step(rule.replace(gamma=True), PARAMS, PARAMS, state)
