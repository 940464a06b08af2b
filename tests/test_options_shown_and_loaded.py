"""What an optimizer shows of its options, and options that stay when a state is loaded."""

import types
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxoptim import optim, schedules

PARAMS = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3), "frozen": None}


def test_the_table_names_every_parameter():
    opt = optim.AdamW(PARAMS, lr=0.1, groups=[("b", {"weight_decay": 0.0, "lr": jnp.asarray(0.25)})])
    table = opt.describe()
    assert [row.name for row in table] == ["b", "frozen", "w"]
    assert table[0] == ("b", (3,), jnp.float32, 0, 0.25, 0.0, True)
    assert table[1] == ("frozen", None, None, None, None, None, False)
    assert table[2] == ("w", (2, 3), jnp.bfloat16, 1, 0.1, 0.01, True)
    assert str(table).split("\n") == [
        "name    shape   dtype     group  rate  decay  trained",
        "b       (3,)    float32   0      0.25  0      trained",
        "frozen  -       -         -      -     -      frozen",
        "w       (2, 3)  bfloat16  1      0.1   0.01   trained",
    ]
    assert repr(table) == str(table)


def test_the_table_follows_groups_and_schedulers():
    weight, bias = optim.Parameter([1.0], "weight"), optim.Parameter(1.0)
    opt = optim.SGD([weight], lr=0.1)
    opt.add_param_group({"params": [bias], "lr": 0.5})
    optim.lr_scheduler.ConstantLR(opt, factor=0.5)
    assert [(row.name, row.group, row.rate, row.decay) for row in opt.describe()] == [
        ("weight", 0, 0.05, 0),
        ("1.0", 1, 0.25, 0),
    ]
    opt.param_groups[1]["params"].clear()
    opt.step([[jnp.ones(1)], [None]])
    assert [row.trained for row in opt.describe()] == [True, False]


@pytest.mark.slow
def test_current_options_are_those_of_the_next_step():
    schedule = schedules.step_lr(0.5, step_size=1, gamma=0.5)
    opt = optim.Adam({"a": 1.0, "b": 1.0}, lr=0.1, groups=[("a", {"lr": schedule, "betas": (lambda step: 0.9, 0.99)})])
    assert [of["lr"] for of in opt.current_options()] == [0.5, 0.1]
    opt.step({"a": 1.0, "b": None})
    opt.step({"a": 1.0, "b": None})
    now = opt.current_options()
    assert [of["lr"] for of in now] == [0.125, 0.1]
    assert now[0]["betas"] == pytest.approx((0.9, 0.99))
    assert now[0]["eps"] == 1e-8
    assert "params" not in now[0]
    assert opt.describe()[0].rate == 0.125
    decaying = optim.ClippedAdam([1.0], lr=0.5, lrd=0.5)
    assert decaying.current_options()[0]["lr"] == 0.25


def test_rates_of_sgd_whose_state_shows_no_count():
    opt = optim.SGD({"a": 1.0}, lr=schedules.step_lr(0.5, step_size=1, gamma=0.5))
    for expected in (0.5, 0.25, 0.125):
        assert opt.current_options()[0]["lr"] == expected
        before = float(opt.params["a"])
        opt.step({"a": 1.0})
        assert float(opt.params["a"]) == before - expected


@pytest.mark.parametrize("make", [optim.SGHMC, optim.LBFGS, optim.AdagradRMSProp, optim.Muon])
def test_every_kind_is_described(make):
    (row,) = make({"w": jnp.ones((2, 2))}).describe()
    assert row.rate is not None
    assert row.trained


def test_options_are_kept():
    old = optim.AdamW(PARAMS, lr=0.1, weight_decay=0.3)
    old.step({"w": PARAMS["w"], "b": PARAMS["b"], "frozen": None})
    new = optim.AdamW(PARAMS, lr=0.5)
    new.load_state_dict(old.state_dict(), keep=["lr"])
    (group,) = new.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.3)
    param = group["params"][0]
    assert jnp.array_equal(new.state[param]["exp_avg"], old.state[old.param_groups[0]["params"][0]]["exp_avg"])


@pytest.mark.parametrize("keep", [["lr"], {"lr"}, (name for name in ["lr"])], ids=["list", "set", "generator"])
def test_options_are_kept_in_every_group(keep):
    def made(lr):
        return optim.SGD({"a": 1.0, "b": 1.0}, groups=[("a", {"lr": lr}), ("b", {"lr": 2 * lr})])

    new = made(0.5)
    new.load_state_dict(made(0.1).state_dict(), keep=keep)
    assert [group["lr"] for group in new.param_groups] == [0.5, 1.0]


