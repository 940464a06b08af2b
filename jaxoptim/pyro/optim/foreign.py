"""Errors for optimizers of torch, Pyro and numpyro that say which one of this library to use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxoptim import optim
from jaxoptim.core.foreign import kind_of, origin, unwrapped
from jaxoptim.optim import lr_scheduler
from jaxoptim.optim.lbfgs import LBFGS
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.optim.sampler import Sampler


class _Foreign(NamedTuple):
    """An optimizer, or a schedule, of another library.

    Attributes:
        shown: what to call it.
        package: where its user finds it.
        name: of its class or function.
        ours: our name for it, if we have it.
    """

    shown: str
    package: str
    name: str
    ours: str


_PACKAGES = ("pyro.optim.multi", "pyro.optim", "numpyro.optim", "torch.optim.lr_scheduler", "torch.optim")
"""Pyro's first, whose classes derive from torch's."""
_WRAPPED = {"PyroOptim": "pt_optim_constructor", "PyroLRScheduler": "pt_scheduler_constructor"}
"""The attributes in which Pyro's classes keep the object that they wrap."""
_OURS = {"RMSProp": "RMSprop", "Momentum": "SGD", "RMSPropMomentum": "RMSprop", "Minimize": "LBFGS"}
"""The names in this library of optimizers that numpyro names otherwise."""


class Place(NamedTuple):
    """A place where an optimizer of this library is expected.

    Attributes:
        forms: how ours may be given there; each is None where there is nothing of that form.
        otherwise: what to take where we have nothing of that name.
    """

    forms: tuple[Callable[[_Foreign], str | None], ...]
    otherwise: str


def refuse_foreign(what: str, given: Any, place: Place) -> None:
    """Raise for an optimizer of another library.

    Args:
        what: what is given, to begin the message with.
        given: anything; of a dict, as a schedule takes it, its optimizer.
        place: which of ours are taken there.

    Raises:
        ``TypeError`` that says which of ours to take.
    """
    foreign = _found(given.get("optimizer") if isinstance(given, Mapping) else given)
    if foreign is None:
        return
    why = "is for numpyro.infer.SVI" if foreign.package == "numpyro.optim" else "works on tensors of torch"
    ours = [text for form in place.forms if (text := form(foreign)) is not None]
    raise TypeError(f"{what} is {foreign.shown}, which {why}. Take {', or '.join(ours) or place.otherwise}.")


def _found(given: Any) -> _Foreign | None:
    """Return the description of an optimizer of another library; None for anything else."""
    given = unwrapped(given)
    package = next((name for name in _PACKAGES if origin(given, name)), None)
    if package is None:
        return None
    kind, source = kind_of(given), origin(given, package)
    called = "" if kind is given else "(...)"
    if source.__name__ in _WRAPPED:
        wrapped = origin(getattr(given, _WRAPPED[source.__name__], None), *_PACKAGES)
        kind = source = wrapped or source
    shown = f"{package}.{source.__name__}" if kind is source else f"{kind.__module__}.{kind.__name__}"
    # A class of the user's own is known by the first of its bases that we have too.
    bases = kind.__mro__ if isinstance(kind, type) else ()
    name = next((base.__name__ for base in bases if _optimizer(base.__name__)), source.__name__)
    return _Foreign(shown + called, package, name, _OURS.get(name, name))


def _optimizer(name: str) -> type[Optimizer] | None:
    """The torch-style class of a name."""
    cls = getattr(optim, name, None)
    return cls if isinstance(cls, type) and issubclass(cls, Optimizer) and cls not in (Optimizer, Sampler) else None


def _by_parameter(name: str) -> bool:
    """Whether a torch-style class is one that :class:`PyroOptim` takes."""
    cls = _optimizer(name)
    return cls is not None and cls is not LBFGS and not issubclass(cls, Sampler)


def _as_class(foreign: _Foreign) -> str | None:
    """Ours as a torch-style class."""
    return f"jaxoptim.optim.{foreign.ours}" if _by_parameter(foreign.ours) else None


def _as_schedule(foreign: _Foreign) -> str | None:
    """Ours as a class of schedules."""
    return f"jaxoptim.optim.lr_scheduler.{foreign.ours}" if hasattr(lr_scheduler, foreign.ours) else None


def _as_wrapper(foreign: _Foreign) -> str | None:
    """Ours as a Pyro-style optimizer, with or without a schedule."""
    options = "'lr': ..., 'momentum': ..." if "Momentum" in foreign.name else "'lr': ..."
    if foreign.ours in ("PyroOptim", "PyroLRScheduler", "HorovodOptimizer"):
        return f"jaxoptim.pyro.optim.{foreign.ours}(...)"
    if hasattr(lr_scheduler, foreign.ours):
        options = "'optimizer': jaxoptim.optim.Adam, 'optim_args': {'lr': ...}, ..."
    elif not _by_parameter(foreign.ours):
        return None
    return f"jaxoptim.pyro.optim.{foreign.ours}({{{options}}})"


def _as_multi(foreign: _Foreign) -> str | None:
    """Ours as a multi-optimizer."""
    return f"jaxoptim.pyro.optim.multi.{foreign.ours}" if foreign.package == "pyro.optim.multi" else None


def _as_rule(foreign: _Foreign) -> str | None:
    """Ours as a rule, where there is no Pyro-style optimizer."""
    is_left = _optimizer(foreign.ours) is not None and not _by_parameter(foreign.ours)
    return f"jaxoptim.rules.{foreign.ours}(...)" if is_left else None


def _as_function(foreign: _Foreign) -> str | None:
    """Ours as a function that makes a torch-style optimizer, for what is torch's."""
    cls = _optimizer(foreign.ours)
    if foreign.package != "torch.optim" or cls is None or issubclass(cls, Sampler):
        return None
    return f"lambda params: jaxoptim.optim.{foreign.ours}(params, lr=...)"


def _as_transformation(foreign: _Foreign) -> str | None:
    """Ours as a transformation of optax, for what is numpyro's."""
    return "an optax transformation" if foreign.package == "numpyro.optim" else None


CLASS = Place((_as_class,), "a class of jaxoptim.optim other than LBFGS, such as Adam")
SCHEDULE = Place((_as_schedule,), "a class of jaxoptim.optim.lr_scheduler, such as StepLR")
WRAPPER = Place((_as_wrapper,), "one of jaxoptim.pyro.optim, such as Adam({'lr': ...})")
PART = Place(
    (_as_wrapper, _as_multi, _as_rule, _as_transformation), f"{WRAPPER.otherwise}, a rule or an optax transformation"
)
ANY = Place((*PART.forms, _as_function), PART.otherwise)
