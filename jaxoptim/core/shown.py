"""Values in messages, and tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def shown(x: Any, width: int = 80) -> str:
    """What somebody gave on one line, arrays and modules too, cut where it is long."""
    text = " ".join(repr(x).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def aligned(rows: Iterable[Sequence[str]], left: bool = False) -> str:
    """The rows of a table, a line each, with their columns under each other: at the right, or at the left."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    put = str.ljust if left else str.rjust
    return "\n".join("  ".join(map(put, row, widths)).rstrip() for row in rows)