def test_a_scheduler_after_loading_starts_from_the_rate_that_was_kept():
    old = optim.SGD([1.0], lr=0.1)
    optim.lr_scheduler.StepLR(old, 1)
    new = optim.SGD([1.0], lr=0.5)
    new.load_state_dict(old.state_dict(), keep=["lr"])
    scheduler = optim.lr_scheduler.StepLR(new, 1)
    new.step([1.0])
    scheduler.step()
    assert new.param_groups[0]["lr"] == pytest.approx(0.05)
    assert scheduler.base_lrs == [0.5]


def test_wrong_options_to_keep_change_nothing():
    old, new = optim.SGD([1.0], lr=0.1), optim.SGD([1.0], lr=0.5)
    for wrong in (["lrr"], ["params"]):
        with pytest.raises(ValueError, match=f"no option '{wrong[0]}'. It has lr, "):
            new.load_state_dict(old.state_dict(), keep=wrong)
    with pytest.raises(TypeError, match=r"keep takes a list of options, but got 'lr'. Give \['lr'\]"):
        new.load_state_dict(old.state_dict(), keep="lr")
    assert new.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_one_cycle_takes_state_dicts_of_torch_2_0(strategy):
    def made(side, value):
        sgd = side.SGD([value], lr=0.1, momentum=0.9)
        return sgd, side.lr_scheduler.OneCycleLR(sgd, max_lr=1.0, total_steps=10, anneal_strategy=strategy)

    optimizer, scheduler = made(torch.optim, torch.ones(2))
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    old = scheduler.state_dict()
    old["anneal_func"] = getattr(scheduler, f"_annealing_{old.pop('_anneal_func_type')}")
    ours, ours_scheduler = made(optim, jnp.ones(2))
    ours_scheduler.load_state_dict(old)
    ours.load_state_dict({"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}, strict=False)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
        ours.step([jnp.ones(2)])
        ours_scheduler.step()
        assert ours_scheduler.get_last_lr() == scheduler.get_last_lr()
    assert "anneal_func" in old


@pytest.mark.parametrize("metric", [np.array([1.0]), np.float32(1), jnp.array([1.0]), torch.tensor([[1.0]])])
def test_the_plateau_takes_arrays_of_one_element(metric):
    scheduler = optim.lr_scheduler.ReduceLROnPlateau(optim.SGD([1.0], lr=0.1))
    scheduler.step(metric)
    assert scheduler.best == 1.0
    assert type(scheduler.best) is float


S = optim.lr_scheduler
CONTINUED = [
    ("StepLR", {"step_size": 3}),
    ("MultiStepLR", {"milestones": [3]}),
    ("ExponentialLR", {"gamma": 0.9}),
    ("ConstantLR", {}),
    ("LinearLR", {}),
    ("PolynomialLR", {}),
    ("CosineAnnealingLR", {"T_max": 20}),
    ("MultiplicativeLR", {"lr_lambda": lambda epoch: 0.9}),
    ("LambdaLR", {"lr_lambda": lambda epoch: 0.9**epoch}),
]


@pytest.mark.parametrize(("name", "options"), CONTINUED, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("is_overridden", [False, True])
def test_continued_schedulers_warn_of_the_wrong_order_as_torch(name, options, is_overridden):
    def run(side, param):
        opt = side.SGD([param], lr=0.05)
        opt.param_groups[0]["initial_lr"] = 0.01
        scheduler = getattr(side.lr_scheduler, name)(opt, last_epoch=10, **options)
        if is_overridden:
            old = opt.step
            opt.step = types.MethodType(lambda self, *args: old(*args), opt)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler.step()
        return [str(warning.message)[:40] for warning in caught]

    ours, theirs = run(optim, optim.Parameter([1.0])), run(torch.optim, torch.ones(1))
    assert ours == theirs
    assert len(ours) == 1


def test_a_continued_swalr_goes_on():
    opt = optim.SGD([1.0], lr=0.1)
    opt.param_groups[0]["initial_lr"] = 0.1
    scheduler = optim.swa_utils.SWALR(opt, 0.5, anneal_epochs=4, anneal_strategy="linear", last_epoch=1)
    opt.step([1.0])
    scheduler.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 + 0.75 * 0.4)
