"""Calls that are checked against a signature other than the function's own."""

from __future__ import annotations

import inspect
from typing import Any


def bound(name: str, signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """Bind the arguments of a call to names, defaults included.

    Raises:
        ``TypeError`` that lists what the function takes.
    """
    try:
        arguments = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}() {error}. It takes {', '.join(signature.parameters)}.") from None
    arguments.apply_defaults()
    return arguments.arguments


def mismatch(function: Any, count: int) -> TypeError | None:
    """Explain why a function cannot be called with so many arguments; None if it can, or its signature is unknown."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*[None] * count)
    except TypeError as error:
        return error
    return None
