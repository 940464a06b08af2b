"""What a class gets that names its rule: a constructor, and the rule's documentation."""

from __future__ import annotations

import inspect
from typing import Any

TORCH_FLAGS = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
"""Options of torch that say how to compute, not what, with their defaults."""


def complete(cls: Any) -> None:
    """Give an optimizer what it does not have of its own."""
    _document(cls)
    if "__init__" not in vars(cls):
        _take_hyperparameters(cls)


def _document(cls: Any) -> None:
    """Put the mathematics, arguments, errors and reference of the rule into the docstring of its class.

    The class's own docstring is its first line and its example.
    """
    summary, _, example = inspect.cleandoc(vars(cls).get("__doc__") or _summary(cls)).partition("\n\nExample:\n")
    rule = inspect.getdoc(cls.rule) or ""
    body = rule.partition("\n\nExample:\n")[0].replace("Args:\n", "Args:\n    params: see :class:`Optimizer`.\n", 1)
    taken = inspect.signature(cls.__init__).parameters if "__init__" in vars(cls) else {}
    flags = [f"``{flag}``" for flag in TORCH_FLAGS if flag in taken]
    note = f"torch's {', '.join(flags)} are accepted and stored in the groups, and have no other effect."
    parts = [summary, body, *([note] if flags else []), *([f"Example:\n{example}"] if example else [])]
    cls.__doc__ = "\n\n".join(part for part in parts if part)


def _summary(cls: Any) -> str:
    return f"The torch-style optimizer of :class:`{cls.rule.__module__}.{cls.rule.__qualname__}`."


def _take_hyperparameters(cls: Any) -> None:
    """Give the class a constructor with the rule's hyperparameters."""
    signature = inspect.signature(cls.rule)

    def __init__(self: Any, params: Any, *args: Any, groups: Any = None, **options: Any) -> None:
        try:
            bound = signature.bind(*args, **options)
        except TypeError as error:
            raise TypeError(
                f"{type(self).__name__}() {error}. After params it takes {', '.join(signature.parameters)}."
            ) from None
        bound.apply_defaults()
        super(cls, self).__init__(params, dict(bound.arguments), groups=groups)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Any),
        *signature.parameters.values(),
        inspect.Parameter("groups", keyword, default=None),
    ]
    __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    cls.__init__ = __init__
