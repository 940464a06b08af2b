"""SVI stopped and resumed: to the last bit, with every kind of optimizer; and parameter stores of Pyro."""

import re
import subprocess
import sys
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pyro as parent
import pytest
import torch
from numpyro.contrib.module import flax_module
from numpyro.infer import Trace_ELBO, autoguide

import jaxoptim
from infer_networks import Normalised
from jaxoptim import checkpoint, optim, pyro, rules
from jaxoptim.optim import Parameter
from jaxoptim.pyro.infer import SVI
from jaxoptim.pyro.optim import multi

KEY = jax.random.key(3)
DATA = jnp.array([1.0, 2.5, 3.0])
X = jnp.linspace(-1.0, 1.0, 12).reshape(6, 2)
positive = dist.constraints.positive


def model(x, late=""):
    """A parameter of each letter of an argument comes late, with a value that is drawn."""
    z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    late = [numpyro.param(f"late_{part}", lambda key: jax.random.normal(key, (2,))) for part in late]
    with numpyro.plate("n", x.shape[0]):
        numpyro.sample("x", dist.Normal(z.sum() + sum(part.sum() for part in late), 1.0), obs=x)


def guide(x, late=""):
    loc = numpyro.param("loc", lambda key: jax.random.normal(key, (2,)))
    numpyro.sample("z", dist.Normal(loc, numpyro.param("scale", jnp.ones(2), constraint=positive)).to_event(1))


def nothing(*args, **kwargs):
    pass


def normalised(x):
    net = flax_module("net", Normalised(), input_shape=(1, 2), mutable=["batch_stats"])
    with numpyro.plate("n", x.shape[0]):
        numpyro.sample("y", dist.Normal(net(x), 0.1), obs=x[:, 0])


OPTIMIZERS = {
    "by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.05 if name == "loc" else 0.01}),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9}),
    "scheduled": lambda: pyro.optim.ExponentialLR({"optimizer": optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}),
    "horovod": lambda: pyro.optim.HorovodOptimizer(pyro.optim.Adam({"lr": 0.05})),
    "rule": lambda: rules.Adam(lr=0.05),
    "transformation": lambda: jaxoptim.adam(lr=0.05),
    "optax": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.exponential_decay(0.1, 3, 0.5))),
    "sampler": lambda: rules.SGLD(lr=1e-3, key=jax.random.key(5)),
    "lbfgs": lambda: rules.LBFGS(lr=0.1, max_iter=2),
    "newton": lambda: rules.Newton({"loc": 0.2, "scale": 0.1}),
    "mixed": lambda: multi.MixedMultiOptimizer(
        [(["loc"], rules.Adam(lr=0.05)), (["scale"], pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9}))]
    ),
    "mixed by pattern": lambda: multi.MixedMultiOptimizer(
        [(re.compile("lo.*"), rules.Adam(lr=0.05)), (re.compile("(sc|la).*"), rules.SGD(lr=0.05))]
    ),
    "torch": lambda: optim.Adam({"loc": jnp.ones(2), "scale": jnp.zeros(2)}, lr=0.05),
    "torch made": lambda: lambda params: optim.Adam(params, lr=0.05),
    "torch lbfgs": lambda: lambda params: optim.LBFGS(params, lr=0.1, max_iter=2),
}
FIXED = ["newton", "mixed", "torch", "torch lbfgs"]
"""Those that are made for some parameters and no others."""
FAST_LATE = ["clipped", "rule", "torch made"]
FAST = ["clipped", "scheduled", "rule", "optax", "torch made"]


def each(names):
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in names]


def fit(optimizer, model=model, guide=guide, key=KEY, **kwargs):
    return SVI(model, guide, optimizer, Trace_ELBO(), key=key, **kwargs)


def another(kind, **kwargs):
    """An SVI as another process makes it."""
    return fit(OPTIMIZERS[kind](), key=jax.random.key(8), **kwargs)


