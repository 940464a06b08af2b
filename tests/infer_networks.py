"""Networks of the models that tests of variational inference fit."""

from flax import linen as nn


class Normalised(nn.Module):
    """A network whose batch normalization keeps statistics."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, use_bias=False)(x)  # the gradient of a bias would be rounding, which Adam makes steps of
        return nn.Dense(1)(nn.BatchNorm(use_running_average=False, momentum=0.5)(x))[..., 0]
