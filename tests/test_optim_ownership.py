"""What the torch-style face owns: the user's arrays live, ours are donated, a failed step changes nothing."""

import copy
import gc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import parity
from jaxoptim import init, optim, pack, rules, step
from jaxoptim.engine import programs as program
from table import FORMS, STATES, Case, slow_unless

SMALL, LARGE = (3,), (200, 100)
"""Shapes that are packed and that stand by themselves."""
DENSE = [case for case in STATES if not case.row.sparse]


def tree(shape=LARGE):
    return {"large": jnp.ones(shape), "small": jnp.ones(SMALL), "one": jnp.ones(()), "frozen": None}


def bowl(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def snapshot(opt):
    """Everything a failed step must not change, as NumPy arrays."""
    return jax.tree.map(np.asarray, (opt.params, opt.state_dict()["state"], opt.state_dict()["param_groups"]))


def optimizer(case: Case, params):
    return getattr(optim, case.row.name)(params, **case.options)


def start(case: Case):
    return [jnp.asarray(x) for x in parity.problem(case.row.shapes)[0]]


@pytest.mark.costly
@pytest.mark.parametrize("advance", [lambda opt: opt.step(tree()), lambda opt: opt.minimize(bowl)], ids=["step", "min"])
@pytest.mark.parametrize(
    "case", slow_unless(FORMS.__contains__, [case for case in DENSE if case.row.rule is not rules.Muon])
)
def test_the_arrays_given_are_never_deleted(case, advance):
    mine = tree()
    opt = optimizer(case, mine)
    for _ in range(3):
        advance(opt)
    assert all(np.all(np.asarray(x) == 1) for x in jax.tree.leaves(mine))


def test_a_parameter_copies_what_it_is_given():
    given = np.ones(3, np.float32)
    param = optim.Parameter(given)
    given[:] = 5
    opt = optim.SGD([param], lr=1.0)
    opt.step([np.zeros(3)])
    assert param.value.tolist() == [1, 1, 1]
    param.value = given
    given[:] = 7
    opt.step([np.zeros(3)])
    assert param.value.tolist() == [5, 5, 5]


@pytest.mark.parametrize("advance", [lambda opt: opt.step(tree()), lambda opt: opt.minimize(bowl)], ids=["step", "min"])
def test_what_was_read_stays_as_it_was(advance):
    opt = optim.Adam(tree(), lr=0.1)
    held = []
    for _ in range(4):
        held.append((opt.params, [p.value for p in opt.param_groups[0]["params"]], opt.state_dict()["state"]))
        advance(opt)
    seen = [np.asarray(params["large"])[0, 0] for params, _, _ in held]
    np.testing.assert_allclose(seen, [1.0, 0.9, 0.8, 0.7], rtol=1e-2)
    for params, values, state in held:
        for value in [*jax.tree.leaves(params), *values, *jax.tree.leaves(state)]:
            assert not value.is_deleted()
            np.asarray(value)


def test_a_numpy_view_of_a_parameter_stays_as_it_was():
    opt = optim.SGD(tree(), lr=0.1)
    view = np.asarray(opt.params["large"])
    for _ in range(3):
        opt.step(tree())
    assert np.all(view == 1)


def test_buffers_that_nobody_else_holds_are_donated():
    opt = optim.Adam(tree(), lr=0.1)
    opt.step(tree())
    before = jax.tree.leaves(opt._storage.store.slabs.taken())
    pointers = {x.unsafe_buffer_pointer() for x in before}
    del before
    opt.step(tree())
    after = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(opt._storage.store.slabs.taken())}
    assert after == pointers  # the new values stand where the old ones stood


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        lambda opt: opt.step(tree()),
        lambda opt: opt.minimize(bowl),
        lambda opt: opt.step(jax.grad(bowl)(opt.params)),
        lambda opt: (opt.state_dict(), opt.step(tree())),
        lambda opt: (opt.step({**tree(), "one": None}), opt.step(tree())),
        lambda opt: setattr(opt.param_groups[0]["params"][0], "value", jnp.ones(LARGE)) or opt.step(tree()),
    ],
    ids=["step", "minimize", "params", "state_dict", "missing", "assigned"],
)
def test_memory_does_not_grow(use, only_new_garbage):
    opt = optim.Adam(tree(), lr=0.1)
    counts = []
    for _ in range(6):
        use(opt)
        gc.collect()
        counts.append(len(jax.live_arrays()))
    assert counts[2:] == [counts[2]] * 4


