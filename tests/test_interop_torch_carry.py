"""Whole runs that are carried over from torch's modules and back: names, transforms, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxoptim
from jaxoptim import interop, optim, rules
from jaxoptim.core import Rearrangement
from test_interop_torch import FEEDBACK, HALF, close, numbers, quartic, refused, same_state, through_file

carry_over, carry_back = interop.torch.carry_over, interop.torch.carry_back
from_torch, load_state_dict, to_torch = interop.torch.from_torch, interop.torch.load_state_dict, interop.torch.to_torch

# Whole runs.

TOKENS, WANTED = np.random.default_rng(4).integers(0, 6, size=(8, 5)), np.random.default_rng(5).normal(size=(8, 2))
NAMES = {"embed.table": "embed.weight", "conv.kernel": "conv.weight", "layer.scale": "layer.weight"}
NAMES |= {"batch.scale": "batch.weight", "dense.kernel": "dense.weight"}
HWIO = (2, 3, 1, 0)


class Net(torch.nn.Module):
    """A layer of every kind whose weights are laid out otherwise here, and one with buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = torch.nn.Embedding(7, 4), torch.nn.Conv2d(1, 3, (2, 3))
        self.batch, self.layer = torch.nn.BatchNorm1d(3), torch.nn.LayerNorm(3)
        self.dense = torch.nn.Linear(3, 2)
        self.double()

    def forward(self, tokens):
        x = torch.tanh(self.conv(self.embed(tokens)[:, None])).mean((2, 3))
        return self.dense(torch.tanh(self.layer(torch.tanh(self.batch(x)))))


def here(net, kernels=HWIO):
    """The paths of the parameters here, with zeros of the shapes that they have here."""
    tree = {part: {} for part in ("embed", "conv", "batch", "layer", "dense")}
    path_of = {name: path for path, name in NAMES.items()}
    for name, x in net.named_parameters():
        part, leaf = path_of.get(name, name).split(".")
        axes = kernels if (part, leaf) == ("conv", "kernel") else range(x.ndim)[:: -1 if leaf == "kernel" else 1]
        tree[part][leaf] = jnp.zeros([x.shape[axis] for axis in axes], jnp.float64)
    return tree


