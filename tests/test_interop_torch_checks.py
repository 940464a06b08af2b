"""What loading a state dict checks: which parameter is which, and what is refused, by name and without a change."""

import copy
import functools
import pickle
from collections import OrderedDict

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxoptim import optim
from jaxoptim.optim.state_dicts import StateDict
from table import FIRST, STATES
from test_interop_torch import close, frozen, numbers, quartic, refused, same_state, through_file, to_torch

# Which parameter is which, and what is refused.


def described(name, **arrays):
    """An optimizer of named parameters in the order that is given."""
    made = getattr(optim, name)([(path, optim.Parameter(x)) for path, x in arrays.items()])
    made.minimize(quartic)
    return made


A, B = np.array([1.0, -2.0]), np.array([[0.5, 0.1, 2.0]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "target"),
    [
        ("Adam", "torch", "a pytree"),
        ("Adam", "ours", "other order"),
        ("LBFGS", "torch", "a pytree"),
        ("LBFGS", "torch", "other order"),
        ("LBFGS", "ours", "a pytree"),
        ("LBFGS", "ours", "other order"),
    ],
)
def test_parameters_are_matched_by_name_not_by_position(name, side, target, x64):
    old = described(name, w=B, b=A, c=A[:1])  # a pytree has them by the alphabet
    saved = old.state_dict()
    if side == "torch":
        tensors = {path: torch.tensor(x, requires_grad=True) for path, x in (("w", B), ("b", A), ("c", A[:1]))}
        theirs = getattr(torch.optim, name)(list(tensors.items()))

        def closure():
            theirs.zero_grad()
            loss = sum(((x - 0.3) ** 4).sum() for x in tensors.values())
            loss.backward()
            return loss

        theirs.step(closure)
        saved = through_file(theirs.state_dict())
    w, b, c = old.params
    new = {"c": c, "w": w, "b": b}
    new = getattr(optim, name)(new if target == "a pytree" else [(k, optim.Parameter(x)) for k, x in new.items()])
    new.load_state_dict(saved)
    if target != "a pytree":
        assert new.param_groups[0]["param_names"] == ["c", "w", "b"]
    for _ in range(2):
        old.minimize(quartic)
        new.minimize(quartic)
    order = [new.params[k] for k in "wbc"] if target == "a pytree" else [new.params[i] for i in (1, 2, 0)]
    close(order, old.params)


def test_groups_are_matched_by_the_names_in_them():
    def made(*groups):
        return optim.Adam([
            {"params": [(name, optim.Parameter(np.ones(len(name)))) for name in names.split()], "lr": lr}
            for names, lr in groups
        ])  # fmt: skip

    old = made(("a bb", 0.1), ("ccc", 0.2))
    old.minimize(quartic)
    new = made(("ccc", 0.5), ("bb a", 0.5))
    new.load_state_dict(old.state_dict())
    assert [(group["lr"], group["param_names"]) for group in new.param_groups] == [(0.2, ["ccc"]), (0.1, ["bb", "a"])]
    state = new.state_dict()["state"]
    assert [state[i]["exp_avg"].shape for i in range(3)] == [(3,), (2,), (1,)]
    others = made(("a", 0.1), ("bb ccc", 0.2))
    with refused(others, "other groups: group 0 here is of 'a', group 0 there of 'a', 'bb'"):
        others.load_state_dict(old.state_dict())
    disjoint = made(("a dd", 0.1), ("ccc", 0.2))
    with refused(disjoint, "of other parameters: it lacks 'dd', and it has 'bb', unknown here"):
        disjoint.load_state_dict(old.state_dict())
    disjoint.load_state_dict(old.state_dict(), strict=False)
    assert disjoint.state_dict()["state"][1]["exp_avg"].shape == (2,)


@pytest.mark.parametrize(
    ("there", "here_"),
    [
        ([A, 2 * A], [("x", A), ("y", 2 * A)]),
        ([("x", A), ("y", 2 * A)], [A, 2 * A]),
        ([A, 2 * A], {"x": A, "y": 2 * A}),
        ([A, 2 * A], [[A], [2 * A]]),
        ([("x", A), ("x", 2 * A)], [("x", A), ("y", 2 * A)]),
    ],
    ids=["names here", "names there", "a dict", "digits of lists", "a name twice"],
)
def test_without_names_on_both_sides_position_counts(there, here_):
    def made(params):
        named = isinstance(params, list) and isinstance(params[0], tuple)
        return optim.Adam([(name, optim.Parameter(x)) for name, x in params] if named else params)

    old, new = made(there), made(here_)
    old.minimize(quartic)
    new.load_state_dict(old.state_dict())
    for i in range(2):
        expected = old.state_dict()["state"][i]["exp_avg"]
        np.testing.assert_array_equal(new.state_dict()["state"][i]["exp_avg"], expected)


