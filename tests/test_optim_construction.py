"""What optimizers are made of, how they are described, and what they refuse at once."""

import dataclasses
import functools
import inspect
import re
import typing
from collections import namedtuple
from typing import Any

import chex
import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.experimental.sparse import BCOO

from comparisons import assert_same
from jaxoptim import optim
from optim_sides import (
    OURS,
    SIDES,
    TORCH,
    Ours,
    Theirs,
    by_row,
    check_state_dicts,
    check_values,
    compare,
    example_of,
    made,
    params_of,
    run_with,
    steps,
)
from table import OWN_OPTIONS

pytestmark = pytest.mark.usefixtures("x64")


def same_error(program: Any, message: str, theirs: str | None = None) -> None:
    """``program(side)`` raises the same type on both sides, with this beginning of its message."""
    with pytest.raises(Exception, match=re.compile("^['\"]?" + re.escape(theirs or message))) as parents:
        program(Theirs)
    with pytest.raises(parents.type, match=re.compile("^['\"]?" + re.escape(message))) as mine:
        program(Ours)
    assert mine.type is parents.type


# Signatures, defaults, repr and documentation.


@by_row()
def test_the_signature_is_the_parents(row):
    cls = getattr(optim, row.name)
    ours = {p.name: (p.kind, p.default, type(p.default)) for p in inspect.signature(cls).parameters.values()}
    theirs = {p.name: (p.kind, p.default, type(p.default)) for p in inspect.signature(row.parent).parameters.values()}
    own = OWN_OPTIONS.get(row.name, [])
    assert [*theirs, *own, *OURS] == list(ours)
    for name, default in (dict.fromkeys(own) | OURS).items():
        assert ours.pop(name) == (inspect.Parameter.KEYWORD_ONLY, default, type(default))
    assert ours == theirs


