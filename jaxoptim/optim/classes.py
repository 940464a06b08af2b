"""The torch-style optimizers: the rule of each, and its options in the order of its parent.

The rest is made of the rule by :mod:`jaxoptim.optim.subclass`, which says what the entries mean. The stub beside this
file has the signatures in full, for editors and type checkers.
"""

from __future__ import annotations

from jaxoptim import rules
from jaxoptim.optim.counts_by_number import CountsByNumber
from jaxoptim.optim.decaying_rate import DecayingRate
from jaxoptim.optim.decoupled import Decoupled
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.optim.sampler import Sampler
from jaxoptim.optim.sgld import MeasuredSampler
from jaxoptim.optim.sgnht import ThermostatSampler

# torch's.


class Adadelta(Optimizer):
    """torch's ``Adadelta``, computed by :class:`jaxoptim.rules.Adadelta`."""

    rule = rules.Adadelta
    _arguments = "lr rho eps weight_decay foreach * capturable maximize differentiable"
    _keys = "lr rho eps weight_decay maximize capturable foreach differentiable"
    _example = 1.0


class Adafactor(Optimizer):
    """torch's ``Adafactor``, computed by :class:`jaxoptim.rules.Adafactor`."""

    rule = rules.Adafactor
    _arguments = "lr beta2_decay eps d weight_decay * foreach maximize"
    _example = 0.9


class Adagrad(Optimizer):
    """torch's ``Adagrad``, computed by :class:`jaxoptim.rules.Adagrad`."""

    rule = rules.Adagrad
    starts_at_once = True
    _arguments = "lr lr_decay weight_decay initial_accumulator_value eps foreach * maximize differentiable fused"
    _keys = "lr lr_decay eps weight_decay initial_accumulator_value foreach maximize differentiable fused"
    _example = 0.9


class Adam(Optimizer):
    """torch's ``Adam``, computed by :class:`jaxoptim.rules.Adam`."""

    rule = rules.Adam
    _arguments = (
        "lr betas eps weight_decay amsgrad * foreach maximize capturable differentiable fused decoupled_weight_decay"
    )
    _keys = "lr betas eps weight_decay amsgrad maximize foreach capturable differentiable fused decoupled_weight_decay"
    _example = 0.9


class Adamax(Optimizer):
    """torch's ``Adamax``, computed by :class:`jaxoptim.rules.Adamax`."""

    rule = rules.Adamax
    _arguments = "lr betas eps weight_decay foreach * maximize differentiable capturable"
    _example = 0.9


class AdamW(Decoupled):
    """torch's ``AdamW``, computed by :class:`jaxoptim.rules.AdamW`."""

    rule = rules.AdamW
    _arguments = "lr betas eps weight_decay amsgrad * maximize foreach capturable differentiable fused"
    _keys = "lr betas eps weight_decay amsgrad maximize foreach capturable differentiable fused decoupled_weight_decay"
    _example = 0.899


class ASGD(Optimizer):
    """torch's ``ASGD``, computed by :class:`jaxoptim.rules.ASGD`."""

    rule = rules.ASGD
    _arguments = "lr lambd alpha t0 weight_decay foreach maximize differentiable capturable"
    _example = 0.9


class Muon(Optimizer):
    """torch's ``Muon``, computed by :class:`jaxoptim.rules.Muon`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt = optim.Muon({"w": jnp.eye(2)}, lr=0.1)
        >>> opt.step({"w": jnp.eye(2)})
        >>> [round(x, 3) for x in opt.params["w"][0].tolist()]
        [0.877, 0.0]
    """

    rule = rules.Muon
    step_type = None
    may_lack = unlisted = frozenset(("flatten",))


class NAdam(Optimizer):
    """torch's ``NAdam``, computed by :class:`jaxoptim.rules.NAdam`."""

    rule = rules.NAdam
    _arguments = (
        "lr betas eps weight_decay momentum_decay decoupled_weight_decay * foreach maximize capturable differentiable"
    )
    _keys = "lr betas eps weight_decay momentum_decay decoupled_weight_decay maximize foreach capturable differentiable"
    _example = 0.894


class RAdam(Optimizer):
    """torch's ``RAdam``, computed by :class:`jaxoptim.rules.RAdam`."""

    rule = rules.RAdam
    _arguments = "lr betas eps weight_decay decoupled_weight_decay * foreach maximize capturable differentiable"
    _keys = "lr betas eps weight_decay maximize foreach capturable decoupled_weight_decay differentiable"
    _example = 0.9


class RMSprop(Optimizer):
    """torch's ``RMSprop``, computed by :class:`jaxoptim.rules.RMSprop`."""

    rule = rules.RMSprop
    _arguments = "lr alpha eps weight_decay momentum centered capturable foreach maximize differentiable"
    _keys = "lr momentum alpha eps centered weight_decay capturable foreach maximize differentiable"
    _example = 0.0


class Rprop(Optimizer):
    """torch's ``Rprop``, computed by :class:`jaxoptim.rules.Rprop`."""

    rule = rules.Rprop
    _arguments = "lr etas step_sizes * capturable foreach maximize differentiable"
    _keys = "lr etas step_sizes foreach maximize differentiable capturable"
    _example = 0.9


