"""Wrong inputs: one message from every entry point, before the loss is evaluated."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import jaxoptim
from jaxoptim import optim, rules, sampling

KEY = jax.random.key(3)
DATA = {"x": np.ones((10, 2), np.float32), "y": np.linspace(-1.0, 1.0, 10)}
START = {"w": jnp.array([0.5, -0.5]), "b": jnp.ones(())}
SGLD = rules.SGLD(lr=0.02, nbeta=5.0, localization=1.0)


def fit(params, batch):
    return jnp.mean(jnp.cosh(batch["x"] @ params["w"] + params["b"] - batch["y"]))


class Unhashable:
    """A callable that cannot name a program."""

    __hash__ = None

    def __call__(self, params, batch):
        return fit(params, batch)


class Batches:
    """An iterable that is neither a generator nor torch's."""

    def __iter__(self):
        yield DATA


class UnhashableBatches:
    """A function of keys that cannot name a program."""

    __hash__ = None

    def __call__(self, key):
        return DATA


def tensors():
    return torch.utils.data.TensorDataset(torch.ones(10, 2), torch.ones(10))


EXAMPLES = r"gives examples one by one.* a loader.*its examples: jax\.tree\.map\(lambda \*x: np\.stack\(x\), \*data\)\."
NOT_ARRAYS = r"data is a pytree of arrays whose first axes run over the data\. Give arrays"
A_RULE = r"Give a rule: jaxoptim\.rules\.SGLD\(lr=1e-4\)"

