"""devinterp 2's SGMCMC and ours on the same gradients and noise, in a process that has no devinterp 1.

``python sgmcmc_live.py results`` writes what both sides of each case of ``CASES`` have come to, a pickle.
"""

import dataclasses
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

SHAPES = [(6, 4), (5,), ()]
STEPS = 200
SWAPPED = 40
"""The steps that one side makes from the state of the other."""

_random = np.random.default_rng(1)
CENTERS = [np.asarray(_random.normal(size=shape)) for shape in SHAPES]
MASKS = [np.asarray(_random.random(shape) < 0.7) for shape in SHAPES]
BASE = {"lr": 0.01, "nbeta": 3.0}
TERMS = BASE | {"weight_decay": 0.3, "localization": 2.0, "noise_level": 0.7, "save_metrics": True, "sketch_dim": 7}
RMSPROP = {"preconditioner": "rmsprop", "preconditioner_kwargs": {"alpha": 0.9, "eps": 0.2}}

CASES = {
    "sgld": ("sgld", BASE),
    "sgld with its terms": ("sgld", TERMS),
    "sgld in a box, masked": ("sgld", TERMS | {"bounding_box_size": 0.3, "mask": MASKS}),
    "rmsprop": ("rmsprop_sgld", BASE),
    "rmsprop with its terms": ("rmsprop_sgld", TERMS | {"alpha": 0.9, "eps": 0.05}),
    "rmsprop in a box, masked": ("rmsprop_sgld", TERMS | {"bounding_box_size": 0.3, "mask": MASKS}),
    "sgnht": ("sgnht", BASE | {"diffusion_factor": 0.2}),
    "sgnht in a box": ("sgnht", BASE | {"bounding_box_size": 0.2, "save_metrics": True}),
    "a box of zero": ("SGMCMC", BASE | {"bounding_box_size": 0.0}),
    "prior by a number": ("SGMCMC", BASE | {"prior": 2.0}),
    "prior by its name": ("SGMCMC", BASE | {"prior": "initial"} | RMSPROP),
    "prior by centers": ("SGMCMC", BASE | {"prior": CENTERS, "save_metrics": True}),
    "prior around zero": ("SGMCMC", BASE | {"prior": ("gaussian", 0.5, None), "preconditioner": None}),
    "composite prior": (
        "SGMCMC",
        BASE
        | {"prior": ("composite", ("uniform",), ("gaussian", 1.5, CENTERS), ("gaussian", 0.5, None)), "mask": MASKS}
        | RMSPROP,
    ),
}
"""How it is made, and the options; a prior as its kind and arguments."""
NORMS = ("scaled_grad", "unscaled_grad", "localization", "weight_decay", "noise", "distance")
METRICS = (*NORMS, "dot_grad_prior", "dot_grad_noise", "dot_prior_noise", "numel")
OBJECTS = ("prior", "preconditioner", "mask", "metrics")
"""What devinterp keeps in its groups as Python objects."""
SKETCHES = ("scaled_grad", "unscaled_grad", "localization", "weight_decay", "noise")
WARNED = {"sgld": {"noise_level": 0.5}, "rmsprop_sgld": {"noise_level": 0.5}, "sgnht": {}}


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two libraries.

    Attributes:
        cls: the class.
        priors: the module of its priors.
        array: an array of NumPy as one of the library's.
        cell: an array of NumPy as a parameter.
        host: the value of a parameter.
        step: one step with gradients and noise of NumPy.
    """

    cls: Any
    priors: Any
    array: Callable[..., Any]
    cell: Callable[..., Any]
    host: Callable[..., Any]
    step: Callable[..., Any]

    def made(self, case, start):
        """A sampler at a start, and its parameters; in two groups unless options are lists for all parameters."""
        kind, options = CASES[case]
        cells = [self.cell(x) for x in start]
        groups = [{"params": cells[:2]}, {"params": cells[2:], "lr": 0.02}]
        if "mask" in options or isinstance(options.get("prior"), list):
            groups = [{"params": cells}]
        options = {name: self.built(x) if name in ("prior", "mask") else x for name, x in options.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return (self.cls if kind == "SGMCMC" else getattr(self.cls, kind))(groups, **options), cells

    def built(self, given):
        """A prior, or a list of arrays."""
        if isinstance(given, list):
            return [self.array(x) for x in given]
        if not isinstance(given, tuple):
            return given
        name, *arguments = given
        if name == "gaussian":
            return self.priors.GaussianPrior(arguments[0], center=self.built(arguments[1]))
        members = [self.built(x) for x in arguments]
        return self.priors.CompositePrior(members) if name == "composite" else self.priors.UniformPrior()

    def walk(self, sampler, cells, first, last):
        """Steps at a falling rate; the second parameter misses every seventh gradient."""
        for at in range(first, last):
            values = [self.host(cell) for cell in cells]
            grads = [np.cos(x) * slope for x, slope in zip(values, SLOPES, strict=True)]
            if at % 7 == 3:
                grads[1] = None
            self.step(sampler, cells, grads, NOISE[at])
            for group in sampler.param_groups:
                group["lr"] *= 0.999
        return [self.host(cell) for cell in cells]

    def warned(self, kind):
        """What a factory warns of."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(self.cls, kind)([self.cell(np.ones(2))], **WARNED[kind])
        return [str(warning.message) for warning in caught]


