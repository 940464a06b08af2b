"""torch's optimizers, Pyro's optimizer interfaces and posterior samplers, in JAX.

The pure face: every optimizer is a function that returns an optax transformation, built from a rule, the
mathematics of one array. ``jaxoptim.rules`` has the rules, for use with ``init``, ``update`` and ``step``.
``jaxoptim.optim`` has the same optimizers as torch-style classes, ``jaxoptim.groups`` lists of their groups,
``jaxoptim.pyro`` in Pyro's interface, ``jaxoptim.sampling`` chains of samplers, ``jaxoptim.distributed`` state over
many devices, ``jaxoptim.checkpoint`` files, and ``jaxoptim.interop`` the way to torch and back, and to numpyro.
"""

from jaxoptim import averaging as averaging
from jaxoptim import checkpoint as checkpoint
from jaxoptim import distributed as distributed
from jaxoptim import groups as groups
from jaxoptim import interop as interop
from jaxoptim import optim as optim
from jaxoptim import pyro as pyro
from jaxoptim import rules as rules
from jaxoptim import sampling as sampling
from jaxoptim import schedules as schedules
from jaxoptim.core import Decay as Decay
from jaxoptim.core import LossScale as LossScale
from jaxoptim.core import OptState as OptState
from jaxoptim.core import Packed as Packed
from jaxoptim.core import Rule as Rule
from jaxoptim.core import Sampler as Sampler
from jaxoptim.core import init as init
from jaxoptim.core import pack as pack
from jaxoptim.core import rule as rule
from jaxoptim.core import scale_loss as scale_loss
from jaxoptim.core import step as step
from jaxoptim.core import transformation as transformation
from jaxoptim.core import update as update
from jaxoptim.native import config as config
from jaxoptim.rules.adadelta import adadelta as adadelta
from jaxoptim.rules.adafactor import adafactor as adafactor
from jaxoptim.rules.adagrad import adagrad as adagrad
from jaxoptim.rules.adagrad_rmsprop import adagrad_rmsprop as adagrad_rmsprop
from jaxoptim.rules.adam import adam as adam
from jaxoptim.rules.adamax import adamax as adamax
from jaxoptim.rules.adamw import adamw as adamw
from jaxoptim.rules.asgd import asgd as asgd
from jaxoptim.rules.clipped_adam import clipped_adam as clipped_adam
from jaxoptim.rules.dct_adam import dct_adam as dct_adam
from jaxoptim.rules.lbfgs import lbfgs as lbfgs
from jaxoptim.rules.muon import muon as muon
from jaxoptim.rules.nadam import nadam as nadam
from jaxoptim.rules.newton import newton as newton
from jaxoptim.rules.newton import newton_step as newton_step
from jaxoptim.rules.psgld import psgld as psgld
from jaxoptim.rules.radam import radam as radam
from jaxoptim.rules.rmsprop import rmsprop as rmsprop
from jaxoptim.rules.rprop import rprop as rprop
from jaxoptim.rules.sgd import sgd as sgd
from jaxoptim.rules.sghmc import sghmc as sghmc
from jaxoptim.rules.sgld import sgld as sgld
from jaxoptim.rules.sgnht import sgnht as sgnht
from jaxoptim.rules.sparse_adam import sparse_adam as sparse_adam

__version__ = "0.1.0"
