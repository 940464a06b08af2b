"""The schedulers that follow a cosine."""

from __future__ import annotations

import math
from typing import Any

from jaxoptim.optim.lr_scheduler.base import LRScheduler, values
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.schedules import arguments as of
from jaxoptim.schedules.annealing import cosine
from jaxoptim.schedules.arithmetic import one_minus_cos, one_plus_cos


class CosineAnnealingLR(LRScheduler):
    r"""Move the rate down to a minimum and up again, along a cosine.

    .. math::
        \eta_n = \eta_{\min} + \tfrac12 (\eta_0 - \eta_{\min}) \left( 1 + \cos \frac{\pi n}{T} \right)

    which, as in torch, is computed from the rate before, so that other changes of the rate are kept.

    Args:
        optimizer: the optimizer whose groups are scheduled.
        T_max: :math:`T`, the epochs to the minimum, an ``int`` other than 0.
        eta_min: :math:`\eta_{\min}`, a number (default 0).
        last_epoch: see :class:`LRScheduler` (default -1).

    Raises:
        ``ZeroDivisionError`` for ``T_max`` of 0.

    References:
        Loshchilov, Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.5)
        >>> scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.25
    """

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1) -> None:
        self.T_max = T_max
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        self._warn_outside_step()
        rates = values(self.optimizer, "lr")
        if self._is_initial:
            return rates
        if (self.last_epoch - 1 - self.T_max) % (2 * self.T_max) == 0:  # after a minimum, where the ratio is 0 / 0
            rise = one_minus_cos(1, self.T_max)
            return [lr + (base - self.eta_min) * rise / 2 for base, lr in zip(self.base_lrs, rates, strict=False)]
        ratio = one_plus_cos(self.last_epoch, self.T_max) / one_plus_cos(self.last_epoch - 1, self.T_max)
        return [ratio * (lr - self.eta_min) + self.eta_min for lr in rates]

    def _get_closed_form_lr(self) -> list[Any]:
        return [cosine(self.last_epoch, lr, self.T_max, self.eta_min) for lr in self.base_lrs]


class CosineAnnealingWarmRestarts(LRScheduler):
    r"""Move the rate down to a minimum along a cosine, over and over.

    .. math::
        \eta_n = \eta_{\min} + \tfrac12 (\eta_0 - \eta_{\min}) \left( 1 + \cos \frac{\pi t}{T_i} \right),
        \qquad T_i = T_0 m^i

    where :math:`t` is the number of epochs since the last restart, and :math:`i` the number of restarts.

    Args:
        optimizer: the optimizer whose groups are scheduled.
        T_0: the epochs to the first restart, an ``int`` >= 1.
        T_mult: :math:`m`, the growth of the periods, an ``int`` >= 1 (default 1).
        eta_min: :math:`\eta_{\min}`, a number (default 0).
        last_epoch: see :class:`LRScheduler` (default -1).

    Raises:
        ``ValueError`` for an argument out of range.

    References:
        Loshchilov, Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.5)
        >>> scheduler = optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2)
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.25
    """

    def __init__(
        self, optimizer: Optimizer, T_0: int, T_mult: int = 1, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        self.T_0 = of.first_period("T_0", T_0)
        self.T_i = T_0
        self.T_mult = of.growth("T_mult", T_mult)
        self.eta_min = of.lowest_rate("eta_min", eta_min)
        self.T_cur: Any = last_epoch
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        self._warn_outside_step()
        return [cosine(self.T_cur, lr, self.T_i, self.eta_min) for lr in self.base_lrs]

    def step(self, epoch: Any = None) -> None:
        """Move to the next epoch, or to any other.

        Args:
            epoch: a number >= 0, not necessarily whole (default None: the next).
        """
        self._refuse_tracing()
        with self._all_or_nothing():
            if epoch is None and self.last_epoch >= 0:
                epoch = self.last_epoch + 1
                self.T_cur = self.T_cur + 1
                if self.T_cur >= self.T_i:
                    self.T_cur = self.T_cur % self.T_i
                    self.T_i = self.T_i * self.T_mult
            else:
                self._jump(0 if epoch is None else epoch)
            self.last_epoch = math.floor(epoch or 0)
            self._compute(self.get_lr)

    def _begin(self) -> None:
        self._jump(0)
        self._update_lr(0)

    def _jump(self, epoch: Any) -> None:
        """Find the period of an epoch."""
        if epoch < 0:
            raise ValueError(f"Expected non-negative epoch, but got {epoch}")
        if epoch < self.T_0:
            self.T_cur, self.T_i = epoch, self.T_0
        elif self.T_mult == 1:
            self.T_cur = epoch % self.T_0
        else:
            n = int(math.log(epoch / self.T_0 * (self.T_mult - 1) + 1, self.T_mult))
            self.T_cur = epoch - self.T_0 * (self.T_mult**n - 1) / (self.T_mult - 1)
            self.T_i = self.T_0 * self.T_mult**n
