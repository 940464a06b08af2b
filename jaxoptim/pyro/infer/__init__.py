"""Stochastic variational inference on numpyro's models, with the optimizers of this library."""

from jaxoptim.core.names import listing
from jaxoptim.pyro.infer.differentiable_loss import differentiable_loss
from jaxoptim.pyro.infer.svi import SVI

__all__ = [
    "SVI",
    "differentiable_loss",
]
__dir__ = listing(__all__)
