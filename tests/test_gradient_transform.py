"""Transformations of optax that gradients go through before a step of a torch-style optimizer."""

import copy

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO

import jaxoptim
from jaxoptim import checkpoint, interop, optim
from jaxoptim.engine import programs
from jaxoptim.pyro import optim as pyro_style

pytestmark = pytest.mark.usefixtures("x64")

LARGE = 70_000
"""So many numbers stand by themselves, and not among small arrays."""
RNG = np.random.default_rng(0)
START = {
    "encoder": {"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=3)},
    "head": RNG.normal(size=(3, 2)),
    "table": RNG.normal(size=LARGE),
}
TX = optax.chain(
    optax.clip_by_global_norm(0.5), optax.trace(0.9), optax.scale_by_schedule(lambda count: 1 / (count + 1))
)
OF_HEAD = optax.ema(0.5)
ONLY_HEAD = {"encoder": {"w": False, "b": False}, "head": True, "table": False}
GROUPS = [("head", {"lr": 0.02, "gradient_transform": OF_HEAD}), (r"encoder\..*", {"lr": 0.01})]


def loss(params, target=0.5):
    return sum(jnp.sum(jnp.cosh(x - target)) for x in jax.tree.leaves(params))


gradient = jax.jit(jax.grad(loss))


class InOptax:
    """The same parameters, with the transformations in front of the rule by hand."""

    def __init__(self):
        rates = {"encoder": {"w": 0.01, "b": 0.01}, "head": 0.02, "table": 0.001}
        rules = {rate: jaxoptim.adamw(lr=rate) for rate in (0.01, 0.02, 0.001)}
        self.tx = optax.chain(TX, optax.masked(OF_HEAD, ONLY_HEAD), optax.partition(rules, rates))
        self.params = jax.tree.map(jnp.asarray, START)
        self.state = self.tx.init(self.params)

    def step(self, grads):
        updates, self.state = self.tx.update(grads, self.state, self.params)
        self.params = optax.apply_updates(self.params, updates)


def optimizer(params=START):
    return optim.AdamW(params, groups=GROUPS, gradient_transform=TX)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["step", "minimize", "both"])
def test_steps_are_those_of_the_chain_in_optax(way):
    opt, theirs = optimizer(), InOptax()
    for index in range(40):
        if way == "step" or (way == "both" and index % 2):
            opt.step(gradient(opt.params))
        else:
            opt.minimize(loss)
        theirs.step(gradient(theirs.params))
    chex.assert_trees_all_close(opt.params, theirs.params, rtol=1e-14, atol=1e-14)


def test_the_clipping_of_minimize_comes_first():
    opt = optim.SGD(START, lr=1.0, gradient_transform=optax.scale(3.0))
    opt.minimize(loss, clip_norm=0.1)
    assert float(opt.last.update_norm) == pytest.approx(0.3, rel=1e-5)
    assert float(opt.last.grad_norm) > 1


