"""The schedulers that multiply the rate by a factor of the epoch."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxoptim import schedules
from jaxoptim.optim.lr_scheduler.base import LRScheduler, values
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.schedules import arguments as of

Lambda = Callable[[int], float]


class _WithLambdas(LRScheduler):
    """A scheduler of user's functions; it saves the state of callable objects only, as torch does."""

    def __init__(self, optimizer: Optimizer, lr_lambda: Lambda | Sequence[Lambda], last_epoch: int = -1) -> None:
        groups = len(optimizer.param_groups)
        lambdas: list[Any] = list(lr_lambda) if isinstance(lr_lambda, list | tuple) else [lr_lambda] * groups
        if len(lambdas) != groups:
            raise ValueError(f"Expected {groups} lr_lambdas, but got {len(lambdas)}")
        for function in lambdas:
            of.function("lr_lambda", function)
        self.optimizer = optimizer
        self.lr_lambdas: list[Lambda] = lambdas
        super().__init__(optimizer, last_epoch)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        del state["lr_lambdas"]
        state["lr_lambdas"] = [state_of(function) for function in self.lr_lambdas]
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        for function, saved in zip(self.lr_lambdas, state.pop("lr_lambdas"), strict=False):
            load_state_of(function, saved)
        super()._restore(state)


def state_of(function: Any) -> dict[str, Any] | None:
    """Return the attributes of a callable object; None for a function, which has no state."""
    return None if isinstance(function, types.FunctionType) else dict(vars(function))


def load_state_of(function: Any, state: dict[str, Any] | None) -> None:
    """Give a callable object the attributes that were saved."""
    if state is not None:
        vars(function).update(state)


class LambdaLR(_WithLambdas):
    r"""Set the rate to the initial one times a function of the epoch.

    .. math::
        \eta_n = \eta_0 \, \lambda(n)

    Args:
        optimizer: the optimizer whose groups are scheduled.
        lr_lambda: :math:`\lambda`, a function of the epoch, or a list with one for each group.
        last_epoch: see :class:`LRScheduler` (default -1).

    Raises:
        ``ValueError`` for another number of functions than groups, ``TypeError`` for anything but a function.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.1)
        >>> scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """

    _continues = False

    def get_lr(self) -> list[Any]:
        self._warn_outside_step()
        formula = schedules.lambda_lr.formula
        return [formula(self.last_epoch, lr, f) for f, lr in zip(self.lr_lambdas, self.base_lrs, strict=True)]


class MultiplicativeLR(_WithLambdas):
    r"""Multiply the rate by a function of the epoch, at every epoch but the first.

    .. math::
        \eta_n = \eta_{n-1} \, \lambda(n)

    Args:
        optimizer: the optimizer whose groups are scheduled.
        lr_lambda: :math:`\lambda`, a function of the epoch, or a list with one for each group.
        last_epoch: see :class:`LRScheduler` (default -1).

    Raises:
        ``ValueError`` for another number of functions than groups, ``TypeError`` for anything but a function.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.1)
        >>> scheduler = optim.lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.5)
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """

    def get_lr(self) -> list[Any]:
        self._warn_outside_step()
        rates = values(self.optimizer, "lr")
        if self._is_initial:
            return rates
        return [lr * function(self.last_epoch) for function, lr in zip(self.lr_lambdas, rates, strict=False)]


class _Recursive(LRScheduler):
    """A scheduler that computes the next rate of a group from the current one, the same way for every group."""

    def get_lr(self) -> list[Any]:
        self._warn_outside_step()
        return [self._next(lr) for lr in values(self.optimizer, "lr")]

    def _get_closed_form_lr(self) -> list[Any]:
        return [self._at(self.last_epoch, lr) for lr in self.base_lrs]

    def _next(self, lr: Any) -> Any:
        """Return the rate at ``last_epoch`` that follows ``lr``."""
        raise NotImplementedError

    def _at(self, epoch: int, lr: Any) -> Any:
        """Return the rate at an epoch, if it began with ``lr``."""
        raise NotImplementedError


class StepLR(_Recursive):
    r"""Multiply the rate by a factor every ``step_size`` epochs.

    .. math::
        \eta_n = \eta_0 \, \gamma^{\lfloor n / s \rfloor}

    Args:
        optimizer: the optimizer whose groups are scheduled.
        step_size: :math:`s`, an ``int`` other than 0.
        gamma: :math:`\gamma`, a number (default 0.1).
        last_epoch: see :class:`LRScheduler` (default -1).

    Raises:
        ``ZeroDivisionError`` for a step size of 0.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.5)
        >>> scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.25
    """

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1) -> None:
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _next(self, lr: Any) -> Any:
        return lr if self.last_epoch == 0 or self.last_epoch % self.step_size != 0 else lr * self.gamma

    def _at(self, epoch: int, lr: Any) -> Any:
        return schedules.step_lr.formula(epoch, lr, self.step_size, self.gamma)


