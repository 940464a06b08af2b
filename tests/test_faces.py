"""Every face makes the same steps: late and missing gradients, edits between steps, copies; and what compiles."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faces import FACES, KINDS, ByName, Called, Given, Minimized, Multi, Pure, Stepped, Updated
from jaxoptim import optim
from jaxoptim.engine import programs
from jaxoptim.optim import Parameter, lr_scheduler
from jaxoptim.pyro import optim as pyro_optim

RELATIVE = 1e-15
"""For float64; four and a half units in the last place of any dtype. Slabs evaluate powers, exponentials and roots of
many rows at once, with vector instructions that round the last bit otherwise than those for one number."""

SHAPES = {
    "scalar": ((), "float64"),
    "vector": ((3,), "float64"),
    "matrix": ((2, 3), "float64"),
    "wide": ((2, 3), "float64"),
    "empty": ((0, 2), "float64"),
    "single": ((5,), "float32"),
    "low": ((2, 2), "bfloat16"),
    "large": ((129, 128), "float64"),
}
"""The parameters, of which each script has some."""
EDITS = ("none", "rate", "number", "term", "state", "value", "out", "in", "add", "save", "copy", "pickle")


@dataclasses.dataclass(frozen=True)
class Call:
    """One step, and what is changed after it.

    Attributes:
        missing: the parameters without a gradient.
        edit: one of ``EDITS``.
        who: which parameter, or which group, by number.
        count: the steps of a state that is loaded.
    """

    missing: frozenset[str] = frozenset()
    edit: str = "none"
    who: int = 0
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Script:
    """A training run.

    Attributes:
        groups: the parameters of each group.
        calls: the steps.
    """

    groups: tuple[tuple[str, ...], ...]
    calls: tuple[Call, ...]


def array(rng, name):
    shape, dtype = SHAPES[name.partition("-")[0]]
    return jnp.asarray(rng.normal(size=shape), dtype)


def assert_close(ours, theirs, what):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), what
    eps = float(jnp.finfo(theirs.dtype).eps)
    rtol, kind = RELATIVE * eps / float(jnp.finfo("float64").eps), np.promote_types(np.float32, "float64")
    np.testing.assert_allclose(ours.astype(kind), theirs.astype(kind), rtol=rtol, atol=rtol, err_msg=what)


def edited(faces, call, known, out, fresh):
    """Change the same in all faces; the copies, where they are copied."""
    pure = faces[0]
    name, at = known[call.who % len(known)], call.who % len(pure.names)
    is_inside = any(name in names for names in pure.names)
    match call.edit:
        case "rate" | "number":
            changed = ("lr", pure.options[at]["lr"] * 0.7) if call.edit == "rate" else pure.kind.change
            for face in faces:
                face.write(at, *changed)
        case "term" if "weight_decay" in pure.kind.options:
            switched = 0.0 if pure.options[at]["weight_decay"] else 0.1
            for face in faces:
                face.write(at, "weight_decay", switched)
        case "state" if name in pure.states:
            _, slots = pure.kept(name)
            halves = {slot: jnp.asarray(x * 0.5, x.dtype) for slot, x in slots.items()}
            for face in faces:
                face.load(name, call.count if pure.kind.is_counted else 1, dict(halves))
        case "value":
            value = jnp.asarray(pure.values()[name] * 0.5)
            for face in faces:
                face.assign(name, value)
        case "out" if is_inside and sum(map(len, pure.names)) > 1:
            out.append(name)
            for face in faces:
                face.take_out(name)
        case "in" if out:
            back = out.pop()
            for face in faces:
                face.put_in(back, at)
        case "add":
            known.append(f"{name.partition('-')[0]}-{len(known)}")
            value = fresh(known[-1])
            for face in faces:
                face.add(known[-1], value, 0.05)
        case "save" if not out:
            for face in faces:
                face.save_and_load()
        case "copy" | "pickle":
            return [face.copied(call.edit == "pickle") for face in faces]
    return faces


def run(kind, script, classes=FACES):
    """Run a script through the pure face and others, which must agree after every step."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        groups = [{name: array(rng, name) for name in names} for names in script.groups]
        rates = [kind.options["lr"] / (1 + at) for at in range(len(groups))]
        faces = [cls(kind, groups, rates) for cls in (Pure, *classes)]
        known, out = [name for names in script.groups for name in names], []
        for number, call in enumerate(script.calls):
            grads = {name: None if name in call.missing else array(rng, name) for name in known}
            for face in faces:
                face.step(grads)
            compare(faces, number)
            faces = edited(faces, call, known, out, functools.partial(array, rng))
        for name, _ in faces[0].states.items():
            count, slots = faces[0].kept(name)
            for face in faces[1:]:
                own, others = face.kept(name)
                what = f"state of {name} in {type(face).__name__}"
                assert own in (count, -1), what
                assert others.keys() == slots.keys(), what
                for slot, x in slots.items():
                    assert_close(others[slot], x, f"{slot}, {what}")


