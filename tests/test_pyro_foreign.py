"""An optimizer of torch, Pyro or numpyro in the place of one of ours: the message names ours, which is there."""

import functools
import re
import subprocess
import sys

import jax.numpy as jnp
import numpyro.infer
import optax
import pyro
import pyro.infer
import pytest
import torch
from numpyro import optim as numpyros
from pyro import optim as pyros
from torch.optim import lr_scheduler as schedules

import jaxoptim
import jaxoptim.pyro
from jaxoptim import rules
from jaxoptim.interop.numpyro import to_numpyro
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim
from jaxoptim.pyro.infer import SVI, differentiable_loss
from jaxoptim.pyro.optim import multi

WEIGHTS = [torch.nn.Parameter(torch.ones(2))]
OF_SCHEDULE = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.1}

SGD = torch.optim.SGD(WEIGHTS)


def nothing(*args):
    pass


class Own(torch.optim.Optimizer):
    """An optimizer that only its author has."""

    def __init__(self, params=WEIGHTS):
        super().__init__(params, {})


class OwnAdam(torch.optim.Adam):
    pass


def message(run):
    """The one line of an error; every name of ours that it tells to take exists."""
    with pytest.raises(TypeError) as error:
        run()
    text = str(error.value)
    assert "\n" not in text
    assert len(text) <= 300
    for path in re.findall(r"jaxoptim[\w.]+\w", text.partition(" Take ")[2]):
        functools.reduce(getattr, path.split(".")[1:], jaxoptim)
    return text


def taken(run):
    """What to take, by a message."""
    return re.search(r"Take (.*)\.$", message(run)).group(1)


PYROS_ADAM = "jaxoptim.pyro.optim.Adam({'lr': ...})"
A_FUNCTION = "lambda params: jaxoptim.optim.Adam(params, lr=...)"
TORCHS_ADAM = f"{PYROS_ADAM}, or {A_FUNCTION}"
OTHERWISE = "one of jaxoptim.pyro.optim, such as Adam({'lr': ...}), a rule or an optax transformation"
A_SCHEDULE = "{'optimizer': jaxoptim.optim.Adam, 'optim_args': {'lr': ...}, ...}"
WITH_MOMENTUM = "({'lr': ..., 'momentum': ...})"
OF_SVI = {
    "torch class": (lambda: torch.optim.Adam, TORCHS_ADAM),
    "torch instance": (lambda: torch.optim.Adam(WEIGHTS), TORCHS_ADAM),
    "torch partial": (lambda: functools.partial(torch.optim.Adam, lr=0.1), TORCHS_ADAM),
    "torch dict": (lambda: OF_SCHEDULE, TORCHS_ADAM),
    "torch subclass": (lambda: OwnAdam, TORCHS_ADAM),
    "torch own": (Own, OTHERWISE),
    "torch lbfgs": (
        lambda: torch.optim.LBFGS,
        "jaxoptim.rules.LBFGS(...), or lambda params: jaxoptim.optim.LBFGS(params, lr=...)",
    ),
    "torch schedule": (
        lambda: schedules.StepLR(SGD, 1),
        f"jaxoptim.pyro.optim.StepLR({A_SCHEDULE})",
    ),
    "pyro instance": (lambda: pyros.Adam({"lr": 0.1}), PYROS_ADAM),
    "pyro function": (lambda: pyros.Adam, PYROS_ADAM),
    "pyro's own": (lambda: pyros.ClippedAdam({}), "jaxoptim.pyro.optim.ClippedAdam({'lr': ...})"),
    "pyro class": (lambda: pyros.clipped_adam.ClippedAdam, "jaxoptim.pyro.optim.ClippedAdam({'lr': ...})"),
    "pyro schedule": (
        lambda: pyros.ExponentialLR(dict(OF_SCHEDULE)),
        f"jaxoptim.pyro.optim.ExponentialLR({A_SCHEDULE})",
    ),
    "pyro function of one's own": (lambda: pyros.PyroOptim(nothing, {}), "jaxoptim.pyro.optim.PyroOptim(...)"),
    "pyro multi": (pyros.multi.Newton, "jaxoptim.pyro.optim.multi.Newton"),
    "numpyro instance": (lambda: numpyros.Adam(0.1), f"{PYROS_ADAM}, or an optax transformation"),
    "numpyro class": (lambda: numpyros.Adam, f"{PYROS_ADAM}, or an optax transformation"),
    "numpyro of another name": (
        lambda: numpyros.Momentum(0.1, 0.9),
        f"jaxoptim.pyro.optim.SGD{WITH_MOMENTUM}, or an optax transformation",
    ),
    "numpyro bfgs": (numpyros.Minimize, "jaxoptim.rules.LBFGS(...), or an optax transformation"),
    "numpyro alone": (lambda: numpyros.SM3(0.1), "an optax transformation"),
    "numpyro of optax": (lambda: numpyros.optax_to_numpyro(optax.adam(0.1)), "an optax transformation"),
    "numpyro of ours": (lambda: to_numpyro(rules.Adam()), "an optax transformation"),
}


@pytest.mark.parametrize("case", OF_SVI)
def test_given_to_svi(case):
    make, ours = OF_SVI[case]
    optimizer = make()
    assert taken(lambda: SVI(nothing, nothing, optimizer, numpyro.infer.Trace_ELBO())) == ours
    assert taken(lambda: multi.as_multi_optimizer(optimizer)) == ours


