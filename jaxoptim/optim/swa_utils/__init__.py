"""Averages of the parameters and their learning rate: what ``torch.optim.swa_utils`` is."""

from jaxoptim.optim.swa_utils.averaged_model import AveragedModel as AveragedModel
from jaxoptim.optim.swa_utils.averaged_model import get_ema_avg_fn as get_ema_avg_fn
from jaxoptim.optim.swa_utils.averaged_model import get_ema_multi_avg_fn as get_ema_multi_avg_fn
from jaxoptim.optim.swa_utils.averaged_model import get_swa_avg_fn as get_swa_avg_fn
from jaxoptim.optim.swa_utils.averaged_model import get_swa_multi_avg_fn as get_swa_multi_avg_fn
from jaxoptim.optim.swa_utils.batch_norm import update_bn as update_bn
from jaxoptim.optim.swa_utils.swalr import SWALR as SWALR