# What is given instead, the error, and its message; a function makes what a call would use up.
LOSSES = {
    "aux": (
        lambda p, b: (fit(p, b), {}),
        TypeError,
        r"returned a tuple of 2\. Return the mean loss alone, without aux",
    ),
    "value_and_grad": (jax.value_and_grad(fit), TypeError, "returned a tuple of 2"),
    "grad": (jax.grad(fit), TypeError, "returned a dict"),
    "dict": (lambda p, b: {"loss": fit(p, b)}, TypeError, "returned a dict. Return the mean loss alone"),
    "none": (lambda p, b: None, TypeError, "returned a NoneType"),
    "text": (lambda p, b: "loss", TypeError, "returned a str"),
    "one element": (lambda p, b: p["w"][:1], TypeError, r"shape \(1,\) and dtype float32"),
    "integer": (lambda p, b: jnp.array(1), TypeError, r"shape \(\) and dtype int32"),
    "float": (lambda p, b: float(fit(p, b)), TypeError, r"calls float\(\), NumPy or torch, .*Write it with jax\.numpy"),
    "NumPy": (lambda p, b: np.mean(np.asarray(p["w"])), TypeError, r"Write it with jax\.numpy"),
    "branch": (lambda p, b: fit(p, b) if p["b"] > 0 else p["b"], TypeError, "branches on a value"),
    "no batch": (lambda p: p["b"], TypeError, r"As there are data, the loss is called as loss_fn\(params, batch\)"),
    "two arguments": (lambda p, x, y: p["b"], TypeError, "missing a required argument: 'y'. Take the batch"),
    "none at all": (None, TypeError, r"loss_fn is a function of the parameters, but got NoneType\. Give loss_fn\("),
    "not hashable": (Unhashable(), TypeError, "must hash it, but Unhashable is not hashable. Wrap it in a function"),
    "of torch": (torch.nn.MSELoss(), TypeError, r"loss_fn is a module of torch.*Write it with jax\.numpy"),
}
PARAMS = {
    "none": (None, ValueError, "params has no arrays"),
    "text": ({"w": "a"}, TypeError, "'w' is a str"),
    "iterator": (iter([jnp.ones(2)]), TypeError, "params is a tree of arrays, but got a list_iterator. Give a dict"),
    "array of text": ({"w": np.array(["a"])}, TypeError, "The parameter 'w' has dtype <U1"),
    "module of torch": (torch.nn.Linear(2, 1), TypeError, "params is a module of torch.*p.detach"),
    "parameter of torch": ({"w": torch.nn.Linear(2, 1).weight}, TypeError, "'w' is a parameter of torch.*p.detach"),
    "equinox module inside": ({"a": eqx.nn.MLP(2, 1, 2, 1, key=KEY)}, TypeError, r"eqx\.partition\(model"),
    "nnx module inside": (
        [nnx.Linear(2, 1, rngs=nnx.Rngs(0))],
        TypeError,
        r"nnx\.split\(model, nnx\.Param, \.\.\.\)\[1\]",
    ),
}
INPUTS = {
    "loader inside": (lambda: {"x": DATA["x"], "y": Batches()}, TypeError, "'y' is a Batches, .* one iterable.*Zip"),
    "Dataset": (tensors, TypeError, f"data is a TensorDataset, .*{EXAMPLES}"),
    "texts": (lambda: ["a", "b"], TypeError, f"data: '0' is a str, .*{NOT_ARRAYS}"),
    "text": (lambda: "data", TypeError, f"data is a str, .*{NOT_ARRAYS}"),
    "numbers": (lambda: [1.0, 2.0], TypeError, f"data: '0' is a float, .*{NOT_ARRAYS}"),
    "scalar": (lambda: jnp.ones(()), TypeError, f"data is a scalar, .*{NOT_ARRAYS}"),
    "none inside": (lambda: DATA | {"y": None}, TypeError, f"data: 'y' is None, .*{NOT_ARRAYS}"),
    "function": (
        lambda: fit,
        TypeError,
        r"called as data\(key\), .*missing a required argument: 'batch'. Take one typed",
    ),
    "array of texts": (lambda: DATA | {"y": np.array(["a"] * 10)}, TypeError, "data: 'y' has dtype <U1, .*Encode it"),
    "array of objects": (lambda: DATA | {"y": np.array([None] * 10)}, TypeError, "data: 'y' has dtype object"),
    "of length 0": (lambda: jax.tree.map(lambda x: x[:0], DATA), ValueError, "arrays of length 0. Give at least one"),
    "missing": (lambda: None, TypeError, r"As there are no data, the loss is called as loss_fn\(params\), .*Give data"),
}
STREAMS = {
    "batch_size": (
        {"data": Batches, "batch_size": 4},
        TypeError,
        "an iterable of batches, so batch_size is None, but got 4. Make them of that size",
    ),
    "batch_size of a function": (
        {"data": lambda: lambda key: DATA, "batch_size": 4},
        TypeError,
        "a function that makes batches, so batch_size is None",
    ),
    "empty": ({"data": lambda: iter([])}, ValueError, "data is an iterable without batches"),
    "of numbers": ({"data": lambda: iter([1.0])}, TypeError, "a batch of data is a float, .*Give arrays"),
    "of scalars": ({"data": lambda: lambda key: jnp.ones(())}, TypeError, r"what data\(key\) returns is a scalar"),
    "of NumPy": (
        {"data": lambda: lambda key: np.ones(3) * float(jax.random.normal(key))},
        TypeError,
        r"data is compiled, but needs the value of an array.*jax\.numpy",
    ),
    "not hashable": ({"data": lambda: UnhashableBatches()}, TypeError, "UnhashableBatches is not hashable. Wrap it"),
    "microbatches": (
        {"data": Batches, "microbatches": 3},
        ValueError,
        "Invalid microbatches: 3. It divides batch_size, which is 10",
    ),
}
SAMPLERS = {
    "none": (None, f"but got None. {A_RULE}"),
    "text": ("SGLD", f"but got 'SGLD'. {A_RULE}"),
    "class": (rules.SGLD, "but got the class SGLD. Give an instance"),
    "torch-style class": (optim.SGLD, "but got the class SGLD. Give an instance"),
    "torch-style": (optim.SGHMC(START, lr=0.1, key=KEY), f"an optimizer SGHMC, which makes its own steps. {A_RULE}"),
    "of torch": (torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1), "an optimizer SGD, which makes its own"),
    "factory": (jaxoptim.sgld, "got the function sgld. Give what it returns, or a rule"),
    "L-BFGS": (rules.LBFGS(), "got a LBFGS, which evaluates the loss itself. Give a sampler"),
}
KEYWORDS = {
    "batch_size float": ({"batch_size": 4.0}, ValueError, r"Invalid batch_size: 4\.0\. It is an int from 1 to"),
    "batch_size bool": ({"batch_size": True}, ValueError, r"Invalid batch_size: True\."),
    "batch_size 0": ({"batch_size": 0}, ValueError, r"Invalid batch_size: 0\."),
    "key int": ({"key": 0}, TypeError, r"key must be a typed key, but got int\. Make one with jax\.random\.key"),
    "keys": ({"key": jax.random.split(KEY, 3)}, ValueError, r"got an array of keys of shape \(3,\)"),
    "num_draws text": ({"num_draws": "3"}, ValueError, r"Invalid num_draws: '3'\. It is an int >= 1"),
    "observables list": ({"observables": [len]}, TypeError, "observables is a mapping of names, but got a list"),
    "observable class": ({"observables": {"c": sampling.Covariance}}, TypeError, "'c' is the class.*an instance of an"),
    "observable's name": ({"observables": {3: len}}, TypeError, "the name 3 is no string"),
    "mask": ({"sampler": SGLD.replace(optimize_over={"w": True})}, ValueError, "optimize_over has nothing for 'b'"),
    "checkpoint": ({"checkpoint": 3}, TypeError, "checkpoint is the path of a file, but got int. Give a str or a Path"),
    "no folder": ({"checkpoint": "/nowhere/run"}, FileNotFoundError, "The folder /nowhere, .*does not exist. Make it"),
    "folder": ({"checkpoint": "/tmp"}, IsADirectoryError, "The checkpoint /tmp is a folder. Give the path of a file"),
    "misspelt": ({"num_chain": 3}, TypeError, "unexpected keyword argument 'num_chain'"),
}
WRONG = {f"loss: {name}": ({"loss_fn": of[0]}, *of[1:]) for name, of in LOSSES.items()}
WRONG |= {f"params: {name}": ({"params": of[0]}, *of[1:]) for name, of in PARAMS.items()}
WRONG |= {f"data: {name}": ({"data": of[0]}, *of[1:]) for name, of in INPUTS.items()}
WRONG |= {f"sampler: {name}": ({"sampler": of[0]}, TypeError, of[1]) for name, of in SAMPLERS.items()}
WRONG |= {f"stream: {name}": of for name, of in STREAMS.items()}
WRONG |= KEYWORDS

