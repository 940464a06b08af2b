"""Learning rates as pure functions of the step, one for each of torch's schedulers.

Value ``n`` is torch's rate after ``n`` calls of ``scheduler.step()``. A schedule is what the factories take for
``lr``, and for any other number.
"""

from jaxoptim.schedules.annealing import cosine_annealing_lr as cosine_annealing_lr
from jaxoptim.schedules.annealing import cosine_annealing_warm_restarts as cosine_annealing_warm_restarts
from jaxoptim.schedules.annealing import swa_lr as swa_lr
from jaxoptim.schedules.combined import chained as chained
from jaxoptim.schedules.combined import sequential_lr as sequential_lr
from jaxoptim.schedules.cycles import cyclic_lr as cyclic_lr
from jaxoptim.schedules.cycles import one_cycle_lr as one_cycle_lr
from jaxoptim.schedules.decays import constant_lr as constant_lr
from jaxoptim.schedules.decays import exponential_lr as exponential_lr
from jaxoptim.schedules.decays import lambda_lr as lambda_lr
from jaxoptim.schedules.decays import linear_lr as linear_lr
from jaxoptim.schedules.decays import multi_step_lr as multi_step_lr
from jaxoptim.schedules.decays import multiplicative_lr as multiplicative_lr
from jaxoptim.schedules.decays import polynomial_lr as polynomial_lr
from jaxoptim.schedules.decays import step_lr as step_lr
from jaxoptim.schedules.plateau import Plateau as Plateau
from jaxoptim.schedules.plateau import PlateauState as PlateauState
from jaxoptim.schedules.plateau import reduce_lr_on_plateau as reduce_lr_on_plateau
from jaxoptim.schedules.plotting import plot as plot
from jaxoptim.schedules.schedule import Schedule as Schedule
