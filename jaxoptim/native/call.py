"""Kernels as functions of JAX."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_batching import custom_vmap

from jaxoptim.native.compiler import library


def call(text: str, in_place: dict[int, int], results: Sequence[Any], operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Call the kernel of a C file.

    Args:
        text: the file.
        in_place: which operands have the memory of which results.
        results: the shapes and dtypes of what it returns.
        operands: what it takes.
    """
    return list(jax.ffi.ffi_call(_target(text), results, input_output_aliases=in_place)(*operands))


@functools.cache
def _target(text: str) -> str:
    """The name by which XLA knows the kernel of a C file: that of the text, as XLA keeps programs on disk."""
    name = f"jaxoptim.native.{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library(text).kernel), platform="cpu")
    return name


def on_cpus(native: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls kernels on CPUs, and its plain twin elsewhere, under ``vmap``, and for derivatives."""

    @jax.custom_jvp
    def differentiable(*args: Any) -> Any:
        return batchable(*args)

    @differentiable.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        return jax.jvp(plain, primals, tangents)

    @custom_vmap
    def batchable(*args: Any) -> Any:
        return jax.lax.platform_dependent(*args, cpu=native, default=plain)

    @batchable.def_vmap
    def batched(size: int, is_batched: Any, *args: Any) -> Any:
        axes = jax.tree.map(lambda own: 0 if own else None, tuple(is_batched))
        made = jax.vmap(plain, in_axes=axes, axis_size=size)(*args)
        return made, jax.tree.map(lambda _: True, made)

    return differentiable
