"""Results with named axes, for xarray and libraries that read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxoptim.core.precision import widened

Labels: TypeAlias = Mapping[str, Sequence[Any] | np.ndarray]
"""The axes before that of chains: a dict from the name of each to the labels along it."""

OF_THE_LOSS = ("sampling_loss", ("draw",))
"""The name of the loss, and its axes behind that of chains."""

_TAKEN = ("chain", "draw", "diverged", "init_loss")


def labelled(
    values: Mapping[str, Any], axes: Mapping[str, Any], first: Sequence[str] = (), taken: Sequence[str] = _TAKEN
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Results by name as variables: the names of their axes, and arrays.

    Args:
        values: by name pytrees of arrays with a first axis of chains.
        axes: what ``Observable.axes`` returns of each; the others are traces of their own names.
        first: the names of axes before that of chains.
        taken: further names that no variable may have.

    Raises:
        ``ValueError`` for two variables of one name.
    """
    found: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    sizes: dict[str, int] = {}
    for name, value in values.items():
        title, known = axes.get(name, (name, ("draw",)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            variable = ".".join([title, jax.tree_util.keystr(path, simple=True, separator=".")] if path else [title])
            if variable in found or variable in (*taken, *first):
                raise ValueError(f"observables: the variable {variable!r} of {name!r} is taken. Choose another name.")
            array = np.asarray(widened(leaf))
            dims = [*first, "chain"]
            for number, size in enumerate(array.shape[len(dims) :]):
                dim = known[number] if number < len(known) else f"{variable}_dim_{number - len(known)}"
                dims.append(dim if sizes.setdefault(dim, size) == size else f"{dim}_{name}")
            found[variable] = tuple(dims), array
    return found


def dataset(
    values: Mapping[str, Any],
    axes: Mapping[str, Any],
    about: Mapping[str, Any],
    first: Labels | None = None,
    more_traces: Mapping[str, Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """Return results as an ``xarray.Dataset``: traces are variables, quantities with one value per chain coordinates.

    Args:
        values: see :func:`labelled`; ``"loss"`` is among them.
        axes: see :func:`labelled`.
        about: by name further numbers of each chain.
        first: the axes before that of chains, by name the labels along each.
        more_traces: by name arrays of the shape of the loss.
        attributes: of the dataset, besides the library that has made it.

    Raises:
        ``ImportError`` without xarray; see :func:`labelled`.
    """
    from jaxoptim import __version__

    xarray = required_xarray()
    first, more_traces = dict(first or {}), dict(more_traces or {})
    variables = labelled(values, {**axes, "loss": OF_THE_LOSS}, tuple(first), (*_TAKEN, *more_traces))
    traces = {name: x for name, x in variables.items() if "draw" in x[0]}
    whole = {name: x for name, x in variables.items() if name not in traces}
    dims, loss = traces[OF_THE_LOSS[0]]
    counts = {**first, "chain": np.arange(loss.shape[-2]), "draw": np.arange(loss.shape[-1])}
    more = {name: (dims[:-1], np.broadcast_to(x, loss.shape[:-1])) for name, x in about.items()}
    library = {"inference_library": "jaxoptim", "inference_library_version": __version__}
    own = {name: (dims, x) for name, x in more_traces.items()}
    return xarray.Dataset({**traces, **own}, {**counts, **more, **whole}, {**library, **(attributes or {})})


def required_xarray() -> Any:
    """The library xarray, an optional dependency."""
    try:
        import xarray
    except ImportError as error:
        raise ImportError(
            "Labelled results need xarray: pip install xarray, or pip install 'jaxoptim[sampling]'."
        ) from error
    return xarray
