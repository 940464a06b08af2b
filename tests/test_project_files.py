"""The files about the project say the same as the project."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import jaxoptim

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
RELEASES = re.findall(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())


def test_the_citation_is_of_this_version_and_licence():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["title"], cited["version"], cited["license"]) == (
        "jaxoptim",
        jaxoptim.__version__,
        PROJECT["license"],
    )
    assert cited["cff-version"] == "1.2.0"
    assert str(cited["date-released"]) == RELEASES[0][1]
    assert cited["message"]
    assert cited["authors"]


def test_the_version_is_that_of_the_newest_release():
    """The package has it, pyproject.toml reads it there; only what is not yet released stands above."""
    assert RELEASES[0][0] == jaxoptim.__version__
    assert "version" not in PROJECT
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "jaxoptim/__init__.py"
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert [line.partition(" (")[0] for line in headings if line != "Unreleased"] == [name for name, _ in RELEASES]
    assert "Unreleased" not in headings[1:]


def test_the_workflow_runs_ci_on_every_python_that_is_named():
    named = [x.rsplit(" ", 1)[1] for x in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", x)]
    job = WORKFLOW["jobs"]["ci"]
    assert job["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert job["steps"][-1] == {"run": ".ci/run"}


def test_the_other_jobs_are_commands_of_make():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split())
    runs = {name: job["steps"][-1]["run"] for name, job in WORKFLOW["jobs"].items() if name != "ci"}
    assert runs == {"pure": "make test-pure", "oldest": "make oldest", "docs": "make docs"}
    assert {run.removeprefix("make ") for run in runs.values()} <= targets


def test_a_dependency_has_one_bound():
    """However many extras name it."""
    named = [*PROJECT["dependencies"], *(x for extra in PROJECT["optional-dependencies"].values() for x in extra)]
    bounds = {}
    for line in named:
        bounds.setdefault(re.match(r"[\w-]+", line)[0], set()).add(line)
    assert {name: lines for name, lines in bounds.items() if len(lines) > 1 and name != "jaxoptim"} == {}


HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_a_hook_is_a_line_of_make_lint(hook):
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    assert f"-m {hook['name']}" in lint
    assert f"-m {hook['name']}" in hook["entry"]
