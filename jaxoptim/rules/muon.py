"""Muon: orthogonalized momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxoptim.core import Coefficient, NonNegative, OpenDecayRate, Rearrangement, Rule, Scalar, Slots, factory, rule
from jaxoptim.core.numerics import with_replicated
from jaxoptim.core.shown import shown
from jaxoptim.core.spreading import ALONE, Group, devices_of, spread
from jaxoptim.rules._terms import shrinkage, zeros


@rule
class Muon(Rule):
    r"""Muon: momentum orthogonalized to the nearest matrix with singular values near one.

    .. math::
        B_t &= \mu B_{t-1} + (1-\mu)\,G_t, \qquad
        U_t = B_t \quad\text{(Nesterov: } (1-\mu)\,G_t + \mu B_t\text{)} \\
        X_0 &= U_t / \max(\|U_t\|_F, \epsilon), \qquad
        X_{k+1} = a X_k + (b A_k + c A_k^2)\,X_k, \quad A_k = X_k X_k^\top \\
        \theta_t &= \theta_{t-1} - \gamma\lambda\,\theta_{t-1} - \gamma r\,X_K

    where :math:`r` corrects the rate for the shape. The iteration runs in bfloat16, as in torch, whatever
    the parameter's dtype.

    Matrices of one shape that are sharded over devices are orthogonalized together: an all-to-all takes each to a group
    of devices, which share its longer side and the rows of :math:`A_k`, or to one device, where that is faster. The
    numbers are those of one device, to rounding. Shardings are known over explicit axes, and over automatic ones from
    :func:`jaxoptim.distributed.zero` with its ``specs``, and in :class:`jaxoptim.optim.Muon`.

    Args:
        lr: learning rate :math:`\gamma \ge 0` (default 1e-3).
        weight_decay: decoupled decay :math:`\lambda \ge 0` (default 0.1).
        momentum: :math:`\mu \ge 0` (default 0.95).
        nesterov: look ahead along the momentum (default True).
        ns_coefficients: :math:`a, b, c` (default 3.4445, -4.7750, 2.0315).
        eps: :math:`\epsilon` (default 1e-7).
        ns_steps: number of iterations :math:`K`, an int below 100 (default 5).
        adjust_lr_fn: ``"original"`` or None: :math:`r = \sqrt{\max(1, \text{rows}/\text{columns})}`;
            ``"match_rms_adamw"``: :math:`r = 0.2\sqrt{\max(\text{rows}, \text{columns})}`.
        flatten: the axes of a kernel that make the rows of its matrix, in this order, the others its columns; ``(-1,)``
            for the kernels of flax's convolutions, whose last axis is that of the outputs, ``(0,)`` for those of torch
            and equinox (default None: parameters are matrices).

    Slots:
        ``momentum_buffer``, of the parameter's shape.

    Raises:
        ``ValueError`` for a number out of range, an unknown ``adjust_lr_fn``, or a parameter that is not a
        matrix or has no such axes (at ``init``; use ``optax.partition`` to give the others to another optimizer);
        ``RuntimeError`` for complex parameters.

    References:
        Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein, Muon: an optimizer for hidden layers in neural
        networks, 2024. Liu et al., Muon is scalable for LLM training, 2025 (arXiv:2502.16982), for
        ``"match_rms_adamw"``.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.muon(lr=0.1, weight_decay=0), jnp.eye(2)
        >>> updates, state = tx.update(2 * params, tx.init(params), params)
        >>> [round(x, 2) for x in optax.apply_updates(params, updates)[0].tolist()]
        [0.89, 0.0]
    """

    lr: NonNegative = 1e-3
    weight_decay: Coefficient = 0.1
    momentum: OpenDecayRate = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[Scalar, Scalar, Scalar] = (3.4445, -4.7750, 2.0315)
    eps: Scalar = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: str | None = None
    _: KW_ONLY
    flatten: tuple[int, ...] | None = None

    complex: ClassVar[bool] = False

    def check(self) -> None:
        if self.adjust_lr_fn not in (None, "original", "match_rms_adamw"):
            raise ValueError(
                f"Invalid adjust_lr_fn: {shown(self.adjust_lr_fn)}. Muon takes None, 'original' or 'match_rms_adamw'."
            )
        if not isinstance(self.ns_steps, int):
            raise TypeError(
                f"Invalid ns_steps: {shown(self.ns_steps)}. Muon takes an int, which fixes the compiled program; "
                "with optax.inject_hyperparams name it in static_args."
            )
        if not 0 <= self.ns_steps < 100:
            raise ValueError(f"Invalid ns_steps: {self.ns_steps}. Muon takes 0 <= ns_steps < 100.")
        axes = self.flatten
        if axes is not None and not (isinstance(axes, tuple) and axes and all(type(axis) is int for axis in axes)):
            raise ValueError(
                f"Invalid flatten: {shown(axes)}. Muon takes a tuple of axes, the rows, such as (-1,), or None."
            )

    def check_param(self, name: str, param: Any) -> None:
        shape, axes = tuple(param.shape), self.flatten
        if axes is None and len(shape) != 2:
            raise ValueError(
                f"Muon only supports 2D parameters, but {name!r} has shape {shape}. "
                "Say which axes of a kernel are rows, flatten=(-1,), or give it to another optimizer, with "
                "optax.partition."
            )
        if axes is not None:
            rows = {axis % max(len(shape), 1) for axis in axes}
            if any(not -len(shape) <= axis < len(shape) for axis in axes) or not len(axes) == len(rows) < len(shape):
                raise ValueError(
                    f"flatten={axes} of Muon names the axes that are rows, but {name!r} has shape {shape}. Name some "
                    "of its axes, and not all."
                )

    @property
    def elementwise(self) -> bool:
        return False

    def init(self, param: jax.Array) -> Slots:
        return zeros(param, "momentum_buffer")

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        direction, buffer = self._direction(grad, slots)
        return self._applied(grad, param, buffer, with_replicated(self._orthogonalized_kernel, direction))

    def update_with(
        self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array, shared: dict[str, Any], **given: Any
    ) -> tuple[jax.Array, Slots]:
        if "orthogonal" not in given:
            return self.update(grad, slots, param, step)
        return self._applied(grad, param, self._direction(grad, slots)[1], given["orthogonal"])

    def _applied(
        self, grad: jax.Array, param: Any, buffer: jax.Array, orthogonal: jax.Array
    ) -> tuple[jax.Array, Slots]:
        """Return the change along an orthogonalized direction, and the new slots."""
        rows, columns = self._as_matrix(grad).shape
        if self.adjust_lr_fn == "match_rms_adamw":
            ratio = 0.2 * math.sqrt(max(rows, columns))
        else:
            ratio = math.sqrt(max(1, rows / columns))
        return -self.lr * ratio * orthogonal.astype(grad.dtype) - shrinkage(self, param), {"momentum_buffer": buffer}

    def spread(
        self, grads: Sequence[jax.Array], slots: Sequence[Slots], sharding: NamedSharding
    ) -> list[dict[str, jax.Array]]:
        if self.flatten is not None:
            return [{} for _ in grads]
        directions = [self._direction(*own)[0].astype(jnp.float32) for own in zip(grads, slots, strict=True)]
        stack = _bfloat16(jnp.stack(directions))  # which the iteration begins with
        height, rows, columns = stack.shape

        def orthogonalized(part: jax.Array, group: Group) -> jax.Array:
            return _bfloat16(self.orthogonalized(part, group, tall=rows > columns))

        groups = _groups(height, rows, columns, devices_of(sharding, rows, columns), self.ns_steps)
        done = spread(orthogonalized, stack, sharding, groups)
        return [{"orthogonal": done[at].astype(jnp.float32)} for at in range(height)]

    def _direction(self, grad: jax.Array, slots: Slots) -> tuple[jax.Array, jax.Array]:
        """Return what is orthogonalized, and the new momentum."""
        buffer = self.momentum.ema(slots["momentum_buffer"], grad)
        return grad + self.momentum.rate * (buffer - grad) if self.nesterov else buffer, buffer

    def _row_axes(self, kernel: jax.Array) -> tuple[int, ...]:
        return (0,) if self.flatten is None else tuple(axis % kernel.ndim for axis in self.flatten)

    def _as_matrix(self, kernel: jax.Array) -> jax.Array:
        rows = self._row_axes(kernel)
        front = jnp.moveaxis(kernel, rows, range(len(rows)))
        return front.reshape(math.prod(front.shape[: len(rows)]), math.prod(front.shape[len(rows) :]))

    def _orthogonalized_kernel(self, kernel: jax.Array) -> jax.Array:
        rows = self._row_axes(kernel)
        front = jnp.moveaxis(kernel, rows, range(len(rows))).shape
        matrix = self.orthogonalized(self._as_matrix(kernel))
        return jnp.moveaxis(matrix.reshape(front), range(len(rows)), rows)

    def rearranged(self, slots: Slots, move: Rearrangement) -> Slots:
        if self.flatten is not None and not move.is_identity():
            raise ValueError("Muon with flatten names axes, which this move changes. Keep torch's layout.")
        if not (move.is_identity() or move.is_transposition()):
            raise ValueError("Muon orthogonalizes a matrix, which a transposition keeps, but no other move.")
        rows, columns = move.shape
        if move.is_transposition() and rows != columns and self.adjust_lr_fn != "match_rms_adamw":
            raise ValueError(
                f"Muon multiplies the learning rate by sqrt(max(1, rows / columns)), which is another for "
                f"{rows}x{columns} and {columns}x{rows}. Keep torch's orientation, or train with "
                "adjust_lr_fn='match_rms_adamw'."
            )
        return {name: move(slot) for name, slot in slots.items()}

    def orthogonalized(self, matrix: jax.Array, group: Group = ALONE, *, tall: bool | None = None) -> jax.Array:
        """Bring the singular values of a matrix near one by Newton and Schulz's iteration.

        A tall matrix is multiplied from the right, which is the iteration of its transpose. Where devices have parts
        of the longer side, each computes its share of the Gram matrix's rows and of their polynomial.
        """
        a, b, c = (jnp.asarray(coefficient, jnp.float32) for coefficient in self.ns_coefficients)
        tall = matrix.shape[0] > matrix.shape[1] if tall is None else tall
        matrix = _rounded(matrix.astype(jnp.float32))
        norm = _rounded(jnp.sqrt(group.total(jnp.sum(matrix * matrix))))
        x = matrix / jnp.maximum(norm, _rounded(jnp.asarray(self.eps, jnp.float32)))
        for _ in range(self.ns_steps):
            x = _bfloat16(x)
            gram = _gram(x.T, x, group) if tall else _gram(x, x.T, group)
            square = c * _matmul(gram, group.all_rows(gram))
            square = jax.lax.reduce_precision(square, exponent_bits=8, mantissa_bits=23)
            polynomial = group.all_rows(_bfloat16(_fused_multiply_add(b, gram, square)))
            product = _matmul(x, polynomial.T) if tall else _matmul(polynomial, x)
            x = _fused_multiply_add(a, x, product)
        return _rounded(x)


def _gram(x: jax.Array, transpose: jax.Array, group: Group) -> jax.Array:
    """Multiply a bfloat16 matrix by its transpose; return the rows of the product that are this device's share."""
    if not group.members:
        return jax.lax.optimization_barrier(jnp.matmul(x, transpose))
    return _bfloat16(group.rows_of_total(_matmul(x, transpose)))


