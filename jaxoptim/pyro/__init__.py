"""Pyro's interfaces: ``from jaxoptim import pyro`` in place of ``import pyro``."""

from jaxoptim.pyro import infer as infer
from jaxoptim.pyro import optim as optim
