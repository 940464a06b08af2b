"""Time of saving and resuming a run of Adam, against torch.save and orbax: ``make bench``."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import StandardCheckpointer

from contenders import Builders, torch, torch_runs_here
from jaxoptim import checkpoint, optim
from tables import print_tables
from timing import Run

Params = dict[str, jax.Array]


def repeated(task: Callable[[], Any]) -> Run:
    """A task as something to run so many times."""

    def run(steps: int) -> None:
        for _ in range(steps):
            task()

    return run


def trained(params: Params, grads: Params) -> optim.Adam:
    """An optimizer after its first step."""
    optimizer = optim.Adam(params)
    optimizer.step(grads)
    return optimizer


def trained_in_torch(params: Params, grads: Params) -> tuple[Any, Any]:
    """Parameters and their optimizer after its first step."""
    parameters = [torch.nn.Parameter(torch.from_dlpack(x).clone()) for x in params.values()]
    for parameter, grad in zip(parameters, grads.values(), strict=True):
        parameter.grad = torch.from_dlpack(grad)
    optimizer = torch.optim.Adam(parameters)
    optimizer.step()
    return parameters, optimizer


def saving(params: Params, grads: Params, folder: Path) -> Builders:
    """Parameters and optimizer into a file."""

    def ours() -> Run:
        optimizer = trained(params, grads)
        path = folder / "ours.safetensors"
        return repeated(lambda: checkpoint.save(path, {"params": optimizer.params, "opt": optimizer.state_dict()}))

    def orbax() -> Run:
        _, values, state = trained(params, grads).to_functional()
        checkpointer = StandardCheckpointer()

        def save() -> None:
            checkpointer.save(folder / "orbax", {"params": values, "state": state}, force=True)
            checkpointer.wait_until_finished()

        return repeated(save)

    def in_torch() -> Run:
        parameters, optimizer = trained_in_torch(params, grads)
        content = {"params": parameters, "opt": optimizer.state_dict()}
        return repeated(lambda: torch.save(content, folder / "torch.pt"))

    builders = {"jaxoptim.checkpoint": ours, "orbax, to_functional": orbax}
    return builders | ({"torch.save": in_torch} if torch_runs_here() else {})


def resuming(params: Params, grads: Params, folder: Path) -> Builders:
    """An optimizer from a file, up to where it can take its next step."""

    def ours() -> Run:
        optimizer = trained(params, grads)
        path = folder / "ours.safetensors"
        checkpoint.save(path, {"params": optimizer.params, "opt": optimizer.state_dict()})

        def resume() -> None:
            run = checkpoint.load(path)
            new = optim.Adam(run["params"])
            new.load_state_dict(run["opt"])
            jax.block_until_ready(new.state_dict()["state"])

        return repeated(resume)

    def into_torch(load: Callable[[Any], Any]) -> Callable[[], Run]:
        def build() -> Run:
            parameters, optimizer = trained_in_torch(params, grads)
            content = io.BytesIO()
            torch.save({"params": parameters, "opt": optimizer.state_dict()}, content)
            path = folder / "torch.pt"
            path.write_bytes(content.getvalue())
            return repeated(lambda: load(torch.load(path, weights_only=True)))

        return build

    def torch_optimizer(run: Any) -> None:
        torch.optim.Adam(run["params"]).load_state_dict(run["opt"])

    def our_optimizer(run: Any) -> None:
        new = optim.Adam([tensor.detach().numpy() for tensor in run["params"]])
        new.load_state_dict(run["opt"])
        jax.block_until_ready(new.state_dict()["state"])

    builders = {"jaxoptim.checkpoint": ours}
    if torch_runs_here():
        builders["torch.load, into jaxoptim.optim"] = into_torch(our_optimizer)
        builders["torch.load"] = into_torch(torch_optimizer)
    return builders


def in_a_folder(contenders: Callable[[Params, Params, Path], Builders]) -> Callable[[Params, Params], Builders]:
    """Contenders whose files go into a folder that lasts as long as the process."""
    return lambda params, grads: contenders(params, grads, Path(tempfile.mkdtemp(dir=FOLDER.name)))


FOLDER = tempfile.TemporaryDirectory()

if __name__ == "__main__":
    print_tables(__doc__, "run", {"saving": in_a_folder(saving), "resuming": in_a_folder(resuming)})