_FLOPS, _START = 1000, 2**20
"""What takes as long as to send a byte between chips: so many operations; and the bytes that go while one is begun."""


def _groups(height: int, rows: int, columns: int, devices: int, steps: int) -> int:
    """Return the number of groups of devices, each with a matrix at a time, for which an iteration is fastest.

    A device alone sends nothing in the iteration. In a group each sends twice what it has of a Gram matrix in float32,
    or as much: its rows are summed in float32, and gathered twice in bfloat16.
    """
    short, long = sorted((rows, columns))

    def cost(groups: int) -> float:
        parts, each = devices // groups, -(-height // groups)
        products = each * (4 * short**2 * long + 2 * short**3) / parts
        sent = 0.0 if parts == 1 else each * 8 * short**2 * (parts - 1) / parts + 3 * _START
        return steps * (products / _FLOPS + sent)

    return min((count for count in range(1, devices + 1) if devices % count == 0), key=cost)


def _rounded(x: jax.Array) -> jax.Array:
    """Round a float32 array to bfloat16 precision by an operation that the compiler may not undo."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _bfloat16(x: jax.Array) -> jax.Array:
    """Cast a float32 array to bfloat16 so that the compiler may not use the float32 original instead."""
    return jax.lax.optimization_barrier(_rounded(x).astype(jnp.bfloat16))


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply two bfloat16 matrices in float32."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _fused_multiply_add(a: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return a * x + y rounded once, as torch's kernels do, where ``x`` holds bfloat16 numbers.

    With ``a`` in two parts of 16 and 8 bits both products are exact, and the error of the one sum that
    matters is carried along. Without it one in a thousand small matrices would differ from torch's.
    """
    x = x.astype(jnp.float32)
    high = jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=15)
    product = high * x
    total = product + y
    rounded = total - product
    error = (product - (total - rounded)) + (y - rounded)
    return total + (error + (a - high) * x)


muon = factory(Muon, "muon")
