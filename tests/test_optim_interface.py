"""The torch-style face apart from its numbers, against the live torch class wherever torch has the behaviour."""

import contextlib
import copy
import dataclasses
import doctest
import functools
import inspect
import pickle
import re
from collections import namedtuple
from typing import Any, ClassVar

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
from torch.optim import optimizer as torch_base

from comparisons import assert_same
from jaxoptim import optim, rules
from jaxoptim.core import NonNegative, Rule, rule
from table import FIRST, ROWS, STATES, Case

pytestmark = pytest.mark.usefixtures("x64")

TORCH = [row for row in ROWS if row.parent.__module__.startswith("torch.")]
OWN_OPTIONS = {"DCTAdam": ["dct_dim", "subsample"]}
"""Options that the parent does not have."""


# The same program on both sides.


class Ours:
    """jaxoptim.optim."""

    optim = optim
    base = optim.optimizer
    permissive: ClassVar[dict[str, Any]] = {"strict": False}
    """Load a state dict as torch does."""

    @staticmethod
    def param(value: Any) -> Any:
        return optim.Parameter(np.asarray(value, np.float64))

    @staticmethod
    def array(value: Any) -> Any:
        return jnp.asarray(np.asarray(value, np.float64))

    @staticmethod
    def numpy(x: Any) -> np.ndarray:
        return np.asarray(x.value if isinstance(x, optim.Parameter) else x)

    @staticmethod
    def rows(values: Any, rows: Any, shape: tuple[int, ...]) -> Any:
        return BCOO((jnp.asarray(values), jnp.asarray(rows)[:, None]), shape=shape)


class Theirs:
    """torch.optim."""

    optim = torch.optim
    base = torch_base
    permissive: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def param(value: Any) -> Any:
        return torch.nn.Parameter(torch.tensor(np.asarray(value, np.float64)))

    @staticmethod
    def array(value: Any) -> Any:
        return torch.tensor(np.asarray(value, np.float64))

    @staticmethod
    def numpy(x: Any) -> np.ndarray:
        return x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)

    @staticmethod
    def rows(values: Any, rows: Any, shape: tuple[int, ...]) -> Any:
        return torch.sparse_coo_tensor(torch.tensor(rows)[None], torch.tensor(values), shape, check_invariants=True)


SIDES = (Ours, Theirs)


def made(side: Any, row: Any, params: Any, **options: Any) -> Any:
    """An optimizer of one row on one side."""
    return (getattr(optim, row.name) if side is Ours else row.parent)(params, **options)


def gradient(shape: tuple[int, ...], t: int, i: int) -> np.ndarray:
    return np.random.default_rng([t, i]).normal(size=shape)


def steps(side: Any, opt: Any, params: Any, times: range) -> None:
    """Some steps with the same gradients on both sides, dense or of two rows."""
    sparse = "SparseAdam" in type(opt).__name__
    for t in times:
        for i, param in enumerate(params):
            grad = gradient(tuple(param.shape), t, i)
            rows = [t % param.shape[0], (t + 1) % param.shape[0]] if sparse else []
            param.grad = side.rows(grad[rows], rows, tuple(param.shape)) if sparse else side.array(grad)
        opt.step()


def check_state_dicts(ours: dict, theirs: dict, tolerance: float = 1e-12) -> None:
    """Two state dicts have the same keys in the same order and the same values of the same types."""
    assert list(ours) == list(theirs) == ["state", "param_groups"]
    assert [list(group) for group in ours["param_groups"]] == [list(group) for group in theirs["param_groups"]]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for key, slots in theirs["state"].items():
        assert list(ours["state"][key]) == list(slots)
        for name, slot in slots.items():
            mine = ours["state"][key][name]
            if isinstance(slot, torch.Tensor):
                assert str(mine.dtype) == str(slot.dtype).removeprefix("torch.")
                assert mine.shape == tuple(slot.shape)
            else:
                assert type(mine) is type(slot)
            np.testing.assert_allclose(np.asarray(mine), Theirs.numpy(slot), rtol=tolerance, atol=tolerance)


def check_values(ours: Any, theirs: Any) -> None:
    chex.assert_trees_all_close([*map(Ours.numpy, ours)], [*map(Theirs.numpy, theirs)], rtol=1e-12, atol=1e-12)


def compare(program: Any) -> None:
    """Run ``program(side)``, which returns an optimizer and its parameters, on both sides, and compare all."""
    (ours, params), (theirs, tensors) = program(Ours), program(Theirs)
    check_values(params, tensors)
    check_state_dicts(ours.state_dict(), theirs.state_dict())


