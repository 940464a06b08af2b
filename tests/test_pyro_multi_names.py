"""How parts of a mixed optimizer name parameters: by name, by the site of a network, by regular expressions."""

import copy
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen as nn
from flax import nnx
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.infer import SVI as Parent
from numpyro.infer import Trace_ELBO

import jaxoptim
from jaxoptim import rules
from jaxoptim.interop.numpyro import to_numpyro
from jaxoptim.optim import Parameter
from jaxoptim.pyro import optim
from jaxoptim.pyro.infer import SVI
from jaxoptim.pyro.optim.multi import MixedMultiOptimizer, Newton

LAYERS = ["Dense_0.kernel", "Dense_0.bias", "Dense_1.kernel", "Dense_10.kernel"]
ENCODER, DECODER = ([f"{site}$params.{layer}" for layer in LAYERS] for site in ("encoder", "decoder"))
FIRST = [name for name in DECODER if "Dense_1." in name]
BIASES = ["encoder$params.Dense_0.bias", "decoder$params.Dense_0.bias"]
NAMES = [*ENCODER, *DECODER, "loc"]

FORMS = {
    "site": (["decoder$params"], DECODER),
    "layer": (["decoder$params.Dense_1"], FIRST),
    "site_and_name": (["decoder$params", "loc"], [*DECODER, "loc"]),
    "pattern": ([re.compile(r".*\.bias")], BIASES),
    "pattern_alone": (re.compile(r".*\.bias"), BIASES),
    "pattern_of_whole_names": (re.compile("loc|decoder"), ["loc"]),
    "all_three": (["loc", "encoder$params", re.compile(r"decoder.*_1\..*")], ["loc", *ENCODER, *FIRST]),
    "overlap_in_one_part": (["decoder$params", "decoder$params.Dense_1.kernel", re.compile("dec.*")], DECODER),
}


def made(names=NAMES):
    values = np.random.default_rng(0).normal(size=(len(names), 3)).astype(np.float32)
    return {name: Parameter(value, name) for name, value in zip(names, values, strict=True)}


def arrays(params):
    return {name: jnp.asarray(param.value) for name, param in params.items()}


def loss(values):
    """Of all parameters together."""
    total = sum(jnp.sum((x - k) ** 2) + 0.1 * jnp.sum(x**4) for k, x in enumerate(values.values()))
    return total + 0.1 * sum(jnp.sum(x) for x in values.values()) ** 2


def two_parts(given, others):
    return MixedMultiOptimizer([(given, optim.Adam({"lr": 0.1})), (others, rules.SGD(lr=0.01, momentum=0.9))])


def by_step(mixed):
    params = made()
    for _ in range(3):
        mixed.step(loss, params)
    return arrays(params)


def by_get_step(mixed):
    return mixed.get_step(loss, made())


def by_transformation(mixed):
    tx, values = jaxoptim.transformation(mixed), arrays(made())
    state = tx.init(values)

    @jax.jit
    def one(values, state):
        value, grads = jax.value_and_grad(loss)(values)
        updates, state = tx.update(grads, state, values, value=value, grad=grads, value_fn=loss)
        return jax.tree.map(jnp.add, values, updates), state

    for _ in range(3):
        values, state = one(values, state)
    return values


class TestForms:
    @pytest.mark.costly
    @pytest.mark.parametrize("run", [by_step, by_get_step, by_transformation], ids=lambda run: run.__name__)
    @pytest.mark.parametrize("form", FORMS)
    def test_as_all_names_listed(self, form, run):
        given, listed = FORMS[form]
        others = [name for name in NAMES if name not in listed]
        chex.assert_trees_all_equal(run(two_parts(given, others)), run(two_parts(listed, others)))

    @pytest.mark.slow
    @pytest.mark.parametrize("call", ["step", "get_step"])
    def test_second_derivatives_by_a_site(self, call):
        given, listed = (
            MixedMultiOptimizer([(names, Newton({"loc": 0.5})), ([*ENCODER, *DECODER], rules.SGD(lr=0.01))])
            for names in (re.compile("loc"), ["loc"])
        )
        params, others = made(), made()
        new, expected = getattr(given, call)(loss, params), getattr(listed, call)(loss, others)
        chex.assert_trees_all_equal((new, arrays(params)), (expected, arrays(others)))

    def test_a_name_is_that_parameter_alone(self):
        mixed = MixedMultiOptimizer([(["net"], rules.SGD(lr=0.0)), (["net.scale"], rules.SGD(lr=1.0))])
        new = mixed.get_step(lambda values: sum(values.values()), {"net": 1.0, "net.scale": 1.0})
        assert new == {"net": 1.0, "net.scale": 0.0}

    @pytest.mark.slow
    def test_a_part_in_a_part(self):
        inner = two_parts(re.compile(r".*\.bias"), re.compile(r".*\.kernel"))
        nested = MixedMultiOptimizer([(["decoder$params", "encoder$params"], inner), (["loc"], Newton())])
        kernels = [name for name in NAMES if name.endswith("kernel")]
        flat = MixedMultiOptimizer([*two_parts(BIASES, kernels).parts, (["loc"], Newton())])
        chex.assert_trees_all_equal(by_step(nested), by_step(flat))

    def test_parts_are_lists(self):
        pattern = re.compile("loc")
        mixed = two_parts(pattern, (name for name in ["encoder$params"]))
        assert [names for names, _ in mixed.parts] == [[pattern], ["encoder$params"]]
        mixed.parts[1][0].append("decoder$params")
        chex.assert_trees_all_equal(by_step(mixed), by_step(two_parts(["loc"], [*ENCODER, *DECODER])))

    @pytest.mark.slow
    def test_new_parameters_below_a_site(self):
        mixed, params = two_parts(["decoder$params"], ["loc"]), made([*FIRST, "loc"])
        mixed.step(loss, params)
        params |= made(["decoder$params.Dense_2.kernel"])
        before = arrays(params)
        mixed.step(loss, params)
        assert all((before[name] != param.value).all() for name, param in params.items())

    @pytest.mark.slow
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
    def test_copies(self, copied):
        mixed = two_parts([re.compile("loc"), "encoder$params"], ["decoder$params"])
        chex.assert_trees_all_equal(by_step(copied(mixed)), by_step(mixed))


