"""Kernels as functions of JAX."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxoptim.native.compiler import library


def call(
    text: str, in_place: dict[int, int], results: Sequence[Any], operands: Sequence[jax.Array], axes: int
) -> list[jax.Array]:
    """Call the kernel of a C file. Under ``vmap`` its operands and results have leading axes.

    Args:
        text: the file.
        in_place: which operands have the memory of which results.
        results: the shapes and dtypes of what it returns.
        operands: what it takes.
        axes: the number of axes of its arrays, without those of ``vmap``.
    """
    target = jax.ffi.ffi_call(_target(text), results, input_output_aliases=in_place, vmap_method="broadcast_all")
    return list(target(*operands, axes=np.int64(axes)))


@functools.cache
def _target(text: str) -> str:
    """The name by which XLA knows the kernel of a C file: that of the text, as XLA keeps programs on disk."""
    name = f"jaxoptim.native.{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library(text).kernel), platform="cpu")
    return name


def on_cpus(native: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls kernels on CPUs, and its plain twin elsewhere and for derivatives."""

    @jax.custom_jvp
    def differentiable(*args: Any) -> Any:
        return jax.lax.platform_dependent(*args, cpu=native, default=plain)

    @differentiable.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        return jax.jvp(plain, primals, tangents)

    return differentiable
