"""The examples as their users run them: commands with tables, a figure and errors of one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.numbers  # they compute for longer than they compile

ROOT = Path(__file__).parent.parent
NAMES = ["sgd", "adam", "adamw", "muon", "rmsprop"]


def python(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def run(*arguments):
    return python(ROOT / "examples" / "train_digits.py", *arguments)


def exits(cases, *arguments):
    """What one process prints and says at its end for each pair of an example, freshly imported as ``e``, and code."""
    code = f"""
import importlib, sys
for name, code in {cases}:
    e = importlib.reload(importlib.import_module(name))
    try:
        exec(code)
        print("well", file=sys.stderr)
    except SystemExit as error:
        print(error.code, file=sys.stderr)
    print("-----")
"""
    done = python("-c", code, *arguments, PYTHONPATH=str(ROOT / "examples"))
    *printed, rest = done.stdout.split("-----\n")
    assert (done.returncode, rest) == (0, ""), done.stderr
    return printed, done.stderr.splitlines()


def accuracies(stdout):
    """Optimizer to test accuracy in percent, from the printed table."""
    return {name: float(percent) for name, percent in re.findall(r"^(\w+) +(\d+\.\d+)% +\d+\.\d+$", stdout, re.M)}


def assert_png(path):
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 10_000


def test_one_optimizer_for_a_few_epochs_prints_its_row_and_writes_the_figure(tmp_path):
    done = run("--optimizer", "sgd", "--lr", 0.1, "--epochs", 2, "--out", tmp_path / "new" / "folder")
    assert done.returncode == 0, done.stderr
    assert list(accuracies(done.stdout)) == ["sgd"]
    assert accuracies(done.stdout)["sgd"] > 70
    assert_png(tmp_path / "new" / "folder" / "train_digits.png")


@pytest.mark.slow
def test_every_optimizer_is_above_97_percent(tmp_path):
    done = run("--out", tmp_path)
    assert done.returncode == 0, done.stderr
    reached = accuracies(done.stdout)
    assert list(reached) == NAMES
    assert min(reached.values()) > 97, reached
    assert_png(tmp_path / "train_digits.png")


@pytest.mark.slow
def test_the_torch_style_loops_print_the_losses_of_torch_and_fail_if_they_differ():
    cases = [("torch_style", code) for code in ("e.main()", "e.TOLERANCE = 0.0; e.main()")]
    (stdout, _), said = exits(cases, "--epochs", 3)
    rows = re.findall(r"^ *(\d+) +(\d+\.\d+) +(\d+\.\d+) +(\d+\.\d+)$", stdout, re.M)
    assert [int(epoch) for epoch, *_ in rows] == [1, 2, 3] * 2
    for _, torch, step, minimize in rows:
        assert float(step) == pytest.approx(float(torch), rel=1e-5)
        assert float(minimize) == pytest.approx(float(torch), rel=1e-5)
    assert float(rows[2][1]) < float(rows[0][1]) / 2, "it learns"
    assert said[0] == "well"
    assert re.fullmatch(r"The losses differ by \S+, more than 0e\+00\.", said[1])


def test_the_examples_about_torch_say_that_they_need_it(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    code = """
for name in ("torch_style", "resume_from_torch"):
    try:
        __import__(name)
    except SystemExit as error:
        print(error)
