"""The base of every optimizer. Knows no algorithm.

Its public names are what a new rule is written with.
"""

from jaxoptim.core.decay import Decay as Decay
from jaxoptim.core.leaf import check_gradient as check_gradient
from jaxoptim.core.leaf import check_param as check_param
from jaxoptim.core.loss_scale import LossScale as LossScale
from jaxoptim.core.loss_scale import scale_loss as scale_loss
from jaxoptim.core.names import listing
from jaxoptim.core.numerics import as_jax as as_jax
from jaxoptim.core.numerics import from_numbers as from_numbers
from jaxoptim.core.numerics import full_like as full_like
from jaxoptim.core.numerics import owned as owned
from jaxoptim.core.numerics import sqrt
from jaxoptim.core.packing import Packed as Packed
from jaxoptim.core.packing import pack as pack
from jaxoptim.core.rearrangement import Rearrangement as Rearrangement
from jaxoptim.core.rule import Arrays as Arrays
from jaxoptim.core.rule import ArraysByLeaf as ArraysByLeaf
from jaxoptim.core.rule import (
    ClosedDecayRate,
    Coefficient,
    Dampening,
    DecayRate,
    Hyperparameters,
    NonNegative,
    OpenDecayRate,
    OptionalCoefficient,
    OptionalNonNegative,
    Positive,
    Rule,
    Scalar,
    Slots,
    enabled,
    is_known,
    rule,
)
from jaxoptim.core.rule import Numeric as Numeric
from jaxoptim.core.rule import ValuesByLeaf as ValuesByLeaf
from jaxoptim.core.rule import as_pytree as as_pytree
from jaxoptim.core.sampler import Sampler
from jaxoptim.core.signatures import bound as bound
from jaxoptim.core.transform import OptState as OptState
from jaxoptim.core.transform import factory
from jaxoptim.core.transform import init as init
from jaxoptim.core.transform import noise_of_some as noise_of_some
from jaxoptim.core.transform import step as step
from jaxoptim.core.transform import step_and_change as step_and_change
from jaxoptim.core.transform import steps_and_changes as steps_and_changes
from jaxoptim.core.transform import transformation as transformation
from jaxoptim.core.transform import update as update

__all__ = [
    "ClosedDecayRate",
    "Coefficient",
    "Dampening",
    "DecayRate",
    "Hyperparameters",
    "NonNegative",
    "OpenDecayRate",
    "OptionalCoefficient",
    "OptionalNonNegative",
    "Positive",
    "Rule",
    "Sampler",
    "Scalar",
    "Slots",
    "enabled",
    "factory",
    "is_known",
    "rule",
    "sqrt",
]
__dir__ = listing(__all__)
