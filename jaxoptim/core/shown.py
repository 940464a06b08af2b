"""Values in messages."""

from __future__ import annotations

from typing import Any


def shown(x: Any, width: int = 80) -> str:
    """What somebody gave on one line, arrays and modules too, cut where it is long."""
    text = " ".join(repr(x).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."
