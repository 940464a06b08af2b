"""A function of single numbers over large arrays, on a CPU by one loop that reads and writes each once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.native.call import call, on_cpus
from jaxoptim.native.elements import Element, Elements, Later, Uniform, Unsupported
from jaxoptim.native.text import Array, file_of

Arrays = dict[str, jax.Array]
Function = Callable[[Any, Arrays], tuple[Arrays, Any]]


def one_pass(function: Function, uniform: Any, arrays: Arrays) -> tuple[Arrays, Any]:
    """Call a function that takes the numbers of its arrays one by one.

    On CPUs it is a loop in C, derived from the jaxpr of the function for vectors, which XLA calls; what is the same for
    all places is left to XLA. On other platforms and for derivatives it is the function itself.

    Args:
        function: takes ``uniform`` and arrays of one shape, by name, and gives arrays of that shape by name, and a tree
            of scalars that depend on ``uniform``, and on sums over arrays. It treats the parts of complex numbers
            alike. The place of a number is to be seen in nothing but :func:`jax.lax.iota` of the vector.
        uniform: a tree of scalars.
        arrays: arrays of one shape, all complex or none. Those of a name and dtype that a result has give it their
            memory, so that a caller donates them, or XLA makes a copy.

    Returns:
        What ``function`` returns.

    Raises:
        :class:`~jaxoptim.native.elements.Unsupported` and :class:`~jaxoptim.native.compiler.CannotCompile`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim.native import one_pass
        >>> scaled, _ = one_pass(lambda rate, its: ({"x": rate * its["x"]}, {}), 2.0, {"x": jnp.arange(3.0)})
        >>> scaled["x"].tolist()
        [0.0, 2.0, 4.0]
    """
    like = next(iter(arrays.values()))
    if like.size < _FEW:
        return function(uniform, arrays)
    return on_cpus(functools.partial(_by_loop, function), function)(uniform, arrays)


_FEW = 16
"""A vector of fewer numbers might be one of scalars, such as the words of a key."""


def _by_loop(function: Function, uniform: Any, arrays: Arrays) -> tuple[Arrays, Any]:
    shape = next(iter(arrays.values())).shape
    is_complex = any(map(jnp.iscomplexobj, arrays.values()))
    size = math.prod(shape) * (2 if is_complex else 1)
    numbers = {name: jax.ShapeDtypeStruct((size,), _real(x.dtype)) for name, x in arrays.items()}
    try:
        closed, form = jax.make_jaxpr(function, return_shape=True)(uniform, numbers)
    except (TypeError, ValueError, IndexError) as error:
        raise Unsupported(f"an operation on whole arrays ({str(error).splitlines()[0]})") from error
    places = [Element(f"v{at}", numbers[name].dtype) for at, name in enumerate(sorted(arrays))]
    elements = Elements(size)
    values = elements.run(closed, [*map(Uniform, jax.tree.leaves(uniform)), *places])
    made, scalars = jax.tree.unflatten(jax.tree.structure(form), values)
    if any(isinstance(x, Element) for x in jax.tree.leaves(scalars, is_leaf=_is_value)):
        raise Unsupported("a result that is not a scalar")
    if any(isinstance(x, Later) for x in made.values()):
        raise Unsupported("a sum over the array that its own numbers wait for")
    dtypes = {name: x.dtype for name, x in form[0].items()}
    loops = {name: x for name, x in made.items() if isinstance(x, Element) and x not in places}
    read = [Array(name, numbers[name].dtype) for name in sorted(arrays)]
    written = [(Array(name, dtypes[name]), loops[name]) for name in sorted(loops)]
    text, in_place = file_of(elements, read, written, 2 if is_complex else 1)
    # Arrays keep their axes: XLA makes copies of what it reshapes, and there would be no memory to be given.
    results = [
        jax.ShapeDtypeStruct(shape, jnp.promote_types(dtype, jnp.complex64) if is_complex else dtype)
        for (_, dtype), _ in written
    ]
    results += [jax.ShapeDtypeStruct((), number.dtype) for number in elements.sums]
    vectors = [jnp.stack([jnp.asarray(x).astype(dtype) for x in own]) for dtype, own in elements.taken.items()]
    operands = [*vectors, *(arrays[name] for name in sorted(arrays))]
    made_here = call(text, in_place, results, operands, len(shape))
    new = dict(zip(sorted(loops), made_here[: len(loops)], strict=True))
    for name, x in made.items():
        if isinstance(x, Uniform):
            new[name] = jnp.broadcast_to(jnp.asarray(x.value, dtypes[name]), shape)
        elif name not in new:
            new[name] = arrays[sorted(arrays)[places.index(x)]]
    known = elements.later(made_here[len(loops) :])
    return {name: new[name] for name in made}, jax.tree.map(
        lambda x: known[x.number] if isinstance(x, Later) else x.value, scalars, is_leaf=_is_value
    )


def _is_value(x: Any) -> bool:
    return isinstance(x, Element | Uniform | Later)


def _real(dtype: Any) -> Any:
    return jnp.finfo(dtype).dtype if jnp.issubdtype(dtype, jnp.complexfloating) else dtype
