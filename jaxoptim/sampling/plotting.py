"""Plots of estimates, drawn with matplotlib."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxoptim.sampling.points import axis


def plot_traces(llc: Any, ax: Any) -> Any:
    """Draw the trace of each chain of an ``LLC``, and the running mean over all of them."""
    if llc.loss.ndim != 2:
        raise ValueError("plot draws the traces of one selection: llc[0].plot().")
    ax = _axes(ax)
    good = llc.trace[llc.diverged < 0]
    for trace in llc.trace:
        ax.plot(trace, linewidth=0.6, alpha=0.5)
    running = np.cumsum(good.mean(0)) / np.arange(1, good.shape[1] + 1)
    ax.plot(running, color="black", label=f"running mean, at the end {llc.mean:.3g}")
    ax.set_xlabel("draw")
    ax.set_ylabel(r"$n\beta\,(L - L(w^*))$")
    ax.legend()
    return ax


def plot_sweep(sweep: Any, ax: Any) -> Any:
    """Draw the estimates of a ``Calibration`` against the step size for each localization."""
    ax = _axes(ax)
    for column, strength in enumerate(sweep.localization):
        ax.errorbar(
            sweep.lr,
            sweep.mean[:, column],
            yerr=sweep.std[:, column],
            marker="o",
            capsize=2,
            label=rf"$\gamma$ = {strength:g}",
        )
    ax.set_xscale("log")
    ax.set_xlabel("lr")
    ax.set_ylabel(r"$\hat\lambda$")
    if (np.nan_to_num(sweep.mean, nan=1.0) > 0).all():
        ax.set_yscale("log")  # one corner that is about to diverge would flatten the plateau
    ax.legend()
    return ax


def plot_over_checkpoints(found: Any, ax: Any) -> Any:
    """Draw the estimates of an ``LLCOverCheckpoints``, a line for each selection, with two standard errors."""
    ax, names, count = _axes(ax), axis(found.names), len(found)
    are_numbers = names.dtype.kind in "iuf"
    places = names if are_numbers else np.arange(count)
    several = found.mean.ndim == 2
    lines, errors = found.mean.reshape(count, -1).T, found.mcse.reshape(count, -1).T
    labels = found.selections or [f"selection {number}" for number in range(len(lines))]
    for mean, error, label in zip(lines, errors, labels if several else [None], strict=True):
        ax.errorbar(places, mean, yerr=2 * np.nan_to_num(error), marker="o", capsize=2, label=label)
    if not are_numbers:
        ax.set_xticks(places, names, rotation=45, ha="right")
    ax.set_xlabel("checkpoint")
    ax.set_ylabel(r"$\hat\lambda$")
    if several:
        ax.legend()
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "A plot needs matplotlib: pip install matplotlib, or pip install 'jaxoptim[sampling]'."
        ) from error
    return plt.subplots()[1]
