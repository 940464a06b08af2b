"""The base of the schedulers, and the access to the options of an optimizer's groups."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import as_jax
from jaxoptim.core.tracing import refuse_tracing
from jaxoptim.optim.optimizer import Optimizer

Number = float | jax.Array
"""A rate: a float, or an array of one element where a group has one."""

EPOCH_DEPRECATION_WARNING = (
    "The epoch parameter in `scheduler.step()` was not necessary and is being deprecated where possible. Please use "
    "`scheduler.step()` to step the scheduler. During the deprecation, if epoch is different from None, the closed "
    "form is used instead of the new chainable form, where available."
)


def check_optimizer(optimizer: Any) -> None:
    """Raise for an object that is none of this library's optimizers, or has no rate to change."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
    for index, lr in enumerate(values(optimizer, "lr")):
        if callable(lr):
            raise TypeError(
                f"param_groups[{index}] has a schedule for lr, {lr}, which no scheduler can change. Give the "
                "optimizer a number for lr, or leave the scheduler out."
            )


def per_group(name: str, optimizer: Optimizer, value: Any) -> list[Any]:
    """Return one value for each group: those of a list, or the same for all."""
    groups = len(optimizer.param_groups)
    if not isinstance(value, list | tuple):
        return [value] * groups
    if len(value) != groups:
        raise ValueError(
            f"{name} must have the same length as optimizer.param_groups. "
            f"{name} has {len(value)} values, param_groups has {groups}."
        )
    return list(value)


def values(optimizer: Optimizer, key: str) -> list[Any]:
    """Return an option of every group."""
    return [group[key] for group in optimizer.param_groups]


def number(x: Any) -> float:
    """Return a number, or an array of one element, as a float."""
    return float(x.reshape(()) if hasattr(x, "reshape") else x)


def write(group: dict[str, Any], key: str, value: Any) -> None:
    """Set an option of a group; an array stays one, of its shape and dtype."""
    old = group[key]
    group[key] = jnp.full_like(old, value) if isinstance(old, jax.Array) else value


_TELLING = ("_schedulers", "_milestones")
"""Entries of a state dict that tell the class though their names are private."""


def warn(message: str, depth: int = 3) -> None:
    """Warn at the user's line, ``depth`` frames away."""
    warnings.warn(message, UserWarning, stacklevel=depth)


