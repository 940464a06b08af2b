"""The Pyro-style optimizers' programs: how many, random sequences of calls, and large, sharded and mixed parameters."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxoptim import optim as torch_style
from jaxoptim.engine import programs as steps
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim


def ones(name, shape=(3,)):
    param = Parameter(jnp.ones(shape), name)
    param.grad = jnp.ones(shape)
    return param


def programs():
    """How many programs of the step were compiled so far."""
    return steps.advance._cache_size()


# How many programs there are.


@pytest.mark.slow
def test_fifty_parameters_with_fifty_options_are_one_program():
    optimizer = optim.Adam(lambda name: {"lr": 0.01 * int(name), "betas": (0.015 * int(name), 0.9)}, {"clip_norm": 9.0})
    params = [ones(str(i), (3, 5)) for i in range(1, 51)]
    before = programs()
    optimizer(params)
    optimizer(params)
    assert programs() == before + 1
    for param in params:
        optimizer.optim_objs[param.name].param_groups[0]["lr"] *= 0.5
    optimizer(params)
    assert programs() == before + 1
    new = [ones(str(i), (3, 5)) for i in range(51, 61)]
    for _ in range(6):
        optimizer(params + new)
    assert programs() == before + 3  # newcomers by themselves first, then together with the others
    optimizer(params[:20] + new[3:])
    for first in range(1, 6):
        optimizer(params[first:] + new[:first])
        optimizer(new)
    params[3].grad = None
    optimizer(params)
    optimizer(list(reversed(params)))
    assert programs() == before + 3


@pytest.mark.slow
def test_parameters_that_come_one_at_a_time_share_programs():
    optimizer, params = optim.Adam({"lr": 0.1}), []
    before = programs()
    for i in range(40):
        params.append(ones(str(i), (3 + i % 2, 7)))
        optimizer(params)
    assert programs() <= before + 3  # the first one, and one for each shape
    for _ in range(5):
        optimizer(params)
    assert programs() <= before + 4
    for i, param in enumerate(params):
        assert int(optimizer.get_state()[str(i)]["state"][0]["step"]) == 45 - i
        np.testing.assert_allclose(param.value, 1 - 0.1 * (45 - i), rtol=1e-4, atol=1e-5)


def test_a_schedule_makes_no_programs():
    scheduler = optim.ExponentialLR({"optimizer": torch_style.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9})
    params = [ones(name, (7,)) for name in "ab"]
    scheduler(params)
    before = programs()
    for _ in range(5):
        scheduler.step()
        scheduler(params)
    assert programs() == before


def test_subsets_of_parameters_of_several_shapes_need_no_other_programs():
    optimizer = optim.SGD({"lr": 0.1})
    params = [ones(str(i), (i, 11)) for i in range(1, 4)]
    optimizer(params)
    optimizer(params[1:])
    before = programs()
    for chosen in range(1, 8):
        optimizer([param for i, param in enumerate(params) if chosen >> i & 1])
    assert programs() == before


# Random sequences of calls.

SHAPES = {"a": (3,), "b": (3,), "c": (3,), "d": (2, 2)}
CALLS = st.lists(
    st.tuples(
        st.sets(st.sampled_from(sorted(SHAPES)), min_size=1),
        st.sets(st.sampled_from(sorted(SHAPES))),
        st.sampled_from(["none", "rate", "state", "value", "fresh"]),
    ),
    min_size=1,
    max_size=8,
)
MAKERS = {
    "Adam": (optim.Adam, torch_style.Adam, {}),
    "SGD": (optim.SGD, torch_style.SGD, {"momentum": 0.9}),
    "ClippedAdam": (optim.ClippedAdam, torch_style.ClippedAdam, {"lrd": 0.9}),
    "Adagrad": (optim.Adagrad, torch_style.Adagrad, {"initial_accumulator_value": 0.5}),
}


def check_calls(maker, calls):
    """The same calls with one torch-style optimizer for each parameter."""
    make, cls, options = maker
    rates = {name: 0.1 * (1 + i) for i, name in enumerate(SHAPES)}
    rng = np.random.default_rng(0)

    def new():
        return make(lambda name: {"lr": rates[name], **options})

    ours, cells, hands, left = new(), {}, {}, {}
    for names, without, change in calls:
        for name in sorted(names):
            if name not in cells:
                cells[name], hand = ones(name, SHAPES[name]), ones(name, SHAPES[name])
                hands[name] = (hand, cls([hand], lr=rates[name], **options))
            grad = None if name in without else jnp.asarray(rng.normal(size=SHAPES[name]), jnp.float32)
            cells[name].grad = hands[name][0].grad = grad
        ours([cells[name] for name in sorted(names)])
        for name in names:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* did nothing, because no parameter has ever had a grad")
                hands[name][1].step()
            left.pop(name, None)
        first = min(names)
        if change == "rate":
            for of in (ours.optim_objs[first], hands[first][1]):
                of.param_groups[0]["lr"] *= 0.5
        elif change == "state":
            state, ours = ours.get_state(), new()
            ours.set_state(state)
            for name in [*left]:  # the state of a name waits for whichever parameter comes under it
                hands[name][1].load_state_dict(left.pop(name).state_dict())
        elif change == "value":
            cells[first].value = hands[first][0].value = jnp.full(SHAPES[first], 0.25)
        elif change == "fresh":  # another fit, which begins afresh
            cells[first], hand = (Parameter(cells[first].value, first) for _ in range(2))
            left[first] = hands[first][1]
            hands[first] = (hand, cls([hand], lr=rates[first], **options))
        for name, cell in cells.items():
            np.testing.assert_allclose(cell.value, hands[name][0].value, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(calls=CALLS)
def test_random_calls_are_those_of_one_optimizer_per_parameter(calls):
    check_calls(MAKERS["ClippedAdam"], calls)


@pytest.mark.slow
@pytest.mark.parametrize("maker", [*MAKERS.values()], ids=MAKERS)
@settings(max_examples=40, deadline=None)
@given(calls=CALLS)
def test_many_random_calls_are_those_of_one_optimizer_per_parameter(maker, calls):
    check_calls(maker, calls)


# Large, sharded and low-precision parameters.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_and_small_ones_make_the_same_steps(dtype):
    optimizer = optim.Adam({"lr": 0.1}, {"clip_value": 0.5})
    shapes = {"small": (4,), "large": (20_000,), "matrix": (130, 130), "low": (4,)}
    cells, hands = {}, {}
    for name, shape in shapes.items():
        cells[name], hand = (Parameter(jnp.ones(shape, dtype), name) for _ in range(2))
        hands[name] = (hand, torch_style.Adam([hand], lr=0.1))
    for t in range(4):
        for name, cell in cells.items():
            cell.grad = jnp.linspace(-1, 1, cell.value.size).reshape(cell.shape).astype(dtype)
            hands[name][0].grad = jnp.clip(cell.grad, -0.5, 0.5)
        chosen = [name for i, name in enumerate(cells) if t == 0 or i != t]
        optimizer([cells[name] for name in chosen])
        for name in chosen:
            hands[name][1].step()
    for name, cell in cells.items():
        assert cell.value.dtype == dtype
        np.testing.assert_allclose(
            cell.value.astype(jnp.float32), hands[name][0].value.astype(jnp.float32), rtol=1e-6, atol=1e-7
        )


def test_mixed_precisions_and_sparse_rows_in_one_call():
    optimizer = optim.SGD({"lr": 0.5})
    low, full, rows = Parameter(jnp.ones(3, jnp.bfloat16), "low"), ones("full"), ones("rows", (4, 2))
    low.grad = jnp.ones(3, jnp.bfloat16)
    optimizer([low, full, rows])
    rows.grad = BCOO((jnp.ones((1, 2)), jnp.array([[2]])), shape=(4, 2))
    optimizer([low, full, rows])
    assert low.value.dtype == jnp.bfloat16
    assert float(low.value[0]) == float(full.value[0]) == 0.0
    assert np.asarray(rows.value)[:, 0].tolist() == [0.5, 0.5, 0.0, 0.5]


def test_a_sharded_parameter_stays_where_it_is():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("x"))
    sharded = Parameter(jax.device_put(jnp.arange(16.0), sharding), "sharded")
    copied, plain, hand = Parameter(jnp.arange(16.0), "hand"), ones("plain"), None
    hand = torch_style.Adam([copied], lr=0.1)
    optimizer = optim.Adam({"lr": 0.1}, {"clip_norm": 100.0})
    for t in range(4):
        sharded.grad = jax.device_put(jnp.arange(16.0) - t, sharding)
        copied.grad = jnp.arange(16.0) - t
        optimizer([sharded, plain] if t % 2 else [sharded])
        hand.step()
    np.testing.assert_allclose(sharded.value, copied.value, rtol=1e-6)
    assert sharded.value.sharding.is_equivalent_to(sharding, 1)
    (state,) = optimizer.get_state()["sharded"]["state"].values()
    assert state["exp_avg"].sharding.is_equivalent_to(sharding, 1)
