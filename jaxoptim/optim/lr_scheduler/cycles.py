"""The schedulers of rate and momentum in cycles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from jaxoptim.optim.lr_scheduler.base import LRScheduler, check_optimizer, per_group, write
from jaxoptim.optim.lr_scheduler.factors import load_state_of, state_of
from jaxoptim.optim.optimizer import Optimizer
from jaxoptim.schedules import arguments as of
from jaxoptim.schedules.cycles import amplitude, phase_ends, through, triangle


class _WithMomentum(LRScheduler):
    """A scheduler of the momentum too, or of the first beta where the optimizer has betas."""

    _continues = False
    cycle_momentum: bool
    use_beta1: bool

    def _check_momentum(self) -> None:
        defaults = self.optimizer.defaults
        if "momentum" not in defaults and "betas" not in defaults:
            raise ValueError(
                "optimizer must support momentum or beta1 with `cycle_momentum` option enabled. "
                f"{type(self.optimizer).__name__} has neither; use cycle_momentum=False."
            )
        self.use_beta1 = "betas" in defaults

    def _start_momentum(self, base_momentums: list[Any], max_momentums: list[Any]) -> None:
        for group, base, top in zip(self.optimizer.param_groups, base_momentums, max_momentums, strict=True):
            self._write_momentum(group, top)
            group["max_momentum"] = top
            group["base_momentum"] = base

    def _write_momentum(self, group: dict[str, Any], momentum: Any) -> None:
        if self.use_beta1:
            group["betas"] = (momentum, *group["betas"][1:])
        else:
            group["momentum"] = momentum

    def _write_momenta(self, momenta: Iterable[Any]) -> None:
        for group, momentum in zip(self.optimizer.param_groups, momenta, strict=False):
            self._write_momentum(group, momentum)


class CyclicLR(_WithMomentum):
    r"""Move the rate up and down between two bounds along lines, and the momentum the other way.

    .. math::
        \eta_n = \eta_{\mathrm{base}} + (\eta_{\max} - \eta_{\mathrm{base}}) \, h(n) \, s, \qquad
        \mu_n = \mu_{\max} - (\mu_{\max} - \mu_{\mathrm{base}}) \, h(n) \, s

    where :math:`h` rises from 0 to 1 and falls back, and :math:`s` is 1 ("triangular"), :math:`2^{1-c}` in cycle
    :math:`c` ("triangular2") or :math:`\gamma^n` ("exp_range").

    Args:
        optimizer: the optimizer whose groups are scheduled.
        base_lr: :math:`\eta_{\mathrm{base}}`, a number, or a list with one for each group.
        max_lr: :math:`\eta_{\max}`, a number, or a list with one for each group.
        step_size_up: the epochs up, a number > 0 (default 2000).
        step_size_down: the epochs down, a number >= 0 (default None: as many as up).
        mode: "triangular" (default), "triangular2" or "exp_range"; not looked at if ``scale_fn`` is given.
        gamma: :math:`\gamma`, a number (default 1).
        scale_fn: a function for :math:`s` (default None).
        scale_mode: whether ``scale_fn`` takes the "cycle" (default) or the "iterations".
        cycle_momentum: whether ``momentum``, or ``betas[0]``, is scheduled too (default True).
        base_momentum: :math:`\mu_{\mathrm{base}}`, a number or a list (default 0.8).
        max_momentum: :math:`\mu_{\max}`, a number or a list (default 0.9).
        last_epoch: see :class:`LRScheduler` (default -1).

    Raises:
        ``ValueError`` for an unknown mode, a list of the wrong length, or an optimizer without momentum.

    References:
        Smith, "Cyclical Learning Rates for Training Neural Networks", 2017.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.SGD([1.0], lr=0.1, momentum=0.9)
        >>> scheduler = optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.25, max_lr=0.5, step_size_up=1)
        >>> optimizer.step([0.5])
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
        (0.5, 0.8)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        base_lr: float | list[float],
        max_lr: float | list[float],
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
        gamma: float = 1.0,
        scale_fn: Callable[[float], float] | None = None,
        scale_mode: Literal["cycle", "iterations"] = "cycle",
        cycle_momentum: bool = True,
        base_momentum: float | list[float] = 0.8,
        max_momentum: float | list[float] = 0.9,
        last_epoch: int = -1,
    ) -> None:
        check_optimizer(optimizer)
        self.optimizer = optimizer
        base_lrs = per_group("base_lr", optimizer, base_lr)
        self.max_lrs = per_group("max_lr", optimizer, max_lr)
        up = float(step_size_up)
        self.total_size = up + (up if step_size_down is None else float(step_size_down))
        self.step_ratio = up / self.total_size
        self.mode = mode if scale_fn is not None else of.cyclic_mode("mode", mode)
        self.gamma = gamma
        self._scale_fn_custom = scale_fn
        self.scale_mode = scale_mode
        self._settle_scale_mode()
        self.cycle_momentum = cycle_momentum
        if cycle_momentum:
            self._check_momentum()
            self.base_momentums = per_group("base_momentum", optimizer, base_momentum)
            self.max_momentums = per_group("max_momentum", optimizer, max_momentum)
        if last_epoch == -1:
            for lr, group in zip(base_lrs, optimizer.param_groups, strict=True):
                write(group, "lr", lr)
            if cycle_momentum:
                self._start_momentum(self.base_momentums, self.max_momentums)
        super().__init__(optimizer, last_epoch)
        self.base_lrs = base_lrs
        if last_epoch >= 0:  # the rate that was just made is of the groups' initial_lr
            self._update_lr(self.last_epoch)

    def _settle_scale_mode(self) -> None:
        if self._scale_fn_custom is None:
            self.scale_mode = "iterations" if self.mode == "exp_range" else "cycle"

    def get_lr(self) -> list[Any]:
        self._warn_outside_step()
        cycle, height = triangle(self.last_epoch, self.total_size, self.step_ratio)
        x = cycle if self.scale_mode == "cycle" else self.last_epoch
        rates = [
            base + (top - base) * height * self.scale_fn(x)
            for base, top in zip(self.base_lrs, self.max_lrs, strict=True)
        ]
        if self.cycle_momentum:
            self._write_momenta(
                top - (top - base) * height * self.scale_fn(x)
                for base, top in zip(self.base_momentums, self.max_momentums, strict=True)
            )
        return rates

    def scale_fn(self, x: Any) -> Any:
        """Return the height of the maximum in a cycle, or at an epoch, as ``scale_mode`` says."""
        if self._scale_fn_custom is not None:
            return self._scale_fn_custom(x)
        return amplitude(x, self.mode, self.gamma)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        function = state.pop("_scale_fn_custom")
        state["_scale_fn_custom"] = None if function is None else state_of(function)
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        load_state_of(self._scale_fn_custom, state.pop("_scale_fn_custom"))
        super()._restore(state)
        self._settle_scale_mode()


