"""Schedules that multiply the base rate by a factor of the step."""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.schedules import arguments as of
from jaxoptim.schedules.arithmetic import divide, is_array, is_single, minimum, power
from jaxoptim.schedules.schedule import schedule


@schedule()
def lambda_lr(step: Any, lr: of.Rate, lr_lambda: of.Function) -> Any:
    r"""Multiply the base rate by a function of the step: ``LambdaLR``.

    .. math::
        \eta_n = \eta_0 \, \lambda(n)

    Args:
        lr: :math:`\eta_0`, a number >= 0; may be traced.
        lr_lambda: :math:`\lambda`, a function of the step that JAX can trace.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Raises:
        ``TypeError`` for what is not a number or not a function, ``ValueError`` for a negative rate.

    Examples:
        >>> from jaxoptim import schedules
        >>> schedule = schedules.lambda_lr(0.1, lambda step: 0.5**step)
        >>> [round(float(schedule(n)), 6) for n in range(3)]
        [0.1, 0.05, 0.025]
    """
    return lr * lr_lambda(step)


@schedule()
def multiplicative_lr(step: Any, lr: of.Rate, lr_lambda: of.Function) -> Any:
    r"""Multiply the base rate by the product of a function over the steps so far: ``MultiplicativeLR``.

    .. math::
        \eta_n = \eta_0 \prod_{k=1}^{n} \lambda(k)

    A call multiplies ``step`` factors, so its cost grows with the step. Where the product is known, give it to
    :func:`lambda_lr`.

    Args:
        lr: :math:`\eta_0`, a number >= 0; may be traced.
        lr_lambda: :math:`\lambda`, a function of the step that JAX can trace. The product keeps the digits of
            the factors, but a factor that is computed in float32 has an error of its own.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Raises:
        ``TypeError`` for what is not a number or not a function, ``ValueError`` for a negative rate.

    Examples:
        >>> from jaxoptim import schedules
        >>> schedule = schedules.multiplicative_lr(0.1, lambda step: 0.5)
        >>> [round(float(schedule(n)), 6) for n in range(3)]
        [0.1, 0.05, 0.025]
    """
    dtype = jnp.result_type(float)

    # The rounding error of a product is computed in the round after: the compiler would fuse a subtraction with
    # the product itself, which is then never rounded.
    def multiply(k: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        product, rest = _settled(*state)
        factor = lr_lambda(k)
        head = jnp.asarray(factor, dtype)
        # What a Python number loses in float32; an array has lost it already.
        tail = 0.0 if is_array(factor) else factor - float(np.asarray(factor, dtype))
        return product * head, rest * head + product * tail, product, head

    one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)
    state = jax.lax.fori_loop(1, jnp.asarray(step, int) + 1, multiply, (one, zero, one, one))
    return lr * _settled(*state)[0]


