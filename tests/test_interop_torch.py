"""Runs that go from torch to here and back: checkpoints, whole runs, and what is refused on the way.

A run of twenty steps that changes sides after ten must end where torch's run of twenty ends. The gradients
depend on the parameters, so that an error would feed back.
"""

import contextlib
import copy
import functools
import pickle
import tempfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.sparse import BCOO

import jaxoptim
from averaging_pairs import module_of
from jaxoptim import interop, optim, rules
from schedule_table import COMPOSITE, SIMPLE
from schedule_table import Row as Schedule
from scheduler_sides import Ours, Theirs, built, options_of
from table import CASES, FIRST, STATES

to_torch, carry_over, carry_back = interop.torch.to_torch, interop.torch.carry_over, interop.torch.carry_back
HALF, FEEDBACK, ATOL = 10, 0.1, 1e-11
BY_NAME = {str(case): case for case in CASES}
PURE = ["SGD", "Adam", "NAdam", "ASGD", "Adafactor", "ClippedAdam", "DCTAdam"]


def each(fast, cases=CASES):
    """Every option set, of which some are for the fast tests."""
    params = [pytest.param(c, id=str(c), marks=[] if c in fast else pytest.mark.slow) for c in cases]
    return pytest.mark.parametrize("case", params)


# Without subsamples Pyro counts all numbers at once, and does not read what counts each.
BACK = [case for case in CASES if not case.options.get("subsample_aware")]


def through_file(state_dict):
    """What ``torch.load`` makes of it, which takes nothing but tensors and plain containers."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state_dict, Path(folder) / "run.pt")
        return torch.load(Path(folder) / "run.pt", weights_only=True)


def numbers(x):
    """Arrays of either library as NumPy's."""
    if isinstance(x, torch.Tensor):
        x = x.detach().float() if x.dtype == torch.bfloat16 else x.detach().resolve_conj()
        return x.numpy().copy()
    return np.array(x)


def close(ours, theirs, atol=ATOL):
    chex.assert_trees_all_close([*map(numbers, ours)], [*map(numbers, theirs)], rtol=0, atol=atol)


def same_state(ours, theirs, atol=ATOL):
    """Two state dicts have the same slots and, up to rounding, the same numbers in them."""
    assert ours["state"].keys() == theirs["state"].keys()
    for key, slots in theirs["state"].items():
        slots = {name: slot for name, slot in slots.items() if slot is not None}
        assert ours["state"][key].keys() == slots.keys()
        for name, slot in slots.items():
            # A step that torch counts once may be counted for each number here.
            close(
                [ours["state"][key][name]], [np.broadcast_to(numbers(slot), np.shape(ours["state"][key][name]))], atol
            )


def frozen(opt):
    """All that a refused call must not change."""
    return repr(opt), pickle.dumps(jax.tree.map(np.asarray, opt.params)), pickle.dumps(opt.state_dict())


@contextlib.contextmanager
def refused(opt, message, error=ValueError):
    before = frozen(opt)
    with pytest.raises(error, match=message):
        yield
    assert frozen(opt) == before


def quartic(params):
    return sum(jnp.sum((x - 0.3) ** 4) for x in jax.tree.leaves(params))


