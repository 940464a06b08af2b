"""Checkpoint files: their content, detection of damage, and atomic writes."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import socket
import threading
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxoptim.checkpoint import apart
from jaxoptim.checkpoint.encoding import NamedArrays, decoded, decoded_like, encoded, parsed, parsed_apart, places
from jaxoptim.core.shown import shown

FORMAT_VERSION = 2
"""The format version of files that :func:`save` writes; :func:`load` reads this one and all before it."""


def save(path: str | os.PathLike[str], state_dict: Any, *, keep: int = 1) -> None:
    """Write a checkpoint atomically: whole or not at all.

    The file is written beside ``path``, brought to the disk, and renamed; whoever reads ``path`` finds the old
    checkpoint or the new one, also after a crash at any moment.

    Where an array is on the devices of several processes, all of them make this call, with one ``path`` on a disk that
    they share. Process 0 writes the file; arrays of which no process has all are written by orbax, by each process its
    own part, into a folder beside it, ``<path>.<...>.parts``, which goes with the file. The checkpoint is read by any
    number of processes.

    Args:
        path: the file. Its folder must exist.
        state_dict: the result of ``state_dict()`` of optimizers, schedulers and averaged models, arrays, typed PRNG
            keys, numbers, strings, None, ``OptState``, and dicts, lists and tuples of these, however nested; or any
            other pytree, which :func:`load` needs ``like`` for.
        keep: the number of checkpoints to keep, an int >= 1 (default 1). Those before the last are
            ``<path>.1`` (the newest), ``<path>.2``, ... A smaller number than before removes none of them.

    Raises:
        ``TypeError`` for what is no data, such as a function, with its path; ``ValueError`` for hundreds of dicts in
        each other, and for ``keep`` below 1; ``OSError`` of the disk, on all processes. What was at ``path`` is still
        there then.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp
        >>> from jaxoptim import checkpoint, optim
        >>> opt = optim.Adam({"w": jnp.ones(2)}, lr=0.1)
        >>> opt.step({"w": jnp.ones(2)})
        >>> path = tempfile.mkdtemp() + "/run.safetensors"
        >>> checkpoint.save(path, {"params": opt.params, "opt": opt.state_dict(), "key": jax.random.key(0)})
        >>> run = checkpoint.load(path)
        >>> resumed = optim.Adam(run["params"])
        >>> resumed.load_state_dict(run["opt"])
        >>> resumed.param_groups[0]["lr"], float(resumed.state_dict()["state"][0]["step"])
        (0.1, 1.0)
    """
    from jaxoptim import __version__

    _safetensors()
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep is the number of checkpoints to keep, an int >= 1, but got {shown(keep)}.")
    arrays = NamedArrays()
    try:
        tree = encoded(state_dict, (), arrays)
    except RecursionError as error:
        raise ValueError("The tree to save is nested too deeply, or holds itself.") from error
    content: dict[str, Any] = {"format": FORMAT_VERSION, "jaxoptim": __version__, "tree": tree}
    real = Path(os.path.realpath(path))
    if not real.parent.is_dir():
        raise FileNotFoundError(f"The folder {real.parent}, where the checkpoint should go, does not exist.")
    if not arrays.is_shared:
        _write(real, content, arrays, keep)
        return
    parts = {name: x for name, x in arrays.items() if isinstance(x, jax.Array)}
    if parts:
        folder = apart.common_name(real.name)
        listed = [[name, x.shape, x.dtype.name] for name, x in parts.items()]
        content["parts"] = {"folder": folder, "arrays": listed}
        apart.write(real.parent / folder, parts)
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            _write(real, content, {name: x for name, x in arrays.items() if name not in parts}, keep)
        except Exception as error:
            failure = error
    apart.agree(real, failure)


def _write(path: Path, content: dict[str, Any], arrays: dict[str, np.ndarray], keep: int) -> None:
    """Write the file of a checkpoint, and remove the array folders of those that it has replaced."""
    safetensors, text = _safetensors(), json.dumps(content, allow_nan=False)
    with _replacing(path, keep) as partial:
        try:
            safetensors.numpy.save_file(arrays, partial, metadata={"jaxoptim": text, "sha256": _checksum(text, arrays)})
        except safetensors.SafetensorError as error:
            raise OSError(f"The checkpoint {path} could not be written: {error}") from error
    if folders := apart.folders(path):
        used, number, file = set[str | None](), 0, path
        while file.exists():
            used.add(_folder_of(file))
            number += 1
            file = _earlier(path, number)
        for folder in folders:
            if folder.name not in used:
                shutil.rmtree(folder, ignore_errors=True)


def _folder_of(file: Path) -> str | None:
    """Return the name of the folder of a checkpoint's arrays; None for another file, and without a folder."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            return json.loads(tensors.metadata()["jaxoptim"])["parts"]["folder"]
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def load(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Read a checkpoint that :func:`save` wrote; nothing in a file is executed, whoever made it.

    A checkpoint of arrays that were spread over several processes is read by all processes that there are now.

    Args:
        path: the file.
        like: a pytree, concrete or from ``jax.eval_shape``, of the structure that was saved (default None). Each
            array comes in the dtype and with the sharding of the one in ``like``, of which each process then reads its
            own part; without, each reads all. Where it has the state dict of
            an optimizer, whatever that holds, the one that was saved comes as it was; where an ``OptState`` has a
            count of an array that has none of its own in the file, that of the tree.

    Returns:
        The saved pytree. Arrays of JAX and of NumPy come as such.

    Raises:
        ``FileNotFoundError``; ``ValueError`` for a file that is damaged, of another program, or of a newer
        version of this library, for 64-bit arrays while ``jax_enable_x64`` is off, and for what does not fit
        ``like``, with its path.

    Examples:
        See :func:`save`. A state of the pure face, where no structure is needed, and any other pytree, where it is:

        >>> import tempfile, jax, jaxoptim, jax.numpy as jnp
        >>> from jaxoptim import checkpoint
        >>> path = tempfile.mkdtemp() + "/run.safetensors"
        >>> state = jaxoptim.adam().init({"w": jnp.ones(2)})
        >>> checkpoint.save(path, state)
        >>> int(checkpoint.load(path).step), int(checkpoint.load(path, like=jax.eval_shape(lambda: state)).step)
        (0, 0)
    """
    path = Path(path)
    content, arrays = _read(path)
    tree = _parsed(path, content, arrays)
    if "parts" in content:
        folder, parts = parsed_apart(content["parts"])
        wanted = {} if like is None else places(tree, like)
        tree = _parsed(path, content, arrays | apart.read(Path(os.path.realpath(path)).parent / folder, parts, wanted))
    try:
        return decoded(tree) if like is None else decoded_like(tree, like)
    except ValueError as error:
        raise ValueError(f"The checkpoint {path} cannot be loaded like this: {error}") from error


def _safetensors() -> Any:
    """Import safetensors, an optional dependency that reads and writes the arrays."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Checkpoints need safetensors: pip install safetensors, or pip install 'jaxoptim[checkpoint]'."
        ) from error
    return safetensors