CALLS = {
    "step": lambda mixed, params: mixed.step(loss, params),
    "get_step": lambda mixed, params: mixed.get_step(loss, params),
    "init": lambda mixed, params: jaxoptim.transformation(mixed).init(arrays(params)),
}
ALL = re.compile(".*")
REFUSED = {
    "layer_1_is_not_10": (
        ["decoder$params.Dense_1", "decoder$params.Dense_0"],
        ["encoder$params", "loc"],
        ValueError,
        "The parameter 'decoder$params.Dense_10.kernel' is in no part",
    ),
    "pattern_of_a_part_of_names": ([re.compile("lo")], ["encoder$params", "decoder$params"], KeyError, "'lo'"),
    "beginning_without_a_dot": (["decoder"], ALL, KeyError, "names 'decoder', but the parameters are"),
    "site_misspelled": (["decodr$params"], ALL, KeyError, "beginning of names up to a dot, or a regular expression"),
    "site_and_its_name": (["decoder$params"], [FIRST[0], "loc"], ValueError, f"optimize parameter '{FIRST[0]}' by two"),
    "site_and_pattern": (["decoder$params"], ALL, ValueError, f"parameter '{DECODER[0]}' by two different optimizers"),
    "one_pattern_twice": (ALL, [ALL], ValueError, f"parameter '{NAMES[0]}' by two different optimizers"),
    "no_names": ([], [], ValueError, "The parts have no names"),
}


class TestErrors:
    @pytest.mark.slow
    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("case", REFUSED)
    def test_refused(self, case, call):
        first, second, error, message = REFUSED[case]
        params = made()
        before = arrays(params)
        with pytest.raises(error, match=re.escape(message)) as raised:
            CALLS[call](two_parts(first, second), params)
        assert "\n" not in raised.value.args[0]
        chex.assert_trees_all_equal(arrays(params), before)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("loc", r"string 'loc'. Give \['loc'\], or a compiled regular expression"),
            ([0], "but got 0"),
            ([None], "but got None"),
            ([re.compile(b"loc")], "regular expressions of strings, but got re.compile"),
        ],
        ids=["string", "int", "none", "bytes"],
    )
    def test_no_names(self, given, message):
        with pytest.raises(TypeError, match=message):
            MixedMultiOptimizer([(given, rules.Adam())])

    def test_in_the_part_of_a_part(self):
        """As in a part: all that it is given is all that there is."""
        nested = MixedMultiOptimizer([(ALL, two_parts(["decoder$params", "encoder$params", "loc"], ["scale"]))])
        for call in ("step", "get_step"):
            with pytest.raises(KeyError, match="names 'scale'"):
                getattr(nested, call)(loss, made())


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(3)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](nnx.tanh(self.layers[0](x)))


NETWORKS = {
    "flax": (lambda name: flax_module(name, Linen(), input_shape=(1, 2)), ["Dense_0", "Dense_1"]),
    "nnx": (lambda name: nnx_module(name, Nnx(nnx.Rngs(0))), ["layers.0", "layers.1"]),
}
X = jnp.linspace(-1.0, 1.0, 12).reshape(6, 2)


def autoencoder(network):
    def model(x):
        net, noise = network("decoder"), numpyro.param("noise", 0.5, constraint=dist.constraints.positive)
        with numpyro.plate("n", x.shape[0]):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(net(z), noise).to_event(1), obs=x)

    def guide(x):
        net = network("encoder")
        with numpyro.plate("n", x.shape[0]):
            numpyro.sample("z", dist.Normal(net(x), 0.3).to_event(1))

    return model, guide


