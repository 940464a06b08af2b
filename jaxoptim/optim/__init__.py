"""torch's optimizers over parameter pytrees: ``from jaxoptim import optim`` in place of ``from torch import optim``.

Every class takes a pytree of arrays, a module, a list of :class:`Parameter`, or torch's list of group dicts, and steps
by ``step(grads)``, or by ``minimize(loss_fn, *args)``, which finds the gradient itself in one compiled program.
``lr_scheduler`` has torch's schedulers, ``swa_utils`` its averages, ``utils`` the clipping of gradients, ``prior`` the
priors of :class:`SGMCMC`; a subclass of :class:`Optimizer` that names a rule is a new optimizer.

The public names are those that ``dir(optim)`` shows; other files of this package are internal.
"""

from jaxoptim.core.names import listing
from jaxoptim.optim import lr_scheduler, prior, swa_utils, utils
from jaxoptim.optim.classes import (
    ASGD,
    PSGLD,
    SGD,
    SGHMC,
    SGLD,
    SGNHT,
    Adadelta,
    Adafactor,
    Adagrad,
    AdagradRMSProp,
    Adam,
    Adamax,
    AdamW,
    ClippedAdam,
    DCTAdam,
    Muon,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)
from jaxoptim.optim.grad_scaler import GradScaler
from jaxoptim.optim.hooks import RemovableHandle
from jaxoptim.optim.lbfgs import LBFGS
from jaxoptim.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.sampler import Sampler
from jaxoptim.optim.sgmcmc import SGMCMC

__all__ = [
    "ASGD",
    "LBFGS",
    "PSGLD",
    "SGD",
    "SGHMC",
    "SGLD",
    "SGMCMC",
    "SGNHT",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "AdagradRMSProp",
    "Adam",
    "AdamW",
    "Adamax",
    "ClippedAdam",
    "DCTAdam",
    "GradScaler",
    "Muon",
    "NAdam",
    "Optimizer",
    "Parameter",
    "RAdam",
    "RMSprop",
    "RemovableHandle",
    "Rprop",
    "Sampler",
    "SparseAdam",
    "lr_scheduler",
    "prior",
    "register_optimizer_step_post_hook",
    "register_optimizer_step_pre_hook",
    "swa_utils",
    "utils",
]
__dir__ = listing(__all__)
