"""The system's C compiler, and the folder of compiled libraries."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import jax

_FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-fPIC",
    "-shared",
)
"""None of them changes a number: a product may be added to a number in one rounding, as XLA allows its own code."""


class CannotCompile(Exception):
    """Raised where no compiler makes a library of the text; the message says why."""


@functools.cache
def compiler() -> str | None:
    """Return the path of a C compiler: that which ``CC`` names, else ``cc``, ``gcc`` or ``clang``; None without one."""
    if os.name != "posix":
        return None
    found = (shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name)
    return next((path for path in found if path), None)


@functools.cache
def library(text: str) -> ctypes.CDLL:
    """Return the library of a C file, from the folder of compiled ones or newly compiled.

    Args:
        text: the C file.

    Raises:
        :class:`CannotCompile`. A file of the folder that is broken, or that another user could have written, is not
        loaded but replaced.
    """
    cc = compiler()
    if cc is None:
        raise CannotCompile("there is no C compiler on the path any more")
    name = f"{_digest(text, cc)}.so"
    folder = _folder()
    if folder is not None and (found := _loaded(folder / name)) is not None:
        return found
    if folder is None:
        folder = _own_folder()
    return ctypes.CDLL(str(_compiled(text, cc, folder / name)))


def _digest(text: str, cc: str) -> str:
    """Return a name that only this text, compiler, flags, and kind of CPU have."""
    stat = os.stat(cc)
    of_compiler = (os.path.realpath(cc), stat.st_size, stat.st_mtime_ns)
    return hashlib.sha256(repr((text, of_compiler, _FLAGS, _cpu(), jax.__version__)).encode()).hexdigest()[:32]


@functools.cache
def _cpu() -> str:
    """Return a description of the CPU that a compiler with ``-march=native`` depends on."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), platform.processor(), *sorted({x for x in lines if x.startswith(kinds)})])


@functools.cache
def _folder() -> Path | None:
    """Return the user's folder of kernels, which nobody else may write to; None, with a warning, if there is none."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "jaxoptim" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        problem = None if _is_own(folder) else "others may write to it"
    except OSError as error:
        problem = str(error)
    if problem is None:
        return folder
    warnings.warn(
        f"Compiled kernels cannot be kept in {folder}: {problem}. This process compiles its own. Set XDG_CACHE_HOME to "
        'a folder of yours, or jaxoptim.config.native = "off".',
        RuntimeWarning,
        stacklevel=2,
    )
    return None


@functools.cache
def _own_folder() -> Path:
    """Return a folder of this process, which is removed at its end."""
    folder = tempfile.TemporaryDirectory(prefix="jaxoptim-native-")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _is_own(path: Path) -> bool:
    """Return whether a file or folder is this user's, and no other may write to it."""
    stat = path.stat()
    return stat.st_uid == os.getuid() and not stat.st_mode & 0o022


def _loaded(path: Path) -> ctypes.CDLL | None:
    """Load a library of the folder; None unless it is whole and this user's own."""
    try:
        if not _is_own(path):
            return None
        written = path.read_bytes()
        if hashlib.sha256(written[:-32]).digest() != written[-32:]:
            return None
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _compiled(text: str, cc: str, path: Path) -> Path:
    """Write the library of a C file at a path, with its digest at its end: whole, or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as beside:
        source, made = Path(beside) / "kernel.c", Path(beside) / "kernel.so"
        source.write_text(text)
        command = [cc, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(made), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise CannotCompile(str(error)) from error
        if done.returncode:
            raise CannotCompile((done.stderr.strip() or f"{cc} failed").splitlines()[0])
        code = made.read_bytes()
        made.write_bytes(code + hashlib.sha256(code).digest())
        made.chmod(0o700)
        os.replace(made, path)
    return path
