"""The same program over our optimizers and over the parents."""

import doctest
from typing import Any, ClassVar

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.sparse import BCOO
from torch.optim import optimizer as torch_base

from jaxoptim import optim
from table import ROWS

TORCH = [row for row in ROWS if row.path.startswith("torch.")]
OURS = {
    "groups": None,
    "frozen": None,
    "wrt": None,
    "gradient_transform": None,
    "master_weights": False,
    "rounding": "nearest",
    "state_dtype": None,
    "mesh": None,
    "zero": None,
}
"""Arguments that every class has besides the parent's, and their defaults."""


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


def start(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [np.linspace(-1, 2, int(np.prod(shape))).reshape(shape) for shape in shapes]


def params_of(side: Any, row: Any, count: int = 2) -> list[Any]:
    return [side.param(x) for x in start(*([row.shapes[0]] * count))]


def by_row(rows: Any = ROWS) -> Any:
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


def example_of(cls: Any) -> doctest.DocTest:
    (test,) = doctest.DocTestFinder(recurse=False).find(cls, cls.__name__)
    return test


def run_with(name: str, options: dict, change: Any, side: Any) -> Any:
    """Three steps of two groups, a change, three more."""
    params = [side.param(x) for x in start((3, 2), (2,), (4,))]
    opt = getattr(side.optim, name)([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], lr=0.05, **options)
    steps(side, opt, params, range(3))
    added = change(opt, params, side)
    params = [*params, *(added or [])]
    steps(side, opt, params, range(3, 6))
    return opt, params
