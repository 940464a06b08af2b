"""The state of an optimizer: what is in it, editing, saving and loading."""

import copy
import functools
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from comparisons import assert_same
from jaxoptim import optim
from optim_sides import (
    SIDES,
    TORCH,
    Ours,
    Theirs,
    by_row,
    check_state_dicts,
    check_values,
    compare,
    made,
    params_of,
    start,
    steps,
)
from table import FIRST, STATES, Case

pytestmark = pytest.mark.usefixtures("x64")


# State.


STEP_TYPES = {"SGD": None, "Muon": None, "SparseAdam": int, "AdagradRMSProp": int, "ClippedAdam": int, "DCTAdam": int}


def trained(case: Case, count: int = 3, **options: Any) -> tuple[Any, list[Any]]:
    params = params_of(Ours, case.row)
    opt = getattr(optim, case.row.name)(params, **case.options, **options)
    steps(Ours, opt, params, range(count))
    return opt, params


@pytest.mark.costly
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_the_count_of_steps_has_torchs_type(case):
    opt, params = trained(case)
    kind = STEP_TYPES.get(case.row.name, jax.Array)
    for param in params:
        if kind is None:
            assert "step" not in opt.state[param]
            continue
        step = opt.state[param]["step"]
        assert step == 3
        assert isinstance(step, kind)
        assert kind is int or (step.dtype, step.shape) == (np.float32, ())


@by_row(TORCH)
def test_there_is_no_state_before_the_first_step_but_adagrads(row):
    opts = [made(side, row, params_of(side, row)) for side in SIDES]
    assert len(opts[0].state) == len(opts[1].state) == (2 if row.name == "Adagrad" else 0)
    check_state_dicts(opts[0].state_dict(), opts[1].state_dict())
    for side, opt in zip(SIDES, opts, strict=True):
        opt.add_param_group({"params": params_of(side, row, 1)})
    check_state_dicts(opts[0].state_dict(), opts[1].state_dict())


@pytest.mark.slow
def test_state_reads_as_a_dict_of_dicts():
    opt = optim.Adam({"a": np.ones(2), "b": np.ones(1)})
    a, b = opt.param_groups[0]["params"]
    assert a not in opt.state
    assert opt.state[a] == {}
    assert opt.state.get(a) is None
    assert opt.state.get(a, 3) == 3
    assert opt.state.pop(a, 3) == 3
    with pytest.raises(KeyError):
        opt.state.pop(a)
    assert dict(opt.state) == {}
    opt.step({"a": jnp.ones(2), "b": None})
    assert list(opt.state) == [a]
    assert len(opt.state) == 1
    assert b not in opt.state
    assert list(opt.state[a]) == ["step", "exp_avg", "exp_avg_sq"]
    assert len(opt.state[a]) == 3
    assert "exp_avg" in opt.state[a]
    assert "momentum" not in opt.state[a]
    assert [key for key, _ in opt.state[a].items()] == ["step", "exp_avg", "exp_avg_sq"]
    assert opt.state[a]["exp_avg"].shape == (2,)
    with pytest.raises(KeyError):
        (lambda: opt.state[a]["momentum"])()
    with pytest.raises(KeyError):
        (lambda: opt.state["other"])()
    assert repr(opt.state) == repr({a: dict(opt.state[a])})
    view = opt.state[a]
    opt.step({"a": jnp.ones(2), "b": jnp.ones(1)})
    assert view["step"] == 2
    assert opt.state[a] is view
    assert list(opt.state) == [a, b]


def edit_slot(state: Any, p: Any, side: Any) -> None:
    state[p]["exp_avg"] = side.array([9.0, -9.0, 1.0])


def edit_step(state: Any, p: Any, side: Any) -> None:
    state[p]["step"] = torch.tensor(50.0) if side is Theirs else 50.0


def edit_by_update(state: Any, p: Any, side: Any) -> None:
    state[p].update(exp_avg=side.array([1.0, 2.0, 3.0]), exp_avg_sq=side.array([1.0, 2.0, 3.0]))


