"""The response matrix of a model's structures to weights of data, and its inverse."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np


class SingularVectors(NamedTuple):
    r"""The singular value decomposition :math:`\chi = U \,\mathrm{diag}(s)\, V^T`.

    Attributes:
        left: U, ``(rows, k)``: in each column structures that answer together.
        values: s, ``(k,)``, the largest first; k is the smaller number of rows or columns.
        right: V, ``(columns, k)``: in each column the weights of data that they answer to.
    """

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray


@dataclasses.dataclass(frozen=True)
class Response:
    r"""The first-order response of structures to weights of data: :math:`d\mu = \chi\, dh`.

    Attributes:
        matrix: :math:`\chi`, ``(rows, columns)``: a row for each selection of parameters.
        std_error: the standard error of each number.
        rows: the names of the selections.
        columns: the names of the data.
    """

    matrix: np.ndarray
    std_error: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def __repr__(self) -> str:
        """Return the shape in a line."""
        rows, columns = self.matrix.shape
        return f"Response({rows} selections, {columns} columns)"

    @property
    def singular_vectors(self) -> SingularVectors:
        """The singular vectors and values, as :class:`SingularVectors`; ``ValueError`` where a number is not finite."""
        self._check_finite()
        left, values, right = np.linalg.svd(self.matrix, full_matrices=False)
        return SingularVectors(left, values, right.T)

    def pseudo_inverse(self, rtol: float | None = None) -> np.ndarray:
        r"""Return :math:`\chi^+`: the smallest weights that move structures as wanted (patterning).

        .. math::
            dh = \chi^+ d\mu

        Args:
            rtol: the share of the largest singular value, from 0 to 1, up to which others count as zero: those that
                are smaller than their errors make large weights of noise (default None: rounding alone).

        Returns:
            ``(columns, rows)``.

        Raises:
            ``ValueError`` for an ``rtol`` out of range, and where a number of the matrix is not finite.

        References:
            Wang, Murfet, Patterning: the dual of interpretability, 2026.

        Examples:
            >>> import numpy as np
            >>> from jaxoptim.sampling import Response
            >>> matrix = np.array([[2.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
            >>> response = Response(matrix, np.zeros((2, 3)), ("head 0", "head 1"), ("a", "b", "c"))
            >>> response
            Response(2 selections, 3 columns)
            >>> response.singular_vectors.values.tolist()
            [4.0, 2.0]
            >>> (response.pseudo_inverse() @ [1.0, 0.0]).tolist()  # head 0 is to move, head 1 is not
            [0.5, 0.0, 0.0]
        """
        if rtol is not None and not _is_share(rtol):
            raise ValueError(f"Invalid rtol: {rtol!r}. It is a number from 0 to 1, or None.")
        self._check_finite()
        rounding = max(self.matrix.shape) * float(np.finfo(self.matrix.dtype).eps)
        return np.linalg.pinv(self.matrix, rtol=rounding if rtol is None else float(rtol))

    def _check_finite(self) -> None:
        bad = [self.columns[i] for i in np.flatnonzero(~np.isfinite(self.matrix).all(0))]
        if bad:
            raise ValueError(f"The response to {len(bad)} columns, {bad[0]!r} first, is not finite. Leave them out.")


def _is_share(x: Any) -> bool:
    """Return whether an object is a number from 0 to 1."""
    return isinstance(x, int | float | np.floating) and not isinstance(x, bool) and 0 <= float(x) <= 1
