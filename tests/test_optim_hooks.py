"""The hooks of an optimizer, and optimizers of a rule of one's own."""

import contextlib
import copy
import doctest
import inspect
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxoptim import optim, rules
from jaxoptim.core import NonNegative, Rule, rule
from optim_sides import OURS, Ours, Theirs, example_of
from table import ROWS

pytestmark = pytest.mark.usefixtures("x64")


# Hooks.


def logged(side: Any, use: Any) -> list[str]:
    """What the hooks of one program write down."""
    log: list[str] = []
    param = side.param([1.0])
    opt = side.optim.SGD([param], lr=0.1)
    param.grad = side.array([1.0])
    with contextlib.ExitStack() as stack:
        use(side, opt, param, log, stack)
    return log


def agree(use: Any) -> list[str]:
    ours, theirs = logged(Ours, use), logged(Theirs, use)
    assert ours == theirs
    assert ours
    return ours


def test_step_hooks_run_in_torchs_order_with_torchs_arguments():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        def hook(name: str) -> Any:
            def run(optimizer: Any, args: Any, kwargs: Any) -> None:
                value = float(side.numpy(param)[0])
                log.append((name, optimizer is opt, args[0] is opt, len(args), sorted(kwargs), value))

            return run

        opt.register_step_post_hook(hook("post"))
        opt.register_step_pre_hook(hook("pre"))
        opt.register_step_pre_hook(hook("second pre"))
        opt.register_step_post_hook(hook("second post"))
        stack.enter_context(side.base.register_optimizer_step_pre_hook(hook("global pre")))
        stack.enter_context(side.base.register_optimizer_step_post_hook(hook("global post")))
        opt.step()
        opt.step(lambda: None)
        opt.step(closure=lambda: None)

    log = agree(use)
    assert [entry[0] for entry in log[:6]] == ["global pre", "pre", "second pre", "post", "second post", "global post"]
    assert optim.register_optimizer_step_pre_hook is optim.optimizer.register_optimizer_step_pre_hook
    assert optim.register_optimizer_step_post_hook is optim.optimizer.register_optimizer_step_post_hook


def test_global_hooks_run_for_every_optimizer_until_removed():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        handle = side.base.register_optimizer_step_pre_hook(
            lambda optimizer, args, kwargs: log.append(type(optimizer).__name__)
        )
        opt.step()
        side.optim.Adam([param]).step()
        handle.remove()
        handle.remove()
        opt.step()

    assert agree(use) == ["SGD", "Adam"]


def test_a_pre_hook_can_replace_the_arguments():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        def closure(name: str) -> Any:
            return lambda: log.append(name) or name

        opt.register_step_pre_hook(lambda o, args, kwargs: ((o, closure("replaced")), {}))
        opt.register_step_pre_hook(lambda o, args, kwargs: log.append(len(args)))
        opt.register_step_post_hook(lambda o, args, kwargs: log.append((len(args), kwargs)))
        log.append(opt.step(closure("given")))
        log.append(opt.step(closure=closure("given")))

    assert agree(use) == [2, "replaced", (2, {}), "replaced"] * 2


def test_a_pre_hook_that_returns_anything_else_is_an_error():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        for wrong in (3, (1, 2, 3), [(), {}], ()):
            with opt.register_step_pre_hook(lambda *args, wrong=wrong: wrong), pytest.raises(RuntimeError) as error:
                opt.step()
            log.append(str(error.value).partition(" must ")[2])
        log.append(float(side.numpy(param)[0]))
        opt.step()  # the failure is over
        log.append(float(side.numpy(param)[0]))

    assert agree(use)[0] == "return None or a tuple of (new_args, new_kwargs), but got 3."


@pytest.mark.parametrize("fails", ["hook", "step"])
def test_hooks_run_again_after_a_failure(fails):
    log = []
    opt = optim.SGD([1.0])

    def hook(*args: Any) -> None:
        log.append("pre")
        if fails == "hook" and len(log) == 1:
            raise ZeroDivisionError

    opt.register_step_pre_hook(hook)
    opt.register_step_post_hook(lambda *args: log.append("post"))
    with pytest.raises((ZeroDivisionError, ValueError)):
        opt.step([1.0, 2.0] if fails == "step" else [1.0])
    opt.step([1.0])
    assert log == ["pre", "pre", "post"]


