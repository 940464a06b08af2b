"""The constructor and the docstring of a class that names its rule.

The constructor takes the hyperparameters of the rule, and the groups keep them. A class may say otherwise for itself:

- ``_arguments``: its options in the parent's order, a ``*`` before those by keyword only. An option is one of the
  rule's, a flag of torch, or a keyword of the base class's constructor, which it goes to.
- ``_keys``: what the groups keep, in the parent's order, where that is another one.
- ``_example``: where a step along a gradient of 1 leads from 1, with 0.1 for the first option.

A docstring that has the arguments stays as it is.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
from jax.sharding import Mesh as Mesh
from optax import GradientTransformation as GradientTransformation

from jaxoptim.core.rule import Hyperparameters, Traced
from jaxoptim.optim import option_names
from jaxoptim.optim.groups import Groups as Groups
from jaxoptim.optim.groups import Selectors as Selectors

Number = float | jax.Array
"""A hyperparameter: a number, or an array of one element."""
TORCH_FLAGS = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
"""Options of torch that say how to compute, not what, with their defaults."""

_EITHER, _KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
_COMMON = ("groups", "frozen", "wrt", "gradient_transform", "master_weights", "rounding", "state_dtype", "mesh", "zero")
"""What constructors take after the options of the rule, where the base class does."""
_FLAGS = {
    name: inspect.Parameter(name, _KEYWORD, default=default, annotation="bool | None" if default is None else "bool")
    for name, default in TORCH_FLAGS.items()
}
_EXAMPLE = """Examples:
    >>> from jaxoptim import optim
    >>> opt = optim.{name}({{"w": 1.0}}, {option}=0.1)
    >>> opt.step({{"w": 1.0}})
    >>> round(float(opt.params["w"]), 3)
    {result}"""


def complete(cls: Any) -> None:
    """Give an optimizer class a constructor and a docstring where it has none of its own."""
    if "__init__" not in vars(cls):
        _construct(cls)
    if "Args:" not in (vars(cls).get("__doc__") or ""):
        _document(cls)


def check_rule(cls: Any) -> None:
    """Raise for an object that is no class of rules."""
    if not (isinstance(cls.rule, type) and issubclass(cls.rule, Hyperparameters)):
        kind = cls.rule.__name__ if isinstance(cls.rule, type) else type(cls.rule).__name__
        raise TypeError(
            f"{cls.__name__}.rule is the class of a rule, such as jaxoptim.rules.Adam, but got {kind}. What gradients "
            "go through before a step is its option gradient_transform=."
        )


def _construct(cls: Any) -> None:
    """Give the class a constructor, which passes its options to that of the base class."""
    own = _hyperparameters(cls.rule)
    signature = inspect.Signature(_options(cls, own))
    taken = signature.parameters
    kept = [name for name in taken if name in own or name in TORCH_FLAGS]
    passed = [name for name in taken if name not in kept]
    keys = vars(cls)["_keys"].split() if "_keys" in vars(cls) else kept
    constants = {name: getattr(cls.rule, name) for name in keys if name not in taken}
    base = inspect.signature(super(cls, cls).__init__).parameters
    common = {name: base[name].replace(kind=_KEYWORD) for name in _COMMON if name in base}

    def __init__(self: Any, params: Any, *args: Any, **options: Any) -> None:
        keywords = {name: options.pop(name) for name in common if name in options}
        try:
            bound = signature.bind(*args, **options)
        except TypeError as error:
            every = [*taken, *(name for name in common if name not in taken)]
            slips = (option_names.meant(name, every) for name in options if name not in every)
            option = next(filter(None, slips), None)
            hint = f" {option!r} is probably meant." if option else ""
            raise TypeError(
                f"{type(self).__name__}() {error}.{hint} After params it takes {', '.join(every)}."
            ) from None
        bound.apply_defaults()
        values = constants | bound.arguments
        keywords |= {name: values[name] for name in passed}
        defaults = {name: values[name] for name in keys if name not in cls.unlisted or values[name] is not None}
        super(cls, self).__init__(params, defaults, **keywords)

    parameters = [
        inspect.Parameter("self", _EITHER),
        inspect.Parameter("params", _EITHER, annotation="Any"),
        *taken.values(),
        *common.values(),
    ]
    __init__.__signature__ = inspect.Signature(parameters, return_annotation="None")  # type: ignore[attr-defined]
    __init__.__annotations__ = {x.name: x.annotation for x in parameters[1:]} | {"return": "None"}
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    cls.__init__ = __init__


def _options(cls: Any, own: dict[str, inspect.Parameter]) -> list[inspect.Parameter]:
    """Return the constructor's parameters after ``params``, except ``groups``; ``own`` are the rule's."""
    if "_arguments" not in vars(cls):
        return list(own.values())
    known = {**inspect.signature(super(cls, cls).__init__).parameters, **_FLAGS, **own}
    either, _, keyword = (names.split() for names in cls._arguments.partition("*"))
    return [known[x].replace(kind=_EITHER) for x in either] + [known[x].replace(kind=_KEYWORD) for x in keyword]


def _hyperparameters(rule: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a rule, with numbers annotated by the type that a torch-style class takes."""
    return {
        name: x.replace(annotation=_annotation(rule.specs[name])) if name in rule.specs else x
        for name, x in inspect.signature(rule).parameters.items()
    }


def _annotation(spec: Any) -> str:
    if isinstance(spec, tuple):
        return f"tuple[{', '.join(map(_annotation, spec))}]"
    return "Any" if isinstance(spec, Traced) else "Number | None" if spec.optional else "Number"


def _document(cls: Any) -> None:
    """Put the mathematics, arguments, errors and reference of the rule into the docstring of its class.

    The class's own docstring is its first line and its example.
    """
    summary, _, example = inspect.cleandoc(vars(cls).get("__doc__") or _summary(cls)).partition("\n\nExamples:\n")
    rule = inspect.getdoc(cls.rule) or ""
    body = rule.partition("\n\nExamples:\n")[0].replace("Args:\n", "Args:\n    params: see :class:`Optimizer`.\n", 1)
    parts = [summary, body]
    options = [*inspect.signature(cls.__init__).parameters][2:]
    if flags := [f"``{flag}``" for flag in TORCH_FLAGS if flag in options]:
        parts.append(f"torch's {', '.join(flags)} are accepted and stored in the groups, and have no other effect.")
    if example:
        parts.append(f"Examples:\n{example}")
    elif "_example" in vars(cls):
        parts.append(_EXAMPLE.format(name=cls.__name__, option=options[0], result=cls._example))
    cls.__doc__ = "\n\n".join(part for part in parts if part)


def _summary(cls: Any) -> str:
    return f"The torch-style optimizer of :class:`{cls.rule.__module__}.{cls.rule.__qualname__}`."
