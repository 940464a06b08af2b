"""torch's optimizers over parameter pytrees: ``from jaxoptim import optim`` in place of ``from torch import optim``."""

from jaxoptim.optim import lr_scheduler as lr_scheduler
from jaxoptim.optim import swa_utils as swa_utils
from jaxoptim.optim.adadelta import Adadelta as Adadelta
from jaxoptim.optim.adafactor import Adafactor as Adafactor
from jaxoptim.optim.adagrad import Adagrad as Adagrad
from jaxoptim.optim.adagrad_rmsprop import AdagradRMSProp as AdagradRMSProp
from jaxoptim.optim.adam import Adam as Adam
from jaxoptim.optim.adamax import Adamax as Adamax
from jaxoptim.optim.adamw import AdamW as AdamW
from jaxoptim.optim.asgd import ASGD as ASGD
from jaxoptim.optim.clipped_adam import ClippedAdam as ClippedAdam
from jaxoptim.optim.dct_adam import DCTAdam as DCTAdam
from jaxoptim.optim.hooks import RemovableHandle as RemovableHandle
from jaxoptim.optim.lbfgs import LBFGS as LBFGS
from jaxoptim.optim.muon import Muon as Muon
from jaxoptim.optim.nadam import NAdam as NAdam
from jaxoptim.optim.optimizer import Optimizer as Optimizer
from jaxoptim.optim.optimizer import register_optimizer_step_post_hook as register_optimizer_step_post_hook
from jaxoptim.optim.optimizer import register_optimizer_step_pre_hook as register_optimizer_step_pre_hook
from jaxoptim.optim.parameter import Parameter as Parameter
from jaxoptim.optim.radam import RAdam as RAdam
from jaxoptim.optim.rmsprop import RMSprop as RMSprop
from jaxoptim.optim.rprop import Rprop as Rprop
from jaxoptim.optim.sgd import SGD as SGD
from jaxoptim.optim.sparse_adam import SparseAdam as SparseAdam
