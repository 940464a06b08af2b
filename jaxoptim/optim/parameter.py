"""The mutable cell that an optimizer updates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO

from jaxoptim.core import owned
from jaxoptim.core.foreign import check_not_trained_by_torch
from jaxoptim.core.numerics import strong
from jaxoptim.core.shown import shown
from jaxoptim.engine.records import Keeper


class Parameter:
    """An array that changes its value, as torch's ``Parameter``.

    Args:
        value: a floating or complex array, or a number. It is copied.
        name: a name for error messages and for matching checkpoints (default None).

    Attributes:
        value: the current array. What was read stays valid however often the parameter is updated. Assign
            an array of the same shape to change it.
        grad: the gradient that ``step()`` uses, an array or a ``BCOO`` of rows; None skips the parameter.
        name: as given; the dotted path if the optimizer was given a pytree.
        requires_grad: whether steps update it (default True); otherwise they leave it, its state and its count as they
            are, whatever its gradient. (torch leaves it alone only where there is no ``grad``.)
        shape: of the value.
        dtype: of the value.
        had_grad: whether a gradient was ever assigned.
        dct_dim: the axis, negative, along which a Pyro-style ``DCTAdam`` transforms the gradient (default None).
        subsample: the indices that the next gradient belongs to, for a Pyro-style ``DCTAdam`` with subsamples: a
            dict of negative axis to indices along it (default None: everything).

    Raises:
        ``TypeError`` for a value that is not floating or complex, or that torch trains; ``ValueError`` for a value
        or gradient of another shape.

    Examples:
        >>> from jaxoptim import optim
        >>> weight = optim.Parameter([1.0, -2.0], name="weight")
        >>> weight.grad = 2 * weight.value
        >>> optim.SGD([weight], lr=0.1).step()
        >>> [round(x, 3) for x in weight.value.tolist()]
        [0.8, -1.6]
    """

    __slots__ = (
        "__weakref__",
        "_grad",
        "_index",
        "_keeper",
        "_requires_grad",
        "_value",
        "dct_dim",
        "dtype",
        "had_grad",
        "name",
        "shape",
        "subsample",
    )

    def __init__(self, value: Any, name: str | None = None) -> None:
        self.name = name
        self._value: jax.Array | None = _copied(value, name)
        self._grad: Any = None
        self.had_grad = False
        self._keeper: Keeper | None = None
        self._index = 0
        self._requires_grad = True
        self.shape: tuple[int, ...] = self._value.shape
        self.dtype = self._value.dtype
        self.dct_dim: int | None = None
        self.subsample: dict[int, Any] | None = None

    @property
    def value(self) -> jax.Array:
        """The current array."""
        return self._keeper.read(self._index) if self._value is None else self._value  # type: ignore[union-attr]

    @value.setter
    def value(self, value: Any) -> None:
        array = _copied(value, self.name)
        if array.shape != self.shape:
            raise ValueError(
                f"The value assigned to {self._described()} has shape {array.shape}, but the parameter has "
                f"{self.shape}. Make a new Parameter for another shape."
            )
        self.leave()
        self._value = array.astype(self.dtype)

    @property
    def grad(self) -> Any:
        """The gradient that ``step()`` uses."""
        return self._grad

    @grad.setter
    def grad(self, grad: Any) -> None:
        if grad is not None and not isinstance(grad, jax.Array | BCOO):
            grad = owned(grad)
        if isinstance(grad, jax.Array):
            grad = strong(grad)
        if grad is not None and grad.shape != self.shape:
            raise ValueError(
                f"The gradient assigned to {self._described()} has shape {grad.shape}, but the parameter has "
                f"{self.shape}. They must be equal."
            )
        self._grad = grad
        if grad is not None:
            self.had_grad = True

    @property
    def requires_grad(self) -> bool:
        """Whether steps update it."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, is_trained: bool) -> None:
        if not isinstance(is_trained, bool):
            raise TypeError(f"requires_grad of {self._described()} is True or False, but got {shown(is_trained)}.")
        self._requires_grad = is_trained
        if self._keeper is not None:
            change = self._keeper.held.discard if is_trained else self._keeper.held.add
            change(self._index)

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype, for abstract evaluation."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def enter(self, keeper: Keeper, index: int) -> None:
        """Let an optimizer keep the value from now on."""
        self.leave()
        self._keeper, self._index, self._value = keeper, index, None
        if not self._requires_grad:
            keeper.held.add(index)

    def leave(self) -> None:
        """Tell whoever keeps the value that they no longer do; the caller puts it elsewhere."""
        if self._keeper is not None:
            self._keeper.outdated.add(self._index)
            self._keeper.held.discard(self._index)
            self._keeper = None

    def _described(self) -> str:
        return "a parameter" if self.name is None else repr(self.name)

    def __repr__(self) -> str:
        name = "" if self.name is None else f", name={self.name!r}"
        return f"Parameter(shape={self.shape}, dtype={self.dtype}{name})"

    def __getstate__(self) -> dict[str, Any]:
        about = {"dct_dim": self.dct_dim, "subsample": self.subsample, "requires_grad": self._requires_grad}
        return {"value": self.value, "grad": self._grad, "name": self.name, **about}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["value"], state["name"])  # type: ignore[misc]
        self._grad, self.dct_dim, self.subsample = state["grad"], state["dct_dim"], state["subsample"]
        self.had_grad = self._grad is not None
        self._requires_grad = state.get("requires_grad", True)  # pickles of older versions lack it


def zeros_like(grad: Any) -> Any:
    """Return a gradient of zeros, of the same kind: a sparse one of zeros has no rows."""
    if not isinstance(grad, BCOO):
        return jnp.zeros_like(grad)
    return BCOO((grad.data[:0], grad.indices[:0]), shape=grad.shape)


def _copied(value: Any, name: str | None) -> jax.Array:
    """Return a copy of an array: optimizers donate the arrays that they hold, and NumPy arrays may change."""
    if isinstance(value, jax.Array):
        is_here = isinstance(value, jax.core.Tracer) or value.is_fully_addressable  # and not with other processes too
        array = strong(jax.device_put(value, may_alias=False) if is_here else jnp.copy(value))
    else:
        check_not_trained_by_torch("The value" if name is None else f"The value of {name!r}", value)
        array = owned(value)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(
            f"The parameter{'' if name is None else ' ' + repr(name)} has dtype {array.dtype}. Floating and complex "
            "arrays are optimized; put None in the place of anything else."
        )
    return array
