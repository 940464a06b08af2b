"""L-BFGS against torch: the points it asks for, the decisions it takes, the state it keeps.

L-BFGS multiplies a rounding error by a constant in every iteration. On some problems torch ends, after ten
steps, 0.1 away from where it ends when started one unit in the last place beside. So there are two comparisons
with torch. Everywhere, each single step is compared: our state is torch's at its beginning, and we are told the
losses and gradients that torch saw. Where torch agrees with itself, ten steps on our own are compared too.
"""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from sklearn.datasets import load_breast_cancer

import jaxoptim
from comparisons import assert_same
from jaxoptim.core import trees
from jaxoptim.core.flat import flatten, flatten_like, unflatten
from jaxoptim.rules import LBFGS

TOLERANCE = 1e-8
STATE = ("d", "t", "H_diag", "prev_flat_grad", "prev_loss")
HISTORY = ("old_dirs", "old_stps", "ro")


def breast_cancer():
    features, labels = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    return np.c_[features, np.ones(len(features))], 2.0 * labels - 1


def ill_conditioned(size=31, condition=1e4):
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
    matrix = rotation @ np.diag(np.geomspace(1, condition, size)) @ rotation.T
    return (matrix + matrix.T) / 2


FEATURES, SIGNS = breast_cancer()
MATRIX = ill_conditioned()


def rosenbrock(x, like):
    return ((1 - x[:-1]) ** 2 + 100 * (x[1:] - x[:-1] ** 2) ** 2).sum()


def quadratic(x, like):
    return 0.5 * x @ (like(MATRIX) @ x) - x.sum()


def logistic(x, like):
    margins = like(SIGNS) * (like(FEATURES) @ x)
    softplus = jax.nn.softplus if like is jnp.asarray else torch.nn.functional.softplus
    return softplus(-margins).mean()


def ridge(x, like):
    return logistic(x, like) + 1e-3 * (x @ x)


PROBLEMS = {
    "rosenbrock2": (rosenbrock, np.array([-1.2, 1.0])),
    "rosenbrock10": (rosenbrock, np.array([-1.2, 1.0] * 5)),
    "quadratic": (quadratic, np.ones(31)),
    "ridge": (ridge, np.zeros(31)),
    "logistic": (logistic, np.zeros(31)),
}
OPTIONS = {
    "defaults": {},
    "slow": {"lr": 0.1},
    "short_history": {"history_size": 3},
    "few_evaluations": {"max_eval": 7},
    "coarse_gradient": {"max_iter": 4, "tolerance_grad": 1e-3},
    "coarse_change": {"tolerance_change": 1e-4},
    "one_iteration": {"max_iter": 1},
}
SEARCHES = [None, "strong_wolfe"]

# Where torch, started one unit in the last place beside, ends within 3e-9 of itself after ten steps.
STABLE = {
    ("rosenbrock2", None): "defaults coarse_gradient coarse_change one_iteration",
    ("rosenbrock2", "strong_wolfe"): "defaults slow short_history few_evaluations coarse_gradient coarse_change",
    ("rosenbrock10", None): "slow one_iteration",
    ("rosenbrock10", "strong_wolfe"): "coarse_gradient one_iteration",
    ("quadratic", None): "defaults few_evaluations coarse_gradient coarse_change one_iteration",
    ("quadratic", "strong_wolfe"): "defaults few_evaluations coarse_gradient coarse_change one_iteration",
    ("ridge", None): "defaults short_history few_evaluations coarse_gradient coarse_change one_iteration",
    ("ridge", "strong_wolfe"): " ".join(OPTIONS),
    ("logistic", None): "few_evaluations coarse_gradient coarse_change one_iteration",
    ("logistic", "strong_wolfe"): "few_evaluations coarse_gradient coarse_change one_iteration",
}
UNSTABLE = [
    ("rosenbrock10", None, "defaults"),
    ("quadratic", None, "slow"),
    ("quadratic", "strong_wolfe", "short_history"),
    ("logistic", "strong_wolfe", "defaults"),
]


class Parent:
    """torch's optimizer on one vector, with a record of what its closure saw."""

    def __init__(self, problem, x=None, **options):
        self.loss, start = PROBLEMS[problem]
        self.param = torch.tensor(start if x is None else x, requires_grad=True)
        self.optimizer = torch.optim.LBFGS([self.param], **options)
        self.seen = []

    def closure(self):
        self.optimizer.zero_grad()
        loss = self.loss(self.param, torch.as_tensor)
        loss.backward()
        self.seen.append((self.x, loss.item(), self.param.grad.numpy().copy()))
        return loss

    def step(self):
        self.seen = []
        return self.optimizer.step(self.closure).item()

    @property
    def x(self):
        return self.param.detach().numpy().copy()

    @property
    def state(self):
        return self.optimizer.state[self.param]


