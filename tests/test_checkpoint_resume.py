"""Runs that go on from a checkpoint bit for bit: in new objects, after being killed, and over devices and processes."""

import os
import random
import signal
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxoptim
from checkpoint_files import NAME, assert_identical
from jaxoptim import checkpoint, optim
from jaxoptim.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from table import FIRST, STATES, slow_unless

pytestmark = pytest.mark.numbers


class Run:
    """A training run: optimizer, schedulers, averaged model and key."""

    def __init__(self, make, params, schedule=None, sparse=False, loss=None):
        self.make, self.schedule, self.sparse, self.loss = make, schedule, sparse, loss
        self.begin(params)
        self.key, self.done = jax.random.key(5), 0

    def begin(self, params):
        self.opt = self.make(params)
        self.schedulers = self.schedule(self.opt) if self.schedule else []
        self.averaged = AveragedModel(self.opt, multi_avg_fn=get_ema_multi_avg_fn(0.75))

    def gradient(self, name, x, noise):
        if name == "late" and self.done % 3:
            return None
        values = np.resize(noise, x.shape)
        if self.sparse:
            return BCOO((jnp.asarray(values[:2]), jnp.array([[3], [1]])), shape=x.shape)
        return (values * (1 + 2j) if jnp.iscomplexobj(x) else values).astype(x.dtype)

    def steps(self, count):
        for _ in range(count):
            self.key, subkey = jax.random.split(self.key)
            noise = np.asarray(jax.random.normal(subkey, (40,)))
            if self.loss:
                self.opt.minimize(self.loss, noise)
            else:
                self.opt.step({name: self.gradient(name, x, noise) for name, x in self.opt.params.items()})
            for scheduler in self.schedulers:
                is_plateau = isinstance(scheduler, optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*[float(noise[0]) + 3] if is_plateau else [])
            self.averaged.update_parameters(self.opt)
            self.done += 1

    def everything(self):
        return {
            "params": self.opt.params, "opt": self.opt.state_dict(), "averaged": self.averaged.state_dict(),
            "schedulers": [x.state_dict() for x in self.schedulers], "key": self.key, "done": self.done,
        }  # fmt: skip

    def resumed(self, path):
        """The same run in new objects, from a file."""
        run = checkpoint.load(path)
        new = Run(self.make, run["params"], self.schedule, self.sparse, self.loss)
        new.opt.load_state_dict(run["opt"])
        new.averaged.load_state_dict(run["averaged"])
        for scheduler, state in zip(new.schedulers, run["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        new.key, new.done = run["key"], run["done"]
        return new


def assert_resumes(run, folder, before=4, after=4):
    run.steps(before)
    checkpoint.save(folder / NAME, run.everything())
    resumed = run.resumed(folder / NAME)
    assert_identical(resumed.everything(), run.everything())
    run.steps(after)
    resumed.steps(after)
    assert_identical(resumed.everything(), run.everything())


def parameters(row):
    """Parameters of several dtypes; gradients of "late" come every third step."""
    rng = np.random.default_rng(0)
    params = {"late": rng.normal(size=(5, 3)), "w": rng.normal(size=(5, 3))}
    params = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}
    params["half"] = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32 if row.sparse else jnp.bfloat16)
    if row.complex:
        params["complex"] = jnp.asarray(rng.normal(size=3) + 1j, jnp.complex64)
    return params


@pytest.mark.slow
@pytest.mark.parametrize("case", STATES, ids=str)
def test_a_resumed_optimizer_goes_on_bit_for_bit(case, tmp_path):
    run = Run(
        lambda params: getattr(optim, case.row.name)(params, groups=[("half", {})], **case.options),
        parameters(case.row),
        lambda opt: [] if "lr" not in opt.defaults else [optim.lr_scheduler.ExponentialLR(opt, 0.9)],
        sparse=case.row.sparse,
    )
    assert_resumes(run, tmp_path)


