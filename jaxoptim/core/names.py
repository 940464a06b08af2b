"""The public names of a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def listing(names: Sequence[str]) -> Callable[[], list[str]]:
    """Make the ``__dir__`` of a module, so that ``dir`` and tab completion show its public names alone.

    Args:
        names: the module's ``__all__``.

    Examples:
        >>> listing(["step", "Rule"])()
        ['Rule', 'step']
    """
    return lambda: sorted(names)