def loss_here(layout):
    def normalized(x, axis, part):
        x = x - x.mean(axis, keepdims=True)
        return x / jnp.sqrt((x * x).mean(axis, keepdims=True) + 1e-5) * part["scale"] + part["bias"]

    def loss(p):
        axes = ("NHWC", layout, "NHWC")
        x = p["embed"]["table"][TOKENS][..., None]
        x = jax.lax.conv_general_dilated(x, p["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=axes)
        x = jnp.tanh(normalized(jnp.tanh(x + p["conv"]["bias"]).mean((1, 2)), 0, p["batch"]))
        x = jnp.tanh(normalized(x, 1, p["layer"])) @ p["dense"]["kernel"] + p["dense"]["bias"]
        return ((x - WANTED) ** 2).mean()

    return loss


LOSS = {"HWIO": loss_here("HWIO"), "OIHW": loss_here("OIHW")}


def train_net(net, optimizer, steps):
    def closure():
        optimizer.zero_grad()
        loss = ((net(torch.tensor(TOKENS)) - torch.tensor(WANTED)) ** 2).mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def net_of(name, options=None):
    net = Net()
    return net, getattr(torch.optim, name)(net.parameters(), **(options or {}))


CARRIED = [
    ("AdamW", {"amsgrad": True}),
    ("SGD", {"lr": 0.05, "momentum": 0.9}),
    ("Adafactor", {}),
    ("LBFGS", {"max_iter": 3, "history_size": 5}),
    ("NAdam", {}),
    ("ASGD", {"lambd": 0.01, "t0": 10.0}),
    ("Rprop", {"lr": 1e-3}),
    ("RMSprop", {"centered": True}),
    ("Adagrad", {"initial_accumulator_value": 0.1}),  # from 0, torch differs from itself one unit beside
    ("LBFGS", {"line_search_fn": "strong_wolfe", "max_iter": 3}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [pytest.param(*x, id="-".join([x[0], *x[1]])) for x in CARRIED])
def test_a_run_of_a_module_is_carried_over_and_back(name, options, x64):
    layout = "OIHW" if name == "Adafactor" else "HWIO"
    given = {"names": NAMES, "transforms": {r"dense\.kernel": np.transpose}}
    if layout == "HWIO":
        given["transforms"][lambda path: path == "conv.kernel"] = lambda x: x.transpose(HWIO)
    steps = 3 if name == "LBFGS" else HALF

    def carried(net, theirs):
        made = getattr(optim, name)(here(net, HWIO if layout == "HWIO" else range(4)))
        carry_over(made, net.state_dict(), through_file(theirs.state_dict()), **given)
        return made

    def returned(ours):
        net, theirs = net_of(name)
        tensors, state_dict = carry_back(ours, net.state_dict(), order=[n for n, _ in net.named_parameters()], **given)
        lacking = net.load_state_dict(through_file(tensors), strict=False)
        assert lacking.missing_keys == [f"batch.{x}" for x in ("running_mean", "running_var")]
        assert not lacking.unexpected_keys
        interop.torch.load_state_dict(theirs, state_dict)
        return net, theirs

    net, theirs = net_of(name, options)
    back = carried(net, theirs)
    train_net(net, theirs, steps)
    ours = carried(net, theirs)
    copied, saved = returned(ours)
    close(copied.parameters(), net.parameters(), 0.0)
    for key, slots in theirs.state_dict()["state"].items():
        for slot, value in slots.items():
            if isinstance(value, torch.Tensor):
                close([saved.state_dict()["state"][key][slot]], [value], 0.0)
    train_net(net, theirs, steps)
    for _ in range(steps):
        ours.minimize(LOSS[layout])
        back.minimize(LOSS[layout])
    close(returned(ours)[0].parameters(), net.parameters())
    half, half_optimizer = returned(back)
    train_net(half, half_optimizer, steps)
    close(half.parameters(), net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "transposed"),
    [({}, False), ({"adjust_lr_fn": "match_rms_adamw"}, True)],
    ids=["as it is", "transposed with match_rms_adamw"],
)
def test_muons_run_is_carried_over_where_its_steps_stay_the_same(options, transposed, x64):
    rng = np.random.default_rng(6)
    tensor, noise = torch.tensor(rng.normal(size=(6, 4))), rng.normal(size=(2 * HALF, 6, 4))
    move = np.transpose if transposed else np.asarray
    theirs = torch.optim.Muon([tensor], lr=0.02, **options)

    def advance(times):
        for t in times:
            tensor.grad = torch.tensor(noise[t]) + FEEDBACK * tensor
            theirs.step()

    advance(range(HALF))
    ours = optim.Muon({"kernel": jnp.zeros((4, 6) if transposed else (6, 4))})
    names, transforms = {"kernel": "weight"}, {"kernel": lambda x: x.T} if transposed else None
    carry_over(ours, {"weight": tensor}, theirs.state_dict(), names=names, transforms=transforms)
    advance(range(HALF, 2 * HALF))
    for t in range(HALF, 2 * HALF):
        ours.step({"kernel": move(noise[t]) + FEEDBACK * np.asarray(ours.params["kernel"])})
    close([ours.params["kernel"]], [move(numbers(tensor))])


def stepped(name, shape, **options):
    tensor = torch.ones(shape)
    made = getattr(torch.optim, name)([tensor], **options)
    tensor.grad = torch.ones(shape)
    made.step()
    return {"weight": tensor}, made.state_dict()


@pytest.mark.costly
@pytest.mark.parametrize(
    ("name", "shape", "move", "reason"),
    [
        ("Muon", (6, 4), np.transpose, r"'kernel' cannot follow its transform: Muon multiplies .* for 6x4 and 4x6"),
        (
            "Muon",
            (6, 4),
            lambda x: x[::-1],
            "'kernel' cannot follow its transform: .*transposition keeps, but no other",
        ),
        ("Muon", (6, 4), lambda x: x.reshape(4, 6), "'kernel' cannot follow its transform: .*no other move"),
        (
            "Adafactor",
            (5, 4, 3, 2),
            lambda x: x.transpose(HWIO),
            r"'kernel' cannot .* \(5, 4, 3, 2\), .*\(3, 2, 4, 5\)",
        ),
        ("Adafactor", (6, 4), lambda x: x.reshape(4, 6), r"'kernel' cannot .* last two axes, of \(6, 4\)"),
        ("Adafactor", (6, 4), lambda x: x.reshape(24), "'kernel' cannot .*means of rows and columns of matrices"),
        ("Adafactor", (24,), lambda x: x.reshape(6, 4), "'kernel' cannot .*the variance of vectors"),
    ],
)
def test_moves_with_which_the_optimizer_would_go_on_otherwise_are_refused_with_the_reason(name, shape, move, reason):
    params, state_dict = stepped(name, shape)
    moved = move(np.ones(shape))
    if name == "Muon" or moved.ndim > 0:
        ours = getattr(optim, name)({"kernel": moved})
        with refused(ours, reason):
            carry_over(ours, params, state_dict, names={"kernel": "weight"}, transforms={"kernel": move})
    back = getattr(optim, name)({"kernel": moved}, lr=0.1)
    back.step({"kernel": moved})
    with refused(back, "'kernel' cannot follow its transform"):
        carry_back(back, params, names=lambda path: "weight", transforms={"kernel": move})


SHAPES = st.lists(st.integers(1, 3), max_size=4).map(tuple)
MOVES = SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), st.permutations(range(len(shape))).map(tuple)))


