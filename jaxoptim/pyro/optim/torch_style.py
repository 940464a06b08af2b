"""Torch-style optimizers where a multi-optimizer is expected."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import trees
from jaxoptim.optim.lbfgs import LBFGS
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.pyro.optim.evaluation import all_finite
from jaxoptim.pyro.optim.multi_optimizer import MultiOptimizer, Params, checked, differentiated, values_of


class TorchStyle(MultiOptimizer):
    """A torch-style optimizer in the interface of :class:`MultiOptimizer`.

    Args:
        optimizer: an instance, whose parameters have the names of those that are optimized, and take their places in
            the dict that :meth:`step` is given; or a function that makes one of a dict of parameters.

    Errors:
        ``TypeError`` for a function that makes something else; ``ValueError`` for other names.
    """

    def __init__(self, optimizer: Optimizer | Callable[[Params], Optimizer]) -> None:
        self._given = optimizer
        self._optimizer: Optimizer | None = None
        self._losses: dict[Any, Callable[..., Any]] = {}

    def get_step(self, loss_fn: Callable[..., Any], params: Mapping[str, Any], *args: Any) -> dict[str, jax.Array]:
        """Refuse: a torch-style optimizer owns the values that it updates."""
        raise NotImplementedError(
            "A torch-style optimizer has no get_step: it owns its parameters. Give PyroOptim(optim.Adam, options), "
            "or a rule such as rules.Adam()."
        )

    def step(
        self,
        loss_fn: Callable[..., Any],
        params: Params,
        *args: Any,
        has_aux: bool = False,
        skip_nonfinite: bool = False,
    ) -> Any:
        """See :meth:`MultiOptimizer.step`. Of L-BFGS no step is skipped: it stops at what is not finite by itself."""
        params, args = checked(params), trees.owned_arrays(args)
        optimizer = self._prepared(params)
        leaves = jax.tree.leaves(optimizer._storage.tree())
        names = tuple(str(param.name) for param in leaves)
        loss_of = self._losses.setdefault((loss_fn, names), functools.partial(_loss_of_tree, loss_fn, names))
        whole = set(names) == set(params)
        if (whole and not skip_nonfinite) or isinstance(optimizer, LBFGS):
            return optimizer.minimize(loss_of, *args, has_aux=has_aux)
        loss, aux, grads = differentiated(loss_fn, has_aux, values_of(params), args)
        if not skip_nonfinite or bool(all_finite((loss, grads))):
            optimizer.step(jax.tree.unflatten(jax.tree.structure(optimizer._storage.tree()), map(grads.get, names)))
        else:
            loss = jnp.full_like(loss, jnp.nan)
        return (loss, aux) if has_aux else loss

    def _make(self, params: Params) -> Optimizer:
        """The optimizer that the function makes."""
        optimizer = self._given(params)  # type: ignore[operator]
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "The optimizer is a function, so it should make a torch-style optimizer of a dict of parameters, but "
                f"made {type(optimizer).__name__}. Give lambda params: optim.Adam(params, lr=0.1)."
            )
        return optimizer

    def _prepared(self, params: Params) -> Optimizer:
        """The optimizer, these parameters among its own."""
        if self._optimizer is None:
            self._optimizer = self._given if isinstance(self._given, Optimizer) else self._make(params)
        own = {str(param.name): param for param in self._optimizer._storage.parameters()}
        given = isinstance(self._given, Optimizer)
        if not given and isinstance(self._optimizer, LBFGS) and params.keys() - own.keys():
            self._optimizer = self._make(params)  # its history is of another vector
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
                if not given:
                    own[name].value = param.value
                params[name] = own[name]
        return self._optimizer


def _loss_of_tree(loss_fn: Callable[..., Any], names: tuple[str, ...], tree: Any, *args: Any) -> Any:
    return loss_fn(dict(zip(names, jax.tree.leaves(tree), strict=True)), *args)