@by_row()
def test_positional_arguments_are_the_parents(row):
    values = {"lr": 0.5, "eta": 0.5, "momentum": 0.3, "lambd": 0.2, "rho": 0.4, "alpha": 0.7}
    parameters = list(inspect.signature(row.parent).parameters.values())[1:]
    positional = [values.get(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    ours = getattr(optim, row.name)(params_of(Ours, row), *positional).param_groups[0]
    theirs = row.parent(params_of(Theirs, row), *positional).param_groups[0]
    for key in ("params", *OWN_OPTIONS.get(row.name, [])):
        ours.pop(key, None)
    theirs.pop("params")
    assert ours == theirs


@by_row()
def test_a_misspelt_option_is_a_type_error_that_names_those_there_are(row):
    cls = getattr(optim, row.name)
    options = [name for name in inspect.signature(cls).parameters if name not in ("params", *OURS)]
    every = ", ".join(list(inspect.signature(cls).parameters)[1:])
    hint = r" 'lr' is probably meant\." if "lr" in options else ""
    with pytest.raises(TypeError, match=rf"^{row.name}\(\) .*'lrr'\.{hint} After params it takes {every}\.$"):
        cls([1.0], lrr=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lrr'"):
        row.parent(params_of(Theirs, row), lrr=0.1)
    assert {*typing.get_type_hints(cls.__init__)} == {"params", *options, *OURS, "return"}


@pytest.mark.slow
@by_row()
def test_defaults_groups_and_repr_are_the_parents(row):
    own = OWN_OPTIONS.get(row.name, [])
    rate = "eta" if row.name == "AdagradRMSProp" else "lr"

    def shown(opt: Any) -> Any:
        text = [line for line in repr(opt).split("\n") if line.split(":")[0].strip() not in own]
        groups = [
            [(k, str(v), type(v)) for k, v in group.items() if k not in (*own, "params")] for group in opt.param_groups
        ]
        return text, groups, [(k, v, type(v)) for k, v in opt.defaults.items() if k not in own]

    def forms(side: Any) -> Any:
        a, b = params_of(side, row)
        yield [a]
        yield [{"params": [a], rate: 0.25}, {"mine": 1, "params": b}]
        yield [("layer.weight", a), ("bias", b)]
        yield [{rate: 0.25, "params": [("layer.weight", a)]}, {"params": [("bias", b)]}]
        yield iter([a, b])

    for ours, theirs in zip(forms(Ours), forms(Theirs), strict=True):
        assert shown(made(Ours, row, ours)) == shown(made(Theirs, row, theirs))


def test_repr_of_an_optimizer_without_groups_is_torchs():
    opts = [side.optim.SGD([side.param(1.0)]) for side in SIDES]
    for opt in opts:
        opt.param_groups.clear()
    assert repr(opts[0]) == repr(opts[1]) == "SGD ()"
    opts[0].step()


@by_row()
def test_the_documentation_is_the_rules(row):
    cls = getattr(optim, row.name)
    rule_doc, _, _ = inspect.getdoc(row.rule).partition("\n\nExamples:\n")
    mathematics = re.findall(r"\.\. math::\n(?:    .*\n)+", rule_doc)
    assert mathematics
    doc = inspect.getdoc(cls)
    assert all(formula in doc for formula in mathematics)
    assert rule_doc.split("Args:\n")[1] in doc
    assert "\n    params: see :class:`Optimizer`.\n" in doc
    documented = re.findall(r"^    (\w+): ", doc.split("Args:\n")[1].split("\n\n")[0], re.MULTILINE)
    flags = {"foreach", "fused", "capturable", "differentiable"} & set(inspect.signature(cls).parameters)
    assert {*documented, *flags, *OURS} == set(inspect.signature(cls).parameters)
    assert all(f"``{flag}``" in doc for flag in flags)
    assert doc.count("Examples:\n") == 1
    assert len(example_of(cls).examples) >= 3  # which the doctests of the package run


# What an optimizer can be made of.


@flax.struct.dataclass
class FlaxLayer:
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


Point = namedtuple("Point", ["kernel", "bias"])


def equinox_layer(kernel: Any, bias: Any) -> Any:
    linear = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    return eqx.tree_at(lambda m: (m.weight, m.bias), linear, (kernel, bias))


def nnx_state(kernel: Any, bias: Any) -> Any:
    return nnx.State({"kernel": nnx.Param(kernel), "bias": nnx.Param(bias)})


@pytest.mark.costly
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda w, b: {"kernel": w, "bias": b}, ["bias", "kernel"]),
        (lambda w, b: [w, b], ["0", "1"]),
        (lambda w, b: (w, None, b), ["0", "2"]),
        (lambda w, b: {"encoder": [{"kernel": w}, {"bias": b}]}, ["encoder.0.kernel", "encoder.1.bias"]),
        (Point, ["kernel", "bias"]),
        (Layer, ["kernel", "bias"]),
        (FlaxLayer, ["kernel", "bias"]),
        (equinox_layer, ["weight", "bias"]),
        (nnx_state, ["bias", "kernel"]),
        (lambda w, b: {"inner": Layer(w, Point(b, None))}, ["inner.kernel", "inner.bias.kernel"]),
    ],
    ids=["dict", "list", "tuple", "nested", "namedtuple", "dataclass", "flax", "equinox", "nnx", "mixed"],
)
def test_any_pytree_keeps_its_structure_and_names_its_leaves(make, names):
    tree = make(jnp.ones((2, 2)), jnp.zeros(2))
    opt = optim.SGD(tree, lr=0.5)
    assert [param.name for param in opt.param_groups[0]["params"]] == names
    chex.assert_trees_all_equal_structs(opt.params, tree)
    opt.step(jax.tree.map(jnp.ones_like, tree))
    expected = jax.tree.map(lambda x: x - 0.5, tree)
    assert_same(opt.params, expected)
    assert jnp.all(jax.tree.leaves(tree)[0] == jax.tree.leaves(make(jnp.ones((2, 2)), jnp.zeros(2)))[0])


def test_a_bare_array_is_a_pytree():
    opt = optim.SGD(jnp.ones(2), lr=0.5)
    opt.step(jnp.ones(2))
    assert opt.params.tolist() == [0.5, 0.5]
    assert opt.param_groups[0]["params"][0].name == "params"


def test_none_leaves_stay_and_have_no_state():
    opt = optim.Adam({"a": jnp.ones(2), "frozen": None})
    opt.step({"a": jnp.ones(2), "frozen": None})
    assert opt.params["frozen"] is None
    assert len(opt.state) == len(opt.param_groups[0]["params"]) == 1


