"""SGHMC over parameter pytrees."""

from jaxoptim import rules
from jaxoptim.optim.sampler import Sampler


class SGHMC(Sampler):
    """Stochastic gradient Hamiltonian Monte Carlo, computed by :class:`jaxoptim.rules.SGHMC`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> chain = optim.SGHMC({"w": jnp.ones(2)}, lr=1e-3, nbeta=50.0, key=jax.random.key(1))
        >>> chain.step({"w": jnp.ones(2)})
        >>> sorted(chain.state[chain.param_groups[0]["params"][0]])
        ['initial_param', 'momentum']
    """

    rule = rules.SGHMC
