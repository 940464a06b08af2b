"""Posterior samplers: many chains in one compiled program, and local learning coefficients."""

from jaxoptim.sampling.calibration import Calibration as Calibration
from jaxoptim.sampling.calibration import calibrate as calibrate
from jaxoptim.sampling.diagnostics import effective_sample_size as effective_sample_size
from jaxoptim.sampling.diagnostics import mcse as mcse
from jaxoptim.sampling.diagnostics import rhat as rhat
from jaxoptim.sampling.doubts import LLCWarning as LLCWarning
from jaxoptim.sampling.llc import LLC as LLC
from jaxoptim.sampling.llc import default_nbeta as default_nbeta
from jaxoptim.sampling.llc import estimate_llc as estimate_llc
from jaxoptim.sampling.mala import mala_acceptance as mala_acceptance
from jaxoptim.sampling.observables import Covariance as Covariance
from jaxoptim.sampling.observables import Draw as Draw
from jaxoptim.sampling.observables import MalaAcceptance as MalaAcceptance
from jaxoptim.sampling.observables import Observable as Observable
from jaxoptim.sampling.sample import Samples as Samples
from jaxoptim.sampling.sample import sample as sample
