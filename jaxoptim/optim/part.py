"""The parameters of an optimizer as the pure face has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxoptim.core import Rule
from jaxoptim.optim.parameter import Parameter


class Part(NamedTuple):
    """Parameters of one group that have made the same steps: one state of the pure face.

    Attributes:
        group: the options that they follow.
        rule: the rule with these options.
        params: the parameters.
        labels: their names.
        times: how often one step updates them.
        count: the steps that they have made, None without state.
        slots: the state of each.
        shared: the entries that belong to all of them.
    """

    group: dict[str, Any]
    rule: Rule
    params: Sequence[Parameter]
    labels: Sequence[str]
    times: int
    count: Any
    slots: Sequence[dict[str, Any]]
    shared: dict[str, Any] | None = None
