"""What ``minimize`` does around a step: clipping, micro-batches, steps that are skipped, arguments of all kinds."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxoptim import optim
from jaxoptim.core.accumulation import accumulated
from jaxoptim.core.loss import Loss
from jaxoptim.engine import programs

RNG = np.random.default_rng(0)
SHAPES = {"first": (5, 4), "bias": (4,), "second": (4, 2), "scale": ()}
START = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
X, Y, MIX = RNG.normal(size=(12, 5)), RNG.normal(size=(12, 2)), RNG.normal(size=(4, 2))
STEPS = 200

PAIRS = {
    "SGD": (optim.SGD, torch.optim.SGD, {"lr": 0.003, "momentum": 0.9, "nesterov": True}),
    "AdamW": (optim.AdamW, torch.optim.AdamW, {"lr": 0.001, "amsgrad": True}),
    "RMSprop": (optim.RMSprop, torch.optim.RMSprop, {"lr": 1e-4, "centered": True}),
}
BOUNDS = {"norm": {"clip_norm": 1.0}, "value": {"clip_value": 0.05}, "both": {"clip_norm": 2.0, "clip_value": 0.1}}


@pytest.fixture(autouse=True)
def _double(x64):
    pass


def start():
    return {name: jnp.asarray(x) for name, x in START.items()}


def outputs(params, x):
    """A linear model, whose trajectories do not drift apart by themselves."""
    return params["scale"] + (x @ params["first"] + params["bias"]) @ MIX + x[:, :4] @ params["second"]


def loss(params, x, y):
    return 20 * jnp.mean((outputs(params, x) - y) ** 2)


def not_finite(params, factor):
    return factor * sum(jnp.sum(x**2) for x in params.values())


def torch_loss(params, x, y):
    mixed = (x @ params["first"] + params["bias"]) @ torch.tensor(MIX)
    return 20 * ((params["scale"] + mixed + x[:, :4] @ params["second"] - y) ** 2).mean()


class TestClipping:
    @pytest.mark.slow
    @pytest.mark.parametrize("bounds", [*BOUNDS.values()], ids=BOUNDS)
    @pytest.mark.parametrize("pair", [*PAIRS.values()], ids=PAIRS)
    def test_trajectories_are_torchs(self, pair, bounds):
        make, make_parent, options = pair
        ours = make(start(), groups=[("bias|scale", {"lr": options["lr"] / 2})], **options)
        theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in START.items()}
        groups = [
            {"params": [theirs["bias"], theirs["scale"]], "lr": options["lr"] / 2},
            {"params": [theirs["first"], theirs["second"]]},
        ]
        parent, x, y = make_parent(groups, **options), torch.tensor(X), torch.tensor(Y)
        for _ in range(STEPS):
            parent.zero_grad()
            value = torch_loss(theirs, x, y)
            value.backward()
            norm = torch.nn.utils.get_total_norm([param.grad for param in theirs.values()])
            if "clip_norm" in bounds:
                torch.nn.utils.clip_grad_norm_(theirs.values(), bounds["clip_norm"])
            if "clip_value" in bounds:
                torch.nn.utils.clip_grad_value_(theirs.values(), bounds["clip_value"])
            parent.step()
            assert float(ours.minimize(loss, X, Y, **bounds)) == pytest.approx(value.item(), rel=1e-10)
            assert float(ours.last.grad_norm) == pytest.approx(norm.item(), rel=1e-10)
        chex.assert_trees_all_close(
            ours.params, {name: x.detach().numpy() for name, x in theirs.items()}, rtol=1e-12, atol=1e-12
        )

    @pytest.mark.slow
    def test_another_bound_runs_the_same_program(self):
        opt = optim.Adam(start())
        opt.minimize(loss, X, Y, clip_norm=1.0)
        before = programs.minimize._cache_size()
        for bound in (0.5, 2, np.float32(3.0), jnp.array(1.0)):
            opt.minimize(loss, X, Y, clip_norm=bound)
        assert programs.minimize._cache_size() <= before + 2  # another dtype of the bound is another program

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options", [{"clip_norm": 1.0}, {"accumulate": 2}, {"skip_nonfinite": True}, {"measure": True}], ids=str
    )
    def test_the_second_step_runs_the_program_of_the_first(self, options):
        def own_loss(params, x, y):
            return loss(params, x, y)

        opt = optim.Adam(start())
        before = programs.minimize._cache_size()
        for _ in range(3):
            opt.minimize(own_loss, X, Y, **options)
        assert programs.minimize._cache_size() == before + 1

    @pytest.mark.slow
    def test_what_is_measured(self):
        opt = optim.SGD(start(), lr=0.1)
        grads = jax.grad(loss)(start(), X, Y)
        norm = np.sqrt(sum(float(jnp.sum(grad**2)) for grad in grads.values()))
        assert opt.last is None
        opt.minimize(loss, X, Y, measure=True)
        assert float(opt.last.grad_norm) == pytest.approx(norm, rel=1e-12)
        assert float(opt.last.update_norm) == pytest.approx(0.1 * norm, rel=1e-12)
        measured = opt.last
        opt.minimize(loss, X, Y)  # measures nothing
        assert opt.last is measured

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda params: optim.AdamW(params, lr=0.1, weight_decay=0.3),
            lambda params: optim.Adam(params, groups=[("bias", {"lr": 0.5})]),
            lambda params: optim.SGD(params, lr=0.1, frozen=["bias"]),
            lambda params: optim.SGD(params, lr=0.1, gradient_transform=optax.scale(3.0)),
            optim.Rprop,
            optim.Adafactor,
            lambda params: optim.SGLD(params, lr=0.1, nbeta=10.0, key=jax.random.key(0)),
        ],
        ids=["decay", "own_rates", "frozen", "transformed", "by_sign", "each_alone", "sampler"],
    )
    def test_the_norm_of_an_update_is_that_of_the_change(self, optimizer):
        opt = optimizer(start())
        for clip_norm in (None, 0.1):
            before = jax.tree.map(np.array, opt.params)
            opt.minimize(loss, X, Y, measure=True, clip_norm=clip_norm)
            change = optax.tree.norm(jax.tree.map(jnp.subtract, opt.params, before))
            chex.assert_trees_all_close(opt.last.update_norm, change, rtol=1e-10)

    @pytest.mark.slow
    def test_of_a_sampler(self):
        chains = [optim.SGLD(start(), lr=1e-3, nbeta=10.0, key=jax.random.key(0)) for _ in range(2)]
        chains[0].minimize(loss, X, Y, clip_norm=0.5)
        grads = jax.grad(loss)(start(), X, Y)
        norm = float(chains[0].last.grad_norm)
        chains[1].step(jax.tree.map(lambda grad: grad * 0.5 / (norm + 1e-6), grads))
        chex.assert_trees_all_close(chains[0].params, chains[1].params, rtol=1e-12)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"clip_norm": -1.0}, ValueError, "clip_norm >= 0"),
            ({"clip_value": "big"}, TypeError, "clip_value"),
            ({"clip_norm": np.ones(2)}, ValueError, r"clip_norm is one number, but got an array of shape \(2,\)"),
            ({"accumulate": 0}, ValueError, "at least 1"),
            ({"accumulate": 5}, ValueError, r"args\[0\] has shape \(12, 5\)"),
            ({"accumulate": 2.5}, TypeError, "integer"),
        ],
        ids=lambda x: str(x) if isinstance(x, dict) else "",
    )
    def test_wrong_options(self, options, error, message):
        opt = optim.Adam(start())
        with pytest.raises(error, match=message):
            opt.minimize(loss, X, Y, **options)
        chex.assert_trees_all_equal(opt.params, start())
        assert not opt.state

    @pytest.mark.parametrize("option", [{"clip_norm": 1.0}, {"accumulate": 2}, {"skip_nonfinite": True}], ids=str)
    def test_lbfgs_takes_none(self, option):
        with pytest.raises(TypeError, match="LBFGS evaluates the loss at several points"):
            optim.LBFGS(start()).minimize(loss, X, Y, **option)


class TestMicroBatches:
    @pytest.mark.slow
    @pytest.mark.parametrize("count", [1, 3, 12])
    def test_are_the_whole_batch(self, count):
        whole, cut = optim.AdamW(start(), lr=0.03), optim.AdamW(start(), lr=0.03)
        for _ in range(50):
            assert float(whole.minimize(loss, X, Y)) == pytest.approx(
                float(cut.minimize(loss, X, Y, accumulate=count)), rel=1e-12
            )
        chex.assert_trees_all_close(whole.params, cut.params, rtol=1e-11)
        assert int(cut.state[cut.param_groups[0]["params"][0]]["step"]) == 50

    @pytest.mark.slow
    def test_weights_make_the_mean_exact(self):
        mask = np.arange(12) < 5  # micro-batches of 4, 1 and 0 examples

        def summed(params, x, y, mask):
            return jnp.sum(mask[:, None] * (outputs(params, x) - y) ** 2), jnp.sum(mask)

        def mean(params, x, y, mask):
            total, weight = summed(params, x, y, mask)
            return total / weight

        whole, cut = optim.SGD(start(), lr=0.03), optim.SGD(start(), lr=0.03)
        for _ in range(20):
            whole.minimize(mean, X, Y, mask)
            cut.minimize(summed, X, Y, mask, accumulate=3)
        chex.assert_trees_all_close(whole.params, cut.params, rtol=1e-12)

    def test_sum(self):
        one, other = optim.SGD(start(), lr=0.01), optim.SGD(start(), lr=0.03)
        value = one.minimize(loss, X, Y, accumulate=3, accumulate_mean=False)
        assert float(other.minimize(loss, X, Y)) == pytest.approx(float(value) / 3, rel=1e-12)
        chex.assert_trees_all_close(one.params, other.params, rtol=1e-12)

    def test_aux_of_each(self):
        def with_aux(params, x, y):
            return loss(params, x, y), {"first": x[0, 0], "size": x.shape[0]}

        _, aux = optim.SGD(start(), lr=0.01).minimize(with_aux, X, Y, accumulate=4, has_aux=True)
        chex.assert_trees_all_equal(aux, {"first": X[::3, 0], "size": np.full(4, 3)})

    @pytest.mark.parametrize("args", [(), (2.0,)], ids=["nothing", "a number"])
    def test_a_batch_that_is_no_argument_is_not_cut(self, args):
        opt = optim.SGD(start(), lr=0.01)
        with pytest.raises(
            ValueError, match=r"there are none\. Pass the batch as an argument: minimize\(loss_fn, batch"
        ):
            opt.minimize(lambda params, factor=1.0: factor * loss(params, X, Y), *args, accumulate=4)

    @pytest.mark.slow
    def test_numbers_go_to_all_and_keys_are_folded(self):
        def noisy(params, x, factor, key):
            return factor * jnp.sum(params["bias"]) * jax.random.normal(key), jax.random.normal(key)

        key = jax.random.key(3)
        _, aux = optim.SGD(start(), lr=0.01).minimize(noisy, X, 2.0, key, accumulate=2, has_aux=True)
        drawn = [jax.random.normal(jax.random.fold_in(key, at)) for at in range(2)]
        chex.assert_trees_all_equal(aux, jnp.stack(drawn))

    @pytest.mark.numbers
    def test_one_gradient_and_its_activations_are_in_memory(self):
        sizes, x = {}, jax.ShapeDtypeStruct((512, 64), jnp.float32)
        weights = jax.ShapeDtypeStruct((16, 64, 64), jnp.float32)

        def deep(weights, x):
            for weight in weights:
                x = jnp.tanh(x @ weight)
            return jnp.mean(x**2)

        for count in (1, 8):

            def gradient(weights, x, count=count):
                return accumulated(Loss(deep, False), weights, (x,), count, True).grads

            sizes[count] = jax.jit(gradient).lower(weights, x).compile().memory_analysis().temp_size_in_bytes
        activations = 16 * 512 * 64 * 4
        assert sizes[1] - sizes[8] > 0.7 * activations  # 7/8 of them, less another gradient


class TestSkippedSteps:
    @pytest.mark.slow
    @pytest.mark.parametrize("make", [optim.AdamW, optim.SGD, optim.NAdam], ids=lambda make: make.__name__)
    def test_leave_everything_as_it_is(self, make):
        opt = make(start(), lr=0.1, groups=[("bias", {"lr": 0.01})])
        opt.minimize(not_finite, 1.0, skip_nonfinite=True)
        before = jax.tree.map(np.array, (opt.params, opt.state_dict()["state"]))
        for factor in (jnp.nan, jnp.inf):
            assert np.isnan(opt.minimize(not_finite, factor, skip_nonfinite=True))
            assert bool(opt.last.skipped)
        chex.assert_trees_all_equal((opt.params, opt.state_dict()["state"]), before)
        assert int(opt.last.num_skipped) == 2
        assert np.isfinite(opt.minimize(not_finite, 1.0, skip_nonfinite=True))
        assert (bool(opt.last.skipped), int(opt.last.num_skipped)) == (False, 2)

    def test_a_gradient_that_is_not_finite(self):
        opt = optim.SGD(jnp.zeros(2), lr=0.1)
        assert np.isnan(opt.minimize(lambda x: jnp.sum(jnp.sqrt(x)), skip_nonfinite=True))
        chex.assert_trees_all_equal(opt.params, np.zeros(2))

    def test_a_rate_that_decays_stays(self):
        opt = optim.ClippedAdam(start(), lr=0.1, lrd=0.5)
        opt.minimize(not_finite, jnp.nan, skip_nonfinite=True)
        assert opt.param_groups[0]["lr"] == 0.1
        opt.minimize(not_finite, 1.0, skip_nonfinite=True)
        assert opt.param_groups[0]["lr"] == 0.05

    @pytest.mark.slow
    def test_a_sampler_keeps_its_count(self):
        chain = optim.SGHMC(start(), lr=1e-3, nbeta=10.0, key=jax.random.key(0))
        chain.minimize(not_finite, jnp.nan, skip_nonfinite=True)
        assert int(chain.param_groups[0]["step"]) == 0
        chex.assert_trees_all_equal(chain.params, start())


class TestArguments:
    def test_arrays_of_other_libraries(self):
        value = optim.SGD(start(), lr=0.1).minimize(loss, jnp.asarray(X), jnp.asarray(Y))
        for x, y in ((X, Y), (torch.tensor(X), torch.tensor(Y))):
            assert optim.SGD(start(), lr=0.1).minimize(loss, x, y) == value

    @pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
    def test_what_others_write_afterwards_is_not_seen(self, make):
        ours, theirs = (optim.SGD(start(), lr=0.1) for _ in range(2))
        batch, x = jnp.asarray(X), make(X)
        ours.minimize(loss, batch, Y)
        theirs.minimize(loss, x, Y)
        x[:] = 0
        chex.assert_trees_all_equal(theirs.params, ours.params)

    def test_keywords(self):
        def scaled(params, x, *, y, factor=1.0):
            return factor * loss(params, x, y)

        value = optim.SGD(start(), lr=0.1).minimize(loss, X, Y)
        opt = optim.SGD(start(), lr=0.1)
        assert float(opt.minimize(scaled, X, y=Y, factor=2.0)) == pytest.approx(2 * float(value))
        before = programs.minimize._cache_size()
        opt.minimize(scaled, X, y=Y, factor=3.0)
        assert programs.minimize._cache_size() == before

    def test_static(self):
        def scaled(params, x, y, kind="mean", train=True):
            return loss(params, x, y) * {"mean": 1, "double": 2}[kind] + (0 if train else 100)

        value = float(optim.SGD(start(), lr=0.0).minimize(loss, X, Y))
        opt = optim.SGD(start(), lr=0.0)
        for kind, factor in (("mean", 1), ("double", 2)):
            found = opt.minimize(scaled, X, Y, kind=kind, train=False, static=["kind", "train"])
            assert float(found) == pytest.approx(factor * value + 100)

    @pytest.mark.parametrize(
        ("args", "kwargs", "message"),
        [
            (("train",), {}, "argument number 1 of the loss is the text 'train'"),
            ((), {"mode": "train"}, r"argument 'mode' of the loss is the text .* static=\['mode'\]"),
            (({"x": [1, min]},), {}, r"argument number 1 of the loss has at 'x.1' a builtin_function_or_method"),
            ((), {"static": "mode"}, "static names 'mode', which is no keyword argument"),
            ((), {"static": ["x"], "x": np.ones(2)}, "static argument 'x' is a ndarray"),
            ((), {"static": 1}, r"static takes the names of keyword arguments, such as \['train'\], but got 1"),
            (({"x": np.array(["a"])},), {}, "argument number 1 of the loss has at 'x' an array of dtype <U1"),
        ],
        ids=["text", "text by keyword", "function", "unknown", "array", "number of an argument", "array of text"],
    )
    def test_wrong_ones(self, args, kwargs, message):
        with pytest.raises(TypeError, match=message):
            optim.SGD(start(), lr=0.1).minimize(not_finite, *args, **kwargs)

    @pytest.mark.parametrize(
        ("args", "kwargs", "words"),
        [
            ((), {"train": True}, r"Such numbers are train \(True\)\..*train=True, static=\['train'\]"),
            ((False,), {}, r"Such numbers are number 1 \(False\)\..* by keyword: "),
            ((), {"train": 3, "count": 2}, r"Such numbers are train \(3\), count \(2\)"),
        ],
        ids=["flag", "by position", "count"],
    )
    @pytest.mark.parametrize("make", [optim.SGD, optim.LBFGS], ids=lambda make: make.__name__)
    def test_numbers_that_decide_say_that_they_are_static(self, make, args, kwargs, words):
        def deciding(params, train, count=1):
            return sum(jnp.sum(params["bias"]) for _ in range(count)) if train else 0.0

        opt = make(start())
        with pytest.raises(TypeError, match=words) as error:
            opt.minimize(deciding, *args, **kwargs)
        assert "\n" not in str(error.value)
        chex.assert_trees_all_equal(opt.params, start())

    def test_an_array_that_decides_is_jaxs_error(self):
        with pytest.raises(jax.errors.TracerBoolConversionError):
            optim.SGD(start()).minimize(lambda params, x: 0.0 if x else 1.0, np.array(True))


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=["whole", "accumulated"])
@pytest.mark.parametrize(
    ("returned", "words"),
    [(lambda x: x, "the loss alone"), (lambda x: (x, 1, 2), "a tuple of 3")],
    ids=["loss", "three"],
)
def test_an_auxiliary_output_that_is_missing_says_so(options, returned, words):
    with pytest.raises(TypeError, match=rf"has_aux=True expects \(loss, aux\), but the function returns {words}"):
        optim.SGD(jnp.ones(2), lr=0.1).minimize(lambda p, x: returned(jnp.sum(p)), X, has_aux=True, **options)


def test_an_auxiliary_output_that_nobody_expects_says_what_to_do():
    opt = optim.SGD(jnp.ones(2), lr=0.1)
    with pytest.raises(TypeError, match=r"the function returns a tuple of 2. Return the loss alone, or \(loss, aux\)"):
        opt.minimize(lambda x: (jnp.sum(x), x))
    chex.assert_trees_all_equal(opt.params, jnp.ones(2))