@schedule()
def step_lr(step: Any, lr: of.Rate, step_size: of.Size, gamma: of.Power = 0.1) -> Any:
    r"""Multiply the rate by a factor every ``step_size`` steps: ``StepLR``.

    .. math::
        \eta_n = \eta_0 \, \gamma^{\lfloor n / s \rfloor}

    Args:
        lr: :math:`\eta_0`, a number >= 0; may be traced.
        step_size: :math:`s`, a whole number >= 1.
        gamma: :math:`\gamma`, a number >= 0 (default 0.1); may be traced.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Raises:
        ``TypeError`` for what is not a number, ``ValueError`` for one out of range.

    Examples:
        >>> from jaxoptim import schedules
        >>> schedule = schedules.step_lr(0.1, step_size=2, gamma=0.5)
        >>> [round(float(schedule(n)), 6) for n in range(5)]
        [0.1, 0.1, 0.05, 0.05, 0.025]
    """
    return lr * power(gamma, step // step_size)


@schedule()
def multi_step_lr(step: Any, lr: of.Rate, milestones: of.Milestones, gamma: of.Power = 0.1) -> Any:
    r"""Multiply the rate by a factor at each milestone: ``MultiStepLR``.

    .. math::
        \eta_n = \eta_0 \, \gamma^{|\{m \,:\, m \le n\}|}

    Args:
        lr: :math:`\eta_0`, a number >= 0; may be traced.
        milestones: :math:`m`, whole numbers >= 0 in any order; one that stands twice counts twice.
        gamma: :math:`\gamma`, a number >= 0 (default 0.1); may be traced.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Raises:
        ``TypeError`` for what is not a number, ``ValueError`` for one out of range.

    Examples:
        >>> from jaxoptim import schedules
        >>> schedule = schedules.multi_step_lr(0.1, milestones=[1, 3], gamma=0.5)
        >>> [round(float(schedule(n)), 6) for n in range(5)]
        [0.1, 0.05, 0.05, 0.025, 0.025]
    """
    return lr * power(gamma, sum((step >= milestone) * 1 for milestone in milestones) + 0 * step)


def _or_never(name: str, value: Any) -> int:
    """Check the step at which the factor is undone; 0 means never, as in torch's class."""
    return of.whole(name, value, 0) or 2**31 - 1


@schedule()
def constant_lr(
    step: Any,
    lr: of.Rate,
    factor: Annotated[Any, of.constant_factor] = 1.0 / 3,
    total_iters: Annotated[int, _or_never] = 5,
) -> Any:
    r"""Multiply the base rate by a factor during the first steps: ``ConstantLR``.

    .. math::
        \eta_n = \begin{cases} \eta_0 f & n < T \\ \eta_0 & n \ge T \end{cases}

    Args:
        lr: :math:`\eta_0`, a number >= 0; may be traced.
        factor: :math:`f`, in [0, 1] (default 1/3); may be traced.
        total_iters: :math:`T`, a whole number >= 0 (default 5). With 0 the factor stays for ever, as in torch.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Raises:
        ``TypeError`` for what is not a number, ``ValueError`` for one out of range.

    Examples:
        >>> from jaxoptim import schedules
        >>> schedule = schedules.constant_lr(0.1, factor=0.5, total_iters=2)
        >>> [round(float(schedule(n)), 6) for n in range(4)]
        [0.05, 0.05, 0.1, 0.1]
    """
    return lr * (factor + (step >= total_iters) * (1 - factor))


@schedule()
def linear_lr(
    step: Any,
    lr: of.Rate,
    start_factor: Annotated[Any, of.start_factor] = 1.0 / 3,
    end_factor: Annotated[Any, of.end_factor] = 1.0,
    total_iters: of.Count = 5,
) -> Any:
    r"""Multiply the base rate by a factor that goes linearly from one number to another: ``LinearLR``.

    .. math::
        \eta_n = \eta_0 \left( f_0 + (f_1 - f_0) \frac{\min(n, T)}{T} \right)

    torch's class multiplies one factor after the other, which in float64 comes to 6e-12 of the rate after a million.

    Args:
        lr: :math:`\eta_0`, a number >= 0; may be traced.
        start_factor: :math:`f_0`, in (0, 1] (default 1/3); may be traced.
        end_factor: :math:`f_1`, in [0, 1] (default 1); may be traced.
        total_iters: :math:`T`, a whole number >= 0 (default 5). With 0 the first factor stays for ever, as in
            torch.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Raises:
        ``TypeError`` for what is not a number, ``ValueError`` for one out of range.

    Examples:
        >>> from jaxoptim import schedules
        >>> schedule = schedules.linear_lr(0.1, start_factor=0.5, total_iters=2)
        >>> [round(float(schedule(n)), 6) for n in range(4)]
        [0.05, 0.075, 0.1, 0.1]
    """
    if total_iters == 0:
        return lr * start_factor
    done = minimum(total_iters, step)
    if is_array(step) and is_single():
        return lr * (start_factor * ((total_iters - done) / total_iters) + end_factor * (done / total_iters))
    return lr * (start_factor + divide((end_factor - start_factor) * done, total_iters))


@schedule()
def exponential_lr(step: Any, lr: of.Rate, gamma: of.Power) -> Any:
    r"""Multiply the rate by a factor at every step: ``ExponentialLR``.

    .. math::
        \eta_n = \eta_0 \, \gamma^n

    Args:
        lr: :math:`\eta_0`, a number >= 0; may be traced.
        gamma: :math:`\gamma`, a number >= 0; may be traced.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Raises:
        ``TypeError`` for what is not a number, ``ValueError`` for one out of range.

    Examples:
        >>> from jaxoptim import schedules
        >>> schedule = schedules.exponential_lr(0.1, gamma=0.5)
        >>> [round(float(schedule(n)), 6) for n in range(3)]
        [0.1, 0.05, 0.025]
    """
    return lr * power(gamma, step)


@schedule()
def polynomial_lr(step: Any, lr: of.Rate, total_iters: of.Count = 5, power: of.Number = 1.0) -> Any:
    r"""Multiply the base rate by a power of the fraction of steps that is left: ``PolynomialLR``.

    .. math::
        \eta_n = \eta_0 \left( 1 - \frac{\min(n, T)}{T} \right)^p

    Args:
        lr: :math:`\eta_0`, a number >= 0; may be traced.
        total_iters: :math:`T`, a whole number >= 0 (default 5). With 0 the rate stays as it is, as in torch.
        power: :math:`p`, a number (default 1); may be traced.

    Returns:
        A :class:`Schedule`: ``step -> value``, the rate after that many ``scheduler.step()`` of the class.

    Raises:
        ``TypeError`` for what is not a number, ``ValueError`` for one out of range.

    Examples:
        >>> from jaxoptim import schedules
        >>> schedule = schedules.polynomial_lr(0.1, total_iters=4, power=2.0)
        >>> [round(float(schedule(n)), 6) for n in range(6)]
        [0.1, 0.05625, 0.025, 0.00625, 0.0, 0.0]
    """
    if total_iters == 0:
        return lr + 0 * step
    return lr * remaining(step, total_iters) ** power


def remaining(step: Any, total_iters: Any) -> Any:
    """Return the fraction of the steps that is left."""
    if is_array(step):
        return divide(1.0 * (total_iters - minimum(total_iters, step)), total_iters)
    return 1.0 - min(total_iters, step) / total_iters


def _settled(product: Any, rest: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """Return ``x * y + rest`` as two floats, the second below the first's rounding; ``product`` rounds ``x * y``."""
    rest = rest + _rounding_error(x, y, product)
    total = product + rest
    return total, rest - (total - product)


def _rounding_error(x: Any, y: Any, product: Any) -> Any:
    """Return the exact product of ``x`` and ``y`` less ``product`` (Dekker 1971)."""
    x_high, x_low = _halves(x)
    y_high, y_low = _halves(y)
    return ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low


def _halves(x: Any) -> tuple[Any, Any]:
    """Split a number into a sum of two with half its digits."""
    form = jnp.finfo(x.dtype)
    high = jax.lax.reduce_precision(x, form.nexp, form.nmant // 2)
    return high, x - high
