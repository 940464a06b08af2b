"""Torch-style optimizers where a multi-optimizer is expected."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core.loss import Loss, all_finite
from jaxoptim.optim.lbfgs import LBFGS
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.storage import Storage
from jaxoptim.pyro.optim import parts as steps
from jaxoptim.pyro.optim.foreign import ANY, refuse_foreign
from jaxoptim.pyro.optim.multi_optimizer import (
    MultiOptimizer,
    Params,
    check_state,
    differentiated,
    held_values,
    values_of,
)
from jaxoptim.pyro.optim.parts import Part

_KIND = "a torch-style optimizer"


class TorchStyle(MultiOptimizer):
    """A torch-style optimizer in the interface of :class:`MultiOptimizer`.

    Of L-BFGS no step is skipped: it stops at what is not finite by itself.

    Args:
        optimizer: an instance, whose parameters have the names of those that are optimized, and take their places in
            the dict that :meth:`step` is given; or a function that makes one of a dict of parameters.

    Raises:
        ``TypeError`` for a function that makes something else; ``ValueError`` for other names.
    """

    def __init__(self, optimizer: Optimizer | Callable[[Params], Optimizer]) -> None:
        self._given = optimizer
        self._optimizer = optimizer if isinstance(optimizer, Optimizer) else None
        self._made_of: list[str] = []
        self._losses: dict[Any, Callable[..., Any]] = {}

    def brought(self) -> dict[str, Parameter]:
        """The parameters of an optimizer that was given as such, which take the places of others."""
        given = self._given
        return {str(p.name): p for p in given._storage.parameters()} if isinstance(given, Optimizer) else {}

    def get_step(self, loss_fn: Callable[..., Any], params: Mapping[str, Any], *args: Any) -> dict[str, jax.Array]:
        """Raise: a torch-style optimizer owns the values that it updates."""
        raise NotImplementedError(
            "A torch-style optimizer has no get_step: it owns its parameters. Give PyroOptim(optim.Adam, options), "
            "or a rule such as rules.Adam()."
        )

    def state_dict(self, params: Params) -> dict[str, Any]:
        """See :meth:`MultiOptimizer.state_dict`; the state is in torch's layout."""
        if self._optimizer is None:
            return {"kind": _KIND, "names": [], "made_of": [], "state": None}
        names = [str(param.name) for param in self._optimizer._storage.parameters()]
        return {"kind": _KIND, "names": names, "made_of": self._made_of, "state": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any], params: Params) -> None:
        """See :meth:`MultiOptimizer.load_state_dict`."""
        check_state(state_dict, _KIND, self.brought() | dict(params))
        names, state = state_dict["names"], state_dict["state"]
        first = state_dict["made_of"] or names
        if state is None:
            self._optimizer = self._given if isinstance(self._given, Optimizer) else None
            return
        optimizer = self._optimizer
        own = {} if optimizer is None else {str(p.name): p for p in optimizer._storage.parameters()}
        if optimizer is not None and (optimizer is self._given or own == {name: params[name] for name in names}):
            optimizer.load_state_dict(state)
            return
        optimizer = self._make({name: params[name] for name in first})
        for name in names:
            if name not in first:  # which has come later
                optimizer.add_param_group({"params": {name: params[name]}})
        optimizer.load_state_dict(state)
        self._optimizer, self._made_of = optimizer, list(first)

    def _step(self, loss: Loss, params: Params, args: tuple[Any, ...], skip_nonfinite: bool) -> Any:
        optimizer = self._prepared(params)
        if (parts := self._parts(params, None)) is not None:
            optimizer._opt_called = True
            return steps.make_step(parts, loss, args, held_values(params), {}, skip_nonfinite)
        leaves, treedef = jax.tree.flatten(optimizer._storage.tree())
        names = tuple(str(param.name) for param in leaves)
        if (set(names) == set(params) and not skip_nonfinite) or isinstance(optimizer, LBFGS):
            seen = tuple(name if name in params else None for name in names)
            of_tree = self._losses.setdefault((loss, seen), functools.partial(_loss_of_tree, loss, seen))
            return optimizer.minimize(of_tree, *args, has_aux=loss.has_aux)
        value, aux, grads = differentiated(loss, values_of(params), args)
        if not skip_nonfinite or bool(all_finite((value, grads))):
            optimizer.step(jax.tree.unflatten(treedef, map(grads.get, names)))
        else:
            value = jnp.full_like(value, jnp.nan)
        return (value, aux) if loss.has_aux else value

    def _parts(self, params: Params, ahead: int | None) -> list[Part] | None:
        """The share of the optimizer, None where its own methods have to make the steps.

        So it is where hooks run at each step, where a class has a way of its own, such as L-BFGS and samplers, and
        where gradients are transformed.
        """
        optimizer = self._prepared(params)
        storage, kind = optimizer._storage, type(optimizer)
        is_plain = all(getattr(kind, name) is getattr(Optimizer, name) for name in ("step", "minimize", "_update"))
        if type(storage) is not Storage or not is_plain or optimizer._has_step_hooks:
            return None
        slabs = storage.slabs()
        trained = {name: param for name, param in params.items() if param.requires_grad}
        has_names = all(storage.labels.get(param) == name for name, param in trained.items())
        if slabs.transform is not None or not trained or not has_names:
            return None
        return [steps.slabs_part(slabs, tuple(trained), list(trained.values()))]

    def _make(self, params: Params) -> Optimizer:
        """The optimizer that the function makes."""
        optimizer = self._given(params)  # type: ignore[operator]
        refuse_foreign("What the function has made", optimizer, ANY)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "The optimizer is a function, so it should make a torch-style optimizer of a dict of parameters, but "
                f"made {type(optimizer).__name__}. Give lambda params: optim.Adam(params, lr=0.1)."
            )
        return optimizer

    def _prepared(self, params: Params) -> Optimizer:
        """The optimizer, these parameters among its own."""
        if self._optimizer is None:
            self._optimizer, self._made_of = self._make(params), list(params)
        own = {str(param.name): param for param in self._optimizer._storage.parameters()}
        given = isinstance(self._given, Optimizer)
        is_another_fit = any(own.get(name, param) is not param for name, param in params.items())
        is_longer = isinstance(self._optimizer, LBFGS) and bool(params.keys() - own.keys())
        if not given and (is_another_fit or is_longer):  # whose history is of another vector
            self._optimizer, self._made_of = self._make(params), list(params)
            return self._optimizer
        for name, param in params.items():
            if name not in own:
                if given:
                    raise ValueError(
                        f"The optimizer has no parameter {name!r}. It has {', '.join(map(repr, own))}. Give a function "
                        "that makes the optimizer: lambda params: optim.Adam(params, lr=0.1)."
                    )
                self._optimizer.add_param_group({"params": {name: param}})
            elif own[name] is not param and isinstance(params, dict):
                params[name] = own[name]
        return self._optimizer


def _loss_of_tree(loss: Loss, names: tuple[str | None, ...], tree: Any, *args: Any) -> Any:
    """The loss of the values that have a name, which are those that it takes."""
    pairs = zip(names, jax.tree.leaves(tree), strict=True)
    return loss.function({name: value for name, value in pairs if name is not None}, *args)
