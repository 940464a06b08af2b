"""The loss of a model and a guide as a function of unconstrained arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxoptim.core.numerics import strong
from jaxoptim.interop.numpyro import by_path, required, to_numpyro
from jaxoptim.pyro.infer.elbo import apart, check_scalar, with_keywords

Values = dict[str, jax.Array]
"""Unconstrained arrays by name; a site whose value is a tree has one for each leaf."""


@dataclasses.dataclass(frozen=True)
class Site:
    """A ``numpyro.param`` statement.

    Attributes:
        name: of the statement.
        leaves: the names of the arrays that its value consists of: ``(name,)`` for an array.
        treedef: how the value is made of them.
        constrain: maps ``{name: unconstrained value}`` to ``{name: constrained value}``.
    """

    name: str
    leaves: tuple[str, ...]
    treedef: Any
    constrain: Callable[[dict[str, Any]], dict[str, Any]]

    def value(self, values: Mapping[str, Any]) -> Any:
        """The constrained value."""
        value = jax.tree.unflatten(self.treedef, [values[leaf] for leaf in self.leaves])
        return self.constrain({self.name: value})[self.name]

    def unconstrained(self, value: Any) -> dict[str, Any]:
        """The unconstrained arrays of a constrained value, by name; not finite where it is outside its constraint."""
        return by_path({self.name: self.constrain({self.name: value}, invert=True)[self.name]})  # type: ignore[call-arg]


@dataclasses.dataclass(frozen=True)
class Discovery:
    """The sites that a model and a guide reach in one run.

    Attributes:
        sites: the ``param`` statements, by name.
        values: their initial values; not those of names in ``known``.
        mutable: the initial mutable state, by site.
        key: what numpyro goes on with.
    """

    sites: dict[str, Site]
    values: Values
    mutable: dict[str, Any]
    key: jax.Array


def discover(
    model: Any,
    guide: Any,
    elbo: Any,
    key: jax.Array,
    args: Any,
    kwargs: Any,
    known: Mapping[str, Any],
    initial: Mapping[str, Any],
) -> Discovery:
    """Run guide and model once, as ``numpyro.infer.SVI.init`` does, and record the sites that they reach.

    Args:
        model: of numpyro.
        guide: of numpyro.
        elbo: of numpyro, or a :class:`FunctionLoss`.
        key: the key for all that is drawn.
        args: the positional arguments of both.
        kwargs: the keyword arguments of both.
        known: values of sites, constrained and mutable ones, that are not to be initialised again.
        initial: constrained values to begin with, by site, in the place of those that the statements have.

    Returns:
        A :class:`Discovery`.

    Raises:
        ``TypeError`` for a parameter that is not floating; ``ValueError`` for two parameters of one name, and for an
        initial value outside its constraint; ``KeyError`` for one of a site that there is not; what the model and the
        guide raise.
    """
    required()
    from numpyro import handlers
    from numpyro.infer import SVI

    # numpyro's own initialisation, so that keys and initial values are the same for good; nothing is optimised here.
    optim = to_numpyro(optax.identity())
    bound = (functools.partial(with_keywords(fn, kwargs), *args) for fn in (model, guide))
    begun = (handlers.substitute(fn, substitute_fn=functools.partial(_initial_value, initial)) for fn in bound)
    svi = SVI(*begun, optim, elbo)
    state = svi.init(key, init_params=dict(known) or None)
    params = optim.get_params(state.optim_state)
    if missing := [name for name in initial if name not in params]:
        raise KeyError(
            f"There is an initial value of {missing[0]!r}, but no param statement that model and guide reach has this "
            f"name. They reach {', '.join(map(repr, sorted(params))) or 'none'}."
        )
    values = by_path(params)
    for name, value in values.items():
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            raise TypeError(
                f"The parameter {name!r} has dtype {value.dtype}. Only floating arrays are optimized: write 1.0 for 1, "
                "or numpyro.primitives.mutable for a state."
            )
    sites = {
        name: Site(name, tuple(by_path({name: value})), jax.tree.structure(value), svi.constrain_fn)
        for name, value in params.items()
    }
    new = {leaf for name, site in sites.items() if name not in known for leaf in site.leaves}
    fresh = {name: value for name, value in values.items() if name in new}
    return Discovery(sites, fresh, dict(state.mutable_state or {}), state.rng_key)


def _initial_value(initial: Mapping[str, Any], statement: dict[str, Any]) -> Any:
    """Return the initial value given for a statement; None if there is none."""
    name = statement["name"]
    if statement["type"] != "param" or name not in initial:
        return None
    constraint = statement["kwargs"].get("constraint")
    for value in jax.tree.leaves(initial[name]):
        with jax.ensure_compile_time_eval():
            is_within = constraint is None or jnp.all(constraint(value))
            is_right = bool(jnp.isfinite(jnp.asarray(value)).all() & is_within)
        if not is_right:
            raise ValueError(
                f"The initial value of {name!r} is {value}, which is not finite or not within its constraint "
                f"{constraint or 'real'}. Give a constrained value, as get_params() does."
            )
    return initial[name]


class Objective:
    """The loss as a pure function of unconstrained values and a key; compared and hashed by identity.

    Args:
        model: of numpyro.
        guide: of numpyro.
        elbo: of numpyro, or a :class:`FunctionLoss`.
        sites: the parameters.
        mutable: the mutable state to begin with.
    """

    __name__ = "loss_fn"

    def __init__(self, model: Any, guide: Any, elbo: Any, sites: dict[str, Site], mutable: dict[str, Any]) -> None:
        self._model, self._guide, self._elbo, self._sites = model, guide, elbo, sites
        self._names = {leaf for site in sites.values() for leaf in site.leaves}
        self.mutable_state = mutable

    def constrain(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The constrained values by the names of the sites."""
        if params.keys() != self._names:
            missing, extra = sorted(self._names - params.keys()), sorted(params.keys() - self._names)
            problem = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which no param statement has"
            raise KeyError(
                f"The dict of parameters {problem}. Give the names of differentiable_loss: {sorted(self._names)}."
            )
        return {name: site.value(params) for name, site in self._sites.items()}

    def __call__(self, params: Mapping[str, Any], key: jax.Array, /, *args: Any, **kwargs: Any) -> jax.Array:
        """The loss."""
        if jax.tree.leaves(self.mutable_state):
            raise ValueError(
                f"The mutable sites {sorted(self.mutable_state)} change at each evaluation. Call "
                "loss_fn.with_mutable_state(params, mutable, key, *args), which returns the loss and the next state; "
                "loss_fn.mutable_state is the first."
            )
        return self.with_mutable_state(params, {}, key, *args, **kwargs)[0]

    def with_mutable_state(
        self, params: Mapping[str, Any], mutable: dict[str, Any], key: jax.Array, /, *args: Any, **kwargs: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Return the loss and the next mutable state, in the form for ``jax.value_and_grad(..., has_aux=True)``."""
        values, new = self.constrain(params), None
        model, guide, kwargs = apart(self._elbo, self._model, self._guide, kwargs)
        if jax.tree.leaves(mutable):
            values.update(lax.stop_gradient(mutable))
            result = self._elbo.loss_with_mutable_state(key, values, model, guide, *args, **kwargs)
            loss, new = result["loss"], result["mutable_state"]
        else:
            loss = self._elbo.loss(key, values, model, guide, *args, **kwargs)
        check_scalar(loss, self._elbo)
        # With several particles numpyro returns no state, and says so in a warning.
        return loss, mutable | jax.tree.map(strong, new or {})
