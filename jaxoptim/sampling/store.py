"""Traces that are written from the device to disk between the pieces of a run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxoptim import checkpoint
from jaxoptim.sampling.labelled import OF_THE_LOSS, Labels, labelled, required_xarray
from jaxoptim.sampling.observables import Observable
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.pieces import Pieces
from jaxoptim.sampling.swaps import SWAP_RATE

Variables = Mapping[str, tuple[tuple[str, ...], np.ndarray]]


class Files(Protocol):
    """Traces on disk, which grow by blocks of draws."""

    def length(self) -> int:
        """Return the number of draws on disk; 0 if there is nothing yet."""

    def cut(self, draws: int) -> None:
        """Drop the draws after the first so many, the end of a block."""

    def append(self, first: int, block: Variables) -> None:
        """Write a block whose first draw has this number; number 0 starts the files anew."""

    def read(self, *names: str) -> dict[str, np.ndarray]:
        """Return all draws of these variables, or of all."""

    def finish(self, whole: Variables) -> None:
        """Write the quantities with one value per chain, and mark the run as finished."""


class ZarrFiles:
    """Traces as an ``xarray.Dataset`` in a zarr folder."""

    def __init__(self, path: Path, labels: Labels) -> None:
        self._path, self._labels = path, labels

    def length(self) -> int:
        """The length of the axis of draws."""
        arrays = self._arrays("r") if self._path.exists() else {}
        return arrays["draw"].shape[0] if "draw" in arrays else 0

    def cut(self, draws: int) -> None:
        """Shorten each array along its axis of draws."""
        for array in self._arrays("r+").values():
            sizes = zip(array.metadata.dimension_names, array.shape, strict=True)
            shape = tuple(min(size, draws) if dim == "draw" else size for dim, size in sizes)
            if shape != array.shape:
                array.resize(shape)

    def append(self, first: int, block: Variables) -> None:
        """Append along the axis of draws."""
        chains, draws = block[OF_THE_LOSS[0]][1].shape[-2:]
        counts = {**self._labels, "chain": np.arange(chains), "draw": np.arange(first, first + draws)}
        dataset = required_xarray().Dataset(dict(block), counts, {"completed": 0})
        if first:
            dataset.to_zarr(self._path, append_dim="draw", consolidated=False)
        else:
            single = (1,) * (len(self._labels) + 1)
            chunks = {name: {"chunks": (*single, *array.shape[len(single) :])} for name, (_, array) in block.items()}
            dataset.to_zarr(self._path, mode="w", encoding=chunks, consolidated=False)

    def read(self, *names: str) -> dict[str, np.ndarray]:
        """Return these arrays, or all."""
        found = self._arrays("r")
        return {name: np.asarray(found[name][...]) for name in names or found}

    def finish(self, whole: Variables) -> None:
        """Add coordinates, and the attribute ``completed`` as devinterp has it."""
        group = self._group("r+")
        for name in whole:
            if name in group:  # of a run with fewer draws, and perhaps another size
                del group[name]
        added = required_xarray().Dataset(coords=dict(whole), attrs={"completed": 1})
        added.to_zarr(self._path, mode="a", consolidated=False)

    def _arrays(self, mode: str) -> dict[str, Any]:
        return dict(self._group(mode).arrays())

    def _group(self, mode: Any) -> Any:
        import zarr

        return zarr.open_group(self._path, mode=mode)


class SafetensorsFiles:
    """Traces as a folder of files of safetensors, one for each block of draws."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def length(self) -> int:
        """The end of the last block."""
        return max((stop for _, stop in self._blocks().values()), default=0)

    def cut(self, draws: int) -> None:
        """Remove the files of later blocks."""
        for file, (_, stop) in self._blocks().items():
            if stop > draws:
                file.unlink()

    def append(self, first: int, block: Variables) -> None:
        """Write one more file."""
        self._path.mkdir(exist_ok=True)
        if not first:
            self.cut(0)
        stop = first + block[OF_THE_LOSS[0]][1].shape[-1]
        self._write(f"draws-{first:012d}-{stop:012d}", block)

    def read(self, *names: str) -> dict[str, np.ndarray]:
        """The blocks one after another."""
        blocks = [checkpoint.load(file) for file in sorted(self._blocks())]
        axes = {name: dims.index("draw") for name, dims in blocks[0]["dimensions"].items()}
        parts = [block["variables"] for block in blocks]
        return {name: np.concatenate([part[name] for part in parts], axes[name]) for name in names or axes}

    def finish(self, whole: Variables) -> None:
        """Write one more file."""
        self._write("completed", whole)

    def _write(self, name: str, variables: Variables) -> None:
        content = {
            "variables": {name: array for name, (_, array) in variables.items()},
            "dimensions": {name: list(dims) for name, (dims, _) in variables.items()},
        }
        checkpoint.save(self._path / f"{name}.safetensors", content)

    def _blocks(self) -> dict[Path, tuple[int, int]]:
        """The files of blocks, with their first draws and ends."""
        found = self._path.glob("draws-*.safetensors")
        return {file: (int(file.stem.split("-")[1]), int(file.stem.split("-")[2])) for file in found}