def scale(state: Any, p: Any, side: Any) -> None:
    state[p]["exp_avg"] = state[p]["exp_avg"] * 10
    state[p]["exp_avg_sq"] = state[p]["exp_avg_sq"] * 10


def replace_entry(state: Any, p: Any, side: Any) -> None:
    step = torch.tensor(7.0) if side is Theirs else jnp.float32(7.0)
    state[p] = {"step": step, "exp_avg": side.array([1.0, 2.0, 3.0]), "exp_avg_sq": side.array([1.0, 2.0, 3.0])}


def clear_entry(state: Any, p: Any, side: Any) -> None:
    state[p].clear()


def delete_entry(state: Any, p: Any, side: Any) -> None:
    del state[p]
    assert p not in state


def pop_entry(state: Any, p: Any, side: Any) -> None:
    entry = state.pop(p)
    assert entry["step"] == 3
    state[p] = entry


def pop_and_drop(state: Any, p: Any, side: Any) -> None:
    assert len(state.pop(p)) == 3


def clear_all(state: Any, p: Any, side: Any) -> None:
    state.clear()
    assert len(state) == 0


def add_own(state: Any, p: Any, side: Any) -> None:
    state[p]["ema"] = side.array([1.0])
    state[p]["count"] = 3


def exchange(state: Any, p: Any, side: Any) -> None:
    q = next(key for key in state if key is not p)
    state[p]["exp_avg"], state[q]["exp_avg"] = state[q]["exp_avg"][:3], side.array([4.0, 4.0, 4.0, 4.0])


def setdefault(state: Any, p: Any, side: Any) -> None:
    assert state.setdefault(p, {})["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [
        edit_slot,
        edit_step,
        edit_by_update,
        scale,
        replace_entry,
        clear_entry,
        delete_entry,
        pop_entry,
        pop_and_drop,
        clear_all,
        add_own,
        exchange,
        setdefault,
    ],
)
def test_what_is_written_into_state_takes_effect_as_in_torch(edit):
    def program(side: Any) -> Any:
        params = [side.param(x) for x in start((3,), (4,))]
        opt = side.optim.Adam(params, lr=0.1)
        steps(side, opt, params, range(3))
        edit(opt.state, params[0], side)
        steps(side, opt, params, range(3, 6))
        return opt, params

    (ours, params), (theirs, tensors) = program(Ours), program(Theirs)
    check_values(params, tensors)
    for param, tensor in zip(params, tensors, strict=True):
        assert set(ours.state[param]) == set(theirs.state[tensor])
        for name, slot in theirs.state[tensor].items():
            np.testing.assert_allclose(ours.state[param][name], slot, rtol=1e-12)


@pytest.mark.costly
@pytest.mark.parametrize("written", ["deleted", None])
@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}, {"nesterov": True}], ids=str)
def test_a_momentum_buffer_that_is_missing_or_none_begins_anew(options, written):
    def program(side: Any) -> Any:
        params = [side.param(x) for x in start((3,), (4,))]
        opt = side.optim.SGD(params, lr=0.1, momentum=0.9, **options)
        steps(side, opt, params, range(3))
        if written is None:
            opt.state[params[0]]["momentum_buffer"] = None
        else:
            del opt.state[params[0]]["momentum_buffer"]
        steps(side, opt, params, range(3, 6))
        return opt, params

    compare(program)


def test_state_under_other_keys_is_kept_and_saved():
    def program(side: Any) -> Any:
        params = [side.param([1.0])]
        opt = side.optim.Adam(params)
        opt.state["notes"] = {"run": 3}
        opt.state[7] = "seven"
        steps(side, opt, params, range(1))
        twin = side.optim.Adam([side.param([1.0])])
        twin.load_state_dict(opt.state_dict())
        assert twin.state["notes"] == {"run": 3}
        assert "notes" in twin.state
        assert pickle.loads(pickle.dumps(opt)).state[7] == "seven"
        keys = list(opt.state_dict()["state"])
        del opt.state["notes"]
        assert "notes" not in opt.state
        return sorted(map(str, keys))

    assert program(Ours) == program(Theirs) == ["0", "7", "notes"]


