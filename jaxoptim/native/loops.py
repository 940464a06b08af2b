"""The loop of a kernel over the places of its arrays; a long one goes through blocks of them in stages."""

from __future__ import annotations

from collections.abc import Sequence

from jaxoptim.native.elements import Elements, Line, local_type

_BLOCK = 256
"""Numbers of each array that go through one stage after the other: what is between stays in the cache."""
_LONG = 24
"""Statements of a stage. In a longer one a CPU sees too few numbers at a time to hide how long each operation takes."""


def loops(elements: Elements, numbers: dict[str, str], ends: Sequence[str], stored: Sequence[str]) -> list[str]:
    """The lines of the loop over the places from ``begin`` to ``end``.

    Args:
        elements: the statements.
        numbers: by its name the statement that loads each number of an array.
        ends: the statements that store.
        stored: the names of the numbers that these store.
    """
    stages = _stages(elements.lines)
    if len(stages) == 1 and not elements.sums:
        body = [*numbers.values(), *map(_statement, stages[0]), *ends]
        return ["for (int64_t i = begin; i < end; ++i) {", *_inner(body), "}"]
    final = len(stages) - 1
    made = {line.name: at for at, lines in enumerate(stages) for line in lines}
    last = {name: at for at, lines in enumerate(stages) for line in lines for name in line.uses}
    last |= dict.fromkeys(stored, final)
    kept = {line.name: line.kind for line in elements.lines if last.get(line.name, 0) > made[line.name]}
    within: list[str] = []
    for at, lines in enumerate(stages):
        added = [n for n, number in enumerate(elements.sums) if made.get(number.name, final) == at]
        used = [name for line in lines for name in line.uses] + [elements.sums[n].name for n in added]
        used = list(dict.fromkeys([*used, *(stored if at == final else [])]))
        body = [numbers[name] for name in used if name in numbers]
        body += [f"{kept[name]} {name} = k_{name}[j];" for name in used if name in kept and made[name] < at]
        body += map(_statement, lines)
        body += [f"k_{line.name}[j] = {line.name};" for line in lines if line.name in kept]
        body += [f"s{n} += {elements.sums[n].name};" for n in added]
        body += ends if at == final else []
        within += [f"{local_type(elements.sums[n].dtype)} s{n} = 0;" for n in added]
        if added:
            within.append(f"#pragma omp simd reduction(+:{', '.join(f's{n}' for n in added)})")
        within += ["for (int64_t j = 0; j < count; ++j) {", "  const int64_t i = at + j;", *_inner(body), "}"]
        within += [f"sums[{n}] += s{n};" for n in added]
    return [
        *(f"{kind} k_{name}[{_BLOCK}];" for name, kind in kept.items()),
        f"for (int64_t at = begin; at < end; at += {_BLOCK}) {{",
        f"  const int64_t count = end - at < {_BLOCK} ? end - at : {_BLOCK};",
        *_inner(within),
        "}",
    ]


def _stages(lines: Sequence[Line]) -> list[list[Line]]:
    """The statements in stages of about the same length, cut where few numbers are still needed."""
    last = {name: at for at, line in enumerate(lines) for name in line.uses}
    made = {line.name: at for at, line in enumerate(lines)}
    stages, start = [], 0
    while len(lines) - start > _LONG + _LONG // 2:
        cuts = range(start + _LONG // 2, start + _LONG + 1)
        cut = min(cuts, key=lambda cut: (sum(at < cut <= last.get(name, -1) for name, at in made.items()), -cut))
        stages.append(list(lines[start:cut]))
        start = cut
    return [*stages, list(lines[start:])]


def _statement(line: Line) -> str:
    return f"{line.kind} {line.name} = {line.text};"


def _inner(lines: Sequence[str]) -> list[str]:
    return [line if line.startswith("#") else f"  {line}" for line in lines]