def files_at(path: str | os.PathLike[str], labels: Labels) -> Files:
    """Return the files of a store: zarr, or safetensors as the name or the installed packages decide."""
    has_zarr = all(importlib.util.find_spec(name) is not None for name in ("xarray", "zarr"))
    plain = os.fspath(path).endswith(".safetensors") or not has_zarr
    return SafetensorsFiles(Path(path)) if plain else ZarrFiles(Path(path), labels)


class Store(Pieces):
    """The traces of a run on disk.

    Args:
        options: the keywords of the run.
        room: how many draws the device has room for.
        step: where the run stands; what the store has beyond is made again.
        labels: the axes of settings.

    Raises:
        ``ValueError`` for a store that has fewer draws than its run has made.
    """

    def __init__(self, options: RunOptions, room: int, step: int, labels: Labels) -> None:
        super().__init__(options, room, step)
        path: Any = options.store
        self._labels, self._files = labels, files_at(path, labels)
        self._axes = {name: _axes_of_trace(name, of) for name, of in options.watched()} | {"loss": OF_THE_LOSS}
        there = self._files.length()
        if there < self.taken:
            raise ValueError(
                f"The store {path} has {there} draws, but its run has made {self.taken}. Give another path, or remove "
                f"{options.saved_at} to begin anew."
            )

    def _append(self, block: Any) -> None:
        if self.taken:  # a block that was not written whole, or that no save of the chains knows of
            self._files.cut(self.taken)
        self._files.append(self.taken, self._labelled(block, self._axes))

    def traces(self, like: dict[str, Any]) -> dict[str, Any]:
        """Return all draws, in the form of the device's traces but for their number.

        They are read whole. An array of zarr has no arithmetic, which statistics of draws and trees of arrays need, and
        a file of safetensors has a checksum of all its numbers.
        """
        found = self._files.read()
        names = iter(self._labelled(dict(sorted(like.items())), self._axes))  # in the order in which JAX has its leaves

        def one(x: Any) -> np.ndarray:
            whole = found[next(names)]
            return whole.reshape(-1, *whole.shape[len(self._labels) + 1 :]).astype(x.dtype, copy=False)

        return jax.tree.map(one, like)

    def loss(self) -> np.ndarray:
        """The loss at the draws that are on disk, ``(chains, draws)``."""
        name = OF_THE_LOSS[0]
        return self._files.read(name)[name][..., : self.taken].reshape(-1, self.taken)

    def saved_with_chains(self, traces: Any) -> Any:
        """Return the traces on the device, for their shapes."""
        return traces

    def finish(self, found: dict[str, Any]) -> None:
        """Write the quantities with one value per chain, and mark the run as finished."""
        made_of = [SWAP_RATE, *(name for name, of in self._options.watched() if is_made(of))]
        whole = {name: found[name] for name in made_of if name in found}
        made = self._labelled(whole, self._options.axes | {SWAP_RATE: (SWAP_RATE, ())})
        self._files.finish({name: of for name, of in made.items() if "draw" not in of[0]})

    def _labelled(self, values: Any, axes: Any) -> Variables:
        """Results of all chains as variables, with the axes of settings."""
        shape = [len(labels) for labels in self._labels.values()]
        apart = jax.tree.map(lambda x: np.reshape(x, (*shape, -1, *x.shape[1:])), values)
        return labelled(apart, axes, tuple(self._labels))


def is_made(of: Observable) -> bool:
    """Return whether the result of an observable differs from its trace."""
    return type(of).result is not Observable.result


def _axes_of_trace(name: str, of: Observable) -> tuple[str, tuple[str, ...]]:
    """Return the name and the axes of an observable's trace in a store."""
    return (f"trace_{name}", ("draw",)) if is_made(of) else of.axes(name)
