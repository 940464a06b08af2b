"""Encoding of pytrees as JSON with the arrays beside it, and back; ``docs/checkpoints.md`` describes the JSON."""

from __future__ import annotations

import math
import os
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.checkpoint.apart import Apart
from jaxoptim.core import OptState, owned
from jaxoptim.core.numerics import is_numeric, placed_like
from jaxoptim.core.placement import is_in_parts
from jaxoptim.optim.state_dicts import StateDict


class NamedArrays(dict[str, Any]):
    """A dict of arrays to be saved: NumPy's, and JAX's for those of which this process has only a part.

    Attributes:
        is_shared: whether one of them is on the devices of several processes.
    """

    is_shared = False


Path = tuple[str, ...]

_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_NATIVE = frozenset((*_INTEGERS, "bool", "float16", "bfloat16", "float32", "float64", "complex64"))
"""The dtypes that safetensors restores as they are; arrays of others are stored as their bytes."""

_MAPPINGS: dict[str, Callable[[list[Any]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda items: Counter(dict(items)),
}
_INFINITE = {repr(x): x for x in (math.nan, math.inf, -math.inf)}
_HEXADECIMAL = 1000
"""The number of bits from which an integer is written in hexadecimal, which Python reads at any length."""


class Malformed(Exception):
    """JSON that :func:`encoded` cannot have made."""


class Stored(NamedTuple):
    """An array from a file.

    Attributes:
        host: its values, or the data of a key; a JAX array if it is spread over several processes, and an
            :class:`Apart` until it is read.
        numpy: whether it was an array of NumPy.
        scalar: whether it was a scalar of NumPy.
        key: the kind of PRNG key whose data it is, or None.
    """

    host: Any
    numpy: bool
    scalar: bool
    key: str | None


class Node(NamedTuple):
    """A pytree node other than a dict, list or tuple: the name of its type, and its children."""

    type: str
    children: dict[str, Any]


def dotted(path: Path) -> str:
    """Format a path for messages."""
    return repr(".".join(path)) if path else "the whole"


def _named(key: Any) -> str:
    """Format a key of a path as JAX does."""
    return jax.tree_util.keystr((key,), simple=True)


def _entry(key: Any) -> str:
    """Format a key of a dict as JAX does."""
    return _named(jax.tree_util.DictKey(key))


# To JSON.


def encoded(x: Any, path: Path, arrays: NamedArrays, nodes: bool = True) -> Any:
    """Encode a pytree as JSON; its arrays are put into ``arrays``.

    Args:
        x: the tree.
        path: its path in the whole.
        arrays: the dict to be filled with the arrays.
        nodes: whether other nodes than dicts, lists and tuples are allowed, which only ``like`` can restore.

    Raises:
        ``TypeError`` for what is no data, with the path.
    """
    if isinstance(x, int) and x.bit_length() > _HEXADECIMAL:
        return {"int": hex(x)}
    if x is None or isinstance(x, bool | int | str):
        return x
    if isinstance(x, float):
        return float(x) if math.isfinite(x) else {"float": repr(float(x))}
    if isinstance(x, complex):
        return {"complex": [encoded(part, path, arrays) for part in (x.real, x.imag)]}
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return _encoded_array(x, path, arrays)
    if type(x) in (list, tuple):
        items = [encoded(item, (*path, str(index)), arrays, nodes) for index, item in enumerate(x)]
        return items if type(x) is list else {"tuple": items}
    if isinstance(x, dict) and type(x) in (dict, OrderedDict, Counter, defaultdict, StateDict):
        nodes = nodes and not isinstance(x, StateDict)
        places = [(*path, _entry(key)) for key in x]
        items = [
            [encoded(key, place, arrays, False), encoded(value, place, arrays, nodes)]
            for place, (key, value) in zip(places, x.items(), strict=True)
        ]
        if isinstance(x, StateDict):
            return {"dict": items, "class": x.made_by, "names": x.names}
        return {"dict" if type(x) is defaultdict else type(x).__name__: items}
    children = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)[0]
    if not nodes or any(not keys for keys, _ in children):
        if hasattr(x, "state_dict"):
            advice = "Save its state_dict()."
        elif hasattr(x, "__dlpack__"):
            advice = "Make it an array of JAX or NumPy."
        else:
            advice = "Leave it out; for a schedule in a group of an optimizer, save a scheduler's state_dict()."
        raise TypeError(
            f"A checkpoint holds arrays, numbers, strings and containers of them, but {dotted(path)} is "
            f"{type(x).__name__}. {advice}"
        )
    pairs = [(_named(*keys), child) for keys, child in children]
    return {"node": [[name, encoded(child, (*path, name), arrays)] for name, child in pairs], "type": type(x).__name__}


def _encoded_array(x: Any, path: Path, arrays: NamedArrays) -> dict[str, Any]:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"A checkpoint is saved outside of compiled functions, but {dotted(path)} is traced.")
    entry: dict[str, Any] = {}
    if isinstance(x, jax.Array):
        arrays.is_shared |= not x.is_fully_addressable
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            entry["key"] = str(jax.random.key_impl(x))
            x = jax.random.key_data(x)
    elif isinstance(x, np.generic):
        entry["scalar"] = True
    if is_in_parts(x):
        arrays[name := _free_name(path, arrays)] = x
        return {"array": name, **entry}
    host = np.asarray(x, order="C")
    if not is_numeric(host.dtype):
        raise TypeError(f"A checkpoint holds arrays of numbers, but {dotted(path)} has dtype {host.dtype}.")
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"A checkpoint holds plain arrays, but {dotted(path)} has a mask. Put that beside it.")
    host = host.astype(host.dtype.newbyteorder("="), copy=False)
    if host.dtype.name not in _NATIVE:
        entry["dtype"] = host.dtype.name
        host = np.frombuffer(host.tobytes(), np.uint8).reshape(*host.shape, host.dtype.itemsize)
    arrays[name := _free_name(path, arrays)] = host
    return {"array" if isinstance(x, jax.Array) else "numpy": name, **entry}


