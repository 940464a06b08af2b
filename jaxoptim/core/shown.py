"""Formatting of values in messages, and of text tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def shown(x: Any, width: int = 80) -> str:
    """Format a given value, arrays and modules too, on one line, truncated if it is long."""
    text = " ".join(repr(x).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def aligned(rows: Iterable[Sequence[str]], left: bool = False) -> str:
    """Format the rows of a table, a line each, with columns aligned at the right or at the left."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    put = str.ljust if left else str.rjust
    return "\n".join("  ".join(map(put, row, widths)).rstrip() for row in rows)