class Trial:
    """The start and the gradients of a case, for both sides."""

    def __init__(self, case):
        rng = np.random.default_rng(0)
        self.case, self.shapes = case, case.row.shapes
        self.start = [rng.normal(size=shape) for shape in self.shapes]
        self.rows = [rng.integers(0, max(shape[:1], default=1), size=(2 * HALF, 4)) for shape in self.shapes]
        sizes = [(4, *shape[1:]) if case.row.sparse else shape for shape in self.shapes]
        self.noise = [rng.normal(size=(2 * HALF, *size)) for size in sizes]

    def gradients(self, t, params):
        """NumPy's, rows for sparse ones."""
        at = [rows[t] if self.case.row.sparse else ... for rows in self.rows]
        return [noise[t] + FEEDBACK * x[i] for noise, x, i in zip(self.noise, map(np.asarray, params), at, strict=True)]

    def ours(self, t, params):
        grads = self.gradients(t, params)
        if not self.case.row.sparse:
            return grads
        return [BCOO((g, r[t][:, None]), shape=s) for g, r, s in zip(grads, self.rows, self.shapes, strict=True)]

    def train(self, optimizer, steps):
        """torch, or the class here."""
        for t in steps:
            if isinstance(optimizer, optim.Optimizer):
                optimizer.step(self.ours(t, optimizer.params))
                continue
            params = optimizer.param_groups[0]["params"]
            grads = map(torch.tensor, self.gradients(t, params))
            with torch.sparse.check_sparse_tensor_invariants():
                for param, grad, rows in zip(params, grads, self.rows, strict=True):
                    sparse = self.case.row.sparse
                    at = torch.tensor(rows[t])[None]
                    param.grad = torch.sparse_coo_tensor(at, grad, param.shape) if sparse else grad
                optimizer.step()

    def parent(self, start, state_dict, load=torch.optim.Optimizer.load_state_dict):
        """torch's optimizer with its default options and a state that is loaded."""
        made = self.case.row.parent([torch.tensor(np.asarray(x)) for x in start], **self.case.row.flags)
        load(made, copy.deepcopy(state_dict))
        return made


def tensors_of(optimizer):
    return [numbers(param) for group in optimizer.param_groups for param in group["params"]]


@functools.cache
def in_torch(name):
    """The run in torch: after half of it parameters and state, from a file; and after all of it."""
    case = BY_NAME[name]
    trial = Trial(case)
    theirs = case.parents(list(map(torch.tensor, trial.start)))
    trial.train(theirs, range(HALF))
    half = tensors_of(theirs), through_file(theirs.state_dict())
    trial.train(theirs, range(HALF, 2 * HALF))
    return trial, *half, tensors_of(theirs), through_file(theirs.state_dict())


step = jax.jit(jaxoptim.step)


# Twenty steps on two sides.


@pytest.mark.costly
@each(STATES)
def test_ten_steps_in_torch_and_ten_here_are_twenty_in_torch(case, x64):
    trial, half, saved, whole, at_end = in_torch(str(case))
    ours, kept = getattr(optim, case.row.name)(half), pickle.dumps(jax.tree.map(numbers, saved))
    ours.load_state_dict(saved)
    trial.train(ours, range(HALF, 2 * HALF))
    close(ours.params, whole)
    same_state(ours.state_dict(), at_end)
    assert pickle.dumps(jax.tree.map(numbers, saved)) == kept


@pytest.mark.costly
@each(STATES, BACK)
def test_ten_steps_here_and_ten_in_torch_are_twenty_in_torch(case, x64):
    trial, half, saved, whole, _ = in_torch(str(case))
    ours = getattr(optim, case.row.name)(trial.start, **case.options)
    trial.train(ours, range(HALF))
    theirs = trial.parent(ours.params, ours.state_dict(), interop.torch.load_state_dict)
    for key, slots in theirs.state_dict()["state"].items():
        assert {k: getattr(x, "dtype", None) for k, x in slots.items()} == {
            k: getattr(x, "dtype", None) for k, x in saved["state"][key].items() if x is not None
        }
    trial.train(theirs, range(HALF, 2 * HALF))
    close(tensors_of(theirs), whole)
    # torch's own loading rounds some slots otherwise, so that it is compared with an interrupted run of torch.
    resumed = trial.parent(half, saved)
    theirs = trial.parent(ours.params, through_file(to_torch(ours.state_dict())))
    trial.train(resumed, range(HALF, 2 * HALF))
    trial.train(theirs, range(HALF, 2 * HALF))
    close(tensors_of(theirs), tensors_of(resumed))


@pytest.mark.costly
@each([case for case in FIRST if case.row.name in PURE])
def test_the_pure_face_continues_a_run_of_torch(case, x64):
    trial, half, saved, whole, _ = in_torch(str(case))
    rule, params = case.ours(), list(map(jnp.asarray, half))
    state = interop.torch.from_torch(rule, params, saved)
    for t in range(HALF, 2 * HALF):
        params, state = step(rule, params, trial.ours(t, params), state)
    close(params, whole)


