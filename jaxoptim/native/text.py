"""The C file of a kernel: a loop over the places of its arrays, and how it is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxoptim.native.elements import Element, Elements, kept_type, loaded, local_type, stored

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
    ``v0``, ``v1``, ... A result has the memory of the array of its name and dtype.

    Args:
        elements: the statements of the loop.
        read: the arrays that they read.
        written: the arrays that are written, each with the number that is.
        parts: how many numbers of the loop a number of the arrays is, 2 for complex ones.
    """
    places = {array: at for at, (array, _) in enumerate(written)}
    first = len(elements.taken)
    in_place = {first + at: places[array] for at, array in enumerate(read) if array in places}
    own = [at for at in range(len(written)) if at not in in_place.values()]
    # A number that is read within the loop would be read under a condition, and keep the compiler from using vectors.
    vectors = [
        f"const {local_type(dtype)} {dtype}_{place} = ((const {kept_type(dtype)} *)in[{at}])[{place}];"
        for at, (dtype, scalars) in enumerate(elements.taken.items())
        for place in range(len(scalars))
    ]
    arrays = [
        f"{kept_type(dtype)} *restrict a{at} = out[{in_place[first + at]}]; /* {name} */"
        if first + at in in_place
        else f"const {kept_type(dtype)} *restrict a{at} = in[{first + at}]; /* {name} */"
        for at, (name, dtype) in enumerate(read)
    ]
    arrays += [
        f"{kept_type(written[at][0].dtype)} *restrict r{at} = out[{at}]; /* {written[at][0].name} */" for at in own
    ]
    loop = [f"{local_type(dtype)} v{at} = {loaded(f'a{at}[i]', dtype)};" for at, (_, dtype) in enumerate(read)]
    loop += elements.lines
    target = {result: f"a{operand - first}" for operand, result in in_place.items()} | {at: f"r{at}" for at in own}
    loop += [f"{target[at]}[i] = {stored(number.name, dtype)};" for at, ((_, dtype), number) in enumerate(written)]
    body = f"""{_indented([*vectors, *arrays], 2)}
  for (int64_t i = begin; i < end; ++i) {{
    {_indented(loop, 4)}
  }}"""
    return _file(first + len(read), len(written), in_place, parts, body), in_place


def barrier_of(count: int, others: int) -> tuple[str, dict[int, int]]:
    """The text of a kernel that leaves as many arrays as they are, and looks at no other operand."""
    in_place = {at: at for at in range(count)}
    return _file(count + others, count, in_place, 0, ""), in_place


def _file(inputs: int, outputs: int, in_place: dict[int, int], parts: int, body: str) -> str:
    sizes = {"INPUTS": inputs, "OUTPUTS": outputs, "IN_PLACE": len(in_place), "PARTS": parts, "CHUNK": _CHUNK}
    pairs = ", ".join(f"{{{operand}, {result}}}" for operand, result in in_place.items()) or "{0, 0}"
    return f"""{_HEAD}
enum {{ {", ".join(f"{name} = {size}" for name, size in sizes.items())} }};
static const int in_place[][2] = {{{pairs}}};

static void run(void *const *in, void *const *out, int64_t begin, int64_t end) {{
  {body}
}}

{_LOOP}"""


_LOOP = Path(__file__).with_name("loop.c").read_text()


def _indented(lines: Sequence[str], by: int) -> str:
    return ("\n" + " " * by).join(lines)
