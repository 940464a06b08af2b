"""The Gaussian noise of the samplers."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxoptim.core.numerics import is_complex, view_as_complex
from jaxoptim.core.shown import shown

IMPLS = ("key", "hash")

_FEW, _MANY = 512, 2**32
"""The sizes between which random bits are materialized as an array on a CPU."""
_PARTS = 8
_Words = tuple[Any, Any]  # the high and the low 32 bits of a number of 64, as uint32; None for high ones of zero
_Key = tuple[Any, Any, Any]  # a key of threefry2x32, and the word that its rounds add
_Lane = tuple[Any, Any, Any, Any]  # what is added to low words, mixed with high ones, the step, and the hash of zero


def normal(key: Any, shape: tuple[int, ...], dtype: Any, impl: str = "key") -> jax.Array:
    r"""Draw standard normal numbers in one pass over memory.

    Number :math:`i` is a function of the key :math:`k` and of its own row-major offset alone, whatever the shape, so
    that the compiler can fuse the noise with what uses it and split it over devices:

    .. math::
        x_i = \sqrt2\,\mathrm{erf}^{-1}(u_i), \qquad
        u_i = -1 + 2^{-b-1} + 2^{1-b} \lfloor 2^b\, w_k(i) \rfloor, \qquad w_k(i) \in [0, 1),

    with :math:`b = 23` random bits for float32 and 52 for float64. The numbers therefore end at -5.42 and 5.22 in
    float32, at -8.29 and 8.16 in float64.

    - ``"key"``: the numbers of ``jax.random.normal``, to the last bit. For keys of threefry2x32, JAX's default, the
      rounds are written out here, as JAX does on accelerators but not on a CPU, where it loops over them in memory;
      and ``jax_threefry_partitionable`` is always taken as on.
    - ``"hash"``: :math:`w` is the hash :math:`m(m(c\,i + a) \oplus m(h \oplus b))`, where :math:`m` is Wellons's
      lowbias32, :math:`h` the part of the offset above 32 bits, and the words :math:`a`, :math:`b` and odd :math:`c`
      are drawn from the key by threefry2x32. On a CPU it takes 0.6 times as long. It passes the tests of distribution,
      tails and correlation (within an array, and of steps, arrays, chains and similar keys) in ``tests/test_noise.py``.

    Args:
        key: One typed key, of any implementation.
        shape: The shape of the result.
        dtype: float32 or float64.
        impl: One of ``IMPLS``.

    Returns:
        An array of ``shape`` and ``dtype``; as everywhere in JAX, float64 is float32 unless x64 is enabled.

    Raises:
        ``ValueError`` for another ``impl`` and for an array of keys, ``TypeError`` for a key that is not typed and for
        another dtype.

    References:
        Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011), for threefry.
        Wellons: Prospecting for hash functions (2018), https://nullprogram.com/blog/2018/07/31/, for lowbias32.

    Examples:
        >>> import jax
        >>> from jaxoptim.core.noise import normal
        >>> key = jax.random.key(0)
        >>> bool((normal(key, (3,), "float32") == jax.random.normal(key, (3,), "float32")).all())
        True
    """
    check_impl(impl)
    check_key(key)
    canonical = jnp.zeros((), dtype).dtype  # and JAX's warning, where it truncates
    if canonical not in (jnp.float32, jnp.float64):
        raise TypeError(f"dtype must be float32 or float64, got {canonical}")
    return _normal(key, tuple(map(operator.index, shape)), canonical, impl)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["shape", "dtype", "impl"])
@dataclasses.dataclass(frozen=True)
class Draw:
    """Numbers of :func:`normal` that are not computed before they are used.

    Attributes:
        words: what an implementation reads of a threefry2x32 key, as scalars.
        shape: the shape of the numbers.
        dtype: float32 or float64.
        impl: one of ``IMPLS``.
    """

    words: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    impl: str

    def numbers(self) -> jax.Array:
        """Return the numbers, in the form that XLA compiles best."""
        return _of_words(self.words, self.shape, self.dtype, self.impl)

    def numbers_in(self, shape: tuple[int, ...]) -> jax.Array:
        """Return the numbers in another shape of as many, each from its own offset alone."""
        return _gaussian(_bits(self.words, *_places(shape), self.dtype, self.impl), self.dtype)


def drawn_for(like: Any, noise: Any) -> jax.Array:
    """Return noise, an array or a :class:`Draw`, for an array like another: complex numbers take one for each part."""
    numbers = noise.numbers() if isinstance(noise, Draw) else noise
    return view_as_complex(numbers) if is_complex(like) else numbers


def normals(keys: jax.Array, likes: Sequence[Any], impl: str = "key") -> list[Any]:
    """Draw the numbers of :func:`normal` for several arrays, in fewer kernels on a TPU.

    Args:
        keys: One typed key for each array.
        likes: Arrays, or their shapes and dtypes.
        impl: One of ``IMPLS``.

    Returns:
        For each a :class:`Draw`, or, for keys of other implementations than threefry2x32, an array.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim.core.noise import normal, normals
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> first, second = normals(keys, [jnp.zeros(3), jnp.zeros((2, 2))])
        >>> bool((second.numbers() == normal(keys[1], (2, 2), "float32")).all())
        True
    """
    forms = [(tuple(like.shape), np.dtype(like.dtype), impl) for like in likes]
    if impl == "key" and jax.random.key_impl(keys) != "threefry2x32":
        return [_normal(key, *form) for key, form in zip(keys, forms, strict=True)]
    if not forms:
        return []
    rows = jax.random.key_data(keys)
    data = [rows[:, at] for at in range(rows.shape[1])]
    if len(forms) == 1:  # TPUs fuse nothing that is done to single numbers; the compiler may not see that two are one
        data = lax.optimization_barrier([jnp.broadcast_to(word, 2) for word in data])
    dtypes = dict.fromkeys(dtype for _, dtype, _ in forms)
    # By one operation, not one for each array.
    words = {dtype: lax.optimization_barrier(_words_of(data, impl, dtype)) for dtype in dtypes}
    return [Draw(jax.tree.map(operator.itemgetter(at), words[form[1]]), *form) for at, form in enumerate(forms)]


def part_of_normal(key: Any, size: int, start: int, stop: int, dtype: Any, impl: str = "key") -> jax.Array:
    """Draw the numbers from ``start`` to ``stop`` of a vector of :func:`normal`, without the others.

    Args:
        key: One typed key. (Of another implementation than threefry2x32, ``"key"`` draws the whole vector.)
        size: The length of the vector.
        start: The index of the first number.
        stop: The index after the last number.
        dtype: float32 or float64.
        impl: One of ``IMPLS``.

    Returns:
        ``(stop - start,)``.

    Examples:
        >>> import jax
        >>> from jaxoptim.core.noise import normal, part_of_normal
        >>> key = jax.random.key(0)
        >>> bool((part_of_normal(key, 9, 2, 5, "float32") == normal(key, (9,), "float32")[2:5]).all())
        True
    """
    if stop - start == size:
        return normal(key, (size,), dtype, impl)
    if size > 2**32 or (impl == "key" and jax.random.key_impl(key) != "threefry2x32"):
        return normal(key, (size,), dtype, impl)[start:stop]

    def within() -> _Words:
        low = lax.iota(jnp.uint32, stop - start) + np.uint32(start)
        return None, low

    canonical = jnp.zeros((), dtype).dtype
    return _numbers(_words_of(list(jax.random.key_data(key)), impl, canonical), within, canonical, impl)


def fold_in(key: jax.Array, *data: Any) -> jax.Array:
    """Compute the key of ``jax.random.fold_in`` in a program that compiles faster, and runs as few kernels on a TPU.

    Args:
        key: One typed key.
        data: Numbers below 2**32 that are folded in one after the other. Arrays of them, which are broadcast together,
            are for an array of keys.

    Returns:
        A key, or as many as there are numbers.

    Examples:
        >>> import jax
        >>> from jaxoptim.core.noise import fold_in
        >>> key = jax.random.key(0)
        >>> bool(fold_in(key, 3, 5) == jax.random.fold_in(jax.random.fold_in(key, 3), 5))
        True
    """
    counters = jnp.broadcast_arrays(*(jnp.asarray(x).astype(jnp.uint32) for x in data))
    if jax.random.key_impl(key) != "threefry2x32":
        return functools.reduce(jnp.vectorize(jax.random.fold_in), counters, key)
    high, low = jax.random.key_data(key)
    shape, size = counters[0].shape, counters[0].size
    for counter in counters:
        # TPUs fuse nothing that is done to single numbers, so that each of a hundred operations would be a kernel. The
        # compiler may not see that all numbers are one.
        line = lax.optimization_barrier(jnp.broadcast_to(counter.reshape(-1), 2 if size == 1 else size))
        high, low = _threefry(_scheduled(high, low), jnp.zeros_like(line), line)
    folded = jnp.stack((high, low), -1)[:size].reshape(*shape, 2)
    # Fused with what uses the key, the rounds would be compiled, and run, once more for each use.
    return jax.random.wrap_key_data(lax.optimization_barrier(folded))


def words(key: jax.Array, count: int) -> jax.Array:
    """Compute the random words of ``jax.random.bits`` in a program that compiles faster on a CPU.

    Args:
        key: One typed key.
        count: The number of words.

    Returns:
        ``(count,)``, uint32.

    Examples:
        >>> import jax
        >>> from jaxoptim.core.noise import words
        >>> words(jax.random.key(0), 3).tolist() == jax.random.bits(jax.random.key(0), (3,)).tolist()
        True
    """
    if jax.random.key_impl(key) != "threefry2x32":
        return jax.random.bits(key, (count,))
    high, low = _threefry(_scheduled(*jax.random.key_data(key)), *offsets((count,)))
    return high ^ low


def check_impl(impl: Any) -> None:
    """Raise for an unknown implementation."""
    if impl not in IMPLS:
        raise ValueError(f"Invalid noise_impl: {shown(impl)}. It must be one of {', '.join(map(repr, IMPLS))}.")


def check_key(key: Any) -> None:
    """Raise for anything but a typed key."""
    if not is_key(key):
        given = f"{key.dtype} of shape {key.shape}" if hasattr(key, "dtype") else type(key).__name__
        raise TypeError(
            f"key must be a typed key, but got {given}. Make one with jax.random.key(seed), or with "
            "jax.random.wrap_key_data(key) of a raw one."
        )
    if key.shape:
        raise ValueError(f"key must be one key, got an array of keys of shape {key.shape}: use jax.vmap over them")


def is_key(x: Any) -> bool:
    """Whether an object is a typed key, or an array of them."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _words_of(data: Sequence[jax.Array], impl: str, dtype: np.dtype) -> Any:
    """Return the words that an implementation needs of the data of a key, or of a line of keys."""
    if impl == "key":
        return _scheduled(data[0], data[1])
    # Arrays of both dtypes may be drawn with one key, but lanes differ.
    return tuple(_lane(data, lane) for lane in ((0,) if dtype == jnp.float32 else (1, 2)))