def test_handles_remove_their_hook():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        first = opt.register_step_pre_hook(lambda *args: log.append("first"))
        second = opt.register_step_pre_hook(lambda *args: log.append("second"))
        log.append((type(first.id), first.id != second.id))
        first.remove()
        opt.step()
        with opt.register_step_post_hook(lambda *args: log.append("inside")) as handle:
            assert hasattr(handle, "remove")
            opt.step()
        opt.step()
        second.remove()
        second.remove()
        opt.step()

    assert agree(use)[1:] == ["second", "second", "inside", "second"]


def test_state_dict_hooks_run_in_torchs_order():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        def saving(name: str) -> Any:
            return lambda optimizer: log.append((name, optimizer is opt))

        def saved(name: str) -> Any:
            return lambda optimizer, sd: log.append((name, optimizer is opt, sorted(sd)))

        opt.register_state_dict_pre_hook(saving("pre"))
        opt.register_state_dict_pre_hook(saving("prepended pre"), prepend=True)
        opt.register_state_dict_post_hook(saved("post"))
        opt.register_state_dict_post_hook(saved("prepended post"), prepend=True)
        opt.register_load_state_dict_pre_hook(saved("load pre"))
        opt.register_load_state_dict_pre_hook(saved("prepended load pre"), prepend=True)
        opt.register_load_state_dict_post_hook(saving("load post"))
        handle = opt.register_load_state_dict_post_hook(saving("prepended load post"), prepend=True)
        opt.load_state_dict(opt.state_dict())
        handle.remove()
        opt.load_state_dict(opt.state_dict())

    log = agree(use)
    assert [entry[0] for entry in log[:4]] == ["prepended pre", "pre", "prepended post", "post"]
    assert [entry[0] for entry in log[4:8]] == ["prepended load pre", "load pre", "prepended load post", "load post"]
    assert len(log) == 8 + 7


def test_state_dict_hooks_may_change_or_replace_the_dict():
    def use(side: Any, opt: Any, param: Any, log: Any, stack: Any) -> None:
        opt.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(saved=True))
        with opt.register_state_dict_post_hook(lambda o, sd: sd.update(extra=1)):
            log.append(sorted(opt.state_dict()))
        with opt.register_state_dict_post_hook(lambda o, sd: {"inner": sd}):
            opt.register_state_dict_post_hook(lambda o, sd: log.append(sorted(sd)))
            log.append(sorted(opt.state_dict()))
        sd = opt.state_dict()
        log.append(sd["param_groups"][0]["saved"])

        def double(optimizer: Any, state_dict: Any) -> Any:
            groups = [{**group, "lr": 2 * group["lr"]} for group in state_dict["param_groups"]]
            return {**state_dict, "param_groups": groups}

        opt.register_load_state_dict_pre_hook(lambda o, d: d.pop("noise", None) and None)
        opt.register_load_state_dict_pre_hook(double)
        given = {**sd, "noise": 1}
        opt.load_state_dict(given)
        log.append((sorted(given), opt.param_groups[0]["lr"], sd["param_groups"][0]["lr"]))

    assert agree(use)[-1] == (["noise", "param_groups", "state"], 0.2, 0.1)


def test_hooks_are_not_pickled_or_copied():
    def program(side: Any) -> list[int]:
        param = side.param([1.0])
        param.grad = side.array([1.0])
        opt = side.optim.SGD([param])
        calls: list[int] = []
        opt.register_step_pre_hook(lambda *args: calls.append(0))
        opt.register_state_dict_post_hook(lambda *args: calls.append(1))
        for twin in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
            twin.step()
            twin.state_dict()
            twin.register_step_post_hook(lambda *args: calls.append(2))
            twin.step()
        assert calls == [2, 2]
        opt.step()
        opt.state_dict()
        return calls

    assert program(Ours) == program(Theirs) == [2, 2, 0, 1]


def test_a_step_within_a_step_of_a_subclass_fires_the_hooks_once():
    class Loud(optim.SGD):
        def step(self, grads: Any = None, closure: Any = None) -> Any:
            log.append("before")
            super().step(grads, closure)
            log.append("after")

        def minimize(self, *args: Any, **kwargs: Any) -> Any:
            return super().minimize(*args, **kwargs)

    log: list[str] = []
    opt = Loud([1.0], lr=0.1)
    opt.register_step_pre_hook(lambda o, args, kwargs: log.append("pre"))
    opt.register_step_post_hook(lambda o, args, kwargs: log.append("post"))
    opt.step([1.0])
    assert log == ["pre", "before", "after", "post"]
    opt.minimize(sum)
    assert log[4:] == ["pre", "post"]
    assert repr(opt).startswith("Loud (")


