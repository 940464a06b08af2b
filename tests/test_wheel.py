"""What users install: the wheel that the source distribution makes, with what it depends on and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import jaxoptim

ROOT = Path(__file__).parent.parent

USE = """
import json, sys
import jax, jax.numpy as jnp
import jaxoptim
from jaxoptim import optim, pyro, sampling

def loss_fn(w):
    return jnp.sum(w ** 2)

jaxoptim.config.native = sys.argv[1]
w = jnp.ones(1000)
tx = jaxoptim.adam(lr=0.1)
updates, _ = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
optimizer = optim.Adam(w, lr=0.1)
loss = optimizer.minimize(loss_fn)
print(json.dumps({
    "file": jaxoptim.__file__,
    "version": jaxoptim.__version__,
    "steps": [float((w + updates)[0]), float(optimizer.params[0])],
}))
"""


def python(*command):
    """Run a Python that sees neither this environment nor the sources."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip_install(folder, *what):
    """The Python of a new virtual environment with some packages."""
    venv.create(folder, with_pip=True)
    executable = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    python(executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what)
    return executable


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that is built of the unpacked source distribution, as pip builds it where there is no wheel."""
    folder = tmp_path_factory.mktemp("built")
    builder = pip_install(folder / "builder", "hatchling")
    code = "import os, sys, hatchling.build as b; os.chdir(sys.argv[1]); print(getattr(b, sys.argv[2])(sys.argv[3]))"
    python(builder, "-c", code, ROOT, "build_sdist", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    python(builder, "-c", code, archive.with_name(archive.name.removesuffix(".tar.gz")), "build_wheel", folder)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "jaxoptim").rglob("*") if path.is_file()}
    assert {name for name in names if not name.startswith("jaxoptim-")} == {x for x in files if "__pycache__" not in x}
    assert {"jaxoptim/py.typed", "jaxoptim/native/loop.c", "jaxoptim/optim/classes.pyi"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_depends_on_jax_optax_and_numpy_alone(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("dist-info/METADATA"))).decode()
    needed = [line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) if "extra ==" not in line]
    assert sorted(line.partition(">=")[0] for line in needed) == ["jax", "numpy", "optax"]


@pytest.mark.slow
def test_the_wheel_makes_steps_in_an_environment_of_its_own(wheel, tmp_path):
    executable = pip_install(tmp_path / "empty", wheel)
    native = "on" if shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") else "off"
    found = json.loads(python(executable, "-I", "-c", USE, native))
    assert Path(found["file"]).is_relative_to(tmp_path / "empty")
    assert found["version"] == jaxoptim.__version__
    assert found["steps"] == pytest.approx([0.9, 0.9])
