"""Deferral of Ctrl-C while a compiled step runs."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Uninterrupted:
    """Defer SIGINT until the outputs of a donating call are stored, because its inputs are already deleted.

    A second Ctrl-C does not wait: the step may hang.
    """

    __slots__ = ("_count", "_handler")

    _is_active = False
    """Whether an enclosing block already defers SIGINT; set while the outermost block runs."""

    def __enter__(self) -> None:
        # Both live as long as the block.
        self._count = 0
        self._handler: Any = None
        if not Uninterrupted._is_active and threading.current_thread() is threading.main_thread():
            handler: Any = signal.signal(signal.SIGINT, self._remember)
            if callable(handler):
                self._handler = handler
                Uninterrupted._is_active = True
            else:  # ignored, or another program's
                signal.signal(signal.SIGINT, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            self._handler(number, frame)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._handler is not None:
            Uninterrupted._is_active = False
            signal.signal(signal.SIGINT, self._handler)
            if self._count == 1 and kind is None:
                self._handler(signal.SIGINT, None)
