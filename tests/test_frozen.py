"""Parameters that steps leave as they are, in every face."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jaxoptim
from jaxoptim import optim, rules
from jaxoptim.engine import programs
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim as pyro_style
from jaxoptim.pyro.infer import SVI

pytestmark = pytest.mark.usefixtures("x64")

LARGE = 70_000
"""So many numbers stand by themselves, and not among small arrays."""
RNG = np.random.default_rng(0)
START = {
    "encoder": {"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=3)},
    "head": {"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=3)},
    "table": RNG.normal(size=LARGE),
}
NAMES = ("encoder.b", "encoder.w", "head.b", "head.w", "table")


def loss(params, target=0.5):
    return sum(jnp.sum(jnp.cosh(x - target)) for x in jax.tree.leaves(params)) + jnp.sum(
        params["encoder"]["w"] * params["head"]["w"]
    )


def torch_loss(leaves):
    total = sum(torch.cosh(x - 0.5).sum() for x in leaves)
    return total + (leaves[1] * leaves[3]).sum()


def by_name(tree):
    return dict(zip(NAMES, jax.tree.leaves(tree), strict=True))


# Against torch, which leaves alone what has no gradient.

KINDS = [
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("AdamW", {"lr": 0.03, "amsgrad": True}),
    ("RAdam", {"lr": 0.02, "weight_decay": 0.1}),
]
PLAN = {10: ["encoder.b", "encoder.w"], 25: ["encoder.w", "table"], 40: [], 50: ["head.b"]}
"""What is frozen from which step on."""


def torch_run(name, options, steps, max_norm):
    leaves = [torch.nn.Parameter(torch.tensor(x)) for x in jax.tree.leaves(START)]
    optimizer = getattr(torch.optim, name)(leaves, **options)
    for step in range(steps):
        if step in PLAN:
            for leaf, its in zip(leaves, NAMES, strict=True):
                leaf.requires_grad_(its not in PLAN[step])
        optimizer.zero_grad()
        torch_loss(leaves).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        optimizer.step()
    return [leaf.detach().numpy() for leaf in leaves]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["step", "minimize", "clipped"])
@pytest.mark.parametrize(("name", "options"), KINDS, ids=[name for name, _ in KINDS])
def test_frozen_parameters_stay_as_in_torch(name, options, way):
    opt = getattr(optim, name)(jax.tree.map(jnp.asarray, START), **options)
    gradient = jax.jit(jax.grad(loss))
    for step in range(60):
        if step in PLAN:
            opt.unfreeze()
            for its in PLAN[step]:
                opt.freeze(its)
        if way == "step":
            opt.step(gradient(opt.params))
        else:
            opt.minimize(loss, clip_norm=0.7 if way == "clipped" else None)
    theirs = torch_run(name, options, 60, 0.7 if way == "clipped" else None)
    chex.assert_trees_all_close(jax.tree.leaves(opt.params), theirs, rtol=1e-12, atol=1e-12)


# What is frozen, and how that is said.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selectors", "names"),
    [
        ("encoder", NAMES[:2]),
        (["encoder", r".*\.b"], NAMES[:3]),
        (r"(en|de)coder\.w", NAMES[1:2]),
        (lambda path: path.endswith("b"), (NAMES[0], NAMES[2])),
        ([lambda path, array: array.size > 100, "head"], NAMES[2:]),
        ({"encoder": True, "head": {"w": False, "b": True}, "table": False}, NAMES[:3]),
    ],
    ids=["subtree", "several", "expression", "predicate", "predicate-of-array", "mask"],
)
def test_selectors(selectors, names):
    opt = optim.SGD(START, lr=0.1, frozen=selectors)
    before = by_name(opt.params)
    assert [row.name for row in opt.describe() if not row.trained] == list(names)
    opt.minimize(loss)
    after = by_name(opt.params)
    assert [name for name in NAMES if np.array_equal(before[name], after[name])] == list(names)
    opt.unfreeze(selectors)
    assert all(row.trained for row in opt.describe())


@pytest.mark.parametrize(
    ("selectors", "error", "message"),
    [
        ("encode", ValueError, "freeze: there is no parameter that 'encode' selects"),
        (["encoder", "("], ValueError, r"'\(' is no regular expression"),
        (3, TypeError, "A selector is"),
    ],
)
def test_wrong_selectors_change_nothing(selectors, error, message):
    opt = optim.SGD(START, lr=0.1)
    with pytest.raises(error, match=message):
        opt.freeze(selectors)
    assert all(row.trained for row in opt.describe())
    with pytest.raises(TypeError, match="requires_grad of 'weight' is True or False, but got 1"):
        Parameter(1.0, "weight").requires_grad = 1


def test_requires_grad_is_the_parameters_own():
    params = [Parameter(1.0, "a"), Parameter(1.0, "b")]
    params[0].requires_grad = False
    opt = optim.Adam(params, lr=0.1)
    for _ in range(2):
        for param in params:
            param.grad = 1.0
        opt.step()
    assert float(params[0].value) == 1.0
    assert float(params[1].value) < 0.9
    assert params[0] not in opt.state
    params[0].value = 3.0  # kept elsewhere until the next step
    opt.step()
    assert float(params[0].value) == 3.0
    for other in (copy.deepcopy(params[0]), pickle.loads(pickle.dumps(params[0]))):
        assert not other.requires_grad
    params[0].requires_grad = True
    opt.step()
    assert float(params[0].value) < 3.0
    assert int(opt.state[params[0]]["step"]) == 1


def test_all_frozen():
    opt = optim.AdamW(START, frozen=".*")
    value = opt.minimize(loss, measure=True)
    opt.step(START)
    chex.assert_trees_all_equal(opt.params, jax.tree.map(jnp.asarray, START))
    assert float(value) == float(loss(START))
    assert (float(opt.last.grad_norm), float(opt.last.update_norm)) == (0.0, 0.0)
    assert not opt.state_dict()["state"]


def test_a_gradient_that_is_not_finite_does_not_matter_where_it_is_frozen():
    opt = optim.Adam({"a": jnp.ones(2), "b": jnp.ones(2)}, lr=0.1, frozen="a")
    opt.minimize(lambda params: jnp.sum(jnp.sqrt(params["a"] - 1)) + jnp.sum(params["b"]), skip_nonfinite=True)
    assert not bool(opt.last.skipped)
    assert float(opt.last.grad_norm) == pytest.approx(np.sqrt(2))
    chex.assert_trees_all_close(opt.params, {"a": jnp.ones(2), "b": jnp.full(2, 0.9)}, atol=1e-6)


# What compiles.


def test_small_parameters_freeze_and_thaw_in_the_program_for_masks():
    params = {str(i): jnp.ones(3) for i in range(6)}
    opt = optim.NAdam(params, lr=0.1)
    opt.step(params)
    opt.freeze("3")
    opt.step(params)
    before = programs.advance._cache_size()
    for names in (["1"], ["2", "4"], []):
        opt.unfreeze()
        if names:
            opt.freeze(names)
        opt.step(params)
    assert programs.advance._cache_size() == before


@pytest.mark.slow
def test_minimize_compiles_once_for_each_choice_and_takes_no_gradient_of_the_rest():
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    seen = []

    @jax.custom_vjp
    def through(x):
        return x

    def forward(x):
        return x, None

    def backward(_, cotangent):
        seen.append(1)
        return (cotangent,)

    through.defvjp(forward, backward)

    def of_both(params):
        return jnp.sum(through(params["a"]) * params["b"])

    opt = optim.Adam(params, lr=0.1, frozen="a")
    opt.minimize(of_both)
    assert seen == []
    opt.unfreeze("a")
    opt.minimize(of_both)
    assert seen == [1]
    before = programs.minimize._cache_size()
    for _ in range(3):
        opt.freeze("a")
        opt.minimize(of_both)
        opt.unfreeze("a")
        opt.minimize(of_both)
    assert programs.minimize._cache_size() == before


# The other faces.


@pytest.mark.slow
def test_samplers():
    for way in ("step", "minimize"):
        chain = optim.SGLD(START, lr=1e-3, nbeta=2.0, frozen="encoder")
        start = by_name(chain.params)
        if way == "step":
            chain.step(jax.grad(loss)(chain.params))
        else:
            chain.minimize(loss)
        after = by_name(chain.params)
        assert [name for name in NAMES if np.array_equal(start[name], after[name])] == list(NAMES[:2])


def test_lbfgs_says_that_it_cannot():
    x, y = Parameter(1.0, "x"), Parameter(1.0, "y")
    opt = optim.LBFGS([x, y])
    y.requires_grad = False
    for step in (lambda: opt.minimize(lambda params: params[0] ** 2), lambda: opt.step(lambda: 0.0)):
        with pytest.raises(ValueError, match="'y' is frozen, but LBFGS updates all of its parameters as one vector"):
            step()


@pytest.mark.costly
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: pyro_style.multi.PyroMultiOptimizer(pyro_style.Adam({"lr": 0.1})),
        lambda: pyro_style.multi.as_multi_optimizer(rules.Adam(lr=0.1)),
        lambda: pyro_style.multi.as_multi_optimizer(jaxoptim.adam(lr=0.1)),
        lambda: pyro_style.multi.as_multi_optimizer(lambda params: optim.Adam(params, lr=0.1)),
        lambda: pyro_style.multi.MixedMultiOptimizer(
            [(["a", "b"], pyro_style.multi.Newton()), (["c"], rules.SGD(lr=0.1))]
        ),
    ],
    ids=["pyro-style", "rule", "transformation", "torch-style", "mixed"],
)
def test_multi_optimizers(optimizer):
    multi = optimizer()
    params = {name: Parameter(jnp.array([1.0 + i]), name) for i, name in enumerate("abc")}

    def of_all(values):
        return jnp.sum(jnp.cosh(values["a"] * values["b"]) + jnp.cosh(values["c"]) + jnp.cosh(values["b"]))

    for frozen in ("", "b", "b", "", "abc"):
        before = {name: param.value for name, param in params.items()}
        for name, param in params.items():
            param.requires_grad = name not in frozen
        value = multi.step(of_all, params)
        assert float(value) == pytest.approx(float(of_all(before)))
        stayed = [name for name, param in params.items() if param.value == before[name]]
        assert stayed == list(frozen)


@pytest.mark.slow
def test_pyro_style_calls():
    optimizer = pyro_style.Adam({"lr": 0.1})
    params = [Parameter(jnp.ones(shape), str(shape)) for shape in ((2,), (LARGE,), (2, 1))]
    params[1].requires_grad = params[2].requires_grad = False
    for _ in range(3):
        for param in params:
            param.grad = jnp.ones(param.shape)
        optimizer(params)
    assert [float(param.value.reshape(-1)[0]) for param in params] == pytest.approx([0.7, 1.0, 1.0])


@pytest.mark.slow
def test_svi():
    numpyro = pytest.importorskip("numpyro")

    def model():
        numpyro.sample("x", numpyro.distributions.Normal(numpyro.param("a", 1.0), 1.0), obs=3.0)
        numpyro.factor("prior", -(numpyro.param("b", 1.0) ** 2))

    svi = SVI(model, lambda: None, pyro_style.Adam({"lr": 0.1}), numpyro.infer.Trace_ELBO())
    svi.step()
    held = float(svi.params["a"].value)
    svi.params["a"].requires_grad = False
    for _ in range(3):
        svi.step()
    assert float(svi.params["a"].value) == held
    assert float(svi.params["b"].value) < 0.7


@pytest.mark.slow
def test_the_pure_face_leaves_them_too():
    opt = optim.Adam(START, lr=0.1)
    opt.minimize(loss)
    opt.freeze("head")
    tx, params, state = opt.to_functional()
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    opt.from_functional(optax.apply_updates(params, updates), state)
    counts = {param.name: int(opt.state[param]["step"]) for param in opt.param_groups[0]["params"]}
    assert counts == {name: 1 if name.startswith("head") else 2 for name in NAMES}
    chex.assert_trees_all_equal(opt.params["head"], params["head"])
