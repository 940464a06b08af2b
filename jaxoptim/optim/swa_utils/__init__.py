"""Averages of the parameters and their learning rate, as ``torch.optim.swa_utils``."""

from jaxoptim.core.names import listing
from jaxoptim.optim.swa_utils.averaged_model import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)
from jaxoptim.optim.swa_utils.batch_norm import update_bn
from jaxoptim.optim.swa_utils.swalr import SWALR

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]
__dir__ = listing(__all__)
