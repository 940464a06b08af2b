"""Values that are fixed in a compiled program."""

from __future__ import annotations

import weakref
from typing import Any, Self

_known: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


class Static:
    """A value that is fixed in a compiled program; values of equal content are one object.

    So a compiled call, which hashes and compares it, does that by identity.
    """

    content: tuple[Any, ...]

    def __new__(cls, *content: Any) -> Self:
        """Return the object of this content."""
        found = _known.get((cls, content))
        if found is None:
            found = _known[cls, content] = super().__new__(cls)
            found.content = content
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.content
