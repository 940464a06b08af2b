"""Clipping of one parameter's gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO

from jaxoptim.core import sparse
from jaxoptim.core.numerics import computing_dtype, is_complex, real_dtype
from jaxoptim.core.rule import Hyperparameters, OptionalNonNegative, rule


@rule
class Clip(Hyperparameters):
    r"""Clip a gradient: first its norm, then each number.

    .. math::
        g \leftarrow g \min\Bigl(1, \frac{c}{\lVert g \rVert_2 + 10^{-6}}\Bigr), \qquad
        g \leftarrow \mathrm{clip}(g, -v, v)

    Args:
        clip_norm: :math:`c \ge 0`, a bound on the norm of this gradient alone (default None: no bound).
        clip_value: :math:`v \ge 0`, a bound on each number (default None: no bound).

    Raises:
        ``ValueError`` for a bound that is negative or no number; ``TypeError`` when the numbers of a complex gradient
        are to be bounded.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.core.clipping import Clip
        >>> clipped = Clip(clip_norm=1.0, clip_value=0.7).clipped(jnp.array([3.0, 4.0]))
        >>> [round(x, 3) for x in clipped.tolist()]
        [0.6, 0.7]
    """

    clip_norm: OptionalNonNegative = None
    clip_value: OptionalNonNegative = None

    @property
    def is_off(self) -> bool:
        """Whether there is no bound, so that gradients pass unchanged."""
        return self.clip_norm is None and self.clip_value is None

    def clipped(self, grad: Any) -> Any:
        """Clip a gradient, in its dtype; the rows of a sparse one are summed first."""
        if self.is_off:
            return grad
        if isinstance(grad, BCOO):
            rows, values = sparse.distinct_rows(grad)
            return BCOO((self.bounded(values, squares(values)), rows[:, None]), shape=grad.shape)
        return self.bounded(grad, squares(grad))

    def bounded(self, grad: jax.Array, square: jax.Array) -> jax.Array:
        """Clip a gradient, or a part of one; ``square`` is the squared norm of the whole gradient."""
        given = grad.dtype
        grad = grad.astype(computing_dtype(given))
        clip = self.cast(real_dtype(grad.dtype))
        if clip.clip_norm is not None:
            grad = grad * jnp.minimum(1, clip.clip_norm / (jnp.sqrt(square) + 1e-6))
        if clip.clip_value is not None:
            if is_complex(grad):
                raise TypeError("clip_value bounds real numbers, but the gradient is complex. Use clip_norm.")
            grad = jnp.clip(grad, -clip.clip_value, clip.clip_value)
        return grad.astype(given)


def squares(grad: jax.Array, axis: int | None = None) -> jax.Array:
    """Sum the squared absolute values, in float32 at least."""
    grad = grad.astype(computing_dtype(grad.dtype))
    return jnp.sum((grad * grad.conj()).real, axis)