NUMBERS = {
    "nbeta text": ({"nbeta": "1"}, ValueError, r"Invalid nbeta: '1'\. It is a finite number > 0"),
    "nbeta infinite": ({"nbeta": float("inf")}, ValueError, r"Invalid nbeta: inf\. It is a finite number > 0"),
    "nbeta complex": ({"nbeta": 1j}, ValueError, r"Invalid nbeta: 1j"),
    "nbetas": ({"nbeta": [1.0, 2.0]}, ValueError, "a coefficient has one temperature"),
    "nbeta schedule": ({"sampler": SGLD.replace(nbeta=lambda t: t)}, ValueError, "a coefficient has one temperature"),
    "init_loss text": ({"init_loss": "1"}, ValueError, r"Invalid init_loss: '1'\. It is a finite number, .*or None"),
    "init_loss nan": ({"init_loss": float("nan")}, ValueError, "Invalid init_loss: nan"),
    "init_losses": ({"init_loss": np.ones(2)}, ValueError, "Invalid init_loss: array"),
    "rule without nbeta": ({"sampler": rules.Adam()}, TypeError, "Adam has no nbeta"),
}
SELECTIONS = {
    "text": ("w", TypeError, "selections is a list, or a mapping of names, but got 'w'"),
    "number": (3, TypeError, "a mapping of names, but got 3"),
    "set": ({"w"}, TypeError, "but got a set"),
    "no expression": (["("], ValueError, "'\\(' is no regular expression"),
    "other numbers": ([{"w": 2.0, "b": 1}], ValueError, "other numbers than zeros and ones"),
    "nothing": (["w", np.zeros(())], ValueError, "selections: number 1 selects nothing"),
    "other tree": ([["w", "b"]], ValueError, "selections and params are different trees"),
}