def adafactor_slots(grads):
    """Adafactor's slots after some gradients."""
    slots = dict.fromkeys(("row_var", "col_var", "variance"))
    axes = {"row_var": -1, "col_var": -2} if grads[0].ndim > 1 else {"variance": ()}
    for t, grad in enumerate(grads, 1):
        for name, axis in axes.items():
            slot = 0.0 if slots[name] is None else slots[name]
            slots[name] = slot + t**-0.8 * (np.mean(grad**2, axis, keepdims=True) - slot)
    return slots


def test_the_slots_of_this_test_are_adafactors(x64):
    grads = np.random.default_rng(0).normal(size=(3, 2, 3))
    params, state = np.ones((2, 3)), jaxoptim.init(rules.Adafactor(), np.ones((2, 3)))
    for grad in grads:
        _, state = jaxoptim.step(rules.Adafactor(), params, grad, state)
    for name, slot in adafactor_slots(grads).items():
        assert slot is None if state.slots[name] is None else np.allclose(slot, state.slots[name], rtol=1e-14)


@pytest.mark.slow
@settings(deadline=None, max_examples=100, derandomize=True)
@given(move=MOVES)
def test_adafactors_factors_follow_a_permutation_of_axes_or_refuse_it(move):
    shape, axes = move
    with jax.enable_x64(True):
        grads = np.random.default_rng(0).normal(size=(3, *shape))
        slots = adafactor_slots(grads)
        rearrangement = Rearrangement.of(lambda x: x.transpose(axes), shape, "weight")
        # The mean over an axis of length one is no mean: it is the same for all such axes.
        last = [axis for axis in range(len(shape))[-2:] if len(shape) > 1]
        single = any(shape[axis] == 1 for axis in last)
        there = [axis in last or (single and shape[axis] == 1) for axis in axes[-2:] if len(shape) > 1]
        if not all(there):
            with pytest.raises(ValueError, match="last two axes"):
                rules.Adafactor().rearranged(slots, rearrangement)
            return
        moved = rules.Adafactor().rearranged(slots, rearrangement)
        for name, slot in adafactor_slots(grads.transpose(0, *[axis + 1 for axis in axes])).items():
            assert (moved[name] is None) == (slot is None)
            if slot is not None:
                assert moved[name].shape == slot.shape
                np.testing.assert_allclose(moved[name], slot, rtol=1e-13)


@pytest.mark.slow
@settings(deadline=None, max_examples=60, derandomize=True)
@given(move=MOVES)
def test_a_rearrangement_is_the_permutation_and_has_an_inverse(move):
    shape, axes = move
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for function in (lambda x: x.transpose(axes), lambda x: x.reshape(-1)[::-1], np.flip):
        there = Rearrangement.of(function, shape, "weight")
        np.testing.assert_array_equal(there(array), function(array))
        np.testing.assert_array_equal(there.inverse()(there(array)), array)
        np.testing.assert_array_equal(there(there.inverse()(function(array))), function(array))
        assert there.is_identity() == (
            there.index.shape == shape and np.array_equal(np.arange(array.size), there.index.ravel())
        )