class MultiStepLR(_Recursive):
    r"""Multiply the rate by a factor at each milestone.

    .. math::
        \eta_n = \eta_0 \, \gamma^{|\{m \,:\, m \le n\}|}

    Args:
        optimizer: the optimizer whose groups are scheduled.
        milestones: :math:`m`, epochs; one that stands twice counts twice.
        gamma: :math:`\gamma`, a number (default 0.1).
        last_epoch: see :class:`LRScheduler` (default -1).

    Raises:
        Those of :class:`LRScheduler`.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.5)
        >>> scheduler = optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 5], gamma=0.5)
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.25
    """

    def __init__(
        self, optimizer: Optimizer, milestones: Iterable[int], gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        self.milestones = Counter(milestones)
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _next(self, lr: Any) -> Any:
        if self.last_epoch not in self.milestones:
            return lr
        return lr * self.gamma ** self.milestones[self.last_epoch]

    def _at(self, epoch: int, lr: Any) -> Any:
        return schedules.multi_step_lr.formula(epoch, lr, tuple(self.milestones.elements()), self.gamma)


class ConstantLR(_Recursive):
    r"""Multiply the rate by a factor during the first epochs.

    .. math::
        \eta_n = \begin{cases} \eta_0 f & n < T \\ \eta_0 & n \ge T \end{cases}

    Args:
        optimizer: the optimizer whose groups are scheduled.
        factor: :math:`f`, in [0, 1] (default 1/3). After a factor of 0, which torch cannot take back, the rate
            is the initial one.
        total_iters: :math:`T`, an ``int`` (default 5).
        last_epoch: see :class:`LRScheduler` (default -1).

    Raises:
        ``ValueError`` for a factor out of range.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.5)
        >>> scheduler = optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=1)
        >>> scheduler.get_last_lr()
        [0.25]
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.5]
    """

    def __init__(
        self, optimizer: Optimizer, factor: float = 1.0 / 3, total_iters: int = 5, last_epoch: int = -1
    ) -> None:
        self.factor = of.constant_factor("factor", factor)
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        self._warn_outside_step()
        if self.factor == 0 and self.last_epoch == self.total_iters != 0:
            return list(self.base_lrs)
        return [self._next(lr) for lr in values(self.optimizer, "lr")]

    def _next(self, lr: Any) -> Any:
        if self.last_epoch == 0:
            return lr * self.factor
        return lr * (1.0 / self.factor) if self.last_epoch == self.total_iters else lr

    def _at(self, epoch: int, lr: Any) -> Any:
        return schedules.constant_lr.formula(epoch, lr, self.factor, self.total_iters)


class LinearLR(_Recursive):
    r"""Multiply the rate by a factor that goes from one number to another in equal steps.

    .. math::
        \eta_n = \eta_0 \left( f_0 + (f_1 - f_0) \frac{\min(n, T)}{T} \right)

    Args:
        optimizer: the optimizer whose groups are scheduled.
        start_factor: :math:`f_0`, in (0, 1] (default 1/3).
        end_factor: :math:`f_1`, in [0, 1] (default 1).
        total_iters: :math:`T`, an ``int`` (default 5).
        last_epoch: see :class:`LRScheduler` (default -1).

    Raises:
        ``ValueError`` for a factor out of range.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.5)
        >>> scheduler = optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.375
    """

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        self.start_factor = of.start_factor("start_factor", start_factor)
        self.end_factor = of.end_factor("end_factor", end_factor)
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def _next(self, lr: Any) -> Any:
        if self.last_epoch == 0:
            return lr * self.start_factor
        if self._is_initial or self.last_epoch > self.total_iters:
            return lr
        change = self.end_factor - self.start_factor
        return lr * (1.0 + change / (self.total_iters * self.start_factor + (self.last_epoch - 1) * change))

    def _at(self, epoch: int, lr: Any) -> Any:
        return schedules.linear_lr.formula(epoch, lr, self.start_factor, self.end_factor, self.total_iters)


class ExponentialLR(_Recursive):
    r"""Multiply the rate by a factor at every epoch.

    .. math::
        \eta_n = \eta_0 \, \gamma^n

    Args:
        optimizer: the optimizer whose groups are scheduled.
        gamma: :math:`\gamma`, a number.
        last_epoch: see :class:`LRScheduler` (default -1).

    Raises:
        Those of :class:`LRScheduler`.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.5)
        >>> scheduler = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.25
    """

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _next(self, lr: Any) -> Any:
        return lr if self._is_initial else lr * self.gamma

    def _at(self, epoch: int, lr: Any) -> Any:
        return schedules.exponential_lr.formula(epoch, lr, self.gamma)


class PolynomialLR(_Recursive):
    r"""Multiply the initial rate by a power of the part of the epochs that is left.

    .. math::
        \eta_n = \eta_0 \left( 1 - \frac{\min(n, T)}{T} \right)^p

    Args:
        optimizer: the optimizer whose groups are scheduled.
        total_iters: :math:`T`, an ``int`` (default 5).
        power: :math:`p`, a number (default 1).
        last_epoch: see :class:`LRScheduler` (default -1).

    Raises:
        Those of :class:`LRScheduler`.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.5)
        >>> scheduler = optim.lr_scheduler.PolynomialLR(optimizer, total_iters=2)
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.25
    """

    def __init__(self, optimizer: Optimizer, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1) -> None:
        self.total_iters = total_iters
        self.power = power
        super().__init__(optimizer, last_epoch)

    def _next(self, lr: Any) -> Any:
        if self._is_initial or self.last_epoch > self.total_iters:
            return lr
        left, before = 1.0 - self.last_epoch / self.total_iters, 1.0 - (self.last_epoch - 1) / self.total_iters
        return lr * (left / before) ** self.power

    def _at(self, epoch: int, lr: Any) -> Any:
        return schedules.polynomial_lr.formula(epoch, lr, self.total_iters, self.power)