def advance(svi, calls):
    """Steps, and moves of schedules."""
    losses = []
    for call in calls:
        losses.append(svi.step(*call))
        if isinstance(svi.optim, pyro.optim.PyroLRScheduler):
            svi.optim.step()
    return losses


def contents(svi):
    """All that makes a run what it is."""
    values = {name: np.asarray(param.value) for name, param in svi.params.items()}
    return values, np.asarray(jax.random.key_data(svi.key)), jax.device_get(svi.mutable_state)


def check_resumed(svi, other, path, before, after):
    """A run that is saved and goes on elsewhere is the undisturbed one."""
    advance(svi, before)
    svi.save(path)
    other.load(path)
    chex.assert_trees_all_equal(contents(other), contents(svi))
    assert advance(other, after) == advance(svi, after)
    chex.assert_trees_all_equal(contents(other), contents(svi))
    chex.assert_trees_all_equal(other.get_params(), svi.get_params())
    chex.assert_trees_all_equal(other.state_dict()["optimizer"], svi.state_dict()["optimizer"])


def calls(*lates):
    return [(DATA, late) for late in lates]


@pytest.mark.costly
@pytest.mark.numbers
@pytest.mark.parametrize("kind", each(OPTIMIZERS))
def test_a_resumed_run_is_the_undisturbed_one(kind, tmp_path):
    check_resumed(fit(OPTIMIZERS[kind]()), another(kind), tmp_path / "run", [(DATA,)] * 5, [(DATA,)] * 5)


@pytest.mark.slow
def test_runs_over_batches_that_are_drawn_go_on_where_they_were(tmp_path):
    data = jnp.arange(7.0)
    svi, other = fit(OPTIMIZERS["clipped"]()), another("clipped")
    svi.run(9, data, batch_size=2, progress_bar=False)
    svi.save(tmp_path / "run")
    other.load(tmp_path / "run")
    resumed = other.run(8, data, batch_size=2, progress_bar=False)
    np.testing.assert_array_equal(resumed, svi.run(8, data, batch_size=2, progress_bar=False))
    chex.assert_trees_all_equal(contents(other), contents(svi))


LATE = {
    "before": (["", "", "a", "", ""], ["", "b", "a", ""]),
    "with the first call": (["", "a", ""], ["ab", ""]),
    "not before others": (["", "a", ""], ["", "b", "a"]),
    "from the start": ([], ["", "a", ""]),
}


def marks(kind, case):
    """To the last bit with the compiler of users: all kinds, where the first call of the new object reaches all."""
    numbers = [pytest.mark.numbers] if case == "with the first call" else []
    return numbers if numbers and kind in FAST_LATE else [*numbers, pytest.mark.slow]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "case"),
    [pytest.param(k, case, marks=marks(k, case)) for k in OPTIMIZERS if k not in FIXED for case in LATE],
)
def test_late_parameters(kind, case, tmp_path):
    before, after = LATE[case]
    check_resumed(fit(OPTIMIZERS[kind]()), another(kind), tmp_path / "run", calls(*before), calls(*after))


@pytest.mark.slow
@pytest.mark.parametrize("kind", each(OPTIMIZERS))
def test_a_run_that_was_only_evaluated(kind, tmp_path):
    svi = fit(OPTIMIZERS[kind]())
    svi.evaluate_loss(DATA)
    check_resumed(svi, another(kind), tmp_path / "run", [], [(DATA,)] * 2)


@pytest.mark.slow
def test_a_loaded_run_can_be_saved_again(tmp_path):
    svi, other, third = fit(OPTIMIZERS["rule"]()), another("rule"), another("rule")
    advance(svi, calls("", "a"))
    svi.save(tmp_path / "run")
    other.load(tmp_path / "run")
    chex.assert_trees_all_equal(other.state_dict(), svi.state_dict())
    check_resumed(other, third, tmp_path / "again", calls(""), calls("", "b", "a"))