start, observe, finish = jax.jit(LBFGS.start), jax.jit(LBFGS.observe, donate_argnums=1), jax.jit(LBFGS.finish)


def step_with(rule, x, state, evaluate):
    """One step through the three functions, and the number of evaluations."""
    search, evaluations = start(rule, state, x), 0
    while not search.done:
        search = observe(rule, search, *evaluate(np.asarray(search.point)))
        evaluations += 1
    return *finish(rule, search), evaluations


def taken_from(rule, state, parent):
    """The state of a rule, with everything in the place where torch has it."""
    if "d" in parent:
        state = state | {name: jnp.asarray(parent[name], state[name].dtype) for name in STATE}
        state = rule.with_history(state, *(parent[name] for name in HISTORY))
    return state | {name: jnp.asarray(parent.get(name, 0), jnp.int32) for name in ("func_evals", "n_iter")}


def close(ours, theirs, what):
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    assert ours.shape == theirs.shape, what
    scale = max(1.0, np.abs(theirs).max(initial=0))
    np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=TOLERANCE, err_msg=what)


def compare_states(rule, state, parent):
    assert int(state["func_evals"]) == parent["func_evals"]
    assert int(state["n_iter"]) == parent["n_iter"]
    if "d" not in parent:
        return
    for name in STATE:
        close(state[name], parent[name], name)
    history = rule.history(state)
    for name in HISTORY:
        assert len(history[name]) == len(parent[name]), name
        for row, (ours, theirs) in enumerate(zip(history[name], parent[name], strict=True)):
            close(ours, theirs, f"{name}[{row}]")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    OPTIONS,
)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("search", SEARCHES)
def test_every_step_asks_for_torchs_points_and_leaves_torchs_state(search, problem, options, x64):
    parent = Parent(problem, line_search_fn=search, **OPTIONS[options])
    rule = LBFGS(line_search_fn=search, **OPTIONS[options])
    fresh = rule.init(jnp.asarray(parent.x))
    for _ in range(10):
        x, state = jnp.asarray(parent.x), taken_from(rule, fresh, parent.state)
        loss = parent.step()
        told = iter(parent.seen)

        def evaluate(point, told=told):
            theirs, loss, grad = next(told)
            close(point, theirs, "point")
            return loss, grad

        first, x, state, evaluations = step_with(rule, x, state, evaluate)
        assert evaluations == len(parent.seen)
        assert float(first) == loss
        close(x, parent.x, "x")
        compare_states(rule, state, parent.state)


@pytest.mark.numbers
@pytest.mark.costly
@pytest.mark.parametrize(
    ("problem", "search", "options"),
    [
        pytest.param(*key, options, marks=[] if names.startswith(options) else pytest.mark.slow)
        for key, names in STABLE.items()
        for options in names.split()
    ],
)
def test_ten_steps_on_our_own_equal_torchs(problem, search, options, x64):
    parent = Parent(problem, line_search_fn=search, **OPTIONS[options])
    other = Parent(problem)

    def evaluate(point):
        other.param.data = torch.tensor(point)
        other.closure()
        return other.seen[-1][1:]

    rule, x = LBFGS(line_search_fn=search, **OPTIONS[options]), jnp.asarray(parent.x)
    state = rule.init(x)
    for _ in range(10):
        loss = parent.step()
        first, x, state, evaluations = step_with(rule, x, state, evaluate)
        assert evaluations == len(parent.seen)
        close(first, loss, "loss")
        close(x, parent.x, "x")
    assert int(state["func_evals"]) == parent.state["func_evals"]
    assert int(state["n_iter"]) == parent.state["n_iter"]
    for name in ("t", "prev_loss"):
        close(state[name], parent.state[name], name)


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "search", "options"), UNSTABLE)
def test_torch_disagrees_with_itself_where_ten_steps_are_not_compared(problem, search, options):
    x = PROBLEMS[problem][1]
    ulp = np.spacing(np.maximum(np.abs(x), 0.5))
    runs = [Parent(problem, x=x + side * ulp, line_search_fn=search, **OPTIONS[options]) for side in (0, 1, -1)]
    for run in runs:
        for _ in range(10):
            run.step()
    assert max(np.abs(run.x - runs[0].x).max() for run in runs) > 10 * TOLERANCE


