"""What the tests of averages share: the parameters, and each average of torch's beside ours."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxoptim.optim import swa_utils
from jaxoptim.optim.swa_utils import AveragedModel

theirs = torch.optim.swa_utils

SHAPES = {"dense": {"kernel": (4, 3), "bias": (3,)}, "large": (200, 100), "scale": ()}
"""Arrays that are packed, one that stands by itself, and a scalar."""
DECAYS = [0.0, 0.5, 0.9, 0.999, 1.0]
UPDATES = 120


def is_shape(x):
    return isinstance(x, tuple)


def draws(count, seed=0, dtype=np.float64, shapes=SHAPES):
    """Trees of normal numbers, which drift so that their averages are not near zero."""
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda shape, n=n: (rng.normal(size=shape) + 0.01 * n).astype(dtype), shapes, is_leaf=is_shape)
        for n in range(count)
    ]


def tensor(x):
    """A NumPy array as a tensor of the same dtype, bfloat16 included."""
    x = np.asarray(x)
    return torch.tensor(x.astype(np.float32)).bfloat16() if x.dtype == jnp.bfloat16 else torch.tensor(x)


def numpy(x):
    """A tensor as a NumPy array."""
    return x.detach().float().numpy() if x.dtype == torch.bfloat16 else x.detach().numpy()


def module_of(tree, is_buffer=lambda name: False):
    """A torch model whose names are the dotted paths of a tree of dicts."""
    module = torch.nn.Module()
    for name, value in tree.items():
        if isinstance(value, dict):
            module.add_module(name, module_of(value, is_buffer))
        elif is_buffer(name):
            module.register_buffer(name, tensor(value))
        else:
            module.register_parameter(name, torch.nn.Parameter(tensor(value)))
    return module


def named(tree):
    """The arrays of a tree of dicts by dotted path."""
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def averaged_by_us(trees, **options):
    """Our average of trees, as a dict by dotted path."""
    averaged = AveragedModel(trees[0], **options)
    for tree in trees:
        averaged.update_parameters(tree)
    assert int(averaged.n_averaged) == len(trees)
    return {name: np.asarray(x) for name, x in named(averaged.module).items()}


assert_close = functools.partial(chex.assert_trees_all_close, rtol=0.0)
"""Without a relative tolerance where none is given."""


def snapshot(averaged):
    """Everything that a failed call must not change, as NumPy arrays of our own."""
    return jax.tree.map(lambda x: np.array(x), (averaged.state_dict(), averaged.module))


# Functions that a user may write, in the words that arrays and tensors share.


def weighted(average, param, num_averaged):
    return (average * (num_averaged + 2) + 3 * param) / (num_averaged + 5)


def larger_by_modulus(average, param, num_averaged):
    return average + abs(param - average)


def our_multi(averaged, current, num_averaged):
    norm = sum((x**2).sum() for x in current) ** 0.5
    return [a + (p - a) / (norm + num_averaged) for a, p in zip(averaged, current, strict=True)]


def their_multi(averaged, current, num_averaged):
    for x, new in zip(averaged, our_multi(averaged, current, num_averaged), strict=True):
        x.copy_(new)


def both(kind, name, *args):
    """The same function of torch's and ours, as the options of each side."""
    return tuple({kind: getattr(side, name)(*args)} for side in (swa_utils, theirs))


PAIRS = {
    "default": ({}, {}),
    "swa": both("avg_fn", "get_swa_avg_fn"),
    **{f"ema-{decay}": both("avg_fn", "get_ema_avg_fn", decay) for decay in DECAYS},
    **{f"ema-multi-{decay}": both("multi_avg_fn", "get_ema_multi_avg_fn", decay) for decay in DECAYS},
    "custom": ({"avg_fn": weighted}, {"avg_fn": weighted}),
    "custom-modulus": ({"avg_fn": larger_by_modulus}, {"avg_fn": larger_by_modulus}),
    "custom-multi": ({"multi_avg_fn": our_multi}, {"multi_avg_fn": their_multi}),
}


SPECIAL = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, 3.4e38, 1 / 3], np.float32)


class Net(nn.Module):
    """A network with two layers of batch normalization."""

    momentum: float = 0.99
    second: float = 0.9
    dtype: type = np.float32

    @nn.compact
    def __call__(self, x, train=True):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, use_fast_variance=False)
        x = nn.Dense(5, param_dtype=self.dtype)(x)
        x = norm(momentum=self.momentum, param_dtype=self.dtype)(x)
        x = nn.relu(x)
        x = norm(momentum=self.second, param_dtype=self.dtype)(x)
        return nn.Dense(2, param_dtype=self.dtype)(x)


class TorchNet(torch.nn.Module):
    """The same network with the same names, as far as torch's layers allow."""

    def __init__(self, momentum=0.99, second=0.9):
        super().__init__()
        self.Dense_0, self.Dense_1 = torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)
        self.BatchNorm_0 = torch.nn.BatchNorm1d(5, momentum=1 - momentum)
        self.BatchNorm_1 = torch.nn.BatchNorm1d(5, momentum=1 - second)

    def forward(self, x):
        return self.Dense_1(self.BatchNorm_1(torch.relu(self.BatchNorm_0(self.Dense_0(x)))))

    def fill(self, variables):
        """Take over flax's variables."""
        for name, layer in variables["params"].items():
            module = getattr(self, name)
            weight = layer["kernel"].T if "kernel" in layer else layer["scale"]
            module.weight.data.copy_(tensor(weight))
            module.bias.data.copy_(tensor(layer["bias"]))
        for name, layer in variables["batch_stats"].items():
            getattr(self, name).running_mean.copy_(tensor(layer["mean"]))
            getattr(self, name).running_var.copy_(tensor(layer["var"]))

    def variables(self):
        """The numbers of this network in flax's structure."""
        params, stats = {}, {}
        for name in ("Dense_0", "Dense_1", "BatchNorm_0", "BatchNorm_1"):
            module = getattr(self, name)
            weight = {"kernel": numpy(module.weight).T} if "Dense" in name else {"scale": numpy(module.weight)}
            params[name] = weight | {"bias": numpy(module.bias)}
            if "Batch" in name:
                stats[name] = {"mean": numpy(module.running_mean), "var": numpy(module.running_var)}
        return {"params": params, "batch_stats": stats}


@functools.cache
def variables_of(seed=0, dtype=np.float32):
    """Variables of the network, with random numbers everywhere, as NumPy arrays."""
    shapes = jax.eval_shape(Net().init, jax.random.key(0), jax.ShapeDtypeStruct((4, 3), np.float32))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) ** 2 + 0.1).astype(dtype), shapes)


def bowl(params):
    return sum(jnp.sum((x - 1) ** 2) for x in jax.tree.leaves(params))


def reused(shape, value, dtype=np.float32):
    """A NumPy array at an address at which JAX reads arrays in place."""
    space = np.empty(np.prod(shape) * 4 + 64, np.uint8)
    start = -space.ctypes.data % 64
    array = space[start : start + np.prod(shape) * 4].view(dtype).reshape(shape)
    array[:] = value
    return array


def raising(average, param, num_averaged):
    raise RuntimeError("no average today")


def batches(sizes, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(size, 3)) * 2 + 3).astype(dtype) for size in sizes]
