"""Storage of arrays spread over several processes: a folder beside the file, which orbax writes and reads."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


@dataclasses.dataclass(frozen=True)
class Apart:
    """A reference to an array that is not in the file.

    Attributes:
        name: its name among all arrays of the checkpoint.
        shape: its shape.
        dtype: its dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any


def common_name(name: str) -> str:
    """Make a unique name for a folder, the same in all processes, which must all call this."""
    token = multihost_utils.broadcast_one_to_all(np.frombuffer(np.random.default_rng().bytes(8), np.uint8))
    return f"{name}.{bytes(np.asarray(token)).hex()}.parts"


def agree(path: Path, error: BaseException | None) -> None:
    """Wait until all processes have called this; raise the error that one of them has met, if any.

    Raises:
        The error of this process; ``OSError`` for that of another.
    """
    has_failed = np.asarray(multihost_utils.process_allgather(np.asarray(error is not None)))
    if error is not None:
        raise error
    if has_failed.any():
        raise OSError(f"The checkpoint {path} could not be written by process {has_failed.argmax()}. See what it says.")


def write(folder: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Write arrays, each process its own part."""
    with _orbax().StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, list(arrays.values()))
        checkpointer.wait_until_finished()


def read(folder: Path, arrays: Collection[Apart], places: Mapping[str, Any]) -> dict[str, Any]:
    """Read arrays by name, with the shardings given for some of them; the others as whole NumPy arrays.

    Args:
        folder: the folder of the arrays.
        arrays: references to all arrays in the folder.
        places: the shardings by name.

    Raises:
        ``FileNotFoundError`` if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The checkpoint has arrays in the folder {folder}, which is not there. Move it with the file."
        )

    def like(x: Apart) -> Any:
        if x.name in places:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[x.name])
        return np.broadcast_to(np.zeros((), x.dtype), x.shape)

    with _orbax().StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(folder, [like(x) for x in arrays])
    return {x.name: its for x, its in zip(arrays, found, strict=True)}


def folders(path: Path) -> list[Path]:
    """Return the array folders of all checkpoints at a path, also of those that were replaced or never completed."""
    name = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.parts.*")
    return [folder for folder in path.parent.iterdir() if name.fullmatch(folder.name)]


def _orbax() -> Any:
    """Import orbax, an optional dependency that reads and writes arrays from several processes."""
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "Checkpoints of arrays that are spread over several processes need orbax: pip install orbax-checkpoint, or "
            "pip install 'jaxoptim[distributed]'."
        ) from error
    return orbax.checkpoint
