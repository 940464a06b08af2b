"""Train on several machines, or on this one as if it were several, with state in parts over the devices of all.

Run ``python examples/multi_host.py`` to start two processes here, over loopback. On machines of your own run on each

    python examples/multi_host.py --coordinator HOST:PORT --processes 2 --index 0

with HOST that of the machine with index 0 and an index of its own. All processes do the same, and process 0 prints what
comes of it. With ``--checkpoint`` all of them save after every epoch, and go on from there if they are started again,
also in another number.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from digits import BATCH_SIZE, OneLineParser, accuracy_of, init_params, load_data, loss_of, shuffled
from jaxoptim import checkpoint, optim

SECONDS = 30
"""When one process dies the others end after so long. JAX would wait for 100, and after an exception for 300."""


def train(epochs: int, path: Path | None) -> None:
    """What every process does."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    if BATCH_SIZE % mesh.size:
        raise SystemExit(f"The {mesh.size} devices do not divide batches of {BATCH_SIZE}.")
    along = NamedSharding(mesh, PartitionSpec("data"))
    data, rng = load_data(), np.random.default_rng(0)
    images, labels = np.asarray(data.train_images), np.asarray(data.train_labels)

    params, done = init_params(rng), 0
    run = checkpoint.load(path) if path is not None and path.exists() else None
    if run is not None:
        params, done = run["params"], run["done"]
    optimizer = optim.AdamW(params, lr=0.01, weight_decay=0.05, mesh=mesh, zero="data")
    if run is not None:
        optimizer.load_state_dict(run["optimizer"])

    share = BATCH_SIZE // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    for epoch in range(epochs):
        batches = shuffled(rng, len(labels))
        if epoch < done:
            continue
        for batch in batches:
            rows = batch[mine]  # a process needs no others
            x, y = (jax.make_array_from_process_local_data(along, part[rows]) for part in (images, labels))
            loss = optimizer.minimize(loss_of, x, y)
        if path is not None:
            everything = {"params": optimizer.params, "optimizer": optimizer.state_dict(), "done": epoch + 1}
            checkpoint.save(path, everything)
        if jax.process_index() == 0:
            print(f"epoch {epoch + 1}: loss {float(loss):.3f}", flush=True)
    accuracy = float(accuracy_of(jax.device_get(optimizer.params), data))
    if jax.process_index() == 0:
        print(f"test accuracy on {mesh.size} devices of {jax.process_count()} processes: {accuracy:.2%}", flush=True)


def start_here(processes: int) -> None:
    """Start the processes on this machine, with the options of this one, and wait for them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--coordinator", address, "--processes", str(processes)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # an accelerator belongs to one process
    started = [subprocess.Popen([*command, "--index", str(index)], env=environment) for index in range(processes)]
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit("A process has failed.")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_epochs(default=15)
    parser.add_argument("--processes", type=int, default=2, help="how many there are (default: 2)")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0 (default: all are started here)")
    parser.add_argument("--index", type=int, help="which of them this one is, from 0")
    parser.add_argument("--checkpoint", type=Path, help="a file on a disk that all of them share")
    arguments = parser.parse_args()
    if arguments.processes < 1 or BATCH_SIZE % arguments.processes:
        parser.error(f"argument --processes: {arguments.processes} does not divide batches of {BATCH_SIZE}")
    if (arguments.coordinator is None) != (arguments.index is None):
        parser.error("--coordinator and --index go together")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.coordinator is None:
        start_here(arguments.processes)
        return
    jax.distributed.initialize(
        arguments.coordinator,
        arguments.processes,
        arguments.index,
        heartbeat_timeout_seconds=SECONDS,
        shutdown_timeout_seconds=SECONDS,
    )
    train(arguments.epochs, arguments.checkpoint)


if __name__ == "__main__":
    main()
