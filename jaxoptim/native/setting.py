"""The setting that decides when functions of single numbers become kernels."""

from __future__ import annotations

import os
from typing import Any

import jax

from jaxoptim.native.compiler import compiler

_LEAST = 2**17
"""Numbers in an array below which a call of the kernel costs what it saves."""
_LEAST_DRAWN = 2**14
"""The same where the kernel draws noise, which saves more."""

_CHOICES = ("auto", "off", "on")


class Config:
    """The settings of this process, ``jaxoptim.config``.

    Attributes:
        native: whether the updates of arrays on CPUs are loops in C, derived from the text of the rule and compiled
            when they are first needed, which read and write each array once:

            - ``"auto"`` (default, or what the environment variable ``JAXOPTIM_NATIVE`` says): of arrays of at least
              131072 numbers, for samplers 16384, if the process has one device, a CPU, and a C compiler is on the path;
            - ``"on"``: of arrays of at least 16 numbers, on CPUs;
            - ``"off"``: XLA's code for all.

            Another choice drops all compiled programs of the process (``jax.clear_caches``), so that it holds from then
            on.

    Raises:
        ``ValueError`` for another choice, ``AttributeError`` for another setting.

    Examples:
        >>> import jaxoptim
        >>> jaxoptim.config.native = "always"
        Traceback (most recent call last):
        ValueError: jaxoptim.config.native is 'auto', 'off' or 'on', but got 'always'.
    """

    __slots__ = ("_native",)

    def __init__(self) -> None:
        self._native = _checked("The environment variable JAXOPTIM_NATIVE", os.environ.get("JAXOPTIM_NATIVE", "auto"))

    @property
    def native(self) -> str:
        """The choice of when updates of arrays on CPUs are loops in C."""
        return self._native

    @native.setter
    def native(self, choice: str) -> None:
        if _checked("jaxoptim.config.native", choice) != self._native:
            self._native = choice
            jax.clear_caches()


def _checked(what: str, choice: Any) -> str:
    if choice not in _CHOICES:
        raise ValueError(f"{what} is 'auto', 'off' or 'on', but got {choice!r}.")
    return choice


config = Config()


def is_native(size: int, is_drawn: bool = False) -> bool:
    """Whether an array of ``size`` numbers goes through a kernel on CPUs; ``is_drawn``: one that draws noise."""
    if config.native == "off" or compiler() is None:
        return False
    if config.native == "on":
        return True
    least = _LEAST_DRAWN if is_drawn else _LEAST
    return size >= least and jax.default_backend() == "cpu" and jax.device_count() == 1