TORCH_CASES = {case.row.name: case for case in FIRST if case.row.path.startswith("torch.")}
NAMED = [*TORCH_CASES, "LBFGS"]


@functools.cache
def one_step(name):
    """torch's state dict after a step with one matrix, and ours of the same state."""
    tensor = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    theirs, ours = getattr(torch.optim, name)([("weight", tensor)]), getattr(optim, name)({"weight": np.ones((3, 2))})

    def closure():
        loss = ((tensor - 0.3) ** 4).sum()
        (grad,) = torch.autograd.grad(loss, tensor)
        tensor.grad = grad.to_sparse(1) if name == "SparseAdam" else grad
        return loss

    theirs.step(closure)
    ours.load_state_dict(theirs.state_dict())
    return through_file(theirs.state_dict()), ours.state_dict()


@pytest.mark.parametrize("name", NAMED)
def test_state_of_another_class_is_refused(name, x64):
    own = set(one_step(name)[0]["param_groups"][0])
    opt, accepted = optim.__dict__[name]({"weight": np.ones((3, 2))}), []
    for torchs, ours in (one_step(other) for other in NAMED if other != name):
        with refused(opt, f"is of {ours.made_by}, but this is {name}. Load it into {ours.made_by}"):
            opt.load_state_dict(ours)
        if set(torchs["param_groups"][0]) == own:
            continue  # torch's AdamW is an Adam with another switch; see below
        for plain in (torchs, dict(ours)):
            try:
                with refused(opt, name, (ValueError, KeyError)):
                    opt.load_state_dict(plain)
            except pytest.fail.Exception:
                accepted.append(f"{ours.made_by} as {name}")
                opt = optim.__dict__[name]({"weight": np.ones((3, 2))})
    assert not accepted


@pytest.mark.parametrize("pair", ["Adamax Adam", "Adam SGD", "RMSprop Adadelta", "SparseAdam RAdam", "SGD Adagrad"])
def test_without_strict_state_of_another_class_is_taken_as_by_torch(pair, x64):
    source, name = pair.split()
    given = one_step(source)[0]
    theirs = getattr(torch.optim, name)([("weight", torch.ones(3, 2, dtype=torch.float64))])
    state = given["state"] if name != "Adagrad" else {}  # torch misses the count when it loads
    theirs.load_state_dict(copy.deepcopy({**given, "state": state}))
    opt = getattr(optim, name)([("weight", optim.Parameter(np.ones((3, 2))))])
    opt.load_state_dict({**given, "state": state}, strict=False)
    same_state(opt.state_dict(), theirs.state_dict())
    mine, parents = opt.state_dict()["param_groups"][0], theirs.state_dict()["param_groups"][0]
    assert mine | parents | {"fused": 0} == mine | {"fused": 0}  # what is missing is off, by False or by None


def test_adams_coupled_decay_is_not_taken_for_adamws():
    torchs = torch.optim.Adam([("weight", torch.ones(2))], weight_decay=0.1).state_dict()
    opt = optim.AdamW({"weight": np.ones(2)})
    with refused(opt, "is of Adam: it adds weight_decay=0.1 times the parameter to the gradient of 'weight'"):
        opt.load_state_dict(torchs)
    opt.load_state_dict(torchs, strict=False)
    assert opt.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.costly
@pytest.mark.parametrize("case", STATES, ids=str)
def test_every_slot_of_a_wrong_shape_or_kind_is_refused_by_name(case, x64):
    tensors = [torch.ones(3, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)]
    theirs = case.parents(tensors)
    for tensor in tensors:
        tensor.grad = 2 * tensor.to_sparse(1) if case.row.sparse else 2 * tensor
    theirs.step()
    opt, saved = getattr(optim, case.row.name)({"weight": np.ones((3, 2)), "x": np.ones((3, 2))}), theirs.state_dict()
    opt.load_state_dict(saved)
    for slot, value in saved["state"].get(0, {}).items():
        if value is None or slot == "step":
            continue
        shape = np.shape(value)
        wrong = [torch.ones(shape, dtype=dtype) for dtype in (torch.complex128, torch.bool)]
        for bad in [*wrong, torch.ones(4, 5), torch.ones(*shape, 1), "text", *([0.5] if shape else [])]:
            given = copy.deepcopy(saved)
            given["state"][0][slot] = bad
            with refused(opt, f"'{slot}' of (shape|dtype) .*'weight', which needs"):
                opt.load_state_dict(given)
        given = copy.deepcopy(saved)
        del given["state"][0][slot]
        if given["state"][0]:  # a parameter without state is one that was never updated
            with refused(opt, f"for the parameter 'weight', but {case.row.name} .* has .*{slot}"):
                opt.load_state_dict(given)


