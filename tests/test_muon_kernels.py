"""Muon for kernels of more than two axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxoptim
from jaxoptim import optim, rules
from jaxoptim.checkpoint import load, save

pytestmark = pytest.mark.numbers

KERNEL = (3, 2, 4, 5)
LAYOUTS = [
    ((0,), lambda x: x, lambda x: x),
    ((-1,), lambda x: np.moveaxis(x, 0, -1), lambda x: np.moveaxis(x, -1, 0)),
    ((2, 0), lambda x: np.moveaxis(x, (0, 1), (2, 0)), lambda x: np.moveaxis(x, (2, 0), (0, 1))),
]
"""The axes that are rows, and the way from torch's layout to one where they are, and back."""


@pytest.mark.costly
@pytest.mark.parametrize(("flatten", "moved", "back"), LAYOUTS, ids=[str(flatten) for flatten, *_ in LAYOUTS])
@pytest.mark.parametrize("way", ["rule", "class"])
def test_the_steps_are_torchs_of_the_matrix(flatten, moved, back, way):
    rng = np.random.default_rng(0)
    # Without momentum, so that the gradient that bfloat16 rounds is the same to the last bit.
    options = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw", "momentum": 0.0}
    start = rng.normal(size=KERNEL).astype(np.float32)
    rows = int(np.prod(KERNEL[: len(flatten)]))
    matrix = torch.nn.Parameter(torch.tensor(start.reshape(rows, -1)))
    theirs = torch.optim.Muon([matrix], **options)
    kernel = jnp.asarray(moved(start))
    rule = rules.Muon(**options, flatten=flatten)
    opt, state = optim.Muon({"kernel": kernel}, **options, flatten=flatten), jaxoptim.init(rule, kernel)
    step = jax.jit(jaxoptim.step)
    for _ in range(60):
        grad = rng.normal(size=KERNEL).astype(np.float32)
        matrix.grad = torch.tensor(grad.reshape(rows, -1))
        theirs.step()
        if way == "class":
            opt.step({"kernel": moved(grad)})
        else:
            kernel, state = step(rule, kernel, jnp.asarray(moved(grad)), state)
    mine = opt.params["kernel"] if way == "class" else kernel
    np.testing.assert_allclose(back(np.asarray(mine)).reshape(rows, -1), matrix.detach(), atol=1e-5)  # 60 roundings


def test_a_matrix_that_is_flattened_by_its_first_axis_is_itself():
    start = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))
    grad = jnp.cos(start)
    plain, flat, turned = (rules.Muon(lr=0.1, flatten=axes) for axes in (None, (0,), (1,)))
    new = [jaxoptim.step(rule, start, grad, jaxoptim.init(rule, start))[0] for rule in (plain, flat)]
    np.testing.assert_array_equal(*new)
    other, _ = jaxoptim.step(turned, start, grad, jaxoptim.init(turned, start))
    across, _ = jaxoptim.step(plain, start.T, grad.T, jaxoptim.init(plain, start.T))
    np.testing.assert_array_equal(other, across.T)


@pytest.mark.slow
def test_groups_flatten_otherwise_and_state_dicts_cross(tmp_path):
    params = {"conv": jnp.ones((3, 3, 2, 4)), "dense": jnp.ones((4, 2))}
    groups = [("conv", {"flatten": (-1,)})]
    opt = optim.Muon(params, groups=groups)
    opt.step(params)
    save(tmp_path / "muon.safetensors", opt.state_dict())
    resumed = optim.Muon(opt.params, groups=groups)
    resumed.load_state_dict(load(tmp_path / "muon.safetensors"))
    assert [group.get("flatten") for group in resumed.param_groups] == [(-1,), None]
    resumed.step(params)
    weight = torch.nn.Parameter(torch.ones(4, 2))
    theirs = torch.optim.Muon([weight])
    weight.grad = torch.ones(4, 2)
    theirs.step()
    alone = optim.Muon([jnp.ones((4, 2))])
    alone.load_state_dict(theirs.state_dict())
    assert alone.param_groups[0].keys() == theirs.param_groups[0].keys()
    kernels = optim.Muon([jnp.ones((4, 2))], flatten=(0,))
    kernels.load_state_dict(theirs.state_dict())
    assert kernels.param_groups[0]["flatten"] == (0,)


@pytest.mark.parametrize(
    ("flatten", "message"),
    [
        (None, r"'k' has shape \(3, 2, 4\). Say which axes of a kernel are rows, flatten=\(-1,\), or give it"),
        ((3,), r"flatten=\(3,\) of Muon names the axes that are rows, but 'k' has shape \(3, 2, 4\)"),
        ((0, 1, 2), "Name some of its axes, and not all"),
        ((0, -3), "Name some of its axes, and not all"),
        ([0], r"Invalid flatten: \[0\]. Muon takes a tuple of axes"),
        ((), r"Invalid flatten: \(\). Muon takes a tuple of axes"),
    ],
)
def test_axes_that_are_none(flatten, message):
    for make in (
        lambda: optim.Muon({"k": jnp.ones((3, 2, 4))}, flatten=flatten),
        lambda: jaxoptim.muon(flatten=flatten).init({"k": jnp.ones((3, 2, 4))}),
    ):
        with pytest.raises(ValueError, match=message):
            make()