_random = np.random.default_rng(0)
START, SLOPES = ([np.asarray(_random.normal(size=shape)) for shape in SHAPES] for _ in range(2))
NOISE = [[np.asarray(_random.normal(size=shape)) for shape in SHAPES] for _ in range(STEPS + SWAPPED)]


def their_side():
    import torch
    from devinterp.optim import SGMCMC, prior

    def step(sampler, cells, grads, noise):
        for cell, grad in zip(cells, grads, strict=True):
            cell.grad = None if grad is None else torch.tensor(grad)
        given = iter([x for x, grad in zip(noise, grads, strict=True) if grad is not None])

        def normal(mean, std, size, device, generator):
            return torch.tensor(next(given)) * std

        with mock.patch("torch.normal", normal):
            sampler.step()

    torch.set_default_dtype(torch.float64)  # that of the noise, and of the root of 2A
    return Side(
        cls=SGMCMC,
        priors=prior,
        array=torch.tensor,
        cell=lambda x: torch.nn.Parameter(torch.tensor(x)),
        host=lambda cell: cell.detach().numpy().copy(),
        step=step,
    )


def our_side():
    import jax.numpy as jnp

    from jaxoptim import optim
    from jaxoptim.optim import prior

    def step(sampler, cells, grads, noise):
        for cell, grad in zip(cells, grads, strict=True):
            cell.grad = None if grad is None else jnp.asarray(grad)
        given = iter(noise)
        sampler.step(noise=[[next(given) for _ in group["params"]] for group in sampler.param_groups])

    return Side(
        cls=optim.SGMCMC,
        priors=prior,
        array=jnp.asarray,
        cell=optim.Parameter,
        host=lambda cell: np.asarray(cell.value),
        step=step,
    )


def state_of(sampler, cells):
    """The arrays of the state of each parameter."""
    idle = ("param_idx", "momentum", "thermostat")
    states = [{k: x for k, x in sampler.state[cell].items() if x is not None and k not in idle} for cell in cells]
    return [{k: np.array(x.tolist()) for k, x in state.items()} for state in states]


def metrics_of(sampler):
    """The metrics by name."""
    found = sampler.get_metrics()
    return {name: float(getattr(found, name)) for name in METRICS}


def hash_as_ours(parent):
    """Give a sampler of devinterp the places and signs of our hash for its tables."""
    import jax
    import torch

    from jaxoptim.core import sketches

    if (table := parent._sketch) is not None:
        key = jax.random.key_data(jax.random.key(0, impl="threefry2x32"))
        words = np.asarray(sketches.words(key, sketches.place(0), (table.input_dim,)), np.int64)
        table.hash_indices = torch.tensor((words >> 1) % table.output_dim)
        table.hash_signs = torch.tensor(1.0 - 2 * (words & 1), dtype=torch.float32)


def sketches_of(sampler):
    """The sketches of the last step by name."""
    found = sampler.get_sketches()
    return {name: np.array(getattr(found, name).tolist()) for name in SKETCHES}


def swapped(theirs, ours, case, parent, chain, values):
    """Where both sides come to from the state of the other."""
    from jaxoptim import interop

    their_state, our_state = parent.state_dict(), interop.torch.to_torch(chain.state_dict())
    other, cells = ours.made(case, values)
    other.load_state_dict(their_state)
    to_ours = ours.walk(other, cells, STEPS, STEPS + SWAPPED)
    other, cells = theirs.made(case, values)
    objects = [{name: x for name, x in group.items() if name in OBJECTS} for group in other.param_groups]
    other.load_state_dict(our_state)
    for group, own in zip(other.param_groups, objects, strict=True):
        group |= own
    return to_ours, theirs.walk(other, cells, STEPS, STEPS + SWAPPED)


def results():
    """For each case what theirs and ours have come to; and what both warn of."""
    theirs, ours = their_side(), our_side()
    found = {"warnings": {kind: (theirs.warned(kind), ours.warned(kind)) for kind in WARNED}}
    for case, (_, options) in CASES.items():
        (parent, tensors), (chain, cells) = theirs.made(case, START), ours.made(case, START)
        hash_as_ours(parent)
        values = theirs.walk(parent, tensors, 0, STEPS), ours.walk(chain, cells, 0, STEPS)
        metrics = (metrics_of(parent), metrics_of(chain)) if "save_metrics" in options else ({}, {})
        sketches = (sketches_of(parent), sketches_of(chain)) if "sketch_dim" in options else ({}, {})
        state = state_of(parent, tensors), state_of(chain, cells)
        exchanged = swapped(theirs, ours, case, parent, chain, values[0])
        ends = theirs.walk(parent, tensors, STEPS, STEPS + SWAPPED)
        found[case] = {"values": values, "metrics": metrics, "sketches": sketches, "state": state}
        found[case]["swapped"] = (ends, *exchanged)
    return found


if __name__ == "__main__":
    with open(sys.argv[1], "wb") as file:
        pickle.dump(results(), file)