"""
    done = python("-c", code, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT / "examples")]))
    assert done.stdout.splitlines() == [
        "This example compares with torch, which is not installed: pip install torch.",
        "This example begins in torch, which is not installed: pip install torch==2.13.0",
    ], done.stderr


@pytest.mark.slow
def test_the_benchmark_runs_and_says_which_targets_it_reaches(tmp_path):
    command = [ROOT / "benchmarks" / "step.py", "--quick", "--json", tmp_path / "numbers.json"]
    done = python(*command, "--trees", "mlp", "--optimizers", "sgd")
    assert done.returncode == 0, done.stderr
    for compared in ("jaxoptim / optax", "jaxoptim.optim, step / jaxoptim,", "jaxoptim.optim, minimize / jaxoptim,"):
        assert re.search(rf"^(reached|NOT REACHED) +mlp, sgd: step of {compared}", done.stdout, re.M)
    assert json.loads((tmp_path / "numbers.json").read_text())["results"][0]["tree"] == "mlp"
    wrong = python(*command, "--trees", "forest")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].endswith("allowed are gpt2, resnet50, 1000x100, 1000-scalars, mlp, table")


@pytest.mark.slow
def test_the_benchmark_of_lbfgs_ends_where_torch_ends():
    done = python(ROOT / "benchmarks" / "lbfgs.py", "--quick")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^  \w.* (\d+) +(0\.\d+)$", done.stdout, re.M)
    assert len(rows) == 6, done.stdout
    for table in (rows[:3], rows[3:]):
        evaluations, losses = zip(*table, strict=True)
        assert len(set(evaluations)) == 1
        assert [float(loss) for loss in losses] == pytest.approx([float(losses[0])] * 3, abs=1e-10)


def ran(name, *arguments):
    """What an example prints that goes well."""
    done = python(ROOT / "examples" / name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def difference_of_faces(stdout):
    return float(re.search(r"^largest difference between the (?:validation )?losses of .*: (\S+)$", stdout, re.M)[1])


@pytest.mark.slow
def test_one_cycle_is_the_same_in_both_faces_and_better_than_a_constant_rate(tmp_path):
    stdout = ran("one_cycle.py", "--out", tmp_path / "new" / "folder")
    assert_png(tmp_path / "new" / "folder" / "one_cycle.png")
    assert difference_of_faces(stdout) < 1e-12
    found = re.findall(r"^(\S.*?) {3,}(\d+\.\d+)%(?: +(\d+\.\d+)% ± \d+\.\d+%)?$", stdout, re.M)
    assert [name for name, *_ in found] == ["one cycle, torch-style", "one cycle, pure", "constant 0.1"]
    (torch_style, _), (pure, of_many), (_, constant) = [(float(one), float(mean or "nan")) for _, one, mean in found]
    assert torch_style == pytest.approx(pure, abs=0.5)
    assert torch_style > 96.5
    assert of_many > max(96.8, constant + 0.4)


@pytest.mark.slow
def test_plateau_and_average_are_the_same_in_both_faces_and_better_than_the_last_weights(tmp_path):
    stdout = ran("plateau_ema.py", "--out", tmp_path)
    assert_png(tmp_path / "plateau_ema.png")
    assert difference_of_faces(stdout) < 1e-12
    row = r"^(\S.*?) {3,}(\d+\.\d+)%(?: ± \S+)? +(\d+\.\d+)%(?: ± \S+|   (.*))$"
    rows = re.findall(row, stdout, re.M)
    assert [name for name, *_ in rows] == ["torch-style", "pure", "mean of 16 trainings"]
    assert [epochs for *_, epochs in rows[:2]] == ["14, 19"] * 2
    torch_style, pure, (last, average) = [(float(last), float(average)) for _, last, average, _ in rows]
    assert torch_style == pytest.approx(pure, abs=0.5)
    assert torch_style[1] > 89
    assert average > max(90, last + 0.7)


@pytest.mark.slow
def test_examples_fail_if_their_faces_differ(tmp_path):
    cases = {
        ("one_cycle", "e.TOLERANCE = 0.0; e.main()"): r"The losses differ by \S+, more than 0e\+00\.",
        ("plateau_ema", "e.TOLERANCE = -1.0; e.main()"): (r"The validation losses differ by \S+, more than -1e\+00\."),
        (
            "plateau_ema",
            "f = e.train_torch_style; e.train_torch_style = lambda *a: f(*a)._replace(rates=[0.05]); e.main()",
        ): r"The rate was reduced after epochs 1 in the torch-style loop, but after none in the pure one\.",
    }
    _, said = exits([*cases], "--epochs", 1, "--out", tmp_path)
    for expected, found in zip(cases.values(), said, strict=True):
        assert re.fullmatch(expected, found)


@pytest.mark.slow
def test_the_picture_of_all_schedules(tmp_path):
    assert "The 24 schedules are in" in ran("plot_schedules.py", "--out", tmp_path / "new" / "folder")
    assert_png(tmp_path / "new" / "folder" / "schedules.png")
    assert (tmp_path / "new" / "folder" / "schedules.png").stat().st_size < 300_000


def check_resumed(stdout, folder, epochs):
    """Check the table and the figure, and give the final test accuracy of the run that changed over, in percent."""
    assert_png(folder / "resume_from_torch.png")
    rows = re.findall(r"^ *(\d+) +(\d+\.\d+) +(\d+\.\d+) +(\S+e\S+) +(\d+\.\d+)% +(\d+\.\d+)%$", stdout, re.M)
    assert [int(epoch) for epoch, *_ in rows] == list(range(1, epochs + 1))
    for _, alone, crossing, *_ in rows:
        assert float(crossing) == pytest.approx(float(alone), rel=1e-5)
    assert 0 < float(rows[-1][3]) < 1e-4, "the run ends in JAX"
    assert float(re.search(r"^kink where the run changes over, after step \d+: (\S+)$", stdout, re.M)[1]) < 1e-5
    jax, back = re.search(r"^test accuracy at the end: (\S+)% in JAX, (\S+)% back in torch$", stdout, re.M).groups()
    assert jax == back == rows[-1][5]
    assert float(jax) == pytest.approx(float(rows[-1][4]), abs=0.5)
    return float(jax)


LATE_SCHEDULER = """
change_over = e.change_over
def late(path, steps):
    run = change_over(path, steps)
    run.scheduler.last_epoch -= 1
    return run