def quartic(params, noise):
    return jnp.sum((params["w"] - noise[:3]) ** 4) + jnp.sum((params["v"] * params["w"][:2] - 1) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_resumed_lbfgs_goes_on_bit_for_bit(line_search, tmp_path):
    params = {"v": jnp.ones(2), "w": jnp.array([1.0, -2.0, 0.5])}
    options = {"max_iter": 4, "history_size": 3, "line_search_fn": line_search, "lr": 0.5}
    run = Run(lambda params: optim.LBFGS(params, **options), params, loss=quartic)
    assert_resumes(run, tmp_path, 3, 3)


lrs = optim.lr_scheduler
SCHEDULES = {
    "OneCycleLR": lambda opt: [lrs.OneCycleLR(opt, max_lr=0.3, total_steps=20)],
    "ReduceLROnPlateau": lambda opt: [lrs.ReduceLROnPlateau(opt, patience=1, cooldown=1)],
    "MultiStepLR": lambda opt: [lrs.MultiStepLR(opt, [2, 5, 5, 7], gamma=0.3)],
    "LambdaLR": lambda opt: [lrs.LambdaLR(opt, [lambda n: 0.9**n, lambda n: 1 / (1 + n)])],
    "CyclicLR": lambda opt: [lrs.CyclicLR(opt, 0.01, 0.3, step_size_up=3, mode="exp_range", gamma=0.9)],
    "WarmRestarts": lambda opt: [lrs.CosineAnnealingWarmRestarts(opt, 3, T_mult=2)],
    "SWALR": lambda opt: [SWALR(opt, 0.7, anneal_epochs=6)],
    "SequentialLR": lambda opt: [
        lrs.SequentialLR(opt, [lrs.LinearLR(opt, 0.1, total_iters=3), lrs.CosineAnnealingLR(opt, 9)], [3])
    ],
    "Chained": lambda opt: [lrs.ChainedScheduler([lrs.ConstantLR(opt, 0.5, 3), lrs.ExponentialLR(opt, 0.9)])],
    "exponential": lambda opt: [lrs.ExponentialLR(opt, 0.9)],
    "two": lambda opt: [lrs.StepLR(opt, 2), lrs.MultiplicativeLR(opt, lambda n: 0.95)],
}


@pytest.mark.costly
@pytest.mark.parametrize("before", [1, 3, 5])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_resumed_schedulers_go_on_bit_for_bit(schedule, before, tmp_path):
    params = {"w": jnp.arange(4.0), "v": jnp.ones(2)}
    run = Run(lambda params: optim.SGD(params, lr=0.1, momentum=0.9, groups=[("v", {"lr": 0.2})]), params, schedule)
    assert_resumes(run, tmp_path, before, 6)


@pytest.mark.costly
@pytest.mark.parametrize(
    "lr",
    [np.float32(0.1), np.float64(0.1), np.asarray(0.1), jnp.asarray(0.1), jnp.float32(0.1), 1],
    ids=["float32", "float64", "NumPy-array", "weak-array", "array", "int"],
)
def test_a_rate_of_any_type_goes_on_bit_for_bit(lr, tmp_path):
    params = {"w": jnp.linspace(1, 2, 33), "half": jnp.ones(5, jnp.bfloat16)}
    run = Run(lambda params: optim.SGD(params, lr=lr, momentum=0.9), params, SCHEDULES["exponential"])
    run.steps(3)
    checkpoint.save(tmp_path / NAME, run.everything())
    resumed = run.resumed(tmp_path / NAME)
    for going in (run, resumed):
        going.steps(4)
    ours, theirs = (x.everything() for x in (resumed, run))
    assert_identical((ours["params"], ours["opt"]["state"]), (theirs["params"], theirs["opt"]["state"]))
    assert float(resumed.opt.param_groups[0]["lr"]) == float(run.opt.param_groups[0]["lr"])


def partial_files(folder):
    return [path for path in folder.iterdir() if path.name.endswith(".partial")]


def stop_within_a_save(process, folder):
    """Stop a process at a moment at which a file is there in part."""
    while True:
        while not partial_files(folder):
            time.sleep(0.0005)
        process.send_signal(signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        if partial_files(folder):
            return
        process.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_run_that_is_killed_six_times_ends_as_an_undisturbed_one(started, tmp_path):
    script, kills, steps, rng = Path(__file__).parent / "killed_run.py", 6, 300, random.Random(0)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    (tmp_path / "killed").mkdir()
    undisturbed = started(script, tmp_path / NAME, steps, **cache)
    path, done = tmp_path / "killed" / NAME, 0
    for number in range(kills):
        process = started(script, path, steps, **cache)
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines[1] == "saved\n", process.communicate()
        resumed = int(lines[0].removeprefix("from "))
        assert resumed >= done
        if number % 2:
            time.sleep(rng.uniform(0, 0.5))
            assert process.poll() is None
        else:
            stop_within_a_save(process, path.parent)
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert "digest" not in rest, errors
        done = resumed + 1
        assert number % 2 or partial_files(path.parent)
        assert checkpoint.load(path)["done"] >= done
    outputs = [process.communicate() for process in (started(script, path, steps, **cache), undisturbed)]
    digests = [output.splitlines()[-1:] for output, _ in outputs]
    assert digests[0] == digests[1], outputs
    assert digests[0][0].startswith("digest ")
    assert sorted(os.listdir(path.parent)) == [NAME, "run.safetensors.1"]


# Sharded and multi-process runs.


DENSE = [case for case in FIRST if not case.row.sparse]


@pytest.mark.parametrize("case", slow_unless(lambda case: case.row.name == "Adam", DENSE))
def test_a_sharded_state_comes_back_from_orbax_and_from_us(case, tmp_path):
    assert len(jax.devices()) == 8
    meshes = [jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto)) for shape in ((4, 2), (2, 4))]
    values = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)

    def state_on(mesh):
        params = {"w": jax.device_put(values, NamedSharding(mesh, P("x", "y"))), "h": jnp.ones((2, 2), jnp.bfloat16)}
        return jax.jit(jaxoptim.step)(case.ours(), params, params, jaxoptim.init(case.ours(), params))[1]

    state, other = map(state_on, meshes)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        checkpoint.save(tmp_path / NAME, state)
        for like in (state, other):
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
            by_orbax = checkpointer.restore(tmp_path / "state", abstract)
            for restored in (by_orbax, checkpoint.load(tmp_path / NAME, abstract)):
                assert type(restored) is jaxoptim.OptState
                assert_identical(jax.tree.leaves(restored), jax.tree.leaves(state))
                assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)


@pytest.mark.slow
def test_two_processes_save_what_is_in_parts_over_both(together, tmp_path):
    processes = together(Path(__file__).parent / "processes_run.py", 2, tmp_path, devices=2)
    for output, errors in [process.communicate(timeout=120) for process in processes]:
        assert "restored" in output, errors
        assert "saved" in output, errors


@pytest.mark.slow
def test_a_run_goes_on_in_more_and_in_fewer_processes(together, tmp_path):
    ends = []
    for name, stages in {"alone": [(1, 4)], "moved": [(2, 2), (1, 3), (2, 4)]}.items():
        folder, done = tmp_path / name, 0
        folder.mkdir()
        for count, steps in stages:
            processes = together(Path(__file__).parent / "trained_run.py", count, folder, steps, devices=8 // count)
            for output, errors in [process.communicate(timeout=120) for process in processes]:
                assert f"from {done}\n" in output, errors
                assert output.count("saved") == steps - done, errors
            done = steps
        ends.append(dict(np.load(folder / "end.npz")))
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)
