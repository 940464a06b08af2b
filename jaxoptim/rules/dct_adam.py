"""Pyro's Adam in the time and frequency domains."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jaxoptim.core import Arrays, DecayRate, NonNegative, OpenDecayRate, Rule, Slots, factory, full_like, rule, sqrt
from jaxoptim.core.numerics import with_replicated
from jaxoptim.rules._terms import decayed, zeros


@rule
class DCTAdam(Rule):
    r"""DCTAdam: ClippedAdam that also moves along the frequencies of a time axis.

    .. math::
        g_t &\leftarrow \mathrm{clip}(g_t, -c, c), \qquad \tilde g_t = [\,g_t,\ \mathrm{DCT}(g_t)\,] \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1)\,\tilde g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1-\beta_2)\,\tilde g_t^2, \qquad
        [\,s,\ \tilde s\,] = \frac{m_t}{\sqrt{v_t} + \epsilon} \\
        \theta_t &= \theta_{t-1} - \gamma\,d^t\,\frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
        \bigl(s + \mathrm{DCT}^{-1}(\tilde s)\bigr)

    The transform is the orthonormal DCT-II along ``dct_dim``, zero-padded to the next length whose only
    prime factors are 2, 3 and 5. Without ``dct_dim`` this is :class:`ClippedAdam`.

    Args:
        lr: learning rate :math:`\gamma \ge 0` (default 1e-3).
        betas: decay rates :math:`\beta_1, \beta_2` in [0, 1) (default 0.9, 0.999).
        eps: :math:`\epsilon \ge 0` (default 1e-8), added before the bias correction.
        clip_norm: :math:`c \ge 0` (default 10), a bound on each number.
        lrd: decay :math:`d \ge 0` of the rate (default 1), in force from the first step on. Here :math:`t` counts
            the updates of the tree, as Pyro decays the rate of a group also where a gradient is missing.
        subsample_aware: count steps and average gradients for each number by itself, and leave numbers
            outside the subsample alone (default False).
        dct_dim: the time axis (default None: no transform).
        subsample: the numbers that the gradient covers: a dict of negative axis to indices along it, or a
            boolean mask that broadcasts to the parameter; None is all (default). It acts only with
            ``subsample_aware``. ``update`` of the transformation takes it as a keyword, for one step.

    Slots:
        ``exp_avg``, ``exp_avg_sq``, of the parameter's shape, longer along ``dct_dim``; with
        ``subsample_aware``, ``step``, the count of each number.

    Raises:
        ``ValueError`` for a number out of range, an axis that a parameter lacks, or a subsample that varies
        along ``dct_dim`` (Pyro fails on any subsample with a transform); ``RuntimeError`` for complex
        parameters.

    References:
        Kingma, Ba, Adam: a method for stochastic optimization, ICLR 2015; ``pyro.optim.DCTAdam``.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim, optax
        >>> tx, params = jaxoptim.dct_adam(lr=0.1, dct_dim=-1), jnp.ones(4)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> [round(x, 3) for x in optax.apply_updates(params, updates).tolist()]
        [0.85, 0.85, 0.85, 0.85]
    """

    lr: NonNegative = 1e-3
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    clip_norm: NonNegative = 10.0
    lrd: OpenDecayRate = 1.0
    subsample_aware: bool = False
    _: KW_ONLY
    dct_dim: int | None = None
    subsample: Arrays = None

    complex: ClassVar[bool] = False
    per_update: ClassVar[tuple[str, ...]] = ("subsample",)

    @property
    def elementwise(self) -> bool:
        return self.dct_dim is None and not self.subsample_aware

    def check_param(self, name: str, param: Any) -> None:
        ndim = len(param.shape)
        if self.dct_dim is not None and not -ndim <= self.dct_dim < ndim:
            raise ValueError(
                f"DCTAdam has dct_dim={self.dct_dim}, but {name!r} of shape {tuple(param.shape)} has no such "
                "axis. Give this parameter to another optimizer, with optax.partition."
            )
        axes = self.subsample if self.subsample_aware and isinstance(self.subsample, dict) else {}
        if wrong := [axis for axis in axes if not -ndim <= axis < 0]:
            raise ValueError(
                f"DCTAdam has a subsample along axis {wrong[0]}, but {name!r} has shape {tuple(param.shape)}. "
                f"Axes are counted from the end: {list(range(-ndim, 0))}."
            )

    def init(self, param: jax.Array) -> Slots:
        if self.dct_dim is None:
            slots = zeros(param, "exp_avg", "exp_avg_sq")
        else:
            slots = zeros(_with_frequencies(param, self.dct_dim), "exp_avg", "exp_avg_sq")
        if self.subsample_aware:
            slots["step"] = full_like(self._without_time(param))
        return slots

    def at_update(self, number: Any) -> Self:
        return decayed(self, number)

    def update(self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array) -> tuple[jax.Array, Slots]:
        beta1, beta2 = self.betas
        size = self.lr
        signal = jnp.clip(grad, -self.clip_norm, self.clip_norm)
        if self.dct_dim is not None:
            signal = _with_frequencies(signal, self.dct_dim)
        new = {
            "exp_avg": beta1.ema(slots["exp_avg"], signal),
            "exp_avg_sq": beta2.ema(slots["exp_avg_sq"], signal * signal),
        }
        if self.subsample_aware:
            sampled = self._sampled(self._without_time(grad))
            new["step"] = slots["step"] + 1
            new = {key: jnp.where(sampled, value, slots[key]) for key, value in new.items()}
            step, size = jnp.maximum(new["step"], 1), jnp.where(sampled, size, 0.0)
        direction = new["exp_avg"] / (sqrt(new["exp_avg_sq"]) + self.eps)
        if self.dct_dim is not None:
            direction = _without_frequencies(direction, self.dct_dim, grad.shape[self.dct_dim])
        size = size * sqrt(beta2.bias_correction(step)) / beta1.bias_correction(step)
        return -size * direction, new

    def _without_time(self, x: jax.Array) -> jax.Array:
        """Reduce a slot to one number for each place along the time axis: what the transform counts together."""
        return x if self.dct_dim is None else jax.lax.slice_in_dim(x, 0, 1, axis=self.dct_dim)

    def _sampled(self, like: jax.Array) -> jax.Array:
        """Return the mask of the subsample, of the shape of ``like``."""
        if self.subsample is None:
            return jnp.ones_like(like, bool)
        if not isinstance(self.subsample, dict):
            mask = jnp.asarray(self.subsample, bool)
            try:
                return jnp.ones_like(like, bool) & jnp.broadcast_to(mask, like.shape)
            except ValueError:
                raise ValueError(
                    f"DCTAdam has a subsample mask of shape {mask.shape}, which does not broadcast to {like.shape}."
                    + ("" if self.dct_dim is None else " It may not vary along dct_dim.")
                ) from None
        if self.dct_dim is not None and self.dct_dim % like.ndim - like.ndim in self.subsample:
            raise ValueError(
                f"DCTAdam has a subsample along dct_dim={self.dct_dim}, but frequencies need the whole time axis. "
                "Subsample another axis."
            )
        mask = jnp.ones_like(like, bool)
        for axis, indices in self.subsample.items():
            along = jnp.zeros(like.shape[axis], bool).at[jnp.asarray(indices)].set(True)
            mask &= along.reshape((-1,) + (1,) * (-1 - axis))
        return mask


def _with_frequencies(x: jax.Array, axis: int) -> jax.Array:
    """Concatenate a signal with the cosine transform of the zero-padded signal."""

    def transformed(x: jax.Array) -> jax.Array:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, _next_fast_len(x.shape[axis]) - x.shape[axis])
        frequencies = jax.scipy.fft.dct(jnp.pad(x, padding), norm="ortho", axis=axis)
        return jnp.concatenate([x, frequencies], axis)

    return with_replicated(transformed, x)


def _without_frequencies(x: jax.Array, axis: int, duration: int) -> jax.Array:
    """Transform the frequency half back, and add it to the half in the time domain."""

    def transformed(x: jax.Array) -> jax.Array:
        signal, frequencies = jnp.split(x, [duration], axis)
        back = jax.scipy.fft.idct(frequencies, norm="ortho", axis=axis)
        return signal + jax.lax.slice_in_dim(back, 0, duration, axis=axis)

    return with_replicated(transformed, x)


def _next_fast_len(size: int) -> int:
    """Return the smallest number >= ``size`` without prime factors above 5."""
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest > 1 and rest % prime == 0:
                rest //= prime
        if rest <= 1:
            return size
        size += 1


dct_adam = factory(DCTAdam, "dct_adam")
