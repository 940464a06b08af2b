"""Sketches: hashed projections of pytrees to a few numbers, which nearly preserve inner products."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import trees
from jaxoptim.core.sketches import check, sketched
from jaxoptim.sampling.observables import Draw, Observable, at_draws

_OF = ("displacement", "gradient")


def sketch(tree: Any, dim: int, seed: Any = 0) -> jax.Array:
    r"""Return ``dim`` numbers whose products with those of other trees are nearly the products of the trees.

    With all numbers of the tree in one long vector v, leaf after leaf,

    .. math:: S(v)_j = \sum_{i:\,h(i) = j} s(i)\,v_i, \qquad j = 0, \ldots, k - 1,

    where the place :math:`h(i)` and the sign :math:`s(i)` are a hash of the number i and the seed, so that there are no
    tables. S is linear, and over seeds

    .. math::
        E\,S(v) \cdot S(u) = v \cdot u, \qquad
        \mathrm{Var}\,S(v) \cdot S(u) = \frac{1}{k}\Big(\|v\|^2 \|u\|^2 + (v \cdot u)^2 - 2 \sum_i v_i^2 u_i^2\Big).

    So the cosine of two sketches is that of the trees to about :math:`1/\sqrt{k}`. Sketches can be compared if trees of
    the same shapes were sketched with the same ``dim`` and seed.

    Args:
        tree: a pytree of floating or complex arrays; None leaves take no place, complex numbers are pairs of real ones.
        dim: :math:`k \ge 1`.
        seed: an int in :math:`[0, 2^{32})` (default 0); it may be traced, and another one compiles nothing anew.

    Returns:
        ``(dim,)``, in the dtype that all leaves promote to, float32 at least.

    Raises:
        ``ValueError`` for a ``dim`` or a seed out of range; ``TypeError`` for a leaf that is not floating or complex.

    References:
        Charikar, Chen, Farach-Colton, Finding frequent items in data streams, 2002 (the count sketch). Weinberger,
        Dasgupta, Langford, Smola, Attenberg, Feature hashing for large scale multitask learning, ICML 2009.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import sampling
        >>> v, u = {"w": jnp.ones(1000)}, {"w": jnp.arange(1000.0)}
        >>> a, b = (sampling.sketch(x, dim=256, seed=1) for x in (v, u))
        >>> exact, error = 499500.0, (1000 * 332833500.0 / 256) ** 0.5
        >>> a.shape, bool(abs(a @ b - exact) < 5 * error)
        ((256,), True)
    """
    check(dim, seed)
    leaves = zip(trees.names(tree), jax.tree.leaves(tree, is_leaf=trees.is_leaf), strict=True)
    arrays = [trees.check_array("leaf", name, leaf) for name, leaf in leaves if leaf is not None]
    return sketched(arrays, int(dim), jnp.asarray(seed, jnp.uint32))


@dataclasses.dataclass(frozen=True)
class Sketch(Observable):
    r"""The sketch of a chain's position, or of the gradient there, at each draw; see :func:`sketch`.

    The result is ``(chains, draws, dim)``: products, distances and angles of displacements, between draws and between
    chains, without keeping the parameters of each. All chains, and all runs with this ``dim`` and seed, have the same
    sketch, so that they can be compared.

    Args:
        dim: how many numbers, an int >= 1. The error of a cosine is about ``dim ** -0.5``.
        of: ``"displacement"``, :math:`w_t - w_0` from the initial parameters before the step, or ``"gradient"``, that
            of the loss there, of the batch of the step (default ``"displacement"``).
        seed: an int in :math:`[0, 2^{32})` (default 0).

    Raises:
        ``ValueError`` for a number out of range and another ``of``; in a run, ``TypeError`` for the displacement with a
        sampler that does not keep its initial parameters: one that is a transformation, or no sampler of this library.

    References:
        As :func:`sketch`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> samples = sampling.sample(
        ...     lambda w: jnp.sum(w**2) / 2, jnp.zeros(1000), rules.SGLD(lr=1e-3), key=jax.random.key(0),
        ...     num_chains=2, num_draws=100, observables={"sketch": sampling.Sketch(dim=16)})
        >>> samples.observables["sketch"].shape
        (2, 100, 16)
    """

    dim: int
    of: str = "displacement"
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.dim, self.seed)
        if self.of not in _OF:
            raise ValueError(f"Invalid of: {self.of!r}. Sketch takes {' or '.join(map(repr, _OF))}.")

    def update(self, memory: Any, draw: Draw) -> tuple[Any, Any]:
        def here() -> jax.Array:
            of = draw.grads if self.of == "gradient" else _displacement(draw)
            return sketch(of, self.dim, self.seed)

        return memory, at_draws(draw, here)


def _displacement(draw: Draw) -> Any:
    """Return the displacement of a chain from its initial parameters."""
    slots = getattr(draw.state, "slots", {})
    if "initial_param" not in slots:
        raise TypeError(
            "Sketch of the displacement takes a rule that keeps its initial parameters, such as rules.SGLD. With this "
            "sampler observe lambda w: sampling.sketch(jax.tree.map(jnp.subtract, w, start), dim)."
        )
    return jax.tree.map(jnp.subtract, draw.arrays, slots["initial_param"])