@pytest.mark.slow
def test_a_dropped_optimizer_frees_its_memory(only_new_garbage):
    gc.collect()
    before = len(jax.live_arrays())
    opt = optim.Adam(tree(), lr=0.1)
    opt.step(tree())
    del opt
    gc.collect()
    assert len(jax.live_arrays()) == before


def raising(params):
    raise RuntimeError("no loss today")


FAILURES = {
    "another tree": (lambda opt: opt.step({"large": jnp.ones(LARGE)}), ValueError, "small|one"),
    "another shape": (lambda opt: opt.step({**tree(), "small": jnp.ones(4)}), ValueError, "'small'.*4"),
    "another large shape": (lambda opt: opt.step({**tree(), "large": jnp.ones((2, 2))}), ValueError, "'large'"),
    "an integer gradient": (lambda opt: opt.step({**tree(), "small": jnp.ones(3, int)}), TypeError, "small|int"),
    "a complex gradient": (lambda opt: opt.step({**tree(), "large": jnp.ones(LARGE) * 1j}), TypeError, "large|complex"),
    "a raising closure": (lambda opt: opt.step(lambda: raising(None)), RuntimeError, "no loss"),
    "a raising loss": (lambda opt: opt.minimize(raising), RuntimeError, "no loss"),
    "a loss that is no scalar": (lambda opt: opt.minimize(lambda p: p["small"]), TypeError, "scalar"),
    "a rate out of range": (lambda opt: (opt.param_groups[0].update(lr=-1.0), opt.step(tree())), ValueError, "lr"),
    "an option that is gone": (lambda opt: (opt.param_groups[0].pop("lr"), opt.step(tree())), KeyError, "lr"),
}


