"""The rate at which a Metropolis test would accept the steps of SGLD."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import is_known, trees
from jaxoptim.core.leaf import by_leaf
from jaxoptim.core.numerics import view_as_real
from jaxoptim.core.precision import widened
from jaxoptim.rules._langevin import force, masked, potential


def mala_acceptance(x: Any, grad_x: Any, U_x: Any, y: Any, grad_y: Any, U_y: Any, lr: Any) -> jax.Array:
    r"""The probability with which the Metropolis-adjusted Langevin algorithm accepts the step from x to y.

    For a proposal :math:`y \sim N(x - \tfrac{\epsilon}{2}\nabla U(x), \epsilon)`

    .. math::
        \log\alpha = U(x) - U(y) + \tfrac12 (y - x)\cdot(\nabla U(x) + \nabla U(y))
        - \tfrac{\epsilon}{8}\left(\|\nabla U(y)\|^2 - \|\nabla U(x)\|^2\right),

    the error of the trapezoidal rule and a difference of squares: nothing large cancels. A chain whose steps are
    accepted nearly always has little error of discretization.

    Args:
        x: the position before the step, a pytree of arrays; complex numbers are pairs of real ones.
        grad_x: the gradient of the potential there, a tree like ``x``, zero where a mask holds it.
        U_x: the potential there, a scalar.
        y: the position after the step.
        grad_y: the gradient there.
        U_y: the potential there.
        lr: step size :math:`\epsilon`.

    Returns:
        :math:`\min(1, \alpha)`, a scalar.

    Raises:
        ``ValueError`` for trees of another structure or shape than ``x``, and for a negative ``lr``;
        ``TypeError`` for a potential or an ``lr`` that is no real scalar.

    References:
        Roberts, Tweedie, Exponential convergence of Langevin distributions and their discrete approximations,
        Bernoulli 1996.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.sampling import mala_acceptance
        >>> U = lambda w: 2 * w**2
        >>> round(float(mala_acceptance(0.5, 2.0, U(0.5), 1.0, 4.0, U(1.0), lr=0.1)), 4)
        0.8607
    """
    for name, value in (("U_x", U_x), ("U_y", U_y), ("lr", lr)):
        _check_scalar(name, value)
    if is_known(lr) and not lr >= 0:
        raise ValueError(f"Invalid lr: {lr!r}. It is a step size >= 0.")
    like = jax.tree.map(jnp.asarray, x)
    given = {"grad_x": grad_x, "y": y, "grad_y": grad_y}
    leaves = {name: map(_real, trees.arrays_like(tree, like, name, "x")) for name, tree in given.items()}
    work = squares = jnp.zeros(())
    for a, grad_a, b, grad_b in zip(map(_real, jax.tree.leaves(like)), *leaves.values(), strict=True):
        work = work + jnp.sum((b - a) * (grad_a + grad_b)) / 2
        squares = squares + jnp.sum((grad_b - grad_a) * (grad_b + grad_a))
    return jnp.exp(jnp.minimum(0, widened(U_x) - widened(U_y) + work - lr / 8 * squares))


def potential_at(rule: Any, state: Any, position: Any, loss: Any, grads: Any) -> tuple[jax.Array, Any]:
    r"""The potential :math:`n\beta L + \tfrac{\lambda}{2}\|w\|^2 + \tfrac{\gamma}{2}\|w - c\|^2` and its gradient.

    Directions that a mask holds take no part.

    Args:
        rule: the rule ``SGLD``.
        state: its state.
        position: the parameters w.
        loss: L there.
        grads: its gradient.
    """
    params, treedef = jax.tree.flatten(position, is_leaf=trees.is_leaf)
    of_loss = jax.tree.leaves(grads, is_leaf=trees.is_leaf)
    centers = jax.tree.leaves(state.slots["initial_param"], is_leaf=trees.is_leaf)
    energy, forces = rule.nbeta * loss, list[Any]()
    for one, param, grad, center in zip(by_leaf(rule, position, "params"), params, of_loss, centers, strict=True):
        if param is None:
            forces.append(None)
            continue
        slots = {"initial_param": center}
        energy = energy + potential(one, 0.0, slots, param)
        forces.append(masked(one, force(one, grad, slots, param)))
    return jnp.asarray(energy, float), jax.tree.unflatten(treedef, forces)


def _real(x: jax.Array) -> jax.Array:
    """Return an array in its computing dtype, complex numbers as pairs."""
    return view_as_real(widened(x))


def _check_scalar(name: str, value: Any) -> None:
    """Raise for anything but a real scalar."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and not (is_array and jnp.ndim(value) == 0 and jnp.issubdtype(value.dtype, jnp.floating)):
        given = f"shape {value.shape} and dtype {value.dtype}" if is_array else f"a {type(value).__name__}"
        raise TypeError(f"{name} is a real scalar, but got {given}. Give one number; jax.vmap is for more of them.")
