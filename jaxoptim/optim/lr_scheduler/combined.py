"""Schedulers made of schedulers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxoptim.optim.lr_scheduler.base import LRScheduler, values
from jaxoptim.optim.lr_scheduler.plateau import ReduceLROnPlateau
from jaxoptim.optim.optimizer import Optimizer


class _Composite(LRScheduler):
    """A scheduler of schedulers for the same optimizer."""

    _schedulers: Sequence[LRScheduler]

    def _check_schedulers(self, schedulers: Sequence[LRScheduler], optimizer: Optimizer) -> None:
        """Raise for schedulers that cannot be combined."""
        name = type(self).__name__
        for index, scheduler in enumerate(schedulers):
            if isinstance(scheduler, ReduceLROnPlateau):
                raise ValueError(
                    f"{name} does not support `ReduceLROnPlateau` scheduler as it requires additional kwargs to be "
                    f"specified when calling `step`, but got one at index {index} in the given schedulers sequence."
                )
            if optimizer is not _optimizer_of(self, index, scheduler):
                raise ValueError(
                    f"{name} expects all schedulers to belong to the same optimizer, but got scheduler "
                    f"{type(scheduler).__name__} at index {index} has {scheduler.optimizer}, which is different from "
                    f"{type(optimizer).__name__}."
                )

    def _all(self) -> Iterator[LRScheduler]:
        yield self
        for scheduler in self._schedulers:
            yield from scheduler._all()

    def _begin(self) -> None:
        self._to_initial_lr()
        self._restart()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        del state["_schedulers"]
        state["_schedulers"] = [scheduler.state_dict() for scheduler in self._schedulers]
        return state

    def _check_saved(self, state: Mapping[str, Any]) -> None:
        super()._check_saved(state)
        saved = state.get("_schedulers", [])
        if len(saved) != len(self._schedulers):
            raise ValueError(
                f"The state dict has {len(saved)} schedulers, but this {type(self).__name__} has "
                f"{len(self._schedulers)}."
            )
        for scheduler, its in zip(self._schedulers, saved, strict=True):
            scheduler._check_saved(its)

    def _restore(self, state: dict[str, Any]) -> None:
        for scheduler, its in zip(self._schedulers, state.pop("_schedulers"), strict=True):
            scheduler.load_state_dict(its)
        super()._restore(state)


def _optimizer_of(owner: LRScheduler, index: int, scheduler: Any) -> Optimizer:
    """Return the optimizer of a scheduler; raise for anything else."""
    if not hasattr(scheduler, "optimizer"):
        raise TypeError(f"{type(owner).__name__} at index {index} should have `optimizer` as its attribute.")
    return scheduler.optimizer


class SequentialLR(_Composite):
    r"""Follow several schedulers, one after the other.

    .. math::
        \eta_n = s_i(n - m_i), \qquad i = |\{m \,:\, m \le n\}|, \quad m_0 = 0

    A :class:`ChainedScheduler` or another ``SequentialLR`` may follow (where torch raises): it begins from the
    initial rates. A :class:`ChainedScheduler` that comes first has the rates that it has by itself (in torch its
    first factors count twice). A ``SequentialLR`` that comes first is one epoch ahead, as in torch.

    Args:
        optimizer: the optimizer whose groups are scheduled.
        schedulers: a list of schedulers of that optimizer.
        milestones: the epochs :math:`m_i` at which the next begins, one fewer than schedulers, in order.
        last_epoch: the last epoch that was seen (default -1: begin). The rates, and the schedulers, are brought
            to the one after it.

    Raises:
        ``TypeError`` for anything but a scheduler; ``ValueError`` for none at all, for a wrong number of milestones,
        for schedulers of another optimizer and for a ``ReduceLROnPlateau``.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.5)
        >>> warmup = optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)
        >>> decay = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> scheduler = optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[1])
        >>> scheduler.get_last_lr()
        [0.25]
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.5]
    """

    def __init__(
        self, optimizer: Optimizer, schedulers: list[LRScheduler], milestones: list[int], last_epoch: int = -1
    ) -> None:
        if len(schedulers) < 1:
            raise ValueError(f"{type(self).__name__} expects at least one scheduler, but got no scheduler.")
        self._check_schedulers(schedulers, optimizer)
        if len(milestones) != len(schedulers) - 1:
            raise ValueError(
                "Sequential Schedulers expects number of schedulers provided to be one more than the number of "
                f"milestone points, but got number of schedulers {len(schedulers)} and the number of milestones to be "
                f"equal to {len(milestones)}"
            )
        self._schedulers = schedulers
        self._milestones = milestones
        self.last_epoch = 0
        self.optimizer = optimizer
        if last_epoch >= 0:
            self._check_initial_lr()
        self._to_initial_lr()
        self.recursive_undo()
        first = self._first()
        first._initial_step()
        self._last_lr = first.get_last_lr()
        self._repeat(last_epoch + 1)

    def _first(self) -> LRScheduler:
        """The scheduler of epoch 0."""
        return self._schedulers[bisect_right(self._milestones, 0)]

    def recursive_undo(self, sched: Any = None) -> None:
        """Take back the initial steps of the schedulers.

        Args:
            sched: a scheduler, whose own ones are taken back if it has some (default None: this).
        """
        for scheduler in getattr(sched or self, "_schedulers", []):
            self.recursive_undo(scheduler)
        if sched is not None and not hasattr(sched, "_schedulers") and hasattr(sched, "last_epoch"):
            sched.last_epoch -= 1

    def step(self) -> None:  # type: ignore[override]
        """Move to the next epoch; call it after the optimizer's step."""
        self._refuse_tracing()
        with self._all_or_nothing():
            self.last_epoch += 1
            index = bisect_right(self._milestones, self.last_epoch)
            scheduler = self._schedulers[index]
            if index > 0 and self._milestones[index - 1] == self.last_epoch:
                scheduler._begin()
            else:
                scheduler.step()
            self._last_lr = scheduler.get_last_lr()

    def _restart(self) -> None:
        self._reset()
        first = self._first()
        first._initial_step()
        self._last_lr = first.get_last_lr()

    def _reset(self) -> None:
        self.last_epoch = 0
        self._first()._reset()


