"""``optim.LBFGS`` against torch's, through closures and through ``minimize``."""

import copy
import gc
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxoptim import optim
from jaxoptim.optim import lbfgs
from test_lbfgs import PROBLEMS, Parent

pytestmark = pytest.mark.numbers

# Runs that torch itself repeats to 1e-8 when it starts one unit in the last place beside: see test_lbfgs.py.
RUNS = [
    ("rosenbrock2", {}),
    ("rosenbrock2", {"line_search_fn": "strong_wolfe"}),
    ("quadratic", {}),
    ("quadratic", {"line_search_fn": "strong_wolfe"}),
    ("ridge", {"history_size": 5}),
    ("ridge", {"line_search_fn": "strong_wolfe"}),
    ("ridge", {"line_search_fn": "strong_wolfe", "max_iter": 4, "max_eval": 6}),
]


def described(run):
    return "-".join([run[0], *(f"{k}={v}" for k, v in run[1].items())])


TAKEN = [
    pytest.param(run, id=described(run), marks=[] if number in (1, 4, 6) else pytest.mark.slow)
    for number, run in enumerate(RUNS)
]
"""Those with and without a line search, with a short history and with limits are quick."""


def loss_of(problem):
    loss = PROBLEMS[problem][0]
    return lambda x: loss(x, jnp.asarray)


LOSSES = {problem: loss_of(problem) for problem in PROBLEMS}
value_and_grad = {problem: jax.jit(jax.value_and_grad(loss)) for problem, loss in LOSSES.items()}


class Closure:
    """A torch-like closure on a list of parameters whose values make up the vector of a problem."""

    def __init__(self, problem, params):
        self.problem, self.params, self.seen = problem, params, []

    def __call__(self):
        x = jnp.concatenate([param.value.reshape(-1) for param in self.params])
        loss, grad = value_and_grad[self.problem](x)
        parts = jnp.split(grad, np.cumsum([param.value.size for param in self.params])[:-1].tolist())
        for param, part in zip(self.params, parts, strict=True):
            param.grad = part.reshape(param.shape)
        self.seen.append(np.asarray(x))
        return loss


def pieces(problem):
    """The start of a problem as a scalar and the rest."""
    start = PROBLEMS[problem][1]
    return [optim.Parameter(start[0]), optim.Parameter(start[1:])]


