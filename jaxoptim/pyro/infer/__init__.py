"""Stochastic variational inference on numpyro's models, with the optimizers of this library."""

from jaxoptim.pyro.infer.differentiable_loss import differentiable_loss as differentiable_loss
from jaxoptim.pyro.infer.svi import SVI as SVI
