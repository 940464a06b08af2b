"""Newton's method on batches of small independent problems, inside a trust region."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxoptim.core import Arrays, Hyperparameters, Numeric, OptState, Packed, factory, is_known, rule, sqrt, trees
from jaxoptim.core import transformation as transformation_of
from jaxoptim.core.numerics import computing_dtype, is_complex, sharded_like, whole
from jaxoptim.core.placement import on_mesh_of
from jaxoptim.core.shown import shown
from jaxoptim.rules._terms import given_loss

_SMALLEST_CURVATURE = 1e-8
"""The least curvature of a one-dimensional problem, and the least shift of a larger Hessian within a radius."""

_RADIUS = Numeric(((">", 0),))

Entries = list[list[jax.Array]]
"""Batched small matrices, one array for each entry, so that the compiler fuses all work into one batch loop."""


def newton_step(loss_fn: Callable[[jax.Array], Any], x: Any, trust_radius: Any = None) -> tuple[jax.Array, jax.Array]:
    r"""Take one Newton step on a batch of small independent problems.

    With the gradient :math:`g` and the Hessian :math:`H` of one problem at :math:`x`, of length :math:`D`, and
    the radius :math:`r` of its trust region,

    .. math::
        \mathrm{mode} = x - A^{-1} g, \qquad \mathrm{cov} = A^{-1}, \qquad
        A = H + \max\bigl(\lVert g \rVert / r - \lambda_{\min}(H),\ 10^{-8}\bigr)\,I

    so that :math:`A \succeq \lVert g \rVert / r`, and :math:`\lVert \mathrm{mode} - x \rVert \le r`, whatever the
    curvature. Without a radius :math:`A = H`: a saddle attracts. For :math:`D = 1`, :math:`A = \max(H, 10^{-8})`,
    and the step is clipped to :math:`[-r, r]`.

    ``loss_fn`` is evaluated once, together with its first and second derivatives: :math:`D` pushforwards of one
    linearization of the gradient. Jit the loop, and give what changes as arguments of the jitted function.

    The result is differentiable, with respect to ``x`` and to all that ``loss_fn`` closes over. Where the step
    has converged its derivatives are those of the minimum, and the one with respect to ``x`` is zero; so end a
    loop over ``jax.lax.stop_gradient(x)`` with one more step. (Pyro takes the derivative with respect to ``x``
    for one everywhere.) If ``loss_fn`` is a negative log density, ``mode`` and ``cov`` are its Laplace
    approximation.

    Args:
        loss_fn: gives the loss, a real scalar: the sum over the batch. No problem may depend on another.
        x: the starting point, floating, of shape (..., D) with any batch axes and D >= 1. A scalar is a problem of
            length one. ``loss_fn`` is given it in at least float32.
        trust_radius: the longest step, > 0: a number, or an array that broadcasts to the batch axes; may be
            traced (default None: no limit).

    Returns:
        ``mode``, of the shape and dtype of ``x``, and ``cov``, of shape (..., D, D), in at least float32.

    Where Pyro fails on D > 3, and gives NaN for equal eigenvalues (the derivative for D = 2, the value for
    D = 3), this does not. At a zero gradient :math:`\lVert g \rVert / r` counts as some rounding errors of
    :math:`H`, and ``cov`` is finite at a saddle.

    Raises:
        ``ValueError`` for a loss that is not a scalar, and a radius that is not positive or does not broadcast;
        ``TypeError`` for ``x`` that is not real floating.

    References:
        Nocedal, Wright, Numerical Optimization, 2nd ed. 2006, chapter 4, for the trust region. Christianson,
        Reverse accumulation and attractive fixed points, Optimization Methods and Software 3, 1994, for the
        derivatives. The numbers are those of ``pyro.ops.newton.newton_step``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.rules.newton import newton_step
        >>> centers = jnp.array([[3.0, 4.0], [0.3, 0.4]])
        >>> loss = lambda x: jnp.sum((x - centers) ** 2)
        >>> mode, cov = newton_step(loss, jnp.zeros((2, 2)), trust_radius=1.0)
        >>> [[round(x, 3) for x in row] for row in mode.tolist()]
        [[0.6, 0.8], [0.3, 0.4]]
        >>> [round(x, 3) for x in jnp.diag(cov[1]).tolist()]
        [0.5, 0.5]
    """
    x = jnp.asarray(x)
    point = _checked_point("x", x)
    g, push = _linearized(loss_fn, point, "loss_fn")
    dx, cov = solve(g, hessian(push, point), trust_radius)
    return (point + dx).astype(x.dtype), cov


def hessian(push_gradient: Callable[[jax.Array], jax.Array], x: Any) -> jax.Array:
    """Compute the Hessians of a batch of independent problems from the linearized gradient.

    Args:
        push_gradient: maps a tangent of ``x`` to that of the gradient, such as the second result of
            ``jax.linearize(jax.grad(loss_fn), x)``. It is called once, under ``jax.vmap``.
        x: the parameter, or its shape and dtype; of shape (..., D). A scalar counts as of length one.

    Returns:
        An array of shape (..., D, D). If the problems do depend on each other, its columns are sums over all
        of the batch.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim.rules.newton import hessian
        >>> g, push = jax.linearize(jax.grad(lambda x: jnp.sum(x[:, 0] * x[:, 1])), jnp.ones((3, 2)))
        >>> hessian(push, jnp.ones((3, 2)))[0].tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    size = x.shape[-1] if x.shape else 1
    each = jnp.eye(size, dtype=x.dtype).reshape((size,) + (1,) * (len(x.shape) - 1) + x.shape[-1:])
    columns = jax.vmap(push_gradient)(jnp.broadcast_to(each, (size, *x.shape)))
    return jnp.moveaxis(columns, 0, -1) if x.shape else columns.reshape(1, 1)


