"""Modules of equinox and flax, and variables of linen: the arrays that are trained, and the rest.

Neither library is imported before a user has.
"""

from __future__ import annotations

import abc
import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import trees


class Module(abc.ABC):
    """A module as it was given, taken apart.

    Attributes:
        trained: the tree of the arrays that are trained, None in the place of anything else.
        rest: the arrays that the module may change when it is called (statistics, counts), None if there are none.
    """

    trained: Any
    rest: Any = None

    @abc.abstractmethod
    def joined(self, trained: Any, rest: Any) -> Any:
        """The module with these arrays."""

    def rest_of(self, module: Any, aux: Any) -> Any:
        """The arrays that a call may have changed, from the module and the auxiliary output of the loss."""
        return self.rest

    def gradients(self, grads: Any) -> Any:
        """Gradients as a tree like the one that is trained."""
        return grads


class EquinoxModule(Module):
    """An equinox module, whose inexact arrays are trained; whatever else it has stays."""

    def __init__(self, module: Any) -> None:
        self.trained = jax.tree.map(lambda x: x if _is_inexact(x) else None, module)
        self._others = jax.tree.map(lambda x: None if _is_inexact(x) else x, module)

    def joined(self, trained: Any, rest: Any) -> Any:
        """The module with these arrays."""
        return jax.tree.map(_either, trained, self._others, is_leaf=lambda x: x is None)


class NnxModule(Module):
    """An nnx module, whose ``nnx.Param`` are trained; its other variables are what a call may change."""

    def __init__(self, module: Any) -> None:
        from flax import nnx

        parts: Any = nnx.split(module, nnx.Param, ...)
        self._structure, self.trained, self._first = parts
        self.rest = self._first if jax.tree.leaves(self._first) else None

    def joined(self, trained: Any, rest: Any) -> Any:
        """The module with these arrays."""
        from flax import nnx

        return nnx.merge(self._structure, trained, self._first if rest is None else rest, copy=True)

    def rest_of(self, module: Any, aux: Any) -> Any:
        """The arrays that a call may have changed."""
        from flax import nnx

        parts: Any = nnx.split(module, nnx.Param, ...)
        given, known = (set(trees.names(rest)) for rest in (parts[-1], self._first))
        if given != known:
            raise TypeError(
                f"The loss has changed which variables the module has, {min(given ^ known)!r} among them. Make all of "
                "them in the module's constructor, and take out what it sows (nnx.pop)."
            )
        return parts[-1]


class LinenVariables(Module):
    """The variables of a linen module, of which ``"params"`` is trained; its other collections may be changed.

    They come back in the auxiliary output of the loss, if that is a dict of collections, as ``apply(..., mutable=)``
    gives.
    """

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._kind: Any = type(variables)
        self._names = list(variables)
        self.trained = {"params": variables["params"]}
        self.rest = {name: jax.tree.map(jnp.asarray, x) for name, x in variables.items() if name != "params"}

    def joined(self, trained: Any, rest: Any) -> Any:
        """The variables with these arrays."""
        every = {**trained, **rest}
        return self._kind({name: every[name] for name in self._names})

    def rest_of(self, module: Any, aux: Any) -> Any:
        """The collections that a call may have changed."""
        rest = {name: module[name] for name in self.rest}
        if not isinstance(aux, Mapping) or not aux or not aux.keys() <= rest.keys():
            return rest
        for name, new in aux.items():
            trees.arrays_like(new, rest[name], f"the loss's {name}", f"the variables' {name}")
        return rest | dict(aux)

    def gradients(self, grads: Any) -> Any:
        """Gradients of the collection that is trained."""
        is_whole = isinstance(grads, Mapping) and grads.keys() == {"params", *self.rest}
        return {"params": grads["params"]} if is_whole else grads


def module_of(params: Any) -> Module | None:
    """The parts of a module of equinox or nnx; None for anything else."""
    if _is_of("equinox", params):
        return EquinoxModule(params)
    return NnxModule(params) if is_nnx(params) else None


def parts_of(params: Any) -> Module | None:
    """The parts of a module, or of linen's variables with batch statistics; None for anything else."""
    if isinstance(params, Mapping) and {"params", "batch_stats"} <= params.keys():
        return LinenVariables(params)
    return module_of(params)


def is_nnx(params: Any) -> bool:
    """Whether something is a module of nnx."""
    return _is_of("flax.nnx", params)


def _is_of(library: str, params: Any) -> bool:
    loaded = sys.modules.get(library)
    return loaded is not None and isinstance(params, loaded.Module)


@dataclasses.dataclass(frozen=True)
class ModuleLoss:
    """A loss of a module as one of the arrays that are trained, and of the rest if there is some.

    Attributes:
        module: the parts of the module, the same object at each step.
        function: as given.
        has_aux: whether it returns an auxiliary output too.
    """

    module: Module
    function: Callable[..., Any]
    has_aux: bool

    def __call__(self, trained: Any, *args: Any, **kwargs: Any) -> Any:
        """What the function returns; where there is a rest, the loss, and ``(aux, the rest after it)``."""
        if self.module.rest is None:
            return self.function(self.module.joined(trained, None), *args, **kwargs)
        module = self.module.joined(trained, args[0])
        result = self.function(module, *args[1:], **kwargs)
        loss, aux = result if self.has_aux else (result, None)
        return loss, (aux, self.module.rest_of(module, aux))


def _is_inexact(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _either(array: Any, other: Any) -> Any:
    return other if array is None else array
