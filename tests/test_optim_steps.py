"""Steps, the parameters that they move, and the options that a user writes in between."""

import contextlib
import copy
import functools
import pickle
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.sparse import BCOO

from comparisons import assert_same
from jaxoptim import optim
from optim_sides import TORCH, Ours, Theirs, by_row, check_values, compare, made, params_of, run_with, start, steps

pytestmark = pytest.mark.usefixtures("x64")


# What the user writes into param_groups.


def write(**options: Any) -> Any:
    def change(opt: Any, params: Any, side: Any) -> None:
        opt.param_groups[0].update(options)

    return change


def move(opt: Any, params: Any, side: Any) -> None:
    opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop(0))


def replace_dicts(opt: Any, params: Any, side: Any) -> None:
    opt.param_groups = [dict(group, lr=0.3) for group in opt.param_groups]


def replace_one(opt: Any, params: Any, side: Any) -> None:
    opt.param_groups[1] = {**opt.param_groups[1], "lr": 0.3}


def swap(opt: Any, params: Any, side: Any) -> None:
    opt.param_groups.reverse()


def merge(opt: Any, params: Any, side: Any) -> None:
    opt.param_groups[0]["params"] += opt.param_groups.pop()["params"]


def append(opt: Any, params: Any, side: Any) -> Any:
    added = side.param([5.0, 6.0])
    opt.param_groups[0]["params"].append(added)
    return [added]


def append_list(opt: Any, params: Any, side: Any) -> Any:
    added = side.param([5.0, 6.0])
    opt.param_groups.append({**opt.param_groups[0], "params": [added], "lr": 0.2})
    return [added]


def empty_a_group(opt: Any, params: Any, side: Any) -> None:
    for param in opt.param_groups[1]["params"]:
        del opt.state[param]
    opt.param_groups[1]["params"] = []


def start_over(opt: Any, params: Any, side: Any) -> None:
    opt.param_groups.clear()
    opt.state.clear()
    opt.add_param_group({"params": params, "lr": 0.1})


@pytest.mark.costly
@pytest.mark.parametrize(
    ("name", "options", "change"),
    [
        ("SGD", {"momentum": 0.9}, write(lr=0.5)),
        ("Adam", {}, write(lr=0.5, betas=(0.5, 0.6), eps=1e-3)),
        ("Adam", {}, write(weight_decay=0.1)),
        ("Adam", {"weight_decay": 0.1}, write(weight_decay=0)),
        ("Adam", {"weight_decay": 0.1}, write(decoupled_weight_decay=True)),
        ("Adam", {}, write(maximize=True, unknown="kept", foreach=False)),
        ("Adam", {"amsgrad": True}, write(amsgrad=False)),
        ("SGD", {}, write(momentum=0.9)),
        ("SGD", {}, write(momentum=0.9, dampening=0.5)),
        ("SGD", {"momentum": 0.9}, write(momentum=0)),
        ("SGD", {"momentum": 0.9}, write(momentum=0.5, nesterov=True)),
        ("RMSprop", {"momentum": 0.9}, write(momentum=0)),
        ("Rprop", {}, write(etas=(0.3, 1.7), step_sizes=(1e-4, 10.0))),
        ("ASGD", {}, write(lr=0.2, t0=2.0)),
        ("NAdam", {}, move),
        ("Adam", {}, move),
        ("Adam", {}, replace_dicts),
        ("Adam", {}, replace_one),
        ("Adam", {}, swap),
        ("SGD", {"momentum": 0.9}, merge),
        ("Adam", {}, append),
        ("Adam", {}, append_list),
        ("SGD", {"momentum": 0.9, "dampening": 0.3}, append),
        ("Adam", {}, empty_a_group),
        ("Adam", {}, start_over),
        ("Adagrad", {}, start_over),
    ],
    ids=lambda x: getattr(x, "__name__", None) or str(x).replace(" ", ""),
)
def test_changes_of_param_groups_take_effect_at_the_next_step(name, options, change):
    compare(functools.partial(run_with, name, options, change))


@pytest.mark.slow
def test_an_option_that_goes_and_comes_back_finds_its_slot_again():
    def off_and_on(opt: Any, params: Any, side: Any) -> None:
        opt.param_groups[0]["momentum"] = 0
        steps(side, opt, params, range(10, 12))
        opt.load_state_dict(opt.state_dict())
        steps(side, opt, params, range(12, 14))
        opt.param_groups[0]["momentum"] = 0.5

    compare(functools.partial(run_with, "SGD", {"momentum": 0.9}, off_and_on))