e.change_over = late
e.main()
"""
WITHOUT_STATE = """
change_over = e.change_over
def without_state(path, steps):
    run = change_over(path, steps)
    new = e.new_in_jax(run.optimizer.params, steps)
    new.scheduler.load_state_dict(run.scheduler.state_dict())
    new.optimizer.param_groups[0].update({x: run.optimizer.param_groups[0][x] for x in ("lr", "betas")})
    return new
e.change_over = without_state
e.main()
"""
WITHOUT_DECAY = """
load_in_jax = e.load_in_jax
def without_decay(path, steps):
    run = load_in_jax(path, steps)
    run.optimizer.param_groups[0]["weight_decay"] = 0.0
    return run
e.load_in_jax = without_decay
e.main()
"""
KINK = r"The jumps of the losses where the run changes over differ by \S+, more than 1e-04\."
RESUMED = {
    "e.main()": "well",
    LATE_SCHEDULER: KINK,
    "e.KINK = 1.0\n" + LATE_SCHEDULER: r"The losses differ by \S+, more than 1e-03\.",
    WITHOUT_STATE: KINK,
    WITHOUT_DECAY: r"The run that was loaded from \S+\.safetensors went on otherwise than the one that was saved\.",
    "e.change_back = lambda run, steps: e.new_in_torch(steps); e.main()": (
        r"The test accuracy is \S+% in JAX, but \S+% back in torch\."
    ),
}


@pytest.mark.slow
def test_a_run_of_torch_goes_on_without_a_kink_and_the_example_fails_if_it_goes_on_otherwise(tmp_path):
    folder = tmp_path / "new" / "folder"
    printed, said = exits([("resume_from_torch", code) for code in RESUMED], "--epochs", 2, "--out", folder)
    assert check_resumed(printed[0], folder, epochs=2) > 85
    assert all(printed), "the table comes first"
    for expected, found in zip(RESUMED.values(), said, strict=True):
        assert re.fullmatch(expected, found)


@pytest.mark.slow
def test_a_run_of_torch_goes_on_to_what_torch_reaches(tmp_path):
    stdout = ran("resume_from_torch.py", "--out", tmp_path)
    assert check_resumed(stdout, tmp_path, epochs=10) > 95.5


@pytest.mark.slow
def test_the_beta_vae_gives_back_the_digits_and_less_of_them_with_a_larger_beta(tmp_path):
    stdout = ran("beta_vae_digits.py", "--out", tmp_path / "new" / "folder")
    assert_png(tmp_path / "new" / "folder" / "beta_vae.png")
    rows = re.findall(r"^ *(\d) +(\d+\.\d+) +(\d+\.\d+)$", stdout, re.M)
    assert [beta for beta, *_ in rows] == ["1", "4"]
    (error, divergence), (larger, smaller) = [(float(error), float(divergence)) for _, error, divergence in rows]
    # The mean image of the training data is off by 4.7.
    assert error < 1.2
    assert error + 0.5 < larger < 2.5
    assert 6 < divergence < 10
    assert 1.5 < smaller < divergence / 3


@pytest.mark.slow
def test_the_coefficient_of_a_network_over_its_training(tmp_path):
    done = python(ROOT / "examples" / "llc_digits.py", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    row = re.compile(r"^ *(\d+) +(\d+\.\d+) +(\d+\.\d+)% +(-?\d+\.\d+) +(\d+\.\d+) +(\d+\.\d+)( \*)?$", re.M)
    found = row.findall(done.stdout)
    rows = [tuple(map(float, numbers)) for *numbers, _ in found]
    assert len(rows) == 8
    # Warned of early in training, and not where there is a minimum.
    assert all(is_doubtful for *_, is_doubtful in found[:2])
    assert not any(is_doubtful for *_, is_doubtful in found[3:])
    assert rows[-1][2] > 95
    assert rows[0][3] < 0 < rows[-1][3]  # no minimum yet: the chains find lower losses
    assert all(rhat < 1.1 for step, *_, rhat in rows if step > 380)
    crossing = re.compile(r"\)\^2 +\S+ +(\d\.\d+) +(\d\.\d+) +(\d\.\d+) ", re.M)
    found = [tuple(map(float, numbers)) for numbers in crossing.findall(done.stdout)]
    assert len(found) == 8
    assert all(abs(estimate - exact) < 4 * mcse + 0.02 * exact for estimate, mcse, exact in found)
    assert_png(tmp_path / "llc.png")


def check_transformers(stdout, folder):
    """Check tables, figure and files; each network to the test accuracies of its last weights and of their average."""
    assert_png(folder / "transformer.png")
    difference = re.search(r"^largest difference between the losses without dropout: (\S+), 20 steps", stdout, re.M)[1]
    assert float(difference) < 1e-13
    rows = re.findall(r"^(\w+) +(\d+\.\d) s +(\d+) +(\d+\.\d+)% +(\d+\.\d+)%$", stdout, re.M)
    assert all(float(first_step) < 60 and int(speed) > 0 for _, first_step, speed, *_ in rows)
    files = {path.name for path in folder.iterdir()} - {"transformer.png"}
    assert files == {f"transformer_{name}.{'pt' if name == 'torch' else 'safetensors'}" for name, *_ in rows}
    return {name: (float(last), float(average)) for name, *_, last, average in rows}


@pytest.mark.slow
def test_the_transformers_learn_the_digits_as_in_torch(tmp_path):
    rows = check_transformers(ran("transformer.py", "--torch", "--out", tmp_path / "new"), tmp_path / "new")
    assert list(rows) == ["nnx", "equinox", "pytrees", "torch"]
    assert all(last > 93.5 and average > 93.5 for last, average in rows.values()), rows


OTHER_EPSILON = """
in_equinox = e.in_equinox
def other_epsilon(params, dropout):
    e.EPS = 1e-6
    return in_equinox(params, dropout)
