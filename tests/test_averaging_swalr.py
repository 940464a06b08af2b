"""SWALR, over our optimizers and torch's."""

import copy
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from averaging_pairs import theirs
from jaxoptim import optim
from jaxoptim.engine import programs
from jaxoptim.optim.swa_utils import SWALR

pytestmark = pytest.mark.numbers


def pair(lrs=(0.1,), dtype=None):
    """An optimizer of torch and one of ours, with a group for each rate."""
    ours = optim.SGD([{"params": [np.zeros(1)], "lr": lr if dtype is None else jnp.asarray(lr, dtype)} for lr in lrs])
    torchs = torch.optim.SGD(
        [
            {
                "params": [torch.zeros(1, requires_grad=True)],
                "lr": lr if dtype is None else torch.tensor(lr, dtype=torch.float64),
            }
            for lr in lrs
        ]
    )
    for opt in (ours, torchs):
        opt.step([[np.zeros(1)]] * len(lrs)) if opt is ours else opt.step()
    return ours, torchs


def after(opt):
    """A step of the optimizer, which schedulers want to see first."""
    opt.step([[np.zeros(1)] for _ in opt.param_groups]) if isinstance(opt, optim.Optimizer) else opt.step()


def rates(opt):
    return [float(group["lr"]) for group in opt.param_groups]


def same_rates(ours, torchs, schedulers, steps=200):
    for n in range(steps + 1):
        assert rates(ours) == rates(torchs), n
        for scheduler, opt in zip(schedulers, (ours, torchs), strict=True):
            assert scheduler.get_last_lr() == rates(opt)
            if n == 0:
                after(opt)
            scheduler.step()