def test_lists_and_arrays_changed_in_place_take_effect():
    def in_place(opt: Any, params: Any, side: Any) -> None:
        opt.param_groups[0]["betas"][0] = 0.1

    compare(lambda side: run_with("NAdam", {"betas": [0.9, 0.99]}, in_place, side))
    rate = np.array(0.5)
    opt = optim.SGD([1.0], lr=rate)
    opt.step([1.0])
    rate[...] = 0.25
    opt.step([1.0])
    assert opt.params == [0.25]


@pytest.mark.slow
def test_a_parameter_that_was_taken_out_is_left_alone():
    def program(side: Any) -> Any:
        params = [side.param(x) for x in start((3, 2), (2,))]
        opt = side.optim.Adam(params, lr=0.1)
        steps(side, opt, params, range(3))
        opt.param_groups[0]["params"].remove(params[0])
        steps(side, opt, params, range(3, 5))
        opt.param_groups[0]["params"].insert(0, params[0])
        steps(side, opt, params, range(5, 7))
        return opt, params

    compare(program)


def test_parameters_put_into_a_group_appear_in_params():
    opt = optim.SGD({"w": 1.0}, lr=0.1)
    opt.param_groups[0]["params"].append(optim.Parameter(5.0))
    assert opt.params == [{"w": 1.0}, [5.0]]
    opt.step([{"w": 1.0}, [2.0]])
    np.testing.assert_allclose(jax.tree.leaves(opt.params), [0.9, 4.8])
    opt.param_groups[0]["params"].pop()
    opt.step({"w": 1.0})
    assert opt.params["w"] == pytest.approx(0.8)


@pytest.mark.slow
def test_replacing_a_parameter_with_its_state_resized():
    # How densification (3D Gaussian splatting) prunes and grows parameters under a running optimizer.
    def program(side: Any) -> Any:
        params = [side.param(x) for x in start((4, 2), (2,))]
        opt = side.optim.Adam([{"params": [p], "lr": 0.1} for p in params])
        steps(side, opt, params, range(3))
        group = opt.param_groups[0]
        old = group["params"][0]
        stored = opt.state.get(old, None)
        stored["exp_avg"] = stored["exp_avg"][1:]
        stored["exp_avg_sq"] = stored["exp_avg_sq"][1:]
        del opt.state[old]
        group["params"][0] = side.param(side.numpy(old)[1:])
        opt.state[group["params"][0]] = stored
        params = [group["params"][0], params[1]]
        steps(side, opt, params, range(3, 6))
        assert opt.state[params[0]]["step"] == 6
        return opt, params

    (ours, params), (theirs, tensors) = program(Ours), program(Theirs)
    check_values(params, tensors)
    assert ours.state[params[0]].keys() == theirs.state[tensors[0]].keys()
    for name, slot in theirs.state[tensors[0]].items():
        np.testing.assert_allclose(ours.state[params[0]][name], slot.numpy(), rtol=1e-12)


def test_options_that_make_no_sense_raise_at_the_step_and_can_be_put_right():
    opt = optim.SGD([1.0], lr=0.1)
    opt.step([1.0])
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="Invalid lr: -1"):
        opt.step([1.0])
    del opt.param_groups[0]["lr"]
    with pytest.raises(KeyError, match="A parameter group of SGD has no option 'lr'"):
        opt.step([1.0])
    opt.param_groups[0]["lr"] = 0.1
    opt.step([1.0])
    assert opt.params[0] == pytest.approx(0.8)


# Steps.


def test_step_takes_gradients_cells_or_a_closure():
    tree = {"w": np.ones(2), "b": np.ones(1)}
    grads = jax.tree.map(np.ones_like, tree)
    by_tree, by_cell, by_closure, by_keyword = (optim.Adam(tree, lr=0.1) for _ in range(4))
    assert by_tree.step(grads) is None

    def fill(opt: Any) -> str:
        for param in opt.param_groups[0]["params"]:
            param.grad = jnp.ones(param.shape)
        return "loss"

    fill(by_cell)
    assert by_cell.step() is None
    assert by_closure.step(lambda: fill(by_closure)) == "loss"
    assert by_keyword.step(closure=functools.partial(fill, by_keyword)) == "loss"
    for opt in (by_cell, by_closure, by_keyword):
        assert_same(opt.params, by_tree.params)


def test_the_closure_is_called_once_and_sees_the_current_values():
    def program(side: Any) -> Any:
        param, seen = side.param([3.0]), []
        opt = side.optim.SGD([param], lr=0.5)

        def closure() -> float:
            opt.zero_grad()
            seen.append(float(side.numpy(param)[0]))
            param.grad = side.array(side.numpy(param))
            return seen[-1]

        return [opt.step(closure) for _ in range(3)], seen

    assert program(Ours) == program(Theirs) == ([3.0, 1.5, 0.75], [3.0, 1.5, 0.75])