def test_hooks_run_around_minimize_too():
    opt, log = optim.SGD({"w": 1.0}, lr=0.1), []
    opt.register_step_pre_hook(lambda o, args, kwargs: log.append((args[0] is o, args[2:], kwargs)))
    opt.register_step_post_hook(lambda o, args, kwargs: log.append(float(o.params["w"])))
    opt.minimize(lambda params, x: (params["w"] * x, x), 2.0, has_aux=True)
    assert log == [(True, (2.0,), {"has_aux": True}), pytest.approx(0.8)]


# A rule of one's own.


@rule
class SignDescent(Rule):
    r"""Descent by signs.

    .. math::
        \theta_t = \theta_{t-1} - \eta\,\mathrm{sign}(g_t)

    Args:
        lr: learning rate.
        boost: factor of the first step (default 1).
    """

    lr: NonNegative
    boost: NonNegative = 1.0

    def init(self, param: jax.Array) -> dict[str, Any]:
        return {"count": jnp.zeros(())}

    def update(self, grad: jax.Array, slots: dict[str, Any], param: Any, step: jax.Array) -> Any:
        rate = jnp.where(step == 1, self.boost * self.lr, self.lr)
        return -rate * jnp.sign(grad), {"count": slots["count"] + 1}


class Mine(optim.Optimizer):
    rule = SignDescent


class Documented(optim.Optimizer):
    """Mine, with a text.

    Examples:
        >>> opt = Documented([1.0], 0.5)
        >>> opt.step([1.0])
        >>> opt.params[0].tolist()
        0.5
    """

    rule = SignDescent


class Derived(Mine):
    pass


def test_a_rule_of_ones_own_is_one_line():
    parameters = inspect.signature(Mine).parameters
    assert list(parameters) == ["params", "lr", "boost", *OURS]
    assert parameters["lr"].default is inspect.Parameter.empty
    assert parameters["boost"].default == 1.0
    assert parameters["groups"].kind is inspect.Parameter.KEYWORD_ONLY
    opt = Mine({"w": np.ones(2), "b": np.ones(1)}, 0.25, groups=[("b", {"lr": 0.5})])
    assert opt.defaults == {"lr": 0.25, "boost": 1.0}
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.25]
    opt.step({"w": jnp.array([3.0, -3.0]), "b": jnp.array([1.0])})
    assert opt.params["w"].tolist() == [0.75, 1.25]
    assert opt.params["b"].tolist() == [0.5]
    assert [dict(slots) for slots in opt.state.values()] == [{"step": 1, "count": 1}] * 2
    twin = pickle.loads(pickle.dumps(opt))
    twin.step({"w": jnp.array([3.0, -3.0]), "b": None})
    assert twin.params["w"].tolist() == [0.5, 1.5]
    assert repr(opt).startswith("Mine (\nParameter Group 0\n    boost: 1.0\n    lr: 0.5\n")
    for wrong in ({}, {"lr": 0.1, "rate": 1}):
        with pytest.raises(TypeError, match=r"Mine\(\).*After params it takes lr, boost, groups, frozen, "):
            Mine([1.0], **wrong)
    with pytest.raises(ValueError, match="Invalid boost: -1"):
        Mine([1.0], 0.1, boost=-1)
    assert Derived([1.0], lr=0.5).rule is SignDescent
    assert list(inspect.signature(Derived).parameters) == ["params", "lr", "boost", *OURS]


def test_a_rule_of_ones_own_is_documented():
    for cls, first in ((Mine, "The torch-style optimizer of"), (Documented, "Mine, with a text.")):
        doc = inspect.getdoc(cls)
        assert doc.startswith(first)
        assert r"\theta_t = \theta_{t-1} - \eta\,\mathrm{sign}(g_t)" in doc
        assert "Args:\n    params: see :class:`Optimizer`.\n    lr: learning rate.\n" in doc
    example = example_of(Documented)
    assert len(example.examples) == 3
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_base_class_needs_a_rule():
    with pytest.raises(TypeError, match="Optimizer has no rule"):
        optim.Optimizer([1.0], {})


def test_all_classes_are_there():
    names = set(torch.optim.__all__) - {"lr_scheduler", "swa_utils", "swap_in_optimizer_params_and_state"}
    ours = {name for name in names if hasattr(optim, name)}
    assert names - ours <= {"LBFGS"}
    assert {"AdagradRMSProp", "ClippedAdam", "DCTAdam", "Parameter", "RemovableHandle"} <= set(vars(optim))
    assert {cls.rule for cls in vars(optim).values() if isinstance(cls, type) and hasattr(cls, "rule")} >= {
        getattr(rules, row.name) for row in ROWS
    }
