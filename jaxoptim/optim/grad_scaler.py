"""torch's ``GradScaler``, whose factor ``minimize`` puts on the loss within its one program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core.loss import all_finite
from jaxoptim.core.loss_scale import LossScale, ScaleState


class GradScaler:
    """The dynamic factor on the loss of a run in float16, as ``torch.amp.GradScaler``.

    Give it to :meth:`Optimizer.minimize`, which scales the loss, divides the gradient by the factor, clips it, skips a
    step whose gradient is not finite, and updates the factor. ``opt.last.skipped`` says whether a step was skipped.
    In a loop of your own, call :meth:`scale`, :meth:`step` and :meth:`update`, as in torch.

    Args:
        init_scale: see :class:`jaxoptim.LossScale`, as the others.
        growth_factor: see there.
        backoff_factor: see there.
        growth_interval: see there.

    Attributes:
        loss_scale: these numbers.
        state: the factor, and the steps since it last changed, on the device.

    Raises:
        ``ValueError`` for a number out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> opt, scaler = optim.SGD(jnp.ones(2, jnp.float16), lr=0.1), optim.GradScaler(init_scale=2.0**30)
        >>> def loss(params):
        ...     return jnp.sum(params.astype(jnp.float32) * 1e-3)
        >>> for _ in range(6):
        ...     value = opt.minimize(loss, loss_scale=scaler)
        >>> scaler.get_scale(), int(opt.last.num_skipped)
        (33554432.0, 5)
    """

    def __init__(
        self,
        init_scale: float = LossScale.init_scale,
        growth_factor: float = LossScale.growth_factor,
        backoff_factor: float = LossScale.backoff_factor,
        growth_interval: int = LossScale.growth_interval,
    ) -> None:
        self.loss_scale = LossScale(init_scale, growth_factor, backoff_factor, growth_interval)
        self.state: ScaleState = self.loss_scale.init()
        self._is_finite: bool | None = None  # the gradients of the last step, until the update

    def get_scale(self) -> float:
        """Return the factor, read from the device.

        Examples:
            See :class:`GradScaler`.
        """
        return float(self.state.scale)

    def scale(self, loss: Any) -> jax.Array:
        """Return the loss times the factor.

        Args:
            loss: a scalar; of a compiled function the factor is an argument: ``scaler.state.scale``.

        Examples:
            >>> from jaxoptim import optim
            >>> float(optim.GradScaler(init_scale=8.0).scale(2.0))
            16.0
        """
        return self.loss_scale.scaled(jnp.asarray(loss), self.state)

    def step(self, optimizer: Any, grads: Any) -> Any:
        """Make a step along gradients of the scaled loss, if all are finite; the call waits for them.

        Args:
            optimizer: a torch-style optimizer.
            grads: a tree like its parameters.

        Returns:
            What its ``step`` returns, None for a step that is left out.

        Examples:
            >>> from jaxoptim import optim
            >>> opt, scaler = optim.SGD({"w": 1.0}, lr=0.5), optim.GradScaler(init_scale=8.0)
            >>> for grad in (8.0, float("inf")):
            ...     scaler.step(opt, {"w": grad})
            ...     scaler.update()
            >>> float(opt.params["w"]), scaler.get_scale()
            (0.5, 4.0)
        """
        grads = jax.tree.map(jnp.asarray, grads)
        self._is_finite = bool(all_finite(grads))
        return optimizer.step(self.loss_scale.unscaled(grads, self.state)) if self._is_finite else None

    def update(self) -> None:
        """Let the factor follow the last :meth:`step`.

        Raises:
            ``RuntimeError`` where there was none since the last update.

        Examples:
            See :meth:`step`.
        """
        if self._is_finite is None:
            raise RuntimeError("There was no step(optimizer, grads) since the last update. minimize updates by itself.")
        self.state, self._is_finite = self.loss_scale.updated(self.state, self._is_finite), None

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's layout.

        Examples:
            >>> from jaxoptim import optim
            >>> optim.GradScaler(init_scale=8.0).state_dict()["scale"]
            8.0
        """
        numbers = self.loss_scale
        return {
            "scale": self.get_scale(),
            "growth_factor": numbers.growth_factor,
            "backoff_factor": numbers.backoff_factor,
            "growth_interval": numbers.growth_interval,
            "_growth_tracker": int(self.state.growth_tracker),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the result of :meth:`state_dict`, of this class or of torch's.

        Args:
            state_dict: in torch's layout.

        Raises:
            ``KeyError`` for a missing entry, ``ValueError`` for a number out of range. Nothing is changed then.

        Examples:
            >>> from jaxoptim import optim
            >>> old, new = optim.GradScaler(init_scale=8.0), optim.GradScaler()
            >>> new.load_state_dict(old.state_dict())
            >>> new.get_scale()
            8.0
        """
        names = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
        if missing := [name for name in names if name not in state_dict]:
            raise KeyError(f"loaded state dict of a GradScaler has no {missing[0]!r}. It has {', '.join(state_dict)}.")
        scale, growth, backoff, interval, tracker = (state_dict[name] for name in names)
        numbers = LossScale(self.loss_scale.init_scale, growth, backoff, interval)
        self.loss_scale = numbers
        self.state = ScaleState(jnp.asarray(float(scale), jnp.float32), jnp.asarray(int(tracker), jnp.int32))
