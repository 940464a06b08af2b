"""Posterior samplers: many chains in one compiled program, and local learning coefficients.

:func:`sample` runs chains of a sampler, :func:`estimate_llc` estimates a local learning coefficient, :func:`calibrate`
compares the settings of a sampler, and :func:`llc_over_checkpoints` follows a training.

The public names are those that ``dir(sampling)`` shows; other files of this package are internal.
"""

from jaxoptim.core.names import listing
from jaxoptim.sampling.calibration import Calibration, calibrate
from jaxoptim.sampling.control_variates import ControlVariates
from jaxoptim.sampling.cross_covariance import CrossCovariance
from jaxoptim.sampling.diagnostics import effective_sample_size, mcse, rhat
from jaxoptim.sampling.doubts import LLCWarning
from jaxoptim.sampling.influence import Influence, influence
from jaxoptim.sampling.jackknife import Estimate
from jaxoptim.sampling.llc import LLC, default_nbeta, estimate_llc
from jaxoptim.sampling.llc_over_checkpoints import LLCOverCheckpoints, llc_over_checkpoints
from jaxoptim.sampling.losses import Losses
from jaxoptim.sampling.mala import mala_acceptance
from jaxoptim.sampling.observables import Covariance, Draw, MalaAcceptance, Observable
from jaxoptim.sampling.plateau import Setting
from jaxoptim.sampling.response import Response, SingularVectors
from jaxoptim.sampling.restrictions import preview, slices
from jaxoptim.sampling.sample import Samples, sample
from jaxoptim.sampling.singular import SingularLearning, llc_of_two_temperatures, singular_learning
from jaxoptim.sampling.sketches import Sketch, sketch
from jaxoptim.sampling.susceptibilities import Susceptibilities, susceptibilities
from jaxoptim.sampling.tempering import FreeEnergy, Tempering, parallel_tempering
from jaxoptim.sampling.transformers import restriction

__all__ = [
    "LLC",
    "Calibration",
    "ControlVariates",
    "Covariance",
    "CrossCovariance",
    "Draw",
    "Estimate",
    "FreeEnergy",
    "Influence",
    "LLCOverCheckpoints",
    "LLCWarning",
    "Losses",
    "MalaAcceptance",
    "Observable",
    "Response",
    "Samples",
    "Setting",
    "SingularLearning",
    "SingularVectors",
    "Sketch",
    "Susceptibilities",
    "Tempering",
    "calibrate",
    "default_nbeta",
    "effective_sample_size",
    "estimate_llc",
    "influence",
    "llc_of_two_temperatures",
    "llc_over_checkpoints",
    "mala_acceptance",
    "mcse",
    "parallel_tempering",
    "preview",
    "restriction",
    "rhat",
    "sample",
    "singular_learning",
    "sketch",
    "slices",
    "susceptibilities",
]
__dir__ = listing(__all__)