@pytest.mark.slow
@pytest.mark.parametrize("run", TAKEN)
def test_closures_are_called_as_by_torch(run, x64):
    problem, options = run
    params, parent = pieces(problem), Parent(problem, **options)
    opt, closure = optim.LBFGS(params, **options), Closure(problem, pieces(problem))
    closure.params = params
    for _ in range(10):
        closure.seen = []
        expected = parent.step()
        assert float(opt.step(closure)) == pytest.approx(expected, rel=1e-8, abs=1e-8)
        assert len(closure.seen) == len(parent.seen)
        for mine, (theirs, _, _) in zip(closure.seen, parent.seen, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-8, atol=1e-8)
    x = np.concatenate([np.ravel(param.value) for param in params])
    np.testing.assert_allclose(x, parent.x, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("run", TAKEN)
def test_minimize_agrees_with_torch(run, x64):
    problem, options = run
    opt, parent = optim.LBFGS(jnp.asarray(PROBLEMS[problem][1]), **options), Parent(problem, **options)
    for _ in range(10):
        expected = parent.step()
        assert float(opt.minimize(LOSSES[problem])) == pytest.approx(expected, rel=1e-8, abs=1e-8)
    np.testing.assert_allclose(opt.params, parent.x, rtol=1e-8, atol=1e-8)
    mine, theirs = opt.state_dict(), parent.optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert repr(opt) == repr(parent.optimizer)
    assert set(mine["state"][0]) == set(theirs["state"][0])
    for name, slot in theirs["state"][0].items():
        if name == "al" or isinstance(slot, list):  # scratch: torch overwrites it before it reads it
            assert len(mine["state"][0][name]) == len(slot)
        else:
            assert np.shape(mine["state"][0][name]) == np.shape(slot)
    for name in ("func_evals", "n_iter"):
        assert mine["state"][0][name] == theirs["state"][0][name]
    for name in ("d", "prev_flat_grad", "prev_loss"):
        np.testing.assert_allclose(mine["state"][0][name], theirs["state"][0][name], rtol=0, atol=1e-7)


def numbers_of(state_dict):
    """torch's state dict with NumPy in the place of tensors."""
    return jax.tree.map(lambda x: x.numpy() if isinstance(x, torch.Tensor) else x, state_dict)


@pytest.mark.slow
def test_torchs_state_is_taken_over(x64):
    parent = Parent("ridge", line_search_fn="strong_wolfe", max_iter=3)
    for _ in range(2):
        parent.step()
    opt = optim.LBFGS(jnp.asarray(parent.x), line_search_fn="strong_wolfe")
    opt.load_state_dict(numbers_of(parent.optimizer.state_dict()))
    assert opt.param_groups[0]["max_iter"] == 3
    for _ in range(3):
        expected = parent.step()
        assert float(opt.minimize(LOSSES["ridge"])) == pytest.approx(expected, abs=1e-10)
    np.testing.assert_allclose(opt.params, parent.x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "copied",
    [lambda opt: pickle.loads(pickle.dumps(opt)), copy.deepcopy],
    ids=["pickle", "deepcopy"],
)
def test_a_copy_goes_on_alike(copied, x64):
    opt = optim.LBFGS(jnp.asarray(PROBLEMS["ridge"][1]), max_iter=4, history_size=3)
    for _ in range(2):
        opt.minimize(LOSSES["ridge"])
    other = copied(opt)
    for _ in range(2):
        assert float(opt.minimize(LOSSES["ridge"])) == float(other.minimize(LOSSES["ridge"]))
    assert np.array_equal(opt.params, other.params)


def test_its_own_state_dict_is_taken_over(x64):
    opt = optim.LBFGS(jnp.asarray(PROBLEMS["ridge"][1]), max_iter=4, history_size=3)
    for _ in range(2):
        opt.minimize(LOSSES["ridge"])
    other = optim.LBFGS(opt.params)
    other.load_state_dict(opt.state_dict())
    assert float(opt.minimize(LOSSES["ridge"])) == float(other.minimize(LOSSES["ridge"]))
    assert np.array_equal(opt.params, other.params)


@pytest.mark.slow
def test_state_of_another_optimizer_is_refused():
    adam = optim.Adam(jnp.ones(3))
    adam.step(jnp.ones(3))
    opt = optim.LBFGS(jnp.ones(3))
    with pytest.raises((ValueError, KeyError), match=r"max_iter|LBFGS"):
        opt.load_state_dict(adam.state_dict())
    short = optim.LBFGS(jnp.ones(2))
    for _ in range(2):
        short.minimize(lambda x: jnp.sum(x**4))
    with pytest.raises(ValueError, match=r"shape|numbers"):
        opt.load_state_dict(short.state_dict())
    assert len(opt.state) == 0


@pytest.mark.costly
@pytest.mark.parametrize("calls", [0, 3])
def test_a_raising_closure_changes_nothing(calls):
    params = pieces("rosenbrock10")
    opt, closure = optim.LBFGS(params), Closure("rosenbrock10", params)
    opt.step(closure)
    before = [np.asarray(p.value) for p in params], opt.state_dict()["state"][0]
    closure.seen = []

    def raising():
        if len(closure.seen) == calls:
            raise RuntimeError("no loss today")
        return closure()

    with pytest.raises(RuntimeError, match="no loss today"):
        opt.step(raising)
    after = [np.asarray(p.value) for p in params], opt.state_dict()["state"][0]
    chex.assert_trees_all_equal(after, before)
    opt.step(closure)


@pytest.mark.slow
def test_the_users_arrays_live_and_memory_does_not_grow(only_new_garbage):
    mine = {"w": jnp.full((30, 10), 0.3), "b": jnp.zeros(())}
    opt = optim.LBFGS(mine, history_size=5, max_iter=4)
    counts, held = [], []
    for _ in range(6):
        held.append(opt.params)
        opt.minimize(quartic)
        gc.collect()
        counts.append(len(jax.live_arrays()))
    assert np.all(np.diff(counts[2:]) == len(jax.tree.leaves(mine)))  # what this test holds
    assert all(not x.is_deleted() for x in jax.tree.leaves((mine, held)))


def quartic(params):
    return jnp.sum((params["w"] - params["b"] - 1.0) ** 4) + params["b"] ** 2


@pytest.mark.slow
def test_a_new_rate_compiles_nothing():
    opt = optim.LBFGS({"w": jnp.full((2, 2), 0.3), "b": jnp.zeros(())}, lr=1.0)
    opt.minimize(quartic)
    before = lbfgs._minimize._cache_size()
    opt.param_groups[0]["lr"] = 0.5
    opt.param_groups[0]["tolerance_change"] = 1e-6
    opt.minimize(quartic)
    assert lbfgs._minimize._cache_size() == before


@pytest.mark.slow
def test_complex_parameters_agree_with_torch(x64):
    target = np.array([1 - 2j, 0.5 + 1j])

    def loss(z):
        return jnp.sum(jnp.abs(z - target) ** 4) + jnp.sum(jnp.abs(z) ** 2)

    tensor = torch.zeros(2, dtype=torch.complex128, requires_grad=True)
    parent = torch.optim.LBFGS([tensor], line_search_fn="strong_wolfe")

    def parents():
        parent.zero_grad()
        value = (tensor - torch.tensor(target)).abs().pow(4).sum() + tensor.abs().square().sum()
        value.backward()
        return value

    first, cell = (
        optim.LBFGS(jnp.zeros(2, complex), line_search_fn="strong_wolfe"),
        optim.Parameter(np.zeros(2, complex)),
    )
    second = optim.LBFGS([cell], line_search_fn="strong_wolfe")

    def closure():
        value, grad = jax.value_and_grad(loss)(cell.value)
        cell.grad = jnp.conj(grad)
        return value

    for _ in range(3):
        parent.step(parents)
        first.minimize(loss)
        second.step(closure)
    np.testing.assert_allclose(first.params, tensor.detach().numpy(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(cell.value, tensor.detach().numpy(), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_what_else_the_loss_returns_is_of_the_first_evaluation(x64):
    opt, twin = (optim.LBFGS(jnp.asarray(PROBLEMS["ridge"][1])) for _ in range(2))
    start = opt.params
    loss, aux = opt.minimize(lambda x: (LOSSES["ridge"](x), x), has_aux=True)
    assert float(loss) == float(twin.minimize(LOSSES["ridge"]))
    assert np.array_equal(aux, start)
    np.testing.assert_allclose(opt.params, twin.params, rtol=1e-12)


@pytest.mark.slow
def test_leaving_for_the_pure_face_and_coming_back(x64):
    loss = LOSSES["ridge"]
    stays, leaves = (optim.LBFGS({"x": jnp.asarray(PROBLEMS["ridge"][1])}, max_iter=4) for _ in range(2))

    def of_tree(params):
        return loss(params["x"])

    stays.minimize(of_tree)
    leaves.minimize(of_tree)
    tx, params, state = leaves.to_functional()
    for _ in range(2):
        stays.minimize(of_tree)
        updates, state = tx.update(jax.grad(of_tree)(params), state, params, value_fn=of_tree)
        params = optax.apply_updates(params, updates)
    leaves.from_functional(params, state)
    stays.minimize(of_tree)
    leaves.minimize(of_tree)
    np.testing.assert_allclose(leaves.params["x"], stays.params["x"], rtol=0, atol=1e-10)
    assert leaves.state_dict()["state"][0]["n_iter"] == stays.state_dict()["state"][0]["n_iter"]


@pytest.mark.slow
def test_a_missing_gradient_counts_as_zero(x64):
    moved, still = optim.Parameter(3.0), optim.Parameter(5.0)
    opt = optim.LBFGS([moved, still])

    def closure():
        loss, moved.grad = jax.value_and_grad(lambda x: (x - 1) ** 2)(moved.value)
        return loss

    opt.step(closure)
    assert float(moved.value) == pytest.approx(1.0)
    assert float(still.value) == 5.0


def test_one_group_and_no_gradients():
    groups = [{"params": [optim.Parameter(1.0)]}, {"params": [optim.Parameter(2.0)]}]
    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        optim.LBFGS(groups)
    opt = optim.LBFGS([1.0])
    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        opt.add_param_group({"params": [2.0]})
    with pytest.raises(TypeError, match="closure"):
        opt.step([jnp.ones(())])
    with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
        optim.LBFGS([1.0], line_search_fn="wolfe")


@pytest.mark.slow
def test_the_state_is_filed_under_the_first_parameter(x64):
    params = pieces("rosenbrock10")
    opt = optim.LBFGS(params)
    assert len(opt.state) == 0
    opt.step(Closure("rosenbrock10", params))
    assert list(opt.state) == params[:1]
    assert opt.state[params[0]]["n_iter"] == 20
    assert opt.state[params[0]]["d"].shape == (10,)
    opt.state[params[0]]["n_iter"] = 0
    opt.step(Closure("rosenbrock10", params))
    assert opt.state[params[0]]["n_iter"] == 20