def generators(side: Any) -> Any:
    def pairs() -> Any:
        yield from {"a": side.param([1.0]), "b": side.param([2.0])}.items()

    yield (param for _, param in pairs())
    yield dict(pairs()).values()
    yield map(side.param, [[1.0], [2.0]])
    yield pairs()
    yield dict(pairs()).items()
    yield ({"params": iter([param])} for _, param in pairs())
    yield [{"params": (param for _, param in pairs()), "lr": 0.5}]
    yield [{"params": pairs()}]
    yield tuple(param for _, param in pairs())
    yield [{"params": []}]


@pytest.mark.parametrize("index", range(len(list(generators(Ours)))))
def test_every_iterable_that_torch_takes_is_taken(index):
    ours, theirs = (side.optim.SGD(list(generators(side))[index], lr=0.1) for side in SIDES)
    check_state_dicts(ours.state_dict(), theirs.state_dict())
    assert isinstance(ours.param_groups[0]["params"], list)
    check_values(*([p for group in opt.param_groups for p in group["params"]] for opt in (ours, theirs)))


def test_the_structure_of_params_follows_what_was_given():
    a, b, c = (optim.Parameter(float(x)) for x in range(3))
    assert optim.SGD([a, b]).params == [0.0, 1.0]
    assert optim.SGD({"x": a, "y": [b]}).params == {"x": 0.0, "y": [1.0]}
    assert optim.SGD([("x", a), ("y", b)]).params == [0.0, 1.0]
    opt = optim.SGD([{"params": [a]}, {"params": {"x": b}}])
    assert opt.params == [[0.0], {"x": 1.0}]
    opt.add_param_group({"params": c})
    assert jax.tree.leaves(opt.params) == [0.0, 1.0, 2.0]
    single = optim.SGD({"x": a})
    single.add_param_group({"params": {"y": b}})
    assert single.params == [{"x": 0.0}, {"y": 1.0}]
    assert a in single.param_groups[0]["params"]  # the very cells


def test_the_group_dict_that_was_given_is_completed_in_place():
    for side in SIDES:
        group = {"params": side.param([1.0]), "lr": 0.5}
        opt = side.optim.SGD([group])
        assert opt.param_groups[0] is group
        assert group["momentum"] == 0
        assert isinstance(group["params"], list)
        added = {"params": (side.param([x]) for x in (1.0, 2.0))}
        opt.add_param_group(added)
        assert opt.param_groups[1] is added
        assert added["lr"] == 1e-3


def test_names_of_pairs_are_kept_and_name_the_errors():
    def groups(side: Any) -> Any:
        opt = side.optim.SGD([("w", side.param([1.0])), ("b", side.param([2.0]))])
        opt.add_param_group({"params": [("c", side.param([3.0]))]})
        return [group["param_names"] for group in opt.param_groups]

    assert groups(Ours) == groups(Theirs) == [["w", "b"], ["c"]]
    known = optim.Parameter(1.0, "known")
    assert optim.SGD([("given", known)]).param_groups[0]["param_names"] == ["given"]
    opt = optim.SGD([("w", optim.Parameter([1.0]))])
    with pytest.raises(ValueError, match="'w' has shape"):
        opt.step([jnp.ones(3)])


# groups=


TREE = {
    "encoder": [{"kernel": np.ones((2, 2)), "bias": np.ones(2)}],
    "head": {"kernel": np.ones(2), "bias": np.ones(1)},
}


def chosen(*groups: Any) -> list[tuple[list[str], float]]:
    opt = optim.SGD(TREE, lr=0.1, groups=list(groups))
    return [([param.name for param in group["params"]], group["lr"]) for group in opt.param_groups]


ALL = ["encoder.0.bias", "encoder.0.kernel", "head.bias", "head.kernel"]


def test_selectors_choose_by_whole_path():
    biases = ["encoder.0.bias", "head.bias"]
    kernels = ["encoder.0.kernel", "head.kernel"]
    for selector in (r".*\.bias", re.compile(r".*\.bias"), lambda path: path.endswith("bias")):
        assert chosen((selector, {"lr": 1.0})) == [(biases, 1.0), (kernels, 0.1)]
    assert chosen((".*", {"lr": 1.0})) == [(ALL, 1.0)]
    assert chosen(("head.*", {"lr": 1.0}), (r".*bias", {})) == [
        (["head.bias", "head.kernel"], 1.0),
        (["encoder.0.bias"], 0.1),
        (["encoder.0.kernel"], 0.1),
    ]
    assert chosen() == [(ALL, 0.1)]
    for wrong in ("head", "bias", re.compile("encoder"), lambda path: False):
        with pytest.raises(ValueError, match=r"selects.*whole path\. The paths are encoder\.0\.bias, enc"):
            chosen((wrong, {}))
    with pytest.raises(ValueError, match=r"no parameter is left that 'head\.bias' selects"):
        chosen(("head.*", {}), ("head.bias", {}))