def same_error(program: Any, message: str, theirs: str | None = None) -> None:
    """``program(side)`` raises the same type on both sides, with this beginning of its message."""
    with pytest.raises(Exception, match=re.compile("^['\"]?" + re.escape(theirs or message))) as parents:
        program(Theirs)
    with pytest.raises(parents.type, match=re.compile("^['\"]?" + re.escape(message))) as mine:
        program(Ours)
    assert mine.type is parents.type


def start(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [np.linspace(-1, 2, int(np.prod(shape))).reshape(shape) for shape in shapes]


def params_of(side: Any, row: Any, count: int = 2) -> list[Any]:
    return [side.param(x) for x in start(*([row.shapes[0]] * count))]


def by_row(rows: Any = ROWS) -> Any:
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


# Signatures, defaults, repr and documentation.


@by_row()
def test_the_signature_is_the_parents(row):
    cls = getattr(optim, row.name)
    ours = {p.name: (p.kind, p.default, type(p.default)) for p in inspect.signature(cls).parameters.values()}
    theirs = {p.name: (p.kind, p.default, type(p.default)) for p in inspect.signature(row.parent).parameters.values()}
    own = OWN_OPTIONS.get(row.name, [])
    assert [*theirs, *own, "groups"] == list(ours)
    for name in (*own, "groups"):
        assert ours.pop(name) == (inspect.Parameter.KEYWORD_ONLY, None, type(None))
    assert ours == theirs


@by_row()
def test_positional_arguments_are_the_parents(row):
    values = {"lr": 0.5, "eta": 0.5, "momentum": 0.3, "lambd": 0.2, "rho": 0.4, "alpha": 0.7}
    parameters = list(inspect.signature(row.parent).parameters.values())[1:]
    positional = [values.get(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    ours = getattr(optim, row.name)(params_of(Ours, row), *positional).param_groups[0]
    theirs = row.parent(params_of(Theirs, row), *positional).param_groups[0]
    for key in ("params", *OWN_OPTIONS.get(row.name, [])):
        ours.pop(key)
    theirs.pop("params")
    assert ours == theirs


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
    rule_doc, _, _ = inspect.getdoc(row.rule).partition("\n\nExample:\n")
    mathematics = re.findall(r"\.\. math::\n(?:    .*\n)+", rule_doc)
    assert mathematics
    doc = inspect.getdoc(cls)
    assert all(formula in doc for formula in mathematics)
    assert rule_doc.split("Args:\n")[1] in doc
    assert "\n    params: see :class:`Optimizer`.\n" in doc
    documented = re.findall(r"^    (\w+): ", doc.split("Args:\n")[1].split("\n\n")[0], re.MULTILINE)
    flags = {"foreach", "fused", "capturable", "differentiable"} & set(inspect.signature(cls).parameters)
    assert {*documented, *flags, "groups"} == set(inspect.signature(cls).parameters)
    assert all(f"``{flag}``" in doc for flag in flags)
    assert doc.count("Example:\n") == 1
    assert len(example_of(cls).examples) >= 3  # which the doctests of the package run


def example_of(cls: Any) -> doctest.DocTest:
    (test,) = doctest.DocTestFinder(recurse=False).find(cls, cls.__name__)
    return test


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


# What the user writes into param_groups.


def run_with(name: str, options: dict, change: Any, side: Any) -> Any:
    """Three steps of two groups, a change, three more."""
    params = [side.param(x) for x in start((3, 2), (2,), (4,))]
    opt = getattr(side.optim, name)([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], lr=0.05, **options)
    steps(side, opt, params, range(3))
    added = change(opt, params, side)
    params = [*params, *(added or [])]
    steps(side, opt, params, range(3, 6))
    return opt, params


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
        opt.step()
        assert row.name != "Adagrad" or len(opt.state) == 2
        return opt, params

    compare(program)


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


def test_a_sparse_gradient_of_zeros_touches_no_row():
    def program(side: Any) -> Any:
        param = side.param(start((4, 2))[0])
        opt = side.optim.SparseAdam([param], lr=0.1)
        steps(side, opt, [param], range(2))
        opt.zero_grad(set_to_none=False)
        opt.step()
        return opt, [param]

    compare(program)


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


# Hooks.


def logged(side: Any, use: Any) -> list[str]:
    """What the hooks of one program write down."""
    log: list[str] = []
    param = side.param([1.0])
    opt = side.optim.SGD([param], lr=0.1)
    param.grad = side.array([1.0])
    with contextlib.ExitStack() as stack:
        use(side, opt, param, log, stack)
    return log


def agree(use: Any) -> list[str]:
    ours, theirs = logged(Ours, use), logged(Theirs, use)
    assert ours == theirs
    assert ours
    return ours


def test_step_hooks_run_in_torchs_order_with_torchs_arguments():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        def hook(name: str) -> Any:
            def run(optimizer: Any, args: Any, kwargs: Any) -> None:
                value = float(side.numpy(param)[0])
                log.append((name, optimizer is opt, args[0] is opt, len(args), sorted(kwargs), value))

            return run

        opt.register_step_post_hook(hook("post"))
        opt.register_step_pre_hook(hook("pre"))
        opt.register_step_pre_hook(hook("second pre"))
        opt.register_step_post_hook(hook("second post"))
        stack.enter_context(side.base.register_optimizer_step_pre_hook(hook("global pre")))
        stack.enter_context(side.base.register_optimizer_step_post_hook(hook("global post")))
        opt.step()
        opt.step(lambda: None)
        opt.step(closure=lambda: None)

    log = agree(use)
    assert [entry[0] for entry in log[:6]] == ["global pre", "pre", "second pre", "post", "second post", "global post"]
    assert optim.register_optimizer_step_pre_hook is optim.optimizer.register_optimizer_step_pre_hook
    assert optim.register_optimizer_step_post_hook is optim.optimizer.register_optimizer_step_post_hook


def test_global_hooks_run_for_every_optimizer_until_removed():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        handle = side.base.register_optimizer_step_pre_hook(
            lambda optimizer, args, kwargs: log.append(type(optimizer).__name__)
        )
        opt.step()
        side.optim.Adam([param]).step()
        handle.remove()
        handle.remove()
        opt.step()

    assert agree(use) == ["SGD", "Adam"]


def test_a_pre_hook_can_replace_the_arguments():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        def closure(name: str) -> Any:
            return lambda: log.append(name) or name

        opt.register_step_pre_hook(lambda o, args, kwargs: ((o, closure("replaced")), {}))
        opt.register_step_pre_hook(lambda o, args, kwargs: log.append(len(args)))
        opt.register_step_post_hook(lambda o, args, kwargs: log.append((len(args), kwargs)))
        log.append(opt.step(closure("given")))
        log.append(opt.step(closure=closure("given")))

    assert agree(use) == [2, "replaced", (2, {}), "replaced"] * 2


def test_a_pre_hook_that_returns_anything_else_is_an_error():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        for wrong in (3, (1, 2, 3), [(), {}], ()):
            with opt.register_step_pre_hook(lambda *args, wrong=wrong: wrong), pytest.raises(RuntimeError) as error:
                opt.step()
            log.append(str(error.value).partition(" must ")[2])
        log.append(float(side.numpy(param)[0]))
        opt.step()  # the failure is over
        log.append(float(side.numpy(param)[0]))

    assert agree(use)[0] == "return None or a tuple of (new_args, new_kwargs), but got 3."


@pytest.mark.parametrize("fails", ["hook", "step"])
def test_hooks_run_again_after_a_failure(fails):
    log = []
    opt = optim.SGD([1.0])

    def hook(*args: Any) -> None:
        log.append("pre")
        if fails == "hook" and len(log) == 1:
            raise ZeroDivisionError

    opt.register_step_pre_hook(hook)
    opt.register_step_post_hook(lambda *args: log.append("post"))
    with pytest.raises((ZeroDivisionError, ValueError)):
        opt.step([1.0, 2.0] if fails == "step" else [1.0])
    opt.step([1.0])
    assert log == ["pre", "pre", "post"]


def test_handles_remove_their_hook():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        first = opt.register_step_pre_hook(lambda *args: log.append("first"))
        second = opt.register_step_pre_hook(lambda *args: log.append("second"))
        log.append((type(first.id), first.id != second.id))
        first.remove()
        opt.step()
        with opt.register_step_post_hook(lambda *args: log.append("inside")) as handle:
            assert hasattr(handle, "remove")
            opt.step()
        opt.step()
        second.remove()
        second.remove()
        opt.step()

    assert agree(use)[1:] == ["second", "second", "inside", "second"]


def test_state_dict_hooks_run_in_torchs_order():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        def saving(name: str) -> Any:
            return lambda optimizer: log.append((name, optimizer is opt))

        def saved(name: str) -> Any:
            return lambda optimizer, sd: log.append((name, optimizer is opt, sorted(sd)))

        opt.register_state_dict_pre_hook(saving("pre"))
        opt.register_state_dict_pre_hook(saving("prepended pre"), prepend=True)
        opt.register_state_dict_post_hook(saved("post"))
        opt.register_state_dict_post_hook(saved("prepended post"), prepend=True)
        opt.register_load_state_dict_pre_hook(saved("load pre"))
        opt.register_load_state_dict_pre_hook(saved("prepended load pre"), prepend=True)
        opt.register_load_state_dict_post_hook(saving("load post"))
        handle = opt.register_load_state_dict_post_hook(saving("prepended load post"), prepend=True)
        opt.load_state_dict(opt.state_dict())
        handle.remove()
        opt.load_state_dict(opt.state_dict())

    log = agree(use)
    assert [entry[0] for entry in log[:4]] == ["prepended pre", "pre", "prepended post", "post"]
    assert [entry[0] for entry in log[4:8]] == ["prepended load pre", "load pre", "prepended load post", "load post"]
    assert len(log) == 8 + 7


def test_state_dict_hooks_may_change_or_replace_the_dict():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        opt.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(saved=True))
        with opt.register_state_dict_post_hook(lambda o, sd: sd.update(extra=1)):
            log.append(sorted(opt.state_dict()))
        with opt.register_state_dict_post_hook(lambda o, sd: {"inner": sd}):
            opt.register_state_dict_post_hook(lambda o, sd: log.append(sorted(sd)))
            log.append(sorted(opt.state_dict()))
        sd = opt.state_dict()
        log.append(sd["param_groups"][0]["saved"])

        def double(optimizer: Any, state_dict: Any) -> Any:
            groups = [{**group, "lr": 2 * group["lr"]} for group in state_dict["param_groups"]]
            return {**state_dict, "param_groups": groups}

        opt.register_load_state_dict_pre_hook(lambda o, d: d.pop("noise", None) and None)
        opt.register_load_state_dict_pre_hook(double)
        given = {**sd, "noise": 1}
        opt.load_state_dict(given)
        log.append((sorted(given), opt.param_groups[0]["lr"], sd["param_groups"][0]["lr"]))

    assert agree(use)[-1] == (["noise", "param_groups", "state"], 0.2, 0.1)


def test_hooks_are_not_pickled_or_copied():
    def program(side: Any) -> list[int]:
        opt = side.optim.SGD([side.param([1.0])])
        calls: list[int] = []
        opt.register_step_pre_hook(lambda *args: calls.append(0))
        opt.register_state_dict_post_hook(lambda *args: calls.append(1))
        for twin in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
            twin.step()
            twin.state_dict()
            twin.register_step_post_hook(lambda *args: calls.append(2))
            twin.step()
        assert calls == [2, 2]
        opt.step()
        opt.state_dict()
        return calls

    assert program(Ours) == program(Theirs) == [2, 2, 0, 1]


def test_a_step_within_a_step_of_a_subclass_fires_the_hooks_once():
    class Loud(optim.SGD):
        def step(self, grads: Any = None, closure: Any = None) -> Any:
            log.append("before")
            super().step(grads, closure)
            log.append("after")

        def minimize(self, *args: Any, **kwargs: Any) -> Any:
            return super().minimize(*args, **kwargs)

    log: list[str] = []
    opt = Loud([1.0], lr=0.1)
    opt.register_step_pre_hook(lambda o, args, kwargs: log.append("pre"))
    opt.register_step_post_hook(lambda o, args, kwargs: log.append("post"))
    opt.step([1.0])
    assert log == ["pre", "before", "after", "post"]
    opt.minimize(sum)
    assert log[4:] == ["pre", "post"]
    assert repr(opt).startswith("Loud (")


def test_hooks_run_around_minimize_too():
    opt, log = optim.SGD({"w": 1.0}, lr=0.1), []
    opt.register_step_pre_hook(lambda o, args, kwargs: log.append((args[0] is o, args[2:], kwargs)))
    opt.register_step_post_hook(lambda o, args, kwargs: log.append(float(o.params["w"])))
    opt.minimize(lambda params, x: (params["w"] * x, x), 2.0, has_aux=True)
    assert log == [(True, (2.0,), {"has_aux": True}), pytest.approx(0.8)]


# State.


STEP_TYPES = {"SGD": None, "Muon": None, "SparseAdam": int, "AdagradRMSProp": int, "ClippedAdam": int, "DCTAdam": int}


def trained(case: Case, count: int = 3, **options: Any) -> tuple[Any, list[Any]]:
    params = params_of(Ours, case.row)
    opt = getattr(optim, case.row.name)(params, **case.options, **options)
    steps(Ours, opt, params, range(count))
    return opt, params


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


# A rule of one's own.


@rule
class SignDescent(Rule):
    r"""Descent by signs.

    .. math::
        \theta_t = \theta_{t-1} - \eta\,\mathrm{sign}(g_t)

    Args:
        lr: learning rate.
        boost: factor of the first step (default 1).
    """

    lr: NonNegative
    boost: NonNegative = 1.0

    def init(self, param: jax.Array) -> dict[str, Any]:
        return {"count": jnp.zeros(())}

    def update(self, grad: jax.Array, slots: dict[str, Any], param: Any, step: jax.Array) -> Any:
        rate = jnp.where(step == 1, self.boost * self.lr, self.lr)
        return -rate * jnp.sign(grad), {"count": slots["count"] + 1}


class Mine(optim.Optimizer):
    rule = SignDescent


class Documented(optim.Optimizer):
    """Mine, with a text.

    Example:
        >>> opt = Documented([1.0], 0.5)
        >>> opt.step([1.0])
        >>> opt.params[0].tolist()
        0.5
    """

    rule = SignDescent


class Derived(Mine):
    pass


def test_a_rule_of_ones_own_is_one_line():
    parameters = inspect.signature(Mine).parameters
    assert list(parameters) == ["params", "lr", "boost", "groups"]
    assert parameters["lr"].default is inspect.Parameter.empty
    assert parameters["boost"].default == 1.0
    assert parameters["groups"].kind is inspect.Parameter.KEYWORD_ONLY
    opt = Mine({"w": np.ones(2), "b": np.ones(1)}, 0.25, groups=[("b", {"lr": 0.5})])
    assert opt.defaults == {"lr": 0.25, "boost": 1.0}
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.25]
    opt.step({"w": jnp.array([3.0, -3.0]), "b": jnp.array([1.0])})
    assert opt.params["w"].tolist() == [0.75, 1.25]
    assert opt.params["b"].tolist() == [0.5]
    assert [dict(slots) for slots in opt.state.values()] == [{"step": 1, "count": 1}] * 2
    twin = pickle.loads(pickle.dumps(opt))
    twin.step({"w": jnp.array([3.0, -3.0]), "b": None})
    assert twin.params["w"].tolist() == [0.5, 1.5]
    assert repr(opt).startswith("Mine (\nParameter Group 0\n    boost: 1.0\n    lr: 0.5\n")
    for wrong in ({}, {"lr": 0.1, "rate": 1}):
        with pytest.raises(TypeError, match=r"Mine\(\).*After params it takes lr, boost\."):
            Mine([1.0], **wrong)
    with pytest.raises(ValueError, match="Invalid boost: -1"):
        Mine([1.0], 0.1, boost=-1)
    assert Derived([1.0], lr=0.5).rule is SignDescent
    assert list(inspect.signature(Derived).parameters) == ["params", "lr", "boost", "groups"]


def test_a_rule_of_ones_own_is_documented():
    for cls, first in ((Mine, "The torch-style optimizer of"), (Documented, "Mine, with a text.")):
        doc = inspect.getdoc(cls)
        assert doc.startswith(first)
        assert r"\theta_t = \theta_{t-1} - \eta\,\mathrm{sign}(g_t)" in doc
        assert "Args:\n    params: see :class:`Optimizer`.\n    lr: learning rate.\n" in doc
    example = example_of(Documented)
    assert len(example.examples) == 3
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_base_class_needs_a_rule():
    with pytest.raises(TypeError, match="Optimizer has no rule"):
        optim.Optimizer([1.0], {})


def test_all_classes_are_there():
    names = set(torch.optim.__all__) - {"lr_scheduler", "swa_utils", "swap_in_optimizer_params_and_state"}
    ours = {name for name in names if hasattr(optim, name)}
    assert names - ours <= {"LBFGS"}
    assert {"AdagradRMSProp", "ClippedAdam", "DCTAdam", "Parameter", "RemovableHandle"} <= set(vars(optim))
    assert {cls.rule for cls in vars(optim).values() if isinstance(cls, type) and hasattr(cls, "rule")} >= {
        getattr(rules, row.name) for row in ROWS
    }