class OneCycleLR(_WithMomentum):
    r"""Move the rate up to a maximum and down to nearly nothing, and the momentum the other way.

    From :math:`\eta_{\max} / d` up to :math:`\eta_{\max}`, then down to :math:`\eta_{\max} / (d f)`; in three
    phases, down to where it began in as many steps as up, and then to the least. In a phase from :math:`a` to
    :math:`b`, at the fraction :math:`t` of its steps,

    .. math::
        \eta = b + \tfrac12 (a - b) (1 + \cos \pi t) \quad \text{or} \quad \eta = a + (b - a) t .

    The least rate is reached after ``total_steps - 1`` steps of the scheduler, and kept in the one step more that
    a loop makes which steps it after every batch (where torch's rate rises again).

    Args:
        optimizer: the optimizer whose groups are scheduled, to be stepped with every batch.
        max_lr: :math:`\eta_{\max}`, a number, or a list with one for each group.
        total_steps: the length of the cycle, an ``int`` >= 1 (default None: ``epochs * steps_per_epoch``).
        epochs: an ``int`` >= 1 (default None).
        steps_per_epoch: an ``int`` >= 1 (default None).
        pct_start: the part of the steps that go up, a ``float`` in [0, 1] (default 0.3).
        anneal_strategy: "cos" (default) or "linear".
        cycle_momentum: whether ``momentum``, or ``betas[0]``, is scheduled too (default True).
        base_momentum: the least momentum, a number or a list (default 0.85).
        max_momentum: the momentum at the start, a number or a list (default 0.95).
        div_factor: :math:`d`, a number (default 25).
        final_div_factor: :math:`f`, a number (default 10,000).
        three_phase: come down in two phases (default False).
        last_epoch: see :class:`LRScheduler` (default -1).

    Raises:
        ``ValueError`` for an argument out of range, a missing length, a list of the wrong length, an optimizer
        without momentum, and for more than ``total_steps`` steps.

    References:
        Smith, Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2019.

    Examples:
        >>> from jaxoptim import optim
        >>> optimizer = optim.Adam([1.0])
        >>> scheduler = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        >>> for _ in range(2):
        ...     optimizer.step([0.5])
        ...     scheduler.step()
        >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]
        (0.1, (0.85, 0.999))
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | list[float],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | list[float] = 0.85,
        max_momentum: float | list[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self.total_steps = of.total_steps(total_steps, epochs, steps_per_epoch)
        ends = phase_ends(self.total_steps, of.fraction("pct_start", pct_start), three_phase)
        rates = ["initial_lr", "max_lr", "initial_lr", "min_lr"] if three_phase else ["initial_lr", "max_lr", "min_lr"]
        momenta = ["max_momentum", "base_momentum", "max_momentum", "max_momentum"]
        self._schedule_phases = [
            {
                "end_step": end,
                "start_lr": rates[i],
                "end_lr": rates[i + 1],
                "start_momentum": momenta[i],
                "end_momentum": momenta[i + 1],
            }
            for i, end in enumerate(ends)
        ]
        self._anneal_func_type = of.strategy("anneal_strategy", anneal_strategy)
        max_lrs = per_group("max_lr", optimizer, max_lr)
        self.cycle_momentum = cycle_momentum
        if cycle_momentum:
            self._check_momentum()
            max_momentums = per_group("max_momentum", optimizer, max_momentum)
            base_momentums = per_group("base_momentum", optimizer, base_momentum)
        if last_epoch == -1:
            for top, group in zip(max_lrs, optimizer.param_groups, strict=True):
                group["initial_lr"] = top / div_factor
                group["max_lr"] = top
                group["min_lr"] = group["initial_lr"] / final_div_factor
            if cycle_momentum:
                self._start_momentum(base_momentums, max_momentums)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        self._warn_outside_step()
        if self.last_epoch > self.total_steps:
            raise ValueError(
                f"Tried to step {self.last_epoch} times. The specified number of total steps is {self.total_steps}"
            )
        for index, group in enumerate(self.optimizer.param_groups):
            if "max_lr" not in group:
                raise KeyError(
                    f"param_groups[{index}] has no 'max_lr': it was added after the scheduler was made. Make a new "
                    "scheduler."
                )
        if self.cycle_momentum:
            self._write_momenta([self._through(group, "momentum") for group in self.optimizer.param_groups])
        return [self._through(group, "lr") for group in self.optimizer.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; see :meth:`LRScheduler.load_state_dict`. Those of torch 2.0 and before will do."""
        if isinstance(state_dict, Mapping) and "anneal_func" in state_dict:  # the function, now its name
            others = {key: value for key, value in state_dict.items() if key != "anneal_func"}
            named = "cos" if "cos" in state_dict["anneal_func"].__name__ else "linear"
            state_dict = {"_anneal_func_type": named} | others
        super().load_state_dict(state_dict)

    def _through(self, group: dict[str, Any], what: str) -> Any:
        """Return the rate or momentum of a group."""
        phases = [
            (phase["end_step"], group[phase[f"start_{what}"]], group[phase[f"end_{what}"]])
            for phase in self._schedule_phases
        ]
        return through(self.last_epoch, phases, self._anneal_func_type)