def test_a_slot_of_another_shape_is_refused_by_name():
    opt = optim.Adam({"w": np.ones(3), "b": np.ones(2)})
    grads = {"w": jnp.ones(3), "b": jnp.ones(2)}
    opt.step(grads)
    b, _ = opt.param_groups[0]["params"]
    kept, values = opt.state[b]["exp_avg"], opt.params
    for wrong in (jnp.ones(3), jnp.ones(1), 1.0):
        opt.state[b]["exp_avg"] = wrong
        with pytest.raises(ValueError, match=r"slot 'exp_avg' of 'b' has shape"):
            opt.step(grads)
    assert_same(opt.params, values)
    opt.state[b]["exp_avg"] = kept
    opt.step(grads)
    assert opt.state[b]["step"] == 2
    with pytest.raises(TypeError, match="is a dict of slots, but got int"):
        opt.state[b] = 3


def test_a_numpy_slot_is_copied():
    opt = optim.SGD([np.ones((300, 300))], lr=0.1, momentum=0.9)
    opt.step([jnp.ones((300, 300))])
    (param,) = opt.param_groups[0]["params"]
    array = np.ones((300, 300))
    opt.state[param]["momentum_buffer"] = array
    opt.step([jnp.zeros((300, 300))])
    array[:] = 7
    opt.step([jnp.zeros((300, 300))])
    np.testing.assert_allclose(opt.state[param]["momentum_buffer"], 0.81)
    assert np.all(array == 7)
    saved = opt.state_dict()
    saved["state"][0]["momentum_buffer"] = array
    opt.load_state_dict(saved)
    array[:] = 1
    opt.step([jnp.zeros((300, 300))])
    np.testing.assert_allclose(opt.state[param]["momentum_buffer"], 6.3)


# Saving and loading.


@pytest.mark.costly
@pytest.mark.numbers
@pytest.mark.parametrize("case", STATES, ids=str)
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_a_saved_run_goes_on_bit_for_bit(case, way):
    opt, params = trained(case)
    if way == "state_dict":
        twins = [optim.Parameter(param.value) for param in params]
        other = getattr(optim, case.row.name)(twins)  # its options come from the state dict
        other.load_state_dict(opt.state_dict())
    else:
        other = pickle.loads(pickle.dumps(opt)) if way == "pickle" else copy.deepcopy(opt)
        twins = other.param_groups[0]["params"]
    assert repr(other) == repr(opt)
    saved, loaded = opt.state_dict(), other.state_dict()
    assert pickle.dumps(jax.tree.map(np.asarray, saved["state"])) == pickle.dumps(
        jax.tree.map(np.asarray, loaded["state"])
    )
    assert saved["param_groups"] == loaded["param_groups"]
    steps(Ours, opt, params, range(3, 6))
    steps(Ours, other, twins, range(3, 6))
    for param, twin in zip(params, twins, strict=True):
        assert twin is not param
        assert jnp.array_equal(param.value, twin.value)


@pytest.mark.costly
@pytest.mark.parametrize("case", [case for case in STATES if case.row in TORCH], ids=str)
def test_torchs_state_dict_is_loaded_as_it_is(case):
    tensors = params_of(Theirs, case.row)
    theirs = case.parents(tensors)
    steps(Theirs, theirs, tensors, range(3))
    params = [optim.Parameter(Theirs.numpy(tensor)) for tensor in tensors]
    ours = getattr(optim, case.row.name)(params)
    ours.load_state_dict(theirs.state_dict())
    assert not any(isinstance(slot, torch.Tensor) for slots in ours.state.values() for slot in slots.values())
    steps(Ours, ours, params, range(3, 6))
    steps(Theirs, theirs, tensors, range(3, 6))
    check_values(params, tensors)
    check_state_dicts(ours.state_dict(), theirs.state_dict())


