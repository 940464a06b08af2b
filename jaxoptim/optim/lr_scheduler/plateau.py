"""The scheduler that waits for a metric to stop improving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, SupportsFloat

from jaxoptim.optim.lr_scheduler.base import (
    EPOCH_DEPRECATION_WARNING,
    LRScheduler,
    check_optimizer,
    number,
    values,
    warn,
    write,
)
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.schedules.plateau import check_plateau, count, is_better, reduced, worst


class ReduceLROnPlateau(LRScheduler):
    r"""Reduce the rate when a metric has stopped improving.

    A metric :math:`x` is better than the best so far, :math:`b`, if :math:`x < b (1 - \tau)` ("min", "rel"),
    :math:`x < b - \tau` ("min", "abs"), :math:`x > b (1 + \tau)` ("max", "rel") or :math:`x > b + \tau` ("max",
    "abs"). After more than ``patience`` metrics that are not better,

    .. math::
        \eta \leftarrow \max(\eta f, \eta_{\min}) .

    As in torch, the relative threshold of a negative metric points the other way, and NaN is never better.

    Args:
        optimizer: the optimizer whose groups are scheduled.
        mode: whether a "min" (default) or a "max" is looked for.
        factor: :math:`f`, a number < 1 (default 0.1).
        patience: how many metrics may be not better, an ``int`` (default 10).
        threshold: :math:`\tau`, a number (default 1e-4).
        threshold_mode: "rel" (default) or "abs".
        cooldown: how many metrics after a reduction are passed over, an ``int`` (default 0).
        min_lr: :math:`\eta_{\min}`, a number, or a list with one for each group (default 0).
        eps: the smallest reduction that is made, a number (default 1e-8).

    Raises:
        ``TypeError`` for anything but an optimizer; ``ValueError`` for an unknown mode, a factor >= 1 or a list of
        the wrong length; ``RuntimeError`` if groups were added since and ``min_lr`` is a list.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.5)
        >>> scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
        >>> for metric in (1.0, 1.0, 1.0):
        ...     scheduler.step(metric)
        >>> optimizer.param_groups[0]["lr"]
        0.25
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: Sequence[float] | float = 0,
        eps: float = 1e-8,
    ) -> None:
        check_plateau(mode, factor, threshold_mode)
        check_optimizer(optimizer)
        groups = len(optimizer.param_groups)
        self.factor = factor
        self.optimizer = optimizer
        self.default_min_lr: float | None
        if isinstance(min_lr, list | tuple):
            if len(min_lr) != groups:
                raise ValueError(f"expected {groups} min_lrs, got {len(min_lr)}")
            self.default_min_lr = None
            self.min_lrs = list(min_lr)
        else:
            self.default_min_lr = min_lr  # type: ignore[assignment]
            self.min_lrs = [min_lr] * groups
        self.patience = patience
        self.cooldown = cooldown
        self.eps = eps
        self.last_epoch = 0
        self._last_lr = values(optimizer, "lr")
        self.mode_worse = worst(mode)
        self.mode: Any = mode
        self.threshold = threshold
        self.threshold_mode: Any = threshold_mode
        self._reset()

    def _reset(self) -> None:
        """Forget the metrics so far."""
        self.best = self.mode_worse
        self.cooldown_counter = 0
        self.num_bad_epochs = 0

    @property
    def in_cooldown(self) -> bool:
        """Whether metrics are ignored."""
        return self.cooldown_counter > 0

    def step(self, metrics: SupportsFloat, epoch: Any = None) -> None:  # type: ignore[override]
        """Take one more metric.

        Args:
            metrics: a number, or an array of one element.
            epoch: deprecated, as in torch: the number of the epoch.
        """
        self._refuse_tracing()
        metric = number(metrics)
        if epoch is not None:
            warn(EPOCH_DEPRECATION_WARNING)
        better = is_better(metric, self.best, self.mode, self.threshold, self.threshold_mode)
        bad, left, reduce = count(better, self.num_bad_epochs, self.cooldown_counter, self.patience, self.cooldown)
        if reduce:
            self._reduce()
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self.best = metric if better else self.best
        self.num_bad_epochs, self.cooldown_counter = bad, left
        self._last_lr = values(self.optimizer, "lr")

    def _reduce(self) -> None:
        groups = self.optimizer.param_groups
        if len(groups) != len(self.min_lrs):
            if self.default_min_lr is None:
                raise RuntimeError(
                    f"The number of param groups in the `optimizer` ({len(groups)}) differs from when "
                    f"`ReduceLROnPlateau` was initialized ({len(self.min_lrs)}), usually due to a new param group "
                    "being added to the optimizer. Please modify the `min_lrs` field to match the length of the "
                    "`optimizer` param groups."
                )
            self.min_lrs = [self.default_min_lr] * len(groups)
        for group, min_lr in zip(groups, self.min_lrs, strict=True):
            old = number(group["lr"])
            new = reduced(old, self.factor, min_lr, self.eps)
            if new != old:
                write(group, "lr", new)

    def _check_saved(self, state: Mapping[str, Any]) -> None:
        super()._check_saved(state)
        options = {name: state.get(name, getattr(self, name)) for name in ("mode", "factor", "threshold_mode")}
        check_plateau(**options)

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.mode_worse = worst(self.mode)
