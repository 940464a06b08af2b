"""What is left out where a library that is compared with is not installed, as with the extra ``dev``."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

PARENTS = ("devinterp", "numpyro", "pyro", "torch")
MISSING = frozenset(name for name in PARENTS if importlib.util.find_spec(name) is None)
HERE = Path(__file__).parent


@cache
def needed_by(path):
    """The parents that a file imports as it is imported itself, and those of the helpers beside it."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    helpers = [HERE / f"{name}.py" for name in found]
    return found.intersection(PARENTS).union(*(needed_by(helper) for helper in helpers if helper.exists()))


def used_in(text):
    """The parents that a piece of code uses; the errors of chains are numpyro's."""
    names = dict(zip(PARENTS, PARENTS, strict=True)) | {"numpyro": "numpyro|mcse|rhat|effective_sample_size"}
    return [parent for parent, name in names.items() if re.search(rf"\b({name})\b", text)]


def marks_of(text):
    """The marks of a test that runs a piece of code."""
    return [pytest.mark.needs(parent) for parent in used_in(text)]


def left_out():
    """The files of tests that cannot be imported here."""
    return [path.name for path in sorted(HERE.glob("test_*.py")) if needed_by(path) & MISSING]
