"""The C text of a function of single numbers, from its jaxpr."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxoptim.native.normal import erf_inv

_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint"}
"""The primitives that are nothing but the operations in them."""

_LOCAL = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "float",
    "float16": "float",
    "int32": "int32_t",
    "uint32": "uint32_t",
    "int64": "int64_t",
    "uint64": "uint64_t",
    "bool": "int",
}
"""The type of a number of each dtype within the loop; those of few bits are rounded after each operation, as in XLA."""

_KEPT = {**_LOCAL, "bfloat16": "uint16_t", "float16": "_Float16", "bool": "uint8_t"}
"""And in memory."""


class Unsupported(Exception):
    """Names a primitive, or a dtype, that has no text in C."""


class Element(NamedTuple):
    """A number of each place: its name in the loop, and its dtype."""

    name: str
    dtype: np.dtype


class Uniform(NamedTuple):
    """A number that is the same in all places, as a scalar of JAX."""

    value: Any


class Later(NamedTuple):
    """A number that follows from sums over all places, by its index in :meth:`Elements.later`."""

    number: int


Value = Element | Uniform | Later


class Line(NamedTuple):
    """A statement of the loop: it computes a number from others, those of arrays among them."""

    name: str
    kind: str
    text: str
    uses: tuple[str, ...]


def kept_type(dtype: Any) -> str:
    """The C type of a number of an array; raises :class:`Unsupported`."""
    return _named(_KEPT, dtype)


def local_type(dtype: Any) -> str:
    """The C type of a number within the loop; raises :class:`Unsupported`."""
    return _named(_LOCAL, dtype)


def _named(types: dict[str, str], dtype: Any) -> str:
    if (name := jnp.dtype(dtype).name) not in types:
        raise Unsupported(f"the dtype {name}")
    return types[name]


class Elements:
    """The statements of a loop over all places, the numbers that they take from outside of it, and the sums over it.

    Args:
        size: the number of places. What has one axis of this length has a number for each of them, all else is scalars.
    """

    def __init__(self, size: int) -> None:
        self.lines: list[Line] = []
        self.taken: dict[str, list[Any]] = {}
        """For each dtype of vectors that the kernel reads, the scalars in it."""
        self.sums: list[Element] = []
        """The numbers that are summed over all places."""
        self._size = size
        self._later: list[Callable[[Sequence[Any], Sequence[Any]], Any]] = []
        self._names: dict[tuple[int, str], str] = {}

    def run(self, closed: ClosedJaxpr, values: Sequence[Value]) -> list[Value]:
        """Write the operations that differ from place to place, and make the others at once.

        Raises:
            :class:`Unsupported`.
        """
        jaxpr: Jaxpr = closed.jaxpr
        known: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
        known |= {var: Uniform(const) for var, const in zip(jaxpr.constvars, closed.consts, strict=True)}

        def read(atom: Any) -> Value:
            return Uniform(atom.val) if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            known |= dict(zip(eqn.outvars, self._made(eqn, operands), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _made(self, eqn: Any, operands: Sequence[Value]) -> Sequence[Value]:
        """The results of an operation."""
        name = eqn.primitive.name
        if name in _CALLS:
            inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
            return self.run(inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ()), operands)
        if not any(self._is_spread(atom) for atom in (*eqn.invars, *eqn.outvars)):
            return self._of_scalars(eqn, operands)
        if any(atom.aval.shape and not self._is_spread(atom) for atom in (*eqn.invars, *eqn.outvars)):
            raise Unsupported(f"the primitive {name!r}")
        if name == "iota":
            return [self._line(_converted("i", of=np.dtype("int64"), to=eqn.outvars[0].aval.dtype), eqn, ())]
        if name == "reduce_sum":
            return [self._summed(operands[0], eqn.outvars[0].aval.dtype)]
        if not (name in _TEXTS or name in _EXPANDED) or not all(map(self._is_spread, eqn.outvars)):
            raise Unsupported(f"the primitive {name!r}")
        if any(isinstance(operand, Later) for operand in operands):
            raise Unsupported("a sum over the array that its own numbers wait for")
        if all(isinstance(operand, Uniform) for operand in operands):
            return [operands[0]] if name in _SHAPES else self._of_scalars(eqn, operands)
        if name in _EXPANDED:
            like = jax.ShapeDtypeStruct((self._size,), eqn.invars[0].aval.dtype)
            return self.run(jax.make_jaxpr(_EXPANDED[name])(like), operands)
        return [self._written(eqn, operands)]

    def _is_spread(self, atom: Any) -> bool:
        return atom.aval.shape == (self._size,)

    def _summed(self, x: Value, dtype: np.dtype) -> Value:
        if isinstance(x, Uniform):
            return Uniform(jnp.asarray(x.value, dtype) * np.asarray(self._size, dtype))
        if dtype not in (jnp.float32, jnp.float64) or not isinstance(x, Element):
            raise Unsupported(f"a sum of {dtype}")
        self.sums.append(x)
        at = len(self.sums) - 1
        return self._deferred(lambda sums, known: sums[at])

    def _of_scalars(self, eqn: Any, operands: Sequence[Any]) -> Sequence[Value]:
        """The results of an operation on scalars, at once or when the loop has ended."""

        def made(values: Sequence[Any]) -> Sequence[Any]:
            new = eqn.primitive.bind(*values, **eqn.params)
            return new if eqn.primitive.multiple_results else [new]

        if all(isinstance(operand, Uniform) for operand in operands):
            return [Uniform(x) for x in made([operand.value for operand in operands])]
        whole = self._deferred(
            lambda sums, known: made([known[x.number] if isinstance(x, Later) else x.value for x in operands])
        )

        def part(at: int) -> Later:
            return self._deferred(lambda sums, known: known[whole.number][at])

        return [part(at) for at in range(len(eqn.outvars))]

    def _deferred(self, of: Callable[[Sequence[Any], Sequence[Any]], Any]) -> Later:
        self._later.append(of)
        return Later(len(self._later) - 1)

    def later(self, sums: Sequence[Any]) -> list[Any]:
        """The numbers that follow from the sums, :attr:`sums` over all places."""
        known: list[Any] = []
        for of in self._later:
            known.append(of(sums, known))
        return known

    def _written(self, eqn: Any, operands: Sequence[Value]) -> Element:
        name, dtype, dtypes = eqn.primitive.name, eqn.outvars[0].aval.dtype, [atom.aval.dtype for atom in eqn.invars]
        text = _TEXTS[name](*map(self.text, operands, dtypes), **_Context(eqn.params, dtypes[0], dtype)._asdict())
        return self._line(text if name in _EXACT else _rounded(text, dtype), eqn, operands)

    def _line(self, text: str, eqn: Any, operands: Sequence[Value]) -> Element:
        dtype, name = eqn.outvars[0].aval.dtype, f"x{len(self.lines)}"
        uses = tuple(operand.name for operand in operands if isinstance(operand, Element))
        self.lines.append(Line(name, _named(_LOCAL, dtype), text, uses))
        return Element(name, dtype)

    def text(self, value: Any, dtype: Any) -> str:
        """The text of a number; one from outside the loop is read from a vector."""
        if isinstance(value, Element):
            return value.name
        if not isinstance(value.value, jax.core.Tracer):
            return _literal(np.asarray(value.value), dtype)
        vector = _VECTORS.get(jnp.dtype(dtype).name, jnp.dtype(dtype).name)
        _named(_LOCAL, vector)
        key = (id(value.value), vector)
        if key not in self._names:
            scalars = self.taken.setdefault(vector, [])
            self._names[key] = f"{vector}_{len(scalars)}"
            scalars.append(value.value)
        return self._names[key]


_VECTORS = {"bfloat16": "float32", "float16": "float32", "bool": "int32"}
"""The dtype of the vector that has scalars of these."""


def loaded(place: str, dtype: Any) -> str:
    """The text of a number in memory, as it is in the loop."""
    return f"from_bfloat16({place})" if dtype == jnp.bfloat16 else place


def stored(text: str, dtype: Any) -> str:
    """The text of a number of the loop, as it is in memory."""
    return f"to_bfloat16({text})" if dtype == jnp.bfloat16 else text


def _rounded(text: str, dtype: Any) -> str:
    if dtype == jnp.bfloat16:
        return f"from_bfloat16(to_bfloat16({text}))"
    return f"(float)(_Float16)({text})" if dtype == jnp.float16 else text


def _literal(value: np.ndarray, dtype: Any) -> str:
    """A constant, to the last bit."""
    if jnp.issubdtype(dtype, jnp.floating):
        x, f = float(value), "" if dtype == jnp.float64 else "f"
        if np.isfinite(x):
            return f"{x.hex()}{f}"
        return f"(0.0{f} / 0.0{f})" if np.isnan(x) else f"({'-' * (x < 0)}1.0{f} / 0.0{f})"
    return f"(({_named(_LOCAL, dtype)}){int(value)}{'u' * (jnp.issubdtype(dtype, jnp.unsignedinteger))})"


class _Context(NamedTuple):
    """What the text of an operation may depend on: its parameters, the dtype of its first operand, and its own."""

    params: dict[str, Any]
    of: Any
    to: Any


def _infix(operator: str) -> Callable[..., str]:
    return lambda a, b, **_: f"({a} {operator} {b})"


def _function(name: str) -> Callable[..., str]:
    """A function of C's mathematics, whose name says the type."""
    return lambda *x, to, **_: f"{name}{'' if to == jnp.float64 else 'f'}({', '.join(x)})"