def option(**options):
    return lambda sd: sd["param_groups"][0].update(options)


def slot(**entries):
    return lambda sd: sd["state"][1].update(entries)


UNKNOWN = r"options 'weight_decya' in group 0 \(of 'b', 'w'\), which Adam does not take. It takes lr, betas"
EXCHANGED = r"'exp_avg\w*' of shape \(2, 2\) for the parameter 'b', which needs \(2,\)"
EDITS = {
    "a typo": (option(weight_decya=1), UNKNOWN),
    "out of range": (option(lr=torch.tensor(-1.0)), "Invalid lr"),
    "a rate of three": (option(lr=torch.ones(3)), "lr must be 1-element"),
    "of another length": (option(betas=(0.9,)), "Invalid betas"),
    "two groups": (lambda sd: sd["param_groups"].append(sd["param_groups"][0]), "it has 2, the optimizer has 1"),
    "no group": (lambda sd: sd["param_groups"].clear(), "it has 0, the optimizer has 1"),
    "a parameter less": (
        lambda sd: sd["param_groups"][0]["params"].pop(),
        "1 parameters there, 2 here; 'w' has",
    ),
    "a parameter more": (
        lambda sd: sd["param_groups"][0]["params"].append(2),
        "3 .* there, 2 here; the parameter 2",
    ),
    "a stray": (lambda sd: sd["state"].update({7: sd["state"][0]}), "state of the parameter number 7, .* none of its"),
    "exchanged": (lambda sd: sd["state"].update({0: sd["state"][1], 1: sd["state"][0]}), EXCHANGED),
    "an unknown slot": (slot(exp_inf=torch.ones(2, 2)), "has exp_avg, exp_avg_sq, exp_inf, step for .* 'w', but Adam"),
    "no count": (lambda sd: sd["state"][1].pop("step"), "exp_avg, exp_avg_sq for .* 'w', but .* exp_avg_sq, step"),
    "counts": (slot(step=torch.ones(3)), "'step' .*'w'"),
    "a text for a count": (slot(step="three"), "'step' .*'w'"),
    "a complex count": (slot(step=torch.tensor(3j)), "'step' .*'w'"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_does_not_fit_is_named_and_nothing_is_changed(edit):
    change, message = EDITS[edit]
    opt = optim.Adam({"w": np.ones((2, 2)), "b": np.ones(2)})
    opt.minimize(quartic)
    given = to_torch(opt.state_dict())
    change(given)
    kept = pickle.dumps(jax.tree.map(numbers, given["state"]))
    with refused(opt, message):
        opt.load_state_dict(given)
    assert pickle.dumps(jax.tree.map(numbers, given["state"])) == kept


@pytest.mark.parametrize(
    "edit", ["a typo", "a stray", "an unknown slot", "exchanged", "a parameter less", "two groups"]
)
def test_without_strict_loading_takes_and_refuses_what_torch_does(edit):
    opt = optim.Adam({"b": np.ones(2), "w": np.ones((2, 2))})
    opt.minimize(quartic)
    given = to_torch(opt.state_dict())
    EDITS[edit][0](given)
    theirs = torch.optim.Adam([torch.ones(2), torch.ones(2, 2)])
    try:
        theirs.load_state_dict(copy.deepcopy(given))
    except ValueError as error:
        with refused(opt, str(error)[:50]):
            opt.load_state_dict(given, strict=False)
        return
    opt.load_state_dict(given, strict=False)
    same_state(opt.state_dict(), theirs.state_dict(), 0.0)
    mine, parents = opt.state_dict()["param_groups"], theirs.state_dict()["param_groups"]
    assert mine == parents


LBFGS_EDITS = [
    ("d", torch.ones(4), r"'d' of shape \(4,\) .*, which needs \(3,\)"),
    ("d", torch.ones(3, dtype=torch.complex64), "'d'"),
    ("d", ["a", "b", "c"], "'d'"),
    ("prev_flat_grad", torch.ones(1), r"'prev_flat_grad' of shape \(1,\)"),
    ("old_dirs", [torch.ones(2)], r"'old_dirs' of shape \(2,\)"),
    ("ro", [], "entries in its lists old_dirs, old_stps, ro, which must be equally long"),
    ("exp_avg", torch.ones(3), "'exp_avg' for the parameter 'b', but LBFGS keeps"),
    ("H_diag", torch.ones(3), "'H_diag'"),
    ("t", "text", "'t'"),
    ("prev_loss", "text", "'prev_loss'"),
    ("n_iter", torch.ones(2), "'n_iter'"),
    ("func_evals", "text", "'func_evals'"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "value", "message"), LBFGS_EDITS)
def test_every_entry_of_lbfgs_that_does_not_fit_is_named(entry, value, message):
    opt = optim.LBFGS({"w": np.ones(1), "b": np.array([1.0, 2.0])}, max_iter=3, history_size=3)
    opt.minimize(quartic)
    given = to_torch(opt.state_dict())
    given["state"][0][entry] = value
    with refused(opt, message):
        opt.load_state_dict(given)


# State dicts as objects.

WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "a copy of its own": lambda sd: sd.copy(),
    "pickle": lambda sd: pickle.loads(pickle.dumps(sd)),
    "jax.tree.map": lambda sd: jax.tree.map(lambda x: x, sd),
    "flattening": lambda sd: jax.tree.unflatten(jax.tree.structure(sd), jax.tree.leaves(sd)),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_state_dict_says_whose_it_is_after(way):
    old = described("AdamW", w=B, b=A)
    saved = WAYS[way](old.state_dict())
    assert isinstance(saved, StateDict)
    assert (saved.made_by, saved.names) == ("AdamW", [["w", "b"]])
    assert list(saved) == ["state", "param_groups"]
    new, wrong = optim.AdamW({"b": A, "w": B}), optim.Adam({"b": A, "w": B})
    new.load_state_dict(saved)
    np.testing.assert_array_equal(new.state_dict()["state"][0]["exp_avg"], saved["state"][1]["exp_avg"])
    with refused(wrong, "is of AdamW, but this is Adam"):
        wrong.load_state_dict(saved)


def test_hooks_see_a_state_dict_that_says_whose_it_is():
    old, seen = described("AdamW", w=B, b=A), []
    old.register_state_dict_post_hook(lambda opt, sd: seen.append((type(sd), sd.made_by)))
    wrong = optim.Adam({"b": A, "w": B})
    wrong.register_load_state_dict_pre_hook(lambda opt, sd: seen.append((type(sd), sd.made_by)))
    with refused(wrong, "is of AdamW"):
        wrong.load_state_dict(old.state_dict())
    assert seen == [(StateDict, "AdamW")] * 2


def types_in(x):
    yield type(x)
    for value in x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ():
        yield from types_in(value)


@pytest.mark.parametrize("name", NAMED)
def test_what_goes_to_torch_is_plain_and_ours_stays_as_it_was(name, x64):
    opt = getattr(optim, name)({"weight": np.ones((3, 2))})
    opt.load_state_dict(one_step(name)[1])
    opt.param_groups[0]["lr"] = jnp.asarray(0.1)
    before, saved = frozen(opt), opt.state_dict()
    saved["mine"] = OrderedDict(a=(1, [np.ones(2)[::-1]]))
    converted = to_torch(saved)
    assert type(converted) is dict
    assert set(types_in(converted)) <= {dict, OrderedDict, list, tuple, torch.Tensor, int, float, bool, str, type(None)}
    again = through_file(converted)
    chex.assert_trees_all_equal_structs(again, converted)
    assert type(again["mine"]) is OrderedDict
    close(jax.tree.leaves(again["state"]), jax.tree.leaves(saved["state"]), 0.0)
    assert isinstance(saved, StateDict)
    assert isinstance(saved["mine"]["a"][1][0], np.ndarray)
    assert frozen(opt) == before


def test_digits_are_names_if_both_sides_have_the_same():
    tensors = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1)) for _ in range(12)])
    theirs = torch.optim.SGD(tensors.named_parameters(), momentum=0.9)
    sum(i * tensor.sum() for i, tensor in enumerate(tensors)).backward()
    theirs.step()
    for params in ({str(i): np.ones(1) for i in range(12)}, [np.ones(1)] * 12):
        ours = optim.SGD(params)
        ours.load_state_dict(theirs.state_dict())
        slots = {param.name: float(entry["momentum_buffer"][0]) for param, entry in ours.state.items()}
        assert slots == {str(i): i for i in range(12)}


def test_the_parameter_without_a_counterpart_is_named():
    old, new = optim.SGD({"b": np.ones(1), "w": np.ones(1)}), {"b": np.ones(1), "head": np.ones(1), "w": np.ones(1)}
    with pytest.raises(ValueError, match="2 parameters there, 3 here; 'head' has nothing there"):
        optim.SGD(new).load_state_dict(old.state_dict(), strict=False)
    with pytest.raises(ValueError, match="3 parameters there, 2 here; the parameter 'head' has nothing here"):
        old.load_state_dict(optim.SGD(new).state_dict(), strict=False)
