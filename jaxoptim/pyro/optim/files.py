"""Files with the states of all parameters: ours, and those that Pyro has written."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from typing import Any

from jaxoptim import checkpoint


def loaded(filename: str | os.PathLike[str], read: Callable[[Any], Any]) -> Any:
    """Return the content of a file; one of Pyro's is read by ``read(torch)``.

    Raises:
        ``ImportError`` for a file of Pyro's without torch; what the loading raises.
    """
    if not zipfile.is_zipfile(filename):
        return checkpoint.load(filename)
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{os.fspath(filename)} was written by Pyro, and needs torch to be read. Run: pip install torch."
        ) from error
    return read(torch)
