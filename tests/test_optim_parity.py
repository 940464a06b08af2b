"""The torch-style face against the live parent: groups, missing gradients, options that change, state dicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.sparse import BCOO

import parity
from jaxoptim import optim, rules
from parity import ROWS_TOUCHED, SLOPE, TORCH_DTYPES, distance, problem, rms_error
from table import CASES, FIRST, OWN_OPTIONS, SPARSE, STATES, Case, of_numbers_if_muon

STEPS = 60
ADDED, FROZEN, CHANGED = 15, range(24, 36), 30
DENSE = of_numbers_if_muon([case for case in CASES if not case.row.sparse])
COMPLEX = [case for case in STATES if case.row.complex and not case.row.sparse]
NEW_OPTIONS = {"betas": (0.7, 0.9), "alpha": 0.8, "rho": 0.7, "eps": 1e-4, "d": 1.5, "lambd": 0.01, "clip_norm": 0.3}
"""What a group is changed to in mid-run, where it has the option."""


def rate(options):
    """The name of the learning rate."""
    return "lr" if "lr" in options else "eta"


def in_both(ours, theirs, change):
    """Make the same change in a group of both optimizers."""
    change(ours)
    change(theirs)


def change_options(group):
    group[rate(group)] *= 0.3
    for name, value in NEW_OPTIONS.items():
        if name in group and not isinstance(group[name], tuple) | (name == "betas"):
            group[name] = value
    if group.get("momentum"):
        group["momentum"] = 0.5


class Twins:
    """The same run with ours and with the parent, driven like a torch training loop."""

    def __init__(self, case: Case, dtype: str) -> None:
        shapes = (*case.row.shapes, case.row.shapes[0])
        self.case, self.dtype, self.own = case, TORCH_DTYPES[dtype], OWN_OPTIONS.get(case.row.name, [])
        self.start, self.noise = problem(shapes, dtype.startswith("complex"))
        self.cells = [optim.Parameter(jnp.asarray(x, dtype)) for x in self.start]
        self.tensors = [torch.nn.Parameter(torch.tensor(x, dtype=self.dtype)) for x in self.start]
        options = {**case.row.flags, **case.options}
        size = options.get(rate(options), 0.01)
        second = {rate(case.ours().specs): 0.5 * size}
        self.third = {rate(case.ours().specs): 2 * size}
        mine = {name: value for name, value in options.items() if name != "foreach"}
        cut = len(shapes) // 2
        self.ours = getattr(optim, case.row.name)(
            [{"params": self.cells[:cut]}, {"params": self.cells[cut:-1], **second}], **mine
        )
        self.theirs = case.row.parent(
            [{"params": self.tensors[:cut]}, {"params": self.tensors[cut:-1], **second}], **options
        )

    def step(self, t: int, skipped: set[int]) -> None:
        for i, (cell, tensor, noise) in enumerate(zip(self.cells, self.tensors, self.noise, strict=True)):
            if i in skipped:
                cell.grad = tensor.grad = None
                continue
            cell.grad = jnp.asarray(noise[t], cell.dtype) + SLOPE * cell.value
            tensor.grad = torch.tensor(noise[t], dtype=self.dtype) + SLOPE * tensor.detach()
        self.ours.step()
        self.theirs.step()

    def distance(self) -> float:
        return distance(
            [np.asarray(cell.value) for cell in self.cells], [tensor.detach().numpy() for tensor in self.tensors]
        )

    def check_state_dicts(self, tolerance: float) -> None:
        """The two state dicts have the same keys in the same order, types, shapes, dtypes and values."""
        ours, theirs = self.ours.state_dict(), self.theirs.state_dict()
        for mine, parents in zip(ours["param_groups"], theirs["param_groups"], strict=True):
            own = {"foreach": mine.get("foreach"), **{k: mine[k] for k in self.own if k in mine}}
            assert {k: v for k, v in mine.items() if k not in own} == {k: v for k, v in parents.items() if k not in own}
            assert [k for k in mine if k not in self.own] == list(parents)
        assert ours["state"].keys() == theirs["state"].keys()
        for key, slots in theirs["state"].items():
            slots = {name: slot for name, slot in slots.items() if slot is not None}
            assert list(ours["state"][key]) == list(slots)
            for name, slot in slots.items():
                mine = ours["state"][key][name]
                if name == "step" and self.case.options.get("subsample_aware"):  # ours counts for each number
                    assert np.all(np.asarray(mine) == slot)
                    continue
                if not isinstance(slot, torch.Tensor):
                    assert type(mine) is type(slot)
                    assert mine == slot
                    continue
                assert str(mine.dtype) == str(slot.dtype).removeprefix("torch.")
                assert mine.shape == tuple(slot.shape)
                np.testing.assert_allclose(
                    np.asarray(mine), slot.numpy(), rtol=tolerance, atol=tolerance * max(1.0, float(slot.abs().max()))
                )


def run(case, dtype):
    """A run with everything that a training loop may do to its optimizer in mid-run."""
    twins = Twins(case, dtype)
    last = len(twins.cells) - 1
    for t in range(STEPS):
        if t == ADDED:
            twins.ours.add_param_group({"params": twins.cells[-1], **twins.third})
            twins.theirs.add_param_group({"params": twins.tensors[-1], **twins.third})
            if case.row.rule is rules.AdagradRMSProp:  # Pyro makes the state of the first groups only
                twins.theirs.state[twins.tensors[-1]] = {"step": 0, "sum": torch.zeros_like(twins.tensors[-1])}
        if t == CHANGED:
            in_both(twins.ours.param_groups[0], twins.theirs.param_groups[0], change_options)
            in_both(twins.ours.param_groups[1], twins.theirs.param_groups[1], change_options)
        if t < ADDED:
            twins.step(t, {last})
        elif t in FROZEN:
            twins.step(t, {1})
        else:
            twins.step(t, {0} if t % 7 == 3 else set())
    return twins


@pytest.mark.costly
@pytest.mark.parametrize("case", DENSE)
def test_a_run_agrees_with_the_parent(case, x64):
    twins = run(case, "float64")
    assert twins.distance() < 1e-12
    twins.check_state_dicts(1e-12)


@pytest.mark.costly
@pytest.mark.parametrize("case", COMPLEX, ids=str)
def test_a_complex_run_agrees_with_the_parent(case, x64):
    twins = run(case, "complex128")
    assert twins.distance() < 1e-12
    twins.check_state_dicts(1e-12)


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in FIRST if not case.row.sparse], ids=str)
def test_low_precision_is_no_worse_than_the_parent(case, dtype):
    start, noise = problem(case.row.wide_shapes)
    reference = parity.wide_reference(case)
    theirs = parity.run_parent(case, start, noise, dtype, 0.0)
    opt = getattr(optim, case.row.name)([jnp.asarray(x, dtype) for x in start], **case.options)
    grads = [jnp.asarray(x, dtype) for x in noise]
    for t in range(parity.STEPS):
        opt.step([grad[t] for grad in grads])
    ours = [np.asarray(x.astype(jnp.float32)).astype(np.float64) for x in opt.params]
    assert rms_error(ours, reference) <= 1.05 * rms_error(theirs, reference)


@pytest.mark.costly
@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_sparse_gradients_agree_with_the_parent(case, x64):
    shapes = case.row.shapes if case.row.sparse else ((12, 4), (9,), (7, 2, 3))
    start, rows = problem(shapes)[0], parity.touched_rows(shapes)
    noise = problem(tuple((ROWS_TOUCHED, *shape[1:]) for shape in shapes))[1]
    opt = getattr(optim, case.row.name)([jnp.asarray(x) for x in start], **case.options)
    tensors = [torch.tensor(x) for x in start]
    parent = case.parents(tensors)
    with torch.sparse.check_sparse_tensor_invariants():
        for t in range(STEPS):
            grads = [None] * len(shapes)
            for i, tensor in enumerate(tensors):
                if i == 0 and t % 5 == 0:
                    tensor.grad = None
                    continue
                at = torch.tensor(rows[i][t])[None]
                tensor.grad = torch.sparse_coo_tensor(at, torch.tensor(noise[i][t]), tensor.shape)
                grads[i] = BCOO((jnp.asarray(noise[i][t]), jnp.asarray(rows[i][t][:, None])), shape=shapes[i])
            opt.step(grads)
            parent.step()
    assert distance([np.asarray(x) for x in opt.params], [tensor.numpy() for tensor in tensors]) < 1e-12


@pytest.mark.costly
@pytest.mark.parametrize("case", of_numbers_if_muon(STATES))
def test_minimize_makes_the_steps_of_its_gradient(case, x64):
    start, noise = problem(case.row.shapes)
    first = getattr(optim, case.row.name)([jnp.asarray(x) for x in start], **case.options)
    second = getattr(optim, case.row.name)([jnp.asarray(x) for x in start], **case.options)

    for t in range(20):
        push = [jnp.asarray(x[t]) for x in noise]
        loss, grads = value_and_grad(second.params, push)
        if case.row.sparse:
            grads = [BCOO((g, jnp.arange(len(g))[:, None]), shape=g.shape) for g in grads]
        second.step(grads)
        assert float(first.minimize(tilted_bowl, push)) == pytest.approx(float(loss), rel=1e-12)
    assert distance([np.asarray(x) for x in first.params], [np.asarray(x) for x in second.params]) < 1e-12


def tilted_bowl(params, push):
    return sum(jnp.sum(x * g) + 0.5 * SLOPE * jnp.sum(x**2) for x, g in zip(params, push, strict=True))


value_and_grad = jax.jit(jax.value_and_grad(tilted_bowl))


def test_minimize_takes_complex_gradients_the_right_way(x64):
    target = 1.0 - 2.0j

    def loss(z):
        return jnp.sum(jnp.abs(z - target) ** 2)

    opt = optim.SGD(jnp.zeros(3, complex), lr=0.1)
    tensor = torch.zeros(3, dtype=torch.complex128, requires_grad=True)
    parent = torch.optim.SGD([tensor], lr=0.1)
    for _ in range(50):
        opt.minimize(loss)
        parent.zero_grad()
        (tensor - target).abs().square().sum().backward()
        parent.step()
    np.testing.assert_allclose(np.asarray(opt.params), tensor.detach().numpy(), rtol=1e-12)
