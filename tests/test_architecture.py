"""The order of the packages: imports point down, for type checking too, and no two modules import each other."""

import ast
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxoptim
from jaxoptim import optim

ROOT = Path(jaxoptim.__file__).parent
LAYERS = [
    ("native",),
    ("core",),
    ("rules",),
    ("schedules",),
    ("averaging",),
    ("distributed",),
    ("engine",),
    ("optim",),
    ("groups",),
    ("checkpoint",),
    ("interop",),
    ("pyro",),
    ("sampling",),
    ("testing",),
]
"""From the bottom to the top; what stands in one line may not import what stands below it."""


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imported(name):
    """The modules of the library that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {module for module in found & MODULES.keys() if module != name}


IMPORTS = {name: imported(name) for name in MODULES}


def layer(name):
    parts = name.split(".")
    return next((at for at, names in enumerate(LAYERS) if len(parts) > 1 and parts[1] in names), len(LAYERS))


def test_every_package_has_a_layer():
    packages = {name.split(".")[1] for name in MODULES if name.count(".") >= 1}
    assert packages - {name for names in LAYERS for name in names} == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    above = [other for other in IMPORTS[name] if layer(other) > layer(name) and other != "jaxoptim"]
    assert above == []


def test_no_two_modules_import_each_other():
    """Of a package, what its ``__init__`` re-exports is no import of the package."""
    pairs = [(a, b) for a in MODULES for b in IMPORTS[a] if a < b and a in IMPORTS[b]]
    assert [pair for pair in pairs if not any(other.startswith(one + ".") for one, other in (pair, pair[::-1]))] == []


def files_touched(call):
    """The files of the library that a call goes through."""
    files = set()

    def look(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents and path.name != "__init__.py":
            files.add(path.relative_to(ROOT).as_posix())

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize(
    ("make", "options", "most"),
    [(optim.Adam, {}, 8), (optim.SGLD, {"nbeta": 2.0, "key": jax.random.key(0)}, 10)],
    ids=["Adam", "SGLD"],
)
def test_a_later_step_goes_through_few_files(make, options, most):
    grads = {"w": jnp.ones(3), "b": jnp.ones(())}
    opt = make(grads, **options)
    for _ in range(2):
        opt.step(grads)
    assert len(touched := files_touched(lambda: opt.step(grads))) <= most, sorted(touched)
