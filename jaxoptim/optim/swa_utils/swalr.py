"""The scheduler that leads to the rate of weight averaging."""

from __future__ import annotations

from typing import Any, Literal

from jaxoptim.optim.lr_scheduler.base import LRScheduler, check_optimizer, per_group
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.schedules import arguments as of
from jaxoptim.schedules.annealing import anneal_fraction, weight


class SWALR(LRScheduler):
    r"""Move the rate from the current one to that of weight averaging, and keep it there.

    .. math::
        \eta_n = \alpha \, \eta_{\mathrm{swa}} + (1 - \alpha) \, \eta_0, \qquad
        \alpha = \tfrac12 \left( 1 - \cos \pi t \right) \text{ or } t, \qquad t = \min(1, n / E)

    Args:
        optimizer: the optimizer whose groups are scheduled.
        swa_lr: :math:`\eta_{\mathrm{swa}}`, a number, or a list with one for each group.
        anneal_epochs: :math:`E`, an ``int`` >= 0 (default 10).
        anneal_strategy: "cos" (default) or "linear".
        last_epoch: see :class:`~jaxoptim.optim.lr_scheduler.LRScheduler` (default -1).

    Raises:
        ``TypeError`` for anything but an optimizer, ``ValueError`` for an argument out of range.

    References:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.5)
        >>> scheduler = optim.swa_utils.SWALR(optimizer, swa_lr=0.25, anneal_epochs=2, anneal_strategy="linear")
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.375
    """

    def __init__(
        self,
        optimizer: Optimizer,
        swa_lr: float | list[float],
        anneal_epochs: int = 10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        last_epoch: int = -1,
    ) -> None:
        check_optimizer(optimizer)
        swa_lrs = per_group("swa_lr", optimizer, swa_lr)
        self._anneal_strategy = of.strategy("anneal_strategy", anneal_strategy)
        self.anneal_epochs = of.anneal_epochs("anneal_epochs", anneal_epochs)
        for rate, group in zip(swa_lrs, optimizer.param_groups, strict=True):
            group["swa_lr"] = rate
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """Return the rate of each group, given the one before."""
        self._warn_outside_step()
        step = self._step_count - 1
        before, now = self._alpha(step - 1), self._alpha(step)
        return [
            group["swa_lr"] * now + _start_of(group["lr"], group["swa_lr"], before) * (1 - now)
            for group in self.optimizer.param_groups
        ]

    def _alpha(self, step: int) -> float:
        """Return the weight of the final rate."""
        return weight(max(0, anneal_fraction(step, self.anneal_epochs)), self._anneal_strategy)


def _start_of(lr: Any, swa_lr: Any, alpha: float) -> Any:
    """Return the rate from which ``lr`` has come a part ``alpha`` of the way."""
    return swa_lr if alpha == 1 else (lr - alpha * swa_lr) / (1 - alpha)