class Scale(eqx.Module):
    factor: jax.Array

    def __call__(self, x: Any) -> Any:
        return self.factor * x


@jax.tree_util.register_pytree_node_class
class CallableTree:
    def __init__(self, factor: Any) -> None:
        self.factor = factor

    def __call__(self) -> Any:
        raise AssertionError("gradients were called")

    def tree_flatten(self) -> Any:
        return (self.factor,), None

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Any:
        return cls(*children)


@pytest.mark.parametrize("make", [Scale, CallableTree], ids=["equinox", "registered class"])
def test_a_callable_pytree_of_gradients_is_no_closure(make):
    opt = optim.SGD(make(jnp.array([1.0])), lr=0.5)
    assert opt.step(make(jnp.array([1.0]))) is None
    assert opt.params.factor.tolist() == [0.5]


@pytest.mark.slow
def test_wrong_gradients_name_the_parameter_and_change_nothing():
    opt = optim.Adam({"layer": {"w": np.ones(2), "b": np.ones(1)}}, lr=0.1)
    right = {"layer": {"w": jnp.ones(2), "b": jnp.ones(1)}}
    opt.step(right)
    before = jax.tree.map(np.asarray, opt.state_dict())

    def wrong(error: type[Exception], message: str, **grads: Any) -> None:
        with pytest.raises(error, match=message):
            opt.step({"layer": {**right["layer"], **grads}})

    wrong(ValueError, r"'layer.b' has shape \(3,\), but the parameter has \(1,\)", b=jnp.ones(3))
    wrong(TypeError, "'layer.b' has dtype int64", b=jnp.ones(1, int))
    wrong(TypeError, "'layer.w' is complex, the parameter is not", w=jnp.ones(2, complex))
    wrong(RuntimeError, "Adam does not support sparse gradients, but that of 'layer.w'", w=BCOO.fromdense(jnp.ones(2)))
    wrong(ValueError, "grads has 'layer.extra', which params lacks", extra=jnp.ones(1))
    with pytest.raises(ValueError, match=r"grads has nothing for 'layer\.b'"):
        opt.step({"layer": {"w": jnp.ones(2)}})
    with pytest.raises(TypeError, match="got two functions"):
        opt.step(lambda: 0, lambda: 0)
    with pytest.raises(TypeError, match="gradients or a closure that sets them, but got both"):
        opt.step(right, closure=lambda: 0)
    chex.assert_trees_all_equal(opt.state_dict(), before)


def test_errors_name_parameters_that_share_a_name_by_path():
    opt = optim.SGD({"a": optim.Parameter([1.0], "w"), "b": optim.Parameter([1.0], "w")})
    with pytest.raises(ValueError, match="'b' has shape"):
        opt.step({"a": jnp.ones(1), "b": jnp.ones(2)})


@by_row(TORCH)
def test_no_gradient_at_all_is_no_step(row):
    def program(side: Any) -> Any:
        params = params_of(side, row)
        opt = made(side, row, params)
        with pytest.warns(UserWarning, match="did nothing") if side is Ours else contextlib.nullcontext():
            opt.step()
        assert row.name != "Adagrad" or len(opt.state) == 2
        return opt, params

    compare(program)


@pytest.mark.slow
def test_zero_grad():
    def program(side: Any, **options: Any) -> Any:
        params = [side.param([1.0, 2.0]), side.param([3.0]), side.param([[1.0]] * 4)]
        opt = side.optim.SGD([{"params": params[:1]}, {"params": params[1:]}])
        params[0].grad = side.array([1.0, 1.0])
        params[2].grad = side.rows(np.ones((1, 1)), [2], (4, 1))
        opt.zero_grad(**options)
        return [param.grad for param in params]

    for options in ({}, {"set_to_none": True}):
        assert program(Ours, **options) == program(Theirs, **options) == [None, None, None]
    ours, theirs = program(Ours, set_to_none=False), program(Theirs, set_to_none=False)
    assert ours[0].tolist() == theirs[0].tolist() == [0.0, 0.0]
    assert ours[1] is theirs[1] is None
    assert isinstance(ours[2], BCOO)
    assert ours[2].nse == theirs[2]._nnz() == 0
    assert not ours[2].todense().any()


@pytest.mark.slow
def test_a_sparse_gradient_of_zeros_touches_no_row():
    def program(side: Any) -> Any:
        param = side.param(start((4, 2))[0])
        opt = side.optim.SparseAdam([param], lr=0.1)
        steps(side, opt, [param], range(2))
        opt.zero_grad(set_to_none=False)
        opt.step()
        return opt, [param]

    compare(program)


