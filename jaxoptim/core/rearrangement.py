"""Permutations of an array's elements: a linear layer's ``[out, in]`` as a kernel's ``[in, out]``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Rearrangement:
    """A permutation of an array's elements, possibly with a new shape.

    Attributes:
        index: an array of the new shape, with the position of each element in the flattened old array.
        shape: the old shape.

    Examples:
        >>> import numpy as np
        >>> from jaxoptim.core import Rearrangement
        >>> transpose = Rearrangement.of(np.transpose, (2, 3), "weight")
        >>> transpose(np.arange(6.0).reshape(2, 3)).tolist()
        [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
        >>> transpose.inverse()(np.ones((3, 2))).shape
        (2, 3)
    """

    index: np.ndarray
    shape: tuple[int, ...]

    @classmethod
    def of(cls, function: Callable[[Any], Any], shape: tuple[int, ...], name: str) -> Rearrangement:
        """Find the permutation that a function makes of an array of this shape, by applying it to the positions.

        Raises:
            ``ValueError`` that names the parameter, if the function does anything but move the numbers.
        """
        positions = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
        try:
            index = np.asarray(function(positions))
        except Exception as error:
            raise ValueError(
                f"The transform of {name!r} fails on an array of shape {shape}: {error}. It is given a NumPy array; "
                "functions of numpy and jax.numpy take that."
            ) from error
        if not _is_permutation(index, positions.size):
            raise ValueError(
                f"The transform of {name!r} changes numbers or loses some. It may only move them, as a transposition "
                "or a reshape does: the squares in exp_avg_sq, for one, would not follow anything else."
            )
        return cls(index, tuple(shape))

    def __call__(self, array: Any) -> jax.Array:
        """Apply the permutation to an array."""
        return jnp.asarray(np.asarray(array).reshape(-1)[self.index])

    def inverse(self) -> Rearrangement:
        """The inverse permutation."""
        back = np.empty(self.index.size, np.int32)
        back[self.index.reshape(-1)] = np.arange(self.index.size, dtype=np.int32)
        return Rearrangement(back.reshape(self.shape), self.index.shape)

    def is_identity(self) -> bool:
        """Whether the array stays as it is: every element in its place."""
        return self.shape == self.index.shape and np.array_equal(self.index.reshape(-1), np.arange(self.index.size))

    def is_transposition(self) -> bool:
        """Whether the permutation is the transposition of a matrix."""
        return len(self.shape) == 2 and np.array_equal(self.index, np.arange(self.index.size).reshape(self.shape).T)


def _is_permutation(index: np.ndarray, size: int) -> bool:
    """Whether each position occurs once."""
    if index.size != size or index.dtype.kind not in "iu" or (size and not 0 <= index.min() <= index.max() < size):
        return False
    seen = np.zeros(size, bool)
    seen[index.reshape(-1)] = True
    return bool(seen.all())
