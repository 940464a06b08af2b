"""Plotting of schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def plot(schedule: Callable[[Any], Any], steps: int, *, ax: Any = None, **style: Any) -> Any:
    """Draw a schedule with matplotlib.

    Args:
        schedule: a function ``step -> value``.
        steps: the number of steps to draw, a whole number >= 1.
        ax: the matplotlib ``Axes`` to draw on (default None: new ones).
        style: keywords of ``Axes.plot``, such as ``label`` or ``color``.

    Returns:
        The ``Axes``; ``.figure.savefig(path)`` writes the picture.

    Raises:
        ``ImportError`` without matplotlib, ``TypeError`` for what is not a function, ``ValueError`` for no steps.

    Examples:
        >>> import matplotlib
        >>> matplotlib.use("agg")
        >>> from jaxoptim import schedules
        >>> ax = schedules.plot(schedules.cosine_annealing_lr(0.1, T_max=50), 200)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('step', 'learning rate')
    """
    if not callable(schedule):
        raise TypeError(f"plot takes a function step -> value, but got {type(schedule).__name__}.")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, but got {steps}.")
    if ax is None:
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError("jaxoptim.schedules.plot draws with matplotlib: pip install matplotlib.") from error
        _, ax = plt.subplots()
    ax.plot(np.arange(steps), np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps))), **style)
    ax.set_xlabel("step")
    ax.set_ylabel("learning rate")
    return ax
