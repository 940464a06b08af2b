"""Posterior samplers: many chains in one compiled program, and local learning coefficients."""

from jaxoptim.sampling.calibration import Calibration as Calibration
from jaxoptim.sampling.calibration import calibrate as calibrate
from jaxoptim.sampling.cross_covariance import CrossCovariance as CrossCovariance
from jaxoptim.sampling.diagnostics import effective_sample_size as effective_sample_size
from jaxoptim.sampling.diagnostics import mcse as mcse
from jaxoptim.sampling.diagnostics import rhat as rhat
from jaxoptim.sampling.doubts import LLCWarning as LLCWarning
from jaxoptim.sampling.influence import Influence as Influence
from jaxoptim.sampling.influence import influence as influence
from jaxoptim.sampling.llc import LLC as LLC
from jaxoptim.sampling.llc import default_nbeta as default_nbeta
from jaxoptim.sampling.llc import estimate_llc as estimate_llc
from jaxoptim.sampling.losses import Losses as Losses
from jaxoptim.sampling.mala import mala_acceptance as mala_acceptance
from jaxoptim.sampling.observables import Covariance as Covariance
from jaxoptim.sampling.observables import Draw as Draw
from jaxoptim.sampling.observables import MalaAcceptance as MalaAcceptance
from jaxoptim.sampling.observables import Observable as Observable
from jaxoptim.sampling.plateau import Setting as Setting
from jaxoptim.sampling.restrictions import slices as slices
from jaxoptim.sampling.sample import Samples as Samples
from jaxoptim.sampling.sample import sample as sample
from jaxoptim.sampling.singular import Estimate as Estimate
from jaxoptim.sampling.singular import SingularLearning as SingularLearning
from jaxoptim.sampling.singular import llc_of_two_temperatures as llc_of_two_temperatures
from jaxoptim.sampling.singular import singular_learning as singular_learning