@pytest.mark.slow
def test_constrained_values_are_there_at_once(tmp_path):
    svi, other = fit(OPTIMIZERS["rule"]()), another("rule")
    advance(svi, calls("", "a"))
    svi.save(tmp_path / "run")
    other.load(tmp_path / "run")
    chex.assert_trees_all_equal(other.get_params(), svi.get_params())
    other.step(DATA)
    assert sorted(other.get_params()) == ["late_a", "loc", "scale"]
    again = another("rule")
    again.load(tmp_path / "run")
    again.params["scale"].value = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"'scale' has changed since it was loaded.* Call evaluate_loss"):
        again.get_params()
    again.evaluate_loss(DATA)
    np.testing.assert_array_equal(again.get_params()["scale"], [1.0, 1.0])


@pytest.mark.slow
def test_a_state_stays_as_it_was():
    for kind in ("rule", "clipped", "torch made"):
        svi = fit(OPTIMIZERS[kind]())
        advance(svi, [(DATA,)] * 2)
        state = svi.state_dict()
        before = jax.device_get({name: state[name] for name in ("params", "optimizer")})
        advance(svi, [(DATA,)] * 2)
        chex.assert_trees_all_equal(jax.device_get({name: state[name] for name in before}), before)


@pytest.mark.slow
def test_a_run_goes_back_to_what_was_saved():
    for kind in ("rule", "clipped", "scheduled", "torch made", "mixed"):
        svi = fit(OPTIMIZERS[kind]())
        svi.evaluate_loss(DATA)
        first, expected = svi.state_dict(), advance(svi, [(DATA,)] * 3)
        second = svi.state_dict()
        last = advance(svi, [(DATA,)] * 2)
        svi.load_state_dict(second)
        assert advance(svi, [(DATA,)] * 2) == last
        svi.load_state_dict(first)
        assert advance(svi, [(DATA,)] * 3) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", [KEY, jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")], ids=["typed", "raw", "rbg"]
)
def test_keys(key, tmp_path):
    svi, other = fit(OPTIMIZERS["rule"](), key=key), another("rule")
    check_resumed(svi, other, tmp_path / "run", [(DATA,)], [(DATA,)])
    assert other.key.dtype == svi.key.dtype


