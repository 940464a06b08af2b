"""The test kit for rules: those of the library pass, and broken ones fail with a message that says why."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxoptim import rules
from jaxoptim.core import Rule, Scalar, full_like, rule
from jaxoptim.testing import check_rule
from table import FIRST

SAMPLERS = [rules.SGLD(), rules.SGHMC(), rules.SGNHT(), rules.PSGLD()]
RULES = [*(case.ours() for case in FIRST), *SAMPLERS]


@pytest.mark.slow
@pytest.mark.parametrize("own", RULES, ids=lambda own: type(own).__name__)
def test_the_rules_of_the_library_pass(own):
    check_rule(own)


# Broken rules.


@rule
class Momentum(Rule):
    """A good rule, which each of the others breaks in one place."""

    lr: Scalar = 0.1
    momentum: Scalar = 0.9

    def init(self, param):
        return {"buffer": full_like(param)}

    def update(self, grad, slots, param, step):
        buffer = self.momentum * slots["buffer"] + grad
        return -self.lr * buffer, {"buffer": buffer}


@rule
class LowSlot(Momentum):
    def init(self, param):
        return {"buffer": jnp.zeros(param.shape, jnp.float16)}


@rule
class WideSlot(Momentum):
    def update(self, grad, slots, param, step):
        change, new = super().update(grad, slots, param, step)
        return change, {"buffer": new["buffer"].astype("float32")}


@rule
class LowChange(Momentum):
    def update(self, grad, slots, param, step):
        change, new = super().update(grad, slots, param, step)
        return change.astype("bfloat16"), new


@rule
class OneNumber(Momentum):
    def update(self, grad, slots, param, step):
        change, new = super().update(grad, slots, param, step)
        return jnp.sum(change), new


@rule
class FlatSlot(Momentum):
    def update(self, grad, slots, param, step):
        change, new = super().update(grad, slots, param, step)
        return change, {"buffer": new["buffer"].reshape(-1)}


@rule
class OtherSlot(Momentum):
    def update(self, grad, slots, param, step):
        change, new = super().update(grad, slots, param, step)
        return change, {"velocity": new["buffer"]}


@rule
class InPlace(Momentum):
    def update(self, grad, slots, param, step):
        slots["buffer"] = self.momentum * slots["buffer"] + grad
        return -self.lr * slots["buffer"], slots


@rule
class SharedSlot(Momentum):
    def init(self, param):
        return {"buffer": param}


@rule
class Normed(Momentum):
    """It divides by the norm of an array, and says that it is elementwise."""

    def update(self, grad, slots, param, step):
        return super().update(grad / (1 + jnp.sqrt(jnp.sum(grad * grad))), slots, param, step)


@rule
class Branching(Momentum):
    def update(self, grad, slots, param, step):
        return super().update(grad if self.lr > 0 else -grad, slots, param, step)


@rule
class Infinite(Momentum):
    def update(self, grad, slots, param, step):
        return super().update(grad / (param - param), slots, param, step)


@rule
class NoSlope(Momentum):
    def update(self, grad, slots, param, step):
        return super().update(grad * jnp.sqrt(self.lr - self.lr), slots, param, step)


@rule
class RealOnly(Momentum):
    def update(self, grad, slots, param, step):
        grad = jnp.where(step > 1, grad, grad * jnp.finfo(grad.dtype).max * 4)
        return super().update(grad, slots, param, step)


class Undecorated(Momentum):
    """The @rule is forgotten."""


BROKEN = {
    LowSlot: r"'arrays'.*'buffer'.*float16 where the rule computes in float32",
    WideSlot: r"'arrays'.*float64",
    LowChange: r"'arrays'.*dtype bfloat16 for 'scalar', which has \(\) and float32",
    OneNumber: r"'arrays'.*a change of shape \(\).*for 'vector', which has \(5,\)",
    FlatSlot: r"'arrays'.*shape",
    OtherSlot: r"'arrays'.*differ in the slots \['buffer', 'velocity'\]",
    InPlace: r"'arrays'.*in place",
    SharedSlot: r"'arrays'.*'buffer' of 'scalar' is an array that stands elsewhere too",
    Normed: r"'packing'.*says it is elementwise",
    Branching: r"'jit'.*TracerBoolConversionError",
    Infinite: r"'dtypes'.*stay finite",
    NoSlope: r"'grad'.*finite",
    RealOnly: r"'dtypes'.*stay finite",
    Undecorated: r"'structure'.*@rule",
}


@pytest.mark.costly
@pytest.mark.parametrize("broken", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_rule_fails_with_what_is_wrong(broken):
    few = {"scalar": jnp.array(0.5), "vector": jnp.linspace(-1, 1, 5), "matrix": jnp.linspace(0.1, 1, 6).reshape(3, 2)}
    with pytest.raises(AssertionError, match=rf"(?s)^{broken.__name__} fails the check {BROKEN[broken]}"):
        check_rule(broken(), few)


@pytest.mark.slow
def test_the_faces_and_missing_gradients_are_checked(monkeypatch):
    few = {"a": jnp.linspace(-1, 1, 5), "b": jnp.array(0.5)}
    check_rule(Momentum(), few)
    monkeypatch.setattr("jaxoptim.optim.Optimizer.step", lambda self, grads: None)
    with pytest.raises(AssertionError, match="'faces': the torch-style and the Pyro-style"):
        check_rule(Momentum(), few)


@rule
class WithoutNumbers(Rule):
    def init(self, param):
        return {}

    def update(self, grad, slots, param, step):
        return -0.1 * grad, slots


@pytest.mark.slow
def test_a_rule_without_numbers_passes():
    check_rule(WithoutNumbers(), {"w": jnp.ones(2)})


@rule
class OnlyCubes(Momentum):
    def check_param(self, name, param):
        raise ValueError("It takes cubes.")


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(TypeError, match=r"takes an instance of a Rule"):
        check_rule(rules.Adam)
    with pytest.raises(TypeError, match=r"takes an instance of a Rule"):
        check_rule(rules.LBFGS())
    with pytest.raises(ValueError, match="OnlyCubes takes none of the arrays"):
        check_rule(OnlyCubes())


@pytest.mark.slow
def test_the_library_does_not_import_the_kit_nor_chex():
    code = "import sys, jaxoptim; sys.exit(bool({'chex', 'jaxoptim.testing'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_precision_is_left_as_it_was():
    before = jax.config.jax_enable_x64
    check_rule(rules.SGD(), {"w": jnp.ones(2)})
    assert jax.config.jax_enable_x64 == before