class ChainedScheduler(_Composite):
    r"""Step several schedulers at each epoch, one after the other.

    .. math::
        \eta_n = (s_k \circ \dots \circ s_1)(\eta_{n-1})

    Args:
        schedulers: schedulers of one optimizer.
        optimizer: that optimizer (default None: the first scheduler's).

    Raises:
        ``TypeError`` for anything but a scheduler; ``ValueError`` for none at all, for schedulers of another
        optimizer and for a ``ReduceLROnPlateau``.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.5)
        >>> constant = optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)
        >>> decay = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> scheduler = optim.lr_scheduler.ChainedScheduler([constant, decay])
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.125]
    """

    def __init__(self, schedulers: Sequence[LRScheduler], optimizer: Optimizer | None = None) -> None:
        if len(schedulers) < 1:
            raise ValueError(
                f"{type(self).__name__} expects at least one scheduler to be chained, but got no scheduler."
            )
        optimizer = optimizer or _optimizer_of(self, 0, schedulers[0])
        self._check_schedulers(schedulers, optimizer)
        self._schedulers = schedulers
        self.optimizer = optimizer
        self._last_lr = values(optimizer, "lr")

    def step(self) -> None:  # type: ignore[override]
        """Step every scheduler; call it after the optimizer's step."""
        self._refuse_tracing()
        with self._all_or_nothing():
            for scheduler in self._schedulers:
                scheduler.step()
            self._last_lr = values(self.optimizer, "lr")

    def _initial_step(self) -> None:
        self._restart()

    def _restart(self) -> None:
        for scheduler in self._schedulers:
            scheduler._restart()
        self._last_lr = values(self.optimizer, "lr")