def compare(faces, number):
    expected = faces[0].values()
    for face in faces[1:]:
        for name, value in face.values().items():
            assert_close(value, expected[name], f"{name} after step {number} in {type(face).__name__}")


@st.composite
def scripts(draw, names, most_groups, most_calls):
    """Random scripts."""
    chosen = draw(st.lists(st.sampled_from(names), min_size=2, max_size=5, unique=True))
    of_each = draw(st.lists(st.integers(0, most_groups - 1), min_size=len(chosen), max_size=len(chosen)))
    groups = [tuple(n for n, at in zip(chosen, of_each, strict=True) if at == g) for g in range(most_groups)]
    calls = st.builds(
        Call,
        missing=st.one_of(st.just(frozenset()), st.frozensets(st.sampled_from(chosen))),
        edit=st.sampled_from(EDITS),
        who=st.integers(0, 4),
        count=st.integers(1, 50),
    )
    many = draw(st.lists(calls, min_size=2, max_size=most_calls))
    return Script(tuple(group for group in groups if group), tuple(many))


ALL = tuple(SHAPES)
MATRICES = ("matrix", "wide", "empty", "low", "large")


def late(names):
    """The last parameter joins late, the first one misses a gradient; every kind of edit happens once."""
    first, *_, last = names
    late, missed = frozenset([last]), frozenset([first])
    return Script(
        (tuple(names[:2]), tuple(names[2:])),
        (
            Call(late, "rate"),
            Call(late, "number", who=1),
            Call(late, "term", who=1),
            Call(frozenset(), "state", count=7),
            Call(missed, "value", who=1),
            Call(frozenset(), "out", who=1),
            Call(frozenset(), "save"),
            Call(missed, "in"),
            Call(frozenset(), "add"),
            Call(frozenset(), "save"),
            Call(frozenset(), "pickle"),
            Call(frozenset()),
        ),
    )


OF_EACH_FORM = ("Adam", "NAdam", "ClippedAdam", "Adafactor")
"""A kind for each way in which arrays are kept: by rows, with numbers of each row, with rates that decay, alone."""


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.parametrize("name", KINDS)
def test_late_and_missing_gradients_and_every_edit(name):
    kind = KINDS[name]
    # The others go through the same calls, and all of them take part in the random scripts.
    classes = FACES if name == "Adam" else (Minimized, Updated, Multi)
    run(kind, late(MATRICES[:3] if kind.matrices else ("vector", "matrix", "scalar")), classes)


@pytest.mark.numbers
@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_random_training(name):
    kind = KINDS[name]

    @settings(max_examples=6 if name in OF_EACH_FORM else 3, deadline=None, derandomize=True)
    @given(script=scripts(MATRICES if kind.matrices else ALL, 3, 8))
    def check(script):
        run(kind, script)

    check()


# What compiles.

LOWERED: list[str] = []
"""Every program that was lowered in this session, those of single operations too."""


def note(event, duration, **about):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        LOWERED.append(str(about.get("fun_name", "")))


jax.monitoring.register_event_duration_secs_listener(note)


@contextlib.contextmanager
def nothing_compiles():
    """No program is lowered: numbers, counts and masks are data."""
    before = len(LOWERED)
    yield
    assert LOWERED[before:] == []


NAMES = ("vector", "matrix", "scalar", "wide")
STATEFUL = (Stepped, Given, Minimized, Called, Updated, Multi)
RNG = np.random.default_rng(1)
VALUES = {name: jnp.asarray(RNG.normal(size=SHAPES[name][0]), "float32") for name in NAMES}
GRADS = {name: jnp.asarray(RNG.normal(size=SHAPES[name][0]), "float32") for name in NAMES}


def warm(cls, name="NAdam"):
    """Two groups, whose programs for equal counts, and for masks and counts, are compiled."""
    face = cls(KINDS[name], [{n: VALUES[n] for n in names} for names in (NAMES[:2], NAMES[2:])], [0.1, 0.1])
    for missing in ([], [], ["vector"], [], ["matrix", "wide"], []):
        face.step(without(missing))
    return face


def without(missing):
    return GRADS | dict.fromkeys(missing)


