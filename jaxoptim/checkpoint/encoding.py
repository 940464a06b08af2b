"""Trees of data as JSON, with the arrays beside it.

None, booleans, numbers, strings and lists stand for themselves. Everything else is an object that says first what
it is: ``{"dict": [[key, value], ...]}``, ``{"array": name}``, ...
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import OptState, owned
from jaxoptim.core.numerics import placed_like
from jaxoptim.optim.state_dicts import StateDict

Arrays = dict[str, np.ndarray]
Path = tuple[str, ...]

_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_NATIVE = frozenset((*_INTEGERS, "bool", "float16", "bfloat16", "float32", "float64", "complex64"))
"""The dtypes that safetensors gives back as they are; arrays of others are kept as their bytes."""
_MAPPINGS: dict[str, Callable[[list[Any]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda items: Counter(dict(items)),
}
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple}


class Malformed(Exception):
    """JSON that :func:`encoded` cannot have made."""


def dotted(path: Path) -> str:
    """A path for messages."""
    return repr(".".join(path)) if path else "the whole"


def encoded(x: Any, path: Path, arrays: Arrays, nodes: bool = True) -> Any:
    """A tree as JSON; its arrays are put into ``arrays``.

    Args:
        x: the tree.
        path: where it stands in the whole.
        arrays: to be filled.
        nodes: whether other nodes than dicts, lists and tuples are allowed, which only ``like`` can restore.

    Errors:
        ``TypeError`` for what is no data, ``ValueError`` for an array that is not all here; with the path.
    """
    if x is None or isinstance(x, bool | int | str):
        return x
    if isinstance(x, float):
        return float(x) if math.isfinite(x) else {"float": repr(float(x))}
    if isinstance(x, complex):
        return {"complex": [encoded(part, path, arrays) for part in (x.real, x.imag)]}
    if isinstance(x, np.generic):
        return encoded(x.item(), path, arrays)
    if isinstance(x, jax.Array | np.ndarray):
        return _encoded_array(x, path, arrays)
    if type(x) in (list, tuple):
        items = [encoded(item, (*path, str(index)), arrays, nodes) for index, item in enumerate(x)]
        return items if type(x) is list else {"tuple": items}
    if isinstance(x, dict) and type(x) in (dict, OrderedDict, Counter, defaultdict, StateDict):
        nodes = nodes and not isinstance(x, StateDict)
        places = [(*path, _named(jax.tree_util.DictKey(key))) for key in x]
        items = [
            [encoded(key, place, arrays, False), encoded(value, place, arrays, nodes)]
            for place, (key, value) in zip(places, x.items(), strict=True)
        ]
        if isinstance(x, StateDict):
            return {"dict": items, "class": x.made_by, "names": x.names}
        return {"dict" if type(x) is defaultdict else type(x).__name__: items}
    children = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)[0]
    if not nodes or any(not keys for keys, _ in children):
        raise TypeError(
            f"A checkpoint holds arrays, numbers, strings and containers of them, but {dotted(path)} is "
            f"{type(x).__name__}. Leave it out, or put its data there; for a schedule in a group of an optimizer, a "
            "scheduler and its state_dict."
        )
    pairs = [(_named(*keys), child) for keys, child in children]
    return {"node": [[name, encoded(child, (*path, name), arrays)] for name, child in pairs], "type": type(x).__name__}


def _named(key: Any) -> str:
    """A key of a path as JAX prints it."""
    return jax.tree_util.keystr((key,), simple=True)


def _encoded_array(x: Any, path: Path, arrays: Arrays) -> dict[str, str]:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"A checkpoint is saved outside of compiled functions, but {dotted(path)} is traced.")
    entry = {}
    if isinstance(x, jax.Array):
        if not x.is_fully_addressable:
            raise ValueError(
                f"The array {dotted(path)} is spread over several processes. Save it with orbax, which writes from all."
            )
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            entry["key"] = str(jax.random.key_impl(x))
            x = jax.random.key_data(x)
    kind = "numpy" if isinstance(x, np.ndarray) else "array"
    host = np.asarray(x, order="C")
    if host.dtype.hasobject or host.dtype.names is not None or host.dtype.kind in "USmM":
        raise TypeError(f"A checkpoint holds arrays of numbers, but {dotted(path)} has dtype {host.dtype}.")
    if host.dtype.name not in _NATIVE:
        entry["dtype"] = host.dtype.name
        host = np.frombuffer(host.tobytes(), np.uint8).reshape(*host.shape, host.dtype.itemsize)
    base = name = ".".join(path) or "array"
    for number in range(len(arrays) + 1):
        if name not in arrays and name != "__metadata__":
            break
        name = f"{base} ({number + 2})"
    arrays[name] = host
    return {kind: name, **entry}


def decoded(x: Any, arrays: Arrays, path: Path = ()) -> Any:
    """The tree that :func:`encoded` was given.

    Errors:
        :class:`Malformed`; ``ValueError`` for a node that only ``like`` can make, and for a dtype that JAX
        does not hold now.
    """
    kind, content = _opened(x)
    if kind == "plain":
        return content
    if kind in _SEQUENCES:
        return _SEQUENCES[kind]([decoded(item, arrays, (*path, str(index))) for index, item in enumerate(content)])
    if kind in _MAPPINGS:
        items = [(decoded(key, arrays), value) for key, value in content]
        items = [(key, decoded(value, arrays, (*path, _named(jax.tree_util.DictKey(key))))) for key, value in items]
        mapping = _MAPPINGS[kind](items)
        return StateDict(mapping, made_by=x["class"], names=x["names"]) if "class" in x else mapping
    if kind == "node":
        children = {name: decoded(child, arrays, (*path, name)) for name, child in content}
        if x["type"] != OptState.__name__:
            raise ValueError(
                f"The checkpoint has a {x['type']} at {dotted(path)}. Give load(path, like=...) such a tree."
            )
        return OptState(**children)
    host = _host(x, arrays)
    if kind == "numpy":
        return host
    _check_held(host.dtype, path)
    return _as_key(x, owned(host))


def decoded_like(x: Any, arrays: Arrays, like: Any) -> Any:
    """The tree in the structure, dtypes and shardings of another.

    Errors:
        As :func:`decoded`; ``ValueError`` for what does not fit, with its path.
    """
    found = dict(_leaves(x, ()))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    wanted = {tuple(map(_named, keys)): leaf for keys, leaf in leaves}
    for here, there, problem in (
        (wanted, found, "has nothing at"),
        (found, wanted, "has something that like lacks at"),
    ):
        if lacking := [path for path in here if path not in there]:
            raise ValueError(f"The checkpoint {problem} {dotted(lacking[0])} ({len(lacking)} such places).")
    return jax.tree.unflatten(treedef, [_leaf_like(found[path], arrays, path, leaf) for path, leaf in wanted.items()])


def _leaves(x: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """What JAX takes for the leaves of a tree, with their paths."""
    kind, content = _opened(x)
    if kind in _SEQUENCES:
        pairs: Sequence[tuple[str, Any]] = [(str(index), item) for index, item in enumerate(content)]
    elif kind in ("dict", "OrderedDict"):
        pairs = [(_named(jax.tree_util.DictKey(decoded(key, {}))), value) for key, value in content]
    elif kind == "node":
        pairs = content
    else:
        pairs = []
        if x is not None:
            yield path, x
    for name, child in pairs:
        yield from _leaves(child, (*path, name))


def _leaf_like(x: Any, arrays: Arrays, path: Path, like: Any) -> Any:
    """One leaf, as the one in ``like`` is."""
    kind, content = _opened(x)
    if not hasattr(like, "shape") or not hasattr(like, "dtype"):
        value = decoded(x, arrays, path)
        if type(value) is not type(like):
            raise ValueError(
                f"{dotted(path)} is {type(value).__name__} in the checkpoint, {type(like).__name__} in like."
            )
        return value
    host = np.asarray(content) if kind == "plain" else _host(x, arrays)
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    if is_key != ("key" in x if isinstance(x, dict) else False):
        raise ValueError(f"{dotted(path)} is {'no' if is_key else 'a'} PRNG key in the checkpoint, otherwise in like.")
    shape = host.shape[: len(like.shape)] if is_key else host.shape
    if shape != tuple(like.shape):
        raise ValueError(f"{dotted(path)} has shape {shape} in the checkpoint, {tuple(like.shape)} in like.")
    if is_key:
        key = _as_key(x, owned(host))
        if key.dtype != like.dtype:
            raise ValueError(f"{dotted(path)} is a {key.dtype} in the checkpoint, {like.dtype} in like.")
        return placed_like(key, like)
    if _rank(host.dtype) > _rank(like.dtype):
        raise ValueError(f"{dotted(path)} has dtype {host.dtype} in the checkpoint, which {like.dtype} cannot hold.")
    host = host.astype(like.dtype)
    return host if isinstance(like, np.ndarray) else placed_like(owned(host), like)


def _rank(dtype: Any) -> int:
    """The kind of a dtype, each of which can hold the numbers of those before it."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next(rank for rank, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind))


