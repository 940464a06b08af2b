"""The optimizers, one file each: hyperparameters, and the update of one array."""

from jaxoptim.rules.adadelta import Adadelta as Adadelta
from jaxoptim.rules.adafactor import Adafactor as Adafactor
from jaxoptim.rules.adagrad import Adagrad as Adagrad
from jaxoptim.rules.adagrad_rmsprop import AdagradRMSProp as AdagradRMSProp
from jaxoptim.rules.adam import Adam as Adam
from jaxoptim.rules.adamax import Adamax as Adamax
from jaxoptim.rules.adamw import AdamW as AdamW
from jaxoptim.rules.asgd import ASGD as ASGD
from jaxoptim.rules.clipped_adam import ClippedAdam as ClippedAdam
from jaxoptim.rules.dct_adam import DCTAdam as DCTAdam
from jaxoptim.rules.lbfgs import LBFGS as LBFGS
from jaxoptim.rules.muon import Muon as Muon
from jaxoptim.rules.nadam import NAdam as NAdam
from jaxoptim.rules.newton import Newton as Newton
from jaxoptim.rules.psgld import PSGLD as PSGLD
from jaxoptim.rules.radam import RAdam as RAdam
from jaxoptim.rules.rmsprop import RMSprop as RMSprop
from jaxoptim.rules.rprop import Rprop as Rprop
from jaxoptim.rules.sgd import SGD as SGD
from jaxoptim.rules.sghmc import SGHMC as SGHMC
from jaxoptim.rules.sgld import SGLD as SGLD
from jaxoptim.rules.sgnht import SGNHT as SGNHT
from jaxoptim.rules.sparse_adam import SparseAdam as SparseAdam
