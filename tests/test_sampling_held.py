"""Arrays that no chain moves are one copy, and chains are those of a run that has them in every chain."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from jaxoptim import rules, sampling
from jaxoptim.core.noise import normal, part_of_normal
from jaxoptim.sampling import chains
from jaxoptim.sampling.chain import Thinning
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.run import prepare, run, stacked
from jaxoptim.sampling.sample import samples_of
from jaxoptim.sampling.selections import stacked_masks
from jaxoptim.sampling.target import problem

KEY = jax.random.key(1)
RNG = np.random.default_rng(0)
START = {
    "a": RNG.normal(size=3),
    "big": RNG.normal(size=(129, 129)),  # whose noise is drawn by itself
    "c": np.float32(RNG.normal(size=(2, 4))),
    "d": RNG.normal(size=5),
    "none": None,
    "z": np.array([1.0 + 2j, 0.5]),
}
MASK = {"a": 0.0, "big": (np.arange(129) < 3)[:, None], "c": np.zeros((2, 4)), "d": True, "none": None, "z": None}
DATA = RNG.normal(size=(8, 5))
FEW = {"key": KEY, "num_chains": 2, "num_draws": 3, "batch_size": 4}
SAMPLERS = {
    "SGLD": rules.SGLD(lr=1e-3, localization=1.0, noise_norm=True, distance=True),
    "SGNHT": rules.SGNHT(lr=1e-3, diffusion_factor=0.1, order="badodab"),
    "SGHMC": rules.SGHMC(lr=1e-3, noise_impl="hash"),
    "PSGLD": rules.PSGLD(lr=1e-3, gamma=True),
}


def loss(params, batch):
    rest = jnp.sum(params["c"] ** 2) * jnp.sum(params["a"]) + jnp.sum(abs(params["z"]) ** 4)
    return jnp.mean((batch @ params["d"] - rest / 100) ** 2) + jnp.mean((params["big"] @ params["big"][:, :3]) ** 2)


def everything(params):
    return params


def in_every_chain(loss_fn, params, sampler, data=None, **keywords):
    """The same chains beside some that move everything, so that each has all arrays for itself."""
    options = RunOptions(**keywords)
    given = problem(loss_fn, params, data, options)
    masks = stacked_masks([sampler.optimize_over, True], given.arrays)
    both = run(prepare(given, sampler, stacked(sampler, 2, optimize_over=masks), 2, options))
    return samples_of(jax.tree.map(lambda x: x[: options.num_chains], both), options.axes)


SMALL = {"a": np.array([1.0, 2.0, 0.5]), "b": np.array([3.0])}


def product(params):
    return jnp.sum(params["a"]) * jnp.sum(params["b"] ** 2)


@pytest.mark.costly
@pytest.mark.numbers
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("impl", ["key", "hash"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_part_of_the_noise_is_that_part(impl, dtype):
    whole = normal(KEY, (1000,), dtype, impl)
    np.testing.assert_array_equal(part_of_normal(KEY, 1000, 333, 917, dtype, impl), whole[333:917])
    foreign = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(
        part_of_normal(foreign, 9, 2, 5, dtype, impl), normal(foreign, (9,), dtype, impl)[2:5]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("SGNHT", "map"),
        *((x, "map") for x in SAMPLERS if x != "SGNHT"),
        ("SGLD", "vmap"),
    ],
)
def test_chains_are_those_that_hold_everything(name, method):
    options = FEW | {"observables": {"all": everything}, "chain_method": method, "start_noise": 0.01}
    sampler = SAMPLERS[name].replace(nbeta=5.0, optimize_over=MASK)
    alone = sampling.sample(loss, START, sampler, DATA, **options)
    both = in_every_chain(loss, START, sampler, DATA, **options)
    chex.assert_trees_all_close((alone.loss, alone.params), (both.loss, both.params), rtol=1e-12)
    chex.assert_trees_all_close(alone.observables, both.observables, rtol=1e-12)
    draws = alone.observables["all"]
    for held in ("a", "c"):
        assert (draws[held] == START[held]).all()
        assert (alone.params[held] == START[held]).all()
        assert alone.params[held].shape == (2, *START[held].shape)
    moved = draws["big"][:, 1:] != START["big"]
    assert moved[:, :, :3].all()
    assert not moved[:, :, 3:].any()


def run_of(sampler, held, microbatches):
    """The bytes that the program of a run takes, of eight layers of which the first moves, or all do."""
    params = {f"layer{number}": jnp.ones((64, 64)) / 64 for number in range(8)}
    mask = {name: name == "layer0" or not held for name in params}
    options = RunOptions(KEY, CHAINS, 5, chain_method="vmap", microbatches=microbatches)
    sampler = sampler.replace(optimize_over=jax.tree.map(np.asarray, mask))
    prepared = prepare(problem(deep, params, jnp.ones((4, 64)), options), sampler, stacked(sampler, 1), 1, options)
    arguments = (prepared.rules, prepared.settings, prepared.state, prepared.problem.given, Thinning(0, 1), 0, 5)
    program = chains.run_steps.lower(prepared.spec, "vmap", None, *arguments).compile()
    return program.memory_analysis()


def deep(params, batch):
    for name in sorted(params):
        batch = jnp.tanh(batch @ params[name])
    return jnp.mean(batch**2)


LAYER = 64 * 64 * 4
CHAINS = 17  # which are not spread over devices


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize(
    ("sampler", "copies"),
    [
        pytest.param(rules.SGLD(), 2, id="parameters and start"),
        pytest.param(rules.SGHMC(), 3, id="momentum"),
    ],
)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_chains_take_the_memory_of_what_they_move(sampler, copies, microbatches):
    one, all_of = (run_of(sampler, held, microbatches=microbatches) for held in (True, False))
    little = LAYER  # losses, data, keys
    assert abs(all_of.argument_size_in_bytes - CHAINS * 8 * copies * LAYER) < little
    assert abs(one.argument_size_in_bytes - (CHAINS * copies + 7) * LAYER) < little
    assert one.temp_size_in_bytes < all_of.temp_size_in_bytes / 8


class Sees(sampling.Observable):
    """Gradients and state of the whole tree."""

    def __hash__(self):
        return 1

    def __eq__(self, other):
        return isinstance(other, Sees)

    def update(self, memory, draw):
        slots = draw.state.slots
        return memory, {"grads": draw.grads, "start": slots["initial_param"], "arrays": draw.arrays, **slots}


@pytest.mark.slow
def test_observables_see_whole_trees():
    watched = {"seen": Sees(), "accepted": sampling.MalaAcceptance()}
    options = {"key": KEY, "num_chains": 2, "num_draws": 3, "observables": watched}
    mask = {"a": False, "b": True}
    sampler = rules.SGLD(lr=1e-3, localization=2.0, optimize_over=mask)
    alone = sampling.sample(product, SMALL, sampler, **options)
    both = in_every_chain(product, SMALL, sampler, **options)
    chex.assert_trees_all_close(alone.observables, both.observables, rtol=1e-6)
    seen = alone.observables["seen"]
    np.testing.assert_allclose(seen["grads"]["a"][..., 0], seen["arrays"]["b"][..., 0] ** 2, rtol=1e-6)
    assert (seen["start"]["a"] == SMALL["a"]).all()
    options["observables"] = {"seen": Sees()}
    sampler = rules.SGHMC(lr=1e-3, optimize_over=mask)
    momentum = sampling.sample(product, SMALL, sampler, **options).observables["seen"]["momentum"]
    assert (momentum["a"] == 0).all()
    assert (momentum["b"] != 0).all()


@pytest.mark.slow
def test_metrics_of_all_parameters_stay_so():
    sampler = rules.SGLD(lr=0.0, weight_norm=True, optimize_over={"a": False, "b": True})
    found = sampling.sample(product, SMALL, sampler, key=KEY, num_chains=1, num_draws=2)
    np.testing.assert_allclose(found.observables["weight_norm"], np.sqrt(1 + 4 + 0.25 + 9), rtol=1e-6)


@pytest.mark.slow
def test_a_restricted_run_continues_to_the_last_bit(tmp_path):
    def go(mask, num_draws=4, **where):
        sampler = rules.SGHMC(lr=1e-3, optimize_over=mask)
        return sampling.sample(product, SMALL, sampler, key=KEY, num_chains=2, num_draws=num_draws, **where)

    mask, path = {"a": False, "b": True}, tmp_path / "run"
    whole = go(mask)
    go(mask, 2, checkpoint=path)
    found = go(mask, checkpoint=path)
    chex.assert_trees_all_equal((found.loss, found.params), (whole.loss, whole.params))
    with pytest.raises(ValueError, match="another run: its arrays that no chain moves is not"):
        go({"a": True, "b": False}, checkpoint=path)


def test_other_parts_of_the_same_arrays_compile_nothing():
    def go(index):
        mask = sampling.slices(SMALL, {"a": (0, 3, index)})
        sampling.sample(product, SMALL, rules.SGLD(lr=1e-4, optimize_over=mask), key=KEY, num_chains=2, num_draws=3)
        return chains.run_steps._cache_size(), chains.init_chains._cache_size(), chains.results._cache_size()

    go(0)
    assert go(1) == go(2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "equinox"])
def test_modules(kind):
    if kind == "equinox":
        model = eqx.nn.MLP(3, 1, 4, 1, key=KEY)
        mask, apply = sampling.slices(model, {r"layers\.1\..*": True}), jax.vmap
        first, last = (lambda model, at=at: model.layers[at].weight for at in (0, 1))
    else:
        model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(1)))
        mask, apply = sampling.slices(model, {r"layers\.1\..*": True}), lambda model: model
        first, last = (lambda model, at=at: model.layers[at].kernel[...] for at in (0, 1))

    def mean(model, batch):
        return jnp.mean((apply(model)(batch) - 1) ** 2)

    sampler = rules.SGHMC(lr=1e-3, optimize_over=mask)
    found = sampling.sample(mean, model, sampler, jnp.ones((4, 3)), key=KEY, num_chains=2, num_draws=2)
    assert type(found.params) is type(model)
    assert (first(found.params) == first(model)).all()
    assert first(found.params).shape == (2, *first(model).shape)
    assert (last(found.params) != last(model)).all()


def temporaries(selections, **changes):
    """The bytes that the program of chains that move eight layers takes beside what they keep."""
    params = {f"layer{number}": jnp.ones((64, 64)) / 64 for number in range(8)}
    options, sampler = RunOptions(KEY, CHAINS, 5, chain_method="vmap"), rules.SGLD(**changes)
    given = problem(deep, params, jnp.ones((4, 64)), options)
    masks = {} if selections is None else {"optimize_over": stacked_masks(selections, given.arrays)}
    count = 1 if selections is None else len(selections)
    prepared = prepare(given, sampler, stacked(sampler, count, **masks), count, options)
    arguments = (prepared.rules, prepared.settings, prepared.state, prepared.problem.given, Thinning(0, 1), 0, 5)
    return (
        chains.run_steps.lower(prepared.spec, "vmap", None, *arguments).compile().memory_analysis().temp_size_in_bytes
    )


def some_of(number):
    """Masks that have a number for each of a layer."""
    return {f"layer{layer}": (np.arange(64 * 64) % 7 == (layer + number) % 7).reshape(64, 64) for layer in range(8)}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_masks_are_one_copy_for_all_chains_of_a_setting(count):
    """As wide as the numbers that they multiply; a byte for each number of each chain would be four times that."""
    masks = [some_of(number) for number in range(count)]
    assert temporaries(masks) - temporaries([True] * count) < (8 * count + 1) * LAYER


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("in_a_row", [1, 2, 3, 8, 24])
def test_chains_get_what_is_the_same_for_their_row(in_a_row, devices):
    """Wherever a device's share begins and ends."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("chains",)) if devices > 1 else None
    rows, number = jnp.arange(24) // in_a_row, jnp.arange(24)

    def one(row, number, factor):
        return factor * row, number

    found = jax.jit(lambda: chains._over_chains(one, "vmap", mesh, (number,), (10,), (rows,), in_a_row))()
    chex.assert_trees_all_equal(found, (10 * rows, number))