TRANSPOSED = {r"l\d\.kernel": jnp.transpose}
TO_TORCH = {"l1.kernel": "0.weight", "l1.bias": "0.bias", "l2.kernel": "2.weight", "l2.bias": "2.bias"}


def small_run(name="Adam", named=False, groups=1):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 4))
    members = list(net.named_parameters()) if named else list(net.parameters())
    # The first group is of the second layer.
    members = [{"params": members[2:]}, {"params": members[:2], "lr": 0.5}] if groups == 2 else members
    theirs = getattr(torch.optim, name)(members)
    net(torch.ones(1, 3)).square().sum().backward()
    theirs.step()
    return net, theirs


def small_tree(fill=0.0):
    shapes = {"l1": {"kernel": (3, 2), "bias": (2,)}, "l2": {"kernel": (2, 4), "bias": (4,)}}
    return {layer: {leaf: jnp.full(x, fill) for leaf, x in of.items()} for layer, of in shapes.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "selector"),
    [(TO_TORCH, r".*\.kernel"), (TO_TORCH.__getitem__, lambda path: path.endswith("kernel"))],
    ids=["dict and regex", "functions"],
)
@pytest.mark.parametrize("way", ["positions", "order", "param_names", "two groups", "two named groups"])
def test_a_run_is_carried_by_names_whatever_the_order_of_torch(names, selector, way):
    net, theirs = small_run(named="named" in way or way == "param_names", groups=2 if "two" in way else 1)
    groups = [(r"l2\..*", {})] if "two" in way else None
    ours = optim.Adam(small_tree(), groups=groups)
    given = {"names": names, "transforms": {selector: lambda x: x.T}}
    order = {
        "order": ["0.weight", "0.bias", "2.weight", "2.bias"],
        "two groups": ["2.weight", "2.bias", "0.weight", "0.bias"],
    }
    params = dict(reversed(net.state_dict().items())) if way != "positions" else net.state_dict()
    carry_over(ours, params, theirs.state_dict(), order=order.get(way), **given)
    assert [group["lr"] for group in ours.param_groups] == [1e-3, 0.5][: len(ours.param_groups)]
    for path, name in TO_TORCH.items():
        (cell,) = (p for p in ours._storage.parameters() if ours._storage.labels[p] == path)
        tensor = net.get_parameter(name)
        for mine, parents in ((cell.value, tensor), (ours.state[cell]["exp_avg"], theirs.state[tensor]["exp_avg"])):
            np.testing.assert_array_equal(mine, parents.detach().numpy().T)
    there = [name for group in theirs.state_dict()["param_groups"] for name in group.get("param_names", [])]
    tensors, state_dict = carry_back(ours, net.state_dict(), order=order.get(way) or there or None, **given)
    same_state(state_dict, theirs.state_dict(), 0.0)
    close(tensors.values(), net.state_dict().values(), 0.0)