def _opened(x: Any) -> tuple[str, Any]:
    """What kind of thing a piece of JSON is, and its content."""
    if x is None or isinstance(x, bool | int | float | str):
        return "plain", x
    if isinstance(x, list):
        return "list", x
    kind = next(iter(x)) if isinstance(x, dict) and x else ""
    if kind == "float" and x[kind] in ("nan", "inf", "-inf"):
        return "plain", float(x[kind])
    if kind == "complex" and isinstance(x[kind], list):
        return "plain", complex(*(_opened(part)[1] for part in x[kind]))
    if kind in ("array", "numpy") and isinstance(x[kind], str):
        return kind, x[kind]
    if kind == "tuple" and isinstance(x[kind], list):
        return kind, x[kind]
    if (kind in _MAPPINGS or kind == "node") and all(isinstance(item, list) and len(item) == 2 for item in x[kind]):
        return kind, x[kind]
    raise Malformed(f"{str(x)[:100]} stands for nothing")


def _host(x: Any, arrays: Arrays) -> np.ndarray:
    """The array that a piece of JSON refers to."""
    kind, name = _opened(x)
    if kind not in ("array", "numpy") or name not in arrays:
        raise Malformed(f"there is no array {name!r}")
    host = arrays[name]
    if "dtype" not in x:
        return host
    try:
        dtype = jnp.dtype(x["dtype"])
        return np.frombuffer(host.tobytes(), dtype).reshape(host.shape[:-1])
    except (TypeError, ValueError) as error:
        raise Malformed(f"the array {name!r} cannot have dtype {x['dtype']!r}") from error


def _check_held(dtype: np.dtype, path: Path) -> None:
    """Raise for a dtype that JAX would change without a word."""
    held = jax.dtypes.canonicalize_dtype(dtype)
    if held != dtype:
        raise ValueError(
            f"{dotted(path)} has dtype {dtype}, of which JAX would make {held}. Switch jax_enable_x64 on "
            "(JAX_ENABLE_X64=1), or give load(path, like=...) a tree with the dtypes that you want."
        )


def _as_key(x: dict[str, str], array: jax.Array) -> jax.Array:
    """An array, or the typed key that it is the data of."""
    if "key" not in x:
        return array
    try:
        return jax.random.wrap_key_data(array, impl=x["key"])
    except (TypeError, ValueError) as error:
        raise Malformed(f"a PRNG key cannot be of kind {x['key']!r}") from error
