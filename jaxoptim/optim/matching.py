"""The match between the parameters of a state dict and those of an optimizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_POSITION = re.compile(r"params|\d+(\.\d+)*")
"""The path of an array that stands alone, or in lists only: it tells where it stands, and perhaps not what it is."""

Names = Sequence[Sequence[Any]]
"""For each group the names of its parameters, None for those that have none."""


def by_name(groups: list[dict[str, Any]], there: Names, here: Names, strict: bool) -> list[dict[str, Any]]:
    """Return the groups of a state dict, and the parameters in each, in the optimizer's order.

    Where one side has no names, or two parameters of one name, both are taken to have one order already.

    Args:
        groups: the groups of the state dict.
        there: the names of their parameters.
        here: the names of the optimizer's.
        strict: whether names that differ are an error; otherwise they are ignored.

    Raises:
        ``ValueError`` for names that are on one side only, or in other groups.
    """
    if not (_are_unique(there) and _are_unique(here)):
        return groups
    same = {name for names in there for name in names} == {name for names in here for name in names}
    if not same and any(_POSITION.fullmatch(name) for side in (there, here) for names in side for name in names):
        return groups
    try:
        return matched(groups, there, here)
    except ValueError:
        if strict:
            raise
        return groups


def matched(groups: list[dict[str, Any]], there: Names, here: Names) -> list[dict[str, Any]]:
    """Match by name where all names are different; arguments and errors as :func:`by_name`."""
    places = {
        name: (index, key)
        for index, names in enumerate(there)
        for name, key in zip(names, groups[index]["params"], strict=True)
    }
    wanted = [name for names in here for name in names]
    missing, extra = [x for x in wanted if x not in places], [x for x in places if x not in set(wanted)]
    if missing or extra:
        problems = [f"it lacks {_some(missing)}"] * bool(missing) + [f"it has {_some(extra)}, unknown here"] * bool(
            extra
        )
        raise ValueError(
            f"loaded state dict is of other parameters: {', and '.join(problems)}. Give both the same names "
            "(jaxoptim.interop.torch.carry_over translates them), or match by position with strict=False."
        )
    result = []
    for index, names in enumerate(here):
        source = places[names[0]][0] if names else index
        if set(names) != set(there[source]):
            raise ValueError(
                f"loaded state dict has other groups: group {index} here is of {_some(names) or 'nothing'}, group "
                f"{source} there of {_some(there[source]) or 'nothing'}. Make the optimizer with the same groups."
            )
        ordered = {"param_names": list(names)} if "param_names" in groups[source] else {}
        result.append({**groups[source], **ordered, "params": [places[name][1] for name in names]})
    return result


def _are_unique(names: Names) -> bool:
    """Return whether every parameter has a name of its own."""
    flat = [name for group in names for name in group]
    return bool(flat) and None not in flat and len(set(flat)) == len(flat)


def _some(names: Sequence[Any]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
