"""The documents: every public name is documented in full, and the README's code runs."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

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

ROOT = Path(__file__).parent.parent
PUBLIC = {f"jaxoptim.{name}": value for name, value in vars(jaxoptim).items() if callable(value)}
PUBLIC |= {f"rules.{name}": value for name, value in vars(rules).items() if callable(value)}
PUBLIC |= {f"schedules.{name}": value for name, value in vars(schedules).items() if callable(value)}
PUBLIC |= {f"averaging.{name}": value for name, value in vars(averaging).items() if name in ("swa", "ema")}
PUBLIC |= {f"checkpoint.{name}": getattr(checkpoint, name) for name in ("save", "load")}
PUBLIC |= {f"groups.{name}": getattr(groups, name) for name in ("no_decay", "layer_decay", "combined")}
UTILS = "clip_grad_norm_ clip_grad_value_ get_total_norm"
PUBLIC |= {f"optim.utils.{name}": getattr(optim.utils, name) for name in UTILS.split()}
INTEROP = ("to_torch", "load_state_dict", "from_torch", "to_torch_state_dict", "carry_over", "carry_back")
PUBLIC |= {f"interop.torch.{name}": getattr(interop.torch, name) for name in INTEROP}
PUBLIC |= {"interop.numpyro.to_numpyro": interop.numpyro.to_numpyro}
PUBLIC |= {f"pyro.optim.{name}": value for name, value in vars(pyro.optim).items() if callable(value)}
MULTI = "MultiOptimizer PyroMultiOptimizer TorchMultiOptimizer MixedMultiOptimizer Newton as_multi_optimizer"
PUBLIC |= {f"pyro.optim.multi.{name}": getattr(pyro.optim.multi, name) for name in MULTI.split()}
PUBLIC |= {f"pyro.infer.{name}": getattr(pyro.infer, name) for name in ("SVI", "differentiable_loss")}
SAMPLING = (
    "sample estimate_llc llc_over_checkpoints calibrate susceptibilities default_nbeta mala_acceptance "
    "effective_sample_size mcse rhat"
)
PUBLIC |= {f"sampling.{name}": getattr(sampling, name) for name in SAMPLING.split()}
PUBLIC |= {f"distributed.{name}": value for name, value in vars(distributed).items() if callable(value)}
PUBLIC |= {"sampling.LLCWarning": sampling.LLCWarning}
PUBLIC |= {"testing.check_rule": testing.check_rule}
PAGES = sorted((ROOT / "docs").glob("*.md"))


def snippets(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    text = PUBLIC[name].__doc__
    assert re.match(r"\S.*\.$", text.splitlines()[0]), "the first line is a sentence"
    is_class = isinstance(PUBLIC[name], type) and not issubclass(PUBLIC[name], core.Hyperparameters)
    is_record = hasattr(PUBLIC[name], "_fields") and name.startswith("schedules.")  # shown where it is made
    sections = [] if is_record else ["Examples:"]
    sections += [] if is_class else ["Args:" if name != "jaxoptim.Rule" else "Raises:", "Raises:"]
    for section in sections:
        assert re.search(rf"^ *{section}", text, re.MULTILINE), f"{name} has no section {section}"


TORCH_STYLE = {name: value for name, value in vars(optim).items() if callable(value)}
TORCH_STYLE |= {f"lr_scheduler.{name}": value for name, value in vars(lr_scheduler).items() if callable(value)}
SWA_UTILS = "AveragedModel SWALR get_ema_avg_fn get_ema_multi_avg_fn get_swa_avg_fn get_swa_multi_avg_fn update_bn"
TORCH_STYLE |= {f"swa_utils.{name}": getattr(swa_utils, name) for name in SWA_UTILS.split()}


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


@pytest.mark.parametrize("snippet", snippets(ROOT / "README.md"), ids=["torch", "pyro", "optax", "devinterp"])
def test_a_block_of_the_readme_runs_alone(snippet, tmp_path):
    command = [sys.executable, "-W", "error", "-c", snippet]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.costly
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for snippet in snippets(page):
        exec(compile(snippet, page.name, "exec"), namespace)


@pytest.mark.slow
def test_import_needs_only_jax_optax_and_numpy():
    code = (
        "import sys, jaxoptim; heavy = {'torch', 'pyro', 'numpyro', 'flax', 'orbax', 'equinox', 'matplotlib', 'tqdm', "
        "'sklearn', 'safetensors', 'chex', 'xarray', 'zarr'}; sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
