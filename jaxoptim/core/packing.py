"""Packing of many small arrays into one buffer, as a view of the pytree that they came from.

A compiled call costs some microseconds for each array that goes in or out, whatever its size, and compile
time grows with their number. A thousand small arrays packed into one buffer cost as much as one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import trees
from jaxoptim.core.numerics import explicit_sharding

_GROUP = 32
"""The most arrays that one operation joins or splits.

One concatenate of a thousand cotangents would be fused, producers included, into every loop that reads the
packed gradient, and double the compile time; a tree of small ones is not.
"""


@dataclasses.dataclass(frozen=True)
class _Place:
    """The place of one array of the tree: its buffer (None: it stands on its own), and its shape there."""

    name: str
    shape: tuple[int, ...]
    buffer: int | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class _Layout:
    """The static half of a :class:`Packed`, compared by identity and with a cached hash, so that dispatch is cheap."""

    def __init__(self, treedef: Any, places: tuple[_Place, ...], buffers: tuple[str, ...]) -> None:
        # Nothing here changes after it is made: compiled programs and states of optimizers hold it.
        self.treedef, self.places, self.buffers = treedef, places, buffers
        self._hash = hash((treedef, places, buffers))
        self.positions: list[int] = []
        """The offset of each array in its buffer, or its index among the large ones."""
        sizes = [0] * len(buffers)
        large = 0
        for place in places:
            if place.buffer is None:
                self.positions.append(large)
                large += 1
            else:
                self.positions.append(sizes[place.buffer])
                sizes[place.buffer] += place.size
        self.sizes = tuple(sizes)

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

    Examples:
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
        """Rebuild the pytree with its arrays.

        The transpose of this function is a concatenation, so gradients through it are cheap.

        Returns:
            A tree of the structure, shapes and dtypes that were packed.
        """
        large = iter(self._large)
        pieces = [iter(self._pieces(index, buffer)) for index, buffer in enumerate(self._buffers)]
        leaves = [next(large) if place.buffer is None else next(pieces[place.buffer]) for place in self._layout.places]
        return jax.tree.unflatten(self._layout.treedef, leaves)

    def pack(self, tree: Any, what: str = "tree") -> Packed:
        """Pack another pytree of the same structure and shapes, such as gradients, with this layout.

        Args:
            tree: the tree to pack.
            what: its name in error messages.

        Returns:
            A ``Packed`` whose dtypes are those of ``tree``.

        Raises:
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
        return Packed(tuple(join(group) for group in members), tuple(large), self._layout)

    def get(self, index: int) -> Any:
        """Return one array of the pytree without unpacking the others.

        Args:
            index: which, in the order of the tree's leaves.

        Returns:
            The large array itself, or a copy of a small one's part of its buffer.
        """
        place, position = self._layout.places[index], self._layout.positions[index]
        if place.buffer is None:
            return self._large[position]
        buffer = self._buffers[place.buffer]
        return buffer if self._is_shared(place.buffer) else part(buffer, position, place.shape)

    def set(self, index: int, value: Any) -> Packed:
        """Return the tree with another array in one place.

        Args:
            index: which, in the order of the tree's leaves.
            value: the new array, of the same shape and dtype.

        Returns:
            A new ``Packed``; this one is left as it is. Of a slot that holds one number for all arrays of a
            buffer (NAdam's ``mu_product``), that number is replaced.
        """
        place, position = self._layout.places[index], self._layout.positions[index]
        if place.buffer is None:
            large = (*self._large[:position], value, *self._large[position + 1 :])
            return Packed(self._buffers, large, self._layout)
        buffer = self._buffers[place.buffer]
        buffer = value if self._is_shared(place.buffer) else with_part(buffer, position, value)
        buffers = (*self._buffers[: place.buffer], buffer, *self._buffers[place.buffer + 1 :])
        return Packed(buffers, self._large, self._layout)

    def _pieces(self, index: int, buffer: Any) -> list[Any]:
        """Split one buffer, which may have leading batch axes as after a ``vmap``, into its arrays."""
        members = [
            (place.shape, position)
            for place, position in zip(self._layout.places, self._layout.positions, strict=True)
            if place.buffer == index
        ]
        if self._is_shared(index):
            return [buffer for _ in members]
        if not isinstance(buffer, jax.core.Tracer):
            return read(buffer, members)
        batch = buffer.shape[:-1]
        parts = split(buffer, [math.prod(shape) for shape, _ in members])
        return [part.reshape(batch + shape) for part, (shape, _) in zip(parts, members, strict=True)]

    def _is_shared(self, index: int) -> bool:
        """Whether a buffer holds a slot with one number per array, which all arrays of the buffer share."""
        return self._buffers[index].shape[-1:] != (self._layout.sizes[index],)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Return the leaves, named by dtype or by path, and the layout."""
        key = jax.tree_util.DictKey
        large = [place.name for place in self._layout.places if place.buffer is None]
        children = [(key(name), x) for name, x in zip(self._layout.buffers, self._buffers, strict=True)]
        children += [(key(name), x) for name, x in zip(large, self._large, strict=True)]
        return children, self._layout

    def tree_flatten(self) -> tuple[Any, Any]:
        """Return the leaves and the layout."""
        return (*self._buffers, *self._large), self._layout

    @classmethod
    def tree_unflatten(cls, layout: _Layout, children: Any) -> Packed:
        """Rebuild the view with other leaves in the same layout."""
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

    Raises:
        ``TypeError`` if ``tree`` is packed already, and for a leaf that is no array, by its name.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim
        >>> jaxoptim.pack([jnp.ones(3), jnp.ones((2, 2)), jnp.ones((200, 200))])
        Packed(3 arrays in 2 leaves)
    """
    if isinstance(tree, Packed):
        raise TypeError("pack was given a Packed, which is packed already. Use it as it is, or unpack() it first.")
    leaves = zip(trees.names(tree), jax.tree.leaves(tree, is_leaf=trees.is_leaf), strict=True)
    arrays = [(name, trees.as_array("parameter", name, leaf)) for name, leaf in leaves if leaf is not None]
    kinds = [str(x.dtype) if x.size <= max_size and not is_sharded(x) else None for _, x in arrays]
    buffers = tuple(sorted({kind for kind in kinds if kind is not None}))
    places = tuple(
        _Place(name, x.shape, None if kind is None else buffers.index(kind))
        for (name, x), kind in zip(arrays, kinds, strict=True)
    )
    return Packed((), (), _Layout(jax.tree.structure(tree), places, buffers)).pack(tree)