CARRY_ERRORS = {
    "an unknown path": ({"names": TO_TORCH | {"l3": "0.bias"}}, "names has 'l3', but the parameters here are"),
    "no names": ({"names": None}, "torch has no parameter 'l1.bias' for 'l1.bias' here; it has '0.weight', '0.bias'"),
    "two on one": ({"names": TO_TORCH | {"l2.bias": "0.bias"}}, "'l2.bias' and 'l1.bias' cannot both be '0.bias'"),
    "a missing tensor": ({"names": TO_TORCH | {"l1.bias": "1.bias"}}, "torch has no parameter '1.bias' for 'l1.bias'"),
    "no transform": ({"transforms": None}, r"'l1.kernel' has shape \(3, 2\), but '0.weight' in torch has \(2, 3\)"),
    "a wrong shape": ({"transforms": {".*": np.ravel}}, r"'l1.kernel' has shape \(3, 2\), but .*makes \(6,\)"),
    "an idle selector": ({"transforms": TRANSPOSED | {"kernel": np.ravel}}, "'kernel' selects no parameter"),
    "a factor": ({"transforms": {".*kernel": lambda x: 2 * x.T}}, "transform of 'l1.kernel' changes numbers or loses"),
    "a slice": ({"transforms": {".*kernel": lambda x: x.T[:1]}}, "transform of 'l1.kernel' changes numbers or loses"),
    "a padding": ({"transforms": {".*bias": lambda x: np.pad(x, 1)}}, "transform of 'l1.bias' changes numbers"),
    "a repetition": ({"transforms": {".*bias": lambda x: x[x * 0]}}, "transform of 'l1.bias' changes numbers"),
    "a short order": ({"order": ["0.weight"]}, "has 4 parameters, but 1 were expected: '0.weight'"),
    "a wrong order": ({"order": ["0.bias", "0.weight", "2.weight", "2.bias"]}, "of shape .* for the parameter 'l1"),
    "an unknown order": ({"order": ["0.weight", "0.bias", "2.weight", "x"]}, "order has 'x', but torch has '0.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("error", CARRY_ERRORS)
def test_what_cannot_be_carried_is_named_and_nothing_is_changed(error):
    changes, message = CARRY_ERRORS[error]
    net, theirs = small_run()
    options = {"names": TO_TORCH, "transforms": TRANSPOSED, **changes}
    ours = optim.Adam(small_tree(1.0))
    ours.minimize(quartic)
    with refused(ours, message):
        carry_over(ours, net.state_dict(), theirs.state_dict(), **options)
    if "order" not in changes:
        with refused(ours, message):
            carry_back(ours, net.state_dict(), **options)


def test_other_classes_groups_and_complex_tensors_are_not_carried_over():
    given = {"names": TO_TORCH, "transforms": TRANSPOSED}
    net, theirs = small_run()
    ours = optim.SGD(small_tree(1.0))
    with refused(ours, "options 'betas', .*of 'l1.bias'.*SGD does not take"):
        carry_over(ours, net.state_dict(), theirs.state_dict(), **given)
    net, theirs = small_run(groups=2)
    ours = optim.Adam(small_tree(1.0), groups=[(r"l2\..*", {})])
    with refused(ours, "has 2 groups and no param_names, so the order of its parameters is not known"):
        carry_over(ours, net.state_dict(), theirs.state_dict(), **given)
    complex_tensor = torch.ones(2, dtype=torch.complex64)
    ours = optim.SGD({"w": np.ones(2)})
    with refused(ours, "'w' is real, but 'w' in torch is complex"):
        carry_over(ours, {"w": complex_tensor}, torch.optim.SGD([complex_tensor]).state_dict())
    with pytest.raises(ValueError, match="order has 'v', but torch has 'w'"):
        carry_back(ours, {"w": torch.ones(2)}, order=["v"])


@pytest.mark.slow
def test_complex_matrices_of_lbfgs_are_transposed_and_reordered(x64):
    rng = np.random.default_rng(7)
    target = rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3))
    z, r = (
        torch.tensor(0.1 * target, requires_grad=True),
        torch.tensor([1.0, 2.0], dtype=torch.float64).requires_grad_(),
    )
    theirs = torch.optim.LBFGS([z, r], max_iter=3, history_size=4)

    def closure():
        theirs.zero_grad()
        loss = ((z - torch.tensor(target)).abs() ** 2).sum() + (z.abs() ** 4).sum() + ((r - 0.3) ** 4).sum()
        loss.backward()
        return loss

    def loss(p):
        square = p["k"].real ** 2 + p["k"].imag ** 2
        far = p["k"] - target.T
        return jnp.sum(far.real**2 + far.imag**2) + jnp.sum(square**2) + jnp.sum((p["a"] - 0.3) ** 4)

    for _ in range(2):
        theirs.step(closure)
    ours = optim.LBFGS({"a": jnp.zeros(2), "k": jnp.zeros((3, 2), complex)})
    names, params = {"a": "r", "k": "z"}, {"z": z, "r": r}
    carry_over(ours, params, theirs.state_dict(), names=names, transforms={"k": np.transpose})
    _, state_dict = carry_back(ours, params, names=names, transforms={"k": np.transpose})
    for name in ("d", "prev_flat_grad"):
        close([state_dict["state"][0][name]], [theirs.state_dict()["state"][0][name]], 0.0)
    for _ in range(2):
        theirs.step(closure)
        ours.minimize(loss)
    close([ours.params["k"].T, ours.params["a"]], [z, r])


