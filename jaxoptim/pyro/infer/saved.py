"""Saved states of an SVI, and states that were loaded before model and guide have run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxoptim.core.numerics import as_jax
from jaxoptim.optim.parameter import Parameter
from jaxoptim.pyro.infer.arguments import Arguments
from jaxoptim.pyro.infer.objective import Discovery, Site
from jaxoptim.pyro.optim.state_trees import plain, shaped_like

_ENTRIES = (
    *("params", "optimizer", "key", "mutable_state", "num_steps", "draws"),
    *("has_begun", "sites", "reached", "calls", "store"),
)
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Loaded:
    """The part of a loaded state that model and guide have not reached yet.

    Only a run of them tells how a parameter is constrained, so the first call that reaches it looks that up.

    Args:
        sites: the ``param`` statements, as :func:`sites_of` gives them.
        values: of the parameters.
        mutable: the names of the mutable sites.
        calls: the parameters that each call has reached in the run that was saved.
    """

    def __init__(
        self,
        sites: Mapping[str, Mapping[str, Any]] = _NOTHING,
        values: Mapping[str, Any] = _NOTHING,
        mutable: Iterable[str] = (),
        calls: Mapping[str, list[str]] = _NOTHING,
    ) -> None:
        self.sites, self.mutable, self.calls = dict(sites), set(mutable), dict(calls)
        self._values = {leaf: values[leaf] for site in sites.values() if not _is_free(site) for leaf in site["leaves"]}

    @property
    def names(self) -> set[str]:
        """The names of the parameters."""
        return {leaf for site in self.sites.values() for leaf in site["leaves"]}

    def unchanged(self, params: Mapping[str, Parameter]) -> dict[str, Any]:
        """Return the sites whose parameters have not changed since loading."""
        changed = {name for name, value in self._values.items() if not np.array_equal(params[name].value, value)}
        return {name: site for name, site in self.sites.items() if not changed.intersection(site["leaves"])}

    def constrained(self, params: Mapping[str, Parameter]) -> dict[str, Any]:
        """The constrained values of the sites.

        Raises:
            ``ValueError`` for a value that has changed since.
        """
        sites = self.unchanged(params)
        if changed := sorted(self.sites.keys() - sites.keys()):
            raise ValueError(
                f"The parameter {changed[0]!r} has changed since it was loaded, and its constraint is known when model "
                "and guide have reached it. Call evaluate_loss with arguments that lead there."
            )

        def value(leaf: Any) -> Any:
            return params[leaf].value if isinstance(leaf, str) else leaf

        return {name: jax.tree.map(value, site["value"]) for name, site in sites.items()}

    def __bool__(self) -> bool:
        return bool(self.sites or self.mutable)

    def check_reached(self, arguments: Arguments, sites: Mapping[str, Site]) -> None:
        """Raise ``KeyError`` if a call reaches other parameters than it did in the run that was saved."""
        reached = {leaf for site in sites.values() for leaf in site.leaves}
        expected = set(self.calls.get(described(arguments.program), reached))
        if differing := sorted(expected ^ reached):
            problem = "has" if differing[0] in expected else "lacks"
            raise KeyError(
                f"The loaded state {problem} {differing[0]!r}, but the param statements that model and guide reach are "
                f"{', '.join(map(repr, sorted(reached))) or 'none'}. Load it into an SVI of the same model and guide."
            )

    def values(self, found: Discovery, params: Mapping[str, Parameter], mutable: Mapping[str, Any]) -> dict[str, Any]:
        """The constrained values and the mutable state of the sites that a run has reached.

        Args:
            found: in the run.
            params: of the SVI.
            mutable: its mutable state.

        Raises:
            ``KeyError`` for a tree of which the state has only a part, ``ValueError`` for another shape.
        """
        values, names = {}, self.names
        for name, site in found.sites.items():
            if not names.intersection(site.leaves):
                continue
            for leaf in site.leaves:
                if leaf not in names:
                    raise KeyError(f"The loaded state has no {leaf!r}, which {name!r} of the model or guide has.")
                if params[leaf].shape != found.values[leaf].shape:
                    raise ValueError(
                        f"The loaded state has {leaf!r} of shape {params[leaf].shape}, but that of the param "
                        f"statement, unconstrained, is {found.values[leaf].shape}. Both must be equal."
                    )
            values[name] = site.value({leaf: params[leaf].value for leaf in site.leaves})
        return values | {
            name: in_form(mutable[name], found.mutable[name], name) for name in self._waiting(found.mutable)
        }

    def in_form(self, mutable: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """Return the mutable state, in the model's structure for the sites that a run has reached."""
        return {**mutable, **{name: in_form(mutable[name], found[name], name) for name in self._waiting(found)}}

    def _waiting(self, found: Mapping[str, Any]) -> list[str]:
        """The mutable sites that a run has reached for the first time."""
        return [name for name in found if name in self.mutable]

    def meet(self, found: Discovery) -> None:
        """Drop the sites that a run has reached."""
        self.sites = {name: site for name, site in self.sites.items() if name not in found.sites}
        self._values = {leaf: value for leaf, value in self._values.items() if leaf in self.names}
        self.mutable.difference_update(found.mutable)


