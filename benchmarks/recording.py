"""The compiled programs that some code runs, found through ``jax.jit`` alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A jitted function and its arguments, described by their shapes."""


class Recorder:
    """Notes the calls of the functions that were jitted while it was at work.

    A module that jits at its import, as most do, must be imported then. A jitted function that is called inside another
    is part of that one's program and is not noted. Operations outside of jitted functions are not seen.
    """

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._jit = jax.jit

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Be in the place of ``jax.jit``."""
        with mock.patch.object(jax, "jit", self.jit):
            yield

    def jit(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        """A function jitted as ``jax.jit`` does, whose calls are noted."""
        if function is None:
            return functools.partial(self.jit, **options)
        jitted = self._jit(function, **options)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs))):
                self._calls.append((jitted, *jax.tree.map(_description, (args, kwargs))))
            return jitted(*args, **kwargs)

        for name in ("lower", "trace", "eval_shape", "clear_cache"):
            setattr(call, name, getattr(jitted, name))
        return call

    def calls(self, run: Callable[[], Any]) -> list[Call]:
        """The calls that a function makes.

        Raises:
            RuntimeError: if there are none.
        """
        self._calls.clear()
        run()
        if not self._calls:
            raise RuntimeError("The function called nothing that was jitted while the recorder was at work.")
        return list(self._calls)


def _description(x: Any) -> Any:
    """The shape and dtype of an array, which may be given away in the call; all else stays."""
    if isinstance(x, jax.Array):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))  # which keys lack
    return x
