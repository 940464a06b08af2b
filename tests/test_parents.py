"""The tests of all but comparisons run in an environment without torch, Pyro, numpyro and devinterp."""

import os
import re
import subprocess
import sys

import pytest

from parents import HERE, MISSING, PARENTS, left_out, needed_by, used_in

WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {PARENTS!r} else PathFinder.find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


def test_what_a_file_needs_is_what_it_and_its_helpers_import():
    assert needed_by(HERE / "test_newton.py") == {"pyro", "torch"}
    assert needed_by(HERE / "test_counts.py") >= {"torch"}  # by way of parity.py
    assert needed_by(HERE / "test_rule.py") == set()
    assert used_in("import torch\nLLC.mcse") == ["numpyro", "torch"]
    assert left_out() == [] or MISSING


@pytest.mark.slow
def test_every_file_is_imported_or_left_out_without_the_parents(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    path = os.pathsep.join([str(tmp_path), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parent, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stdout[-2000:]
    collected = set(re.findall(r"^tests/(test_\w+\.py)::", done.stdout, re.M))
    assert {"test_rule.py", "test_transform.py", "test_packing.py", "test_sampling.py"} <= collected
    assert not collected & {path.name for path in HERE.glob("test_*.py") if needed_by(path)}