def _is_free(site: Mapping[str, Any]) -> bool:
    """Whether the constrained values of a site are its parameters."""
    return all(isinstance(leaf, str) for leaf in jax.tree.leaves(site["value"]))


def described(program: Any) -> str:
    """The static arguments, shapes and dtypes of a call, the same in another process."""
    return repr(program)


def checked_state(state: Any) -> dict[str, Any]:
    """A state dict; raises for anything else."""
    if not isinstance(state, Mapping):
        raise TypeError(f"load_state_dict takes what svi.state_dict() gave, a dict, but got {type(state).__name__}.")
    if missing := [name for name in _ENTRIES if name not in state]:
        raise ValueError(
            f"The state lacks {missing[0]!r}: it was not made by svi.state_dict(), which has {', '.join(_ENTRIES)}."
        )
    params = {name: as_jax(value) for name, value in state["params"].items()}
    key = as_jax(state["key"]) if isinstance(state["key"], np.ndarray) else state["key"]
    return {**state, "params": params, "key": key}


def check_params(values: Mapping[str, Any], own: Mapping[str, Parameter], has_begun: bool) -> None:
    """Raise for values that do not fit the existing parameters.

    Args:
        values: by name.
        own: the parameters of the SVI, and those that its optimizer brings.
        has_begun: whether it has all of its parameters.
    """
    if has_begun and values.keys() != own.keys():
        name = min(values.keys() ^ own.keys())
        problem = "has" if name in values else "lacks"
        raise KeyError(
            f"The state {problem} {name!r}, but the parameters of this SVI are {', '.join(map(repr, own)) or 'none'}. "
            "Load it into a new SVI, which takes them all."
        )
    for name, value in values.items():
        if name in own and own[name].shape != value.shape:
            raise ValueError(
                f"The state has {name!r} of shape {value.shape}, but the parameter of this SVI has {own[name].shape}. "
                "Both must be equal."
            )


def loaded_mutable(saved: Mapping[str, Any], own: Mapping[str, Any], has_begun: bool) -> dict[str, Any]:
    """The mutable state of a loaded state.

    Args:
        saved: as it was saved.
        own: that of the SVI.
        has_begun: whether it has all of its sites.

    Raises:
        ``KeyError`` for a site that only one side has, ``ValueError`` for one of another form.
    """
    if not has_begun:
        return dict(saved)
    if saved.keys() != own.keys():
        name = min(saved.keys() ^ own.keys())
        problem = "has" if name in saved else "lacks"
        raise KeyError(
            f"The state {problem} the mutable site {name!r}, but those of this SVI are "
            f"{', '.join(map(repr, own)) or 'none'}. Load it into a new SVI, which takes them all."
        )
    return {name: in_form(saved[name], own[name], name) for name in own}


def in_form(saved: Any, like: Any, name: str) -> Any:
    """The value of a mutable site in the structure that the model gives it."""
    return shaped_like(saved, like, f"mutable state {name!r}")


def sites_of(sites: Mapping[str, Site], params: Mapping[str, Parameter], loaded: Loaded) -> dict[str, Any]:
    """The ``param`` statements that model and guide have reached, with their constrained values.

    Returns:
        By name a dict of ``"leaves"``, the names of its parameters, and ``"value"``, the constrained value: a tree of
        arrays, with the name of a parameter in the place of an array that is the same. Those of a loaded state that
        have been changed from elsewhere are left out.
    """
    values = {name: param.value for name, param in params.items()}
    result = loaded.unchanged(params)
    for name, site in sites.items():
        arrays = jax.tree.leaves(site.value(values))
        pairs = zip(site.leaves, arrays, strict=True)
        tree = [
            leaf if array is values[leaf] or np.array_equal(array, values[leaf]) else array for leaf, array in pairs
        ]
        result[name] = {"leaves": list(site.leaves), "value": plain(jax.tree.unflatten(site.treedef, tree))}
    return result


def calls_of(programs: Mapping[Any, Any], loaded: Loaded) -> dict[str, list[str]]:
    """The parameters that each call has reached."""
    calls: dict[str, list[str]] = {}
    ambiguous = set()
    for program, of in programs.items():
        text, names = described(program), list(of.names)
        if calls.setdefault(text, names) != names:  # of arguments that look alike
            ambiguous.add(text)
    return {text: names for text, names in (loaded.calls | calls).items() if text not in ambiguous}