def _free_name(path: Path, arrays: NamedArrays) -> str:
    """Make an unused name for the array at a path."""
    base = name = ".".join(path).encode("utf-8", "backslashreplace").decode() or "array"
    for number in range(len(arrays) + 1):
        if name not in arrays and name != "__metadata__":
            break
        name = f"{base} ({number + 2})"
    return name


# From JSON.


def parsed_apart(x: Any) -> tuple[str, list[Apart]]:
    """Parse the name of the folder of the arrays that are not in a file, and references to these.

    Raises:
        As :func:`parsed`.
    """
    folder = _a(str, x["folder"])
    if os.path.basename(folder) != folder or folder in ("", ".", ".."):
        raise Malformed(f"{folder!r} is no name of a folder")
    listed = [(name, tuple(_a(int, n) for n in _a(list, shape)), dtype) for name, shape, dtype in _pairs(x["arrays"])]
    found = [Apart(_a(str, name), shape, jnp.dtype(_dtype_name(dtype))) for name, shape, dtype in listed]
    if other := [x.name for x in found if not is_numeric(x.dtype)]:
        raise Malformed(f"{other[0]!r} is no array of numbers")
    return folder, found


def parsed(x: Any, arrays: dict[str, Any]) -> Any:
    """Parse JSON into the pytree that :func:`encoded` was given, with :class:`Stored` arrays and :class:`Node` objects.

    Raises:
        :class:`Malformed`, and any other for JSON that is not of this kind.
    """
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, list):
        return [parsed(item, arrays) for item in x]
    kind, content = next(iter(x.items()))
    if kind in ("array", "numpy"):
        return _stored(kind, arrays[content], x)
    if kind == "tuple":
        return tuple(parsed(item, arrays) for item in _a(list, content))
    if kind in _MAPPINGS:
        mapping = _MAPPINGS[kind]([(_key(parsed(x, arrays)), parsed(y, arrays)) for x, y in _pairs(content)])
        if "class" not in x:
            return mapping
        names = [
            [None if name is None else _a(str, name) for name in _a(list, group)] for group in _a(list, x["names"])
        ]
        return StateDict(mapping, made_by=_a(str, x["class"]), names=names)
    if kind == "node":
        children = {_a(str, name): parsed(child, arrays) for name, child in _pairs(content)}
        # Files of format 1 have no counts: every array has made the updates of the tree.
        if x["type"] == OptState.__name__ and children.keys() | {"counts"} != set(OptState._fields):
            raise Malformed(f"an OptState has {', '.join(OptState._fields)}")
        return Node(_a(str, x["type"]), children)
    if kind == "float":
        return _INFINITE[content]
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        real, imag = (_a(float, parsed(part, arrays)) for part in content)
        return complex(real, imag)
    raise Malformed(f"{kind!r} stands for nothing")


