"""Files with the states of all parameters: ours, and those that Pyro has written."""

from __future__ import annotations

import os
import zipfile
from typing import Any

from jaxoptim import checkpoint


def loaded(filename: str | os.PathLike[str], map_location: Any) -> Any:
    """What is in a file; one of Pyro's is read by ``torch.load(weights_only=True)``, which runs nothing.

    Raises:
        ``ImportError`` for a file of Pyro's without torch; what the loading raises.
    """
    if not zipfile.is_zipfile(filename):
        return checkpoint.load(filename)
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{os.fspath(filename)} was written by Pyro, and needs torch to be read.") from error
    return torch.load(filename, map_location=map_location, weights_only=True)