def test_a_missing_gradient_is_zero_for_the_transformation_and_its_parameter_stays():
    seen = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda u, p: seen.append((u, p)), updates, params)
        return updates, state + 1

    tx = optax.GradientTransformation(lambda params: jnp.zeros(()), update)
    opt = optim.SGD({"a": 1.0, "b": 2.0, "c": None}, lr=0.5, gradient_transform=tx, frozen="b")
    opt.step({"a": 1.0, "b": 3.0, "c": None})
    opt.minimize(lambda params: params["a"] * params["b"])
    opt.unfreeze("b")
    opt.step({"a": None, "b": 1.0, "c": None})
    opt.step({"a": None, "b": None, "c": None})
    jax.effects_barrier()
    grads = [[float(x) for x in jax.tree.leaves(updates)] for updates, _ in seen]
    assert grads == [[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]
    assert [float(x) for x in jax.tree.leaves(opt.params)] == [-0.5, 1.5]
    assert float(opt.state_dict()["gradient_transform"][""]) == 3


def test_a_skipped_step_leaves_the_state():
    opt = optim.SGD({"a": jnp.ones(2)}, lr=0.1, gradient_transform=optax.trace(0.9))

    def of(params, x):
        return jnp.sum(params["a"] * x)

    opt.minimize(of, 1.0, skip_nonfinite=True)
    before = opt.state_dict()["gradient_transform"], opt.params
    opt.minimize(of, jnp.nan, skip_nonfinite=True)
    chex.assert_trees_all_equal((opt.state_dict()["gradient_transform"], opt.params), before)
    assert bool(opt.last.skipped)


def test_a_step_that_fails_leaves_the_state():
    opt = optimizer()
    opt.step(gradient(opt.params))
    before = opt.state_dict()["gradient_transform"], opt.params
    with pytest.raises(ValueError, match="The gradient of 'head' has shape"):
        opt.step(gradient(opt.params) | {"head": jnp.ones(3)})
    with pytest.raises(ZeroDivisionError):
        opt.minimize(lambda params: 1 / 0)
    chex.assert_trees_all_equal((opt.state_dict()["gradient_transform"], opt.params), before)


def test_numbers_change_without_a_new_program():
    opt = optimizer()
    opt.step(gradient(opt.params))
    opt.minimize(loss)
    before = programs.advance._cache_size(), programs.minimize._cache_size()
    for index in range(3):
        opt.param_groups[index]["lr"] = 0.1 * index
        opt.step(gradient(opt.params))
        opt.minimize(loss)
    assert (programs.advance._cache_size(), programs.minimize._cache_size()) == before


# Saving, loading, leaving.


def resumed_by_state_dict(opt, path):
    new = optimizer(opt.params)
    new.load_state_dict(opt.state_dict())
    return new


def resumed_from_a_file(opt, path):
    new = optimizer(opt.params)
    checkpoint.save(path / "run.safetensors", opt.state_dict())
    new.load_state_dict(checkpoint.load(path / "run.safetensors"))
    return new


def went_through_the_pure_face(opt, path):
    tx, params, state = opt.to_functional()
    updates, state = tx.update(gradient(params), state, params)
    opt.from_functional(optax.apply_updates(params, updates), state)
    return opt


@pytest.mark.slow
@pytest.mark.parametrize(
    "resumed",
    [resumed_by_state_dict, resumed_from_a_file, lambda opt, path: copy.deepcopy(opt), went_through_the_pure_face],
    ids=["state-dict", "file", "copy", "pure"],
)
def test_a_run_that_is_resumed_goes_on(resumed, tmp_path):
    opt, theirs = optimizer(), InOptax()
    for index in range(12):
        opt.minimize(loss)
        theirs.step(gradient(theirs.params))
        if index == 5:
            opt = resumed(opt, tmp_path)
            if resumed is went_through_the_pure_face:
                theirs.step(gradient(theirs.params))
    chex.assert_trees_all_close(opt.params, theirs.params, rtol=1e-14, atol=1e-14)


@pytest.mark.needs("torch")
def test_state_dicts_have_torchs_keys_but_for_the_state():
    plain, opt = optim.AdamW(START), optim.AdamW(START, gradient_transform=optax.clip(1.0))
    assert opt.state_dict().keys() == plain.state_dict().keys() == {"state", "param_groups"}
    opt = optimizer()
    saved = opt.state_dict()
    assert saved.keys() == {"state", "param_groups", "gradient_transform"}
    assert [group.keys() for group in saved["param_groups"]] == [plain.state_dict()["param_groups"][0].keys()] * 3
    assert interop.torch.to_torch(saved)["gradient_transform"].keys() == saved["gradient_transform"].keys()
    plain.load_state_dict(plain.state_dict() | {"gradient_transform": {}})


def test_a_state_of_another_transformation_is_refused():
    opt, saved = optim.SGD(START, gradient_transform=optax.trace(0.9)), optimizer().state_dict()
    opt.step(gradient(opt.params))
    before = opt.state_dict()
    with pytest.raises(
        ValueError, match=r"The state of gradient_transform in the state dict lacks \".trace\['encoder'"
    ):
        opt.load_state_dict({key: x for key, x in before.items() if key != "gradient_transform"})
    with pytest.raises(ValueError, match="The state of gradient_transform in the state dict has "):
        optim.AdamW(START, groups=[("head", {}), (r"encoder\..*", {})]).load_state_dict(saved)
    wrong = before["gradient_transform"] | {".trace['head']": np.ones(2)}
    with pytest.raises(
        ValueError, match=r"has \".trace\['head'\]\" of shape \(2,\), but that of the optimizer has \(3, 2\)"
    ):
        opt.load_state_dict(before | {"gradient_transform": wrong})
    chex.assert_trees_all_equal(dict(opt.state_dict()), dict(before))
    opt.load_state_dict({key: x for key, x in before.items() if key != "gradient_transform"}, strict=False)


# Other parameters, other transformations.


def test_the_state_begins_afresh_with_other_parameters():
    opt = optim.SGD({"a": jnp.ones(2)}, lr=0.1, gradient_transform=optax.trace(0.9))
    opt.step({"a": jnp.ones(2)})
    opt.add_param_group({"params": {"b": jnp.ones(2)}})
    with pytest.warns(UserWarning, match="The state of gradient_transform begins afresh, because the parameters are"):
        opt.step([{"a": jnp.ones(2)}, {"b": jnp.ones(2)}])
    opt.step([{"a": jnp.ones(2)}, {"b": jnp.ones(2)}])
    chex.assert_trees_all_close(opt.params, [{"a": jnp.full(2, 0.61)}, {"b": jnp.full(2, 0.71)}], rtol=1e-12)


@pytest.mark.slow
def test_a_group_takes_another_one_at_any_time():
    opt = optim.SGD([{"params": [jnp.ones(2)]}, {"params": [jnp.ones(2)]}], lr=1.0)
    grads = [[jnp.full(2, 4.0)], [jnp.full(2, 4.0)]]
    opt.step(grads)
    opt.param_groups[1]["gradient_transform"] = optax.clip(1.0)
    opt.step(grads)
    opt.param_groups[1]["gradient_transform"] = optax.clip(0.5)
    opt.step(grads)
    del opt.param_groups[1]["gradient_transform"]
    opt.step(grads)
    chex.assert_trees_all_close(opt.params, [[jnp.full(2, -15.0)], [jnp.full(2, -8.5)]])
    opt.param_groups[0]["gradient_transform"] = "clip"
    with pytest.raises(TypeError, match=r"gradient_transform takes a transformation of optax, such as .* got 'clip'"):
        opt.step(grads)


def test_a_parameter_that_stands_twice_counts_once():
    shared = optim.Parameter(1.0)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = optim.SGD([shared, shared], lr=1.0, gradient_transform=optax.clip_by_global_norm(1.0))
    opt.step([2.0, 3.0])
    assert float(shared.value) == -1.0  # two steps of one along the sum, as without the transformation


def test_options_and_descriptions_leave_it_out():
    opt = optimizer()
    assert "gradient_transform" not in opt.current_options()[0]
    assert [row.rate for row in opt.describe()] == [0.01, 0.01, 0.02, 0.001]
    scheduler = optim.lr_scheduler.StepLR(opt, 1, 0.5)
    opt.step(gradient(opt.params))
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.01, 0.005, 0.0005]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.SGD(START, gradient_transform=3), "takes a transformation of optax, .*, but got 3"),
        (lambda: optim.SGD(START, groups=[("head", {"gradient_transform": 3})]), "takes a transformation of optax"),
        (
            lambda: optim.SGLD(START, nbeta=2.0, gradient_transform=TX),
            "unexpected keyword argument 'gradient_transform'",
        ),
        (lambda: optim.SGLD(START, nbeta=2.0, groups=[("head", {"gradient_transform": TX})]), "is no option of SGLD"),
        (lambda: optim.LBFGS([{"params": START, "gradient_transform": TX}]), "LBFGS takes no gradient_transform here"),
        (
            lambda: pyro_style.PyroOptim(optim.Adam, {"lr": 0.1, "gradient_transform": TX})(
                [optim.Parameter(1.0, "a")]
            ),
            "Adam takes no gradient_transform here",
        ),
    ],
    ids=["number", "in-a-group", "sampler", "group-of-a-sampler", "lbfgs", "pyro-style"],
)
def test_who_takes_none_says_so(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_sparse_gradient_is_refused():
    opt = optim.SGD({"a": jnp.ones((4, 2))}, gradient_transform=optax.clip(1.0))
    sparse = BCOO((jnp.ones((1, 2)), jnp.zeros((1, 1), int)), shape=(4, 2))
    with pytest.raises(TypeError, match="gradient_transform takes dense gradients, but that of 'a' is sparse"):
        opt.step({"a": sparse})


@pytest.mark.slow
def test_gradients_of_modules():
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    opt = optim.SGD(model, lr=0.1, gradient_transform=optax.chain(optax.clip_by_global_norm(0.1), optax.trace(0.5)))

    def of_model(model):
        return jnp.sum(model(jnp.ones(3)) ** 2)

    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.trace(0.5), optax.sgd(0.1))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    state = tx.init(params)
    for _ in range(5):
        opt.minimize(of_model)
        grads = jax.grad(lambda params: of_model(eqx.combine(params, static)))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(eqx.filter(opt.params, eqx.is_inexact_array), params, rtol=1e-12)
