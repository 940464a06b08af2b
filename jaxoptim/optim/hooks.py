"""Functions that run around a step, a save or a load."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from jaxoptim.core.tracing import refuse_tracing

F = TypeVar("F", bound=Callable[..., Any])

_ids = itertools.count()


class Hooks(OrderedDict[int, Callable[..., Any]]):
    """Registered functions in the order in which they run."""

    def register(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Add a function at the end, or at the front."""
        handle = RemovableHandle(self)
        self[handle.id] = hook
        if prepend:
            self.move_to_end(handle.id, last=False)
        return handle


class RemovableHandle:
    """The handle of a registered hook: ``remove()``, or the end of a ``with``, takes the hook out again.

    Args:
        hooks: the registry that holds the hook.

    Attributes:
        id: the key of the hook in its registry.

    Examples:
        >>> from jaxoptim import optim
        >>> opt = optim.SGD([1.0])
        >>> with opt.register_step_post_hook(lambda opt, args, kwargs: print("stepped")):
        ...     opt.step([0.5])
        stepped
        >>> opt.step([0.5])
    """

    def __init__(self, hooks: Hooks) -> None:
        self.id = next(_ids)
        self._hooks = weakref.ref(hooks)

    def remove(self) -> None:
        """Take the hook out; a second time does nothing."""
        hooks = self._hooks()
        if hooks is not None:
            hooks.pop(self.id, None)

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


_before_every_step, _after_every_step = Hooks(), Hooks()


def register_optimizer_step_pre_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """Run a function before each step of every optimizer.

    Args:
        hook: ``hook(optimizer, args, kwargs)``, where ``args`` begins with the optimizer, as in torch. It may
            return new ``(args, kwargs)``.

    Returns:
        A handle whose ``remove()`` takes the hook out.

    Examples:
        >>> from jaxoptim import optim
        >>> handle = optim.register_optimizer_step_pre_hook(lambda opt, args, kwargs: print(type(opt).__name__))
        >>> optim.SGD([1.0]).step([0.5])
        SGD
        >>> handle.remove()
    """
    return _before_every_step.register(hook)


def register_optimizer_step_post_hook(hook: Callable[..., None]) -> RemovableHandle:
    """Run a function after each step of every optimizer.

    Args:
        hook: ``hook(optimizer, args, kwargs)``, where ``args`` begins with the optimizer, as in torch.

    Returns:
        A handle whose ``remove()`` takes the hook out.

    Examples:
        See :func:`register_optimizer_step_pre_hook`.
    """
    return _after_every_step.register(hook)


def hooked(step: F) -> F:
    """Wrap a method that makes a step in its hooks: global ones, the instance's, the step, and back."""
    if getattr(step, "hooked", False):
        return step

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        self = args[0]
        if self._stepping:  # super().step() within a step fires no hooks again
            return step(*args, **kwargs)
        refuse_tracing(f"{type(self).__name__}.{step.__name__}", "take the pure form that to_functional() gives")
        self._stepping = self._opt_called = True
        try:
            for before in (*_before_every_step.values(), *self._step_pre_hooks.values()):
                result = before(self, args, kwargs)
                if result is not None:
                    if not (isinstance(result, tuple) and len(result) == 2):
                        raise RuntimeError(
                            f"{before} must return None or a tuple of (new_args, new_kwargs), but got {result}."
                        )
                    args, kwargs = result
            out = step(*args, **kwargs)
            for after in (*self._step_post_hooks.values(), *_after_every_step.values()):
                after(self, args, kwargs)
            return out
        finally:
            self._stepping = False

    wrapper.hooked = True  # type: ignore[attr-defined]
    return wrapper  # type: ignore[return-value]


class Hooked:
    """The six kinds of hooks of one optimizer."""

    def _prepare_hooks(self) -> None:
        self._stepping = False
        self._scheduled = False
        """Whether there is a scheduler."""
        self._opt_called = False
        """Whether a step was made since the first scheduler came; schedulers warn if not."""
        self._step_at_scheduling: Any = None
        """The ``step`` that the user had put in the place of ours when the last scheduler came."""
        self._step_pre_hooks, self._step_post_hooks = Hooks(), Hooks()
        self._state_dict_pre_hooks, self._state_dict_post_hooks = Hooks(), Hooks()
        self._load_state_dict_pre_hooks, self._load_state_dict_post_hooks = Hooks(), Hooks()

    @property
    def _has_step_hooks(self) -> bool:
        """Return whether functions run before or after a step."""
        return any((_before_every_step, self._step_pre_hooks, self._step_post_hooks, _after_every_step))

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Run ``hook(optimizer, args, kwargs)`` before each step; it may return new ``(args, kwargs)``."""
        return self._step_pre_hooks.register(hook)

    def register_step_post_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Run ``hook(optimizer, args, kwargs)`` after each step."""
        return self._step_post_hooks.register(hook)

    def register_state_dict_pre_hook(self, hook: Callable[..., None], prepend: bool = False) -> RemovableHandle:
        """Run ``hook(optimizer)`` before :meth:`state_dict`; first of all with ``prepend``."""
        return self._state_dict_pre_hooks.register(hook, prepend)

    def register_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Run ``hook(optimizer, state_dict)`` after :meth:`state_dict`; it may change the dict or return another."""
        return self._state_dict_post_hooks.register(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Run ``hook(optimizer, state_dict)`` before loading a shallow copy; it may change it or return another."""
        return self._load_state_dict_pre_hooks.register(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Callable[..., None], prepend: bool = False) -> RemovableHandle:
        """Run ``hook(optimizer)`` after :meth:`load_state_dict`."""
        return self._load_state_dict_post_hooks.register(hook, prepend)
