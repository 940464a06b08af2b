"""The documents: every public name is documented in full, and the README's code runs."""

import ast
import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxoptim
from jaxoptim import (
    averaging,
    checkpoint,
    core,
    distributed,
    groups,
    interop,
    optim,
    pyro,
    rules,
    sampling,
    schedules,
    testing,
)
from jaxoptim.optim import lr_scheduler, swa_utils
from parents import marks_of

ROOT = Path(__file__).parent.parent
MODULES = [
    jaxoptim,
    averaging,
    checkpoint,
    core,
    distributed,
    groups,
    interop.numpyro,
    interop.torch,
    optim.prior,
    optim.utils,
]
MODULES += [pyro.infer, pyro.optim, pyro.optim.multi, rules, sampling, schedules, testing]
PUBLIC = {
    f"{module.__name__.removeprefix('jaxoptim.')}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if inspect.isroutine(getattr(module, name)) or inspect.isclass(getattr(module, name))
}
NEVER_RAISE = ("pyro.optim.is_scheduler",)
IN_A_LINE = ("core.enabled", "core.is_known", "core.sqrt")
PAGES = sorted((ROOT / "docs").glob("*.md"))


def snippets(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in IN_A_LINE])
def test_public_names_are_documented(name):
    text = PUBLIC[name].__doc__
    assert re.match(r"\S.*\.$", text.splitlines()[0]), "the first line is a sentence"
    is_class = isinstance(PUBLIC[name], type) and not issubclass(PUBLIC[name], core.Hyperparameters)
    is_result = is_class and "Attributes:" in text and "Args:" not in text  # shown where it is made
    sections = [] if is_result else ["Examples:"]
    if not is_class:
        is_base = PUBLIC[name] in (core.Rule, core.Hyperparameters)  # whose fields are those of its subclasses
        sections += ["Args:"] if inspect.signature(PUBLIC[name]).parameters and not is_base else []
        sections += ["Raises:"] if name not in NEVER_RAISE else []
    for section in sections:
        assert re.search(rf"^ *{section}", text, re.MULTILINE), f"{name} has no section {section}"


