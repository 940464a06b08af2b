"""pSGLD over parameter pytrees."""

from jaxoptim import rules
from jaxoptim.optim.sampler import Sampler


class PSGLD(Sampler):
    """Preconditioned SGLD, computed by :class:`jaxoptim.rules.PSGLD`; its ``gamma`` needs ``sampling.sample``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> chain = optim.PSGLD({"w": jnp.ones(2)}, lr=1e-3, nbeta=50.0, key=jax.random.key(1))
        >>> chain.step({"w": jnp.ones(2)})
        >>> sorted(chain.state[chain.param_groups[0]["params"][0]])
        ['initial_param', 'square_avg']
    """

    rule = rules.PSGLD
