"""Programs compiled for an H100 on a machine that has none, and what they do to its memory.

XLA compiles for a chip that is described to it. The text of the program shows its kernels; nothing is run.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

INSTALL = """\
The compiler for CUDA is not installed: {reason}
It needs the plugin of this jax and ptxas, but no GPU and none of CUDA's libraries:
    pip install --no-deps jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version} nvidia-cuda-nvcc-cu12"""

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.-]+) = (.+?) ([a-z][\w-]*)\(([^)]*)\)")
"""The name of an instruction, its type, its operation and its operands."""
ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
"""The kind, the bits and the shape of an array in a type."""
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
"""Operations that are no kernel; the second half of one that is asynchronous is none either."""


class NotInstalled(RuntimeError):
    """There is no compiler for CUDA here; the message says how to get one."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Kernels of a program, and the bytes that they read and write.

    A kernel that reads or writes a part of a buffer counts with all of it, and one that calls others counts as one.
    """

    kernels: int = 0
    moved: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.kernels + other.kernels, self.moved + other.moved)


def h100() -> jax.Device:
    """An H100 on paper. To be called before JAX has made its first array.

    Raises:
        NotInstalled: without the plugin, its compiler, or with those of another version.
    """
    jax.config.update("jax_platforms", "cpu")  # the plugin then asks for no GPU
    try:
        importlib.import_module("jax_plugins.xla_cuda12")
        root = next(iter(importlib.import_module("nvidia.cuda_nvcc").__path__))
        os.environ["PATH"] = os.path.join(root, "bin") + os.pathsep + os.environ["PATH"]
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={root}"
        chip = topologies.get_topology_desc("h100", "cuda", topology="1x1x1", target_config=H100)
    except (ImportError, NotImplementedError) as error:
        raise NotInstalled(INSTALL.format(reason=error, version=jax.__version__)) from error
    return chip.devices[0]


def placed(tree: Any, device: jax.Device) -> Any:
    """The arrays of a tree as descriptions of arrays on a device; all else stays."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def description(x: Any) -> Any:
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            return x
        weak = getattr(x, "weak_type", False)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=weak)

    return jax.tree.map(description, tree)


def cost(program: jax.stages.Wrapped, device: jax.Device, *args: Any, **kwargs: Any) -> Cost:
    """Kernels and traffic of a jitted function on a device, for arguments of which only the shapes count."""
    args, kwargs = placed((args, kwargs), device)
    return counted(program.lower(*args, **kwargs).compile().as_text())


def counted(text: str) -> Cost:
    """Kernels and traffic of the entry computation of a compiled program."""
    entry = text[text.index("\nENTRY ") :].split("\n}")[0]
    sizes: dict[str, int] = {}
    kernels = moved = 0
    for name, kind, operation, operands in INSTRUCTION.findall(entry):
        sizes[name] = _bytes(kind)
        if operation not in FREE and not operation.endswith("-done"):
            kernels += 1
            moved += sizes[name] + sum(sizes[operand] for operand in re.findall(r"%([\w.-]+)", operands))
    return Cost(kernels, moved)


def _bytes(kind: str) -> int:
    """The bytes of all arrays in a type."""
    return sum(
        math.prod(map(int, filter(None, shape.split(",")))) * (int(bits) // 8 if bits else 1)
        for _, bits, shape in ARRAY.findall(kind)
    )