@pytest.mark.slow
def test_slots_of_torch_are_copied_in_any_dtype():
    tensor = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    theirs = torch.optim.SGD([tensor], momentum=0.9)
    tensor.grad = torch.arange(6.0).reshape(3, 2).T.to(torch.bfloat16)
    theirs.step()
    ours = optim.SGD([jnp.ones((2, 3), jnp.bfloat16)])
    ours.load_state_dict(theirs.state_dict())
    theirs.state[tensor]["momentum_buffer"].fill_(100.0)
    (buffer,) = (slots["momentum_buffer"] for slots in ours.state.values())
    assert np.asarray(buffer, float).tolist() == [[0, 2, 4], [1, 3, 5]]
    ours.step([jnp.zeros((2, 3), jnp.bfloat16)])
    (slots,) = ours.state.values()
    np.testing.assert_allclose(np.asarray(slots["momentum_buffer"], float)[1, 2], 4.5)


@pytest.mark.slow
def test_slots_keep_the_dtype_that_they_have_here():
    opt = optim.Adam([np.ones(2, np.float32)])
    other = optim.Adam([np.ones(2, np.float64)])
    opt.step([np.ones(2)])
    other.load_state_dict(opt.state_dict())
    other.step([np.ones(2)])
    (slots,) = other.state.values()
    assert [slots[name].dtype for name in slots] == [np.float32, np.float64, np.float64]


def test_options_and_unknown_keys_come_from_the_state_dict():
    def program(side: Any) -> Any:
        old = side.optim.Adam([{"params": [side.param([1.0])], "lr": 0.5, "mine": "kept"}], betas=(0.5, 0.6))
        new = side.optim.Adam([("w", side.param([1.0]))], lr=0.1, weight_decay=0.3)
        new.param_groups[0]["only here"] = 1
        given = old.state_dict()
        new.load_state_dict(given, **side.permissive)
        assert given["param_groups"][0]["params"] == [0]
        assert new.param_groups[0] is not given["param_groups"][0]
        return {key: value for key, value in new.param_groups[0].items() if key != "params"}

    ours, theirs = program(Ours), program(Theirs)
    assert ours == theirs
    assert (ours["lr"], ours["mine"], ours["param_names"], "only here" in ours) == (0.5, "kept", ["w"], False)
    named = optim.SGD([("saved", optim.Parameter(1.0))]).state_dict()
    for params in ([optim.Parameter(1.0)], [("here", optim.Parameter(1.0))]):
        opt = optim.SGD(params)
        opt.load_state_dict(named, strict=False)
        assert opt.param_groups[0]["param_names"] == ["saved"]


@by_row(TORCH)
def test_options_that_older_checkpoints_lack_are_off(row):
    added = ["foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay"]
    if row.name in ("Adafactor", "Muon", "SparseAdam"):
        added = ["foreach"]  # the rest is as old as the class

    def program(side: Any) -> dict[str, Any]:
        options = {"amsgrad": True} if row.name == "Adam" else {}
        opt = made(side, row, params_of(side, row), **options)
        old = opt.state_dict()
        for group in old["param_groups"]:
            for name in added:
                group.pop(name, None)
        opt.load_state_dict(old)
        return {key: value for key, value in opt.param_groups[0].items() if key != "params"}

    theirs = program(Theirs)
    if row.name == "SGD":
        assert theirs.pop("fused") is False  # torch's constructor says None
        theirs["fused"] = None
    assert program(Ours) == theirs


def unchanged(opt: Any, state_dict: Any, error: type[Exception], message: str, **options: Any) -> None:
    before = repr(opt), pickle.dumps(opt.state_dict())
    given = copy.deepcopy(state_dict)
    with pytest.raises(error, match=message):
        opt.load_state_dict(given, **options)
    assert (repr(opt), pickle.dumps(opt.state_dict())) == before