def solve(g: jax.Array, H: jax.Array, trust_radius: Any = None) -> tuple[jax.Array, jax.Array]:
    """Compute the Newton step of a batch of problems from given derivatives, as :func:`newton_step` does.

    Args:
        g: the gradients, of shape (..., D); a scalar counts as of length one.
        H: the symmetric Hessians, of shape (..., D, D).
        trust_radius: as for :func:`newton_step`.

    Returns:
        The step, of the shape of ``g``, and the inverse of the matrix that it was found with, of that of ``H``.
        Their dtype is the one that ``g`` and ``H`` promote to, float32 at least.

    Raises:
        ``ValueError`` for shapes that do not fit, and a radius that is not positive; ``TypeError`` for a radius
        that is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.rules.newton import solve
        >>> dx, cov = solve(jnp.array([2.0, 2.0]), jnp.diag(jnp.array([1.0, 2.0])))
        >>> dx.tolist(), jnp.diag(cov).tolist()
        ([-2.0, -1.0], [1.0, 0.5])
    """
    g, H = jnp.asarray(g), jnp.asarray(H)
    rows = g.reshape(g.shape or (1,))
    if H.shape != rows.shape + rows.shape[-1:]:
        raise ValueError(
            f"H has shape {H.shape}, but g has shape {g.shape}. Give g of shape (..., D) and H of (..., D, D)."
        )
    dtype = computing_dtype(jnp.promote_types(g.dtype, H.dtype))
    radius = None if trust_radius is None else _checked_radius(trust_radius, rows.shape[:-1])
    radius = None if radius is None else jnp.asarray(radius).astype(dtype)
    dx, cov = _solve(rows.astype(dtype), H.astype(dtype), radius)
    return dx.reshape(g.shape), cov


@jax.custom_jvp
def smallest_eigenvalue(H: jax.Array) -> jax.Array:
    """Compute the smallest eigenvalue of symmetric matrices, differentiably also where it is a multiple one.

    Up to three dimensions by closed forms, to a few rounding errors of the largest entry.

    Args:
        H: matrices of shape (..., D, D).

    Returns:
        An array of shape (...). Its derivative is that of an eigenvector's Rayleigh quotient.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim.rules.newton import smallest_eigenvalue
        >>> bool(jnp.isfinite(jax.grad(smallest_eigenvalue)(jnp.eye(3))).all())
        True
    """
    size = H.shape[-1]
    if size == 1:
        return H[..., 0, 0]
    if size > 3:
        return jnp.linalg.eigvalsh(H)[..., 0]
    scale = _scale(H)
    entries = _entries(H / scale[..., None, None])
    return scale * (_smallest_of_2(entries) if size == 2 else _smallest_of_3(entries))