e.in_equinox = other_epsilon
e.main()
"""
LOADED_WITHOUT = """
e.difference_without_dropout = lambda *_: 0.0
def load(run, path):
    saved = e.checkpoint.load(path, like=run.state())
    run.start(saved["model"])
    for name in {"optimizer", "scheduler", "averaged"} - {without}:
        getattr(run, name).load_state_dict(saved[name])
e.JaxTraining.load = load
e.main()
"""


@pytest.mark.slow
def test_the_example_of_transformers_fails_if_networks_or_runs_differ(tmp_path):
    cases = {OTHER_EPSILON: r"The losses without dropout differ by \S+, more than 1e-11\."}
    for without in ("optimizer", "scheduler", "averaged"):
        cases[f"without = {without!r}" + LOADED_WITHOUT] = (
            r"The run in nnx and the one that goes on from its file differ by \S+, more than 0e\+00\."
        )
    _, said = exits([("transformer", code) for code in cases], "--epochs", 1, "--out", tmp_path)
    for expected, found in zip(cases.values(), said, strict=True):
        assert re.fullmatch(expected, found)


def test_the_transformer_says_what_it_needs(tmp_path):
    code = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
sys.modules["equinox"] = None
try:
    import transformer
except SystemExit as error:
    print(error)
del sys.modules["equinox"]
import transformer
transformer.main()
"""
    done = python("-c", code, "--torch", "--out", tmp_path / "out", PYTHONPATH=str(ROOT / "examples"))
    assert done.stdout == "This example needs equinox and flax: pip install equinox flax.\n"
    assert done.returncode == 2
    assert done.stderr == "-c: --torch needs torch, which is not installed: pip install torch\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_train_and_one_goes_on(tmp_path):
    ends = []
    for processes, epochs, name in ((2, 2, "run"), (1, 4, "run"), (2, 4, "undisturbed")):
        options = ["--processes", processes, "--epochs", epochs, "--checkpoint", tmp_path / f"{name}.safetensors"]
        done = python(ROOT / "examples" / "multi_host.py", *options, XLA_FLAGS="")
        assert done.returncode == 0, done.stderr
        ends.append(re.findall(r"^(epoch.*|test accuracy.*)$", done.stdout, re.M))
    assert [line.split(":")[0] for line in ends[1]] == [
        "epoch 3",
        "epoch 4",
        "test accuracy on 1 devices of 1 processes",
    ]
    assert ends[2][:2] == ends[0][:2]
    assert ends[2][2:4] == ends[1][:2]
    accuracy = re.fullmatch(r"test accuracy on 2 devices of 2 processes: (.*)%", ends[2][-1])[1]
    assert float(accuracy) > 94