@pytest.mark.slow
def test_loading_checks_what_it_is_given_and_changes_nothing():
    opt = optim.Adam({"w": np.ones((2, 2)), "b": np.ones(2)}, lr=0.1)
    grads = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    opt.step(grads)
    saved = opt.state_dict()

    def edited(edit: Any) -> Any:
        state_dict = copy.deepcopy(saved)
        edit(state_dict)
        return state_dict

    sgd = optim.SGD({"w": np.ones((2, 2)), "b": np.ones(2)}, momentum=0.9)
    sgd.step(grads)
    adamax = optim.Adamax({"w": np.ones((2, 2)), "b": np.ones(2)})
    adamax.step(grads)
    unchanged(opt, sgd.state_dict(), ValueError, "is of SGD, but this is Adam")
    unchanged(
        opt, dict(sgd.state_dict()), ValueError, "options 'momentum', 'dampening', 'nesterov' in group 0 .of 'b', 'w'"
    )
    unchanged(sgd, dict(saved), ValueError, "options 'betas', 'eps', .* which SGD does not take. It takes lr, momentum")
    foreign = {"state": adamax.state_dict()["state"], "param_groups": saved["param_groups"]}
    unchanged(opt, foreign, ValueError, "has exp_avg, exp_inf, step for the parameter 'b', but Adam")
    unchanged(opt, {}, KeyError, "has no 'state'")
    unchanged(opt, {"state": {}}, KeyError, "has no 'param_groups'")
    unchanged(
        opt,
        edited(lambda sd: sd["state"][1].update(exp_avg=np.ones((2, 3)))),
        ValueError,
        r"'exp_avg' of shape \(2, 3\) for the parameter 'w'",
    )
    unchanged(opt, edited(lambda sd: sd["state"][0].pop("exp_avg_sq")), ValueError, "for the parameter 'b'")
    unchanged(opt, edited(lambda sd: sd["state"][0].pop("step")), ValueError, "for the parameter 'b'")
    unchanged(
        opt, edited(lambda sd: sd["state"][0].update(other=1)), ValueError, "has exp_avg, exp_avg_sq, other, step"
    )
    unchanged(opt, edited(lambda sd: sd["param_groups"][0].update(lr=-1)), ValueError, "Invalid lr")
    unchanged(opt, edited(lambda sd: sd["param_groups"][0].pop("lr")), KeyError, "has no option 'lr'")
    for side in SIDES:
        loaded = side.optim.SGD([side.param([1.0]), side.param([2.0])])
        many = side.optim.SGD([{"params": [side.param([1.0])]}, {"params": [side.param([1.0])]}]).state_dict()
        with pytest.raises(ValueError, match=r"^loaded state dict has a different number of parameter group"):
            loaded.load_state_dict(many)
        with pytest.raises(ValueError, match=r"^loaded state dict contains a parameter group that doesn't"):
            loaded.load_state_dict(side.optim.SGD([side.param([1.0])]).state_dict())


@pytest.mark.slow
def test_loading_without_strict_takes_what_there_is():
    grads = [jnp.ones(2)]
    adamax = optim.Adamax([np.ones(2)])
    adamax.step(grads)
    opt = optim.Adam([np.ones(2)])
    opt.load_state_dict(adamax.state_dict(), strict=False)
    opt.step(grads)
    (slots,) = opt.state.values()
    assert slots["step"] == 2
    assert set(slots) == {"step", "exp_avg", "exp_avg_sq", "exp_inf"}
    np.testing.assert_allclose(slots["exp_avg"], 0.19)


def test_state_of_parameters_that_were_never_updated_is_absent():
    def program(side: Any) -> Any:
        params = [side.param(x) for x in start((3,), (4,))]
        opt = side.optim.Adam(params, lr=0.1)
        steps(side, opt, params[1:], range(2))
        params[1].grad = None
        twin = side.optim.Adam(params)
        twin.load_state_dict(opt.state_dict())
        assert list(twin.state_dict()["state"]) == [1]
        steps(side, twin, params[:1], range(2))
        return twin, params

    compare(program)