def test_what_was_given_is_named():
    text = message(lambda: multi.as_multi_optimizer(pyros.Adam({"lr": 0.1})))
    assert text == f"The optimizer is pyro.optim.Adam(...), which works on tensors of torch. Take {PYROS_ADAM}."
    text = message(lambda: multi.as_multi_optimizer(numpyros.SM3))
    assert text.startswith("The optimizer is numpyro.optim.SM3, which is for numpyro.infer.SVI.")
    assert f"is {__name__}.Own(...), which" in message(lambda: multi.as_multi_optimizer(Own()))


MULTI = {
    "torch part": (lambda: multi.MixedMultiOptimizer([(["x"], torch.optim.Adam)]), PYROS_ADAM),
    "pyro part": (lambda: multi.MixedMultiOptimizer([(["x"], pyros.Adam({}))]), PYROS_ADAM),
    "numpyro part": (
        lambda: multi.MixedMultiOptimizer([(["x"], numpyros.Adam(0.1))]),
        f"{PYROS_ADAM}, or an optax transformation",
    ),
    "pyro in PyroMultiOptimizer": (lambda: multi.PyroMultiOptimizer(pyros.Adam({})), PYROS_ADAM),
    "numpyro in PyroMultiOptimizer": (lambda: multi.PyroMultiOptimizer(numpyros.Adam(0.1)), PYROS_ADAM),
    "torch in TorchMultiOptimizer": (lambda: multi.TorchMultiOptimizer(torch.optim.Adam, {}), "jaxoptim.optim.Adam"),
    "pyro in HorovodOptimizer": (lambda: optim.HorovodOptimizer(pyros.Adam({})), PYROS_ADAM),
}


@pytest.mark.parametrize("case", MULTI)
def test_given_to_an_optimizer(case):
    run, ours = MULTI[case]
    assert taken(run) == ours


CONSTRUCTORS = {
    "torch": (torch.optim.Adam, "jaxoptim.optim.Adam"),
    "torch lbfgs": (torch.optim.LBFGS, "a class of jaxoptim.optim other than LBFGS, such as Adam"),
    "torch own": (Own, "a class of jaxoptim.optim other than LBFGS, such as Adam"),
    "pyro": (pyros.ClippedAdam, "jaxoptim.optim.ClippedAdam"),
    "numpyro": (numpyros.RMSProp, "jaxoptim.optim.RMSprop"),
}


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_given_as_a_class(case):
    given, ours = CONSTRUCTORS[case]
    assert taken(lambda: optim.PyroOptim(given, {})) == ours
    options = OF_SCHEDULE | {"optimizer": given}
    assert taken(lambda: optim.ExponentialLR(options)) == ours
    text = message(lambda: optim.PyroLRScheduler(jaxoptim.optim.lr_scheduler.ExponentialLR, options))
    assert text.startswith("The 'optimizer' of optim_args is ")
    assert options["optimizer"] is given


@pytest.mark.parametrize("given", [schedules.ExponentialLR, pyros.ExponentialLR], ids=["torch", "pyro"])
def test_a_schedule_as_a_class(given):
    options = OF_SCHEDULE | {"optimizer": jaxoptim.optim.Adam}
    assert taken(lambda: optim.PyroLRScheduler(given, options)) == "jaxoptim.optim.lr_scheduler.ExponentialLR"


def test_made_by_a_function():
    params = {"x": Parameter(1.0, "x")}
    optimizer = multi.as_multi_optimizer(lambda params: pyros.Adam({}))
    assert taken(lambda: optimizer.step(lambda values: values["x"], params)) == PYROS_ADAM
    assert params["x"].value == 1.0


LOSSES = {
    "instance": (pyro.infer.Trace_ELBO, "numpyro.infer.Trace_ELBO(),"),
    "class": (lambda: pyro.infer.TraceMeanField_ELBO, "numpyro.infer.TraceMeanField_ELBO(),"),
    "compiled": (pyro.infer.JitTraceGraph_ELBO, "numpyro.infer.TraceGraph_ELBO(),"),
    "method": (lambda: pyro.infer.Trace_ELBO().differentiable_loss, "numpyro.infer.Trace_ELBO(),"),
    "no counterpart": (pyro.infer.TraceTailAdaptive_ELBO, "an ELBO of numpyro, such as numpyro.infer.Trace_ELBO(),"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_of_pyro(case):
    make, ours = LOSSES[case]
    for run in (
        lambda: SVI(nothing, nothing, rules.Adam(), make()),
        lambda: differentiable_loss(nothing, nothing, make(), jnp.zeros(2, jnp.uint32)),
    ):
        text = message(run)
        assert text.startswith("The loss is pyro.infer.")
        assert f"which works on tensors of torch. Give {ours} and a model and a guide of numpyro." in text


@pytest.mark.slow
def test_nobody_imports_the_other_libraries():
    code = (
        "import sys; from jaxoptim.pyro.optim.multi import as_multi_optimizer as check; from jaxoptim import rules; "
        "check(rules.Adam()), check(lambda params: None); "
        "sys.exit(', '.join({'torch', 'pyro', 'numpyro'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
