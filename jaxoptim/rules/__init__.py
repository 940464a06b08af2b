"""The optimizers, one file each: hyperparameters, and the update of one array."""

from jaxoptim.core.names import listing
from jaxoptim.rules.adadelta import Adadelta
from jaxoptim.rules.adafactor import Adafactor
from jaxoptim.rules.adagrad import Adagrad
from jaxoptim.rules.adagrad_rmsprop import AdagradRMSProp
from jaxoptim.rules.adam import Adam
from jaxoptim.rules.adamax import Adamax
from jaxoptim.rules.adamw import AdamW
from jaxoptim.rules.asgd import ASGD
from jaxoptim.rules.clipped_adam import ClippedAdam
from jaxoptim.rules.dct_adam import DCTAdam
from jaxoptim.rules.lbfgs import LBFGS
from jaxoptim.rules.muon import Muon
from jaxoptim.rules.nadam import NAdam
from jaxoptim.rules.newton import Newton
from jaxoptim.rules.psgld import PSGLD
from jaxoptim.rules.radam import RAdam
from jaxoptim.rules.rmsprop import RMSprop
from jaxoptim.rules.rprop import Rprop
from jaxoptim.rules.sgd import SGD
from jaxoptim.rules.sghmc import SGHMC
from jaxoptim.rules.sgld import SGLD
from jaxoptim.rules.sgnht import SGNHT
from jaxoptim.rules.sparse_adam import SparseAdam

__all__ = [
    "ASGD",
    "LBFGS",
    "PSGLD",
    "SGD",
    "SGHMC",
    "SGLD",
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
    "Muon",
    "NAdam",
    "Newton",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
]
__dir__ = listing(__all__)
