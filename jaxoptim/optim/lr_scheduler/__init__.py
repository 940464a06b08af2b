"""torch's learning rate schedulers: ``from jaxoptim.optim import lr_scheduler``.

They write ``group["lr"]`` in Python floats, with torch's arithmetic to the last bit. ``jaxoptim.schedules`` has the
same schedules as pure functions of the step.
"""

from jaxoptim.core.names import listing
from jaxoptim.optim.lr_scheduler.base import LRScheduler
from jaxoptim.optim.lr_scheduler.combined import ChainedScheduler, SequentialLR
from jaxoptim.optim.lr_scheduler.cosine import CosineAnnealingLR, CosineAnnealingWarmRestarts
from jaxoptim.optim.lr_scheduler.cycles import CyclicLR, OneCycleLR
from jaxoptim.optim.lr_scheduler.factors import (
    ConstantLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    PolynomialLR,
    StepLR,
)
from jaxoptim.optim.lr_scheduler.plateau import ReduceLROnPlateau

__all__ = [
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
]
__dir__ = listing(__all__)