def test_signature_follows_torch():
    parent = dict(inspect.signature(torch.optim.LBFGS).parameters)
    del parent["params"]
    assert inspect.signature(LBFGS).parameters.keys() == parent.keys()
    for name, parameter in inspect.signature(LBFGS).parameters.items():
        assert parameter.default == parent[name].default
        assert parameter.kind == parent[name].kind
    assert LBFGS(max_iter=10).evaluations == 12


# The transformation.


def optimized(tx, loss, params, steps, jit=True, **given):
    state, losses = tx.init(params), []

    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params)
        extra = {"value": value, "grad": grad} if given.get("value") else {}
        grads = jax.tree.map(jnp.conj, grad)
        updates, state = tx.update(grads, state, params, value_fn=loss, **extra)
        return value, optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    for _ in range(steps):
        value, params, state = step(params, state)
        losses.append(float(value))
    return losses, params, state


def ridge_tree(params):
    return ridge(jnp.concatenate([params["weights"].reshape(-1), params["bias"]]), jnp.asarray)


def zeros_tree():
    return {"weights": jnp.zeros((3, 10)), "frozen": None, "bias": jnp.zeros(1)}


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("search", SEARCHES)
def test_the_transformation_is_torchs_step(search, given, x64):
    parent = Parent("ridge", line_search_fn=search)
    tx = jaxoptim.lbfgs(line_search_fn=search)
    expected = [parent.step() for _ in range(10)]
    losses, params, state = optimized(tx, ridge_tree, zeros_tree(), 10, value=given)
    close(losses, expected, "losses")
    close(jnp.concatenate([params["weights"].reshape(-1), params["bias"]]), parent.x, "x")
    assert params["frozen"] is None
    assert int(state.step) == 10
    assert state.slots == {}
    assert int(state.shared["func_evals"]) == parent.state["func_evals"]
    assert int(state.shared["n_iter"]) == parent.state["n_iter"]


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_the_loss_is_evaluated_as_often_as_in_torch(given, x64):
    seen = []

    def loss(x):
        jax.debug.callback(lambda: seen.append(1))
        return ridge(x, jnp.asarray)

    x = jnp.zeros(31)
    value, grad = jax.value_and_grad(lambda x: ridge(x, jnp.asarray))(x)
    tx = jaxoptim.lbfgs(line_search_fn="strong_wolfe")
    extra = {"value": value, "grad": grad} if given else {}
    _, state = tx.update(grad, tx.init(x), x, value_fn=loss, **extra)
    jax.effects_barrier()
    parent = Parent("ridge", line_search_fn="strong_wolfe")
    parent.step()
    assert len(seen) == len(parent.seen) - given
    assert int(state.shared["func_evals"]) == len(parent.seen)


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES)
def test_it_runs_in_scan_and_under_vmap(search, x64):
    tx = jaxoptim.lbfgs(line_search_fn=search, history_size=5, max_iter=5)

    def loss(x):
        return jnp.sum(jnp.cosh(x - jnp.arange(3.0))) + x[0] * x[1]

    def train(x):
        def body(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
            return (x + updates, state), state.shared["func_evals"]

        (x, _), evals = jax.lax.scan(body, (x, tx.init(x)), length=4)
        return x, evals

    starts = jnp.array([[0.0, 0.0, 0.0], [3.0, -1.0, 0.5], [0.1, 0.2, 5.0]])
    swept, evals = jax.jit(jax.vmap(train))(starts)
    for x, result, count in zip(starts, swept, evals, strict=True):
        _, expected, state = optimized(tx, loss, x, 4)
        np.testing.assert_allclose(result, expected, atol=1e-12)
        assert int(count[-1]) == int(state.shared["func_evals"])


@pytest.mark.slow
def test_vmap_over_the_driven_search(x64):
    rule = LBFGS(line_search_fn="strong_wolfe", max_iter=3)
    states = jax.vmap(rule.init)(jnp.ones((2, 4)))
    search = jax.vmap(rule.start)(states, jnp.arange(8.0).reshape(2, 4))
    for _ in range(2):
        search = jax.vmap(rule.observe)(search, *jax.vmap(jax.value_and_grad(lambda x: jnp.sum(x**4)))(search.point))
    assert search.point.shape == (2, 4)
    assert not search.done.any()


def test_changing_numbers_compiles_nothing_new():
    compiled = []

    @jax.jit
    def step(rule, x, state):
        compiled.append(rule)
        return rule.minimize(jax.value_and_grad(lambda x: jnp.sum((x - 1) ** 2)), x, state)

    x = jnp.zeros(3)
    for lr in (1, 0.5, np.float32(0.1)):
        for tolerance in (0, 1e-3):
            rule = LBFGS(lr=lr, tolerance_grad=tolerance, tolerance_change=tolerance)
            step(rule, x, rule.init(x))
    assert len(compiled) == 1


@pytest.mark.slow
def test_a_schedule_gives_the_rate_of_each_step(x64):
    def loss(x):
        return jnp.sum((x - 1.0) ** 4)

    x, state = jnp.zeros(3), None
    tx = jaxoptim.lbfgs(lr=lambda step: 0.1 * (step + 1))
    _, scheduled, _ = optimized(tx, loss, x, 3)
    for k in range(3):
        tx = jaxoptim.lbfgs(lr=0.1 * (k + 1))
        state = tx.init(x) if state is None else state
        updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
        x = x + updates
    np.testing.assert_allclose(x, scheduled, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES)
def test_complex_parameters_are_pairs_of_real_ones(search, x64):
    z = np.array([1.0 + 2.0j, -0.5 + 0.1j])
    param = torch.tensor(z, requires_grad=True)
    real = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([real, param], line_search_fn=search, max_iter=6)

    def closure():
        optimizer.zero_grad()
        loss = (
            ((param - (1 + 1j)).abs() ** 2).sum() + (param * param).real.cosh().sum() + ((real - param.imag) ** 2).sum()
        )
        loss.backward()
        return loss

    def loss(params):
        real, z = params
        return jnp.sum(jnp.abs(z - (1 + 1j)) ** 2) + jnp.sum(jnp.cosh((z * z).real)) + jnp.sum((real - z.imag) ** 2)

    expected = [optimizer.step(closure).item() for _ in range(3)]
    tx = jaxoptim.lbfgs(line_search_fn=search, max_iter=6)
    losses, params, state = optimized(tx, loss, [jnp.ones(2), jnp.asarray(z)], 3)
    close(losses, expected, "losses")
    close(params[0], real.detach().numpy(), "real")
    np.testing.assert_allclose(params[1], param.detach().numpy(), atol=TOLERANCE)
    close(state.shared["prev_flat_grad"], optimizer.state[real]["prev_flat_grad"], "prev_flat_grad")


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lower_precisions(dtype, search):
    target = jnp.array([1.0, -2.0, 0.5], dtype)
    params = {"a": jnp.zeros(3, dtype), "b": jnp.zeros((), jnp.float32)}

    def loss(params):
        return jnp.sum((params["a"] - target).astype(jnp.float32) ** 4) + (params["b"] - 1) ** 2

    tx = jaxoptim.lbfgs(line_search_fn=search)
    _, params, state = optimized(tx, loss, params, 5)
    assert params["a"].dtype == dtype
    assert state.shared["d"].dtype == jnp.float32
    np.testing.assert_allclose(params["a"].astype(float), target.astype(float), atol=0.05)


@pytest.mark.slow
def test_packed_parameters_and_plain_gradients(x64):
    tx = jaxoptim.lbfgs(line_search_fn="strong_wolfe")
    _, expected, _ = optimized(tx, ridge_tree, zeros_tree(), 3)
    packed = jaxoptim.pack(zeros_tree())
    _, result, _ = optimized(tx, lambda params: ridge_tree(params.unpack()), packed, 3)
    chex.assert_trees_all_close(result.unpack(), expected, rtol=1e-7, atol=TOLERANCE)
    grads = jax.grad(ridge_tree)(zeros_tree())
    updates, _ = tx.update(grads, tx.init(packed), packed, value_fn=lambda params: ridge_tree(params.unpack()))
    assert isinstance(updates, jaxoptim.Packed)


@pytest.mark.slow
def test_a_parameter_without_gradient_is_held_fixed(x64):
    def loss(params):
        return jnp.sum((params["a"] - params["b"]) ** 2) + jnp.sum(params["a"] ** 4)

    params = {"a": jnp.ones(2), "b": jnp.full(2, 3.0)}
    grads = jax.grad(loss)(params) | {"b": None}
    tx = jaxoptim.lbfgs(line_search_fn="strong_wolfe")
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=loss)
    assert updates["b"] is None
    fixed = lambda a: loss({"a": a, "b": params["b"]})  # noqa: E731
    expected, _ = tx.update(grads["a"], tx.init(params["a"]), params["a"], value_fn=fixed)
    np.testing.assert_allclose(updates["a"], expected, atol=1e-12)