@pytest.mark.costly
@pytest.mark.parametrize("cls", STATEFUL)
def test_no_number_of_a_group_compiles(cls):
    face = cls(KINDS["NAdam"], [{n: VALUES[n] for n in names} for names in (NAMES[:2], NAMES[2:])], [0.1, 0.1])
    face.step(GRADS)
    face.step(GRADS)
    with nothing_compiles():
        for at, option, value in (
            (0, "lr", 0.05),  # the first time that the groups differ
            (1, "lr", 0.07),
            (1, "betas", (0.8, 0.9)),
            (0, "eps", 1e-5),
            (0, "momentum_decay", 0.1),
            (1, "lr", np.float32(0.1)),
            (0, "lr", 1),
        ):
            face.write(at, option, value)
            face.step(GRADS)


@pytest.mark.costly
@pytest.mark.parametrize("cls", STATEFUL)
def test_a_term_that_another_group_has_compiles_nothing(cls):
    face = warm(cls)
    face.write(0, "weight_decay", 0.1)
    for missing in ([], ["matrix"], []):
        face.step(without(missing))
    with nothing_compiles():
        for decay in (0.2, 0, 0.1):
            face.write(1, "weight_decay", decay)
            face.step(GRADS)


@pytest.mark.needs("torch")
@pytest.mark.costly
@pytest.mark.numbers
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam", "Adadelta", "SGD"])
def test_terms_that_some_groups_have_are_torchs(kind):
    import torch

    start = {name: np.random.default_rng(at).normal(size=(3, 5)) for at, name in enumerate("abcd")}
    decays = dict(zip(start, (0.0, 0.3, 0.0, 0.1), strict=True))
    params = {name: Parameter(jnp.asarray(x, "float32"), name) for name, x in start.items()}
    tensors = {name: torch.tensor(x, dtype=torch.float32, requires_grad=True) for name, x in start.items()}
    ours, theirs = (
        getattr(library, kind)(
            [{"params": [of[name]], "weight_decay": decay} for name, decay in decays.items()], lr=0.1
        )
        for library, of in ((optim, params), (torch.optim, tensors))
    )
    for _ in range(4):
        for name, tensor in tensors.items():
            params[name].grad, tensor.grad = params[name].value * 2 + 1, tensor.detach() * 2 + 1
        ours.step()
        theirs.step()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(params[name].value, tensor.detach(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [cls for cls in STATEFUL if cls is not Multi])
def test_gradients_that_come_and_go_compile_nothing(cls):
    face = warm(cls)
    with nothing_compiles():
        for pattern in range(16):
            face.step(without([name for at, name in enumerate(NAMES) if pattern >> at & 1]))
            face.step(GRADS)
        for _ in range(3):
            face.step(without(["scalar"]))  # frozen, and thawed again
        face.step(GRADS)


@pytest.mark.parametrize("cls", STATEFUL)
def test_a_state_with_another_count_compiles_nothing(cls):
    face = warm(cls)
    _, slots = face.kept("matrix")
    slots = {slot: np.asarray(x) for slot, x in slots.items()}
    with nothing_compiles():
        for count in (7, 500):
            face.load("matrix", count, {slot: x * np.float32(0.5) for slot, x in slots.items()})
            face.step(GRADS)


def scheduled(cls):
    """A Pyro-style face whose optimizer is a scheduler."""

    def made(self):
        return pyro_optim.ExponentialLR({"optimizer": self.kind.cls, "optim_args": ByName(self), "gamma": 0.9})

    return type(cls.__name__, (cls,), {"made": made})


@pytest.mark.parametrize("cls", STATEFUL)
def test_a_scheduler_that_moves_every_group_compiles_nothing(cls):
    if issubclass(cls, Stepped):
        face = warm(cls)
        scheduler = lr_scheduler.ExponentialLR(face.opt, 0.9)
    else:
        face = warm(scheduled(cls))
        scheduler = face.opt
    with nothing_compiles():
        for _ in range(4):
            face.step(GRADS)
            scheduler.step()


@pytest.mark.costly
@pytest.mark.parametrize("cls", STATEFUL)
def test_a_new_group_compiles_once(cls):
    face = warm(cls)
    grads = GRADS | {"new": jnp.ones(7)}
    before = programs.advance._cache_size() + programs.minimize._cache_size()
    face.add("new", jnp.ones(7), 0.3)
    for _ in range(6):
        face.step(grads)
    after = programs.advance._cache_size() + programs.minimize._cache_size()
    assert after - before <= (2 if isinstance(face, Called) else 1)  # by itself first, then together
    with nothing_compiles():
        for at in range(3):
            face.write(at, "lr", 0.01)
            face.step(grads)


def test_numbers_and_counts_compile_nothing_in_the_pure_face():
    face = warm(Pure)
    _, slots = face.kept("matrix")
    with nothing_compiles():
        face.write(0, "lr", 0.05)
        face.write(1, "betas", (0.8, 0.9))
        face.step(GRADS)
        face.load("matrix", 500, slots)
        face.step(without(["vector"]))