OPTIONS = [
    {"swa_lr": 0.05},
    {"swa_lr": 0.05, "anneal_strategy": "linear"},
    *({"swa_lr": 0.3, "anneal_epochs": n, "anneal_strategy": s} for n in (0, 1, 2, 7, 300) for s in ("cos", "linear")),
    {"swa_lr": 0.0},
    {"swa_lr": 1e-5, "anneal_epochs": 150},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_rates_are_torchs_exactly(options):
    ours, torchs = pair()
    same_rates(ours, torchs, (SWALR(ours, **options), theirs.SWALR(torchs, **options)))
    assert ours.param_groups[0]["swa_lr"] == torchs.param_groups[0]["swa_lr"]


@settings(max_examples=40, deadline=None)
@given(
    lr=st.floats(1e-8, 1e3),
    swa_lr=st.floats(0, 1e3),
    anneal_epochs=st.integers(0, 60),
    anneal_strategy=st.sampled_from(["cos", "linear"]),
)
def test_any_rates_are_torchs_exactly(lr, **options):
    ours, torchs = pair((lr,))
    same_rates(ours, torchs, (SWALR(ours, **options), theirs.SWALR(torchs, **options)), 70)


@pytest.mark.parametrize("swa_lr", [0.05, [0.05, 0.01, 0.2], (0.0, 1.0, 0.1)], ids=str)
def test_each_group_has_its_rate(swa_lr):
    ours, torchs = pair((0.1, 0.01, 1.0))
    options = {"swa_lr": swa_lr, "anneal_epochs": 30}
    same_rates(ours, torchs, (SWALR(ours, **options), theirs.SWALR(torchs, **options)))
    assert [group["swa_lr"] for group in ours.param_groups] == [group["swa_lr"] for group in torchs.param_groups]


def test_rates_that_are_arrays_stay_arrays(x64):
    ours, torchs = pair((0.1, 0.2), np.float64)
    same_rates(ours, torchs, (SWALR(ours, 0.05), theirs.SWALR(torchs, 0.05)), 20)
    assert all(isinstance(group["lr"], jax.Array) for group in ours.param_groups)


@pytest.mark.parametrize("when", [0, 3, 12])
@pytest.mark.parametrize("anneal_strategy", ["cos", "linear"])
def test_a_change_of_the_rate_by_hand_is_followed_as_in_torch(when, anneal_strategy):
    ours, torchs = pair()
    schedulers = [
        cls(opt, 0.05, anneal_strategy=anneal_strategy) for cls, opt in ((SWALR, ours), (theirs.SWALR, torchs))
    ]
    for opt in (ours, torchs):
        after(opt)
    for n in range(20):
        for scheduler, opt in zip(schedulers, (ours, torchs), strict=True):
            if n == when:
                opt.param_groups[0]["lr"] = 0.7
            if n == when + 2:
                opt.param_groups[0]["swa_lr"] = 0.02
            scheduler.step()
        assert rates(ours) == rates(torchs)


BAD = [
    ({"swa_lr": 0.1, "anneal_strategy": "x"}, "anneal_strategy must be one of 'cos' or 'linear', instead got x"),
    ({"swa_lr": 0.1, "anneal_epochs": -1}, "anneal_epochs must be equal or greater than 0, got -1"),
    ({"swa_lr": 0.1, "anneal_epochs": 1.5}, "anneal_epochs must be equal or greater than 0, got 1.5"),
    (
        {"swa_lr": [0.1, 0.2]},
        "swa_lr must have the same length as optimizer.param_groups. swa_lr has 2 values, param_groups has 1.",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda x: str(x)[:30])
def test_bad_options_raise_what_torch_raises(options, message):
    ours, torchs = pair()
    before = dict(ours.param_groups[0])
    for cls, opt in ((SWALR, ours), (theirs.SWALR, torchs)):
        with pytest.raises(ValueError, match=re.escape(message)):
            cls(opt, **options)
    assert dict(ours.param_groups[0]) == before


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="int is not an Optimizer"):
        SWALR(3, 0.1)
    ours, _ = pair()
    with pytest.raises(KeyError, match="initial_lr"):
        SWALR(ours, 0.1, last_epoch=3)


def test_reading_the_next_rate_is_warned_about():
    for cls, opt in zip((SWALR, theirs.SWALR), pair(), strict=True):
        scheduler = cls(opt, 0.05)
        with pytest.warns(UserWarning, match="please use `get_last_lr") as caught:
            scheduler.get_lr()
        assert caught[0].filename == __file__


@pytest.mark.parametrize("steps", [0, 4, 15])
def test_the_schedulers_state_goes_to_torch_and_back(steps):
    ours, torchs = pair((0.1, 0.3))
    schedulers = [cls(opt, [0.05, 0.01], 9, "linear") for cls, opt in ((SWALR, ours), (theirs.SWALR, torchs))]
    for scheduler, opt in zip(schedulers, (ours, torchs), strict=True):
        after(opt)
        for _ in range(steps):
            scheduler.step()
    saved, torchs_saved = (scheduler.state_dict() for scheduler in schedulers)
    assert saved == torchs_saved
    new_ours, new_torchs = pair((1.0, 1.0))
    new = [SWALR(new_ours, 0.5), theirs.SWALR(new_torchs, 0.5)]
    for opt, source in ((new_ours, torchs), (new_torchs, ours)):
        after(opt)
        for group, other in zip(opt.param_groups, source.param_groups, strict=True):
            group.update({key: other[key] for key in ("lr", "swa_lr", "initial_lr")})
    new[0].load_state_dict(copy.deepcopy(torchs_saved))
    new[1].load_state_dict(copy.deepcopy(saved))
    for _ in range(20):
        for scheduler in (*schedulers, *new):
            scheduler.step()
        assert rates(ours) == rates(torchs) == rates(new_ours) == rates(new_torchs)
    assert new[0].state_dict() == new[1].state_dict() == schedulers[0].state_dict()
    assert pickle.loads(pickle.dumps(saved)) == saved


def test_a_state_dict_is_not_changed_by_loading_it():
    ours, _ = pair()
    scheduler = SWALR(ours, 0.05)
    after(ours)
    saved = scheduler.state_dict()
    kept = copy.deepcopy(saved)
    scheduler.load_state_dict(saved)
    scheduler.step()
    assert saved == kept


def test_a_resumed_scheduler_has_the_rate_of_that_many_steps():
    # torch's is one step behind there.
    ours, _ = pair((0.1, 0.4))
    scheduler, seen = SWALR(ours, 0.05, 6), []
    after(ours)
    for _ in range(10):
        seen.append(rates(ours))
        scheduler.step()
    for last_epoch in (0, 2, 5, 8):
        resumed, _ = pair((1.0, 1.0))
        for group, lr in zip(resumed.param_groups, (0.1, 0.4), strict=True):
            group["initial_lr"] = lr
        other = SWALR(resumed, 0.05, 6, last_epoch=last_epoch)
        after(resumed)
        assert rates(resumed) == seen[last_epoch + 1]
        for n in range(last_epoch + 2, 10):
            other.step()
            assert rates(resumed) == seen[n]


def side_of(opt):
    """The schedulers that belong to an optimizer."""
    return (optim.lr_scheduler, SWALR) if isinstance(opt, optim.Optimizer) else (torch.optim.lr_scheduler, theirs.SWALR)


COMBINED = {
    "second": lambda lib, swa, opt: lib.SequentialLR(
        opt, [lib.ExponentialLR(opt, 0.9), swa(opt, 0.05, 7)], milestones=[20]
    ),
    "first": lambda lib, swa, opt: lib.SequentialLR(
        opt, [swa(opt, 0.05, 7, "linear"), lib.StepLR(opt, 10)], milestones=[30]
    ),
    "after a warmup": lambda lib, swa, opt: lib.SequentialLR(
        opt, [lib.LinearLR(opt), lib.CosineAnnealingLR(opt, 40), swa(opt, 0.03)], milestones=[5, 45]
    ),
    "at once": lambda lib, swa, opt: lib.SequentialLR(opt, [lib.ConstantLR(opt), swa(opt, 0.05)], milestones=[1]),
    "chained": lambda lib, swa, opt: lib.ChainedScheduler([lib.ExponentialLR(opt, 0.99), swa(opt, 0.05, 30)]),
    "chained first": lambda lib, swa, opt: lib.ChainedScheduler([swa(opt, 0.05, 30, "linear"), lib.StepLR(opt, 50)]),
    "twice": lambda lib, swa, opt: lib.ChainedScheduler([swa(opt, 0.05, 30), swa(opt, 0.2, 10)]),
}


@pytest.mark.parametrize("combined", COMBINED)
def test_combinations_have_torchs_rates_exactly(combined):
    ours, torchs = pair((0.1, 0.5))
    schedulers = []
    for opt in (ours, torchs):
        schedulers.append(COMBINED[combined](*side_of(opt), opt))
    same_rates(ours, torchs, schedulers)


@pytest.mark.parametrize("start", [0, 1, 25])
def test_it_takes_over_from_another_scheduler(start):
    # The example of torch's documentation: both exist from the beginning, and one at a time is stepped.
    ours, torchs = pair()
    schedulers = []
    for opt in (ours, torchs):
        lib, swa = side_of(opt)
        first = lib.MultiplicativeLR(opt, lambda epoch: 0.9)
        schedulers.append((first, swa(opt, anneal_strategy="linear", anneal_epochs=20, swa_lr=0.05)))
        after(opt)
    for n in range(60):
        for first, second in schedulers:
            (second if n >= start else first).step()
        assert rates(ours) == rates(torchs)


def test_a_new_rate_compiles_nothing():
    ours, _ = pair()
    scheduler = SWALR(ours, 0.05)
    after(ours)
    before = programs.advance._cache_size()
    for _ in range(12):
        scheduler.step()
        after(ours)
    assert programs.advance._cache_size() == before