@pytest.mark.slow
@each([case for case in FIRST if case.row.name in PURE], BACK)
def test_torch_continues_a_run_of_the_pure_face(case, x64):
    trial, _, saved, whole, _ = in_torch(str(case))
    rule, params = case.ours(), list(map(jnp.asarray, trial.start))
    state = jaxoptim.init(rule, params)
    for t in range(HALF):
        params, state = step(rule, params, trial.ours(t, params), state)
    state_dict = interop.torch.to_torch_state_dict(rule, params, state)
    same_state(state_dict, saved)
    theirs = trial.parent(params, through_file(state_dict), interop.torch.load_state_dict)
    trial.train(theirs, range(HALF, 2 * HALF))
    close(tensors_of(theirs), whole)


FEATURES, TARGETS = np.random.default_rng(1).normal(size=(2, 30, 3))
SEARCHES = [None, pytest.param("strong_wolfe", marks=pytest.mark.slow)]
by_search = pytest.mark.parametrize("search", SEARCHES, ids=["fixed step", "strong_wolfe"])
START = [np.array([[0.3, -0.2, 0.1], [0.2, 0.5, -0.4], [0.1, 0.0, 0.7]]), np.zeros(3)]


def least_squares(params):
    weight, bias = params
    return jnp.mean((jnp.tanh(FEATURES @ weight + bias) - TARGETS) ** 2) + 0.01 * jnp.sum(weight**2)


def search_in_torch(optimizer, steps):
    weight, bias = params = optimizer.param_groups[0]["params"]
    features, targets = torch.tensor(FEATURES), torch.tensor(TARGETS)

    def closure():
        optimizer.zero_grad()
        loss = ((torch.tanh(features @ weight + bias) - targets) ** 2).mean() + 0.01 * (weight**2).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return list(map(numbers, params))


def lbfgs_in_torch(start, state_dict=None, **options):
    made = torch.optim.LBFGS([torch.tensor(np.asarray(x), requires_grad=True) for x in start], **options)
    if state_dict is not None:
        made.load_state_dict(state_dict)
    return made


@pytest.mark.slow
@by_search
def test_lbfgs_changes_sides_in_mid_run(search, x64):
    options = {"line_search_fn": search, "max_iter": 3}
    theirs = lbfgs_in_torch(START, **options)
    half = search_in_torch(theirs, 2)
    saved = through_file(theirs.state_dict())
    whole = search_in_torch(theirs, 2)
    assert np.abs(whole[0] - half[0]).max() > 1e-3
    out, back = optim.LBFGS(half), optim.LBFGS(START, **options)
    out.load_state_dict(saved)
    for _ in range(2):
        out.minimize(least_squares)
        back.minimize(least_squares)
    close(out.params, whole)
    close(search_in_torch(lbfgs_in_torch(back.params, through_file(to_torch(back.state_dict()))), 2), whole)


@pytest.mark.slow
@by_search
def test_pure_lbfgs_changes_sides_in_mid_run(search, x64):
    rule = rules.LBFGS(max_iter=3, line_search_fn=search)
    tx = jaxoptim.transformation(rule)

    @jax.jit
    def advance(params, state):
        value, grad = jax.value_and_grad(least_squares)(params)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=least_squares)
        return jax.tree.map(jnp.add, params, updates), state

    theirs = lbfgs_in_torch(START, line_search_fn=search, max_iter=3)
    out = list(map(jnp.asarray, search_in_torch(theirs, 2)))
    state = interop.torch.from_torch(rule, out, through_file(theirs.state_dict()))
    whole = search_in_torch(theirs, 2)
    back = list(map(jnp.asarray, START))
    other = tx.init(back)
    for _ in range(2):
        (out, state), (back, other) = advance(out, state), advance(back, other)
    close(out, whole)
    state_dict = through_file(interop.torch.to_torch_state_dict(rule, back, other))
    close(search_in_torch(lbfgs_in_torch(back, state_dict), 2), whole)


def pair_in_torch(named=True):
    """Parameters in another order than the leaves of a pytree, and torch's optimizer of them."""
    tensors = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": torch.ones(3, dtype=torch.float64)}
    return tensors, torch.optim.Adam(list(tensors.items() if named else tensors.values()), lr=0.1)


