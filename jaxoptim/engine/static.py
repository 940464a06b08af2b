"""What is fixed in a compiled program."""

from __future__ import annotations

from typing import Any


class Static:
    """Something fixed in a compiled program, compared at every call: its hash is kept, and identity decides."""

    def __init__(self, *content: Any) -> None:
        self.content = content
        self._hash = hash(content)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Static) and self._hash == other._hash and self.content == other.content
        )
