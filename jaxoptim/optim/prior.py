"""Priors of :class:`jaxoptim.optim.SGMCMC`, by the names that they have in devinterp."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import as_jax, trees
from jaxoptim.core.names import listing
from jaxoptim.core.shown import shown
from jaxoptim.optim.parameter import Parameter

__all__ = [
    "CompositePrior",
    "GaussianPrior",
    "UniformPrior",
]
__dir__ = listing(__all__)

_SLOT = "prior_center"


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianPrior:
    r"""A Gaussian prior, which pulls to its center.

    .. math:: -\log p(w) = \tfrac{\gamma}{2} \|w - c\|^2 + \text{const}

    Args:
        localization: strength :math:`\gamma \ge 0`, the inverse of the variance.
        center: :math:`c`: ``"initial"`` for the parameters at construction, None for zero, a number, or a tree like the
            parameters, or a list of arrays in the order of the group's (default ``"initial"``).

    Differences from devinterp:
        A number is the center (there it is taken for zero), and any other text is an error (there it is zero too).

    Raises:
        ``ValueError`` for a strength that is no number >= 0, and for other text.

    Examples:
        >>> from jaxoptim.optim.prior import GaussianPrior
        >>> GaussianPrior(2.0, center=None)
        GaussianPrior(localization=2.0, center=None)
    """

    localization: Any
    center: Any = "initial"

    def __post_init__(self) -> None:
        strength = self.localization
        if not _is_number(strength) or not strength >= 0:
            raise ValueError(f"Invalid localization: {shown(strength)}. GaussianPrior takes a number >= 0.")
        if isinstance(self.center, str) and self.center != "initial":
            raise ValueError(
                f"Invalid center: {shown(self.center)}. GaussianPrior takes 'initial', None for zero, a number, or a "
                "tree like the parameters."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class UniformPrior:
    """The flat prior, which pulls nowhere.

    Args:
        box_size: infinity (default), as in devinterp.

    Raises:
        ``NotImplementedError`` for another size, with what to do.

    Examples:
        >>> from jaxoptim.optim.prior import UniformPrior
        >>> UniformPrior()
        UniformPrior(box_size=inf)
    """

    box_size: float = math.inf

    def __post_init__(self) -> None:
        if self.box_size != math.inf:
            raise NotImplementedError(
                f"UniformPrior has no box_size {shown(self.box_size)}. Give the sampler a bounding_box_size, which "
                "keeps it to a box around the initial parameters."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class CompositePrior:
    r"""The product of priors, which pulls with the sum of their forces.

    Args:
        priors: Gaussian and flat ones. At most one of the Gaussians has another center than zero: several are the same
            as one of the strength :math:`\gamma = \sum_i \gamma_i` around :math:`\sum_i \gamma_i c_i / \gamma`.

    Raises:
        ``TypeError`` for anything but a Gaussian or flat prior, ``ValueError`` for two centers.

    Examples:
        >>> from jaxoptim.optim.prior import CompositePrior, GaussianPrior
        >>> prior = CompositePrior([GaussianPrior(0.1, center=None), GaussianPrior(2.0)])
        >>> len(prior.priors)
        2
    """

    priors: Sequence[Any]

    def __post_init__(self) -> None:
        if wrong := [x for x in self.priors if not isinstance(x, GaussianPrior | UniformPrior)]:
            raise TypeError(
                f"CompositePrior takes a list of GaussianPrior and UniformPrior, but got {shown(wrong[0], 200)}."
            )
        if (count := sum(isinstance(x, GaussianPrior) and x.center is not None for x in self.priors)) > 1:
            raise ValueError(
                f"CompositePrior takes one prior with another center than zero, but got {count}. Give one "
                "GaussianPrior with the sum of their localization, around the mean of their centers with these "
                "weights: it is the same."
            )


Prior = GaussianPrior | UniformPrior | CompositePrior


class Terms(NamedTuple):
    """A prior as the terms of a potential.

    Attributes:
        weight_decay: the strength toward zero.
        localization: the strength toward the center.
        center: see :class:`GaussianPrior`; never None.
        slot: the name under which devinterp keeps the center.
    """

    weight_decay: Any = 0.0
    localization: Any = 0.0
    center: Any = "initial"
    slot: str = _SLOT


def terms_of(prior: Any, strength: Any = 1.0) -> Terms:
    """Return the terms of a prior that devinterp's ``SGMCMC`` takes.

    Args:
        prior: a prior; a number, its strength around the initial parameters; its center, ``"initial"`` or a tree; or
            None.
        strength: of a prior that is given by its center (default 1).
    """
    if prior is None:
        return Terms()
    if not isinstance(prior, Prior):
        prior = GaussianPrior(prior) if _is_number(prior) else GaussianPrior(strength, center=prior)
    terms, place = Terms(), 0
    for member in prior.priors if isinstance(prior, CompositePrior) else [prior]:
        if isinstance(member, UniformPrior):
            continue
        if member.center is None:
            terms = terms._replace(weight_decay=terms.weight_decay + member.localization)
        else:
            slot = f"{_SLOT}_{place}" if isinstance(prior, CompositePrior) else _SLOT
            terms = terms._replace(localization=member.localization, center=member.center, slot=slot)
        place += 1
    return terms


def centers_of(center: Any, params: Sequence[Parameter]) -> list[jax.Array]:
    """Return a center for each parameter of a group.

    Args:
        center: a number, a list in the order of the parameters, or a tree that has their names.
        params: the parameters.

    Raises:
        ``ValueError`` for another number of arrays, another name or shape; ``TypeError`` for anything but an array.
    """
    if _is_number(center):
        return [jnp.full(param.shape, center, param.dtype) for param in params]
    names, leaves = trees.array_names(center), jax.tree.leaves(center)
    if not isinstance(center, list | tuple):
        of_name: dict[str | None, Any] = dict(zip(names, leaves, strict=True))
        if missing := [param.name for param in params if param.name not in of_name]:
            raise ValueError(
                f"The center of a prior has nothing for {missing[0]!r}; it has {', '.join(names)}. Give a tree like "
                "the parameters, or a list of arrays in their order."
            )
        leaves = [of_name[param.name] for param in params]
    if len(leaves) != len(params):
        raise ValueError(
            f"The center of a prior has {len(leaves)} arrays, but the group has {len(params)} parameters. Give one for "
            "each of them."
        )
    found = []
    for at, (leaf, param) in enumerate(zip(leaves, params, strict=True)):
        name = param.name or f"params[{at}]"
        value = trees.check_array("center of", name, as_jax(leaf))
        trees.check_shape("center", name, value, param)
        found.append(value)
    return found


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.number) and not isinstance(x, bool)