def test_the_pure_face_finds_parameters_by_name_and_refuses_other_ones(x64):
    tensors, theirs = pair_in_torch()
    params, rule = {"w": jnp.ones(2), "b": jnp.ones(3)}, rules.Adam(lr=0.1)
    assert interop.torch.from_torch(rule, params, theirs.state_dict()).step == 0
    for first in (2, 0, 1):  # the second parameter comes one step late
        for late, tensor in enumerate(tensors.values()):
            tensor.grad = None if late > first else 2 * tensor
        theirs.step()
    tensors["b"].grad = None
    state = interop.torch.from_torch(rule, params, {**theirs.state_dict(), "state": {}})
    assert state.step == 0
    state = interop.torch.from_torch(rule, params, theirs.state_dict())
    assert (int(state.step), int(state.counts["b"]), state.counts["w"]) == (3, 2, None)
    even = theirs.state_dict()
    even["state"][1]["step"] = even["state"][0]["step"]
    slots = interop.torch.from_torch(rule, params, even).slots
    close([slots["exp_avg"][name] for name in "wb"], [even["state"][i]["exp_avg"] for i in range(2)], 0.0)
    groups = [{"params": [tensors["w"]]}, {"params": [tensors["b"]]}]
    for wrong, error in (
        (torch.optim.Adam(groups).state_dict(), "it has 2, the optimizer has 1"),
        (torch.optim.Adam([tensors["w"]]).state_dict(), "group 0 has 1 parameters there, 2 here; 'w' has nothing"),
        (torch.optim.RMSprop(tensors.values()).state_dict(), "options 'momentum', .* which Adam does not take"),
    ):
        with pytest.raises(ValueError, match=error):
            interop.torch.from_torch(rule, params, wrong)
    with pytest.raises(ValueError, match=r"'exp_avg(_sq)?' of shape .* for the parameter 'b'"):
        interop.torch.from_torch(rule, params | {"b": jnp.ones(4)}, even)


def test_names_on_both_sides_count_on_the_way_into_torch(x64):
    tensors, theirs = pair_in_torch()
    ours = optim.Adam({"w": np.ones(2), "b": np.ones(3)})
    ours.step({"w": np.full(2, 2.0), "b": np.full(3, 3.0)})
    interop.torch.load_state_dict(theirs, ours.state_dict())
    close([theirs.state[tensors["w"]]["exp_avg"], theirs.state[tensors["b"]]["exp_avg"]], [[0.2] * 2, [0.3] * 3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NAdam", "Adagrad", "RAdam"])
def test_counts_and_numbers_of_older_torch_are_plain_ones(name, x64):
    tensor = torch.ones(2, dtype=torch.float64)
    theirs = getattr(torch.optim, name)([tensor])
    tensor.grad = torch.ones(2, dtype=torch.float64)
    theirs.step()
    saved, (old, new) = theirs.state_dict(), [getattr(optim, name)([numbers(tensor)]) for _ in range(2)]
    new.load_state_dict(saved)
    plain = {k: x.item() if x.ndim == 0 else x for k, x in saved["state"][0].items()}
    old.load_state_dict(saved | {"state": {0: plain | {"step": int(plain["step"])}}})
    for opt in (old, new):
        opt.step([np.ones(2)])
    same_state(old.state_dict(), new.state_dict(), 0.0)


# What a state may hold.


def mixed(options):
    """torch's optimizer of a complex parameter, a real one, one that is never updated, and one that comes late."""
    rng = np.random.default_rng(2)
    start = [rng.normal(size=3) + 1j * rng.normal(size=3), *(rng.normal(size=s) for s in [(2, 2), (4,), (2,)])]
    tensors = list(map(torch.tensor, start))
    groups = [{"params": tensors[:2]}, {"params": tensors[2:3], "lr": 0.5}]
    noise = [rng.normal(size=(60, *x.shape)) * (1 + 1j if np.iscomplexobj(x) else 1) for x in start]
    return getattr(torch.optim, options.pop("name"))(groups, **options), tensors, noise


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"name": "Adam", "amsgrad": True, "lr": 0.02},
        {"name": "SGD", "momentum": 0.9, "lr": 0.02, "weight_decay": 0.1},
        {"name": "NAdam", "lr": 0.02},
        {"name": "Adagrad"},
        {"name": "ASGD", "lr": 0.05, "t0": 10.0, "lambd": 0.01},
    ],
    ids=lambda options: options["name"],
)
def test_groups_of_new_frozen_and_complex_parameters_change_sides_twice(options, x64):
    name = options["name"]

    def part(optimizer, tensors, noise, times):
        """Twenty steps: the real parameter starts at 10, the late one at 15 with options of its own."""
        for t in times:
            if t == 15:
                optimizer.add_param_group({"params": [tensors[3]], "lr": 0.1})
            for i, first in enumerate([0, 10, 99, 15]):
                tensors[i].grad = torch.tensor(noise[i][t]) + FEEDBACK * tensors[i] if t >= first else None
            optimizer.step()

    theirs, tensors, noise = mixed(dict(options))
    part(theirs, tensors, noise, range(20))
    groups = [[numbers(x) for x in group["params"]] for group in theirs.param_groups]
    ours = getattr(optim, name)([{"params": group} for group in groups])
    ours.load_state_dict(through_file(theirs.state_dict()))
    assert [group["lr"] for group in ours.param_groups] == [theirs.param_groups[0]["lr"], 0.5, 0.1]
    for t in range(20, 40):
        values = [[noise[0][t], noise[1][t]], [None], [noise[3][t]]]
        ours.step([
            [None if n is None else n + FEEDBACK * np.asarray(x) for n, x in zip(*pair, strict=True)]
            for pair in zip(values, ours.params, strict=True)
        ])  # fmt: skip
    again = [torch.tensor(np.asarray(x)) for x in jax.tree.leaves(ours.params)]
    back = getattr(torch.optim, name)([{"params": again[:2]}, {"params": again[2:3]}, {"params": again[3:]}])
    interop.torch.load_state_dict(back, ours.state_dict())
    part(theirs, tensors, noise, range(20, 60))
    part(back, again, noise, range(40, 60))
    close(again, tensors)
    same_state(back.state_dict(), theirs.state_dict())
    assert [{**g, "params": 0} for g in back.param_groups] == [{**g, "params": 0} for g in theirs.param_groups]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", FIRST[1:4], ids=str)