class LRScheduler:
    r"""The base of the schedulers, as ``torch.optim.lr_scheduler.LRScheduler``.

    A scheduler writes ``group["lr"]``; the optimizer reads it at its next step, without compiling again. A
    subclass defines :meth:`get_lr`, and may define ``_get_closed_form_lr``:

    .. math::
        \eta_{n+1} = \mathtt{get\_lr}(\eta_n, n + 1), \qquad n = \mathtt{last\_epoch}

    Args:
        optimizer: the optimizer whose groups are scheduled.
        last_epoch: -1 for a new scheduler (default), which starts from the groups' ``lr``. Otherwise the last
            epoch that was seen: the scheduler begins at the one after it, with the rate that it would have after
            that many steps from ``initial_lr``. (torch's rates are one step behind there, or count a milestone
            twice.) Several schedulers of one optimizer are restored by :meth:`load_state_dict` only.

    Attributes:
        base_lrs: the rate of each group at the start, from its ``initial_lr``.
        last_epoch: how often the scheduler was stepped.

    Raises:
        ``TypeError`` for anything but an optimizer, ``KeyError`` for ``last_epoch`` with groups that have no
        ``initial_lr``, ``ValueError`` if groups were added that the scheduler does not know.

    Examples:
        >>> from jaxoptim import optim
        >>> class Halving(optim.lr_scheduler.LRScheduler):
        ...     def get_lr(self):
        ...         return [base / 2**self.last_epoch for base in self.base_lrs]
        >>> optimizer = optim.SGD([1.0], lr=0.1)
        >>> scheduler = Halving(optimizer)
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.05]
    """

    _get_lr_called_within_step: bool = False
    _is_initial: bool = False
    _is_resumed: bool = False
    """Whether it was made with ``last_epoch`` and not stepped since."""
    _continues: ClassVar[bool] = True
    """Whether ``get_lr`` goes on from the current rate, and not from the base rate alone."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "get_lr" in vars(cls) and "_continues" not in vars(cls):
            cls._continues = True

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        check_optimizer(optimizer)
        self.optimizer = optimizer
        if last_epoch == -1:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        else:
            self._check_initial_lr()
        self.base_lrs: list[Any] = values(optimizer, "initial_lr")
        self.last_epoch = last_epoch
        if not optimizer._scheduled:
            optimizer._scheduled, optimizer._opt_called = True, False
        optimizer._step_at_scheduling = vars(optimizer).get("step")
        if last_epoch < 0 or not self._continues:
            self._initial_step()
            return
        self._to_initial_lr()
        self._restart()
        self._repeat(last_epoch + 1)
        self._is_resumed = True

    def _check_initial_lr(self) -> None:
        """Raise for groups that no scheduler has seen yet."""
        for index, group in enumerate(self.optimizer.param_groups):
            if "initial_lr" not in group:
                raise KeyError(
                    f"param 'initial_lr' is not specified in param_groups[{index}] when resuming scheduler with "
                    "last_epoch >= 0.\nThis typically happens when:\n"
                    "1. You're trying to resume training from a checkpoint but haven't properly loaded the optimizer "
                    "state\n2. You're using last_epoch >= 0 for a fresh training run (not recommended)"
                )

    def _to_initial_lr(self) -> None:
        """Give every group its initial rate."""
        for group in self.optimizer.param_groups:
            write(group, "lr", group["initial_lr"])

    def _initial_step(self) -> None:
        """Move to epoch 0."""
        self._step_count = 0
        self._is_initial = True
        try:
            self.step()
        finally:
            self._is_initial = False

    def _repeat(self, steps: int) -> None:
        """Repeat the steps of an earlier run, which had steps of the optimizer between them."""
        called, self.optimizer._opt_called = self.optimizer._opt_called, True
        for _ in range(steps):
            self.step()
        self.optimizer._opt_called = called

    def _begin(self) -> None:
        """Move to epoch 0 in the midst of a sequence, where the rate is what another scheduler has left."""
        self._step_count = 1
        self._update_lr(0)

    def _restart(self) -> None:
        """Move to epoch 0 from the initial rate."""
        self._reset()
        self._initial_step()

    def _reset(self) -> None:
        """Return to before the initial step."""
        self.last_epoch = -1

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer, under torch's keys.

        Returns:
            A dict, to be saved together with the optimizer's.
        """
        return {key: value for key, value in vars(self).items() if key not in ("optimizer", "_is_resumed")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of :meth:`state_dict`, here or from torch. The rates come with the optimizer's state.

        Args:
            state_dict: it is not changed.

        Raises:
            ``ValueError`` for a state dict of another class of this library, or of another number of groups or
            schedulers; nothing is changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"A state dict is expected, what state_dict() returns, but got {type(state_dict).__name__}."
            )
        state = own(state_dict)
        self._check_saved(state)
        self._restore(state)

    def _check_saved(self, state: Mapping[str, Any]) -> None:
        """Raise for the state of another class: torch saves no name of it, but the options differ."""
        ours = self.state_dict()
        lacking = [name for name in inspect.signature(type(self)).parameters if name in ours.keys() - state.keys()]
        unknown = [name for name in state if name not in ours and (name in _TELLING or not name.startswith("_"))]
        unknown = [name for name in unknown if name != "verbose"]  # of older versions of torch
        if lacking or (unknown and type(self).__module__.startswith("jaxoptim.")):
            found = [f"lacks {', '.join(map(repr, lacking))}"] * bool(lacking)
            found += [f"has {', '.join(map(repr, unknown))}"] * bool(unknown)
            raise ValueError(
                f"The state dict is not of {type(self).__name__}: it {' and '.join(found)}. Load the state of the same "
                f"scheduler, which has {', '.join(name for name in ours if not name.startswith('_'))}."
            )
        there, here = state.get("base_lrs", []), ours.get("base_lrs", [])
        if len(there) != len(here):
            raise ValueError(
                f"The state dict is of an optimizer with {len(there)} parameter groups, but this {type(self).__name__} "
                f"schedules {len(here)}."
            )

    def _restore(self, state: dict[str, Any]) -> None:
        """Load a state dict that was checked."""
        vars(self).update(state)

    def get_last_lr(self) -> list[Any]:
        """Return the rate of each group after the last step.

        Returns:
            A list with the type of each group's ``lr``.
        """
        return self._last_lr

    def get_lr(self) -> list[Any]:
        """Return the rate of each group at ``last_epoch``; subclasses define it, and :meth:`step` calls it."""
        raise NotImplementedError(
            f"{type(self).__name__} has no get_lr. Define it to return the rate of each group at self.last_epoch."
        )

    def step(self, epoch: Any = None) -> None:
        """Move to the next epoch; call it after the optimizer's step.

        Args:
            epoch: deprecated, as in torch: go to this epoch, by the closed form if there is one.
        """
        self._refuse_tracing()
        if self._step_count == 1 or self._is_resumed:
            if self._is_overridden():
                warn(
                    "Seems like `optimizer.step()` has been overridden after learning rate scheduler initialization. "
                    "Please, make sure to call `optimizer.step()` before `lr_scheduler.step()`."
                )
            elif not self.optimizer._opt_called:
                warn(
                    "Detected call of `lr_scheduler.step()` before `optimizer.step()`. Call them in the opposite "
                    "order: `optimizer.step()` before `lr_scheduler.step()`. Otherwise the first value of the "
                    "learning rate schedule is skipped."
                )
        self._is_resumed = False
        if epoch is not None:
            warn(EPOCH_DEPRECATION_WARNING)
        with self._all_or_nothing():
            self._step_count += 1
            self._update_lr(epoch)

    def _refuse_tracing(self) -> None:
        """Raise within compiled functions, where a scheduler would step once, while tracing, and never again."""
        if not self._is_initial:  # the first epoch, of a scheduler that is made there
            refuse_tracing(f"{type(self).__name__}.step", "use a schedule of jaxoptim.schedules as the learning rate")

    def _update_lr(self, epoch: Any = None) -> None:
        if epoch is None:
            self.last_epoch += 1
            self._compute(self.get_lr)
        else:
            self.last_epoch = epoch
            self._compute(getattr(self, "_get_closed_form_lr", self.get_lr))

    def _compute(self, get_lr: Callable[[], Iterable[Any]]) -> None:
        """Give each group its rate."""
        with self._within_step():
            rates = list(get_lr())
        groups = self.optimizer.param_groups
        if len(rates) != len(groups):
            raise ValueError(
                f"{type(self).__name__} has the rates of {len(rates)} parameter groups, but the optimizer has "
                f"{len(groups)} now. Make a new scheduler after add_param_group."
            )
        for group, rate in zip(groups, rates, strict=True):
            write(group, "lr", rate)
        self._last_lr = values(self.optimizer, "lr")

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Leave schedulers and groups as they were if a step fails."""
        states = [(vars(scheduler), dict(vars(scheduler))) for scheduler in self._all()]
        states += [(group, dict(group)) for group in self.optimizer.param_groups]
        try:
            yield
        except BaseException:
            for state, before in states:
                state.clear()
                state.update(before)
            raise

    def _all(self) -> Iterator[LRScheduler]:
        """Return this scheduler and those that it steps."""
        yield self

    @contextlib.contextmanager
    def _within_step(self) -> Iterator[None]:
        self._get_lr_called_within_step = True
        try:
            yield
        finally:
            self._get_lr_called_within_step = False

    def _is_overridden(self) -> bool:
        """Return whether the user has replaced the optimizer's ``step`` since the scheduler was made."""
        step = vars(self.optimizer).get("step", self.optimizer.step)
        return step is not self.optimizer._step_at_scheduling and not getattr(step, "hooked", False)

    def _warn_outside_step(self) -> None:
        """Warn a user who calls :meth:`get_lr`, which computes the next rate, to read the current one."""
        if not self._get_lr_called_within_step:
            warn("To get the last learning rate computed by the scheduler, please use `get_last_lr()`.", depth=4)


def own(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a shallow copy of a state dict with JAX arrays in the place of torch's."""

    def convert(x: Any) -> Any:
        return as_jax(x) if hasattr(x, "__array__") and not isinstance(x, np.generic) else x

    return {
        key: [convert(x) for x in value] if isinstance(value, list) else convert(value)
        for key, value in state_dict.items()
    }
