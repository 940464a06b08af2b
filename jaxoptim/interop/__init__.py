"""Bridges to other libraries, each of which imports its library when it is used."""

from jaxoptim.interop import numpyro as numpyro
from jaxoptim.interop import torch as torch