def refused(run, changes, error, match):
    """Raises so, in one line, and evaluates nothing."""
    evaluations = itertools.count()

    def counted(params, batch):
        jax.debug.callback(lambda: next(evaluations))
        return fit(params, batch)

    options = {"loss_fn": counted, "params": START, "sampler": SGLD, "data": DATA, "key": KEY, "num_draws": 3}
    options |= changes
    options["data"] = options["data"]() if callable(options["data"]) else options["data"]
    if options["data"] is None:
        options["loss_fn"] = fit
    with pytest.raises(error, match=match) as raised:
        run(**options)
    text = str(raised.value)
    assert "\n" not in text
    assert len(text) <= 300
    jax.effects_barrier()
    assert next(evaluations) == 0


calibrate = functools.partial(sampling.calibrate, lr=[0.01], localization=[1.0])
susceptibilities = functools.partial(
    sampling.susceptibilities, probes={"few": {"x": DATA["x"][:3], "y": DATA["y"][:3]}}
)
RUNS = {
    "sample": sampling.sample,
    "estimate_llc": sampling.estimate_llc,
    "calibrate": calibrate,
    "susceptibilities": susceptibilities,
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("case", WRONG)
def test_every_entry_point_refuses(case, run):
    refused(RUNS[run], *WRONG[case])


@pytest.mark.parametrize("run", ["estimate_llc", "calibrate"])
@pytest.mark.parametrize("case", NUMBERS)
def test_estimates_refuse(case, run):
    refused(RUNS[run], *NUMBERS[case])


@pytest.mark.parametrize("run", ["estimate_llc", "susceptibilities"])
@pytest.mark.parametrize("case", SELECTIONS)
def test_selections_are_refused(case, run):
    selections, *rest = SELECTIONS[case]
    refused(RUNS[run], {"selections": selections}, *rest)


def test_calibrate_refuses_a_transformation():
    changes = {"sampler": optax.sgd(0.1)}
    refused(calibrate, changes, TypeError, "sets lr, localization and nbeta of a rule, .*such as jaxoptim.rules.SGLD")


def test_the_advice_on_examples_works():
    stacked = jax.tree.map(lambda *x: np.stack(x), *tensors())
    assert [x.shape for x in stacked] == [(10, 2), (10,)]
    loader = torch.utils.data.DataLoader(tensors(), batch_size=5)
    for data in (stacked, loader):
        sampling.sample(lambda w, batch: jnp.mean(batch[0]) * w**2, jnp.ones(()), SGLD, data, key=KEY, num_draws=3)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"U_x": "a"}, TypeError, "U_x is a real scalar, but got a str"),
        ({"U_y": np.ones(2)}, TypeError, r"U_y is a real scalar, but got shape \(2,\) and dtype float64"),
        ({"lr": None}, TypeError, "lr is a real scalar, but got a NoneType"),
        ({"lr": -0.1}, ValueError, r"Invalid lr: -0\.1\. It is a step size >= 0"),
        ({"y": {"w": 1.0}}, ValueError, "y and x are different trees"),
    ],
    ids=["text", "vector", "none", "negative", "tree"],
)
def test_mala_acceptance_refuses(changes, error, match):
    options = {"x": 0.5, "grad_x": 2.0, "U_x": 0.5, "y": 1.0, "grad_y": 4.0, "U_y": 2.0, "lr": 0.1} | changes
    with pytest.raises(error, match=match):
        sampling.mala_acceptance(**options)