@pytest.mark.slow
def test_adams_state_goes_into_adamw_and_back():
    def program(source: str, target: str, side: Any) -> Any:
        params = [side.param(x) for x in start((3,), (4,))]
        old = getattr(side.optim, source)(params, lr=0.1, weight_decay=0.1)
        steps(side, old, params, range(3))
        new = getattr(side.optim, target)(params)
        new.load_state_dict(old.state_dict(), **side.permissive)
        assert new.param_groups[0]["decoupled_weight_decay"] is True
        steps(side, new, params, range(3, 6))
        return new, params

    compare(functools.partial(program, "Adam", "AdamW"))
    compare(functools.partial(program, "AdamW", "Adam"))


def test_a_momentum_buffer_of_none_is_loaded_as_a_first_step():
    def program(side: Any) -> Any:
        params = [side.param(x) for x in start((3,), (4,))]
        opt = side.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
        steps(side, opt, params, range(3))
        saved = opt.state_dict()
        saved["state"] = {0: {"momentum_buffer": None}, 1: saved["state"][1]}
        opt.load_state_dict(saved)
        steps(side, opt, params, range(3, 6))
        return opt, params

    compare(program)


@pytest.mark.slow
def test_a_state_dict_survives_later_steps():
    opt = optim.Adam({"w": np.ones((200, 200)), "b": np.ones(2)})
    grads = {"w": jnp.ones((200, 200)), "b": jnp.ones(2)}
    opt.step(grads)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    opt.step(grads)
    saved["param_groups"][0]["lr"] = 3.0
    assert opt.param_groups[0]["lr"] == 1e-3
    chex.assert_trees_all_equal(saved["state"], kept["state"])
    opt.load_state_dict(kept)
    opt.step(grads)
    chex.assert_trees_all_equal(saved["state"], kept["state"])


def test_a_pickled_optimizer_keeps_groups_trees_and_identities():
    weight = optim.Parameter([1.0], "w")
    opt = optim.Adam([{"params": {"w": weight}, "lr": 0.5}, {"params": [np.ones(2)]}])
    opt.step([{"w": jnp.ones(1)}, [jnp.ones(2)]])
    for twin, cell in (pickle.loads(pickle.dumps((opt, weight))), copy.deepcopy((opt, weight))):
        assert twin.param_groups[0]["params"][0] is cell
        chex.assert_trees_all_equal_structs(twin.params, opt.params)
        assert twin.defaults == opt.defaults
        assert cell in twin.state
        twin.step([{"w": jnp.ones(1)}, [jnp.ones(2)]])
        np.testing.assert_allclose([weight.value[0], cell.value[0]], [0.5, 0.0], atol=1e-7)
        with pytest.raises(ValueError, match="'w' has shape"):
            twin.step([{"w": jnp.ones(2)}, [jnp.ones(2)]])


def test_groups_that_share_parameters_have_torchs_ids():
    theirs = torch.optim.SGD([torch.ones(2), torch.ones(2)], lr=0.1, momentum=0.9)
    ours = optim.SGD([optim.Parameter(jnp.ones(2)), optim.Parameter(jnp.ones(2))], lr=0.1, momentum=0.9)
    for opt, ones in ((theirs, torch.ones(2)), (ours, jnp.ones(2))):
        for param in opt.param_groups[0]["params"]:
            param.grad = ones
        opt.step()
        opt.param_groups.extend(opt.param_groups)
        opt.step()  # twice, because the group is there twice
    for saved in (theirs.state_dict(), ours.state_dict()):
        assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [0, 1]]
        assert list(saved["state"]) == [0, 1]
    for mine, other in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        np.testing.assert_allclose(mine.value, other.numpy(), rtol=1e-6)


def test_a_parameter_in_two_groups_is_refused_at_the_next_step():
    opt = optim.SGD({"w": jnp.ones(2), "v": jnp.ones(2)}, groups=[("w", {"lr": 0.1})])
    opt.param_groups[1]["params"].append(opt.param_groups[0]["params"][0])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.step({"w": jnp.ones(2), "v": jnp.ones(2)})
