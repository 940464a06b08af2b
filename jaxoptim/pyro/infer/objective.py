"""The loss of a model and a guide as a function of unconstrained arrays."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxoptim.core.numerics import strong
from jaxoptim.interop.numpyro import by_path, required, to_numpyro

Values = dict[str, jax.Array]
"""Unconstrained arrays by name; a site whose value is a tree has one for each leaf."""


class FunctionLoss:
    """A function ``loss(model, guide, *args, **kwargs)`` in the place of an ELBO of numpyro.

    Args:
        function: returns a differentiable scalar.
    """

    can_infer_discrete = True  # numpyro warns about discrete sites otherwise, and this function's author knows
    multi_sample_guide = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def loss(self, key: jax.Array, values: dict[str, Any], model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss at constrained values."""
        model_key, guide_key = jax.random.split(key)  # the order of numpyro.infer.Trace_ELBO
        model = _seeded(model, model_key, values)
        return self.function(model, _seeded(guide, guide_key, values), *args, **kwargs)

    def loss_with_mutable_state(self, key: jax.Array, values: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Not there: the function has no way to return the state."""
        raise ValueError(
            "The model or guide has mutable sites, whose new values a plain function as loss cannot return. Derive "
            "from numpyro.infer.ELBO and implement loss_with_mutable_state."
        )


def _seeded(fn: Callable[..., Any], key: jax.Array, values: dict[str, Any]) -> Callable[..., Any]:
    """A model that draws from ``key`` at its first call, and at call n from ``fold_in(key, n)``."""
    from numpyro import handlers

    calls = itertools.count()

    def seeded(*args: Any, **kwargs: Any) -> Any:
        call = next(calls)
        # numpyro's handler begins anew at each call, and would make all particles of a loop the same.
        current = key if call == 0 else jax.random.fold_in(key, call)
        # numpyro's random modules write into the trees that they get.
        data = jax.tree.map(lambda x: x, values)
        return handlers.substitute(handlers.seed(fn, current), data=data)(*args, **kwargs)

    return seeded


def as_elbo(loss: Any) -> Any:
    """What has the methods of an ELBO.

    Args:
        loss: an ELBO of numpyro, or a function.

    Returns:
        The ELBO, or a :class:`FunctionLoss`.

    Raises:
        ``TypeError`` for anything else, and for the class of an ELBO.
    """
    if isinstance(loss, type):
        raise TypeError(f"The loss is the class {loss.__name__}. Give an instance: {loss.__name__}().")
    if callable(getattr(loss, "loss", None)):
        return loss
    if not callable(loss):
        raise TypeError(
            "The loss must be an ELBO of numpyro, such as numpyro.infer.Trace_ELBO(), or a function "
            f"loss(model, guide, *args, **kwargs), but got {type(loss).__name__}."
        )
    return FunctionLoss(loss)


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


@dataclasses.dataclass(frozen=True)
class Discovery:
    """What a model and a guide reach when they run once.

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
    model: Any, guide: Any, elbo: Any, key: jax.Array, args: Any, kwargs: Any, known: dict[str, Any]
) -> Discovery:
    """Run guide and model once, as ``numpyro.infer.SVI.init`` does, and see what they reach.

    Args:
        model: of numpyro.
        guide: of numpyro.
        elbo: of numpyro, or a :class:`FunctionLoss`.
        key: the key for all that is drawn.
        args: the positional arguments of both.
        kwargs: the keyword arguments of both.
        known: values of sites, constrained and mutable ones, that are not to be initialised again.

    Returns:
        A :class:`Discovery`.

    Raises:
        ``TypeError`` for a parameter that is not floating; ``ValueError`` for two parameters of one name; what the
        model and the guide raise.
    """
    required()
    from numpyro.infer import SVI

    # numpyro's own initialisation, so that keys and initial values are the same for good; nothing is optimised here.
    optim = to_numpyro(optax.identity())
    svi = SVI(model, guide, optim, elbo)
    state = svi.init(key, *args, init_params=known or None, **kwargs)
    params = optim.get_params(state.optim_state)
    empty = state._replace(optim_state=None, mutable_state=None)

    def constrain(values: dict[str, Any]) -> dict[str, Any]:
        return svi.get_params(empty._replace(optim_state=optim.init(values)))

    values = by_path(params)
    for name, value in values.items():
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            raise TypeError(
                f"The parameter {name!r} has dtype {value.dtype}. Only floating arrays are optimized: write 1.0 for 1, "
                "or numpyro.primitives.mutable for a state."
            )
    sites = {
        name: Site(name, tuple(by_path({name: value})), jax.tree.structure(value), constrain)
        for name, value in params.items()
    }
    new = {leaf for name, site in sites.items() if name not in known for leaf in site.leaves}
    fresh = {name: value for name, value in values.items() if name in new}
    return Discovery(sites, fresh, dict(state.mutable_state or {}), state.rng_key)


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
        """The loss and the next mutable state: what ``jax.value_and_grad(..., has_aux=True)`` takes."""
        values = self.constrain(params)
        new = None
        if jax.tree.leaves(mutable):
            values.update(lax.stop_gradient(mutable))
            result = self._elbo.loss_with_mutable_state(key, values, self._model, self._guide, *args, **kwargs)
            loss, new = result["loss"], result["mutable_state"]
        else:
            loss = self._elbo.loss(key, values, self._model, self._guide, *args, **kwargs)
        _check_scalar(loss, self._elbo)
        # With several particles numpyro returns no state, and says so in a warning.
        return loss, mutable | jax.tree.map(strong, new or {})


def _check_scalar(loss: Any, elbo: Any) -> None:
    """Raise for a loss that is no scalar."""
    name = getattr(elbo.function, "__name__", "The function") if isinstance(elbo, FunctionLoss) else type(elbo).__name__
    if isinstance(loss, Mapping):
        raise TypeError(f"{name} returned one loss for each site. Give numpyro's ELBO with sum_sites=True.")
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        kind = f"an array of shape {jnp.shape(loss)} and dtype {jnp.result_type(loss)}"
        raise TypeError(f"{name} returned {kind}. A loss is a real scalar.")