def of_networks(encoder, decoder):
    return MixedMultiOptimizer([(encoder, optim.Adam({"lr": 0.05})), (decoder, rules.SGD(lr=0.01, momentum=0.9))])


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_sites_of_networks_in_svi(kind):
    network, layers = NETWORKS[kind]
    weights = [f"{layer}.{leaf}" for layer in layers for leaf in ("bias", "kernel")]
    encoder, decoder = ([f"{site}$params.{weight}" for weight in weights] for site in ("encoder", "decoder"))
    fits = [
        SVI(*autoencoder(network), of_networks(*names), Trace_ELBO())
        for names in (
            (encoder, [*decoder, "noise"]),
            (["encoder$params"], ["decoder$params", "noise"]),
            ([f"encoder$params.{layer}" for layer in layers], re.compile("decoder.*|noise")),
        )
    ]
    losses = [[svi.step(X) for _ in range(3)] for svi in fits]
    assert sorted(fits[0].params) == sorted([*encoder, *decoder, "noise"])
    for svi, its in zip(fits[1:], losses[1:], strict=True):
        assert its == losses[0]
        chex.assert_trees_all_equal(arrays(svi.params), arrays(fits[0].params))


@pytest.mark.slow
def test_sites_of_networks_in_numpyros_svi():
    network, _ = NETWORKS["flax"]
    mixed = of_networks(["encoder$params"], ["decoder$params", "noise"])
    key, ours = jax.random.key(0), SVI(*autoencoder(network), mixed, Trace_ELBO())
    result = Parent(*autoencoder(network), to_numpyro(mixed), Trace_ELBO()).run(key, 3, X, progress_bar=False)
    np.testing.assert_allclose([ours.step(X) for _ in range(3)], result.losses, rtol=1e-5)
    chex.assert_trees_all_close(ours.get_params(), result.params, rtol=1e-5, atol=1e-6)


def staged(stage):
    """Its param statements depend on an argument."""
    loc = numpyro.param("loc", 3.0)
    late = sum(numpyro.param(name, 1.0) for name in ("late_a", "late_b")) if stage else 0.0
    numpyro.factor("height", -(loc + late))


def nothing(stage):
    pass


LATE = {
    "names": ["late_a", "late_b"],
    "pattern": re.compile("late_.*"),
    "both": ["late_a", re.compile("late_b|never")],
}
ELBO = Trace_ELBO()


class TestLateInSVI:
    """Steps of gradient 1: each parameter falls by its rate."""

    @staticmethod
    def fit(late, rest=("loc",)):
        return SVI(staged, nothing, MixedMultiOptimizer([(rest, rules.SGD(lr=1.0)), (late, rules.SGD(lr=0.25))]), ELBO)

    @pytest.mark.costly
    @pytest.mark.parametrize("form", LATE)
    def test_names_of_other_steps(self, form):
        svi = self.fit(LATE[form])
        assert [svi.step(stage) for stage in (0, 1, 0, 1)] == [3.0, 4.0, 1.0, 1.5]
        assert arrays(svi.params) == {"loc": -1.0, "late_a": 0.5, "late_b": 0.5}

    @pytest.mark.slow
    def test_names_in_the_part_of_a_part(self):
        inner = MixedMultiOptimizer([(["loc"], rules.SGD(lr=1.0)), (["late_a"], rules.SGD(lr=0.25))])
        outer = MixedMultiOptimizer([(["loc", "late_a"], inner), (["late_b"], rules.SGD(lr=0.25))])
        svi = SVI(staged, nothing, outer, ELBO)
        assert [svi.step(stage) for stage in (0, 1, 0, 1)] == [3.0, 4.0, 1.0, 1.5]

    @pytest.mark.parametrize("late", [["late_a", "laet_b"], re.compile("late_a|laet_b")], ids=["name", "pattern"])
    def test_a_misspelled_one_is_told_when_its_parameter_arrives(self, late):
        svi = self.fit(late)
        svi.step(0)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"'late_b' is in no part.*laet_b"):
                svi.step(1)
        assert list(svi.params) == ["loc"]
        assert svi.step(0) == 2.0

    def test_a_misspelled_one_of_the_first_step(self):
        with pytest.raises(ValueError, match=r"'loc' is in no part.* of which 'lok', 'late_a', 'late_b' reach"):
            self.fit(LATE["names"], ["lok"]).step(0)

    def test_two_parts_of_one_that_is_late(self):
        svi = self.fit(LATE["pattern"], ["loc", "late_b"])
        svi.step(0)
        with pytest.raises(ValueError, match="optimize parameter 'late_b' by two different optimizers"):
            svi.step(1)
        assert list(svi.params) == ["loc"]

    def test_parameters_shared_by_two(self):
        """Each reaches what the other does not."""
        mixed = MixedMultiOptimizer([(["mine"], rules.SGD(lr=1.0)), (re.compile("its"), rules.SGD(lr=0.5))])

        def height(name):
            return lambda: numpyro.factor("height", -numpyro.param(name, 3.0))

        first = SVI(height("mine"), lambda: None, mixed, ELBO)
        second = SVI(height("its"), lambda: None, mixed, ELBO, params=first.params)
        assert [svi.step() for svi in (first, second, first, second)] == [3.0, 3.0, 2.0, 2.5]
