"""Calls inside the functions that JAX transforms."""

from __future__ import annotations

from jax.extend.core import get_opaque_trace_state

_OUTSIDE = get_opaque_trace_state()


def refuse_tracing(call: str, instead: str) -> None:
    """Raise for a call that changes an object while JAX traces the function around it.

    Args:
        call: the name of the call, such as ``"Adam.step"``.
        instead: the advice, for the message.

    Raises:
        ``TypeError`` inside ``jax.jit``, ``grad``, ``vmap``, ``scan`` and whatever else traces.
    """
    if get_opaque_trace_state() != _OUTSIDE:
        raise TypeError(
            f"{call} was called inside a function that JAX traces (jit, grad, vmap, scan, ...), but it changes an "
            f"object that keeps state. Call it outside, or {instead}."
        )
