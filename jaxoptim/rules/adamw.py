"""Adam with decoupled weight decay."""

from __future__ import annotations

import dataclasses

from jaxoptim.core import Coefficient, factory, rule
from jaxoptim.rules.adam import Adam


@rule
class AdamW(Adam):
    r"""AdamW: Adam whose weight decay is not scaled by the second moment.

    .. math::
        \theta_t = \theta_{t-1} - \gamma\lambda\,\theta_{t-1}
        - \gamma\,\frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    with the moments of :class:`Adam`.

    Args:
        lr: learning rate :math:`\gamma \ge 0` (default 1e-3).
        betas: decay rates :math:`\beta_1, \beta_2` in [0, 1) (default 0.9, 0.999).
        eps: :math:`\epsilon \ge 0` (default 1e-8).
        weight_decay: :math:`\lambda \ge 0` (default 1e-2; optax's default is 1e-4).
        amsgrad: divide by the largest second moment (default False).
        maximize: ascend instead (default False). Weight decay still decays.

    Slots:
        Those of :class:`Adam`.

    Raises:
        ``ValueError`` for a number out of range, or for missing ``params`` in an update that decays.

    References:
        Loshchilov, Hutter, Decoupled weight decay regularization, ICLR 2019.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.adamw(lr=0.1, weight_decay=0.5), jnp.array([1.0, -2.0])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.85, -1.8]
    """

    weight_decay: Coefficient = 1e-2
    decoupled_weight_decay: bool = dataclasses.field(default=True, init=False)


adamw = factory(AdamW, "adamw")
