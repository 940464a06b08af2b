"""Programs compiled for accelerators on a machine that has none, and what they do to their memory.

XLA compiles for a chip that is described to it. The text of the program shows its kernels; nothing is run.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^}]*)\})?")
"""The kind, the bits, the shape and the layout of an array in a type."""
COLLECTIVE = re.compile(r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
"""The type and the operation of an instruction that moves bytes between devices."""
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
"""Operations that are no kernel; the second half of one that is asynchronous is none either."""
PREFETCH = {"copy-start": 0, "slice-start": 1}
"""Operations that move an array between the main and the scratch memory of a TPU, and the place of that array in their
type; no kernels either."""
SMALL = 1024
"""A kernel that moves fewer bytes is a small operation."""


class NotInstalled(RuntimeError):
    """There is no compiler for a chip here; the message says how to get one."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a compiled program costs on each device.

    A kernel that reads or writes a part of a buffer counts with all of it, and one that calls others counts as one.

    Attributes:
        kernels: of its entry computation, and of the bodies of loops.
        small: those of them that move little.
        moved: bytes that kernels read and write in main memory.
        scratch: bytes of memory beside arguments and results.
        held: bytes of arguments, and of results that do not take the place of one.
        collectives: the number of each kind of them.
        sent: bytes of the results of collectives.
        seconds: of the compiler.
    """

    kernels: int = 0
    small: int = 0
    moved: int = 0
    scratch: int = 0
    held: int = 0
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    sent: int = 0
    seconds: float = 0.0


def h100(number: int = 1) -> list[jax.Device]:
    """H100s of one host, on paper. To be called before JAX has made its first array.

    Raises:
        NotInstalled: without the plugin, its compiler, or with those of another version.
    """
    jax.config.update("jax_platforms", "cpu")  # the plugin then asks for no GPU
    try:
        importlib.import_module("jax_plugins.xla_cuda12")
        root = next(iter(importlib.import_module("nvidia.cuda_nvcc").__path__))
        os.environ["PATH"] = os.path.join(root, "bin") + os.pathsep + os.environ["PATH"]
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={root}"
        chip = topologies.get_topology_desc("h100", "cuda", topology=f"1x1x{number}", target_config=H100)
    except (ImportError, NotImplementedError) as error:
        raise NotInstalled(f"The compiler for CUDA is not installed: {error}. Run make accelerators.") from error
    return list(chip.devices)


def tpu(topology: str) -> list[jax.Device]:
    """The chips of a TPU slice such as ``"v5e:2x4"``, on paper. To be called before JAX has made its first array.

    Raises:
        NotInstalled: without libtpu, or with that of another version.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        importlib.import_module("libtpu")
        chips = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise NotInstalled(f"The compiler for TPUs is not installed: {error}. Run make accelerators.") from error
    return list(chips.devices)


def placed(tree: Any, devices: list[jax.Device]) -> Any:
    """The arrays of a tree as descriptions of arrays on devices; all else stays.

    On several devices an array is spread along its first axis, where they divide it, and otherwise on each.
    """
    mesh = Mesh(devices, "chips")

    def description(x: Any) -> Any:
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            return x
        is_spread = bool(x.shape) and x.shape[0] % len(devices) == 0
        sharding = NamedSharding(mesh, PartitionSpec("chips") if is_spread else PartitionSpec())
        weak = getattr(x, "weak_type", False)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=weak)

    return jax.tree.map(description, tree)


def cost(program: jax.stages.Wrapped, devices: list[jax.Device], *args: Any, **kwargs: Any) -> Cost:
    """The cost of a jitted function on devices, for arguments of which only the shapes count."""
    args, kwargs = placed((args, kwargs), devices)
    lowered = program.lower(*args, **kwargs)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    counts = counted(compiled.as_text())
    return dataclasses.replace(counts, scratch=memory.temp_size_in_bytes, held=held, seconds=seconds)


def counted(text: str) -> Cost:
    """Kernels, traffic and collectives of a compiled program, as its text shows them; what is in a loop counts once."""
    moved = _moved(text[text.index("\nENTRY ") :].split("\n}")[0], text)
    moves = COLLECTIVE.findall(text)
    names = [operation for _, operation in moves]
    return Cost(
        kernels=len(moved.kernels),
        small=sum(size < SMALL for size in moved.kernels),
        moved=sum(moved.kernels) + moved.prefetched,
        collectives={name: names.count(name) for name in dict.fromkeys(names)},
        sent=sum(bytes_of(kind) for kind, _ in moves),
    )


class _Moved(NamedTuple):
    """The bytes that each kernel of a computation moves, and those that are fetched ahead of them."""

    kernels: list[int]
    prefetched: int


def _moved(computation: str, text: str) -> _Moved:
    """What a computation of a program moves, with the bodies of its loops."""
    sizes: dict[str, int] = {}
    kernels: list[int] = []
    prefetched = 0
    for line in computation.splitlines():
        if not (found := INSTRUCTION.match(line)):
            continue
        name, kind, operation, operands = found.groups()
        sizes[name] = bytes_of(kind)
        if operation in PREFETCH:
            prefetched += _size(*ARRAY.findall(kind)[PREFETCH[operation]][:3])
        elif operation == "while":
            body = re.search(r"body=(%[\w.-]+)", line)
            inside = _moved(text[text.index(f"\n{body[1]} ") :].split("\n}")[0], text) if body else _Moved([], 0)
            kernels += inside.kernels
            prefetched += inside.prefetched
        elif operation not in FREE and not operation.endswith("-done") and "ConcatBitcast" not in line:
            kernels.append(sizes[name] + sum(sizes.get(x, 0) for x in re.findall(r"%([\w.-]+)", operands)))
    return _Moved(kernels, prefetched)


def bytes_of(kind: str) -> int:
    """The bytes in main memory of all arrays in a type; the layout of those in other memory says ``S``."""
    return sum(_size(*array) for *array, layout in ARRAY.findall(kind) if "S(" not in layout)


def _size(_: str, bits: str, shape: str) -> int:
    """The bytes of an array."""
    return math.prod(map(int, filter(None, shape.split(",")))) * (int(bits) // 8 if bits else 1)