def entangled(*, groups=False, reverse=False):
    """Two parameters of one shape with different state; torch's optimizer has them in an order of its own."""
    tensors = {name: torch.nn.Parameter(torch.ones(2)) for name in ("a", "b")}
    named = [("b", tensors["b"]), ("a", tensors["a"])]
    given = [{"params": [pair], "lr": 0.1 * (i + 1)} for i, pair in enumerate(named)] if groups else named
    theirs = torch.optim.SGD(given, lr=0.1, momentum=0.9)
    (tensors["a"].sum() + 10 * tensors["b"].sum()).backward()
    theirs.step()
    return tensors, theirs


def buffers(tensors, theirs):
    return [theirs.state[tensors[name]]["momentum_buffer"].tolist() for name in ("a", "b")]


@pytest.mark.parametrize("groups", [False, True], ids=["one group", "groups"])
def test_the_way_back_keeps_names_and_groups_apart(groups):
    tensors, theirs = entangled(groups=groups)
    selectors = [("a", {})] if groups else None
    ours = optim.SGD({"a": np.zeros(2), "b": np.zeros(2)}, momentum=0.9, groups=selectors)
    carry_over(ours, tensors, theirs.state_dict())
    assert [slots["momentum_buffer"].tolist() for slots in ours.state.values()] == [[1, 1], [10, 10]]
    _, named = carry_back(ours, tensors)
    _, ordered = carry_back(ours, tensors, order=["b", "a"])
    for state_dict in (named, ordered):
        others, fresh = entangled(groups=groups)
        fresh.state.clear()
        load_state_dict(fresh, state_dict)
        assert buffers(others, fresh) == [[1, 1], [10, 10]]
        assert [group["lr"] for group in fresh.param_groups] == ([0.1, 0.2] if groups else [0.1])
    others = {name: torch.nn.Parameter(torch.ones(2)) for name in ("a", "b")}
    unnamed = [{"params": [others["b"]]}, {"params": [others["a"]]}] if groups else [others["b"], others["a"]]
    fresh = torch.optim.SGD(unnamed, momentum=0.9)
    load_state_dict(fresh, ordered)
    assert buffers(others, fresh) == [[1, 1], [10, 10]]
    fresh.add_param_group({"params": [torch.ones(1)]})  # which torch refuses after loading names


def test_tied_weights_count_by_the_first_of_their_names():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.mid, self.head = torch.nn.Embedding(4, 4), *(torch.nn.Linear(4, 4, False) for _ in "mh")
            self.head.weight = self.emb.weight

    module = Tied()
    theirs = torch.optim.Adam(module.parameters())
    (module.emb.weight.sum() + 5 * module.mid.weight.sum()).backward()
    theirs.step()
    given = {"names": {"head": "head.weight", "mid": "mid.weight"}, "transforms": {".*": np.transpose}}
    ours = optim.Adam({"head": np.zeros((4, 4)), "mid": np.zeros((4, 4))})
    for order in (None, ["head.weight", "mid.weight"]):
        carry_over(ours, module.state_dict(), theirs.state_dict(), **given, order=order)
        means = [float(slots["exp_avg"][0, 0]) for slots in ours.state.values()]
        assert means == pytest.approx([0.1, 0.5])
    tensors, state_dict = carry_back(ours, module.state_dict(), **given)
    assert set(tensors) == set(module.state_dict())
    again = torch.optim.Adam(module.parameters())
    load_state_dict(again, state_dict)
    assert float(again.state[module.emb.weight]["exp_avg"][0, 0]) == pytest.approx(0.1)


def test_what_was_frozen_in_torch_need_not_be_here():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[0].requires_grad_(False)
    theirs = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    theirs.step()
    ours = optim.Adam({"1": {"weight": np.zeros((2, 2)), "bias": np.zeros(2)}})
    carry_over(ours, module.state_dict(), theirs.state_dict())
    assert len(ours.state) == 2
    np.testing.assert_array_equal(ours.params["1"]["weight"], module[1].weight.detach())
    (module[0].requires_grad_(True)(torch.ones(1, 2))).sum().backward()
    theirs.step()
    with pytest.raises(ValueError, match=r"of other parameters: it has '0.weight', '0.bias', unknown here"):
        carry_over(ours, module.state_dict(), theirs.state_dict())