@pytest.mark.slow
def test_selectors_update_by_their_options_and_keep_the_tree():
    opt = optim.SGD(TREE, lr=0.5, groups=[(r"head\..*", {"lr": 0.25, "momentum": 0.9}), ("encoder.0.bias", {"lr": 0})])
    opt.step(jax.tree.map(np.ones_like, TREE))
    chex.assert_trees_all_equal_structs(opt.params, TREE)
    assert [float(x.ravel()[0]) for x in jax.tree.leaves(opt.params)] == [1.0, 0.5, 0.75, 0.75]
    assert len(opt.state) == 2  # with momentum


def test_selectors_see_the_names_of_pairs_and_the_paths_of_parameters():
    a, b = optim.Parameter(1.0), optim.Parameter(2.0)
    opt = optim.SGD([("layer.weight", a), ("layer.bias", b)], groups=[(".*bias", {"lr": 1.0})])
    assert [group["params"] for group in opt.param_groups] == [[b], [a]]
    assert [group["param_names"] for group in opt.param_groups] == [["layer.bias"], ["layer.weight"]]
    opt = optim.SGD({"w": a, "b": b}, groups=[("b", {"lr": 1.0})])
    assert [group["params"] for group in opt.param_groups] == [[b], [a]]


def test_wrong_selectors_say_what_is_wrong():
    with pytest.raises(TypeError, match=r"list of \(selector, options\), but one item is 'head'"):
        chosen("head")
    with pytest.raises(TypeError, match=r"list of \(selector, options\)"):
        chosen((".*", 0.1))
    with pytest.raises(TypeError, match="A selector is a regular expression or a predicate"):
        chosen((3, {}))
    with pytest.raises(TypeError, match="list of group dicts already"):
        optim.SGD([{"params": [1.0]}], groups=[(".*", {})])
    with pytest.raises(ValueError, match="Invalid lr: -1"):
        chosen(("head.*", {"lr": -1}))


# Errors and warnings of construction and of add_param_group.


@pytest.mark.parametrize(
    ("params", "message", "theirs"),
    [
        (lambda s: [], "optimizer got an empty parameter list", None),
        (lambda s: iter(()), "optimizer got an empty parameter list", None),
        (lambda s: s.param([1.0]), "params argument given to the optimizer should be an iterable of", None),
        (lambda s: [s.param([1.0]), 3], "optimizer can only optimize", None),
        (lambda s: [s.param([1.0]), "w"], "optimizer can only optimize", None),
        (lambda s: [object()], "optimizer can only optimize", None),
        (lambda s: "abc", "optimizer can only optimize", None),
        (lambda s: [{"params": 3}], "The parameter 'params' has dtype int", "'int' object is not iterable"),
        (lambda s: 3, "The parameter 'params' has dtype int", "'int' object is not iterable"),
        (lambda s: [("a", s.param([1.0])), s.param([1.0])], "all optimizer params should be with/without names", None),
        (lambda s: [{"params": {s.param([1.0])}}], "optimizer parameters need to be organized in ordered", None),
        (lambda s: [{"params": [s.param([1.0])]}, {"lr": 1.0}], "params", None),
        (lambda s: [{"params": [s.param([1.0])]}, [s.param([1.0])]], "params", "param_group must be a dict"),
        (lambda s: [{"params": [p]} for p in [s.param([1.0])] * 2], "some parameters appear in more than one", None),
        (
            lambda s: [{"params": [s.param([1.0])]}, {"params": [("a", s.param([1.0]))]}],
            "all optimizer param groups should be with/without names. cannot add param group with names",
            None,
        ),
        (
            lambda s: [{"params": [("a", s.param([1.0]))]}, {"params": [s.param([1.0])]}],
            "all optimizer param groups should be with/without names. cannot add param group without names",
            None,
        ),
    ],
    ids=lambda x: None if callable(x) or x is None else x[:40],
)
def test_construction_refuses_what_torch_refuses(params, message, theirs):
    if theirs == "param_group must be a dict":
        with pytest.raises(TypeError):
            torch.optim.SGD(params(Theirs))
        with pytest.raises(KeyError, match="item 1 has no 'params' key"):
            optim.SGD(params(Ours))
    else:
        same_error(lambda side: side.optim.SGD(params(side)), message, theirs)


