"""torch's learning rate schedulers: ``from jaxoptim.optim import lr_scheduler``.

They write ``group["lr"]`` in Python floats, with torch's arithmetic to the last bit. ``jaxoptim.schedules`` has the
same schedules as pure functions of the step.
"""

from jaxoptim.optim.lr_scheduler.base import LRScheduler as LRScheduler
from jaxoptim.optim.lr_scheduler.combined import ChainedScheduler as ChainedScheduler
from jaxoptim.optim.lr_scheduler.combined import SequentialLR as SequentialLR
from jaxoptim.optim.lr_scheduler.cosine import CosineAnnealingLR as CosineAnnealingLR
from jaxoptim.optim.lr_scheduler.cosine import CosineAnnealingWarmRestarts as CosineAnnealingWarmRestarts
from jaxoptim.optim.lr_scheduler.cycles import CyclicLR as CyclicLR
from jaxoptim.optim.lr_scheduler.cycles import OneCycleLR as OneCycleLR
from jaxoptim.optim.lr_scheduler.factors import ConstantLR as ConstantLR
from jaxoptim.optim.lr_scheduler.factors import ExponentialLR as ExponentialLR
from jaxoptim.optim.lr_scheduler.factors import LambdaLR as LambdaLR
from jaxoptim.optim.lr_scheduler.factors import LinearLR as LinearLR
from jaxoptim.optim.lr_scheduler.factors import MultiplicativeLR as MultiplicativeLR
from jaxoptim.optim.lr_scheduler.factors import MultiStepLR as MultiStepLR
from jaxoptim.optim.lr_scheduler.factors import PolynomialLR as PolynomialLR
from jaxoptim.optim.lr_scheduler.factors import StepLR as StepLR
from jaxoptim.optim.lr_scheduler.plateau import ReduceLROnPlateau as ReduceLROnPlateau