def test_torch_is_not_given_the_state_of_another_class_or_shape():
    ours = optim.SGD({"b": np.ones(2), "w": np.ones((2, 2))}, momentum=0.9)
    ours.minimize(lambda p: (p["w"] ** 2).sum() + (p["b"] ** 2).sum())
    _, plain = carry_back(ours, {"w": torch.ones(2, 2), "b": torch.ones(2)})
    weights = [torch.ones(2, 2), torch.ones(2)]

    class Mine(torch.optim.SGD):
        """A class of the user's."""

    for name in ("Adam", "Adagrad", "RMSprop", "LBFGS"):
        theirs = getattr(torch.optim, name)(weights)
        for state_dict in (ours.state_dict(), plain):
            with pytest.raises(ValueError, match=f"(is of SGD|has no option).* but torch's optimizer is {name}"):
                load_state_dict(theirs, state_dict)
    load_state_dict(Mine(weights), plain)
    with pytest.raises(ValueError, match=r"shape \(2,\), but torch's parameter there has \(2, 2\). .* use carry_back"):
        load_state_dict(Mine(weights), ours.state_dict())
    with pytest.raises(TypeError, match="An optimizer of torch is expected, but got SGD"):
        load_state_dict(ours, plain)


MODULE = torch.nn.Linear(2, 1)
MISTAKES = {
    "a module": (lambda o, sd: carry_over(o, MODULE, sd), TypeError, "params is tensors by name, .* but got Linear"),
    "pairs": (lambda o, sd: carry_over(o, MODULE.named_parameters(), sd), TypeError, "params is tensors by"),
    "a path": (lambda o, sd: carry_over(o, "run.pt", sd), TypeError, "params is tensors by name, .* but got str"),
    "torch's optimizer": (
        lambda o, sd: carry_over(torch.optim.SGD(MODULE.parameters()), {}, sd),
        TypeError,
        "optimizer is an optimizer of jaxoptim.optim, but got SGD",
    ),
    "an optimizer for its state": (
        lambda o, sd: carry_over(o, MODULE.state_dict(), torch.optim.SGD(MODULE.parameters())),
        TypeError,
        "A state dict is expected, .* but got SGD",
    ),
    "the whole file": (lambda o, sd: carry_over(o, MODULE.state_dict(), {"model": 1}), KeyError, "it has 'model'"),
    "names in a list": (
        lambda o, sd: carry_over(o, MODULE.state_dict(), sd, names=[("a", "b")]),
        TypeError,
        "names is a dict by paths here, but got list",
    ),
    "one transform": (
        lambda o, sd: carry_over(o, MODULE.state_dict(), sd, transforms=np.transpose),
        TypeError,
        "transforms is a dict by paths here",
    ),
    "a transform of tensors": (
        lambda o, sd: carry_over(o, MODULE.state_dict(), sd, transforms={"weight": lambda x: x.permute(1, 0)}),
        ValueError,
        "transform of 'weight' fails on an array of shape .* It is given a NumPy array",
    ),
    "arrays of JAX": (lambda o, sd: carry_back(o, o.params), TypeError, "'bias' is ArrayImpl"),
    "an optimizer to load": (lambda o, sd: o.load_state_dict(MODULE), TypeError, "A state dict is expected"),
    "an optimizer to torch": (lambda o, sd: to_torch(o), TypeError, "to_torch takes a state dict, .* but got SGD"),
    "a class for a rule": (lambda o, sd: from_torch(optim.SGD, o.params, sd), TypeError, "A rule is expected, such as"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_natural_mistake_is_named(mistake):
    call, error, message = MISTAKES[mistake]
    ours = optim.SGD({"weight": np.zeros((1, 2)), "bias": np.zeros(1)})
    with refused(ours, message, error):
        call(ours, torch.optim.SGD(MODULE.parameters()).state_dict())
