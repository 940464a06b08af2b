"""The optimizers and schedulers of torch and Pyro for parameters that are met while the program runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxoptim import optim
from jaxoptim.optim import lr_scheduler
from jaxoptim.pyro.optim.lr_scheduler import PyroLRScheduler
from jaxoptim.pyro.optim.optim import OptimArgs, PyroOptim


def _optimizer(cls: type[optim.Optimizer]) -> Callable[..., PyroOptim]:
    """The function that makes a :class:`PyroOptim` of a class."""

    def wrapper(optim_args: OptimArgs, clip_args: OptimArgs | None = None) -> PyroOptim:
        return PyroOptim(cls, optim_args, clip_args)

    return _named(wrapper, cls, PyroOptim, f"See :class:`PyroOptim`.\n\n    >>> optimizer = {cls.__name__}({{}})")


def _scheduler(cls: type[lr_scheduler.LRScheduler]) -> Callable[..., PyroLRScheduler]:
    """The function that makes a :class:`PyroLRScheduler` of a class."""

    def wrapper(optim_args: Mapping[str, Any], clip_args: OptimArgs | None = None) -> PyroLRScheduler:
        return PyroLRScheduler(cls, optim_args, clip_args)

    return _named(wrapper, cls, PyroLRScheduler, "See :class:`PyroLRScheduler`.")


def _named(wrapper: Callable[..., Any], cls: type, made: type, example: str) -> Callable[..., Any]:
    wrapper.__name__ = wrapper.__qualname__ = cls.__name__
    what = "options" if made is PyroOptim else "'optimizer', 'optim_args' and its options"
    wrapper.__doc__ = f"""``{cls.__name__}`` for parameters that are met while the program runs.

The mathematics and the options are those of :class:`{cls.__module__}.{cls.__name__}`.

Args:
    optim_args: {what}; see :class:`{made.__name__}`.
    clip_args: how gradients are clipped (default None: not at all).

Returns:
    A :class:`{made.__name__}`.

Raises:
    Those of :class:`{made.__name__}`.

Examples:
    {example}
"""
    return wrapper


Adadelta = _optimizer(optim.Adadelta)
Adafactor = _optimizer(optim.Adafactor)
Adagrad = _optimizer(optim.Adagrad)
AdagradRMSProp = _optimizer(optim.AdagradRMSProp)
Adam = _optimizer(optim.Adam)
Adamax = _optimizer(optim.Adamax)
AdamW = _optimizer(optim.AdamW)
ASGD = _optimizer(optim.ASGD)
ClippedAdam = _optimizer(optim.ClippedAdam)
DCTAdam = _optimizer(optim.DCTAdam)
Muon = _optimizer(optim.Muon)
NAdam = _optimizer(optim.NAdam)
RAdam = _optimizer(optim.RAdam)
RMSprop = _optimizer(optim.RMSprop)
Rprop = _optimizer(optim.Rprop)
SGD = _optimizer(optim.SGD)
SparseAdam = _optimizer(optim.SparseAdam)

ChainedScheduler = _scheduler(lr_scheduler.ChainedScheduler)
ConstantLR = _scheduler(lr_scheduler.ConstantLR)
CosineAnnealingLR = _scheduler(lr_scheduler.CosineAnnealingLR)
CosineAnnealingWarmRestarts = _scheduler(lr_scheduler.CosineAnnealingWarmRestarts)
CyclicLR = _scheduler(lr_scheduler.CyclicLR)
ExponentialLR = _scheduler(lr_scheduler.ExponentialLR)
LambdaLR = _scheduler(lr_scheduler.LambdaLR)
LinearLR = _scheduler(lr_scheduler.LinearLR)
LRScheduler = _scheduler(lr_scheduler.LRScheduler)
_LRScheduler = LRScheduler
MultiplicativeLR = _scheduler(lr_scheduler.MultiplicativeLR)
MultiStepLR = _scheduler(lr_scheduler.MultiStepLR)
OneCycleLR = _scheduler(lr_scheduler.OneCycleLR)
PolynomialLR = _scheduler(lr_scheduler.PolynomialLR)
ReduceLROnPlateau = _scheduler(lr_scheduler.ReduceLROnPlateau)
SequentialLR = _scheduler(lr_scheduler.SequentialLR)
StepLR = _scheduler(lr_scheduler.StepLR)
