"""Learning rates as pure functions of the step, one for each of torch's schedulers.

Value ``n`` is torch's rate after ``n`` calls of ``scheduler.step()``. A schedule is what the factories take for
``lr``, and for any other number.
"""

from jaxoptim.core.names import listing
from jaxoptim.schedules.annealing import cosine_annealing_lr, cosine_annealing_warm_restarts, swa_lr
from jaxoptim.schedules.combined import chained, sequential_lr
from jaxoptim.schedules.cycles import cyclic_lr, one_cycle_lr
from jaxoptim.schedules.decays import (
    constant_lr,
    exponential_lr,
    lambda_lr,
    linear_lr,
    multi_step_lr,
    multiplicative_lr,
    polynomial_lr,
    step_lr,
)
from jaxoptim.schedules.plateau import Plateau, PlateauState, reduce_lr_on_plateau
from jaxoptim.schedules.plotting import plot
from jaxoptim.schedules.schedule import Schedule

__all__ = [
    "Plateau",
    "PlateauState",
    "Schedule",
    "chained",
    "constant_lr",
    "cosine_annealing_lr",
    "cosine_annealing_warm_restarts",
    "cyclic_lr",
    "exponential_lr",
    "lambda_lr",
    "linear_lr",
    "multi_step_lr",
    "multiplicative_lr",
    "one_cycle_lr",
    "plot",
    "polynomial_lr",
    "reduce_lr_on_plateau",
    "sequential_lr",
    "step_lr",
    "swa_lr",
]
__dir__ = listing(__all__)