@smallest_eigenvalue.defjvp
def _smallest_eigenvalue_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[jax.Array, jax.Array]:
    (H,), (dH,) = primals, tangents
    v = jnp.linalg.eigh(H)[1][..., 0]
    return smallest_eigenvalue(H), jnp.sum(v[..., :, None] * dH * v[..., None, :], axis=(-2, -1))


def _smallest_of_2(H: Entries) -> jax.Array:
    mean, half = (H[0][0] + H[1][1]) / 2, (H[0][0] - H[1][1]) / 2
    return mean - jnp.sqrt(half * half + H[0][1] * H[0][1])


def _smallest_of_3(H: Entries) -> jax.Array:
    r"""Compute the smallest eigenvalue of 3x3 matrices by the trigonometric solution of the cubic.

    The matrix is :math:`q + pB` with :math:`\mathrm{tr} B = 0` and :math:`\mathrm{tr} B^2 = 6`, so that the
    eigenvalues of :math:`B` are :math:`2\cos(\varphi + 2\pi k/3)` with :math:`\cos 3\varphi = \det B / 2`.
    The arc cosine loses half of the digits at double eigenvalues. But
    :math:`\sin 3\varphi = \lVert B^2 - 2 - \cos(3\varphi) B \rVert / \sqrt 6`, which is accurate there.
    """
    q = (H[0][0] + H[1][1] + H[2][2]) / 3
    deviation = _plus_diagonal(H, -q)
    p = jnp.sqrt(_sum_of_squares(deviation) / 6)
    divisor = jnp.where(p > 0, p, 1)
    B = [[entry / divisor for entry in row] for row in deviation]
    cos = _determinant(B, _adjugate(B)) / 2
    square = [[_sum([B[i][k] * B[k][j] for k in range(3)]) for j in range(3)] for i in range(3)]
    rest = [[square[i][j] - cos * B[i][j] for j in range(3)] for i in range(3)]
    sin = jnp.sqrt(_sum_of_squares(_plus_diagonal(rest, -2)) / 6)
    return q + 2 * p * jnp.cos(jnp.arctan2(sin, cos) / 3 + 2 * np.pi / 3)