class SGD(Optimizer):
    """torch's ``SGD``, computed by :class:`jaxoptim.rules.SGD`."""

    rule = rules.SGD
    step_type = None
    _arguments = "lr momentum dampening weight_decay nesterov * maximize foreach differentiable fused"
    _example = 0.9


class SparseAdam(Optimizer):
    """torch's ``SparseAdam``, computed by :class:`jaxoptim.rules.SparseAdam`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jax.experimental.sparse import BCOO
        >>> from jaxoptim import optim
        >>> opt = optim.SparseAdam({"table": jnp.ones((4, 2))}, lr=0.1)
        >>> opt.step({"table": BCOO((jnp.ones((1, 2)), jnp.array([[3]])), shape=(4, 2))})
        >>> [round(x, 3) for x in opt.params["table"][:, 0].tolist()]
        [1.0, 1.0, 1.0, 0.9]
    """

    rule = rules.SparseAdam
    step_type = int


# Pyro's.


class AdagradRMSProp(Optimizer):
    """Pyro's ``AdagradRMSProp``, computed by :class:`jaxoptim.rules.AdagradRMSProp`."""

    rule = rules.AdagradRMSProp
    starts_at_once = True
    step_type = int
    _example = 0.95


class ClippedAdam(DecayingRate):
    """Pyro's ``ClippedAdam``, computed by :class:`jaxoptim.rules.ClippedAdam`."""

    rule = rules.ClippedAdam
    step_type = int
    _example = 0.9


class DCTAdam(CountsByNumber):
    """Pyro's ``DCTAdam``, computed by :class:`jaxoptim.rules.DCTAdam`."""

    rule = rules.DCTAdam
    step_type = int
    _example = 0.9


# Samplers, of which the first two are devinterp's.


class SGLD(MeasuredSampler):
    """devinterp's ``SGLD``, computed by :class:`jaxoptim.rules.SGLD`.

    The metrics that are switched on are entries of the groups; ``opt.noise_norm``, ``opt.grad_norm``,
    ``opt.weight_norm``, ``opt.distance`` and ``opt.lr`` are those of the first group. ``opt.noise`` (a list of arrays
    for each group), ``opt.dws`` (a list) and ``opt.localization_loss`` (summed over the groups) are of the last step.
    ``temperature`` is an old name of ``nbeta``, which it overrides. ``optimize_over`` of a group is a mask that
    broadcasts to all its parameters, or a tree or list with one for each; ``center`` is such a tree
    or list.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> chain = optim.SGLD({"w": jnp.ones(2)}, lr=1e-3, nbeta=50.0, noise_norm=True, key=jax.random.key(1))
        >>> chain.step({"w": jnp.ones(2)})
        >>> 0 < float(chain.noise_norm) < 5
        True
    """

    rule = rules.SGLD
    _arguments = (
        "lr noise_level weight_decay localization nbeta bounding_box_size save_noise save_mala_vars optimize_over "
        "noise_norm grad_norm weight_norm distance temperature * box metrics center key noise_impl"
    )


class SGNHT(ThermostatSampler):
    """devinterp's ``SGNHT``, computed by :class:`jaxoptim.rules.SGNHT`.

    The thermostat is an entry of each group, and begins at the group's own ``diffusion_factor`` (in devinterp at that
    of the constructor). devinterp's ``save_noise`` and ``save_mala_vars`` do nothing but warn, as there.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> chain = optim.SGNHT({"w": jnp.ones(2)}, lr=1e-3, nbeta=50.0, key=jax.random.key(1))
        >>> chain.step({"w": jnp.ones(2)})
        >>> chain.param_groups[0]["thermostat"].shape
        ()
    """

    rule = rules.SGNHT
    _arguments = (
        "lr diffusion_factor bounding_box_size save_noise save_mala_vars nbeta "
        "* weight_decay localization optimize_over box order metrics center key noise_impl"
    )


class PSGLD(Sampler):
    """Preconditioned SGLD, computed by :class:`jaxoptim.rules.PSGLD`; its ``gamma`` needs ``sampling.sample``.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> chain = optim.PSGLD({"w": jnp.ones(2)}, lr=1e-3, nbeta=50.0, key=jax.random.key(1))
        >>> chain.step({"w": jnp.ones(2)})
        >>> sorted(chain.state[chain.param_groups[0]["params"][0]])
        ['initial_param', 'square_avg']
    """

    rule = rules.PSGLD


class SGHMC(Sampler):
    """Stochastic gradient Hamiltonian Monte Carlo, computed by :class:`jaxoptim.rules.SGHMC`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> chain = optim.SGHMC({"w": jnp.ones(2)}, lr=1e-3, nbeta=50.0, key=jax.random.key(1))
        >>> chain.step({"w": jnp.ones(2)})
        >>> sorted(chain.state[chain.param_groups[0]["params"][0]])
        ['initial_param', 'momentum']
    """

    rule = rules.SGHMC