@pytest.mark.slow
def test_it_goes_into_an_optax_chain(x64):
    tx = optax.chain(jaxoptim.lbfgs(), optax.scale(1.0))
    _, params, _ = optimized(tx, ridge_tree, zeros_tree(), 2)
    _, expected, _ = optimized(jaxoptim.lbfgs(), ridge_tree, zeros_tree(), 2)
    np.testing.assert_allclose(params["weights"], expected["weights"], atol=1e-12)


@pytest.mark.slow
def test_the_state_may_be_donated_and_shaped_without_arrays():
    tx, x = jaxoptim.lbfgs(line_search_fn="strong_wolfe"), jnp.zeros(3)
    step = jax.jit(
        lambda x, state: tx.update(jax.grad(cosh)(x), state, x, value_fn=cosh),
        donate_argnums=1,
    )
    _, state = step(x, tx.init(x))
    step(x, state)
    shapes = jax.eval_shape(tx.init, x)
    assert shapes.shared["old_dirs"].shape == (100, 3)
    rule = LBFGS()
    jax.jit(rule.observe, donate_argnums=0)(rule.start(rule.init(x), x), 1.0, jnp.ones(3))


def cosh(x):
    return jnp.sum(jnp.cosh(x - 1))


# Where a step ends early, and what torch does not survive.


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES)
def test_a_flat_gradient_ends_the_step_at_once(search):
    tx, x = jaxoptim.lbfgs(line_search_fn=search), jnp.ones(3)
    before = tx.init(x)
    updates, state = tx.update(jnp.zeros(3), before, x, value_fn=cosh)
    assert not updates.any()
    assert int(state.shared["func_evals"]) == 1
    unchanged = {name: value for name, value in state.shared.items() if name != "func_evals"}
    for name, value in unchanged.items():
        np.testing.assert_array_equal(value, before.shared[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_ends_the_step_and_spoils_nothing(bad, search):
    def loss(x):
        return jnp.sum(x**2) * bad

    tx, x = jaxoptim.lbfgs(line_search_fn=search), jnp.ones(3)
    updates, state = tx.update(jax.grad(loss)(x), tx.init(x), x, value_fn=loss)
    assert not updates.any()
    chex.assert_tree_all_finite(state)
    updates, state = tx.update(jax.grad(cosh)(x + 1), state, x + 1, value_fn=cosh)
    assert updates.any()


@pytest.mark.parametrize("search", SEARCHES)
def test_a_loss_that_is_never_finite_ends_too(search):
    rule, x = LBFGS(line_search_fn=search), jnp.ones(3)
    first, x, state = rule.minimize(lambda x: (jnp.nan, 2 * x), x, rule.init(x))
    assert jnp.isnan(first)
    assert int(state["func_evals"]) <= 26


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_line_search_goes_back_from_a_trial_that_is_not_finite(bad, x64):
    def loss(x):  # a barrier at zero, beyond which the first trial lies
        inside = jnp.all(x > 0)
        return jnp.where(inside, jnp.sum(x - jnp.log(jnp.where(inside, x, 1.0))), bad)

    tx, x = jaxoptim.lbfgs(lr=50.0, line_search_fn="strong_wolfe"), jnp.array([10.0, 3.0])
    _, x, _ = optimized(tx, loss, x, 3)
    np.testing.assert_allclose(x, 1.0, atol=1e-5)


@pytest.mark.slow
def test_a_rate_of_zero_and_a_flat_cubic_do_not_move():
    tx, x = jaxoptim.lbfgs(lr=0.0, line_search_fn="strong_wolfe"), jnp.ones(2)
    updates, state = tx.update(jax.grad(cosh)(x + 1), tx.init(x), x, value_fn=lambda x: cosh(x + 1))
    assert not updates.any()
    chex.assert_tree_all_finite(state)


def test_an_empty_tree():
    tx = jaxoptim.lbfgs()
    updates, _ = tx.update({"a": None}, tx.init({"a": None}), {"a": None}, value_fn=lambda params: jnp.zeros(()))
    assert updates == {"a": None}


def test_history_is_a_ring_read_oldest_first():
    rule = LBFGS(history_size=3)
    state = rule.init(jnp.zeros(2))
    assert rule.history(state) == {"old_dirs": [], "old_stps": [], "ro": []}
    rows = [np.full(2, k) for k in range(5)]
    state = rule.with_history(state, rows, rows, list(range(5)))
    assert [float(ro) for ro in rule.history(state)["ro"]] == [2, 3, 4]
    ring = state | {"stored": jnp.asarray(4)}
    assert [float(ro) for ro in rule.history(ring)["ro"]] == [3, 4, 2]


# Errors.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "Invalid lr: -1.0. LBFGS takes lr >= 0."),
        ({"lr": None}, TypeError, "takes a number"),
        ({"max_iter": 2.5}, TypeError, "Invalid max_iter: 2.5 (float). LBFGS takes an int"),
        ({"max_iter": 0}, ValueError, "LBFGS takes max_iter >= 1"),
        ({"max_eval": True}, TypeError, "Invalid max_eval: True"),
        ({"history_size": 0}, ValueError, "LBFGS takes history_size >= 1"),
        ({"history_size": None}, TypeError, "Invalid history_size: None"),
        ({"tolerance_grad": np.nan}, ValueError, "Invalid tolerance_grad: nan"),
        ({"line_search_fn": "wolfe"}, RuntimeError, "only 'strong_wolfe' is supported"),
    ],
    ids=str,
)
def test_bad_hyperparameters(options, error, message):
    with pytest.raises(error) as raised:
        jaxoptim.lbfgs(**options)
    assert message in str(raised.value)


