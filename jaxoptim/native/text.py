"""The C file of a kernel: its operands, the loop over the places of their numbers, and how it is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxoptim.native.elements import Element, Elements, kept_type, loaded, local_type, stored
from jaxoptim.native.loops import loops

_CHUNK = 65536
"""Numbers of each array that a thread takes at a time: with fewer, it begins new pages too often."""

_HEAD = """#include <fenv.h>
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "xla/ffi/api/c_api.h"

static inline float from_bfloat16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  return (uint16_t)(x != x ? quiet : rounded);
}

#define BITS(from, to) \\
  static inline to bits_##from##_##to(from x) { to bits; memcpy(&bits, &x, sizeof bits); return bits; }
BITS(float, uint32_t)
BITS(float, int32_t)
BITS(uint32_t, float)
BITS(int32_t, float)
BITS(uint32_t, int32_t)
BITS(int32_t, uint32_t)
BITS(double, uint64_t)
BITS(double, int64_t)
BITS(uint64_t, double)
BITS(int64_t, double)
BITS(uint64_t, int64_t)
BITS(int64_t, uint64_t)
"""


class Array(NamedTuple):
    """An array that a kernel reads or writes, by the dtype of its numbers."""

    name: str
    dtype: Any


def file_of(
    elements: Elements, read: Sequence[Array], written: Sequence[tuple[Array, Element]], parts: int
) -> tuple[str, dict[int, int]]:
    """The text of a kernel, and which of its operands have the memory of which of its results.

    Its operands are the vectors of ``elements.taken`` and the arrays that are read, whose numbers the statements call
    ``v0``, ``v1``, ... Its results are the arrays that are written, and the sums. A result has the memory of the array
    of its name and dtype. All may have leading axes, of rows.

    Args:
        elements: the statements of the loop.
        read: the arrays that they read, one at least.
        written: the arrays that are written, each with the number that is.
        parts: how many numbers of the loop a number of the arrays is, 2 for complex ones.
    """
    places = {array: at for at, (array, _) in enumerate(written)}
    first = len(elements.taken)
    in_place = {first + at: places[array] for at, array in enumerate(read) if array in places}
    own = [at for at in range(len(written)) if at not in in_place.values()]
    # A number that is read within the loop would be read under a condition, and keep the compiler from using vectors.
    lines = [
        f"const {local_type(dtype)} {dtype}_{place} = "
        f"((const {kept_type(dtype)} *)in[{at}])[row * {len(scalars)} + {place}];"
        for at, (dtype, scalars) in enumerate(elements.taken.items())
        for place in range(len(scalars))
    ]
    for at, (name, dtype) in enumerate(read):
        where = f"out[{in_place[first + at]}]" if first + at in in_place else f"in[{first + at}]"
        lines.append(_array(f"a{at}", where, dtype, name, first + at not in in_place))
    lines += [_array(f"r{at}", f"out[{at}]", written[at][0].dtype, written[at][0].name, False) for at in own]
    target = {result: f"a{operand - first}" for operand, result in in_place.items()} | {at: f"r{at}" for at in own}
    ends = [f"{target[at]}[i] = {stored(number.name, dtype)};" for at, ((_, dtype), number) in enumerate(written)]
    numbers = {
        f"v{at}": f"{local_type(dtype)} v{at} = {loaded(f'a{at}[i]', dtype)};" for at, (_, dtype) in enumerate(read)
    }
    body = loops(elements, numbers, ends, [number.name for _, number in written])
    results = len(written)
    sums = [kept_type(number.dtype) for number in elements.sums]
    text = _file(first + len(read), results, in_place, parts, _indented([*lines, *body], 2), first, sums)
    return text, in_place


def _array(name: str, where: str, dtype: Any, of: str, is_read: bool) -> str:
    kind = f"{'const ' * is_read}{kept_type(dtype)}"
    return f"{kind} *restrict {name} = ({kind} *){where} + row * size; /* {of} */"


def barrier_of(count: int, others: int) -> tuple[str, dict[int, int]]:
    """The text of a kernel that leaves as many arrays as they are, and looks at no other operand."""
    in_place = {at: at for at in range(count)}
    return _file(count + others, count, in_place, 0, "", 0, ()), in_place


def _file(
    inputs: int, outputs: int, in_place: dict[int, int], parts: int, body: str, first: int, sums: Sequence[str]
) -> str:
    sizes = {"INPUTS": inputs, "OUTPUTS": outputs, "IN_PLACE": len(in_place), "PARTS": parts, "CHUNK": _CHUNK}
    sizes |= {"FIRST": first, "SUMS": len(sums)}
    pairs = ", ".join(f"{{{operand}, {result}}}" for operand, result in in_place.items()) or "{0, 0}"
    written = _indented(
        [f"(({kind} *)out[{outputs + at}])[row] = ({kind})sums[{at}];" for at, kind in enumerate(sums)], 2
    )
    return f"""{_HEAD}
enum {{ {", ".join(f"{name} = {size}" for name, size in sizes.items())} }};
static const int in_place[][2] = {{{pairs}}};

static void run(void *const *in, void *const *out, int64_t row, int64_t size, int64_t begin, int64_t end,
                double *sums) {{
  {body}
}}

static void store(void *const *out, int64_t row, const double *sums) {{
  {written}
}}

{_LOOP}"""


_LOOP = Path(__file__).with_name("loop.c").read_text()


def _indented(lines: Sequence[str], by: int) -> str:
    return ("\n" + " " * by).join(lines)