def _a(kind: type, x: Any) -> Any:
    if type(x) is not kind:
        raise Malformed(f"{str(x)[:100]} stands where a {kind.__name__} is expected")
    return x


def _pairs(x: Any) -> list[Any]:
    return [_a(list, item) for item in _a(list, x)]


def _key(x: Any) -> Any:
    """Parse the key of a dict."""
    if isinstance(x, tuple) and not isinstance(x, Stored | Node):
        return tuple(map(_key, x))
    if x is None or isinstance(x, bool | int | float | complex | str):
        return x
    raise Malformed("the key of a dict is no plain value")


def _stored(kind: str, host: np.ndarray, x: dict[str, Any]) -> Stored:
    if "dtype" in x:
        dtype = jnp.dtype(_dtype_name(x["dtype"]))
        if dtype.name != x["dtype"] or not is_numeric(dtype):
            raise Malformed(f"{x['dtype']!r} is no dtype of numbers")
        host = np.frombuffer(bytearray(host.tobytes()), dtype).reshape(host.shape[:-1])
    key = _a(str, x["key"]) if "key" in x else None
    if key is not None:
        jax.eval_shape(lambda data: jax.random.wrap_key_data(data, impl=key), host)
    scalar = x.get("scalar", False)
    if scalar and host.shape:
        raise Malformed("a scalar has a shape")
    return Stored(host, kind == "numpy", scalar, key)


def _dtype_name(name: str) -> str:
    """Check the name of a dtype: NumPy would read some names as expressions."""
    if not _a(str, name).replace("_", "").isalnum():
        raise Malformed(f"{name!r} is no dtype")
    return name


# From what was parsed.


def decoded(x: Any, path: Path = ()) -> Any:
    """Decode the pytree that was saved.

    Raises:
        ``ValueError`` for a node that only ``like`` can make, and for a dtype that JAX does not hold now.
    """
    if isinstance(x, Stored):
        return _decoded_array(x, path)
    if isinstance(x, Node):
        if x.type != OptState.__name__:
            raise ValueError(f"It has a {x.type} at {dotted(path)}. Give load(path, like=...) such a tree.")
        return OptState(**{name: decoded(child, (*path, name)) for name, child in x.children.items()})
    if isinstance(x, list | tuple):
        return type(x)(decoded(item, (*path, str(index))) for index, item in enumerate(x))
    if isinstance(x, dict):
        new = x.copy()
        for key, value in x.items():
            new[key] = decoded(value, (*path, _entry(key)))
        return new
    return x


def _decoded_array(x: Stored, path: Path) -> Any:
    if x.numpy:
        return x.host[()] if x.scalar else x.host
    held = jax.dtypes.canonicalize_dtype(x.host.dtype)
    if held != x.host.dtype:
        raise ValueError(
            f"{dotted(path)} has dtype {x.host.dtype}, of which JAX would make {held}. Switch jax_enable_x64 on "
            "(JAX_ENABLE_X64=1), or give load(path, like=...) a tree with the dtypes that you want."
        )
    own = x.host if isinstance(x.host, jax.Array) else owned(x.host)
    return own if x.key is None else jax.random.wrap_key_data(own, impl=x.key)


def decoded_like(x: Any, like: Any) -> Any:
    """Decode a pytree into the structure, dtypes and shardings of another.

    Raises:
        As :func:`decoded`; ``ValueError`` for what does not fit, with its path.
    """
    found: dict[Path, Any] = {}
    states: list[Path] = []
    for path, leaf in _leaves(x, (), states):
        if path in found:
            raise ValueError(f"It has two things at {dotted(path)}, which like cannot tell apart.")
        found[path] = leaf
    wanted, treedef = _wanted(like)
    paths = {path for path, _ in wanted}
    for state in states:  # an array that has missed no update, and so has no count of its own, has the tree's
        own = [path for path in paths if path[: len(state) + 1] == (*state, "counts")]
        found |= {path: found[*state, "step"] for path in own if path not in found}
    if missing := [path for path, _ in wanted if path not in found]:
        raise ValueError(f"It has nothing at {dotted(missing[0])}, but like has ({len(missing)} such).")
    if extra := [path for path in found if path not in paths]:
        raise ValueError(f"It has something that like lacks at {dotted(extra[0])} ({len(extra)} such).")
    return jax.tree.unflatten(treedef, [_leaf_like(found[path], path, leaf) for path, leaf in wanted])