@pytest.mark.needs("torch")
@pytest.mark.needs("numpyro")
def test_a_wrong_option_is_one_line(tmp_path):
    wrong = {
        ("beta_vae_digits", "--epochs", "none"): "argument --epochs: 'none' is not a number of epochs",
        ("llc_digits", "--epochs", "none"): "argument --epochs: 'none' is not a number of epochs",
        ("multi_host", "--index", "1"): "--coordinator and --index go together$",
        ("one_cycle", "--epochs", "two"): "argument --epochs: 'two' is not a number of epochs",
        ("plateau_ema", "--out", __file__): f".*{re.escape(__file__)}",
        ("plot_schedules", "--steps", "3"): "unrecognized arguments: --steps 3$",
        ("train_digits", "--optimizer", "adam,lion"): f".*'lion'.* {', '.join(NAMES)}",
        ("train_digits", "--lr", "-1", "--optimizer", "muon"): r"Invalid lr: -1\.0.*lr >= 0",
        ("train_digits", "--epochs", "0"): ".*'0'.* >= 1",
        ("transformer", "--epochs", "none"): "argument --epochs: 'none' is not a number of epochs",
    }
    commands = [
        [*command, *([] if "--out" in command or "multi_host" in command else ["--out", str(tmp_path / "out")])]
        for command in wrong
    ]
    code = f"""
import importlib, sys
for command in {commands}:
    sys.argv = command
    try:
        importlib.import_module(command[0]).main()
    except SystemExit as error:
        print(error.code)
"""
    done = python("-c", code, PYTHONPATH=str(ROOT / "examples"))
    assert done.stdout.split() == ["2"] * len(wrong), done.stderr
    for (name, *_), said, line in zip(wrong, wrong.values(), done.stderr.splitlines(), strict=True):
        assert re.match(f"{name}: {said}", line), line
    assert not (tmp_path / "out").exists()