@jax.jit
def _solve(g: jax.Array, H: jax.Array, radius: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Compute the step and the inverse, in one dtype; jitted so that an eager caller pays for one call."""
    if g.shape[-1] == 1:
        return _solve_1(g, H, radius)
    g, H = _computed_once(g), _computed_once(H)
    if radius is None:
        inverse = _computed_once(_inverse(H))
        return _times(-inverse, g), inverse
    # Below some rounding errors of H, the norm would not keep H + reg I away from a singular matrix.
    least = 8 * H.shape[-1] * jnp.finfo(H.dtype).eps * jnp.max(jnp.abs(H), axis=(-2, -1))
    slope = jnp.maximum(_norm(g) / radius, jax.lax.stop_gradient(least))
    reg = _computed_once(jnp.maximum(slope - smallest_eigenvalue(H), _SMALLEST_CURVATURE))
    regularized = H + reg[..., None, None] * jnp.eye(H.shape[-1], dtype=H.dtype)
    inverse = _computed_once(_inverse_of_definite(regularized))
    return _shortened(_times(-inverse, g), radius), inverse


def _solve_1(g: jax.Array, H: jax.Array, radius: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    inverse = 1 / jnp.maximum(H, _SMALLEST_CURVATURE)
    dx = -g * inverse[..., 0]
    dx = jnp.where(jnp.isnan(dx), 0, dx)
    return (dx if radius is None else jnp.clip(dx, -radius[..., None], radius[..., None])), inverse


def _computed_once(x: jax.Array) -> jax.Array:
    """Keep the compiler from recomputing an array for each number derived from it."""
    return jax.lax.optimization_barrier(x)


def _shortened(dx: jax.Array, radius: jax.Array) -> jax.Array:
    """Shorten a step that rounding has made longer than the radius to the radius."""
    norm = _norm(dx)
    is_long = norm > radius
    return dx * jnp.where(is_long, radius / jnp.where(is_long, norm, 1), 1)[..., None]


def _norm(v: jax.Array) -> jax.Array:
    """Compute the norm of vectors without overflow; its derivative at zero is zero."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(v), axis=-1, keepdims=True))
    largest = jnp.where(largest > 0, largest, 1)
    return largest[..., 0] * sqrt(jnp.sum((v / largest) ** 2, axis=-1))


def _times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Multiply matrices in full precision on every device."""
    size = vector.shape[-1]
    if size > 3:
        return jnp.einsum("...ij,...j->...i", matrix, vector, precision=jax.lax.Precision.HIGHEST)
    # Not as a product of matrices: a thousand of that size take ten times longer.
    rows = [_sum([matrix[..., i, j] * vector[..., j] for j in range(size)]) for i in range(size)]
    return jnp.stack(rows, axis=-1)


def _inverse(A: jax.Array) -> jax.Array:
    """Invert symmetric matrices of any signature."""
    if A.shape[-1] > 3:
        inverse = jnp.linalg.inv(A)
        return (inverse + jnp.swapaxes(inverse, -2, -1)) / 2
    scale = _scale(A)
    entries = _entries(A / scale[..., None, None])
    adjugate = _adjugate(entries)
    divisor = _determinant(entries, adjugate) * scale
    return _matrix([[entry / divisor for entry in row] for row in adjugate])


def _inverse_of_definite(A: jax.Array) -> jax.Array:
    """Invert positive definite matrices.

    A determinant would vanish in the rounding errors where two of three eigenvalues are small.
    """
    return _inverse(A) if A.shape[-1] > 3 else _matrix(_eliminated(_entries(A)))


def _eliminated(A: Entries) -> Entries:
    """Invert a positive definite matrix through the Schur complement of its first entry."""
    if len(A) == 1:
        return [[1 / A[0][0]]]
    rest = range(len(A) - 1)
    below = [A[i + 1][0] for i in rest]
    w = [entry / A[0][0] for entry in below]
    S = _eliminated([[A[i + 1][j + 1] - w[i] * below[j] for j in rest] for i in rest])
    Sw = [_sum([S[i][j] * w[j] for j in rest]) for i in rest]
    corner = 1 / A[0][0] + _sum([w[i] * Sw[i] for i in rest])
    return [[corner, *(-entry for entry in Sw)], *([-Sw[i], *S[i]] for i in rest)]


def _adjugate(A: Entries) -> Entries:
    """Compute the adjugate, the transposed cofactors, of a matrix of two or three rows."""
    if len(A) == 2:
        return [[A[1][1], -A[0][1]], [-A[1][0], A[0][0]]]

    def cofactor(i: int, j: int) -> jax.Array:
        a, b, c, d = (i + 1) % 3, (i + 2) % 3, (j + 1) % 3, (j + 2) % 3
        return A[a][c] * A[b][d] - A[a][d] * A[b][c]

    return [[cofactor(j, i) for j in range(3)] for i in range(3)]


def _determinant(A: Entries, adjugate: Entries) -> jax.Array:
    return _sum([A[0][j] * adjugate[j][0] for j in range(len(A))])


def _plus_diagonal(A: Entries, number: Any) -> Entries:
    return [[entry + number if i == j else entry for j, entry in enumerate(row)] for i, row in enumerate(A)]


def _sum_of_squares(A: Entries) -> jax.Array:
    return _sum([entry * entry for row in A for entry in row])


def _sum(terms: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _entries(A: jax.Array) -> Entries:
    return [[A[..., i, j] for j in range(A.shape[-1])] for i in range(A.shape[-1])]


def _matrix(rows: Entries) -> jax.Array:
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def _scale(A: jax.Array) -> jax.Array:
    """Return a power of two near the largest entry of each matrix, to divide by without a rounding error."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(A), axis=(-2, -1)))
    mantissa, _ = jnp.frexp(largest)
    is_normal = largest > jnp.finfo(A.dtype).tiny
    return jnp.where(is_normal, largest / jnp.where(is_normal, 2 * mantissa, 1), 1)


def _linearized(loss_fn: Callable[[Any], Any], x: Any, name: str) -> tuple[Any, Callable[[Any], Any]]:
    """Return the gradient at ``x`` and its linearization, from one evaluation."""

    def scalar(x: Any) -> Any:
        loss = loss_fn(x)
        if jnp.shape(loss) != ():
            raise ValueError(
                f"{name} returned a loss of shape {jnp.shape(loss)}. Newton's method takes a scalar: return the sum "
                "over the batch."
            )
        return loss

    return jax.linearize(jax.grad(scalar), x)


def _checked_point(name: str, x: Any) -> jax.Array:
    """Return a parameter in its computing dtype; raise if Newton's method does not apply to it."""
    x = trees.check_array("parameter", name, x)
    if is_complex(x):
        raise TypeError(
            f"The parameter {name!r} has dtype {x.dtype}. Newton's method takes real parameters; optimize the real and "
            "imaginary parts as two parameters."
        )
    if x.shape[-1:] == (0,):
        raise ValueError(f"The parameter {name!r} has shape {x.shape}. Newton's method takes (..., D) with D >= 1.")
    return x.astype(computing_dtype(x.dtype))


def _checked_radius(radius: Any, batch: tuple[int, ...] | None = None, name: str = "trust_radius") -> Any:
    """Check that a radius is positive, if it is concrete, and broadcasts to the batch axes if they are given."""
    numeric = int | float | np.number | np.ndarray | jax.Array
    if isinstance(radius, bool) or not isinstance(radius, numeric):
        raise TypeError(
            f"Invalid {name}: {shown(radius)} ({type(radius).__name__}). Give a number or an array > 0, or None "
            "for no limit."
        )
    if is_known(radius) and not _RADIUS.admits(radius):
        raise ValueError(f"Invalid {name}: {shown(radius)}. The radius of a trust region is > 0, or None for no limit.")
    shape = np.shape(radius)
    # Like jnp.broadcast_shapes, but the batch stays as it is.
    fits = batch is None or (
        len(shape) <= len(batch) and all(a in (1, b) for a, b in zip(shape[::-1], batch[::-1], strict=False))
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {shape}, but the batch axes are {batch}. Give one radius, or an array that broadcasts "
            "to the shape of the parameter without its last axis."
        )
    return radius


@rule
class Newton(Hyperparameters):
    r"""Newton's method: a step of :func:`jaxoptim.newton_step` on every parameter.

    .. math::
        \theta_i \leftarrow \theta_i - A_i^{-1} g_i, \qquad
        A_i = H_i + \max\bigl(\lVert g_i \rVert / r_i - \lambda_{\min}(H_i),\ 10^{-8}\bigr)\,I

    Each parameter, of shape (..., D), is a batch of independent problems of D dimensions. All gradients
    :math:`g_i` and Hessians :math:`H_i` are taken at the old point, one parameter at a time: block diagonal.
    Without a radius :math:`A_i = H_i`.

    The transformation's ``update(grads, state, params, value_fn=)`` makes one step. ``value_fn(params)`` is the
    loss, of which it takes the derivatives by itself, all from one evaluation, with params in at least float32;
    ``grads`` say which parameters are held fixed (None) and the dtypes of the updates. Jit the update.

    Args:
        trust_radii: a dict from the dotted path of a parameter to the radius of its trust region: a number > 0,
            or an array that broadcasts to the batch axes. Parameters without one have no limit (default None:
            none has). A bare array is named ``params``.

    State:
        None but the count of updates.

    Raises:
        Construction raises ``TypeError`` for what is not a dict from names to numbers, and ``ValueError`` for a
        radius that is not positive; ``init`` and ``update`` raise ``ValueError`` for the name of no parameter,
        and ``TypeError`` for a parameter that is not real floating. ``update`` raises ``ValueError`` without
        ``params`` or ``value_fn``.

    References:
        Nocedal, Wright, Numerical Optimization, 2nd ed. 2006, chapter 4; ``pyro.optim.multi.Newton``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxoptim.rules.newton import newton
        >>> loss = lambda p: jnp.sum((p["x"] - 3) ** 2) + jnp.cosh(p["y"])
        >>> tx, params = newton(trust_radii={"x": 1.0}), {"x": jnp.zeros((2, 1)), "y": jnp.array(0.1)}
        >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
        >>> params = optax.apply_updates(params, updates)
        >>> params["x"].tolist(), round(float(params["y"]), 3)
        ([[1.0], [1.0]], 0.0)
    """

    trust_radii: Arrays = None

    def __post_init__(self) -> None:
        given = {} if self.trust_radii is None else self.trust_radii
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise TypeError(
                f"Invalid trust_radii: {shown(given)}. Newton takes a dict from the dotted path of a parameter to the "
                'radius of its trust region, such as {"encoder.scale": 0.1}.'
            )
        radii = {name: _validated(radius, name) for name, radius in given.items() if radius is not None}
        object.__setattr__(self, "trust_radii", radii)
        super().__post_init__()

    def check_names(self, names: list[str]) -> None:
        """Raise a ``ValueError`` for a radius whose name is that of none of these parameters."""
        if unknown := [name for name in self.trust_radii if name not in names]:
            raise ValueError(
                f"trust_radii has {', '.join(map(repr, unknown))}, but there is no such parameter. The parameters are "
                f"{', '.join(map(repr, names)) or 'none'}."
            )


def _validated(radius: Any, name: str) -> Any:
    """Return a radius as a leaf of the rule: of one type for every plain number, so that an int does not retrace."""
    radius = _checked_radius(radius, name=f"trust_radii[{name!r}]")
    return float(radius) if isinstance(radius, int | float | np.number) else radius


@transformation_of.register
def _whole_tree(rule: Newton, /) -> optax.GradientTransformationExtraArgs:
    """Make the transformation: one step on every parameter, all others held at the old point."""

    def init(params: Any) -> OptState:
        tree = params.unpack() if isinstance(params, Packed) else params
        # optax initialises on trees without arrays, such as those of placeholders.
        if names := trees.array_names(tree):
            rule.check_names(names)
        for name, leaf in zip(trees.names(tree), jax.tree.leaves(tree, is_leaf=trees.is_leaf), strict=True):
            if leaf is not None:
                _check_leaf(name, leaf)
        return on_mesh_of(params, OptState(jnp.zeros((), jnp.int32), {}, {}))

    def update(
        grads: Any,
        state: OptState,
        params: Any = None,
        *,
        value: Any = None,
        grad: Any = None,
        value_fn: Callable[[Any], Any] | None = None,
        **extra: Any,
    ) -> tuple[Any, OptState]:
        loss_fn = given_loss("Newton takes second derivatives of the loss", params, value_fn)
        count = optax.safe_increment(state.step)
        if isinstance(params, Packed):
            packed, tree = params, params.unpack()
            given = grads.unpack() if isinstance(grads, Packed) else grads
            changes = _changes(rule, given, tree, lambda tree: loss_fn(packed.pack(tree)))
            return packed.pack(changes, "grads"), OptState(count, {}, {})
        return _changes(rule, grads, params, loss_fn), OptState(count, {}, {})

    return optax.GradientTransformationExtraArgs(init, update)


def _check_leaf(name: str, leaf: Any) -> None:
    """Raise for a parameter that Newton's method does not apply to; its shape and dtype suffice."""
    jax.eval_shape(lambda leaf: _checked_point(name, leaf), trees.as_array("parameter", name, leaf))


def _changes(rule: Newton, grads: Any, params: Any, value_fn: Callable[[Any], Any]) -> Any:
    """Return the change of each parameter, in the dtypes of the gradients; None where there is no gradient."""
    leaves, treedef = jax.tree.flatten(params, is_leaf=trees.is_leaf)
    given, names = trees.leaves_like(grads, params, "grads"), trees.names(params)
    rule.check_names(trees.array_names(params))
    dtypes, points, held = {}, {}, dict(zip(names, leaves, strict=True))
    for name, leaf, grad in zip(names, leaves, given, strict=True):
        if leaf is not None and grad is not None:
            grad = grad if hasattr(grad, "dtype") else jnp.asarray(grad)
            leaf = jnp.asarray(leaf)
            trees.check_shape("gradient", name, grad, leaf)
            dtypes[name], points[name] = grad.dtype, whole(_checked_point(name, leaf))

    def loss_at(points: dict[str, jax.Array]) -> Any:
        moved = held | {name: sharded_like(point, held[name]) for name, point in points.items()}
        return value_fn(jax.tree.unflatten(treedef, moved.values()))

    if not points:
        return jax.tree.unflatten(treedef, [None] * len(leaves))
    gradient, push = _linearized(loss_at, points, "value_fn")
    still = jax.tree.map(jnp.zeros_like, points)

    def change(name: str) -> jax.Array:
        block = hessian(lambda tangent: push(still | {name: tangent})[name], points[name])
        radius = rule.trust_radii.get(name)
        batch = points[name].shape[:-1]
        _checked_radius(1.0 if radius is None else radius, batch, f"trust_radii[{name!r}]")
        return sharded_like(solve(gradient[name], block, radius)[0].astype(dtypes[name]), held[name])

    return jax.tree.unflatten(treedef, [change(name) if name in points else None for name in names])


newton = factory(Newton, "newton")