def test_update_says_what_is_missing():
    tx, x = jaxoptim.lbfgs(), jnp.ones(2)
    state = tx.init(x)
    with pytest.raises(ValueError, match="`value_fn` was not given"):
        tx.update(x, state, x)
    with pytest.raises(ValueError, match="`params` was not given"):
        tx.update(x, state, value_fn=cosh)
    with pytest.raises(ValueError, match="shape"):
        tx.update(jnp.ones(3), state, x, value_fn=cosh)
    with pytest.raises(TypeError, match="has dtype int32"):
        tx.init(jnp.arange(3))
    with pytest.raises(TypeError, match=r"lbfgs\(\) got an unexpected keyword argument 'history'"):
        jaxoptim.lbfgs(history=3)
    with pytest.raises(TypeError, match="LBFGS does not work array by array"):
        jaxoptim.init(LBFGS(), x)
    with pytest.raises(TypeError, match="LBFGS does not work array by array"):
        jaxoptim.update(LBFGS(), x, state, x)


# The tree as a vector.


@pytest.mark.slow
def test_flatten_and_unflatten_are_inverse(x64):
    tree = {
        "c": jnp.array([[1 + 2j], [3 - 1j]], jnp.complex64),
        "h": jnp.ones(3, jnp.bfloat16),
        "n": None,
        "many": [jnp.full((2, 1), k, jnp.float32) for k in range(100)],
        "empty": jnp.zeros((0, 2)),
        "scalar": jnp.asarray(2.0, jnp.float64),
    }
    vector = jax.jit(flatten)(tree)
    assert vector.dtype == jnp.float64
    assert vector[:4].tolist() == [1, 2, 3, -1]
    back = jax.jit(unflatten)(vector, tree)
    assert_same(back, tree)
    np.testing.assert_array_equal(flatten_like(tree, tree), vector)
    assert trees.names(unflatten(vector, jax.eval_shape(lambda: tree))) == trees.names(tree)


@pytest.mark.slow
def test_flatten_errors():
    params = {"w": jnp.ones(2), "z": jnp.ones(1, jnp.complex64)}
    with pytest.raises(ValueError, match="holds 4 real numbers"):
        unflatten(jnp.ones(3), params)
    with pytest.raises(TypeError, match="'z' has dtype float32, but the parameter has complex64"):
        flatten_like({"w": jnp.ones(2), "z": jnp.ones(1)}, params)
    with pytest.raises(ValueError, match="grads has nothing for 'z'"):
        flatten_like({"w": jnp.ones(2)}, params)
    assert flatten({}).shape == (0,)
    sparse = jax.experimental.sparse.BCOO.fromdense(jnp.eye(2), n_dense=1)
    assert flatten_like({"e": sparse}, {"e": jnp.ones((2, 2))}).tolist() == [1, 0, 0, 1]