def _converted(x: str, *, of: Any, to: Any, **_: Any) -> str:
    if to == jnp.bool_:
        return f"({x} != 0)"
    return _rounded(f"({_named(_LOCAL, to)})({x})", to)


def _power(x: str, *, params: dict[str, Any], to: Any, **_: Any) -> str:
    exponent = params["y"]
    one = _literal(np.asarray(1), to)
    product = functools.reduce(lambda a, b: f"({a} * {b})", [x] * abs(exponent)) if exponent else one
    return product if exponent >= 0 else f"({one} / {product})"


# NaN wins, as in XLA: a comparison with it is false. Without || there is no jump, which would keep the compiler from
# using vectors.
def _maximum(a: str, b: str, **_: Any) -> str:
    return f"(({a} != {a}) | ({a} > {b}) ? {a} : {b})"


def _minimum(a: str, b: str, **_: Any) -> str:
    return f"(({a} != {a}) | ({a} < {b}) ? {a} : {b})"


def _same(x: str, **_: Any) -> str:
    return x


def _bits(dtype: Any) -> int:
    return 8 * jnp.dtype(dtype).itemsize


# A shift by as many bits as there are, or more, leaves nothing in XLA, and what the CPU likes in C.
def _left(x: str, by: str, *, to: Any, **_: Any) -> str:
    return f"({by} < {_bits(to)} ? {x} << {by} : 0)"


