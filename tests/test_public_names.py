"""What is public: ``__all__`` of each module, which is what ``dir``, ``help``, the documents and the site go by."""

import ast
import fnmatch
import importlib
import inspect
import pydoc
import re
from pathlib import Path

import pytest

import jaxoptim
from jaxoptim import core, optim, sampling

ROOT = Path(__file__).parent.parent


def reached(module):
    """A module and those that it names in ``__all__``, and so on."""
    own = [getattr(module, name) for name in module.__all__]
    return [module, *(found for value in own if inspect.ismodule(value) for found in reached(value))]


PUBLIC = {module.__name__: module for module in [*reached(jaxoptim), importlib.import_module("jaxoptim.testing")]}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_a_module_has_all_where_it_is_public():
    paths = (ROOT / "jaxoptim").rglob("*.py")
    assert {name_of(path) for path in paths if re.search("^__all__ = ", path.read_text(), re.M)} == PUBLIC.keys()


@pytest.mark.parametrize("module", PUBLIC.values(), ids=PUBLIC)
def test_dir_shows_what_all_names(module):
    assert dir(module) == sorted(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize(
    "module", [module for module in PUBLIC.values() if hasattr(module, "__path__")], ids=lambda m: m.__name__
)
def test_all_of_a_package_is_what_it_imports(module):
    """What is imported under ``as`` is for other modules of the library."""
    imports = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names if alias.asname is None}
    assert names - {"listing"} == set(module.__all__)


def test_help_lists_classes_and_no_internals():
    text = pydoc.plain(pydoc.render_doc(optim)).split("\nCLASSES\n")[1]
    listed = re.findall(r"^    class (\w+)", text, re.M)
    assert sorted(listed) == sorted(name for name in optim.__all__ if inspect.isclass(getattr(optim, name)))


@pytest.mark.parametrize("module", [jaxoptim, optim, sampling], ids=lambda module: module.__name__)
def test_help_says_what_is_internal_before_it_lists_all_files(module):
    """Which files pydoc lists as contents of a package, no package can say."""
    before, _ = pydoc.plain(pydoc.render_doc(module)).split("\nPACKAGE CONTENTS\n")
    assert f"names are those that ``dir({module.__name__.rpartition('.')[2]})`` shows" in before
    named = set(re.findall(r"``(?:jaxoptim\.)?(\w+)``", before))
    assert {name for name in module.__all__ if inspect.ismodule(getattr(module, name))} - named == set()


def named_in(tree):
    """The public modules and names that a piece of code takes from the library, as pairs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxoptim":
            yield from ((node.module, alias.name) for alias in node.names)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documents_and_examples_import_public_names_alone(page):
    text = page.read_text()
    blocks = [text] if page.suffix == ".py" else re.findall(r"```python\n(.*?)```", text, re.S)
    taken = {pair for block in blocks for pair in named_in(ast.parse(block))}
    allowed = {(module, name) for module in PUBLIC for name in PUBLIC[module].__all__} | {("jaxoptim", "testing")}
    assert sorted(taken - allowed) == []


def in_the_reference():
    """Each entry of the reference, by the module that its page says."""
    found = []
    for page in sorted((ROOT / "docs" / "api").glob("*.rst")):
        module = ""
        for directive, name in re.findall(r"^\.\. (\w+):: (\S+)$", page.read_text(), re.M):
            if directive == "currentmodule":
                module = name
            elif directive in ("autoclass", "autofunction", "autodata"):
                found.append((module, name))
    return found


def test_the_reference_has_every_public_name_once():
    entries = [
        ("jaxoptim.core" if module == "jaxoptim.core.rule" else module, name) for module, name in in_the_reference()
    ]
    assert len(entries) == len(set(entries))
    names = {(module, name) for module in PUBLIC for name in PUBLIC[module].__all__}
    elsewhere = {("jaxoptim.core", name) for name in core.__all__ if name in jaxoptim.__all__}
    wanted = {
        (module, name) for module, name in names - elsewhere if not inspect.ismodule(getattr(PUBLIC[module], name))
    }
    assert {(module, name) for module, name in entries if module in PUBLIC} == wanted


def test_the_navigation_has_every_page():
    patterns = re.findall(r"^[\w/*\[\]]+$", (ROOT / "docs" / "index.md").read_text(), re.M)
    pages = [path for kind in ("*.md", "api/*.rst") for path in (ROOT / "docs").glob(kind)]
    names = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in pages} - {"index"}
    assert {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)} == set()