def test_slots_are_float32_here_and_of_torchs_dtype_there(case, dtype):
    tensor = torch.tensor([0.5, -1.5], dtype=getattr(torch, dtype))
    theirs = case.parents([tensor])
    for _ in range(3):
        tensor.grad = torch.tensor([0.25, 1.0], dtype=tensor.dtype)
        theirs.step()
    ours = getattr(optim, case.row.name)([jnp.asarray(numbers(tensor), dtype)])
    ours.load_state_dict(through_file(theirs.state_dict()))
    ours.params  # noqa: B018
    ours.step([None])
    slots = ours.state_dict()["state"][0]
    assert {slot.dtype for slot in slots.values()} == {np.dtype(np.float32)}
    twin = case.parents([tensor.clone()])
    interop.torch.load_state_dict(twin, through_file(to_torch(ours.state_dict())))
    for name, slot in theirs.state_dict()["state"][0].items():
        mine = twin.state_dict()["state"][0][name]
        assert mine.dtype == slot.dtype
        assert torch.equal(mine, slot)


def test_rates_in_tensors_flags_and_nested_options_are_kept(x64):
    weight = torch.ones(2)
    note = {"a": [1, (2.0, "z")], "t": torch.tensor([1, 2]), "n": None}
    group = {"params": [weight], "note": note, "betas": (0.8, 0.9)}
    theirs = torch.optim.AdamW([group], lr=torch.tensor(0.5), foreach=False, capturable=True, differentiable=False)
    ours = optim.AdamW([{"params": [np.ones(2)], "note": None}])
    saved = theirs.state_dict()
    ours.load_state_dict(saved)
    theirs.param_groups[0]["lr"].fill_(9.0)
    note["t"].fill_(9)
    (mine,) = ours.param_groups
    assert isinstance(mine["lr"], jax.Array)
    assert isinstance(mine["note"]["t"], jax.Array)
    assert (mine["lr"], mine["foreach"], mine["capturable"], mine["fused"]) == (0.5, False, True, None)
    back = through_file(to_torch(ours.state_dict()))["param_groups"][0]
    assert list(back) == list(saved["param_groups"][0])
    assert isinstance(back["lr"], torch.Tensor)
    assert back["note"]["t"].tolist() == [1, 2]
    assert back["note"] | {"t": 0} == note | {"t": 0}
    assert back["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5)], ids=lambda x: type(x).__name__)
def test_numpys_numbers_among_the_options_are_read_by_torch(number):
    ours = optim.SGD([np.ones(2)], lr=number)
    assert through_file(to_torch(ours.state_dict()))["param_groups"][0]["lr"] == 0.5


def test_neither_side_shares_memory_with_the_other():
    tensor = torch.ones(3)
    theirs = torch.optim.SGD([tensor], lr=0.5, momentum=0.9)
    tensor.grad = torch.ones(3)
    theirs.step()
    ours, carried = optim.SGD({"w": np.ones(3)}), optim.SGD({"w": np.ones(3)})
    saved = theirs.state_dict()
    ours.load_state_dict(saved)
    carry_over(carried, {"w": tensor}, saved)
    before, out = copy.deepcopy(ours.state_dict()), ours.state_dict()
    converted = to_torch(out)
    params, state_dict = carry_back(carried, {"w": tensor})
    for buffer in (saved["state"][0]["momentum_buffer"], tensor.data):
        buffer.fill_(9.0)
    for given_state, param in ((converted, torch.ones(3)), (state_dict, params["w"])):
        there = torch.optim.SGD([param])
        there.load_state_dict(given_state)  # which keeps the tensors that it is given, and changes them in place
        param.grad = torch.full((3,), 5.0)
        there.step()
        assert given_state["state"][0]["momentum_buffer"][0] == pytest.approx(5.9)
    for one in (out, ours.state_dict(), carried.state_dict()):
        np.testing.assert_array_equal(one["state"][0]["momentum_buffer"], before["state"][0]["momentum_buffer"])
    assert carried.params["w"].tolist() == [0.5] * 3


# Tensors of every kind.

GRID = np.arange(6.0).reshape(3, 2)
REAL = "bfloat16 float16 float32 float64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"


def rows_twice():
    return torch.sparse_coo_tensor([[1, 1]], torch.ones(2, 2), (3, 2), check_invariants=True)


DTYPES = f"{REAL} int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex64 complex128".split()
KINDS = {
    **{dtype: lambda dtype=dtype: (torch.tensor(GRID).to(getattr(torch, dtype)), GRID) for dtype in DTYPES},
    "bool": lambda: (torch.tensor(GRID) > 2, GRID > 2),
    "requires_grad": lambda: (torch.tensor(GRID, requires_grad=True), GRID),
    "a parameter": lambda: (torch.nn.Parameter(torch.tensor(GRID)), GRID),
    "of a graph": lambda: (2 * torch.tensor(GRID, requires_grad=True), 2 * GRID),
    "a conjugate": lambda: (torch.tensor(GRID * (1 + 1j)).conj(), GRID * (1 - 1j)),
    "a negation": lambda: (torch.tensor(GRID * (1 + 1j)).conj().imag, -GRID),
    "expanded": lambda: (torch.tensor([[3.0]]).expand(3, 2), np.full((3, 2), 3.0)),
    "sliced": lambda: (torch.arange(12.0).reshape(3, 4)[:, ::2], np.arange(12.0).reshape(3, 4)[:, ::2]),
    "transposed": lambda: (torch.tensor(GRID).T, GRID.T),
    "sparse": lambda: (rows_twice(), np.array([[0, 0], [2, 2], [0, 0]])),
    "a number": lambda: (torch.tensor(2.5), np.array(2.5)),
    "empty": lambda: (torch.empty(0, 3), np.empty((0, 3))),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_any_kind_comes_and_goes(kind, x64):
    tensor, expected = KINDS[kind]()
    opt = optim.SGD([np.ones(2)])
    state_dict = {"state": {0: {"mine": tensor}}, "param_groups": opt.state_dict()["param_groups"]}
    opt.load_state_dict(state_dict, strict=False)
    loaded = opt.state_dict()["state"][0]["mine"]
    assert isinstance(loaded, jax.Array)
    assert str(loaded.dtype) == str(tensor.dtype).removeprefix("torch.")
    np.testing.assert_array_equal(np.asarray(loaded).astype(complex), expected.astype(complex))
    back = to_torch(loaded)
    assert (back.dtype, back.shape, back.layout) == (tensor.dtype, tensor.shape, torch.strided)
    assert back.is_contiguous()
    np.testing.assert_array_equal(back.to(torch.complex128), expected.astype(complex))
    assert through_file(back).dtype == back.dtype


def test_a_key_becomes_its_words():
    assert to_torch({"key": jax.random.key(7)})["key"].tolist() == [0, 7]


def test_a_tensor_without_numbers_is_refused():
    opt = optim.SGD([np.ones(2)], momentum=0.9)
    given = opt.state_dict() | {"state": {0: {"momentum_buffer": torch.ones(2, device="meta")}}}
    with refused(opt, "meta", NotImplementedError):
        opt.load_state_dict(given)


# Schedulers and averages.

PLATEAU = Schedule("ReduceLROnPlateau", {"patience": 3, "factor": 0.5})
EACH = {row.name: row for row in reversed([*SIMPLE, *COMPOSITE, PLATEAU])}


@pytest.mark.slow
@pytest.mark.parametrize("row", EACH.values(), ids=EACH)
def test_a_scheduler_and_its_optimizer_change_sides_twice(row):
    part = 13 if row is PLATEAU else min(13, (row.values(40) - 1) // 3)

    def advanced(scheduler, t):
        opt = scheduler.optimizer
        for group in opt.param_groups:
            for param in group["params"]:
                param.grad = Ours.array(t % 3) if isinstance(param, optim.Parameter) else Theirs.array(t % 3)
        opt.step()
        scheduler.step(*[1.0] * (row is PLATEAU))
        return options_of(opt), scheduler.get_last_lr()

    def loaded(side, old):
        new = built(row, side)
        opt, states = new.optimizer, [old.optimizer.state_dict(), old.state_dict()]
        for one, other in zip(opt.param_groups, old.optimizer.param_groups, strict=True):
            for param, value in zip(one["params"], other["params"], strict=True):
                if side is Ours:
                    param.value = jnp.asarray(numbers(value))
                else:
                    param.data = torch.tensor(np.asarray(value.value))
        opt.load_state_dict(through_file(to_torch(states[0])))
        new.load_state_dict(through_file(to_torch(states[1])))
        return new

    whole = moving = built(row, Theirs)
    history = [advanced(whole, t) for t in range(part)]
    moving, expected = loaded(Ours, whole), [advanced(whole, t) for t in range(part, 3 * part)]
    seen = [advanced(moving, t) for t in range(part, 2 * part)]
    moving = loaded(Theirs, moving)
    seen += [advanced(moving, t) for t in range(2 * part, 3 * part)]
    assert seen == expected
    assert len(history) == part
    close(tensors_of(moving.optimizer), tensors_of(whole.optimizer), atol=1e-5)


@pytest.mark.slow
def test_an_average_changes_sides_twice(x64):
    rng = np.random.default_rng(3)
    trees = [{"0": {"weight": rng.normal(size=(2, 3)), "bias": rng.normal(size=2)}} for _ in range(9)]

    def averaged(tree):
        return torch.optim.swa_utils.AveragedModel(module_of(tree))

    whole, ours, back = averaged(trees[0]), optim.swa_utils.AveragedModel(trees[8]), averaged(trees[8])
    for tree in trees[:3]:
        whole.update_parameters(module_of(tree))
    ours.load_state_dict(through_file(whole.state_dict()))
    for tree in trees[3:6]:
        ours.update_parameters(tree)
    back.load_state_dict(through_file(to_torch(ours.state_dict())))
    for tree in trees[6:]:
        back.update_parameters(module_of(tree))
    for tree in trees[3:]:
        whole.update_parameters(module_of(tree))
    assert back.state_dict().keys() == whole.state_dict().keys()
    close(back.state_dict().values(), whole.state_dict().values())