def _right(x: str, by: str, *, to: Any, **_: Any) -> str:
    return f"({by} < {_bits(to)} ? (uint{_bits(to)}_t){x} >> {by} : 0)"


def _right_with_sign(x: str, by: str, *, to: Any, **_: Any) -> str:
    most = _bits(to) - 1
    return f"((int{_bits(to)}_t){x} >> ({by} < {most} ? {by} : {most}))"


def _viewed(x: str, *, of: Any, to: Any, **_: Any) -> str:
    """The bits of a number as those of another type."""
    if _bits(of) != _bits(to) or _bits(to) < 32:
        raise Unsupported(f"the bits of {of} as {to}")
    return f"bits_{_LOCAL[of.name]}_{_LOCAL[to.name]}({x})"


def _remainder(a: str, b: str, *, to: Any, **_: Any) -> str:
    if not jnp.issubdtype(to, jnp.floating):
        raise Unsupported(f"a remainder of {to}")
    return _function("fmod")(a, b, to=to)


# fmt: off
_SHAPES = {"broadcast_in_dim", "reshape", "squeeze", "copy", "stop_gradient", "optimization_barrier"}
"""The operations that leave each number as it is."""

_EXACT = _SHAPES | {
    "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor", "not", "neg", "abs", "sign", "max", "min", "clamp", "floor",
    "ceil", "is_finite", "select_n", "convert_element_type", "bitcast_convert_type", "shift_left",
    "shift_right_logical", "shift_right_arithmetic", "rem",
}
# fmt: on
"""The operations whose result a dtype of few bits always has."""

_TEXTS: dict[str, Callable[..., str]] = {
    "add": _infix("+"),
    "add_any": _infix("+"),
    "sub": _infix("-"),
    "mul": _infix("*"),
    "div": _infix("/"),
    "lt": _infix("<"),
    "le": _infix("<="),
    "gt": _infix(">"),
    "ge": _infix(">="),
    "eq": _infix("=="),
    "ne": _infix("!="),
    "and": _infix("&"),
    "or": _infix("|"),
    "xor": _infix("^"),
    "not": lambda x, *, to, **_: f"(!{x})" if to == jnp.bool_ else f"(~{x})",
    "neg": lambda x, **_: f"(-{x})",
    "abs": lambda x, *, to, **_: _function("fabs")(x, to=to) if jnp.issubdtype(to, jnp.floating) else f"abs({x})",
    "sign": lambda x, *, to, **_: f"({x} > 0 ? ({_LOCAL[to.name]})1 : {x} < 0 ? ({_LOCAL[to.name]})-1 : {x})",
    "max": _maximum,
    "min": _minimum,
    "clamp": lambda low, x, high, **_: _minimum(f"{_maximum(low, x)}", high),
    "square": lambda x, **_: f"({x} * {x})",
    "integer_pow": _power,
    "sqrt": _function("sqrt"),
    "rsqrt": lambda x, *, to, **_: f"({_literal(np.asarray(1), to)} / {_function('sqrt')(x, to=to)})",
    "cbrt": _function("cbrt"),
    "exp": _function("exp"),
    "exp2": _function("exp2"),
    "expm1": _function("expm1"),
    "log": _function("log"),
    "log1p": _function("log1p"),
    "tanh": _function("tanh"),
    "sin": _function("sin"),
    "cos": _function("cos"),
    "pow": _function("pow"),
    "floor": _function("floor"),
    "ceil": _function("ceil"),
    "is_finite": lambda x, **_: f"({x} - {x} == 0)",
    "select_n": lambda which, no, yes, **_: f"({which} ? {yes} : {no})",
    "convert_element_type": _converted,
    "rem": _remainder,
    "shift_left": _left,
    "shift_right_logical": _right,
    "shift_right_arithmetic": _right_with_sign,
    "bitcast_convert_type": _viewed,
    **dict.fromkeys(_SHAPES, _same),
}
"""The text of each primitive in C, from those of its operands."""

_EXPANDED: dict[str, Callable[[jax.Array], jax.Array]] = {"erf_inv": erf_inv}
"""Primitives by others."""