def unpacked(tree: Any) -> Any:
    """Unpack a :class:`Packed`; return any other pytree as it is."""
    return tree.unpack() if isinstance(tree, Packed) else tree


def is_sharded(x: Any) -> bool:
    """Whether an array is laid out over several devices, as far as that is known."""
    if isinstance(x, jax.core.Tracer):
        return explicit_sharding(x) is not None
    return isinstance(x, jax.Array) and len(x.sharding.device_set) > 1


def read(buffer: jax.Array, members: list[tuple[tuple[int, ...], int]], is_whole: bool = False) -> list[jax.Array]:
    """Read the arrays of these shapes and offsets from a buffer, by programs specialized to shapes alone.

    A program for a whole layout would have a kernel for each offset, and compile for seconds.
    """
    pieces: list[Any] = [None] * len(members)
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, (shape, _) in enumerate(members):
        alike.setdefault(shape, []).append(index)
    for shape, indices in alike.items():
        whole = len(indices) // _GROUP * _GROUP
        for start in range(0, whole, _GROUP):
            group = indices[start : start + _GROUP]
            offsets = np.array([members[index][1] for index in group], np.int32)
            for index, piece in zip(group, _parts(buffer, offsets, shape, is_whole), strict=True):
                pieces[index] = piece
        for index in indices[whole:]:
            pieces[index] = part(buffer, members[index][1], shape, is_whole)
    return pieces


@functools.partial(jax.jit, static_argnames=("shape", "is_whole"))
def _parts(buffer: jax.Array, offsets: Any, shape: tuple[int, ...], is_whole: bool) -> list[jax.Array]:
    """Read several arrays of one shape."""
    return [part(buffer, offsets[i], shape, is_whole) for i in range(len(offsets))]


@functools.partial(jax.jit, static_argnames=("shape", "is_whole"))
def part(buffer: jax.Array, offset: Any, shape: tuple[int, ...], is_whole: bool = False) -> jax.Array:
    """Read one array of a buffer; the offset is traced, so that arrays of one shape share the program.

    Args:
        buffer: flat, or with axes of a batch in front.
        offset: the array's first position.
        shape: the array's shape.
        is_whole: whether all axes of the buffer are its own, instead of a batch (default False).
    """
    buffer = buffer.reshape(-1) if is_whole else buffer
    part = jax.lax.dynamic_slice_in_dim(buffer, offset, math.prod(shape), buffer.ndim - 1)
    return part.reshape(buffer.shape[:-1] + shape)


@jax.jit
def with_part(buffer: jax.Array, offset: Any, value: jax.Array) -> jax.Array:
    """Return the buffer with one array replaced."""
    return jax.lax.dynamic_update_slice(buffer.reshape(-1), value.reshape(-1), (offset,)).reshape(buffer.shape)


@functools.partial(jax.jit, static_argnames="group")
def join(arrays: list[jax.Array], group: int = _GROUP) -> jax.Array:
    """Concatenate arrays into one flat array, through concatenations of at most ``group`` arrays each.

    The barrier keeps the compiler from merging them again: most are of equal shapes, and equal kernels are
    compiled once. Of arrays of many shapes, a few small ones compile faster than one large one.
    """
    arrays = [x.reshape(-1) for x in arrays]
    while len(arrays) > group:
        size = -(-len(arrays) // -(-len(arrays) // group))  # none much smaller, which would be fused after all
        groups = [jnp.concatenate(arrays[i : i + size]) for i in range(0, len(arrays), size)]
        arrays = list(jax.lax.optimization_barrier(groups))
    return jnp.concatenate(arrays)


def split(buffer: jax.Array, sizes: list[int]) -> list[jax.Array]:
    """Split the last axis of a buffer into parts, by a tree of operations with at most ``_GROUP`` results each."""
    axis = buffer.ndim - 1
    if len(sizes) <= _GROUP:
        return list(jax.lax.split(buffer, sizes, axis))
    groups = [sizes[i : i + _GROUP] for i in range(0, len(sizes), _GROUP)]
    parts = split(buffer, [sum(group) for group in groups])
    return [piece for group, part in zip(groups, parts, strict=True) for piece in jax.lax.split(part, group, axis)]