@pytest.mark.slow
def test_two_optimizers_of_one_parameter_see_each_others_updates():
    def program(side: Any) -> Any:
        params = [side.param(x) for x in start((3,), (2,))]
        first, second = side.optim.Adam(params, lr=0.1), side.optim.SGD(params[:1], lr=0.5, momentum=0.9)
        for t in range(4):
            steps(side, first, params, range(t, t + 1))
            steps(side, second, params, range(10 + t, 11 + t))
        return first, params

    compare(program)
    cell = optim.Parameter(1.0)
    first, second = optim.SGD([cell], lr=0.5), optim.SGD({"w": cell}, lr=0.25)
    first.step([1.0])
    second.step({"w": 1.0})
    first.step([1.0])
    assert cell.value == first.params[0] == second.params["w"] == -0.25
    second.minimize(lambda params: params["w"] ** 2)
    assert first.params[0] == -0.125


def test_an_assigned_value_is_where_the_next_step_starts():
    def program(side: Any) -> Any:
        params = [side.param(x) for x in start((3,), (2,))]
        opt = side.optim.Adam(params, lr=0.1)
        steps(side, opt, params, range(2))
        if side is Ours:
            params[0].value = np.full(3, 7.0)
        else:
            params[0].data = torch.full((3,), 7.0, dtype=torch.float64)
        steps(side, opt, params, range(2, 4))
        return opt, params

    compare(program)


# Parameters.


def test_a_parameter_checks_what_is_assigned():
    param = optim.Parameter(np.ones((2, 3), np.float32), "w")
    assert (param.shape, param.dtype, param.name, param.grad) == ((2, 3), np.float32, "w", None)
    assert repr(param) == "Parameter(shape=(2, 3), dtype=float32, name='w')"
    assert repr(optim.Parameter(np.float32(1))) == "Parameter(shape=(), dtype=float32)"
    param.value = np.zeros((2, 3), np.float64)
    assert param.value.dtype == np.float32
    assert not param.value.any()
    with pytest.raises(ValueError, match=r"assigned to 'w' has shape \(3, 2\), but the parameter has \(2, 3\)"):
        param.value = np.zeros((3, 2))
    with pytest.raises(
        ValueError, match=r"gradient assigned to 'w' has shape \(1, 3\), but the parameter has \(2, 3\)"
    ):
        param.grad = np.zeros((1, 3))
    with pytest.raises(ValueError, match="gradient assigned to a parameter has shape"):
        optim.Parameter(1.0).grad = np.ones(1)
    with pytest.raises(TypeError, match="parameter 'w' has dtype int64"):
        param.value = np.zeros((2, 3), int)
    with pytest.raises(TypeError, match="parameter has dtype int64"):
        optim.Parameter(1)
    with pytest.raises(TypeError, match="parameter 'flag' has dtype bool"):
        optim.Parameter(True, "flag")
    assert not param.value.any()
    assert param.grad is None


def test_a_parameter_is_a_copy():
    array = np.ones((300, 300))
    param = optim.Parameter(array)
    param.grad = gradient = np.ones((300, 300))
    opt = optim.SGD([param], lr=0.5)
    array[:] = 7
    opt.step()
    assert np.all(param.value == 0.5)
    assert np.all(gradient == 1)
    other = np.full((300, 300), 2.0)
    param.value = other
    other[:] = 7
    assert np.all(param.value == 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "value", [1.5, 1.5 + 2j, np.float32(1), [1.0, 2.0], np.ones((2, 0)), jnp.ones(2, jnp.bfloat16)]
)
def test_a_parameter_of_any_shape_and_dtype_is_stepped_and_pickled(value):
    param = optim.Parameter(value, "w")
    assert not param.value.weak_type
    param.grad = jnp.ones(param.shape, param.dtype)
    optim.SGD([param], lr=0.5).step()
    np.testing.assert_array_equal(param.value, jnp.asarray(value) - 0.5)
    assert param.value.dtype == param.dtype
    for twin in (pickle.loads(pickle.dumps(param)), copy.deepcopy(param)):
        assert (twin.name, twin.shape, twin.dtype) == (param.name, param.shape, param.dtype)
        assert jnp.array_equal(twin.value, param.value)
        assert jnp.array_equal(twin.grad, param.grad)
        twin.value = twin.value + 1
    np.testing.assert_array_equal(param.value, jnp.asarray(value) - 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("of_others", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_gradients_of_other_libraries_are_copied(of_others):
    ours, theirs = (optim.Adam({"w": jnp.ones(3)}, lr=0.1) for _ in range(2))
    given = of_others([0.5, -1.0, 2.0])
    ours.step({"w": jnp.array([0.5, -1.0, 2.0])})
    theirs.step({"w": given})
    given[:] = 0
    chex.assert_trees_all_equal(theirs.params, ours.params)