def documented(node, prefix=""):
    """Each docstring of a module and of what is not private in it, by name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield f"{prefix}{child.name}", ast.get_docstring(child) or ""
            yield from documented(child, f"{prefix}{child.name}.")


FILES = sorted((ROOT / "jaxoptim").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_lines_say_first_what_a_thing_is_or_does(path):
    tree = ast.parse(path.read_text())
    texts = {"module": ast.get_docstring(tree) or "", **dict(documented(tree))}
    beside_the_point = re.compile("(What|How|Which|Where|When|As|From|For|If|In|Of|By|With|Those|Everything) ")
    assert {name: text for name, text in texts.items() if beside_the_point.match(text)} == {}


TORCH_STYLE = {name: getattr(optim, name) for name in optim.__all__ if callable(getattr(optim, name))}
TORCH_STYLE |= {f"lr_scheduler.{name}": getattr(lr_scheduler, name) for name in lr_scheduler.__all__}
TORCH_STYLE |= {f"swa_utils.{name}": getattr(swa_utils, name) for name in swa_utils.__all__}


@pytest.mark.parametrize("name", TORCH_STYLE)
def test_the_torch_style_face_is_documented(name):
    value = TORCH_STYLE[name]
    sections = ["Examples:"] + (["Args:"] if inspect.signature(value).parameters else [])
    if isinstance(value, type) and issubclass(value, optim.Optimizer):
        sections += [".. math::", "Raises:"] + (["References:"] if value is not optim.Optimizer else [])
    if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler):
        sections += [".. math::", "Raises:"]
    for section in sections:
        assert section in value.__doc__


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.startswith("rules.")])
def test_rules_state_their_mathematics_and_source(name):
    rule = PUBLIC[name]
    for section in (".. math::", "References:", "Slots:" if issubclass(rule, core.Rule) else "State:"):
        assert section in rule.__doc__
    arguments = rule.__doc__.split("Args:")[1].split("\n\n")[0]
    documented = re.findall(r"^        (\w+):", arguments, re.MULTILINE)
    assert documented == list(inspect.signature(rule).parameters), "every argument, in the order of the signature"


def test_the_pure_face_has_every_factory():
    names = (
        "adadelta adafactor adagrad adagrad_rmsprop adam adamax adamw asgd clipped_adam dct_adam lbfgs muon nadam "
        "newton psgld radam rmsprop rprop sgd sghmc sgld sgnht sparse_adam"
    )
    for name in names.split():
        assert getattr(jaxoptim, name).__name__ == name
    assert len(names.split()) == len([v for v in vars(rules).values() if isinstance(v, type)])


def test_readme_names_the_two_commands_and_what_they_need():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


BLOCKS = dict(zip(["torch", "pyro", "optax", "devinterp"], snippets(ROOT / "README.md"), strict=True))


@pytest.mark.parametrize(
    "snippet", [pytest.param(text, id=name, marks=marks_of(text)) for name, text in BLOCKS.items()]
)
def test_a_block_of_the_readme_runs_alone(snippet, tmp_path):
    command = [sys.executable, "-W", "error", "-c", snippet]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.costly
@pytest.mark.parametrize(
    "page",
    [pytest.param(x, id=x.name, marks=marks_of("".join(snippets(x)))) for x in PAGES if snippets(x)],
)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for snippet in snippets(page):
        exec(compile(snippet, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if "```pycon" in page.read_text()], ids=lambda page: page.name)
def test_the_sessions_of_a_page_show_what_happens(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "\n".join(re.findall(r"```pycon\n(.*?)```", page.read_text(), re.DOTALL))
    session = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    filtering, found = jax.config.jax_traceback_filtering, []
    jax.config.update("jax_traceback_filtering", "off")  # which adds a note to some errors
    try:
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=found.append)
    finally:
        jax.config.update("jax_traceback_filtering", filtering)
    assert not found, "".join(found)


def test_the_table_of_speed_has_figures_that_were_measured():
    """By a label in the tables of times, and by the title of a program that is counted."""
    speed, text = ((ROOT / "docs" / name).read_text() for name in ("speed.md", "benchmarks.md"))
    *timed, counted = re.findall(r"^\| (?!one step)([^|]+?) \| (.*) \|$", speed, re.M)
    names = ["jaxoptim", "jaxoptim, packed", "optax", "torch fused", "torch foreach"]
    labels = {"GPT-2": "gpt2", "ResNet-50,": "resnet50", "1000": "1000x100", "an": "mlp"}
    for title, cells in timed:
        times = text.split(f"\n{labels[title.split()[0]]}, adam: floor")[-1].split("\n\n")[0]
        shown = dict(zip(names, cells.split(" | "), strict=True))
        assert {name: re.search(rf"^  {name} +(\S+ \S+)", times, re.M)[1] for name in names} == shown
    rows = (ROOT / "docs" / "accelerators.md").read_text().split("### Many arrays: one H100")[1]
    programs = ["AdamW, GPT-2 small", "AdamW, GPT-2 small, packed", "optax: AdamW, GPT-2 small"]
    for name, cell in zip(programs, counted[1].split(" | "), strict=False):
        kernels, moved = re.search(rf"^\| {name} \| (\d+) \| \d+ \| ([\d.]+) \|", rows, re.M).groups()
        assert cell == f"{kernels} kernels, {moved} bytes"


@pytest.mark.slow
def test_import_needs_only_jax_optax_and_numpy():
    code = (
        "import sys, jaxoptim; heavy = {'torch', 'pyro', 'numpyro', 'flax', 'orbax', 'equinox', 'matplotlib', 'tqdm', "
        "'sklearn', 'safetensors', 'chex', 'xarray', 'zarr'}; sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
