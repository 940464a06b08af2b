"""One run with a Pyro-style optimizer of ours and with live Pyro's, for the tests of ``jaxoptim.pyro.optim``."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pyro
import torch
from jax.experimental.sparse import BCOO

from jaxoptim.optim import Parameter
from parity import SLOPE, TORCH_DTYPES

OURS_ONLY = ("dct_dim", "subsample")
"""Options of our DCTAdam, which Pyro keeps as attributes of the parameter."""


class Twins:
    """The same parameters, met and updated in the same calls, in ours and in Pyro.

    Args:
        ours: an optimizer of ``jaxoptim.pyro.optim``.
        theirs: the one of ``pyro.optim``.
        dtype: of the parameters.
    """

    def __init__(self, ours: Any, theirs: Any, dtype: str = "float64") -> None:
        self.ours, self.theirs, self.dtype = ours, theirs, dtype
        self.cells: dict[str, Parameter] = {}
        self.tensors: dict[str, Any] = {}
        pyro.clear_param_store()

    def add(self, name: str, value: Any) -> None:
        """A new parameter for both."""
        store = pyro.get_param_store()
        tensor = torch.tensor(np.asarray(value), dtype=TORCH_DTYPES[self.dtype])
        store[name] = tensor
        self.tensors[name] = store._params[name]
        self.cells[name] = Parameter(jnp.asarray(value, self.dtype), name)

    def set_grads(self, noises: dict[str, Any], slope: float = SLOPE) -> None:
        """Gradients: noise and a share of the value; None; or values and rows of a sparse one."""
        for name, noise in noises.items():
            cell, tensor = self.cells[name], self.tensors[name]
            if noise is None:
                cell.grad = tensor.grad = None
            elif isinstance(noise, tuple):
                values, rows = noise
                cell.grad = BCOO((jnp.asarray(values, self.dtype), jnp.asarray(rows)[:, None]), shape=cell.shape)
                values = torch.tensor(values, dtype=tensor.dtype)
                tensor.grad = torch.sparse_coo_tensor(torch.tensor(rows)[None], values, tensor.shape)
            else:
                mine = jnp.asarray(noise, self.dtype)
                cell.grad = mine + SLOPE * cell.value if slope else mine
                tensor.grad = torch.tensor(noise, dtype=tensor.dtype)
                if slope:
                    tensor.grad += slope * tensor.detach()

    def step(self, noises: dict[str, Any], slope: float = SLOPE) -> None:
        """One call of both with these parameters."""
        self.set_grads(noises, slope)
        self.ours([self.cells[name] for name in noises])
        self.theirs([self.tensors[name] for name in noises])

    def distance(self) -> float:
        """The largest difference in any parameter, relative to its largest number."""
        return max(
            float(np.abs(np.asarray(self.cells[name].value) - tensor.detach().numpy()).max(initial=0.0))
            / max(float(tensor.detach().abs().max()), 1e-300)
            for name, tensor in self.tensors.items()
        )

    def check_states(self, tolerance: float = 1e-12) -> None:
        """The states have the same names, keys in the same order, counts, slots and options."""
        check_states(self.ours.get_state(), self.theirs.get_state(), tolerance)


def check_states(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-12) -> None:
    """Compare what ``get_state`` gives."""
    assert list(ours) == list(theirs)
    for name, parents in theirs.items():
        mine = ours[name]
        if "scheduler" in parents:
            assert list(mine) == list(parents)
            check_scheduler(mine["scheduler"], parents["scheduler"])
            mine, parents = mine["optimizer"], parents["optimizer"]
        check_state_dict(mine, parents, tolerance)


def check_scheduler(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same entries with the same numbers; nested ones too."""
    assert set(ours) == set(theirs)
    for key, parents in theirs.items():
        if key == "_schedulers":
            for mine, other in zip(ours[key], parents, strict=True):
                check_scheduler(mine, other)
        elif key not in ("_scale_fn_custom", "anneal_func", "_anneal_func_type", "lr_lambdas"):
            assert ours[key] == parents or np.allclose(ours[key], parents, rtol=1e-12), key


def check_state_dict(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """The state dicts of one parameter."""
    assert list(ours) == list(theirs)
    (mine,), (parents,) = ours["param_groups"], theirs["param_groups"]
    assert [key for key in mine if key not in OURS_ONLY] == [key for key in parents if key not in OURS_ONLY]
    for key, value in parents.items():
        assert key == "foreach" or mine[key] == value or np.allclose(mine[key], value, rtol=1e-13, atol=0), key
    assert ours["state"].keys() == theirs["state"].keys()
    for key, slots in theirs["state"].items():
        slots = {name: slot for name, slot in slots.items() if slot is not None}
        assert list(ours["state"][key]) == list(slots)
        for name, slot in slots.items():
            check_slot(name, ours["state"][key][name], slot, tolerance)


def check_slot(name: str, mine: Any, slot: Any, tolerance: float) -> None:
    """An entry of a state; a count of each number may stand for one of all."""
    if name == "step" and not isinstance(mine, int):
        assert np.all(np.asarray(mine) == np.asarray(slot))
        return
    if not isinstance(slot, torch.Tensor):
        assert type(mine) is type(slot)
        assert mine == slot
        return
    assert str(mine.dtype).removeprefix("torch.") == str(slot.dtype).removeprefix("torch.")
    assert tuple(mine.shape) == tuple(slot.shape)
    scale = max(1.0, float(slot.abs().max())) if slot.numel() else 1.0
    np.testing.assert_allclose(np.asarray(mine), np.asarray(slot), rtol=tolerance, atol=tolerance * scale, err_msg=name)
