"""Arrays that miss updates because they have no gradient: each has a count of its own, as in torch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from jax import export
from jax.experimental.sparse import BCOO
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxoptim
import parity
from checkpoint_files import NAME
from jaxoptim import checkpoint, interop, optim, rules
from table import CASES, FIRST, STATES, slow_unless

FROZEN = 120
"""The steps before the late parameter has its first gradient."""
SELDOM = np.array([t < FROZEN or t % 7 in (0, 3) for t in range(parity.STEPS)])
"""At which steps the late parameter has none."""
BY_COUNT = {
    "SGD": {"momentum", "dampening"},
    "Adagrad": {"lr_decay", "initial_accumulator_value"},
    "ASGD": {"t0"},
    "ClippedAdam": {"weight_decay", "lrd"},
    "DCTAdam": {"lrd"},
}
"""Options of those rules that do not depend on the count with their first ones."""


def depends_on_the_count(case):
    wanted = BY_COUNT.get(case.row.name)
    return wanted <= case.options.keys() if wanted else case in FIRST


def gradients(case, noise, rows, params):
    """Those of one step, of arrays of JAX or of tensors."""
    if not case.row.sparse:
        return [n + parity.SLOPE * p for n, p in zip(noise, params, strict=True)]
    if isinstance(params[0], torch.Tensor):
        made = zip(noise, rows, params, strict=True)
        return [torch.sparse_coo_tensor(i[None], n, p.shape, check_invariants=True) for n, i, p in made]
    return [BCOO((n, i[:, None]), shape=p.shape) for n, i, p in zip(noise, rows, params, strict=True)]


def ours_and_theirs(case):
    """The parameters after all steps, where the second of them is late and then misses one now and then."""
    shapes = case.row.shapes[:2]
    start, noise = parity.problem(shapes)
    rows = parity.touched_rows(shapes) if case.row.sparse else noise
    if case.row.sparse:
        noise = parity.problem(tuple((parity.ROWS_TOUCHED, *shape[1:]) for shape in shapes))[1]

    tensors = [torch.tensor(x) for x in start]
    optimizer = case.parents(tensors)
    for t, is_missing in enumerate(SELDOM):
        given = gradients(case, [torch.tensor(x[t]) for x in noise], [torch.tensor(x[t]) for x in rows], tensors)
        tensors[0].grad, tensors[1].grad = given[0], None if is_missing else given[1]
        optimizer.step()

    with jax.enable_x64(True):
        rule, params = case.ours(), [jnp.asarray(x) for x in start]

        @jax.jit
        def trained(params, state, noise, rows):
            def body(carry, now):
                noise, rows, is_missing = now
                both = gradients(case, noise, rows, carry[0])
                return jax.lax.cond(
                    is_missing,
                    lambda carry: jaxoptim.step(rule, carry[0], [both[0], None], carry[1]),
                    lambda carry: jaxoptim.step(rule, carry[0], both, carry[1]),
                    carry,
                ), None

            return jax.lax.scan(body, (params, state), (noise, rows, SELDOM))[0]

        params, state = trained(params, jaxoptim.init(rule, params, counts=True), noise, rows)
        assert int(state.step) == int(state.counts[0]) == parity.STEPS
        assert int(state.counts[1]) == parity.STEPS - SELDOM.sum()
        return [np.asarray(x) for x in params], [x.numpy() for x in tensors]


@pytest.mark.costly
@pytest.mark.parametrize("case", slow_unless(depends_on_the_count, CASES))
def test_late_and_missing_gradients_agree_with_the_parent(case):
    assert parity.distance(*ours_and_theirs(case)) < 1e-12


# What a step with missing gradients does, and what it leaves alone.


def ones(*shape):
    return jnp.ones(shape or (3, 2))


FEW = [case for case in FIRST if case.row.name in ("SGD", "NAdam")]


def late(case):
    """A rule with two parameters, and gradients of both, of one, and of none."""
    grad = BCOO((ones(2, 2), jnp.array([[2], [0]])), shape=(3, 2)) if case.row.sparse else ones()
    params = {"late": ones(), "w": ones()}
    return case.ours(), params, {"late": grad, "w": grad}, {"late": None, "w": grad}, {"late": None, "w": None}


@pytest.mark.slow
@pytest.mark.parametrize("case", STATES, ids=str)
def test_an_array_moves_as_it_would_alone(case):
    rule, params, both, one, _ = late(case)
    step, alone = jax.jit(jaxoptim.step), ones()
    state, own = jaxoptim.init(rule, params), jaxoptim.init(rule, alone)
    counted, other = jaxoptim.init(rule, params, counts=True), params
    for grads in (both, one, one, both):
        params, state = step(rule, params, grads, state)
        other, counted = step(rule, other, grads, counted)
        if grads is both:
            alone, own = step(rule, alone, grads["late"], own)
    np.testing.assert_allclose(params["late"], alone, rtol=1e-6)
    chex.assert_trees_all_equal(other, params)
    chex.assert_trees_all_equal(counted._replace(counts=None), state._replace(counts=None))
    assert (int(state.step), int(own.step), own.counts) == (4, 2, None)
    assert (int(state.counts["late"]), state.counts["w"]) == (2, None)
    assert jax.tree.map(int, counted.counts) == {"late": 2, "w": 4}


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("case", slow_unless(FEW.__contains__, STATES))
def test_a_step_without_any_gradient_changes_nothing(case, counts):
    rule, params, both, one, none = late(case)
    state = jaxoptim.init(rule, params, counts=counts)
    for grads in (both, one):
        params, state = jaxoptim.step(rule, params, grads, state)
    after, unchanged = jaxoptim.step(rule, params, none, state)
    updates, also = jaxoptim.update(rule, none, state, params)
    assert after["w"] is params["w"]
    assert updates == none
    assert unchanged is also is state
    fresh = jaxoptim.init(rule, params)
    assert jaxoptim.step(rule, params, none, fresh)[1] is fresh


def test_schedules_follow_the_updates_made():
    rule = rules.SGD(lr=lambda step: 1.0 + step)
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    state = jaxoptim.init(rule, params)
    for a, b in ((1.0, None), (None, None), (1.0, 1.0), (None, 1.0)):
        params, state = jaxoptim.step(rule, params, {"a": a, "b": b}, state)
    assert jax.tree.map(float, params) == {"a": -1 - 2, "b": -2 - 3}
    assert (int(state.step), jax.tree.map(int, state.counts)) == (3, {"a": 2, "b": 2})


def test_frozen_leaves_have_no_count_and_unknown_ones_are_told_by_their_slots():
    rule, params = rules.Adam(), {"a": ones(), "frozen": None, "late": ones()}
    state, grads = jaxoptim.init(rule, params), {"a": ones(), "frozen": None, "late": None}
    for given in (params, None):
        counts = jaxoptim.update(rule, grads, state, given)[1].counts
        assert {name: count is None for name, count in counts.items()} == {"a": True, "frozen": True, "late": False}
    full = {"a": ones(), "frozen": None, "late": ones()}
    assert jaxoptim.update(rule, full, state)[1].counts is None
    assert jaxoptim.init(rule, params, counts=True).counts["frozen"] is None
    with pytest.raises(ValueError, match=r"state\.counts has nothing for 'late'"):
        jaxoptim.step(rule, params, full, state._replace(counts={"a": None, "frozen": None}))


def test_states_of_three_fields_count_for_all_arrays():
    rule, params = rules.Adam(), {"a": ones(), "b": ones()}
    made = jaxoptim.init(rule, params)
    state = jaxoptim.OptState(made.step, made.slots, made.shared)
    chex.assert_trees_all_equal(jaxoptim.step(rule, params, params, state), jaxoptim.step(rule, params, params, made))
    assert jaxoptim.step(rule, params, params, state)[1].counts is None


@pytest.mark.slow
def test_the_noise_of_a_sampler_follows_the_updates_of_the_tree():
    rule, params = rules.SGLD(key=jax.random.key(3)), {"a": ones(), "b": ones()}
    state, plain = jaxoptim.init(rule, params, counts=True), jaxoptim.init(rule, params)
    now, also = params, params
    for _ in range(2):
        now, state = jaxoptim.step(rule, now, params, state)
        also, plain = jaxoptim.step(rule, also, params, plain)
    chex.assert_trees_all_equal(now, also)
    _, one = jaxoptim.step(rule, now, {"a": ones(), "b": None}, state)
    assert (int(one.step), jax.tree.map(int, one.counts)) == (3, {"a": 3, "b": 2})


def test_donated_states_hold_no_array_twice():
    rule, params = rules.Adam(), {"a": ones(), "b": ones(), "c": ones()}
    step = jax.jit(jaxoptim.step, donate_argnums=(1, 3))
    state, one = jaxoptim.init(rule, params), {"a": ones(), "b": None, "c": None}
    params, state = jaxoptim.step(rule, jax.tree.map(jnp.copy, params), one, state)
    for grads in (one, jax.tree.map(jnp.copy, params), one):
        params, state = step(rule, params, grads, state)
    assert (int(state.step), int(state.counts["b"])) == (4, 1)


# Through the transformations of JAX and optax, and to disk.


def counted(rule=None):
    """A rule, parameters, and a state in which ``late`` has a count of its own."""
    rule, params = rule or rules.NAdam(lr=0.1), {"late": ones(8, 4), "w": ones(8, 4)}
    return rule, *jaxoptim.step(rule, params, params | {"late": None}, jaxoptim.init(rule, params)), params


@pytest.mark.slow
def test_a_scan_carries_counts_and_a_hypergradient_goes_through_it():
    params = {"late": ones(), "w": ones()}

    @jax.jit
    def final(lr):
        def body(carry, _):
            return jaxoptim.step(rules.Adam(lr=lr), carry[0], params | {"late": None}, carry[1]), None

        state = jaxoptim.init(rules.Adam(lr=lr), params, counts=True)
        carry, _ = jax.lax.scan(body, (params, state), length=3)
        now, state = jaxoptim.step(rules.Adam(lr=lr), carry[0], params, carry[1])
        return jnp.sum(now["late"]) + jnp.sum(now["w"]), state

    (_, state), slope = jax.value_and_grad(final, has_aux=True)(0.1)
    assert jax.tree.map(int, state.counts) == {"late": 1, "w": 4}
    assert float(slope) == pytest.approx(-6 * (4 + 1), rel=1e-4)  # six numbers, each step a rate long


@pytest.mark.slow
def test_a_stack_of_states_has_counts_of_its_own():
    rates, params = jnp.array([0.1, 0.2]), {"late": ones(), "w": ones()}
    stack = jax.vmap(rules.RAdam)(rates)

    def trained(rule):
        now, state = jaxoptim.step(rule, params, params | {"late": None}, jaxoptim.init(rule, params))
        return jaxoptim.step(rule, now, params, state)

    swept, states = jax.vmap(trained)(stack)
    assert states.counts["late"].tolist() == [1, 1]
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], swept), trained(rules.RAdam(0.2))[0], rtol=1e-6)
    begun = jax.vmap(lambda rule: jaxoptim.init(rule, params, counts=True))(stack)
    assert begun.counts["w"].shape == (2,)


@pytest.mark.slow
def test_counts_are_exported_described_and_found():
    rule, now, state, params = counted()
    described = jax.eval_shape(lambda: jaxoptim.init(rule, params, counts=True))
    chex.assert_trees_all_equal_shapes_and_dtypes(described, jaxoptim.init(rule, params, counts=True))
    exported = export.deserialize(
        export.export(jax.jit(functools.partial(jaxoptim.step, rule)))(now, params, state).serialize()
    )
    chex.assert_trees_all_close(exported.call(now, params, state), jaxoptim.step(rule, now, params, state), rtol=1e-6)
    assert int(optax.tree.get(state, "step")) == 1


def test_counts_go_through_wrappers_of_optax():
    params = {"late": ones(), "w": ones(), "other": ones()}
    grads, some = params, params | {"late": None}
    tx = optax.partition({"a": jaxoptim.nadam(), "b": jaxoptim.sgd()}, {"late": "a", "w": "a", "other": "b"})
    masked = optax.masked(jaxoptim.nadam(), {"late": True, "w": True, "other": False})
    plain, own = jaxoptim.nadam(), {"late": ones(), "w": ones()}
    states = [tx.init(params), masked.init(params), plain.init(own)]
    for g in (some, some, grads):
        first, states[0] = tx.update(g, states[0], params)
        second, states[1] = masked.update(g, states[1], params)
        third, states[2] = plain.update({"late": g["late"], "w": g["w"]}, states[2], own)
    for updates in (first, second):
        chex.assert_trees_all_equal({name: updates[name] for name in own}, third)
    inner = states[0].inner_states["a"].inner_state
    assert (int(inner.step), int(inner.counts["late"])) == (3, 1)
    assert states[0].inner_states["b"].inner_state.counts is None


@pytest.mark.parametrize("counts", [False, True])
def test_accumulated_gradients_keep_the_structure_of_the_state(counts):
    rule, params = rules.Adam(lr=0.1), {"a": ones(), "b": ones()}
    inner = optax.GradientTransformationExtraArgs(
        lambda params: jaxoptim.init(rule, params, counts=counts), jaxoptim.transformation(rule).update
    )
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        _, state = update(params, state, params)
    assert int(state.inner_opt_state.step) == 2
    assert jax.tree.map(int, state.inner_opt_state.counts) == ({"a": 2, "b": 2} if counts else None)


@pytest.mark.slow
def test_packed_parameters_may_have_counts():
    params = {f"w{i}": jnp.full(3, i + 1.0) for i in range(40)} | {"large": ones(30, 20)}
    packed, rule = jaxoptim.pack(params, 100), rules.NAdam(lr=0.1)
    state, plain = jaxoptim.init(rule, packed, counts=True), jaxoptim.init(rule, packed)
    now, state = jax.jit(jaxoptim.step)(rule, packed, params, state)
    expected, _ = jax.jit(jaxoptim.step)(rule, packed, params, plain)
    chex.assert_trees_all_close(now.unpack(), expected.unpack(), rtol=1e-6)
    assert [int(x) for x in jax.tree.leaves(state.counts)] == [1, 1]
    matrices, rule = jaxoptim.pack({"a": ones(3, 2), "b": ones(2, 2)}), rules.Adafactor()  # works on the tree
    _, state = jaxoptim.step(rule, matrices, matrices, jaxoptim.init(rule, matrices, counts=True))
    assert jax.tree.map(int, state.counts) == {"a": 1, "b": 1}


def test_counts_stand_on_every_device():
    rule, now, state, params = counted()
    mesh = jax.make_mesh((8,), ("x",))
    sharded = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("x"))), (now, params))
    put = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*(["x"] if x.ndim else [])))), state)
    after, ours = jax.jit(jaxoptim.step)(rule, sharded[0], sharded[1], put)
    chex.assert_trees_all_close(
        jax.device_get((after, ours)), jax.device_get(jaxoptim.step(rule, now, params, state)), rtol=1e-6
    )
    assert ours.counts["late"].sharding.is_fully_replicated


def test_counts_are_saved_and_restored(tmp_path):
    rule, now, state, params = counted()
    state = jaxoptim.step(rule, now, params, state)[1]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "orbax", jax.eval_shape(lambda: state))
    chex.assert_trees_all_equal(restored, state)
    checkpoint.save(tmp_path / NAME, state)
    for loaded in (
        checkpoint.load(tmp_path / NAME),
        checkpoint.load(tmp_path / NAME, like=jax.eval_shape(lambda: state)),
    ):
        chex.assert_trees_all_equal(loaded, state)
    # One with counts of all arrays takes it, and what has none; that of another tree does not.
    full = jax.eval_shape(lambda: jaxoptim.init(rule, params, counts=True))
    assert jax.tree.map(int, checkpoint.load(tmp_path / NAME, like=full).counts) == {"late": 1, "w": 2}
    with pytest.raises(ValueError, match=r"like lacks at 'counts\.late'"):
        checkpoint.load(tmp_path / NAME, like=jaxoptim.init(rule, params))
    checkpoint.save(tmp_path / NAME, {"run": [state._replace(counts=None)]})
    (loaded,) = checkpoint.load(tmp_path / NAME, like={"run": [full]})["run"]
    assert jax.tree.map(int, loaded.counts) == {"late": 2, "w": 2}
    checkpoint.save(tmp_path / NAME, {"step": jnp.int32(1), "counts": {}})
    with pytest.raises(ValueError, match=r"nothing at 'counts\.a'"):
        checkpoint.load(tmp_path / NAME, like={"step": jnp.int32(1), "counts": {"a": jnp.int32(1)}})


# To the other faces and back.

KINDS = ["Adam", "NAdam", "ASGD", "SGD", "ClippedAdam", "DCTAdam", "Adagrad", "Adafactor", "SparseAdam"]
MET = [case for case in CASES if case.row.name in KINDS and depends_on_the_count(case)]


MISSING = [(1, 2), (2,), (1, 2)]
"""Which of three parameters have no gradient at each of the first steps."""


class Meeting:
    """A run of three parameters, with the gradients of every step."""

    shapes = ((4, 3), (5, 2), (3, 2))

    def __init__(self, case):
        self.case, self.rule = case, case.ours()
        rng = np.random.default_rng(0)
        self.params, *self.values = [[rng.normal(size=shape) for shape in self.shapes] for _ in range(7)]
        self.params = list(map(jnp.asarray, self.params))

    def grads(self, t):
        missing = MISSING[t] if t < len(MISSING) else ()
        rows = jnp.array([[1], [0]])
        made = [BCOO((jnp.asarray(x[:2]), rows), shape=x.shape) if self.case.row.sparse else x for x in self.values[t]]
        return [None if i in missing else x for i, x in enumerate(made)]

    def trained(self, params, state, steps):
        for t in steps:
            params, state = jaxoptim.step(self.rule, params, self.grads(t), state)
        return params, state

    def parent_trained(self, tensors, optimizer, steps):
        for t in steps:
            for tensor, grad in zip(tensors, self.grads(t), strict=True):
                if isinstance(grad, BCOO):
                    indices, values = (torch.tensor(np.asarray(x)) for x in (grad.indices.T, grad.data))
                    grad = torch.sparse_coo_tensor(indices, values, grad.shape, check_invariants=True)
                tensor.grad = None if grad is None else torch.as_tensor(grad)
            optimizer.step()
        return [tensor.numpy() for tensor in tensors]


@pytest.mark.slow
@pytest.mark.parametrize("case", MET, ids=str)
def test_counts_go_to_the_other_faces_and_to_the_parent_and_back(case, x64):
    run = Meeting(case)
    tensors = [torch.tensor(np.asarray(x)) for x in run.params]
    parent = case.parents(tensors)
    run.parent_trained(tensors, parent, range(3))
    params, state = run.trained(run.params, jaxoptim.init(run.rule, run.params), range(3))
    expected, _ = run.trained(params, state, range(3, 6))

    there = interop.torch.to_torch_state_dict(run.rule, params, state)
    if "step" in parent.state_dict()["state"][0]:
        steps = {key: int(of["step"]) for key, of in parent.state_dict()["state"].items() if int(of["step"])}
        assert {key: int(of["step"]) for key, of in there["state"].items() if int(of["step"])} == steps == {0: 3, 1: 1}
    others = [torch.tensor(np.asarray(x)) for x in params]
    continued = case.parents(others)
    interop.torch.load_state_dict(continued, there)
    chex.assert_trees_all_close(run.parent_trained(others, continued, range(3, 6)), expected, rtol=1e-12)

    back = interop.torch.from_torch(run.rule, params, parent.state_dict())
    chex.assert_trees_all_close(run.trained(params, back, range(3, 6))[0], expected, rtol=1e-12)

    opt = getattr(optim, case.row.name)(params, **case.options)
    opt.from_functional(params, state)
    opt.step(run.grads(3))
    _, now, of_all = opt.to_functional()
    opt.from_functional(now, of_all)
    for t in (4, 5):
        opt.step(run.grads(t))
    chex.assert_trees_all_close(opt.params, expected, rtol=1e-12)


def test_a_wrong_tree_of_counts_changes_nothing_in_the_torch_style_face():
    _, now, state, params = counted(rules.Adam())
    opt = optim.Adam(params)
    with pytest.raises(ValueError, match=r"state\.counts has nothing for 'late'"):
        opt.from_functional(now, state._replace(counts={"w": None}))
    assert (len(opt.state), opt.params["w"] is params["w"]) == (0, False)
    chex.assert_trees_all_equal(opt.params, params)


@pytest.mark.slow
def test_the_rate_of_a_pyro_style_optimizer_decays_where_a_gradient_is_missing():
    optimizer = jaxoptim.pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.5})
    tx, params = jaxoptim.transformation(optimizer), {"a": jnp.ones(()), "b": jnp.ones(())}
    values, state = params, tx.init(params)
    for b in (1.0, None, None, 1.0):
        grads = {"a": jnp.ones(()), "b": None if b is None else jnp.ones(())}
        values = optimizer.update(values, grads)
        updates, state = tx.update(grads, state, params)
        params = {name: x if updates[name] is None else x + updates[name] for name, x in params.items()}
    chex.assert_trees_all_close(params, values, rtol=1e-6)
    assert float(params["b"]) == pytest.approx(1 - 0.05 - 0.1 / 16, rel=1e-5)
    assert tx.update({"a": None, "b": None}, state, params)[1] == state
