"""The keys of models that a loss calls: from the loss's own seeds if it has some, else from the step's key.

Imported only where a model runs: it derives from a class of numpyro.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpyro
from jax.extend.core import get_opaque_trace_state
from numpyro import handlers
from numpyro.primitives import Messenger


class Draws(Messenger):  # type: ignore[misc]
    """A context manager around one evaluation of a loss, which gives its models keys.

    A seed of the loss's own tells its draws apart, such as those of particles; it is most often a constant, so the key
    of the evaluation is folded into it. Else each call of a model has a key, and a function that JAX traces once for
    many evaluations may draw nothing.

    Args:
        key: of the evaluation.
    """

    def __init__(self, key: jax.Array) -> None:
        super().__init__()
        self._salt = jax.random.bits(jax.random.fold_in(key, 2))  # the children 0 and 1 are those of the split
        self._trace = get_opaque_trace_state()
        self._calls: list[_Keyed] = []

    def keyed(self, what: str, fn: Callable[..., Any], key: jax.Array, values: dict[str, Any]) -> Callable[..., Any]:
        """Return a model with its parameters and keys substituted.

        Args:
            what: what it is called in messages.
            fn: the model.
            key: of its first call; call n has ``fold_in(key, n)``.
            values: of its parameters.
        """
        count = 0

        def keyed(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            own = None
            if get_opaque_trace_state() == self._trace:
                own = handlers.seed(rng_seed=key if count == 0 else jax.random.fold_in(key, count))
                count += 1
            # numpyro's random modules write into the trees that they get.
            data = jax.tree.map(lambda x: x, values)
            call = _Keyed(handlers.substitute(fn, data=data), what, own, self._salt)
            self._calls.append(call)
            try:
                return call(*args, **kwargs)
            finally:
                self._calls.pop()

        return keyed

    def process_message(self, msg: dict[str, Any]) -> None:
        """Raise for a draw that has no key."""
        if not self._calls:
            return
        call = self._calls[-1]
        msg["stop"] = msg["type"] == "prng_key"  # a seed around the whole step has been there for its compilation alone
        if not call.asks and _lacks_key(msg) and msg["type"] != "control_flow":  # whose body may draw nothing
            name = repr(msg["name"]) if "name" in msg else "A key"
            raise ValueError(
                f"{name} of the {call.what} would be one draw for all evaluations of a function that JAX traces once "
                f"(vmap, scan, jit, grad, ...). Give each a key: numpyro.handlers.seed({call.what}, key)."
            )


class _Keyed(Messenger):  # type: ignore[misc]
    """One call of a model. Statements get keys before a replay makes them superfluous, as in numpyro's ELBOs.

    Args:
        fn: the model.
        what: what it is called in messages.
        own: a seed for when its caller has none, None if there must be one.
        salt: folded into the keys of its caller's.
    """

    def __init__(self, fn: Callable[..., Any], what: str, own: handlers.seed | None, salt: jax.Array) -> None:
        super().__init__(fn)
        self.what, self._own, self._salt = what, own, salt
        self.asks = False

    def process_message(self, msg: dict[str, Any]) -> None:
        """Give a statement its key."""
        if self.asks or not _lacks_key(msg):
            return
        self.asks = True
        try:
            key = numpyro.prng_key()
        finally:
            self.asks = False
        if key is not None:
            msg["kwargs"]["rng_key"] = jax.random.fold_in(key, self._salt)
        elif self._own is not None:
            self._own.process_message(msg)


def _lacks_key(msg: dict[str, Any]) -> bool:
    """Whether ``numpyro.handlers.seed`` would give a key to a statement."""
    kinds = ("sample", "prng_key", "plate", "control_flow")
    return msg["type"] in kinds and msg["kwargs"]["rng_key"] is None and msg["value"] is None
