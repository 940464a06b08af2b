"""Modules of equinox and flax, and variables of linen: the arrays that are trained, and the rest.

Neither library is imported before a user has.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import trees
from jaxoptim.core.foreign import ARRAYS_ALONE
from jaxoptim.core.loss import loss_and_aux
from jaxoptim.core.shown import shown


class Rest(NamedTuple):
    """The arrays of a module that are not trained.

    Attributes:
        changing: those that a call of the module may change (statistics, counts); None if there are none.
        kept: the others; None if there are none.
    """

    changing: Any = None
    kept: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Rest:
        return self  # arrays stay as they are, and a State of nnx would lose its variables


class ModuleDef(abc.ABC):
    """The static part of a module, without its arrays, as a treedef is a pytree without its leaves.

    It is the key of compiled programs. Modules of equal structure share one object, and so share programs.
    """

    @abc.abstractmethod
    def split(self, module: Any) -> tuple[Any, Rest]:
        """Split the arrays of a module into the pytree of the trained ones and the rest."""

    @abc.abstractmethod
    def joined(self, trained: Any, rest: Rest) -> Any:
        """Rebuild the module with these arrays."""

    def changed(self, module: Any, aux: Any, before: Any) -> Any:
        """Return the changeable arrays after a call, from the module, the auxiliary output, or else as before."""
        return before

    def gradients(self, grads: Any) -> Any:
        """Return gradients as a pytree like the trained one."""
        return grads


class Parts(NamedTuple):
    """A module split into its static definition, its trained arrays, and the rest.

    Attributes:
        definition: the module without its arrays.
        trained: the tree of the arrays that are trained, None in the place of anything else.
        rest: its other arrays.
    """

    definition: ModuleDef
    trained: Any
    rest: Rest


class EquinoxDef(ModuleDef):
    """An equinox module, whose inexact arrays are trained."""

    def __init__(self, module: Any) -> None:
        self._others = jax.tree.map(lambda x: None if _is_array(x) else x, module)

    def key(self) -> Any:
        """Return the key that equal definitions share; not hashable if something in the module is not."""
        leaves, treedef = jax.tree.flatten(self._others)
        # Of the numbers 1, 1.0 and True, and of 0.0 and -0.0, each has programs of its own.
        return treedef, tuple((type(x), repr(x) if isinstance(x, float | complex) else x) for x in leaves)

    def split(self, module: Any) -> tuple[Any, Rest]:
        """Split the module into its inexact arrays and the others."""
        trained = jax.tree.map(lambda x: x if _is_inexact(x) else None, module)
        others = jax.tree.map(lambda x: jnp.asarray(x) if _is_array(x) and not _is_inexact(x) else None, module)
        return trained, Rest(kept=_if_any(others))

    def joined(self, trained: Any, rest: Rest) -> Any:
        """Rebuild the module with these arrays."""
        parts = [part for part in (trained, rest.kept, self._others) if part is not None]
        return jax.tree.map(_first, *parts, is_leaf=lambda x: x is None)


class NnxDef(ModuleDef):
    """An nnx module: selected variables are trained; a call may change the others, except ``nnx.Param``.

    Args:
        module: the module.
        wrt: nnx's predicate that selects the trained variables.
    """

    def __init__(self, module: Any, wrt: Any) -> None:
        from flax import nnx

        self._structure: Any = nnx.graphdef(module)
        self.wrt: Any = wrt
        self._takes_some = wrt != nnx.filterlib.to_predicate(nnx.Param)

    def key(self) -> Any:
        """Return the key that equal definitions share; not hashable if something in the module is not."""
        return self._structure, self.wrt

    def split(self, module: Any) -> tuple[Any, Rest]:
        """Split the variables into the trained ones and the others."""
        from flax import nnx

        parts: Any = nnx.split(module, self.wrt, nnx.Not(nnx.Param), ...)
        _, trained, changing, kept = parts
        return trained, Rest(_if_any(changing), _if_any(kept))

    def joined(self, trained: Any, rest: Rest) -> Any:
        """Rebuild the module with these arrays."""
        from flax import nnx

        return nnx.merge(self._structure, trained, *(part for part in rest if part is not None), copy=True)

    def changed(self, module: Any, aux: Any, before: Any) -> Any:
        """Return the variables that a call may have changed."""
        after = self.split(module)[1].changing
        given, known = (set(trees.names(variables)) for variables in (after, before))
        if given != known:
            raise TypeError(
                f"The loss has changed which variables the module has, {min(given ^ known)!r} among them. Make all of "
                "them in the module's constructor, and take out what it sows (nnx.pop)."
            )
        return after

    def gradients(self, grads: Any) -> Any:
        """Return the gradients of the trained variables, of those that ``nnx.grad`` took of every ``nnx.Param``."""
        from flax import nnx

        return nnx.filter_state(grads, self.wrt) if self._takes_some and isinstance(grads, nnx.State) else grads


class LinenDef(ModuleDef):
    """The variables of a linen module, of which ``"params"`` is trained; its other collections may be changed.

    They come back in the auxiliary output of the loss, if that is a dict of collections, as ``apply(..., mutable=)``
    gives.
    """

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._kind: Any = type(variables)
        self._names = tuple(variables)

    def key(self) -> Any:
        """Return the key that equal definitions share."""
        return self._kind, self._names

    def split(self, module: Any) -> tuple[Any, Rest]:
        """Split the variables into the trained collection and the others."""
        others = {name: jax.tree.map(jnp.asarray, x) for name, x in module.items() if name != "params"}
        return {"params": module["params"]}, Rest(others)

    def joined(self, trained: Any, rest: Rest) -> Any:
        """Rebuild the variables with these arrays."""
        every = {**trained, **rest.changing}
        return self._kind({name: every[name] for name in self._names})

    def changed(self, module: Any, aux: Any, before: Any) -> Any:
        """Return the collections that a call may have changed."""
        others = {name: module[name] for name in before}
        if not isinstance(aux, Mapping) or not aux or not aux.keys() <= others.keys():
            return others
        for name, new in aux.items():
            trees.arrays_like(new, others[name], f"the loss's {name}", f"the variables' {name}")
        return others | dict(aux)

    def gradients(self, grads: Any) -> Any:
        """Return the gradients of the collection that is trained."""
        is_whole = isinstance(grads, Mapping) and grads.keys() == set(self._names)
        return {"params": grads["params"]} if is_whole else grads


def module_of(params: Any, wrt: Any = None) -> Parts | None:
    """Split a module of equinox or nnx into its parts; return None for anything else.

    Args:
        params: anything.
        wrt: a filter of nnx, which variables of an nnx module are trained (default None: its ``nnx.Param``).

    Raises:
        ``TypeError`` for a filter of what is no nnx module, and for what is no filter; ``ValueError`` for one that
        selects nothing.
    """
    if is_nnx(params):
        return _nnx_parts(params, wrt)
    if wrt is not None:
        raise TypeError(
            f"wrt says which variables of an nnx module are trained, but params is a {type(params).__name__}. Leave "
            "wrt out, or select by frozen=; of an equinox module give the part that eqx.partition makes."
        )
    return _parts(EquinoxDef(params), params) if _is_of("equinox", params) else None


def parts_of(params: Any, wrt: Any = None) -> Parts | None:
    """Split a module, or linen's variables with batch statistics, into its parts; return None for anything else.

    It takes and raises what :func:`module_of` does.
    """
    if wrt is None and isinstance(params, Mapping) and {"params", "batch_stats"} <= params.keys():
        return _parts(LinenDef(params), params)
    return module_of(params, wrt)


def trained_of(params: Any) -> Any:
    """Return the pytree of the trained arrays; anything but a module is returned as it is."""
    parts = parts_of(params)
    return params if parts is None else parts.trained


def anew(params: Any) -> Any:
    """Return the parameters, a module rebuilt: its counts may be changed only in the trace that made it."""
    parts = parts_of(params)
    return params if parts is None else parts.definition.joined(parts.trained, parts.rest)


def is_nnx(params: Any) -> bool:
    """Whether an object is a module of nnx."""
    return _is_of("flax.nnx", params)


def check_not_inside(params: Any) -> None:
    """Raise for an nnx module inside a pytree of arrays: as a pytree its statistics would be trained too."""
    if any(map(is_nnx, jax.tree.leaves(params, is_leaf=is_nnx))):
        raise TypeError(f"params is one module or a tree of arrays, but has a module of nnx in it. {ARRAYS_ALONE}")


def _is_of(library: str, params: Any) -> bool:
    loaded = sys.modules.get(library)
    return loaded is not None and isinstance(params, loaded.Module)


_DEFINITIONS: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
"""All live definitions, by the key that equal ones share."""


def _parts(definition: EquinoxDef | NnxDef | LinenDef, module: Any) -> Parts:
    with contextlib.suppress(TypeError):  # of what cannot be hashed, where nothing is known to be equal
        definition = _DEFINITIONS.setdefault(definition.key(), definition)
    return Parts(definition, *definition.split(module))


def _nnx_parts(module: Any, wrt: Any) -> Parts:
    from flax import nnx

    if not (wrt is None or isinstance(wrt, type | str | bool | tuple | list) or wrt is ... or callable(wrt)):
        raise TypeError(f"wrt is a filter of nnx, such as nnx.Param or nnx.PathContains('head'), but got {shown(wrt)}.")
    chosen = nnx.filterlib.to_predicate(nnx.Param if wrt is None else wrt)
    parts = _parts(NnxDef(module, chosen), module)
    if wrt is not None and not jax.tree.leaves(parts.trained):
        kinds = sorted({type(variable).__name__ for _, variable in nnx.to_flat_state(nnx.state(module))})
        raise ValueError(f"wrt={shown(wrt)} selects no variable of the module, which has {', '.join(kinds) or 'none'}.")
    return parts


@dataclasses.dataclass(frozen=True)
class ModuleLoss:
    """A loss of a module, as a function of the module's arrays.

    Attributes:
        module: the module without its arrays.
        function: the function as given.
        has_aux: whether it returns an auxiliary output too.
    """

    module: ModuleDef
    function: Callable[..., Any]
    has_aux: bool

    def __call__(self, trained: Any, changing: Any, kept: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the function; if a call may change arrays, return the loss and ``(aux, the arrays after the call)``."""
        module = self.module.joined(trained, Rest(changing, kept))
        result = self.function(module, *args, **kwargs)
        if changing is None:
            return result
        loss, aux = loss_and_aux(result) if self.has_aux else (result, None)
        return loss, (aux, self.module.changed(module, aux, changing))


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _is_inexact(x: Any) -> bool:
    return _is_array(x) and bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _if_any(tree: Any) -> Any:
    """Return a pytree if it has arrays, else None."""
    return tree if jax.tree.leaves(tree) else None


def _first(*found: Any) -> Any:
    return next((x for x in found if x is not None), None)
