"""The loss of variational inference: an ELBO of numpyro, or a function in its place."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core.foreign import origin
from jaxoptim.interop.numpyro import required


class FunctionLoss:
    """A function ``loss(model, guide, *args, **kwargs)`` in the place of an ELBO of numpyro.

    Args:
        function: returns a differentiable scalar.
    """

    can_infer_discrete = True  # numpyro warns about discrete sites otherwise, and this function's author knows
    multi_sample_guide = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def loss(self, key: jax.Array, values: dict[str, Any], model: Any, guide: Any, /, *args: Any, **kwargs: Any) -> Any:
        """The loss at constrained values."""
        from jaxoptim.pyro.infer.draws import Draws

        model_key, guide_key = jax.random.split(key)  # the order of numpyro.infer.Trace_ELBO
        draws = Draws(key)
        model = draws.keyed("model", model, model_key, values)
        guide = draws.keyed("guide", guide, guide_key, values)
        with draws:
            return self.function(model, guide, *args, **kwargs)

    def loss_with_mutable_state(self, /, *args: Any, **kwargs: Any) -> Any:
        """Raise: the function has no way to return the mutable state."""
        raise ValueError(
            "The model or guide has mutable sites, whose new values a plain function as loss cannot return. Derive "
            "from numpyro.infer.ELBO and implement loss_with_mutable_state."
        )


def as_elbo(loss: Any) -> Any:
    """Return an object with the methods of an ELBO.

    Args:
        loss: an ELBO of numpyro, or a function.

    Returns:
        The ELBO, or a :class:`FunctionLoss`.

    Raises:
        ``TypeError`` for anything else, such as a loss of Pyro's, and for the class of an ELBO; ``ImportError`` for
        ``TraceEnum_ELBO`` without the package funsor.
    """
    _refuse_pyros(loss)
    if isinstance(loss, type):
        raise TypeError(f"The loss is the class {loss.__name__}. Give an instance: {loss.__name__}().")
    if callable(getattr(loss, "loss", None)):
        _check_enumeration(loss)
        return loss
    if not callable(loss):
        raise TypeError(
            "The loss must be an ELBO of numpyro, such as numpyro.infer.Trace_ELBO(), or a function "
            f"loss(model, guide, *args, **kwargs), but got {type(loss).__name__}."
        )
    return FunctionLoss(loss)


def _refuse_pyros(loss: Any) -> None:
    """Raise for a loss of Pyro."""
    if (kind := origin(loss, "pyro.infer")) is None:
        return
    required()
    from numpyro import infer

    name = kind.__name__.removeprefix("Jit")
    is_there = name != "ELBO" and hasattr(infer, name)
    ours = f"numpyro.infer.{name}()" if is_there else "an ELBO of numpyro, such as numpyro.infer.Trace_ELBO()"
    raise TypeError(
        f"The loss is pyro.infer.{kind.__name__}, which works on tensors of torch. Give {ours}, and a model and a "
        "guide of numpyro."
    )


def _check_enumeration(elbo: Any) -> None:
    """Raise for an ELBO that sums over discrete sites if the package that does so is not installed."""
    kind = origin(elbo, "numpyro.infer")
    if kind is not None and kind.__name__ == "TraceEnum_ELBO" and importlib.util.find_spec("funsor") is None:
        raise ImportError(
            "numpyro.infer.TraceEnum_ELBO sums over discrete sites with the package funsor, which is not installed. "
            "Run: pip install funsor, or pip install 'jaxoptim[enum]'."
        )


def apart(elbo: Any, model: Any, guide: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Return model, guide and keyword arguments in a form that the loss can be called with.

    Args:
        elbo: of numpyro, or a :class:`FunctionLoss`.
        model: of numpyro.
        guide: of numpyro.
        kwargs: of model and guide, of any names.

    Returns:
        Model and guide, which have those arguments that are called like one of the loss's own; and the others.
    """
    own = kwargs.keys() & _own_names(elbo)
    if not own:
        return model, guide, kwargs
    inner = {name: kwargs[name] for name in own}
    outer = {name: value for name, value in kwargs.items() if name not in own}
    return with_keywords(model, inner), with_keywords(guide, inner), outer


def with_keywords(fn: Any, kwargs: dict[str, Any]) -> functools.partial[Any]:
    """A model or a guide with its keyword arguments.

    Args:
        fn: of numpyro.
        kwargs: of any names.

    Raises:
        ``TypeError`` for ``self`` to an object, such as an automatic guide or a handler, whose ``__call__`` has one.
    """
    if "self" in kwargs:
        first = next(iter(inspect.signature(type(fn).__call__).parameters.values()), None)
        if first is not None and first.name == "self" and first.kind is first.POSITIONAL_OR_KEYWORD:
            raise TypeError(
                f"{type(fn).__name__} cannot take the argument 'self' by keyword, because its own __call__ has a "
                "parameter of this name. Give it by position, or rename it in model and guide."
            )
    return functools.partial(fn, **kwargs)


def _own_names(elbo: Any) -> set[str]:
    """Return the names of the arguments of a loss other than those of model and guide."""
    if isinstance(elbo, FunctionLoss):
        methods, number = [elbo.function], 2
    else:
        methods, number = [of.loss for of in type(elbo).__mro__ if hasattr(of, "loss")], 5
    names = {"self"}  # of numpyro's handlers
    for method in methods:
        every = list(inspect.signature(method).parameters.values())[:number]
        names |= {of.name for of in every if of.kind is of.POSITIONAL_OR_KEYWORD}
    return names


def check_scalar(loss: Any, elbo: Any) -> None:
    """Raise for a loss that is no scalar."""
    name = getattr(elbo.function, "__name__", "The function") if isinstance(elbo, FunctionLoss) else type(elbo).__name__
    if isinstance(loss, Mapping):
        raise TypeError(f"{name} returned one loss for each site. Give numpyro's ELBO with sum_sites=True.")
    if not isinstance(loss, jax.Array | np.ndarray | np.generic | int | float | complex):
        kind = f"a {type(loss).__name__}"
    elif jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        kind = f"an array of shape {jnp.shape(loss)} and dtype {jnp.result_type(loss)}"
    else:
        return
    raise TypeError(
        f"{name} returned {kind}. A loss is a real scalar: sum it over data and particles, and return it alone."
    )