def _numbers(words: Any, offsets: Callable[[], _Words], dtype: np.dtype, impl: str) -> jax.Array:
    """Compute the normal numbers at some offsets, which are given as two words each."""

    def bits(words: Any) -> jax.Array:
        return _bits(words, *offsets(), dtype, impl)

    if not _FEW <= math.prod(jax.eval_shape(bits, words).shape) < _MANY:
        return _gaussian(bits(words), dtype)
    return _gaussian(lax.platform_dependent(words, cpu=_once(bits), default=bits), dtype)


def _bits(words: Any, high: jax.Array | None, low: jax.Array, dtype: np.dtype, impl: str) -> jax.Array:
    """Compute the random bits at some offsets, as many as a number of the dtype has."""
    if impl == "key":
        high, low = _threefry(words, jnp.zeros_like(low) if high is None else high, low)
        # JAX makes 32 bits of the 64 that it has in this way.
        return high ^ low if dtype == jnp.float32 else _join(high, low)
    drawn = [_hashed(lane, high, low) for lane in words]
    return drawn[0] if dtype == jnp.float32 else _join(*drawn)


def _once(bits: Callable[[Any], jax.Array]) -> Callable[[Any], jax.Array]:
    """Wrap a function of words so that XLA materializes its result.

    XLA on CPUs fuses the computation of bits with each use of them, and so repeats it up to three times: for the two
    terms of a number, and for the norm of the noise. It does not fuse across a condition that it cannot foresee.
    """

    def call(words: Any) -> jax.Array:
        word, form = jax.tree.leaves(words)[-1], jax.eval_shape(bits, words)
        is_true = ((word & 1) + 2) // 2 == 1  # of any word
        return lax.cond(is_true, bits, lambda words: jnp.broadcast_to(word.astype(form.dtype), form.shape), words)

    return call


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype, impl: str) -> jax.Array:
    if impl == "key" and jax.random.key_impl(key) != "threefry2x32":
        return jax.random.normal(key, shape, dtype)
    return _of_words(_words_of(list(jax.random.key_data(key)), impl, dtype), shape, dtype, impl)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _of_words(words: Any, shape: tuple[int, ...], dtype: np.dtype, impl: str) -> jax.Array:
    def at_once(words: Any) -> jax.Array:
        return _numbers(words, lambda: _places(shape), dtype, impl)

    def in_parts(words: Any) -> jax.Array:
        part = lax.iota(jnp.uint32, -(-size // _PARTS))
        starts = lax.iota(jnp.uint32, _PARTS) * np.uint32(part.size)
        parts = lax.map(lambda start: _gaussian(_bits(words, None, start + part, dtype, impl), dtype), starts)
        return parts.reshape(-1)[:size].reshape(shape)

    # XLA's loops on a CPU use vector instructions along the last axis only, and without them a number takes seven times
    # as long. A reshape would not help, as XLA moves it before the computation; a loop over parts it leaves as it is.
    size = math.prod(shape)
    if len(shape) > 1 and shape[-1] < 64 and _FEW <= size < _MANY - _PARTS:
        return lax.platform_dependent(words, cpu=in_parts, default=at_once)
    return at_once(words)


def offsets(shape: tuple[int, ...]) -> _Words:
    """Return the row-major offset of each element of an array as a high and a low word."""
    high, low = _places(shape)
    return jnp.zeros_like(low) if high is None else high, low


def _places(shape: tuple[int, ...]) -> _Words:
    """Return what :func:`offsets` does, with None for high words that are zero."""
    if math.prod(shape) <= 2**32:
        return None, offset_in(shape, jnp.uint32)
    with jax.enable_x64(True):
        offset = offset_in(shape, jnp.uint64)
        return (offset >> 32).astype(jnp.uint32), offset.astype(jnp.uint32)


def offset_in(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return the row-major offset of each element of an array."""
    # A sum over the axes can be computed where each part of a sharded array is; a reshaped range would be gathered.
    offset = jnp.zeros(shape, dtype)
    for axis in range(len(shape)):
        offset += lax.broadcasted_iota(dtype, shape, axis) * np.array(math.prod(shape[axis + 1 :])).astype(dtype)
    return offset


def _scheduled(first: Any, second: Any) -> _Key:
    """Compute the key schedule of threefry2x32."""
    return first, second, first ^ second ^ np.uint32(0x1BD11BDA)


def _threefry(keys: _Key, high: Any, low: Any) -> _Words:
    """Apply threefry2x32 with 20 rounds to a counter of two words."""
    high, low = high + keys[0], low + keys[1]
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            high = high + low
            low = ((low << rotation) | (low >> (32 - rotation))) ^ high
        high, low = high + keys[(group + 1) % 3], low + keys[(group + 2) % 3] + np.uint32(group + 1)
    return high, low


def hashed(words: jax.Array, lane: int, high: jax.Array, low: jax.Array) -> jax.Array:
    """Return a keyed hash of a counter of two words, in one word.

    Lanes are independent: 0 is of noise in float32, 1 and 2 of noise in float64, 3 of sketches.
    """
    return _hashed(_lane(list(words), lane), high, low)


def _lane(words: Sequence[jax.Array], lane: int) -> _Lane:
    """Return the words that a lane of hashes is keyed by, of a key or of a line of keys."""
    pairs = [*words, *[jnp.zeros_like(words[0])] * (len(words) % 2)]
    key = _scheduled(pairs[0], pairs[1])
    for first, second in zip(pairs[2::2], pairs[3::2], strict=True):
        key = _scheduled(*_threefry(key, first, second))
    # Keys that differ little, or are counted up, are worlds apart after this. JAX splits a key at counters near zero.
    a, b = _threefry(key, np.uint32(2**32 - 1), np.uint32(2 * lane))
    c, _ = _threefry(key, np.uint32(2**32 - 1), np.uint32(2 * lane + 1))
    # Two keys would give the same numbers at shifted offsets, were the step between the counters the same for both.
    return a, b, c | 1, mixed(b)


def _hashed(lane: _Lane, high: jax.Array | None, low: jax.Array) -> jax.Array:
    """Return the hash of a counter in a lane."""
    start, of_high, step, of_zero = lane
    return mixed(mixed(low * step + start) ^ (of_zero if high is None else mixed(high ^ of_high)))


def mixed(x: jax.Array) -> jax.Array:
    """Return lowbias32 of a word, a permutation: each bit of ``x`` flips each bit of the result half of the time."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _join(high: jax.Array, low: jax.Array) -> jax.Array:
    return (high.astype(jnp.uint64) << 32) | low.astype(jnp.uint64)


def _gaussian(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """Map each word to a normal number by the inverse of the distribution function."""
    info = jnp.finfo(dtype)
    one = np.array(1, dtype).view(bits.dtype)
    # The random bits are the fraction of a number in [1, 2). With more of them u could round to 1, and x be infinite.
    fraction = lax.bitcast_convert_type((bits >> (info.bits - info.nmant)) | one, dtype) - 1
    lowest = np.nextafter(np.array(-1, dtype), np.array(0, dtype))
    return lax.erf_inv(fraction * 2 + lowest) * np.array(math.sqrt(2), dtype)