def test_construction_says_what_cannot_be_optimized():
    with pytest.raises(TypeError, match="ordering of parameters in sets will change between runs"):
        optim.SGD({optim.Parameter(1.0)})
    with pytest.raises(TypeError, match=r"'layer\.step' has dtype int64.*put None"):
        optim.SGD({"layer": {"kernel": np.ones(2), "step": np.arange(2)}})
    with pytest.raises(TypeError, match="among Parameters the one at 'b' is"):
        optim.SGD({"a": optim.Parameter(1.0), "b": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"one of the params, 'layer\.name', is str"):
        optim.SGD({"layer": {"name": "relu"}})


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (lambda s, p: [p], "param_group must be a dict, but got <class 'list'>"),
        (lambda s, p: {"params": [p]}, "some parameters appear in more than one parameter group"),
        (lambda s, p: {"params": p}, "some parameters appear in more than one parameter group"),
        (lambda s, p: {"params": [("a", s.param([1.0]))]}, "all optimizer param groups should be with/without names."),
        (lambda s, p: {"params": {s.param([1.0])}}, "optimizer parameters need to be organized in ordered collections"),
        (lambda s, p: {"params": [s.param([1.0]), None, 3]}, "optimizer can only optimize"),
    ],
)
def test_add_param_group_refuses_what_torch_refuses_and_changes_nothing(group, message):
    def program(side: Any) -> None:
        param = side.param([1.0])
        opt = side.optim.SGD([param], lr=0.1)
        before = repr(opt)
        try:
            opt.add_param_group(group(side, param))
        finally:
            assert repr(opt) == before
            assert len(opt.param_groups) == 1

    same_error(program, message)


def test_add_param_group_without_params_is_a_key_error():
    opt = optim.SGD([1.0])
    with pytest.raises(KeyError, match=r"param_group has no 'params'\. Give"):
        opt.add_param_group({"lr": 1.0})
    with pytest.raises(KeyError):
        torch.optim.SGD([Theirs.param([1.0])]).add_param_group({"lr": 1.0})
    with pytest.raises(ValueError, match="Invalid lr: -1"):
        opt.add_param_group({"params": [2.0], "lr": -1})
    assert opt.params == [1.0]


