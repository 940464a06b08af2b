"""Many small arrays in one buffer, as a view of the tree they came from.

A compiled call costs some microseconds for each array that goes in or out, whatever its size, and compile
time grows with their number. A thousand small arrays packed into one buffer cost as much as one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxoptim.core import trees
from jaxoptim.core.numerics import explicit_spec

_GROUP = 32
"""Arrays joined or split by one operation.

One concatenate of a thousand cotangents would be fused, producers included, into every loop that reads the
packed gradient, and double the compile time; a tree of small ones is not.
"""


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one array of the tree is kept: the buffer (None: on its own), and its shape there."""

    name: str
    shape: tuple[int, ...]
    buffer: int | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class _Layout:
    """The static half of a :class:`Packed`; compared at every dispatch, so identity decides and the hash is kept."""

    def __init__(self, treedef: Any, places: tuple[_Place, ...], buffers: tuple[str, ...]) -> None:
        self.treedef, self.places, self.buffers = treedef, places, buffers
        self._hash = hash((treedef, places, buffers))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, _Layout)
            and self._hash == other._hash
            and self.treedef == other.treedef
            and self.places == other.places
            and self.buffers == other.buffers
        )


@jax.tree_util.register_pytree_with_keys_class
class Packed:
    """A pytree as one flat buffer for each dtype of its small arrays, and its large arrays as they are.

    Made by :func:`pack`. It is a pytree itself, whose leaves are the buffers and the large arrays: every
    function of this library takes it in the place of ``params`` (elementwise rules run on the buffers,
    the others on the unpacked tree), and so do ``jax.grad``, ``jit`` and checkpointers.

    Example:
        >>> import jax, jax.numpy as jnp, jaxoptim
        >>> params = jaxoptim.pack({"w": jnp.ones((2, 3)), "b": jnp.zeros(3)})
        >>> [leaf.shape for leaf in jax.tree.leaves(params)]
        [(9,)]
        >>> loss = lambda params: jnp.sum(params.unpack()["w"] ** 2)
        >>> jax.grad(loss)(params).unpack()["w"].shape
        (2, 3)
    """

    def __init__(self, buffers: tuple[Any, ...], large: tuple[Any, ...], layout: _Layout) -> None:
        self._buffers, self._large, self._layout = buffers, large, layout

    def unpack(self) -> Any:
        """The tree with its arrays.

        The transpose of this function is a concatenation, so gradients through it are cheap.

        Returns:
            A tree of the structure, shapes and dtypes that were packed.
        """
        large = iter(self._large)
        pieces = [iter(self._pieces(index, buffer)) for index, buffer in enumerate(self._buffers)]
        leaves = [next(large) if place.buffer is None else next(pieces[place.buffer]) for place in self._layout.places]
        return jax.tree.unflatten(self._layout.treedef, leaves)

    def pack(self, tree: Any, what: str = "tree") -> Packed:
        """Another tree of the same structure and shapes, such as gradients, packed as this one.

        Args:
            tree: the tree to pack.
            what: its name in error messages.

        Returns:
            A ``Packed`` whose dtypes are those of ``tree``.

        Errors:
            ``ValueError`` that names the parameter whose gradient is missing or has another shape.
        """
        like = jax.tree.unflatten(self._layout.treedef, self._layout.places)
        places = jax.tree.leaves(like, is_leaf=trees.is_leaf)
        members: list[list[jax.Array]] = [[] for _ in self._layout.buffers]
        large: list[jax.Array] = []
        for leaf, place in zip(trees.leaves_like(tree, like, what), places, strict=True):
            if place is None:
                continue
            if leaf is None:
                raise ValueError(
                    f"{what} is None at {place.name!r}, but the packed parameters are updated as one buffer. "
                    "Give zeros, or leave the parameters unpacked."
                )
            leaf = jnp.asarray(leaf)
            trees.check_shape(what, place.name, leaf, place)
            (large if place.buffer is None else members[place.buffer]).append(leaf)
        buffers = tuple(_join([leaf.reshape(-1) for leaf in group]) for group in members)
        return Packed(buffers, tuple(large), self._layout)

    def _pieces(self, index: int, buffer: Any) -> list[Any]:
        """The arrays of one buffer, which may have axes in front of its own, as after a ``vmap``."""
        places = [place for place in self._layout.places if place.buffer == index]
        sizes = [place.size for place in places]
        if buffer.shape[-1:] != (sum(sizes),):  # a slot with one number for each array: all members share it
            return [buffer for _ in places]
        batch = buffer.shape[:-1]
        return [piece.reshape(batch + place.shape) for piece, place in zip(_split(buffer, sizes), places, strict=True)]

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """The leaves, named by dtype or by path, and the layout."""
        key = jax.tree_util.DictKey
        large = [place.name for place in self._layout.places if place.buffer is None]
        children = [(key(name), x) for name, x in zip(self._layout.buffers, self._buffers, strict=True)]
        children += [(key(name), x) for name, x in zip(large, self._large, strict=True)]
        return children, self._layout

    def tree_flatten(self) -> tuple[Any, Any]:
        """The leaves and the layout."""
        return (*self._buffers, *self._large), self._layout

    @classmethod
    def tree_unflatten(cls, layout: _Layout, children: Any) -> Packed:
        """The view of other leaves in the same layout."""
        children, count = tuple(children), len(layout.buffers)
        return cls(children[:count], children[count:], layout)

    def __repr__(self) -> str:
        leaves, arrays = len(self._buffers) + len(self._large), len(self._layout.places)
        return f"Packed({arrays} arrays in {leaves} leaves)"