@pytest.mark.slow
def test_batch_normalisation(tmp_path):
    svi, other = (fit(rules.SGD(lr=1e-4, momentum=0.9), normalised, nothing) for _ in range(2))
    check_resumed(svi, other, tmp_path / "run", [(X,)] * 3, [(X[:4],), (X,)])
    state = svi.state_dict()
    svi.step(X)
    svi.load_state_dict(state)
    chex.assert_trees_all_equal(svi.mutable_state, state["mutable_state"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AutoNormal", "AutoMultivariateNormal"])
def test_automatic_guides(kind, tmp_path):
    svi, other = (fit(rules.Adam(lr=0.05), guide=getattr(autoguide, kind)(model)) for _ in range(2))
    check_resumed(svi, other, tmp_path / "run", calls("", ""), calls("a", ""))


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
import test_infer_saved as cases
svi = cases.another("rule")
svi.load({path!r})
losses = cases.advance(svi, cases.calls("ab", ""))
np.savez({path!r}, losses=losses, **{{name: param.value for name, param in svi.params.items()}})
"""


@pytest.mark.slow
def test_another_process(tmp_path):
    svi, path = fit(OPTIMIZERS["rule"]()), tmp_path / "run"
    advance(svi, calls("", "a"))
    svi.save(path)
    tests = __file__.rpartition("/")[0]
    subprocess.run([sys.executable, "-c", SCRIPT.format(tests=tests, path=str(path))], check=True, timeout=300)
    found = np.load(f"{path}.npz")
    np.testing.assert_array_equal(found["losses"], np.array(advance(svi, calls("ab", ""))))
    for name, param in svi.params.items():
        np.testing.assert_array_equal(found[name], param.value)


# Several SVIs.


def auxiliary(x, late=""):
    numpyro.sample("label", dist.Normal(numpyro.param("loc", jnp.zeros(2)).sum(), numpyro.param("width", 1.0)), obs=4.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", each(["clipped", "rule", "optax", "torch made"]))
def test_shared_parameters(kind, tmp_path):
    def pair():
        first = fit(OPTIMIZERS[kind]())
        return first, fit(first.optim, auxiliary, nothing, params=first.params)

    def alternate(fits):
        return [svi.step(DATA) for _ in range(2) for svi in fits]

    old, new = pair(), pair()
    alternate(old)
    for number, svi in enumerate(old):
        svi.save(tmp_path / str(number))
    for number, svi in enumerate(new):
        svi.load(tmp_path / str(number))
    assert new[0].params is new[1].params
    assert alternate(new) == alternate(old)
    for one, other in zip(old, new, strict=True):
        chex.assert_trees_all_equal(contents(one), contents(other))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clipped", "scheduled", "mixed"])
def test_two_fits_of_one_optimizer_are_saved_apart(kind, tmp_path):
    """The optimizer has the state of the fit that came last; that of the other is put aside."""
    one, other = fit(optimizer := OPTIMIZERS[kind]()), fit(optimizer, key=jax.random.key(4))
    twin = fit(OPTIMIZERS[kind]())
    for svi in (one, twin):
        svi.step(DATA)
    other.step(DATA), other.step(DATA)
    resumed = another(kind)
    resumed.load_state_dict(one.state_dict())
    assert advance(resumed, [(DATA,)] * 2) == advance(twin, [(DATA,)] * 2)
    chex.assert_tree_all_finite([other.step(DATA), one.step(DATA)])


def test_parameters_put_in_are_saved_before_the_first_call(tmp_path):
    svi, other = fit(rules.SGD(lr=0.1)), fit(rules.SGD(lr=0.1))
    svi.params["loc"] = Parameter(jnp.array([3.0, 4.0]), "loc")
    check_resumed(svi, other, tmp_path / "run", [], [(DATA,)] * 2)


@pytest.mark.slow
def test_a_torch_style_optimizer_and_a_function_that_makes_one(tmp_path):
    svi, other = fit(OPTIMIZERS["torch"]()), another("torch made")
    svi.step(DATA)
    svi.save(tmp_path / "run")
    other.load(tmp_path / "run")
    assert other.step(DATA) == svi.step(DATA)
    back = another("torch")
    back.load_state_dict(other.state_dict())
    assert back.params["loc"] is jax.tree.leaves(back.optim._storage.forest)[0]
    assert back.step(DATA) == other.step(DATA)


def test_the_optimizer_is_the_one_that_was_given():
    for make in OPTIMIZERS.values():
        optimizer = make()
        assert fit(optimizer).optim is optimizer


# Optimizers of the user's own.


class Momentum(multi.MultiOptimizer):
    def __init__(self):
        self.velocity = {}

    def get_step(self, loss_fn, params, *args):
        values = {name: param.value for name, param in params.items()}
        grads = jax.grad(loss_fn)(values, *args)
        self.velocity = {name: 0.9 * self.velocity.get(name, 0.0) + grad for name, grad in grads.items()}
        return {name: values[name] - 0.01 * self.velocity[name] for name in values}


class Saved(Momentum):
    def state_dict(self, params):
        return {"velocity": {name: self.velocity[name] for name in params if name in self.velocity}}

    def load_state_dict(self, state_dict, params):
        self.velocity = dict(state_dict["velocity"])


@pytest.mark.slow
def test_an_optimizer_of_ones_own(tmp_path):
    check_resumed(fit(Saved()), fit(Saved()), tmp_path / "run", [(DATA,)] * 2, [(DATA,)] * 2)

    def mixed():
        return multi.MixedMultiOptimizer([(["loc"], Saved()), (["scale"], rules.Adam(lr=0.05))])

    check_resumed(fit(mixed()), fit(mixed()), tmp_path / "mixed", [(DATA,)] * 2, [(DATA,)] * 2)
    svi = fit(Momentum())
    svi.step(DATA)
    with pytest.raises(ValueError, match=r"but Momentum keeps none\. Define state_dict\(params\) and load_state_dict"):
        fit(Momentum()).load_state_dict(fit(rules.Adam()).state_dict())


# What does not fit.


def renamed(x, late=""):
    loc = numpyro.param("location", jnp.zeros(2))
    numpyro.sample("z", dist.Normal(loc, numpyro.param("scale", jnp.ones(2), constraint=positive)).to_event(1))


def longer(x, late=""):
    loc = numpyro.param("loc", jnp.zeros(3))[:2]
    numpyro.sample("z", dist.Normal(loc, numpyro.param("scale", jnp.ones(2), constraint=positive)).to_event(1))


def saved(kind="rule", *lates):
    svi = fit(OPTIMIZERS[kind]())
    advance(svi, calls("", *lates))
    return svi.state_dict()


def without(name):
    state = saved()
    del state[name]
    return state


def twisted(*path, to):
    """A state in which one entry is something else."""
    state = inside = saved("mixed" if "parts" in path else "rule")
    for name in path[:-1]:
        inside[name] = type(inside[name])(inside[name])
        inside = inside[name]
    inside[path[-1]] = to
    return state


REFUSED = {
    "no dict": (lambda: 3, "rule", TypeError, r"load_state_dict takes what svi\.state_dict\(\) gave, .*got int"),
    "another dict": (lambda: {"w": 1.0}, "rule", ValueError, "lacks 'params'"),
    "no key": (lambda: without("key"), "rule", ValueError, "lacks 'key'"),
    "wrong key": (lambda: twisted("key", to=3), "rule", TypeError, "JAX key"),
    "name": (lambda: saved("rule", "a"), "rule", KeyError, "has 'late_a', .* of this SVI are 'loc', 'scale'.*new SVI"),
    "fewer": (lambda: twisted("params", to={"loc": jnp.ones(2)}), "rule", KeyError, "lacks 'scale'"),
    "shape": (lambda: twisted("params", "loc", to=jnp.ones(3)), "rule", ValueError, r"'loc' of shape \(3,\), .*\(2,\)"),
    "kind": (saved, "clipped", ValueError, "is of a rule or a transformation, but this .* a Pyro-style optimizer"),
    "kind of part": (
        lambda: twisted("optimizer", "parts", 0, to={"kind": "Newton's method", "names": []}),
        "mixed",
        ValueError,
        "Newton",
    ),
    "part": (lambda: twisted("optimizer", "parts", to=[]), "mixed", ValueError, "has 0 parts, but this one has 2"),
    "later part": (
        lambda: twisted("optimizer", "parts", 1, "state", "scale", to={"state": {}}),
        "mixed",
        KeyError,
        "'scale' does not fit",
    ),
    "slots": (lambda: saved("rule"), "optax", ValueError, r"lacks \[1\]\[0\]\.count, which this optimizer has"),
    "no schedule": (lambda: saved("clipped"), "scheduled", ValueError, "'loc' has no 'scheduler'"),
    "schedule": (lambda: saved("scheduled"), "clipped", ValueError, "'loc' is of a PyroLRScheduler"),
    "options": (lambda: saved("torch lbfgs"), "torch made", ValueError, "LBFGS"),
    "mutable": (lambda: twisted("mutable_state", to={"net": {}}), "rule", KeyError, "has the mutable site 'net'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_states_that_do_not_fit(case):
    make, kind, error, words = REFUSED[case]
    state, svi, twin = make(), fit(OPTIMIZERS[kind]()), fit(OPTIMIZERS[kind]())
    for each in (svi, twin):
        advance(each, [(DATA,)] * 2)
    before = contents(svi)
    with pytest.raises(error, match=words) as caught:
        svi.load_state_dict(state)
    assert "\n" not in str(caught.value)
    chex.assert_trees_all_equal(contents(svi), before)
    assert advance(svi, [(DATA,)] * 2) == advance(twin, [(DATA,)] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clipped", "scheduled"])
@pytest.mark.parametrize("evaluated", [False, True], ids=["known", "new"])
def test_a_part_that_was_loaded_is_taken_back(kind, evaluated):
    """The second part does not fit, the first does: a Pyro-style optimizer whose state or parameters are others."""

    def make():
        parts = [(["loc", "scale"], OPTIMIZERS[kind]()), ([], rules.Adam())]
        return fit(multi.MixedMultiOptimizer(parts)), parts[0][1]

    (svi, of_svi), (twin, of_twin) = make(), make()
    svi.step(DATA), of_svi.step() if kind == "scheduled" else None
    state = svi.state_dict()
    state["optimizer"]["parts"][1] = saved("clipped")["optimizer"]
    (svi, of_svi) = make()
    for each, optimizer in ((svi, of_svi), (twin, of_twin)):
        if evaluated:
            each.evaluate_loss(DATA)
        else:
            advance(each, [(DATA,)] * 3)
        if kind == "scheduled":
            optimizer.step()
    with pytest.raises(ValueError, match=r"Part 1 .* has 'loc'"):
        svi.load_state_dict(state)
    assert advance(svi, [(DATA,)] * 2) == advance(twin, [(DATA,)] * 2)
    chex.assert_trees_all_equal(of_svi.get_state(), of_twin.get_state())


@pytest.mark.slow
def test_a_loaded_run_has_other_arguments_of_the_constructor():
    """Initial values are for a run that begins."""
    svi, other = fit(rules.Adam()), fit(rules.Adam(), init_params={"loc": jnp.ones(2)}, skip_nonfinite=True)
    svi.run(3, DATA, progress_bar=False)
    other.load_state_dict(svi.state_dict())
    np.testing.assert_array_equal(other.run(3, DATA, progress_bar=False), svi.run(3, DATA, progress_bar=False))
    with pytest.raises(ValueError, match="init_params are for the first call"):
        other.run(1, DATA, progress_bar=False, init_params={"loc": jnp.ones(2)})


@pytest.mark.parametrize(
    ("other", "error", "words"),
    [
        (renamed, KeyError, "The loaded state has 'loc', .* reach are 'location', 'scale'"),
        (longer, ValueError, r"The loaded state has 'loc' of shape \(2,\), .* is \(3,\)"),
    ],
    ids=["name", "shape"],
)
def test_states_of_other_models_are_refused_by_the_first_call(other, error, words):
    svi = fit(rules.Adam(), guide=other)
    svi.load_state_dict(saved())
    before = contents(svi)
    for call in (svi.step, svi.evaluate_loss):
        with pytest.raises(error, match=words):
            call(DATA, "")
    chex.assert_trees_all_equal(contents(svi), before)


# Pyro's parameter stores.

CONSTRAINTS = {
    "loc": (torch.tensor([1.0, 2.0]), "real"),
    "scale": (torch.tensor(0.3), "positive"),
    "rate": (torch.tensor(0.3), "unit_interval"),
    "weights": (torch.tensor([0.2, 0.3, 0.5]), "simplex"),
    "factor": (torch.tensor([[1.0, 0.0], [0.5, 2.0]]), "lower_cholesky"),
    "soft": (torch.tensor(0.7), "softplus_positive"),
}


def everything(scale=1.0):
    """The same parameters in numpyro."""
    for name, (value, constraint) in CONSTRAINTS.items():
        start = {"simplex": jnp.ones(3) / 3, "lower_cholesky": jnp.eye(2)}.get(constraint, jnp.full(value.shape, 0.5))
        numpyro.param(name, start, constraint=getattr(dist.constraints, constraint))
    weights = numpyro.param("net", {"weight": jnp.zeros((3, 2)), "bias": jnp.zeros(3)})
    numpyro.param("other", 0.25)
    numpyro.factor("f", -scale * (weights["weight"] ** 2).sum())


@pytest.fixture
def store(tmp_path):
    """What Pyro has saved, and its values."""
    parent.clear_param_store()
    for name, (value, constraint) in CONSTRAINTS.items():
        parent.param(name, value, constraint=getattr(parent.distributions.constraints, constraint))
    parent.module("net", torch.nn.Linear(2, 3))
    path = tmp_path / "store"
    parent.get_param_store().save(path)
    values = {name: parent.param(name).detach().numpy() for name in CONSTRAINTS}
    net = {name: parent.param(f"net$$${name}").detach().numpy() for name in ("weight", "bias")}
    yield path, values | {"net": net, "other": np.float32(0.25)}
    parent.clear_param_store()


def made(*begun):
    svi = SVI(everything, nothing, rules.SGD(lr=0.0), Trace_ELBO())
    for scale in begun:
        svi.step(scale)
    return svi


@pytest.mark.slow
@pytest.mark.parametrize("begun", [(), (1.0,)], ids=["before the first call", "after it"])
def test_stores_of_pyro(store, begun):
    path, expected = store
    svi = made(*begun)
    svi.load(path)
    svi.evaluate_loss(1.0)
    chex.assert_trees_all_close(svi.get_params(), expected, rtol=1e-5, atol=1e-7)
    another = made(*begun)
    another.load_state_dict(parent.get_param_store().get_state())
    another.step(1.0)
    chex.assert_trees_all_equal(another.get_params(), svi.get_params())


def test_a_store_that_waits_is_saved(store, tmp_path):
    path, expected = store
    svi, other = made(), made()
    svi.load(path)
    svi.save(tmp_path / "run")
    other.load(tmp_path / "run")
    other.step(1.0)
    chex.assert_trees_all_close(other.get_params(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_store_without_pyro(store):
    """Its own constraints are not known then."""
    code = f"""
import sys
sys.modules["pyro"] = None
from jaxoptim.pyro.infer import stores
try:
    stores.constrained_values(stores.loaded({str(store[0])!r}))
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True, text=True)
    assert result.stdout.startswith("The constraint of 'soft', _SoftplusPositive, is not known here. Import"), result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "constraint", "error", "words"),
    [
        (
            "extra",
            torch.tensor(1.0),
            "real",
            KeyError,
            r"Pyro's store has 'extra', .*They reach 'factor', 'loc'",
        ),
        ("loc", torch.ones(3), "real", ValueError, r"Pyro's value of 'loc' has shape \(3,\), .*\(2,\)"),
        ("scale", torch.tensor(-1.0), "real", ValueError, "'scale' is .*not within"),
    ],
    ids=["name", "shape", "constraint"],
)
@pytest.mark.parametrize("begun", [(), (1.0,)], ids=["before the first call", "after it"])
def test_stores_that_do_not_fit(name, value, constraint, error, words, begun):
    parent.clear_param_store()
    parent.param("rate", torch.tensor(0.9), constraint=parent.distributions.constraints.unit_interval)
    parent.param(name, value, constraint=getattr(parent.distributions.constraints, constraint))
    state = parent.get_param_store().get_state()
    parent.clear_param_store()
    svi = made(*begun)
    before = contents(svi)

    def call():
        svi.load_state_dict(state)
        svi.step(1.0)

    with pytest.raises(error, match=words):
        call()
    chex.assert_trees_all_equal(contents(svi), before)


class Harmful:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('harmed').touch()",)


def test_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2)}, tmp_path / "model")
    torch.save({"params": {"loc": Harmful()}, "constraints": {}}, tmp_path / "harmful")
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("a", "b")
    checkpoint.save(tmp_path / "other", {"w": jnp.ones(2)})
    for name, words in {
        "model": "no parameter store of Pyro",
        "harmful": "'loc' .* but no tensor",
        "zip": "neither a file of svi.save nor",
        "other": "lacks 'params'",
    }.items():
        with pytest.raises(ValueError, match=words):
            made().load(tmp_path / name)
    assert not (tmp_path / "harmed").exists()