WRONG = [
    ({"lr": -0.1}, [row.name for row in TORCH]),
    ({"eps": -1.0}, ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop", "SparseAdam"]),
    ({"betas": (1.0, 0.9)}, ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SparseAdam"]),
    ({"betas": (0.9, -0.1)}, ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SparseAdam"]),
    ({"weight_decay": -1.0}, [row.name for row in TORCH if row.name not in ("Rprop", "SparseAdam")]),
    ({"momentum": -1.0}, ["SGD", "RMSprop", "Muon"]),
    ({"nesterov": True}, ["SGD"]),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ["SGD"]),
    ({"rho": 1.5}, ["Adadelta"]),
    ({"alpha": -1.0}, ["RMSprop"]),
    ({"lr_decay": -1.0}, ["Adagrad"]),
    ({"initial_accumulator_value": -1.0}, ["Adagrad"]),
    ({"momentum_decay": -1.0}, ["NAdam"]),
    ({"etas": (1.2, 1.5)}, ["Rprop"]),
    ({"lr": 0.0}, ["SparseAdam"]),
    ({"eps": (-1.0, 1e-3)}, ["Adafactor"]),
    ({"d": 0.5}, ["Adafactor"]),
    ({"beta2_decay": 0.5}, ["Adafactor"]),
    ({"adjust_lr_fn": "other"}, ["Muon"]),
]


@pytest.mark.parametrize(
    ("row", "options"),
    [(row, options) for options, names in WRONG for row in TORCH if row.name in names],
    ids=lambda x: getattr(x, "name", None) or str(x).replace(" ", ""),
)
def test_options_out_of_range_are_refused_as_in_torch(row, options):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        row.parent(params_of(Theirs, row), **options)
    with pytest.raises(theirs.type) as ours:
        getattr(optim, row.name)(params_of(Ours, row), **options)
    assert any(name in str(ours.value) for name in options)


def test_a_rate_that_is_no_number_is_refused():
    same_error(lambda side: side.optim.Adam([side.param([1.0])], lr=None), "", "")


def test_a_rate_that_is_an_array_has_one_element():
    same_error(
        lambda side: side.optim.SGD([side.param([1.0])], lr=side.array([1.0, 2.0])), "Tensor lr must be 1-element"
    )
    for rate in (0.5, [0.5]):
        compare(functools.partial(run_with, "SGD", {}, lambda opt, params, side, rate=rate: set_rate(opt, side, rate)))


def set_rate(opt: Any, side: Any, rate: Any) -> None:
    opt.param_groups[0]["lr"] = side.array(rate)
    opt.step()
    opt.param_groups[0]["lr"] = 0.1


def test_what_a_rule_cannot_update_is_refused_by_name_at_once():
    with pytest.raises(RuntimeError, match="Adafactor does not support complex parameters, but 'w'"):
        optim.Adafactor({"w": np.ones(2, complex)})
    for group in ({"params": {"bias": np.ones(2)}}, {"params": [("bias", optim.Parameter([1.0]))]}):
        opt = optim.Muon({"w": np.ones((2, 2))})
        with pytest.raises(ValueError, match="Muon only supports 2D parameters, but 'bias'"):
            opt.add_param_group(group)
        chex.assert_trees_all_equal_structs(opt.params, {"w": 0})


def test_required_options():
    def program(side: Any, group: dict) -> Any:
        base = type("Base", (side.optim.SGD,), {})
        opt = base.__new__(base)
        option = side.base.required
        assert repr(option) == "<required parameter>"
        defaults = {**side.optim.SGD([side.param([0.0])]).defaults, "lr": option}
        side.optim.Optimizer.__init__(opt, [{"params": [side.param([1.0])], **group}], defaults)
        return opt.param_groups[0]["lr"]

    same_error(
        lambda side: program(side, {}), "parameter group didn't specify a value of required optimization parameter lr"
    )
    assert program(Ours, {"lr": 0.5}) == program(Theirs, {"lr": 0.5}) == 0.5


@pytest.mark.slow
def test_a_parameter_given_twice():
    def program(side: Any) -> Any:
        p, q = side.param([1.0, 2.0]), side.param([3.0])
        with pytest.warns(
            UserWarning, match="^optimizer contains a parameter group with duplicate parameters; in futu"
        ):
            opt = side.optim.Adam([p, p, q], lr=0.1)
        steps(side, opt, [p, q], range(3))
        assert [group["params"] for group in opt.state_dict()["param_groups"]] == [[1, 1, 2]]
        assert opt.state[p]["step"] == 6
        assert opt.state[q]["step"] == 3
        opt.load_state_dict(opt.state_dict())
        steps(side, opt, [p, q], range(3, 5))
        return opt, [p, q]

    compare(program)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optim.SGD([1.0]).add_param_group({"params": [optim.Parameter(2.0)] * 2})


def test_the_gradients_of_a_shared_parameter_add_up():
    embedding = optim.Parameter([1.0, 2.0])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = optim.SGD({"embed": embedding, "head": embedding}, lr=0.1)
    opt.step({"embed": jnp.array([1.0, 0.0]), "head": jnp.array([1.0, 1.0])})
    np.testing.assert_allclose(embedding.value, [1 - 2 * 0.1 * 2, 2 - 2 * 0.1])
    assert opt.params["embed"] is opt.params["head"] or jnp.array_equal(opt.params["embed"], opt.params["head"])
    opt.step({"embed": None, "head": jnp.array([1.0, 1.0])})
    np.testing.assert_allclose(embedding.value, [1 - 2 * 0.1 * 3, 2 - 2 * 0.1 * 2])


# What cannot be a parameter.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_a_sparse_array_is_no_parameter(name):
    table = BCOO.fromdense(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"the parameter 'table' is a BCOO\. Give its todense\(\)"):
        getattr(optim, name)({"table": table})


def test_complex_parameters_of_sparse_adam_are_torchs_value_error():
    with pytest.raises(ValueError, match="SparseAdam does not support complex parameters"):
        torch.optim.SparseAdam([torch.zeros(3, dtype=torch.complex64)])  # whose message says so too
    with pytest.raises(ValueError, match="SparseAdam does not support complex parameters, but 'w'"):
        optim.SparseAdam({"w": jnp.zeros(3, jnp.complex64)})