def places(x: Any, like: Any) -> dict[str, Any]:
    """Map the names of arrays still to be read to their shardings in another pytree of the same structure."""
    wanted, found = dict(_wanted(like)[0]), dict[str, Any]()
    for path, stored in _leaves(x, (), []):
        apart, its = getattr(stored, "host", None), wanted.get(path)
        sharding = getattr(its, "sharding", None)
        if its is None or sharding is None or not isinstance(apart, Apart):
            continue
        if stored.key is not None or (its.shape, its.dtype) == (apart.shape, apart.dtype):
            found[apart.name] = sharding  # another dtype, or shape, is converted or refused on the host
    return found


def _wanted(like: Any) -> tuple[list[tuple[Path, Any]], Any]:
    """Flatten a pytree into leaves with paths, and its structure; a state dict counts as a leaf."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=lambda x: isinstance(x, StateDict))
    return [(tuple(map(_named, keys)), leaf) for keys, leaf in leaves], treedef


def _leaves(x: Any, path: Path, states: list[Path]) -> Iterator[tuple[Path, Any]]:
    """Yield the leaves of a pytree and state dicts, with paths; put the paths of each ``OptState`` into ``states``."""
    if isinstance(x, Node):
        if x.type == OptState.__name__:
            states.append(path)
        children = list(x.children.items())
    elif isinstance(x, list | tuple) and not isinstance(x, Stored):
        children = [(str(index), item) for index, item in enumerate(x)]
    elif isinstance(x, dict) and type(x) not in (Counter, StateDict):
        children = [(_entry(key), value) for key, value in x.items()]
    else:
        children = []
        if x is not None:
            yield path, x
    for name, child in children:
        yield from _leaves(child, (*path, name), states)


def _leaf_like(x: Any, path: Path, like: Any) -> Any:
    """Decode one leaf with the type, dtype and sharding of the one in ``like``."""
    if not hasattr(like, "shape") or not hasattr(like, "dtype"):
        value = decoded(x, path)
        if type(value) is not type(like):
            raise ValueError(
                f"{dotted(path)} is {type(value).__name__} in the checkpoint, {type(like).__name__} in like."
            )
        return value
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    if is_key or (isinstance(x, Stored) and x.key is not None):
        value = decoded(x, path)
        found = getattr(value, "dtype", type(value).__name__)
        if found != like.dtype:
            raise ValueError(f"{dotted(path)} is {found} in the checkpoint, {like.dtype} in like.")
    elif isinstance(x, Stored) and isinstance(x.host, jax.Array):
        return x.host
    else:
        value = _converted(x, path, like.dtype)
    if value.shape != tuple(like.shape):
        raise ValueError(f"{dotted(path)} has shape {value.shape} in the checkpoint, {tuple(like.shape)} in like.")
    return value if isinstance(like, np.ndarray) else placed_like(value if is_key else owned(value), like)


def _converted(x: Any, path: Path, dtype: Any) -> np.ndarray:
    """Convert an array or number to a dtype that can hold its value, if not all of its digits."""
    host = x.host if isinstance(x, Stored) else np.asarray(x)
    if not is_numeric(host.dtype) or _rank(host.dtype) > _rank(dtype):
        kind = f"dtype {host.dtype}" if is_numeric(host.dtype) else type(x).__name__
        raise ValueError(f"{dotted(path)} has {kind} in the checkpoint, which {dtype} cannot hold.")
    with np.errstate(over="ignore"):
        new = host.astype(dtype)
    lost = new != host if jnp.issubdtype(dtype, jnp.integer) else np.isinf(new) & ~np.isinf(host)
    if np.any(lost):
        raise ValueError(f"{dotted(path)} has numbers in the checkpoint that {dtype} cannot hold.")
    return new


def _rank(dtype: Any) -> int:
    """Rank the kind of a dtype: each kind can hold the numbers of those before it."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next(rank for rank, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind))
