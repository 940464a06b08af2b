"""What belongs to torch, told without importing it."""

from __future__ import annotations

from typing import Any


def is_tensor(x: Any) -> bool:
    """Whether ``x`` is a tensor of torch."""
    return hasattr(x, "requires_grad") and hasattr(x, "to_dense")


def check_not_trained_by_torch(what: str, x: Any) -> None:
    """Raise for a tensor that torch differentiates by, and for a module of torch; other tensors are data."""
    is_module = hasattr(type(x), "named_parameters")
    if is_module or (is_tensor(x) and (x.requires_grad or type(x).__name__ == "Parameter")):
        kind = f"{'module' if is_module else 'parameter'} of torch"
        raise TypeError(
            f"{what} is a {kind}, which no loss.backward() would train here: the loss is a JAX function. Convert the "
            "weights, {n: p.detach().numpy() for n, p in module.named_parameters()}; jaxoptim.interop.torch has the "
            "rest of a run."
        )