@pytest.mark.slow
@pytest.mark.parametrize("begun", [True, False], ids=["begun", "fresh"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_step_changes_nothing(failure, begun):
    fail, error, message = FAILURES[failure]
    opt = optim.Adam(tree(), lr=0.1)
    if begun:
        opt.step(tree())
    before, options = snapshot(opt), dict(opt.param_groups[0])
    with pytest.raises(error, match=f"(?s){message}"):
        fail(opt)
    opt.param_groups[0].update(options)
    if "lr" not in list(opt.param_groups[0])[:1]:
        opt.param_groups[0] = {key: opt.param_groups[0][key] for key in options}
    chex.assert_trees_all_equal(snapshot(opt), before, strict=True)
    opt.step(tree())  # and it can go on
    twin = optim.Adam(tree(), lr=0.1)
    for _ in range(1 + begun):
        twin.step(tree())
    chex.assert_trees_all_equal(opt.params, twin.params, strict=True)


def test_a_failed_step_of_a_decaying_rate_gives_the_rate_back():
    opt = optim.ClippedAdam(tree(), lr=0.1, lrd=0.5)
    with pytest.raises(ValueError, match="small"):
        opt.step({**tree(), "small": jnp.ones(4)})
    assert opt.param_groups[0]["lr"] == 0.1
    opt.step(tree())
    assert opt.param_groups[0]["lr"] == 0.05


@pytest.mark.slow
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_new_numbers_compile_nothing(case):
    opt = optimizer(case, start(case))
    grads = [x[0] for x in parity.problem(case.row.shapes)[1]]
    opt.step(grads)
    opt.minimize(tree_bowl)
    before = program.advance._cache_size(), program.minimize._cache_size()
    group = opt.param_groups[0]
    for name in ("lr", "eta", "alpha", "rho", "momentum", "lrd", "eps"):
        if isinstance(group.get(name), float) and group[name]:
            group[name] *= 0.9
    for name in ("betas", "etas"):
        if name in group:
            group[name] = tuple(x * 0.999 + 0.001 * (name == "etas") for x in group[name])
    opt.step(grads)
    opt.minimize(tree_bowl)
    assert (program.advance._cache_size(), program.minimize._cache_size()) == before


def tree_bowl(params):
    return bowl(params)


def test_optimizers_of_the_same_form_share_their_programs():
    for rate in (0.1, 0.2, jnp.asarray(0.3), 1):
        opt = optim.SGD({"shared": jnp.ones(7)}, lr=rate)
        opt.step({"shared": jnp.ones(7)})
        opt.minimize(tree_bowl)
        sizes = program.advance._cache_size(), program.minimize._cache_size()
        if rate == 0.1:
            first = sizes
    assert sizes == first


def test_a_loss_that_is_made_anew_at_each_step_is_warned_about():
    opt = optim.SGD(jnp.ones(2))
    for scale in range(3):
        opt.minimize(scaled_sum(scale))
    with pytest.warns(UserWarning, match="Define it once"):
        opt.minimize(scaled_sum(3))


def scaled_sum(scale):
    return lambda x: scale * jnp.sum(x)


def test_minimize_returns_what_else_the_loss_returns():
    opt = optim.SGD({"w": jnp.ones(2)}, lr=0.5)
    loss, aux = opt.minimize(lambda p, y: (jnp.sum(p["w"]) * y, {"double": 2 * p["w"]}), 3.0, has_aux=True)
    assert float(loss) == 6
    assert aux["double"].tolist() == [2, 2]
    assert opt.params["w"].tolist() == [-0.5, -0.5]


def test_minimize_refuses_what_it_cannot_hash():
    class Unhashable:
        __hash__ = None

        def __call__(self, params):
            return jnp.sum(params)

    with pytest.raises(TypeError, match="hash"):
        optim.SGD(jnp.ones(2)).minimize(Unhashable())


@pytest.mark.slow
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_leaving_for_the_pure_face_and_coming_back(case, x64):
    noise = parity.problem(case.row.shapes)[1]
    stays, leaves = optimizer(case, start(case)), optimizer(case, start(case))
    grads = [[x[t] for x in noise] for t in range(30)]
    for t in range(10):
        stays.step(grads[t])
        leaves.step(grads[t])
    tx, params, state = leaves.to_functional()
    update = jax.jit(lambda g, s, p: tx.update(g, s, p))
    for t in range(10, 20):
        stays.step(grads[t])
        updates, state = update(grads[t], state, params)
        params = optax.apply_updates(params, updates)
    leaves.from_functional(params, state)
    for t in range(20, 30):
        stays.step(grads[t])
        leaves.step(grads[t])
    for mine, theirs in zip(leaves.params, stays.params, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)
    left, right = leaves.state_dict(), stays.state_dict()
    chex.assert_trees_all_equal_structs(left, right)
    chex.assert_trees_all_close(left["state"], right["state"], rtol=1e-7, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("begun", [True, False], ids=["begun", "fresh"])
def test_groups_and_counts_leave_as_a_partition(begun, x64):
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones((2, 2)), "d": None}, "e": jnp.ones(3)}
    grads = jax.tree.map(lambda x: 0.5 * x, params)

    def make():
        opt = optim.AdamW(params, lr=0.1, groups=[("b\\..*", {"lr": 0.01, "amsgrad": True})])
        if begun:
            opt.step(grads)
            opt.step({**grads, "e": None})
        return opt

    stays, leaves = make(), make()
    tx, now, state = leaves.to_functional()
    for _ in range(5):
        stays.step(grads)
        updates, state = tx.update(grads, state, now)
        now = optax.apply_updates(now, updates)
    leaves.from_functional(now, state)
    chex.assert_trees_all_equal_structs(leaves.params, params)
    chex.assert_trees_all_close(leaves.params, stays.params, rtol=1e-12)
    for mine, theirs in zip(leaves.state.values(), stays.state.values(), strict=True):
        assert float(mine["step"]) == float(theirs["step"])


def test_a_list_of_groups_leaves_as_a_list():
    opt = optim.SGD([{"params": {"w": jnp.ones(2)}}, {"params": jnp.ones(3), "lr": 0.5}], lr=0.1)
    tx, params, state = opt.to_functional()
    chex.assert_trees_all_equal_structs(params, [{"w": 0}, 0])
    updates, state = tx.update(params, state, params)
    opt.from_functional(optax.apply_updates(params, updates), state)
    np.testing.assert_allclose(opt.params[0]["w"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(opt.params[1], 0.5, rtol=1e-6)


@pytest.mark.parametrize("wrong", ["params", "shape", "state"])
def test_coming_back_with_something_else_changes_nothing(wrong):
    opt = optim.Adam({"w": jnp.ones(2), "v": jnp.ones(3)}, lr=0.1)
    opt.step({"w": jnp.ones(2), "v": jnp.ones(3)})
    before = snapshot(opt)
    _, params, state = opt.to_functional()
    if wrong == "params":
        params = {"w": params["w"]}
    elif wrong == "shape":
        params = {**params, "v": jnp.ones(4)}
    else:
        state = state._replace(slots={"exp_avg": state.slots["exp_avg"]})
    with pytest.raises(ValueError, match=r"from_functional|'v'"):
        opt.from_functional(params, state)
    chex.assert_trees_all_equal(snapshot(opt), before, strict=True)


def test_two_optimizers_of_one_parameter_see_each_other():
    shared, own = optim.Parameter(jnp.zeros(3)), optim.Parameter(jnp.zeros(3))
    first, second = optim.SGD([shared, own], lr=1.0), optim.SGD([shared], lr=10.0)
    for _ in range(3):
        first.step([jnp.ones(3), jnp.ones(3)])
        second.step([jnp.ones(3)])
    assert shared.value.tolist() == [-33.0] * 3
    assert own.value.tolist() == [-3.0] * 3
    assert first.params[0].tolist() == [-33.0] * 3


def test_a_copy_goes_its_own_way():
    opt = optim.Adam(tree(), lr=0.1)
    opt.step(tree())
    other = copy.deepcopy(opt)
    opt.step(tree())
    assert float(other.params["one"]) == pytest.approx(0.9)
    assert float(opt.params["one"]) == pytest.approx(0.8)


@pytest.mark.slow
def test_sharded_parameters_stay_sharded():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {"w": jax.device_put(jnp.ones((16, 4)), sharding)}
    opt = optim.Adam(params, lr=0.1)
    opt.step(params)
    opt.minimize(bowl)
    assert opt.params["w"].sharding.is_equivalent_to(sharding, 2)
    assert opt.state_dict()["state"][0]["exp_avg"].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.slow
def test_the_face_makes_the_steps_of_the_pure_packed_form():
    params = {f"layer{i}": jnp.full((4, i + 1), 1.0) for i in range(20)}
    opt, packed = optim.AdamW(params, lr=0.1), pack(params)
    rule = rules.AdamW(lr=0.1)
    state = init(rule, packed)
    for _ in range(3):
        opt.step(params)
        packed, state = jax.jit(step)(rule, packed, params, state)
    chex.assert_trees_all_close(opt.params, packed.unpack(), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["step", "minimize"])
def test_numpy_arrays_may_change_after_the_call(way):
    for _ in range(10):  # whether the program reads them too late is a matter of chance
        array = np.ones((1000, 700), np.float32)
        optimizer = optim.SGD(jnp.zeros(array.shape), lr=1.0)
        optimizer.step(array) if way == "step" else optimizer.minimize(_product, array)
        array[:] = 9
        assert bool(jnp.all(optimizer.params == -1))


def _product(param, array):
    return jnp.sum(param * array)
