"""torch's optimizers, Pyro's optimizer interfaces and posterior samplers, in JAX.

The pure face: every optimizer is a function that returns an optax transformation, built from a rule, the
mathematics of one array. ``jaxoptim.rules`` has the rules, for use with ``init``, ``update`` and ``step``,
``jaxoptim.core`` what a rule of one's own is made of, ``jaxoptim.schedules`` learning rates and ``jaxoptim.averaging``
averages as pure functions. ``jaxoptim.optim`` has the same optimizers as torch-style classes, ``jaxoptim.groups`` lists
of their groups, ``jaxoptim.pyro`` in Pyro's interface, ``jaxoptim.sampling`` chains of samplers,
``jaxoptim.distributed`` state over many devices, ``jaxoptim.checkpoint`` files, and ``jaxoptim.interop`` the way to
torch and back, and to numpyro.

The public names are those that ``dir(jaxoptim)`` shows; ``engine`` and ``native`` are internal.
"""

from jaxoptim import averaging, checkpoint, core, distributed, groups, interop, optim, pyro, rules, sampling, schedules
from jaxoptim.core import (
    Decay,
    LossScale,
    OptState,
    Packed,
    Rule,
    Sampler,
    init,
    pack,
    rule,
    scale_loss,
    step,
    transformation,
    update,
)
from jaxoptim.core.names import listing
from jaxoptim.native import config
from jaxoptim.rules.adadelta import adadelta
from jaxoptim.rules.adafactor import adafactor
from jaxoptim.rules.adagrad import adagrad
from jaxoptim.rules.adagrad_rmsprop import adagrad_rmsprop
from jaxoptim.rules.adam import adam
from jaxoptim.rules.adamax import adamax
from jaxoptim.rules.adamw import adamw
from jaxoptim.rules.asgd import asgd
from jaxoptim.rules.clipped_adam import clipped_adam
from jaxoptim.rules.dct_adam import dct_adam
from jaxoptim.rules.lbfgs import lbfgs
from jaxoptim.rules.muon import muon
from jaxoptim.rules.nadam import nadam
from jaxoptim.rules.newton import newton, newton_step
from jaxoptim.rules.psgld import psgld
from jaxoptim.rules.radam import radam
from jaxoptim.rules.rmsprop import rmsprop
from jaxoptim.rules.rprop import rprop
from jaxoptim.rules.sgd import sgd
from jaxoptim.rules.sghmc import sghmc
from jaxoptim.rules.sgld import sgld
from jaxoptim.rules.sgnht import sgnht
from jaxoptim.rules.sparse_adam import sparse_adam

__all__ = [
    "Decay",
    "LossScale",
    "OptState",
    "Packed",
    "Rule",
    "Sampler",
    "adadelta",
    "adafactor",
    "adagrad",
    "adagrad_rmsprop",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "averaging",
    "checkpoint",
    "clipped_adam",
    "config",
    "core",
    "dct_adam",
    "distributed",
    "groups",
    "init",
    "interop",
    "lbfgs",
    "muon",
    "nadam",
    "newton",
    "newton_step",
    "optim",
    "pack",
    "psgld",
    "pyro",
    "radam",
    "rmsprop",
    "rprop",
    "rule",
    "rules",
    "sampling",
    "scale_loss",
    "schedules",
    "sgd",
    "sghmc",
    "sgld",
    "sgnht",
    "sparse_adam",
    "step",
    "transformation",
    "update",
]
__dir__ = listing(__all__)

__version__ = "0.2.0"
