"""Many steps in calls that are neither too short nor too long."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxoptim.core.placement import largest
from jaxoptim.engine.loops import CAPACITY

_SECONDS = 0.1
"""The least seconds of one call, so that its overhead is small; the bar and Ctrl-C act between calls."""


def in_pieces(
    num_steps: int, progress_bar: bool, advance: Callable[[int], np.ndarray], most: int = 1, mesh: Mesh | None = None
) -> int:
    """Make so many steps, and return the number that the first call of another run may make.

    Args:
        num_steps: how many.
        progress_bar: whether to show one, if tqdm is installed.
        advance: makes some steps, at most as many as it is told, and returns their losses.
        most: how many the first call makes, at most (default 1).
        mesh: the devices that make them, whose processes are to make the same calls; None for those of this one.
    """
    made = 0
    with _bar(num_steps, progress_bar) as bar:
        while made < num_steps:
            begin = time.monotonic()
            losses = advance(min(most, num_steps - made))
            made += len(losses)
            if largest(mesh, time.monotonic() - begin) < _SECONDS:
                most = min(8 * most, CAPACITY)
            if bar is not None:
                bar.set_postfix_str(f"loss {np.mean(losses):.4f}", refresh=False)
                bar.update(len(losses))
    return most


def _bar(total: int, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """A bar of tqdm, or None without it."""
    if not wanted:
        return contextlib.nullcontext()
    try:
        import tqdm
    except ImportError:
        return contextlib.nullcontext()
    return tqdm.tqdm(total=total)
