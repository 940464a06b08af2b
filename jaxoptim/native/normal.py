"""The inverse of the error function by operations that have a text in C, for normal numbers in kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class _Piece(NamedTuple):
    """A polynomial in the distance from the middle of an interval, from the constant coefficient on."""

    middle: float
    coefficients: tuple[float, ...]

    def at(self, x: jax.Array) -> jax.Array:
        total = jnp.full_like(x, self.coefficients[-1])
        for coefficient in self.coefficients[-2::-1]:
            total = total * (x - self.middle) + coefficient
        return total


def erf_inv(x: jax.Array) -> jax.Array:
    r"""Compute :math:`\mathrm{erf}^{-1}(x)` without a jump, which would keep compilers from using vectors.

    With :math:`w = -\log(1 - x^2)` it is :math:`x\,p(w)` in the centre and :math:`x\,q(\sqrt w)` in the tails. The
    polynomials are those of XLA, from which it differs by rounding.

    Args:
        x: float32 or float64, in :math:`(-1, 1)`.

    Returns:
        An array of the shape and dtype of ``x``.

    References:
        Giles: Approximating the erfinv function (GPU Computing Gems, 2012).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.native.normal import erf_inv
        >>> round(float(erf_inv(jnp.float32(0.5))), 4)
        0.4769
    """
    # Without the bound a compiler would not round the square, and differ from XLA by more than rounding in the tails.
    w = -_log(1 - jnp.minimum(x * x, 1))
    root, (centre, *tails) = jnp.sqrt(w), _PIECES[x.dtype.name]
    value = centre.at(w)
    for begin, tail in tails:
        value = jnp.where(w < begin, value, tail.at(root))
    return value * x


def _log(x: jax.Array) -> jax.Array:
    r"""Compute the logarithm of positive normal numbers, to a unit in the last place of 1 or of the result.

    With :math:`x = 2^e m` and :math:`s = (m - 1)/(m + 1)` it is
    :math:`e \log 2 + 2 s\,(1 + s^2/3 + s^4/5 + \dots)`, where :math:`s^2 < 0.03`.
    """
    info, root = jnp.finfo(x.dtype), np.array(math.sqrt(0.5), x.dtype)
    kind = f"int{info.bits}"
    bits = lax.bitcast_convert_type(x, kind)
    exponent = (bits - root.view(kind)) >> info.nmant
    mantissa = lax.bitcast_convert_type(bits - (exponent << info.nmant), x.dtype)
    s = (mantissa - 1) / (mantissa + 1)
    square, terms = s * s, 5 if info.bits == 32 else 10
    series = jnp.full_like(x, 1 / (2 * terms - 1))
    for term in range(terms - 2, -1, -1):
        series = series * square + 1 / (2 * term + 1)
    return exponent.astype(x.dtype) * math.log(2) + 2 * s * series


# fmt: off
_PIECES: dict[str, tuple[Any, ...]] = {
    "float32": (
        _Piece(2.5, (
        1.50140941, 0.246640727, -0.00417768164, -0.00125372503, 0.00021858087, -4.39150654e-06, -3.5233877e-06,
        3.43273939e-07, 2.81022636e-08,
        )),
        (5.0, _Piece(3.0, (
        2.83297682, 1.00167406, 0.00943887047, -0.0076224613, 0.00573950773, -0.00367342844, 0.00134934322,
        0.000100950558, -0.000200214257,
        ))),
    ),
    "float64": (
        _Piece(3.125, (
        1.6536545626831027, 0.24015818242558962, -0.006033670871430149, -0.000740702534166267,
        0.00018673420803405714, -1.3882523362786469e-05, -1.3654692000834679e-06, 4.2347877827932404e-07,
        -2.9070369957882005e-08, -4.112633980346984e-09, 1.0512122733215323e-09, -5.415412054294628e-11,
        -1.2975133253453532e-11, 2.6335093153082323e-12, -8.151934197605472e-14, -4.054566272975207e-14,
        6.637638134358324e-15, 2.0972767875968562e-17, -1.333171662854621e-16, 1.1157877678025181e-17,
        1.28584807152564e-18, -1.6850591381820166e-19, -3.64441206401782e-21,
        )),
        (6.25, _Piece(3.25, (
        3.0838856104922208, 1.0052589676941592, 0.005370914553590064, -0.003751208507569241,
        0.002491442096107851, -0.0016882755560235047, 0.0009532893797373805, -0.0003550375203628475,
        2.4031110387097894e-05, 6.828485145957318e-05, -4.7318229009055734e-05, 1.2475304481671779e-05,
        2.9234449089955446e-06, -4.013867526981546e-06, 1.5027403968909828e-06, 1.8239629214389228e-08,
        -2.7517406297064545e-07, 9.075656193888539e-08, 2.2137376921775787e-09,
        ))),
        (16.0, _Piece(5.0, (
        4.849906401408584, 1.0103004648645344, -0.00013871931833623122, -0.00021503011930044477,
        7.599527703001776e-05, -1.968177810553167e-05, 4.526062597223154e-06, -9.9298272942317e-07,
        2.2900482228026655e-07, -6.771199775845234e-08, 2.914795345090108e-08, -1.496002662714924e-08,
        7.61570120807834e-09, -3.789465440126737e-09, 1.5076572693500548e-09, -2.555641816996525e-10,
        -2.7109920616438573e-11,
        ))),
    ),
}
# fmt: on
"""For each dtype the piece of the centre, and those of the tails, each with the w where it begins."""
