"""``optimizer.state``: torch's dictionaries of each parameter's state, over buffers that hold many."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.storage import Storage


class ParameterState(MutableMapping[str, Any]):
    """The state of one parameter, by torch's names: ``step``, ``exp_avg``, ...

    It is a live view: what it gives is current, what is written takes effect at the next step. Once the entry
    is deleted or replaced it is a dict of its own, as torch's would be, that may be filed under another parameter.
    """

    def __init__(self, storage: Storage, param: Parameter) -> None:
        self._storage, self._param = storage, param
        self._own: dict[str, Any] | None = None

    def detach(self) -> None:
        """Keep the current entries, and stop following the parameter."""
        self._own = self._now()

    def _now(self) -> dict[str, Any]:
        return self._storage.state_of(self._param) if self._own is None else self._own

    def _write(self, state: dict[str, Any]) -> None:
        if self._own is None:
            self._storage.set_state(self._param, state)
        else:
            self._own = state

    def __getitem__(self, name: str) -> Any:
        return self._now()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._write(self._now() | {name: value})

    def __delitem__(self, name: str) -> None:
        state = dict(self._now())
        del state[name]
        self._write(state)

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def __repr__(self) -> str:
        return repr(dict(self))


class State(MutableMapping[Any, Any]):
    """The state of all parameters; like torch's, it has no entry for one that was never updated.

    What a user files under anything but a parameter is kept as it is.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._views: weakref.WeakValueDictionary[Parameter, ParameterState] = weakref.WeakValueDictionary()

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, Parameter):
            return self._views.setdefault(key, ParameterState(self._storage, key))
        return self._storage.other_state[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, Parameter):
            self._storage.other_state[key] = value
        elif isinstance(value, Mapping):
            self._replace(key, dict(value))
        else:
            raise TypeError(f"The state of {key} is a dict of slots, but got {type(value).__name__}.")

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        if isinstance(key, Parameter):
            self._replace(key, {})
        else:
            del self._storage.other_state[key]

    def _replace(self, param: Parameter, state: dict[str, Any]) -> None:
        if param in self._views:
            self._views.pop(param).detach()
        self._storage.set_state(param, state)

    # Only state[param] makes an entry where there is none.

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the entry of a key, or the default."""
        if key not in self:
            return default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        """Take an entry out and return it."""
        if default and key not in self:
            return default[0]
        entry = self[key]
        del self[key]
        return entry

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return the entry of a key, which is set to the default if it had none."""
        if key not in self:
            self[key] = default
        return self[key]

    def clear(self) -> None:
        """Take all entries out."""
        for key in list(self):
            del self[key]

    def __contains__(self, key: object) -> bool:
        return self._storage.has_state(key) if isinstance(key, Parameter) else key in self._storage.other_state

    def __iter__(self) -> Iterator[Any]:
        yield from [param for param in self._storage.known() if self._storage.has_state(param)]
        yield from self._storage.other_state

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))
