"""The names of options, and the check for misspelt ones."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

OF_SCHEDULERS = frozenset(("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"))
"""The options that schedulers add to a group."""
_ELSEWHERE = {
    "learning_rate": "lr",
    "step_size": "lr",
    "beta": "betas",
    "beta1": "betas",
    "beta2": "betas",
    "b1": "betas",
    "b2": "betas",
    "epsilon": "eps",
    "wd": "weight_decay",
    "l2": "weight_decay",
}
"""What other libraries call an option."""
_LIKENESS = 0.78
"""Of two names, from which on one is the other with a slip: ``lrr`` is of ``lr``, ``steps`` is not of ``eps``."""


def meant(name: Any, options: Collection[str]) -> str | None:
    """Return the option that an unknown name probably means; None for a key of the user's own.

    ``lr_scale``, ``fix_lr`` and the like are no slips, however close.
    """
    if not isinstance(name, str) or any(name.startswith(f"{x}_") or name.endswith(f"_{x}") for x in options):
        return None
    if _ELSEWHERE.get(name) in options:
        return _ELSEWHERE[name]
    close = difflib.get_close_matches(name.lower(), options, n=1, cutoff=_LIKENESS)
    return close[0] if close else None


def check_own(owner: str, names: Iterable[Any], options: Collection[str]) -> None:
    """Raise for a key of torch's group dicts that is a misspelt option; users may have keys of their own there."""
    for name in names:
        if name not in options and (option := meant(name, options)) is not None:
            raise TypeError(
                f"A parameter group has the key {name!r}, which is no option of {owner} and would have no effect. "
                f"{option!r} is probably meant. Keys of your own have names less like an option."
            )


def check_all(owner: str, names: Iterable[Any], options: Collection[str]) -> None:
    """Raise for a key that is no option."""
    for name in names:
        if name not in options and name not in OF_SCHEDULERS:
            option = meant(name, options)
            hint = f", and {option!r} is probably meant" if option else ""
            raise TypeError(f"groups: {name!r} is no option of {owner}{hint}. It takes {', '.join(options)}.")