def pack(tree: Any, max_size: int = 16384) -> Packed:
    """Pack the small arrays of a pytree into one flat buffer for each dtype.

    Args:
        tree: a pytree of arrays; None leaves stay None.
        max_size: arrays of at most this many elements are packed (default 16384). Larger ones, and arrays
            sharded over several devices, are left as they are: to copy them would cost more than it saves.

    Returns:
        A :class:`Packed`; ``.unpack()`` gives the tree back.

    Errors:
        ``TypeError`` if ``tree`` is packed already.

    Example:
        >>> import jax.numpy as jnp, jaxoptim
        >>> jaxoptim.pack([jnp.ones(3), jnp.ones((2, 2)), jnp.ones((200, 200))])
        Packed(3 arrays in 2 leaves)
    """
    if isinstance(tree, Packed):
        raise TypeError("pack was given a Packed, which is packed already. Use it as it is, or unpack() it first.")
    leaves = zip(trees.names(tree), jax.tree.leaves(tree, is_leaf=trees.is_leaf), strict=True)
    arrays = [(name, jnp.asarray(leaf)) for name, leaf in leaves if leaf is not None]
    kinds = [str(x.dtype) if x.size <= max_size and not _is_sharded(x) else None for _, x in arrays]
    buffers = tuple(sorted({kind for kind in kinds if kind is not None}))
    places = tuple(
        _Place(name, x.shape, None if kind is None else buffers.index(kind))
        for (name, x), kind in zip(arrays, kinds, strict=True)
    )
    return Packed((), (), _Layout(jax.tree.structure(tree), places, buffers)).pack(tree)


def _is_sharded(x: jax.Array) -> bool:
    """Whether an array is laid out over several devices, as far as that is known."""
    if isinstance(x, jax.core.Tracer):
        return explicit_spec(x) is not None
    return len(x.sharding.device_set) > 1


def _join(arrays: list[jax.Array]) -> jax.Array:
    """Flat arrays as one, through concatenations of at most ``_GROUP`` arrays each.

    The barrier keeps the compiler from merging them again: most are of equal shapes, and equal kernels are
    compiled once.
    """
    while len(arrays) > _GROUP:
        groups = [jnp.concatenate(arrays[i : i + _GROUP]) for i in range(0, len(arrays), _GROUP)]
        arrays = list(jax.lax.optimization_barrier(groups))
    return jnp.concatenate(arrays)


def _split(buffer: jax.Array, sizes: list[int]) -> list[jax.Array]:
    """The last axis of a buffer in parts, by a tree of operations with at most ``_GROUP`` results each."""
    axis = buffer.ndim - 1
    if len(sizes) <= _GROUP:
        return list(jax.lax.split(buffer, sizes, axis))
    groups = [sizes[i : i + _GROUP] for i in range(0, len(sizes), _GROUP)]
    parts = _split(buffer, [sum(group) for group in groups])
    return [piece for group, part in zip(groups, parts, strict=True) for piece in jax.lax.split(part, group, axis)]
