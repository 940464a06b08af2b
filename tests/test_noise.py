"""The noise of the samplers: its numbers against JAX's, its transformations, and its statistics."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.random import threefry_2x32
from jax.sharding import NamedSharding, PartitionSpec
from scipy import special, stats

from comparisons import assert_same
from jaxoptim.core.noise import IMPLS, _gaussian, normal, normals

pytestmark = pytest.mark.numbers

SHAPES = [(), (0, 3), (1001,), (91, 11)]  # the last of which is made in parts
MORE_SHAPES = [(3, 0), (1,), (7,), (100_003,), (513, 1), (3, 5, 7), (10, 100), (600, 3, 3), (4, 1, 300), (64, 64, 3, 3)]
KEYS = {"zero": (0, 0), "seed": (0, 12345), "ones": (2**32 - 1, 2**32 - 1), "any": (0x9E3779B9, 0x7F4A7C15)}
# What a count of events, a mean or a correlation may be off by, and how unlikely the rest may be.
SIGMA = 5
P_VALUE = 1e-6

of_impl = pytest.mark.parametrize("impl", IMPLS)


def quick(fast, slow):
    """Cases, of which the fast suite runs the first ones."""
    return [*fast, *(pytest.param(case, marks=pytest.mark.slow) for case in slow)]


def typed(words, impl="threefry2x32"):
    return jax.random.wrap_key_data(jnp.array(words, jnp.uint32), impl=impl)


# --- The numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("words", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("shape", quick(SHAPES, MORE_SHAPES), ids=str)
def test_key_gives_the_numbers_of_jax(shape, words):
    expected = jax.random.normal(typed(words), (math.prod(shape),)).reshape(shape)
    assert_same(normal(typed(words), shape, jnp.float32), expected)


@pytest.mark.costly
@pytest.mark.parametrize("shape", quick(SHAPES, MORE_SHAPES), ids=str)
def test_key_gives_the_numbers_of_jax_in_float64(shape, x64):
    expected = jax.random.normal(typed(KEYS["any"]), (math.prod(shape),), jnp.float64).reshape(shape)
    assert_same(normal(typed(KEYS["any"]), shape, jnp.float64), expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SHAPES, *MORE_SHAPES], ids=str)
def test_key_gives_the_numbers_of_jax_in_its_shape(shape):
    key = typed(KEYS["any"])
    assert_same(normal(key, shape, jnp.float32), jax.random.normal(key, shape))


@pytest.mark.slow
@of_impl
def test_x64_does_not_change_float32(impl):
    key = typed(KEYS["any"])
    expected = normal(key, (1000,), "float32", impl)
    with jax.enable_x64(True):
        assert_same(normal(key, (1000,), "float32", impl), expected)


def test_float64_without_x64_is_float32_and_warns():
    with pytest.warns(UserWarning, match="float64 .*is not available"):
        x = normal(typed(KEYS["any"]), (3,), "float64")
    assert_same(x, normal(typed(KEYS["any"]), (3,), "float32"))


@pytest.mark.parametrize("impl", quick(["philox4x32"], ["rbg", "unsafe_rbg", "threefry4x32"]))
def test_key_of_another_implementation_gives_the_numbers_of_jax(impl):
    key = jax.random.key(5, impl=impl)
    assert_same(normal(key, (10,), "float32"), jax.random.normal(key, (10,)))


@of_impl
@pytest.mark.parametrize("count", [0, 1, 3])
def test_arrays_drawn_together_have_the_numbers_of_each(count, impl, x64):
    keys, forms = jax.random.split(typed(KEYS["any"]), count), [((5,), "float32"), ((3, 4), "float64"), ((), "float32")]
    likes = [jax.ShapeDtypeStruct(*form) for form in forms[:count]]
    for key, like, drawn in zip(keys, likes, normals(keys, likes, impl), strict=True):
        assert_same(drawn.numbers(), normal(key, like.shape, like.dtype, impl))


@pytest.mark.slow
@of_impl
@pytest.mark.parametrize("shape", [(1000,), (91, 11)], ids=str)
def test_numbers_do_not_depend_on_threefry_partitionable(shape, impl):
    key = typed(KEYS["any"])
    expected = normal(key, shape, "float32", impl)
    with jax.threefry_partitionable(False):
        assert (jax.random.normal(key, shape) != expected).any()
        assert_same(normal(key, shape, "float32", impl), expected)
        assert_same(jax.jit(lambda key: normal(key, shape, "float32", impl))(key), expected)


def lowbias32(x):
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def block(key, high, low):
    """One block of threefry, as JAX has it."""
    return np.asarray(threefry_2x32(jnp.array(key, jnp.uint32), jnp.array([high, low], jnp.uint32)))


def hashed(key, offsets, lane=0):
    """The words that the docstring says the hash to be."""
    high, low = (offsets >> 32).astype(np.uint32), offsets.astype(np.uint32)
    a, b = block(key, 2**32 - 1, 2 * lane)
    c = block(key, 2**32 - 1, 2 * lane + 1)[0] | np.uint32(1)
    return lowbias32(lowbias32(low * c + a) ^ lowbias32(high ^ b))


@pytest.mark.slow
@pytest.mark.parametrize("words", KEYS.values(), ids=KEYS)
def test_hash_is_its_formula(words):
    expected = _gaussian(jnp.asarray(hashed(words, np.arange(1000, dtype=np.uint64))), np.dtype("float32"))
    np.testing.assert_allclose(normal(typed(words), (1000,), "float32", "hash"), expected, rtol=1e-6)


@pytest.mark.slow
def test_hash_is_its_formula_in_float64(x64):
    high, low = (hashed(KEYS["any"], np.arange(1000, dtype=np.uint64), lane) for lane in (1, 2))
    expected = _gaussian(jnp.asarray(high.astype(np.uint64) << 32 | low), np.dtype("float64"))
    np.testing.assert_allclose(normal(typed(KEYS["any"]), (1000,), "float64", "hash"), expected, rtol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["philox2x32", "threefry4x32", "rbg"])
def test_hash_takes_every_word_of_a_key(impl):
    words = np.asarray(jax.random.key_data(jax.random.key(5, impl=impl)))
    x = normal(typed(words, impl), (1000,), "float32", "hash")
    for word in range(words.size):
        other = normal(typed(words ^ (np.arange(words.size) == word), impl), (1000,), "float32", "hash")
        assert abs(np.corrcoef(x, other)[0, 1]) < SIGMA / math.sqrt(1000)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2**33 + 4,), (3, 2**20, 2**12), (1, 2**32), (2**32 - 4, 2)], ids=str)
@of_impl
def test_offsets_beyond_32_bits(impl, shape):
    """A slice of an array too large to make: the compiler makes the slice alone, which is checked before it is run."""
    offset = min(2**32 + 2, math.prod(shape) - 4)
    offset -= offset % 4  # so that the slice lies within one row
    count = min(4, shape[-1])
    start = np.unravel_index(offset, shape)
    stop = (*(i + 1 for i in start[:-1]), start[-1] + count)

    def sliced(key):
        return lax.slice(normal(key, shape, "float32", impl), tuple(map(int, start)), tuple(map(int, stop)))

    program = jax.jit(sliced).lower(typed(KEYS["any"])).compile()
    assert program.memory_analysis().temp_size_in_bytes < 10**6
    offsets = offset + np.arange(count, dtype=np.uint64)
    if impl == "key":
        words = np.stack([np.bitwise_xor(*block(KEYS["any"], i >> 32, i & (2**32 - 1))) for i in map(int, offsets)])
    else:
        words = hashed(KEYS["any"], offsets)
    expected = _gaussian(jnp.asarray(words), np.dtype("float32"))
    np.testing.assert_allclose(program(typed(KEYS["any"])).ravel(), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "word"), [("float32", np.uint32), ("float64", np.uint64)])
def test_tails_end_where_the_docstring_says(dtype, word, x64):
    ends = _gaussian(jnp.array([0, np.iinfo(word).max], word), np.dtype(dtype))
    np.testing.assert_allclose(ends, {"float32": [-5.42, 5.22], "float64": [-8.29, 8.16]}[dtype], atol=0.005)


# --- The transformations ---------------------------------------------------------------------------------------------


def maps():
    def mesh():
        return jax.make_mesh((4,), ("chain",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard_map(f, keys):
        spec = PartitionSpec("chain")
        return jax.jit(jax.shard_map(jax.vmap(f), mesh=mesh(), in_specs=spec, out_specs=spec))(keys)

    def shard_map_of_map(f, keys):
        spec = PartitionSpec("chain")
        run = functools.partial(lax.map, f)
        return jax.jit(jax.shard_map(run, mesh=mesh(), in_specs=spec, out_specs=spec))(keys)

    def sharded(f, keys):
        sharding = NamedSharding(mesh(), PartitionSpec("chain"))
        return jax.jit(jax.vmap(f), out_shardings=sharding)(jax.device_put(keys, sharding))

    return {
        "jit": lambda f, keys: jnp.stack([jax.jit(f)(key) for key in keys]),
        "vmap": lambda f, keys: jax.vmap(f)(keys),
        "jit of vmap": lambda f, keys: jax.jit(jax.vmap(f))(keys),
        "map": lambda f, keys: lax.map(f, keys),
        "map in batches": lambda f, keys: lax.map(f, keys, batch_size=2),
        "scan": lambda f, keys: lax.scan(lambda _, key: (None, f(key)), None, keys)[1],
        "shard_map": shard_map,
        "shard_map of map": shard_map_of_map,
        "jit of sharded keys": sharded,
    }


MAPS = maps()


@pytest.mark.slow
@pytest.mark.parametrize("transform", MAPS)
@pytest.mark.parametrize("shape", [(91, 11), (1000,)], ids=str)
@of_impl
def test_transformations_do_not_change_the_numbers(impl, shape, transform):
    keys = jax.random.split(jax.random.key(3), 4)
    f = functools.partial(normal, shape=shape, dtype="float32", impl=impl)
    assert_same(MAPS[transform](f, keys), jnp.stack([f(key) for key in keys]))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [("x", "y"), ("x", None), (None, "x")], ids=str)
@pytest.mark.parametrize("shape", [(128, 8), (128, 128)], ids=str)
@of_impl
def test_a_sharded_result_has_the_same_numbers(impl, shape, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    f = functools.partial(normal, shape=shape, dtype="float32", impl=impl)
    key = jax.random.key(3)
    assert_same(jax.jit(f, out_shardings=sharding)(key), f(key))


# --- The errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["philox", None, "Key"])
def test_unknown_impl(impl):
    with pytest.raises(ValueError, match=f"Invalid noise_impl: {impl!r}. It must be one of 'key', 'hash'"):
        normal(jax.random.key(0), (2,), "float32", impl)


@pytest.mark.parametrize(
    ("key", "given"),
    [
        (jnp.zeros(2, jnp.uint32), r"uint32 of shape \(2,\)"),
        (np.zeros(2, np.uint32), r"uint32 of shape \(2,\)"),
        (0, "int"),
        (None, "NoneType"),
    ],
    ids=["jax", "numpy", "seed", "None"],
)
@of_impl
def test_key_that_is_not_typed(impl, key, given):
    with pytest.raises(TypeError, match=rf"got {given}. Make one with jax\.random\.key\(seed\), .*wrap_key_data"):
        normal(key, (2,), "float32", impl)


@of_impl
def test_array_of_keys(impl):
    with pytest.raises(ValueError, match=r"array of keys of shape \(3,\): use jax\.vmap"):
        normal(jax.random.split(jax.random.key(0), 3), (2,), "float32", impl)


@pytest.mark.parametrize("dtype", ["bfloat16", "int32", "complex64"])
@of_impl
def test_dtype_that_is_no_real_number_of_32_or_64_bits(impl, dtype):
    with pytest.raises(TypeError, match=f"must be float32 or float64, got {dtype}"):
        normal(jax.random.key(0), (2,), dtype, impl)


# --- The statistics --------------------------------------------------------------------------------------------------
#
# Each check of one array takes the array, and each check of many keys a matrix with a row for each. It returns what it
# found, in units of what it allows.


def moments(x):
    """The means of the first six powers."""
    worst, power = 0, np.ones_like(x)
    for k in range(1, 7):
        power = power * x
        expected = special.factorial2(k - 1) if k % 2 == 0 else 0
        variance = special.factorial2(2 * k - 1) - expected**2
        worst = max(worst, abs(power.mean(dtype=np.float64) - expected) / math.sqrt(variance / x.size) / SIGMA)
    return worst


def distribution(x):
    """The distance of Kolmogorov and Smirnov."""
    u = special.ndtr(np.sort(x))
    steps = np.arange(x.size + 1) / x.size
    distance = max(np.abs(u - steps[1:]).max(), np.abs(u - steps[:-1]).max())
    return distance * math.sqrt(x.size) / stats.kstwobign.isf(P_VALUE)


def tails(x):
    """How many numbers lie far out, on either side."""
    worst = 0
    for bound in (3, 4, 4.5, 5):
        expected = x.size * special.ndtr(-bound)
        for count in ((x > bound).sum(), (x < -bound).sum()):
            worst = max(worst, abs(count - expected) / math.sqrt(expected) / SIGMA)
    return worst


def lags(x):
    """The correlation of numbers that are up to 64 apart, and of their squares."""
    y = ((x * x - 1) / math.sqrt(2)).astype(np.float32)
    # By blocks, as a sum of ten million products in float32 would be no sharper than what it is compared with.
    products = [
        sum(float(a @ b) for a, b in zip(np.array_split(p[:-lag], 64), np.array_split(q[lag:], 64), strict=True))
        for lag in range(1, 65)
        for p, q in ((x, x), (y, y), (x, y), (y, x))
    ]
    return largest(np.array(products) / math.sqrt(x.size))


def pairs(x):
    """How evenly pairs of neighbours fill a square of 256 by 256 cells of equal probability."""
    cells = np.minimum(special.ndtr(x[: x.size // 2 * 2]) * 256, 255).astype(np.int64).reshape(-1, 2)
    return evenness(cells[:, 0] * 256 + cells[:, 1])


def evenness(cells):
    counts = np.bincount(cells, minlength=256**2)
    expected = cells.size / 256**2
    chi2 = ((counts - expected) ** 2).sum() / expected
    return abs(chi2 - 256**2) / math.sqrt(2 * 256**2) / SIGMA


def largest(z):
    """The largest of many standard normals."""
    return float(np.abs(z).max() / stats.norm.isf(P_VALUE / 2 / np.size(z)))


def products(rows):
    """The correlation of each row with each other, and of their squares."""
    n, (i, j) = rows.shape[1], np.triu_indices(len(rows), 1)
    squares = ((rows * rows - 1) / math.sqrt(2)).astype(np.float32)
    return max(largest((p @ q.T)[i, j] / math.sqrt(n)) for p, q in ((rows, rows), (squares, squares), (rows, squares)))


def neighbours(rows):
    """The correlation of all numbers of one row with those of the next, summed over the rows."""
    a, b = rows[:-1].ravel().astype(np.float64), rows[1:].ravel().astype(np.float64)
    return largest([a @ b / math.sqrt(a.size), (a * a - 1) @ (b * b - 1) / 2 / math.sqrt(a.size)])


def shifts(rows):
    """The correlation of each row with the next and with the first, at each shift."""
    transform = np.fft.rfft(rows)
    other = np.concatenate([transform[:-1] * transform[1:].conj(), transform[1:] * transform[:1].conj()])
    return largest(np.fft.irfft(other, rows.shape[1]) / math.sqrt(rows.shape[1]))


def exchanges(rows):
    """The correlation of each row with the next and with the first, at offsets that differ by an exclusive or."""
    n = rows.shape[1]
    sylvester = np.ones((1, 1), np.float32)
    while len(sylvester) < math.isqrt(n):
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])

    def walsh(x):
        for _ in range(2):  # as products of two matrices: NumPy is sixty times slower at products of stacks
            x = (x.reshape(-1, len(sylvester)) @ sylvester).reshape(-1, len(sylvester), len(sylvester)).swapaxes(1, 2)
        return x.reshape(-1, n)

    transform = walsh(rows)
    other = np.concatenate([transform[:-1] * transform[1:], transform[1:] * transform[:1]])
    return largest(walsh(other) / n / math.sqrt(n))


def pairs_of_rows(rows):
    """How evenly a number and its like in the next row fill a square."""
    cells = np.minimum(special.ndtr(rows) * 256, 255).astype(np.int64)
    return evenness((cells[:-1:2] * 256 + cells[1::2]).ravel())


OF_ONE = [moments, distribution, tails, lags, pairs]
OF_MANY = [products, neighbours, shifts, exchanges, pairs_of_rows]


def fold(key, *data):
    """The keys of all combinations of counts."""
    keys = key[None]
    for count in data:
        keys = jax.vmap(lambda key, count=count: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count)))(
            keys
        )
        keys = keys.reshape(-1)
    return keys


def one_bit():
    """The keys that differ from a given one in one bit, and the given one."""
    flips = [(0, 0)] + [((1 << bit) >> 32, (1 << bit) % 2**32) for bit in range(64)]
    return typed(np.array(KEYS["any"], np.uint32) ^ np.array(flips, np.uint32))


FAMILIES = {
    "steps": lambda: fold(jax.random.key(1), 512),
    "arrays of steps": lambda: fold(jax.random.key(2), 16, 32),
    "steps of chains": lambda: fold(jax.random.key(3), 32, 16),
    "split": lambda: jax.random.split(jax.random.key(4), 512),
    "seeds": lambda: jax.vmap(jax.random.key)(jnp.arange(512)),
    "high words": lambda: typed(np.stack([np.arange(512), np.zeros(512)], 1)),
    "one bit": one_bit,
}


def naive(key, shape):
    """A hash that takes the key in with too little care: the keys of two seeds give nearly the same numbers."""
    k = jax.random.key_data(key)
    x = lax.iota(jnp.uint32, math.prod(shape)) * np.uint32(0x9E3779B9) + k[0]
    return _gaussian(lowbias32(x) ^ k[1], np.dtype("float32")).reshape(shape)


def unkeyed_step(key, shape):
    """The hash without its key schedule: two keys of the same second word give the same numbers in another order."""
    k = jax.random.key_data(key)
    x = lax.iota(jnp.uint32, math.prod(shape)) ^ k[0]
    return _gaussian(lowbias32(lowbias32(x) ^ k[1]), np.dtype("float32")).reshape(shape)


def counter(key, shape):
    """No hash at all: the numbers are evenly spread, and each one tells the next."""
    k = jax.random.key_data(key)
    x = lax.iota(jnp.uint32, math.prod(shape)) * np.uint32(0x9E3779B9) + k[0] + k[1]
    return _gaussian(x, np.dtype("float32")).reshape(shape)


def of(impl):
    return lambda key, shape: normal(key, shape, "float32", impl)


@functools.cache
def array(generate, size):
    return np.asarray(jax.jit(generate, static_argnums=1)(jax.random.key(7), (size,)))


@functools.cache
def matrix(generate, family, size=2**14):
    return np.asarray(jax.jit(jax.vmap(lambda key: generate(key, (size,))))(FAMILIES[family]()))


GENERATORS = {impl: of(impl) for impl in IMPLS}


@pytest.mark.slow
@pytest.mark.parametrize("check", OF_ONE[:3], ids=lambda check: check.__name__)
@pytest.mark.parametrize("generate", GENERATORS.values(), ids=GENERATORS)
def test_statistics_of_few_numbers(generate, check):
    assert check(array(generate, 200_000)) < 1


@pytest.mark.slow
@of_impl
def test_statistics_in_float64(impl, x64):
    x = np.asarray(normal(jax.random.key(7), (200_000,), "float64", impl))
    assert len(np.unique(x)) == x.size
    assert moments(x) < 1
    assert distribution(x) < 1


@pytest.mark.slow
@pytest.mark.parametrize("check", OF_ONE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("generate", GENERATORS.values(), ids=GENERATORS)
def test_statistics_of_one_array(generate, check):
    assert check(array(generate, 10**7)) < 1


@pytest.mark.slow
@pytest.mark.parametrize("check", OF_MANY, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("impl", "family"), [("key", "steps"), *(("hash", family) for family in FAMILIES)])
def test_statistics_of_many_keys(impl, family, check):
    # The numbers of "key" are JAX's own to the last bit: one family shows that the checks let good numbers pass.
    assert check(matrix(GENERATORS[impl], family)) < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generate", "family", "check"),
    [
        (naive, "seeds", products),
        (naive, "one bit", products),
        (naive, "one bit", pairs_of_rows),
        (unkeyed_step, "high words", exchanges),
        (unkeyed_step, "one bit", exchanges),
        (counter, "seeds", shifts),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_weak_generator_fails(generate, family, check):
    assert check(matrix(generate, family, 2**12)) > 2


@pytest.mark.parametrize("check", [moments, distribution, lags, pairs], ids=lambda check: check.__name__)
def test_numbers_that_are_too_even_or_too_coarse_fail(check):
    x = array(counter, 200_000)
    coarse = np.round(x * 4) / 4 * (1 + 1 / 64)
    assert max(check(x), check(coarse)) > 2