def _checksum(content: str, arrays: dict[str, np.ndarray]) -> str:
    """Compute a digest of everything that is read."""
    digest = hashlib.sha256(content.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the metadata of a file and its arrays by name, and check them."""
    safetensors = _safetensors()
    with path.open("rb") as file:
        start = file.read(1)
    try:
        with safetensors.safe_open(path, framework="numpy") as tensors:
            metadata = tensors.metadata() or {}
            if not {"jaxoptim", "sha256"} <= metadata.keys():
                raise ValueError(f"{path} is a file of safetensors, but no checkpoint of jaxoptim.{_advice(path)}")
            content = _content(path, metadata["jaxoptim"])
            arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no dict
    except (safetensors.SafetensorError, AttributeError) as error:
        if zipfile.is_zipfile(path) or start == b"\x80":
            raise ValueError(
                f"{path} is a file of torch.save or pickle, which could run code, so it is not opened here. Give what "
                "torch.load(path, weights_only=True) returns to load_state_dict."
            ) from error
        raise _damaged(path, f"it is no file of safetensors ({error})") from error
    if _checksum(metadata["jaxoptim"], arrays) != metadata["sha256"]:
        raise _damaged(path, "its checksum is wrong")
    return content, arrays


def _parsed(path: Path, content: dict[str, Any], arrays: dict[str, Any]) -> Any:
    """Parse the pytree in a file; an array that is not in it is the one that was read, or else its reference."""
    try:
        known = {x.name: x for x in parsed_apart(content["parts"])[1]} if "parts" in content else {}
        return parsed(content["tree"], known | arrays)
    except Exception as error:  # whatever a file can be made to say
        problem = f"The checkpoint {path} was not written by jaxoptim ({error!r:.200})."
        raise ValueError(problem + _advice(path)) from error


def _content(path: Path, text: str) -> dict[str, Any]:
    """Parse the metadata of a file, and check that its version can be read."""
    try:
        content = json.loads(text)
        version = content["format"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise _damaged(path, f"its metadata cannot be read ({error!r:.200})") from error
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"The checkpoint {path} has format {version!r}, of jaxoptim {content.get('jaxoptim')}; this version reads "
            f"formats 1 to {FORMAT_VERSION}. Upgrade jaxoptim.{_advice(path)}"
        )
    return content


def _damaged(path: Path, problem: str) -> ValueError:
    return ValueError(f"The checkpoint {path} is damaged, or no checkpoint: {problem}.{_advice(path)}")


def _advice(path: Path) -> str:
    """Return advice to end the message about a file that cannot be read."""
    earlier = _earlier(Path(os.path.realpath(path)), 1)
    return f" An earlier checkpoint is {earlier}." if earlier.exists() else ""


def _earlier(path: Path, number: int) -> Path:
    """Return the file of an earlier checkpoint."""
    return path.with_name(f"{path.name}.{number}")


@contextlib.contextmanager
def _replacing(path: Path, keep: int) -> Iterator[Path]:
    """Yield a file to write, which replaces ``path`` when it is complete; ``path`` is whole at every moment."""
    mine = f".{path.name}.{socket.gethostname()}."
    for left in path.parent.glob(f"{glob.escape(mine)}*.partial"):
        if not _is_running(left.name.removeprefix(mine).split(".")[0]):
            shutil.rmtree(left, ignore_errors=True)
    # A folder, because safetensors writes files of its own beside the one it is asked for.
    room = path.with_name(f"{mine}{os.getpid()}.{uuid.uuid4().hex}.partial")
    room.mkdir()
    try:
        partial = room / path.name
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        (room / "fresh").touch()
        shutil.copymode(path if path.exists() else room / "fresh", partial)  # safetensors lets nobody else read
        with _RENAMING:
            _shift(path, keep, room / "second")
            partial.replace(path)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # the renaming is brought to the disk where the file system can do that
            os.fsync(folder)
        os.close(folder)


_RENAMING = threading.Lock()
"""A lock for the threads of a process that save at one path, so that they move files one after the other."""


def _shift(path: Path, keep: int, second: Path) -> None:
    """Make room for one more checkpoint: ``path`` stays in place, and gets a second name as the newest earlier one."""
    newest = _earlier(path, 1)
    if keep == 1 or not path.exists():
        return
    if newest.exists() and _are_one(newest, path):  # after a crash between here and the renaming
        return
    gap = next((number for number in range(1, keep) if not _earlier(path, number).exists()), keep - 1)
    for number in range(gap, 1, -1):
        _earlier(path, number - 1).replace(_earlier(path, number))
    try:
        os.link(path, second)
    except OSError:  # a file system without links
        shutil.copy2(path, second)
    second.replace(newest)


def _are_one(a: Path, b: Path) -> bool:
    """Whether two paths are one file, or one is a copy that ``shutil.copy2`` made of the other."""
    first, second = a.stat(), b.stat()
    return a.samefile(b) or (first.st_size, first.st_mtime_ns) == (second.st_size, second.st_mtime_ns)


def _is_running(pid: str) -> bool:
    """Whether a process of this machine still runs; True if that cannot be determined."""
    if os.name != "posix" or not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
