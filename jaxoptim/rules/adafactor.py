"""Adafactor."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import (
    Coefficient,
    NonNegative,
    Numeric,
    OptionalNonNegative,
    Rearrangement,
    Rule,
    Slots,
    factory,
    full_like,
    rule,
    sqrt,
)
from jaxoptim.rules._terms import needed, shrinkage


@rule
class Adafactor(Rule):
    r"""Adafactor: the second moment of a matrix kept as one row and one column.

    .. math::
        \rho_t &= \min(\gamma, t^{-1/2}), \qquad
        \alpha_t = \max(\epsilon_2, \mathrm{RMS}(\theta_{t-1}))\,\rho_t, \qquad w_t = t^{\tau} \\
        R_t &= (1-w_t) R_{t-1} + w_t\,\mathrm{mean}_{\text{columns}}(g_t^2), \qquad
        C_t = (1-w_t) C_{t-1} + w_t\,\mathrm{mean}_{\text{rows}}(g_t^2) \\
        \hat V_t &= \frac{R_t C_t}{\max(\mathrm{mean}(R_t), \epsilon_1)}, \qquad
        U_t = \frac{g_t}{\sqrt{\max(\hat V_t, \epsilon_1^2)}} \\
        \theta_t &= \theta_{t-1} - \gamma\lambda\,\theta_{t-1}
        - \alpha_t\,\frac{U_t}{\max(1, \mathrm{RMS}(U_t)/d)}

    Vectors and scalars keep the whole moment :math:`\hat V_t = (1-w_t)\hat V_{t-1} + w_t g_t^2`. Arrays of
    more dimensions are factored along their last two.

    Args:
        lr: :math:`\gamma \ge 0` (default 1e-2), the largest relative step.
        beta2_decay: :math:`\tau \le 0` (default -0.8).
        eps: :math:`\epsilon_1, \epsilon_2 \ge 0` (default None, 1e-3). None is the machine epsilon of the
            dtype computed in, for each array its own (torch lets the first array's decide for its group).
        d: clipping threshold :math:`d \ge 1` (default 1).
        weight_decay: decoupled decay :math:`\lambda \ge 0` (default 0).
        maximize: ascend instead (default False). Weight decay still decays.

    Slots:
        ``row_var`` of shape (..., rows, 1) and ``col_var`` of shape (..., 1, columns), or ``variance`` of
        the shape of a vector; None for those a parameter lacks.

    Raises:
        ``ValueError`` for a number out of range; ``RuntimeError`` for complex parameters.

    References:
        Shazeer, Stern, Adafactor: adaptive learning rates with sublinear memory cost, ICML 2018, with
        torch's use of :math:`\epsilon_1`.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.adafactor(lr=0.1), jnp.array([[1.0, -2.0]])
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates)[0].tolist()]
        [0.842, -1.842]
    """

    lr: NonNegative = 1e-2
    beta2_decay: Annotated[Any, Numeric((("<=", 0),))] = -0.8
    eps: tuple[OptionalNonNegative, NonNegative] = (None, 1e-3)
    d: Annotated[Any, Numeric(((">=", 1),))] = 1.0
    weight_decay: Coefficient = 0.0
    _: KW_ONLY
    maximize: bool = False

    complex: ClassVar[bool] = False

    @property
    def elementwise(self) -> bool:
        return False

    def init(self, param: jax.Array) -> Slots:
        slots: Slots = {"row_var": None, "col_var": None, "variance": None}
        if param.ndim < 2:
            return slots | {"variance": full_like(param)}
        rows, columns = param.mean(-1, keepdims=True), param.mean(-2, keepdims=True)
        return slots | {"row_var": full_like(rows), "col_var": full_like(columns)}

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        param = needed(self, param)
        grad = -grad if self.maximize else grad
        eps1 = jnp.finfo(grad.dtype).eps if self.eps[0] is None else self.eps[0]
        size = jnp.maximum(self.eps[1], rms(param)) * jnp.minimum(self.lr, 1 / sqrt(step))

        weight = step**self.beta2_decay
        new: Slots = {}
        for name, axis in (("row_var", -1), ("col_var", -2), ("variance", None)):
            if slots[name] is not None:
                square = grad * grad if axis is None else jnp.mean(grad * grad, axis, keepdims=True)
                new[name] = slots[name] + weight * (square - slots[name])
        if "variance" in new:
            variance = new["variance"]
        else:
            variance = new["row_var"] * new["col_var"]
            variance = variance / jnp.maximum(jnp.mean(new["row_var"], -2, keepdims=True), eps1)

        scaled = grad * jax.lax.rsqrt(jnp.maximum(variance, eps1 * eps1))
        size = size / jnp.maximum(1.0, rms(scaled) / self.d)
        return -size * scaled - shrinkage(self, param), slots | new

    def rearranged(self, slots: Slots, move: Rearrangement) -> Slots:
        factors = {name: slots[name] for name in ("row_var", "col_var") if slots.get(name) is not None}
        if not factors and len(move.index.shape) < 2:
            return {
                name: move(slot) if name == "variance" and slot is not None else slot for name, slot in slots.items()
            }
        if len(factors) < 2 or len(move.index.shape) < 2:
            raise ValueError("Adafactor keeps means of rows and columns of matrices, but the variance of vectors.")
        moved = [_factor(axis, factors, move) for axis in (-1, -2)]
        return slots | dict(zip(("row_var", "col_var"), moved, strict=True))


def _factor(axis: int, factors: dict[str, Any], move: Rearrangement) -> jax.Array:
    """Return the mean over an axis after a permutation: the earlier mean that is constant along that axis now."""
    for factor in factors.values():
        positions = np.arange(np.size(factor), dtype=np.int32).reshape(np.shape(factor))
        moved = np.broadcast_to(positions, move.shape).reshape(-1)[move.index]
        kept = moved.take([0], axis)
        if kept.size == positions.size == np.unique(kept).size and (moved == kept).all():
            return jnp.asarray(np.asarray(factor).reshape(-1)[kept])
    raise ValueError(
        f"Adafactor keeps the means of the squared gradient over the last two axes, of {move.shape}, from which those "
        f"over the last two of {move.index.shape} cannot be computed. Keep these two axes last."
    )


def rms(x: jax.Array) -> jax.Array:
    """Compute the root mean square of all elements, summed axis by axis: short sums lose fewer digits."""
    mean = x * x
    while mean.ndim:
        mean = jnp.mean(mean, -1)
    return sqrt(mean)


adafactor = factory(Adafactor, "adafactor")
